"""Which lanes a device holds, and the few things lanes must know of each other.

A solver that walks lanes is written for those that one device holds. On several devices (`jax.shard_map`) each holds
the same number of lanes, neighbours in order, and runs the same program. In a sweep of repair they exchange twice,
however long the lanes are: the end of the last lane goes to the next device (one collective permute), and the counts
of every chain are compared (one all-reduce).
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from pmcmc._jit import that_ends
from pmcmc._tree import expand_mask, is_real
from pmcmc._types import Array, PyTree
from pmcmc.recurrence._lanes import Layout

AXIS = "lanes"


def distinct(devices: Sequence[jax.Device]) -> tuple[jax.Device, ...]:
    """As a solver keeps them: hashable, as what is static must be.

    Raises:
        ValueError: none, or repeated ones.
    """
    devices = tuple(devices)
    if not devices or len(set(devices)) < len(devices):
        raise ValueError(f"devices must differ and be at least one, got {devices}. Use jax.devices() for all.")
    return devices


def lane_sharding(devices: Sequence[jax.Device]) -> NamedSharding:
    """Of arrays whose first axis is lanes."""
    return NamedSharding(Mesh(np.array(devices), (AXIS,)), PartitionSpec(AXIS))


def replicated(devices: Sequence[jax.Device]) -> NamedSharding:
    """Of arrays that every device holds whole."""
    return NamedSharding(Mesh(np.array(devices), (AXIS,)), PartitionSpec())


class AllLanes(NamedTuple):
    """One device holds all lanes. Its methods say what `SomeLanes` must do."""

    layout: Layout

    @property
    def num_lanes(self) -> int:
        return self.layout.num_lanes

    def own(self, lanes: PyTree) -> PyTree:
        """Out of arrays of all lanes."""
        return lanes

    def valid_steps(self) -> Array:
        """See `Layout.valid_steps`, of own lanes."""
        return self.layout.valid_steps()

    def numbers(self) -> Array:
        """Of own lanes among all."""
        return jnp.arange(self.num_lanes)

    def first_of_chain(self) -> Array:
        """(own lanes,) whether a lane is the first of its chain."""
        return self.numbers() % self.layout.num_blocks == 0

    def hand_over(self, ends: PyTree) -> PyTree:
        """Each own lane's entry goes to the next lane; the first of a chain keeps its own."""
        return jax.tree.map(self.layout.shift, ends)

    def most(self, *counts: Array) -> Array:
        """Over the lanes of each chain, of integers (own lanes,): (counts, C)."""
        return jnp.stack([jnp.max(self.layout.by_chain(c), axis=1) for c in counts])

    def every(self, stride: int, record: PyTree) -> PyTree:
        """Every so manieth step of all lanes in order, of real leaves (own lanes, capacity, ...)."""
        return jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:])[::stride], record)


class SomeLanes(NamedTuple):
    """One of several devices, inside `over_devices`; see `AllLanes`."""

    layout: Layout
    num_devices: int

    @property
    def num_lanes(self) -> int:
        return self.layout.num_lanes // self.num_devices

    def numbers(self) -> Array:
        return jax.lax.axis_index(AXIS) * self.num_lanes + jnp.arange(self.num_lanes)

    def own(self, lanes: PyTree) -> PyTree:
        first = jax.lax.axis_index(AXIS) * self.num_lanes
        return jax.tree.map(lambda x: jax.lax.dynamic_slice_in_dim(x, first, self.num_lanes), lanes)

    def valid_steps(self) -> Array:
        return self.own(self.layout.valid_steps())

    def first_of_chain(self) -> Array:
        return self.numbers() % self.layout.num_blocks == 0

    def hand_over(self, ends: PyTree) -> PyTree:
        last = jax.tree.map(lambda x: x[-1:], ends)
        onwards = [(device, device + 1) for device in range(self.num_devices - 1)]
        before = _from_bytes(jax.lax.ppermute(_to_bytes(last), AXIS, onwards), last)
        first = self.first_of_chain()

        def leaf(x: Array, before: Array) -> Array:
            return jnp.where(expand_mask(first, x), x, jnp.concatenate([before, x[:-1]]))

        return jax.tree.map(leaf, ends, before)

    def most(self, *counts: Array) -> Array:
        # a chain of which this device holds no lane has the least integer there
        chains = self.numbers() // self.layout.num_blocks
        own = jax.ops.segment_max(jnp.stack(counts, axis=1), chains, self.layout.num_chains)
        return jax.lax.pmax(own.T, AXIS)

    def every(self, stride: int, record: PyTree) -> PyTree:
        capacity = self.layout.capacity
        steps = np.arange(0, self.layout.num_lanes * capacity, stride)
        here = jnp.asarray(steps) - jax.lax.axis_index(AXIS) * self.num_lanes * capacity
        mine = (here >= 0) & (here < self.num_lanes * capacity)

        def leaf(x: Array) -> Array:
            if not is_real(x):
                return jnp.zeros((len(steps), *x.shape[2:]), x.dtype)
            own = x.reshape(-1, *x.shape[2:]).at[here].get(mode="clip")
            return jax.lax.psum(jnp.where(expand_mask(mine, own), own, 0), AXIS)  # one of them is not zero: exact

        return jax.tree.map(leaf, record)


def over_devices(devices: Sequence[jax.Device], fn: Callable, lanes: PyTree, out: PyTree, layout: Layout) -> PyTree:
    """``fn(held, own lanes)`` on each device.

    lanes: arrays of all lanes. out: of the result, a tree of True for what is per lane, and False for what is the same
    on every device.
    """
    spec = jax.tree.map(lambda per_lane: PartitionSpec(AXIS) if per_lane else PartitionSpec(), out)
    held = SomeLanes(layout, len(devices))
    return jax.shard_map(
        that_ends(lambda lanes: fn(held, lanes)),
        mesh=lane_sharding(devices).mesh,
        in_specs=PartitionSpec(AXIS),
        out_specs=spec,
        check_vma=False,  # loops whose carry begins with constants would have to mark each of them as varying
    )(lanes)


def _to_bytes(tree: PyTree) -> Array:
    """All leaves as one vector, so that one message holds them."""

    def leaf(x: Array) -> Array:
        x = x.astype(jnp.uint8) if x.dtype == jnp.bool_ else jax.lax.bitcast_convert_type(x, jnp.uint8)
        return x.reshape(-1)

    return jnp.concatenate([leaf(x) for x in jax.tree.leaves(tree)])


def _from_bytes(message: Array, like: PyTree) -> PyTree:
    """Inverse of `_to_bytes`."""
    leaves, start = [], 0
    for x in jax.tree.leaves(like):
        width = x.dtype.itemsize
        part = message[start : start + x.size * width]
        start += x.size * width
        if x.dtype == jnp.bool_:
            part = part.astype(bool)
        else:
            part = jax.lax.bitcast_convert_type(part.reshape(-1, width) if width > 1 else part, x.dtype)
        leaves.append(part.reshape(x.shape))
    return jax.tree.unflatten(jax.tree.structure(like), leaves)
