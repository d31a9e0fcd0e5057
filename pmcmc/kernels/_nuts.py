"""The No-U-Turn sampler."""

from dataclasses import dataclass, field
from typing import Any

import jax.numpy as jnp

from pmcmc._tree import register_dataclass
from pmcmc._types import Scalar
from pmcmc.interop import _blackjax_algorithm as interop
from pmcmc.kernels._blackjax import AlgorithmKernel


@register_dataclass
@dataclass(frozen=True)
class NUTS(AlgorithmKernel):
    """BlackJAX's NUTS: a trajectory of ``H(x, p) = -log p(x) + |p|^2 / 2`` doubled until it turns back on itself.

    step_size: the leapfrog step, in units of the target's coordinates; None: tuned by warm-up to an acceptance rate
        of 0.8, as for HMC. The metric is the identity, right in the whitened coordinates of warm-up.
    max_num_doublings: deepest tree, of ``2^max_num_doublings - 1`` leapfrog steps; NumPyro's ``max_tree_depth``.

    Extra fields ``num_steps`` and ``tree_depth`` beside those of HMC; ``accept_prob`` is the mean over the trajectory.
    Run as lanes, every lane waits for the deepest tree of a step. Given the same keys, step for step equal to
    ``blackjax.nuts``.

    Raises:
        ValueError: step_size not positive, max_num_doublings below 1.

    Source: Hoffman & Gelman 2014; multinomial and iterative as in Betancourt 2017 and Phan et al. 2019.

    Example:
        >>> import pmcmc
        >>> pmcmc.NUTS(step_size=0.5).max_num_doublings
        10
    """

    step_size: Scalar | None = None
    max_num_doublings: int = field(default=10, metadata=dict(static=True))

    def __post_init__(self):
        if isinstance(self.step_size, (int, float)) and not self.step_size > 0:
            raise ValueError(f"step_size must be positive, got {self.step_size}.")
        if self.max_num_doublings < 1:
            raise ValueError(f"max_num_doublings must be at least 1, got {self.max_num_doublings}.")

    def algorithm(self, target) -> Any:
        dtype = target.spec.dtype
        step_size, metric = jnp.asarray(self.step_size, dtype), jnp.ones(target.dim, dtype)
        return interop.nuts(target.logdensity_fn, step_size, metric, self.max_num_doublings)
