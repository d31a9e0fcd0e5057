"""Conditional updates of one site for `Gibbs`, as maps of the state and of pre-drawn noise.

An `Update` writes a draw from a full conditional as ``x' = g(state, noise)``: `NormalUpdate`, `GammaUpdate`,
`InverseGammaUpdate` and `DirichletUpdate` scale standard variates drawn first, `CategoricalUpdate` inverts the
distribution function at uniforms drawn first, and `CustomUpdate` is the user's own map.

Source: Gelfand & Smith (1990); Zoltowski et al. (2025) for noise drawn first.
"""

import abc
from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from typing import Any, ClassVar, NamedTuple, cast

import jax
import jax.numpy as jnp

from pmcmc._pytree import Array, ArrayLeaf, PRNGKey, PyTree, register_dataclass
from pmcmc._xla.trace import Traced, Untraced
from pmcmc.random.distributions import (
    at_least_single,
    check_values,
    inverse_cdf,
    log_gammas,
    normals,
    uniform_array,
)
from pmcmc.random.streams import key_pair, raw_keys_are_threefry


class Site(NamedTuple):
    """Shapes and dtypes that an update needs of its site.

    Attributes:
        like: Shapes and dtypes of the site's value, a pytree.
        dtype: Floating dtype of the noise.
        has_density: Whether the step reports a log density, by whose size near ties are then bounded.
    """

    like: PyTree
    dtype: Any
    has_density: bool = True

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of a site that is a single array.

        Raises:
            ValueError: The site is a pytree of other structure.
        """
        if not hasattr(self.like, "shape"):
            raise ValueError(
                f"the site of this update must be one array, got {jax.tree.structure(self.like)}: make each of its "
                "arrays a site of its own, or use CustomUpdate."
            )
        return self.like.shape


class Drawn(NamedTuple):
    """Result of one update.

    Attributes:
        value: New value of the site.
        margin: Smallest margin of discrete draws, see `Info`; inf for continuous ones.
        failed: Whether a discrete draw failed, see `DiscreteDraw`; False for continuous ones.
    """

    value: PyTree
    margin: Array | float = jnp.inf
    failed: Array | bool = False


Function = Untraced | Traced


class Update(abc.ABC):
    """Base class of updates, which draw one site given all others as ``x' = g(state, noise)``.

    An update is a frozen dataclass and a pytree.

    Attributes:
        confined_to: What all values are, such as "positive numbers"; "" if they may be any real numbers. `Gibbs`
            refuses such an update of a site that positions hold unconstrained.
        is_discrete: Whether values are discrete, whatever the site's dtype.

    Example:
        >>> import pmcmc
        >>> isinstance(pmcmc.kernels.GammaUpdate(2.0, rate=1.0), Update)
        True
    """

    confined_to: ClassVar[str] = ""
    is_discrete: ClassVar[bool] = False

    @abc.abstractmethod
    def draw_noise(self, rng_key: PRNGKey, site: Site) -> PyTree:
        """Draw all randomness of one update.

        Args:
            rng_key: Key of this update.
            site: Shapes and dtypes of the site.

        Returns:
            Noise of one update, a pytree.
        """

    @abc.abstractmethod
    def draw(self, state: PyTree, noise: PyTree, site: Site) -> Drawn:
        """Compute the new value of the site.

        Args:
            state: Values of all sites, this one included.
            noise: Noise from `draw_noise`.
            site: Shapes and dtypes of the site.

        Returns:
            The value and, for discrete draws, their margin and whether they failed.
        """

    def nudge(self, noise: PyTree, amount: Array) -> PyTree:
        """Return the noise with ``amount`` added to the variables that decide; see `Kernel.nudge`."""
        return noise

    def traced(self, state: PyTree, site: Site) -> "Update":
        """Return this update with its functions of the state replaced by their current traces.

        Args:
            state: Shapes and dtypes of the values of all sites.
            site: Shapes and dtypes of this site.
        """
        functions = {f.name: getattr(self, f.name) for f in fields(self)}  # type: ignore[arg-type]
        now = {name: fn.at(state) for name, fn in functions.items() if _is_function(fn)}
        return replace(self, **now)  # type: ignore[type-var]


def _read(parameter: Any, state: PyTree, shape: tuple[int, ...], dtype: Any) -> Array:
    """Return the value of a parameter, a function of the state or not, as an array of the given shape."""
    value = parameter(state) if _is_function(parameter) else parameter
    return jnp.broadcast_to(jnp.asarray(value, dtype), shape)


def _is_function(parameter: Any) -> bool:
    """Return whether a parameter is a function of the state."""
    return isinstance(parameter, (Untraced, Traced))


def _wrap(update: Any, *names: str) -> None:
    """Turn functions among the parameters into pytrees without leaves, so that numbers can be leaves."""
    for name in names:
        if callable(value := getattr(update, name)) and not _is_function(value):
            object.__setattr__(update, name, Untraced(value))


def _gamma_noise(shape: Any, rng_key: PRNGKey, site: Site) -> Array:
    """Return logs of standard gammas if the shape is fixed, otherwise the key to draw them with."""
    if _is_function(shape):
        return key_pair(rng_key)
    return log_gammas(rng_key, _read(shape, None, site.shape, site.dtype))


def _log_gamma(shape: Any, state: PyTree, noise: Array, site: Site) -> Array:
    """Return logs of standard gammas, drawn with the noise as a key if the shape depends on the state."""
    if _is_function(shape):
        return log_gammas(noise, _read(shape, state, site.shape, site.dtype))
    return noise


def _positive(log_value: Array) -> Array:
    """Return ``exp(log_value)``, clipped to the positive numbers of the dtype: a positive site has no value 0 or inf.

    Values that are not finite already, such as those from a rate of 0, are not clipped.
    """
    info, value = jnp.finfo(log_value.dtype), jnp.exp(log_value)
    return jnp.where(jnp.isfinite(log_value), jnp.clip(value, info.tiny, info.max), value)


def _check_callable(update: Any, name: str, form: str) -> None:
    """Raise a TypeError if a parameter is not a function."""
    if not callable(getattr(update, name)):
        raise TypeError(f"{type(update).__name__} needs {name} as a function, {form}, got {getattr(update, name)!r}.")


@register_dataclass
@dataclass(frozen=True)
class NormalUpdate(Update):
    """Normal conditional ``x' = loc + scale z`` with z standard normal.

    It draws what positions hold of the site, for a positive site of a NumPyro model the logarithm, see `Gibbs`.

    Args:
        conditional: Function ``state -> (loc, scale)``, both of the site's shape or broadcast to it.

    Raises:
        TypeError: ``conditional`` is not a function.

    Source: Gelfand & Smith (1990), Gibbs sampling from full conditionals.

    Example:
        >>> import pmcmc
        >>> update = pmcmc.kernels.NormalUpdate(lambda x: (0.9 * x["y"], 0.44))
    """

    conditional: Callable

    def __post_init__(self):
        _check_callable(self, "conditional", "state -> (loc, scale)")
        _wrap(self, "conditional")

    def draw_noise(self, rng_key, site):
        return normals(uniform_array(rng_key, site.shape, at_least_single(site.dtype))).astype(site.dtype)

    def draw(self, state, noise, site):
        loc, scale = (_read(value, state, site.shape, site.dtype) for value in self.conditional(state))
        return Drawn(loc + scale * noise)


@register_dataclass
@dataclass(frozen=True)
class GammaUpdate(Update):
    """Gamma conditional ``x' = g / rate`` with g ~ Gamma(shape, 1).

    Its density is proportional to ``x^(shape - 1) exp(-rate x)``. If ``shape`` is a number or an array, g is drawn
    first and the update is smooth in the state. If it is a function of the state, g is drawn within the step from its
    key.

    Values are clipped to the range of positive normal numbers of the dtype. Small shapes often give smaller values: in
    float32, 17 % of the draws of shape 0.02.

    Positive sites of a NumPyro model are refused, since positions hold their logarithms, see `Gibbs`.

    Args:
        shape: A number, an array that broadcasts to the site, or a function of the state.
        rate: A number, an array that broadcasts to the site, or a function of the state.

    Source: Gelfand & Smith (1990); Zoltowski et al. (2025) for draws made first; Marsaglia & Tsang (2000) for gamma
    variates.

    Example:
        >>> import jax.numpy as jnp, pmcmc
        >>> update = pmcmc.kernels.GammaUpdate(2.5, rate=lambda x: 1 + 0.5 * jnp.sum(x["y"] ** 2))
    """

    confined_to: ClassVar[str] = "positive numbers"

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
    """Inverse gamma conditional ``x' = scale / g`` with g ~ Gamma(shape, 1).

    Its density is proportional to ``x^(-shape - 1) exp(-scale / x)``. Values are clipped as in `GammaUpdate`. A scaled
    inverse chi-squared distribution with nu degrees of freedom and scale s^2 has shape ``nu / 2`` and scale
    ``nu s^2 / 2``. Positive sites of a NumPyro model are refused, see `Gibbs`.

    Args:
        shape: A number, an array that broadcasts to the site, or a function of the state; see `GammaUpdate`.
        scale: A number, an array that broadcasts to the site, or a function of the state.

    Source: Gelfand & Smith (1990); Zoltowski et al. (2025) for draws made first; Marsaglia & Tsang (2000) for gamma
    variates.

    Example:
        >>> import jax.numpy as jnp, pmcmc
        >>> update = pmcmc.kernels.InverseGammaUpdate(4.5, scale=lambda x: 0.5 * jnp.sum((x["theta"] - x["mu"]) ** 2))
    """

    confined_to: ClassVar[str] = "positive numbers"

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
    """Dirichlet conditional ``x' = g / sum(g)`` over the last axis, with g ~ Gamma(concentration, 1).

    Beta variates are the case of two components. Small concentrations are safe: gamma variates and their ratio are
    computed in logs, and values are at least the smallest positive normal number of the dtype. Simplex and interval
    sites of a NumPyro model are refused, since positions hold them unconstrained, see `Gibbs`.

    Args:
        concentration: A number, an array that broadcasts to the site, or a function of the state; drawn first or within
            the step like the shape of `GammaUpdate`.

    Source: Gelfand & Smith (1990); Zoltowski et al. (2025) for draws made first; Marsaglia & Tsang (2000) for gamma
    variates.

    Example:
        >>> import jax.numpy as jnp, pmcmc
        >>> update = pmcmc.kernels.DirichletUpdate(lambda x: 1.0 + jnp.bincount(x["cluster"], length=3))
    """

    confined_to: ClassVar[str] = "probabilities"

    concentration: ArrayLeaf | Function

    def __post_init__(self):
        _wrap(self, "concentration")

    def draw_noise(self, rng_key, site):
        return _gamma_noise(self.concentration, rng_key, site)

    def draw(self, state, noise, site):
        value = jax.nn.softmax(_log_gamma(self.concentration, state, noise, site), axis=-1)
        return Drawn(jnp.maximum(value, jnp.finfo(value.dtype).tiny))


class Nudged(NamedTuple):
    """Uniforms that `Update.nudge` has changed.

    Attributes:
        uniform: Uniforms as they were drawn.
        amount: What to add to them, on the scale of the margin; the same shape.
    """

    uniform: Array
    amount: Array


@register_dataclass
@dataclass(frozen=True)
class CategoricalUpdate(Update):
    """Categorical conditional by inverse CDF: ``x' = least k with p[0] + ... + p[k] >= u``, p = softmax(logits).

    Each element has its own uniform u. With a shared u, two copies of the chain draw ordered values if their
    distributions are ordered, and different values with a probability of at most ``sum_k |F(k) - F'(k)|``, F and F'
    being the two distribution functions. For two values no coupling has a smaller one. For more values their order
    matters: coupled chains merge earlier if values that replace each other are neighbours.

    If the probabilities are not finite (a logit is NaN or +inf, or all are -inf), the site keeps its old value and the
    step is counted as divergent.

    Args:
        logits: Function ``state -> (..., K)``, the site's shape followed by an axis of the K values 0..K-1; an additive
            constant does not matter. Elements are drawn all at once, so they must be independent of each other given
            the other sites.

    Raises:
        TypeError: ``logits`` is not a function.
        ValueError: The logits do not have the site's shape and one more axis, or the site's dtype cannot hold the
            values.

    Source: Gelfand & Smith (1990); the monotone coupling of Propp & Wilson (1996).

    Example:
        >>> import pmcmc
        >>> update = pmcmc.kernels.CategoricalUpdate(lambda x: -0.5 * (x["y"][:, None] - x["centre"][None]) ** 2)
    """

    confined_to: ClassVar[str] = "integers"
    is_discrete: ClassVar[bool] = True

    logits: Callable

    def __post_init__(self):
        _check_callable(self, "logits", "state -> array (..., K)")
        _wrap(self, "logits")

    def draw_noise(self, rng_key, site):
        return uniform_array(rng_key, site.shape, at_least_single(site.dtype))

    def nudge(self, noise, amount):
        return Nudged(noise, jnp.full_like(noise, amount))

    def draw(self, state, noise, site):
        logits = jnp.asarray(self.logits(state), at_least_single(site.dtype))
        if logits.ndim == 0 or logits.shape[:-1] != site.shape:
            raise ValueError(
                f"logits must have the site's shape {site.shape} and a last axis for its values, got {logits.shape}."
            )
        check_values(site.like.dtype, range(logits.shape[-1]), "CategoricalUpdate draws values 0..K-1, and its site")
        # Rounding errors of the probabilities are of the size of the logits that matter, which are near the largest.
        unit = jnp.ones(site.shape, logits.dtype)
        if not site.has_density:
            unit = jnp.maximum(unit, jnp.abs(jnp.max(logits, axis=-1)))
        if isinstance(noise, Nudged):
            noise = noise.uniform + noise.amount * unit
        drawn = inverse_cdf(logits, noise)
        margin = jnp.min(drawn.margin / unit, initial=jnp.inf)
        return Drawn(drawn.category.astype(site.like.dtype), margin, drawn.failed)


@register_dataclass
@dataclass(frozen=True)
class CustomUpdate(Update):
    """User-defined update ``x' = update(state, noise)``, a map of user-defined noise.

    It must leave the conditional distribution of its site invariant, that of the unconstrained values for a continuous
    site of a NumPyro model (see `Gibbs`). Near ties of its decisions, if it makes any, are not counted.

    Args:
        sample_noise: Function ``rng_key -> noise``, any pytree.
        update: Function ``(state, noise) -> value``, of the site's shape.

    Raises:
        TypeError: ``sample_noise`` or ``update`` is not a function.

    Example:
        >>> import jax, pmcmc
        >>> update = pmcmc.kernels.CustomUpdate(lambda key: jax.random.normal(key), lambda x, z: 0.5 * x["y"] + z)
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
            return replace(self, sample_noise=sample_noise, update=cast(Function, self.update).at(state, noise))

    def draw_noise(self, rng_key, site):
        with raw_keys_are_threefry():
            return self.sample_noise(key_pair(rng_key))

    def draw(self, state, noise, site):
        with raw_keys_are_threefry():  # the noise may be a key
            return Drawn(self.update(state, noise), jnp.nan)
