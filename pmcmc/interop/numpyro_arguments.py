"""The arguments of a NumPyro model: which of them are arrays, and which cannot be read more than once."""

import inspect
from collections.abc import Callable
from typing import Any

import jax
import numpy as np


def array_arguments(model: Callable, args: tuple, kwargs: dict) -> dict[str, np.ndarray]:
    """Return copies of the arrays among a model's arguments, by the names of its parameters."""
    try:
        arguments = inspect.signature(model).bind(*args, **kwargs).arguments
    except (TypeError, ValueError):  # a callable without a signature
        return {}
    return {name: np.array(value) for name, value in arguments.items() if _is_array(value)}


def _is_array(leaf: Any) -> bool:
    """Whether a leaf is an array of numbers or booleans."""
    return isinstance(leaf, (np.ndarray, jax.Array)) and getattr(leaf.dtype, "kind", None) in set("fiub")


def refuse_iterators(args: tuple, kwargs: dict) -> None:
    """Raise an error if arguments of a model are iterators or hold some.

    The model runs several times, and the second time an iterator is empty: the data would be missing without a word.

    Raises:
        TypeError: They are.
    """
    for name, given in (("model_args", args), ("model_kwargs", kwargs)):
        if _holds_iterator(given):
            raise TypeError(
                f"{name} holds an iterator, such as map(...) or an open file, which is empty after the first of "
                "several runs of the model: pass list(...) of it, or an array."
            )


def _holds_iterator(value: Any) -> bool:
    """Whether a value is an iterator, or a list, tuple or dict that holds one."""
    if isinstance(value, dict):
        value = list(value.values())
    if isinstance(value, (list, tuple)):
        return any(map(_holds_iterator, value))
    return hasattr(type(value), "__next__")
