"""Run pairs of chains under common noise and measure how they merge.

`coalescence_time` steps all pairs of x[t] = fn(x[t-1], u[t]) with shared inputs u until they merge (common random
numbers, as in the circular coupling of Neal, 1999). `Coalescence` holds the merge times, the distances and the growth
rate of small distances; `Checkpoints` holds states of the pairs at logarithmically spaced steps. Pairs that merge from
far apart show that `MultipleShooting` can start its blocks from guesses.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from pmcmc._pytree import Array, ArrayLeaf, PyTree, Scalar, finite_rows, is_real, real_dtype, tree_index
from pmcmc.recurrence import Recurrence
from pmcmc.recurrence.problem import as_recurrence, check_dtypes, check_scale, step_shape
from pmcmc.recurrence.solution import log_growth, tolerance_for
from pmcmc.stability.distance import (
    continuous_coordinates,
    coordinate_distances,
    judged_movement,
    largest_movement,
)


class Checkpoints(NamedTuple):
    """States of the pairs after some numbers of steps, spaced logarithmically; n checkpoints.

    Attributes:
        steps: Numbers of steps 0 (the starts), ..., max_steps; shape (n,).
        reached: Whether the run got to each checkpoint; shape (n,). In the states of the others real entries are NaN
            and integers zero.
        first: States of the first paths, leading axes (n, pairs).
        second: States of the second paths, leading axes (n, pairs).
    """

    steps: ArrayLeaf
    reached: ArrayLeaf
    first: PyTree
    second: PyTree


def checkpoint_steps(max_steps: int, num_checkpoints: int) -> np.ndarray:
    """Return steps 0, 1, ..., max_steps with constant ratios; fewer if rounding makes some of them equal.

    One checkpoint is step 0, two are steps 0 and 1.
    """
    if num_checkpoints < 1:
        return np.zeros(0, int)
    spaced = np.geomspace(1, max_steps, num_checkpoints - 1) if num_checkpoints > 1 else np.zeros(0)
    return np.unique(np.concatenate([[0], np.round(spaced)]).astype(int))


def empty_checkpoints(x: PyTree, grid: np.ndarray) -> PyTree:
    """Allocate a buffer for the states x (2 pairs, ...) at each step of the grid; the first row holds x itself."""
    blank = lambda v: jnp.full((grid.size, *v.shape), jnp.nan if is_real(v) else 0, v.dtype)
    return jax.tree.map(lambda v: blank(v).at[0].set(v) if grid.size else blank(v), x)


def store_checkpoint(states: PyTree, x: PyTree, now: Array, grid: np.ndarray) -> PyTree:
    """Write x to its row if this step is a checkpoint."""
    if not grid.size:
        return states
    row = jnp.searchsorted(jnp.asarray(grid), now)
    row = jnp.where(jnp.asarray(grid)[row] == now, row, grid.size)  # past the last row: the write is dropped
    return jax.tree.map(lambda buffer, v: buffer.at[row].set(v, mode="drop"), states, x)


class Coalescence(NamedTuple):
    """How coupled pairs of paths approach each other. Distances are in units of the scale.

    The distance of a pair is the largest over the coordinates; it is inf where integers differ or an entry is not
    finite. A pair has merged at the first step at which its distance is within ``tol``. Coordinates are the D entries
    of all leaves of a state, concatenated.

    Attributes:
        steps: Steps until each pair merged; shape (pairs,). max_steps + 1 if it did not.
        dimension_steps: Steps until each coordinate was within the tolerance and stayed there until the pair merged;
            shape (pairs, D). max_steps + 1 if it did not. The largest of a pair is its `steps`.
        distance: Last distance of each pair; shape (pairs,).
        by_dimension: Last distance of each coordinate; shape (pairs, D).
        distances: Distance after 0, 1, ... steps; shape (max_steps + 1, pairs). NaN after the last step run.
        growth_rate: Mean log growth per step of distances below sqrt(tol): the largest Lyapunov exponent measured from
            finite distances, so decisions that differ between the two paths count. NaN if no small distance was seen.
        growth_error: Standard error of ``growth_rate`` from the differences between pairs; NaN with fewer than two.
        movement: Largest |x[t] - x[t-1]| / scale over the continuous coordinates, or over all if there are none (1 for
            an integer that changed); shape (max_steps, 2, pairs). NaN after the last step run.
        dimension_movement: Movement by coordinate, averaged over steps and the paths of finite pairs (of all pairs if
            none is finite); shape (D,). NaN for a discrete coordinate that never changed.
        finite: Whether all states of a pair were finite; shape (pairs,).
        num_steps: Steps run; fewer than max_steps once every pair has merged or is not finite.
        tol: The merge tolerance.
        checkpoints: States of the pairs at some steps, see `Checkpoints`.
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
        """Which pairs merged; shape (pairs,)."""
        return self.steps <= self.max_steps

    @property
    def started_apart(self) -> ArrayLeaf:
        """Which pairs were not within the tolerance of each other at the start; shape (pairs,)."""
        return self.distances[0] > self.tol

    def quantiles(self, probabilities: Array) -> Array:
        """Return observed merge times that the given shares of the pairs do not exceed; inf where fewer merged."""
        steps = jnp.sort(jnp.where(self.merged, self.steps, jnp.inf))
        rank = jnp.ceil(jnp.asarray(probabilities) * steps.size).astype(int) - 1
        return steps[jnp.clip(rank, 0, steps.size - 1)]

    def profile(self, scale: PyTree) -> Array:
        """Return the distance by coordinate at the checkpoints.

        Args:
            scale: The scale that was passed to `coalescence_time`.

        Returns:
            Distances, shape (n, pairs, D); NaN at checkpoints that were not reached.
        """
        points = self.checkpoints
        scale = check_scale(scale, _one(points.first, 2))
        gaps = coordinate_distances(points.first, points.second, scale, num_axes=2)
        return jnp.where(points.reached[:, None, None], gaps, jnp.nan)

    def steps_within(self, distances: Array) -> Array:
        """Return the step of the first checkpoint from which ``distances`` stay within tol.

        Use it for quantities that are known only at the checkpoints, such as `site_distances` of their states.

        Args:
            distances: Distances at the checkpoints, shape (n, pairs, ...).

        Returns:
            Steps, shape (pairs, ...). The merge time of the pair if that is earlier or no checkpoint qualifies; as
            there, max_steps + 1 if the pair did not merge.
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
    """Run pairs of paths under common inputs until every pair has merged or the inputs end.

    The two paths of a pair follow ``x[t] = fn(x[t-1], inputs[t])`` with the same inputs. If they merge from starts that
    are spread wider than the states of interest, `MultipleShooting` can start a block from any guess and recovers the
    path after as many steps. No derivative is needed; integer leaves merge when they are equal. Can be called inside
    jit.

    The growth rate is measured as in `MultipleShooting`: over steps of unmerged pairs that start below sqrt(tol), so
    that by optional stopping a pair that leaves this regime by merging does not bias the mean. A distance of exactly
    zero counts as ``tol / 1024``.

    For a coupling with lag L (Biswas, Jacob & Vanetti, 2019) pass as `first` states L steps further along than
    `second`, from the same law of starts; see `wasserstein_bound`.

    Args:
        fn: ``(x, u) -> x``, or ``(x, u) -> (x, aux)`` with has_aux=True, or a `Recurrence`, which carries caches.
        first: Starting states of the first paths, leading axis pairs.
        second: Starting states of the second paths, leading axis pairs.
        inputs: Common inputs, leading axes (max_steps, pairs).
        scale: Typical spread of each coordinate; structure of one state (leaves broadcast), or one number for all.
        tol: Largest distance that counts as merged. None takes the merge tolerance of `MultipleShooting`, 32 eps in
            float32 and 512 eps in float64; states in half precision need one.
        num_checkpoints: Number of checkpoints to keep, see `Checkpoints`; uses the memory of ``2 pairs
            num_checkpoints`` states.
        has_aux: Whether ``fn`` returns auxiliary output, which is dropped.

    Returns:
        Merge times, distances, movement and checkpoints of all pairs.

    Raises:
        ValueError: inputs has no steps; first, second, inputs and scale do not fit each other; scale or tol is negative
            or not finite, or states are in half precision and there is no tol.
        TypeError: The states have complex numbers or typed keys, or fn would truncate them; or fn draws random numbers
            from keys of JAX's ``rbg`` generators, which are not common to the paths of a pair.

    Source: Neal (1999): circular coupling by common random numbers. Optional stopping: Wald's identity.

    Example:
        >>> import jax.numpy as jnp, pmcmc
        >>> halve = lambda x, u: 0.5 * x + u
        >>> found = pmcmc.stability.coalescence_time(
        ...     halve, jnp.zeros(1), jnp.ones(1), jnp.zeros((100, 1)), scale=1.0, tol=1e-3)
        >>> int(found.steps[0])  # 2^-10 < 1e-3 < 2^-9
        10
    """
    recurrence = as_recurrence(fn, has_aux)
    first, second, inputs = jax.tree.map(jnp.asarray, (first, second, inputs))
    max_steps, num_pairs = _check(first, second, inputs)
    # All paths are lanes of one program: the first paths of all pairs, then the second ones.
    both = lambda x: jnp.concatenate([x, x])
    start = jax.tree.map(lambda a, b: jnp.concatenate([a, b]), first, second)  # in a dtype that holds both
    step, unknown = jax.vmap(recurrence.step), jax.vmap(recurrence.unknown)
    carry = jax.vmap(recurrence.restore)(start)
    # The loop needs a carry of the dtypes that a step returns.
    out, _ = jax.eval_shape(step, carry, jax.tree.map(both, tree_index(inputs, 0)))
    state = jax.eval_shape(unknown, out)
    check_dtypes(start, state)
    step_shape(recurrence, _one(start, 1), _one(inputs, 2))
    carry = jax.tree.map(lambda c, o: c.astype(o.dtype), carry, out)
    scale, tol = check_scale(scale, _one(state, 1)), tolerance_for(tol, real_dtype(state))
    grid = checkpoint_steps(max_steps, num_checkpoints)

    def body(run: _Run) -> _Run:
        u = jax.tree.map(both, tree_index(inputs, run.step))
        carry, _ = step(run.carry, u)
        return _observe(run, carry, unknown(carry), num_pairs, scale, tol, grid)

    begin = _begin(carry, unknown(carry), max_steps, num_pairs, scale, tol.dtype, grid)
    run = jax.lax.while_loop(lambda run: (run.step < max_steps) & jnp.any(run.pending), body, begin)
    return _conclude(run, num_pairs, tol, grid)


class _Run(NamedTuple):
    """State of the loop after ``step`` steps; fields shared with `Coalescence` have the same meaning."""

    step: Array
    carry: PyTree
    x: PyTree  # (2 pairs, ...)
    pending: Array  # (pairs,) finite so far and not merged
    steps: Array
    last_above: Array  # (pairs, D) the last step at which a coordinate was not within the tolerance
    by_dimension: Array
    finite: Array
    distances: Array
    growth: Array  # (pairs,) sum of log growths of small distances
    growth_count: Array
    movement: Array
    dimension_movement: Array  # (2 pairs, D) summed over the steps
    states: PyTree  # (n, 2 pairs, ...)


def _check(first: PyTree, second: PyTree, inputs: PyTree) -> tuple[int, int]:
    """Check the shapes; return max_steps and the number of pairs."""
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


def _one(tree: PyTree, num_axes: int) -> PyTree:
    """Return the shapes of arrays without their leading axes."""
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape[num_axes:], x.dtype), tree)


def _halves(x: PyTree, num_pairs: int) -> tuple[PyTree, PyTree]:
    """Split states (2 pairs, ...) into those of the first and of the second paths."""
    return jax.tree.map(lambda v: v[:num_pairs], x), jax.tree.map(lambda v: v[num_pairs:], x)


def _largest(by_dimension: Array) -> Array:
    """Reduce distances (pairs, D) to the largest coordinate's; shape (pairs,)."""
    return jnp.max(by_dimension, axis=1)  # never NaN: entries that are not finite are at distance inf


def _begin(
    carry: PyTree, x: PyTree, max_steps: int, num_pairs: int, scale: PyTree, dtype: Any, grid: np.ndarray
) -> _Run:
    """Return the state of the loop before the first step; distances have this dtype."""
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
        dimension_movement=jnp.zeros((2 * num_pairs, by_dimension.shape[1]), dtype),
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
    # Only steps of unmerged pairs that start in the regime of small distances count: see optional stopping above.
    small = run.pending & finite & (before < jnp.sqrt(tol)) & (before > 0)
    growth = log_growth(distance, before, tol)
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
        movement=run.movement.at[run.step].set(largest_movement(moves, continuous_coordinates(x, 1))),
        dimension_movement=run.dimension_movement + moves,
        states=store_checkpoint(run.states, x, now, grid),
    )


def _conclude(run: _Run, num_pairs: int, tol: Array, grid: np.ndarray) -> Coalescence:
    """Summarise the finished loop: growth rate with its error over pairs, and times by coordinate."""
    max_steps = run.movement.shape[0]
    count = jnp.sum(run.growth_count)
    rate = jnp.where(count > 0, jnp.sum(run.growth) / jnp.maximum(count, 1), jnp.nan)
    spread = jnp.sum((run.growth - rate * run.growth_count) ** 2)  # variance of a ratio estimate, over pairs
    seen = jnp.sum(run.growth_count > 0)
    error = jnp.sqrt(spread * seen / jnp.maximum(seen - 1, 1)) / jnp.maximum(count, 1)
    # Movement counts on paths of finite pairs.
    counted = run.finite | ~jnp.any(run.finite)
    counted = jnp.concatenate([counted, counted])[:, None]
    moved = jnp.sum(jnp.where(counted, run.dimension_movement, 0.0), axis=0) / jnp.sum(counted)
    # A coordinate has merged after the last step at which it was above the tolerance.
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
        dimension_movement=judged_movement(moved / jnp.maximum(run.step, 1), continuous_coordinates(run.x, 1)),
        finite=run.finite,
        num_steps=run.step,
        tol=tol,
        checkpoints=Checkpoints(jnp.asarray(grid), jnp.asarray(grid) <= run.step, first, second),
    )
