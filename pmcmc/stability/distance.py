"""Distances between states, and a bound on the distance of a chain from stationarity.

States are compared by coordinate (`coordinate_distances`) and by site of the model (`site_distances`).
`wasserstein_bound` implements Biswas, Jacob & Vanetti (2019) for the distances that `coalescence_time` measures. These
are L-lag couplings: pairs of chains of which one is L steps ahead.
"""

import math
from dataclasses import replace
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from pmcmc._pytree import Array, ArrayLeaf, PyTree, is_real, relative_gap
from pmcmc.target import Target


def coordinate_distances(
    first: PyTree, second: PyTree, scale: PyTree, *, num_axes: int = 1, discrete: float = jnp.inf
) -> Array:
    """Return ``|first - second| / scale`` for every coordinate.

    The entries of all leaves after the leading axes are concatenated in the order of the leaves.

    Args:
        first: States with ``num_axes`` leading axes.
        second: States to compare with; same structure and shapes as ``first``.
        scale: Unit of each coordinate; structure of one state, leaves broadcast against it.
        num_axes: Number of leading axes.
        discrete: Distance between integers that differ.

    Returns:
        Distances, shape (..., D). Equal entries are at distance 0 whatever the scale; entries that are not finite are
        at distance inf.

    Example:
        >>> import jax.numpy as jnp
        >>> a, b = {"x": jnp.zeros((1, 2)), "n": jnp.array([3])}, {"x": jnp.ones((1, 2)), "n": jnp.array([3])}
        >>> coordinate_distances(a, b, {"x": jnp.array([1.0, 2.0]), "n": jnp.ones(())}).tolist()  # n, then x
        [[0.0, 1.0, 0.5]]
    """

    def leaf(x, y, s):
        if not is_real(x):
            ratio = jnp.where(x == y, 0.0, discrete)
        else:
            ratio = relative_gap(x, y, s)
            ratio = jnp.where(jnp.isfinite(ratio), ratio, jnp.inf)
        return ratio.reshape(*x.shape[:num_axes], -1)

    return jnp.concatenate(jax.tree.leaves(jax.tree.map(leaf, first, second, scale)), axis=-1)


def continuous_coordinates(states: PyTree, num_axes: int, discrete: PyTree = None) -> np.ndarray:
    """Return which coordinates are continuous; shape (D,).

    Args:
        states: States with ``num_axes`` leading axes; only their shapes and dtypes are used.
        num_axes: Number of leading axes.
        discrete: For each leaf whether its values are discrete, see `pmcmc.Kernel.discrete`. None: those that are not
            floating.
    """
    if discrete is None:
        discrete = jax.tree.map(lambda x: not is_real(x), states)
    pairs = zip(jax.tree.leaves(states), jax.tree.leaves(discrete), strict=True)
    return np.concatenate([np.full(math.prod(x.shape[num_axes:]), not flag) for x, flag in pairs])


def largest_movement(moves: ArrayLeaf, continuous: np.ndarray) -> ArrayLeaf:
    """Return the largest of moves (..., D) over the continuous coordinates, or over all if there are none."""
    some = continuous.any() and not continuous.all()
    return (moves[..., continuous] if some else moves).max(axis=-1)


def judged_movement(movement: ArrayLeaf, continuous: np.ndarray) -> ArrayLeaf:
    """Replace the movement of discrete coordinates that never changed by NaN: they may well keep their value.

    Args:
        movement: Movement by coordinate, shape (D,).
        continuous: Which coordinates are continuous; shape (D,).
    """
    where = np.where if isinstance(movement, np.ndarray) else jnp.where
    return where((movement == 0) & ~continuous, np.nan, movement)


def site_distances(target: Target, first: Array, second: Array, *, scale: PyTree = None) -> dict[str, Array]:
    """Return ``|x - x'| / scale`` for every site of the model, in unconstrained positions.

    A basis mixes the sites, so the distance of a coordinate does not belong to the site it is named after. Positions
    are ``loc + L y``, hence ``x - x' = L (y - y')``; computed this way the difference keeps its precision where loc is
    large.

    Args:
        target: The target, whose basis and site names are used.
        first: Coordinates as a kernel's states hold them, shape (..., D).
        second: Coordinates to compare with, shape (..., D).
        scale: Standard deviation of each site, a pytree like the position (leaves broadcast). By default that of the
            basis, ``sqrt(diag(L S^2 L^T))`` with S its spread, or 1 where the target has no basis.

    Returns:
        Distances by site, each of shape (..., shape of the site). If the position is not a dict, sites are named by
        their path in the pytree, or "position" if it is a single array.

    Example:
        >>> import jax.numpy as jnp, pmcmc
        >>> target = pmcmc.Target.from_logdensity(lambda x: -(x["a"] ** 2) - x["b"] ** 2, {"a": 0.0, "b": 0.0})
        >>> sites = site_distances(target, jnp.array([1.0, 2.0]), jnp.zeros(2))
        >>> {name: float(distance) for name, distance in sites.items()}
        {'a': 1.0, 'b': 2.0}
    """
    # Undo the basis: from coordinates to unconstrained positions.
    gap = first - second
    basis = target.basis
    if basis is not None:
        wide = basis.scale.ndim == 2
        gap = jnp.einsum("ij,...j->...i", basis.scale, gap) if wide else gap * jnp.broadcast_to(basis.scale, gap.shape)
    if scale is None and basis is not None:
        unit = jnp.asarray(basis.scale if basis.spread is None else basis.scale * basis.spread)
        scale = target.spec.unravel(jnp.linalg.norm(unit, axis=1) if unit.ndim == 2 else jnp.abs(unit))
    # A difference of booleans or unsigned integers does not fit their dtype.
    unravel = replace(target.spec, dtypes=(gap.dtype,) * len(target.spec.dtypes)).unravel
    for _ in range(gap.ndim - 1):
        unravel = jax.vmap(unravel)
    gaps = unravel(gap)
    scales = jax.tree.map(jnp.ones_like, gaps) if scale is None else scale
    ratios = jax.tree.map(lambda d, s: relative_gap(d, jnp.zeros_like(d), jnp.asarray(s, d.dtype)), gaps, scales)
    return {
        jax.tree_util.keystr(path, simple=True, separator="/") or "position": ratio
        for path, ratio in jax.tree_util.tree_leaves_with_path(ratios)
    }


class WassersteinBound(NamedTuple):
    """Result of `wasserstein_bound`; n is the number of distances observed.

    Attributes:
        bound: Bound after t = 0, ..., n-1 steps; shape (n,).
        extrapolated: Part of each bound that comes from distances beyond the last one observed; shape (n,).
        rate: Log factor per step used to extrapolate the mean distance; NaN where there was nothing to fit.
    """

    bound: np.ndarray
    extrapolated: np.ndarray
    rate: float


def wasserstein_bound(distances: ArrayLeaf, *, lag: int) -> WassersteinBound:
    """Return upper bounds on the 1-Wasserstein distance between the law of x[t] and the stationary law.

    X and Y start from the same law; X runs ``lag`` = L steps alone, then both share their inputs. With the mean
    distances d[t] = E |X[t+L] - Y[t]|

        W1(law of x[t], stationary law)  <=  d[t] + d[t+L] + d[t+2L] + ...

    by the triangle inequality over laws L steps apart. The chains need not merge.

    Distances after the last one observed are extrapolated geometrically, ``d[n-1] exp(rate (s - n + 1))``, where rate
    is the least-squares slope of log d over the second half of the observed steps. Trust the bound only where
    `extrapolated` is small compared with it. The bound is inf where the rate is not negative. A larger lag gives a
    sharper bound. Mean distances of few pairs are noisy.

    Args:
        distances: Distances by step, shape (n,) or (n, pairs), as in `Coalescence.distances` up to its ``num_steps``;
            pairs are averaged. The bound is in the metric of these distances, such as the largest |x - y| / scale over
            the coordinates.
        lag: L, the number of steps that X is ahead.

    Returns:
        The bounds, what was extrapolated in them, and the rate.

    Raises:
        ValueError: lag is below 1; distances are missing, NaN or negative.

    Source: Biswas, Jacob & Vanetti (2019): L-lag couplings, for chains that merge.

    Example:
        >>> import numpy as np
        >>> found = wasserstein_bound(0.5 ** np.arange(30), lag=1)
        >>> found.bound[:3].round(3).tolist()  # 1 + 1/2 + 1/4 + ...
        [2.0, 1.0, 0.5]
    """
    means = np.asarray(distances, float)
    means = means.mean(axis=1) if means.ndim == 2 else means
    if lag < 1 or means.ndim != 1 or means.size == 0 or not np.all(means >= 0):
        raise ValueError(
            f"expected lag >= 1 and distances (n,) or (n, pairs) without NaN, got lag={lag} and shape {means.shape}. "
            "Cut Coalescence.distances at num_steps + 1."
        )
    n = means.size
    rate = _slope(means)
    behind = n + (np.arange(n) - n) % lag  # first of t, t + L, t + 2L, ... that was not observed
    if means[-1] == 0:
        extrapolated = np.zeros(n)
    elif rate < 0:
        extrapolated = means[-1] * np.exp(rate * (behind - n + 1)) / -np.expm1(rate * lag)
    else:
        extrapolated = np.full(n, np.inf)
    bound = extrapolated.copy()
    for t in range(n):
        bound[t] += means[t::lag].sum()
    return WassersteinBound(bound, extrapolated, rate)


def _slope(means: np.ndarray) -> float:
    """Return the least-squares slope of log d over the second half of the positive entries; NaN with fewer than two."""
    steps = np.flatnonzero((means > 0) & np.isfinite(means))
    steps = steps[steps.size // 2 :]
    if steps.size < 2:
        return float("nan")
    return float(np.polyfit(steps, np.log(means[steps]), 1)[0])
