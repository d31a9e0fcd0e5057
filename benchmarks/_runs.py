"""Chains of a case in programs of the engine's: in order, in blocks, in blocks without repair, as separate chains."""

import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks._harness import program_bytes
from benchmarks.targets import Case
from pmcmc._typing import PyTree
from pmcmc._xla.background import num_cores
from pmcmc.recurrence import MultipleShooting, Sequential
from pmcmc.recurrence.lanes import LaneSolver
from pmcmc.sampling.programs import Clock, Engine, Segment, Shape, solve_noise

NUM_STATES = 64
# With fewer cores than this a second compilation only slows the first.
MANY_CORES = 8


def solve_program(engine: Engine, solver: LaneSolver, shape: Shape) -> Any:
    """The compiled program that solves; noise, states and info are among its arguments."""
    noise, record = engine._buffer_shapes(shape)
    integer = jnp.result_type(int)
    number, numbers = np.asarray(0, integer), np.zeros(engine.num_chains, integer)
    x0 = jax.tree.map(lambda g: jax.ShapeDtypeStruct((engine.num_chains, *g.shape[1:]), g.dtype), engine.guesses)
    arguments = (engine.target, engine.kernel, solver, noise, x0, numbers, number, engine.guesses, engine.scale, record)
    return solve_noise.lower(*arguments, shape=shape).compile()


@dataclass
class Run:
    """Chains of a case under one solver, noise included; runs again in the same program.

    num_steps: of each chain, rounded up to whole blocks.
    """

    case: Case
    bank: PyTree  # unknowns: starts of chains and guesses of block starts
    solver: LaneSolver
    num_steps: int
    num_chains: int = 1

    @cached_property
    def engine(self) -> Engine:
        keys = jax.random.split(jax.random.key(0), self.num_chains)
        return Engine(self.case.target, self.case.kernel, keys, self.bank, self.case.scale)

    @cached_property
    def shape(self) -> Shape:
        """As `pmcmc.sample` would have it."""
        blocks = self.solver.blocks_for(self.num_steps)
        unit = self.solver.unit if self.num_steps >= 4 * self.solver.unit * blocks else 1
        return Shape(blocks, -(-self.num_steps // (blocks * unit)) * unit, self.solver.shared_by)

    def __call__(self, solver: LaneSolver | None = None, block_length: int | None = None) -> tuple[Segment, Clock]:
        """solver: of the same program, with other numbers. block_length: fewer steps."""
        engine, numbers = self.engine, np.zeros(self.num_chains, int)
        x0 = jax.tree.map(lambda x: x[jnp.arange(self.num_chains) % len(x)], self.bank)
        return engine.solve(solver or self.solver, self.shape, x0, numbers, block_length or self.shape.capacity)

    def seconds(self, solver: LaneSolver | None = None, block_length: int | None = None) -> float:
        """By the engine's own clock: looking its programs up takes some 50 ms a call."""
        return self(solver, block_length)[1].run_seconds

    def bytes_per_draw(self) -> float:
        """Of noise, states, info and whatever the program takes beside them."""
        states = self.num_chains * self.shape.num_blocks * self.shape.capacity
        return sum(program_bytes(solve_program(self.engine, self.solver, self.shape)).values()) / states


def in_order(case: Case, bank: PyTree, num_chains: int = 1, num_steps: int | None = None) -> Run:
    """Sequential sampling; of many chains, as lanes of one program."""
    return Run(case, bank, Sequential(), num_steps or case.length, num_chains)


def in_blocks(case: Case, bank: PyTree, num_blocks: int, num_chains: int = 1, **options: Any) -> Run:
    """Multiple shooting. The budget of sweeps is a number, so that `without_repair` is the same program."""
    solver = MultipleShooting(num_blocks=num_blocks, max_sweeps=np.int32(num_blocks), **options)
    return Run(case, bank, solver, case.length, num_chains)


def without_repair(run: Run) -> LaneSolver:
    """The zeroth sweep alone: its blocks as if they were independent chains."""
    return MultipleShooting(run.shape.num_blocks, max_sweeps=np.int32(0), devices=run.solver.shared_by or None)


def compile_all(runs: list[Run]) -> list[float]:
    """Seconds that each run's programs take to compile, at once where there are cores enough."""
    jobs = []
    for run in runs:
        begin = time.perf_counter()
        jobs.append((run.engine._trace(run.solver, run.shape), time.perf_counter() - begin))
    with ThreadPoolExecutor(len(jobs) if num_cores() >= MANY_CORES else 1) as pool:
        return list(pool.map(lambda job: job[1] + _seconds(job[0]), jobs))


def _seconds(job: Callable[[], None]) -> float:
    begin = time.perf_counter()
    job()
    return time.perf_counter() - begin


def typical_states(case: Case) -> PyTree:
    """What warm-up would hand over: starts, or the last states of an ensemble of chains from there."""
    starts = case.start(jax.random.key(1), NUM_STATES)
    if not case.settle:
        return starts
    run = in_order(case, starts, NUM_STATES, case.settle)
    segment, _ = run()
    return jax.tree.map(lambda x: jnp.asarray(x[:, -1]), segment.chains(segment.solution.value))
