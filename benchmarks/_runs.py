"""Run a case in the engine's programs: sequentially, in blocks, in blocks without repair, or as separate chains."""

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
from pmcmc._pytree import PyTree
from pmcmc._xla.compile import num_cores
from pmcmc.recurrence import MultipleShooting, Sequential
from pmcmc.recurrence.sequential import LaneSolver
from pmcmc.sampling.engine import Engine, Segment
from pmcmc.sampling.programs import Shape, draw_noise, solve_noise
from pmcmc.sampling.threads import Clock

NUM_STATES = 64
# With fewer cores than this, a second compilation only slows the first.
MANY_CORES = 8


def solve_program(engine: Engine, solver: LaneSolver, shape: Shape) -> Any:
    """Compile the program that solves, in one thread; noise, states and info are among its arguments."""
    shape = shape._replace(num_groups=1, num_parts=1)
    noise, record = engine._buffer_shapes(shape)
    source = engine._keys(shape, 0) if shape.draws else noise
    integer = jnp.result_type(int)
    number, numbers = np.asarray(0, integer), np.zeros(engine.num_chains // shape.num_groups, integer)
    x0 = jax.tree.map(lambda g: jax.ShapeDtypeStruct((len(numbers), *g.shape[1:]), g.dtype), engine.guesses)
    rest = (numbers, numbers, number, engine.guesses, engine.scale, record)
    return solve_noise.lower(engine.target, engine.kernel, solver, source, x0, *rest, shape=shape).compile()


@dataclass
class Run:
    """Chains of a case under one solver, noise included; it can be run again in the same program.

    Args:
        case: The case.
        bank: Unknowns: starts of chains and guesses of block starts.
        solver: The solver.
        num_steps: Steps of each chain, rounded up to whole blocks.
        num_chains: Number of chains.
        in_threads: Whether threads share the work where the engine would let them.
    """

    case: Case
    bank: PyTree
    solver: LaneSolver
    num_steps: int
    num_chains: int = 1
    in_threads: bool = True

    @cached_property
    def engine(self) -> Engine:
        """The engine of these chains."""
        keys = jax.random.split(jax.random.key(0), self.num_chains)
        return Engine(self.case.target, self.case.kernel, keys, self.bank, self.case.scale)

    @cached_property
    def shape(self) -> Shape:
        """The shape that `pmcmc.sample` would use."""
        blocks = self.solver.blocks_for(self.num_steps)
        unit = self.solver.unit if self.num_steps >= 4 * self.solver.unit * blocks else 1
        shape = Shape(blocks, -(-self.num_steps // (blocks * unit)) * unit, self.solver.shared_by)
        if shape.devices:
            return shape
        if not self.in_threads:
            return shape._replace(draws=self.engine.draws_noise(self.solver, self.num_chains * blocks))
        groups, parts = self.engine.threads(blocks)
        draws = self.engine.draws_noise(self.solver, self.num_chains * blocks // (groups * parts))
        return shape._replace(num_groups=groups, num_parts=parts, draws=draws)

    def __call__(self, solver: LaneSolver | None = None, block_length: int | None = None) -> tuple[Segment, Clock]:
        """Solve once.

        Args:
            solver: Solver for the same program, with other numbers.
            block_length: Fewer steps than the capacity of a block.
        """
        engine, numbers = self.engine, np.zeros(self.num_chains, int)
        x0 = jax.tree.map(lambda x: x[jnp.arange(self.num_chains) % len(x)], self.bank)
        return engine.solve(solver or self.solver, self.shape, x0, numbers, block_length or self.shape.capacity)

    def seconds(self, solver: LaneSolver | None = None, block_length: int | None = None) -> float:
        """Return the seconds of a solve by the engine's clock: looking up its programs takes about 50 ms per call."""
        return self(solver, block_length)[1].run_seconds

    def bytes_per_draw(self) -> float:
        """Return the bytes per draw of noise, states, info and what the program needs besides them."""
        states = self.num_chains * self.shape.num_blocks * self.shape.capacity
        return sum(program_bytes(solve_program(self.engine, self.solver, self.shape)).values()) / states


def in_order(case: Case, bank: PyTree, num_chains: int = 1, num_steps: int | None = None) -> Run:
    """Sample sequentially; many chains run as lanes of one program."""
    return Run(case, bank, Sequential(), num_steps or case.length, num_chains)


def in_blocks(case: Case, bank: PyTree, num_blocks: int, num_chains: int = 1, **options: Any) -> Run:
    """Sample by multiple shooting. The budget of sweeps is an array, so that `without_repair` uses the same program."""
    solver = MultipleShooting(num_blocks=num_blocks, max_sweeps=np.int32(num_blocks), **options)
    return Run(case, bank, solver, case.length, num_chains)


def without_repair(run: Run) -> LaneSolver:
    """Return a solver for sweep 0 alone, whose blocks cost as much as independent chains."""
    none = np.zeros((), np.int32)  # as a number it would be refused
    return MultipleShooting(run.shape.num_blocks, max_sweeps=none, devices=run.solver.shared_by or None)


def noise_and_steps(run: Run) -> tuple[Callable[[], float], Callable[[], float]]:
    """Return functions that draw the noise alone, and that take the steps without repair under noise drawn before.

    Both return the seconds that a program of the engine took. The noise is stored between them, also where the engine
    would draw it as it is needed, and must be drawn once before the first steps. Everything runs in one thread.
    """
    engine, solver = run.engine, without_repair(run)
    shape = run.shape._replace(num_groups=1, num_parts=1, draws=False)
    integer = jnp.result_type(int)
    first, numbers = np.zeros(run.num_chains, integer), np.arange(run.num_chains, dtype=integer)
    length = np.asarray(shape.capacity, integer)
    x0 = jax.tree.map(lambda x: x[jnp.arange(run.num_chains) % len(x)], run.bank)
    (group,) = engine._take_buffers(shape)
    buffers = list(group)

    def noise() -> float:
        model = engine.target, engine.kernel, engine.chain_keys
        buffers[0], clock = draw_noise.timed(*model, first, length, np.zeros_like(length), buffers[0], shape=shape)
        return clock[1]

    def steps() -> float:
        model, rest = (engine.target, engine.kernel, solver), (length, engine.guesses, engine.scale, buffers[1])
        (solution, _), clock = solve_noise.timed(*model, buffers[0], x0, numbers, first, *rest, shape=shape)
        buffers[1] = solution.value, solution.aux
        return clock[1]

    return noise, steps


def compile_all(runs: list[Run]) -> list[float]:
    """Compile each run's programs and return the seconds; concurrently if there are enough cores."""
    jobs = []
    for run in runs:
        begin = time.perf_counter()
        jobs.append((run.engine._trace(run.solver, run.shape), time.perf_counter() - begin))
    with ThreadPoolExecutor(len(jobs) if num_cores() >= MANY_CORES else 1) as pool:
        return list(pool.map(lambda job: job[1] + _seconds(job[0]), jobs))


def _seconds(job: Callable[[], None]) -> float:
    """Return the seconds that a job takes."""
    begin = time.perf_counter()
    job()
    return time.perf_counter() - begin


def typical_states(case: Case) -> PyTree:
    """Return states like those after warm-up: starts, or the last states of an ensemble of chains from there."""
    starts = case.start(jax.random.key(1), NUM_STATES)
    if not case.settle:
        return starts
    run = in_order(case, starts, NUM_STATES, case.settle)
    segment, _ = run()
    return jax.tree.map(lambda x: jnp.asarray(x[:, -1]), segment.chains()[0])
