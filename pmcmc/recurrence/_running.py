"""Running totals of a few numbers a step: quickly compiled, where an associative scan is one program for each level.

Rows of `ROW` steps are run through at once, then their totals one after the other: ``ROW + T / ROW`` steps in sequence.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp

from pmcmc._types import PyTree
from pmcmc.recurrence._steps import Steps

ROW = 64


def running(steps: Steps, operator: Callable, elements: PyTree, identity: PyTree) -> PyTree:
    """All prefixes of elements (own steps, ...) under an associative operator with this identity."""
    length = steps.num_own
    rows = -(-length // ROW)

    def cut(x, one):
        x = jnp.concatenate([x, jnp.full((rows * ROW - length, *x.shape[1:]), one, x.dtype)])
        return jnp.moveaxis(x.reshape(rows, ROW, *x.shape[1:]), 1, 0)

    def along(carry, element):
        carry = operator(carry, element)
        return carry, carry

    neutral = lambda like: jax.tree.map(lambda x, one: jnp.full_like(x, one), like, identity)
    elements = jax.tree.map(cut, elements, identity)
    first = neutral(jax.tree.map(lambda x: x[0], elements))
    totals, within = jax.lax.scan(along, first, elements)  # (rows, ...), (ROW, rows, ...)
    total, before = jax.lax.scan(
        lambda carry, row: (operator(carry, row), carry), jax.tree.map(lambda x: x[0], first), totals
    )
    devices = steps.before(operator, total, identity)
    wide = jax.tree.map(lambda x, like: jnp.broadcast_to(x, like.shape), devices, before)
    before = operator(wide, before)
    joined = operator(jax.tree.map(lambda x, like: jnp.broadcast_to(x, like.shape), before, within), within)
    return jax.tree.map(lambda x: jnp.moveaxis(x, 0, 1).reshape(rows * ROW, *x.shape[2:])[:length], joined)
