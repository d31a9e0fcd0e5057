"""Newton's iterates on their way to the chain."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from pmcmc._tree import real_dtype, relative_distance
from pmcmc._types import PyTree
from pmcmc.plots._axes import axes_for
from pmcmc.recurrence import Solution
from pmcmc.recurrence._base import typical_scale

# Columns of the picture; the largest error of the steps within a column is shown.
MAX_COLUMNS = 1000


def newton_iterates(solution: Solution, path: PyTree = None, *, scale: PyTree = None, ax: Any = None) -> Any:
    """Heat map of the iterates' error against the chain, over time t and iteration.

    Below the staircase of solved states (causality: k iterations solve at least the first k) contraction shows as
    columns that darken all at once, and its absence as a front that moves one step an iteration.

    solution: of a Newton-type solver with ``num_iterates`` set, as in ``deer(num_iterates=20)``.
    path: the chain to compare with, states with leading axis T; the solution itself by default.
    scale: spread of each coordinate, in whose units errors are; that of the path by default.
    ax: matplotlib axes to draw into.

    Returns:
        The axes.

    Raises:
        ValueError: the solution holds no iterates.

    Example:
        >>> import jax.numpy as jnp, pmcmc
        >>> solution = pmcmc.recurrence.deer().solve(lambda x, u: 0.5 * x + u, 0.0, jnp.ones(9))
        >>> pmcmc.plots.newton_iterates(solution)
        Traceback (most recent call last):
        ValueError: the solution holds no iterates: ...
    """
    if solution.iterates is None:
        raise ValueError(
            "the solution holds no iterates: solve with a Newton-type solver that keeps them, such as "
            "pmcmc.recurrence.deer(num_iterates=20)."
        )
    path = solution.value if path is None else path
    errors = _errors(solution.iterates, path, typical_scale(path) if scale is None else scale)
    num_iterates, length = errors.shape
    stop = min(num_iterates, int(solution.stats.num_iters) + 1)  # behind the last one it is repeated
    width = -(-length // MAX_COLUMNS)
    padded = np.pad(errors[:stop], ((0, 0), (0, -length % width)), mode="edge")
    columns = padded.reshape(stop, -1, width).max(axis=2)
    eps = float(jnp.finfo(real_dtype(path)).eps)
    (ax,) = axes_for(ax, figsize=(8, 3.5))
    image = ax.imshow(
        np.log10(np.clip(columns, eps, 1e3)),
        aspect="auto",
        origin="lower",
        interpolation="nearest",
        extent=(0.5, columns.shape[1] * width + 0.5, -0.5, stop - 0.5),
        cmap="viridis",
        vmin=np.log10(eps),
        vmax=1,
    )
    ax.figure.colorbar(image, ax=ax, label="log10 error (sd of the path)")
    ax.set(xlabel="step t", ylabel="iteration", title="Iterates against the chain", xlim=(0.5, length + 0.5))
    ax.yaxis.get_major_locator().set_params(integer=True)
    return ax


def _errors(iterates: PyTree, path: PyTree, scale: PyTree) -> np.ndarray:
    """(num_iterates, T) largest coordinate's difference; inf where an iterate is not finite."""
    one = lambda iterate: relative_distance(iterate, path, scale)
    return np.asarray(jax.jit(lambda tree: jax.lax.map(one, tree))(iterates))
