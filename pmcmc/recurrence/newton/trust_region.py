"""Levenberg-Marquardt by Kalman filtering: Newton's recursion, held near the current iterate.

Newton's step solves the linearised system whatever its size; where the products of A[t] grow, it overflows although the
recurrence itself is tame. ELK (Gonzalez et al. 2024, section 4) adds a penalty on the increments d,

    minimise  sum over t of  |d[t] - A[t] d[t-1] - r[t]|^2 + lambda |d[t]|^2

which is the mode of a linear Gaussian state-space model with pseudo-observations, so a Kalman smoother finds it by
associative scans (see `_kalman`). The published method uses the filter alone, a cheaper step that looks at the past
only. Both shrink the products of A[t]: they stay bounded for every lambda > 0, and lambda = 0 is Newton.

With lambda > 0 the step is not exact along a growing prefix, and where decisions flip (Metropolis) or f folds, the sum
has points where no small step lowers it. So `AdaptiveRegularization` differs from the source: behind the prefix that
already holds, one more increment is free of the penalty, and a rejected iterate still gives its prefix. So the prefix
grows by a step an iteration, as in Newton's method, and T iterations suffice (one more where the first evaluation,
outside the loop, rounds differently).
"""

import abc
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from pmcmc._pytree import finite_rows, register_dataclass
from pmcmc._typing import Array, PyTree, Scalar
from pmcmc.recurrence.newton import kalman
from pmcmc.recurrence.newton.basis import Basis, StandardBasis
from pmcmc.recurrence.newton.equations import exact_prefix
from pmcmc.recurrence.newton.jacobian import Dense, JacobianStructure, Scanned
from pmcmc.recurrence.newton.loop import NewtonType, drop_overflow
from pmcmc.recurrence.scan import apply_affine
from pmcmc.recurrence.sharding import Steps


class Step(NamedTuple):
    """A trust-region step in the basis."""

    beyond_images: Array  # (T, D): new path minus the images of the old one
    model: Array  # (T, D): residual that the linear model predicts behind the step


class StepRule(abc.ABC):
    """Which mean of the state-space model is the step.

    The filtered mean at t has seen the pseudo-observations up to t, the smoothed mean all of them.
    """

    @abc.abstractmethod
    def step(self, a: Any, r: Array, strength: Scalar, num_known: Array | int, steps: Steps) -> Step:
        """The step for A ``(T, ...)``, r ``(T, D)`` and lambda; the first num_known increments are Newton's.

        steps: as in `JacobianStructure.recur`.
        """


@register_dataclass
@dataclass(frozen=True)
class Filter(StepRule):
    """The filtered mean, as in the published ELK (Gonzalez et al. 2024).

    One Riccati and one affine scan an iteration.
    """

    def step(self, a, r, strength, num_known, steps):
        carried, pull = kalman.filter_means(steps, a, r, kalman.gains(steps, a, strength, num_known))
        return Step(carried - pull, pull)


@register_dataclass
@dataclass(frozen=True)
class Smoother(StepRule):
    """The smoothed mean, the exact Levenberg-Marquardt step.

    One more affine scan than `Filter`, from the end of the path.
    """

    def step(self, a, r, strength, num_known, steps):
        gains = kalman.gains(steps, a, strength, num_known)
        carried, pull = kalman.filter_means(steps, a, r, gains)
        s = kalman.smoother_corrections(steps, a, gains, pull, strength)
        return Step(carried - pull + s, pull + apply_affine(a, steps.delayed(s)) - s)


class Trial(NamedTuple):
    """What is known about a step when it is judged: the residual over the path, where it is finite."""

    before: Array  # root of its sum of squares
    after: Array
    predicted: Array  # by the linear model
    lost_before: Array  # number of steps where it is not finite
    lost_after: Array


class Regularization(abc.ABC):
    """How strong the trust region is, and when a step is accepted.

    lambda is the precision of the pseudo-observations: 0 gives the step of Newton, a large one keeps the iterate.
    """

    @abc.abstractmethod
    def begin(self, dtype: Any) -> PyTree:
        """The memory before the first iteration of a solve in this precision."""

    @abc.abstractmethod
    def strength(self, memory: PyTree) -> Scalar:
        """lambda of the next step."""

    def num_exact(self, prefix: Array) -> Array | int:
        """How many increments at the start are Newton's, free of the penalty, where ``prefix`` states hold already."""
        return 0

    @abc.abstractmethod
    def update(self, memory: PyTree, trial: Trial) -> tuple[Array, PyTree, Array]:
        """Whether the step is accepted, the new memory, and whether a rejected step should be tried again."""


@register_dataclass
@dataclass(frozen=True)
class FixedRegularization(Regularization):
    """One lambda for all iterations, every step accepted, as in the published ELK (there: 1e-8 by default).

    value: lambda, at least 0. Where A = 0 the error shrinks by lambda / (1 + lambda) an iteration. In float32 keep it
        above 1e-5 (see `AdaptiveRegularization`), or at 0 where Newton's step is wanted.
    """

    value: Scalar = 0.1

    def begin(self, dtype):
        return None

    def strength(self, memory):
        return self.value

    def update(self, memory, trial):
        return jnp.array(True), None, jnp.array(False)


class Adaptation(NamedTuple):
    """Memory of `AdaptiveRegularization`."""

    strength: Array  # lambda
    merits: Array  # (history,) roots of phi of the last iterates that were accepted, zeros before


@register_dataclass
@dataclass(frozen=True)
class AdaptiveRegularization(Regularization):
    """lambda from how well the linear model predicted the last step, without asking for a decrease each time.

    The merit is ``phi = sum of |r[t]|^2`` and the reference the largest phi of the last ``history`` iterates (Grippo,
    Lampariello & Lucidi 1986; in trust regions: Toint 1996). A step is accepted if its phi is below the reference;
    with ``rho`` = actual over predicted decrease from there, lambda grows by ``increase`` if rho < 1/4 and shrinks by
    ``decrease`` if rho > 3/4, within [smallest, largest] (Nocedal & Wright 2006, algorithm 4.1). Rejected steps count
    as iterations; the prefix on which they hold is kept, and grows by at least one step (see the module).

    initial: lambda of the first step.
    smallest: None: the square root of the dtype's eps (1.5e-8, or 3.5e-4 in float32). Along unstable directions the
        covariances reach 1 / lambda beside 1 along stable ones. At 1e-5, float32 steps were seen off by 2e-4 of their
        size (`Filter`).
    history: 1 asks for a decrease in every step, the textbook's rule: it creeps along accept flips and folds, where
        phi must rise before it falls, at a step an iteration.

    Differs from the textbook, besides, where the recurrence is not finite at some steps of the path: phi is taken over
    the others, fewer such steps are always progress, and more never are.

    Raises:
        ValueError: history below 1.
    """

    initial: Scalar = 1.0
    increase: Scalar = 4.0
    decrease: Scalar = 0.1
    smallest: Scalar | None = None
    largest: Scalar = 1e8
    history: int = field(default=10, metadata=dict(static=True))

    def __post_init__(self):
        if isinstance(self.history, int) and self.history < 1:
            raise ValueError(f"history must be at least 1, got {self.history}.")

    def begin(self, dtype):
        return Adaptation(jnp.asarray(self.initial, dtype), jnp.zeros(self.history, dtype))

    def strength(self, memory):
        return memory.strength

    def num_exact(self, prefix):
        return prefix + 1

    def update(self, memory, trial):
        merits = jnp.roll(memory.merits, 1).at[0].set(trial.before)
        reference = jnp.max(merits)
        same = trial.lost_after == trial.lost_before
        accepted = (trial.lost_after < trial.lost_before) | (same & (trial.after < reference))
        safe = jnp.where(reference > 0, reference, 1.0)
        actual = 1 - (trial.after / safe) ** 2
        predicted = 1 - (trial.predicted / safe) ** 2
        # a model that predicts no decrease is a poor one, whatever happened
        rho = jnp.where(predicted > 0, actual / jnp.where(predicted > 0, predicted, 1.0), -1.0)
        poor = ~(rho >= 0.25) | (trial.lost_after > trial.lost_before)
        good = rho > 0.75
        factor = jnp.where(poor, self.increase, jnp.where(good, self.decrease, 1.0))
        lam = memory.strength
        smallest = jnp.sqrt(jnp.finfo(lam.dtype).eps) if self.smallest is None else self.smallest
        new = jnp.clip(lam * factor, smallest, self.largest).astype(lam.dtype)
        return accepted, Adaptation(new, jnp.where(accepted, merits, memory.merits)), lam < self.largest


@register_dataclass
@dataclass(frozen=True)
class LevenbergMarquardt(NewtonType):
    """ELK and its relatives: Newton-type iterations inside a trust region.

    jacobian: `Dense` (ELK), `Diagonal` (quasi-ELK), `HutchinsonDiagonal`, `BlockDiagonal`, `HutchinsonBlockDiagonal`.
    regularization: `AdaptiveRegularization` or `FixedRegularization`: lambda, without unit.
    step_rule: `Filter`, as published, or `Smoother`, the exact Levenberg-Marquardt step.
    tol, max_iters, basis, damping, clip, num_iterates, devices: as `Newton`. The trust region is a ball in the basis. T
        iterations suffice with `AdaptiveRegularization`, not with a fixed lambda.

    Raises:
        ValueError: as `Newton`.
        TypeError: a Jacobian without entries (`Identity`, `Zero`); integer leaves in the state.

    Source: Gonzalez et al. 2024, section 4; Sarkka & Garcia-Fernandez 2021 (scans), Nocedal & Wright 2006 (lambda).

    Example:
        >>> import jax.numpy as jnp, pmcmc
        >>> solver = pmcmc.recurrence.elk()
        >>> solution = solver.solve(lambda x, u: jnp.tanh(x) + u, 0.0, jnp.ones(100))
        >>> bool(solution.result == pmcmc.recurrence.RESULTS.successful)
        True
    """

    jacobian: JacobianStructure = Dense()
    regularization: Regularization = AdaptiveRegularization()
    step_rule: StepRule = Filter()
    tol: Scalar | None = None
    max_iters: Scalar = 200
    basis: Basis = StandardBasis()
    damping: Scalar | None = None
    clip: Scalar | None = None
    num_iterates: int = field(default=0, metadata=dict(static=True))
    devices: Sequence[jax.Device] | None = field(default=None, metadata=dict(static=True))

    def __post_init__(self):
        self.check()
        if isinstance(self.jacobian, JacobianStructure) and not isinstance(self.jacobian, Scanned):
            raise TypeError(
                f"a trust region needs a Jacobian with entries, got {type(self.jacobian).__name__}(). "
                "Use Dense(), Diagonal() or one of their relatives."
            )

    def begin(self, system):
        return self.regularization.begin(system.start.dtype)

    def propose(self, system, it):
        a, r = self.linearize(system, it)
        num_exact = self.regularization.num_exact(exact_prefix(system, it.now))
        step = self.step_rule.step(a, r, self.regularization.strength(it.memory), num_exact, system.steps)
        return it.now.images + drop_overflow(jax.vmap(self.basis.decode)(step.beyond_images)), step.model

    def judge(self, system, it, candidate, plan):
        residual = lambda now: jax.vmap(self.basis.encode)(now.images - now.path)
        before, after = residual(it.now), residual(candidate)
        norm = lambda r: _norm(system.steps, r)
        lost = lambda r: system.steps.sum(~finite_rows(r))
        trial = Trial(norm(before), norm(after), norm(plan), lost(before), lost(after))
        accepted, memory, retry = self.regularization.update(it.memory, trial)
        return system.splice(candidate, it.now, accepted), memory, ~accepted & retry


def _norm(steps: Steps, r: Array) -> Array:
    """Root sum of squares of the finite rows, without overflow."""
    r = jnp.where(finite_rows(r)[:, None], r, 0.0)
    largest = steps.max(jnp.abs(r))
    safe = jnp.where(largest > 0, largest, 1.0)
    return safe * jnp.sqrt(steps.sum((r / safe) ** 2))
