"""Many lanes side by side: on a CPU with lanes on the last axis of every value, and chunks of steps as one kernel.

Solvers and their buffers have lanes on the first axis. Steps are fast with lanes on the last one (see
`pmcmc._xla.lanes_last`), so here is where both forms meet. `walk_abreast` keeps carries lanes last for the whole walk,
and transposes inputs and records a chunk of steps at a time. `step_abreast` takes one step, with carries lanes first.
`walk_apart` lets each lane be at a step of its own, if the step comes in stages.

A chunk is one kernel (`pmcmc._xla.rewrites.in_one_kernel`), unless the step contains what such kernels cannot, or
are slow at: a product of matrices, a scatter, a factorisation, or an operation on more than `LARGEST` numbers. The
choice is made on the traced step and never by timing. In a program that the user compiles no chunk is a kernel, since
XLA may make library calls of its operations (`pmcmc._xla.rewrites.own_program`).

On other platforms, and for few lanes, steps are batched by ``jax.vmap``.
"""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from pmcmc._pytree import Array, PyTree
from pmcmc._xla import default_platform
from pmcmc._xla.lanes_last import vmap_last
from pmcmc._xla.rewrites import FEW_LANES, in_one_kernel, in_own_program
from pmcmc.recurrence.problem import Staged
from pmcmc.recurrence.sequential import Inputs, Lanes, record_for, walk

# An operation on more numbers than this is left to XLA, which spreads it over cores.
LARGEST = 2**16


def prefers_lanes_last(num_lanes: int) -> bool:
    """Whether this many lanes are stepped with lanes last."""
    return num_lanes > FEW_LANES and default_platform() == "cpu"


def map_lanes(fn: Callable, in_axes: Sequence[int | None], num_lanes: int) -> Callable:
    """Return ``jax.vmap(fn, in_axes, out_axes=-1)``, with lanes last in between, too, where that is faster.

    Args:
        fn: Function of pytrees of one lane.
        in_axes: For each argument -1 if its leaves have lanes on the last axis, None if it is shared.
        num_lanes: Number of lanes.
    """
    return vmap_last(fn, in_axes) if prefers_lanes_last(num_lanes) else jax.vmap(fn, in_axes, out_axes=-1)


def scan_abreast(body: Callable, carry: PyTree, inputs: PyTree, length: int, num_lanes: int) -> tuple[PyTree, PyTree]:
    """Return ``jax.lax.scan(body, carry, inputs, length)`` over steps of all lanes, as one kernel where that pays."""
    run = lambda carry, inputs: jax.lax.scan(body, carry, inputs, length)
    is_kernel = prefers_lanes_last(num_lanes) and in_own_program()
    return in_one_kernel(run, carry, inputs, largest=LARGEST) if is_kernel else run(carry, inputs)


def while_abreast(test: Callable, body: Callable, carry: PyTree, num_lanes: int) -> PyTree:
    """Return ``jax.lax.while_loop(test, body, carry)`` over values of all lanes, as one kernel where that pays."""
    run = lambda carry: jax.lax.while_loop(test, body, carry)
    is_kernel = prefers_lanes_last(num_lanes) and in_own_program()
    return in_one_kernel(run, carry, largest=LARGEST) if is_kernel else run(carry)


def step_abreast(step: Callable, num_lanes: int) -> Callable:
    """Return ``step``, a function of pytrees of one lane, for all lanes; lanes are the first axis of every leaf."""
    if not prefers_lanes_last(num_lanes):
        return jax.vmap(step)
    return lambda *args: _first(vmap_last(step)(*map(_last, args)))


def walk_abreast(step: Callable, carry: PyTree, lanes: Lanes, chunk: int) -> tuple[PyTree, PyTree]:
    """Do what `walk` does, for a step of one lane.

    Args:
        step: ``(carry, input) -> (carry, record)`` of one lane.
        carry: Carries of all lanes before the first step, lanes first.
        lanes: Inputs, layout and, if there are any, buffers to overwrite.
        chunk: Steps between two writes to the large buffers; divides the capacity.

    Returns:
        The last carry, and the record ``(lanes, capacity, ...)``.
    """
    if not prefers_lanes_last(lanes.held.num_lanes):
        return walk(jax.vmap(step), carry, lanes, chunk)
    layout, record = lanes.layout, record_for(jax.vmap(step), carry, lanes)
    step_all = vmap_last(step)

    def body(number, state):
        carry, record = state
        first = number * chunk
        u = lanes.inputs.of_chunk(first, chunk)
        carry, new = scan_abreast(step_all, carry, u, chunk, lanes.held.num_lanes)
        write = lambda buffer, x: jax.lax.dynamic_update_slice_in_dim(buffer, x, first, 1)
        return carry, jax.tree.map(write, record, _first(new))

    end, record = jax.lax.fori_loop(0, -(-layout.block_length // chunk), body, (_last(carry), record))
    return _first(end), record


# Lanes that have ended their step wait until this share of the active lanes has; then all of these begin a new step.
SHARE = 0.1


def walk_apart(
    staged: Staged, inputs: Inputs, start: PyTree, state: Any, going: Callable, visit: Callable
) -> tuple[PyTree, Any]:
    """Take steps of varying length until no lane is going; lanes need not be at the same step.

    Args:
        staged: The step in stages.
        inputs: Inputs of all lanes.
        start: Carries before the first step, leading axis lanes.
        state: The caller's state, with a field ``step``, (lanes,): the number of the step that each lane is in.
        going: ``state -> (lanes,)``, whether a lane has a step to take.
        visit: ``(state, carry, aux, arrived) -> state``, called when lanes have ended a step. Only lanes where
            ``arrived`` is True may change their step number.

    Returns:
        The carries where each lane stopped, and the last state.
    """

    def body(loop: Any) -> Any:
        state, work = loop
        under_way = going(state)
        enough = jnp.ceil(SHARE * jnp.sum(under_way))

        def few_wait(work: PyTree) -> Array:
            return jnp.sum(under_way & staged.finished(work)) < enough

        # Advance until enough lanes have ended their step, then report these.
        work = while_abreast(few_wait, staged.advance, work, under_way.size)
        arrived = under_way & staged.finished(work)
        carry, aux = staged.conclude(work)
        state = visit(state, carry, aux, arrived)
        # Begin the next step in the lanes that go on; all others keep their work.
        begun = staged.begin(carry, inputs.of_step(state.step))
        again = arrived & going(state)
        wide = lambda x: again.reshape((1,) * (x.ndim - 1) + again.shape)
        return state, jax.tree.map(lambda new, old: jnp.where(wide(new), new, old), begun, work)

    work = staged.begin(start, inputs.of_step(state.step))
    state, work = jax.lax.while_loop(lambda loop: jnp.any(going(loop[0])), body, (state, work))
    return staged.conclude(work)[0], state


def _last(tree: PyTree) -> PyTree:
    """Move the first axis of every leaf to the end."""
    return jax.tree.map(lambda x: jnp.moveaxis(x, 0, -1), tree)


def _first(tree: PyTree) -> PyTree:
    """Move the last axis of every leaf to the front."""
    return jax.tree.map(lambda x: jnp.moveaxis(x, -1, 0), tree)
