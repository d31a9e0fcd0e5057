"""Pytrees as vectors, and reductions over pytrees that do not lose NaN.

On CPU ``jnp.max`` silently drops NaN for large arrays, so no norm here is trusted to carry one:
finiteness is always tested on its own.
"""

import math
from dataclasses import dataclass, fields
from typing import Any

import jax
import jax.numpy as jnp

from pmcmc._typing import Array, ArrayLeaf, PyTree


def register_dataclass(cls: type) -> type:
    """Class decorator: a dataclass as a pytree whose fields are leaves, but for those with metadata ``static=True``.

    Differs from ``jax.tree_util.register_dataclass`` in one thing: the class is part of the structure. There, in jax
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
    """How a pytree of arrays maps to one real vector and back; hashable, so it can be static in a jit.

    Unlike ``jax.flatten_util.ravel_pytree`` the inverse is a value that compares equal across calls,
    which is what keeps two calls with the same shapes at one compilation.
    """

    treedef: Any
    shapes: tuple[tuple[int, ...], ...]
    dtypes: tuple[Any, ...]

    @classmethod
    def of(cls, tree: PyTree) -> "RavelSpec":
        leaves, treedef = jax.tree.flatten(tree)
        return cls(treedef, tuple(jnp.shape(x) for x in leaves), tuple(jnp.result_type(x) for x in leaves))

    @property
    def size(self) -> int:
        return sum(math.prod(shape) for shape in self.shapes)

    @property
    def dtype(self) -> Any:
        """The widest floating dtype among the leaves (the default float where there is none)."""
        return real_dtype(self.template)

    @property
    def template(self) -> PyTree:
        """Shapes and dtypes in the place of the leaves."""
        leaves = [jax.ShapeDtypeStruct(*leaf) for leaf in zip(self.shapes, self.dtypes, strict=True)]
        return jax.tree.unflatten(self.treedef, leaves)

    def ravel(self, tree: PyTree) -> Array:
        """The leaves of ``tree``, flattened and joined: shape ``(size,)``."""
        leaves = [jnp.ravel(x).astype(self.dtype) for x in jax.tree.leaves(tree)]
        return leaves[0] if len(leaves) == 1 else jnp.concatenate(leaves)

    def unravel(self, vectors: ArrayLeaf) -> PyTree:
        """Inverse of `ravel`, of one vector or of many: (..., size)."""
        leaves, start = [], 0
        for shape, dtype in zip(self.shapes, self.dtypes, strict=True):
            stop = start + math.prod(shape)
            leaves.append(vectors[..., start:stop].reshape(*vectors.shape[:-1], *shape).astype(dtype))
            start = stop
        return jax.tree.unflatten(self.treedef, leaves)


def is_real(x: Any) -> bool:
    """Whether a leaf (array, number or shape) is compared by distance (floating), not equality (integer, boolean)."""
    return jnp.issubdtype(jnp.result_type(x), jnp.floating)


def tree_index(tree: PyTree, index: Any) -> PyTree:
    """``x[index]`` of every leaf."""
    return jax.tree.map(lambda x: x[index], tree)


def expand_mask(mask: Array, like: Array) -> Array:
    """``mask`` with trailing axes of length one, so that it broadcasts against ``like``."""
    return mask.reshape(mask.shape + (1,) * (like.ndim - mask.ndim))


def tree_where(mask: Array, on_true: PyTree, on_false: PyTree) -> PyTree:
    """Leaf-wise ``where`` with a mask over the leading axes."""
    return jax.tree.map(lambda a, b: jnp.where(expand_mask(mask, a), a, b), on_true, on_false)


def finite_rows(tree: PyTree, num_axes: int = 1) -> Array:
    """For each index of the leading ``num_axes`` axes: are all real entries finite?"""
    leaves = [x for x in jax.tree.leaves(tree)]
    shape = leaves[0].shape[:num_axes]
    flags = [jnp.all(jnp.isfinite(x), axis=tuple(range(num_axes, x.ndim))) for x in leaves if is_real(x)]
    out = jnp.ones(shape, bool)
    for flag in flags:
        out = out & flag
    return out


def leading_true(mask: Array) -> Array:
    """Length of the run of True at the start of the last axis."""
    return jnp.where(jnp.all(mask, -1), mask.shape[-1], jnp.argmin(mask, -1))


def all_finite(tree: PyTree) -> Array:
    """True where every real entry of the pytree is finite."""
    return jnp.all(finite_rows(tree, 0))


def relative_distance(a: PyTree, b: PyTree, scale: PyTree, num_axes: int = 1) -> Array:
    """``max |a - b| / scale`` over everything behind the leading axes.

    ``scale`` has the structure of one state (no leading axes). Equal entries are at distance 0 whatever
    the scale; entries that are not finite, or integers that differ, are at distance inf.
    """

    def leaf(x, y, s):
        axes = tuple(range(num_axes, x.ndim))
        if not is_real(x):
            return jnp.where(jnp.all(x == y, axis=axes), 0.0, jnp.inf)
        gap = jnp.abs(x - y)
        ratio = jnp.where(gap == 0, 0.0, gap / jnp.broadcast_to(s, x.shape))
        worst = jnp.max(ratio, axis=axes, initial=0.0)
        return jnp.where(jnp.all(jnp.isfinite(ratio), axis=axes), worst, jnp.inf)

    distances = jax.tree.leaves(jax.tree.map(leaf, a, b, scale))
    out = distances[0]
    for distance in distances[1:]:
        out = jnp.maximum(out, distance)
    return out


def within_rounding(a: Array, b: Array, ulps: float = 2.0) -> Array:
    """Rows of two arrays ``(T, D)`` whose entries differ by at most ``ulps`` units of rounding at their size."""
    gap = ulps * jnp.finfo(a.dtype).eps * jnp.maximum(jnp.abs(a), jnp.abs(b))
    return jnp.all(jnp.abs(a - b) <= gap, axis=-1)


def real_dtype(tree: PyTree) -> Any:
    """The widest floating dtype among the leaves (the default float where there is none)."""
    dtypes = [jnp.result_type(x) for x in jax.tree.leaves(tree) if is_real(x)]
    return jnp.result_type(*dtypes) if dtypes else jnp.result_type(float)
