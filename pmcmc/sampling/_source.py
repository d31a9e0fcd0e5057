"""Where a run's model comes from."""

from collections.abc import Callable

from pmcmc._state import Source
from pmcmc._types import PyTree
from pmcmc.interop._numpyro import array_arguments, numpyro_target
from pmcmc.target import Target


def model_source(model: Callable, model_args: tuple, model_kwargs: dict) -> Source:
    """A NumPyro model with its arguments as they are now."""
    make = lambda: numpyro_target(model, model_args, model_kwargs)
    return Source(make, make(), array_arguments(model, model_args, model_kwargs))


def density_source(logdensity_fn: Callable | None, position: PyTree) -> Source:
    """A log density over pytrees like ``position`` as it is now."""
    target = Target.from_logdensity(logdensity_fn, position)
    return Source(lambda: Target.from_logdensity(logdensity_fn, target.spec.template), target, {})
