"""Gibbs sampling of discrete sites with finite support.

`DiscreteGibbs` evaluates the log density at all K values of an element and draws the element from its conditional by
inverse CDF,

    p(z[i] = v | rest)  proportional to  exp(logdensity(z with z[i] = v)),    z[i]' = inverse CDF at u[i],

with uniforms u drawn first. Under shared uniforms, coupled chains draw the same value wherever their conditionals are
close, so they merge.

Source: Geman & Geman (1984); the monotone coupling of Propp & Wilson (1996).
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from pmcmc._pytree import Array, PRNGKey, PyTree, register_dataclass
from pmcmc._xla.compile import plain_jit
from pmcmc.kernels.base import Info, SiteKernel, site_templates
from pmcmc.random.distributions import at_least_single, check_values, inverse_cdf, uniforms
from pmcmc.target import Target


@register_dataclass
@dataclass(frozen=True, init=False)
class DiscreteGibbs(SiteKernel):
    """Gibbs updates of every element of discrete sites, from conditionals over a finite support.

        p(z[i] = v | rest)  proportional to  exp(logdensity(z with z[i] = v)),    z[i]' = inverse CDF at u[i]

    Elements are updated one after the other, each given the newest values of all others. An element with K values costs
    K evaluations of the log density. The uniforms u are drawn first, so that coupled chains draw the same value
    wherever their conditionals are close.

    If the log density is NaN or +inf at one of an element's values, that element keeps its old value and the step is
    counted as divergent, as in `CategoricalUpdate`; of an ``independent`` site all elements keep theirs. Values at
    which the log density is -inf are never drawn.

    Unlike NumPyro's DiscreteHMCGibbs, sites are updated in a fixed order, not in a random one.

    Args:
        supports: Dict from site to its values. None: the supports of a NumPyro model's discrete latent sites
            (Bernoulli, Categorical, Binomial, DiscreteUniform and others that NumPyro can enumerate).
        independent: Sites of a NumPyro model, in plates, whose elements are independent of each other given all other
            sites, such as the assignments of a mixture. Their elements are drawn all at once, with K evaluations of the
            log density in total. Before sampling, up to 64 elements are changed one at a time, where the first chain
            starts and at random values: each may change only those terms of the log density that belong to it.

    Raises:
        TypeError: A support is not a list of numbers.
        ValueError: A site has no support or a dtype that cannot hold it, a support repeats values, or the elements of a
            site in ``independent`` are not independent.

    Source: Geman & Geman (1984); NumPyro's DiscreteHMCGibbs; the monotone coupling of Propp & Wilson (1996).

    Example:
        >>> import jax.numpy as jnp, pmcmc
        >>> logdensity = lambda x: 0.4 * jnp.sum(x["spin"][1:] * x["spin"][:-1])  # an Ising chain
        >>> kernel = pmcmc.DiscreteGibbs(supports={"spin": [-1, 1]})
        >>> start = {"spin": jnp.ones(5, int)}
        >>> chain = pmcmc.sample(logdensity, start, 0, kernel=kernel, num_samples=100, progress_bar=False)
        >>> sorted(set(chain.get_samples()["spin"].ravel().tolist()))
        [-1, 1]
    """

    supports: tuple[tuple[str, tuple[bool | int | float, ...]], ...] | None = field(metadata=dict(static=True))
    independent: tuple[str, ...] = field(metadata=dict(static=True))

    def __init__(self, supports: Any = None, independent: Sequence[str] = ()):
        if isinstance(supports, Mapping):
            supports = tuple((name, _values(name, support)) for name, support in supports.items())
        object.__setattr__(self, "supports", supports)
        object.__setattr__(self, "independent", (independent,) if isinstance(independent, str) else tuple(independent))

    def _supports(self, target: Target) -> dict[str, tuple[int | float, ...]]:
        """Return the values of each site, sites in the order in which they are updated."""
        known = target.model.supports if self.supports is None else self.supports
        sites = site_templates(target)
        return {name: values for name, values in known if self.supports is not None or name in sites}

    def site_names(self, target):
        return tuple(self._supports(target))

    def check(self, target):
        if not target.model.has_density:
            raise TypeError("DiscreteGibbs needs a log density: pass logdensity_fn, or draw by Gibbs(...) instead.")
        supports, sites = self._supports(target), site_templates(target)
        if not supports:
            raise ValueError("no discrete site has a known support: pass DiscreteGibbs(supports={site: values}).")
        super().check(target)
        strangers = [name for name in self.independent if name not in supports]
        if strangers:
            raise ValueError(
                f"independent names {strangers}: expected names out of the discrete sites {list(supports)}."
            )
        for name, values in supports.items():
            like = sites[name]
            if not hasattr(like, "dtype"):
                raise ValueError(f"site {name!r} must be one array, whose dtype can hold its support {values}.")
            check_values(like.dtype, values, f"site {name!r} with the support {_shortened(values)}")

    def check_start(self, target: Target, position: PyTree) -> None:
        """Check that an element of an ``independent`` site changes only its own terms of the log density.

        Raises:
            ValueError: It changes others.
        """
        for name in self.independent:
            values = jnp.asarray(self._supports(target)[name], position[name].dtype)
            if not bool(_are_independent(target, values, position, name=name)):
                raise ValueError(
                    f"the elements of {name!r} are not independent given the other sites, or other sites outside its "
                    "plate depend on them: leave it out of `independent`, and they are drawn sequentially."
                )

    def sample_noise(self, rng_key, target):
        sites, dtype = site_templates(target), target.spec.dtype
        sizes = [sites[name].size for name in self._supports(target)]
        u = uniforms(rng_key, sum(sizes), at_least_single(dtype))
        return tuple(jnp.split(u, np.cumsum(sizes)[:-1]))

    def discrete(self, unknown):
        return jax.tree.map(lambda x: True, unknown)

    def nudge(self, noise, amount):
        return tuple(u + amount for u in noise)

    def step(self, target: Target, state: dict, noise: tuple) -> tuple[dict, Info]:
        dtype = target.spec.dtype
        margin, failed = jnp.asarray(jnp.inf, dtype), jnp.array(False)
        for (name, support), u in zip(self._supports(target).items(), noise, strict=True):
            draw = self._draw_abreast if name in self.independent else _draw_in_order
            values = jnp.asarray(support, state[name].dtype)
            state, nearest, bad = draw(target, state, name, values, u)
            margin, failed = jnp.minimum(margin, nearest), failed | bad
        return state, Info(
            acceptance_rate=jnp.asarray(jnp.nan, dtype),
            is_divergent=failed,
            margin=jnp.asarray(margin, dtype),
            logdensity=jnp.asarray(target.model.logdensity(target.data, state), dtype),
        )

    @staticmethod
    def _draw_abreast(target: Target, state: dict, name: str, values: Array, u: Array) -> tuple[dict, Array, Array]:
        """Draw all elements of an ``independent`` site at once.

        Args:
            target: Target to sample.
            state: Values of all sites.
            name: The site.
            values: Its support; shape (K,).
            u: Uniforms, one per element; shape (size,).

        Returns:
            The new values of all sites, the smallest margin, and whether a conditional was not finite.
        """
        old = state[name]
        logits = target.model.element_logdensities(target.data, state, name, values)
        drawn = inverse_cdf(logits, u.reshape(old.shape))
        new = jnp.where(drawn.failed, old, values[drawn.category])
        return {**state, name: new}, jnp.min(drawn.margin, initial=jnp.inf), drawn.failed


def _logits(target: Target, state: dict, name: str, values: Array, index: Array) -> Array:
    """Return the log densities with one element of a site set to each of its values; shape (K,)."""
    old = state[name]

    def at(value: Array) -> Array:
        new = jnp.ravel(old).at[index].set(value).reshape(old.shape)
        return target.model.logdensity(target.data, {**state, name: new})

    return jax.vmap(at)(values)


def _draw_in_order(target: Target, state: dict, name: str, values: Array, u: Array) -> tuple[dict, Array, Array]:
    """Draw the elements of a site one after the other; arguments and results as `DiscreteGibbs._draw_abreast`."""

    def draw(state: dict, element: tuple) -> tuple[dict, tuple]:
        index, uniform = element
        old = state[name]
        drawn = inverse_cdf(_logits(target, state, name, values, index), uniform)
        flat = jnp.ravel(old)
        flat = flat.at[index].set(jnp.where(drawn.failed, flat[index], values[drawn.category]))
        return {**state, name: flat.reshape(old.shape)}, (drawn.margin, drawn.failed)

    if not u.size:
        return state, jnp.asarray(jnp.inf, u.dtype), jnp.array(False)
    state, (margins, failed) = jax.lax.scan(draw, state, (jnp.arange(u.size), u))
    return state, jnp.min(margins), jnp.any(failed)


# Number of elements that are changed, and the share of all elements that is drawn anew before: none (where the chain
# starts, which is possible while random values may not be), few, and all.
NUM_CHANGED, SHARES = 64, (0.0, 0.1, 1.0, 1.0)


@plain_jit()
def _are_independent(target: Target, values: Array, position: dict, *, name: str) -> Array:
    """Return whether each element of a site changes only its own terms of the log density.

    At most `NUM_CHANGED` elements are changed, one at a time, at the position and with some elements drawn at random.
    """
    shape, size = position[name].shape, position[name].size

    def at(given: tuple[PRNGKey, Array]) -> Array:
        key, share = given
        pick_key, which_key, value_key = jax.random.split(key, 3)
        is_drawn = jax.random.uniform(which_key, shape) < share
        site = jnp.where(is_drawn, jax.random.choice(value_key, values, shape), position[name])
        state = {**position, name: site}
        chosen = jax.random.permutation(pick_key, size)[:NUM_CHANGED]
        alone = lambda index: target.model.changes_own_terms(target.data, state, name, values, index)
        return jnp.all(jax.lax.map(alone, chosen))

    keys = jax.random.split(jax.random.key(0), len(SHARES))
    return jnp.all(jax.lax.map(at, (keys, jnp.asarray(SHARES))))


def _values(name: str, support: Any) -> tuple[int | float, ...]:
    """Return the values of a support, after checks."""
    try:
        values = tuple(np.asarray(list(support)).tolist())
    except TypeError:
        raise TypeError(f"the support of {name!r} must be a list of numbers, got {support!r}.") from None
    if not values or not all(isinstance(v, (int, float, bool)) for v in values):
        raise TypeError(f"the support of {name!r} must be a list of numbers, got {support!r}.")
    if bad := [v for v in values if not np.isfinite(v)]:
        raise ValueError(f"the support of {name!r} must be finite numbers, got {bad}: leave them out.")
    if repeated := sorted({v for v in values if values.count(v) > 1}):
        raise ValueError(
            f"the support of {name!r} has {repeated} more than once, which would multiply their probability: give each "
            "value once; weights belong in the log density."
        )
    return values


def _shortened(values: tuple[int | float, ...]) -> str:
    """Return a support as text, abbreviated if it is long."""
    return str(list(values)) if len(values) <= 6 else f"[{values[0]}, {values[1]}, ..., {values[-1]}]"
