"""One NUTS transition as a flat state machine: every `advance` is one leapfrog step and all the bookkeeping due there.

A trajectory is doubled, forwards or backwards at random, until it turns back on itself. Doubling d adds a subtree of
2^d leaves (states), taken one by one; a state is drawn from the subtree with weights exp(-H) as it grows, and when it
is complete its draw replaces that of the trajectory with probability min(1, ratio of weights). A subtree that turns,
or diverges, is thrown away, and ends the transition.

Loops over leaves and doublings within the transition would make each lane of a batch wait for the slowest in every
one of them, and carry everything through selects; here the only loop is around `advance`, and it need not be one:
lanes may be at different leaves of different transitions. Everything works on one transition, arrays (D,), or on a
batch with the lanes last, (D, L): neighbours in memory, so that sums over coordinates are vectorised too.

U-turns inside a subtree (Phan et al. 2019, appendix A): leaf n ends every balanced subtree of 2, 4, ... leaves that
has n as its last one, as many as n has trailing ones in binary. The first leaf of each is at hand as a checkpoint: an
even leaf n is stored in the row that the number of ones in n / 2 says. Lanes share one loop over the rows that any of
them has to read, a few out of ``max_num_doublings``.

Randomness is that of ``blackjax.nuts`` 1.7: ``key, d -> (direction, leaves, merge)``, ``leaves, n -> leaf``. It is
drawn one step ahead: what is carried from step to step XLA computes once, what is not it hashes anew wherever read.

Sources: Hoffman & Gelman 2014; Betancourt 2017 (multinomial, biased merge); Phan et al. 2019 (iterative); Dance et al.
2025 (state machines for lanes).
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

from pmcmc._typing import Array, PyTree
from pmcmc.kernels.metropolis import GradientState, log_acceptance
from pmcmc.random.distributions import jax_uniforms
from pmcmc.random.threefry import fold_in


class End(NamedTuple):
    """An end of the trajectory; all (D,)."""

    position: Array
    momentum: Array
    gradient: Array


class Draw(NamedTuple):
    """A state drawn from a part of the trajectory. weight: log of the sum of exp(H0 - H) over that part."""

    state: GradientState
    energy: Array
    weight: Array


class Subtree(NamedTuple):
    """The doubling under way.

    num_leaves: so far. momentum_sum: (D,) over them.
    checkpoints, sums: (rows, D) momenta of first leaves, and momentum sums up to the middle of them.
    """

    num_leaves: Array
    momentum_sum: Array
    draw: Draw
    checkpoints: Array
    sums: Array


class Drawn(NamedTuple):
    """Randomness of the next step. direction: of the doubling, 1 or -1. leaf, merge: uniforms that decide on draws."""

    direction: Array
    leaf: Array
    merge: Array


class Tree(NamedTuple):
    """A transition under way.

    key: (2,) words. energy: H0, of its start. front, back: it is extended at its front. heading: 1 or -1, the
    direction in which it was last. depth: doublings ended. num_steps: leapfrog steps. acceptance: sum of
    min(1, exp(H0 - H)) over them.
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


def begin(state: GradientState, momentum: Array, key: Array, max_num_doublings: int) -> Tree:
    """The trajectory of one state, about to be doubled. key: (2,) words."""
    batch, dtype = momentum.shape[1:], momentum.dtype
    zero, real, never = jnp.zeros(batch, int), jnp.zeros(batch, dtype), jnp.zeros(batch, bool)
    energy = kinetic(momentum) - state.logdensity
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


def advance(value_and_grad: Callable, step_size: Array, max_num_doublings: int, tree: Tree) -> Tree:
    """One leapfrog step. Of a finished transition it changes nothing that is read of it."""
    live, drawn = ~tree.finished, tree.drawn
    turned_about = (tree.subtree.num_leaves == 0) & (drawn.direction != tree.heading)
    back = choose(turned_about, tree.front, tree.back)
    front = choose(turned_about, tree.back, tree.front)
    front, logdensity = _leapfrog(value_and_grad, drawn.direction * step_size, front)
    state = GradientState(front.position, logdensity, front.gradient)
    energy = kinetic(front.momentum) - logdensity
    usable = jnp.all(jnp.isfinite(front.gradient), 0)
    weight, diverges = log_acceptance(jnp.where(usable, tree.energy - energy, jnp.nan))
    subtree, turns = _add_leaf(tree.subtree, front.momentum, Draw(state, energy, weight), drawn.leaf)

    broken = diverges | turns
    ended = live & (broken | (subtree.num_leaves == 1 << tree.depth))
    depth = tree.depth + ended
    subtree = subtree._replace(num_leaves=jnp.where(ended | tree.finished, 0, subtree.num_leaves))
    momentum_sum = tree.momentum_sum + choose(ended, subtree.momentum_sum, jnp.zeros_like(subtree.momentum_sum))
    turns_back = _is_turning(back.momentum, front.momentum, momentum_sum - (back.momentum + front.momentum) / 2)
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
    """Leaf-wise ``where`` with a mask over the trailing axes."""
    wide = lambda x: mask.reshape((1,) * (x.ndim - mask.ndim) + mask.shape)
    return jax.tree.map(lambda a, b: jnp.where(wide(a), a, b), on_true, on_false)


def kinetic(momentum: Array) -> Array:
    """``|p|^2 / 2`` of momenta (D, ...)."""
    return 0.5 * jnp.sum(momentum * momentum, 0)


def _is_turning(first: Array, last: Array, between: Array) -> Array:
    """Whether a stretch of the trajectory turns at either end, ``r . rho <= 0`` (Betancourt 2013).

    between: rho, the sum of its momenta with those at its ends counted by half.
    """
    return (jnp.sum(first * between, 0) <= 0) | (jnp.sum(last * between, 0) <= 0)


def _leapfrog(value_and_grad: Callable, step: Array, end: End) -> tuple[End, Array]:
    step = step[None]
    momentum = end.momentum + 0.5 * step * end.gradient
    position = end.position + step * momentum
    logdensity, gradient = value_and_grad(position)
    return End(position, momentum + 0.5 * step * gradient, gradient), logdensity


def _draw_ahead(key: Array, depth: Array, leaf: Array, dtype) -> Drawn:
    """For a leaf of a doubling."""
    key = fold_in(key, depth)
    direction, leaves, merge = (fold_in(key, jnp.full_like(depth, i)) for i in range(3))
    first_uniform = lambda key: jax_uniforms(key, jnp.zeros_like(depth, jnp.uint32), dtype)
    forwards = first_uniform(direction) < 0.5
    return Drawn(jnp.where(forwards, 1, -1).astype(dtype), first_uniform(fold_in(leaves, leaf)), first_uniform(merge))


def _add_leaf(subtree: Subtree, momentum: Array, leaf: Draw, uniform: Array) -> tuple[Subtree, Array]:
    """The subtree with one more leaf, and whether it turns there."""
    number, old = subtree.num_leaves, subtree.draw
    first = number == 0
    momentum_sum = momentum + choose(first, jnp.zeros_like(momentum), subtree.momentum_sum)
    draw = choose(first | (uniform < jax.nn.sigmoid(leaf.weight - old.weight)), leaf, old)
    draw = draw._replace(weight=jnp.where(first, leaf.weight, _log_add(old.weight, leaf.weight)))

    row = jax.lax.population_count(number >> 1)
    lowest = row + 1 - jax.lax.population_count(number & ~(number + 1))  # of the rows due: none for an even leaf
    rows = jnp.arange(subtree.sums.shape[0]).reshape(-1, *(1,) * number.ndim)
    store = ((rows == row[None]) & (number % 2 == 0)[None])[:, None]
    middle = momentum_sum - momentum / 2
    checkpoints = jnp.where(store, momentum[None], subtree.checkpoints)
    sums = jnp.where(store, middle[None], subtree.sums)

    def check(i, turns):
        due = (lowest <= i) & (i <= row)
        return turns | (due & _is_turning(checkpoints[i], momentum, middle - sums[i]))

    turns = jax.lax.fori_loop(jnp.min(lowest), jnp.max(row) + 1, check, jnp.zeros(number.shape, bool))
    return Subtree(number + 1, momentum_sum, draw, checkpoints, sums), turns


def _draw_from_both(old: Draw, new: Draw, uniform: Array, complete: Array) -> Draw:
    """The biased merge of a trajectory's draw with that of a subtree, where that is ``complete``."""
    taken = complete & (uniform < jnp.exp(jnp.minimum(new.weight - old.weight, 0.0)))
    weight = jnp.where(complete, _log_add(old.weight, new.weight), old.weight)
    return choose(taken, new, old)._replace(weight=weight)


def _log_add(a: Array, b: Array) -> Array:
    """``log(exp(a) + exp(b))`` for finite a; XLA's log1p is not vectorised on CPU, and a weight needs it no better."""
    return jnp.maximum(a, b) + jnp.log(1 + jnp.exp(-jnp.abs(a - b)))
