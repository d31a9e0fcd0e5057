"""ArviZ containers from draws. ArviZ is imported when a function here runs, not before."""

import inspect
from typing import Any

import numpy as np

from pmcmc._types import PyTree


def to_arviz(posterior: dict[str, PyTree], sample_stats: dict[str, np.ndarray], attrs: dict[str, Any]) -> Any:
    """`InferenceData` (ArviZ 0.x) or `xarray.DataTree` (ArviZ 1.x) from arrays with axes (chain, draw, ...)."""
    import arviz as az

    groups: dict[str, Any] = {
        "posterior": {name: np.asarray(value) for name, value in posterior.items()},
        "sample_stats": {name: np.asarray(value) for name, value in sample_stats.items()},
    }
    # ArviZ 1.0 replaced one keyword per group by one dict of groups.
    if "data" in inspect.signature(az.from_dict).parameters:
        return az.from_dict(groups, attrs={"/": attrs, **{name: attrs for name in groups}})
    return az.from_dict(**groups, attrs=attrs)
