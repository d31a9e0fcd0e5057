"""The compiled programs of a segment: `draw_noise` draws the noise of its steps, `solve_noise` finds its states.

Blocks on a CPU need the second program only: they draw the noise of a step where they take it, see `draws_noise`. A
`Shape` is what the programs are compiled for. `pmcmc.sampling.engine.Engine` runs them.
"""

from collections.abc import Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from pmcmc._pytree import Array, PyTree
from pmcmc._xla.compile import plain_jit, tuned_jit
from pmcmc._xla.rewrites import FEW_LANES, in_one_kernel, is_straight
from pmcmc.kernels import Kernel
from pmcmc.kernels.base import near_tie_bound
from pmcmc.random.streams import key_pair, lane_noise, numbered_noise
from pmcmc.recurrence import RecurrenceSolver, Solution
from pmcmc.recurrence.abreast import prefers_lanes_last
from pmcmc.recurrence.drawn import Drawn
from pmcmc.recurrence.sequential import Lanes, Layout, Stored
from pmcmc.recurrence.sharding import AllLanes, Steps, lane_sharding, over_devices, over_steps, step_sharding
from pmcmc.target import Target


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
        draws: Whether the solve draws the noise as it needs it, instead of reading it from memory.
    """

    num_blocks: int
    capacity: int
    devices: Sequence[jax.Device] = ()
    by_steps: bool = False
    num_groups: int = 1
    draws: bool = False

    def layout(self, num_chains: int, block_length: int | Array) -> Layout:
        """Return the layout of ``num_chains`` chains whose blocks all have ``block_length`` steps."""
        return Layout(num_chains, self.num_blocks, self.capacity, block_length, self.num_blocks * block_length)

    @property
    def sharding(self) -> jax.sharding.Sharding | None:
        """Sharding of arrays (lanes, steps, ...); None for the default device."""
        if not self.devices:
            return None
        return step_sharding(self.devices) if self.by_steps else lane_sharding(self.devices)


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
        chain, first = _first_of_lanes(held, first_step)
        return lane_noise(target, kernel, chain_keys[chain], first, block_length, buffer, shape.capacity)

    if not shape.devices:
        return draw(AllLanes(layout), buffer)
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


@tuned_jit(static_argnames="shape", donate_argnames="buffers")
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
    num_guesses = jax.tree.leaves(guesses)[0].shape[0]
    arrays = (target, kernel, noise, x0, numbers, first_step, block_length, guesses, scale, buffers)

    # All arrays are arguments, because `in_one_kernel` must see every array that the kernel reads.
    def solve(target, kernel, noise, x0, numbers, first_step, block_length, guesses, scale, buffers):
        def guess(index):
            # Neighbouring steps get different guesses, and so do equal steps of different chains.
            pick = (numbers[:, None] * 7919 + (first_step[:, None] + index[None]) * 31) % num_guesses
            return jax.tree.map(lambda x: x[pick], guesses)

        transition = kernel.transition(target)
        layout = shape.layout(len(numbers), block_length)
        inputs = _drawn(target, kernel, noise, first_step, layout) if shape.draws else Stored(noise)
        solution = solver.solve_lanes(Lanes(transition, x0, inputs, guess, scale, layout, buffers))
        return solution, jnp.abs(solution.aux.margin) <= near_tie_bound(solution.aux)

    if solver.is_sequential and len(numbers) <= FEW_LANES:
        return in_one_kernel(solve, *arrays)
    return solve(*arrays)


def _drawn(target: Target, kernel: Kernel, chain_keys: Array, first_step: Array, layout: Layout) -> Drawn:
    """Return the noise of all lanes as inputs that are drawn where they are needed."""
    chain, first = _first_of_lanes(AllLanes(layout), first_step)
    draw = lambda lane, step: numbered_noise(kernel, target, lane[0], lane[1] + step)
    return Drawn(draw, (jax.vmap(key_pair)(chain_keys)[chain].T, first))


def draws_noise(target: Target, kernel: Kernel, chain_keys: Array, num_lanes: int) -> bool:
    """Whether a solve in this many lanes draws its noise, for solvers that can (`RecurrenceSolver.draws_inputs`).

    It does where lanes are stepped with lanes last, all are at the same step, and the noise has no loops: others take
    longer in many small pieces than in one large one (docs/decisions/035).
    """
    if not prefers_lanes_last(num_lanes) or kernel.transition(target).staged is not None:
        return False
    return is_straight(one_noise.program(target, kernel, chain_keys))


@plain_jit()
def one_noise(target: Target, kernel: Kernel, chain_keys: Array) -> PyTree:
    """Return the noise of a step of one chain; used for its shapes and its operations."""
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
