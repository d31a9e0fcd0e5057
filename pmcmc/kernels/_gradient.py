"""What kernels with a cached gradient share: the state and the way in and out of it."""

from typing import NamedTuple

import jax.numpy as jnp

from pmcmc._types import Array
from pmcmc.kernels._base import Info, PositionKernel
from pmcmc.kernels._metropolis import Surrogate, decide


class GradientState(NamedTuple):
    """Position (D,) in the target's coordinates with the log density and its gradient (D,) there."""

    position: Array
    logdensity: Array
    gradient: Array


def accept(
    surrogate: Surrogate, state: GradientState, proposal: GradientState, log_ratio: Array, log_uniform: Array
) -> tuple[GradientState, Info]:
    """The Metropolis decision; a proposal whose gradient is not finite is impossible."""
    usable = jnp.all(jnp.isfinite(proposal.gradient))
    return decide(surrogate, state, proposal, jnp.where(usable, log_ratio, jnp.nan), log_uniform)


class GradientKernel(PositionKernel):
    """A kernel whose unknown is the position alone; log density and gradient are caches."""

    def restore(self, target, unknown: Array) -> GradientState:
        return GradientState(unknown, *target.value_and_grad(unknown))
