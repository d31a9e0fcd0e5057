"""The engine of a run: compiles the programs of a segment for one set of chains, runs them, reuses their buffers.

Threads share the work of a CPU's cores: groups of chains, or parts of the lanes of all chains (docs/decisions/031). A
`Segment` is what a run of the programs returns.
"""

import math
import time
from collections.abc import Callable, Hashable
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils

from pmcmc._pytree import Array, PyTree
from pmcmc._xla import default_platform
from pmcmc._xla.compile import BackgroundCompiler, Job, num_cores, programs_of
from pmcmc._xla.rewrites import FEW_LANES
from pmcmc.chain.state import ChainState
from pmcmc.kernels import Kernel
from pmcmc.random.streams import chain_keys, some_keys
from pmcmc.recurrence import RecurrenceSolver, Solution, Stats
from pmcmc.sampling.parts import InParts
from pmcmc.sampling.programs import (
    BRIEF_OPERATIONS,
    Shape,
    draw_noise,
    draws_noise,
    new_buffers,
    one_step,
    operations_of,
    solve_noise,
)
from pmcmc.sampling.threads import AtOnce, Clock
from pmcmc.target import Target

# Bytes that one solve, and one stretch of sequential sampling, may take for all chains; see `Engine.bytes_per_step`.
SEGMENT_BYTES = 512 * 2**20
SEQUENTIAL_BYTES = 64 * 2**20
# Sequential chains are split into groups of at least this many: two threads of two took as long as one kernel of four.
FEWEST_TOGETHER = 4
# A thread solves at most this many groups of sequential chains one after the other: a call takes some milliseconds.
MOST_CALLS = 4
# Programs that were compiled quickly are compiled anew for a run of this many times the operations of a brief one.
MUCH_LONGER = 4
# Length of a path for which memory matters, by which blocks are counted where their number depends on the length.
MANY_STEPS = 10**6


class Segment(NamedTuple):
    """Result of one solve: the states of a stretch of steps of every chain.

    Attributes:
        result: `RESULTS` code of each chain; shape (C,).
        residual: Residual of each chain; shape (C,).
        stats: `Stats` of each chain.
        paths: Unknowns, infos and near ties (accept decisions within rounding of a tie) of all lanes, in one or more
            pieces with leading axes (lanes, capacity).
        num_blocks: P, blocks per chain.
        block_length: S, steps of each block; later entries of a lane are undefined.
    """

    result: np.ndarray
    residual: np.ndarray
    stats: Stats
    paths: list[tuple[PyTree, PyTree, Array]]
    num_blocks: int
    block_length: int

    @classmethod
    def of(
        cls, solutions: list[Solution], paths: list[tuple[PyTree, PyTree, Array]], num_blocks: int, block_length: int
    ) -> "Segment":
        """Return the segment of the solutions of several groups of chains."""
        join = lambda *xs: np.concatenate(list(map(_read, xs)))
        result, residual, stats = jax.tree.map(join, *((s.result, s.residual, s.stats) for s in solutions))
        return cls(result, residual, stats, paths, num_blocks, block_length)

    def chains(self) -> tuple[PyTree, PyTree, np.ndarray]:
        """Return unknowns, infos and near ties as numpy arrays (C, steps, ...)."""

        def leaf(*pieces: Any) -> np.ndarray:
            lanes = [_read(x)[:, : self.block_length] for x in pieces]
            every = lanes[0] if len(lanes) == 1 else np.concatenate(lanes)
            chains = len(self.result)
            return every.reshape(chains, math.prod(every.shape[:2]) // chains, *every.shape[2:])

        return jax.tree.map(leaf, *self.paths)


def _read(x: Any) -> np.ndarray:
    """Copy an array to the host; the parts of other processes are gathered."""
    if x.is_fully_addressable or x.is_fully_replicated:
        return np.asarray(x)
    return multihost_utils.process_allgather(x, tiled=True)


class Engine:
    """Compile and run the programs of segments for one set of chains.

    Buffers are reused: the next segment overwrites a segment. For ahead-of-time compilation the arrays may be shapes.

    Args:
        target: Target to sample.
        kernel: The tuned kernel.
        chain_keys: Keys of the chains; shape (C,).
        guesses: A bank of unknowns from which initial guesses are taken, leading axis N.
        scale: Spread of each coordinate of an unknown; None if it is not known.
        background: Compiles programs that are not needed yet. None: a new one.
        origin: Steps that the chains took before; step 0 of this engine draws the noise of the step with this number.

    Attributes:
        max_bytes: Bytes that one solve may hold; `SEGMENT_BYTES` at first.
        clock: Seconds of all programs so far.
    """

    def __init__(
        self,
        target: Target,
        kernel: Kernel,
        chain_keys: Array,
        guesses: PyTree,
        scale: PyTree,
        background: BackgroundCompiler | None = None,
        origin: int = 0,
    ):
        self.target, self.kernel, self.chain_keys = target, kernel, chain_keys
        self.guesses, self.scale, self.background = guesses, scale, background or BackgroundCompiler()
        self.origin = origin
        self.max_bytes = SEGMENT_BYTES
        self.clock = Clock(0.0, 0.0)
        self._buffers: dict[Shape, list[tuple[PyTree, PyTree]]] = {}
        self._brief: set[int] = set()  # lengths of runs whose programs are compiled quickly

    @classmethod
    def of(cls, state: ChainState, background: BackgroundCompiler | None = None) -> "Engine":
        """Return an engine for the steps that follow ``state``, which may hold shapes only."""
        keys = chain_keys(state.rng_key, num_chains=len(state.own))
        return cls(state.target, state.kernel, keys, state.ensemble, state.scale, background, state.num_steps)

    @classmethod
    def of_one_chain(cls, state: ChainState, number: int) -> tuple["Engine", PyTree]:
        """Return an engine for one chain, from its first step on, and the unknown before that step; shape (1, ...)."""
        some = slice(number, number + 1)
        keys = chain_keys(state.rng_key, num_chains=len(state.own))[some]
        x0 = jax.tree.map(lambda x: jnp.asarray(np.asarray(x)[state.own[some]]), state.ensemble)
        return cls(state.target, state.kernel, keys, state.ensemble, state.scale), x0

    def bind(self, state: ChainState) -> None:
        """Replace the engine's shapes by the arrays of ``state``, which have these shapes."""
        self.target, self.kernel, self.origin = state.target, state.kernel, state.num_steps
        self.chain_keys = chain_keys(state.rng_key, num_chains=len(state.own))
        self.guesses, self.scale = state.ensemble, state.scale

    @property
    def num_chains(self) -> int:
        """C, the number of chains."""
        return len(self.chain_keys)

    @property
    def _step_shapes(self) -> tuple[PyTree, PyTree]:
        """Shapes of one step of one chain: noise, and (unknown, info)."""
        return one_step.eval_shape(self.target, self.kernel, self.chain_keys, self.guesses)

    @property
    def record_shapes(self) -> tuple[PyTree, PyTree]:
        """Shapes of the unknown and the info of one step of one chain."""
        return self._step_shapes[1]

    def bytes_per_step(self, solver: RecurrenceSolver) -> int:
        """Return the bytes that a solve holds for each step of all chains.

        They are those of noise, unless the solve draws it, of states and info, counted twice for their copies on the
        host, and of what the solver stores besides (`RecurrenceSolver.numbers_per_step`).
        """
        noise, (x, info) = self._step_shapes
        if self.draws_noise(solver, self.num_chains * solver.blocks_for(MANY_STEPS)):
            noise = None
        dim = sum(math.prod(s.shape) for s in jax.tree.leaves(x))
        held = solver.numbers_per_step(dim) * max(s.dtype.itemsize for s in jax.tree.leaves(x))
        leaves = jax.tree.leaves((noise, x, x, info, info))
        return self.num_chains * (held + sum(math.prod(s.shape) * s.dtype.itemsize for s in leaves))

    def shape_for(self, solver: RecurrenceSolver, num_steps: int) -> Shape:
        """Return the shape for segments of ``num_steps`` steps, or of equal parts of them that fit into the budget.

        The budget is `max_bytes`; one stretch of sequential sampling uses at most `SEQUENTIAL_BYTES`.
        """
        budget = self.max_bytes
        if solver.is_sequential:
            budget = min(budget, SEQUENTIAL_BYTES)
        pieces = math.ceil(num_steps * self.bytes_per_step(solver) / budget)
        length = math.ceil(num_steps / pieces)
        if not solver.walks:
            shares = max(1, len(solver.shared_by))
            return Shape(1, shares * math.ceil(length / shares), solver.shared_by, by_steps=bool(solver.shared_by))
        blocks = solver.blocks_for(length)
        capacity = math.ceil(length / blocks)
        brief = self._is_brief(num_steps)
        # A few more steps in whole chunks take less time than a loop of single ones, which on a GPU is all launches.
        unit = solver.unit if capacity >= (4 if default_platform() == "cpu" else 1) * solver.unit else 1
        shape = Shape(blocks, math.ceil(capacity / unit) * unit, solver.shared_by, brief=brief)
        if solver.shared_by:
            return shape
        groups, parts = self.threads(blocks, solver.in_parts)
        shape = shape._replace(num_groups=groups, num_parts=parts)
        return shape._replace(draws=self.draws_noise(solver, self.num_chains * blocks // shape.num_threads))

    def _is_brief(self, num_steps: int) -> bool:
        """Whether programs that take this many steps of all chains run for a shorter time than they take to compile.

        Warm-up finds the number of leapfrog steps after programs were compiled for a guess of it; they stay as they are
        unless their runs are `MUCH_LONGER`.
        """
        operations = operations_of(self.target, self.kernel, self.chain_keys, self.guesses, num_steps)
        if operations <= BRIEF_OPERATIONS:
            self._brief.add(num_steps)
        return num_steps in self._brief and operations <= MUCH_LONGER * BRIEF_OPERATIONS

    def draws_noise(self, solver: RecurrenceSolver, num_lanes: int) -> bool:
        """Whether a solve in this many lanes draws its noise as it needs it."""
        if not solver.draws_inputs or solver.shared_by:
            return False
        return draws_noise(self.target, self.kernel, self.chain_keys, num_lanes)

    def threads(self, num_blocks: int, in_parts: bool = True) -> tuple[int, int]:
        """Return how threads share the work: the number of groups of chains, and that of parts of all lanes.

        Chains in blocks form as many equal groups as there are cores. If their number does not allow as many as there
        could be equal parts of the lanes, there are parts. Either has more than `FEW_LANES` lanes: fewer are not
        stepped with lanes last. Groups of sequential chains have `FEWEST_TOGETHER` to `FEW_LANES` chains if that is
        possible: more are not one kernel. Of many groups the calls would take longer. On other platforms than CPUs
        there are neither.

        Args:
            num_blocks: P, blocks per chain; 1 for sequential sampling.
            in_parts: Whether the solver can be called for parts.
        """
        if default_platform() != "cpu":
            return 1, 1
        cores, chains = num_cores(), self.num_chains
        if num_blocks > 1:
            lanes = chains * num_blocks
            equal = [n for n in range(1, cores + 1) if lanes % n == 0 and lanes // n > FEW_LANES]
            parts = max((n for n in equal if in_parts or chains % n == 0), default=1)
            return (parts, 1) if chains % parts == 0 else (1, parts)
        sizes = {n: chains // n for n in range(1, chains + 1) if chains % n == 0}
        small = [n for n in sizes if FEWEST_TOGETHER <= sizes[n] <= FEW_LANES and n <= MOST_CALLS * cores]
        return min(small, key=lambda n: (math.ceil(n / cores) * sizes[n], n), default=1), 1

    def _buffer_shapes(self, shape: Shape) -> tuple[PyTree, PyTree]:
        """Return the shapes of the buffers of a group or part: noise, None if the solve draws it, and (value, aux)."""
        leading = (self.num_chains * shape.num_blocks // shape.num_threads, shape.capacity)
        widen = lambda s: jax.ShapeDtypeStruct((*leading, *s.shape), s.dtype, sharding=shape.sharding)
        noise, record = self._step_shapes
        return jax.tree.map(widen, (None if shape.draws else noise, record))

    def _take_buffers(self, shape: Shape) -> list[tuple[PyTree, PyTree]]:
        """Take the buffers of the last segment if it had this shape, otherwise new ones, for each group or part."""
        if shape in self._buffers:
            return self._buffers.pop(shape)
        self._buffers.clear()  # hold the buffers of one shape at a time
        leaves, structure = jax.tree.flatten(self._buffer_shapes(shape))
        # A program's results would get a layout that XLA chooses, for which the programs would be compiled once more.
        if shape.devices:
            return [jax.tree.unflatten(structure, [jnp.zeros(s.shape, s.dtype, device=s.sharding) for s in leaves])]
        return [jax.tree.unflatten(structure, new_buffers(tuple(leaves))) for _ in range(shape.num_threads)]

    def compile_ahead(self, solver: RecurrenceSolver, shape: Shape) -> None:
        """Start to compile the programs of a solver in the background, unless an earlier run is still doing so."""
        name, running, program = _name(solver, shape), self._running, self._program(solver, shape)
        if (job := running.get(program)) is not None:
            self.background.adopt(name, job)
            return
        running[program] = job = self.background.begin(name, lambda: self._trace(solver, shape))
        job.future.add_done_callback(lambda _: running.pop(program, None))

    def is_ready(self, solver: RecurrenceSolver, shape: Shape) -> bool:
        """Whether the compilation begun by `compile_ahead` has ended; True if none was begun."""
        return self.background.ready(_name(solver, shape))

    def is_compiling(self, solver: RecurrenceSolver, shape: Shape) -> bool:
        """Whether these programs are being compiled, or are about to be, for this run or an earlier one."""
        return self._program(solver, shape) in self._running

    def compile_seconds(self, solver: RecurrenceSolver, shape: Shape) -> float | None:
        """Return the seconds that this process took to compile the programs; None if it has not compiled them."""
        return self._notes.get(self._program(solver, shape))

    def _program(self, solver: RecurrenceSolver, shape: Shape) -> Hashable:
        """Return a key of the programs of this solver, shape, target and kernel."""
        leaves, structure = jax.tree.flatten((self.target, self.kernel))
        # Data of other shapes needs another program.
        shapes = tuple((jnp.shape(x), jnp.result_type(x)) for x in leaves)
        return _name(solver, shape), structure, shapes, self.num_chains

    def _note(self, solver: RecurrenceSolver, shape: Shape, seconds: float) -> None:
        """Record the seconds of compilation. Only the first record counts, since later calls find the programs."""
        self._notes.setdefault(self._program(solver, shape), seconds)

    @property
    def _notes(self) -> dict[Hashable, float]:
        """Seconds that each program of this target took to compile, for plans; dropped together with the programs."""
        return programs_of(self.target).setdefault("seconds", {})

    @property
    def _running(self) -> dict[Hashable, Job]:
        """The compilations of this target's programs that have not ended."""
        return programs_of(self.target).setdefault("running", {})

    def _trace(self, solver: RecurrenceSolver, shape: Shape) -> Callable[[], None]:
        """Trace the programs, and return a function that compiles them without reading the model again."""
        begin = time.perf_counter()
        noise, record = buffers = self._buffer_shapes(shape)
        record = record if solver.walks else None
        number, some = jax.ShapeDtypeStruct((), jnp.result_type(int)), self.num_chains // shape.num_groups
        numbers = jax.ShapeDtypeStruct((some,), jnp.result_type(int))
        x0 = jax.tree.map(lambda g: jax.ShapeDtypeStruct((some, *g.shape[1:]), g.dtype), self.guesses)
        keys, model = self._keys(shape, 0), (self.target, self.kernel)
        programs = [new_buffers.lower(tuple(jax.tree.leaves(buffers)))]
        if not shape.draws:
            stretch = (keys, numbers, number, number, noise)
            programs.append(draw_noise.lower(*model, *stretch, shape=shape, brief=shape.brief))
        source = keys if shape.draws else noise
        if shape.num_parts > 1:
            programs += self._in_parts(solver, shape, x0, numbers, number).lower(source, record)
        else:
            arrays = (source, x0, numbers, numbers, number, self.guesses, self.scale, record)
            programs.append(solve_noise.lower(*model, solver, *arrays, shape=shape, brief=shape.brief))

        def compile_programs() -> None:
            with ThreadPoolExecutor(len(programs)) as side_by_side:
                list(side_by_side.map(lambda program: program.compile(), programs))
            known = [getattr(program, "seconds", 0.0) for program in programs]  # those that were loaded from disk
            self._note(solver, shape, max(time.perf_counter() - begin, *known))

        return compile_programs

    def solve(
        self, solver: RecurrenceSolver, shape: Shape, x0: PyTree, first_step: np.ndarray, block_length: int
    ) -> tuple[Segment, Clock]:
        """Take ``num_blocks * block_length`` steps of all chains.

        Args:
            solver: Solver of the segment.
            shape: Shape for which the programs are compiled.
            x0: Unknowns before the first step, leading axis C.
            first_step: Number of each chain's first step in this run; shape (C,).
            block_length: Steps of each block.

        Returns:
            The segment, and the seconds that it took. The next segment of this shape overwrites its arrays.
        """
        # Wait for a compilation in the background. Programs that several threads will run are compiled before.
        waited, begin = self.background.wait(_name(solver, shape)), time.perf_counter()
        if shape.num_threads > 1 and self.compile_seconds(solver, shape) is None:
            self._trace(solver, shape)()
            waited += time.perf_counter() - begin
        # Solve.
        integer = jnp.result_type(int)
        first, length = np.asarray(self.origin + first_step, integer), np.asarray(block_length, integer)
        buffers = self._take_buffers(shape)
        with AtOnce(shape.num_threads) as at_once:
            if shape.num_parts > 1:
                begin = time.perf_counter()
                solution, buffers, ties = self._in_parts(solver, shape, x0, first, length).solve(buffers, at_once)
                at_once.count_all(time.perf_counter() - begin)  # hand-overs are part of the run
                solutions = [solution]
                paths = [(value, aux, near) for (_, (value, aux)), near in zip(buffers, ties, strict=True)]
            else:
                group = lambda number: self._solve_group(solver, shape, number, x0, first, length, buffers[number])
                done = at_once(group, range(shape.num_groups))
                solutions = [solution for _, (solution, _) in done]
                paths = [(solution.value, solution.aux, near) for _, (solution, near) in done]
                buffers = [(noise, (solution.value, solution.aux)) for noise, (solution, _) in done]
        # Keep the results as buffers of the next segment, and account for the time.
        if solver.walks:
            self._buffers[shape] = buffers
        clock = at_once.clock.plus(Clock(waited, 0.0))
        self._note(solver, shape, clock.compile_seconds)
        self.clock = self.clock.plus(clock)
        return Segment.of(solutions, paths, shape.num_blocks, block_length), clock

    def _in_parts(self, solver: Any, shape: Shape, x0: PyTree, first: Any, length: Any) -> InParts:
        """Return the solve of a segment whose lanes are shared by threads."""
        arrays = (self.chain_keys, self.guesses, self.scale, x0, first, length)
        return InParts(self.target, self.kernel, solver, shape, *arrays)

    def _solve_group(
        self,
        solver: RecurrenceSolver,
        shape: Shape,
        number: int,
        x0: PyTree,
        first: np.ndarray,
        length: np.ndarray,
        buffers: tuple[PyTree, PyTree],
    ) -> tuple[tuple[PyTree, tuple[Solution, Array]], Clock]:
        """Draw the noise of a group of chains unless the solve does, then solve; the buffers are overwritten.

        Args:
            solver: Solver of the segment.
            shape: Shape for which the programs are compiled.
            number: Number of the group.
            x0: Unknowns of all chains before the first step, leading axis C.
            first: Number of each chain's first step since its start; shape (C,).
            length: Steps of each block.
            buffers: Buffers of the group.

        Returns:
            The noise if it was stored, and the solution and its near ties; and the seconds.
        """
        (noise, record), own, keys = buffers, self._own(shape, number), self._keys(shape, number)
        start = x0 if shape.num_groups == 1 else jax.tree.map(lambda x: np.asarray(x)[own], x0)
        model, clock = (self.target, self.kernel), Clock(0.0, 0.0)
        if not shape.draws:
            stretch = (keys, first[own], length, np.zeros_like(length), noise)
            noise, seconds = draw_noise.timed(*model, *stretch, shape=shape, brief=shape.brief)
            clock = clock.plus(Clock(*seconds))
        source, record = keys if shape.draws else noise, record if solver.walks else None
        numbers = np.arange(self.num_chains, dtype=first.dtype)[own]
        arrays = (source, start, numbers, first[own], length, self.guesses, self.scale, record)
        solved, seconds = solve_noise.timed(*model, solver, *arrays, shape=shape, brief=shape.brief)
        return (noise, solved), clock.plus(Clock(*seconds))

    def _own(self, shape: Shape, number: int) -> slice:
        """Return which chains belong to a group."""
        size = self.num_chains // shape.num_groups
        return slice(number * size, (number + 1) * size)

    def _keys(self, shape: Shape, number: int) -> Array:
        """Return the keys of a group's chains."""
        return self.chain_keys if shape.num_groups == 1 else some_keys(self.chain_keys, self._own(shape, number))


def _name(solver: RecurrenceSolver, shape: Shape) -> tuple:
    """Return the key of a solver's programs in this engine; it does not depend on the solver's numbers."""
    return jax.tree.structure(solver), shape
