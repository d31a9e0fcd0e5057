"""What a step takes, told by stretches of steps of which some may have been held up."""

import numpy as np


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
