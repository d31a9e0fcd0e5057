"""Coordinates in which a Newton-type solver approximates the Jacobian.

A diagonal is a good approximation in some coordinates and a poor one in others. With ``x = L z`` the Jacobian of the
recurrence in z is ``L^-1 J L``. Whitening or rotating by an estimate of the posterior's covariance makes it nearly
diagonal for samplers. The solver maps only increments, ``dz = L^-1 dx``, so a location would cancel and none is
needed. The states, the residual and the tolerance are not affected.
"""

import abc
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp

from pmcmc._pytree import register_dataclass
from pmcmc._typing import Array


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
class StandardBasis(JacobianBasis):
    """The state's own coordinates, L = I.

    This is the default; nothing is mapped.
    """

    def encode(self, dx):
        return dx

    def decode(self, dz):
        return dz


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
        matrix = jnp.asarray(matrix)
        if matrix.ndim != 2 or matrix.shape[0] != matrix.shape[1]:
            raise ValueError(f"a basis needs a square matrix, got shape {matrix.shape}.")
        return cls(matrix, jnp.linalg.inv(matrix))

    @classmethod
    def from_scale_tril(cls, scale_tril: Array) -> "LinearBasis":
        """Whiten: L is a lower-triangular Cholesky factor of the covariance, shape ``(D, D)``."""
        scale_tril = jnp.asarray(scale_tril)
        eye = jnp.eye(scale_tril.shape[-1], dtype=scale_tril.dtype)
        return cls(scale_tril, jax.scipy.linalg.solve_triangular(scale_tril, eye, lower=True))

    @classmethod
    def from_covariance(cls, covariance: Array) -> "LinearBasis":
        """Rotate to principal axes: L contains the eigenvectors of the covariance, shape ``(D, D)``."""
        vectors = jnp.linalg.eigh(jnp.asarray(covariance))[1]
        return cls(vectors, vectors.T)

    def encode(self, dx):
        return self.inverse @ dx

    def decode(self, dz):
        return self.matrix @ dz
