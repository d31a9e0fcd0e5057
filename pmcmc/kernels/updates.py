"""Conditional updates of one site: maps of the state and of noise drawn first."""

import abc
from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from typing import Any, NamedTuple, cast

import jax
import jax.numpy as jnp

from pmcmc._pytree import register_dataclass
from pmcmc._typing import Array, ArrayLeaf, PRNGKey, PyTree
from pmcmc._xla.trace import Traced, Untraced
from pmcmc.random.distributions import check_values, inverse_cdf, log_gammas, normals, uniform_array
from pmcmc.random.threefry import key_pair, raw_keys_are_threefry


class Site(NamedTuple):
    """What an update knows of its site. like: shapes and dtypes of its value. dtype: of noise, floating."""

    like: PyTree
    dtype: Any

    @property
    def shape(self) -> tuple[int, ...]:
        return self.like.shape


class Drawn(NamedTuple):
    """value: of the site. margin, failed: of discrete draws, see `DiscreteDraw`; inf and False elsewhere."""

    value: PyTree
    margin: Array | float = jnp.inf
    failed: Array | bool = False


Function = Untraced | Traced


class Update(abc.ABC):
    """How one site is drawn given all the others, ``x' = g(state, noise)``; a frozen dataclass and a pytree.

    Example:
        >>> import pmcmc
        >>> isinstance(pmcmc.GammaUpdate(2.0, rate=1.0), Update)
        True
    """

    @abc.abstractmethod
    def draw_noise(self, rng_key: PRNGKey, site: Site) -> PyTree:
        """All the randomness of one update."""

    @abc.abstractmethod
    def draw(self, state: PyTree, noise: PyTree, site: Site) -> Drawn:
        """The new value of the site. state: the values of all sites, this one included."""

    def nudge(self, noise: PyTree, amount: Array) -> PyTree:
        """See `Kernel.nudge`."""
        return noise

    def traced(self, state: PyTree, site: Site) -> "Update":
        """This update with its functions of the state as they are now. state: shapes of the values of all sites."""
        functions = {f.name: getattr(self, f.name) for f in fields(self)}  # type: ignore[arg-type]
        now = {name: fn.at(state) for name, fn in functions.items() if _is_function(fn)}
        return replace(self, **now)  # type: ignore[type-var]


def _read(parameter: Any, state: PyTree, shape: tuple[int, ...], dtype: Any) -> Array:
    value = parameter(state) if _is_function(parameter) else parameter
    return jnp.broadcast_to(jnp.asarray(value, dtype), shape)


def _is_function(parameter: Any) -> bool:
    """Whether a parameter is a function of the state."""
    return isinstance(parameter, (Untraced, Traced))


def _wrap(update: Any, *names: str) -> None:
    """Functions among the parameters become pytrees without leaves, so that numbers can be leaves."""
    for name in names:
        if callable(value := getattr(update, name)) and not _is_function(value):
            object.__setattr__(update, name, Untraced(value))


def _gamma_noise(shape: Any, rng_key: PRNGKey, site: Site) -> Array:
    """Logs of standard gammas where the shape is known beforehand, else the key to draw them by."""
    if _is_function(shape):
        return key_pair(rng_key)
    return log_gammas(rng_key, _read(shape, None, site.shape, site.dtype))


def _log_gamma(shape: Any, state: PyTree, noise: Array, site: Site) -> Array:
    if _is_function(shape):
        return log_gammas(noise, _read(shape, state, site.shape, site.dtype))
    return noise


def _positive(log_value: Array) -> Array:
    """``exp``, held within the positive numbers of the dtype: 0 and inf are no values of a positive site.

    What was not finite before stays so: a rate of 0, for instance.
    """
    info, value = jnp.finfo(log_value.dtype), jnp.exp(log_value)
    return jnp.where(jnp.isfinite(log_value), jnp.clip(value, info.tiny, info.max), value)


def _check_callable(update: Any, name: str, form: str) -> None:
    if not callable(getattr(update, name)):
        raise TypeError(f"{type(update).__name__} needs {name} as a function, {form}, got {getattr(update, name)!r}.")


@register_dataclass
@dataclass(frozen=True)
class NormalUpdate(Update):
    """``x' = loc + scale z``, z standard normal.

    conditional: ``state -> (loc, scale)``, each of the site's shape or broadcast to it.

    Source: Gelfand & Smith 1990 (Gibbs sampling from full conditionals).

    Example:
        >>> import pmcmc
        >>> update = pmcmc.NormalUpdate(lambda x: (0.9 * x["y"], 0.44))
    """

    conditional: Callable

    def __post_init__(self):
        _check_callable(self, "conditional", "state -> (loc, scale)")
        _wrap(self, "conditional")

    def draw_noise(self, rng_key, site):
        return normals(uniform_array(rng_key, site.shape, site.dtype))

    def draw(self, state, noise, site):
        loc, scale = (_read(value, state, site.shape, site.dtype) for value in self.conditional(state))
        return Drawn(loc + scale * noise)


@register_dataclass
@dataclass(frozen=True)
class GammaUpdate(Update):
    """``x' = g / rate``, g ~ Gamma(shape, 1): density proportional to ``x^(shape - 1) exp(-rate x)``.

    shape, rate: numbers, arrays that broadcast to the site, or functions of the state. A shape that is a number is
        smooth: g is drawn beforehand. One that is a function of the state is drawn within the step by its key.

    A value below the smallest positive (normal) number of the dtype, as small shapes give, is that number, and one
    above the largest the largest; in float32 that is 17 % of the draws of shape 0.02.

    Source: Gelfand & Smith 1990; Zoltowski et al. 2025 (drawn beforehand); Marsaglia & Tsang 2000 (the draws).

    Example:
        >>> import jax.numpy as jnp, pmcmc
        >>> update = pmcmc.GammaUpdate(2.5, rate=lambda x: 1 + 0.5 * jnp.sum(x["y"] ** 2))
    """

    shape: ArrayLeaf | Function
    rate: ArrayLeaf | Function

    def __post_init__(self):
        _wrap(self, "shape", "rate")

    def draw_noise(self, rng_key, site):
        return _gamma_noise(self.shape, rng_key, site)

    def draw(self, state, noise, site):
        log_gamma = _log_gamma(self.shape, state, noise, site)
        return Drawn(_positive(log_gamma - jnp.log(_read(self.rate, state, site.shape, site.dtype))))


@register_dataclass
@dataclass(frozen=True)
class InverseGammaUpdate(Update):
    """``x' = scale / g``, g ~ Gamma(shape, 1): density proportional to ``x^(-shape - 1) exp(-scale / x)``.

    shape, scale: as `GammaUpdate`. A scaled inverse chi-squared with nu degrees and scale s^2 has shape ``nu / 2`` and
        scale ``nu s^2 / 2``.

    Values beyond the range of the dtype as there.

    Source: as `GammaUpdate`.

    Example:
        >>> import jax.numpy as jnp, pmcmc
        >>> update = pmcmc.InverseGammaUpdate(4.5, scale=lambda x: 0.5 * jnp.sum((x["theta"] - x["mu"]) ** 2))
    """

    shape: ArrayLeaf | Function
    scale: ArrayLeaf | Function

    def __post_init__(self):
        _wrap(self, "shape", "scale")

    def draw_noise(self, rng_key, site):
        return _gamma_noise(self.shape, rng_key, site)

    def draw(self, state, noise, site):
        log_gamma = _log_gamma(self.shape, state, noise, site)
        return Drawn(_positive(jnp.log(_read(self.scale, state, site.shape, site.dtype)) - log_gamma))


@register_dataclass
@dataclass(frozen=True)
class DirichletUpdate(Update):
    """``x' = g / sum(g)`` over the last axis, g ~ Gamma(concentration, 1).

    concentration: a number, an array that broadcasts to the site, or a function of the state, as the shape of
        `GammaUpdate`. Beta variates are the case of two components. Small ones need no care: gammas and their ratio
        are taken in logs.

    Source: as `GammaUpdate`.

    Example:
        >>> import jax.numpy as jnp, pmcmc
        >>> update = pmcmc.DirichletUpdate(lambda x: 1.0 + jnp.bincount(x["cluster"], length=3))
    """

    concentration: ArrayLeaf | Function

    def __post_init__(self):
        _wrap(self, "concentration")

    def draw_noise(self, rng_key, site):
        return _gamma_noise(self.concentration, rng_key, site)

    def draw(self, state, noise, site):
        return Drawn(jax.nn.softmax(_log_gamma(self.concentration, state, noise, site), axis=-1))


@register_dataclass
@dataclass(frozen=True)
class CategoricalUpdate(Update):
    """``x' = least k with p[0] + ... + p[k] >= u``, p = softmax(logits), one uniform u an element.

    logits: ``state -> (..., K)``, the site's shape and an axis of the K values 0..K-1; constants are free. Elements
        are drawn side by side, so they must be independent of each other given the other sites.

    Under a shared u two copies of the chain draw the same value with a probability near that of the best coupling, and
    in the same order where their distributions are ordered. Where logits are not finite the old value is kept and the
    step counted as divergent.

    Source: Gelfand & Smith 1990; the monotone coupling of Propp & Wilson 1996.

    Example:
        >>> import pmcmc
        >>> update = pmcmc.CategoricalUpdate(lambda x: -0.5 * (x["y"][:, None] - x["centre"][None]) ** 2)
    """

    logits: Callable

    def __post_init__(self):
        _check_callable(self, "logits", "state -> array (..., K)")
        _wrap(self, "logits")

    def draw_noise(self, rng_key, site):
        return uniform_array(rng_key, site.shape, site.dtype)

    def nudge(self, noise, amount):
        return noise + amount

    def draw(self, state, noise, site):
        logits = jnp.asarray(self.logits(state), site.dtype)
        if logits.ndim == 0 or logits.shape[:-1] != site.shape:
            raise ValueError(
                f"logits must have the site's shape {site.shape} and a last axis for its values, got {logits.shape}."
            )
        check_values(site.like.dtype, range(logits.shape[-1]), "CategoricalUpdate draws values 0..K-1, and its site")
        drawn = inverse_cdf(logits, noise)
        return Drawn(drawn.category.astype(site.like.dtype), drawn.margin, drawn.failed)


@register_dataclass
@dataclass(frozen=True)
class CustomUpdate(Update):
    """``x' = update(state, noise)``, the user's own map of the user's own noise.

    sample_noise: ``rng_key -> noise``, any pytree. update: ``(state, noise) -> value`` of the site's shape.

    It must leave the conditional distribution of its site unchanged. Its decisions, if any, are not counted as near
    ties.

    Example:
        >>> import jax, pmcmc
        >>> update = pmcmc.CustomUpdate(lambda key: jax.random.normal(key), lambda x, z: 0.5 * x["y"] + z)
    """

    sample_noise: Callable
    update: Callable

    def __post_init__(self):
        _check_callable(self, "sample_noise", "rng_key -> noise")
        _check_callable(self, "update", "(state, noise) -> value")
        _wrap(self, "sample_noise", "update")

    def traced(self, state, site):
        key = jnp.zeros(2, jnp.uint32)
        with raw_keys_are_threefry():
            sample_noise = cast(Function, self.sample_noise).at(key)
            noise = jax.eval_shape(sample_noise, key)
            return CustomUpdate(sample_noise, cast(Function, self.update).at(state, noise))

    def draw_noise(self, rng_key, site):
        with raw_keys_are_threefry():
            return self.sample_noise(key_pair(rng_key))

    def draw(self, state, noise, site):
        with raw_keys_are_threefry():  # the noise may be a key
            return Drawn(self.update(state, noise), jnp.nan)
