"""Work shared by several devices: lanes, each device some of them, or steps, each device a part of every path."""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from pmcmc._pytree import expand_mask, is_real, leading_true
from pmcmc._typing import Array, PyTree
from pmcmc._xla.compile import that_ends
from pmcmc.recurrence.lanes import Layout

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


AXIS = "steps"


def step_sharding(devices: Sequence[jax.Device]) -> NamedSharding:
    """Of arrays (chains, steps, ...)."""
    return NamedSharding(Mesh(np.array(devices), (AXIS,)), PartitionSpec(None, AXIS))


class AllSteps(NamedTuple):
    """One device holds the whole path. Its methods say what `SomeSteps` must do.

    length: T.
    """

    length: int

    @property
    def num_own(self) -> int:
        """Steps that this device holds, padding included."""
        return self.length

    def numbers(self) -> Array:
        """Of own steps, from 0; padding has T and more."""
        return jnp.arange(self.length)

    def delayed(self, x: Array, first: Array | float = 0) -> Array:
        """``x[t-1]`` of an array (own steps, ...); ``first`` before the path."""
        return jnp.concatenate([jnp.broadcast_to(first, x[:1].shape).astype(x.dtype), x[:-1]])

    def ahead(self, x: Array) -> Array:
        """``x[t+1]``; zero behind the path."""
        return jnp.concatenate([x[1:], jnp.zeros_like(x[:1])])

    def scan(self, operator: Callable, elements: PyTree, reverse: bool = False) -> PyTree:
        """All prefixes (reverse: suffixes) of a path of elements under an associative operator."""
        return jax.lax.associative_scan(operator, elements, reverse=reverse)

    def before(self, operator: Callable, total: PyTree, identity: PyTree) -> PyTree:
        """Of the totals that each device has of its own steps, those of the devices before this one, joined."""
        return jax.tree.map(lambda x, one: jnp.full_like(x, one), total, identity)

    def all(self, holds: Array) -> Array:
        """Over the path."""
        return jnp.all(holds)

    def any(self, holds: Array) -> Array:
        """Over the path."""
        return jnp.any(holds)

    def max(self, x: Array) -> Array:
        """The largest entry over the path."""
        return jnp.max(x)

    def sum(self, x: Array) -> Array:
        """Of all entries over the path."""
        return jnp.sum(x)

    def total(self, own: Array) -> Array:
        """Of a number that each device has."""
        return own

    def leading(self, holds: Array) -> Array:
        """Length of the run of True at the start of the path."""
        return leading_true(holds)

    def every(self, stride: int, x: Array) -> Array:
        """Every so manieth row of the path."""
        return x[::stride]


class SomeSteps(NamedTuple):
    """One of several devices, inside `over_steps`; see `AllSteps`."""

    length: int
    num_devices: int

    @property
    def num_own(self) -> int:
        return -(-self.length // self.num_devices)

    @property
    def padding(self) -> int:
        """Of the path as a whole."""
        return self.num_own * self.num_devices - self.length

    def numbers(self) -> Array:
        return jax.lax.axis_index(AXIS) * self.num_own + jnp.arange(self.num_own)

    def inside(self) -> Array:
        """(own steps,) whether a step is no padding."""
        return self.numbers() < self.length

    def delayed(self, x: Array, first: Array | float = 0) -> Array:
        onwards = [(device, device + 1) for device in range(self.num_devices - 1)]
        x = jnp.concatenate([jax.lax.ppermute(x[-1:], AXIS, onwards), x[:-1]])
        numbers = self.numbers()
        outside = expand_mask((numbers == 0) | (numbers >= self.length), x)
        return jnp.where(outside, jnp.broadcast_to(first, x.shape).astype(x.dtype), x)

    def ahead(self, x: Array) -> Array:
        back = [(device + 1, device) for device in range(self.num_devices - 1)]
        x = jnp.concatenate([x[1:], jax.lax.ppermute(x[:1], AXIS, back)])
        return jnp.where(expand_mask(self.numbers() + 1 < self.length, x), x, 0)

    def scan(self, operator: Callable, elements: PyTree, reverse: bool = False) -> PyTree:
        own = jax.lax.associative_scan(operator, elements, reverse=reverse)
        # not joined into one message: there A, which is known, could not be told from b's tangents
        totals = jax.lax.all_gather(jax.tree.map(lambda x: x[0] if reverse else x[-1], own), AXIS)
        upto = jax.lax.associative_scan(operator, totals, reverse=reverse)
        device = jax.lax.axis_index(AXIS)
        edge, neighbour = (self.num_devices - 1, device + 1) if reverse else (0, device - 1)
        incoming = jax.tree.map(
            lambda x, like: jnp.broadcast_to(x[jnp.clip(neighbour, 0, self.num_devices - 1)], like.shape), upto, own
        )
        joined = operator(incoming, own)
        return jax.tree.map(lambda joined, own: jnp.where(device == edge, own, joined), joined, own)

    def before(self, operator: Callable, total: PyTree, identity: PyTree) -> PyTree:
        totals, device = jax.lax.all_gather(total, AXIS), jax.lax.axis_index(AXIS)
        joined = jax.tree.map(lambda x, one: jnp.full_like(x, one), total, identity)
        for number in range(self.num_devices - 1):
            more = operator(joined, jax.tree.map(lambda x: x[number], totals))  # noqa: B023
            joined = jax.tree.map(lambda x, y: jnp.where(number < device, x, y), more, joined)  # noqa: B023
        return joined

    def all(self, holds: Array) -> Array:
        return ~self.any(~holds)

    def any(self, holds: Array) -> Array:
        return jax.lax.pmax(jnp.any(holds & self.inside()).astype(jnp.int32), AXIS) > 0

    def max(self, x: Array) -> Array:
        return jax.lax.pmax(jnp.max(jnp.where(expand_mask(self.inside(), x), x, -jnp.inf)), AXIS)

    def sum(self, x: Array) -> Array:
        return self.total(jnp.sum(jnp.where(expand_mask(self.inside(), x), x, 0)))

    def total(self, own: Array) -> Array:
        return jax.lax.psum(own, AXIS)

    def leading(self, holds: Array) -> Array:
        own = leading_true(holds | ~self.inside())
        return jax.lax.pmin(jnp.where(own < self.num_own, self.numbers()[0] + own, self.length), AXIS)

    def every(self, stride: int, x: Array) -> Array:
        here = jnp.arange(0, self.length, stride) - self.numbers()[0]
        mine = (here >= 0) & (here < self.num_own)
        rows = x.at[here].get(mode="clip")
        return self.total(jnp.where(expand_mask(mine, rows), rows, 0))  # one of them is not zero: exact


Steps = AllSteps | SomeSteps


def over_steps(
    devices: Sequence[jax.Device], fn: Callable, whole: PyTree, shared: PyTree, out: PyTree, length: int
) -> PyTree:
    """``fn(steps, whole, own part of shared)`` on each device.

    whole: arrays that every device gets. shared: arrays (chains, T, ...). out: of the result, a tree with the number of
    the axis that is steps, or -1 for what is the same on every device.
    """
    steps = SomeSteps(length, len(devices))

    def pad(x: Array) -> Array:
        return jnp.concatenate([x, jnp.repeat(x[:, :1], steps.padding, axis=1)], axis=1)

    spec = lambda axis: PartitionSpec() if axis < 0 else PartitionSpec(*(None,) * axis, AXIS)
    shared_program = jax.shard_map(
        that_ends(lambda whole, own: fn(steps, whole, own)),
        mesh=step_sharding(devices).mesh,
        in_specs=(PartitionSpec(), PartitionSpec(None, AXIS)),
        out_specs=jax.tree.map(spec, out),
        check_vma=False,  # as in `over_devices`
    )
    # one program also where the caller compiles none: else each operation would be one
    found = jax.jit(shared_program)(whole, jax.tree.map(pad, shared) if steps.padding else shared)
    if not steps.padding:
        return found
    cut = lambda axis, part: (
        part if axis < 0 else jax.tree.map(lambda x: jax.lax.slice_in_dim(x, 0, length, axis=axis), part)
    )
    return jax.tree.map(cut, out, found)
