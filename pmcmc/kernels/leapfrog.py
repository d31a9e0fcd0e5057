"""How the L leapfrog steps of one HMC proposal are taken: one after the other, or all at once by a Newton-type solver.

A leapfrog step is itself a recurrence, of (position, momentum) without noise:

    p' = p[t-1] + h/2 grad(q[t-1]),   q[t] = q[t-1] + h M^-1 p',   p[t] = p' + h/2 grad(q[t])

Its Jacobian couples a coordinate above all with its own momentum, so block quasi-DEER, with 2x2 blocks of diagonals,
is the solver for it (Zoltowski et al. 2025, section 3).
"""

import abc
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import jax
import jax.numpy as jnp

from pmcmc._pytree import register_dataclass
from pmcmc._typing import Array, Scalar
from pmcmc.kernels.metropolis import GradientState
from pmcmc.recurrence import RESULTS, BlockDiagonal, Newton, RecurrenceSolver
from pmcmc.target import Target


@register_dataclass
@dataclass(frozen=True)
class UniformLength:
    """Number of leapfrog steps drawn uniformly from ``low .. high`` at every step.

    Lanes then wait for the longest trajectory among them: a share of about ``1 - mean / high`` of the work is lost
    (a third for 1..2, half for 1..L). Step-size jitter breaks resonance at no such cost.
    """

    low: Scalar
    high: Scalar

    def __post_init__(self):
        if isinstance(self.low, int) and isinstance(self.high, int) and not 1 <= self.low <= self.high:
            raise ValueError(f"expected 1 <= low <= high, got {self.low}, {self.high}.")


class Leapfrog(abc.ABC):
    """Velocity Verlet over ``length`` steps; an implementation says in which order its L states are found.

    A new one needs `check`, `length` and `integrate`.
    """

    @abc.abstractmethod
    def check(self, num_integration_steps: Any) -> None:
        """Raise where this number of steps, as given to the kernel, cannot be taken."""

    @abc.abstractmethod
    def length(self, asked: Array) -> Array:
        """The number of steps taken where the kernel asks for ``asked``."""

    @abc.abstractmethod
    def integrate(
        self, target: Target, state: GradientState, momentum: Array, step_size: Array, length: Array, velocity: Callable
    ) -> tuple[GradientState, Array]:
        """The end of the trajectory and the momentum there. velocity: ``p -> M^-1 p``."""


@register_dataclass
@dataclass(frozen=True)
class SequentialLeapfrog(Leapfrog):
    """One step after the other, L gradients one after the other; the number of steps may be drawn.

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
    """All L states at once, with the same end as `SequentialLeapfrog` up to rounding.

    num_steps: L, an int, since the trajectory's states need a shape. The kernel's num_integration_steps may be left
        out; if given it must be the same.
    solver: `Newton(BlockDiagonal())` by default; `Newton(HutchinsonBlockDiagonal(key))` for large D. Its max_iters is
        set to L, which always suffices. It starts from the drift without force.

    Where the solver finds no finite trajectory the proposal is rejected as a divergence.

    When it pays: the critical path falls from L gradients to K + 1 rounds, each of L gradients side by side and, but
    for the last, of L D Jacobian-vector products (2 L a probe with Hutchinson) and a scan. On whitened German credit
    (D = 25, h = 0.2, 5 starts, float32) K was 5 or 6 for L = 16 and 8 or 9 for L = 64, with exact and with one-probe
    blocks. If a round is worth three gradients that is 21 against 16 and 30 against 64, so L should be some 32 or more
    on a device that runs L gradients in the time of one. Counts only: no time was measured.

    Raises:
        ValueError: num_steps below 1; another number of steps in the kernel.
        TypeError: num_steps is no int; the kernel draws its number of steps; solver is no `Newton`.

    Source: Zoltowski et al. 2025, block quasi-DEER; there with a cap on iterations that says nothing when reached.

    Example:
        >>> import pmcmc
        >>> from pmcmc.kernels import ParallelLeapfrog
        >>> pmcmc.HMC(step_size=0.05, leapfrog=ParallelLeapfrog(64)).leapfrog.num_steps
        64
    """

    num_steps: int = field(metadata=dict(static=True))
    solver: Newton = Newton(BlockDiagonal())

    def __post_init__(self):
        if not isinstance(self.num_steps, int):
            raise TypeError(
                f"ParallelLeapfrog needs a static number of steps, an int such as 64, got {self.num_steps!r}."
            )
        if self.num_steps < 1:
            raise ValueError(f"num_steps must be at least 1, got {self.num_steps}.")
        if isinstance(self.solver, RecurrenceSolver) and not isinstance(self.solver, Newton):
            raise TypeError(f"ParallelLeapfrog needs a Newton solver, got {type(self.solver).__name__}().")

    def check(self, num_integration_steps):
        if isinstance(num_integration_steps, int) and num_integration_steps != self.num_steps:
            raise ValueError(
                f"the kernel takes {num_integration_steps} leapfrog steps, ParallelLeapfrog {self.num_steps}: leave "
                "num_integration_steps out, or make them equal."
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
            # momentum half a step ahead of the position: one gradient a step
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
        # A trajectory neither contracts nor forgets: that nearby ones separate is no reason to distrust it.
        solved = (found.result == RESULTS.successful) | (found.result == RESULTS.not_contracting)
        end = jax.tree.map(lambda x: jnp.where(solved, x[-1], jnp.nan), found.aux)
        return end
