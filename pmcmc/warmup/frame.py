"""The basis of an exploration on the host, in float64."""

import numpy as np

from pmcmc.target import Basis


class Frame:
    """A `Basis` on the host, in float64, for rows of points.

    Args:
        loc: Location; shape (D,).
        scale: Standard deviations (D,), or lower triangular (D, D).
    """

    def __init__(self, loc: np.ndarray, scale: np.ndarray):
        self.loc, self.scale = loc, scale

    def basis(self, dtype) -> Basis:
        """Return the `Basis` in a given dtype."""
        return Basis(np.asarray(self.loc, dtype), np.asarray(self.scale, dtype))

    def to_positions(self, y: np.ndarray) -> np.ndarray:
        """Return positions ``loc + scale y`` of rows of coordinates (..., D)."""
        return Basis(self.loc, self.scale).to_positions(y)

    def to_coordinates(self, x: np.ndarray) -> np.ndarray:
        """Return coordinates of rows of positions (N, D); the inverse of `to_positions`."""
        centred = x - self.loc
        return np.linalg.solve(self.scale, centred.T).T if self.scale.ndim == 2 else centred / self.scale

    def followed_by(self, loc: np.ndarray, scale: np.ndarray) -> "Frame":
        """Return the frame of another one's coordinates, whose location and scale are in coordinates of this one."""
        loc = self.to_positions(loc[None])[0]
        return Frame(loc, self.scale @ scale if self.scale.ndim == 2 else self.scale * scale)
