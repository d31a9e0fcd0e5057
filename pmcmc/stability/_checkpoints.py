"""States of coupled pairs on the way, at steps spaced logarithmically."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from pmcmc._tree import is_real
from pmcmc._types import Array, ArrayLeaf, PyTree


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
