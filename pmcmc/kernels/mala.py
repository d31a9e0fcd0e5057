"""The Metropolis-adjusted Langevin algorithm.

`MALA` proposes ``y = x + h grad log p(x) + sqrt(2 h) z``, an Euler step of the Langevin diffusion, and accepts or
rejects it by a Metropolis decision. A step costs one gradient.

Source: Besag (1994); Roberts & Tweedie (1996).
"""

from dataclasses import dataclass
from typing import NamedTuple

import jax.numpy as jnp

from pmcmc._pytree import Array, Scalar, register_dataclass
from pmcmc.kernels.base import Info, check_step_size
from pmcmc.kernels.metropolis import BranchTaken, GradientKernel, GradientState, Surrogate, accept
from pmcmc.random.distributions import at_least_single, normals, uniforms


class MALANoise(NamedTuple):
    """Randomness of one MALA step.

    Attributes:
        normal: Standard normal z of the proposal; shape (D,).
        log_uniform: Log of a uniform on (0, 1), for the Metropolis decision.
    """

    normal: Array
    log_uniform: Array


@register_dataclass
@dataclass(frozen=True)
class MALA(GradientKernel):
    """Langevin proposal ``y = x + h grad log p(x) + sqrt(2 h) z`` with a Metropolis correction.

    The log acceptance ratio is computed as
    ``log p(y) - log p(x) + |z|^2 / 2 - |z + sqrt(h/2) (grad(x) + grad(y))|^2 / 2``, which avoids cancellation at small
    h. Given the same noise, every step equals that of ``blackjax.mala``.

    Args:
        step_size: h, in squared units of the target's coordinates. None: tuned by warm-up, in whitened coordinates, to
            an acceptance rate of 0.574 (Roberts & Rosenthal 1998).
        surrogate: Derivative of the accept decision, used by Newton-type solvers only.

    Raises:
        ValueError: ``step_size`` is not positive.

    Source: Besag (1994); Roberts & Tweedie (1996).

    Example:
        >>> import pmcmc
        >>> pmcmc.MALA(step_size=0.1).step_size
        0.1
    """

    step_size: Scalar | None = None
    surrogate: Surrogate = BranchTaken()

    def __post_init__(self):
        check_step_size(self.step_size)

    def target_acceptance_rate(self, dim):
        return 0.574

    def first_step_size(self, dim):
        return dim ** (-1 / 3)  # optimal scaling of Roberts & Rosenthal (1998)

    def sample_noise(self, rng_key, target):
        dtype = target.spec.dtype
        u = uniforms(rng_key, target.dim + 1, at_least_single(dtype))
        return MALANoise(normals(u[1:]).astype(dtype), jnp.log(u[0]).astype(dtype))

    def nudge(self, noise, amount):
        return noise._replace(log_uniform=noise.log_uniform + amount)

    def step(self, target, state: GradientState, noise: MALANoise) -> tuple[GradientState, Info]:
        h = jnp.asarray(self.step_size, state.position.dtype)
        position = state.position + h * state.gradient + jnp.sqrt(2 * h) * noise.normal
        proposal = GradientState(position, *target.value_and_grad(position))
        backward = noise.normal + jnp.sqrt(h / 2) * (state.gradient + proposal.gradient)
        log_ratio = proposal.logdensity - state.logdensity + 0.5 * (jnp.sum(noise.normal**2) - jnp.sum(backward**2))
        return accept(self.surrogate, state, proposal, log_ratio, noise.log_uniform)
