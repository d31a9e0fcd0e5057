"""The compiled programs of a segment: `draw_noise` draws the noise of its steps, `solve_noise` finds its states.
`solve_part` takes the place of `solve_noise` where threads solve parts of the lanes.

Blocks on a CPU need the second program only: they draw the noise of a step where they take it, see `draws_noise`. A
`Shape` is what the programs are compiled for. `pmcmc.sampling.engine.Engine` runs them.
"""

from collections.abc import Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from pmcmc._pytree import Array, PyTree
from pmcmc._xla.compile import plain_jit, tuned_jit
from pmcmc._xla.content import count_operations
from pmcmc._xla.rewrites import FEW_LANES, gains_from_lanes, in_one_kernel, is_straight
from pmcmc.kernels import Info, Kernel
from pmcmc.kernels.base import near_tie_bound
from pmcmc.random.streams import key_pair, lane_noise, numbered_noise, raw_keys_are_threefry
from pmcmc.recurrence import MultipleShooting, RecurrenceSolver, Solution
from pmcmc.recurrence.abreast import prefers_lanes_last
from pmcmc.recurrence.drawn import Drawn
from pmcmc.recurrence.sequential import Inputs, Lanes, Layout, Stored
from pmcmc.recurrence.sharding import (
    AllLanes,
    PartOfLanes,
    Steps,
    lane_sharding,
    over_devices,
    over_steps,
    step_sharding,
)
from pmcmc.recurrence.shooting.parts import Call, Part, call_part
from pmcmc.target import Target

# Operations up to which a run is brief: about a second on one core. A step of HMC or NUTS, whose loops have an unknown
# number of rounds, is taken to have a few leapfrog steps. Noise counts more than once, because programs that were
# compiled quickly take up to 5 times as long for it.
BRIEF_OPERATIONS, LEAPFROGS, NOISE = 2**33, 4, 8


class Shape(NamedTuple):
    """What a program is compiled for, besides the kernel and the target.

    The number of steps is an argument of the program if the solver walks, see `LaneSolver`. Other solvers always solve
    for ``capacity`` steps, in one block.

    Attributes:
        num_blocks: P, blocks per chain.
        capacity: Largest number of steps per block.
        devices: Devices that share the work. Empty: the default device.
        by_steps: Whether each device has a part of the steps of every chain; otherwise it has some of the lanes.
        num_groups: Groups of chains, equally large, that are solved at once, each by a thread. The programs are those
            of one group.
        num_parts: Parts of the lanes of all chains, equally large, that are solved at once, each by a thread, and hand
            over to the next one. The programs are those of one part. 1 if there are several groups.
        draws: Whether the solve draws the noise as it needs it, instead of reading it from memory.
        brief: Whether compilation takes longer than the run; False for solvers that do not walk.
    """

    num_blocks: int
    capacity: int
    devices: Sequence[jax.Device] = ()
    by_steps: bool = False
    num_groups: int = 1
    num_parts: int = 1
    draws: bool = False
    brief: bool = False

    @property
    def num_threads(self) -> int:
        """Number of groups or parts."""
        return self.num_groups * self.num_parts

    def layout(self, num_chains: int, block_length: int | Array) -> Layout:
        """Return the layout of ``num_chains`` chains whose blocks all have ``block_length`` steps."""
        return Layout(num_chains, self.num_blocks, self.capacity, block_length, self.num_blocks * block_length)

    @property
    def sharding(self) -> jax.sharding.Sharding | None:
        """Sharding of arrays (lanes, steps, ...); None for the default device."""
        if not self.devices:
            return None
        return step_sharding(self.devices) if self.by_steps else lane_sharding(self.devices)


@tuned_jit(donated="buffer")
def draw_noise(
    target: Target,
    kernel: Kernel,
    chain_keys: Array,
    first_step: Array,
    block_length: Array,
    part: Array,
    buffer: PyTree,
    *,
    shape: Shape,
) -> PyTree:
    """Draw the noise of ``num_blocks * block_length`` steps of all chains, laid out as lanes.

    Each device draws the noise of its own lanes, or of its own steps; each part that of its own lanes. The program is
    separate from `solve_noise`, because together they took 61 ms instead of 47 on 10^6 MALA steps (docs/decisions/006).

    Args:
        target: Target to sample.
        kernel: Kernel, which draws the noise of a step.
        chain_keys: Keys of the chains; shape (C,).
        first_step: Number of each chain's first step; shape (C,).
        block_length: Steps of each block.
        part: Number of the part.
        buffer: Earlier noise of this shape, which is overwritten.
        shape: Shape of the program.

    Returns:
        Noise, leading axes (own lanes, capacity).
    """
    if shape.by_steps:
        axes = jax.tree.map(lambda _: 1, buffer)
        return over_steps(
            shape.devices, partial(_draw_part, target, kernel), (chain_keys, first_step), buffer, axes, shape.capacity
        )
    layout = shape.layout(chain_keys.shape[0], block_length)

    def draw(held: Any, buffer: PyTree) -> PyTree:
        chain, first = _first_of_lanes(held, first_step)
        return lane_noise(target, kernel, chain_keys[chain], first, block_length, buffer, shape.capacity)

    if not shape.devices:
        return draw(PartOfLanes(layout, shape.num_parts, part), buffer)
    return over_devices(shape.devices, draw, buffer, jax.tree.map(lambda _: True, buffer), layout)


def _first_of_lanes(held: Any, first_step: Array) -> tuple[Array, Array]:
    """Return for each own lane its chain, and the number of its first step."""
    layout = held.layout
    chain, block = jnp.divmod(held.numbers(), layout.num_blocks)
    return chain, first_step[chain] + block * layout.block_length


def _draw_part(target: Target, kernel: Kernel, steps: Steps, whole: tuple[Array, Array], buffer: PyTree) -> PyTree:
    """Draw the noise of the steps that one device has of every chain."""
    chain_keys, first_step = whole
    num_steps = steps.num_own
    first = first_step + steps.numbers()[0]
    return lane_noise(target, kernel, chain_keys, first, jnp.asarray(num_steps), buffer, num_steps)


@tuned_jit(donated="buffers")
def solve_noise(
    target: Target,
    kernel: Kernel,
    solver: RecurrenceSolver,
    noise: PyTree,
    x0: PyTree,
    numbers: Array,
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
        noise: Noise from `draw_noise`; if the shape says that the solve draws it, the keys of the chains, (C,).
        x0: Unknowns before the first step, leading axis C.
        numbers: Numbers of the chains among all chains; shape (C,).
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
    arrays = (target, kernel, noise, x0, numbers, first_step, block_length, guesses, scale, buffers)

    # All arrays are arguments, because `in_one_kernel` must see every array that the kernel reads.
    def solve(target, kernel, noise, x0, numbers, first_step, block_length, guesses, scale, buffers):
        guess = partial(_guess, guesses, numbers, first_step)
        layout = shape.layout(len(numbers), block_length)
        inputs = _inputs(target, kernel, noise, first_step, AllLanes(layout), shape)
        solution = solver.solve_lanes(Lanes(kernel.transition(target), x0, inputs, guess, scale, layout, buffers))
        return solution, _near_ties(solution.aux)

    if solver.is_sequential and len(numbers) <= FEW_LANES:
        return in_one_kernel(solve, *arrays)
    return solve(*arrays)


@tuned_jit(donated="buffers")
def solve_part(
    target: Target,
    kernel: Kernel,
    solver: MultipleShooting,
    noise: PyTree,
    x0: PyTree,
    first_step: Array,
    block_length: Array,
    guesses: PyTree,
    scale: PyTree,
    number: Array,
    what: Call,
    before: PyTree,
    part: Part,
    buffers: PyTree,
    *,
    shape: Shape,
) -> tuple[PyTree, PyTree, Array, Part]:
    """Advance one part of the lanes of all chains; see `pmcmc.recurrence.shooting.parts`.

    Args:
        target: Target to sample.
        kernel: Kernel that takes the steps.
        solver: Solver of the recurrence.
        noise: Noise of the part's lanes from `draw_noise`; if the shape says that the solve draws it, the keys of the
            chains, (C,).
        x0: Unknowns before the first step of all chains, leading axis C.
        first_step: Number of each chain's first step; shape (C,).
        block_length: Steps of each block.
        guesses: Bank of unknowns, leading axis N, from which initial guesses are taken; they cannot change the result.
        scale: Spread of each coordinate of an unknown; None if it is not known.
        number: Number of the part.
        what: What to do.
        before: What the part before hands over.
        part: State of the part.
        buffers: (value, aux) of the part's lanes, which are overwritten.
        shape: Shape of the program.

    Returns:
        Value, aux and near ties of the part's lanes, and its state. Near ties are counted like finite states.
    """
    layout = shape.layout(len(first_step), block_length)
    guess = partial(_guess, guesses, jnp.arange(len(first_step)), first_step)
    inputs = _inputs(target, kernel, noise, first_step, PartOfLanes(layout, shape.num_parts, number), shape)
    lanes = Lanes(kernel.transition(target), x0, inputs, guess, scale, layout, buffers)
    value, aux, part = call_part(solver, lanes, number, shape.num_parts, what, before, part)
    none = jnp.zeros(aux.margin.shape, bool)
    ties = jax.lax.fori_loop(0, jnp.where(what.fill, 0, 1), lambda _, none: _near_ties(aux), none)
    return value, aux, ties, part


def _guess(guesses: PyTree, numbers: Array, first_step: Array, index: Array) -> PyTree:
    """Return guesses of some steps of some chains, leading axes (C, steps).

    Neighbouring steps get different guesses, and so do equal steps of different chains.
    """
    num_guesses = jax.tree.leaves(guesses)[0].shape[0]
    pick = (numbers[:, None] * 7919 + (first_step[:, None] + index[None]) * 31) % num_guesses
    return jax.tree.map(lambda x: x[pick], guesses)


def _near_ties(aux: Info) -> Array:
    """Return which accept decisions are near ties; the shape of the margins."""
    return jnp.abs(aux.margin) <= near_tie_bound(aux)


@plain_jit()
def one_carry(target: Target, kernel: Kernel, chain_keys: Array, guesses: PyTree) -> PyTree:
    """Return the carry after a step of one chain; used for its shape."""
    recurrence = kernel.transition(target)
    noise = _noise(target, kernel, chain_keys)
    return recurrence.step(recurrence.restore(jax.tree.map(lambda x: x[0], guesses)), noise)[0]


def _inputs(target: Target, kernel: Kernel, noise: PyTree, first_step: Array, held: Any, shape: Shape) -> Inputs:
    """Return the noise as inputs of the own lanes: stored, or drawn where it is needed."""
    if not shape.draws:
        return Stored(noise)
    chain, first = _first_of_lanes(held, first_step)
    draw = lambda lane, step: numbered_noise(kernel, target, lane[0], lane[1] + step)
    return Drawn(draw, (jax.vmap(key_pair)(noise)[chain].T, first))


def draws_noise(target: Target, kernel: Kernel, chain_keys: Array, num_lanes: int) -> bool:
    """Whether a solve in this many lanes draws its noise, for solvers that can (`RecurrenceSolver.draws_inputs`).

    It does where lanes are stepped with lanes last, all are at the same step, and the noise has no loops: others take
    longer in many small pieces than in one large one (docs/decisions/035).
    """
    if not prefers_lanes_last(num_lanes) or kernel.transition(target).staged is not None:
        return False
    return one_noise.ask(is_straight, target, kernel, chain_keys)


def operations_of(target: Target, kernel: Kernel, chain_keys: Array, guesses: PyTree, num_steps: int) -> int:
    """Return the arithmetic operations of this many steps of all chains.

    They follow from shapes, and from the number of leapfrog steps where it is known.
    """
    known = getattr(kernel, "num_integration_steps", None)
    rounds = max(LEAPFROGS, int(known)) if isinstance(known, (int, np.integer, np.ndarray, jax.Array)) else LEAPFROGS
    step = one_step.ask(count_operations, target, kernel, chain_keys, guesses, unknown_rounds=rounds)
    noise = one_noise.ask(count_operations, target, kernel, chain_keys)
    return len(chain_keys) * num_steps * (step + NOISE * noise)


def lanes_gain(target: Target, kernel: Kernel, chain_keys: Array, guesses: PyTree) -> bool:
    """Whether a step takes less time per lane in many lanes than in few, by its operations."""
    return one_step.ask(gains_from_lanes, target, kernel, chain_keys, guesses)


@plain_jit()
def one_noise(target: Target, kernel: Kernel, chain_keys: Array) -> PyTree:
    """Return the noise of a step of one chain; used for its shapes and its operations."""
    return _noise(target, kernel, chain_keys)


def _noise(target: Target, kernel: Kernel, chain_keys: Array) -> PyTree:
    """Return noise of one chain, of no step in particular."""
    with raw_keys_are_threefry():
        return kernel.sample_noise(key_pair(chain_keys[0]), target)


@plain_jit()
def one_step(target: Target, kernel: Kernel, chain_keys: Array, guesses: PyTree) -> tuple[PyTree, PyTree]:
    """Return noise, and (unknown, info), of a step of one chain; used for their shapes."""
    noise = one_noise(target, kernel, chain_keys)
    return noise, kernel.transition(target)(jax.tree.map(lambda x: x[0], guesses), noise)


@partial(jax.jit, static_argnums=0)
def new_buffers(shapes: tuple[jax.ShapeDtypeStruct, ...]) -> list[Array]:
    """Return zeros of these shapes."""
    return [jnp.zeros(s.shape, s.dtype) for s in shapes]
