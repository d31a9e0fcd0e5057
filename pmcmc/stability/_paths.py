"""Coalescence of paths that are already there."""

from typing import Any

import jax
import numpy as np

from pmcmc._tree import is_real
from pmcmc._types import PyTree
from pmcmc.stability._checkpoints import Checkpoints, checkpoint_steps
from pmcmc.stability._coalescence import Coalescence
from pmcmc.stability._distance import judged_movement


def coalescence_of_paths(first: PyTree, second: PyTree, *, scale: PyTree, tol: float) -> Coalescence:
    """`coalescence_time` of pairs whose paths are known, on the host: nothing is compiled.

    first, second: states, leading axes (max_steps + 1, pairs), the starts included; numpy arrays.
    scale, tol: as `coalescence_time`.

    Differs from it in one thing: paths may go on behind the merge of their pair, and behind the last merge of all;
    all steps are counted as run.
    """
    gaps = _by_dimension(first, second, scale)
    distances = gaps.max(axis=2)
    num_steps = distances.shape[0] - 1
    finite = np.isfinite(_joined(first)).all(axis=(0, 2)) & np.isfinite(_joined(second)).all(axis=(0, 2))
    close = (distances[1:] <= tol) & finite
    merged = close.any(axis=0)
    steps = np.where(merged, close.argmax(axis=0) + 1, num_steps + 1)
    until = np.arange(num_steps + 1)[:, None] < steps  # before the merge
    above = (gaps > tol) & until[:, :, None]
    last_above = np.where(above.any(axis=0), num_steps - above[::-1].argmax(axis=0), 0)
    before, after = distances[:-1], distances[1:]
    small = until[:-1] & (before < np.sqrt(tol)) & (before > 0)
    floor = tol * 2.0**-10
    growth = np.where(small, np.log(np.clip(after, floor, 1.0) / np.clip(before, floor, 1.0)), 0.0)
    rate, error = _ratio(growth.sum(axis=0), small.sum(axis=0))
    moves = [_by_dimension(_rows(x, slice(1, None)), _rows(x, slice(-1)), scale, 1.0) for x in (first, second)]
    grid = checkpoint_steps(num_steps, 16)
    return Coalescence(
        steps=steps,
        dimension_steps=np.where(finite[:, None], last_above + 1, num_steps + 1),
        distance=distances[-1],
        by_dimension=gaps[-1],
        distances=distances,
        growth_rate=rate,
        growth_error=error,
        movement=np.stack([m.mean(axis=2) for m in moves], axis=1),
        dimension_movement=judged_movement(np.mean([m.mean(axis=(0, 1)) for m in moves], axis=0), first, 2),
        finite=finite,
        num_steps=num_steps,
        tol=tol,
        checkpoints=Checkpoints(grid, grid <= num_steps, _rows(first, grid), _rows(second, grid)),
    )


def _rows(tree: PyTree, index: Any) -> PyTree:
    return jax.tree.map(lambda x: np.asarray(x)[index], tree)


def _joined(tree: PyTree) -> np.ndarray:
    """Leaves joined: (steps, pairs, D)."""
    flat = [np.asarray(x, float).reshape(*np.shape(x)[:2], -1) for x in jax.tree.leaves(tree)]
    return np.concatenate(flat, axis=2)


def _by_dimension(a: PyTree, b: PyTree, scale: PyTree, discrete: float = np.inf) -> np.ndarray:
    """|a - b| / scale, inf where not finite; ``discrete`` where integers differ."""

    def leaf(x, y, s):
        x, y = np.asarray(x), np.asarray(y)
        if not is_real(x):
            gap = np.where(x == y, 0.0, discrete)
        else:
            with np.errstate(invalid="ignore", divide="ignore"):
                gap = np.abs(x - y)
                gap = np.where(gap == 0, 0.0, gap / np.broadcast_to(np.asarray(s), x.shape))
            gap = np.where(np.isfinite(gap), gap, np.inf)
        return gap.reshape(*x.shape[:2], -1)

    return np.concatenate(jax.tree.leaves(jax.tree.map(leaf, a, b, scale)), axis=2)


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
