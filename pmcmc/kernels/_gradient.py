"""What kernels with a cached gradient share: the state and the way in and out of it."""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from pmcmc._types import Array
from pmcmc.kernels._base import Info, Kernel
from pmcmc.kernels._metropolis import Surrogate, log_acceptance, select


class GradientState(NamedTuple):
    """Position (D,) in the target's coordinates with the log density and its gradient (D,) there."""

    position: Array
    logdensity: Array
    gradient: Array


def accept(
    surrogate: Surrogate, state: GradientState, proposal: GradientState, log_ratio: Array, log_uniform: Array
) -> tuple[GradientState, Info]:
    """The Metropolis decision between a state and a proposal, and what is to be said of it."""
    log_ratio, is_divergent = log_acceptance(log_ratio, proposal.gradient)
    # The barrier keeps XLA from computing the margin anew in each of the programs that read it.
    margin = jax.lax.optimization_barrier(log_ratio - log_uniform)
    new = select(surrogate, margin, proposal, state)
    return new, Info(
        acceptance_rate=jnp.exp(jnp.minimum(log_ratio, 0.0)),
        is_divergent=is_divergent,
        margin=margin,
        logdensity=new.logdensity,
    )


class GradientKernel(Kernel):
    """A kernel whose unknown is the position alone; log density and gradient are caches."""

    def init(self, target, position):
        return self.restore(target, target.coordinates(position))

    def start(self, target, y):
        return self.restore(target, y)

    def unknown(self, state: GradientState) -> Array:
        return state.position

    def restore(self, target, unknown: Array) -> GradientState:
        return GradientState(unknown, *target.value_and_grad(unknown))

    def coordinates(self, unknown: Array) -> Array:
        return unknown
