"""The repair rule: which blocks are run again, and when their path has met the recorded one."""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from pmcmc._pytree import finite_rows, is_real, relative_distance, tree_where
from pmcmc._typing import Array, PyTree, Scalar
from pmcmc.recurrence.lanes import Lanes, read_step, walk_apart, write_where
from pmcmc.recurrence.solution import default_tolerance

# A lane merges once it has been watched for so many steps at small distances, unless it meets the recording exactly.
WATCHED_STEPS = 8


class Recording(NamedTuple):
    """The path as it stands, and what its merges say about it; arrays are (lanes,) unless said otherwise."""

    path: PyTree  # (lanes, S, ...)
    aux: PyTree  # (lanes, S, ...)
    splice: Array  # largest accepted difference that may still stand in each block, 0 where there is none
    residual: Array  # running maximum of accepted differences
    growth: Array  # sum of log growths of small distances
    growth_count: Array


class Sweep(NamedTuple):
    """State between sweeps."""

    number: Array  # of repair sweeps run
    start: PyTree  # carries the active lanes start from
    active: Array  # (lanes,)
    pending: Array  # any lane of any device is active
    end: PyTree  # carries at the end of each block, as recorded
    recording: Recording
    num_sweeps: Array  # (chains,) repair sweeps in which the chain had work
    critical_path: Array  # (chains,)
    evaluations: Array  # (lanes,) steps taken while active
    depth: Array  # steps one after the other so far


class Pass(NamedTuple):
    """State within a repair sweep."""

    step: Array  # that all lanes are in, or (lanes,) each its own
    active: Array
    ran_out: Array  # active and not merged so far
    distance: Array  # to the recording, at the previous step
    recording: Recording
    taken: Array  # steps taken by each lane in this sweep
    watched: Array  # steps of each lane at small distances in this sweep
    reach: tuple[PyTree, PyTree] | None  # least and largest state of each lane; None where a scale is given


def successor_starts(lanes: Lanes, end: PyTree, ran_out: Array) -> tuple[PyTree, Array]:
    """Starts from the ends of the blocks before; active if and only if that block ran to its end unmerged."""
    start, active = lanes.held.hand_over((end, ran_out))
    return start, active & ~lanes.held.first_of_chain() & (lanes.held.valid_steps() > 0)


def repair_sweep(lanes: Lanes, tol: Array, max_steps: Scalar, sweep: Sweep) -> Sweep:
    """One pass over the active lanes, then hand the new ends to their successors."""
    carry, done = _run_pass(lanes, tol, max_steps - sweep.depth, sweep)
    end = tree_where(done.ran_out, carry, sweep.end)
    start, active = successor_starts(lanes, end, done.ran_out & ~done.active)
    # stopped by the budget on its way: its block does not hold
    active = active | done.active
    counts = lanes.held.most(done.taken, sweep.active.astype(int), active.astype(int))
    taken, had_work, unfinished = counts
    return Sweep(
        number=sweep.number + 1,
        start=start,
        active=active,
        pending=jnp.any(unfinished > 0),
        end=end,
        # a block overwritten to its end has no splice left
        recording=done.recording._replace(splice=jnp.where(done.ran_out, 0.0, done.recording.splice)),
        num_sweeps=sweep.num_sweeps + had_work,
        critical_path=sweep.critical_path + taken,
        evaluations=sweep.evaluations + done.taken,
        depth=sweep.depth + jnp.max(taken),
    )


def _run_pass(lanes: Lanes, tol: Array, budget: Array, sweep: Sweep) -> tuple[PyTree, Pass]:
    """Step all lanes until every active one has merged, the blocks end or the budget does; also their last carries."""
    staged, num_lanes = lanes.recurrence.staged, lanes.held.num_lanes
    none = jnp.zeros(num_lanes, int)
    begin = Pass(
        step=jnp.zeros((), int) if staged is None else none,
        active=sweep.active,
        ran_out=sweep.active,
        distance=jnp.full(num_lanes, jnp.inf, tol.dtype),
        recording=sweep.recording,
        taken=none,
        watched=none,
        reach=(jax.vmap(lanes.recurrence.unknown)(sweep.start),) * 2 if lanes.measured else None,
    )
    going = lambda now: now.active & (now.step < budget)
    if staged is not None:
        visit = lambda now, carry, aux, arrived: _compare(lanes, tol, now, carry, aux, arrived)
        return walk_apart(staged, lanes.inputs, sweep.start, begin, going, visit)
    step_lanes, everyone = jax.vmap(lanes.recurrence.step), jnp.array(True)

    def body(state):
        carry, now = state
        carry, aux = step_lanes(carry, read_step(lanes.inputs, now.step))
        return carry, _compare(lanes, tol, now, carry, aux, everyone)

    return jax.lax.while_loop(lambda state: jnp.any(going(state[1])), body, (sweep.start, begin))


def _compare(lanes: Lanes, tol: Array, now: Pass, carry: PyTree, aux: PyTree, arrived: Array) -> Pass:
    """The rule, for the lanes that have arrived at the end of a step."""
    valid = lanes.held.valid_steps()
    x = jax.vmap(lanes.recurrence.unknown)(carry)
    reach, scale = now.reach, lanes.scale
    if reach is not None:
        reach = tuple(tree_where(arrived, *both) for both in zip(_widened(reach, x), reach, strict=True))
        scale = _own_scale(reach, scale, tol)
    distance = relative_distance(x, read_step(now.recording.path, now.step), scale).astype(tol.dtype)
    live = now.active & arrived & (now.step < valid)
    # Small: within the square root of the tolerance, where a distance behaves linearly. By optional stopping the
    # mean growth per step is unbiased although a lane enters this regime from above and leaves it by merging.
    small = live & (now.distance < jnp.sqrt(tol)) & (now.distance > 0)
    watched = now.watched + small
    last = now.step + 1 >= valid
    merged = live & (distance <= tol) & ((distance == 0) | (watched >= WATCHED_STEPS) | last)
    overwrite = live & ~merged
    lost = overwrite & ~finite_rows(x)  # from a state that is not finite there is nothing to repair
    return Pass(
        step=now.step + arrived,
        active=jnp.where(arrived, overwrite & ~lost & (now.step + 1 < valid), now.active),
        ran_out=now.ran_out & ~merged & ~lost,
        distance=jnp.where(arrived, distance, now.distance),
        recording=_write(now, x, aux, distance, live, merged, overwrite, small, tol),
        taken=now.taken + live,
        watched=watched,
        reach=reach,
    )


def _widened(reach: tuple[PyTree, PyTree], x: PyTree) -> tuple[PyTree, PyTree]:
    """Least and largest states, this one included."""
    return jax.tree.map(jnp.minimum, reach[0], x), jax.tree.map(jnp.maximum, reach[1], x)


def _own_scale(reach: tuple[PyTree, PyTree], scale: PyTree, tol: Array) -> PyTree:
    """Scale of each lane ``(lanes, ...)``: that of the path, at most twice the range of the lane's own states.

    The path's is measured on runs from guesses, and wild ones inflate it. A lane that counts runs from the end of the
    block before it, so its states are those of the sequential path. Four units of rounding are always allowed.
    """
    floor = 4 / jnp.maximum(tol, default_tolerance(tol.dtype))

    def leaf(low: Array, high: Array, scale: Array) -> Array:
        if not is_real(low):
            return scale
        rounding = floor * jnp.finfo(low.dtype).eps * jnp.maximum(jnp.abs(low), jnp.abs(high))
        return jnp.minimum(scale[None], jnp.maximum(2 * (high - low), rounding)).astype(low.dtype)

    return jax.tree.map(leaf, *reach, scale)


def _write(now: Pass, x, aux, distance, live, merged, overwrite, small, tol) -> Recording:
    """Overwrite the recording on lanes that have not merged; account for merges and for small distances.

    Where a lane merges, the recorded state stands, but aux is that of the step just taken: its predecessor has changed.
    """
    recording = now.recording
    floor = tol * 2.0**-10
    growth = jnp.log(jnp.maximum(jnp.minimum(distance, 1.0), floor) / jnp.maximum(now.distance, floor))
    return Recording(
        path=write_where(overwrite, recording.path, x, now.step),
        aux=write_where(live, recording.aux, aux, now.step),
        splice=jnp.where(merged, jnp.maximum(recording.splice, distance), recording.splice),
        residual=jnp.where(merged, jnp.maximum(recording.residual, distance), recording.residual),
        growth=recording.growth + jnp.where(small, growth, 0.0),
        growth_count=recording.growth_count + small,
    )
