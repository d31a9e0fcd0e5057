"""What the sites of a NumPyro model show: what pmcmc cannot sample, and the scales that sites depend on."""

import warnings
from typing import Any

import jax.numpy as jnp

from pmcmc._typing import Array


def check_trace(trace: dict[str, dict[str, Any]]) -> None:
    """Raise, or warn, where NumPyro's MCMC does; the site or plate is named.

    trace: sites by name, as ``handlers.trace`` records them, of a run under ``seed`` and ``init_to_uniform``.

    Raises:
        ValueError: a plate that draws a subsample, a latent site with a delta distribution or a support that has no
            unconstrained coordinates, a discrete one marked for sequential enumeration, values of a shape that does
            not fit the site's distribution.

    Warns:
        UserWarning: a dimension without a plate at a site in plates, a latent site on the circle.
    """
    for name, site in trace.items():
        if site["type"] == "plate":
            _check_plate(name, site)
        elif site["type"] == "sample":
            _check_batch_shape(name, site)
            if not site.get("is_observed", False):
                _check_latent(name, site)


def _check_plate(name: str, site: dict[str, Any]) -> None:
    """A plate whose indices were drawn has the key that drew them; those given by ``handlers.substitute`` have none."""
    size, subsample_size = site["args"][:2]
    if subsample_size in (None, size) or site["kwargs"].get("rng_key") is None:
        return
    raise ValueError(
        f"plate {name!r} draws a subsample of {subsample_size} out of {size}, which MCMC does not support: every step "
        "would have to see the same data. Leave subsample_size out to condition on all of them, or choose them by "
        f"numpyro.handlers.substitute(model, data={{{name!r}: indices}})."
    )


def _check_batch_shape(name: str, site: dict[str, Any]) -> None:
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
                stacklevel=2,
            )


def _check_latent(name: str, site: dict[str, Any]) -> None:
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
