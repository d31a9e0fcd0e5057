"""Choice of the lanes that chains start from, so that R-hat shows what the ensemble found.

If the lanes of warm-up have not mixed, they may lie in separate modes. `start_order` sorts them so that the first
chains start in different modes. Lanes are told apart by their means, with

    F[d] = variance between the means of the lanes / mean variance within a lane

as the weight of coordinate d.
"""

import numpy as np

# The lanes have not mixed if the variance of their means exceeds this share of the variance within a lane, in some
# coordinate. A single lane of 32 that spends half of its steps in a mode five standard deviations away gives 0.16,
# without the noise of the means.
APART = 0.25
# Lanes whose means are within this many standard deviations of one lane's draws are taken to be in the same mode.
RADIUS = 2.0


def start_order(path: np.ndarray, logdensity: np.ndarray) -> np.ndarray | None:
    """Return the lanes in the order in which chains should start from them; None if the lanes have mixed.

    The squared distance of two lanes is the mean of ``(mean - mean')^2 / (variance within)`` over the coordinates,
    weighted by

        F[d] = variance between the means of the lanes / mean variance within a lane

    so that coordinates in which the lanes agree do not count. The first lane is followed by the lane that has, within
    `RADIUS`, the most lanes not yet within `RADIUS` of an earlier one. This repeats until every lane is within `RADIUS`
    of a chosen one; then come the others by number. So each mode has a chain, the most frequent modes first, and the
    first k lanes are the same for any number of chains.

    A lane far out in the tails would count as a separate mode, so lanes whose log density is an outlier below all
    others come last.

    Args:
        path: Coordinates of the lanes under a fixed kernel; shape (steps, lanes, D).
        logdensity: Log densities; shape (steps, lanes).

    Returns:
        Lane numbers; shape (lanes,). None if the lanes have mixed.
    """
    path = np.asarray(path, float)
    means, within = path.mean(axis=0), path.var(axis=0).mean(axis=0)
    within = np.where(within > 0, within, np.finfo(float).tiny)
    between = np.minimum(means.var(axis=0) / within, 1e12)
    if not between.max(initial=0.0) > APART:
        return None
    # Distances between the lanes' means, in coordinates in which the lanes differ.
    places = (means - means.mean(axis=0)) * np.sqrt(between / between.sum() / within)
    squares = np.sum(places**2, axis=1)
    near = squares[:, None] + squares - 2 * places @ places.T <= RADIUS**2
    np.fill_diagonal(near, True)
    fit = ~_is_outlier(logdensity.mean(axis=0))
    # Choose lanes until every lane that is not an outlier is near a chosen one.
    order, open_lanes = [int(np.argmax(fit))], fit.copy()
    open_lanes &= ~near[order[0]]
    while open_lanes.any():
        order.append(int(np.argmax(np.where(open_lanes, (near & open_lanes).sum(axis=1), -1))))
        open_lanes &= ~near[order[-1]]
    others = np.setdiff1d(np.arange(len(fit)), order)
    return np.array([*order, *others[fit[others]], *others[~fit[others]]])


def _is_outlier(values: np.ndarray) -> np.ndarray:
    """Return which values are far below all others: by three interquartile ranges and 3 below the lower quartile."""
    low, high = np.quantile(values, (0.25, 0.75))
    return values < low - 3 * (high - low) - 3  # False if a value is NaN
