"""Checks of numbers that users pass, the same for Python's and numpy's numbers. Booleans are no numbers here.

Fields of kernels and solvers are leaves of pytrees: they may also hold arrays, whose values may be unknown while a
program is traced. `check_int` and `known_number` let arrays pass.
"""

import operator
from numbers import Real
from typing import Any

import numpy as np


def as_int(name: str, value: Any, least: int, remedy: str = "") -> int:
    """Return an argument as an integer of at least ``least``.

    Args:
        name: Name of the argument.
        value: Its value.
        least: Least value that is allowed.
        remedy: Sentence that follows where it is less.

    Raises:
        ValueError: It is less than ``least``.
        TypeError: It is not an integer.
    """
    try:
        number = operator.index(value)
    except TypeError:
        number = None
    if number is None or isinstance(value, bool):
        raise TypeError(f"{name} must be an integer, got {value!r}.")
    if number < least:
        raise ValueError(f"{name} must be at least {least}, got {value}. {remedy}".rstrip())
    return number


def check_int(name: str, value: Any, least: int, remedy: str = "") -> None:
    """Raise an error if an argument is a number but not an integer of at least ``least``; see `as_int`."""
    if isinstance(value, (Real, np.bool_)):
        as_int(name, value, least, remedy)


def check_rate(name: str, value: Any) -> None:
    """Raise an error if an acceptance rate to tune to is a number outside of (0, 1); None and arrays pass.

    Raises:
        ValueError: It is.
        TypeError: It is a boolean.
    """
    rate = known_number(name, value)
    if rate is not None and not 0 < rate < 1:
        raise ValueError(
            f"{name} must lie between 0 and 1, both excluded, got {value}: leave it out, or pass 0.8, or 0.95 for "
            "smaller steps."
        )


def known_number(name: str, value: Any) -> Any:
    """Return an argument if it is a number, and None if its value may be unknown.

    Raises:
        TypeError: It is a boolean.
    """
    if isinstance(value, (bool, np.bool_)):
        raise TypeError(f"{name} must be a number, got {value!r}.")
    return value if isinstance(value, Real) else None
