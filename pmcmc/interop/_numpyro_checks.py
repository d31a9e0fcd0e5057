"""The checks that NumPyro's MCMC makes of a model before it samples. NumPyro is imported when a function here runs.

They are those of ``initialize_model``, ``_validate_model`` and ``_get_model_transforms``, on a trace of the model with
every latent site at a random start. Only shapes and types are read, so the trace may be made of abstract values.
tests/test_numpyro_guards.py has a model for each.
"""

import warnings
from typing import Any

import jax.numpy as jnp


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
