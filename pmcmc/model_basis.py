"""Affine coordinates in which kernels and solvers see the position."""

from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np

from pmcmc._pytree import register_dataclass
from pmcmc._typing import Array, ArrayLeaf, Float

# Up to this dimension a matrix is multiplied without calling a library.
SMALL_DIM = 32


def _product(matrix: Array, vector: Array) -> Array:
    """Return ``matrix @ vector``; a small one as a sum, which XLA fuses with its surroundings (see `in_one_kernel`)."""
    if len(vector) > SMALL_DIM:
        return matrix @ vector
    return jnp.sum(matrix * vector[None, :], axis=1)


@register_dataclass
@dataclass(frozen=True)
class Basis:
    """Affine coordinates ``x = loc + scale y``; kernels and solvers see y.

    Attributes:
        loc: Shape (D,).
        scale: Shape (D,) for a diagonal map, (D, D) lower triangular for a full one.
    """

    loc: ArrayLeaf
    scale: ArrayLeaf

    def to_position(self, y: Float[Array, " dim"]) -> Float[Array, " dim"]:
        """Return ``x = loc + scale y``, (D,)."""
        return self.loc + (_product(self.scale, y) if self.scale.ndim == 2 else self.scale * y)

    def to_positions(self, rows: np.ndarray) -> np.ndarray:
        """Map many coordinates (..., D) by `to_position`, in numpy and float64."""
        loc, scale = np.asarray(self.loc, float), np.asarray(self.scale, float)
        return loc + (rows @ scale.T if scale.ndim == 2 else rows * scale)

    def to_coordinates(self, x: Float[Array, " dim"]) -> Float[Array, " dim"]:
        """Inverse of `to_position`, (D,)."""
        if self.scale.ndim == 2:
            return jax.scipy.linalg.solve_triangular(self.scale, x - self.loc, lower=True)
        return (x - self.loc) / self.scale

    @property
    def covariance(self) -> Array:
        """The inverse mass matrix that this basis corresponds to: scale scale^T, or its diagonal."""
        return self.scale @ self.scale.T if self.scale.ndim == 2 else self.scale**2
