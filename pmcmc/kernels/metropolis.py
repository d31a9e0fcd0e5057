"""The accept decision: hard in the forward map, with an explicit surrogate for derivatives."""

import abc
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from pmcmc._pytree import register_dataclass
from pmcmc._typing import Array, PyTree, Scalar
from pmcmc.kernels.base import Info, PositionKernel

DIVERGENCE_THRESHOLD = 1000.0  # lost log density (energy) that counts as a divergence: Stan's and BlackJAX's value


class Surrogate(abc.ABC):
    """Derivative of the accept decision, as the Jacobian of a Newton-type solver sees it.

    The decision itself is always hard; a surrogate changes how fast such a solver converges, never what to.
    """

    @abc.abstractmethod
    def weight(self, margin: Array) -> tuple[Array, Array]:
        """The proposal's weight in the tangent, and its derivative in the margin."""


@register_dataclass
@dataclass(frozen=True)
class BranchTaken(Surrogate):
    """The derivative of the branch taken: w = 1 where accepted, else 0, and w' = 0.

    Exact almost everywhere, but blind to flips of the decision.
    """

    def weight(self, margin):
        return (margin > 0).astype(margin.dtype), jnp.zeros_like(margin)


@register_dataclass
@dataclass(frozen=True)
class StraightThrough(Surrogate):
    """A sigmoid of the margin in place of the step: w = sigmoid(margin / temperature).

    Lets the solver foresee flips of the decision. After Zoltowski et al. (2025); differs from the published code in
    that the sigmoid weights the tangents too, where theirs keeps the hard weight and takes only the slope from it.

    temperature: width of the sigmoid in units of log acceptance probability.
    """

    temperature: Scalar = 1.0

    def weight(self, margin):
        gate = jax.nn.sigmoid(margin / self.temperature)
        return gate, gate * (1 - gate) / self.temperature


@partial(jax.custom_jvp, nondiff_argnums=())
def select(surrogate: Surrogate, margin: Array, proposal: PyTree, current: PyTree) -> PyTree:
    """``proposal`` where margin > 0, else ``current``; differentiated as ``surrogate`` says.

    Tangent: ``w dproposal + (1 - w) dcurrent + w' (proposal - current) dmargin`` with weight w(margin).
    A NaN margin selects ``current``.
    """
    return jax.tree.map(lambda p, c: jnp.where(margin > 0, p, c), proposal, current)


@select.defjvp
def _select_jvp(primals: Any, tangents: Any) -> Any:
    surrogate, margin, proposal, current = primals
    _, d_margin, d_proposal, d_current = tangents
    # A proposal that is not finite is never taken; its tangent must not leak NaN through a zero weight.
    usable = jnp.isfinite(margin)
    weight, slope = surrogate.weight(jnp.where(usable, margin, -jnp.inf))
    slope = jnp.where(usable, slope, 0.0)

    def tangent(p, c, dp, dc):
        p, dp = jnp.where(usable, p, c), jnp.where(usable, dp, 0.0)
        return weight * dp + (1 - weight) * dc + slope * jnp.where(usable, d_margin, 0.0) * (p - c)

    out = select(surrogate, margin, proposal, current)
    return out, jax.tree.map(tangent, proposal, current, d_proposal, d_current)


def log_acceptance(log_ratio: Array) -> tuple[Array, Array]:
    """Log acceptance ratio with impossible proposals at -inf, and whether the proposal diverged."""
    broken = jnp.isnan(log_ratio) | (log_ratio == jnp.inf)
    log_ratio = jnp.where(broken, -jnp.inf, log_ratio)
    return log_ratio, broken | (-log_ratio > DIVERGENCE_THRESHOLD)


def decide(surrogate: Surrogate, state: Any, proposal: Any, log_ratio: Array, log_uniform: Array) -> tuple[Any, Info]:
    """The Metropolis decision between a state and a proposal (with a field ``logdensity``), and what is to be said.

    NaN and +inf are rejections counted as divergences, as NumPyro and Stan do.
    """
    log_ratio, is_divergent = log_acceptance(log_ratio)
    # The barrier keeps XLA from computing the margin anew in each of the programs that read it.
    margin = jax.lax.optimization_barrier(log_ratio - log_uniform)
    new = select(surrogate, margin, proposal, state)
    return new, Info(
        acceptance_rate=jnp.exp(jnp.minimum(log_ratio, 0.0)),
        is_divergent=is_divergent,
        margin=margin,
        logdensity=new.logdensity,
    )


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
