"""Inspect the sites of a NumPyro model: what pmcmc cannot sample, and scales that depend on other sites.

`check_trace` refuses what NumPyro's MCMC refuses and names the site. `scales` and `non_centred_forms` find latent sites
of location-scale families, for which `pmcmc.stability.diagnose` suggests non-centred forms.
"""

import warnings
from typing import Any, NamedTuple

import jax.numpy as jnp

from pmcmc._pytree import Array
from pmcmc._warnings import user_level
from pmcmc.interop.partial_centring import locations_and_scales


def check_trace(trace: dict[str, dict[str, Any]]) -> None:
    """Raise or warn where NumPyro's MCMC does, naming the site; `pmcmc.interop.numpyro_runs` refuses subsamples.

    Args:
        trace: Sites by name, as ``handlers.trace`` records them in a run under ``seed`` and ``init_to_uniform``.

    Raises:
        ValueError: A latent site has a delta distribution or a support without unconstrained coordinates; a discrete
            site is marked for sequential enumeration; values do not fit the shape of the site's distribution.

    Warns:
        UserWarning: A site in plates has a dimension without a plate; a latent site is on the circle.
    """
    for name, site in trace.items():
        if site["type"] == "sample":
            _check_batch_shape(name, site)
            if not site.get("is_observed", False):
                _check_latent(name, site)


def _check_batch_shape(name: str, site: dict[str, Any]) -> None:
    """Check the shape of a site's value; warn of a dimension without a plate."""
    fn, shape, plates = site["fn"], jnp.shape(site["value"]), {frame.dim for frame in site["cond_indep_stack"]}
    try:
        batch_shape = jnp.broadcast_shapes(tuple(fn.batch_shape), shape[: len(shape) - len(fn.event_shape)])
    except ValueError as error:
        raise ValueError(
            f"the value of site {name!r} has shape {shape}, which does not fit its distribution of shape "
            f"{(*fn.batch_shape, *fn.event_shape)}: check the shapes of obs= and of the parameters."
        ) from error
    if not plates:
        return
    for dim in range(-len(batch_shape), 0):
        along_scan = dim == -len(batch_shape) and site.get("_control_flow_done", False)
        if batch_shape[dim] > 1 and dim not in plates and not along_scan:
            warnings.warn(
                f"Missing a plate statement for batch dimension {dim} at site {name!r}, whose batch shape is "
                f"{batch_shape}. An array of another shape than meant may have been broadcast, so that observations "
                "count more than once: numpyro.util.format_shapes shows the shapes of all sites.",
                stacklevel=user_level(),
            )


def _check_latent(name: str, site: dict[str, Any]) -> None:
    """Refuse a latent site that cannot be sampled."""
    from numpyro.distributions import Delta
    from numpyro.distributions.transforms import biject_to
    from numpyro.infer.util import helpful_support_errors

    if isinstance(site["fn"], Delta):
        raise ValueError(
            f"site {name!r} has a delta distribution, which leaves nothing to sample: record its value by "
            "numpyro.deterministic instead."
        )
    if site["fn"].support.is_discrete:
        kind = site["infer"].get("enumerate")
        if kind not in (None, "parallel"):
            raise ValueError(
                f"site {name!r} is marked for {kind} enumeration, which MCMC does not support: leave "
                f"infer={{'enumerate': {kind!r}}} out, and it is drawn by Gibbs."
            )
        return
    with helpful_support_errors(site, raise_warnings=True):
        biject_to(site["fn"].support)


# Suffix of the auxiliary site that `LocScaleReparam` samples instead of a site.
DECENTERED = "_decentered"


def scales(sites: dict[str, dict]) -> dict[str, Array]:
    """Return the scale of each latent site of a location-scale family; ``sites`` are the sample sites of a trace."""
    return {name: jnp.asarray(fn.scale) for name, fn in _families(sites).items()}


class NonCentred(NamedTuple):
    """How to change the form of a latent site of a location-scale family.

    Attributes:
        site: Its name.
        hint: The end of a sentence that says how.
        is_automatic: Whether `AutoReparam` does it to the model as it is, if location or scale depend on other sites.
    """

    site: str
    hint: str
    is_automatic: bool


def non_centred_forms(sites: dict[str, dict], active: dict[str, list], discrete: bool) -> tuple[NonCentred, ...]:
    """Return how to change the form of each latent site of a location-scale family.

    Args:
        sites: All sites of a trace.
        active: By sample site, the configurations of the ``reparam`` handlers within which it was sampled.
        discrete: Whether the model has discrete latent sites, beside which `AutoReparam` is not possible.
    """
    drawn = {name: site for name, site in sites.items() if site["type"] == "sample"}
    automatic = {} if discrete else locations_and_scales(drawn)
    found = []
    for name, fn in _families(drawn).items():
        root = reparametrised(name, sites, active.get(name, []))
        hint = _form(name, root, fn, name in automatic)
        found.append(NonCentred(name, hint, name in automatic and root == name))
    return tuple(found)


def active_reparams() -> list:
    """Return the configurations of the ``reparam`` handlers that see the current site."""
    from numpyro import handlers
    from numpyro.primitives import _PYRO_STACK

    return [handler.config for handler in _PYRO_STACK if isinstance(handler, handlers.reparam)]


def _families(sites: dict[str, dict]) -> dict[str, Any]:
    """Return, by latent site, its distribution without wrappers if it has a location and a scale."""
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


def _form(name: str, root: str, fn: Any, automatic: bool) -> str:
    """Write the end of a sentence that suggests another form of a site, which is made from ``root``."""
    from numpyro.distributions import constraints

    if automatic:
        instead = "" if root == name else f"leave out what reparametrises {root!r} now, and "
        return (
            f"{instead}pass reparam=pmcmc.AutoReparam(), with the default warm-up, one kernel over all sites and no "
            f"inverse_mass_matrix: it chooses how far {root!r} is centred"
        )
    others = [parameter for parameter in fn.arg_constraints if parameter not in ("loc", "scale")]
    reparam = f"LocScaleReparam(0{f', shape_params={others}' if others else ''})"
    if root != name:
        return f"put numpyro.infer.reparam.{reparam} in place of what reparametrises {root!r} now"
    if fn.support is not constraints.real:
        return f"write {name!r} as a function of a site whose distribution does not depend on them"
    return (
        f"try a non-centred form, for instance numpyro.handlers.reparam(model, config={{{name!r}: "
        f"numpyro.infer.reparam.{reparam}}})"
    )


def reparametrised(name: str, sites: dict[str, dict], configs: list) -> str:
    """Return the site of the model that ``name`` replaces: itself, unless `LocScaleReparam` made it.

    In that case the original site is recorded as deterministic, and one of the handlers names it. A configuration that
    is a function is assumed to do so. Reparametrisations may be nested.
    """
    from numpyro.infer.reparam import LocScaleReparam

    while name.endswith(DECENTERED):
        root = name.removesuffix(DECENTERED)
        makes = any(callable(c) or isinstance((c or {}).get(root), LocScaleReparam) for c in configs)
        if not makes or sites.get(root, {}).get("type") != "deterministic":
            break
        name = root
    return name
