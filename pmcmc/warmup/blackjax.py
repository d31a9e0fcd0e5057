"""Warm-up by BlackJAX's adaptation algorithms.

- `WindowAdaptation`: Stan's windows with NUTS find location and metric.
- `ChEESAdaptation`: tunes the trajectory length of `pmcmc.HMC` by the ChEES criterion, the change in the estimator of
  the expected square.
- `Pathfinder`: moves each start to a draw of a Gaussian approximation fitted along an L-BFGS path.

After that the step size is tuned on up to 32 lanes, by `pmcmc.warmup.lanes.tune`.

Source: Hoffman & Gelman (2014); Hoffman, Radul & Sountsov (2021); Zhang, Carpenter, Gelman & Vehtari (2022).
"""

import math
from dataclasses import dataclass, field, replace
from typing import ClassVar

import jax
import jax.numpy as jnp
import numpy as np

from pmcmc._arguments import as_int, check_rate
from pmcmc._pytree import Array, PRNGKey, PyTree, Scalar, register_dataclass
from pmcmc._xla.compile import tuned_jit
from pmcmc.interop.blackjax import AdaptedTrajectory, chees_adaptation, pathfinder, window_adaptation
from pmcmc.kernels import HMC, Kernel, SequentialLeapfrog, UniformLength
from pmcmc.random.streams import split_key
from pmcmc.target import Target
from pmcmc.warmup.base import Tuned, Warmup, WarmupError, Watch, check_metric, ignore, pooled_moments, take_metric
from pmcmc.warmup.ensemble import EnsembleAdaptation, explore_basis
from pmcmc.warmup.lanes import NUM_LANES, Exploration, check_exploration, is_dense, num_lanes, tune, tuned_shapes
from pmcmc.warmup.settlement import NORMAL_QUARTILES, judge_halves, remedy_for, unsettled


@register_dataclass
@dataclass(frozen=True)
class WindowAdaptation(Warmup):
    """Stan's windows with NUTS for location and metric, then dual averaging of the kernel's own step size.

    1. From each of ``num_starts`` starts, BlackJAX's window adaptation runs NUTS for ``num_steps`` steps. The second
       halves of these paths, pooled, give the mean and covariance that become the target's basis. A remark says so
       if the two parts of these halves disagree, or the paths do (`pmcmc.warmup.settlement.judge_halves`).
    2. In that basis lanes of the kernel, as many as in `EnsembleAdaptation`, run for a quarter as many steps, at
       least 102 (rounded up, see `pmcmc.warmup.lanes.tune`). Over the first two thirds of these, dual averaging brings
       their mean acceptance rate to the kernel's target; the last third decorrelates the lanes.

    Args:
        dense: Full covariance (True) or its diagonal (False). None: full up to 50 dimensions.
        target_acceptance_rate: Acceptance rate to tune to. None: the kernel's own, such as 0.574 for MALA and 0.8 for
            HMC.
        num_starts: Number of starts, from 1 to 32. There are more if a start is given for each of more chains.

    Raises:
        ValueError: ``num_starts`` is not in 1..32, or ``target_acceptance_rate`` not between 0 and 1.
        TypeError: ``num_starts`` is not an integer, or ``target_acceptance_rate`` is a boolean.

    Source: Hoffman & Gelman (2014) for dual averaging; Stan Development Team for windows.
    """

    dense: bool | None = field(default=None, metadata=dict(static=True))
    target_acceptance_rate: Scalar | None = None
    num_starts: int = field(default=4, metadata=dict(static=True))

    def __post_init__(self):
        check_rate("target_acceptance_rate", self.target_acceptance_rate)
        object.__setattr__(self, "num_starts", as_int("num_starts", self.num_starts, 1))
        if self.num_starts > NUM_LANES:
            raise ValueError(f"num_starts must lie in 1..{NUM_LANES}, got {self.num_starts}.")

    def count_starts(self, target, num_given=1):
        return max(num_given, min(self.num_starts, num_lanes(target)))

    def tuned_shapes(self, target: Target, kernel: Kernel, num_starts: int) -> Tuned:
        return tuned_shapes(
            target, kernel, _lanes_per_start(target, num_starts) * num_starts, is_dense(target, self.dense)
        )

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
        if num_steps < 20:
            raise ValueError(f"num_warmup must be 0 or at least 20 (for its windows), got {num_steps}.")
        check_metric(target, kernel)
        metric_key, step_key = split_key(rng_key, 2)
        positions = jax.vmap(target.coordinates)(starts)
        dense = is_dense(target, self.dense)
        found, *halves = _explore(target, metric_key, positions, num_steps=num_steps, dense=dense)
        check_exploration(target, found)
        verdict = judge_halves(*(np.asarray(x, float) for x in (*halves, found.scale)))
        fine = verdict.settled if kernel.metric is None else verdict.placed
        kernel, basis = take_metric(target, kernel, found.mean, found.scale)
        lanes = np.asarray(jax.vmap(basis.to_coordinates)(found.last))
        num_tuning = max(102, num_steps // 4)
        tuned = tune(target.with_basis(basis), kernel, step_key, lanes, self.target_acceptance_rate, num_tuning, watch)
        remark = "" if fine else unsettled(num_steps, remedy_for(target))
        return tuned._replace(remark=" ".join(filter(None, (remark, tuned.remark))))


def _lanes_per_start(target: Target, num_starts: int) -> int:
    """Return the number of lanes for each start of `WindowAdaptation`: together about as many as usual, or one each."""
    return max(1, num_lanes(target) // num_starts)


@tuned_jit()
def _explore(
    target: Target, rng_key: PRNGKey, positions: Array, *, num_steps: int, dense: bool
) -> tuple[Exploration, Array, Array]:
    """Run BlackJAX's window adaptation from each position and pool the second halves of the paths.

    Args:
        target: Target to sample.
        rng_key: Key of the adaptation.
        positions: Starts in the target's coordinates; shape (num_starts, D).
        num_steps: Number of steps per start.
        dense: Whether the scale is a full matrix.

    Returns:
        Moments of the draws, and positions for the lanes, evenly spaced along the second halves; then the two parts of
        each second half as `judge_halves` takes them.
    """

    def one(key, position):
        """Return the path of one start, and its mean acceptance rate."""
        path = window_adaptation(target.logdensity_fn, key, position, num_steps, is_mass_matrix_diagonal=not dense)
        return path.positions, jnp.mean(path.acceptance_rate)

    num_starts = positions.shape[0]
    paths, acceptance_rate = jax.vmap(one)(jax.random.split(rng_key, num_starts), positions)
    late = paths[:, num_steps // 2 :]
    mean, scale = pooled_moments(late.reshape(-1, late.shape[-1]), dense)
    per_start = _lanes_per_start(target, num_starts)
    spaced = jnp.linspace(num_steps // 2, num_steps - 1, per_start).astype(int)
    last = paths[:, spaced].reshape(num_starts * per_start, -1)
    found = Exploration(mean, scale, last, jnp.max(jnp.std(late, axis=1), axis=0), jnp.mean(acceptance_rate))
    parts = late[:, late.shape[1] % 2 :].reshape(num_starts, 2, -1, late.shape[-1])
    lower, median, upper = jnp.quantile(parts, jnp.array([0.25, 0.5, 0.75], parts.dtype), axis=2)
    return found, median, ((upper - lower) / NORMAL_QUARTILES) ** 2


# Learning rate of Adam, as in Hoffman et al. (2021).
LEARNING_RATE = 0.025
# Largest number of leapfrog steps, that of NumPyro's deepest tree; longer trajectories are cut.
MAX_STEPS = 1023


@register_dataclass
@dataclass(frozen=True)
class ChEESAdaptation(Warmup):
    """Warm-up of `HMC` that tunes the trajectory length by the ChEES criterion, over up to 32 lanes.

    The criterion is the change in the estimator of the expected square, which ChEES maximises.

    1. Location and metric are found as in `EnsembleAdaptation`, on half of ``num_steps``.
    2. In that basis BlackJAX's ChEES adapts the step size (to a harmonic mean acceptance rate of 0.651) and the longest
       trajectory T of HMC with lengths uniform on (0, T), for a quarter as many steps, at least 102.
    3. The kernel gets ``UniformLength(1, T / step_size)`` and, unless one is given, the step size. Its lanes then
       run for as many steps again, which decorrelates and times them.

    It is worth its longer compilation if `HMC`'s default length, 0.29 of a period in whitened coordinates, is far
    from the best, as under strong dependence that no linear map removes. It raises the cost of a step, see
    `UniformLength`.

    Args:
        dense: Full covariance (True) or its diagonal (False). None: full up to 50 dimensions.

    Raises:
        ValueError: When run, if the kernel is not an `HMC` with ``num_integration_steps=None`` and
            `SequentialLeapfrog`.
        WarmupError: When run, if ChEES finds no step size or trajectory length.

    Source: Hoffman, Radul & Sountsov (2021).

    Example:
        >>> import jax.numpy as jnp, pmcmc
        >>> chain = pmcmc.sample(
        ...     lambda x: -0.5 * jnp.sum(x**2), jnp.zeros(2), 0, warmup=pmcmc.warmup.ChEESAdaptation(), num_samples=100,
        ...     progress_bar=False
        ... )
        >>> int(chain.kernel.num_integration_steps.low)
        1
    """

    dense: bool | None = field(default=None, metadata=dict(static=True))
    chooses_centredness: ClassVar[bool] = True

    def count_starts(self, target, num_given=1):
        return num_lanes(target, num_given)

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
        if not isinstance(kernel, HMC) or kernel.num_integration_steps is not None:
            raise ValueError(
                f"ChEESAdaptation tunes the trajectory length of HMC(), got {kernel!r}. Leave num_integration_steps "
                "out, or use EnsembleAdaptation()."
            )
        if not isinstance(kernel.leapfrog, SequentialLeapfrog):
            raise ValueError(
                f"ChEESAdaptation draws the number of steps: use SequentialLeapfrog(), got {kernel.leapfrog!r}."
            )
        explore_key, chees_key, step_key = split_key(rng_key, 3)
        explored = explore_basis(target, kernel, explore_key, starts, num_steps, self.dense, watch, num_given=num_given)
        num_tuning = max(102, num_steps // 4)
        lanes = jnp.asarray(explored.lanes, target.spec.dtype)
        found = _find_length(explored.target, chees_key, lanes, num_steps=num_tuning)
        kernel = _take_length(target, explored.kernel, found)
        tuned = tune(explored.target, kernel, step_key, np.asarray(found.positions), None, num_tuning, watch)
        return explored.told(tuned)


@tuned_jit()
def _find_length(target: Target, rng_key: PRNGKey, positions: Array, *, num_steps: int) -> AdaptedTrajectory:
    """Run BlackJAX's ChEES from positions (lanes, D) in whitened coordinates."""
    first: Scalar = 0.5 * target.dim ** (-1 / 4)
    return chees_adaptation(
        target.logdensity_fn, rng_key, positions, num_steps, step_size=first, learning_rate=LEARNING_RATE
    )


def _take_length(target: Target, kernel: HMC, found: AdaptedTrajectory) -> HMC:
    """Return the kernel with the step size and trajectory length that ChEES found.

    Raises:
        WarmupError: The step size or the length is not finite and positive.
    """
    step_size = float(found.step_size)
    length = step_size * float(found.num_integration_steps)
    if not (math.isfinite(length) and step_size > 0):
        raise WarmupError(
            f"ChEES found no trajectory (step size {step_size:.3g}, length {length:.3g}): raise num_warmup, or use "
            "EnsembleAdaptation()."
        )
    if kernel.step_size is None:
        kernel = replace(kernel, step_size=jnp.asarray(step_size, target.spec.dtype))
    longest = int(np.clip(math.ceil(length / float(jnp.asarray(kernel.step_size))), 1, MAX_STEPS))
    return replace(kernel, num_integration_steps=UniformLength(jnp.asarray(1), jnp.asarray(longest)))


@register_dataclass
@dataclass(frozen=True)
class Pathfinder(Warmup):
    """Warm-up that moves every start by Pathfinder, then continues with another warm-up.

    Pathfinder fits a Gaussian along an L-BFGS path from the start, and moves the start to a draw of it. Each start has
    its own path, so starts in different modes stay apart. If a path finds nothing finite, its start stays. Use it for
    posteriors whose bulk is far from the starts: L-BFGS takes tens of gradients where HMC from the tails takes
    hundreds. On small models it takes longer to compile than to run.

    Args:
        then: The warm-up that continues from the new starts.

    Source: Zhang, Carpenter, Gelman & Vehtari (2022), algorithm 1 with 30 iterations.

    Example:
        >>> import jax.numpy as jnp, pmcmc
        >>> chain = pmcmc.sample(
        ...     lambda x: -0.5 * jnp.sum((x - 50) ** 2), jnp.zeros(2), 0,
        ...     warmup=pmcmc.warmup.Pathfinder(), num_samples=100, progress_bar=False
        ... )
        >>> bool(abs(chain.get_samples().mean() - 50) < 1)
        True
    """

    then: Warmup = field(default=EnsembleAdaptation(), metadata=dict(static=True))

    def count_starts(self, target, num_given=1):
        return self.then.count_starts(target, num_given)

    @property
    def shows_path(self) -> bool:  # type: ignore[override]
        return self.then.shows_path

    @property
    def metric(self):
        return self.then.metric

    def tuned_shapes(self, target: Target, kernel: Kernel, num_starts: int) -> Tuned | None:
        return self.then.tuned_shapes(target, kernel, num_starts)

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
        path_key, rest_key = split_key(rng_key, 2)
        return self.then.run(target, kernel, rest_key, _move(target, path_key, starts), num_steps, watch, num_given)


@tuned_jit()
def _move(target: Target, rng_key: PRNGKey, starts: PyTree) -> PyTree:
    """Return the starts moved by Pathfinder, as positions of the same structure."""

    def one(key: PRNGKey, start: Array) -> Array:
        """Return the draw found from one start, or the start itself if anything there is not finite."""
        moved, elbo = pathfinder(target.logdensity_fn, key, start)
        value, gradient = target.value_and_grad(moved)
        usable = jnp.isfinite(elbo) & jnp.isfinite(value) & jnp.all(jnp.isfinite(gradient))
        return jnp.where(usable, moved, start)

    rows = jax.vmap(target.coordinates)(starts)
    moved = jax.vmap(one)(jax.random.split(rng_key, rows.shape[0]), rows)
    return jax.vmap(target.position)(moved)
