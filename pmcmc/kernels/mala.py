"""The Metropolis-adjusted Langevin algorithm."""

from dataclasses import dataclass
from typing import NamedTuple

import jax.numpy as jnp

from pmcmc._pytree import register_dataclass
from pmcmc._typing import Array, Scalar
from pmcmc.kernels.base import Info
from pmcmc.kernels.metropolis import BranchTaken, GradientKernel, GradientState, Surrogate, accept
from pmcmc.random.distributions import normals, uniforms


class MALANoise(NamedTuple):
    """normal: (D,) standard normal. log_uniform: log of a uniform on (0, 1)."""

    normal: Array
    log_uniform: Array


@register_dataclass
@dataclass(frozen=True)
class MALA(GradientKernel):
    """Langevin proposal ``y = x + h grad log p(x) + sqrt(2 h) z`` with a Metropolis correction.

    step_size: the h above, in squared units of the target's coordinates; None: tuned by warm-up to an acceptance
        rate of 0.574 (Roberts & Rosenthal 1998) in whitened coordinates.
    surrogate: derivative of the accept decision, seen only by Newton-type solvers.

    The log acceptance ratio is ``log p(y) - log p(x) + |z|^2 / 2 - |z + sqrt(h/2) (grad(x) + grad(y))|^2 / 2``,
    a form without cancellation at small h.

    Source: Besag 1994; Roberts & Tweedie 1996. Given the same noise, step for step equal to ``blackjax.mala``.

    Raises:
        ValueError: step_size is not positive.

    Example:
        >>> import pmcmc
        >>> pmcmc.MALA(step_size=0.1).step_size
        0.1
    """

    step_size: Scalar | None = None
    surrogate: Surrogate = BranchTaken()

    def __post_init__(self):
        if isinstance(self.step_size, (int, float)) and not self.step_size > 0:
            raise ValueError(f"step_size must be positive, got {self.step_size}.")

    def target_acceptance_rate(self, dim):
        return 0.574

    def first_step_size(self, dim):
        return dim ** (-1 / 3)  # optimal scaling, Roberts & Rosenthal 1998

    def sample_noise(self, rng_key, target):
        u = uniforms(rng_key, target.dim + 1, target.spec.dtype)
        return MALANoise(normals(u[1:]), jnp.log(u[0]))

    def nudge(self, noise, amount):
        return noise._replace(log_uniform=noise.log_uniform + amount)

    def step(self, target, state: GradientState, noise: MALANoise) -> tuple[GradientState, Info]:
        h = jnp.asarray(self.step_size, state.position.dtype)
        position = state.position + h * state.gradient + jnp.sqrt(2 * h) * noise.normal
        proposal = GradientState(position, *target.value_and_grad(position))
        backward = noise.normal + jnp.sqrt(h / 2) * (state.gradient + proposal.gradient)
        log_ratio = proposal.logdensity - state.logdensity + 0.5 * (jnp.sum(noise.normal**2) - jnp.sum(backward**2))
        return accept(self.surrogate, state, proposal, log_ratio, noise.log_uniform)
