"""The Metropolis decision, with an explicit derivative for Newton-type solvers.

A proposal is accepted if ``margin = log alpha - log u > 0``. The decision is a jump, so its derivative is zero almost
everywhere and does not show a solver that a state near the jump may change its decision. `select` keeps the hard
decision in the forward map, and takes its derivative from a `Surrogate`: `BranchTaken` or `StraightThrough`. `decide`
and `accept` make the decision of a kernel and report it as an `Info`; `GradientKernel` is the base of kernels that
cache the log density and its gradient.

Source: Metropolis et al. (1953); Zoltowski et al. (2025) for the surrogate derivative.
"""

import abc
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from pmcmc._pytree import register_dataclass
from pmcmc._typing import Array, PyTree, Scalar
from pmcmc.kernels.base import Info, PositionKernel

DIVERGENCE_THRESHOLD = 1000.0  # a larger loss of log density (energy) is a divergence, as in Stan and BlackJAX


class Surrogate(abc.ABC):
    """Derivative of the accept decision in the Jacobian of a Newton-type solver.

    The decision itself is always hard. A surrogate changes how fast the solver converges, not what it converges to.
    """

    @abc.abstractmethod
    def weight(self, margin: Array) -> tuple[Array, Array]:
        """Return the weight of the proposal in the tangent, and the derivative of that weight.

        Args:
            margin: log alpha - log u, a scalar.

        Returns:
            The weight w(margin), and its derivative w'(margin).
        """


@register_dataclass
@dataclass(frozen=True)
class BranchTaken(Surrogate):
    """The derivative of the branch taken: w = 1 if the proposal is accepted, 0 otherwise, and w' = 0.

    It is exact almost everywhere, but does not anticipate changes of the decision.
    """

    def weight(self, margin):
        return (margin > 0).astype(margin.dtype), jnp.zeros_like(margin)


@register_dataclass
@dataclass(frozen=True)
class StraightThrough(Surrogate):
    """A sigmoid of the margin in place of the jump: w = sigmoid(margin / temperature).

    It lets the solver anticipate changes of the decision. Here the sigmoid weights the tangents too; in the published
    code of Zoltowski et al. the weight is hard and only the slope is that of the sigmoid.

    Args:
        temperature: Width of the sigmoid, in units of log acceptance probability.

    Source: Zoltowski et al. (2025).
    """

    temperature: Scalar = 1.0

    def weight(self, margin):
        gate = jax.nn.sigmoid(margin / self.temperature)
        return gate, gate * (1 - gate) / self.temperature


@partial(jax.custom_jvp, nondiff_argnums=())
def select(surrogate: Surrogate, margin: Array, proposal: PyTree, current: PyTree) -> PyTree:
    """Return ``proposal`` if margin > 0, else ``current``, with the derivative of a surrogate.

    The tangent is ``w dproposal + (1 - w) dcurrent + w' (proposal - current) dmargin`` with the weight w(margin). A NaN
    margin selects ``current``.

    Args:
        surrogate: Derivative of the decision.
        margin: log alpha - log u, a scalar.
        proposal: Proposed state, a pytree.
        current: Current state, of the same structure.

    Returns:
        The state selected.
    """
    return jax.tree.map(lambda p, c: jnp.where(margin > 0, p, c), proposal, current)


@select.defjvp
def _select_jvp(primals: Any, tangents: Any) -> Any:
    """Return the value and tangent of `select`."""
    surrogate, margin, proposal, current = primals
    _, d_margin, d_proposal, d_current = tangents
    # A proposal that is not finite is never accepted, and 0 * NaN in its tangent must not reach the result.
    usable = jnp.isfinite(margin)
    weight, slope = surrogate.weight(jnp.where(usable, margin, -jnp.inf))
    slope = jnp.where(usable, slope, 0.0)

    def tangent(p, c, dp, dc):
        p, dp = jnp.where(usable, p, c), jnp.where(usable, dp, 0.0)
        return weight * dp + (1 - weight) * dc + slope * jnp.where(usable, d_margin, 0.0) * (p - c)

    out = select(surrogate, margin, proposal, current)
    return out, jax.tree.map(tangent, proposal, current, d_proposal, d_current)


def log_acceptance(log_ratio: Array) -> tuple[Array, Array]:
    """Return the log acceptance ratio, -inf for impossible proposals, and whether the proposal diverged.

    NaN and +inf are impossible. A proposal diverges if it is impossible or loses more than `DIVERGENCE_THRESHOLD`.
    """
    broken = jnp.isnan(log_ratio) | (log_ratio == jnp.inf)
    log_ratio = jnp.where(broken, -jnp.inf, log_ratio)
    return log_ratio, broken | (-log_ratio > DIVERGENCE_THRESHOLD)


def decide(surrogate: Surrogate, state: Any, proposal: Any, log_ratio: Array, log_uniform: Array) -> tuple[Any, Info]:
    """Make the Metropolis decision between a state and a proposal.

    NaN and +inf are rejected and counted as divergences, as in NumPyro and Stan.

    Args:
        surrogate: Derivative of the decision.
        state: Current state, with a field ``logdensity``.
        proposal: Proposed state, of the same structure.
        log_ratio: Log acceptance ratio.
        log_uniform: Log of a uniform on (0, 1).

    Returns:
        The new state and the `Info` of the step.
    """
    log_ratio, is_divergent = log_acceptance(log_ratio)
    # The barrier keeps XLA from recomputing the margin wherever it is read.
    margin = jax.lax.optimization_barrier(log_ratio - log_uniform)
    new = select(surrogate, margin, proposal, state)
    return new, Info(
        acceptance_rate=jnp.exp(jnp.minimum(log_ratio, 0.0)),
        is_divergent=is_divergent,
        margin=margin,
        logdensity=new.logdensity,
    )


class GradientState(NamedTuple):
    """A position with its log density and gradient.

    Attributes:
        position: Position in the target's coordinates; shape (D,).
        logdensity: Log density at the position.
        gradient: Gradient of the log density; shape (D,).
    """

    position: Array
    logdensity: Array
    gradient: Array


def accept(
    surrogate: Surrogate, state: GradientState, proposal: GradientState, log_ratio: Array, log_uniform: Array
) -> tuple[GradientState, Info]:
    """Make the Metropolis decision as `decide` does; a proposal whose gradient is not finite is impossible."""
    usable = jnp.all(jnp.isfinite(proposal.gradient))
    return decide(surrogate, state, proposal, jnp.where(usable, log_ratio, jnp.nan), log_uniform)


class GradientKernel(PositionKernel):
    """Base class of kernels whose unknown is the position alone; log density and gradient are caches."""

    def restore(self, target, unknown: Array) -> GradientState:
        return GradientState(unknown, *target.value_and_grad(unknown))
