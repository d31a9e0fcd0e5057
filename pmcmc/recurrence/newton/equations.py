"""One chain as a system of equations in vectors: ``x[t] = f(x[t-1], u[t])``, t = 1..T, x[t] of shape ``(D,)``.

What every Newton-type solver shares: evaluating all T equations at once, and deciding which of them hold.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, NamedTuple, cast

import jax
import jax.numpy as jnp

from pmcmc._pytree import expand_mask, finite_rows, relative_distance, within_rounding
from pmcmc._typing import Array, PyTree
from pmcmc.recurrence.scan import running
from pmcmc.recurrence.sharding import AllSteps, Steps
from pmcmc.recurrence.shooting.growth import amplified, mean_growth, separates, tangent_growth
from pmcmc.recurrence.solution import RESULTS, Stats, default_tolerance, typical_scale

# About so many states say what the scale is, as in `typical_scale`.
SCALE_STATES = 4096


class Evaluation(NamedTuple):
    """An iterate and what the recurrence says about it."""

    path: Array  # (T, D): x[1..T]
    images: Array  # (T, D): f(x[t-1], u[t])
    aux: PyTree
    residual: Array  # (T,) |x[t] - f(x[t-1])| / scale; inf where not finite
    holds: Array  # (T,) whether that is within the tolerance
    scale: Array | None  # (D,) what "small" was measured by


@dataclass(frozen=True)
class System:
    """The equations of one chain, or those of them that one device holds; then arrays are of its own steps.

    fn: ``(x, u) -> (x, aux)`` on vectors. start: x[0], ``(D,)``. inputs: leading axis T.
    scale: spread of each coordinate ``(D,)``, or None: measured on the images of each iterate.
    tol: largest residual of an equation that holds. None: that of the dtype, see `default_tolerance`.
    steps: what joins them.
    """

    fn: Callable
    start: Array
    inputs: PyTree
    scale: Array | None
    tol: Any
    steps: Steps

    @property
    def length(self) -> int:
        return self.steps.length

    def image(self, x: Array, u: PyTree) -> Array:
        return self.fn(x, u)[0]

    def previous(self, path: Array) -> Array:
        """x[0..T-1]."""
        return self.steps.delayed(path, self.start)

    def evaluate(self, path: Array) -> Evaluation:
        """All T equations at once."""
        images, aux = jax.vmap(self.fn)(self.previous(path), self.inputs)
        return self.compare(path, images, aux)

    def splice(self, new: Evaluation, old: Evaluation, whole: Array) -> Evaluation:
        """The new iterate where ``whole``, else its exact prefix followed by the rest of the old one.

        Without another evaluation: an image depends on the state before it alone.
        """
        index, prefix = self.steps.numbers(), exact_prefix(self, new)
        pick = lambda stop: lambda x, y: jnp.where(whole | expand_mask(index < stop, x), x, y)
        images, aux = jax.tree.map(pick(prefix + 1), (new.images, new.aux), (old.images, old.aux))
        return self.compare(pick(prefix)(new.path, old.path), images, aux)

    def compare(self, path: Array, images: Array, aux: PyTree) -> Evaluation:
        """Which equations hold, given both sides of them."""
        scale = self.scale
        if scale is None:
            scale = measured_scale(self, images)
        residual = relative_distance(path, images, scale)
        tol = default_tolerance(path.dtype) if self.tol is None else self.tol
        # No state can satisfy the equation better than its own rounding (a posterior shifted by 1e5).
        holds = (residual <= jnp.asarray(tol, path.dtype)) | within_rounding(path, images)
        return Evaluation(path, images, aux, residual, holds & jnp.isfinite(residual), scale)

    def part(self, start: Array, first: Array, length: int) -> "System":
        """Steps ``first + 1 .. first + length``, from the state ``start`` before them."""
        cut = lambda x: jax.lax.dynamic_slice_in_dim(x, first, length, 0)
        return replace(self, start=start, inputs=jax.tree.map(cut, self.inputs), steps=AllSteps(length))


class Outcome(NamedTuple):
    """What a solver found for one chain; the fields of `Solution` on vectors."""

    path: Array
    aux: PyTree
    result: Array
    residual: Array
    stats: Stats
    iterates: Array | None
    residual_profile: Array


def measured_scale(system: System, images: Array) -> Array:
    """Spread of each coordinate ``(D,)`` over the images, where no scale is given."""
    return typical_scale(system.steps.every(max(1, system.length // SCALE_STATES), images))


def exact_prefix(system: System, now: Evaluation) -> Array:
    """Length of the prefix that holds to rounding: where the iteration stands, not what is certified (`conclude`).

    To rounding, not to the tolerance: that is relative to a scale which an exploding iterate inflates.
    """
    return system.steps.leading(now.holds & within_rounding(now.path, now.images))


def blocked_at(system: System, now: Evaluation) -> Array:
    """The step t (from 0) whose predecessors are right to rounding while f is not finite there; T if there is none."""
    prefix = exact_prefix(system, now)
    behind = system.steps.numbers() == prefix
    return jnp.where(system.steps.any(behind & ~finite_rows(now.images)), prefix, system.length)


class Course(NamedTuple):
    """How the iterations went."""

    moving: Array  # whether the iterates still changed
    blocked: Array  # see `blocked_at`; T where there is none
    num_iters: Array
    rounds: Array  # evaluations one after the other
    width: int  # steps in each of them


def own_residual(system: System, now: Evaluation) -> Array:
    """``(T,)`` residual of each step on a scale that depends on the states before it alone.

    Where the scale is measured, a wild iterate inflates it, and against it wrong states hold. So each step is compared
    on the smaller of that scale and the range of x[0] and the images up to its own: as long as the steps before hold,
    those are states of the sequential path. A given scale stays.
    """
    if system.scale is not None:
        return now.residual
    start = jnp.broadcast_to(system.start, now.images.shape)
    images = jnp.where(finite_rows(now.images)[:, None], now.images, start)  # where it is not, no step holds
    both = running(system.steps, jnp.maximum, jnp.concatenate([images, -images], axis=1), -jnp.inf)
    high, low = jnp.split(both, 2, axis=1)
    high, low = jnp.maximum(high, start), jnp.minimum(-low, start)
    rounding = jnp.finfo(start.dtype).eps * jnp.maximum(jnp.abs(high), jnp.abs(low))
    scale = jnp.maximum(jnp.minimum(cast(Array, now.scale)[None], high - low), rounding)
    residual = relative_distance(now.path, now.images, scale)
    return jnp.where(jnp.isfinite(now.residual), residual, jnp.inf)


def holding(system: System, now: Evaluation, residual: Array) -> Array:
    """Which equations hold with this residual, see `own_residual`."""
    tol = default_tolerance(now.path.dtype) if system.tol is None else system.tol
    return now.holds & ((residual <= tol) | within_rounding(now.path, now.images))


class Standing(NamedTuple):
    """What is known of the states that an iterate has."""

    growth_rate: Array  # NaN where the path does not hold as a whole, or exactly
    separating: Array  # whether the path as a whole may be a pseudo-orbit
    residual: Array  # (T,) as it is reported
    prefix: Array  # length of the prefix that is the sequential path within the tolerance


def _standing(system: System, now: Evaluation, known: Array) -> Standing:
    """Judge the path as a whole where all steps hold, else the longest prefix that is right by itself.

    A step that holds is f of its predecessor up to a residual. Errors of the prefix are residuals, each carried on by
    the growth of small distances along the states behind it; they must stay within the tolerance.
    """
    steps, all_hold, dtype = system.steps, system.steps.all(now.holds), now.path.dtype
    tol = default_tolerance(dtype) if system.tol is None else system.tol
    residual = jnp.where(all_hold, now.residual, own_residual(system, now))
    holds = known & holding(system, now, residual)
    inexact = steps.any((residual > 0) & (steps.numbers() < steps.leading(holds)))
    unit = cast(Array, now.scale)
    growth = tangent_growth(system.image, system.previous(now.path), system.inputs, unit, inexact, steps)
    # rounding is relative to the state, not to the scale
    rounded = jnp.minimum(residual, 2 * jnp.finfo(dtype).eps)
    error = amplified(jnp.where(within_rounding(now.path, now.images), rounded, residual), growth, steps)
    growth_rate = jnp.where(all_hold & inexact, mean_growth(growth, steps), jnp.nan)
    # errors above the square root of the tolerance are no longer small, and the linear recursion says nothing of them
    blown_up = steps.max(error) > jnp.maximum(tol, jnp.sqrt(tol))
    separating = separates(growth_rate, steps.max(now.residual), tol, system.length) | blown_up
    exact = steps.leading(known & (residual == 0))
    within = steps.leading(holds & (error <= jnp.maximum(tol, default_tolerance(dtype))))
    prefix = jnp.where(all_hold, jnp.where(separating, exact, steps.leading(known)), jnp.maximum(exact, within))
    return Standing(growth_rate.astype(dtype), separating, residual, prefix)


def conclude(system: System, now: Evaluation, course: Course, iterates: Array | None) -> Outcome:
    """From the last iterate to an `Outcome`: what stands, and the code that says why the rest does not."""
    steps = system.steps
    known = jnp.all(jnp.isfinite(system.start)) & (steps.numbers() < course.blocked)
    standing = _standing(system, now, known)
    # From the first state that f makes NaN or infinite on, nothing is known, and the path says so.
    path = jnp.where(known[:, None], now.path, jnp.nan)
    finite, converged = steps.all(known & finite_rows(path)), steps.all(now.holds & known)
    result = jnp.select(
        [~finite, converged & standing.separating, converged, ~course.moving],
        [RESULTS.nonfinite, RESULTS.not_contracting, RESULTS.successful, RESULTS.stagnated],
        RESULTS.max_iters_reached,
    )
    residual = jnp.where(known, standing.residual, jnp.inf)
    worst = jnp.where(steps.all(jnp.isfinite(residual)), steps.max(residual), jnp.inf)
    stats = Stats(
        num_iters=course.num_iters,
        num_sweeps=jnp.zeros_like(course.num_iters),
        num_sequential_steps=course.rounds,
        num_fn_evals=course.rounds * course.width,
        certified_steps=standing.prefix,
        growth_rate=standing.growth_rate,
        certified_residual=steps.max(jnp.where(steps.numbers() < standing.prefix, residual, 0.0)),
    )
    return Outcome(path, now.aux, result, worst, stats, iterates, residual)
