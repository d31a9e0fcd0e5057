"""Levenberg-Marquardt by Kalman filtering: Newton's recursion, kept near the current iterate.

Newton's step solves the linearised system whatever its size. Where the products of A[t] grow, it overflows although the
recurrence itself does not. ELK (Gonzalez et al. 2024, section 4) adds a penalty on the increments d,

    minimise  sum over t of  |d[t] - A[t] d[t-1] - r[t]|^2 + lambda |d[t]|^2

The minimiser is the mode of a linear Gaussian state-space model with pseudo-observations, so a Kalman smoother finds it
by associative scans (see `pmcmc.recurrence.newton.kalman`). The published method uses the filter alone, a cheaper step
that takes only the past into account. Both shrink the products of A[t]: they stay bounded for every lambda > 0, and
lambda = 0 is Newton.

The solver is `LevenbergMarquardt`. A `StepRule` chooses between filter and smoother; a `Regularization` chooses lambda
and accepts or rejects steps.

With lambda > 0 the step is not exact along a growing prefix, and where decisions flip (Metropolis) or f folds, the sum
has points from which no small step lowers it. `AdaptiveRegularization` therefore differs from the source: after the
prefix that is already satisfied, one more increment is free of the penalty, and of a rejected iterate the exact prefix
is kept. The prefix then grows by a step per iteration, as in Newton's method, and T iterations suffice (one more if the
first evaluation, outside the loop, rounds differently).
"""

import abc
from dataclasses import dataclass, field
from typing import Any, NamedTuple, cast

import jax.numpy as jnp

from pmcmc._arguments import check_int
from pmcmc._pytree import Array, PyTree, Scalar, at_least_single, finite_rows, register_dataclass
from pmcmc.recurrence.newton import kalman
from pmcmc.recurrence.newton.equations import exact_prefix
from pmcmc.recurrence.newton.jacobian import JacobianStructure, Scanned
from pmcmc.recurrence.newton.newton import NewtonType, drop_overflow
from pmcmc.recurrence.scan import apply_affine
from pmcmc.recurrence.sharding import Steps

__all__ = ["Filter", "Smoother", "StepRule"]  # the other public names are exported by pmcmc.recurrence


class Step(NamedTuple):
    """A trust-region step in the basis.

    Attributes:
        beyond_images: New path minus the images of the old one, (T, D).
        model: Residual after the step as predicted by the linear model, (T, D).
    """

    beyond_images: Array
    model: Array


class StepRule(abc.ABC):
    """Which mean of the state-space model is the step.

    The filtered mean at t depends on the pseudo-observations up to t, the smoothed mean on all of them.
    """

    @abc.abstractmethod
    def step(self, a: Any, r: Array, strength: Scalar, num_known: Array | int, steps: Steps) -> Step:
        """Compute the step.

        Args:
            a: A, shape ``(T, ...)``.
            r: Residuals, shape ``(T, D)``.
            strength: lambda.
            num_known: Number of increments at the start that are Newton's, free of the penalty.
            steps: As in `JacobianStructure.recur`.
        """


@register_dataclass
@dataclass(frozen=True)
class Filter(StepRule):
    """The filtered mean, as in the published ELK.

    An iteration takes one scan for the covariances and one affine scan.

    Source: Gonzalez et al. (2024).
    """

    def step(self, a, r, strength, num_known, steps):
        carried, pull = kalman.filter_means(steps, a, r, kalman.gains(steps, a, strength, num_known))
        return Step(carried - pull, pull)


@register_dataclass
@dataclass(frozen=True)
class Smoother(StepRule):
    """The smoothed mean, the exact Levenberg-Marquardt step.

    It takes one more affine scan than `Filter`, from the end of the path.
    """

    def step(self, a, r, strength, num_known, steps):
        gains = kalman.gains(steps, a, strength, num_known)
        carried, pull = kalman.filter_means(steps, a, r, gains)
        s = kalman.smoother_corrections(steps, a, gains, pull, strength)
        return Step(carried - pull + s, pull + apply_affine(a, steps.delayed(s)) - s)


class Trial(NamedTuple):
    """What is known when a step is judged: residuals over the steps of the path where they are finite.

    Attributes:
        before: Root of the sum of squares before the step.
        after: The same after the step.
        predicted: The same after the step, as predicted by the linear model.
        lost_before: Number of steps of the path whose residual is not finite, before.
        lost_after: Their number after the step.
    """

    before: Array
    after: Array
    predicted: Array
    lost_before: Array
    lost_after: Array


class Regularization(abc.ABC):
    """How strong the trust region is, and when a step is accepted.

    lambda is the precision of the pseudo-observations: 0 gives Newton's step, a large lambda keeps the iterate.
    """

    @abc.abstractmethod
    def begin(self, dtype: Any) -> PyTree:
        """Return the memory before the first iteration of a solve in this precision."""

    @abc.abstractmethod
    def strength(self, memory: PyTree) -> Scalar:
        """Return lambda of the next step."""

    def num_exact(self, prefix: Array) -> Array | int:
        """Return the number of increments at the start that are Newton's, free of the penalty.

        Args:
            prefix: Number of states that are already exact.
        """
        return 0

    @abc.abstractmethod
    def update(self, memory: PyTree, trial: Trial) -> tuple[Array, PyTree, Array]:
        """Return whether the step is accepted, the new memory, and whether to retry after a rejected step."""


@register_dataclass
@dataclass(frozen=True)
class FixedRegularization(Regularization):
    """One lambda for all iterations, with every step accepted, as in the published ELK (there: 1e-8 by default).

    Where A = 0 the error shrinks by lambda / (1 + lambda) per iteration.

    Args:
        value: lambda, at least 0. In float32 keep it above 1e-5 (see `AdaptiveRegularization`), or at 0 for Newton's
            step.
    """

    value: Scalar = 0.1

    def begin(self, dtype):
        return None

    def strength(self, memory):
        return self.value

    def update(self, memory, trial):
        return jnp.array(True), None, jnp.array(False)


class Adaptation(NamedTuple):
    """Memory of `AdaptiveRegularization`.

    Attributes:
        strength: lambda.
        merits: Roots of phi of the last accepted iterates, (history,); zeros before these.
    """

    strength: Array
    merits: Array


@register_dataclass
@dataclass(frozen=True)
class AdaptiveRegularization(Regularization):
    """Choose lambda by how well the linear model predicted the last step, without requiring a decrease at each step.

    The merit is ``phi = sum of |r[t]|^2``, and the reference is the largest phi of the last ``history`` iterates
    (Grippo, Lampariello & Lucidi 1986; in trust regions: Toint 1996). A step is accepted if its phi is below the
    reference. With rho = actual / predicted decrease from the reference, lambda is multiplied by ``increase`` if rho <
    1/4 and by ``decrease`` if rho > 3/4, within [smallest, largest] (Nocedal & Wright 2006, algorithm 4.1). Rejected
    steps count as iterations; their exact prefix is kept and grows by at least one step per iteration.

    A further difference from the textbook concerns paths on which the recurrence is not finite at some steps: phi is
    taken over the others; fewer such steps always count as progress, and more never do.

    Args:
        initial: lambda of the first step.
        increase: Factor of lambda after a poor prediction.
        decrease: Factor of lambda after a good prediction.
        smallest: Lower bound of lambda. None: the square root of the dtype's eps (1.5e-8, or 3.5e-4 in float32).
            Covariances reach 1 / lambda along unstable directions and about 1 along stable ones; at 1e-5, errors of
            2e-4 of their size were seen in float32 steps (`Filter`).
        largest: Upper bound of lambda.
        history: Number of accepted iterates that the reference is taken over. 1 requires a decrease at every step, the
            textbook's rule, which advances by only a step per iteration along accept flips and folds, where phi must
            rise before it falls.

    Raises:
        ValueError: history is below 1.
        TypeError: It is a number but no integer.
    """

    initial: Scalar = 1.0
    increase: Scalar = 4.0
    decrease: Scalar = 0.1
    smallest: Scalar | None = None
    largest: Scalar = 1e8
    history: int = field(default=10, metadata=dict(static=True))

    def __post_init__(self):
        check_int("history", self.history, 1)

    def begin(self, dtype):
        return Adaptation(jnp.asarray(self.initial, dtype), jnp.zeros(self.history, dtype))

    def strength(self, memory):
        return memory.strength

    def num_exact(self, prefix):
        return prefix + 1

    def update(self, memory, trial):
        # Acceptance: fewer steps that are not finite, or as many and a merit below the reference.
        merits = jnp.roll(memory.merits, 1).at[0].set(trial.before)
        reference = jnp.max(merits)
        same = trial.lost_after == trial.lost_before
        accepted = (trial.lost_after < trial.lost_before) | (same & (trial.after < reference))
        # lambda from the ratio of actual and predicted decrease, both relative to the reference.
        safe = jnp.where(reference > 0, reference, 1.0)
        actual = 1 - (trial.after / safe) ** 2
        predicted = 1 - (trial.predicted / safe) ** 2
        # a model that predicts no decrease is poor, whatever the step achieved
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

    Each iteration minimises the sum over t of ``|d[t] - A[t] d[t-1] - r[t]|^2 + lambda |d[t]|^2`` over increments d of
    the path, exactly or in part (see ``step_rule``). The trust region is a ball in the basis.

    Args:
        jacobian: `Dense` (ELK), `Diagonal` (quasi-ELK), `HutchinsonDiagonal`, `BlockDiagonal` or
            `HutchinsonBlockDiagonal`.
        tol: As in `Newton`.
        max_iters: As in `Newton`. T iterations suffice with `AdaptiveRegularization`, but not with a fixed lambda.
        basis: As in `Newton`.
        damping: As in `Newton`.
        clip: As in `Newton`.
        num_iterates: As in `Newton`.
        devices: As in `Newton`.
        regularization: `AdaptiveRegularization` or `FixedRegularization`: lambda, dimensionless.
        step_rule: `Filter`, as published, or `Smoother`, the exact Levenberg-Marquardt step.

    Raises:
        ValueError: As in `Newton`.
        TypeError: The Jacobian has no entries (`Identity`, `Zero`); or, in a solve, the state has integer leaves.

    Sources: Gonzalez et al. (2024), section 4; Sarkka & Garcia-Fernandez (2021) (scans); Nocedal & Wright (2006)
        (lambda).

    Example:
        >>> import jax.numpy as jnp, pmcmc
        >>> solver = pmcmc.recurrence.elk()
        >>> solution = solver.solve(lambda x, u: jnp.tanh(x) + u, 0.0, jnp.ones(100))
        >>> bool(solution.result == pmcmc.recurrence.RESULTS.successful)
        True
    """

    regularization: Regularization = AdaptiveRegularization()
    step_rule: StepRule = Filter()

    def __post_init__(self):
        super().__post_init__()
        if isinstance(self.jacobian, JacobianStructure) and not isinstance(self.jacobian, Scanned):
            raise TypeError(
                f"a trust region needs a Jacobian with entries, got {type(self.jacobian).__name__}(). "
                "Use Dense(), Diagonal() or one of their relatives."
            )

    def numbers_per_step(self, dim):
        # From XLA's memory analysis of chains: the scan of a matrix structure holds roots of covariances besides A[t],
        # and their QR factorisations, 25 D^2 for Dense with the filter, 29 with the smoother. Diagonals fit Newton's.
        entries = self.jacobian.num_entries(dim)
        return super().numbers_per_step(dim) + (26 * entries if entries > dim else 0)

    def begin(self, system):
        return self.regularization.begin(system.start.dtype)

    def propose(self, system, it):
        a, r = self.linearize(system, it)
        num_exact = self.regularization.num_exact(exact_prefix(system, it.now))
        strength, wide = self.regularization.strength(it.memory), at_least_single(cast(Array, a))
        step = self.step_rule.step(wide, at_least_single(r), strength, num_exact, system.steps)
        beyond_images, model = (x.astype(r.dtype) for x in step)
        return it.now.images + drop_overflow(self.decode(beyond_images)), model

    def judge(self, system, it, candidate, plan):
        residual = lambda now: self.encode(now.images - now.path)
        before, after = residual(it.now), residual(candidate)
        norm = lambda r: _norm(system.steps, r)
        lost = lambda r: system.steps.sum(~finite_rows(r))
        trial = Trial(norm(before), norm(after), norm(plan), lost(before), lost(after))
        accepted, memory, retry = self.regularization.update(it.memory, trial)
        return system.splice(candidate, it.now, accepted), memory, ~accepted & retry


def _norm(steps: Steps, r: Array) -> Array:
    """Root of the sum of squares of the finite rows, without overflow."""
    r = jnp.where(finite_rows(r)[:, None], r, 0.0)
    largest = steps.max(jnp.abs(r))
    safe = jnp.where(largest > 0, largest, 1.0)
    return safe * jnp.sqrt(steps.sum((r / safe) ** 2))
