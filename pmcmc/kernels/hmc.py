"""Hamiltonian Monte Carlo with a fixed or random number of leapfrog steps.

`HMC` integrates Hamilton's equations of ``H(x, p) = -log p(x) + p^T M^{-1} p / 2`` by leapfrog steps and accepts the
end of the trajectory with probability ``min(1, exp(H(x, p) - H(x', p')))``. The integrators are in
`pmcmc.kernels.leapfrog`, the decision in `pmcmc.kernels.metropolis`.

Source: Duane et al. (1987); Neal (2011).
"""

import math
from dataclasses import dataclass, replace
from typing import ClassVar, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from pmcmc._pytree import register_dataclass
from pmcmc._typing import Array, ArrayLeaf, Scalar
from pmcmc.kernels.base import Info, check_step_size
from pmcmc.kernels.leapfrog import Leapfrog, SequentialLeapfrog, UniformLength
from pmcmc.kernels.metropolis import BranchTaken, GradientKernel, GradientState, Surrogate, accept
from pmcmc.random.distributions import normals, uniforms


class HMCNoise(NamedTuple):
    """Randomness of one HMC step.

    Attributes:
        normal: Standard normal that the metric turns into a momentum; shape (D,).
        log_uniform: Log of a uniform on (0, 1), for the Metropolis decision.
        jitter: Uniform on (-1, 1), for the step size.
        length: Uniform on (0, 1), for a random number of leapfrog steps; None if that number is fixed.
    """

    normal: Array
    log_uniform: Array
    jitter: Array
    length: Array | None


@register_dataclass
@dataclass(frozen=True)
class HMC(GradientKernel):
    """Leapfrog integration of ``H(x, p) = -log p(x) + p^T M^{-1} p / 2``, then a Metropolis decision.

    Given the same noise and no jitter, every step equals that of ``blackjax.hmc``.

    Args:
        step_size: Leapfrog step, in units of the metric (about the posterior's scale). None: tuned by warm-up to an
            acceptance rate of 0.8.
        num_integration_steps: Number L of leapfrog steps, or `UniformLength`. None:
            ``clip(ceil((pi/2) / step_size), 1, 64)``, a quarter of the period on a standard normal target.
        inverse_mass_matrix: M^{-1}, about the posterior's (co)variance; shape (D,) or (D, D). None: the identity, which
            suits the whitened coordinates of warm-up. A full matrix is factorised in every step.
        step_size_jitter: The step size is multiplied by a factor uniform on (1 - jitter, 1 + jitter), drawn with the
            noise. Without jitter, trajectories of fixed length may resonate: coupled chains took 3 times as long to
            merge on an IRT model, mostly did not merge on a mixture, and merged as early on eight schools
            (docs/choosing.md).
        surrogate: Derivative of the accept decision, used by Newton-type solvers only.
        leapfrog: `SequentialLeapfrog`, or `ParallelLeapfrog`, which solves all states of a long trajectory at once.

    Raises:
        ValueError: ``step_size`` is not positive, ``num_integration_steps`` is below 1, or the jitter is outside
            [0, 1).

    Source: Duane et al. (1987); Neal (2011), eq. 5.18-5.20.

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
        check_step_size(self.step_size)
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

    def finalize(self):
        return (
            self
            if self.num_integration_steps is not None
            else replace(self, num_integration_steps=self.default_length())
        )

    @property
    def may_resonate(self):
        return not (
            isinstance(self.num_integration_steps, UniformLength) or np.any(np.asarray(self.step_size_jitter) > 0)
        )

    def default_length(self) -> Array:
        """Return ``clip(ceil((pi/2) / step_size), 1, 64)``, or the number of steps fixed by the leapfrog integrator."""
        quarter = jnp.clip(jnp.ceil((math.pi / 2) / jnp.asarray(self.step_size)), 1, 64).astype(int)
        return self.leapfrog.length(quarter)

    def _length(self, noise: HMCNoise) -> Array:
        """Return the number of leapfrog steps of one transition."""
        steps = self.num_integration_steps
        if steps is None:
            return self.default_length()
        if isinstance(steps, UniformLength):
            drawn = steps.low + jnp.floor(noise.length * (steps.high - steps.low + 1)).astype(int)
            return jnp.minimum(drawn, steps.high)
        return self.leapfrog.length(jnp.asarray(steps, int))

    def _momentum(self, normal: Array) -> Array:
        """Return a momentum with covariance M: z / sqrt(M^{-1}), or L^{-T} z with M^{-1} = L L^T."""
        metric = self.inverse_mass_matrix
        if metric is None:
            return normal
        metric = jnp.asarray(metric, normal.dtype)
        if metric.ndim < 2:
            return normal / jnp.sqrt(metric)
        return jax.scipy.linalg.solve_triangular(jnp.linalg.cholesky(metric), normal, lower=True, trans=1)

    def _velocity(self, momentum: Array) -> Array:
        """Return M^{-1} p."""
        if self.inverse_mass_matrix is None:
            return momentum
        metric = jnp.asarray(self.inverse_mass_matrix, momentum.dtype)
        return metric * momentum if metric.ndim < 2 else metric @ momentum

    def _kinetic(self, momentum: Array) -> Array:
        """Return the kinetic energy p^T M^{-1} p / 2."""
        return 0.5 * jnp.sum(momentum * self._velocity(momentum))
