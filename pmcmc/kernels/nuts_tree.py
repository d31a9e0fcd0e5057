"""One NUTS transition as a flat state machine: each `advance` takes one leapfrog step and all bookkeeping due after it.

The trajectory is doubled, forwards or backwards at random, until it turns back on itself. Doubling d adds a subtree of
2^d leaves (states), one by one. As the subtree grows, one of its states is selected with weights exp(-H). When the
subtree is complete, its selection replaces that of the trajectory with probability min(1, ratio of weights). A subtree
that turns back or diverges is discarded and ends the transition.

Why flat: with loops over leaves and doublings inside a transition, each lane of a batch would wait for the slowest lane
in every loop, and all state would pass through selects. Here the only loop is around `advance`, and lanes may be at
different leaves of different transitions. All functions accept one transition, arrays (D,), or a batch with lanes last,
(D, L), where lanes are contiguous in memory, so that sums over coordinates are vectorised too.

U-turns inside a subtree (Phan et al. 2019, appendix A): leaf n is the last leaf of a balanced subtree of 2, 4, ...
leaves, one for each trailing one of n in binary. The first leaf of each of these subtrees was stored as a checkpoint:
an even leaf n is stored in row popcount(n / 2). Lanes share one loop over the rows that any of them has to read, which
are few of the ``max_num_doublings - 1`` rows.

The randomness is that of ``blackjax.nuts`` 1.7: ``key, d -> (direction, leaves, merge)``, ``leaves, n -> leaf``. It is
drawn one step ahead: XLA computes a value carried from step to step once, but would hash again at every place that
reads a value which is not carried.

Source: Hoffman & Gelman (2014); Betancourt (2017) for multinomial weights and the biased combination of draws; Phan et
al. (2019) for the iterative form; Dance et al. (2025) for state machines over lanes.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

from pmcmc._pytree import Array, PyTree
from pmcmc.kernels.metropolis import GradientState, log_acceptance
from pmcmc.random.distributions import jax_uniforms
from pmcmc.random.streams import fold_in


class End(NamedTuple):
    """One end of the trajectory.

    Attributes:
        position: Position; shape (D,).
        momentum: Momentum; shape (D,).
        gradient: Gradient of the log density; shape (D,).
    """

    position: Array
    momentum: Array
    gradient: Array


class Draw(NamedTuple):
    """A state selected from a part of the trajectory.

    Attributes:
        state: The state.
        energy: H of the state.
        weight: Log of the sum of exp(H0 - H) over that part of the trajectory.
    """

    state: GradientState
    energy: Array
    weight: Array


class Subtree(NamedTuple):
    """The doubling in progress.

    Attributes:
        num_leaves: Number of leaves so far.
        momentum_sum: Sum of the momenta of these leaves; shape (D,).
        draw: State selected from these leaves.
        checkpoints: Momenta of stored leaves; shape (rows, D).
        sums: Momentum sums up to the middle of the stored leaves; shape (rows, D).
    """

    num_leaves: Array
    momentum_sum: Array
    draw: Draw
    checkpoints: Array
    sums: Array


class Drawn(NamedTuple):
    """Randomness of the next step.

    Attributes:
        direction: Direction of the doubling, 1 or -1.
        leaf: Uniform that decides whether the next leaf is selected within its subtree.
        merge: Uniform that decides whether the selection of a complete subtree replaces that of the trajectory.
    """

    direction: Array
    leaf: Array
    merge: Array


class Tree(NamedTuple):
    """A transition in progress.

    Attributes:
        key: Raw key; shape (2,).
        drawn: Randomness of the next step.
        energy: H0, the energy of the start.
        front: End of the trajectory that is extended.
        back: The other end.
        heading: Direction of the last doubling, 1 or -1.
        momentum_sum: Sum of the momenta of the trajectory without the doubling in progress; shape (D,).
        draw: State selected from the trajectory.
        subtree: The doubling in progress.
        depth: Number of doublings ended.
        num_steps: Number of leapfrog steps.
        acceptance: Sum of min(1, exp(H0 - H)) over these steps.
        is_divergent: Whether a step diverged.
        finished: Whether the transition has ended.
    """

    key: Array
    drawn: Drawn
    energy: Array
    front: End
    back: End
    heading: Array
    momentum_sum: Array
    draw: Draw
    subtree: Subtree
    depth: Array
    num_steps: Array
    acceptance: Array
    is_divergent: Array
    finished: Array


def begin(velocity: Callable, state: GradientState, momentum: Array, key: Array, max_num_doublings: int) -> Tree:
    """Return the transition at its start, a trajectory of one state.

    Args:
        velocity: Function ``p -> M^{-1} p`` of momenta (D, ...).
        state: Start of the trajectory.
        momentum: Momentum at the start; shape (D,) or (D, L).
        key: Raw key; shape (2,) or (2, L).
        max_num_doublings: Depth of the deepest tree.

    Returns:
        A `Tree` with no leapfrog step taken.
    """
    batch, dtype = momentum.shape[1:], momentum.dtype
    zero, real, never = jnp.zeros(batch, int), jnp.zeros(batch, dtype), jnp.zeros(batch, bool)
    energy = _kinetic(velocity, momentum) - state.logdensity
    end = End(state.position, momentum, state.gradient)
    draw = Draw(state, energy, real)
    rows = jnp.zeros((max(max_num_doublings - 1, 1), *momentum.shape), dtype)
    return Tree(
        key=key,
        drawn=_draw_ahead(key, zero, zero, dtype),
        energy=energy,
        front=end,
        back=end,
        heading=real + 1,
        momentum_sum=momentum,
        draw=draw,
        subtree=Subtree(zero, momentum, draw, rows, rows),
        depth=zero,
        num_steps=zero,
        acceptance=real,
        is_divergent=never,
        finished=never,
    )


def advance(value_and_grad: Callable, velocity: Callable, step_size: Array, max_num_doublings: int, tree: Tree) -> Tree:
    """Take one leapfrog step; a finished transition keeps everything that is read of it.

    Args:
        value_and_grad: Log density and gradient at positions like those of the tree.
        velocity: Function ``p -> M^{-1} p`` of momenta (D, ...).
        step_size: Leapfrog step.
        max_num_doublings: Depth of the deepest tree.
        tree: The transition.

    Returns:
        The transition after the step.
    """
    live, drawn = ~tree.finished, tree.drawn
    # A doubling in the other direction extends the other end.
    turned_about = (tree.subtree.num_leaves == 0) & (drawn.direction != tree.heading)
    back = choose(turned_about, tree.front, tree.back)
    front = choose(turned_about, tree.back, tree.front)
    front, logdensity = _leapfrog(value_and_grad, velocity, drawn.direction * step_size, front)
    state = GradientState(front.position, logdensity, front.gradient)
    energy = _kinetic(velocity, front.momentum) - logdensity
    usable = jnp.all(jnp.isfinite(front.gradient), 0)
    weight, diverges = log_acceptance(jnp.where(usable, tree.energy - energy, jnp.nan))
    subtree, turns = _add_leaf(velocity, tree.subtree, front.momentum, Draw(state, energy, weight), drawn.leaf)

    # The doubling ends if its subtree is complete, turns or diverges.
    broken = diverges | turns
    ended = live & (broken | (subtree.num_leaves == 1 << tree.depth))
    depth = tree.depth + ended
    subtree = subtree._replace(num_leaves=jnp.where(ended | tree.finished, 0, subtree.num_leaves))
    momentum_sum = tree.momentum_sum + choose(ended, subtree.momentum_sum, jnp.zeros_like(subtree.momentum_sum))
    between = momentum_sum - (back.momentum + front.momentum) / 2
    turns_back = _is_turning(velocity, back.momentum, front.momentum, between)
    return Tree(
        key=tree.key,
        drawn=_draw_ahead(tree.key, depth, subtree.num_leaves, energy.dtype),
        energy=tree.energy,
        front=front,
        back=back,
        heading=drawn.direction,
        momentum_sum=momentum_sum,
        draw=_draw_from_both(tree.draw, subtree.draw, drawn.merge, ended & ~broken),
        subtree=subtree,
        depth=depth,
        num_steps=tree.num_steps + live,
        acceptance=tree.acceptance + jnp.where(live, jnp.exp(jnp.minimum(weight, 0.0)), 0.0),
        is_divergent=tree.is_divergent | (live & diverges),
        finished=tree.finished | (ended & (broken | turns_back | (depth == max_num_doublings))),
    )


def choose(mask: Array, on_true: PyTree, on_false: PyTree) -> PyTree:
    """Select leaf by leaf with a mask over the trailing axes."""
    wide = lambda x: mask.reshape((1,) * (x.ndim - mask.ndim) + mask.shape)
    return jax.tree.map(lambda a, b: jnp.where(wide(a), a, b), on_true, on_false)


def _kinetic(velocity: Callable, momentum: Array) -> Array:
    """Return ``p^T M^{-1} p / 2`` of momenta (D, ...)."""
    return 0.5 * jnp.sum(momentum * velocity(momentum), 0)


def _is_turning(velocity: Callable, first: Array, last: Array, between: Array) -> Array:
    """Return whether a part of the trajectory turns at either end, ``r^T M^{-1} rho <= 0`` (Betancourt 2013).

    Args:
        velocity: Function ``p -> M^{-1} p``.
        first: Momentum r at the first state.
        last: Momentum r at the last state.
        between: rho, the sum of the momenta, with those of the first and last state weighted by one half.
    """
    towards = velocity(between)
    return (jnp.sum(first * towards, 0) <= 0) | (jnp.sum(last * towards, 0) <= 0)


def _leapfrog(value_and_grad: Callable, velocity: Callable, step: Array, end: End) -> tuple[End, Array]:
    """Return the end of the trajectory after one leapfrog step, and the log density there."""
    step = step[None]
    momentum = end.momentum + 0.5 * step * end.gradient
    position = end.position + step * velocity(momentum)
    logdensity, gradient = value_and_grad(position)
    return End(position, momentum + 0.5 * step * gradient, gradient), logdensity


def _draw_ahead(key: Array, depth: Array, leaf: Array, dtype) -> Drawn:
    """Return the randomness for leaf ``leaf`` of doubling ``depth``."""
    key = fold_in(key, depth)
    direction, leaves, merge = (fold_in(key, jnp.full_like(depth, i)) for i in range(3))
    first_uniform = lambda key: jax_uniforms(key, jnp.zeros_like(depth, jnp.uint32), dtype)
    forwards = first_uniform(direction) < 0.5
    return Drawn(jnp.where(forwards, 1, -1).astype(dtype), first_uniform(fold_in(leaves, leaf)), first_uniform(merge))


def _add_leaf(
    velocity: Callable, subtree: Subtree, momentum: Array, leaf: Draw, uniform: Array
) -> tuple[Subtree, Array]:
    """Return the subtree with one more leaf, and whether it turns there."""
    number, old = subtree.num_leaves, subtree.draw
    first = number == 0
    momentum_sum = momentum + choose(first, jnp.zeros_like(momentum), subtree.momentum_sum)
    draw = choose(first | (uniform < jax.nn.sigmoid(leaf.weight - old.weight)), leaf, old)
    draw = draw._replace(weight=jnp.where(first, leaf.weight, _log_add(old.weight, leaf.weight)))

    # Rows lowest..row hold the first leaves of the balanced subtrees that end at this leaf.
    row = jax.lax.population_count(number >> 1)
    lowest = row + 1 - jax.lax.population_count(number & ~(number + 1))  # an even leaf ends no subtree
    rows = jnp.arange(subtree.sums.shape[0]).reshape(-1, *(1,) * number.ndim)
    store = ((rows == row[None]) & (number % 2 == 0)[None])[:, None]
    middle = momentum_sum - momentum / 2
    checkpoints = jnp.where(store, momentum[None], subtree.checkpoints)
    sums = jnp.where(store, middle[None], subtree.sums)

    def check(i, turns):
        due = (lowest <= i) & (i <= row)
        return turns | (due & _is_turning(velocity, checkpoints[i], momentum, middle - sums[i]))

    turns = jax.lax.fori_loop(jnp.min(lowest), jnp.max(row) + 1, check, jnp.zeros(number.shape, bool))
    return Subtree(number + 1, momentum_sum, draw, checkpoints, sums), turns


def _draw_from_both(old: Draw, new: Draw, uniform: Array, complete: Array) -> Draw:
    """Combine the selection of a trajectory with that of a subtree where the subtree is ``complete``.

    The combination is biased towards the subtree, which replaces the old selection with probability min(1, ratio of
    weights).
    """
    taken = complete & (uniform < jnp.exp(jnp.minimum(new.weight - old.weight, 0.0)))
    weight = jnp.where(complete, _log_add(old.weight, new.weight), old.weight)
    return choose(taken, new, old)._replace(weight=weight)


def _log_add(a: Array, b: Array) -> Array:
    """Return ``log(exp(a) + exp(b))`` for finite a.

    It uses log instead of log1p, which XLA does not vectorise on CPU; weights do not need the extra accuracy.
    """
    return jnp.maximum(a, b) + jnp.log(1 + jnp.exp(-jnp.abs(a - b)))
