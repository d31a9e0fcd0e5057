"""Whether the draws of warm-up show that its estimates of the posterior are right, and what is said if they do not.

`judge_path` judges a path of lanes in the basis in which it was run, `judge_halves` the moments of several paths. With
mean m and standard deviations s of the draws in units of the estimate before them, and the share w of their variance
that is within lanes,

    placed:   |m| < SETTLED max(1, s)   and   w > MIXED
    settled:  |m| < SETTLED   and   1 / SETTLED < s < SETTLED   and   w > MIXED

in every direction. Lanes in separate modes, or still on their way, have a small w.
"""

from typing import NamedTuple

import numpy as np

from pmcmc.target import Target

SETTLED, MIXED = 3.0, 0.2
# Distance of the quartiles of a standard normal variable.
NORMAL_QUARTILES = 1.349
UNSETTLED = (
    "Warm-up did not settle: the last window still changed its estimates of the posterior's location and scales, or "
    "its lanes kept apart, so chains may start far off, and move and merge slowly. Raise num_warmup (it was "
    "{num_steps}){remedy}"
)
FUNNEL = "the posterior may have separate modes or a funnel, which no single scale fits: reparametrise"
REMEDY = f". If that does not help, {FUNNEL}."
REMEDY_OF_ENSEMBLE = f", or try warmup=pmcmc.WindowAdaptation(). If neither helps, {FUNNEL}."
REMEDY_OF_HIERARCHIES = (
    f". If that does not help, {FUNNEL}, for instance by reparam=pmcmc.AutoReparam() with the default warm-up."
)
REMEDY_WITH_CENTREDNESS = (
    ". If that does not help, the posterior may have separate modes, or a funnel beyond its partially centred sites: "
    "reparametrise others by hand."
)


class Verdict(NamedTuple):
    """What draws say about the estimates before them.

    Attributes:
        settled: Whether location and scales are right, and the lanes mix.
        placed: Whether the location is right, and the lanes mix. It is enough if the user gave the scales.
    """

    settled: bool
    placed: bool


def judge_path(path: np.ndarray, mean: np.ndarray, factor: np.ndarray) -> Verdict:
    """Judge a basis by a path that was run in it.

    Args:
        path: Coordinates of the lanes; shape (steps, lanes, D).
        mean: Mean of the path; shape (D,).
        factor: Cholesky factor of its covariance (D, D), or standard deviations (D,).
    """
    within = (path - path.mean(axis=0)).reshape(-1, path.shape[-1])
    if factor.ndim == 2:
        spread, deviation = np.linalg.svd(factor, compute_uv=False), np.sqrt(np.sum(factor**2, axis=1))
        whitened = np.linalg.solve(factor, within.T)
        share = np.linalg.eigvalsh(whitened @ whitened.T / len(within))
    else:
        spread = deviation = factor
        share = np.mean((within / factor) ** 2, axis=0)
    return _verdict(mean, deviation, spread, float(share.min()))


def judge_halves(means: np.ndarray, variances: np.ndarray, scale: np.ndarray) -> Verdict:
    """Judge paths by their halves: the second halves in units of the first.

    Scales are compared by coordinate: few paths are too short for those of all directions. Directions count for the
    variance between paths. Medians and quartiles take the place of moments, which heavy tails may not have.

    Args:
        means: Medians of the two halves of each path; shape (paths, 2, D).
        variances: Squares of the distances of their quartiles over `NORMAL_QUARTILES`; shape (paths, 2, D).
        scale: Cholesky factor of the covariance of all draws (D, D), or standard deviations (D,).
    """
    mean, deviation = means.mean(axis=0), np.sqrt(variances.mean(axis=0) + means.var(axis=0))
    between = means.mean(axis=1) - mean.mean(axis=0)
    if scale.ndim == 2:
        largest = np.linalg.norm(np.linalg.solve(scale, between.T), 2) ** 2 / len(between)
    else:
        largest = np.max(np.mean((between / scale) ** 2, axis=0))
    with np.errstate(divide="ignore", invalid="ignore"):
        moved, spread = (mean[1] - mean[0]) / deviation[0], deviation[1] / deviation[0]
    return _verdict(moved, spread, spread, 1 - float(largest))


def _verdict(mean: np.ndarray, deviation: np.ndarray, spread: np.ndarray, share: float) -> Verdict:
    """Return the verdict.

    Args:
        mean: Mean of the draws, in units of the estimate before them; shape (D,).
        deviation: Standard deviations of the coordinates, in these units; shape (D,).
        spread: Standard deviations along the principal directions, or of the coordinates; shape (D,).
        share: Least share of the variance that is within lanes.
    """
    placed = share > MIXED and bool(np.all(np.abs(mean) < SETTLED * np.maximum(1, deviation)))
    right = np.all((spread < SETTLED) & (spread > 1 / SETTLED)) and np.all(np.abs(mean) < SETTLED)
    return Verdict(bool(placed and right), placed)


def unsettled(num_steps: int, remedy: str = REMEDY) -> str:
    """Return `UNSETTLED` with the number of warm-up steps and a remedy."""
    return UNSETTLED.format(num_steps=num_steps, remedy=remedy)


def remedy_for(target: Target, otherwise: str = REMEDY) -> str:
    """Return the remedy that suits a target, for kernels over all sites at once."""
    if target.centredness:
        return REMEDY_WITH_CENTREDNESS
    return REMEDY_OF_HIERARCHIES if target.model.could_be_centred else otherwise
