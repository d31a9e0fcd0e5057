"""The inverse mass matrix that a user gave: it becomes the basis in which the kernel is tuned."""

import jax.numpy as jnp
import numpy as np

from pmcmc._typing import ArrayLeaf
from pmcmc.kernels import Kernel
from pmcmc.model_basis import Basis
from pmcmc.target import Target


def check_metric(target: Target, kernel: Kernel, metric: ArrayLeaf | None = None) -> None:
    """Check that the user's metric fits the target and is positive definite; called before warm-up starts.

    Args:
        target: Target to sample.
        kernel: Kernel to tune.
        metric: Inverse mass matrix given to the warm-up. None: that of the kernel, if it has one.

    Raises:
        ValueError: The metric does not fit or is not positive definite, or there are two.
    """
    own = kernel.metric
    if own is not None and metric is not None:
        raise ValueError("inverse_mass_matrix is given twice, to the kernel and to warmup=: leave one of them out.")
    metric = own if metric is None else metric
    if metric is None:
        return
    metric = np.asarray(metric)
    if metric.shape not in ((), (target.dim,), (target.dim, target.dim)):
        raise ValueError(
            f"inverse_mass_matrix has shape {metric.shape}: expected ({target.dim},) or ({target.dim}, {target.dim}), "
            "the number of unconstrained parameters."
        )
    values = np.linalg.eigvalsh(metric) if metric.ndim == 2 else metric
    if not np.all(np.isfinite(values) & (values > 0)):
        raise ValueError("inverse_mass_matrix is not positive definite: it should be about the posterior's covariance.")


def take_metric(
    target: Target, kernel: Kernel, loc: ArrayLeaf, scale: ArrayLeaf, metric: ArrayLeaf | None = None
) -> tuple[Kernel, Basis]:
    """Return the kernel and the basis to tune it in, the only place where a metric takes effect.

    Args:
        target: Target to sample.
        kernel: Kernel to tune.
        loc: Mean that the exploration found; shape (D,).
        scale: Its standard deviations (D,), or a Cholesky factor of its covariance (D, D).
        metric: Inverse mass matrix given to the warm-up, see `check_metric`.

    Returns:
        The kernel without its metric, and the explored basis, with the scale of the user's metric if there is one.
    """
    metric, kernel = metric if kernel.metric is None else kernel.metric, kernel.without_metric()
    if metric is not None:
        scale = scale_of_metric(metric, target.dim)
    return kernel, Basis(*(jnp.asarray(np.asarray(x, target.spec.dtype)) for x in (loc, scale)))


def scale_of_metric(metric: ArrayLeaf, dim: int) -> np.ndarray:
    """Return the scale of the basis whose `Basis.covariance` is an inverse mass matrix.

    Args:
        metric: Inverse mass matrix; a number, (dim,) or (dim, dim).
        dim: Number of dimensions.

    Returns:
        Standard deviations (dim,), or a Cholesky factor (dim, dim) for a full matrix.
    """
    metric = np.asarray(metric, float)
    return np.linalg.cholesky(metric) if metric.ndim == 2 else np.broadcast_to(np.sqrt(metric), (dim,))
