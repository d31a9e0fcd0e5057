"""Which lanes of an ensemble chains should start from, so that R-hat sees what the ensemble saw."""

import numpy as np

# Lanes have not mixed where their means vary more than this share of what the draws of one lane do: as of a single lane
# of 32 that spent half of its steps in a mode five standard deviations away.
APART = 0.25


# Lanes whose means lie within this many standard deviations of one lane's draws are taken to be in one place.
RADIUS = 2.0


def start_order(path: np.ndarray, logdensity: np.ndarray) -> np.ndarray | None:
    """(lanes,) numbers of the lanes from which chains should start, one after the other; None where lanes have mixed.

    Lanes in separate modes are told apart by their means. With

        F[d] = variance between the means of the lanes / mean variance within a lane

    the squared distance of two lanes is the mean of ``(mean - mean')^2 / (variance within)`` over the coordinates,
    weighted by F, so coordinates in which the lanes agree do not count. After the first lane comes the one with the
    most lanes within `RADIUS` that no lane before it has there, until each has one; then the others as they come. So
    each mode has a chain, the most frequent first, and the first k lanes are the same for any number of chains.

    A lane far out in the tails would be such a mode of its own. Lanes whose log density is an outlier below all others
    come last.

    path: (steps, lanes, D) coordinates under a fixed kernel. logdensity: (steps, lanes).
    """
    path = np.asarray(path, float)
    means, within = path.mean(axis=0), path.var(axis=0).mean(axis=0)
    within = np.where(within > 0, within, np.finfo(float).tiny)
    between = np.minimum(means.var(axis=0) / within, 1e12)
    if not between.max(initial=0.0) > APART:
        return None
    places = (means - means.mean(axis=0)) * np.sqrt(between / between.sum() / within)
    squares = np.sum(places**2, axis=1)
    near = squares[:, None] + squares - 2 * places @ places.T <= RADIUS**2
    np.fill_diagonal(near, True)
    fit = ~_is_outlier(logdensity.mean(axis=0))
    order, open_lanes = [int(np.argmax(fit))], fit.copy()
    open_lanes &= ~near[order[0]]
    while open_lanes.any():
        order.append(int(np.argmax(np.where(open_lanes, (near & open_lanes).sum(axis=1), -1))))
        open_lanes &= ~near[order[-1]]
    others = np.setdiff1d(np.arange(len(fit)), order)
    return np.array([*order, *others[fit[others]], *others[~fit[others]]])


def _is_outlier(values: np.ndarray) -> np.ndarray:
    """Values far below all others: three interquartile ranges, and three nats, below the lower quartile."""
    low, high = np.quantile(values, (0.25, 0.75))
    return values < low - 3 * (high - low) - 3  # False where values are NaN
