"""The interface of warm-up: from dispersed starts to a tuned kernel, a basis, and states near the posterior.

A `Warmup` implements `Warmup.run`, which returns a `Tuned`. Its result does not depend on how the run that follows is
scheduled. A `Watch` is called with the steps of the lanes as they are taken.
"""

import abc
from collections.abc import Callable
from typing import ClassVar, NamedTuple

import numpy as np

from pmcmc._typing import Array, PRNGKey, PyTree
from pmcmc.kernels import Kernel
from pmcmc.target import Target


class WarmupError(RuntimeError):
    """Warm-up found nothing to sample with.

    No move was accepted, some coordinate never moved, or states are not finite; the message says which, and suggests a
    remedy. Nothing has been sampled.
    """


class LaneTiming(NamedTuple):
    """Measured time of a step of the tuned kernel on many lanes at once.

    Attributes:
        num_lanes: Number of lanes.
        seconds_per_step: Seconds of one step of all lanes.
    """

    num_lanes: int
    seconds_per_step: float


# Observes warm-up: called with the target in its current coordinates, and the lanes' coordinates after each step,
# shape (steps, lanes, D).
Watch = Callable[[Target, Array], None]


def ignore(target: Target, path: Array) -> None:
    """A `Watch` that does nothing."""


class Tuned(NamedTuple):
    """Result of warm-up.

    Attributes:
        target: The target in the coordinates that warm-up found.
        kernel: The kernel, with every tunable set.
        states: Last unknowns of the ensemble, with leading axis lanes. Chains start at some of them, and guesses of
            block starts are taken from them. Lanes of different halves of the ensemble descend from different starts.
        acceptance_rate: Mean acceptance rate of the tuned kernel over the last steps of warm-up.
        timing: Time of a step of these lanes, for the planner; None if it was not measured.
        remark: Sentences that say what is doubtful about the result and what may help; "" if nothing is.
        order: Lane numbers in the order in which chains should start from them, so that the chains start apart; shape
            (lanes,). None if the lanes have mixed, and any order is as good.
        num_lost: Number of times that a lane was moved to another lane's position, because it did not move and its log
            density was far below that of all lanes that moved.
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
    """Base class of warm-ups, which tune a kernel.

    The cost and the result of warm-up never depend on the number of chains or blocks of the run, so the same key gives
    the same chain for any schedule.

    Attributes:
        num_starts: Number of positions from which `run` starts.
        shows_path: Whether `run` passes all steps of all lanes to its watch, so that they can be kept as draws.
    """

    num_starts: int
    shows_path: ClassVar[bool] = False

    def tuned_shapes(self, target: Target, kernel: Kernel) -> Tuned | None:
        """Return the shapes of the arrays in the result of `run`, or None if they are not known in advance.

        If they are known, sampling is compiled while warm-up runs. Wrong shapes cost only time: programs are then
        compiled again.
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
        """Tune a kernel on ``num_steps`` steps.

        Args:
            target: Target to sample.
            kernel: Kernel to tune.
            rng_key: Key of the warm-up.
            starts: Positions with leading axis `num_starts`.
            num_steps: Number of warm-up steps.
            watch: Called with the steps of the lanes as they are taken, as far as they are available one by one.

        Returns:
            The tuned kernel, the target in its coordinates, and the ensemble.

        Raises:
            WarmupError: The posterior cannot be sampled like this; with what was observed and a remedy.
        """
