"""The sequential solver: ``x[t] = fn(x[t-1], inputs[t])``, one step after the other. See `Sequential`.

Other solvers that walk along the path share its memory layout, in which paths are lanes. A chain of T steps is cut into
P blocks of S steps. Lane ``c * P + p`` contains steps ``p S + 1 .. (p + 1) S`` of chain c. Buffers have shape (lanes,
capacity, ...) with S <= capacity. The capacity is part of a program's shapes, S is a number, so one compiled program
solves any path of up to P * capacity steps, in time proportional to S.

`Layout` converts between chains and lanes, `Lanes` is a batch of recurrences in this layout, and `LaneSolver` is the
base class of the solvers. `walk` steps all lanes together.
"""

import abc
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple, Protocol, runtime_checkable

import jax
import jax.numpy as jnp

from pmcmc._pytree import (
    Array,
    PyTree,
    finite_rows,
    leading_true,
    real_dtype,
    register_dataclass,
    single_or_wider,
    tree_index,
    tree_where,
)
from pmcmc._xla import default_platform
from pmcmc.recurrence.problem import Problem, Recurrence
from pmcmc.recurrence.solution import RESULTS, RecurrenceSolver, Solution, Stats


class Layout(NamedTuple):
    """How chains are cut into lanes. The first three numbers are static, the others may be traced.

    Attributes:
        num_chains: C.
        num_blocks: P, blocks per chain.
        capacity: Steps that a lane's buffers have room for.
        block_length: S, at most ``capacity``; see `LaneSolver.unit` for the numbers allowed.
        length: T, steps of each chain, at most P S.
    """

    num_chains: int
    num_blocks: int
    capacity: int
    block_length: int | Array
    length: int | Array

    @classmethod
    def of(cls, problem: Problem, num_blocks: int, num_devices: int = 1) -> "Layout":
        """Return a static layout whose blocks are as long as the buffers.

        Blocks are equally long. Their number is chosen to be a multiple of ``num_devices``, so the last ones may be
        empty.
        """
        block_length = -(-problem.length // num_blocks)
        blocks = num_devices * -(-problem.length // (block_length * num_devices))
        return cls(problem.num_chains, blocks, block_length, block_length, problem.length)

    @property
    def num_lanes(self) -> int:
        """C P, the lanes of all chains."""
        return self.num_chains * self.num_blocks

    def to_lanes(self, tree: PyTree) -> PyTree:
        """Cut ``(C, T, ...)`` into lanes ``(C * P, capacity, ...)``; the last step is repeated as padding."""
        pad = self.num_blocks * self.capacity - self.length

        def leaf(x):
            if pad:
                x = jnp.concatenate([x, jnp.repeat(x[:, -1:], pad, axis=1)], axis=1)
            return x.reshape(self.num_lanes, self.capacity, *x.shape[2:])

        return jax.tree.map(leaf, tree)

    def to_chains(self, tree: PyTree) -> PyTree:
        """Inverse of `to_lanes`; drops the padding."""
        leaf = lambda x: x.reshape(self.num_chains, self.num_blocks * x.shape[1], *x.shape[2:])[:, : self.length]
        return jax.tree.map(leaf, tree)

    def by_chain(self, lanes: Array) -> Array:
        """Reshape ``(lanes,)`` to ``(C, P)``."""
        return lanes.reshape(self.num_chains, self.num_blocks)

    def valid_steps(self) -> Array:
        """Number of steps of each block that lie within the path, shape ``(lanes,)``; the last block may be padded."""
        start = jnp.arange(self.num_blocks) * self.block_length
        return jnp.tile(jnp.clip(self.length - start, 0, self.block_length), self.num_chains)

    def shift(self, lanes: Array) -> Array:
        """Pass each block's entry to its successor; the first block keeps its own, since it is never restarted."""
        blocks = lanes.reshape(self.num_chains, self.num_blocks, *lanes.shape[1:])
        return jnp.concatenate([blocks[:, :1], blocks[:, :-1]], axis=1).reshape(lanes.shape)


@runtime_checkable
class Inputs(Protocol):
    """The inputs of all lanes."""

    def of_step(self, step: Array | int) -> PyTree:
        """Return the inputs of one step of every lane, (lanes, ...); ``step`` is one number, or one per lane."""
        ...

    def of_chunk(self, first: Array, length: int) -> PyTree:
        """Return the inputs of ``length`` steps from ``first`` on, lanes last: (length, ..., lanes)."""
        ...


class Stored(NamedTuple):
    """Inputs that are in memory; see `Inputs`.

    Attributes:
        buffer: The inputs, (lanes, capacity, ...).
    """

    buffer: PyTree

    def of_step(self, step: Array | int) -> PyTree:
        return read_step(self.buffer, step)

    def of_chunk(self, first: Array, length: int) -> PyTree:
        cut = lambda x: jax.lax.dynamic_slice_in_dim(x, first, length, 1)
        return jax.tree.map(lambda x: jnp.moveaxis(cut(x), 0, -1), self.buffer)


class Lanes(NamedTuple):
    """A batch of recurrences laid out as lanes; compare `Problem`.

    Attributes:
        recurrence: The recurrence.
        x0: States before the first step, (C, ...).
        inputs: Inputs of all lanes: `Stored`, or `pmcmc.recurrence.drawn.Drawn` for solvers that `draw_inputs`.
        guess_at: See `Problem.guess_at`; None without a guess.
        scale: Spread of each coordinate, structure of one state; None: measured.
        layout: How chains are cut into lanes.
        buffers: (value, aux) of an earlier solution of this layout, which are overwritten. None: new buffers.
        measured: Whether the scale was measured on runs from guesses rather than given.
        held: Lanes of this device, where a solver distributes lanes over devices: see `AllLanes`.
    """

    recurrence: Recurrence
    x0: PyTree
    inputs: Inputs
    guess_at: Callable | None
    scale: PyTree
    layout: Layout
    buffers: PyTree = None
    measured: bool = False
    held: Any = None


class LaneSolver(RecurrenceSolver):
    """A solver that walks: each lane takes one step after the other, so one program serves any number of steps.

    Attributes:
        unit: S must be a multiple of the greatest common divisor of this and the capacity.
    """

    walks: ClassVar[bool] = True

    @abc.abstractmethod
    def blocks_for(self, length: int) -> int:
        """Return P for a path of ``length`` steps."""

    @abc.abstractmethod
    def solve_lanes(self, lanes: Lanes) -> Solution:
        """Solve for all lanes.

        Value and aux of the solution have shape (lanes, capacity, ...); entries after the first S steps are undefined.
        """

    def solve_problem(self, problem: Problem) -> Solution:
        layout = Layout.of(problem, self.blocks_for(problem.length), max(1, len(self.shared_by)))
        guess_at = None if problem.guess is None else problem.guess_at
        inputs = Stored(layout.to_lanes(problem.inputs))
        solution = self.solve_lanes(Lanes(problem.recurrence, problem.x0, inputs, guess_at, problem.scale, layout))
        return solution._replace(value=layout.to_chains(solution.value), aux=layout.to_chains(solution.aux))


def read_step(buffer: PyTree, step: Array | int) -> PyTree:
    """Read one step of every lane from buffers ``(lanes, S, ...)``; ``step`` is one number, or one per lane."""
    if jnp.ndim(step):
        return jax.tree.map(lambda b: b.at[jnp.arange(b.shape[0]), step].get(mode="clip"), buffer)
    return jax.tree.map(lambda b: jax.lax.dynamic_index_in_dim(b, step, 1, keepdims=False), buffer)


def write_step(buffer: PyTree, new: PyTree, step: Array | int) -> PyTree:
    """Inverse of `read_step`, for one step shared by all lanes."""
    return jax.tree.map(lambda b, n: jax.lax.dynamic_update_index_in_dim(b, n, step, 1), buffer, new)


def write_where(mask: Array, buffer: PyTree, new: PyTree, step: Array | int) -> PyTree:
    """Write like `write_step`, only in the lanes where ``mask`` is True; each lane may have its own step."""
    if jnp.ndim(step) or default_platform() != "cpu":

        def leaf(b, n):
            at = b.at[jnp.arange(b.shape[0]), jnp.where(mask, step, b.shape[1])]
            return at.set(n, mode="drop", unique_indices=True, indices_are_sorted=True)

        return jax.tree.map(leaf, buffer, new)
    return write_step(buffer, tree_where(mask, new, read_step(buffer, step)), step)


def walk(step: Callable, carry: PyTree, lanes: Lanes, chunk: int) -> tuple[PyTree, PyTree]:
    """Take S steps of every lane, rounded up to whole chunks.

    Args:
        step: ``(carry, input) -> (carry, record)`` of all lanes at once.
        carry: Carries of all lanes before the first step.
        lanes: Inputs, layout and, if there are any, buffers to overwrite.
        chunk: Steps between two writes to the large buffers; divides the capacity.

    Returns:
        The last carry, and the record ``(lanes, capacity, ...)``, undefined where nothing was written.
    """
    layout, record = lanes.layout, record_for(step, carry, lanes)
    run_chunk = _run_alone if layout.num_blocks == 1 else _run_abreast
    body = lambda number, state: run_chunk(step, lanes.inputs, number * chunk, chunk, *state)
    return jax.lax.fori_loop(0, -(-layout.block_length // chunk), body, (carry, record))


def record_for(step: Callable, carry: PyTree, lanes: Lanes) -> PyTree:
    """Return the buffers that `walk` overwrites, or new ones."""
    if lanes.buffers is not None:
        return lanes.buffers
    _, shapes = jax.eval_shape(lambda carry: step(carry, lanes.inputs.of_step(0)), carry)
    return jax.tree.map(lambda x: jnp.zeros((x.shape[0], lanes.layout.capacity, *x.shape[1:]), x.dtype), shapes)


def _run_alone(step, inputs, first, chunk, carry, record):
    """Step few lanes: each step reads and writes the large buffers. A fixed loop length saves 15 ns a step."""

    def body(number, state):
        carry, record = state
        carry, new = step(carry, inputs.of_step(first + number))
        return carry, write_step(record, new, first + number)

    return jax.lax.fori_loop(0, chunk, body, (carry, record))


def _run_abreast(step, inputs, first, chunk, carry, record):
    """Step many lanes through small buffers (steps, lanes, ...), in which the lanes of a step are adjacent.

    Writing each step into the large buffers would touch a page per lane and array.
    """
    u = jax.tree.map(lambda x: jnp.moveaxis(x, -1, 1), inputs.of_chunk(first, chunk))
    carry, new = jax.lax.scan(step, carry, u, length=chunk, unroll=1 if default_platform() == "cpu" else UNROLLED)
    write = lambda buffer, x: jax.lax.dynamic_update_slice_in_dim(buffer, jnp.swapaxes(x, 0, 1), first, 1)
    return carry, jax.tree.map(write, record, new)


# Steps per chunk, where the number of steps is traced.
CHUNK = 128
# Steps per turn of the loop on a GPU: their records are written, and their noise is read, by one launch for each array.
UNROLLED = 4


@register_dataclass
@dataclass(frozen=True)
class Sequential(LaneSolver):
    """Evaluate ``x[t] = fn(x[t-1], inputs[t])`` sequentially, t = 1..T, by one scan.

    Several chains run as lanes of the same scan. It needs neither a guess nor contraction: it is the reference for
    tests of all parallel solvers, and the fallback where a parallel solve would not pay.

    Example:
        >>> import jax.numpy as jnp, pmcmc
        >>> solution = pmcmc.recurrence.Sequential().solve(lambda x, u: 0.5 * x + u, 0.0, jnp.ones(3))
        >>> solution.value
        Array([1.  , 1.5 , 1.75], dtype=float32)
    """

    is_sequential: ClassVar[bool] = True
    unit: ClassVar[int] = CHUNK

    @property
    def decision(self):
        return "sequential"

    def blocks_for(self, length):
        return 1

    def solve_problem(self, problem: Problem) -> Solution:
        recurrence = problem.recurrence

        def body(carry, u):
            carry, aux = recurrence.step(carry, u)
            return carry, (recurrence.unknown(carry), aux)

        def one_chain(x0, inputs):
            return jax.lax.scan(body, recurrence.restore(x0), inputs, length=problem.length)[1]

        if problem.num_chains == 1:  # without a lane axis the step of a small model is cheaper
            single = one_chain(tree_index(problem.x0, 0), tree_index(problem.inputs, 0))
            value, aux = jax.tree.map(lambda x: x[None], single)
        else:
            value, aux = jax.vmap(one_chain)(problem.x0, problem.inputs)
        finite = finite_rows(value, 2) & finite_rows(problem.x0)[:, None]
        return _conclude(value, aux, leading_true(finite), problem.length)

    def solve_lanes(self, lanes: Lanes) -> Solution:
        """Solve like `solve_problem`, for a number of steps that may be traced; one lane per chain."""
        recurrence, layout, u = lanes.recurrence, lanes.layout, lanes.inputs.of_step(0)

        def one(carry: Any, u: Any) -> Any:
            carry, aux = recurrence.step(carry, u)
            return carry, (recurrence.unknown(carry), aux)

        if layout.num_chains == 1:
            first, add = lambda tree: tree_index(tree, 0), lambda tree: jax.tree.map(lambda x: x[None], tree)

            def step(carry, u):
                carry, record = one(carry, first(u))
                return carry, add(record)

            start = recurrence.restore(first(lanes.x0))
            shape, _ = jax.eval_shape(one, start, first(u))
        else:
            step, start = jax.vmap(one), jax.vmap(recurrence.restore)(lanes.x0)
            shape, _ = jax.eval_shape(step, start, u)
        start = jax.tree.map(lambda s, c: jnp.asarray(s, c.dtype), start, shape)
        _, (value, aux) = walk(step, start, lanes, math.gcd(layout.capacity, self.unit))
        within = jnp.arange(layout.capacity)[None] < layout.length
        finite = (finite_rows(value, 2) | ~within) & finite_rows(lanes.x0)[:, None]
        return _conclude(value, aux, jnp.minimum(leading_true(finite), layout.length), layout.length)


def _conclude(value: Any, aux: Any, finite_steps: Array, length: int | Array) -> Solution:
    """Return the solution, given the length of the finite prefix of each chain, ``finite_steps`` (C,)."""
    steps = jnp.full(finite_steps.shape, length)
    none = jnp.zeros_like(steps)
    finite, dtype = finite_steps == length, single_or_wider(real_dtype(value))
    return Solution(
        value=value,
        aux=aux,
        result=jnp.where(finite, RESULTS.successful, RESULTS.nonfinite),
        residual=jnp.where(finite, 0.0, jnp.inf).astype(dtype),
        stats=Stats(
            num_iters=none,
            num_sweeps=none,
            num_sequential_steps=steps,
            num_fn_evals=steps,
            certified_steps=finite_steps,
            growth_rate=jnp.full(steps.shape, jnp.nan, dtype),
            certified_residual=jnp.zeros(steps.shape, dtype),
        ),
    )
