"""Partially centred sites of a NumPyro model: every element anywhere between its centred and its non-centred form.

Let x be the unconstrained value of an element of a site from a location-scale family, mu its location, s its scale, and
c in [0, 1] its centredness. Instead of x, chains move in

    w = c mu + s^(c-1) (x - mu)

so that, with the standardised value z,

    z = (w - c mu) s^-c,    x = mu + s z,    log p(w) = log base(z) - c log s

where base is the family's density at location 0 and scale 1. With c = 1, w is x (the centred form); with c = 0, w is z
(the non-centred form). mu and s are functions of other sites, so the map is triangular, and its Jacobian is the product
of ``dw/dx = s^(c-1)`` over all elements. c is data, so another c needs no other program. The elements of a multivariate
normal site are taken one after the other: each is normal given those before it.

Source: Papaspiliopoulos, Roberts & Skold (2007), "A general framework for the parametrization of hierarchical models";
Gorinova, Moore & Hoffman (2020), "Automatic reparameterisation of probabilistic programs".
"""

from dataclasses import dataclass
from typing import Any, NamedTuple

import jax.numpy as jnp

from pmcmc._pytree import Array
from pmcmc.target import Place


@dataclass(frozen=True)
class AutoReparam:
    """Choose during warm-up, for every element of a hierarchy, how far it is centred.

    It concerns latent sites of the families Normal, LogNormal, StudentT, Laplace, Cauchy, Gumbel, Logistic, and
    MultivariateNormal of up to 8 dimensions, whose location or scale depends on other latent sites. For an element with
    location mu and scale s, chains move in

        w = c mu + s^(c-1) (x - mu)

    instead of x (for LogNormal, its logarithm). Warm-up starts with c = 0 (non-centred), and computes from n draws for
    c in [0, 1]

        log Var(w) / 2 - (c - 1) E[log s]

    which is, up to a constant, the divergence of a normal law from that of w. It takes the least c whose value is
    within 10 / n of the minimum, as noise of the draws may be. Then c is fixed, so the draws are exact.
    They come out as the model is written, with its own names and shapes, and `SolveReport.centredness` says what was
    chosen.

    It needs a warm-up that explores by an ensemble (`EnsembleAdaptation` or `ChEESAdaptation`), and a kernel over all
    sites at once. Sites within ``numpyro.handlers.mask`` or ``scale``, of other families, or with constant location and
    scale stay as they are.

    Source: Gorinova, Moore & Hoffman (2020) for the family of maps and the divergence.

    Example:
        >>> import jax.numpy as jnp, numpyro, numpyro.distributions as dist, pmcmc
        >>> def funnel():
        ...     v = numpyro.sample("v", dist.Normal(0, 3))
        ...     with numpyro.plate("elements", 3):
        ...         numpyro.sample("x", dist.Normal(0, jnp.exp(v / 2)))
        >>> chain = pmcmc.parallel_chain(
        ...     funnel, 0, reparam=pmcmc.AutoReparam(), num_warmup=200, num_samples=100, progress_bar=False
        ... )
        >>> chain.get_samples()["x"].shape
        (400, 3)
    """


# Multivariate normal sites of more dimensions stay as they are: their loop over dimensions is unrolled.
MOST_DIMENSIONS = 8


class _Form(NamedTuple):
    """A distribution of a location-scale family, on the unconstrained scale.

    Attributes:
        loc: Location mu.
        scale: Scale s; the diagonal of the factor of a multivariate normal distribution.
        standard: The same family at location 0 and scale 1, by element.
        factor: Cholesky factor L of the covariance of a multivariate normal distribution; None for other families.
        is_heavy: Whether the variance of the family may be infinite.
    """

    loc: Array
    scale: Array
    standard: Any
    factor: Array | None = None
    is_heavy: bool = False

    def standardise(self, w: Array, c: Array) -> tuple[Array, Array]:
        """Return ``z = (w - c mu) s^-c``, and mu; of a multivariate normal distribution those of the conditionals.

        Its element i has, given the elements before it, the scale ``L[i, i]`` and the location

            mu[i] + sum_(j < i) L[i, j] z[j]
        """
        power = jnp.exp(-c * jnp.log(self.scale))
        if self.factor is None:
            return (w - c * self.loc) * power, self.loc
        zs: list[Array] = []
        locs: list[Array] = []
        for i in range(self.factor.shape[-1]):
            before = [self.factor[..., i, j] * z for j, z in enumerate(zs)]
            locs.append(jnp.broadcast_to(sum(before, start=self.loc[..., i]), w.shape[:-1]))
            zs.append((w[..., i] - c[..., i] * locs[i]) * power[..., i])
        return jnp.stack(zs, axis=-1), jnp.stack(locs, axis=-1)


def _form(fn: Any) -> Any:
    """Return the `_Form` of a distribution, without wrappers; None if it has none."""
    from numpyro import distributions as dist
    from numpyro.distributions import ExpandedDistribution, Independent

    while isinstance(fn, (ExpandedDistribution, Independent)):
        fn = fn.base_dist
    family = type(fn)
    if family is dist.MultivariateNormal and fn.event_shape[0] <= MOST_DIMENSIONS:
        factor = jnp.asarray(fn.scale_tril)
        loc = jnp.broadcast_to(fn.loc, (*jnp.shape(fn.loc)[:-1], *fn.event_shape))
        return _Form(loc, jnp.diagonal(factor, 0, -2, -1), dist.Normal(0.0, 1.0), factor)
    if family in (dist.Normal, dist.LogNormal):
        standard = dist.Normal(0.0, 1.0)
    elif family is dist.StudentT:
        standard = dist.StudentT(fn.df, 0.0, 1.0)
    elif family in (dist.Laplace, dist.Cauchy, dist.Gumbel, dist.Logistic):
        standard = family(0.0, 1.0)
    else:
        return None
    is_heavy = family in (dist.StudentT, dist.Cauchy)
    return _Form(jnp.asarray(fn.loc), jnp.asarray(fn.scale), standard, is_heavy=is_heavy)


def locations_and_scales(sites: dict[str, dict]) -> dict[str, tuple[Array, Array]]:
    """Return location and scale, or factor, of each latent site that can be partially centred.

    Args:
        sites: The sample sites of a trace.
    """
    found = {}
    for name, site in sites.items():
        form = None if site.get("is_observed", False) or site["scale"] is not None else _form(site["fn"])
        if form is not None:
            found[name] = (form.loc, form.scale if form.factor is None else form.factor)
    return found


class PartialCentring:
    """The partially centred sites in one run of a model.

    Args:
        position: Coordinates w by site; other sites are ignored.
        centredness: c by site, in the shapes of w.

    Attributes:
        names: Names of the sites.
    """

    def __init__(self, position: dict[str, Array], centredness: dict[str, Array]):
        self._w, self._c, self.names = position, centredness, frozenset(centredness)

    def value(self, site: dict[str, Any]) -> Array:
        """Return the value of a site that is being sampled, within ``scan`` that of the current step.

        Nothing is kept for `term` and `place`: within ``scan`` and ``cond`` the values are tracers of an inner program.
        """
        from numpyro.distributions.transforms import biject_to

        name, fn, form = site["name"], site["fn"], _form(site["fn"])
        step, w, c = site["infer"].get("_scan_current_index"), self._w[name], self._c[name]
        if step is not None and w.ndim > len(fn.shape()):
            w, c = w[step], c[step]
        z, loc = form.standardise(w, c)
        return biject_to(fn.support)(loc + form.scale * z)

    def term(self, name: str, fn: Any) -> Array:
        """Return ``log base(z) - c log s`` of a site after the run, in the shape of its log probability."""
        form = _form(fn)
        z, _ = form.standardise(self._w[name], self._c[name])
        density = form.standard.log_prob(z) - self._c[name] * jnp.log(form.scale)
        return jnp.sum(density, axis=tuple(range(-fn.event_dim, 0)))

    def place(self, name: str, fn: Any) -> Place:
        """Return the `Place` of a site after the run."""
        form, shape = _form(fn), self._w[name].shape
        z, loc = form.standardise(self._w[name], self._c[name])
        log_scale = jnp.broadcast_to(jnp.log(form.scale), shape)
        heavy = jnp.asarray(form.is_heavy)
        return Place(loc + form.scale * z, z, jnp.broadcast_to(loc, shape), log_scale, heavy)
