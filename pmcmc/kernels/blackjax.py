"""BlackJAX's algorithms as kernels.

A BlackJAX algorithm draws its randomness from the key that its ``step`` receives. `from_blackjax` wraps it as a kernel
whose noise is that key, so that the chain is the deterministic recurrence

    x[t] = algorithm.step(key[t], x[t-1])

and equals the chain that BlackJAX gives with these keys. `AlgorithmKernel` translates states and diagnostics;
`BlackJAX` holds the algorithm and its parameters.

Source: Cabezas et al. (2024).
"""

import abc
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np
from jax.flatten_util import ravel_pytree

from pmcmc._pytree import Array, PRNGKey, PyTree, Scalar, is_real, register_dataclass
from pmcmc.interop import blackjax as interop
from pmcmc.kernels.base import Info, Kernel, check_step_size, step_content
from pmcmc.random.streams import key_pair
from pmcmc.target import Target


def _typed(pair: Array) -> PRNGKey:
    """Return a typed threefry key made of two words."""
    return jax.random.wrap_key_data(pair, impl="threefry2x32")


def _key_at(position: PyTree) -> PRNGKey:
    """Return a key computed from a position, for ``init`` functions that draw from a key.

    What such a function draws (a momentum, say) is arbitrary, like the start itself, but should differ between starts.
    """
    words = jax.lax.bitcast_convert_type(ravel_pytree(position)[0].astype(jnp.float32), jnp.uint32)
    odd = 2 * jnp.arange(words.size, dtype=jnp.uint32) + 1
    return jax.random.fold_in(jax.random.key(0, impl="threefry2x32"), jnp.sum(words * odd, dtype=jnp.uint32))


class AlgorithmKernel(Kernel):
    """Base class of kernels that step as a BlackJAX algorithm does with the key drawn as their noise.

    The state is BlackJAX's. The unknown is the same NamedTuple with None in place of caches, which ``init`` rebuilds,
    and of keys, which are derived from the step's key. `Info.margin` is NaN, because BlackJAX does not report it, so
    near ties are not counted.
    """

    extra_fields: ClassVar[tuple[str, ...]] = (*Kernel.extra_fields, "energy", "num_steps", "tree_depth")

    @abc.abstractmethod
    def algorithm(self, target: Target) -> Any:
        """Return BlackJAX's ``SamplingAlgorithm`` on this target."""

    def cache_names(self) -> tuple[str, ...] | None:
        """Return the fields that ``init`` computes from the position; None to infer them from their names."""
        return None

    def start(self, target, y):
        return interop.init_state(self.algorithm(target), y, _key_at(y))

    def init(self, target, position):
        return self.start(target, target.coordinates(position))

    def sample_noise(self, rng_key, target):
        return key_pair(rng_key)

    def step(self, target, state: Any, noise: Array) -> tuple[Any, Info]:
        new, info = interop.take_step(self.algorithm(target), _typed(noise), state)
        new = jax.tree.map(lambda x, old: jnp.asarray(x, jnp.result_type(old)), new, state)
        said, dtype = interop.read_info(new, info), target.spec.dtype
        logdensity = said.logdensity
        if logdensity is None:
            logdensity = target.logdensity_fn(self.coordinates(self.unknown(new)))
        optional = lambda x, dtype: None if x is None else jnp.asarray(x, dtype)
        return new, Info(
            acceptance_rate=jnp.asarray(jnp.nan if said.acceptance_rate is None else said.acceptance_rate, dtype),
            is_divergent=jnp.asarray(False if said.is_divergent is None else said.is_divergent, bool),
            margin=jnp.asarray(jnp.nan, dtype),
            logdensity=jnp.asarray(logdensity, dtype),
            energy=optional(said.energy, dtype),
            num_integration_steps=optional(said.num_integration_steps, int),
            tree_depth=optional(said.tree_depth, int),
        )

    def takes_leapfrogs(self, target):
        kernel: Any = self if self.is_tuned else self.with_step_size(1.0)

        def step() -> Info:
            state = kernel.start(target, jnp.zeros(target.dim, target.spec.dtype))
            return kernel.step(target, state, kernel.sample_noise(jax.random.key(0), target))[1]

        return jax.eval_shape(step).num_integration_steps is not None

    def unknown(self, state: Any) -> Any:
        return interop.without_caches(state, self.cache_names())

    def restore(self, target, unknown: Any) -> Any:
        fresh = interop.init_state(self.algorithm(target), unknown.position, _key_at(unknown.position))
        return interop.with_caches(unknown, fresh)

    def coordinates(self, unknown: Any) -> Array:
        return ravel_pytree(unknown.position)[0]


@register_dataclass
@dataclass(frozen=True)
class BlackJAX(AlgorithmKernel):
    """A kernel made by `from_blackjax`; do not construct it directly.

    Attributes:
        source: A constructor ``(logdensity_fn, **parameters) -> SamplingAlgorithm``, or an algorithm already built.
        parameters: Parameters of the constructor that consist of floats and arrays, as leaves.
        settings: The other parameters, static, as (name, value) pairs.
        caches: Names of the cached fields of the state, see `from_blackjax`.
        gradient: Whether steps evaluate the gradient; None to decide from the fields of the state.
    """

    source: Any = field(metadata=dict(static=True))
    parameters: dict[str, PyTree]
    settings: tuple[tuple[str, object], ...] = field(metadata=dict(static=True))
    caches: tuple[str, ...] | None = field(metadata=dict(static=True))
    gradient: bool | None = field(metadata=dict(static=True))

    @property
    def takes_basis(self) -> bool:
        return not interop.is_built(self.source)

    @property
    def uses_gradient(self) -> bool:
        if self.gradient is not None or not self.takes_basis:
            return self.gradient is not False
        line = Target.from_logdensity(lambda x: -jnp.sum(x**2), np.zeros(1, np.float32))  # any target has these fields
        try:
            state = jax.eval_shape(lambda: self.start(line, jnp.zeros(1, jnp.float32)))
        except (TypeError, ValueError):  # the constructor needs another dimension, or is refused when it is used
            return True
        return any("grad" in name for name in state._fields)

    @property
    def step_size(self) -> Scalar | None:
        if "step_size" not in self.parameters:
            raise AttributeError("this algorithm has no parameter named step_size.")
        return self.parameters["step_size"]

    def with_step_size(self, step_size: Scalar) -> "BlackJAX":
        return replace(self, parameters={**self.parameters, "step_size": step_size})

    @property
    def metric(self):
        given = self.parameters.get("inverse_mass_matrix")
        return given if isinstance(given, (int, float)) or hasattr(given, "shape") else None  # not of several arrays

    def without_metric(self):
        return (
            self if self.metric is None else replace(self, parameters={**self.parameters, "inverse_mass_matrix": None})
        )

    def cache_names(self) -> tuple[str, ...] | None:
        return self.caches

    def algorithm(self, target):
        if not self.takes_basis:
            if target.basis is not None:
                raise ValueError(
                    "a BlackJAX algorithm that is already built samples its own log density and cannot use the "
                    f"target's whitened coordinates. {_BUILD_INSTEAD}"
                )
            return self.source
        dtype = target.spec.dtype
        parameters = jax.tree.map(lambda x: jnp.asarray(x, dtype) if is_real(x) else x, self.parameters)
        if parameters.get("inverse_mass_matrix", 0) is None:
            parameters["inverse_mass_matrix"] = jnp.ones(target.dim, dtype)
        algorithm = self.source(target.logdensity_fn, **parameters, **dict(self.settings))
        if not interop.is_built(algorithm):
            raise TypeError(f"the constructor must return a SamplingAlgorithm, got {type(algorithm).__name__}.")
        return algorithm

    def start(self, target, y):
        return super().start(target, y if self.takes_basis else target.position(y))

    def context(self, target):
        given = (self.source, *(value for _, value in self.settings))
        return None if all(map(interop.is_of_blackjax, given)) else step_content(self, target)


_BUILD_INSTEAD = (
    "Pass the constructor and its parameters, as in from_blackjax(blackjax.mala, step_size=0.3), or num_warmup=0."
)


def from_blackjax(
    algorithm: Callable | Any,
    *,
    caches: tuple[str, ...] | None = None,
    uses_gradient: bool | None = None,
    **parameters: Any,
) -> BlackJAX:
    """Return a BlackJAX algorithm as a kernel, so that it can be sampled in parallel across the chain's length.

    The algorithm is given in one of two forms:

    - A constructor and its parameters, ``from_blackjax(blackjax.mala, step_size=0.3)``. It is called as
      ``algorithm(logdensity_fn, **parameters)`` and returns a ``SamplingAlgorithm``; any function that does so is
      accepted. ``logdensity_fn`` is the target's own log density over vectors (D,), in whitened coordinates after
      warm-up. Warm-up and NumPyro models need this form.
    - A ``SamplingAlgorithm`` that is already built, ``from_blackjax(blackjax.nuts(logdensity_fn, 0.3, ones))``. It
      samples its own log density over positions like the initial one, and needs ``num_warmup=0``. Pass the same density
      to `pmcmc.sample`: it is used for checks, and for the log density of draws if the algorithm does not report it.

    The noise of a step is the key passed to ``algorithm.step``, so the chain is the one that BlackJAX gives with these
    keys. NUTS, HMC, slice sampling and MCLMC merge on many posteriors. BlackJAX's random walk and Barker proposals do
    not merge under common keys; ``solver="auto"`` detects this and samples them sequentially. `pmcmc.RandomWalk`
    merges.

    Acceptance rate, divergences, energy, numbers of leapfrog steps and tree depth are passed on if BlackJAX reports
    them; otherwise they are NaN, False or None. As in BlackJAX, the energy of HMC-type algorithms is that of the
    proposal. The margin of decisions is NaN. The state of the algorithm must be a NamedTuple with one field
    ``position``.

    Args:
        algorithm: A constructor of a ``SamplingAlgorithm``, or a ``SamplingAlgorithm``.
        caches: Fields of the state that ``init`` computes from the position. None: those named ``logdensity*`` and
            ``*grad*``. All other fields are part of the unknown and must agree before two paths count as merged; a key
            in the state (dynamic HMC) is derived anew from the key of every step.
        uses_gradient: Whether steps evaluate the gradient of the log density, which must then be finite where chains
            start. None: whether a field of the state is named ``*grad*``. An algorithm that is already built, or that
            cannot be constructed in one dimension, counts as using it unless this is False.
        parameters: Parameters of the constructor, by name. Floats and arrays are leaves of the kernel, so other values
            need no new compilation; integers, functions and other hashable objects are static. ``step_size=None`` is
            tuned by warm-up if the algorithm reports acceptance rates, to 0.8 or to the warm-up's
            ``target_acceptance_rate``. ``inverse_mass_matrix=None`` is the identity. A matrix
            becomes the basis of the target in warm-up, and the algorithm then has the identity.

    Returns:
        The kernel.

    Raises:
        TypeError: ``algorithm`` is neither a constructor nor an algorithm, parameters are given to an algorithm that is
            already built, or a parameter is not hashable.
        ValueError: ``step_size`` is not positive, or the constructor expects a likelihood, such as elliptical slice
            sampling; the example divides a Gaussian out of the target for it.

    Source: Cabezas et al. (2024), "BlackJAX: composable Bayesian inference in JAX"; Nishihara et al. (2014) for the
    example.

    Example:
        >>> import blackjax, jax.numpy as jnp, pmcmc
        >>> pmcmc.from_blackjax(blackjax.mala, step_size=0.3).step_size
        0.3
        >>> def elliptical(logdensity_fn, mean, cov):  # the target over N(0, I) is the likelihood
        ...     return blackjax.elliptical_slice(lambda x: logdensity_fn(x) + 0.5 * jnp.sum(x**2), mean=mean, cov=cov)
        >>> kernel = pmcmc.from_blackjax(elliptical, mean=jnp.zeros(2), cov=jnp.ones(2))
        >>> target = pmcmc.Target.from_logdensity(lambda x: -jnp.sum((x - 1) ** 2), jnp.zeros(2))
        >>> kernel.init(target, jnp.zeros(2)).position.shape
        (2,)
    """
    if interop.is_built(algorithm):
        if parameters:
            raise TypeError(
                f"parameters {sorted(parameters)} cannot be given to an algorithm that is already built. Pass its "
                "constructor instead, as in from_blackjax(blackjax.mala, step_size=0.3)."
            )
    elif not callable(algorithm):
        raise TypeError(
            "algorithm must be a BlackJAX SamplingAlgorithm or a constructor of one such as blackjax.nuts, got "
            f"{algorithm!r}."
        )
    elif interop.takes_likelihood(algorithm):
        raise ValueError(
            "this constructor expects a log likelihood and multiplies the likelihood by a Gaussian prior; given the "
            "target's log density it would sample another distribution. Pass a function of the log density that "
            "divides the prior out: see the example of from_blackjax."
        )
    parameters = {name: int(value) if isinstance(value, np.integer) else value for name, value in parameters.items()}
    step_size = parameters.get("step_size")
    check_step_size(step_size)
    if isinstance(step_size, int):
        parameters["step_size"] = float(step_size)
    numbers = {name: value for name, value in parameters.items() if _is_numeric(value)}
    settings = tuple((name, value) for name, value in sorted(parameters.items()) if name not in numbers)
    for name, value in settings:
        try:
            hash(value)
        except TypeError:
            raise TypeError(f"{name} must be floats, arrays, or hashable, got {value!r}.") from None
    source = algorithm if interop.is_built(algorithm) else interop.as_function(algorithm)
    return BlackJAX(source, numbers, settings, None if caches is None else tuple(caches), uses_gradient)


def _is_numeric(value: PyTree) -> bool:
    """Return whether a parameter consists of floats and arrays alone."""
    return all(isinstance(leaf, (float, np.floating, np.ndarray, jax.Array)) for leaf in jax.tree.leaves(value))
