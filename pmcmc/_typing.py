"""Type aliases shared by the whole package."""

from typing import Annotated, Any

from jaxtyping import Array, Bool, Float, Int, PyTree

__all__ = ["Array", "ArrayLeaf", "Bool", "Float", "Int", "PRNGKey", "PyTree", "Scalar"]


# A typed key (jax.random.key) or a raw uint32 key (jax.random.PRNGKey).
PRNGKey = Any


# A Python number or a 0-d array.
Scalar = Annotated[Any, "no axes"]


# An array as a field of a pytree. Any, because jax also rebuilds pytrees with its own placeholders as leaves.
ArrayLeaf = Any
