"""Gibbs sampling from conditional distributions that the user provides.

`Gibbs` updates the sites of a position one after the other, each from its full conditional,

    x[i]' ~ p(x[i] | x[1]', ..., x[i-1]', x[i+1], ..., x[n]),    i = 1..n.

How one site is drawn is an `Update` from `pmcmc.kernels.updates`, a map of the state and of noise drawn first.

Source: Geman & Geman (1984); Gelfand & Smith (1990).
"""

from collections.abc import Mapping
from copy import copy
from dataclasses import dataclass, field
from typing import Any

import jax
import jax.numpy as jnp

from pmcmc._pytree import is_real, register_dataclass
from pmcmc._typing import PyTree
from pmcmc._xla.trace import traced_functions
from pmcmc.kernels.base import Info, SiteKernel, site_templates
from pmcmc.kernels.updates import Site, Update
from pmcmc.random.threefry import fold_in, key_pair
from pmcmc.target import Target


@register_dataclass
@dataclass(frozen=True, init=False)
class Gibbs(SiteKernel):
    """Gibbs sampler that draws the sites one after the other, each given the newest values of all others.

        x[i]' ~ p(x[i] | x[1]', ..., x[i-1]', x[i+1], ..., x[n]),    i = 1..n

    No log density is needed: pass None to `pmcmc.sample`. If there is one, it is evaluated once per step and reported.
    The acceptance rate is NaN.

    Chains of normal, gamma and inverse gamma updates whose shapes are fixed numbers are smooth in the state, so
    `pmcmc.recurrence.deer` can solve them too. Use `MultipleShooting` for chains with integer sites.

    Args:
        updates: Dict from site to update, in the order in which sites are updated: `NormalUpdate`, `GammaUpdate`,
            `InverseGammaUpdate`, `DirichletUpdate`, `CategoricalUpdate` or `CustomUpdate`. Their functions receive a
            dict of all sites, with values in the user's dtypes: integers stay integers.

    Raises:
        TypeError: ``updates`` is not a mapping of names to updates, or the position is not a dict.
        ValueError: There are no updates, a name is not a site, a site has no update, or an update has the wrong shape.

    Source: Geman & Geman (1984); Gelfand & Smith (1990); Zoltowski et al. (2025) as a recurrence of pre-drawn noise.

    Example:
        >>> import pmcmc
        >>> rho = 0.6
        >>> kernel = pmcmc.Gibbs({
        ...     "a": pmcmc.kernels.NormalUpdate(lambda x: (rho * x["b"], (1 - rho**2) ** 0.5)),
        ...     "b": pmcmc.kernels.NormalUpdate(lambda x: (rho * x["a"], (1 - rho**2) ** 0.5)),
        ... })
        >>> chain = pmcmc.sample(None, {"a": 0.0, "b": 0.0}, 0, kernel=kernel, num_samples=100, progress_bar=False)
        >>> chain.get_samples()["a"].shape
        (400,)
    """

    sites: tuple[str, ...] = field(metadata=dict(static=True))
    updates: tuple[Update, ...]

    def __init__(self, updates: Mapping[str, Any]):
        if not isinstance(updates, Mapping):
            raise TypeError(f"updates must be a dict of site names to updates, got {type(updates).__name__}.")
        for name, update in updates.items():
            if not isinstance(update, Update):
                raise TypeError(
                    f"the update of {name!r} must be an update such as NormalUpdate(...), got {update!r}. Wrap your "
                    "own map as CustomUpdate(sample_noise, update)."
                )
        if not updates:
            raise ValueError("Gibbs needs at least one update: pass {site: update}.")
        object.__setattr__(self, "sites", tuple(updates))
        object.__setattr__(self, "updates", tuple(updates.values()))

    def site_names(self, target):
        return self.sites

    def check(self, target):
        super().check(target)
        # Tracing the step checks shapes without evaluating anything.
        noise = jax.eval_shape(self.sample_noise, jax.random.key(0), target)
        jax.eval_shape(self.step, target, target.spec.template, noise)

    def traced(self, target):
        state = jax.eval_shape(target.model.sites, target.data, target.spec.template)
        updates = zip(self.sites, self.updates, strict=True)
        kernel = copy(self)
        object.__setattr__(kernel, "updates", tuple(u.traced(state, _site(target, name)) for name, u in updates))
        return kernel

    def context(self, target):
        return tuple(fn.trace for fn in traced_functions(self))

    def sample_noise(self, rng_key, target):
        pair = key_pair(rng_key)
        return tuple(
            update.draw_noise(fold_in(pair, jnp.asarray(number, jnp.uint32)), _site(target, name))
            for number, (name, update) in enumerate(zip(self.sites, self.updates, strict=True))
        )

    def nudge(self, noise, amount):
        return tuple(update.nudge(u, amount) for update, u in zip(self.updates, noise, strict=True))

    def step(self, target: Target, state: dict, noise: tuple) -> tuple[dict, Info]:
        dtype = target.spec.dtype
        margin, failed = jnp.asarray(jnp.inf, dtype), jnp.array(False)
        for name, update, u in zip(self.sites, self.updates, noise, strict=True):
            site = _site(target, name)
            drawn = update.draw(target.model.sites(target.data, state), u, site)
            value = _fitted(name, drawn.value, site.like)
            value = jax.tree.map(lambda new, old, bad=drawn.failed: jnp.where(bad, old, new), value, state[name])
            state = {**state, name: value}
            margin, failed = jnp.minimum(margin, drawn.margin), failed | drawn.failed
        return state, Info(
            acceptance_rate=jnp.asarray(jnp.nan, dtype),
            is_divergent=failed,
            margin=margin,
            logdensity=jnp.asarray(target.model.logdensity(target.data, state), dtype),
        )


def _site(target: Target, name: str) -> Site:
    """Return the shape and dtypes of a site for its update."""
    return Site(site_templates(target)[name], target.spec.dtype)


def _fitted(name: str, value: PyTree, like: PyTree) -> PyTree:
    """Return the value of an update in the site's dtypes.

    Raises:
        ValueError: The value differs from the site in structure, shape or kind (real or not).
    """
    kinds = lambda tree: [(jnp.shape(x), is_real(x)) for x in jax.tree.leaves(tree)]
    if jax.tree.structure(value) != jax.tree.structure(like) or kinds(value) != kinds(like):
        said = lambda tree: jax.tree.map(lambda x: f"{jnp.result_type(x)}{list(jnp.shape(x))}", tree)
        raise ValueError(
            f"the update of {name!r} must return a value like the site's, {said(like)}, got {said(value)}. Check its "
            "shape, or give the initial position the shape and dtype that the site should have."
        )
    cast: Any = lambda x, s: jnp.asarray(x, s.dtype)
    return jax.tree.map(cast, value, like)
