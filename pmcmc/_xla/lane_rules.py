"""How each primitive acts on values whose last axis is lanes: the rules of `pmcmc._xla.lanes_last`.

A rule takes an equation of the program of one lane, its operands, of which at least one is `Wide`, and the number of
lanes. It returns the results, or NotImplemented if ``jax.vmap`` has to do it. Axes of one lane keep their numbers,
because lanes come after them.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from pmcmc._pytree import Array, single_or_wider
from pmcmc._xla import evaluate
from pmcmc._xla.rewrites import ELEMENTWISE, REDUCTIONS

# Products of which a lane takes at most this many multiplications are sums of products, which XLA fuses with the rest.
SMALL_PRODUCT = 1024


class Wide(NamedTuple):
    """A value that differs between lanes.

    Attributes:
        value: The values of all lanes; the last axis is lanes.
    """

    value: Array


def is_wide(x: Any) -> bool:
    """Whether a value differs between lanes."""
    return isinstance(x, Wide)


def raw(x: Any) -> Any:
    """Return the array of a value, wide or shared."""
    return x.value if isinstance(x, Wide) else x


def lane_shape(var: Any) -> tuple[int, ...]:
    """Return the shape of one lane of an operand or a result of an equation."""
    return tuple(var.aval.shape)


def widen(x: Any, shape: tuple[int, ...], size: int) -> Wide:
    """Return a value of one lane's ``shape``, or a number, as a wide one of this shape, for ``size`` lanes."""
    if isinstance(x, Wide) and x.value.ndim == len(shape) + 1:
        return x
    if isinstance(x, Wide):  # one number a lane
        return Wide(jax.lax.broadcast_in_dim(x.value, (*shape, size), (len(shape),)))
    x = jnp.asarray(x)
    return Wide(jax.lax.broadcast_in_dim(x, (*shape, size), tuple(range(x.ndim))))


def bind(equation: Any, *operands: Any, **changed: Any) -> list[Any]:
    """Evaluate the primitive of an equation, with some parameters changed; returns a list of results."""
    out = evaluate(equation, operands, {**equation.params, **changed})
    return list(out) if equation.primitive.multiple_results else [out]


def _as_it_is(equation: Any, operands: list[Any], size: int) -> list[Any]:
    """Primitives whose parameters number the axes from the front."""
    given = [widen(x, lane_shape(var), size).value for x, var in zip(operands, equation.invars, strict=True)]
    return list(map(Wide, bind(equation, *given)))


def _elementwise(equation: Any, operands: list[Any], size: int) -> list[Any]:
    """Elementwise functions; numbers among the operands are spread over the result's shape."""
    shape = lane_shape(equation.outvars[0])
    return list(map(Wide, bind(equation, *(widen(x, shape, size).value for x in operands))))


def _bitcast(equation: Any, operands: list[Any], size: int) -> Any:
    """A bitcast, if it keeps the shape."""
    same = lane_shape(equation.invars[0]) == lane_shape(equation.outvars[0])
    return _elementwise(equation, operands, size) if same else NotImplemented


def _select(equation: Any, operands: list[Any], size: int) -> list[Any]:
    """A choice between arrays. One that is shared, and a single one, stays single."""
    which, shape = operands[0], lane_shape(equation.outvars[0])
    if is_wide(which) or jnp.ndim(which):
        which = widen(which, shape, size).value
    return [Wide(jax.lax.select_n(which, *(widen(x, shape, size).value for x in operands[1:])))]


def _barrier(equation: Any, operands: list[Any], size: int) -> list[Any]:
    """An optimisation barrier: shared operands stay shared."""
    return [Wide(y) if is_wide(x) else y for x, y in zip(operands, bind(equation, *map(raw, operands)), strict=True)]


def _broadcast(equation: Any, operands: list[Any], size: int) -> list[Any]:
    """New axes in front of the lanes."""
    shape, axes = lane_shape(equation.outvars[0]), equation.params["broadcast_dimensions"]
    return [Wide(jax.lax.broadcast_in_dim(operands[0].value, (*shape, size), (*axes, len(shape))))]


def _reshape(equation: Any, operands: list[Any], size: int) -> Any:
    """Another shape with the same order of entries: reshape, squeeze and expand_dims."""
    if equation.params.get("dimensions") is not None and equation.primitive.name == "reshape":
        return NotImplemented
    return [Wide(jax.lax.reshape(operands[0].value, (*lane_shape(equation.outvars[0]), size)))]


def _transpose(equation: Any, operands: list[Any], size: int) -> list[Any]:
    """Another order of one lane's axes."""
    order = equation.params["permutation"]
    return [Wide(jax.lax.transpose(operands[0].value, (*order, len(order))))]


def _slice(equation: Any, operands: list[Any], size: int) -> list[Any]:
    """A slice, of every lane."""
    params = equation.params
    strides = None if params["strides"] is None else (*params["strides"], 1)
    limits = (*params["limit_indices"], size)
    return [Wide(jax.lax.slice(operands[0].value, (*params["start_indices"], 0), limits, strides))]


def _pad(equation: Any, operands: list[Any], size: int) -> Any:
    """Padding with a number that is shared."""
    x, padding = operands
    if is_wide(padding):
        return NotImplemented
    config = (*equation.params["padding_config"], (0, 0, 0))
    return [Wide(jax.lax.pad(x.value, padding, config))]


def _tile(equation: Any, operands: list[Any], size: int) -> list[Any]:
    """Repetitions of one lane's axes."""
    return list(map(Wide, bind(equation, operands[0].value, reps=(*equation.params["reps"], 1))))


def _dynamic_slice(equation: Any, operands: list[Any], size: int) -> Any:
    """A slice at shared indices."""
    x, *start = operands
    if any(map(is_wide, start)):
        return NotImplemented
    # Indices are those of the primitive, which does not count negative ones from the end.
    sizes = (*equation.params["slice_sizes"], size)
    return [Wide(y) for y in bind(equation, x.value, *start, _zero_like(start), slice_sizes=sizes)]


def _dynamic_update_slice(equation: Any, operands: list[Any], size: int) -> Any:
    """An update at shared indices."""
    x, update, *start = operands
    if any(map(is_wide, start)):
        return NotImplemented
    x, update = (widen(v, lane_shape(var), size).value for v, var in zip((x, update), equation.invars, strict=False))
    return [Wide(y) for y in bind(equation, x, update, *start, _zero_like(start))]


def _zero_like(start: list[Any]) -> Any:
    """Return an index 0 of the type of the other indices, which must agree."""
    return np.zeros((), start[0].dtype) if start else np.zeros((), np.int32)


def _gather(equation: Any, operands: list[Any], size: int) -> Any:
    """A gather at shared indices: lanes are one more axis of each slice."""
    x, indices = operands
    if is_wide(indices):
        return NotImplemented
    numbers = equation.params["dimension_numbers"]
    last = len(lane_shape(equation.outvars[0]))
    changed = dict(
        dimension_numbers=numbers._replace(offset_dims=(*numbers.offset_dims, last)),
        slice_sizes=(*equation.params["slice_sizes"], size),
    )
    return [Wide(y) for y in bind(equation, x.value, indices, **changed)]


def _scatter(equation: Any, operands: list[Any], size: int) -> Any:
    """A scatter at shared indices: lanes are one more axis of each update."""
    x, indices, updates = operands
    if is_wide(indices):
        return NotImplemented
    numbers = equation.params["dimension_numbers"]
    last = len(lane_shape(equation.invars[2]))
    numbers = numbers._replace(update_window_dims=(*numbers.update_window_dims, last))
    x, updates = (widen(v, lane_shape(equation.invars[n]), size).value for n, v in ((0, x), (2, updates)))
    return [Wide(y) for y in bind(equation, x, indices, updates, dimension_numbers=numbers)]


def _product(equation: Any, operands: list[Any], size: int) -> Any:
    """``dot_general``: small ones as sums of products, a shared operand as one product of all lanes."""
    left, right = operands
    (axes, other_axes), (batch, other_batch) = equation.params["dimension_numbers"]
    contracted = math.prod(lane_shape(equation.invars[0])[axis] for axis in axes)
    dtype = equation.outvars[0].aval.dtype
    if math.prod(lane_shape(equation.outvars[0])) * contracted <= SMALL_PRODUCT and jnp.issubdtype(dtype, jnp.inexact):
        return [_sum_of_products(equation, operands, size)]
    if is_wide(left) and is_wide(right):
        return NotImplemented
    if is_wide(right):
        return [Wide(y) for y in bind(equation, left, right.value)]
    # The wide operand has to be the right one, so that lanes come last; then restore the order of the other axes.
    precision = equation.params["precision"]
    precision = precision[::-1] if isinstance(precision, tuple) else precision
    numbers = ((other_axes, axes), (other_batch, batch))
    (out,) = bind(equation, right, left.value, dimension_numbers=numbers, precision=precision)
    num_batch, rank = len(batch), len(lane_shape(equation.outvars[0]))
    num_left = len(lane_shape(equation.invars[0])) - num_batch - len(axes)
    num_right = rank - num_batch - num_left
    first_left = num_batch + num_right
    order = (*range(num_batch), *range(first_left, rank), *range(num_batch, first_left), rank)
    return [Wide(jax.lax.transpose(out, order))]


def _sum_of_products(equation: Any, operands: list[Any], size: int) -> Wide:
    """``dot_general`` as a sum over the contracted axes, which come first; of half precision in float32."""
    (axes, other_axes), (batch, other_batch) = equation.params["dimension_numbers"]
    dtype = equation.outvars[0].aval.dtype
    wide = single_or_wider(dtype)
    ranks = [len(lane_shape(var)) for var in equation.invars]
    free = [n for n in range(ranks[0]) if n not in (*axes, *batch)]
    other_free = [n for n in range(ranks[1]) if n not in (*other_axes, *other_batch)]

    def arranged(x: Any, rank: int, order: Sequence[int], gap: tuple[int, int]) -> Array:
        """Put axes in this order, with ``gap[1]`` axes of length one at place ``gap[0]``, and lanes last."""
        value, order = (x.value, (*order, rank)) if is_wide(x) else (jnp.asarray(x), tuple(order))
        value = jax.lax.transpose(value, order).astype(wide)
        shape = (*value.shape[: gap[0]], *(1,) * gap[1], *value.shape[gap[0] :], *(() if is_wide(x) else (1,)))
        return value.reshape(shape)

    left = arranged(operands[0], ranks[0], (*axes, *batch, *free), (ranks[0], len(other_free)))
    right = arranged(
        operands[1], ranks[1], (*other_axes, *other_batch, *other_free), (len(axes) + len(batch), len(free))
    )
    return Wide(jnp.sum(left * right, axis=tuple(range(len(axes))), dtype=wide).astype(dtype))


Rule = Callable[[Any, list[Any], int], Any]
# Elementwise functions that XLA expands to loops, or that act on complex numbers.
_SPECIAL = """bessel_i0e bessel_i1e complex conj igamma igamma_grad_a igammac imag polygamma random_gamma_grad
regularized_incomplete_beta threefry2x32 zeta"""
# The rules, by the name of the primitive.
RULES: dict[str, Rule] = {
    **dict.fromkeys(ELEMENTWISE.split() + _SPECIAL.split(), _elementwise),
    **dict.fromkeys([*REDUCTIONS.split(), "concatenate", "rev", "sort", "split", "stack", "unstack"], _as_it_is),
    **dict.fromkeys(["expand_dims", "reshape", "squeeze"], _reshape),
    **dict.fromkeys(["scatter", "scatter-add", "scatter-max", "scatter-min", "scatter-mul"], _scatter),
    "bitcast_convert_type": _bitcast,
    "broadcast_in_dim": _broadcast,
    "dot_general": _product,
    "dynamic_slice": _dynamic_slice,
    "dynamic_update_slice": _dynamic_update_slice,
    "gather": _gather,
    "optimization_barrier": _barrier,
    "pad": _pad,
    "select_n": _select,
    "slice": _slice,
    "tile": _tile,
    "transpose": _transpose,
}
