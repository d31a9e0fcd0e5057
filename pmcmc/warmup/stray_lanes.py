"""Lanes of warm-up that do not take part: lanes that are held by too large a step size, and lanes far out."""

import numpy as np

# A lane is held if it did not move in a piece and its mean acceptance rate was below this share of the target rate.
HELD = 0.1
# A lane is far out if its log density stayed below that of the better half of the lanes by more than this, plus one nat
# per dimension, plus what a wider region could make up for; see `far_lanes`. The posterior then has less than about
# exp(-20) of its mass there. A region is taken to be at most `WIDER` times as wide as the lane has moved in it, and a
# lane that has made up the share `ON_ITS_WAY` of what it lacks is left alone.
FAR, WIDER, ON_ITS_WAY = 20.0, 10.0, 0.1


def held_lanes(moved: np.ndarray, acceptance_rate: np.ndarray, rate: float) -> np.ndarray:
    """Return which lanes are held: they did not move, and not by chance; shape (lanes,).

    Args:
        moved: Share of its steps that moved each lane; shape (lanes,).
        acceptance_rate: Acceptance rates; shape (steps, lanes).
        rate: Acceptance rate that is tuned to.
    """
    return (moved == 0) & (np.mean(acceptance_rate, axis=0, dtype=float) < HELD * rate)


def half_for_held(held: np.ndarray) -> np.ndarray:
    """Return weights of the lanes, with sum 1: half for all held lanes together, half for the others; shape (lanes,).

    If all lanes are held, or none, the weights are equal.
    """
    groups = [group for group in (held, ~held) if group.any()]
    return np.sum([group / group.sum() for group in groups], axis=0) / len(groups)


def far_lanes(path: np.ndarray, logdensity: np.ndarray) -> np.ndarray:
    """Return which lanes are where the posterior has no mass worth a lane; shape (lanes,).

    The mass of a region is about its log density plus the log of its volume. Lane k is far if, with s[k, i] the
    standard deviation of its coordinate i and s[i] that within the better half of the lanes (by mean log density),

        max_t logp[t, k] < min_(t, better) logp - FAR - D - sum_i log(1 + WIDER s[k, i] / s[i])

    A lane that does not move needs a smaller step size than the others, so the posterior is no wider there, and the sum
    is 0. A lane that has come a tenth of the way up is not far, and none is where the better half does not move.

    Args:
        path: Coordinates of the lanes; shape (steps, lanes, D).
        logdensity: Log densities; shape (steps, lanes).
    """
    num_lanes, dim = path.shape[1:]
    logdensity = np.asarray(logdensity, float)
    better = np.argsort(-np.mean(logdensity, axis=0), kind="stable")[: max(1, num_lanes // 2)]  # NaN comes last
    variance = np.where(np.ptp(path, axis=0) > 0, np.var(path, axis=0), 0.0)  # rounding moves no lane
    with np.errstate(divide="ignore", invalid="ignore"):
        ratio = np.sqrt(variance / np.mean(variance[better], axis=0))
        bound = FAR + dim + np.sum(np.log1p(WIDER * ratio), axis=1)
        lacking = np.min(logdensity[:, better]) - np.max(logdensity, axis=0)
        climbed = logdensity[-1] - logdensity[0]
        return (lacking > bound) & (climbed < ON_ITS_WAY * lacking)  # False where NaN
