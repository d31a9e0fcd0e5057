"""Iterate on a window that slides along the path, instead of on all T steps at once.

Far from the certified prefix early iterations are wasted: the states there depend on states that are still wrong. A
window of W steps after the prefix limits the work and memory of an iteration to W steps. Whenever its first states are
correct, the window advances past them; what remains in it is a warm start. Picard iteration with a sliding window is
due to Shih et al. (2023); `Windowed` takes any Newton-type solver.
"""

from dataclasses import dataclass, field, replace
from typing import NamedTuple

import jax
import jax.numpy as jnp

from pmcmc._arguments import check_int
from pmcmc._pytree import Array, leading_true, register_dataclass
from pmcmc.recurrence.newton.equations import (
    Course,
    Evaluation,
    System,
    blocked_at,
    conclude,
    holding,
    measured_scale,
    own_residual,
)
from pmcmc.recurrence.newton.newton import Iterate, NewtonType, VectorSolver, finish, record
from pmcmc.recurrence.solution import RecurrenceSolver


class Slide(NamedTuple):
    """State of the outer loop.

    Attributes:
        all: What was last known about every step, (T, ...).
        window: Iterate of the window, (W, ...).
        first: Number of steps before the window, all of which are correct.
        reach: Number of steps that have been in a window so far.
        rounds: Evaluations of a window so far.
        iterates: Stored iterates, (num_iterates, T, D), or None.
    """

    all: Evaluation
    window: Iterate
    first: Array
    reach: Array
    rounds: Array
    iterates: Array | None


@register_dataclass
@dataclass(frozen=True)
class Windowed(VectorSolver):
    """Solve by sliding a window of ``window`` steps past the certified prefix.

    A step that enters the window starts from the initial guess or, if none was given, from the last state of the
    window. If no `scale` is given, it is measured on the window and, once the last window is solved, on the whole path:
    the window then slides again from the first step that is not solved on that scale. Steps that no window reached have
    residual inf. After ``max_iters`` iterations at least that many steps are correct (for `Newton`); under contraction
    the window advances by W steps every few iterations.

    Args:
        solver: A Newton-type solver. Its options apply; ``max_iters`` is the budget over all windows.
        window: W, the number of steps solved for at once; the whole path if T <= W.

    Raises:
        ValueError: window is below 1, or the solver has devices.
        TypeError: The solver is not Newton-type, or window is no integer.

    Example:
        >>> import jax.numpy as jnp, pmcmc
        >>> solver = pmcmc.recurrence.Windowed(pmcmc.recurrence.deer(), window=32)
        >>> solution = solver.solve(lambda x, u: jnp.tanh(x) + u, 0.0, jnp.ones(100))
        >>> bool(solution.result == pmcmc.recurrence.RESULTS.successful)
        True
    """

    solver: NewtonType
    window: int = field(default=256, metadata=dict(static=True))

    def __post_init__(self):
        check_int("window", self.window, 1)
        if isinstance(self.solver, RecurrenceSolver) and not isinstance(self.solver, NewtonType):
            raise TypeError("Windowed needs a Newton-type solver: Newton(...) or LevenbergMarquardt(...).")
        if isinstance(self.solver, NewtonType) and self.solver.shared_by:
            raise ValueError(
                "Windowed runs on one device, got a solver with devices. Drop devices; or drop Windowed, then each "
                "device stores only its share of the path."
            )

    @property
    def decision(self):
        return self.solver.decision

    @property
    def tolerance(self):
        return self.solver.tolerance

    def numbers_per_step(self, dim):
        # From XLA's memory analysis on a CPU (MALA, D = 4 and 24: 18 and 46 to 99). The window's own memory, W times
        # the numbers of `solver`, does not grow with the path and is left out.
        return 4 * dim + 8

    def run(self, system, guess, guess_given):
        width = min(self.window, system.length)
        last = _to_the_end(self.solver, system, _begin(self.solver, system, guess, width), width, guess_given)
        if system.scale is None and width < system.length:
            fixed = replace(system, scale=measured_scale(system, last.all.images))
            last = _to_the_end(self.solver, fixed, _again(fixed, last, width), width, True)
        # Judge the whole path, from what was last known about each step.
        it, seen = last.window, last.all
        blocked = jnp.where(it.blocked < width, last.first + it.blocked, system.length)
        course = Course(it.moving, blocked, it.num_iters, last.rounds, width)
        return conclude(system, seen, course, finish(last.iterates, seen.path, it.num_iters))


def _to_the_end(solver: NewtonType, system: System, slide: Slide, width: int, guess_given: bool) -> Slide:
    """Iterate and slide until the last window is solved, nothing changes, or the budget is spent."""

    def body(slide: Slide) -> Slide:
        slide = _slide(solver, system, slide, width, guess_given)
        part = _part(system, slide.all.path, slide.first, width)
        window = solver.advance(part, slide.window)
        seen = _write(slide.all, window.now, slide.first)
        return slide._replace(
            all=seen,
            window=window,
            rounds=slide.rounds + 1,
            iterates=record(slide.iterates, seen.path, window.num_iters),
        )

    return jax.lax.while_loop(lambda s: _unfinished(solver, system, s, width), body, slide)


def _again(system: System, slide: Slide, width: int) -> Slide:
    """Compare every step on the scale of the path; if all windows were passed, return to the first step that fails.

    Windows were passed on scales of their own. That of a window with a burst, or with a wild iterate, is larger.
    """
    seen = slide.all
    known = jnp.isfinite(seen.residual)
    now = system.compare(seen.path, seen.images, seen.aux)
    now = now._replace(residual=jnp.where(known, now.residual, jnp.inf), holds=now.holds & seen.holds)
    slide = slide._replace(all=now)
    passed = slide.window.solved & (slide.first + width == system.length)
    first = jnp.minimum(leading_true(now.holds), system.length - width)
    path = jax.lax.dynamic_slice_in_dim(now.path, first, width, 0)
    return jax.lax.cond(passed & ~jnp.all(now.holds), lambda: _moved(system, slide, first, path), lambda: slide)


def _begin(solver: NewtonType, system: System, guess: Array, width: int) -> Slide:
    """Evaluate the guess in the first window; all later steps are unknown."""
    part = system.part(system.start, jnp.zeros((), int), width)
    window = solver.start(part, guess[:width])
    window = window._replace(moving=jnp.all(jnp.isfinite(system.start)), iterates=None)
    shapes = jax.eval_shape(system.evaluate, guess)
    unknown = jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), shapes)
    unknown = unknown._replace(path=guess, images=guess, residual=jnp.full_like(unknown.residual, jnp.inf))
    iterates = jnp.broadcast_to(guess, (solver.num_iterates, *guess.shape)) if solver.num_iterates else None
    first = jnp.zeros((), int)
    return Slide(_write(unknown, window.now, first), window, first, jnp.array(width), jnp.ones((), int), iterates)


def _unfinished(solver: NewtonType, system: System, slide: Slide, width: int) -> Array:
    """Whether to iterate again."""
    it = slide.window
    # A window that is solved does not change any more, but the path may continue after it.
    ahead = slide.first + width < system.length
    return jnp.where(it.solved, ahead, it.moving) & (it.num_iters < solver.max_iters)


def _slide(solver: NewtonType, system: System, slide: Slide, width: int, guess_given: bool) -> Slide:
    """Advance past the states that are correct, if any, and evaluate the new window."""
    now = slide.window.now
    part = _part(system, slide.all.path, slide.first, width)
    step = jnp.minimum(_trusted(part, now), system.length - width - slide.first)

    def moved() -> Slide:
        first = slide.first + step
        path = jax.lax.dynamic_slice_in_dim(slide.all.path, first, width, 0)
        if not guess_given:  # steps that enter for the first time start from the last state of the window
            new = first + jnp.arange(width) >= slide.reach
            path = jnp.where(new[:, None], slide.all.path[slide.reach - 1], path)
        return _moved(system, slide, first, path)

    return jax.lax.cond(step > 0, moved, lambda: slide)


def _moved(system: System, slide: Slide, first: Array, path: Array) -> Slide:
    """Move the window to the steps after ``first``, with these states (W, D), and evaluate it."""
    width = path.shape[0]
    part = _part(system, slide.all.path, first, width)
    now = part.evaluate(path)
    solved, blocked = part.steps.all(now.holds), blocked_at(part, now)
    window = slide.window._replace(now=now, moving=jnp.array(True), solved=solved, blocked=blocked)
    return slide._replace(
        all=_write(slide.all, now, first),
        window=window,
        first=first,
        reach=jnp.maximum(slide.reach, first + width),
        rounds=slide.rounds + 1,
    )


def _trusted(part: System, now: Evaluation) -> Array:
    """Length of the prefix of a window that the window may advance past.

    It is the whole window if all its equations are satisfied; otherwise the states that satisfy them on their own
    scale, because a later state that explodes inflates the scale of the window.
    """
    return leading_true(jnp.all(now.holds) | holding(part, now, own_residual(part, now)))


def _before(system: System, path: Array, first: Array) -> Array:
    """Return the state before the window."""
    return jnp.where(first > 0, path[jnp.maximum(first - 1, 0)], system.start)


def _part(system: System, path: Array, first: Array, width: int) -> System:
    """Return the equations of the window."""
    return system.part(_before(system, path, first), first, width)


def _write(everything: Evaluation, window: Evaluation, first: Array) -> Evaluation:
    """Write the window into the arrays of the whole path."""
    put = lambda x, w: jax.lax.dynamic_update_slice_in_dim(x, w, first, 0)
    same = everything._replace(scale=None), window._replace(scale=None)
    return jax.tree.map(put, *same)._replace(scale=window.scale)
