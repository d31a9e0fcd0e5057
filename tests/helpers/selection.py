"""Which cases of a test run every time, and which in the slow leg alone."""

from collections.abc import Iterable, Mapping
from typing import Any

import pytest


def share(cases: Iterable[str] | Mapping[str, Any], *fast: str) -> list:
    """Parameters of a test: those named in ``fast``, and the rest marked slow.

    For cases that prove one statement of several things: each in CI, one or two of its kind in `make test`. cases:
    names, which are the parameters, or parameters by name.
    """
    table = cases if isinstance(cases, Mapping) else {name: name for name in cases}
    if unknown := set(fast) - set(table):
        raise ValueError(f"no such cases: {sorted(unknown)}")
    marks = {name: () if name in fast else pytest.mark.slow for name in table}
    return [pytest.param(value, id=name, marks=marks[name]) for name, value in table.items()]
