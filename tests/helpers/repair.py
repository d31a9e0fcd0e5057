"""The repair rule of multiple shooting as a plain loop over blocks and steps."""

from typing import Any, NamedTuple

import jax
import numpy as np


class Repaired(NamedTuple):
    """The path as a pytree of arrays (T, ...), and the counts."""

    path: Any
    residual: float
    num_sweeps: int
    critical_path: int
    num_fn_evals: int


def distance(x, y) -> float:
    """Largest absolute difference; infinite where integers differ."""
    gaps = []
    for a, b in zip(jax.tree.leaves(x), jax.tree.leaves(y), strict=True):
        if np.issubdtype(np.asarray(a).dtype, np.floating):
            gaps.append(float(np.max(np.abs(a - b))))
        else:
            gaps.append(0.0 if np.all(a == b) else np.inf)
    return max(gaps)


def repair_by_hand(step, x0, inputs, guess, num_blocks: int, tol: float) -> Repaired:
    """Return all states of ``x[t] = step(x[t-1], inputs[t])`` by the rule, with scale 1."""
    at = lambda tree, t: jax.tree.map(lambda x: x[t], tree)
    length = len(jax.tree.leaves(inputs)[0])
    size = -(-length // num_blocks)
    blocks = [range(first, min(first + size, length)) for first in range(0, length, size)]
    path: list = [None] * length
    for block in blocks:
        x = x0 if block[0] == 0 else at(guess, block[0] - 1)
        for t in block:
            path[t] = x = step(x, at(inputs, t))
    residual, num_sweeps, critical_path, num_fn_evals = 0.0, 0, size, length
    active = list(range(1, len(blocks)))
    while active:
        num_sweeps += 1
        starts = {p: path[blocks[p][0] - 1] for p in active}  # taken together: the ends before this sweep
        longest, unmerged = 0, []
        for p in active:
            x, taken, before, watched = starts[p], 0, np.inf, 0
            for t in blocks[p]:
                x, taken = step(x, at(inputs, t)), taken + 1
                gap = distance(x, path[t])
                watched += 0 < before < np.sqrt(tol)
                if gap <= tol and (gap == 0 or watched >= 8 or t == blocks[p][-1]):
                    residual = max(residual, gap)
                    break
                path[t], before = x, gap
            else:
                unmerged.append(p)
            longest, num_fn_evals = max(longest, taken), num_fn_evals + taken
        critical_path += longest
        active = [p + 1 for p in unmerged if p + 1 < len(blocks)]
    stacked = jax.tree.map(lambda *xs: np.stack(xs), *path)
    return Repaired(stacked, residual, num_sweeps, critical_path, num_fn_evals)
