"""States of coupled pairs on the way, at steps spaced logarithmically."""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from pmcmc._pytree import finite_rows, is_real, real_dtype, tree_index
from pmcmc._typing import Array, ArrayLeaf, PyTree, Scalar
from pmcmc.recurrence import Recurrence
from pmcmc.recurrence.problem import as_recurrence
from pmcmc.recurrence.solution import default_tolerance
from pmcmc.stability.distance import coordinate_distances, judged_movement


class Checkpoints(NamedTuple):
    """States of the pairs after some numbers of steps, spaced logarithmically; n of them.

    steps: (n,) 0 (the starts), ..., max_steps. reached: (n,) whether the run came so far; behind it real entries are
        NaN, others zero.
    first, second: states, leading axes (n, pairs).
    """

    steps: ArrayLeaf
    reached: ArrayLeaf
    first: PyTree
    second: PyTree


def checkpoint_steps(max_steps: int, num_checkpoints: int) -> np.ndarray:
    """0, 1, ..., max_steps in even ratios; fewer than asked for where they would repeat."""
    if num_checkpoints < 1:
        return np.zeros(0, int)
    spaced = np.geomspace(1, max_steps, num_checkpoints - 1) if num_checkpoints > 1 else np.zeros(0)
    return np.unique(np.concatenate([[0], np.round(spaced)]).astype(int))


def empty_checkpoints(x: PyTree, grid: np.ndarray) -> PyTree:
    """Room for the states x (2 pairs, ...) at each step of the grid; the first row holds x itself."""
    blank = lambda v: jnp.full((grid.size, *v.shape), jnp.nan if is_real(v) else 0, v.dtype)
    return jax.tree.map(lambda v: blank(v).at[0].set(v) if grid.size else blank(v), x)


def store_checkpoint(states: PyTree, x: PyTree, now: Array, grid: np.ndarray) -> PyTree:
    """Write x to its row if this step is a checkpoint."""
    if not grid.size:
        return states
    row = jnp.searchsorted(jnp.asarray(grid), now)
    row = jnp.where(jnp.asarray(grid)[row] == now, row, grid.size)  # behind the last: dropped
    return jax.tree.map(lambda buffer, v: buffer.at[row].set(v, mode="drop"), states, x)


class Coalescence(NamedTuple):
    """How coupled pairs of paths approach each other. Distances are in units of the scale.

    A distance is the largest over the coordinates; it is inf where integers differ or an entry is not finite. A pair
    has merged at the first step at which its distance is within ``tol``. Coordinates are the D entries of all leaves
    of a state, joined.

    steps: (pairs,) steps until each pair merged; max_steps + 1 where it did not.
    dimension_steps: (pairs, D) steps until each coordinate was within the tolerance and stayed there until the pair
        merged; max_steps + 1 where it did not. The largest of a pair is its `steps`.
    distance, by_dimension: (pairs,), (pairs, D) last distances.
    distances: (max_steps + 1, pairs) distance after each number of steps, from 0; NaN behind the last step run.
    growth_rate: mean log growth per step of distances below sqrt(tol): the largest Lyapunov exponent, from finite
        distances, so with every decision that flipped between the two paths. NaN where no small distance was seen.
    growth_error: its standard error, from the differences between pairs; NaN with fewer than two.
    movement: (max_steps, 2, pairs) mean over coordinates of |x[t] - x[t-1]| / scale (1 for an integer that changed);
        NaN behind the last step run.
    dimension_movement: (D,) the same by coordinate, a mean over steps and paths; NaN for an integer that never changed.
    finite: (pairs,) whether all states were finite.
    num_steps: steps run; fewer than max_steps once every pair has merged or is not finite.
    tol: the merge tolerance.
    checkpoints: see `Checkpoints`.
    """

    steps: ArrayLeaf
    dimension_steps: ArrayLeaf
    distance: ArrayLeaf
    by_dimension: ArrayLeaf
    distances: ArrayLeaf
    growth_rate: ArrayLeaf
    growth_error: ArrayLeaf
    movement: ArrayLeaf
    dimension_movement: ArrayLeaf
    finite: ArrayLeaf
    num_steps: ArrayLeaf
    tol: ArrayLeaf
    checkpoints: Checkpoints

    @property
    def max_steps(self) -> int:
        """Steps after which the run gave up."""
        return self.movement.shape[0]

    @property
    def merged(self) -> ArrayLeaf:
        """(pairs,) which pairs merged."""
        return self.steps <= self.max_steps

    def quantiles(self, probabilities: Array) -> Array:
        """Merge times that these shares of the pairs do not exceed, as observed; inf where so few merged."""
        steps = jnp.sort(jnp.where(self.merged, self.steps, jnp.inf))
        rank = jnp.ceil(jnp.asarray(probabilities) * steps.size).astype(int) - 1
        return steps[jnp.clip(rank, 0, steps.size - 1)]

    def profile(self, scale: PyTree) -> Array:
        """Distance by coordinate at the checkpoints, (n, pairs, D); NaN where not reached. scale: as was passed."""
        points = self.checkpoints
        gaps = coordinate_distances(points.first, points.second, scale, num_axes=2)
        return jnp.where(points.reached[:, None, None], gaps, jnp.nan)

    def steps_within(self, distances: Array) -> Array:
        """Steps of the first checkpoint from which on ``distances`` stay within tol; those of the pair where later.

        For what only the checkpoints tell, such as `site_distances` of their states. distances: (n, pairs, ...).
        Returns (pairs, ...); as for the pair, max_steps + 1 where it did not merge.
        """
        points, ones = self.checkpoints, [1] * (distances.ndim - 2)
        rows = jnp.arange(1, len(points.steps) + 1).reshape(-1, 1, *ones)
        above = points.reached.reshape(-1, 1, *ones) & ~(distances <= self.tol)
        row = jnp.max(jnp.where(above, rows, 0), axis=0)
        first = jnp.append(points.steps, self.max_steps + 1)[row]
        pair = jnp.broadcast_to(self.steps.reshape(-1, *ones), row.shape)
        return jnp.where(row < jnp.sum(points.reached), jnp.minimum(first, pair), pair)


def coalescence_time(
    fn: Callable | Recurrence,
    first: PyTree,
    second: PyTree,
    inputs: PyTree,
    *,
    scale: PyTree,
    tol: Scalar | None = None,
    num_checkpoints: int = 16,
    has_aux: bool = False,
) -> Coalescence:
    """Run pairs of paths under common inputs until every pair has merged, or the inputs end.

    The two paths of a pair follow ``x[t] = fn(x[t-1], inputs[t])`` with the same inputs. Where they merge from starts
    spread wider than the states of interest, any guess of a block start will do for `MultipleShooting`, after as many
    steps. Needs no derivative; integer leaves merge when they are equal. May stand inside jit.

    fn: ``(x, u) -> x``, or ``(x, u) -> (x, aux)`` with has_aux=True; or a `Recurrence`, which carries caches.
    first, second: states, leading axis pairs. inputs: leading axes (max_steps, pairs).
    scale: the typical spread of each coordinate, structure of one state (leaves broadcast).
    tol: largest distance that counts as merged. None: the merge tolerance of `MultipleShooting`, 32 eps in float32 and
        512 eps in float64.
    num_checkpoints: states to keep, see `Checkpoints`; memory of ``2 pairs num_checkpoints`` states.

    The growth rate is measured as `MultipleShooting` does: over steps of unmerged pairs that start below sqrt(tol), so
    that by optional stopping leaving this regime by merging does not bias the mean. A distance of exactly zero counts
    as ``tol / 1024``.

    For a coupling with lag L (Biswas, Jacob & Vanetti 2019) pass as `first` states L steps further along than
    `second`, from the same law of starts; see `wasserstein_bound`.

    Raises:
        ValueError: no steps; first, second and inputs that do not fit.

    Sources: common random numbers as in circular coupling (Neal 1999); optional stopping: Wald's identity.

    Example:
        >>> import jax.numpy as jnp, pmcmc
        >>> halve = lambda x, u: 0.5 * x + u
        >>> found = pmcmc.stability.coalescence_time(
        ...     halve, jnp.zeros(1), jnp.ones(1), jnp.zeros((100, 1)), scale=1.0, tol=1e-3)
        >>> int(found.steps[0])  # 2^-10 < 1e-3 < 2^-9
        10
    """
    recurrence = as_recurrence(fn, has_aux)
    max_steps, num_pairs = _check(first, second, inputs)
    dtype = real_dtype(first)
    tol = jnp.asarray(default_tolerance(dtype) if tol is None else tol, dtype)
    both = lambda x: jnp.concatenate([x, x])
    start = jax.tree.map(lambda a, b: jnp.concatenate([a, jnp.asarray(b, a.dtype)]), first, second)
    step, unknown = jax.vmap(recurrence.step), jax.vmap(recurrence.unknown)
    carry = jax.vmap(recurrence.restore)(start)
    out, _ = jax.eval_shape(step, carry, jax.tree.map(both, tree_index(inputs, 0)))
    carry = jax.tree.map(lambda c, o: c.astype(o.dtype), carry, out)
    grid = checkpoint_steps(max_steps, num_checkpoints)

    def body(run: _Run) -> _Run:
        u = jax.tree.map(both, tree_index(inputs, run.step))
        carry, _ = step(run.carry, u)
        return _observe(run, carry, unknown(carry), num_pairs, scale, tol, grid)

    begin = _begin(carry, unknown(carry), max_steps, num_pairs, scale, grid)
    run = jax.lax.while_loop(lambda run: (run.step < max_steps) & jnp.any(run.pending), body, begin)
    return _conclude(run, num_pairs, tol, grid)


class _Run(NamedTuple):
    """State of the loop after ``step`` steps; `Coalescence` says what the fields it shares mean."""

    step: Array
    carry: PyTree
    x: PyTree  # (2 pairs, ...)
    pending: Array  # (pairs,) neither merged nor lost to a state that is not finite
    steps: Array
    last_above: Array  # (pairs, D) the last step at which a coordinate was not within the tolerance
    by_dimension: Array
    finite: Array
    distances: Array
    growth: Array  # (pairs,) sum of log growths of small distances
    growth_count: Array
    movement: Array
    dimension_movement: Array
    states: PyTree  # (n, 2 pairs, ...)


def _check(first: PyTree, second: PyTree, inputs: PyTree) -> tuple[int, int]:
    """max_steps and the number of pairs."""
    shapes = [jax.tree.map(jnp.shape, tree) for tree in (first, second)]
    if not jax.tree.leaves(first) or shapes[0] != shapes[1]:
        raise ValueError(f"first and second must be states of the same shapes, got {shapes[0]} and {shapes[1]}.")
    leading = {jnp.shape(x)[:1] for x in jax.tree.leaves(first)}
    axes = {jnp.shape(u)[:2] for u in jax.tree.leaves(inputs)}
    if len(leading) != 1 or len(axes) != 1 or next(iter(axes))[1:] != next(iter(leading)) or () in leading:
        raise ValueError(
            "states need the leading axis (pairs,) and inputs the leading axes (max_steps, pairs), got "
            f"{sorted(leading)} and {sorted(axes)}."
        )
    max_steps, num_pairs = next(iter(axes))
    if max_steps < 1:
        raise ValueError("inputs has no steps: expected leading axes (max_steps, pairs) with max_steps >= 1.")
    return max_steps, num_pairs


def _halves(x: PyTree, num_pairs: int) -> tuple[PyTree, PyTree]:
    return jax.tree.map(lambda v: v[:num_pairs], x), jax.tree.map(lambda v: v[num_pairs:], x)


def _largest(by_dimension: Array) -> Array:
    return jnp.max(by_dimension, axis=1)  # never NaN: entries that are not finite are at distance inf


def _begin(carry: PyTree, x: PyTree, max_steps: int, num_pairs: int, scale: PyTree, grid: np.ndarray) -> _Run:
    dtype = real_dtype(x)
    by_dimension = coordinate_distances(*_halves(x, num_pairs), scale).astype(dtype)
    finite = finite_rows(x)
    finite = finite[:num_pairs] & finite[num_pairs:]
    unknown_yet = lambda *shape: jnp.full(shape, jnp.nan, dtype)
    return _Run(
        step=jnp.zeros((), int),
        carry=carry,
        x=x,
        pending=finite,
        steps=jnp.full(num_pairs, max_steps + 1),
        last_above=jnp.zeros(by_dimension.shape, int),
        by_dimension=by_dimension,
        finite=finite,
        distances=unknown_yet(max_steps + 1, num_pairs).at[0].set(_largest(by_dimension)),
        growth=jnp.zeros(num_pairs, dtype),
        growth_count=jnp.zeros(num_pairs, dtype),
        movement=unknown_yet(max_steps, 2 * num_pairs),
        dimension_movement=jnp.zeros(by_dimension.shape[1], dtype),
        states=empty_checkpoints(x, grid),
    )


def _observe(run: _Run, carry: PyTree, x: PyTree, num_pairs: int, scale: PyTree, tol: Array, grid: np.ndarray) -> _Run:
    """Account for one more step of every path, which led to x."""
    dtype, now = tol.dtype, run.step + 1
    by_dimension = coordinate_distances(*_halves(x, num_pairs), scale).astype(dtype)
    moves = coordinate_distances(x, run.x, scale, discrete=1.0).astype(dtype)
    distance, before = _largest(by_dimension), _largest(run.by_dimension)
    finite = finite_rows(x)
    finite = run.finite & finite[:num_pairs] & finite[num_pairs:]
    merged = run.pending & finite & (distance <= tol)
    small = run.pending & finite & (before < jnp.sqrt(tol)) & (before > 0)
    floor = tol * 2.0**-10
    growth = jnp.log(jnp.maximum(jnp.minimum(distance, 1.0), floor) / jnp.maximum(before, floor))
    return _Run(
        step=now,
        carry=carry,
        x=x,
        pending=run.pending & finite & ~merged,
        steps=jnp.where(merged, now, run.steps),
        last_above=jnp.where(run.pending[:, None] & (by_dimension > tol), now, run.last_above),
        by_dimension=by_dimension,
        finite=finite,
        distances=run.distances.at[now].set(distance),
        growth=run.growth + jnp.where(small, growth, 0.0),
        growth_count=run.growth_count + small,
        movement=run.movement.at[run.step].set(jnp.mean(moves, axis=1)),
        dimension_movement=run.dimension_movement + jnp.mean(moves, axis=0),
        states=store_checkpoint(run.states, x, now, grid),
    )


def _conclude(run: _Run, num_pairs: int, tol: Array, grid: np.ndarray) -> Coalescence:
    max_steps = run.movement.shape[0]
    count = jnp.sum(run.growth_count)
    rate = jnp.where(count > 0, jnp.sum(run.growth) / jnp.maximum(count, 1), jnp.nan)
    spread = jnp.sum((run.growth - rate * run.growth_count) ** 2)  # of a ratio, over pairs
    seen = jnp.sum(run.growth_count > 0)
    error = jnp.sqrt(spread * seen / jnp.maximum(seen - 1, 1)) / jnp.maximum(count, 1)
    stayed = jnp.where(run.finite[:, None], run.last_above + 1, max_steps + 1)
    first = jax.tree.map(lambda s: s[:, :num_pairs], run.states)
    second = jax.tree.map(lambda s: s[:, num_pairs:], run.states)
    return Coalescence(
        steps=run.steps,
        dimension_steps=stayed,
        distance=_largest(run.by_dimension),
        by_dimension=run.by_dimension,
        distances=run.distances,
        growth_rate=rate,
        growth_error=jnp.where(seen > 1, error, jnp.nan),
        movement=run.movement.reshape(max_steps, 2, num_pairs),
        dimension_movement=judged_movement(run.dimension_movement / jnp.maximum(run.step, 1), run.x, 1),
        finite=run.finite,
        num_steps=run.step,
        tol=tol,
        checkpoints=Checkpoints(jnp.asarray(grid), jnp.asarray(grid) <= run.step, first, second),
    )
