"""Pytrees: types, registration, conversion to vectors, masks, and the one distance between states.

On CPU ``jnp.max`` silently drops NaN for large arrays. No reduction here relies on NaN passing through it:
finiteness is always tested separately.
"""

import math
from dataclasses import dataclass, fields
from typing import Annotated, Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, PyTree

__all__ = ["Array", "ArrayLeaf", "Bool", "Float", "Int", "PRNGKey", "PyTree", "Scalar"]


# A typed key (jax.random.key) or a raw uint32 key (jax.random.PRNGKey).
PRNGKey = Any


# A Python number or a 0-d array.
Scalar = Annotated[Any, "no axes"]


# An array as a field of a pytree. Any, because jax also rebuilds pytrees with its own placeholders as leaves.
ArrayLeaf = Any


def register_dataclass(cls: type) -> type:
    """Register a dataclass as a pytree; fields with metadata ``static=True`` are static, all others are leaves.

    Differs from ``jax.tree_util.register_dataclass`` in one point: the class is part of the tree structure. In jax
    0.10.2, two classes with the same fields have equal structures with different hashes, so about one in 300 such
    pairs shared a slot of jit's cache, and one class ran the other's program.

    Example:
        >>> @register_dataclass
        ... @dataclass(frozen=True)
        ... class Damped:
        ...     factor: float
        >>> jax.tree.leaves(Damped(0.5))
        [0.5]
    """
    static = [f.name for f in fields(cls) if f.metadata.get("static", False)]
    dynamic = [f.name for f in fields(cls) if f.name not in static]

    def flatten(obj: Any) -> tuple[list, tuple]:
        return [getattr(obj, name) for name in dynamic], (cls, *(getattr(obj, name) for name in static))

    def flatten_with_keys(obj: Any) -> tuple[list, tuple]:
        children, aux = flatten(obj)
        return [(jax.tree_util.GetAttrKey(n), child) for n, child in zip(dynamic, children, strict=True)], aux

    def unflatten(aux: tuple, children: Any) -> Any:
        obj: Any = object.__new__(cls)
        for name, value in (*zip(dynamic, children, strict=True), *zip(static, aux[1:], strict=True)):
            object.__setattr__(obj, name, value)
        return obj

    jax.tree_util.register_pytree_with_keys(cls, flatten_with_keys, unflatten, flatten)
    return cls


@dataclass(frozen=True)
class RavelSpec:
    """How a pytree of arrays maps to one real vector and back.

    Unlike the closure that ``jax.flatten_util.ravel_pytree`` returns, a spec is hashable and compares equal across
    calls. It can therefore be static in a jit, and calls with the same shapes share one compilation.

    Attributes:
        treedef: Structure of the pytree.
        shapes: Shape of each leaf.
        dtypes: Dtype of each leaf.
    """

    treedef: Any
    shapes: tuple[tuple[int, ...], ...]
    dtypes: tuple[Any, ...]

    @classmethod
    def of(cls, tree: PyTree) -> "RavelSpec":
        """Return the spec of a pytree of arrays or shapes."""
        leaves, treedef = jax.tree.flatten(tree)
        return cls(treedef, tuple(jnp.shape(x) for x in leaves), tuple(jnp.result_type(x) for x in leaves))

    @property
    def size(self) -> int:
        """Total number of entries, the length of the vector."""
        return sum(math.prod(shape) for shape in self.shapes)

    @property
    def dtype(self) -> Any:
        """Widest floating dtype among the leaves; the default float if no leaf is floating."""
        return real_dtype(self.template)

    @property
    def template(self) -> PyTree:
        """The pytree with a ``jax.ShapeDtypeStruct`` for each leaf."""
        leaves = [jax.ShapeDtypeStruct(*leaf) for leaf in zip(self.shapes, self.dtypes, strict=True)]
        return jax.tree.unflatten(self.treedef, leaves)

    def ravel(self, tree: PyTree) -> Array:
        """Flatten and concatenate the leaves of ``tree``, shape ``(size,)``."""
        leaves = [jnp.ravel(x).astype(self.dtype) for x in jax.tree.leaves(tree)]
        return leaves[0] if len(leaves) == 1 else jnp.concatenate(leaves)

    def unravel(self, vectors: ArrayLeaf) -> PyTree:
        """Inverse of `ravel`, for one vector or many, shape ``(..., size)``."""
        leaves, start = [], 0
        for shape, dtype in zip(self.shapes, self.dtypes, strict=True):
            stop = start + math.prod(shape)
            leaves.append(vectors[..., start:stop].reshape(*vectors.shape[:-1], *shape).astype(dtype))
            start = stop
        return jax.tree.unflatten(self.treedef, leaves)


def is_real(x: Any) -> bool:
    """Whether a leaf (array, number or shape) is floating.

    Floating leaves are compared by distance, integer and boolean ones by equality.
    """
    return jnp.issubdtype(jnp.result_type(x), jnp.floating)


def tree_index(tree: PyTree, index: Any) -> PyTree:
    """Return ``x[index]`` for every leaf x."""
    return jax.tree.map(lambda x: x[index], tree)


def expand_mask(mask: Array, like: Array) -> Array:
    """Append axes of length one to ``mask`` so that it broadcasts against ``like``."""
    return mask.reshape(mask.shape + (1,) * (like.ndim - mask.ndim))


def tree_where(mask: Array, on_true: PyTree, on_false: PyTree) -> PyTree:
    """Apply ``jnp.where`` to each leaf, with a mask over the leading axes."""
    return jax.tree.map(lambda a, b: jnp.where(expand_mask(mask, a), a, b), on_true, on_false)


def finite_rows(tree: PyTree, num_axes: int = 1) -> Array:
    """For each index of the leading ``num_axes`` axes, whether all real and complex entries are finite."""
    leaves = jax.tree.leaves(tree)
    shape, inexact = leaves[0].shape[:num_axes], [x for x in leaves if jnp.issubdtype(x.dtype, jnp.inexact)]
    flags = [jnp.all(jnp.isfinite(x), axis=tuple(range(num_axes, x.ndim))) for x in inexact]
    out = jnp.ones(shape, bool)
    for flag in flags:
        out = out & flag
    return out


def leading_true(mask: Array) -> Array:
    """Length of the run of True at the start of the last axis."""
    return jnp.where(jnp.all(mask, -1), mask.shape[-1], jnp.argmin(mask, -1))


def all_finite(tree: PyTree) -> Array:
    """Whether every real and complex entry of the pytree is finite; a scalar."""
    return jnp.all(finite_rows(tree, 0))


def relative_gap(x: ArrayLeaf, y: ArrayLeaf, scale: ArrayLeaf) -> Array:
    """Return ``|x - y| / scale`` by entry, at least in float32; equal entries are at distance 0 whatever the scale.

    A scale that is not positive and finite counts as 0: others than equal entries are then at distance inf.
    """
    gap = at_least_single(jnp.abs(x - y))
    unit = jnp.where((scale > 0) & jnp.isfinite(scale), scale, 0)
    return jnp.where(gap == 0, 0.0, gap / jnp.broadcast_to(unit, x.shape))


def relative_distance(a: PyTree, b: PyTree, scale: PyTree, num_axes: int = 1) -> Array:
    """Largest ``|a - b| / scale`` over all axes after the leading ``num_axes``, and over all leaves.

    Equal entries have distance 0 whatever the scale. Entries that are not finite, and integers that differ, have
    distance inf.

    Args:
        a: Pytree of arrays.
        b: Pytree of the same structure and shapes.
        scale: Structure of one state, without the leading axes.
        num_axes: Leading axes that the result keeps.

    Returns:
        Distances, with the shape of the leading axes.
    """

    def leaf(x, y, s):
        axes = tuple(range(num_axes, x.ndim))
        if not is_real(x):
            return jnp.where(jnp.all(x == y, axis=axes), 0.0, jnp.inf)
        ratio = relative_gap(x, y, s)
        worst = jnp.max(ratio, axis=axes, initial=0.0)
        return jnp.where(jnp.all(jnp.isfinite(ratio), axis=axes), worst, jnp.inf)

    distances = jax.tree.leaves(jax.tree.map(leaf, a, b, scale))
    out = distances[0]
    for distance in distances[1:]:
        out = jnp.maximum(out, distance)
    return out


def single_or_wider(dtype: Any) -> Any:
    """Return an inexact dtype, or float32 if it is narrower."""
    return jnp.dtype(jnp.float32) if jnp.finfo(dtype).bits < 32 else jnp.dtype(dtype)


def at_least_single(x: Array) -> Array:
    """Return a floating array in float32 if its dtype is narrower; LAPACK has no half precision."""
    return x.astype(single_or_wider(x.dtype))


def within_rounding(a: Array, b: Array, ulps: float = 2.0) -> Array:
    """Whether rows of two arrays ``(T, D)`` agree to ``ulps`` units of rounding at the size of each entry; ``(T,)``."""
    gap = ulps * jnp.finfo(a.dtype).eps * jnp.maximum(jnp.abs(a), jnp.abs(b))
    return jnp.all(jnp.abs(a - b) <= gap, axis=-1)


def real_dtype(tree: PyTree) -> Any:
    """Widest floating dtype among the leaves; the default float if no leaf is floating."""
    dtypes = [jnp.result_type(x) for x in jax.tree.leaves(tree) if is_real(x)]
    return jnp.result_type(*dtypes) if dtypes else jnp.result_type(float)


def known_values(x: Any) -> np.ndarray | None:
    """Return a number or an array in numpy; None if its values are unknown, as while a program is traced."""
    if isinstance(x, jax.core.Tracer) or (isinstance(x, jax.Array) and not x.is_fully_addressable):
        return None
    return np.asarray(x)
