"""Length of the segments of a run in blocks, which limits what "auto" may lose, and the measured pace of steps.

`next_segment` is the rule: a segment is planned to cost at most the time saved so far plus the share `LOSS` of a
sequential run. A segment that fails may cost more, since its repair is given up after several predicted merges and one
is counted (`PATIENCE` in `pmcmc.sampling.automatic`). For a plan, `schedule` applies it to a run in which merges occur
as predicted; `pmcmc.sampling.automatic` applies it to the time that a run has really saved. `Pace` estimates the
seconds of a step from stretches, some of which may be delayed by a stalling machine.
"""

import numpy as np

from pmcmc._typing import Scalar
from pmcmc.planning.costs import segment_cost

# The first segment is at most this share of a run.
FIRST_SHARE = 1 / 8
# Time that a failing segment may cost beyond the time saved so far, as a share of a sequential run.
LOSS = 0.1


def next_segment(num_steps: int, done: int, saved: Scalar, cost: Scalar, max_steps: Scalar) -> int:
    """Return the number of steps of the next segment.

    Its planned cost, ``cost`` per step, is at most the time saved so far plus the share `LOSS` of a sequential run. The
    first segment is at most T / 8.

    Args:
        num_steps: T, all steps planned for.
        done: Steps solved so far.
        saved: Time saved so far, in sequential steps; it may be negative.
        cost: Cost of a step in blocks, in sequential steps; see `segment_cost`.
        max_steps: Steps for which a solve has memory.
    """
    allowed = (LOSS * num_steps + max(saved, 0.0)) / cost
    if not done:
        allowed = min(allowed, FIRST_SHARE * num_steps)
    return max(1, int(min(num_steps - done, allowed, max_steps)))


def schedule(num_steps: int, num_blocks: int, merge: Scalar, step: Scalar, max_steps: Scalar) -> list[int]:
    """Return the lengths of the segments of a run in which merges occur as predicted.

    Args:
        num_steps: T, steps per chain.
        num_blocks: P, blocks per chain.
        merge: Steps until the slowest lane of a segment has merged.
        step: Cost of a step of all lanes, in sequential steps.
        max_steps: Steps for which a solve has memory.
    """
    segments: list[int] = []
    done, saved = 0, 0.0
    while done < num_steps:
        # The cost of a step depends on the length of the segment, which is guessed: that of the last one, or T / 8.
        guess = segments[-1] if segments else FIRST_SHARE * num_steps
        length = next_segment(num_steps, done, saved, segment_cost(step, num_blocks, merge, guess), max_steps)
        segments.append(length)
        done += length
        saved += length * (1 - segment_cost(step, num_blocks, merge, length))
        if len(segments) > 1000:  # segments are too short to pay: this plan will not be chosen
            return [*segments, num_steps - done]
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
