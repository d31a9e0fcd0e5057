"""Gains of a Kalman filter and smoother whose means are the trust-region step, by associative scan.

In the increments ``d[t] = x[t] - x_k[t]`` of an iterate x_k, the model of Gonzalez et al. (2024) is

    prior               d[t] = A[t] d[t-1] + r[t] + noise,   noise ~ N(0, I),   d[0] = 0
    pseudo-observation  0    = d[t] + noise,                 noise ~ N(0, I / lambda)

Its covariances do not depend on r, so they come first, and the mean is then one affine recursion:

    P-[t] = A[t] P[t-1] A[t]' + I          predicted covariance, P[0] = 0
    G[t]  = (I + lambda P-[t])^-1          one minus the Kalman gain
    P[t]  = G[t] P-[t]                     filtered covariance, at most I / lambda
    m[t]  = G[t] (A[t] m[t-1] + r[t])      filtered mean

An associative scan gives all P[t] (Sarkka & Garcia-Fernandez 2021, eqs. 10-13). An element (A, C, J) holds the closed
loop from the state before a stretch of steps to the one behind it, the covariance there, and the information that the
stretch carries about the state before it; for one step A[t]/(1+lambda), I/(1+lambda), A[t]'A[t] lambda/(1+lambda).
Two stretches combine, with M = I + C1 J2, as

    A = A2 M^-1 A1,    C = A2 M^-1 C1 A2' + C2,    J = A1' J2 M^-1 A1 + J1

Stability. C is at most I/lambda and J at most A'A, however long the stretch and however unstable the A[t]: nothing
overflows. C and J are symmetrised after each product. The gain is computed anew from P-[t] by Cholesky, of a matrix
that is at least I, so float32 errors of the scan change the step a little and its stability not at all. In the
diagonal case all terms are positive: no cancellation.

Differs from the published code in 1. increments instead of states, so the step is invariant to shifts; 2. gains first,
means by the scan that Newton uses, so lambda = 0 is Newton up to rounding; 3. any of the three structures of A.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from pmcmc._types import Array, Scalar
from pmcmc.recurrence._scan import affine_scan, apply_affine, compose, delayed


class Gains(NamedTuple):
    """What the means need; arrays are in the structure of A."""

    predicted: Array  # P-[t]
    filtered: Array  # P[t]
    shrink: Array  # G[t]


def is_diagonal(a: Array) -> bool:
    """Whether A is given by its diagonals ``(T, D)``, not by matrices ``(T, D, D)``."""
    return a.ndim == 2


def matrices(a: Array) -> Array:
    """Dense ``(T, D, D)`` stays; blocks ``(T, 2, 2, h)`` become a batch of h 2x2 matrices, ``(T, h, 2, 2)``."""
    return jnp.moveaxis(a, -1, 1) if a.ndim == 4 else a


def structured(matrix: Array) -> Array:
    """Inverse of `matrices`."""
    return jnp.moveaxis(matrix, 1, -1) if matrix.ndim == 4 else matrix


def transpose(a: Array) -> Array:
    """A[t]' in the structure of A."""
    if is_diagonal(a):
        return a
    return jnp.swapaxes(a, 1, 2)


def _symmetric(matrix: Array) -> Array:
    return (matrix + jnp.swapaxes(matrix, -1, -2)) / 2


def _diagonal_operator(first, second):
    (a1, c1, j1), (a2, c2, j2) = first, second
    m = 1 + c1 * j2
    return a2 * a1 / m, a2 * a2 * (c1 / m) + c2, a1 * a1 * (j2 / m) + j1


def _dense_operator(first, second):
    (a1, c1, j1), (a2, c2, j2) = first, second
    eye = jnp.broadcast_to(jnp.eye(a1.shape[-1], dtype=a1.dtype), c1.shape)
    solved = jnp.linalg.solve(eye + c1 @ j2, jnp.concatenate([a1, c1], axis=-1))
    from_a, from_c = jnp.split(solved, 2, axis=-1)
    c = a2 @ from_c @ jnp.swapaxes(a2, -1, -2) + c2
    return a2 @ from_a, _symmetric(c), _symmetric(jnp.swapaxes(a1, -1, -2) @ j2 @ from_a + j1)


def _elements(a: Array, strength: Array, eye: Array):
    """One-step elements; d[0] = 0 is known, so nothing before the first step matters to it."""
    gain = strength / (1 + strength)
    information = a * a if is_diagonal(a) else jnp.swapaxes(a, -1, -2) @ a
    behind_first = jnp.ones(a.shape, bool).at[0].set(False)
    return (
        jnp.where(behind_first, a, 0) / (1 + strength),
        eye / (1 + strength),
        jnp.where(behind_first, information, 0) * gain,
    )


def _gain(predicted: Array, strength: Array, eye: Array) -> Array:
    if is_diagonal(predicted):
        return 1 / (1 + strength * predicted)
    factor = jnp.linalg.cholesky(eye + strength * predicted)
    half = jax.scipy.linalg.solve_triangular(factor, eye, lower=True)
    return jnp.swapaxes(half, -1, -2) @ half


def gains(a: Array, strength: Scalar) -> Gains:
    """Covariances and gains of the filter, all t at once, for lambda = ``strength``."""
    lam = jnp.asarray(strength, a.dtype)
    work = matrices(a)
    eye = (
        jnp.ones_like(work) if is_diagonal(a) else jnp.broadcast_to(jnp.eye(work.shape[-1], dtype=a.dtype), work.shape)
    )
    operator = _diagonal_operator if is_diagonal(a) else _dense_operator
    filtered = jax.lax.associative_scan(operator, _elements(work, lam, eye))[1]
    carried = delayed(filtered)
    if is_diagonal(a):
        predicted = work * work * carried + eye
    else:
        predicted = _symmetric(work @ carried @ jnp.swapaxes(work, -1, -2)) + eye
    # Without observations the covariance may overflow and does not matter.
    shrink = jnp.where(lam == 0, eye, _gain(predicted, lam, eye))
    return Gains(structured(predicted), structured(filtered), structured(shrink))


def gains_sequential(a: Array, strength: Scalar) -> Gains:
    """The same by the textbook recursion over t, dense A only: the twin that tests compare with."""
    lam, eye = jnp.asarray(strength, a.dtype), jnp.eye(a.shape[-1], dtype=a.dtype)

    def body(covariance, a):
        predicted = a @ covariance @ a.T + eye
        shrink = jnp.linalg.inv(eye + lam * predicted)
        filtered = shrink @ predicted
        return filtered, Gains(predicted, filtered, shrink)

    return jax.lax.scan(body, jnp.zeros_like(a[0]), a)[1]


class Filtered(NamedTuple):
    """Means of the filter, split so that nothing is lost to rounding near the solution."""

    carried: Array  # A[t] m[t-1], (T, D)
    pull: Array  # A[t] m[t-1] + r[t] - m[t]: what the pseudo-observation took away; 0 for lambda = 0


def filter_means(a: Array, r: Array, gains: Gains) -> Filtered:
    """``m[t] = G[t] (A[t] m[t-1] + r[t])`` by one affine scan."""
    closed_loop = compose(gains.shrink, a, r.ndim)
    means = affine_scan(closed_loop, apply_affine(gains.shrink, r))
    carried = apply_affine(a, delayed(means))
    return Filtered(carried, (carried + r) - apply_affine(gains.shrink, carried + r))


def smoother_corrections(a: Array, gains: Gains, pull: Array, strength: Scalar) -> Array:
    """``s[t] = E[d[t] | all] - m[t]`` by one affine scan from the end (Rauch, Tung & Striebel 1965).

    ``s[t] = S[t] (s[t+1] - pull[t+1])``, ``S[t] = P[t] A[t+1]' P-[t+1]^-1``, s[T] = 0.
    """
    ahead = jnp.concatenate([a[1:], jnp.zeros_like(a[:1])])
    predicted = jnp.concatenate([gains.predicted[1:], gains.predicted[:1]])
    if is_diagonal(a):
        smoothing = gains.filtered * ahead / predicted
    else:
        product = matrices(compose(ahead, gains.filtered, pull.ndim))  # A[t+1] P[t]: its transpose is P A'
        smoothing = jnp.swapaxes(jnp.linalg.solve(matrices(predicted), product), -1, -2)
        smoothing = structured(smoothing)
    smoothing = jnp.where(jnp.asarray(strength) == 0, jnp.zeros_like(smoothing), smoothing)
    next_pull = jnp.concatenate([pull[1:], jnp.zeros_like(pull[:1])])
    return affine_scan(smoothing, -apply_affine(smoothing, next_pull), reverse=True)
