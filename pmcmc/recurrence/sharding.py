"""Work shared by several devices: each device gets some of the lanes, or a part of the steps of every path.

Solvers are written once, against the methods of `AllLanes` or `AllSteps` (one device). On several devices,
`over_devices` passes `SomeLanes` to solvers that walk lanes, and `over_steps` passes `SomeSteps` to Newton-type
solvers; their methods exchange what is needed between devices.
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from pmcmc._pytree import Array, PyTree, expand_mask, is_real, leading_true
from pmcmc._xla.compile import adapted
from pmcmc.recurrence.sequential import Layout

# Name of the one axis of the device mesh: along lanes, or along steps.
AXIS = "devices"


def distinct(devices: Sequence[jax.Device]) -> tuple[jax.Device, ...]:
    """Return devices as a tuple, which is hashable as static fields must be.

    Raises:
        ValueError: There is no device, or one is repeated.
    """
    devices = tuple(devices)
    if not devices or len(set(devices)) < len(devices):
        raise ValueError(f"devices must differ and be at least one, got {devices}. Use jax.devices() for all.")
    return devices


def lane_sharding(devices: Sequence[jax.Device]) -> NamedSharding:
    """Sharding of arrays whose first axis is lanes."""
    return NamedSharding(Mesh(np.array(devices), (AXIS,)), PartitionSpec(AXIS))


def replicated(devices: Sequence[jax.Device]) -> NamedSharding:
    """Sharding of arrays that every device stores completely."""
    return NamedSharding(Mesh(np.array(devices), (AXIS,)), PartitionSpec())


class AllLanes(NamedTuple):
    """All lanes, on one device. Its methods document those of `SomeLanes`.

    Attributes:
        layout: How chains are cut into lanes.
    """

    layout: Layout

    @property
    def num_lanes(self) -> int:
        """Number of own lanes."""
        return self.layout.num_lanes

    def own(self, lanes: PyTree) -> PyTree:
        """Select the own lanes from arrays of all lanes."""
        return lanes

    def valid_steps(self) -> Array:
        """`Layout.valid_steps` of the own lanes."""
        return self.layout.valid_steps()

    def numbers(self) -> Array:
        """Numbers of the own lanes among all lanes."""
        return jnp.arange(self.num_lanes)

    def first_of_chain(self) -> Array:
        """Whether a lane is the first of its chain, (own lanes,)."""
        return self.numbers() % self.layout.num_blocks == 0

    def hand_over(self, ends: PyTree) -> PyTree:
        """Pass each own lane's entry to the next lane; the first lane of a chain keeps its own."""
        return jax.tree.map(self.layout.shift, ends)

    def most(self, *counts: Array) -> Array:
        """Maximum over the lanes of each chain, for counts (own lanes,); shape (counts, C)."""
        return jnp.stack([jnp.max(self.layout.by_chain(c), axis=1) for c in counts])

    def every(self, stride: int, record: PyTree) -> PyTree:
        """Return every ``stride``-th step of the concatenated lanes, for real leaves (own lanes, capacity, ...)."""
        return _every(stride, record)


def _every(stride: int, record: PyTree) -> PyTree:
    """Return every ``stride``-th step of the concatenated lanes, for leaves (lanes, capacity, ...) of one device."""
    return jax.tree.map(lambda x: x.reshape(x.shape[0] * x.shape[1], *x.shape[2:])[::stride], record)


class PartOfLanes(NamedTuple):
    """Some of the lanes, on one device, where the caller passes states from part to part; see `AllLanes`.

    Attributes:
        layout: How chains are cut into lanes.
        num_parts: Number of parts; divides the number of lanes.
        number: Number of this part.
        before: What the last lane before this part hands over, leading axis 1; the structure of `hand_over`.
    """

    layout: Layout
    num_parts: int
    number: Array
    before: PyTree = None

    @property
    def num_lanes(self) -> int:
        return self.layout.num_lanes // self.num_parts

    def numbers(self) -> Array:
        return self.number * self.num_lanes + jnp.arange(self.num_lanes)

    def own(self, lanes: PyTree) -> PyTree:
        first = self.number * self.num_lanes
        return jax.tree.map(lambda x: jax.lax.dynamic_slice_in_dim(x, first, self.num_lanes), lanes)

    def valid_steps(self) -> Array:
        return self.own(self.layout.valid_steps())

    def first_of_chain(self) -> Array:
        return self.numbers() % self.layout.num_blocks == 0

    def hand_over(self, ends: PyTree) -> PyTree:
        first = self.first_of_chain()

        def leaf(x: Array, before: Array) -> Array:
            return jnp.where(expand_mask(first, x), x, jnp.concatenate([before, x[:-1]]))

        return jax.tree.map(leaf, ends, self.before)

    def most(self, *counts: Array) -> Array:
        chains = self.numbers() // self.layout.num_blocks
        found = jax.ops.segment_max(jnp.stack(counts, axis=1), chains, self.layout.num_chains).T
        return jnp.maximum(found, 0)  # chains without a lane in this part got the smallest integer

    def every(self, stride: int, record: PyTree) -> PyTree:
        return _every(stride, record)


class SomeLanes(NamedTuple):
    """The lanes of one of several devices, inside `over_devices`; see `AllLanes`.

    Attributes:
        layout: How chains are cut into lanes.
        num_devices: Number of devices; divides the number of lanes.
    """

    layout: Layout
    num_devices: int

    def _part(self, before: PyTree = None) -> PartOfLanes:
        """Return the lanes as a part, given what the device before hands over."""
        return PartOfLanes(self.layout, self.num_devices, jax.lax.axis_index(AXIS), before)

    @property
    def num_lanes(self) -> int:
        return self.layout.num_lanes // self.num_devices

    def numbers(self) -> Array:
        return self._part().numbers()

    def own(self, lanes: PyTree) -> PyTree:
        return self._part().own(lanes)

    def valid_steps(self) -> Array:
        return self._part().valid_steps()

    def first_of_chain(self) -> Array:
        return self._part().first_of_chain()

    def hand_over(self, ends: PyTree) -> PyTree:
        last = jax.tree.map(lambda x: x[-1:], ends)
        onwards = [(device, device + 1) for device in range(self.num_devices - 1)]
        before = _from_bytes(jax.lax.ppermute(_to_bytes(last), AXIS, onwards), last)
        return self._part(before).hand_over(ends)

    def most(self, *counts: Array) -> Array:
        return jax.lax.pmax(self._part().most(*counts), AXIS)

    def every(self, stride: int, record: PyTree) -> PyTree:
        capacity = self.layout.capacity
        steps = np.arange(0, self.layout.num_lanes * capacity, stride)
        here = jnp.asarray(steps) - jax.lax.axis_index(AXIS) * self.num_lanes * capacity
        mine = (here >= 0) & (here < self.num_lanes * capacity)

        def leaf(x: Array) -> Array:
            if not is_real(x):
                return jnp.zeros((len(steps), *x.shape[2:]), x.dtype)
            own = x.reshape(x.shape[0] * x.shape[1], *x.shape[2:]).at[here].get(mode="clip")
            # exact, since at most one device contributes a number other than zero
            return jax.lax.psum(jnp.where(expand_mask(mine, own), own, 0), AXIS)

        return jax.tree.map(leaf, record)


def over_devices(devices: Sequence[jax.Device], fn: Callable, lanes: PyTree, out: PyTree, layout: Layout) -> PyTree:
    """Call ``fn(held, own lanes)`` on each device.

    Args:
        devices: The devices.
        fn: ``(SomeLanes, own lanes) -> result``.
        lanes: Arrays of all lanes.
        out: Structure of the result, with True for leaves per lane and False for leaves equal on every device.
        layout: How chains are cut into lanes.

    Returns:
        The result, with all lanes.
    """
    spec = jax.tree.map(lambda per_lane: PartitionSpec(AXIS) if per_lane else PartitionSpec(), out)
    held = SomeLanes(layout, len(devices))
    return jax.shard_map(
        adapted(lambda lanes: fn(held, lanes)),
        mesh=lane_sharding(devices).mesh,
        in_specs=PartitionSpec(AXIS),
        out_specs=spec,
        check_vma=False,  # otherwise loops would have to mark each constant in their first carry as varying
    )(lanes)


def _to_bytes(tree: PyTree) -> Array:
    """Concatenate the bytes of all leaves, so that one message carries them."""

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


def step_sharding(devices: Sequence[jax.Device]) -> NamedSharding:
    """Sharding of arrays (chains, steps, ...) whose second axis is steps."""
    return NamedSharding(Mesh(np.array(devices), (AXIS,)), PartitionSpec(None, AXIS))


class AllSteps(NamedTuple):
    """All steps of a path, on one device. Its methods document those of `SomeSteps`.

    Attributes:
        length: T.
    """

    length: int

    @property
    def num_own(self) -> int:
        """Number of own steps, padding included."""
        return self.length

    def numbers(self) -> Array:
        """Numbers of the own steps, from 0; padding has numbers of T and above."""
        return jnp.arange(self.length)

    def delayed(self, x: Array, first: Array | float = 0) -> Array:
        """Return ``x[t-1]`` of an array (own steps, ...); ``first`` before the path."""
        return jnp.concatenate([jnp.broadcast_to(first, x[:1].shape).astype(x.dtype), x[:-1]])

    def ahead(self, x: Array) -> Array:
        """Return ``x[t+1]`` of an array (own steps, ...); zero after the path."""
        return jnp.concatenate([x[1:], jnp.zeros_like(x[:1])])

    def scan(self, operator: Callable, elements: PyTree, reverse: bool = False) -> PyTree:
        """Compute all prefixes (reverse: suffixes) of the path's elements under an associative operator."""
        return jax.lax.associative_scan(operator, elements, reverse=reverse)

    def before(self, operator: Callable, total: PyTree, identity: PyTree) -> PyTree:
        """Combine the totals of the devices before this one, each device giving the ``total`` of its own steps."""
        return jax.tree.map(lambda x, one: jnp.full_like(x, one), total, identity)

    def all(self, holds: Array) -> Array:
        """Whether all entries over the path are True."""
        return jnp.all(holds)

    def any(self, holds: Array) -> Array:
        """Whether any entry over the path is True."""
        return jnp.any(holds)

    def max(self, x: Array) -> Array:
        """Largest entry over the path."""
        return jnp.max(x)

    def sum(self, x: Array) -> Array:
        """Sum of all entries over the path."""
        return jnp.sum(x)

    def total(self, own: Array) -> Array:
        """Sum over devices of a number that each device has."""
        return own

    def leading(self, holds: Array) -> Array:
        """Length of the run of True at the start of the path."""
        return leading_true(holds)

    def every(self, stride: int, x: Array) -> Array:
        """Return every ``stride``-th row of the path."""
        return x[::stride]


class SomeSteps(NamedTuple):
    """The steps of one of several devices, inside `over_steps`; see `AllSteps`.

    Attributes:
        length: T.
        num_devices: Number of devices.
    """

    length: int
    num_devices: int

    @property
    def num_own(self) -> int:
        return -(-self.length // self.num_devices)

    @property
    def padding(self) -> int:
        """Number of padding steps after the path, on all devices together."""
        return self.num_own * self.num_devices - self.length

    def numbers(self) -> Array:
        return jax.lax.axis_index(AXIS) * self.num_own + jnp.arange(self.num_own)

    def inside(self) -> Array:
        """Whether a step belongs to the path rather than the padding, (own steps,)."""
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
        # one message per leaf: in a common one, A, which is known, could not be separated from b's tangents
        totals = jax.lax.all_gather(jax.tree.map(lambda x: x[0] if reverse else x[-1], own), AXIS)
        upto = jax.lax.associative_scan(operator, totals, reverse=reverse)
        # Combine with the totals of all devices on one side; the device at that end has none.
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
        # exact, since at most one device contributes a number other than zero
        return self.total(jnp.where(expand_mask(mine, rows), rows, 0))


Steps = AllSteps | SomeSteps


def over_steps(
    devices: Sequence[jax.Device], fn: Callable, whole: PyTree, shared: PyTree, out: PyTree, length: int
) -> PyTree:
    """Call ``fn(steps, whole, own part of shared)`` on each device.

    Args:
        devices: The devices.
        fn: ``(SomeSteps, whole, own part of shared) -> result``.
        whole: Arrays that every device gets completely.
        shared: Arrays (chains, T, ...), cut along the steps.
        out: Structure of the result, with the number of the steps axis of each leaf, or -1 for leaves that are equal on
            every device.
        length: T.

    Returns:
        The result, with all steps and without padding.
    """
    steps = SomeSteps(length, len(devices))

    def pad(x: Array) -> Array:
        return jnp.concatenate([x, jnp.repeat(x[:, :1], steps.padding, axis=1)], axis=1)

    spec = lambda axis: PartitionSpec() if axis < 0 else PartitionSpec(*(None,) * axis, AXIS)
    shared_program = jax.shard_map(
        adapted(lambda whole, own: fn(steps, whole, own)),
        mesh=step_sharding(devices).mesh,
        in_specs=(PartitionSpec(), PartitionSpec(None, AXIS)),
        out_specs=jax.tree.map(spec, out),
        check_vma=False,  # as in `over_devices`
    )
    # jitted here as well: without a jit around it, each operation would be compiled as a separate program
    found = jax.jit(shared_program)(whole, jax.tree.map(pad, shared) if steps.padding else shared)
    if not steps.padding:
        return found
    cut = lambda axis, part: (
        part if axis < 0 else jax.tree.map(lambda x: jax.lax.slice_in_dim(x, 0, length, axis=axis), part)
    )
    return jax.tree.map(cut, out, found)
