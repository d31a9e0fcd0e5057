"""Warm-up of HMC with its trajectory length: an ensemble for location and metric, ChEES for the length."""

import math
from dataclasses import dataclass, field, replace

import jax.numpy as jnp
import numpy as np

from pmcmc._jit import tuned_jit
from pmcmc._tree import register_dataclass
from pmcmc._types import Array, PRNGKey, PyTree, Scalar
from pmcmc.interop._blackjax import AdaptedTrajectory, chees_adaptation
from pmcmc.kernels import HMC, Kernel, SequentialLeapfrog, UniformLength
from pmcmc.target import Target
from pmcmc.warmup._base import Tuned, Warmup, WarmupError, Watch, ignore
from pmcmc.warmup._ensemble import explore_basis, split_key
from pmcmc.warmup._lanes import NUM_LANES, tune

# Adam's, as in Hoffman et al. 2021.
LEARNING_RATE = 0.025
# A trajectory that ChEES wants longer than this in steps is cut: NumPyro's deepest tree.
MAX_STEPS = 1023


@register_dataclass
@dataclass(frozen=True)
class ChEESAdaptation(Warmup):
    """For `HMC`: its trajectory length by the change in the estimator of the expected square, over 32 lanes.

    1. Location and metric as in `EnsembleAdaptation`, on half of ``num_steps``.
    2. In that basis BlackJAX's ChEES adapts step size (to a harmonic mean acceptance rate of 0.651) and the longest
       trajectory T of HMC whose lengths are uniform on (0, T), for a quarter as many steps (at least 102).
    3. The kernel gets ``UniformLength(1, T / step_size)`` and the step size, unless it has one of its own; its lanes
       run for some hundred steps, which decorrelates and times them.

    Worth its longer compilation where a quarter of a period in whitened coordinates, `HMC`'s own length, is far from
    the best: strong dependence that no linear map removes. It raises the cost of a step, see `UniformLength`.

    dense: full covariance (True) or its diagonal (False). None: full up to 50 dimensions.

    Raises (on use):
        ValueError: the kernel is no HMC with ``num_integration_steps=None``.

    Source: Hoffman, Radul & Sountsov 2021.

    Example:
        >>> import jax.numpy as jnp, pmcmc
        >>> chain = pmcmc.sample(
        ...     lambda x: -0.5 * jnp.sum(x**2), jnp.zeros(2), 0, warmup=pmcmc.ChEESAdaptation(), num_samples=100,
        ...     progress_bar=False
        ... )
        >>> int(chain.kernel.num_integration_steps.low)
        1
    """

    dense: bool | None = field(default=None, metadata=dict(static=True))

    @property
    def num_starts(self) -> int:  # type: ignore[override]
        return NUM_LANES

    def run(
        self,
        target: Target,
        kernel: Kernel,
        rng_key: PRNGKey,
        starts: PyTree,
        num_steps: int,
        watch: Watch = ignore,
    ) -> Tuned:
        if not isinstance(kernel, HMC) or kernel.num_integration_steps is not None:
            raise ValueError(
                f"ChEESAdaptation tunes the trajectory length of HMC(), got {kernel!r}. Leave num_integration_steps "
                "out, or use EnsembleAdaptation()."
            )
        if not isinstance(kernel.leapfrog, SequentialLeapfrog):
            raise ValueError(f"ChEESAdaptation draws the number of steps, which {kernel.leapfrog!r} cannot take.")
        explore_key, chees_key, step_key = split_key(rng_key, number=3)
        explored = explore_basis(target, kernel, explore_key, starts, num_steps, self.dense, watch)
        whitened, num_tuning = target.with_basis(explored.basis), max(102, num_steps // 4)
        lanes = jnp.asarray(explored.lanes, target.spec.dtype)
        found = _find_length(whitened, chees_key, lanes, num_steps=num_tuning)
        kernel = _take_length(target, explored.kernel, found)
        tuned = tune(whitened, kernel, step_key, np.asarray(found.positions), None, num_tuning, watch)
        return explored.told(tuned)


@tuned_jit(static_argnames="num_steps")
def _find_length(target: Target, rng_key: PRNGKey, positions: Array, *, num_steps: int) -> AdaptedTrajectory:
    first: Scalar = 0.5 * target.dim ** (-1 / 4)
    return chees_adaptation(
        target.logdensity_fn, rng_key, positions, num_steps, step_size=first, learning_rate=LEARNING_RATE
    )


def _take_length(target: Target, kernel: HMC, found: AdaptedTrajectory) -> HMC:
    step_size = float(found.step_size)
    length = step_size * float(found.num_integration_steps)
    if not (math.isfinite(length) and step_size > 0):
        raise WarmupError(
            f"ChEES found no trajectory (step size {step_size:.3g}, length {length:.3g}): lengthen num_warmup, or use "
            "EnsembleAdaptation()."
        )
    if kernel.step_size is None:
        kernel = replace(kernel, step_size=jnp.asarray(step_size, target.spec.dtype))
    longest = int(np.clip(math.ceil(length / float(jnp.asarray(kernel.step_size))), 1, MAX_STEPS))
    return replace(kernel, num_integration_steps=UniformLength(jnp.asarray(1), jnp.asarray(longest)))
