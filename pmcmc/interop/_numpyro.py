"""NumPyro models as targets. NumPyro is imported when a function here runs, not before."""

import hashlib
import inspect
import math
import threading
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial, wraps
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from pmcmc._threefry import key_pair, threefry_2x32
from pmcmc._types import Array, PRNGKey, PyTree
from pmcmc.interop._numpyro_checks import check_trace
from pmcmc.target import Described, Model, Supports, Target, evaluate_starts

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
    def run(*args: Any, **kwargs: Any) -> Any:
        with _ONE_AT_A_TIME:
            return method(*args, **kwargs)

    return run


class _Constant:
    """An argument of the model that is no traced array: compared by content where possible, else by identity."""

    def __init__(self, value: Any):
        self.value = value
        if isinstance(value, (np.ndarray, jax.Array)):
            is_key = jnp.issubdtype(value.dtype, jax.dtypes.prng_key)
            array = np.asarray(jax.random.key_data(value) if is_key else value)
            self._key: Any = (array.shape, str(value.dtype), hashlib.sha256(array.tobytes()).hexdigest())
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
    supports: of discrete latent sites. Positions hold their values as they are, and continuous ones unconstrained.
    """

    model: Callable
    treedef: Any
    constants: tuple[_Constant | None, ...]
    supports: Supports = ()

    def _call(self, data: list) -> tuple[Callable, tuple, dict]:
        import numpyro

        arrays = iter(data)
        leaves = [next(arrays) if c is None else c.value for c in self.constants]
        args, kwargs = jax.tree.unflatten(self.treedef, leaves)
        # A fixed key: only subsampling plates draw anything here, and they must draw the same at every step.
        return numpyro.handlers.seed(self.model, jax.random.key(0)), args, kwargs

    def _call_at(self, data: list, position: PyTree) -> tuple[tuple[Callable, tuple, dict], dict, dict]:
        """The call with discrete sites fixed at their values, these values, and the continuous rest of the position."""
        from numpyro import handlers

        names = [name for name, _ in self.supports]
        discrete = {name: value for name, value in position.items() if name in names}
        model, args, kwargs = self._call(data)
        if discrete:
            model = handlers.substitute(model, data=discrete)
        return (model, args, kwargs), discrete, {k: v for k, v in position.items() if k not in discrete}

    @_alone
    def logdensity(self, data, position):
        from numpyro.infer.util import potential_energy

        call, _, continuous = self._call_at(data, position)
        return -potential_energy(*call, continuous)

    @_alone
    def constrain(self, data, position):
        return self._constrained(data, position, return_deterministic=True)

    def _constrained(self, data: list, position: PyTree, return_deterministic: bool) -> dict:
        from numpyro.infer.util import constrain_fn

        call, discrete, continuous = self._call_at(data, position)
        return {**discrete, **constrain_fn(*call, continuous, return_deterministic=return_deterministic)}

    @_alone
    def element_logdensities(self, data, position, site, values):
        from numpyro.infer.util import compute_log_probs

        constrained = self._constrained(data, position, return_deterministic=False)

        def at(value: Array) -> Array:
            everywhere = {**constrained, site: jnp.full_like(constrained[site], value)}
            terms, trace = compute_log_probs(*self._call(data), everywhere, sum_log_prob=False)
            return _by_element(trace, terms, site)

        return jnp.moveaxis(jax.vmap(at)(values), 0, -1)

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


def _by_element(trace: dict, terms: dict, name: str) -> Array:
    """Sum of the log probabilities that belong to each element of a site: those of all sites within its plates.

    Raises:
        ValueError: the site has dimensions that are no plates.
    """
    site = trace[name]
    plates, shape = {frame.name: frame.dim for frame in site["cond_indep_stack"]}, site["value"].shape
    if {-axis for axis in range(1, len(shape) + 1) if shape[-axis] > 1} - set(plates.values()):
        raise ValueError(
            f"site {name!r} of shape {shape} has dimensions that no plate declares independent: put it in a plate, or "
            "leave it out of `independent`."
        )
    total = jnp.zeros(shape)
    for other, term in terms.items():
        if plates.keys() <= {frame.name for frame in trace[other]["cond_indep_stack"]}:
            foreign = tuple(axis for axis in range(-term.ndim, 0) if axis not in plates.values())
            term = jnp.sum(term, axis=foreign, keepdims=True)
            total = total + jnp.broadcast_to(term.reshape(term.shape[max(0, term.ndim - len(shape)) :]), shape)
    return total


def numpyro_target(model: Callable, model_args: tuple, model_kwargs: dict) -> Target:
    """A `Target` over the unconstrained latent sites of a NumPyro model.

    Float and integer arrays among the arguments become data leaves, so that a second call with the same shapes does
    not compile again. Where the model needs values of arrays while it is traced (``len(np.unique(group))``), first the
    integer arrays and then all arrays are fixed as constants instead.

    Raises:
        TypeError: ``model`` is not callable.
        ValueError: no latent sites, discrete ones that cannot be enumerated, ``param`` or ``mutable`` sites.
    """
    if not callable(model):
        raise TypeError(f"model must be a NumPyro model (a function with sample sites), got {type(model).__name__}.")
    prototype, supports = _prototype_position(model, model_args, model_kwargs)
    leaves, treedef = jax.tree.flatten((tuple(model_args), dict(model_kwargs)))
    failure: Exception | None = None
    for is_data in (_is_array, _is_float_array, lambda leaf: False):
        constants = tuple(None if is_data(leaf) else _Constant(leaf) for leaf in leaves)
        data = [jnp.asarray(leaf) for leaf in leaves if is_data(leaf)]
        try:
            return Target.build(NumpyroModel(model, treedef, constants, supports), prototype, data)
        except _NEEDS_VALUE as error:
            failure = error
        except ValueError as error:
            raise ValueError(f"{_refusing_site(model, model_args, model_kwargs)}{error}") from error
    raise ValueError(f"the model cannot be traced by JAX: {failure}") from failure


def _refusing_site(model: Callable, args: tuple, kwargs: dict) -> str:
    """The site whose distribution NumPyro does not allow, as the beginning of a sentence; "" for other faults."""
    from numpyro import handlers, validation_enabled
    from numpyro.infer.initialization import init_to_uniform

    key = jax.random.key(0)
    names = list(_random_trace(model, args, kwargs, key))
    started = handlers.substitute(handlers.seed(model, key), substitute_fn=init_to_uniform)
    checked = handlers.trace(started)
    try:
        with validation_enabled(True):
            checked.get_trace(*args, **kwargs)
    except ValueError:
        return f"check the parameters of the distribution at site {names[len(checked.trace)]!r}: "
    return ""


def _is_array(leaf: Any) -> bool:
    return isinstance(leaf, (np.ndarray, jax.Array)) and getattr(leaf.dtype, "kind", None) in set("fiub")


def _is_float_array(leaf: Any) -> bool:
    return _is_array(leaf) and leaf.dtype.kind == "f"


def _prototype_position(model: Callable, args: tuple, kwargs: dict) -> tuple[dict[str, np.ndarray], Supports]:
    """Zeros in the shapes of the latent sites, unconstrained or discrete, and the supports of the latter.

    The model runs on abstract values: on real ones every primitive of it would be compiled by itself.
    """
    discrete: list[str] = []
    trace = lambda key: _traced_position(model, args, kwargs, key, discrete)
    shapes = jax.eval_shape(trace, jax.random.key(0))
    position = jax.tree.map(lambda leaf: np.zeros(leaf.shape, leaf.dtype), shapes)
    return position, _supports(model, args, kwargs, discrete) if discrete else ()


def _traced_position(
    model: Callable, args: tuple, kwargs: dict, rng_key: PRNGKey, discrete: list[str]
) -> dict[str, Any]:
    """Values of the latent sites at a random point, and the names of discrete ones; checks what NumPyro lets pass."""
    from numpyro.distributions.transforms import biject_to
    from numpyro.infer.util import helpful_support_errors

    trace = _random_trace(model, args, kwargs, rng_key)
    check_trace(trace)
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
            position[name] = jnp.asarray(site["value"], int)
            discrete.append(name)
            continue
        with helpful_support_errors(site):
            position[name] = jnp.asarray(biject_to(site["fn"].support).inv(site["value"]), float)
    return position


def _supports(model: Callable, args: tuple, kwargs: dict, names: list[str]) -> Supports:
    """The values of each discrete site, which must be the same at two random points."""
    first, second = (_random_trace(model, args, kwargs, jax.random.key(seed)) for seed in range(2))
    supports = {name: _support(name, first[name]["fn"]) for name in names}
    moving = [name for name, values in supports.items() if _support(name, second[name]["fn"]) != values]
    if moving:
        raise ValueError(
            f"the support of {moving} depends on other latent sites, so it cannot be enumerated beforehand: "
            "marginalise these sites out, or give them a fixed support and weights of zero."
        )
    return tuple(supports.items())


def _random_trace(model: Callable, args: tuple, kwargs: dict, rng_key: PRNGKey) -> dict:
    from numpyro import handlers, validation_enabled
    from numpyro.infer.initialization import init_to_uniform

    with validation_enabled(False):  # values are judged by the density, and named, before anything is sampled
        # as NumPyro starts its own samplers: an improper prior has no draws
        started = handlers.substitute(handlers.seed(model, rng_key), substitute_fn=init_to_uniform)
        return handlers.trace(started).get_trace(*args, **kwargs)


def _support(name: str, fn: Any) -> tuple[int, ...]:
    """The values of each element of a discrete site."""
    from numpyro.distributions import Independent, MaskedDistribution

    while isinstance(fn, (Independent, MaskedDistribution)):
        fn = fn.base_dist
    found = None
    if fn.has_enumerate_support and not fn.event_dim:
        try:
            found = np.unique(np.asarray(fn.enumerate_support(expand=False)))
        except NotImplementedError:
            found = None
    if found is None:
        raise ValueError(
            f"latent site {name!r} is discrete without a finite support that all its elements share: marginalise it "
            "out, truncate it to a Categorical site, or write its update and pass the model's log density to "
            "pmcmc.sample with Compose([...])."
        )
    return tuple(found.tolist())


def numpyro_starts(target: Target, rng_key: PRNGKey, num_starts: int) -> PyTree:
    """Valid unconstrained starts as NumPyro draws them (`init_to_uniform`), leading axis ``num_starts``.

    Uniform on (-2, 2), and on the values of a discrete site; drawn again up to 100 times where the density or its
    gradient is not finite. NumPyro's own function compiles anew at every call, which took two thirds of a short one.

    Raises:
        ValueError: no start with a finite density and gradient was found; says which site is to blame.
    """
    starts, usable = None, np.zeros(num_starts, bool)
    for tries in range(_MAX_TRIES):
        drawn = jax.tree.map(np.asarray, _draw_starts(target, rng_key, jnp.asarray(tries), num_starts=num_starts))
        keep = lambda old, new: np.where(usable.reshape(-1, *(1,) * (new.ndim - 1)), old, new)  # noqa: B023
        starts = drawn if starts is None else jax.tree.map(keep, starts, drawn)
        *_, usable = evaluate_starts(target, starts)
        if usable.all():
            return starts
    centre = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), target.spec.template)
    centre.update({name: jnp.full_like(centre[name], values[0]) for name, values in target.model.supports})
    raise ValueError(
        f"the log density cannot be used at any of {_MAX_TRIES} random starts. "
        f"{target.model.explain(target.data, centre)} Check the model and its data for NaN and values outside a "
        "support, or pass starting values by init_params."
    )


_MAX_TRIES = 100


@partial(jax.jit, static_argnames="num_starts")
def _draw_starts(target: Target, rng_key: PRNGKey, tries: Array, *, num_starts: int) -> PyTree:
    """Leading axis num_starts. Neither the density nor jax.random is in here: each took longer to compile."""
    supports, template, drawn = dict(target.model.supports), target.spec.template, 0

    def uniform(*shape: int) -> Array:
        nonlocal drawn
        numbers = drawn + jnp.arange(math.prod(shape), dtype=jnp.uint32).reshape(shape)
        drawn += math.prod(shape)
        bits, _ = threefry_2x32(key_pair(rng_key), numbers, tries.astype(jnp.uint32))
        return bits.astype(target.spec.dtype) * 2.0**-32

    starts = jax.vmap(target.spec.unravel)(4 * uniform(num_starts, target.dim) - 2)
    for name, values in supports.items():
        which = (uniform(num_starts, *template[name].shape) * len(values)).astype(int)
        starts[name] = jnp.asarray(values, template[name].dtype)[jnp.minimum(which, len(values) - 1)]
    return starts


def print_summary(samples: dict, prob: float) -> None:
    """NumPyro's table of means, quantiles, n_eff and r_hat for samples with axes (chain, draw, ...)."""
    from numpyro.diagnostics import print_summary as numpyro_print_summary

    numpyro_print_summary(samples, prob=prob, group_by_chain=True)
