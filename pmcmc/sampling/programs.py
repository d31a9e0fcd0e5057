"""The two compiled programs of a segment: `draw_noise` draws the noise of its steps, `solve_noise` finds its states.

`Engine` compiles both for one set of chains, runs them and reuses their buffers. A `Shape` is what they are compiled
for, a `Segment` is what a run of both returns.
"""

import math
import time
from collections.abc import Callable, Hashable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils

from pmcmc._pytree import Array, PyTree
from pmcmc._xla.compile import BackgroundCompiler, plain_jit, programs_of, tuned_jit
from pmcmc._xla.rewrites import FEW_LANES, in_one_kernel
from pmcmc.chain.state import ChainState
from pmcmc.kernels import Kernel
from pmcmc.kernels.base import near_tie_bound
from pmcmc.random.streams import chain_keys, key_pair, lane_noise
from pmcmc.recurrence import RecurrenceSolver, Solution
from pmcmc.recurrence.sequential import Lanes, Layout
from pmcmc.recurrence.sharding import AllLanes, Steps, lane_sharding, over_devices, over_steps, step_sharding
from pmcmc.target import Target

# Bytes that one solve, and one stretch of sequential sampling, may take for all chains; see `Engine.bytes_per_step`.
SEGMENT_BYTES = 512 * 2**20
SEQUENTIAL_BYTES = 64 * 2**20


class Shape(NamedTuple):
    """What a program is compiled for, besides the kernel and the target.

    The number of steps is an argument of the program if the solver walks, see `LaneSolver`. Other solvers always solve
    for ``capacity`` steps, in one block.

    Attributes:
        num_blocks: P, blocks per chain.
        capacity: Largest number of steps per block.
        devices: Devices that share the work. Empty: the default device.
        by_steps: Whether each device has a part of the steps of every chain; otherwise it has some of the lanes.
    """

    num_blocks: int
    capacity: int
    devices: Sequence[jax.Device] = ()
    by_steps: bool = False

    def layout(self, num_chains: int, block_length: int | Array) -> Layout:
        """Return the layout of ``num_chains`` chains whose blocks all have ``block_length`` steps."""
        return Layout(num_chains, self.num_blocks, self.capacity, block_length, self.num_blocks * block_length)

    @property
    def sharding(self) -> jax.sharding.Sharding | None:
        """Sharding of arrays (lanes, steps, ...); None for the default device."""
        if not self.devices:
            return None
        return step_sharding(self.devices) if self.by_steps else lane_sharding(self.devices)


class Segment(NamedTuple):
    """Result of one solve: the states of a stretch of steps of every chain.

    Attributes:
        solution: The solution; value and aux have leading axes (num_chains * num_blocks, capacity).
        near_ties: Accept decisions within rounding of a tie; shape (num_chains * num_blocks, capacity).
        num_chains: C.
        num_blocks: P, blocks per chain.
        block_length: S, steps of each block; later entries of a lane are undefined.
    """

    solution: Solution
    near_ties: Array
    num_chains: int
    num_blocks: int
    block_length: int

    def chains(self, tree: PyTree) -> PyTree:
        """Return numpy arrays (chains, steps, ...) from arrays (chains * num_blocks, capacity, ...)."""

        def leaf(x: Any) -> np.ndarray:
            lanes = _read(x)[:, : self.block_length]
            return lanes.reshape(self.num_chains, -1, *lanes.shape[2:])

        return jax.tree.map(leaf, tree)


@tuned_jit(static_argnames="shape", donate_argnames="buffer")
def draw_noise(
    target: Target,
    kernel: Kernel,
    chain_keys: Array,
    first_step: Array,
    block_length: Array,
    buffer: PyTree,
    *,
    shape: Shape,
) -> PyTree:
    """Draw the noise of ``num_blocks * block_length`` steps of all chains, laid out as lanes.

    Each device draws the noise of its own lanes, or of its own steps. The program is separate from `solve_noise`,
    because together they took 61 ms instead of 47 on 10^6 MALA steps (docs/decisions/006).

    Args:
        target: Target to sample.
        kernel: Kernel, which draws the noise of a step.
        chain_keys: Keys of the chains; shape (C,).
        first_step: Number of each chain's first step; shape (C,).
        block_length: Steps of each block.
        buffer: Earlier noise of this shape, which is overwritten.
        shape: Shape of the program.

    Returns:
        Noise, leading axes (C * num_blocks, capacity).
    """
    if shape.by_steps:
        axes = jax.tree.map(lambda _: 1, buffer)
        return over_steps(
            shape.devices, partial(_draw_part, target, kernel), (chain_keys, first_step), buffer, axes, shape.capacity
        )
    layout = shape.layout(chain_keys.shape[0], block_length)

    def draw(held: Any, buffer: PyTree) -> PyTree:
        chain, block = jnp.divmod(held.numbers(), shape.num_blocks)
        first = first_step[chain] + block * block_length
        return lane_noise(target, kernel, chain_keys[chain], first, block_length, buffer, shape.capacity)

    if not shape.devices:
        return draw(AllLanes(layout), buffer)
    return over_devices(shape.devices, draw, buffer, jax.tree.map(lambda _: True, buffer), layout)


def _draw_part(target: Target, kernel: Kernel, steps: Steps, whole: tuple[Array, Array], buffer: PyTree) -> PyTree:
    """Draw the noise of the steps that one device has of every chain."""
    chain_keys, first_step = whole
    num_steps = steps.num_own
    first = first_step + steps.numbers()[0]
    return lane_noise(target, kernel, chain_keys, first, jnp.asarray(num_steps), buffer, num_steps)


@tuned_jit(static_argnames="shape", donate_argnames="buffers")
def solve_noise(
    target: Target,
    kernel: Kernel,
    solver: RecurrenceSolver,
    noise: PyTree,
    x0: PyTree,
    first_step: Array,
    block_length: Array,
    guesses: PyTree,
    scale: PyTree,
    buffers: PyTree,
    *,
    shape: Shape,
) -> tuple[Solution, Array]:
    """Solve for the states of all chains under given noise.

    Args:
        target: Target to sample.
        kernel: Kernel that takes the steps.
        solver: Solver of the recurrence.
        noise: Noise from `draw_noise`.
        x0: Unknowns before the first step, leading axis C.
        first_step: Number of each chain's first step; shape (C,).
        block_length: Steps of each block.
        guesses: Bank of unknowns, leading axis N, from which initial guesses are taken; they cannot change the result.
        scale: Spread of each coordinate of an unknown; None if it is not known.
        buffers: (value, aux) of an earlier solution of this shape, which are overwritten; None for solvers that do not
            walk.
        shape: Shape of the program.

    Returns:
        The solution in lanes, and which accept decisions are near ties; shape (C * num_blocks, capacity).
    """
    num_chains = jax.tree.leaves(x0)[0].shape[0]
    num_guesses = jax.tree.leaves(guesses)[0].shape[0]
    arrays = (target, kernel, noise, x0, first_step, block_length, guesses, scale, buffers)

    # All arrays are arguments, because `in_one_kernel` must see every array that the kernel reads.
    def solve(target, kernel, noise, x0, first_step, block_length, guesses, scale, buffers):
        def guess(index):
            # Neighbouring steps get different guesses, and so do equal steps of different chains.
            pick = (jnp.arange(num_chains)[:, None] * 7919 + (first_step[:, None] + index[None]) * 31) % num_guesses
            return jax.tree.map(lambda x: x[pick], guesses)

        transition = kernel.transition(target)
        layout = shape.layout(num_chains, block_length)
        solution = solver.solve_lanes(Lanes(transition, x0, noise, guess, scale, layout, buffers))
        return solution, jnp.abs(solution.aux.margin) <= near_tie_bound(solution.aux)

    if solver.is_sequential and num_chains <= FEW_LANES:
        return in_one_kernel(solve, *arrays)
    return solve(*arrays)


@plain_jit()
def _one_step(target: Target, kernel: Kernel, chain_keys: Array, guesses: PyTree) -> tuple[PyTree, PyTree]:
    """Return noise, and (unknown, info), of a step of one chain; used for their shapes."""
    noise = kernel.sample_noise(key_pair(chain_keys[0]), target)
    return noise, kernel.transition(target)(jax.tree.map(lambda x: x[0], guesses), noise)


@partial(jax.jit, static_argnums=0)
def _new_buffers(shapes: tuple[jax.ShapeDtypeStruct, ...]) -> list[Array]:
    """Return zeros of these shapes."""
    return [jnp.zeros(s.shape, s.dtype) for s in shapes]


def _read(x: Any) -> np.ndarray:
    """Copy an array to the host; the parts of other processes are gathered."""
    if x.is_fully_addressable or x.is_fully_replicated:
        return np.asarray(x)
    return multihost_utils.process_allgather(x, tiled=True)


class Clock(NamedTuple):
    """Seconds that programs took.

    Attributes:
        compile_seconds: Seconds of compilation, as far as they were waited for.
        run_seconds: Seconds in which programs ran.
    """

    compile_seconds: float
    run_seconds: float


class Engine:
    """Compile and run both programs for one set of chains.

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
        self._buffers: dict[Shape, tuple[PyTree, PyTree]] = {}

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
        return _one_step.eval_shape(self.target, self.kernel, self.chain_keys, self.guesses)

    @property
    def record_shapes(self) -> tuple[PyTree, PyTree]:
        """Shapes of the unknown and the info of one step of one chain."""
        return self._step_shapes[1]

    def bytes_per_step(self, solver: RecurrenceSolver) -> int:
        """Return the bytes that a solve holds for each step of all chains.

        They are those of noise, states and info, with states and info counted twice for their copies on the host, and
        of what the solver stores besides (`RecurrenceSolver.numbers_per_step`).
        """
        noise, (x, info) = self._step_shapes
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
        unit = solver.unit if capacity >= 4 * solver.unit else 1
        return Shape(blocks, math.ceil(capacity / unit) * unit, solver.shared_by)

    def _buffer_shapes(self, shape: Shape) -> tuple[PyTree, PyTree]:
        """Return the shapes of the buffers: noise, and (value, aux)."""
        leading = (self.num_chains * shape.num_blocks, shape.capacity)
        widen = lambda s: jax.ShapeDtypeStruct((*leading, *s.shape), s.dtype, sharding=shape.sharding)
        return jax.tree.map(widen, self._step_shapes)

    def _take_buffers(self, shape: Shape) -> tuple[PyTree, PyTree]:
        """Take the buffers of the last segment if it had this shape, otherwise new ones."""
        if shape in self._buffers:
            return self._buffers.pop(shape)
        self._buffers.clear()  # hold the buffers of one shape at a time
        leaves, structure = jax.tree.flatten(self._buffer_shapes(shape))
        # A program's results would get a layout that XLA chooses, for which the programs would be compiled once more.
        if shape.devices:
            return jax.tree.unflatten(structure, [jnp.zeros(s.shape, s.dtype, device=s.sharding) for s in leaves])
        return jax.tree.unflatten(structure, _new_buffers(tuple(leaves)))

    def compile_ahead(self, solver: RecurrenceSolver, shape: Shape) -> None:
        """Start to compile both programs of a solver in the background."""
        self.background.begin(_name(solver, shape), lambda: self._trace(solver, shape))

    def is_ready(self, solver: RecurrenceSolver, shape: Shape) -> bool:
        """Whether the compilation begun by `compile_ahead` has ended; True if none was begun."""
        return self.background.ready(_name(solver, shape))

    def compile_seconds(self, solver: RecurrenceSolver, shape: Shape) -> float | None:
        """Return the seconds that this process took to compile the programs; None if it has not compiled them."""
        return self._notes.get(self._program(solver, shape))

    def _program(self, solver: RecurrenceSolver, shape: Shape) -> Hashable:
        """Return a key of the two programs of this solver, shape, target and kernel."""
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

    def _trace(self, solver: RecurrenceSolver, shape: Shape) -> Callable[[], None]:
        """Trace the programs, and return a function that compiles them without reading the model again."""
        begin = time.perf_counter()
        noise, record = buffers = self._buffer_shapes(shape)
        record = record if solver.walks else None
        number = jax.ShapeDtypeStruct((), jnp.result_type(int))
        numbers = jax.ShapeDtypeStruct((self.num_chains,), jnp.result_type(int))
        x0 = jax.tree.map(lambda g: jax.ShapeDtypeStruct((self.num_chains, *g.shape[1:]), g.dtype), self.guesses)
        programs = [
            _new_buffers.lower(tuple(jax.tree.leaves(buffers))),
            draw_noise.lower(self.target, self.kernel, self.chain_keys, numbers, number, noise, shape=shape),
            solve_noise.lower(
                self.target,
                self.kernel,
                solver,
                noise,
                x0,
                numbers,
                number,
                self.guesses,
                self.scale,
                record,
                shape=shape,
            ),
        ]

        def compile_programs() -> None:
            with ThreadPoolExecutor(len(programs)) as side_by_side:
                list(side_by_side.map(lambda program: program.compile(), programs))
            self._note(solver, shape, time.perf_counter() - begin)

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
        # Wait for a compilation in the background, and prepare the arguments.
        waited = self.background.wait(_name(solver, shape))
        integer = jnp.result_type(int)
        first, length = np.asarray(self.origin + first_step, integer), np.asarray(block_length, integer)
        noise, record = self._take_buffers(shape)
        record = record if solver.walks else None
        # Draw the noise, then solve; both programs overwrite the buffers.
        noise, drawing = draw_noise.timed(self.target, self.kernel, self.chain_keys, first, length, noise, shape=shape)
        (solution, near_ties), solving = solve_noise.timed(
            self.target, self.kernel, solver, noise, x0, first, length, self.guesses, self.scale, record, shape=shape
        )
        # Keep the results as buffers of the next segment, and account for the time.
        if record is not None:
            self._buffers[shape] = (noise, (solution.value, solution.aux))
        clock = Clock(waited + drawing[0] + solving[0], drawing[1] + solving[1])
        self._note(solver, shape, clock.compile_seconds)
        self.clock = Clock(*(a + b for a, b in zip(self.clock, clock, strict=True)))
        return Segment(solution, near_ties, self.num_chains, shape.num_blocks, block_length), clock


def _name(solver: RecurrenceSolver, shape: Shape) -> tuple:
    """Return the key of a solver's programs in this engine; it does not depend on the solver's numbers."""
    return jax.tree.structure(solver), shape
