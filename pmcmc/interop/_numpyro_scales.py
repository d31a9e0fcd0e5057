"""Latent sites of location-scale families: their scales, and how each is written in a non-centred form.

NumPyro is imported when a function here runs, not before.
"""

from typing import Any

import jax.numpy as jnp

from pmcmc._types import Array

# What `LocScaleReparam` appends to the name of a site for the one that it samples in its place.
DECENTERED = "_decentered"


def scales(sites: dict[str, dict]) -> dict[str, Array]:
    """The scale of each latent site of a location-scale family. sites: sample sites of a trace."""
    return {name: jnp.asarray(fn.scale) for name, fn in _families(sites).items()}


def non_centred_forms(sites: dict[str, dict], active: dict[str, list]) -> tuple[tuple[str, str], ...]:
    """What to write for a non-centred form of each of these sites, as the end of a sentence.

    sites: all of a trace. active: by sample site, the configurations of the ``reparam`` handlers within which it was
    sampled.
    """
    drawn = {name: site for name, site in sites.items() if site["type"] == "sample"}
    return tuple((name, _form(name, fn, sites, active.get(name, []))) for name, fn in _families(drawn).items())


def active_reparams() -> list:
    """Configurations of the ``reparam`` handlers that see the site at hand."""
    from numpyro import handlers
    from numpyro.primitives import _PYRO_STACK

    return [handler.config for handler in _PYRO_STACK if isinstance(handler, handlers.reparam)]


def _families(sites: dict[str, dict]) -> dict[str, Any]:
    """Distributions with a location and a scale, without what wraps them, of latent sites."""
    from numpyro.distributions import ExpandedDistribution, Independent, MaskedDistribution

    found = {}
    for name, site in sites.items():
        if site.get("is_observed", False):
            continue
        fn = site["fn"]
        while isinstance(fn, (ExpandedDistribution, Independent, MaskedDistribution)):
            fn = fn.base_dist
        if hasattr(fn, "loc") and hasattr(fn, "scale"):
            found[name] = fn
    return found


def _form(name: str, fn: Any, sites: dict[str, dict], configs: list) -> str:
    from numpyro.distributions import constraints

    others = [parameter for parameter in fn.arg_constraints if parameter not in ("loc", "scale")]
    reparam = f"LocScaleReparam(0{f', shape_params={others}' if others else ''})"
    if (root := _reparametrised(name, sites, configs)) != name:
        return f"put numpyro.infer.reparam.{reparam} in place of what reparametrises {root!r} now"
    if fn.support is not constraints.real:
        return f"write {name!r} as a function of a site whose distribution does not depend on them"
    return (
        f"try a non-centred form, for instance numpyro.handlers.reparam(model, config={{{name!r}: "
        f"numpyro.infer.reparam.{reparam}}})"
    )


def _reparametrised(name: str, sites: dict[str, dict], configs: list) -> str:
    """The site of the model that ``name`` stands for: itself, unless `LocScaleReparam` made it.

    Then the site it was made for is recorded as deterministic, and one of the handlers names it. A configuration that
    is a function is taken to do so. Reparametrisations may be nested.
    """
    from numpyro.infer.reparam import LocScaleReparam

    while name.endswith(DECENTERED):
        root = name.removesuffix(DECENTERED)
        makes = any(callable(c) or isinstance((c or {}).get(root), LocScaleReparam) for c in configs)
        if not makes or sites.get(root, {}).get("type") != "deterministic":
            break
        name = root
    return name
