"""Hamiltonian Monte Carlo with a fixed or random number of leapfrog steps.

`HMC` integrates Hamilton's equations of ``H(x, p) = -log p(x) + p^T M^{-1} p / 2`` by leapfrog steps and accepts the
end of the trajectory with probability ``min(1, exp(H(x, p) - H(x', p')))``. The decision is in
`pmcmc.kernels.metropolis`.

One leapfrog (velocity Verlet) step of size h is a recurrence of (position, momentum) = (q, p) without noise:

    p' = p[t-1] + h/2 grad(q[t-1]),   q[t] = q[t-1] + h M^-1 p',   p[t] = p' + h/2 grad(q[t])

`SequentialLeapfrog` takes the L steps one after the other. `ParallelLeapfrog` solves all L states at once by a
Newton-type solver. The Jacobian of a step couples a coordinate mainly with its own momentum, so the solver is block
quasi-DEER, which keeps 2x2 blocks of diagonals. `UniformLength` makes the number of steps random.

Source: Duane et al. (1987); Neal (2011); Zoltowski et al. (2025), section 3, for the parallel integrator.
"""

import abc
import math
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from numbers import Integral
from typing import Any, ClassVar, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from pmcmc._arguments import as_int, check_int, known_number
from pmcmc._pytree import Array, ArrayLeaf, Scalar, register_dataclass
from pmcmc.kernels.base import Info, check_step_size
from pmcmc.kernels.metropolis import BranchTaken, GradientKernel, GradientState, Surrogate, accept
from pmcmc.random.distributions import at_least_single, normals, uniforms
from pmcmc.recurrence import RESULTS, BlockDiagonal, Newton, RecurrenceSolver
from pmcmc.target import Target


@register_dataclass
@dataclass(frozen=True)
class UniformLength:
    """Number of leapfrog steps drawn uniformly from ``low .. high`` at every HMC step.

    Lanes wait for the longest trajectory among them, so about ``1 - mean / high`` of the work is lost (a quarter for
    1..2, nearly half for 1..L with large L). Step-size jitter breaks resonance without this cost.

    Args:
        low: Smallest number of steps, at least 1.
        high: Largest number of steps.

    Raises:
        ValueError: Not ``1 <= low <= high``.
        TypeError: They are not integers.
    """

    low: Scalar
    high: Scalar

    def __post_init__(self):
        check_int("low", self.low, 1)
        check_int("high", self.high, 1)
        if isinstance(self.low, Integral) and isinstance(self.high, Integral) and self.low > self.high:
            raise ValueError(f"expected 1 <= low <= high, got {self.low}, {self.high}.")


class Leapfrog(abc.ABC):
    """Base class of leapfrog (velocity Verlet) integrators, which differ in how they find the L states of a trajectory.

    A subclass implements `check`, `length` and `integrate`.
    """

    @abc.abstractmethod
    def check(self, num_integration_steps: Any) -> None:
        """Raise an error if the integrator cannot take the kernel's number of steps.

        Args:
            num_integration_steps: The kernel's setting: an int, a `UniformLength` or None.
        """

    @abc.abstractmethod
    def length(self, asked: Array) -> Array:
        """Return the number of steps taken when the kernel asks for ``asked``."""

    @abc.abstractmethod
    def integrate(
        self, target: Target, state: GradientState, momentum: Array, step_size: Array, length: Array, velocity: Callable
    ) -> tuple[GradientState, Array]:
        """Integrate a trajectory.

        Args:
            target: Target to sample.
            state: Start of the trajectory.
            momentum: Momentum at the start; shape (D,).
            step_size: Step size h.
            length: Number of steps.
            velocity: Function ``p -> M^-1 p``.

        Returns:
            The state at the end of the trajectory, and the momentum there; shape (D,).
        """


@register_dataclass
@dataclass(frozen=True)
class SequentialLeapfrog(Leapfrog):
    """Leapfrog steps taken one after the other: L gradients on the critical path; the number of steps may be random.

    Example:
        >>> import pmcmc
        >>> pmcmc.HMC(step_size=0.1).leapfrog
        SequentialLeapfrog()
    """

    def check(self, num_integration_steps):
        pass

    def length(self, asked):
        return asked

    def integrate(self, target, state, momentum, step_size, length, velocity):
        def body(_, carry):
            now, momentum = carry
            momentum = momentum + 0.5 * step_size * now.gradient
            position = now.position + step_size * velocity(momentum)
            now = GradientState(position, *target.value_and_grad(position))
            return now, momentum + 0.5 * step_size * now.gradient

        return jax.lax.fori_loop(0, length, body, (state, momentum))


@register_dataclass
@dataclass(frozen=True)
class ParallelLeapfrog(Leapfrog):
    """All L leapfrog steps solved at once by a Newton-type solver.

    The end of the trajectory equals that of `SequentialLeapfrog` up to rounding. The solver starts from the motion at
    constant momentum. If it fails, the proposal is NaN and is rejected as divergent.

    The critical path falls from L gradients to K + 1 rounds. Each round evaluates L gradients in parallel; all but the
    last also evaluate L D Jacobian-vector products (2 L per probe with Hutchinson) and a scan. On whitened German
    credit (D = 25, h = 0.2, 5 starts, float32), K was 5 or 6 for L = 16 and 8 or 9 for L = 64, with exact and with
    one-probe blocks. If a round costs three gradients, that is up to 21 against 16 and 30 against 64. It therefore pays
    from about L = 32 on a device that evaluates L gradients in the time of one. These are counts; no time was measured.

    Args:
        num_steps: L, an int, because the states of the trajectory need a static shape. The kernel's
            ``num_integration_steps`` may be left out; if given, it must equal L.
        solver: ``Newton(BlockDiagonal())`` by default; ``Newton(HutchinsonBlockDiagonal(key))`` for large D. Its
            ``max_iters`` is set to L, which always suffices. Its ``tol`` must be left out: a trajectory that is solved
            to a larger one is not reversible, and the draws would not be the posterior's.

    Raises:
        TypeError: ``num_steps`` is not an integer, the kernel's number of steps is random, or ``solver`` is not a
            `Newton`.
        ValueError: ``num_steps`` is below 1, or differs from the kernel's number of steps, or the solver has a ``tol``.

    Source: Zoltowski et al. (2025), block quasi-DEER. Their code caps the number of iterations and does not report when
    the cap is reached.

    Example:
        >>> import pmcmc
        >>> from pmcmc.kernels import ParallelLeapfrog
        >>> pmcmc.HMC(step_size=0.05, leapfrog=ParallelLeapfrog(64)).leapfrog.num_steps
        64
    """

    num_steps: int = field(metadata=dict(static=True))
    solver: Newton = Newton(BlockDiagonal())

    def __post_init__(self):
        object.__setattr__(self, "num_steps", as_int("num_steps", self.num_steps, 1))
        if isinstance(self.solver, RecurrenceSolver) and not isinstance(self.solver, Newton):
            raise TypeError(f"ParallelLeapfrog needs a Newton solver, got {type(self.solver).__name__}().")
        if isinstance(self.solver, Newton) and self.solver.tol is not None:
            raise ValueError(
                "ParallelLeapfrog solves trajectories to rounding, without which they are not reversible, got a solver "
                f"with tol={self.solver.tol}: leave tol out."
            )

    def check(self, num_integration_steps):
        if isinstance(num_integration_steps, Integral) and num_integration_steps != self.num_steps:
            raise ValueError(
                f"the kernel takes {num_integration_steps} leapfrog steps, but ParallelLeapfrog {self.num_steps}: "
                "leave num_integration_steps out, or make them equal."
            )
        if isinstance(num_integration_steps, UniformLength):
            raise TypeError(
                "ParallelLeapfrog needs a static number of steps, got UniformLength. Use SequentialLeapfrog(), or "
                "jitter the step size instead."
            )

    def length(self, asked):
        return jnp.asarray(self.num_steps, int)

    def integrate(self, target, state, momentum, step_size, length, velocity):
        def step(x, _):
            # The momentum is carried half a step ahead of the position, so that a step needs one gradient.
            position, ahead = x
            position = position + step_size * velocity(ahead)
            now = GradientState(position, *target.value_and_grad(position))
            end = now, ahead + 0.5 * step_size * now.gradient
            return (position, ahead + step_size * now.gradient), end

        ahead = momentum + 0.5 * step_size * state.gradient
        times = step_size * jnp.arange(1, self.num_steps + 1, dtype=momentum.dtype)
        drift = state.position[None] + times[:, None] * velocity(ahead)[None]
        guess = drift, jnp.broadcast_to(ahead, drift.shape)
        solver = replace(self.solver, max_iters=self.num_steps)
        found = solver.solve(step, (state.position, ahead), length=self.num_steps, initial_guess=guess, has_aux=True)
        # Trajectories of HMC need not contract, so `not_contracting` is no reason to reject this one.
        solved = (found.result == RESULTS.successful) | (found.result == RESULTS.not_contracting)
        end = jax.tree.map(lambda x: jnp.where(solved, x[-1], jnp.nan), found.aux)
        return end


# Time of a trajectory whose number of steps is left out, 0.29 of the period on a standard normal target. A trajectory
# of time T multiplies a centred coordinate by cos(T) on average, and a rejection by 1. At the acceptance rate of 0.8 to
# which warm-up tunes, successive draws have the correlation 0.8 cos(T) + 0.2, which is zero here.
TRAJECTORY_LENGTH = math.acos(-1 / 4)
# Largest number of steps that is taken for this time.
MOST_STEPS = 64
# There is a warning if trajectories take less than this share of a time that warm-up chose.
CUT = 0.5
# Numbers of steps that miss this time by a smaller share than this, such as rounding errors, count as reaching it.
TIME_TOLERANCE = 1e-4


class HMCNoise(NamedTuple):
    """Randomness of one HMC step.

    Attributes:
        normal: Standard normal that the metric turns into a momentum; shape (D,).
        log_uniform: Log of a uniform on (0, 1), for the Metropolis decision.
        jitter: Uniform on (-1, 1), for the step size.
        length: Uniform on (0, 1), at least in float32, for a random number of leapfrog steps; None if that number is
            fixed.
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
            acceptance rate of 0.8, then shortened to T / L if ``num_integration_steps`` is left out too.
        num_integration_steps: Number L of leapfrog steps, or `UniformLength`. None: ``clip(ceil(trajectory_length /
            step_size), 1, 64)``.
        inverse_mass_matrix: M^{-1}, about the posterior's (co)variance; shape (D,) or (D, D). None: the identity, which
            suits the whitened coordinates of warm-up. A full matrix is factorised in every step.
        step_size_jitter: The step size is multiplied by a factor uniform on (1 - jitter, 1 + jitter), drawn with the
            noise. Without jitter, trajectories of fixed length may resonate with a period of the posterior, and coupled
            chains merge late or not at all (docs/choosing.md).
        surrogate: Derivative of the accept decision, used by Newton-type solvers only.
        leapfrog: `SequentialLeapfrog`, or `ParallelLeapfrog`, which solves all states of a long trajectory at once.
        trajectory_length: Time T of a trajectory whose number of steps is left out. The default, arccos(-1/4) = 1.82,
            is 0.29 of the period on a standard normal target. `EnsembleAdaptation` lengthens the default in a diagonal
            basis with directions more than twice as wide as the coordinates (`pmcmc.warmup.trajectories`), unless a
            metric is given. At most 64 steps are taken, so a long time may not be reached. There is a warning if it is
            a time that you gave, or if steps that warm-up tuned do not take half of the time that it aimed at.

    Raises:
        ValueError: ``step_size`` or ``trajectory_length`` is not positive, ``num_integration_steps`` is below 1, or the
            jitter is outside [0, 1).
        TypeError: ``num_integration_steps`` is not an integer, or another number is a boolean.

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
    trajectory_length: Scalar = TRAJECTORY_LENGTH

    def __post_init__(self):
        check_step_size(self.step_size)
        check_int("num_integration_steps", self.num_integration_steps, 1)
        time = known_number("trajectory_length", self.trajectory_length)
        if time is not None and not time > 0:
            raise ValueError(f"trajectory_length must be positive, got {time}.")
        jitter = known_number("step_size_jitter", self.step_size_jitter)
        if jitter is not None and not 0 <= jitter < 1:
            raise ValueError(f"step_size_jitter must lie in [0, 1), got {jitter}.")
        if isinstance(self.leapfrog, Leapfrog):
            self.leapfrog.check(self.num_integration_steps)

    def sample_noise(self, rng_key, target):
        drawn, dtype = isinstance(self.num_integration_steps, UniformLength), target.spec.dtype
        u = uniforms(rng_key, target.dim + 2 + drawn, at_least_single(dtype))
        return HMCNoise(
            normal=normals(u[2 + drawn :]).astype(dtype),
            log_uniform=jnp.log(u[0]).astype(dtype),
            jitter=(2 * u[1] - 1).astype(dtype),
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

    def unkept(self, tuned):
        if self.num_integration_steps is not None or not isinstance(self.leapfrog, SequentialLeapfrog):
            return ""
        if isinstance(tuned.num_integration_steps, UniformLength):  # found by ChEES
            return ""
        # The time of the tuned kernel, because warm-up may have lengthened the default.
        time, step_size = float(np.asarray(tuned.trajectory_length)), float(np.asarray(tuned.step_size))
        is_default = float(np.asarray(self.trajectory_length)) == TRAJECTORY_LENGTH
        if is_default and self.step_size is not None:  # nobody asked for this time
            return ""
        if MOST_STEPS * step_size > (CUT if is_default else 0.99) * time:
            return ""
        remedy = "reparametrise, or pass" if is_default else "pass a shorter trajectory_length, or"
        return (
            f"Trajectories of HMC take a time of {MOST_STEPS * step_size:.3g} instead of trajectory_length={time:.3g}, "
            f"because they stop after {MOST_STEPS} steps of size {step_size:.3g}: {remedy} "
            f"num_integration_steps={math.ceil(time / step_size)} to take them all."
        )

    def at_most(self, num_steps):
        if isinstance(self.num_integration_steps, UniformLength) or not isinstance(self.leapfrog, SequentialLeapfrog):
            return self
        return replace(self, num_integration_steps=jnp.minimum(self.finalize().num_integration_steps, num_steps))

    def final_step_size(self, step_size):
        """Return the step size at which the L steps of the default take no longer than ``trajectory_length``.

        The number of steps is rounded up, so with few large steps the trajectory would turn back: with two steps of
        1.35 it takes 2.7, nearly half a period, and squares of coordinates hardly change.
        """
        if self.num_integration_steps is not None or not isinstance(self.leapfrog, SequentialLeapfrog):
            return step_size
        longest = jnp.asarray(self.trajectory_length) / replace(self, step_size=step_size).default_length()
        return jnp.minimum(step_size, longest.astype(jnp.result_type(step_size)))

    @property
    def may_resonate(self):
        return not (
            isinstance(self.num_integration_steps, UniformLength) or np.any(np.asarray(self.step_size_jitter) > 0)
        )

    def default_length(self) -> Array:
        """Return ``clip(ceil(trajectory_length / step_size), 1, 64)``, or the number that the integrator fixes."""
        length = _default_length(jnp, jnp.asarray(self.trajectory_length), jnp.asarray(self.step_size))
        return self.leapfrog.length(length.astype(int))

    def num_leapfrogs(self, step_size: Scalar) -> float:
        """Return the number of leapfrog steps that the default takes with this step size, computed in numpy."""
        return float(_default_length(np, np.asarray(self.trajectory_length), np.asarray(step_size)))

    def _length(self, noise: HMCNoise) -> Array:
        """Return the number of leapfrog steps of one transition."""
        steps = self.num_integration_steps
        if steps is None:
            return self.default_length()
        if isinstance(steps, UniformLength):
            drawn = steps.low + jnp.floor(noise.length * (steps.high - steps.low + 1)).astype(int)
            return jnp.minimum(drawn, steps.high)
        return self.leapfrog.length(jnp.asarray(steps, int))

    def _kinetic(self, momentum: Array) -> Array:
        """Return the kinetic energy p^T M^{-1} p / 2."""
        return 0.5 * jnp.sum(momentum * self._velocity(momentum))


def _default_length(xp: Any, time: Any, step_size: Any) -> Any:
    """Return ``clip(ceil(time / step_size), 1, 64)``, computed by numpy or JAX."""
    return xp.clip(xp.ceil((1 - TIME_TOLERANCE) * time / step_size), 1, MOST_STEPS)
