"""The interface of warm-up: from dispersed starts to a tuned kernel, a basis, and states near the posterior.

A `Warmup` implements `Warmup.run`, which returns a `Tuned`. Its result does not depend on how the run that follows is
scheduled. A `Watch` is called with the steps of the lanes as they are taken.

All warm-ups share what follows. `check_metric` and `take_metric` turn the inverse mass matrix that a user gave into the
basis in which the kernel is tuned. `pooled_moments` and `path_moments` estimate mean and covariance, shrunk so that the
Cholesky factor stays finite if there are few draws: the first in traced programs, weighted by the number of draws, the
second on the host, weighted by the effective number of draws of lanes.

`start_order` chooses the lanes that chains start from. If the lanes of warm-up have not mixed, they may lie in separate
modes. It sorts them so that the first chains start in different modes. Lanes are told apart by their means, with

    F[d] = variance between the means of the lanes / mean variance within a lane

as the weight of coordinate d. So R-hat shows what the ensemble found.
"""

import abc
from collections.abc import Callable
from typing import ClassVar, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from pmcmc._pytree import Array, ArrayLeaf, PRNGKey, PyTree
from pmcmc.kernels import Compose, Kernel
from pmcmc.target import Basis, Target


class WarmupError(RuntimeError):
    """Warm-up found nothing to sample with.

    No move was accepted, some coordinate never moved, or states are not finite; the message says which, and suggests a
    remedy. Nothing has been sampled.
    """


class LaneTiming(NamedTuple):
    """Measured time of a step of the tuned kernel, or of the one that was tuned in its place, on many lanes at once.

    Attributes:
        num_lanes: Number of lanes.
        seconds_per_step: Seconds of one step of all lanes.
        num_leapfrogs: Leapfrog steps of a step of the kernel that was timed in place of the tuned one (see
            `Kernel.tuned_by`); 0 if the tuned kernel itself was timed.
    """

    num_lanes: int
    seconds_per_step: float
    num_leapfrogs: float = 0.0


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
        num_lost: Number of times that a lane was moved to another lane's position, because its log density stayed far
            below that of the others.
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
        shows_path: Whether `run` passes all steps of all lanes to its watch, so that they can be kept as draws.
        chooses_centredness: Whether `run` chooses the centredness of partially centred sites.
        uses_gradient: Whether `run` evaluates gradients of the log density, also for a kernel that does not.
    """

    shows_path: ClassVar[bool] = False
    chooses_centredness: ClassVar[bool] = False
    uses_gradient: ClassVar[bool] = True

    @property
    def metric(self) -> ArrayLeaf | None:
        """The inverse mass matrix that the user gave to the warm-up; None if there is none."""
        return getattr(self, "inverse_mass_matrix", None)

    @abc.abstractmethod
    def count_starts(self, target: Target, num_given: int = 1) -> int:
        """Return the number of positions from which `run` starts.

        Args:
            target: Target to sample.
            num_given: Number of different starts that the user gave, one for each chain. The result must not be
                smaller, so that each chain can start from its own.
        """

    def tuned_shapes(self, target: Target, kernel: Kernel, num_starts: int) -> Tuned | None:
        """Return the shapes of the arrays in the result of `run`, or None if they are not known in advance.

        If they are known, sampling is compiled while warm-up runs. Wrong shapes cost only time: programs are then
        compiled again.

        Args:
            target: Target to sample.
            kernel: Kernel to tune.
            num_starts: Number of positions from which `run` starts.
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
        num_given: int = 1,
    ) -> Tuned:
        """Tune a kernel on ``num_steps`` steps.

        Args:
            target: Target to sample.
            kernel: Kernel to tune.
            rng_key: Key of the warm-up.
            starts: Positions; their leading axis has the length that `count_starts` returns.
            num_steps: Number of warm-up steps.
            watch: Called with the steps of the lanes as they are taken, as far as they are available one by one.
            num_given: Number of different starts that the user gave, as in `count_starts`. If there are several, start
                number i is that of chain ``i % num_given``, and the lane that chain starts from must descend from it.

        Returns:
            The tuned kernel, the target in its coordinates, and the ensemble.

        Raises:
            WarmupError: The posterior cannot be sampled like this; with what was observed and a remedy.
        """


# The lanes have not mixed if the variance of their means exceeds this share of the variance within a lane, in some
# coordinate. A single lane of 32 that spends half of its steps in a mode five standard deviations away gives 0.16,
# without the noise of the means.
APART = 0.25
# Lanes whose means are within this many standard deviations of one lane's draws are taken to be in the same mode.
RADIUS = 2.0


def start_order(path: np.ndarray, logdensity: np.ndarray) -> np.ndarray | None:
    """Return the lanes in the order in which chains should start from them; None if the lanes have mixed.

    The squared distance of two lanes is the mean of ``(mean - mean')^2 / (variance within)`` over the coordinates,
    weighted by

        F[d] = variance between the means of the lanes / mean variance within a lane

    so that coordinates in which the lanes agree do not count. The first lane is followed by the lane that has, within
    `RADIUS`, the most lanes not yet within `RADIUS` of an earlier one. This repeats until every lane is within `RADIUS`
    of a chosen one; then come the others by number. So each mode has a chain, the most frequent modes first, and the
    first k lanes are the same for any number of chains.

    A lane far out in the tails would count as a separate mode, so lanes whose log density is an outlier below all
    others come last. Of up to four lanes none is an outlier, because it moves the quartiles as far: where a model is so
    costly that there are only four, a lane in the tails counts as a mode.

    Args:
        path: Coordinates of the lanes under a fixed kernel; shape (steps, lanes, D).
        logdensity: Log densities; shape (steps, lanes).

    Returns:
        Lane numbers; shape (lanes,). None if the lanes have mixed.
    """
    path = np.asarray(path, float)
    means, within = path.mean(axis=0), path.var(axis=0).mean(axis=0)
    within = np.where(within > 0, within, np.finfo(float).tiny)
    between = np.minimum(means.var(axis=0) / within, 1e12)
    if not between.max(initial=0.0) > APART:
        return None
    # Distances between the lanes' means, in coordinates in which the lanes differ.
    places = (means - means.mean(axis=0)) * np.sqrt(between / between.sum() / within)
    squares = np.sum(places**2, axis=1)
    near = squares[:, None] + squares - 2 * places @ places.T <= RADIUS**2
    np.fill_diagonal(near, True)
    fit = ~_is_outlier(logdensity.mean(axis=0, dtype=float))
    # Choose lanes until every lane that is not an outlier is near a chosen one.
    order, open_lanes = [int(np.argmax(fit))], fit.copy()
    open_lanes &= ~near[order[0]]
    while open_lanes.any():
        order.append(int(np.argmax(np.where(open_lanes, (near & open_lanes).sum(axis=1), -1))))
        open_lanes &= ~near[order[-1]]
    others = np.setdiff1d(np.arange(len(fit)), order)
    return np.array([*order, *others[fit[others]], *others[~fit[others]]])


def _is_outlier(values: np.ndarray) -> np.ndarray:
    """Return which values are far below all others: by three interquartile ranges and 3 below the lower quartile.

    Up to four values have no outlier.
    """
    low, high = np.quantile(values, (0.25, 0.75))
    return values < low - 3 * (high - low) - 3  # False if a value is NaN


def pooled_moments(draws: Array, dense: bool) -> tuple[Array, Array]:
    """Return the mean of draws, and the Cholesky factor of their covariance or their standard deviations.

    The correlation is shrunk towards the identity by ``D / (D + N)``.

    Args:
        draws: Shape (N, D).
        dense: Whether to return a factor (D, D); otherwise standard deviations (D,).
    """
    count, dim = draws.shape
    mean = jnp.mean(draws, axis=0)
    centred = draws - mean[None]
    scale = jnp.sqrt(jnp.mean(centred**2, axis=0))
    if not dense:
        return mean, scale
    weight = dim / (dim + count)
    standardised = centred / scale[None]
    correlation = standardised.T @ standardised / count
    correlation = (1 - weight) * correlation + weight * jnp.eye(dim, dtype=draws.dtype)
    return mean, scale[:, None] * jnp.linalg.cholesky(correlation)


def path_moments(path: np.ndarray, dense: bool) -> tuple[np.ndarray, np.ndarray]:
    """Return the mean of a path of lanes, and the Cholesky factor of its covariance or its standard deviations.

    A coordinate that did not move keeps its scale. The correlation is shrunk towards the identity by
    ``(D / (D + n))^2``, with n the effective number of draws. This is negligible for many draws, however strong the
    correlation, and enough to keep the factor finite for few.

    Args:
        path: Coordinates of the lanes; shape (steps, lanes, D).
        dense: Whether to return a factor (D, D); otherwise standard deviations (D,).
    """
    num_steps, num_lanes, dim = path.shape
    draws = path.reshape(-1, dim)
    mean, deviation = draws.mean(axis=0), draws.std(axis=0)
    deviation = np.where(deviation > 0, deviation, 1.0)
    if not dense:
        return mean, deviation
    z = (path - mean) / deviation
    lagged = np.clip(np.mean(z[1:] * z[:-1], axis=(0, 1)).max(), 0.0, 1.0)
    effective = num_lanes * (1 + (num_steps - 1) * (1 - lagged) / (1 + lagged))
    weight = (dim / (dim + effective)) ** 2
    z = z.reshape(-1, dim)
    correlation = (1 - weight) * (z.T @ z) / len(z)
    np.fill_diagonal(correlation, 1.0)
    return mean, deviation[:, None] * np.linalg.cholesky(correlation)


def check_metric(target: Target, kernel: Kernel, metric: ArrayLeaf | None = None) -> None:
    """Check that the user's metric fits the target and is positive definite; called before warm-up starts.

    Args:
        target: Target to sample.
        kernel: Kernel to tune.
        metric: Inverse mass matrix given to the warm-up. None: that of the kernel, if it has one.

    Raises:
        ValueError: The metric does not fit or is not positive definite, or there are two.
    """
    own = kernel.metric
    if own is not None and metric is not None:
        raise ValueError("inverse_mass_matrix is given twice, to the kernel and to warmup=: leave one of them out.")
    metric = own if metric is None else metric
    if metric is None:
        return
    metric = np.asarray(metric)
    if metric.shape not in ((), (target.dim,), (target.dim, target.dim)):
        raise ValueError(
            f"inverse_mass_matrix has shape {metric.shape}: expected ({target.dim},) or ({target.dim}, {target.dim}), "
            "the number of unconstrained parameters."
        )
    values = np.linalg.eigvalsh(metric) if metric.ndim == 2 else metric
    if not np.all(np.isfinite(values) & (values > 0)):
        raise ValueError("inverse_mass_matrix is not positive definite: it should be about the posterior's covariance.")


def check_metrics(target: Target, kernel: Kernel) -> None:
    """Check the metric of a kernel, or of each site group of a `Compose`, see `check_metric`.

    Raises:
        ValueError: A metric does not fit or is not positive definite.
    """
    if not isinstance(kernel, Compose):
        check_metric(target, kernel)
        return
    for block in kernel.blocks:
        try:
            check_metric(block.given(target), block.kernel)
        except ValueError as error:
            raise ValueError(f"{error} It was given for the sites {list(block.names(target))}.") from error


def take_metric(
    target: Target, kernel: Kernel, loc: ArrayLeaf, scale: ArrayLeaf, metric: ArrayLeaf | None = None
) -> tuple[Kernel, Basis]:
    """Return the kernel and the basis to tune it in, the only place where a metric takes effect.

    Args:
        target: Target to sample.
        kernel: Kernel to tune.
        loc: Mean that the exploration found; shape (D,).
        scale: Its standard deviations (D,), or a Cholesky factor of its covariance (D, D).
        metric: Inverse mass matrix given to the warm-up, see `check_metric`.

    Returns:
        The kernel without its metric, and the explored basis. If there is a metric of the user's, its scale takes the
        place of the explored one, of which ``spread`` remains.
    """
    metric, kernel = metric if kernel.metric is None else kernel.metric, kernel.without_metric()
    parts = [loc, scale]
    if metric is not None:
        given = scale_of_metric(metric, target.dim)
        parts = [loc, given, spread_between(np.asarray(given, float), np.asarray(scale, float))]
    return kernel, Basis(*(jax.device_put(np.asarray(x, target.spec.dtype)) for x in parts))


def spread_between(scale: np.ndarray, explored: np.ndarray) -> np.ndarray:
    """Return the standard deviations of a law with the scale ``explored`` in the coordinates of a basis, (D,)."""
    if scale.ndim == 1:
        return (np.linalg.norm(explored, axis=1) if explored.ndim == 2 else explored) / scale
    return np.linalg.norm(np.linalg.solve(scale, explored if explored.ndim == 2 else np.diag(explored)), axis=1)


def scale_of_metric(metric: ArrayLeaf, dim: int) -> np.ndarray:
    """Return the scale of the basis whose `Basis.covariance` is an inverse mass matrix.

    Args:
        metric: Inverse mass matrix; a number, (dim,) or (dim, dim).
        dim: Number of dimensions.

    Returns:
        Standard deviations (dim,), or a Cholesky factor (dim, dim) for a full matrix.
    """
    metric = np.asarray(metric, float)
    return np.linalg.cholesky(metric) if metric.ndim == 2 else np.broadcast_to(np.sqrt(metric), (dim,))
