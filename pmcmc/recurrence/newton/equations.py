"""One chain as a system of equations in vectors: ``x[t] = f(x[t-1], u[t])``, t = 1..T, x[t] of shape ``(D,)``.

All Newton-type solvers use it to evaluate all T equations at once (`System`, `Evaluation`) and to judge the last
iterate: `conclude` decides which states are certified, and the result code.

`growth_along` and `amplified` measure how errors grow along the path.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, NamedTuple, cast

import jax
import jax.numpy as jnp
import numpy as np

from pmcmc._pytree import (
    Array,
    PyTree,
    at_least_single,
    expand_mask,
    finite_rows,
    relative_distance,
    single_or_wider,
    within_rounding,
)
from pmcmc.recurrence.scan import running
from pmcmc.recurrence.sharding import AllSteps, Steps
from pmcmc.recurrence.solution import RESULTS, Stats, default_tolerance, largest_error, separates, typical_scale

# The scale is measured on about this many states, as in `typical_scale`.
SCALE_STATES = 4096


class Evaluation(NamedTuple):
    """An iterate and how well it satisfies the equations.

    Attributes:
        path: x[1..T], (T, D).
        images: f(x[t-1], u[t]), (T, D).
        aux: Auxiliary output of f, leading axis T.
        residual: ``|x[t] - f(x[t-1], u[t])| / scale``, (T,); inf where it is not finite.
        holds: Whether the equation is satisfied within the tolerance, (T,).
        scale: Scale that residuals are relative to, (D,).
    """

    path: Array
    images: Array
    aux: PyTree
    residual: Array
    holds: Array
    scale: Array | None


@dataclass(frozen=True)
class System:
    """The equations of one chain, or those of them that one device has; arrays then contain its own steps only.

    Attributes:
        fn: ``(x, u) -> (x, aux)`` on vectors.
        start: x[0], ``(D,)``.
        inputs: Leading axis T.
        scale: Spread of each coordinate, ``(D,)``. None: measured on the images of each iterate.
        tol: Largest residual of a satisfied equation.
        steps: Operations across steps, on one device or several.
    """

    fn: Callable
    start: Array
    inputs: PyTree
    scale: Array | None
    tol: Any
    steps: Steps

    @property
    def length(self) -> int:
        """T, the steps of the whole path."""
        return self.steps.length

    def image(self, x: Array, u: PyTree) -> Array:
        """Return f(x, u)."""
        return self.fn(x, u)[0]

    def previous(self, path: Array) -> Array:
        """Return x[0..T-1]."""
        return self.steps.delayed(path, self.start)

    def evaluate(self, path: Array) -> Evaluation:
        """Evaluate all T equations at once."""
        images, aux = jax.vmap(self.fn)(self.previous(path), self.inputs)
        return self.compare(path, images, aux)

    def splice(self, new: Evaluation, old: Evaluation, whole: Array) -> Evaluation:
        """Return the new iterate if ``whole``, otherwise its exact prefix followed by the rest of the old iterate.

        Needs no further evaluation, since an image depends only on the state before it.
        """
        index, prefix = self.steps.numbers(), exact_prefix(self, new)
        pick = lambda stop: lambda x, y: jnp.where(whole | expand_mask(index < stop, x), x, y)
        images, aux = jax.tree.map(pick(prefix + 1), (new.images, new.aux), (old.images, old.aux))
        return self.compare(pick(prefix)(new.path, old.path), images, aux)

    def compare(self, path: Array, images: Array, aux: PyTree) -> Evaluation:
        """Compare both sides of the equations, path and images."""
        scale = self.scale
        if scale is None:
            scale = measured_scale(self, images)
        residual = relative_distance(path, images, scale)
        # No state can satisfy the equation better than its rounding (consider a posterior shifted by 1e5).
        holds = (residual <= self.tol) | within_rounding(path, images)
        return Evaluation(path, images, aux, residual, holds & finite_rows((path, images)), scale)

    def part(self, start: Array, first: Array, length: int) -> "System":
        """Return the equations of steps ``first + 1 .. first + length``, given the state ``start`` before them."""
        cut = lambda x: jax.lax.dynamic_slice_in_dim(x, first, length, 0)
        return replace(self, start=start, inputs=jax.tree.map(cut, self.inputs), steps=AllSteps(length))


class Outcome(NamedTuple):
    """What a solver found for one chain; the fields of `Solution` on vectors.

    Attributes:
        path: States, (T, D).
        aux: Auxiliary output, leading axis T.
        result: `RESULTS` code.
        residual: Largest residual.
        stats: Cost and certification.
        iterates: Iterates (num_iterates, T, D), or None.
        residual_profile: Residual of each step, (T,).
    """

    path: Array
    aux: PyTree
    result: Array
    residual: Array
    stats: Stats
    iterates: Array | None
    residual_profile: Array


def measured_scale(system: System, images: Array) -> Array:
    """Spread of each coordinate over the images, ``(D,)``, used if no scale is given.

    It is at most the range of x[0] and the images. Images of a guess that stands still are equal, so they have no
    spread, and relative to their size a small step looks like none. Below rounding no scale has a meaning.
    """
    sample = system.steps.every(max(1, system.length // SCALE_STATES), images)
    start = jnp.broadcast_to(system.start, sample.shape)
    known = jnp.concatenate([start, jnp.where(jnp.isfinite(sample), sample, start)])
    return at_most(typical_scale(sample), jnp.min(known, axis=0), jnp.max(known, axis=0))


def at_most(scale: Array, low: Array, high: Array) -> Array:
    """Limit a measured scale to the range of states between ``low`` and ``high``, but not below their rounding."""
    info = jnp.finfo(low.dtype)
    rounding = info.eps * jnp.maximum(jnp.abs(high), jnp.abs(low))
    return jnp.maximum(jnp.minimum(scale, high - low), jnp.maximum(rounding, info.tiny))


def exact_prefix(system: System, now: Evaluation) -> Array:
    """Length of the prefix that satisfies its equations to rounding.

    It measures the progress of the iteration; `conclude` decides what is certified. Rounding is used rather than the
    tolerance, because the latter is relative to a scale that an exploding iterate inflates.
    """
    return system.steps.leading(now.holds & within_rounding(now.path, now.images))


def blocked_at(system: System, now: Evaluation) -> Array:
    """Step t (from 0) where f is not finite although all earlier states are correct to rounding; T if there is none."""
    prefix = exact_prefix(system, now)
    behind = system.steps.numbers() == prefix
    return jnp.where(system.steps.any(behind & ~finite_rows(now.images)), prefix, system.length)


class Course(NamedTuple):
    """How the iterations went.

    Attributes:
        moving: Whether the iterates still changed.
        blocked: See `blocked_at`; T if no step is blocked.
        num_iters: Number of iterations.
        rounds: Evaluations of the system one after the other.
        width: Steps per evaluation.
    """

    moving: Array
    blocked: Array
    num_iters: Array
    rounds: Array
    width: int


def own_residual(system: System, now: Evaluation) -> Array:
    """Residual of each step on a scale that depends only on the states before it, ``(T,)``.

    A wild iterate inflates a measured scale, and relative to that scale wrong states pass. Each step is therefore
    compared on the smaller of that scale and the range of x[0] and the images up to its own: as long as the earlier
    equations are satisfied, these are states of the sequential path. A given scale is used as it is.
    """
    if system.scale is not None:
        return now.residual
    start = jnp.broadcast_to(system.start, now.images.shape)
    images = jnp.where(finite_rows(now.images)[:, None], now.images, start)  # steps with other images fail below
    # One scan for both ends of the range: the running minimum is minus the running maximum of -images.
    both = running(system.steps, jnp.maximum, jnp.concatenate([images, -images], axis=1), -jnp.inf)
    high, low = jnp.split(both, 2, axis=1)
    high, low = jnp.maximum(high, start), jnp.minimum(-low, start)
    scale = at_most(cast(Array, now.scale)[None], low, high)
    residual = relative_distance(now.path, now.images, scale)
    return jnp.where(jnp.isfinite(now.residual), residual, jnp.inf)


def holding(system: System, now: Evaluation, residual: Array) -> Array:
    """Whether each equation is satisfied, given this residual from `own_residual`."""
    return now.holds & ((residual <= system.tol) | within_rounding(now.path, now.images))


class Standing(NamedTuple):
    """How far the states of an iterate are certified.

    Attributes:
        growth_rate: Mean log growth of small distances; NaN if some equation is not satisfied, or all are exactly.
        separating: Whether the path as a whole may be a pseudo-orbit.
        residual: Residual of each step as it is reported, (T,).
        prefix: Length of the prefix that is the sequential path within the tolerance.
    """

    growth_rate: Array
    separating: Array
    residual: Array
    prefix: Array


def _standing(system: System, now: Evaluation, known: Array) -> Standing:
    """Judge the whole path if all equations are satisfied, otherwise the longest prefix that is correct by itself.

    A satisfied step is f of its predecessor up to a residual. The errors of a prefix are these residuals, propagated by
    the growth of small distances along the later states. They must stay within the tolerance.
    """
    steps, all_hold, dtype = system.steps, system.steps.all(now.holds), now.path.dtype
    residual = jnp.where(all_hold, now.residual, own_residual(system, now))
    holds = known & holding(system, now, residual)
    inexact = steps.any((residual > 0) & (steps.numbers() < steps.leading(holds)))
    # Propagate the residuals along the path. Growth is needed only where some of them are not zero.
    unit = cast(Array, now.scale)
    growth = growth_along(system.image, system.previous(now.path), system.inputs, unit, inexact, steps)
    # Rounding is relative to the state, not to the scale.
    rounded = jnp.minimum(residual, 2 * jnp.finfo(dtype).eps)
    made = jnp.where(within_rounding(now.path, now.images), rounded, residual)
    error = jnp.max(amplified(made[:, None], growth, steps), axis=1)
    growth_rate = jnp.where(all_hold & inexact, jnp.max(mean_growth(growth, steps)), jnp.nan)
    # Errors of rounding are accepted whatever the tolerance, so growth is judged by one that they can meet.
    least = jnp.maximum(system.tol, default_tolerance(dtype))
    blown_up = steps.max(error) > largest_error(least)
    separating = separates(growth_rate, steps.max(made), least, system.length) | blown_up
    exact = steps.leading(known & (residual == 0))
    within = steps.leading(holds & (error <= least))
    prefix = jnp.where(all_hold, jnp.where(separating, exact, steps.leading(known)), jnp.maximum(exact, within))
    return Standing(growth_rate, separating, residual, prefix)


def conclude(system: System, now: Evaluation, course: Course, iterates: Array | None) -> Outcome:
    """Turn the last iterate into an `Outcome`: the states, how far they are certified, and the result code.

    Args:
        system: The equations.
        now: The last iterate.
        course: How the iterations went.
        iterates: Stored iterates, or None.
    """
    steps = system.steps
    known = jnp.all(jnp.isfinite(system.start)) & (steps.numbers() < course.blocked)
    standing = _standing(system, now, known)
    # From the first state that f makes NaN or infinite onwards, states are unknown and set to NaN.
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
        num_fn_evals=times(course.rounds, course.width),
        certified_steps=standing.prefix,
        growth_rate=standing.growth_rate,
        certified_residual=steps.max(jnp.where(steps.numbers() < standing.prefix, residual, 0.0)),
    )
    return Outcome(path, now.aux, result, worst, stats, iterates, residual)


def times(count: Array, width: int) -> Array:
    """Return ``count * width``, or the largest multiple of ``width`` that the dtype can hold."""
    return jnp.minimum(count, jnp.iinfo(count.dtype).max // width) * width


def growth_along(
    fn, previous: Array, inputs: PyTree, unit: Array, wanted: Array, steps: Steps, num_steps: int = 64
) -> Array:
    """Log growth of small distances in each step along a path, ``(own steps, 2)``; 0 where not ``wanted`` or undefined.

    It is measured twice: on tangents, and on finite differences (`_difference`), since derivatives may be the user's
    own, such as those of ``jax.lax.stop_gradient``, ``jax.custom_jvp`` and smoothed decisions.

    Blocks of ``num_steps`` steps run as lanes, twice: first each from the same direction, then each from the direction
    in which its predecessor ended. From a direction of its own a block would lose the share of it that does not grow
    and count the loss as contraction. An entry depends on the states before it alone, so a prefix of the path has the
    growth that it would have by itself. The first direction is drawn at random: maps of differences of coordinates turn
    one with equal coordinates to zero.

    previous: states x[t-1], shape ``(own steps, D)``. inputs: leading axis of the same. unit: of the norm, ``(D,)``.
    """
    length, dim = previous.shape
    num_steps, wide = min(num_steps, length), single_or_wider(previous.dtype)
    lanes = -(-length // num_steps)
    unit = at_least_single(jnp.where((unit > 0) & jnp.isfinite(unit), unit, 1))
    largest = math.log(jnp.finfo(wide).max)

    def cut(x):
        x = jnp.concatenate([x, jnp.repeat(x[-1:], lanes * num_steps - length, axis=0)])
        return jnp.moveaxis(x.reshape(lanes, num_steps, *x.shape[1:]), 1, 0)

    own = (jnp.arange(lanes * num_steps) < length).reshape(lanes, num_steps).T

    def push(x, u, v):
        image, tangent = jax.jvp(lambda x: fn(x, u), (x,), ((v[0] * unit).astype(x.dtype),))
        return jnp.stack([tangent.astype(wide) / unit, _difference(fn, x, u, v[1], image, unit)])

    direction = np.random.default_rng(0).standard_normal(dim)
    first = jnp.broadcast_to(jnp.asarray(direction / np.linalg.norm(direction), wide), (lanes, 2, dim))

    def body(before, xu):
        x, u, own = xu
        v = jax.vmap(push)(x, u, before)
        size, v, norm = _sized(v)
        log = jnp.clip(jnp.log(size) + jnp.log(norm), -largest, largest)
        defined = jnp.isfinite(norm) & (norm > 0)
        v = jnp.where(defined[..., None], v / jnp.where(defined, norm, 1)[..., None], first)
        return jnp.where(own[:, None, None], v, before), jnp.where(jnp.isnan(log), 0, log)

    def along(begin, _):
        ends, logs = jax.lax.scan(body, begin, (cut(previous), jax.tree.map(cut, inputs), own))
        handed = steps.before(lambda earlier, later: later, ends[-1], 0.0)  # zero on the first device
        handed = jnp.where(jnp.any(handed != 0), handed, first[0])
        return jnp.concatenate([handed[None], ends[:-1]]), logs

    def measure():
        _, logs = jax.lax.scan(along, first, length=2)
        return jnp.moveaxis(logs[-1], 1, 0).reshape(-1, 2)[:length]

    return jax.lax.cond(wanted, measure, lambda: jnp.zeros((length, 2), wide))


def _sized(v: Array) -> tuple[Array, Array, Array]:
    """Return the largest entries of vectors (..., D), the vectors over these, and the norms of the latter.

    The square of a wild derivative is infinite.
    """
    size = jnp.max(jnp.abs(v), axis=-1)
    v = v / jnp.where((size > 0) & jnp.isfinite(size), size, 1)[..., None]
    return size, v, jnp.sqrt(jnp.sum(v * v, axis=-1))


def _difference(fn, x: Array, u: PyTree, v: Array, image: Array, unit: Array) -> Array:
    """Finite difference of a step in a direction of length 1, ``(D,)``, over its length; both in units of the scale.

    Of the two sides it is that of the smaller difference: a decision that falls otherwise next to the path concerns one
    side alone, and is no growth of distances that are smaller still. What rounding may add is subtracted, and what
    rounding hides is no growth, so that paths that keep their distance are not said to separate.
    """
    eps = float(jnp.finfo(x.dtype).eps)
    magnitude = jnp.maximum(jnp.abs(x), jnp.abs(image)).astype(unit.dtype) / unit
    reach = jnp.cbrt(eps * jnp.maximum(1, jnp.max(magnitude)))
    side = lambda sign: (fn((x + sign * reach * v * unit).astype(x.dtype), u) - image).astype(unit.dtype) / unit
    size, moved, norm = _sized(jax.vmap(side)(jnp.array([1, -1], unit.dtype)))
    length = size * norm
    least = jnp.argmin(jnp.where(jnp.isfinite(length), length, jnp.inf))
    noise = 4 * eps * jnp.sqrt(jnp.sum(magnitude**2))
    safe = jnp.where(length[least] > 0, length[least], 1)
    seen = jnp.maximum(1 - noise / safe, jnp.minimum(1, jnp.minimum(noise, reach) / safe))
    return seen * size[least] / reach * moved[least]


def mean_growth(growth: Array, steps: Steps, num_steps: int = 64) -> Array:
    """Means of `growth_along` over its whole blocks, ``(2,)``: estimates of the largest Lyapunov exponent."""
    num_steps = min(num_steps, growth.shape[0])
    lanes = growth.shape[0] // num_steps
    whole = steps.numbers()[num_steps - 1 :: num_steps][:lanes] < steps.length  # blocks without padding
    total = jnp.where(whole[:, None, None], growth[: lanes * num_steps].reshape(lanes, num_steps, 2), 0)
    return steps.total(jnp.sum(total, axis=(0, 1))) / (num_steps * steps.total(jnp.sum(whole)))


def amplified(residual: Array, growth: Array, steps: Steps) -> Array:
    """Errors of a path whose steps have these residuals: ``e[t] = exp(growth[t]) e[t-1] + residual[t]``, e[0] = 0."""

    def join(first, second):
        (a1, b1), (a2, b2) = first, second
        return a1 + a2, jnp.logaddexp(b1 + a2, b2)

    made = jnp.broadcast_to(jnp.log(residual), growth.shape)
    return jnp.exp(running(steps, join, (growth, made), (0.0, -jnp.inf))[1])
