"""Affine recursions ``e[t] = A[t] e[t-1] + b[t]``, e[0] = 0, by an associative scan, and by a loop as its reference.

The composition of two affine maps is affine: ``(A2, b2) o (A1, b1) = (A2 A1, A2 b1 + b2)``. This operator is
associative, so all prefixes take O(log T) parallel rounds (Blelloch 1990). With b of shape ``(T, D)``, A is

| structure | shape of A | entry |
|---|---|---|
| dense | ``(T, D, D)`` | A[t, i, j] |
| diagonal | ``(T, D)`` | products are elementwise |
| 2x2 blocks of diagonals | ``(T, 2, 2, D/2)`` | A[t, p, q, i] maps entry i of half q to entry i of half p |

Products keep their structure, so diagonal and block scans need O(T D) memory. `affine_scan` is the parallel form,
`affine_scan_sequential` the plain loop, and `running` computes prefixes under other operators.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp

from pmcmc._pytree import Array, PyTree
from pmcmc.recurrence.sharding import Steps


def compose(second: Array, first: Array, vector_ndim: int) -> Array:
    """Product ``A2 A1`` of two structured matrices that act on arrays with ``vector_ndim`` axes."""
    extra = second.ndim - vector_ndim
    if extra == 0:
        return second * first
    if extra == 1:
        return second @ first
    # [a b; c d] of diagonals, written out: a batched 2x2 matrix product would be slower than elementwise products
    rows = [
        [second[..., p, 0, :] * first[..., 0, q, :] + second[..., p, 1, :] * first[..., 1, q, :] for q in range(2)]
        for p in range(2)
    ]
    return jnp.stack([jnp.stack(row, -2) for row in rows], -3)


def apply_affine(a: Array, e: Array) -> Array:
    """Product ``A e`` of a dense, diagonal or block A, distinguished by their shapes."""
    extra = a.ndim - e.ndim
    if extra == 0:
        return a * e
    if extra == 1:
        return jnp.einsum("...ij,...j->...i", a, e)
    upper, lower = jnp.split(e, 2, axis=-1)
    halves = [a[..., p, 0, :] * upper + a[..., p, 1, :] * lower for p in range(2)]
    return jnp.concatenate(halves, axis=-1)


def affine_operator(first, second):
    """Compose ``(A2, b2) o (A1, b1)``, the associative operator for all three structures."""
    (a1, b1), (a2, b2) = first, second
    return compose(a2, a1, b1.ndim), apply_affine(a2, b1) + b2


def affine_scan(steps: Steps, a: Array, b: Array, reverse: bool = False) -> Array:
    """Compute all e[t], shape ``(T, D)``, in O(log T) rounds.

    Args:
        steps: Steps of the path, on one device or several.
        a: A[t], in one of the three structures.
        b: b[t], shape ``(T, D)``.
        reverse: Run ``e[t] = A[t] e[t+1] + b[t]`` from the end of the path instead.
    """
    return steps.scan(affine_operator, (a, b), reverse)[1]


def affine_scan_sequential(a: Array, b: Array, reverse: bool = False) -> Array:
    """Compute `affine_scan` by a loop over t, as its reference."""

    def body(e, ab):
        e = apply_affine(ab[0], e) + ab[1]
        return e, e

    return jax.lax.scan(body, jnp.zeros_like(b[0]), (a, b), reverse=reverse)[1]


# Consecutive elements that `running` combines sequentially; the rows of this length are processed side by side.
ROW = 64


def running(steps: Steps, operator: Callable, elements: PyTree, identity: PyTree) -> PyTree:
    """Compute all prefixes of the elements under an associative operator, on the steps of this device.

    The path is cut into rows. The elements of a row are combined sequentially, all rows side by side; then the totals
    of rows and of devices.

    Args:
        steps: Steps of the path, on one device or several.
        operator: ``(first, second) -> combined``, associative.
        elements: Pytree with leading axis own steps.
        identity: The operator's identity, one number per leaf.

    Returns:
        Prefixes, with the shapes of ``elements``.
    """
    length = steps.num_own
    rows = -(-length // ROW)

    def cut(x, one):
        x = jnp.concatenate([x, jnp.full((rows * ROW - length, *x.shape[1:]), one, x.dtype)])
        return jnp.moveaxis(x.reshape(rows, ROW, *x.shape[1:]), 1, 0)

    def along(carry, element):
        carry = operator(carry, element)
        return carry, carry

    # Prefixes within each row.
    neutral = lambda like: jax.tree.map(lambda x, one: jnp.full_like(x, one), like, identity)
    elements = jax.tree.map(cut, elements, identity)
    first = neutral(jax.tree.map(lambda x: x[0], elements))
    totals, within = jax.lax.scan(along, first, elements)  # (rows, ...), (ROW, rows, ...)
    # What comes before each row: earlier rows of this device, and all steps of earlier devices.
    total, before = jax.lax.scan(
        lambda carry, row: (operator(carry, row), carry), jax.tree.map(lambda x: x[0], first), totals
    )
    devices = steps.before(operator, total, identity)
    wide = jax.tree.map(lambda x, like: jnp.broadcast_to(x, like.shape), devices, before)
    before = operator(wide, before)
    joined = operator(jax.tree.map(lambda x, like: jnp.broadcast_to(x, like.shape), before, within), within)
    return jax.tree.map(lambda x: jnp.moveaxis(x, 0, 1).reshape(rows * ROW, *x.shape[2:])[:length], joined)
