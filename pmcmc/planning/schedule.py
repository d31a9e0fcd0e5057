"""Length of the segments of a run in blocks, which limits what "auto" may lose, and the measured pace of steps.

`next_segment` is the rule: a segment that fails may cost the time saved so far plus the share `LOSS` of a sequential
run. For a plan, `schedule` applies it to a run in which merges occur as predicted; `pmcmc.sampling.automatic` applies
it to the time that a run has really saved. `Pace` estimates the seconds of a step from stretches, some of which may be
delayed by a stalling machine.
"""

import math

import numpy as np

from pmcmc._typing import Scalar
from pmcmc.recurrence import MultipleShooting

# The first segment is at most this share of a run.
FIRST_SHARE = 1 / 8
# Time that a failing segment may cost beyond the time saved so far, as a share of a sequential run.
LOSS = 0.1
# A repair may take this many times its predicted merge before it is given up.
PATIENCE = 4


def patience(merge: Scalar) -> int:
    """Return the steps after which the repair of a segment is given up; merge: as predicted, of its slowest lane."""
    return math.ceil(PATIENCE * max(merge, MultipleShooting.unit))


def next_segment(
    num_steps: int, done: int, saved: Scalar, step: Scalar, num_blocks: int, merge: Scalar, max_steps: Scalar
) -> int:
    """Return the number of steps of the next segment; 0 if none may be risked.

    A segment of L steps that fails costs at most ``step (L / num_blocks + patience)``, with the patience of its repair.
    That may be no more than what was saved so far plus the share `LOSS` of a sequential run:

        step (L / num_blocks + patience) <= LOSS num_steps + saved

    The first segment is at most num_steps / 8, too.

    Args:
        num_steps: T, all steps planned for.
        done: Steps solved so far.
        saved: Time that they saved, in sequential steps; negative if they took longer.
        step: Cost of a step of all lanes, in sequential steps.
        num_blocks: P.
        merge: Predicted steps until the slowest lane has merged.
        max_steps: Steps for which a solve has memory.
    """
    most = num_blocks * ((LOSS * num_steps + saved) / step - patience(merge))
    if not done:
        most = min(most, FIRST_SHARE * num_steps)
    return max(0, int(min(num_steps - done, most, max_steps)))


def schedule(num_steps: int, num_blocks: int, merge: Scalar, step: Scalar, max_steps: Scalar) -> list[int]:
    """Return the segments of a run in which merges arrive as predicted; empty if no segment may be risked.

    Args:
        num_steps: T.
        num_blocks: P.
        merge: Steps until the slowest lane of a segment has merged.
        step: Cost of a step of all lanes, in sequential steps.
        max_steps: Steps for which a solve has memory.
    """
    segments: list[int] = []
    done, saved = 0, 0.0
    while done < num_steps:
        length = next_segment(num_steps, done, saved, step, num_blocks, merge, max_steps)
        if not length or len(segments) > 1000:  # no segment may be risked, or they are too short to pay
            return []
        segments.append(length)
        done += length
        saved += length - step * (length / num_blocks + merge)
    return segments


class Pace:
    """Seconds per step from stretches of steps, robust to a machine that stalls during some of them."""

    def __init__(self) -> None:
        self._steps: list[int] = []
        self._rates: list[float] = []

    def add(self, num_steps: int, seconds: float) -> None:
        """Add a stretch of ``num_steps`` steps that took ``seconds``."""
        self._steps.append(num_steps)
        self._rates.append(seconds / num_steps)

    @property
    def seconds_per_step(self) -> float:
        """Lower median of the seconds per step, over all steps; NaN if there are none.

        Each step counts with the mean of its stretch. So short stretches, which mostly measure the time of a call,
        count little.
        """
        if not self._steps:
            return float("nan")
        order = np.argsort(self._rates)
        count = np.cumsum(np.asarray(self._steps)[order])
        return float(np.asarray(self._rates)[order][np.searchsorted(count, count[-1] / 2)])
