"""The repair rule of multiple shooting: which blocks are run again, and when they have merged.

Each clause keeps the certificate true:

1. Starts are never compared. In the first repair sweep every block but the first is active. Later, block p+1 is active
   if and only if block p ran to its end without merging. A lane that the budget of steps stops stays active itself, and
   one whose state becomes non-finite ends: neither hands on a start.
2. An active lane takes at least one step from its new start and compares the new state with the recorded one at that
   step. It has merged if the two are equal, or if they are within the tolerance after `WATCHED_STEPS` steps in a row
   from small distances. Then the recorded state is kept. Otherwise it is overwritten, and the lane goes on. A block
   hands its count of such steps on with its end: its successor goes on watching.
3. If no scale is given, it is the smaller of the spread of the zeroth sweep and twice the range of the lane's own
   states in this sweep: runs from wild guesses may have any spread, and relative to that any two states are close.
4. The residual is the running maximum of the accepted differences. Elsewhere every state is the image of its
   predecessor by construction. The exact prefix grows by at least one block per sweep.

`pmcmc.recurrence.shooting.reference` is the same rule as a plain loop, for states of scale 1. `repair_sweep` is one
sweep, `_compare` is clauses 2 to 4.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from pmcmc._pytree import Array, ArrayLeaf, PyTree, Scalar, finite_rows, is_real, relative_distance, tree_where
from pmcmc.recurrence.abreast import step_abreast, walk_apart
from pmcmc.recurrence.sequential import Lanes, read_step, write_where
from pmcmc.recurrence.shooting.reference import WATCHED_STEPS
from pmcmc.recurrence.solution import default_tolerance, log_growth


class Recording(NamedTuple):
    """The current path and what its merges tell.

    Attributes:
        path: States, (lanes, S, ...).
        aux: Auxiliary results of the steps, (lanes, S, ...).
        splice: Largest accepted difference that is still part of each block, 0 if there is none; (lanes,).
        residual: Running maximum of accepted differences, (lanes,).
        growth: Sum of the log growths of small distances, (lanes,).
        growth_count: Number of terms in ``growth``, (lanes,).
    """

    path: PyTree
    aux: PyTree
    splice: Array
    residual: Array
    growth: Array
    growth_count: Array


class Edge(NamedTuple):
    """What a block hands on at its end, and its successor starts from.

    Attributes:
        carry: Carries of the recurrence, (lanes, ...).
        watched: Last steps in a row from small distances, (lanes,); they may have begun in an earlier block.
    """

    carry: PyTree
    watched: ArrayLeaf


class Sweep(NamedTuple):
    """State between sweeps.

    Attributes:
        number: Number of repair sweeps so far.
        start: `Edge` from which the active lanes start.
        recorded: States from which the recording of each lane starts, (lanes, ...).
        active: Lanes to be run again, (lanes,).
        pending: Whether any lane of any device is active.
        end: Recorded `Edge` at the end of each block.
        recording: The current path.
        num_sweeps: Repair sweeps in which the chain had work, (chains,).
        critical_path: Sequential steps, (chains,).
        evaluations: Steps taken while active, (lanes,).
        depth: Sequential steps so far, the largest over chains and devices.
        handed: Whether the last lane has handed on a new end.
    """

    number: Array
    start: Edge
    recorded: PyTree
    active: Array
    pending: Array
    end: Edge
    recording: Recording
    num_sweeps: Array
    critical_path: Array
    evaluations: Array
    depth: Array
    handed: Array

    @classmethod
    def first(
        cls, held: Any, start: Edge, recorded: PyTree, active: Array, end: Edge, recording: Recording, depth: Array
    ) -> "Sweep":
        """Return the state before the first repair sweep; ``held`` are the lanes of this device."""
        none = jnp.zeros(held.layout.num_chains, int)
        return cls(
            number=jnp.zeros((), int),
            start=start,
            recorded=recorded,
            active=active,
            pending=jnp.any(held.most(active.astype(int)) > 0),
            end=end,
            recording=recording,
            num_sweeps=none,
            critical_path=none,
            evaluations=jnp.zeros(held.num_lanes, int),
            depth=depth,
            handed=jnp.zeros((), bool),
        )


class Pass(NamedTuple):
    """State within a repair sweep.

    Attributes:
        step: Step within the block, the same for all lanes or one for each, (lanes,).
        active: Lanes that have to go on, (lanes,).
        ran_out: Lanes that were active and have not merged so far, (lanes,).
        distance: Distance to the recording before the step, (lanes,); only used if a scale is given.
        recording: The current path.
        taken: Steps taken in this sweep, (lanes,).
        watched: Last steps in a row from small distances, (lanes,).
        reach: Smallest and largest state of each lane; None if a scale is given.
        before: State of each lane and the recorded one before the step; None if a scale is given.
    """

    step: Array
    active: Array
    ran_out: Array
    distance: Array
    recording: Recording
    taken: Array
    watched: Array
    reach: tuple[PyTree, PyTree] | None
    before: tuple[PyTree, PyTree] | None


def successor_starts(lanes: Lanes, end: Edge, ran_out: Array) -> tuple[Edge, Array]:
    """Return starts (the ends of the preceding blocks) and which lanes are active (clause 1)."""
    start, active = lanes.held.hand_over((end, ran_out))
    return start, active & ~lanes.held.first_of_chain() & (lanes.held.valid_steps() > 0)


def repair_sweep(lanes: Lanes, tol: Array, max_steps: Scalar, sweep: Sweep) -> Sweep:
    """Run the active lanes once, then give the new ends to their successors."""
    begun = jax.vmap(lanes.recurrence.unknown)(sweep.start.carry)
    carry, done = _run_pass(lanes, tol, max_steps - sweep.depth, sweep, begun)
    end = tree_where(done.ran_out, Edge(carry, done.watched), sweep.end)
    ran_out = done.ran_out & ~done.active
    start, active = successor_starts(lanes, end, ran_out)
    # a lane that the budget stopped is still active: its block is not certified
    active = active | done.active
    counts = lanes.held.most(done.taken, sweep.active.astype(int), active.astype(int))
    taken, had_work, unfinished = counts
    return Sweep(
        number=sweep.number + 1,
        start=start,
        recorded=tree_where(sweep.active, begun, sweep.recorded),
        active=active,
        pending=jnp.any(unfinished > 0),
        end=end,
        # a block that was overwritten to its end contains no splice any more
        recording=done.recording._replace(splice=jnp.where(done.ran_out, 0.0, done.recording.splice)),
        num_sweeps=sweep.num_sweeps + had_work,
        critical_path=sweep.critical_path + taken,
        evaluations=sweep.evaluations + done.taken,
        depth=sweep.depth + jnp.max(taken),
        handed=sweep.handed | ran_out[-1],
    )


def _run_pass(lanes: Lanes, tol: Array, budget: Array, sweep: Sweep, begun: PyTree) -> tuple[PyTree, Pass]:
    """Step all lanes until every active one has merged or ended, or the budget has; returns the last carries, too.

    ``begun`` are the states from which they start.
    """
    staged, num_lanes = lanes.recurrence.staged, lanes.held.num_lanes
    none = jnp.zeros(num_lanes, int)
    begin = Pass(
        step=jnp.zeros((), int) if staged is None else none,
        active=sweep.active,
        ran_out=sweep.active,
        distance=relative_distance(begun, sweep.recorded, lanes.scale).astype(tol.dtype),
        recording=sweep.recording,
        taken=none,
        watched=sweep.start.watched,
        reach=(begun, begun) if lanes.measured else None,
        before=(begun, sweep.recorded) if lanes.measured else None,
    )
    going = lambda now: now.active & (now.step < budget)
    if staged is not None:
        visit = lambda now, carry, aux, arrived: _compare(lanes, tol, now, carry, aux, arrived)
        return walk_apart(staged, lanes.inputs, sweep.start.carry, begin, going, visit)
    step_lanes, everyone = step_abreast(lanes.recurrence.step, num_lanes), jnp.array(True)

    def body(state):
        carry, now = state
        carry, aux = step_lanes(carry, lanes.inputs.of_step(now.step))
        return carry, _compare(lanes, tol, now, carry, aux, everyone)

    return jax.lax.while_loop(lambda state: jnp.any(going(state[1])), body, (sweep.start.carry, begin))


def _compare(lanes: Lanes, tol: Array, now: Pass, carry: PyTree, aux: PyTree, arrived: Array) -> Pass:
    """Apply the rule to the lanes that have completed a step.

    Args:
        lanes: What is solved.
        tol: Largest accepted distance.
        now: State of the sweep before the step.
        carry: Carries after the step.
        aux: Auxiliary results of the step.
        arrived: Lanes that have completed it; (lanes,), or a scalar if all have.
    """
    valid = lanes.held.valid_steps()
    x = jax.vmap(lanes.recurrence.unknown)(carry)
    recorded = read_step(now.recording.path, now.step)
    reach, before, scale, past = now.reach, now.before, lanes.scale, now.distance
    if reach is not None and before is not None:
        reach, here = tree_where(arrived, (_widened(reach, x), (x, recorded)), (reach, before))
        scale = _own_scale(reach, scale, tol)
        # The scale widens from step to step, and growth is that of two distances on one scale.
        past, before = relative_distance(*before, scale).astype(tol.dtype), here
    distance = relative_distance(x, recorded, scale).astype(tol.dtype)
    live = now.active & arrived & (now.step < valid)
    # Small means below the square root of the tolerance, where distances grow linearly. By optional stopping the mean
    # growth per step is unbiased, although a lane enters this regime from above and leaves it by merging.
    small = live & (past < jnp.sqrt(tol)) & (past > 0)
    watched = jnp.where(small, now.watched + 1, jnp.where(live, 0, now.watched))
    merged = live & (distance <= tol) & ((distance == 0) | (watched >= WATCHED_STEPS))
    overwrite = live & ~merged
    lost = overwrite & ~finite_rows(x)  # a run from a non-finite state repairs nothing
    return Pass(
        step=now.step + arrived,
        active=jnp.where(arrived, overwrite & ~lost & (now.step + 1 < valid), now.active),
        ran_out=now.ran_out & ~merged & ~lost,
        distance=jnp.where(arrived, distance, now.distance),
        recording=_write(now, x, aux, past, distance, live, merged, overwrite, small, tol),
        taken=now.taken + live,
        watched=watched,
        reach=reach,
        before=before,
    )


def _widened(reach: tuple[PyTree, PyTree], x: PyTree) -> tuple[PyTree, PyTree]:
    """Extend the range of states by this one."""
    return jax.tree.map(jnp.minimum, reach[0], x), jax.tree.map(jnp.maximum, reach[1], x)


def _own_scale(reach: tuple[PyTree, PyTree], scale: PyTree, tol: Array) -> PyTree:
    """Return the scale of each lane (lanes, ...): that of the path, at most twice the range of the lane's own states.

    The scale of the path is measured on runs from guesses, and wild guesses inflate it. An active lane runs from the
    end of the preceding block, so its own states are on the scale of the sequential path. Four units of rounding are
    always allowed.
    """

    def leaf(low: Array, high: Array, scale: Array) -> Array:
        if not is_real(low):
            return scale
        floor = 4 / jnp.maximum(tol, default_tolerance(low.dtype))
        rounding = floor * jnp.finfo(low.dtype).eps * jnp.maximum(jnp.abs(low), jnp.abs(high))
        return jnp.minimum(scale[None], jnp.maximum(2 * (high - low), rounding)).astype(low.dtype)

    return jax.tree.map(leaf, *reach, scale)


def _write(now: Pass, x, aux, past, distance, live, merged, overwrite, small, tol) -> Recording:
    """Overwrite the recording of lanes that have not merged; account for merges and for small distances.

    If a lane merges, the recorded state is kept, but aux is that of the step just taken: its predecessor has changed.
    """
    recording = now.recording
    growth = log_growth(distance, past, tol)
    return Recording(
        path=write_where(overwrite, recording.path, x, now.step),
        aux=write_where(live, recording.aux, aux, now.step),
        splice=jnp.where(merged, jnp.maximum(recording.splice, distance), recording.splice),
        residual=jnp.where(merged, jnp.maximum(recording.residual, distance), recording.residual),
        growth=recording.growth + jnp.where(small, growth, 0.0),
        growth_count=recording.growth_count + small,
    )
