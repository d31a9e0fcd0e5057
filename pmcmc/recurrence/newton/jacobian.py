"""Approximations A[t] of the Jacobian in Newton-type solvers; each structure is a type.

A `JacobianStructure` says what A[t] is at a linearisation point (`linearize`), and how to solve the recursion ``e[t] =
A[t] e[t-1] + r[t]`` (`recur`). `Dense`, `Diagonal` and `BlockDiagonal` are exact entries of the Jacobian, `Identity`
and `Zero` are constants. States are vectors here, ``(T, D)`` over time.

A `JacobianBasis` gives the coordinates in which A is approximated. A diagonal is a good approximation in some
coordinates and a poor one in others. With ``x = L z`` the Jacobian of the recurrence in z is ``L^-1 J L``. Whitening or
rotating by an estimate of the posterior's covariance makes it nearly diagonal for samplers. The solver maps only
increments, ``dz = L^-1 dx``, so a location would cancel and none is needed. The states, the residual and the tolerance
are not affected.
"""

import abc
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp

from pmcmc._pytree import Array, PyTree, at_least_single, is_real, register_dataclass
from pmcmc.recurrence.scan import affine_scan, apply_affine
from pmcmc.recurrence.sharding import Steps


class JacobianBasis(abc.ABC):
    """An invertible linear map L between increments of the state, both vectors of length D.

    A solver works on ``dz = L^-1 dx`` and maps back, so the solution and its residual do not depend on L. What changes
    is how well a diagonal approximates the Jacobian ``L^-1 J L``.
    """

    @abc.abstractmethod
    def encode(self, dx: Array) -> Array:
        """Return ``dz = L^-1 dx``."""

    @abc.abstractmethod
    def decode(self, dz: Array) -> Array:
        """Return ``dx = L dz``."""


@register_dataclass
@dataclass(frozen=True)
class ScaledBasis(JacobianBasis):
    """Diagonal scaling, L = diag(scale).

    It has no effect on a diagonal Jacobian without clipping. It does change a trust region, which is a ball in the
    basis.

    Args:
        scale: Scale of each coordinate, shape ``(D,)``, or one number.
    """

    scale: Any  # not a narrower type: it is a leaf, and jax transformations put placeholders here

    def encode(self, dx):
        return dx / self.scale

    def decode(self, dz):
        return dz * self.scale


@register_dataclass
@dataclass(frozen=True)
class LinearBasis(JacobianBasis):
    """JacobianBasis given by a matrix L, stored with its inverse.

    Build it with `from_matrix`, `from_scale_tril` (a Cholesky factor) or `from_covariance` (its principal axes).

    Args:
        matrix: L, shape ``(D, D)``.
        inverse: Inverse of L, shape ``(D, D)``.

    Example:
        >>> import jax.numpy as jnp
        >>> basis = LinearBasis.from_scale_tril(jnp.array([[2.0, 0.0], [1.0, 1.0]]))
        >>> basis.encode(jnp.array([2.0, 3.0])).tolist()
        [1.0, 2.0]
    """

    matrix: Any
    inverse: Any

    @classmethod
    def from_matrix(cls, matrix: Array) -> "LinearBasis":
        """Use any invertible L, shape ``(D, D)``.

        Raises:
            ValueError: The matrix is not square.
        """
        matrix = _floating(matrix)
        if matrix.ndim != 2 or matrix.shape[0] != matrix.shape[1]:
            raise ValueError(f"a basis needs a square matrix, got shape {matrix.shape}.")
        return cls(matrix, jnp.linalg.inv(matrix))

    @classmethod
    def from_scale_tril(cls, scale_tril: Array) -> "LinearBasis":
        """Whiten: L is a lower-triangular Cholesky factor of the covariance, shape ``(D, D)``."""
        scale_tril = _floating(scale_tril)
        eye = jnp.eye(scale_tril.shape[-1], dtype=scale_tril.dtype)
        return cls(scale_tril, jax.scipy.linalg.solve_triangular(scale_tril, eye, lower=True))

    @classmethod
    def from_covariance(cls, covariance: Array) -> "LinearBasis":
        """Rotate to principal axes: L contains the eigenvectors of the covariance, shape ``(D, D)``."""
        vectors = jnp.linalg.eigh(_floating(covariance))[1]
        return cls(vectors, vectors.T)

    def encode(self, dx):
        return self.inverse @ dx

    def decode(self, dz):
        return self.matrix @ dz


def _floating(matrix: Array) -> Array:
    """Return a matrix in a floating dtype that linear algebra accepts."""
    matrix = jnp.asarray(matrix)
    return at_least_single(matrix if is_real(matrix) else matrix.astype(float))


class JacobianStructure(abc.ABC):
    """Approximation A[t] of df/dx used by `Newton` and `LevenbergMarquardt`.

    The structure determines what a Newton-type iteration costs and how fast it converges: the rate is set by the error
    of the approximation and by the contraction of the recurrence (Gonzalez et al. 2025).
    """

    @abc.abstractmethod
    def linearize(self, fn: Callable, x: Array, inputs: PyTree, iteration: Array) -> Array | None:
        """Compute A[t] at every ``x[t-1]``.

        Args:
            fn: ``(x, u) -> x`` on vectors.
            x: States x[0..T-1], shape ``(T, D)``.
            inputs: Inputs, leading axis T.
            iteration: Number of earlier iterations; only stochastic estimates use it.

        Returns:
            A, shape ``(T, ...)``; None if nothing is stored.
        """

    def num_entries(self, dim: int) -> int:
        """Numbers stored for one A[t], from which memory is estimated."""
        return dim * dim

    @abc.abstractmethod
    def recur(self, a: Array | None, r: Array, steps: Steps) -> Array:
        """Solve the recursion ``e[t] = A[t] e[t-1] + r[t]``, e[0] = 0.

        Args:
            a: A from `linearize`.
            r: Residuals, shape ``(T, D)``.
            steps: Operations across steps, on one device or several: ``steps.scan(operator, elements)``,
                ``steps.delayed(e)``.

        Returns:
            All ``A[t] e[t-1]``, shape ``(T, D)``.
        """


class Scanned(JacobianStructure):
    """A structure whose A[t] are stored and composed by an associative scan."""

    def recur(self, a, r, steps):
        return apply_affine(a, steps.delayed(affine_scan(steps, a, r)))


@register_dataclass
@dataclass(frozen=True)
class Dense(Scanned):
    """The full Jacobian, D JVPs per step: Newton's method, DEER.

    An iteration needs T D^2 memory and T D^3 work. Convergence is quadratic near the solution.

    Source: Lim et al. (2024).

    Example:
        >>> import jax.numpy as jnp
        >>> Dense().linearize(lambda x, u: x**2, jnp.array([[1.0, 2.0]]), None, 0).tolist()
        [[[2.0, 0.0], [0.0, 4.0]]]
    """

    def linearize(self, fn, x, inputs, iteration):
        return jax.vmap(jax.jacfwd(fn))(x, inputs)


@register_dataclass
@dataclass(frozen=True)
class Diagonal(Scanned):
    """The exact diagonal of the Jacobian, D JVPs per step one after the other: quasi-DEER.

    It needs T D memory: no D x D matrix is ever formed.

    Source: Gonzalez et al. (2024).

    Example:
        >>> import jax.numpy as jnp
        >>> Diagonal().linearize(lambda x, u: x**2, jnp.array([[1.0, 2.0]]), None, 0).tolist()
        [[2.0, 4.0]]
    """

    def num_entries(self, dim):
        return dim

    def linearize(self, fn, x, inputs, iteration):
        def column(i):
            return jax.vmap(lambda x, u: pushforward(fn, x, u, unit(i, x))[i])(x, inputs)

        return jax.lax.map(column, jnp.arange(x.shape[1])).T


@register_dataclass
@dataclass(frozen=True)
class BlockDiagonal(Scanned):
    """2x2 blocks of exact diagonals for a state of (position, momentum) halves, D JVPs per step: block quasi-DEER.

    ``A = [diag(dq'/dq) diag(dq'/dp); diag(dp'/dq) diag(dp'/dp)]`` contains the coupling of each coordinate with its own
    momentum, which is what a leapfrog step computes and a diagonal misses. It needs O(T D) memory.
    `HutchinsonBlockDiagonal` estimates the same with two JVPs per probe.

    Raises:
        ValueError: In a solve, if D is odd.

    Source: Zoltowski et al. (2025).

    Example:
        >>> import jax.numpy as jnp
        >>> swap = lambda x, u: jnp.array([2 * x[1], 3 * x[0]])
        >>> BlockDiagonal().linearize(swap, jnp.zeros((1, 2)), None, 0)[0, :, :, 0].tolist()
        [[0.0, 2.0], [3.0, 0.0]]
    """

    def num_entries(self, dim):
        return 2 * dim

    def linearize(self, fn, x, inputs, iteration):
        half = half_size(x)

        def column(i):
            def entries(x, u):
                columns = [pushforward(fn, x, u, unit(i + q * half, x)) for q in range(2)]
                return jnp.stack([jnp.stack([c[i + p * half] for c in columns]) for p in range(2)])

            return jax.vmap(entries)(x, inputs)

        return jnp.moveaxis(jax.lax.map(column, jnp.arange(half)), 0, -1)


@register_dataclass
@dataclass(frozen=True)
class Identity(JacobianStructure):
    """A = I: Picard iteration, a cumulative sum.

    An iteration takes no derivative. The certificate does, to measure how small distances grow. If fn has no
    forward derivative, as with `jax.pure_callback` or `jax.custom_vjp`, use `MultipleShooting`. It suits
    recurrences whose steps change the state little.

    Source: Shih et al. (2023).
    """

    def num_entries(self, dim):
        return 0

    def linearize(self, fn, x, inputs, iteration):
        return None

    def recur(self, a, r, steps):
        return steps.delayed(steps.scan(jnp.add, r))


@register_dataclass
@dataclass(frozen=True)
class Zero(JacobianStructure):
    """A = 0: Jacobi iteration, one evaluation of every step per round.

    An iteration takes no derivative. The certificate does, to measure how small distances grow. If fn has no
    forward derivative, as with `jax.pure_callback` or `jax.custom_vjp`, use `MultipleShooting`. It suits
    recurrences that forget their state at once.
    """

    def num_entries(self, dim):
        return 0

    def linearize(self, fn, x, inputs, iteration):
        return None

    def recur(self, a, r, steps):
        return jnp.zeros_like(r)


def pushforward(fn: Callable, x: Array, u: PyTree, v: Array) -> Array:
    """Return the Jacobian-vector product ``(df/dx)(x, u) v``, shape ``(D,)``."""
    return jax.jvp(lambda x: fn(x, u), (x,), (v,))[1]


def unit(i: Array, like: Array) -> Array:
    """Return the i-th unit vector, with the length and dtype of ``like``."""
    return jnp.zeros_like(like).at[i].set(1)


def half_size(x: Array) -> int:
    """Return D/2 for states ``(T, D)`` of (position, momentum) halves.

    Raises:
        ValueError: D is odd.
    """
    if x.shape[-1] % 2:
        raise ValueError(
            f"BlockDiagonal needs a state of two equal halves (position, momentum), got {x.shape[-1]} numbers. "
            "Use Diagonal() for other states."
        )
    return x.shape[-1] // 2
