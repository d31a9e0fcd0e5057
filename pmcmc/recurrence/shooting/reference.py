"""Multiple shooting as a plain sequential loop over blocks and steps: the algorithm on one page.

`MultipleShooting` computes the same in parallel, for many chains at once, and the tests compare the two. Read this file
for the order of things, with finite states of scale 1 and no budget; `pmcmc.recurrence.shooting.repair` has all clauses
of the rule.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import numpy as np

from pmcmc._pytree import PyTree

# Steps in a row from small distances after which a merge within the tolerance is accepted.
WATCHED_STEPS = 8


class Reference(NamedTuple):
    """What the plain loop finds.

    Attributes:
        path: States x[1..T], leading axis T.
        residual: Largest accepted distance between a repaired and a recorded state.
        num_sweeps: Number of repair sweeps.
        num_sequential_steps: Critical path: block length plus the longest run of each repair sweep.
        num_fn_evals: Steps taken by all blocks together.
    """

    path: PyTree
    residual: float
    num_sweeps: int
    num_sequential_steps: int
    num_fn_evals: int


def distance(x: PyTree, y: PyTree) -> float:
    """Return the largest absolute difference of two states; infinite if integers differ."""
    gaps = [0.0]
    for a, b in zip(map(np.asarray, jax.tree.leaves(x)), map(np.asarray, jax.tree.leaves(y)), strict=True):
        if np.issubdtype(a.dtype, np.floating):
            gaps.append(float(np.max(np.abs(a - b))))
        else:
            gaps.append(0.0 if np.all(a == b) else np.inf)
    return max(gaps)


def solve_plainly(fn: Callable, x0: PyTree, inputs: PyTree, guess: PyTree, *, num_blocks: int, tol: float) -> Reference:
    """Solve ``x[t] = fn(x[t-1], inputs[t])``, t = 1..T, by multiple shooting with repair, one step after the other.

    Args:
        fn: The recurrence ``(x, u) -> x``. All coordinates have scale 1.
        x0: State before the first step.
        inputs: Leading axis T.
        guess: States for t = 1..T, leading axis T. Only those before block starts are used.
        num_blocks: P.
        tol: Largest accepted distance.

    Returns:
        The `Reference` solution.

    Source: Heidelberger & Stone (1990); Neal (1999); Chartier & Philippe (1993).
    """
    at = lambda tree, t: jax.tree.map(lambda x: x[t], tree)
    length = len(jax.tree.leaves(inputs)[0])
    size = -(-length // num_blocks)
    blocks = [range(first, min(first + size, length)) for first in range(0, length, size)]

    # Zeroth sweep: every block runs from its guess.
    path: list[Any] = [None] * length
    for block in blocks:
        x = x0 if block[0] == 0 else at(guess, block[0] - 1)
        for t in block:
            path[t] = x = fn(x, at(inputs, t))

    # Repair sweeps: a block is run again from the end of its predecessor until it meets its own recording.
    residual, num_sweeps, critical_path, num_fn_evals = 0.0, 0, size, length
    active = list(range(1, len(blocks)))
    recorded = {p: at(guess, blocks[p][0] - 1) for p in active}  # where the recordings start
    handed_on = [0] * len(blocks)  # steps in a row from small distances, at the end of each block
    while active:
        num_sweeps += 1
        # as they were before this sweep: blocks run at once
        starts = {p: (path[blocks[p][0] - 1], handed_on[p - 1]) for p in active}
        longest, unmerged = 0, []
        for p in active:
            (x, watched), taken = starts[p], 0
            before, recorded[p] = distance(x, recorded[p]), x
            for t in blocks[p]:
                x, taken = fn(x, at(inputs, t)), taken + 1
                gap = distance(x, path[t])
                watched = watched + 1 if 0 < before < np.sqrt(tol) else 0
                if gap <= tol and (gap == 0 or watched >= WATCHED_STEPS):
                    residual = max(residual, gap)  # merged: the recording is valid from here on
                    break
                path[t], before = x, gap
            else:
                unmerged.append(p)  # its end has changed, so its successor has to be run again
                handed_on[p] = watched
            longest, num_fn_evals = max(longest, taken), num_fn_evals + taken
        critical_path += longest
        active = [p + 1 for p in unmerged if p + 1 < len(blocks)]
    stacked = jax.tree.map(lambda *xs: np.stack(xs), *path)
    return Reference(stacked, residual, num_sweeps, critical_path, num_fn_evals)
