"""Multiple shooting with repair: the whole path from blocks that run at once.

T steps are cut into P blocks of S = ceil(T / P) steps. Every block starts from a guess and runs S ordinary steps,
all P at once: the zeroth sweep. Then block p+1 is restarted from the end of block p with the same inputs, again all
at once; where paths under common inputs coalesce, the repaired path soon meets the recorded one, and from there on
the recording stands. A block whose repair ran to its end has a new end, so its successor is restarted in the next
sweep, and so on until nothing is pending.

The rule, to the letter (each clause keeps a certificate true):

- Starts are never compared. In the first repair sweep every block but the first is active; later, block p+1 is
  active if and only if block p ran to its end unmerged.
- An active lane takes at least one step from its new start and compares f(new) with the recording at that step.
  Within the tolerance: merged, and the recorded state stands. Otherwise it is overwritten and the lane goes on.
- The residual is the running maximum of the accepted differences; elsewhere a state is f of its predecessor by
  construction. The exact prefix grows by at least one block a sweep.

Depth: S + the sum over sweeps of the longest merge, instead of T. Work: about T (1 + t_c / S), with t_c the
coalescence time. No derivative is needed, and discrete states are welcome.

A merge within the tolerance proves little where nearby paths separate: two orbits of a chaotic map come close by
chance. So the rate at which small distances (below the square root of the tolerance) grow is measured on the way, on
the very lanes that merge; where it is not negative and a merge was not bitwise, the result is `not_contracting`.

Sources: time-parallel simulation (Heidelberger & Stone 1990), circular coupling (Neal 1999), parallel shooting for
dissipative systems (Chartier & Philippe 1993).
"""

import math
from dataclasses import dataclass, field
from typing import NamedTuple

import jax
import jax.numpy as jnp

from pmcmc._tree import expand_mask, finite_rows, is_real, leading_true, relative_distance, tree_where
from pmcmc._types import Array, PyTree, Scalar
from pmcmc.recurrence._base import (
    RESULTS,
    Problem,
    Recurrence,
    RecurrenceSolver,
    Solution,
    Stats,
    default_tolerance,
    typical_scale,
)
from pmcmc.recurrence._growth import separates


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class MultipleShooting(RecurrenceSolver):
    """Run blocks of the path at once and repair them until they join.

    num_blocks: P, blocks per chain. None: about sqrt(8 T), at least 16 steps a block.
    merge_tol: largest accepted |recorded - repaired| / scale. None: 32 eps in float32, 512 eps in float64.
    max_sweeps: budget of repair sweeps. None: P, with which the solve always completes.

    Raises:
        ValueError: num_blocks or max_sweeps below 1.

    Example:
        >>> import jax.numpy as jnp, pmcmc
        >>> solver = pmcmc.recurrence.MultipleShooting(num_blocks=8)
        >>> solution = solver.solve(lambda x, u: 0.5 * x + u, 0.0, jnp.ones(800))
        >>> bool(solution.result == pmcmc.recurrence.RESULTS.successful)
        True
    """

    num_blocks: int | None = field(default=None, metadata=dict(static=True))
    merge_tol: Scalar | None = None
    max_sweeps: Scalar | None = None

    def __post_init__(self):
        if self.num_blocks is not None and self.num_blocks < 1:
            raise ValueError(f"num_blocks must be at least 1, got {self.num_blocks}.")
        if isinstance(self.max_sweeps, int) and self.max_sweeps < 1:
            raise ValueError(f"max_sweeps must be at least 1, got {self.max_sweeps}. Use Sequential() for none.")

    def solve_problem(self, problem: Problem) -> Solution:
        layout = Layout.of(problem, self.num_blocks or default_num_blocks(problem.length))
        tol = jnp.asarray(default_tolerance(problem.dtype) if self.merge_tol is None else self.merge_tol, problem.dtype)
        max_sweeps = layout.num_blocks if self.max_sweeps is None else self.max_sweeps
        inputs = layout.to_lanes(problem.inputs)
        sweep = _fill(problem, layout, inputs)
        scale = problem.scale
        if scale is None:
            scale = typical_scale(jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:]), sweep.recording.path))

        def pending(sweep):
            return jnp.any(sweep.active) & (sweep.number < max_sweeps)

        sweep = jax.lax.while_loop(
            pending, lambda sweep: _repair(problem.recurrence, layout, inputs, scale, tol, sweep), sweep
        )
        return _conclude(problem, layout, tol, sweep)


def default_num_blocks(length: int, max_blocks: int = 4096) -> int:
    """P of about sqrt(8 T), a power of two, at least 16 steps a block.

    The time (T/P + t_c)(a + b P), with a the cost of a step and b of a lane in it, is least at
    P = sqrt(a T / (b t_c)); a/b is some hundreds on a CPU, t_c some tens of steps on well-conditioned posteriors.
    """
    blocks = 1
    while blocks * blocks * 4 <= 8 * length and 2 * blocks * 16 <= length and blocks < max_blocks:
        blocks *= 2
    return blocks


# Steps of the zeroth sweep between writes to the path, where they divide a block's length.
CHUNK = 16


class Layout(NamedTuple):
    """Lanes by steps: lane ``c * P + p`` holds steps ``p * S + 1 .. (p + 1) * S`` of chain c.

    Buffers are (lanes, steps, ...), so that a path of P * S steps is its lanes without a copy: transposing 10^6
    steps of a two-dimensional path and its aux took as long as solving for them.
    """

    num_chains: int
    num_blocks: int
    block_length: int
    length: int

    @classmethod
    def of(cls, problem: Problem, num_blocks: int) -> "Layout":
        block_length = -(-problem.length // num_blocks)
        return cls(problem.num_chains, -(-problem.length // block_length), block_length, problem.length)

    @property
    def num_lanes(self) -> int:
        return self.num_chains * self.num_blocks

    def to_lanes(self, tree: PyTree) -> PyTree:
        """``(C, T, ...)`` to ``(C * P, S, ...)``; the last block is padded by repeating the last step."""
        pad = self.num_blocks * self.block_length - self.length

        def leaf(x):
            if pad:
                x = jnp.concatenate([x, jnp.repeat(x[:, -1:], pad, axis=1)], axis=1)
            return x.reshape(self.num_lanes, self.block_length, *x.shape[2:])

        return jax.tree.map(leaf, tree)

    def to_chains(self, tree: PyTree) -> PyTree:
        """Inverse of `to_lanes`; the padding is dropped."""
        leaf = lambda x: x.reshape(self.num_chains, -1, *x.shape[2:])[:, : self.length]
        return jax.tree.map(leaf, tree)

    def by_chain(self, lanes: Array) -> Array:
        return lanes.reshape(self.num_chains, self.num_blocks)

    def valid_steps(self) -> Array:
        """(lanes,) steps of each block that lie within the path; the last block may be padded."""
        start = jnp.arange(self.num_blocks) * self.block_length
        return jnp.tile(jnp.clip(self.length - start, 0, self.block_length), self.num_chains)

    def shift(self, lanes: Array) -> Array:
        """Hand each block's entry to its successor; the first block keeps its own (it is never restarted)."""
        blocks = lanes.reshape(self.num_chains, self.num_blocks, *lanes.shape[1:])
        return jnp.concatenate([blocks[:, :1], blocks[:, :-1]], axis=1).reshape(lanes.shape)


def read_step(buffer: PyTree, step: Array | int) -> PyTree:
    """One step of every lane of ``(lanes, S, ...)`` buffers."""
    return jax.tree.map(lambda b: jax.lax.dynamic_index_in_dim(b, step, 1, keepdims=False), buffer)


def write_step(buffer: PyTree, new: PyTree, step: Array | int) -> PyTree:
    """Inverse of `read_step`."""
    return jax.tree.map(lambda b, n: jax.lax.dynamic_update_index_in_dim(b, n, step, 1), buffer, new)


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
    end: PyTree  # carries at the end of each block, as recorded
    recording: Recording
    num_sweeps: Array  # (chains,) repair sweeps in which the chain had work
    critical_path: Array  # (chains,)
    evaluations: Array  # (lanes,) steps taken while active


class Pass(NamedTuple):
    """State within a repair sweep, one step of all lanes at a time."""

    step: Array
    carry: PyTree
    active: Array
    ran_out: Array  # active and not merged so far
    distance: Array  # to the recording, at the previous step
    recording: Recording
    taken: Array  # steps taken by each lane in this sweep


def _guessed_starts(problem: Problem, layout: Layout) -> PyTree:
    """Carries at the block starts: x0 for the first block of a chain, the guess for the others."""
    guess = problem.guess_at(jnp.arange(1, layout.num_blocks) * layout.block_length - 1)
    if guess is None:
        starts = jax.tree.map(lambda x: jnp.repeat(x, layout.num_blocks, axis=0), problem.x0)
    else:
        join = lambda x, g: jnp.concatenate([x[:, None], g], axis=1).reshape(layout.num_lanes, *x.shape[1:])
        starts = jax.tree.map(join, problem.x0, guess)
    return jax.vmap(problem.recurrence.restore)(starts)


def _fill(problem: Problem, layout: Layout, inputs: PyTree) -> Sweep:
    """The zeroth sweep: S plain steps of every block."""
    step, unknown = jax.vmap(problem.recurrence.step), jax.vmap(problem.recurrence.unknown)
    start = _guessed_starts(problem, layout)
    carry, aux = jax.eval_shape(step, start, read_step(inputs, 0))
    start = jax.tree.map(lambda s, c: s.astype(c.dtype), start, carry)
    empty = lambda tree: jax.tree.map(
        lambda x: jnp.zeros((x.shape[0], layout.block_length, *x.shape[1:]), x.dtype), tree
    )

    # A few steps at a time go through small buffers (steps, lanes, ...), where a step's lanes are neighbours.
    chunk = math.gcd(layout.block_length, CHUNK)
    swap = lambda tree: jax.tree.map(lambda x: jnp.swapaxes(x, 0, 1), tree)

    def body(carry, u):
        carry, aux = step(carry, u)
        return carry, (unknown(carry), aux)

    def run_chunk(number, state):
        carry, record = state
        first = number * chunk
        u = jax.tree.map(lambda x: jax.lax.dynamic_slice_in_dim(x, first, chunk, 1), inputs)
        carry, new = jax.lax.scan(body, carry, swap(u), length=chunk)
        write = lambda buffer, x: jax.lax.dynamic_update_slice_in_dim(buffer, x, first, 1)
        return carry, jax.tree.map(write, record, swap(new))

    begin = (start, (empty(jax.eval_shape(unknown, carry)), empty(aux)))
    end, (path, aux) = jax.lax.fori_loop(0, layout.block_length // chunk, run_chunk, begin)
    zeros = jnp.zeros(layout.num_lanes, problem.dtype)
    none = jnp.zeros(layout.num_chains, int)
    return _hand_over(
        layout,
        jnp.ones(layout.num_lanes, bool),
        Sweep(
            number=jnp.zeros((), int),
            start=start,
            active=jnp.ones(layout.num_lanes, bool),
            end=end,
            recording=Recording(path, aux, zeros, zeros, zeros, zeros),
            num_sweeps=none,
            critical_path=none + layout.block_length,
            evaluations=layout.valid_steps(),
        ),
    )


def _hand_over(layout: Layout, ran_out: Array, sweep: Sweep) -> Sweep:
    """Restart block p+1 from the end of block p, if and only if block p ran to its end unmerged."""
    active = layout.by_chain(layout.shift(ran_out)).at[:, 0].set(False)
    return sweep._replace(start=jax.tree.map(layout.shift, sweep.end), active=active.reshape(-1))


def _repair(recurrence: Recurrence, layout: Layout, inputs, scale, tol, sweep: Sweep) -> Sweep:
    """One pass over the active lanes, then hand the new ends to their successors."""
    done = _run_pass(recurrence, layout, inputs, scale, tol, sweep)
    had_work = jnp.any(layout.by_chain(sweep.active), axis=1)
    return _hand_over(
        layout,
        done.ran_out,
        Sweep(
            number=sweep.number + 1,
            start=sweep.start,
            active=sweep.active,
            end=tree_where(done.ran_out, done.carry, sweep.end),
            # a block overwritten to its end has no splice left
            recording=done.recording._replace(splice=jnp.where(done.ran_out, 0.0, done.recording.splice)),
            num_sweeps=sweep.num_sweeps + had_work,
            critical_path=sweep.critical_path + jnp.max(layout.by_chain(done.taken), axis=1),
            evaluations=sweep.evaluations + done.taken,
        ),
    )


def _run_pass(recurrence: Recurrence, layout: Layout, inputs, scale, tol, sweep: Sweep) -> Pass:
    """Step all lanes until every active one has merged or the blocks end."""
    valid = layout.valid_steps()
    step_lanes, unknown_lanes = jax.vmap(recurrence.step), jax.vmap(recurrence.unknown)

    def body(now: Pass) -> Pass:
        carry, aux = step_lanes(now.carry, read_step(inputs, now.step))
        x = unknown_lanes(carry)
        distance = relative_distance(x, read_step(now.recording.path, now.step), scale).astype(tol.dtype)
        live = now.active & (now.step < valid)
        merged = live & (distance <= tol)
        overwrite = live & ~merged
        lost = overwrite & ~finite_rows(x)  # from a state that is not finite there is nothing to repair
        return Pass(
            step=now.step + 1,
            carry=carry,
            active=overwrite & ~lost,
            ran_out=now.ran_out & ~merged & ~lost,
            distance=distance,
            recording=_write(now, x, aux, distance, live, merged, overwrite, tol),
            taken=now.taken + live,
        )

    begin = Pass(
        step=jnp.zeros((), int),
        carry=sweep.start,
        active=sweep.active,
        ran_out=sweep.active,
        distance=jnp.full(layout.num_lanes, jnp.inf, tol.dtype),
        recording=sweep.recording,
        taken=jnp.zeros(layout.num_lanes, int),
    )
    return jax.lax.while_loop(lambda now: (now.step < layout.block_length) & jnp.any(now.active), body, begin)


def _write(now: Pass, x, aux, distance, live, merged, overwrite, tol) -> Recording:
    """Overwrite the recording on lanes that have not merged; account for merges and for small distances."""
    recording = now.recording

    write = lambda buffer, new: write_step(buffer, tree_where(overwrite, new, read_step(buffer, now.step)), now.step)
    # Small: within the square root of the tolerance, where a distance behaves linearly. By optional stopping the
    # mean growth per step is unbiased although a lane enters this regime from above and leaves it by merging.
    small = live & (now.distance < jnp.sqrt(tol)) & (now.distance > 0)
    floor = tol * 2.0**-10
    growth = jnp.log(jnp.maximum(jnp.minimum(distance, 1.0), floor) / jnp.maximum(now.distance, floor))
    return Recording(
        path=write(recording.path, x),
        aux=write(recording.aux, aux),
        splice=jnp.where(merged, jnp.maximum(recording.splice, distance), recording.splice),
        residual=jnp.where(merged, jnp.maximum(recording.residual, distance), recording.residual),
        growth=recording.growth + jnp.where(small, growth, 0.0),
        growth_count=recording.growth_count + small,
    )


def _blank(known: Array, value: PyTree) -> PyTree:
    """NaN in the real leaves of states that are not known."""
    return jax.tree.map(lambda x: jnp.where(expand_mask(known, x), x, jnp.nan) if is_real(x) else x, value)


def _conclude(problem: Problem, layout: Layout, tol: Array, sweep: Sweep) -> Solution:
    recording = sweep.recording
    value = layout.to_chains(recording.path)
    finite = finite_rows(value, 2) & finite_rows(problem.x0)[:, None]
    active, splice = layout.by_chain(sweep.active), layout.by_chain(recording.splice)
    all_finite, complete = jnp.all(finite, 1), ~jnp.any(active, 1)
    count = jnp.sum(layout.by_chain(recording.growth_count), axis=1)
    growth = jnp.sum(layout.by_chain(recording.growth), axis=1)
    growth_rate = jnp.where(count > 0, growth / jnp.maximum(count, 1), jnp.nan)
    separating = separates(growth_rate, jnp.max(splice, axis=1), tol, layout.length)
    # A block pending, or in a separating recurrence spliced inexactly, ends the prefix that stands.
    stands = ~active & ((splice == 0) | ~separating[:, None])
    prefix = jnp.minimum(leading_true(stands) * layout.block_length, layout.length)
    residual = jnp.max(layout.by_chain(recording.residual), axis=1)
    known = jnp.arange(layout.length)[None] < leading_true(finite)[:, None]
    return Solution(
        # behind a state that is not finite nothing is known: a block there may still be the run of a guess
        value=jax.lax.cond(jnp.all(finite), lambda: value, lambda: _blank(known, value)),
        aux=layout.to_chains(recording.aux),
        result=jnp.select(
            [~all_finite, ~complete, separating],
            [RESULTS.nonfinite, RESULTS.max_iters_reached, RESULTS.not_contracting],
            RESULTS.successful,
        ),
        residual=jnp.where(all_finite & complete, residual, jnp.inf),
        stats=Stats(
            num_iters=jnp.zeros_like(sweep.num_sweeps),
            num_sweeps=sweep.num_sweeps,
            num_sequential_steps=sweep.critical_path,
            num_fn_evals=jnp.sum(layout.by_chain(sweep.evaluations), axis=1),
            certified_steps=jnp.minimum(prefix, leading_true(finite)),
            growth_rate=growth_rate,
        ),
    )
