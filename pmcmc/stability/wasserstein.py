"""Bound the distance of a chain from stationarity by L-lag couplings: pairs of chains of which one is L steps ahead.

`wasserstein_bound` implements Biswas, Jacob & Vanetti (2019) for the distances that `coalescence_time` measures.
"""

from typing import NamedTuple

import numpy as np

from pmcmc._typing import ArrayLeaf


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
