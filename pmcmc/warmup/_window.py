"""Warm-up in two parts: BlackJAX's window adaptation for the metric, dual averaging for the kernel at hand."""

from dataclasses import dataclass, field

import jax
import jax.numpy as jnp
import numpy as np

from pmcmc._jit import tuned_jit
from pmcmc._tree import register_dataclass
from pmcmc._types import Array, PRNGKey, PyTree, Scalar
from pmcmc.interop._blackjax import window_adaptation
from pmcmc.kernels import Kernel
from pmcmc.target import Target
from pmcmc.warmup._base import Tuned, Warmup, Watch, ignore
from pmcmc.warmup._lanes import (
    NUM_LANES,
    Exploration,
    check_exploration,
    check_metric,
    is_dense,
    take_metric,
    tune,
    tuned_shapes,
)


@register_dataclass
@dataclass(frozen=True)
class WindowAdaptation(Warmup):
    """Stan's windows with NUTS for location and metric, then dual averaging of the kernel's own step size.

    1. From each of ``num_starts`` starts BlackJAX's window adaptation runs NUTS for ``num_steps`` steps. The second
       halves of these paths, pooled, give the mean and covariance that become the target's basis.
    2. In that basis 32 lanes of the kernel run for a quarter as many steps (at least 102). Over the first two thirds
       dual averaging brings their mean acceptance rate to the kernel's target; the rest decorrelates the lanes.

    dense: full covariance (True) or its diagonal (False). None: full up to 50 dimensions.
    target_acceptance_rate: None: the kernel's own, such as 0.574 for MALA and 0.8 for HMC.
    num_starts: size of the first ensemble.

    Sources: Hoffman & Gelman 2014 (dual averaging); Stan Development Team (windows).
    """

    dense: bool | None = field(default=None, metadata=dict(static=True))
    target_acceptance_rate: Scalar | None = None
    num_starts: int = field(default=4, metadata=dict(static=True))

    def __post_init__(self):
        if not 1 <= self.num_starts <= NUM_LANES:
            raise ValueError(f"num_starts must lie in 1..{NUM_LANES}, got {self.num_starts}.")

    def tuned_shapes(self, target: Target, kernel: Kernel) -> Tuned:
        return tuned_shapes(target, kernel, is_dense(target, self.dense))

    def run(
        self,
        target: Target,
        kernel: Kernel,
        rng_key: PRNGKey,
        starts: PyTree,
        num_steps: int,
        watch: Watch = ignore,
    ) -> Tuned:
        if num_steps < 20:
            raise ValueError(f"num_warmup must be 0 or at least 20 (windows need room), got {num_steps}.")
        check_metric(target, kernel)
        metric_key, step_key = jax.random.split(rng_key)
        positions = jax.vmap(target.coordinates)(starts)
        dense = is_dense(target, self.dense)
        found = _explore(target, metric_key, positions, num_steps=num_steps, dense=dense)
        check_exploration(target, found)
        kernel, basis = take_metric(target, kernel, found)
        lanes = np.asarray(jax.vmap(basis.to_coordinates)(found.last))
        num_tuning = max(102, num_steps // 4)
        return tune(target.with_basis(basis), kernel, step_key, lanes, self.target_acceptance_rate, num_tuning, watch)


@tuned_jit(static_argnames=("num_steps", "dense"))
def _explore(target: Target, rng_key: PRNGKey, positions: Array, *, num_steps: int, dense: bool) -> Exploration:
    def one(key, position):
        path = window_adaptation(target.logdensity_fn, key, position, num_steps, is_mass_matrix_diagonal=not dense)
        return path.positions, jnp.mean(path.acceptance_rate)

    num_starts = positions.shape[0]
    paths, acceptance_rate = jax.vmap(one)(jax.random.split(rng_key, num_starts), positions)
    late = paths[:, num_steps // 2 :]
    draws = late.reshape(-1, late.shape[-1])
    mean = jnp.mean(draws, axis=0)
    centred = draws - mean[None]
    variance = jnp.mean(centred**2, axis=0)
    scale = jnp.sqrt(variance)
    if dense:
        # Shrinkage towards the diagonal keeps the factor finite when there are few draws for the dimension.
        weight = target.dim / (target.dim + draws.shape[0])
        standardised = centred / scale[None]
        correlation = standardised.T @ standardised / draws.shape[0]
        correlation = (1 - weight) * correlation + weight * jnp.eye(target.dim, dtype=draws.dtype)
        scale = scale[:, None] * jnp.linalg.cholesky(correlation)
    per_start = NUM_LANES // num_starts
    spaced = jnp.linspace(num_steps // 2, num_steps - 1, per_start).astype(int)
    last = paths[:, spaced].reshape(num_starts * per_start, -1)
    return Exploration(mean, scale, last, jnp.max(jnp.std(late, axis=1), axis=0), jnp.mean(acceptance_rate))
