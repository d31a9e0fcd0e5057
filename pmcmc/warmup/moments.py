"""Mean and covariance of draws, shrunk so that the Cholesky factor stays finite if there are few draws.

`pooled_moments` is for traced programs, and weighs by the number of draws. `path_moments` is for the host, and weighs
by the effective number of draws of lanes.
"""

import jax.numpy as jnp
import numpy as np

from pmcmc._typing import Array


def pooled_moments(draws: Array, dense: bool) -> tuple[Array, Array]:
    """Return the mean of draws, and the Cholesky factor of their covariance or their standard deviations.

    The correlation is shrunk towards the identity by ``D / (D + N)``.

    Args:
        draws: Shape (N, D).
        dense: Whether to return a factor (D, D); otherwise standard deviations (D,).
    """
    count, dim = draws.shape
    mean = jnp.mean(draws, axis=0)
    centred = draws - mean[None]
    scale = jnp.sqrt(jnp.mean(centred**2, axis=0))
    if not dense:
        return mean, scale
    weight = dim / (dim + count)
    standardised = centred / scale[None]
    correlation = standardised.T @ standardised / count
    correlation = (1 - weight) * correlation + weight * jnp.eye(dim, dtype=draws.dtype)
    return mean, scale[:, None] * jnp.linalg.cholesky(correlation)


def path_moments(path: np.ndarray, dense: bool) -> tuple[np.ndarray, np.ndarray]:
    """Return the mean of a path of lanes, and the Cholesky factor of its covariance or its standard deviations.

    A coordinate that did not move keeps its scale. The correlation is shrunk towards the identity by
    ``(D / (D + n))^2``, with n the effective number of draws. This is negligible for many draws, however strong the
    correlation, and enough to keep the factor finite for few.

    Args:
        path: Coordinates of the lanes; shape (steps, lanes, D).
        dense: Whether to return a factor (D, D); otherwise standard deviations (D,).
    """
    num_steps, num_lanes, dim = path.shape
    draws = path.reshape(-1, dim)
    mean, deviation = draws.mean(axis=0), draws.std(axis=0)
    deviation = np.where(deviation > 0, deviation, 1.0)
    if not dense:
        return mean, deviation
    z = (path - mean) / deviation
    lagged = np.clip(np.mean(z[1:] * z[:-1], axis=(0, 1)).max(), 0.0, 1.0)
    effective = num_lanes * (1 + (num_steps - 1) * (1 - lagged) / (1 + lagged))
    weight = (dim / (dim + effective)) ** 2
    z = z.reshape(-1, dim)
    correlation = (1 - weight) * (z.T @ z) / len(z)
    np.fill_diagonal(correlation, 1.0)
    return mean, deviation[:, None] * np.linalg.cholesky(correlation)
