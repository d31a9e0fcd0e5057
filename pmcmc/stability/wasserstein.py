"""How far is a chain from stationarity? A bound from coupled chains, one some steps ahead of the other."""

from typing import NamedTuple

import numpy as np

from pmcmc._typing import ArrayLeaf


class WassersteinBound(NamedTuple):
    """bound: (n,) for t = 0..n-1 steps. extrapolated: (n,) the part of each that no distance was observed for.

    rate: log factor per step by which the mean distance was extrapolated; NaN where there was nothing to fit.
    """

    bound: np.ndarray
    extrapolated: np.ndarray
    rate: float


def wasserstein_bound(distances: ArrayLeaf, *, lag: int) -> WassersteinBound:
    """Upper bounds of the 1-Wasserstein distance between the law of x[t] and the stationary law.

    X and Y start from the same law; X runs ``lag`` = L steps alone, then both share their inputs. With the mean
    distances d[t] = E |X[t+L] - Y[t]|

        W1(law of x[t], stationary law)  <=  d[t] + d[t+L] + d[t+2L] + ...

    by the triangle inequality over laws L steps apart. The chains need not meet. Distances behind the last observed one
    are extrapolated geometrically, ``d[n-1] exp(rate (s - n + 1))``, rate the least-squares slope of log d over the
    second half of what was observed: the bound is a bound as far as `extrapolated` is small beside it. It is inf where
    the rate is not negative. A larger lag gives a sharper bound. Mean distances of few pairs are noisy.

    distances: (n,) or (n, pairs), as in `Coalescence.distances` up to its ``num_steps``; pairs are averaged. The metric
        is theirs, such as the largest |x - y| / scale over the coordinates.

    Raises:
        ValueError: lag below 1; no distances, or some that are NaN or negative.

    Source: Biswas, Jacob & Vanetti 2019 (L-lag couplings; there for chains that meet).

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
    """Least-squares slope of log d over the second half of the positive finite entries; NaN with fewer than two."""
    steps = np.flatnonzero((means > 0) & np.isfinite(means))
    steps = steps[steps.size // 2 :]
    if steps.size < 2:
        return float("nan")
    return float(np.polyfit(steps, np.log(means[steps]), 1)[0])
