"""Longer trajectories of HMC where a diagonal basis leaves wide directions.

A diagonal basis makes every coordinate a unit wide, but a direction across many correlated coordinates can be much
wider: with D coordinates of correlation r, the standard deviation along the unit vector (1, ..., 1) / sqrt(D) is
``sqrt(1 + (D - 1) r)``. A trajectory of time T multiplies a direction of standard deviation s by cos(T / s), so in a
wide direction chains move slowly. `widest` measures s, and `lengthened` gives the kernel trajectories in which such a
direction forgets as much as it should.
"""

import math
from dataclasses import replace

import numpy as np

from pmcmc.kernels import HMC, Kernel
from pmcmc.kernels.hmc import TRAJECTORY_LENGTH, SequentialLeapfrog

# At the acceptance rate of 0.8 to which warm-up tunes, successive draws have the correlation 0.8 cos(T / s) + 0.2 along
# a direction of standard deviation s. In the widest one it may be this large. The usual T suffices up to s = 2.03.
CORRELATION = 0.7
# Draws of each half of the lanes from which a direction is found, and rounds of the power iteration.
NUM_ROWS, NUM_ROUNDS = 256, 30


def widest(path: np.ndarray, scale: np.ndarray) -> float:
    """Return the standard deviation along the widest direction, in units of the coordinates' standard deviations.

    The direction is found from half of the lanes, and its variance is that of the other half. Without this, the
    widest of many directions would be found to be wide by chance. Of both ways round the smaller one counts, and only
    variance within lanes: that between separate modes cannot be crossed by longer trajectories.

    Args:
        path: Positions of the lanes; shape (steps, lanes, D).
        scale: Standard deviations of the coordinates; shape (D,).
    """
    within = (path - path.mean(axis=0)) / scale
    halves = [_some_rows(within[:, half::2].reshape(-1, within.shape[-1])) for half in range(2)]
    if not all(map(len, halves)):
        return 1.0
    variances = [np.mean((there @ _leading(here)) ** 2) for here, there in (halves, halves[::-1])]
    return float(np.sqrt(min(variances)))


def _some_rows(rows: np.ndarray) -> np.ndarray:
    """Return at most `NUM_ROWS` rows, evenly spaced."""
    return rows[:: max(1, math.ceil(len(rows) / NUM_ROWS))]


def _leading(rows: np.ndarray) -> np.ndarray:
    """Return the unit vector along which rows (n, D) vary most, by power iteration."""
    direction = np.random.default_rng(0).standard_normal((rows.shape[1],))
    for _ in range(NUM_ROUNDS):
        image = rows.T @ (rows @ direction)
        direction = image / (np.linalg.norm(image) or 1.0)
    return direction


def lengthened(kernel: Kernel, width: float) -> Kernel:
    """Return the kernel with trajectories for a posterior whose widest direction has this standard deviation.

    Changed is only `HMC` itself, with the default number of steps and the default length of trajectories.
    """
    if (hmc := _left_to_warm_up(kernel)) is None:
        return kernel
    return replace(hmc, trajectory_length=max(TRAJECTORY_LENGTH, width * math.acos((CORRELATION - 0.2) / 0.8)))


def with_length_of(kernel: Kernel, tuned: Kernel) -> Kernel:
    """Return the kernel with the length of trajectories of a tuned one, if `lengthened` may have set it."""
    hmc = _left_to_warm_up(kernel)
    if hmc is None or not isinstance(tuned, HMC):
        return kernel
    return replace(hmc, trajectory_length=tuned.trajectory_length)


def _left_to_warm_up(kernel: Kernel) -> HMC | None:
    """Return the kernel if it leaves the length of its trajectories to warm-up; None if it does not."""
    if type(kernel) is not HMC or not isinstance(kernel.leapfrog, SequentialLeapfrog):
        return None
    left = kernel.num_integration_steps is None and kernel.trajectory_length == TRAJECTORY_LENGTH
    return kernel if left else None
