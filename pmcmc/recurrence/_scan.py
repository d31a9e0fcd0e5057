"""Affine recursions ``e[t] = A[t] e[t-1] + b[t]``, e[0] = 0, by associative scan and, as its twin, by a loop.

Composing two affine maps gives an affine map: ``(A2, b2) o (A1, b1) = (A2 A1, A2 b1 + b2)``. The operator is
associative, so all prefixes follow in O(log T) parallel rounds (Blelloch 1990). A is ``(T, D, D)`` (dense) or
``(T, D)`` (diagonal: the products are elementwise).
"""

import jax
import jax.numpy as jnp

from pmcmc._types import Array


def _dense_operator(first, second):
    (a1, b1), (a2, b2) = first, second
    return a2 @ a1, jnp.einsum("...ij,...j->...i", a2, b1) + b2


def _diagonal_operator(first, second):
    (a1, b1), (a2, b2) = first, second
    return a2 * a1, a2 * b1 + b2


def affine_scan(a: Array, b: Array) -> Array:
    """All e[t], shape ``(T, D)``, in O(log T) rounds."""
    operator = _dense_operator if a.ndim == b.ndim + 1 else _diagonal_operator
    return jax.lax.associative_scan(operator, (a, b))[1]


def affine_scan_sequential(a: Array, b: Array) -> Array:
    """The same by a loop over t; the reference for `affine_scan`."""

    def body(e, ab):
        e = apply_affine(ab[0], e) + ab[1]
        return e, e

    return jax.lax.scan(body, jnp.zeros_like(b[0]), (a, b))[1]


def apply_affine(a: Array, e: Array) -> Array:
    """``A e`` for a dense ``(..., D, D)`` or diagonal ``(..., D)`` A."""
    return jnp.einsum("...ij,...j->...i", a, e) if a.ndim == e.ndim + 1 else a * e
