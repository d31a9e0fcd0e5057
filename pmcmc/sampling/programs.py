"""Two compiled programs, one that draws the noise of a stretch of steps and one that solves for its states."""

import math
import time
from collections.abc import Callable, Hashable, Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils

from pmcmc._typing import Array, PyTree
from pmcmc._xla.background import BackgroundCompiler
from pmcmc._xla.compile import plain_jit, programs_of, tuned_jit
from pmcmc._xla.fused_loop import FEW_LANES, in_one_kernel
from pmcmc._xla.memory import available_bytes, size_text
from pmcmc.chain.state import ChainState
from pmcmc.kernels import Kernel
from pmcmc.kernels.base import near_tie_bound
from pmcmc.random.streams import chain_keys, step_noise
from pmcmc.random.threefry import key_pair
from pmcmc.recurrence import RecurrenceSolver, Sequential, Solution
from pmcmc.recurrence.lanes import Lanes, Layout
from pmcmc.recurrence.sharding import AllLanes, Steps, lane_sharding, over_devices, over_steps, step_sharding
from pmcmc.sampling.settings import Settings
from pmcmc.target import Target

# Noise is drawn in pieces: as many large ones as fit into what is wanted, this share of the capacity each, then small
# ones of this many steps.
NOISE_PIECE, SMALL_PIECE = 1 / 8, 64
# What one solve may hold at a time, for all chains, and what one stretch of sequential sampling does: see
# `Engine.bytes_per_step`.
SEGMENT_BYTES = 512 * 2**20
SEQUENTIAL_BYTES = 64 * 2**20


class Shape(NamedTuple):
    """What a program is compiled for, beside the kernel and the target.

    Chains of ``num_blocks`` blocks, up to ``capacity`` steps each. How many are wanted is a number: see `LaneSolver`.
    Solvers that do not walk always solve for all of them, in one block.
    """

    num_blocks: int
    capacity: int
    devices: Sequence[jax.Device] = ()  # that share the work; none: the default one
    by_steps: bool = False  # each device has its part of every chain's steps, not some of the lanes

    def layout(self, num_chains: int, block_length: int | Array) -> Layout:
        """Of full blocks."""
        return Layout(num_chains, self.num_blocks, self.capacity, block_length, self.num_blocks * block_length)

    @property
    def sharding(self) -> jax.sharding.Sharding | None:
        """Of arrays (lanes, steps, ...)."""
        if not self.devices:
            return None
        return step_sharding(self.devices) if self.by_steps else lane_sharding(self.devices)


class Segment(NamedTuple):
    """The states of a stretch of steps of every chain, and the solve behind them."""

    solution: Solution  # value and aux: leading axes (chains * num_blocks, capacity)
    near_ties: Array  # (chains * num_blocks, capacity) accept decisions within rounding of a tie
    num_chains: int
    num_blocks: int
    block_length: int

    def chains(self, tree: PyTree) -> PyTree:
        """Numpy arrays (chains, steps, ...) out of ones (chains * num_blocks, capacity, ...)."""

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
    """Noise of ``num_blocks * block_length`` steps of all chains from numbers ``first_step`` on, laid out as lanes.

    Each device draws that of its own lanes, or of its own steps.

    chain_keys: (C,) keys. first_step: (C,). buffer: earlier noise of this shape, overwritten.
    A program of its own: drawn within `solve_noise` it cost 14 of 61 ms on 10^6 MALA steps.
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
        return _draw_lanes(target, kernel, chain_keys[chain], first, block_length, buffer, shape.capacity)

    if not shape.devices:
        return draw(AllLanes(layout), buffer)
    return over_devices(shape.devices, draw, buffer, jax.tree.map(lambda _: True, buffer), layout)


def _draw_part(target: Target, kernel: Kernel, steps: Steps, whole: tuple[Array, Array], buffer: PyTree) -> PyTree:
    """Of every chain, the steps of one device."""
    chain_keys, first_step = whole
    num_steps = steps.num_own
    first = first_step + steps.numbers()[0]
    return _draw_lanes(target, kernel, chain_keys, first, jnp.asarray(num_steps), buffer, num_steps)


def _draw_lanes(
    target: Target,
    kernel: Kernel,
    keys: Array,
    first_step: Array,
    block_length: Array,
    buffer: PyTree,
    capacity: int,
) -> PyTree:
    """The same for some lanes; keys, first_step: (lanes,)."""

    def draw_steps(first: Array, num_steps: int) -> PyTree:
        steps = first_step[:, None] + (first + jnp.arange(num_steps))[None]
        return jax.vmap(partial(step_noise, kernel, target))(keys, steps)

    def run_piece(size: int, start: Array | int, number: Array, noise: PyTree) -> PyTree:
        first = jnp.minimum(start + number * size, capacity - size)
        write = lambda buffer, new: jax.lax.dynamic_update_slice_in_dim(buffer, new, first, 1)
        return jax.tree.map(write, noise, draw_steps(first, size))

    large, small = math.ceil(capacity * NOISE_PIECE), min(capacity, SMALL_PIECE)
    whole = block_length // large if large > small else jnp.zeros_like(block_length)
    buffer = jax.lax.fori_loop(0, whole, partial(run_piece, large, 0), buffer)
    rest = -(-(block_length - whole * large) // small)
    return jax.lax.fori_loop(0, rest, partial(run_piece, small, whole * large), buffer)


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
    """The states of all chains under ``noise`` as lanes, and where their accept decisions are near ties.

    x0: unknowns, leading axis C. first_step: (C,) numbers of the chains' first steps.
    guesses: a bank of unknowns, leading axis N, from which initial guesses are drawn (they cannot change the result).
    buffers: (value, aux) of an earlier solution in this shape, overwritten; None for solvers that do not walk.
    """
    num_chains = jax.tree.leaves(x0)[0].shape[0]
    num_guesses = jax.tree.leaves(guesses)[0].shape[0]
    arrays = (target, kernel, noise, x0, first_step, block_length, guesses, scale, buffers)

    # of all arrays, as in_one_kernel wants it
    def solve(target, kernel, noise, x0, first_step, block_length, guesses, scale, buffers):
        def guess(index):
            # neighbouring steps get different guesses, and so does the same step of different chains
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
    noise = kernel.sample_noise(key_pair(chain_keys[0]), target)
    return noise, kernel.transition(target)(jax.tree.map(lambda x: x[0], guesses), noise)


@partial(jax.jit, static_argnums=0)
def _new_buffers(shapes: tuple[jax.ShapeDtypeStruct, ...]) -> list[Array]:
    return [jnp.zeros(s.shape, s.dtype) for s in shapes]


def _read(x: Any) -> np.ndarray:
    """On the host, of every process where there are several."""
    if x.is_fully_addressable or x.is_fully_replicated:
        return np.asarray(x)
    return multihost_utils.process_allgather(x, tiled=True)


class Clock(NamedTuple):
    """Seconds spent in compiling and in running."""

    compile_seconds: float
    run_seconds: float


class Engine:
    """Runs both programs for one set of chains, and reuses their buffers: a segment is overwritten by the next one.

    guesses: a bank of unknowns. scale: of the unknown, or None where it is not known. Of an engine that is only asked
    to compile, shapes will do. background: where programs are compiled that nobody waits for yet.
    origin: steps that the chains took before; what is step 0 here draws the noise of that number.
    max_bytes: that one solve may hold in place of `SEGMENT_BYTES`; None: that.
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
        self.max_bytes: int | None = None
        self.clock = Clock(0.0, 0.0)
        self._buffers: dict[Shape, tuple[PyTree, PyTree]] = {}

    @classmethod
    def of(cls, state: ChainState, background: BackgroundCompiler | None = None) -> "Engine":
        """Return an engine for the steps that follow ``state``, which may hold shapes only."""
        keys = chain_keys(state.rng_key, num_chains=len(state.own))
        return cls(state.target, state.kernel, keys, state.ensemble, state.scale, background, state.num_steps)

    @classmethod
    def of_one_chain(cls, state: ChainState, number: int) -> tuple["Engine", PyTree]:
        """Return an engine for one of the chains from its first step on, and its unknown before it (1, ...)."""
        some = slice(number, number + 1)
        keys = chain_keys(state.rng_key, num_chains=len(state.own))[some]
        x0 = jax.tree.map(lambda x: jnp.asarray(np.asarray(x)[state.own[some]]), state.ensemble)
        return cls(state.target, state.kernel, keys, state.ensemble, state.scale), x0

    def bind(self, state: ChainState) -> None:
        """Replace shapes by the arrays of ``state``, which has the same ones."""
        self.target, self.kernel, self.origin = state.target, state.kernel, state.num_steps
        self.chain_keys = chain_keys(state.rng_key, num_chains=len(state.own))
        self.guesses, self.scale = state.ensemble, state.scale

    @property
    def num_chains(self) -> int:
        return len(self.chain_keys)

    @property
    def _step_shapes(self) -> tuple[PyTree, PyTree]:
        """Of one step of one chain: noise, and (unknown, info)."""
        return _one_step.eval_shape(self.target, self.kernel, self.chain_keys, self.guesses)

    @property
    def record_shapes(self) -> tuple[PyTree, PyTree]:
        """Unknown and info of one step of one chain."""
        return self._step_shapes[1]

    def bytes_per_step(self, solver: RecurrenceSolver) -> int:
        """Noise, states and info of one step of all chains, the latter two once more for their copies on the host.

        And what the solver holds besides.
        """
        noise, (x, info) = self._step_shapes
        dim = sum(math.prod(s.shape) for s in jax.tree.leaves(x))
        held = solver.numbers_per_step(dim) * max(s.dtype.itemsize for s in jax.tree.leaves(x))
        leaves = jax.tree.leaves((noise, x, x, info, info))
        return self.num_chains * (held + sum(math.prod(s.shape) * s.dtype.itemsize for s in leaves))

    def shape_for(self, solver: RecurrenceSolver, num_steps: int) -> Shape:
        """Programs for ``num_steps`` steps at once, or for an even share of them that fits into memory."""
        budget = SEGMENT_BYTES if self.max_bytes is None else self.max_bytes
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
        """Of noise, and of (value, aux)."""
        leading = (self.num_chains * shape.num_blocks, shape.capacity)
        widen = lambda s: jax.ShapeDtypeStruct((*leading, *s.shape), s.dtype, sharding=shape.sharding)
        return jax.tree.map(widen, self._step_shapes)

    def _take_buffers(self, shape: Shape) -> tuple[PyTree, PyTree]:
        """Those of the last segment of this shape, or new ones."""
        if shape in self._buffers:
            return self._buffers.pop(shape)
        self._buffers.clear()  # one solve's at a time
        leaves, structure = jax.tree.flatten(self._buffer_shapes(shape))
        if shape.devices:  # a program's results would be laid out as it likes, and the programs be compiled once more
            return jax.tree.unflatten(structure, [jnp.zeros(s.shape, s.dtype, device=s.sharding) for s in leaves])
        return jax.tree.unflatten(structure, _new_buffers(tuple(leaves)))

    def compile_ahead(self, solver: RecurrenceSolver, shape: Shape) -> None:
        """Have both programs of a solver compiled while something else is done."""
        self.background.begin(_name(solver, shape), lambda: self._trace(solver, shape))

    def is_ready(self, solver: RecurrenceSolver, shape: Shape) -> bool:
        """Whether nothing is left to wait for of what was begun by `compile_ahead`."""
        return self.background.ready(_name(solver, shape))

    def compile_seconds(self, solver: RecurrenceSolver, shape: Shape) -> float | None:
        """That the programs took when this process compiled them; None where it never did."""
        return self._notes.get(self._program(solver, shape))

    def _program(self, solver: RecurrenceSolver, shape: Shape) -> Hashable:
        leaves, structure = jax.tree.flatten((self.target, self.kernel))
        shapes = tuple(
            (jnp.shape(x), jnp.result_type(x)) for x in leaves
        )  # other data of this model is another program
        return _name(solver, shape), structure, shapes, self.num_chains

    def _note(self, solver: RecurrenceSolver, shape: Shape, seconds: float) -> None:
        """The first time counts: later ones find the programs."""
        self._notes.setdefault(self._program(solver, shape), seconds)

    @property
    def _notes(self) -> dict[Hashable, float]:
        """Seconds that programs of this target took to compile, as long as they are kept: plans need to know."""
        return programs_of(self.target).setdefault("seconds", {})

    def _trace(self, solver: RecurrenceSolver, shape: Shape) -> Callable[[], None]:
        """Trace the programs; returns their compilation, which reads the model no more."""
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
            for program in programs:
                program.compile()
            self._note(solver, shape, time.perf_counter() - begin)

        return compile_programs

    def solve(
        self, solver: RecurrenceSolver, shape: Shape, x0: PyTree, first_step: np.ndarray, block_length: int
    ) -> tuple[Segment, Clock]:
        """``num_blocks * block_length`` steps of all chains from ``x0``, numbered from ``first_step`` (C,) on.

        The segment is overwritten by the next one of this shape: read it first.
        """
        waited = self.background.wait(_name(solver, shape))
        integer = jnp.result_type(int)
        first, length = np.asarray(self.origin + first_step, integer), np.asarray(block_length, integer)
        noise, record = self._take_buffers(shape)
        record = record if solver.walks else None
        noise, drawing = draw_noise.timed(self.target, self.kernel, self.chain_keys, first, length, noise, shape=shape)
        (solution, near_ties), solving = solve_noise.timed(
            self.target, self.kernel, solver, noise, x0, first, length, self.guesses, self.scale, record, shape=shape
        )
        if record is not None:
            self._buffers[shape] = (noise, (solution.value, solution.aux))
        clock = Clock(waited + drawing[0] + solving[0], drawing[1] + solving[1])
        self._note(solver, shape, clock.compile_seconds)
        self.clock = Clock(*(a + b for a, b in zip(self.clock, clock, strict=True)))
        return Segment(solution, near_ties, self.num_chains, shape.num_blocks, block_length), clock


def _name(solver: RecurrenceSolver, shape: Shape) -> tuple:
    return jax.tree.structure(solver), shape


# A solve for fewer steps at once is all overhead; sequential sampling takes them in such pieces.
LEAST_STEPS = Sequential.unit
_REMEDY = "Keep fewer draws by thinning=, write them to disk by Chain.stream, or sample fewer chains at a time."


def fit_memory(engine: Engine, settings: Settings, held: int) -> None:
    """Give an engine its share of the memory, or raise where that holds nothing to speak of.

    engine: of shapes, if there is no more yet. held: bytes of what is kept of all chains, which share the user's
    budget with the engine. Without one it has `SEGMENT_BYTES`, and both share what is available.

    Raises:
        MemoryError: how much is needed and there, and what to do.
    """
    num_steps, most, available = settings.num_samples, settings.max_memory, available_bytes()
    step = engine.bytes_per_step(settings.solver or Sequential())
    least = held + step * min(num_steps, LEAST_STEPS)
    if most is not None:
        if least > most:
            raise MemoryError(
                f"max_memory is {size_text(most)}, and the least is {size_text(least)}: {size_text(held)} for draws, "
                f"the rest for {LEAST_STEPS} steps of {engine.num_chains} chain(s) at once. {_REMEDY}"
            )
        engine.max_bytes = most - held
    needed = max(least, held + min(num_steps * step, engine.max_bytes or SEGMENT_BYTES))
    if needed > available:
        raise MemoryError(
            f"{num_steps:,} steps of {engine.num_chains} chain(s) need about {size_text(needed)}, {size_text(held)} of "
            f"it for draws, and {size_text(available)} are available. {_REMEDY}"
        )
