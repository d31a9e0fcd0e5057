"""NumPyro models as targets. NumPyro is imported when a function here runs, not before."""

import hashlib
import inspect
import threading
from collections.abc import Callable
from dataclasses import dataclass
from functools import wraps
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from pmcmc._types import Array, PRNGKey, PyTree
from pmcmc.target import Described, Model, Target

# What jax raises when a model asks a traced array for its value: np.unique(group), if n > 3, y[mask].
_NEEDS_VALUE = (
    jax.errors.ConcretizationTypeError,
    jax.errors.TracerArrayConversionError,
    jax.errors.TracerBoolConversionError,
    jax.errors.TracerIntegerConversionError,
    jax.errors.NonConcreteBooleanIndexError,
)


# NumPyro's stack of handlers is one for all threads, and programs are traced in a second one: two models that run at
# once would see each other's sites.
_ONE_AT_A_TIME = threading.RLock()


def _alone(method: Callable) -> Callable:
    """Decorator: no other model runs meanwhile."""

    @wraps(method)
    def run(*args: Any) -> Any:
        with _ONE_AT_A_TIME:
            return method(*args)

    return run


class _Constant:
    """An argument of the model that is no traced array: compared by content where possible, else by identity."""

    def __init__(self, value: Any):
        self.value = value
        if isinstance(value, (np.ndarray, jax.Array)):
            array = np.asarray(value)
            self._key: Any = (array.shape, str(array.dtype), hashlib.sha256(array.tobytes()).hexdigest())
        else:
            try:
                hash(value)
                self._key = (type(value), value)
            except TypeError:
                self._key = id(value)  # kept alive by this object

    def __hash__(self):
        return hash(self._key)

    def __eq__(self, other):
        return isinstance(other, _Constant) and self._key == other._key


@dataclass(frozen=True)
class NumpyroModel(Model):
    """A NumPyro model with its arguments: arrays are the target's data, everything else is static.

    model: the user's function; two targets of the same function and shapes are equal.
    treedef, constants: the arguments without the arrays that are data (None in their place).
    """

    model: Callable
    treedef: Any
    constants: tuple[_Constant | None, ...]

    def _call(self, data: list) -> tuple[Callable, tuple, dict]:
        import numpyro

        arrays = iter(data)
        leaves = [next(arrays) if c is None else c.value for c in self.constants]
        args, kwargs = jax.tree.unflatten(self.treedef, leaves)
        # A fixed key: only subsampling plates draw anything here, and they must draw the same at every step.
        return numpyro.handlers.seed(self.model, jax.random.key(0)), args, kwargs

    @_alone
    def logdensity(self, data, position):
        from numpyro.infer.util import potential_energy

        return -potential_energy(*self._call(data), position)

    @_alone
    def constrain(self, data, position):
        from numpyro.infer.util import constrain_fn

        return constrain_fn(*self._call(data), position, return_deterministic=True)

    @_alone
    def _trace(self, data: list, position: PyTree) -> dict:
        """The model's sites at a position."""
        from numpyro import handlers, validation_enabled

        model, args, kwargs = self._call(data)
        with validation_enabled(False):  # a value that is not allowed shall have a name, not an exception without one
            values = self.constrain(data, position)
            return handlers.trace(handlers.substitute(model, data=values)).get_trace(*args, **kwargs)

    def centred_sites(self, data, position, other) -> list[str]:
        scales = [self._scales(data, x) for x in (position, other)]
        return [name for name, scale in scales[0].items() if bool(jnp.any(scale != scales[1][name]))]

    def _scales(self, data: list, position: PyTree) -> dict[str, Array]:
        """The scale of each latent site of a location-scale family, at a position."""
        from numpyro.distributions import ExpandedDistribution, Independent, MaskedDistribution

        found = {}
        for name, site in self._trace(data, position).items():
            if site["type"] != "sample" or site.get("is_observed", False):
                continue
            fn = site["fn"]
            while isinstance(fn, (ExpandedDistribution, Independent, MaskedDistribution)):
                fn = fn.base_dist
            if hasattr(fn, "loc") and hasattr(fn, "scale"):
                found[name] = jnp.asarray(fn.scale)
        return found

    def describe(self, data, position):
        dims, observed = {}, {}
        for name, site in self._trace(data, position).items():
            if site["type"] not in ("sample", "deterministic"):
                continue
            plates = sorted(site["cond_indep_stack"], key=lambda frame: frame.dim)
            # a deterministic site in a plate need not have the plate's axis
            if jnp.shape(site["value"])[: len(plates)] == tuple(frame.size for frame in plates):
                dims[name] = [frame.name for frame in plates] + list(site.get("infer", {}).get("event_dims", []))
            if _is_observation(site):
                observed[name] = jnp.asarray(site["value"])
        return Described(dims, observed, self._constants(data, observed))

    def _constants(self, data: list, observed: dict) -> dict[str, Array]:
        """Array arguments of the model that are no observations, by the names of its parameters."""
        _, args, kwargs = self._call(data)
        try:
            arguments = inspect.signature(self.model).bind(*args, **kwargs).arguments
        except (TypeError, ValueError):  # a callable that does not tell
            return {}
        same = lambda a, b: jnp.shape(a) == jnp.shape(b) and bool(jnp.all(a == b))
        arrays = {name: value for name, value in arguments.items() if _is_array(value)}
        return {name: x for name, x in arrays.items() if not any(same(x, y) for y in observed.values())}

    @_alone
    def log_likelihood(self, data, position):
        from numpyro.handlers import substitute, trace

        model, args, kwargs = self._call(data)
        sites = trace(substitute(model, data=self.constrain(data, position))).get_trace(*args, **kwargs)
        return {name: site["fn"].log_prob(site["value"]) for name, site in sites.items() if _is_observation(site)}

    def explain(self, data, position) -> str:
        trace = self._trace(data, position)
        sites = [
            name
            for name, site in trace.items()
            if site["type"] == "sample" and not bool(jnp.all(jnp.isfinite(site["fn"].log_prob(site["value"]))))
        ]
        return f"Its terms are not finite at site {', '.join(map(repr, sites))}." if sites else ""


def _is_observation(site: dict) -> bool:
    """Data, and not a factor, whose value is empty."""
    return site["type"] == "sample" and site.get("is_observed", False) and jnp.size(site["value"]) > 0


def numpyro_target(model: Callable, model_args: tuple, model_kwargs: dict) -> Target:
    """A `Target` over the unconstrained latent sites of a NumPyro model.

    Float and integer arrays among the arguments become data leaves, so that a second call with the same shapes does
    not compile again. Where the model needs values of arrays while it is traced (``len(np.unique(group))``), first the
    integer arrays and then all arrays are fixed as constants instead.

    Raises:
        TypeError: ``model`` is not callable.
        ValueError: no latent sites, discrete latent sites, ``param`` or ``mutable`` sites.
    """
    if not callable(model):
        raise TypeError(f"model must be a NumPyro model (a function with sample sites), got {type(model).__name__}.")
    prototype = _prototype_position(model, model_args, model_kwargs)
    leaves, treedef = jax.tree.flatten((tuple(model_args), dict(model_kwargs)))
    failure: Exception | None = None
    for is_data in (_is_array, _is_float_array, lambda leaf: False):
        constants = tuple(None if is_data(leaf) else _Constant(leaf) for leaf in leaves)
        data = [jnp.asarray(leaf) for leaf in leaves if is_data(leaf)]
        try:
            return Target.build(NumpyroModel(model, treedef, constants), prototype, data)
        except _NEEDS_VALUE as error:
            failure = error
        except ValueError as error:
            raise ValueError(f"{_refusing_site(model, model_args, model_kwargs)}{error}") from error
    raise ValueError(f"the model cannot be traced by JAX: {failure}") from failure


def _refusing_site(model: Callable, args: tuple, kwargs: dict) -> str:
    """The site whose distribution NumPyro does not allow, as the beginning of a sentence; "" for other faults."""
    from numpyro import handlers, validation_enabled
    from numpyro.infer.initialization import init_to_uniform

    started = handlers.substitute(handlers.seed(model, jax.random.key(0)), substitute_fn=init_to_uniform)
    with validation_enabled(False):
        names = list(handlers.trace(started).get_trace(*args, **kwargs))
    checked = handlers.trace(started)
    try:
        with validation_enabled(True):
            checked.get_trace(*args, **kwargs)
    except ValueError:
        return f"check the parameters of the distribution at site {names[len(checked.trace)]!r}: "
    return ""


def _is_array(leaf: Any) -> bool:
    return isinstance(leaf, (np.ndarray, jax.Array)) and np.asarray(leaf).dtype.kind in "fiub"


def _is_float_array(leaf: Any) -> bool:
    return _is_array(leaf) and np.asarray(leaf).dtype.kind == "f"


def _prototype_position(model: Callable, args: tuple, kwargs: dict) -> dict[str, Array]:
    """Unconstrained values of the latent sites at a random point; checks what NumPyro lets pass in silence."""
    from numpyro import handlers, validation_enabled
    from numpyro.distributions.transforms import biject_to
    from numpyro.infer.initialization import init_to_uniform
    from numpyro.infer.util import helpful_support_errors

    with validation_enabled(False):  # values are judged by the density, and named, before anything is sampled
        # as NumPyro starts its own samplers: an improper prior has no draws
        started = handlers.substitute(handlers.seed(model, jax.random.key(0)), substitute_fn=init_to_uniform)
        trace = handlers.trace(started).get_trace(*args, **kwargs)
    for name, site in trace.items():
        if site["type"] in ("param", "mutable"):
            raise ValueError(
                f"site {name!r} is a {site['type']} site, which MCMC cannot update: give it a prior with "
                "numpyro.sample, or fix its value."
            )
    latent = {
        name: site for name, site in trace.items() if site["type"] == "sample" and not site.get("is_observed", False)
    }
    if not latent:
        raise ValueError(
            "the model has no latent sample sites: there is nothing to sample. Check that not every site has obs=."
        )
    position = {}
    for name, site in latent.items():
        if site["fn"].support.is_discrete:
            raise ValueError(
                f"latent site {name!r} is discrete, and gradient-based kernels cannot update it: marginalise it out "
                "(for instance with numpyro.distributions.MixtureSameFamily)."
            )
        with helpful_support_errors(site):
            position[name] = jnp.asarray(biject_to(site["fn"].support).inv(site["value"]), float)
    return position


def numpyro_starts(target: Target, rng_key: PRNGKey, num_starts: int) -> PyTree:
    """Valid unconstrained starts as NumPyro draws them (`init_to_uniform`), leading axis ``num_starts``.

    Uniform on (-2, 2), drawn again up to 100 times where the density or its gradient is not finite. NumPyro's own
    function compiles anew at every call, which took two thirds of a short one.

    Raises:
        ValueError: no start with a finite density and gradient was found; says which site is to blame.
    """
    starts, found = _draw_starts(target, jax.random.split(rng_key, num_starts))
    if not bool(jnp.all(found)):
        centre = target.position(jnp.zeros(target.dim, target.spec.dtype))
        raise ValueError(
            f"the log density cannot be used at any of {_MAX_TRIES} random starts. "
            f"{target.model.explain(target.data, centre)} Check the model and its data for NaN and values outside a "
            "support, or pass starting values by init_params."
        )
    return starts


_MAX_TRIES = 100


@jax.jit
def _draw_starts(target: Target, keys: Array) -> tuple[PyTree, Array]:
    def one(key):
        def draw(state):
            tries, _, _ = state
            x = jax.random.uniform(jax.random.fold_in(key, tries), (target.dim,), target.spec.dtype, -2, 2)
            value, gradient = target.value_and_grad(x)
            return tries + 1, x, jnp.isfinite(value) & jnp.all(jnp.isfinite(gradient))

        begin = (jnp.zeros((), int), jnp.zeros(target.dim, target.spec.dtype), jnp.array(False))
        _, x, found = jax.lax.while_loop(lambda state: ~state[2] & (state[0] < _MAX_TRIES), draw, begin)
        return target.spec.unravel(x), found

    return jax.vmap(one)(keys)


def print_summary(samples: dict, prob: float) -> None:
    """NumPyro's table of means, quantiles, n_eff and r_hat for samples with axes (chain, draw, ...)."""
    from numpyro.diagnostics import print_summary as numpyro_print_summary

    numpyro_print_summary(samples, prob=prob, group_by_chain=True)
