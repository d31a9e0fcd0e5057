"""Multiple shooting in parts: each part is some of the blocks, and the caller passes states from part to part.

Threads that solve one part each keep several cores busy with a single chain. `call_part` is the program of a part. It
is called several times for a segment:

1. It runs the zeroth sweep of its blocks (`Call.fill`).
2. Given the last state of the part before, it repairs its blocks until none is pending.
3. If that last state has changed since, it repairs again, from its first block on.

Between two calls the caller hands over, as between two sweeps; so the rule of `pmcmc.recurrence.shooting.repair` holds
for the whole path. `conclude_parts` makes one solution of all parts.
"""

from collections.abc import Sequence
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from pmcmc._pytree import Array, ArrayLeaf, PyTree, Scalar, finite_rows, real_dtype, single_or_wider
from pmcmc.recurrence.sequential import Lanes, Layout
from pmcmc.recurrence.sharding import PartOfLanes
from pmcmc.recurrence.shooting.repair import Edge, Recording, Sweep, successor_starts
from pmcmc.recurrence.shooting.solver import (
    LaneResults,
    MultipleShooting,
    conclude,
    fill,
    leading_finite,
    measure_scale,
    repair,
)
from pmcmc.recurrence.solution import Solution, typical_scale


class Call(NamedTuple):
    """What one call of a part's program does.

    Attributes:
        fill: Whether it begins with the zeroth sweep.
        all_blocks: Whether each block hands over to the next one first; otherwise only the last block of the part
            before does, if ``before_moved``.
        before_moved: Whether the last block of the part before hands over.
        num_sweeps: Repair sweeps so far, the largest over parts.
        depth: Sequential steps so far, the largest over parts.
    """

    fill: Scalar
    all_blocks: Scalar
    before_moved: Scalar
    num_sweeps: Scalar
    depth: Scalar

    def as_arrays(self, integer: np.dtype) -> "Call":
        """Return numpy arrays, with integers of this dtype."""
        flags, counts = self[:3], self[3:]
        return Call(*(np.asarray(x, bool) for x in flags), *(np.asarray(x, integer) for x in counts))


class Part(NamedTuple):
    """State of a part between two calls, besides the path. Arrays without a comment have shape (own lanes,).

    Attributes:
        end: What each block hands on at its end.
        recorded: See `Sweep`; (own lanes, ...).
        splice: See `Recording`, and so for the next three.
        active: Blocks whose repair a budget has stopped.
        evaluations: Repair steps taken.
        leading: Steps before the first state that is not finite, once counted.
        scale: Spread of each coordinate as measured, structure of one state; None if it is given.
        num_sweeps: Repair sweeps of the last call in which each chain had work, (chains,).
        taken: Sequential repair steps of the last call, (chains,).
        moved: Whether the last block handed on a new end in the last call, ().
    """

    end: Edge
    recorded: PyTree
    splice: ArrayLeaf
    residual: ArrayLeaf
    growth: ArrayLeaf
    growth_count: ArrayLeaf
    active: ArrayLeaf
    evaluations: ArrayLeaf
    leading: ArrayLeaf
    scale: PyTree
    num_sweeps: ArrayLeaf
    taken: ArrayLeaf
    moved: ArrayLeaf

    @classmethod
    def blank(cls, end: PyTree, x: PyTree, num_lanes: int, num_chains: int, with_scale: bool) -> "Part":
        """Return the state before the first call, in numpy.

        Args:
            end: Shapes of the carry of one lane.
            x: Shapes of one state.
            num_lanes: Number of own lanes.
            num_chains: C.
            with_scale: Whether a scale is given.
        """
        integer, real = jnp.result_type(int), single_or_wider(real_dtype(x))
        lanes = lambda dtype: np.zeros(num_lanes, dtype)
        rows = jax.tree.map(lambda s: jax.ShapeDtypeStruct((1, *s.shape), s.dtype), x)
        scale = jax.eval_shape(typical_scale, rows)
        chains = lambda: np.zeros(num_chains, integer)
        zeros = lambda shapes: jax.tree.map(lambda s: np.zeros((num_lanes, *s.shape), s.dtype), shapes)
        return cls(
            end=Edge(zeros(end), lanes(integer)),
            recorded=zeros(x),
            splice=lanes(real),
            residual=lanes(real),
            growth=lanes(real),
            growth_count=lanes(real),
            active=lanes(bool),
            evaluations=lanes(integer),
            leading=lanes(integer),
            scale=None if with_scale else jax.tree.map(lambda s: np.zeros(s.shape, s.dtype), scale),
            num_sweeps=chains(),
            taken=chains(),
            moved=np.zeros((), bool),
        )

    @property
    def message(self) -> PyTree:
        """What the next part needs: the `Edge` at the end of the last block, leading axis 1."""
        return jax.tree.map(lambda x: np.asarray(x)[-1:].copy(), self.end)

    def stopped(self) -> "Part":
        """Return the state if no budget is left for its first block, whose start has changed."""
        active = np.array(self.active)
        active[0] = True
        return self._replace(active=active)


def call_part(
    solver: MultipleShooting, lanes: Lanes, number: Array, num_parts: int, what: Call, before: Edge, part: Part
) -> tuple[PyTree, PyTree, Part]:
    """Advance a part.

    Args:
        solver: The solver.
        lanes: What is solved. ``inputs`` and ``buffers`` are those of the part's own lanes, and ``buffers`` are
            overwritten; after the first call they are the path.
        number: Number of the part.
        num_parts: Number of parts.
        what: What to do.
        before: `Part.message` of the part before; anything of that structure for the first one.
        part: State of the part.

    Returns:
        States and aux of the path, and the state of the part.
    """
    layout, measured = lanes.layout, lanes.scale is None
    moved = jnp.reshape(what.before_moved, (1,))
    held = PartOfLanes(layout, num_parts, number, (before, moved))
    lanes = lanes._replace(held=held)
    tol, max_sweeps, max_steps = solver.limits(lanes.x0)
    # The zeroth sweep has no steps in later calls.
    if_new = lambda new, old: jax.tree.map(lambda x, y: jnp.where(what.fill, x, y), new, old)
    begun, end, path, aux = fill(lanes, jnp.where(what.fill, layout.block_length, 0))
    recorded, end = if_new((begun, end), (part.recorded, part.end))
    if measured:
        anew = lambda _, scale: measure_scale(lanes, path)
        scale = jax.lax.fori_loop(0, jnp.where(what.fill, 1, 0), anew, part.scale)
        lanes = lanes._replace(scale=scale, measured=True)
    # Repair. After the first hand-over the part before has nothing new.
    start, active = successor_starts(lanes, end, jnp.full(held.num_lanes, what.all_blocks))
    lanes = lanes._replace(held=held._replace(before=(before, jnp.zeros_like(moved))))
    recording = Recording(path, aux, part.splice, part.residual, part.growth, part.growth_count)
    # A lane that a budget has stopped is not run again: from its start it would meet its own steps.
    begin = Sweep.first(held, start, recorded, active, end, recording, what.depth)
    sweep = repair(lanes, tol, max_sweeps - what.num_sweeps, max_steps, begin)
    # A loop of at most one iteration: after the zeroth sweep the finite states are not counted.
    recording = sweep.recording
    count = lambda _, leading: leading_finite(lanes, recording.path).astype(leading.dtype)
    return (
        recording.path,
        recording.aux,
        Part(
            end=sweep.end,
            recorded=sweep.recorded,
            splice=recording.splice,
            residual=recording.residual,
            growth=recording.growth,
            growth_count=recording.growth_count,
            active=sweep.active | part.active,
            evaluations=part.evaluations + sweep.evaluations,
            leading=jax.lax.fori_loop(0, jnp.where(what.fill, 0, 1), count, part.leading),
            scale=lanes.scale if measured else None,
            num_sweeps=sweep.num_sweeps,
            taken=sweep.critical_path,
            moved=sweep.handed,
        ),
    )


def joined(parts: Sequence[Part]) -> LaneResults:
    """Return what was found for all lanes, in numpy."""
    return LaneResults(*(np.concatenate([np.asarray(getattr(p, name)) for p in parts]) for name in LaneResults._fields))


@partial(jax.jit, static_argnames=("num_chains", "num_blocks"))
def conclude_parts(
    solver: MultipleShooting,
    x0: PyTree,
    found: LaneResults,
    num_sweeps: Array,
    critical_path: Array,
    block_length: Array,
    *,
    num_chains: int,
    num_blocks: int,
) -> Solution:
    """Return the solution of all parts without its states; see `conclude`."""
    layout = Layout(num_chains, num_blocks, 0, block_length, num_blocks * block_length)  # buffers play no part
    found = found._replace(evaluations=layout.valid_steps() + found.evaluations)
    return conclude(layout, solver.limits(x0)[0], finite_rows(x0), found, num_sweeps, critical_path)[1]
