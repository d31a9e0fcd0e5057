"""Select which cases of a test run every time, and which only in the slow leg."""

from collections.abc import Iterable, Mapping
from typing import Any

import pytest


def share(cases: Iterable[str] | Mapping[str, Any], *fast: str) -> list:
    """Return the parameters of a test: those named in ``fast`` as they are, the rest marked slow.

    Use it for cases that show the same thing several times: all run in CI, one or two of each kind in `make test`.

    Args:
        cases: Names, which are the parameters, or parameters by name.
        fast: Names of the cases that always run.
    """
    table = cases if isinstance(cases, Mapping) else {name: name for name in cases}
    if unknown := set(fast) - set(table):
        raise ValueError(f"no such cases: {sorted(unknown)}")
    marks = {name: () if name in fast else pytest.mark.slow for name in table}
    return [pytest.param(value, id=name, marks=marks[name]) for name, value in table.items()]
