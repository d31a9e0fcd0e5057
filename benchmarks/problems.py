"""NumPyro models by name: those of `benchmarks.models`, `benchmarks.posteriors`, and posteriordb's in ``../shared``."""

import functools
import sys
from collections.abc import Callable
from importlib.util import module_from_spec, spec_from_file_location
from typing import Any, NamedTuple

import numpy as np

from benchmarks._harness import SHARED
from benchmarks.models import MODELS
from benchmarks.posteriors import POSTERIORS


class Problem(NamedTuple):
    """A NumPyro model with its arguments.

    Attributes:
        model: The model.
        args: Positional arguments.
        kwargs: Keyword arguments.
        reference: Moments of posteriordb's reference draws by name, or None.
        parameters: Sites whose draws are compared; None compares all.
    """

    model: Callable
    args: tuple
    kwargs: dict
    reference: dict[str, Any] | None
    parameters: tuple[str, ...] | None = None


@functools.cache
def posteriordb() -> dict[str, Any]:
    """Return the public posteriors by name; an empty dict if the folder is absent."""
    path = SHARED / "posteriordb" / "posteriors.py"
    if not path.exists():
        print(f"posteriordb's posteriors are absent ({path.parent.name} in the shared folder): skipped.")
        return {}
    spec: Any = spec_from_file_location("posteriordb_posteriors", path)
    module = sys.modules[spec.name] = module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.POSTERIORS


def of_model(name: str, data: dict[str, np.ndarray] | None = None) -> Problem:
    """Return one of `benchmarks.models`, given its data or with data made anew."""
    found = MODELS[name]()
    public = posteriordb().get(found.reference) if found.reference else None
    reference = public.reference() if public else None
    return Problem(found.numpyro, (), found.data() if data is None else data, reference, found.parameters)


def problem(name: str) -> Problem:
    """Return a posterior by name: eight schools, one of `benchmarks.posteriors`, or one of posteriordb."""
    if name == "eight_schools":
        return of_model(name)
    if name in POSTERIORS:
        found = POSTERIORS[name]()
        if not found.is_density:
            return Problem(found.model, found.arguments, {}, None)
        # NumPyro samples a log density as a factor of a flat site.
        return Problem(functools.partial(_flat_model, found.model, found.dim), (), {}, None)
    public = posteriordb()[name]
    return Problem(public.model, public.model_args, public.model_kwargs, public.reference())


def _flat_model(logdensity: Callable, dim: int) -> None:
    """A log density as a NumPyro model: a factor of a flat site."""
    import numpyro
    import numpyro.distributions as dist

    x = numpyro.sample("x", dist.ImproperUniform(dist.constraints.real_vector, (), (dim,)))
    numpyro.factor("density", logdensity(x))
