"""Coalescence of paths that are already there."""

from typing import Any, NamedTuple

import jax
import numpy as np

from pmcmc._tree import is_real
from pmcmc._types import PyTree
from pmcmc.stability._checkpoints import Checkpoints, checkpoint_steps
from pmcmc.stability._coalescence import Coalescence
from pmcmc.stability._distance import judged_movement


class Pair(NamedTuple):
    """One pair of paths of n steps in D coordinates.

    steps: until they merged, n + 1 where they did not. distances: (n + 1,). last, last_above: (D,) last distances, and
    the last steps before the merge that are above the tolerance. growth, num_small: summed over steps with small
    distances, and their number. movement: (2, n). dimension_movement: (D,). finite: whether all states are.
    """

    steps: int
    distances: np.ndarray
    last: np.ndarray
    last_above: np.ndarray
    growth: float
    num_small: int
    movement: np.ndarray
    dimension_movement: np.ndarray
    finite: bool


def coalescence_of_paths(first: PyTree, second: PyTree, *, scale: PyTree, tol: float) -> Coalescence:
    """`coalescence_time` of pairs whose paths are known, on the host: nothing is compiled.

    first, second: states, leading axes (pairs, max_steps + 1), the starts included; numpy arrays.
    scale, tol: as `coalescence_time`.

    Differs from it in one thing: paths may go on behind the merge of their pair, and behind the last merge of all;
    all steps are counted as run.
    """
    num_pairs, num_rows = jax.tree.leaves(first)[0].shape[:2]
    # one by one, each small enough for a cache: 8 times as fast as all pairs at once, (30, 8193, 10) numbers
    pairs = [_compare(_rows(first, i), _rows(second, i), scale, tol) for i in range(num_pairs)]
    found: Any = Pair._make(map(np.stack, zip(*pairs, strict=True)))
    rate, error = _ratio(found.growth, found.num_small)
    num_steps = num_rows - 1
    grid = checkpoint_steps(num_steps, 16)
    at_grid = lambda tree: jax.tree.map(lambda x: np.swapaxes(np.asarray(x)[:, grid], 0, 1), tree)
    return Coalescence(
        steps=found.steps,
        dimension_steps=np.where(found.finite[:, None], found.last_above + 1, num_steps + 1),
        distance=found.distances[:, -1],
        by_dimension=found.last,
        distances=found.distances.T,
        growth_rate=rate,
        growth_error=error,
        movement=np.moveaxis(found.movement, 2, 0).swapaxes(1, 2),
        dimension_movement=judged_movement(found.dimension_movement.mean(axis=0), first, 2),
        finite=found.finite,
        num_steps=num_steps,
        tol=tol,
        checkpoints=Checkpoints(grid, grid <= num_steps, at_grid(first), at_grid(second)),
    )


def _compare(first: PyTree, second: PyTree, scale: PyTree, tol: float) -> Pair:
    """States: (n + 1, ...)."""
    gaps = gaps_by_dimension(first, second, scale)
    distances = gaps.max(axis=1)
    finite = all(np.isfinite(x).all() for x in jax.tree.leaves((first, second)))
    close = distances[1:] <= tol
    steps = int(close.argmax()) + 1 if finite and close.any() else len(distances)
    above = gaps[:steps] > tol
    last_above = np.where(above.any(axis=0), steps - 1 - above[::-1].argmax(axis=0), 0)
    before, after = distances[:-1][:steps], distances[1:][:steps]
    small = (before < np.sqrt(tol)) & (before > 0)
    floor = tol * 2.0**-10
    growth = np.log(np.clip(after[small], floor, 1.0) / np.clip(before[small], floor, 1.0))
    moves = [gaps_by_dimension(_rows(x, slice(1, None)), _rows(x, slice(-1)), scale, 1.0) for x in (first, second)]
    return Pair(
        steps=steps,
        distances=distances,
        last=gaps[-1],
        last_above=last_above,
        growth=growth.sum(),
        num_small=len(growth),
        movement=np.stack([m.mean(axis=1) for m in moves]),
        dimension_movement=np.mean([m.mean(axis=0) for m in moves], axis=0),
        finite=finite,
    )


def gaps_by_dimension(a: PyTree, b: PyTree, scale: PyTree, discrete: float = np.inf) -> np.ndarray:
    """(n, D): |a - b| / scale, inf where not finite; ``discrete`` where integers differ. a, b: (n, ...)."""

    def leaf(x, y, s):
        x, y = np.asarray(x), np.asarray(y)
        if not is_real(x):
            gap = np.where(x == y, 0.0, discrete)
        else:
            with np.errstate(invalid="ignore", divide="ignore", over="ignore"):
                gap = np.abs(x - y)
                gap = np.where(gap == 0, 0.0, gap / np.broadcast_to(np.asarray(s), x.shape))
            gap = np.where(np.isfinite(gap), gap, np.inf)
        return gap.reshape(len(x), -1)

    return np.concatenate(jax.tree.leaves(jax.tree.map(leaf, a, b, scale)), axis=1)


def _rows(tree: PyTree, index: Any) -> PyTree:
    return jax.tree.map(lambda x: np.asarray(x)[index], tree)


def _ratio(sums: np.ndarray, counts: np.ndarray) -> tuple[float, float]:
    """Mean growth per step over all pairs, and its standard error from the differences between them."""
    total, seen = counts.sum(), (counts > 0).sum()
    if not total:
        return np.nan, np.nan
    rate = sums.sum() / total
    if seen < 2:
        return float(rate), np.nan
    spread = np.sum((sums - rate * counts) ** 2) * seen / (seen - 1)
    return float(rate), float(np.sqrt(spread) / total)
