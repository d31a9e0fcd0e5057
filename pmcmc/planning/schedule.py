"""How long the next segment of a run may be, and what steps really took."""

import numpy as np

from pmcmc._typing import Scalar

# The first segment is at most this share of a run.
FIRST_SHARE = 1 / 8
# What a failing segment may cost beyond all that was saved so far, as a share of a sequential run.
LOSS = 0.1


def next_segment(num_steps: int, done: int, saved: Scalar, cost: Scalar, max_steps: Scalar) -> int:
    """Steps of the next segment: as many as may be lost, at most T/8 at first.

    A segment that fails costs ``cost`` per step; what it costs in all may exceed what was saved so far by a tenth of
    the sequential run.

    num_steps: T, all steps planned for, of which ``done`` are solved. saved: steps of sequential sampling that they
    saved. cost: of a step in blocks, in steps of sequential sampling.
    """
    allowed = (LOSS * num_steps + max(saved, 0.0)) / cost
    if not done:
        allowed = min(allowed, FIRST_SHARE * num_steps)
    return max(1, int(min(num_steps - done, allowed, max_steps)))


def schedule(num_steps: int, num_blocks: int, merge: Scalar, step: Scalar, max_steps: Scalar) -> list[int]:
    """Segments of a run in which merges arrive as predicted; step: of all lanes, in steps of sequential sampling."""
    segments: list[int] = []
    done, saved = 0, 0.0
    while done < num_steps:
        # merges are known to arrive by the time that a segment is repaired; a first guess of its length is T/8
        guess = segments[-1] if segments else FIRST_SHARE * num_steps
        length = next_segment(num_steps, done, saved, step * (1 / num_blocks + merge / guess), max_steps)
        segments.append(length)
        done += length
        saved += length - step * (length / num_blocks + merge)
        if len(segments) > 1000:  # each segment too short to pay: it will not be chosen
            return [*segments, num_steps - done]
    return segments


class Pace:
    """Stretches of steps and the seconds that they took. A machine that stalls for a moment spoils one of them."""

    def __init__(self) -> None:
        self._steps: list[int] = []
        self._rates: list[float] = []

    def add(self, num_steps: int, seconds: float) -> None:
        """One more stretch."""
        self._steps.append(num_steps)
        self._rates.append(seconds / num_steps)

    @property
    def seconds_per_step(self) -> float:
        """The lower median over all steps, each at the rate of its stretch; NaN where there are none.

        Short stretches, most of whose time goes into the call, count as little as they are long.
        """
        if not self._steps:
            return float("nan")
        order = np.argsort(self._rates)
        count = np.cumsum(np.asarray(self._steps)[order])
        return float(np.asarray(self._rates)[order][np.searchsorted(count, count[-1] / 2)])
