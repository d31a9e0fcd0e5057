"""The seam of warm-up: from dispersed starts to a tuned kernel, a basis, and states near the posterior."""

import abc
from collections.abc import Callable
from typing import ClassVar, NamedTuple

import numpy as np

from pmcmc._typing import Array, PRNGKey, PyTree
from pmcmc.kernels import Kernel
from pmcmc.target import Target


class WarmupError(RuntimeError):
    """Warm-up found nothing to sample with.

    No accepted move, no movement in some coordinate, or states that are not finite: the message says which, and what
    to do. Nothing has been sampled.
    """


class LaneTiming(NamedTuple):
    """Seconds that a step of the tuned kernel took on ``num_lanes`` lanes at once."""

    num_lanes: int
    seconds_per_step: float


# Told what warm-up does: the target in the coordinates of the moment, and where the lanes stood in them after each
# step, (steps, lanes, D).
Watch = Callable[[Target, Array], None]


def ignore(target: Target, path: Array) -> None:
    """The `Watch` that looks away."""


class Tuned(NamedTuple):
    """What warm-up hands to sampling.

    target: in the coordinates that warm-up found. kernel: with every tunable set.
    states: (lanes, ...) last unknowns of the ensemble; chains start here, and guesses for block starts are drawn
        here. Lanes of different halves descend from different starts.
    acceptance_rate: of the tuned kernel over the last steps of warm-up.
    timing: of its lanes, for the planner; None where it was not taken.
    remark: what is doubtful about all this and what may help, in sentences; "" where nothing is.
    order: (lanes,) from which chains should start, one after the other, so that they start apart; None where the lanes
        have mixed, and any will do.
    num_lost: times that a lane was put on another's place, because it did not move and its log density was far below
        that of all that did.
    """

    target: Target
    kernel: Kernel
    states: PyTree
    acceptance_rate: Array
    timing: LaneTiming | None = None
    remark: str = ""
    order: np.ndarray | None = None
    num_lost: int = 0


class Warmup(abc.ABC):
    """Tunes a kernel.

    Its cost and its result never depend on the number of chains or blocks of the run, so the same key gives the same
    chain whatever the schedule.
    """

    num_starts: int
    # whether `run` shows its watch all steps of all lanes, so that they can be kept as draws
    shows_path: ClassVar[bool] = False

    def tuned_shapes(self, target: Target, kernel: Kernel) -> Tuned | None:
        """Shapes of the arrays in what `run` will return; None where they are not known before.

        With them sampling is compiled beside warm-up. They are a promise that saves time: where it is broken, programs
        are compiled once more.
        """
        return None

    @abc.abstractmethod
    def run(
        self,
        target: Target,
        kernel: Kernel,
        rng_key: PRNGKey,
        starts: PyTree,
        num_steps: int,
        watch: Watch = ignore,
    ) -> Tuned:
        """Tune on ``num_steps`` steps from ``starts``, positions with leading axis `num_starts`.

        watch: called with the steps of lanes as they are taken, as far as they are known one by one.

        Raises:
            WarmupError: with what was seen and a remedy.
        """
