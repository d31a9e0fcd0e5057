"""Which steps of a path a device holds, and the few things steps must know of each other.

A Newton-type solver evaluates every step by itself; only a shift by one step, scans along the path and reductions over
it join steps. It is written in these. On several devices (`jax.shard_map`) each holds an even share of the path,
neighbours in order, and all run the same program. An iteration costs the same number of messages however long the
path is: a shift sends one row to the neighbour, a reduction one number, and a scan gathers the total of each device,
once for each array of an element,

    scan own steps;   gather totals;   combine those of the devices before;   join that to own results.

Where the devices do not divide T, the path is padded by repetitions of its first step: its input, after the state
before it. So padding is as finite as the path is; it follows the path, so nothing runs from it into a scan, shifts put
what is outside of the path there, and reductions leave it out.
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from pmcmc._jit import that_ends
from pmcmc._tree import expand_mask, leading_true
from pmcmc._types import Array, PyTree

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
