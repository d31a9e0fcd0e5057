"""Multiple shooting with repair: solve a path in blocks that run at once.

The T steps are cut into P blocks of S = ceil(T / P) steps.

1. *Zeroth sweep.* Every block starts from a guess and takes S ordinary steps, all blocks at once.
2. *Repair sweeps.* Block p+1 is run again from the end of block p with the same inputs, again all at once. If paths
   under common inputs coalesce, the repaired path soon merges with the recorded one, and from there on the recording
   is valid. A block that ran to its end without merging has a new end, so its successor is run again in the next
   sweep, until no block is pending.

`pmcmc.recurrence.shooting.repair` states the rule and each of its clauses; `pmcmc.recurrence.shooting.reference` is the
same algorithm as a plain loop.

The critical path is S plus the sum over sweeps of the longest merge, instead of T. The work is about T (1 + t_c / S)
steps, where t_c is the coalescence time. No derivatives are needed, and states may be discrete.

A merge within the tolerance proves little if nearby paths separate: two orbits of a chaotic map come close by chance.
The growth rate of small distances (below the square root of the tolerance) is therefore measured on all lanes that are
run again. If it would carry the largest accepted difference past the tolerance within T steps, or all of them, added up
as they grow, past its square root, the result is `not_contracting` (see `pmcmc.recurrence.solution`).

Source: Heidelberger & Stone (1990), time-parallel simulation; Neal (1999), circular coupling; Chartier & Philippe
(1993), parallel shooting for dissipative systems.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from pmcmc._arguments import check_int
from pmcmc._pytree import (
    Array,
    ArrayLeaf,
    PyTree,
    Scalar,
    expand_mask,
    finite_rows,
    is_real,
    leading_true,
    real_dtype,
    register_dataclass,
)
from pmcmc._xla import default_platform
from pmcmc.recurrence.abreast import walk_abreast, walk_apart
from pmcmc.recurrence.problem import Staged
from pmcmc.recurrence.sequential import Lanes, LaneSolver, Layout, record_for, write_where
from pmcmc.recurrence.sharding import AllLanes, distinct, lane_sharding, over_devices, replicated
from pmcmc.recurrence.shooting.derivative import differentiable
from pmcmc.recurrence.shooting.repair import Edge, Recording, Sweep, repair_sweep, successor_starts
from pmcmc.recurrence.solution import (
    RESULTS,
    Solution,
    Stats,
    check_tolerance,
    check_tolerance_for,
    largest_error,
    separates,
    tolerance_for,
    typical_scale,
)

# Steps of the zeroth sweep between writes to the path, if they divide the capacity.
CHUNK = 16
# The scale is measured on about this many states, as in `typical_scale`.
SCALE_STATES = 4096


@register_dataclass
@dataclass(frozen=True)
class MultipleShooting(LaneSolver):
    """Run blocks of the path at once and repair them until they merge.

    The solution can be differentiated as that of `Newton`, if all leaves of the state are real.

    Args:
        num_blocks: P, blocks per chain. None: about sqrt(8 T), with at least 16 steps per block, and on a CPU at most
            128.
        tol: Largest accepted ``|recorded - repaired| / scale``. None: 32 eps in float32, 512 eps in float64; states in
            half precision need one.
        max_sweeps: Budget of repair sweeps. None: no limit; P always suffice.
        max_steps: Budget of the critical path, including the S steps of the zeroth sweep. None: no limit. Where threads
            solve parts of the blocks, both budgets count the slowest part between two hand-overs.
        devices: Devices that share the blocks evenly; P is rounded up to a multiple of their number. The solution is
            the same. None: the default device of JAX.

    Raises:
        ValueError: ``num_blocks``, ``max_sweeps`` or ``max_steps`` is below 1, ``tol`` is negative or not finite, or
            ``devices`` is empty or repeats one; or, in a solve, the state is in half precision and there is no tol.
        TypeError: One of the first three is a number but no integer; or a solution is differentiated whose state has
            integer or boolean leaves, or whose fn has no forward derivative.

    Example:
        >>> import jax.numpy as jnp, pmcmc
        >>> solver = pmcmc.recurrence.MultipleShooting(num_blocks=8)
        >>> solution = solver.solve(lambda x, u: 0.5 * x + u, 0.0, jnp.ones(800))
        >>> bool(solution.result == pmcmc.recurrence.RESULTS.successful)
        True
    """

    num_blocks: int | None = field(default=None, metadata=dict(static=True))
    tol: Scalar | None = None
    max_sweeps: Scalar | None = None
    max_steps: Scalar | None = None
    devices: Sequence[jax.Device] | None = field(default=None, metadata=dict(static=True))

    def __post_init__(self):
        check_int("num_blocks", self.num_blocks, 1)
        check_int("max_sweeps", self.max_sweeps, 1, "Use Sequential() for none.")
        check_int("max_steps", self.max_steps, 1, "Use None for no limit.")
        check_tolerance(self.tol)
        if self.devices is not None:
            object.__setattr__(self, "devices", distinct(self.devices))

    draws_inputs: ClassVar[bool] = True
    in_parts: ClassVar[bool] = True
    unit: ClassVar[int] = CHUNK

    @property
    def decision(self):
        return "shooting"

    @property
    def shared_by(self) -> Sequence[jax.Device]:
        return self.devices or ()

    def with_devices(self, devices):
        return replace(self, devices=devices)

    def blocks_for(self, length):
        blocks, shares = self.num_blocks or default_num_blocks(length), max(1, len(self.shared_by))
        return shares * -(-blocks // shares)

    def limits(self, x0: PyTree) -> tuple[Array, Scalar, Scalar]:
        """Return the tolerance, the budget of sweeps and that of steps for chains of this state, (C, ...)."""
        tol = tolerance_for(self.tol, real_dtype(x0))
        or_most = lambda limit: np.iinfo(np.int32).max if limit is None else limit  # P sweeps always suffice
        return tol, or_most(self.max_sweeps), or_most(self.max_steps)

    def check_dtype(self, dtype):
        check_tolerance_for(self.tol, dtype)

    def solve_problem(self, problem):
        self.check_dtype(problem.dtype)
        return differentiable(super().solve_problem, problem)

    def solve_lanes(self, lanes):
        tol, max_sweeps, max_steps = self.limits(lanes.x0)

        def run(held: Any, own: tuple[Any, PyTree]) -> Outcome:
            inputs, buffers = own
            return _run(lanes._replace(held=held, inputs=inputs, buffers=buffers), tol, max_sweeps, max_steps)

        if not self.shared_by:
            return _conclude(lanes, tol, run(AllLanes(lanes.layout), (lanes.inputs, lanes.buffers)))
        per_lane = Outcome._make((True, True, True, False, False))  # per-chain values are replicated
        outcome = over_devices(self.shared_by, run, (lanes.inputs, lanes.buffers), per_lane, lanes.layout)
        solution = _conclude(lanes, tol, outcome)
        constrain = jax.lax.with_sharding_constraint
        path = constrain((solution.value, solution.aux), lane_sharding(self.shared_by))
        rest = constrain(solution._replace(value=None, aux=None), replicated(self.shared_by))
        return rest._replace(value=path[0], aux=path[1])


def default_num_blocks(length: int) -> int:
    """Return P of about sqrt(8 T), a power of two, with at least 16 steps per block, up to 4,096; on a CPU up to 128.

    The time ``(T/P + t_c) (a + b P)``, where a is the cost of a step and b that of a lane in it, is smallest at
    ``P = sqrt(a T / (b t_c))``; t_c is some tens of steps on well-conditioned posteriors. On a CPU a/b is some tens, so
    further blocks cost more in repair than they save. A million steps with 2,048 / 512 / 128 blocks, ns a step: eight
    schools 522 / 342 / 233 (in sequence 691), mixture 237 / 101 / 69 (180).
    """
    most, blocks = 128 if default_platform() == "cpu" else 4096, 1
    while blocks * blocks * 4 <= 8 * length and 2 * blocks * 16 <= length and blocks < most:
        blocks *= 2
    return blocks


class Outcome(NamedTuple):
    """The fields of the last `Sweep` that the solution is made of."""

    recording: Recording
    active: Array
    evaluations: Array
    num_sweeps: Array
    critical_path: Array


class Filled(NamedTuple):
    """State of the zeroth sweep if every lane is at a step of its own."""

    step: Array  # (lanes,)
    record: PyTree


def _run(lanes: Lanes, tol: Array, max_sweeps: Scalar, max_steps: Scalar) -> Outcome:
    """Run the zeroth sweep and all repair sweeps, for the lanes of this device."""
    held, length = lanes.held, lanes.layout.block_length
    begun, end, path, aux = fill(lanes)
    if lanes.scale is None:
        lanes = lanes._replace(scale=measure_scale(lanes, path), measured=True)
    zero = jnp.zeros(held.num_lanes, tol.dtype)
    start, active = successor_starts(lanes, end, jnp.ones(held.num_lanes, bool))
    recording = Recording(path, aux, zero, zero, zero, zero)
    begin = Sweep.first(held, start, begun, active, end, recording, jnp.asarray(length))
    sweep = repair(lanes, tol, max_sweeps, max_steps, begin)
    evaluations = held.valid_steps() + sweep.evaluations
    return Outcome(sweep.recording, sweep.active, evaluations, sweep.num_sweeps, length + sweep.critical_path)


def repair(lanes: Lanes, tol: Array, max_sweeps: Scalar, max_steps: Scalar, sweep: Sweep) -> Sweep:
    """Run repair sweeps until no block is pending, or a budget is used up; see `MultipleShooting`."""

    def pending(sweep):
        return sweep.pending & (sweep.number < max_sweeps) & (sweep.depth < max_steps)

    return jax.lax.while_loop(pending, lambda sweep: repair_sweep(lanes, tol, max_steps, sweep), sweep)


def _guessed_starts(lanes: Lanes) -> PyTree:
    """Return the carries at the block starts: x0 for the first block of a chain, the guess for the others."""
    layout = lanes.layout
    if lanes.guess_at is None:
        starts = jax.tree.map(lambda x: jnp.repeat(x, layout.num_blocks, axis=0), lanes.x0)
    else:
        guess = lanes.guess_at(jnp.arange(1, layout.num_blocks) * layout.block_length - 1)
        join = lambda x, g: jnp.concatenate([x[:, None], g], axis=1).reshape(layout.num_lanes, *x.shape[1:])
        starts = jax.tree.map(join, lanes.x0, guess)
    return jax.vmap(lanes.recurrence.restore)(lanes.held.own(starts))


def measure_scale(lanes: Lanes, path: PyTree) -> PyTree:
    """Measure the scale of each coordinate on the states of the zeroth sweep."""
    layout = lanes.layout
    known = jnp.arange(layout.capacity)[None] < lanes.held.valid_steps()[:, None]
    stride = max(1, layout.num_lanes * layout.capacity // SCALE_STATES)
    return typical_scale(lanes.held.every(stride, _blank(known, path)))


def fill(lanes: Lanes, steps: Array | None = None) -> tuple[PyTree, Edge, PyTree, PyTree]:
    """Run the zeroth sweep: plain steps of every block.

    Args:
        lanes: What is solved.
        steps: Number of steps. None: S.

    Returns:
        The states from which the blocks start, what they hand on at their ends, states, and aux.
    """
    layout, recurrence = lanes.layout, lanes.recurrence
    step, unknown = jax.vmap(recurrence.step), jax.vmap(recurrence.unknown)
    start = _guessed_starts(lanes)
    carry, _ = jax.eval_shape(lambda start: step(start, lanes.inputs.of_step(0)), start)
    start = jax.tree.map(lambda s, c: s.astype(c.dtype), start, carry)

    def one(carry, u):
        carry, aux = recurrence.step(carry, u)
        return carry, (recurrence.unknown(carry), aux)

    if steps is not None:
        lanes = lanes._replace(layout=layout._replace(block_length=steps))
    if recurrence.staged is None:
        end, (path, aux) = walk_abreast(one, start, lanes, math.gcd(layout.capacity, CHUNK))
    else:
        record = record_for(jax.vmap(one), start, lanes)
        end, (path, aux) = _fill_apart(recurrence.staged, unknown, start, lanes, record)
    return unknown(start), Edge(end, jnp.zeros(lanes.held.num_lanes, int)), path, aux


def _fill_apart(staged: Staged, unknown, start: PyTree, lanes: Lanes, record: PyTree) -> tuple[PyTree, PyTree]:
    """Do what `walk` does, with each lane at a step of its own."""

    def visit(now: Filled, carry, aux, arrived) -> Filled:
        record = write_where(arrived, now.record, (unknown(carry), aux), now.step)
        return Filled(now.step + arrived, record)

    going = lambda now: now.step < lanes.layout.block_length
    first = Filled(jnp.zeros(lanes.held.num_lanes, int), record)
    end, filled = walk_apart(staged, lanes.inputs, start, first, going, visit)
    return end, filled.record


def _blank(known: Array, value: PyTree) -> PyTree:
    """Replace the real leaves of unknown states by NaN."""
    return jax.tree.map(lambda x: jnp.where(expand_mask(known, x), x, jnp.nan) if is_real(x) else x, value)


class LaneResults(NamedTuple):
    """What the certificate is made of, for all lanes, (lanes,): fields of the last `Sweep` and `Recording`.

    Attributes:
        leading: Steps before the first state that is not finite.
    """

    leading: ArrayLeaf
    active: ArrayLeaf
    splice: ArrayLeaf
    residual: ArrayLeaf
    growth: ArrayLeaf
    growth_count: ArrayLeaf
    evaluations: ArrayLeaf


def leading_finite(lanes: Lanes, path: PyTree) -> Array:
    """Count the steps of each lane before the first state that is not finite, (own lanes,)."""
    valid = lanes.held.valid_steps()
    steps = jnp.arange(lanes.layout.capacity)[None]
    return jnp.minimum(leading_true(finite_rows(path, 2) | (steps >= valid[:, None])), valid)


def _conclude(lanes: Lanes, tol: Array, sweep: Outcome) -> Solution:
    """Return the solution of all lanes."""
    recording, layout, held = sweep.recording, lanes.layout, AllLanes(lanes.layout)
    leading = leading_finite(lanes._replace(held=held), recording.path)
    lasting = (recording.splice, recording.residual, recording.growth, recording.growth_count)
    found = LaneResults(leading, sweep.active, *lasting, sweep.evaluations)
    finite_prefix, solution = conclude(layout, tol, finite_rows(lanes.x0), found, sweep.num_sweeps, sweep.critical_path)
    first = (jnp.arange(layout.num_blocks) * layout.block_length)[None]
    known = jnp.arange(layout.capacity)[None] < jnp.reshape(finite_prefix[:, None] - first, (-1, 1))
    # after the first non-finite state all values are unknown: a block there may still be the run of a guess
    # (a loop of at most one iteration, which unlike a branch needs no second copy of the path)
    rounds = jnp.where(jnp.all(finite_prefix == layout.length), 0, 1)
    value = jax.lax.fori_loop(0, rounds, lambda _, x: _blank(known, x), recording.path)
    return solution._replace(value=value, aux=recording.aux)


def conclude(
    layout: Layout, tol: Array, finite_x0: Array, found: LaneResults, num_sweeps: Array, critical_path: Array
) -> tuple[Array, Solution]:
    """Decide how far each chain is certified, and say why not further.

    Args:
        layout: How chains are cut into lanes.
        tol: Largest accepted distance.
        finite_x0: Whether the state before the first step is finite, (chains,).
        found: What was found for all lanes.
        num_sweeps: Repair sweeps in which the chain had work, (chains,).
        critical_path: Sequential steps, (chains,).

    Returns:
        The finite prefix of each chain, and the solution without its states.
    """
    by_chain = layout.by_chain
    whole, leading = by_chain(found.leading == layout.valid_steps()), by_chain(found.leading)
    finite_prefix = jnp.where(finite_x0, _prefix(layout, whole, leading), 0)
    # Does the recurrence contract? Otherwise inexact merges do not count.
    active, splice = by_chain(found.active), by_chain(found.splice)
    all_finite, complete = finite_prefix == layout.length, ~jnp.any(active, 1)
    count, growth = (jnp.sum(by_chain(x), axis=1) for x in (found.growth_count, found.growth))
    growth_rate = jnp.where(count > 0, growth / jnp.maximum(count, 1), jnp.nan)
    separating = separates(growth_rate, jnp.max(splice, axis=1), tol, layout.length)
    small = _errors(layout, splice, growth_rate) <= largest_error(tol)
    # The certified prefix ends at a pending block, at one at whose end the error is no longer small, or, if nearby
    # paths separate, at one that merged inexactly.
    fine = small & ((splice == 0) | ~separating[:, None])
    separating = separating | ~jnp.all(small, axis=1)
    prefix = _prefix(layout, ~active & fine, jnp.zeros_like(active, int))
    residual = jnp.max(by_chain(found.residual), axis=1)
    first = (jnp.arange(layout.num_blocks) * layout.block_length)[None]
    certified = jnp.minimum(prefix, finite_prefix)
    return finite_prefix, Solution(
        value=None,
        aux=None,
        result=jnp.select(
            [~all_finite, ~complete, separating],
            [RESULTS.nonfinite, RESULTS.max_iters_reached, RESULTS.not_contracting],
            RESULTS.successful,
        ),
        residual=jnp.where(all_finite & complete, residual, jnp.inf),
        stats=Stats(
            num_iters=jnp.zeros_like(num_sweeps),
            num_sweeps=num_sweeps,
            num_sequential_steps=critical_path,
            num_fn_evals=_total(by_chain(found.evaluations)),
            certified_steps=certified,
            growth_rate=growth_rate,
            certified_residual=jnp.max(jnp.where(first < certified[:, None], splice, 0.0), axis=1),
        ),
    )


def _errors(layout: Layout, splice: Array, growth_rate: Array) -> Array:
    """Bound the error at the end of each block, (chains, blocks).

    The error of a block's start and the difference at its merge grow at the measured rate; the latter may be at its
    end, so it does not shrink. Without a measured rate they are added up.
    """
    rate = jnp.where(jnp.isnan(growth_rate), 0, growth_rate)[:, None]
    growth = rate * jnp.minimum(jnp.arange(1, layout.num_blocks + 1) * layout.block_length, layout.length)[None]
    made = jnp.log(splice) + jnp.maximum(rate, 0) * layout.block_length
    added = jax.lax.cumlogsumexp(made - growth, axis=1)
    return jnp.exp(growth + jax.lax.optimization_barrier(added))  # XLA would add them up again in each use


def _total(counts: Array) -> Array:
    """Sum counts (chains, blocks) over blocks; where their dtype cannot hold it, the largest number that it can."""
    total, most = jnp.sum(counts, axis=1), jnp.iinfo(counts.dtype).max
    fits = jnp.sum(counts.astype(float), axis=1) < most
    return jnp.where(fits & (total >= 0), total, most)


def _prefix(layout: Layout, whole: Array, partial: Array) -> Array:
    """Count the steps before the first block that is not ``whole``, plus the ``partial`` steps of that one;
    (chains,).
    """
    blocks = leading_true(whole)
    within = jnp.take_along_axis(partial, jnp.minimum(blocks, layout.num_blocks - 1)[:, None], axis=1)[:, 0]
    steps = blocks * layout.block_length + jnp.where(blocks < layout.num_blocks, within, 0)
    return jnp.minimum(steps, layout.length)
