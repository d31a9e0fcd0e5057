"""Build ArviZ containers from draws. ArviZ is imported only when a function of this module runs."""

import inspect
from typing import Any

import numpy as np


def to_arviz(
    groups: dict[str, dict[str, Any]], attrs: dict[str, Any], *, dims: dict[str, list[str]], coords: dict[str, Any]
) -> Any:
    """Return an `InferenceData` (ArviZ 0.x) or `xarray.DataTree` (ArviZ 1.x) of arrays by group, without empty groups.

    Args:
        groups: Arrays by group and name.
        attrs: Attributes of every group.
        dims: Names of the axes of a draw, by array.
        coords: Coordinates of named axes.
    """
    import arviz as az

    arrays: dict[str, Any] = {
        group: {name: np.asarray(value) for name, value in values.items()} for group, values in groups.items() if values
    }
    labels: dict[str, Any] = dict(dims=dims, coords=coords, save_warmup=any(g.startswith("warmup_") for g in arrays))
    # ArviZ 1.0 replaced one keyword per group by one dict of groups.
    if "data" in inspect.signature(az.from_dict).parameters:
        by_group = {"/": attrs, **{name: attrs for name in arrays}}
        return az.from_dict(arrays, attrs=by_group, **labels)
    return az.from_dict(**arrays, attrs=attrs, **labels)


def predictive_groups(
    prior: dict[str, Any] | None, posterior_predictive: dict[str, Any] | None, posterior: dict[str, Any]
) -> dict[str, dict[str, Any]]:
    """Return the groups of draws made with NumPyro's `Predictive`.

    Args:
        prior: Prior draws by site, leading axis draw; None for none.
        posterior_predictive: Posterior predictive draws by site, leading axes (chain, draw) or both flattened; None for
            none.
        posterior: Posterior draws by site, leading axes (chain, draw); fixes numbers of chains and draws, and which
            prior draws are of latent sites.

    Raises:
        ValueError: The number of posterior predictive draws differs from that of the posterior.
    """
    num_chains, num_draws = np.shape(next(iter(posterior.values())))[:2]
    one_chain = {name: np.asarray(x)[None] for name, x in (prior or {}).items()}
    groups: dict[str, dict[str, Any]] = {
        "prior": {name: x for name, x in one_chain.items() if name in posterior},
        "prior_predictive": {name: x for name, x in one_chain.items() if name not in posterior},
        "posterior_predictive": {},
    }
    for name, given in (posterior_predictive or {}).items():
        x = np.asarray(given)
        if x.shape[:1] == (num_chains * num_draws,):
            x = x.reshape(num_chains, num_draws, *x.shape[1:])
        if x.shape[:2] != (num_chains, num_draws):
            raise ValueError(
                f"posterior_predictive has {name!r} of shape {x.shape}: expected {num_chains * num_draws} draws, or "
                f"{num_chains} chains of {num_draws}. Pass Predictive(model, chain.get_samples()) of all draws."
            )
        groups["posterior_predictive"][name] = x
    return groups
