"""Hamiltonian Monte Carlo with a fixed (or drawn) number of leapfrog steps."""

import math
from dataclasses import dataclass
from typing import ClassVar, NamedTuple

import jax
import jax.numpy as jnp

from pmcmc._pytree import register_dataclass
from pmcmc._typing import Array, ArrayLeaf, Scalar
from pmcmc.kernels.base import Info
from pmcmc.kernels.leapfrog import Leapfrog, SequentialLeapfrog, UniformLength
from pmcmc.kernels.metropolis import BranchTaken, GradientKernel, GradientState, Surrogate, accept
from pmcmc.random.distributions import normals, uniforms


class HMCNoise(NamedTuple):
    """normal: (D,) standard normal, made a momentum by the metric. log_uniform: log of a uniform on (0, 1).

    jitter: uniform on (-1, 1), for the step size. length: uniform on (0, 1), for a drawn number of steps.
    """

    normal: Array
    log_uniform: Array
    jitter: Array
    length: Array | None


@register_dataclass
@dataclass(frozen=True)
class HMC(GradientKernel):
    """Leapfrog integration of ``H(x, p) = -log p(x) + p^T M^{-1} p / 2`` for L steps, then a Metropolis decision.

    step_size: the leapfrog step, in units of the metric (about the posterior's scale); None: tuned by warm-up to
        an acceptance rate of 0.8.
    num_integration_steps: L, or `UniformLength`; None: ``clip(ceil((pi/2) / step_size), 1, 64)``, a quarter of the
        period of a standard normal target.
    inverse_mass_matrix: M^{-1}, (D,) or (D, D), about the posterior's (co)variance. None: the identity, which is
        right in the whitened coordinates of warm-up. A full matrix is factorised in every step.
    step_size_jitter: the step is multiplied by a factor uniform on (1 - jitter, 1 + jitter), drawn with the noise.
        Without it trajectories of fixed length may resonate: coupled chains merged 3 times as late on an IRT model,
        mostly not at all on a mixture, and as soon on eight schools (docs/choosing.md).
    surrogate: derivative of the accept decision, seen only by Newton-type solvers.
    leapfrog: `SequentialLeapfrog` or `ParallelLeapfrog`, which solves all states of a long trajectory at once.

    Source: Duane et al. 1987; Neal 2011, eq. 5.18-5.20. Given the same noise and no jitter, step for step
    equal to ``blackjax.hmc``.

    Raises:
        ValueError: step_size not positive, num_integration_steps below 1, jitter outside [0, 1).

    Example:
        >>> import pmcmc
        >>> pmcmc.HMC(step_size=0.1, num_integration_steps=8).num_integration_steps
        8
    """

    extra_fields: ClassVar[tuple[str, ...]] = (*GradientKernel.extra_fields, "energy", "num_steps")

    step_size: Scalar | None = None
    num_integration_steps: Scalar | UniformLength | None = None
    inverse_mass_matrix: ArrayLeaf | None = None
    step_size_jitter: Scalar = 0.2
    surrogate: Surrogate = BranchTaken()
    leapfrog: Leapfrog = SequentialLeapfrog()

    def __post_init__(self):
        if isinstance(self.step_size, (int, float)) and not self.step_size > 0:
            raise ValueError(f"step_size must be positive, got {self.step_size}.")
        if isinstance(self.num_integration_steps, int) and self.num_integration_steps < 1:
            raise ValueError(f"num_integration_steps must be at least 1, got {self.num_integration_steps}.")
        if isinstance(self.step_size_jitter, (int, float)) and not 0 <= self.step_size_jitter < 1:
            raise ValueError(f"step_size_jitter must lie in [0, 1), got {self.step_size_jitter}.")
        if isinstance(self.leapfrog, Leapfrog):
            self.leapfrog.check(self.num_integration_steps)

    def sample_noise(self, rng_key, target):
        drawn = isinstance(self.num_integration_steps, UniformLength)
        u = uniforms(rng_key, target.dim + 2 + drawn, target.spec.dtype)
        return HMCNoise(
            normal=normals(u[2 + drawn :]),
            log_uniform=jnp.log(u[0]),
            jitter=2 * u[1] - 1,
            length=u[2] if drawn else None,
        )

    def nudge(self, noise, amount):
        return noise._replace(log_uniform=noise.log_uniform + amount)

    def step(self, target, state: GradientState, noise: HMCNoise) -> tuple[GradientState, Info]:
        dtype = state.position.dtype
        base_step = jnp.asarray(self.step_size, dtype)
        step_size = base_step * (1 + jnp.asarray(self.step_size_jitter, dtype) * noise.jitter)
        length = self._length(noise)
        momentum = self._momentum(noise.normal)
        proposal, end_momentum = self.leapfrog.integrate(target, state, momentum, step_size, length, self._velocity)
        energy = self._kinetic(momentum) - state.logdensity
        proposal_energy = self._kinetic(end_momentum) - proposal.logdensity
        new, info = accept(self.surrogate, state, proposal, energy - proposal_energy, noise.log_uniform)
        return new, info._replace(
            energy=jnp.where(info.margin > 0, proposal_energy, energy),
            num_integration_steps=length if noise.length is not None else None,
        )

    def default_length(self) -> Array:
        """``clip(ceil((pi/2) / step_size), 1, 64)``, or the number that the leapfrog is made for."""
        quarter = jnp.clip(jnp.ceil((math.pi / 2) / jnp.asarray(self.step_size)), 1, 64).astype(int)
        return self.leapfrog.length(quarter)

    def _length(self, noise: HMCNoise) -> Array:
        steps = self.num_integration_steps
        if steps is None:
            return self.default_length()
        if isinstance(steps, UniformLength):
            drawn = steps.low + jnp.floor(noise.length * (steps.high - steps.low + 1)).astype(int)
            return jnp.minimum(drawn, steps.high)
        return self.leapfrog.length(jnp.asarray(steps, int))

    def _momentum(self, normal: Array) -> Array:
        """p with covariance M: z / sqrt(M^{-1}), or L^{-T} z with M^{-1} = L L^T."""
        metric = self.inverse_mass_matrix
        if metric is None:
            return normal
        metric = jnp.asarray(metric, normal.dtype)
        if metric.ndim < 2:
            return normal / jnp.sqrt(metric)
        return jax.scipy.linalg.solve_triangular(jnp.linalg.cholesky(metric), normal, lower=True, trans=1)

    def _velocity(self, momentum: Array) -> Array:
        """M^{-1} p."""
        if self.inverse_mass_matrix is None:
            return momentum
        metric = jnp.asarray(self.inverse_mass_matrix, momentum.dtype)
        return metric * momentum if metric.ndim < 2 else metric @ momentum

    def _kinetic(self, momentum: Array) -> Array:
        return 0.5 * jnp.sum(momentum * self._velocity(momentum))
