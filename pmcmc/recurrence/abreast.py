"""Many lanes side by side: on a CPU with lanes on the last axis of every value, and chunks of steps as one kernel.

Solvers and their buffers have lanes on the first axis. Steps are fast with lanes on the last one (see
`pmcmc._xla.lanes_last`), so here is where both forms meet. `walk_abreast` keeps carries lanes last for the whole walk,
and transposes inputs and records a chunk of steps at a time. `step_abreast` takes one step, with carries lanes first.

A chunk is one kernel (`pmcmc._xla.rewrites.in_one_kernel`), unless the step contains what such kernels cannot, or
are slow at: a product of matrices, a scatter, a factorisation, or an operation on more than `LARGEST` numbers. The
choice is made on the traced step and never by timing. In a program that the user compiles no chunk is a kernel, since
XLA may make library calls of its operations (`pmcmc._xla.rewrites.own_program`).

On other platforms, and for few lanes, steps are batched by ``jax.vmap``.
"""

from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp

from pmcmc._pytree import PyTree
from pmcmc._xla import default_platform
from pmcmc._xla.lanes_last import vmap_last
from pmcmc._xla.rewrites import FEW_LANES, in_one_kernel, in_own_program
from pmcmc.recurrence.sequential import Lanes, record_for, walk

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


def _last(tree: PyTree) -> PyTree:
    """Move the first axis of every leaf to the end."""
    return jax.tree.map(lambda x: jnp.moveaxis(x, 0, -1), tree)


def _first(tree: PyTree) -> PyTree:
    """Move the last axis of every leaf to the front."""
    return jax.tree.map(lambda x: jnp.moveaxis(x, -1, 0), tree)
