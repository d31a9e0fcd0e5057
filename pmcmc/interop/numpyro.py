"""Turn NumPyro models into targets. NumPyro is imported only when a function of this module runs.

`numpyro_target` runs the model once under trace and makes a `Target` of it, whose `NumpyroModel` evaluates log density,
deterministic sites and log likelihoods without running Python again.
"""

from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from pmcmc._pytree import Array, PRNGKey, PyTree, RavelSpec, is_real
from pmcmc._xla.trace import Trace, trace
from pmcmc.interop.numpyro_arguments import refuse_iterators
from pmcmc.interop.numpyro_positions import Shapes, check_shapes, fixed_values, prototype_position, shapes_of
from pmcmc.interop.numpyro_runs import alone, random_trace, watched
from pmcmc.interop.numpyro_sites import NonCentred, active_reparams, non_centred_forms, reparametrised, scales
from pmcmc.interop.partial_centring import AutoReparam, PartialCentring, locations_and_scales
from pmcmc.target import Model, Supports, Target


@dataclass(frozen=True)
class NumpyroModel(Model):
    """A NumPyro model as it was when it was traced. Its data are the arrays that it read then, arguments or not.

    Attributes:
        trace: Trace of `_run`, which computes everything that is asked of a model at a position.
        about: Properties of the sites that are the same at every position.
        supports: Values of each discrete latent site. Positions hold discrete values as they are, and continuous ones
            unconstrained.
        transformed: As in `Model`. Known from the operations of the trace, so not compared.
        forms: For each site with a scale, a hint how to change its form. Not used in computations, so not
            compared.
    """

    trace: Trace
    about: "_Sites"
    supports: Supports = ()
    transformed: tuple[str, ...] = field(default=(), compare=False)
    forms: tuple[NonCentred, ...] = field(default=(), compare=False)

    def density_shape(self, data, position):
        return self.trace.out_shapes["logdensity"]

    def content(self, data):
        operations, numbers = self.trace.content(data.constants)
        return (operations, self.about, self.supports), numbers

    def _part(self, name: str, data: "_Data", position: PyTree) -> PyTree:
        given = (data.centredness,) if data.centredness else ()
        return self.trace.part(name)(data.constants, position, *given)

    def centredness(self, data):
        return data.centredness

    def with_centredness(self, data, centredness):
        return data._replace(centredness={**data.centredness, **centredness})

    def places(self, data, position):
        return self._part("places", data, position) if data.centredness else {}

    def logdensity(self, data, position):
        return self._part("logdensity", data, position)

    def constrain(self, data, position):
        return self._part("values", data, position)

    def log_likelihood(self, data, position):
        return self._part("log_likelihood", data, position)

    def observed(self, data, position):
        return self._part("observed", data, position)

    def element_logdensities(self, data, position, site, values):
        def at(value: Array) -> Array:
            everywhere = {**position, site: jnp.full_like(position[site], value)}
            return _by_element(self.about, self._part("terms", data, everywhere), site, position[site].shape)

        return jnp.moveaxis(jax.vmap(at)(values), 0, -1)

    def changes_own_terms(self, data, position, site, values, index):
        def at(value: Array) -> dict[str, Array]:
            changed = jnp.ravel(position[site]).at[index].set(value).reshape(position[site].shape)
            return self._part("terms", data, {**position, site: changed})

        # One value after the other, by the same operations: terms that do not depend on it are equal bit for bit.
        changed = jax.tree.map(_changes, jax.lax.map(at, values))
        by_element = jnp.ravel(_by_element(self.about, changed, site, position[site].shape))
        own, number = by_element[index], sum(jnp.sum(x) for x in changed.values())
        return (own == number) & (own == jnp.sum(by_element))

    def site_scales(self, data, position):
        return self._part("scales", data, position)

    def non_centred_form(self, site):
        return next(form.hint for form in self.forms if form.site == site)

    @property
    def could_be_centred(self):
        scales = self.trace.part("scales")
        sites = [form.site for form in self.forms if form.is_automatic and form.site in scales.out_shapes]
        return any(scales.part(site).reads_arguments for site in sites)

    def explain(self, data, position) -> str:
        finite = self._part("finite", data, position)
        sites = [name for name in self.about.order if not bool(finite.get(name, True))]
        return f"Its terms are not finite at site {', '.join(map(repr, sites))}." if sites else ""

    @property
    def dims(self) -> dict[str, list[str]]:
        return {name: list(dims) for name, dims in self.about.dims}


class _Data(NamedTuple):
    """What a model reads.

    Attributes:
        constants: Arrays, arguments or not.
        centredness: c of partially centred sites, in the shapes of their unconstrained values; empty if there are none.
    """

    constants: list[Array]
    centredness: dict[str, Array]


class _Sites(NamedTuple):
    """Properties of a model's sites that are the same at every position.

    Attributes:
        order: Names of the sites.
        dims: Names of the leading axes of their values, by site.
        plates: Plates of each site, as (name, axis) pairs.
    """

    order: tuple[str, ...]
    dims: tuple[tuple[str, tuple[str, ...]], ...]
    plates: tuple[tuple[str, tuple[tuple[str, int], ...]], ...]


def _run(
    model: Callable,
    args: tuple,
    kwargs: dict,
    supports: Supports,
    position: PyTree,
    centredness: dict[str, Array],
    rng_key: PRNGKey,
) -> tuple[dict, tuple[_Sites, tuple[NonCentred, ...], Shapes]]:
    """Run the model once at a position; return what is asked of it, and its `_Sites`, non-centred forms and shapes.

    ``centredness`` names the partially centred sites, of which the position holds w. A result that depends on
    ``rng_key`` is made from values that neither the position nor the data give.

    Each program takes one entry of the dict, and tracing drops what only the other entries need:

        logdensity: Log density at the position.
        values: Values of latent and deterministic sites.
        terms: Log probabilities by site, with NumPyro's scales, not summed.
        log_likelihood: Log probabilities of observed sites, without scales.
        finite: Whether all log probabilities of a site are finite.
        scales: Scales of latent sites of location-scale families, without partially centred ones.
        observed: The data.
        places: The `Place` of each partially centred site, if there are any.
    """
    partial = PartialCentring(position, centredness)
    terms, sites, active = _trace_at(model, args, kwargs, supports, position, partial, rng_key)
    terms |= {name: partial.term(name, sites[name]["fn"]) for name in centredness}
    drawn = {name: site for name, site in sites.items() if site["type"] == "sample"}
    observed = {name: site for name, site in drawn.items() if _is_observation(site)}
    values = {
        name: site["value"]
        for name, site in sites.items()
        if site["type"] == "deterministic" or (name in drawn and not site.get("is_observed", False))
    }
    asked = {
        "logdensity": sum((jnp.sum(term) for term in terms.values()), start=0.0),
        "values": jax.tree.map(jnp.asarray, values),
        "terms": jax.tree.map(jnp.asarray, terms),
        "log_likelihood": {name: _log_likelihood(site, terms[name]) for name, site in observed.items()},
        "finite": {name: jnp.all(jnp.isfinite(term)) for name, term in terms.items()},
        "scales": scales({name: site for name, site in drawn.items() if name not in centredness}),
        "observed": {name: jnp.asarray(site["value"]) for name, site in observed.items()},
    }
    if centredness:
        asked["places"] = {name: partial.place(name, sites[name]["fn"]) for name in centredness}
    about, forms = _about(sites, {*values, *observed}), non_centred_forms(sites, active, bool(supports))
    return asked, (about, forms, shapes_of(sites))


def _trace_at(
    model: Callable,
    args: tuple,
    kwargs: dict,
    supports: Supports,
    position: PyTree,
    partial: PartialCentring,
    rng_key: PRNGKey,
) -> tuple[dict[str, Array], dict[str, dict], dict[str, list]]:
    """Run the model once at a position, as NumPyro's ``potential_energy`` does, which keeps neither terms nor sites.

    NumPyro has no key then, and fails where a value is missing. Here it is drawn from ``rng_key``, see `watched`.

    Returns:
        Log probabilities by site, not summed; the sites; and by site the ``reparam`` handlers that see it.
    """
    from numpyro import handlers
    from numpyro.infer.util import _unconstrain_reparam, compute_log_probs

    discrete = {name: position[name] for name, _ in supports}
    continuous = {name: value for name, value in position.items() if name not in discrete}
    given = watched(handlers.substitute(model, data=discrete) if discrete else model, rng_key)
    active: dict[str, list] = {}

    def start(site: dict) -> Any:
        active[site["name"]] = active_reparams()
        return partial.value(site) if site["name"] in partial.names else _unconstrain_reparam(continuous, site)

    started = handlers.substitute(given, substitute_fn=start)
    terms, sites = compute_log_probs(started, args, kwargs, {}, sum_log_prob=False)
    return terms, sites, active


def _non_centred(
    model: Callable, args: tuple, kwargs: dict, supports: Supports, position: PyTree
) -> dict[str, np.ndarray]:
    """Return a centredness of 0 for each site that can be partially centred and depends on other latent sites.

    Sites that `LocScaleReparam` made are left alone, whatever they depend on, and so are sites without elements.
    """

    def find(position: PyTree) -> dict[str, tuple[Array, Array]]:
        unused = jax.random.key(0)  # the whole trace is checked for what is drawn
        _, sites, active = _trace_at(model, args, kwargs, supports, position, PartialCentring(position, {}), unused)
        drawn = {name: site for name, site in sites.items() if site["type"] == "sample"}
        places = locations_and_scales(drawn)
        return {name: place for name, place in places.items() if reparametrised(name, sites, active[name]) == name}

    found = trace(find, position).trace
    names = [name for name in found.out_shapes if position[name].size and found.part(name).reads_arguments]
    return {name: np.zeros(position[name].shape, position[name].dtype) for name in names}


def _check_supports(model: Callable, args: tuple, kwargs: dict, supports: Supports, position: PyTree) -> None:
    """Raise an error if the support of a discrete site depends on other latent sites.

    Raises:
        ValueError: It does, even if it is the same at most positions.
    """

    def find(position: PyTree) -> dict[str, list]:
        unused = jax.random.key(0)  # the whole trace is checked for what is drawn
        _, sites, _ = _trace_at(model, args, kwargs, supports, position, PartialCentring(position, {}), unused)
        return {name: _bounds(sites[name]["fn"]) for name, _ in supports}

    found = trace(find, position).trace
    moving = [name for name, _ in supports if found.part(name).reads_arguments]
    if moving:
        raise ValueError(
            f"the support of {moving} depends on other latent sites, so it cannot be enumerated beforehand: "
            "marginalise these sites out, or give them a fixed support and weights of zero."
        )


def _bounds(distribution: Any) -> list:
    """Return the numbers that a discrete support depends on."""
    try:
        return jax.tree.leaves(distribution.support)
    except NotImplementedError:  # a constraint of the user's own that is no pytree
        return [distribution.enumerate_support(expand=False)]


def _log_likelihood(site: dict, term: Array) -> Array:
    """Return the log probabilities of an observed site without NumPyro's scale; ``term`` includes it."""
    return jnp.asarray(term if site["scale"] is None else site["fn"].log_prob(site["value"]))


def _about(sites: dict[str, dict], labelled: set[str]) -> _Sites:
    """Collect `_Sites`; ``labelled`` are the sites whose values a user sees, without factors."""
    axes: dict[str, tuple[str, ...]] = {}
    plates, sizes_of = [], defaultdict(set)
    for name, site in sites.items():
        if site["type"] not in ("sample", "deterministic"):
            continue
        frames = sorted(site["cond_indep_stack"], key=lambda frame: frame.dim)
        plates.append((name, tuple((frame.name, frame.dim) for frame in frames)))
        # A deterministic site in a plate need not have the plate's axis; the first axis of a site in a scan is time.
        shape, sizes = jnp.shape(site["value"]), tuple(frame.size for frame in frames)
        if name in labelled and shape[: len(frames)] == sizes and not (frames and _is_in_scan(site)):
            events = site.get("infer", {}).get("event_dims", [])
            axes[name] = (*(frame.name for frame in frames), *events)
            for axis, size in zip(axes[name], shape, strict=False):
                sizes_of[axis].add(size)
    # xarray would pad sites that share an axis of several sizes: such an axis has ArviZ's own name, by site.
    own = lambda name, n, axis: axis if len(sizes_of[axis]) < 2 else f"{name}_dim_{n}"
    dims = ((name, tuple(own(name, n, axis) for n, axis in enumerate(names))) for name, names in axes.items())
    return _Sites(tuple(sites), tuple(dims), tuple(plates))


def _is_in_scan(site: dict) -> bool:
    """Whether a site is within NumPyro's ``scan``, whose steps are the first axis of its values."""
    return bool(site.get("_control_flow_done", False))


def _is_observation(site: dict) -> bool:
    """Whether a site is data, and not a factor, whose value is empty."""
    return site["type"] == "sample" and site.get("is_observed", False) and jnp.size(site["value"]) > 0


def _changes(terms: Array) -> Array:
    """Return 1 for each term that differs along the leading axis, 0 for the others."""
    same = (terms == terms[:1]) | (jnp.isnan(terms) & jnp.isnan(terms[:1]))
    return jnp.any(~same, axis=0).astype(float)


def _by_element(about: _Sites, terms: dict[str, Array], name: str, shape: tuple[int, ...]) -> Array:
    """Sum the log probabilities that belong to each element of a site: the terms of all sites within its plates.

    Raises:
        ValueError: The site has dimensions that are not plates.
    """
    plates_of = {site: dict(frames) for site, frames in about.plates}
    plates = plates_of[name]
    if {-axis for axis in range(1, len(shape) + 1) if shape[-axis] > 1} - set(plates.values()):
        raise ValueError(
            f"site {name!r} of shape {shape} has dimensions that no plate declares independent: put it in a plate, or "
            "leave it out of `independent`."
        )
    total = jnp.zeros(shape)
    for other, term in terms.items():
        if plates.keys() <= plates_of[other].keys():
            foreign = tuple(axis for axis in range(-term.ndim, 0) if axis not in plates.values())
            term = jnp.sum(term, axis=foreign, keepdims=True)
            total = total + jnp.broadcast_to(term.reshape(term.shape[max(0, term.ndim - len(shape)) :]), shape)
    return total


@alone
def numpyro_target(
    model: Callable, model_args: tuple, model_kwargs: dict, reparam: AutoReparam | None = None
) -> Target:
    """Return a `Target` over the unconstrained latent sites of a NumPyro model as it is now.

    The model runs on the user's own arguments, so numpy computes with them in their own precision, and values enter JAX
    as they do in NumPyro. Arrays that the model reads, arguments or not, become data leaves, so a second call with
    arrays of the same shapes does not compile again.

    Args:
        model: A NumPyro model: a function with sample sites.
        model_args: Positional arguments of the model.
        model_kwargs: Keyword arguments of the model.
        reparam: Which sites are partially centred, non-centred at first. None: none.

    Raises:
        TypeError: ``model`` is not callable.
        TypeError: ``reparam`` is not an `AutoReparam`, or an argument of the model is an iterator.
        ValueError: The model has no latent sites, discrete ones that cannot be enumerated, or other data in each run.
    """
    if not (reparam is None or isinstance(reparam, AutoReparam)):
        raise TypeError(f"reparam must be None or pmcmc.AutoReparam(), got {reparam!r}.")
    if not callable(model):
        raise TypeError(f"model must be a NumPyro model (a function with sample sites), got {type(model).__name__}.")
    refuse_iterators(model_args, model_kwargs)
    args, kwargs = tuple(model_args), dict(model_kwargs)
    prototype, supports, transformed, fixed, shapes = prototype_position(model, args, kwargs)
    if fixed:
        from numpyro.handlers import substitute

        model = substitute(model, data=fixed_values(model, args, kwargs, fixed))
    static: list[tuple[_Sites, tuple, Shapes]] = []

    def run(position: PyTree, *given: Any) -> dict:
        *centred, rng_key = given
        out, about = _run(model, args, kwargs, supports, position, centred[0] if centred else {}, rng_key)
        static.append(about)
        return out

    try:
        template = RavelSpec.of(prototype).template
        if supports:
            _check_supports(model, args, kwargs, supports, template)
        centredness = {} if reparam is None else _non_centred(model, args, kwargs, supports, template)
        rng_key = jax.eval_shape(lambda: jax.random.key(0))
        traced = trace(run, template, *([centredness] if centredness else []), rng_key)
        about, forms, found = static[-1]
        check_shapes(shapes, found)
        _refuse_drawn(traced.trace)
        data = _Data(traced.constants, jax.device_put(centredness))
        sampled = NumpyroModel(traced.trace.without_last, about, supports, transformed, forms)
        return Target.build(sampled, prototype, data)
    except ValueError as error:
        raise ValueError(f"{_refusing_site(model, args, kwargs)}{error}") from error


def _refuse_drawn(found: Trace) -> None:
    """Raise an error if a model draws what the density, or another result, is made from.

    Args:
        found: Trace of `_run`, whose last argument is the key.

    Raises:
        ValueError: It does, as where fewer values are given than a ``scan`` has steps.
    """
    if not found.uses_last:
        return
    parts = [found.part(name) for name in ("values", "observed")]
    drawn = {name for part in parts for name in part.out_shapes if part.part(name).reads_last}
    sites = [name for name in found.part("terms").out_shapes if name in drawn]
    what = f"values of {', '.join(f'site {name!r}' for name in sites)}" if sites else "numbers that belong to no site"
    raise ValueError(
        f"the model draws {what}, since it is given none for them, as where data end before the last step of a scan. "
        "MCMC does not support this: every step would have to see the same values. Run the model for the steps that "
        "have data, without a forecast, and forecast by numpyro.infer.Predictive(model, samples)(rng_key, ...)."
    )


def _refusing_site(model: Callable, args: tuple, kwargs: dict) -> str:
    """Name the site whose distribution NumPyro rejects, as the beginning of a sentence; "" for other faults."""
    from numpyro import handlers, validation_enabled
    from numpyro.infer.initialization import init_to_uniform

    key = jax.random.key(0)
    names = list(random_trace(model, args, kwargs, key))
    started = handlers.substitute(handlers.seed(model, key), substitute_fn=init_to_uniform)
    checked = handlers.trace(started)
    try:
        with validation_enabled(True):
            checked.get_trace(*args, **kwargs)
    except ValueError:
        return f"check the parameters of the distribution at site {names[len(checked.trace)]!r}: "
    return ""


def summary_of(samples: dict, prob: float) -> dict[str, dict]:
    """Return NumPyro's means, medians, intervals, n_eff and r_hat for samples with axes (chain, draw, ...)."""
    from numpyro import diagnostics

    found: dict[str, dict] = {}
    for name, x in samples.items():
        # NumPyro computes in the dtype of the draws: it adds millions of float32 numbers one after the other, adds
        # integers in pairs for the median, and subtracts booleans. One site at a time is copied to a wider dtype.
        wide = np.asarray(x, float if is_real(x) else np.result_type(x.dtype, np.int64))
        found |= diagnostics.summary({name: wide}, prob=prob, group_by_chain=True)
    return found
