"""Decide whether a run of coupled pairs is evidence that a chain contracts.

`check_pilot` raises `PilotError` where the distances of a pilot prove nothing, for instance because chains stand still.
`coalescence_of_paths` computes the `Coalescence` of pairs whose paths are already known, in numpy and without
compiling.
"""

import math
from typing import Any, NamedTuple

import jax
import numpy as np

from pmcmc._pytree import PyTree, is_real
from pmcmc.stability.coalescence import Checkpoints, Coalescence, checkpoint_steps
from pmcmc.stability.distance import continuous_coordinates, judged_movement, largest_movement

# A pilot proves nothing if fewer than this share of its pairs, or fewer than two, started apart.
LEAST_APART = 0.25


class PilotError(RuntimeError):
    """A pilot of coupled chains proves nothing: chains hardly moved or started together, or a state is not finite.

    A pilot whose chains move and do not merge raises no such error: it is evidence for sampling sequentially. Only
    `check_pilot` raises this error. With ``solver="auto"`` chains are sampled sequentially after such a pilot, and the
    report says why.
    """


def check_pilot(pilot: Coalescence) -> None:
    """Raise unless the chains of a pilot started apart, moved and stayed finite.

    Distances of zero between chains that stand still are no contraction. A kernel that always accepts can contract to a
    point and then stop moving: movement over the last quarter of the run, that of the continuous coordinate that moves
    most, must exceed the regime of small distances, ``sqrt(tol)`` in units of the scale. A valid kernel that moves less
    than that per step can still be sampled; the pilot cannot tell it from a faulty one. At least a quarter of the
    pairs, and two of several, must start further apart than the tolerance.

    Args:
        pilot: Result of `coalescence_time`, outside jit.

    Raises:
        PilotError: A state was not finite, chains or a coordinate did not move, chains moved too little, or most pairs
            started from equal states. The message has what was seen and a remedy.

    Example:
        >>> import jax.numpy as jnp, pmcmc
        >>> still = pmcmc.stability.coalescence_time(
        ...     lambda x, u: x, jnp.zeros(2), jnp.ones(2), jnp.zeros((50, 2)), scale=1.0)
        >>> pmcmc.stability.check_pilot(still)
        Traceback (most recent call last):
        pmcmc.stability.evidence.PilotError: no chain moved in the 50 steps of the pilot...
    """
    if fault := pilot_fault(pilot):
        raise PilotError(fault)


def pilot_fault(pilot: Coalescence) -> str:
    """Return why a pilot proves nothing, with what was seen and a remedy; "" if it is evidence. See `check_pilot`."""
    num_steps = int(pilot.num_steps)
    finite = np.asarray(pilot.finite)
    if not finite.all():
        return (
            f"{(~finite).sum()} of {finite.size} coupled pairs of chains reached a state that is NaN or infinite "
            f"within {num_steps} steps. Check the kernel and the log density there, or lower the step size."
        )
    by_dimension = np.asarray(pilot.dimension_movement)  # NaN marks a discrete coordinate, which may keep its value
    if not (by_dimension > 0).any():
        return (
            f"no chain moved in the {num_steps} steps of the pilot, so it does not show whether chains merge. Lower "
            "the step size or run a longer warm-up; if every proposal diverges, check the model."
        )
    still = by_dimension == 0
    if still.any():
        return (
            f"coordinate(s) {', '.join(map(str, np.flatnonzero(still)[:8]))} of the state never moved in the "
            f"{num_steps} steps of the pilot. Check that the kernel updates them."
        )
    movement, quarter = np.asarray(pilot.movement)[:num_steps], max(1, num_steps // 4)
    early, late = float(movement[:quarter].mean()), float(movement[-quarter:].mean())
    if not late > np.sqrt(float(pilot.tol)):
        return (
            f"chains move {late:.1e} posterior sd a step at the end of the pilot ({early:.1e} at its beginning) along "
            "the coordinate that moves most, too little to tell a kernel that moves slowly from one that comes to rest "
            "at a point. Take larger steps or longer trajectories; if you wrote the kernel, check that it uses its "
            "noise."
        )
    apart = np.asarray(pilot.started_apart)
    if apart.sum() < min(apart.size, max(2, math.ceil(LEAST_APART * apart.size))):
        return (
            f"only {apart.sum()} of {apart.size} coupled pairs start from different states, too few to show how long "
            "merges take. Start the pilot from different states, for instance those after a longer warm-up."
        )
    return ""


class Pair(NamedTuple):
    """One pair of paths of n steps in D coordinates.

    Attributes:
        steps: Steps until the paths merged; n + 1 if they did not.
        distances: Distance after 0, ..., n steps; shape (n + 1,).
        last: Last distance by coordinate; shape (D,).
        last_above: Last step before the merge at which each coordinate was above the tolerance; shape (D,).
        growth: Sum of log growths over the steps that start from small distances.
        num_small: Number of those steps.
        movement: Largest movement of both paths by step; shape (2, n).
        dimension_movement: Movement by coordinate; shape (D,).
        finite: Whether all states are finite.
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


def coalescence_of_paths(
    first: PyTree, second: PyTree, *, scale: PyTree, tol: float, discrete: PyTree = None
) -> Coalescence:
    """Compute the `Coalescence` of pairs whose paths are known, in numpy: nothing is compiled.

    It differs from `coalescence_time` in one point: paths may go on after the merge of their pair, and after the last
    merge of all pairs; all steps count as run.

    Args:
        first: States of the first paths, leading axes (pairs, max_steps + 1), starts included; numpy arrays.
        second: States of the second paths, of the same shapes.
        scale: Typical spread of each coordinate, as in `coalescence_time`.
        tol: Largest distance that counts as merged.
        discrete: For each leaf of a state whether its values are discrete, see `pmcmc.Kernel.discrete`. None: those
            that are not floating.
    """
    continuous = continuous_coordinates(first, 2, discrete)
    num_pairs, num_rows = jax.tree.leaves(first)[0].shape[:2]
    # One pair at a time fits into a cache: 8 times as fast as all pairs at once, for (30, 8193, 10) numbers.
    pairs = [_compare(_rows(first, i), _rows(second, i), scale, tol, continuous) for i in range(num_pairs)]
    found: Any = Pair._make(map(np.stack, zip(*pairs, strict=True)))
    rate, error = _ratio(found.growth, found.num_small)
    num_steps = num_rows - 1
    counted = found.finite if found.finite.any() else ~found.finite
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
        dimension_movement=judged_movement(found.dimension_movement[counted].mean(axis=0), continuous),
        finite=found.finite,
        num_steps=num_steps,
        tol=tol,
        checkpoints=Checkpoints(grid, grid <= num_steps, at_grid(first), at_grid(second)),
    )


def _compare(first: PyTree, second: PyTree, scale: PyTree, tol: float, continuous: np.ndarray) -> Pair:
    """Compare two paths of states with leading axis n + 1."""
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
        movement=np.stack([largest_movement(m, continuous) for m in moves]),
        dimension_movement=np.mean([m.mean(axis=0) for m in moves], axis=0),
        finite=finite,
    )


def gaps_by_dimension(a: PyTree, b: PyTree, scale: PyTree, discrete: float = np.inf) -> np.ndarray:
    """Return ``|a - b| / scale`` by coordinate, shape (n, D): `coordinate_distances` in numpy for one leading axis.

    Args:
        a: States, leading axis n.
        b: States, leading axis n.
        scale: Unit of each coordinate; leaves broadcast.
        discrete: Distance between integers that differ. Entries that are not finite are at distance inf.
    """

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
    """Take these rows of every leaf."""
    return jax.tree.map(lambda x: np.asarray(x)[index], tree)


def _ratio(sums: np.ndarray, counts: np.ndarray) -> tuple[float, float]:
    """Return the mean growth per step over all pairs, and its standard error from the differences between pairs."""
    total, seen = counts.sum(), (counts > 0).sum()
    if not total:
        return np.nan, np.nan
    rate = sums.sum() / total
    if seen < 2:
        return float(rate), np.nan
    spread = np.sum((sums - rate * counts) ** 2) * seen / (seen - 1)
    return float(rate), float(np.sqrt(spread) / total)
