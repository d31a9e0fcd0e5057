"""Type aliases shared by all rooms."""

from typing import Annotated, Any

from jaxtyping import Array, Bool, Float, Int, PyTree

__all__ = ["Array", "ArrayLeaf", "Bool", "Float", "Int", "PRNGKey", "PyTree", "Scalar"]


PRNGKey = Any  # a typed key (jax.random.key) or a raw uint32 key (jax.random.PRNGKey)


Scalar = Annotated[Any, "no axes"]  # a Python number or a 0-d array


ArrayLeaf = Any  # an array as a field of a pytree; jax also rebuilds pytrees with its own placeholders as leaves
