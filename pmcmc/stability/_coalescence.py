"""Do coupled paths merge? Pairs from different starts under common noise."""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from pmcmc._tree import real_dtype, relative_distance, tree_index
from pmcmc._types import Array, PyTree
from pmcmc.recurrence import Recurrence
from pmcmc.recurrence._base import default_tolerance


class Coalescence(NamedTuple):
    """steps: (pairs,) steps until each pair was within the tolerance; max_steps + 1 where it was not.

    distance: (pairs,) last distance, in units of the scale.
    """

    steps: Array
    distance: Array


def coalescence_steps(
    recurrence: Recurrence, first: PyTree, second: PyTree, inputs: PyTree, scale: PyTree
) -> Coalescence:
    """Run pairs of paths under common inputs until every pair has merged, or the inputs end.

    first, second: unknowns, leading axis pairs. inputs: leading axes (max_steps, pairs).
    A pair counts as merged once its distance is within the merge tolerance of `MultipleShooting`.
    """
    max_steps = jax.tree.leaves(inputs)[0].shape[0]
    num_pairs = jax.tree.leaves(first)[0].shape[0]
    dtype = real_dtype(first)
    tol = default_tolerance(dtype)
    step = jax.vmap(recurrence.step)
    both = lambda x: jnp.concatenate([x, x])
    start = jax.tree.map(lambda a, b: jnp.concatenate([a, b]), first, second)

    def body(state):
        t, carry, steps, _ = state
        carry, _ = step(carry, jax.tree.map(both, tree_index(inputs, t)))
        x = jax.vmap(recurrence.unknown)(carry)
        half = lambda i: jax.tree.map(lambda v: v[i * num_pairs : (i + 1) * num_pairs], x)
        distance = relative_distance(half(0), half(1), scale).astype(dtype)
        steps = jnp.where((distance <= tol) & (steps > max_steps), t + 1, steps)
        return t + 1, carry, steps, distance

    begin = (
        jnp.zeros((), int),
        jax.vmap(recurrence.restore)(start),
        jnp.full(num_pairs, max_steps + 1),
        jnp.full(num_pairs, jnp.inf, dtype),
    )
    _, _, steps, distance = jax.lax.while_loop(
        lambda state: (state[0] < max_steps) & jnp.any(state[2] > max_steps), body, begin
    )
    return Coalescence(steps, distance)
