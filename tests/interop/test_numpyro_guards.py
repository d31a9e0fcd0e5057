"""pmcmc refuses or warns of what NumPyro's MCMC refuses or warns of: one row for each check in its source (0.22).

The checks are in `MCMC.__init__` and `run`, `HMC.__init__`, `init` and `_init_state`, `initialize_model`,
`_validate_model`, `_transforms_from_trace`, `find_valid_initial_params`, `potential_energy`, `constrain_fn`, and the
plates, handlers and distributions that a model consists of.
"""

import functools
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import pytest
from numpyro.contrib.control_flow import cond, scan
from numpyro.infer import HMC, MCMC, NUTS
from numpyro.infer.util import initialize_model
from numpyro.util import _validate_model

import pmcmc
from pmcmc.interop.numpyro import numpyro_target

Y = np.array([0.8, 1.4, -0.2, 1.1, 0.9, 0.4])


@pytest.fixture(autouse=True)
def numpyro_broadcasts_over_ranks():
    """Allow rank promotion, which NumPyro's own code needs."""
    with jax.numpy_rank_promotion("allow"):
        yield


def subsampled():
    mu = numpyro.sample("mu", dist.Normal(0, 1))
    with numpyro.plate("rows", 6, subsample_size=2) as index:
        numpyro.sample("y", dist.Normal(mu, 1), obs=jnp.asarray(Y)[index])


def subsampled_latents():
    with numpyro.plate("rows", 6, subsample_size=2) as index:
        mu = numpyro.sample("mu", dist.Normal(0, 1))
        numpyro.sample("y", dist.Normal(mu, 1), obs=numpyro.subsample(jnp.asarray(Y), event_dim=0) + 0 * index)


def subsampled_mixture():
    z = numpyro.sample("z", dist.Bernoulli(0.5))
    with numpyro.plate("rows", 6, subsample_size=2) as index:
        numpyro.sample("y", dist.Normal(1.0 * z, 1), obs=jnp.asarray(Y)[index])


def subsampled_in_scan():
    mu = numpyro.sample("mu", dist.Normal(0, 1))

    def step(carry, _):
        with numpyro.plate("rows", 6, subsample_size=2) as index:
            numpyro.sample("y", dist.Normal(mu, 1), obs=jnp.asarray(Y)[index])
        return carry, None

    scan(step, 0.0, None, length=3)


def subsampled_in_cond():
    mu = numpyro.sample("mu", dist.Normal(0, 1))

    def branch(scale):
        with numpyro.plate("rows", 6, subsample_size=2) as index:
            numpyro.sample("y", dist.Normal(mu, scale), obs=jnp.asarray(Y)[index])

    cond(mu > 0, branch, lambda scale: branch(2 * scale), 1.0)


def series():
    def step(x, _):
        x = numpyro.sample("x", dist.Normal(x, 1))
        return x, numpyro.sample("y", dist.Normal(x, 1))

    return scan(step, 0.0, None, length=6)[1]


def forecast():
    """Six steps with data for three of them."""
    numpyro.handlers.condition(series, data={"y": jnp.asarray(Y)[:3]})()


def masked_forecast():
    """The density does not depend on what is drawn, but a deterministic site does."""
    numpyro.sample("mu", dist.Normal(0, 1))
    with numpyro.handlers.mask(mask=False):
        drawn = numpyro.handlers.condition(series, data={"y": jnp.asarray(Y)[:3]})()
    numpyro.deterministic("drawn", drawn)


def delta():
    mu = numpyro.sample("mu", dist.Normal(0, 1))
    numpyro.sample("same", dist.Delta(mu))


def plate_of_given_rows():
    return numpyro.handlers.substitute(subsampled, data={"rows": jnp.array([0, 3])})()


def all_steps():
    numpyro.handlers.condition(series, data={"y": jnp.asarray(Y)})()


def blocked():
    with numpyro.handlers.block():
        offset = numpyro.sample("offset", dist.Normal(0, 1))
    mu = numpyro.sample("mu", dist.Normal(offset, 1))
    with numpyro.handlers.block():
        offset = numpyro.sample("offset", dist.Normal(offset, 1))
    numpyro.sample("y", dist.Normal(mu, jnp.exp(offset)), obs=0.5)


def blocked_scan():
    with numpyro.handlers.block():
        path = series()
    mu = numpyro.sample("mu", dist.Normal(0, 1))
    numpyro.sample("z", dist.Normal(mu, 1), obs=jnp.sum(path))


def dropout():
    mu = numpyro.sample("mu", dist.Normal(0, 1))
    kept = [jax.random.bernoulli(numpyro.prng_key(), 0.5, (6,)) for _ in range(2)]
    numpyro.sample("y", dist.Normal(mu * kept[0] + kept[1], 1).to_event(1), obs=jnp.asarray(Y))


def dropout_in_scan():
    def step(x, now):
        x = numpyro.sample("x", dist.Normal(x, 1))
        kept = jax.random.normal(numpyro.prng_key())
        with numpyro.handlers.block():
            offset = numpyro.sample("offset", dist.Normal(0, 1))
        numpyro.sample("y", dist.Normal(x * kept + offset, 1), obs=now)
        return x, None

    scan(step, 0.0, jnp.asarray(Y))


def changed_in_place():
    state = numpyro.primitives.mutable("state", {"value": 1.0, "within": {"steps": 0.5}})
    numpyro.sample("mu", dist.Normal(state["value"], state["within"]["steps"]))
    state["value"] = state["value"] + 2.0


def enumerated_in_turn():
    k = numpyro.sample("k", dist.Bernoulli(0.5), infer={"enumerate": "sequential"})
    numpyro.sample("mu", dist.Normal(k, 1))


def counts():
    numpyro.sample("mu", dist.Normal(0, 1))
    numpyro.sample("count", dist.Poisson(3.0))


def same_name_twice():
    numpyro.sample("mu", dist.Normal(0, 1))
    numpyro.deterministic("mu", 1.0)


def on_a_sphere():
    numpyro.sample("direction", dist.ProjectedNormal(jnp.ones(3)))


def on_a_circle():
    numpyro.sample("angle", dist.VonMises(0.0, 1.0))


def plate_left_out():
    mu = numpyro.sample("mu", dist.Normal(0, 1))
    with numpyro.plate("rows", 6, dim=-1):
        numpyro.sample("y", dist.Normal(mu, 1), obs=jnp.asarray(Y)[:, None])  # meant: 6 values, counted: 36


def other_shape():
    mu = numpyro.sample("mu", dist.Normal(jnp.zeros(4), 1).to_event(1))
    numpyro.sample("y", dist.Normal(mu, 1), obs=jnp.asarray(Y))


def other_plate():
    with numpyro.plate("rows", 5):
        numpyro.sample("y", dist.Normal(jnp.zeros(6), 1))


def no_distribution():
    numpyro.sample("mu", 3.0)


def scan_in_a_plate():
    def body(x, _):
        return numpyro.sample("x", dist.Normal(x, 1)), None

    with numpyro.plate("rows", 6):
        scan(body, jnp.zeros(6), None, length=2)


def plate_from_the_left():
    with numpyro.plate("rows", 6, dim=0):
        numpyro.sample("mu", dist.Normal(0, 1))


def empty_plate():
    with numpyro.plate("rows", 0):
        numpyro.sample("mu", dist.Normal(0, 1))


def negative_weight():
    with numpyro.handlers.scale(scale=-1.0):
        numpyro.sample("mu", dist.Normal(0, 1))


def mask_of_floats():
    with numpyro.handlers.mask(mask=jnp.ones(2)):
        numpyro.sample("mu", dist.Normal(jnp.zeros(2), 1).to_event(1))


def never_finite():
    mu = numpyro.sample("mu", dist.Normal(0, 1))
    numpyro.sample("y", dist.Normal(mu, 1), obs=jnp.array([1.0, jnp.nan]))


def outside_support():
    scale = numpyro.sample("scale", dist.HalfNormal(1))
    numpyro.sample("y", dist.Exponential(scale), obs=jnp.array([1.0, -1.0]))


def negative_scale():
    mu = numpyro.sample("mu", dist.Normal(0, 1))
    numpyro.sample("y", dist.Normal(mu, -1.0), obs=jnp.asarray(Y))


def no_gradient():
    mu = numpyro.sample("mu", dist.Normal(0, 1))
    numpyro.factor("kink", jnp.sqrt(mu - jax.lax.stop_gradient(mu)))


def improper():
    mu = numpyro.sample("mu", dist.ImproperUniform(dist.constraints.real, (), ()))
    numpyro.sample("y", dist.Normal(mu, 1), obs=0.5)


def moving_bounds():
    low = numpyro.sample("low", dist.Normal(0, 1))
    numpyro.sample("above", dist.Uniform(low, low + 2))


def whole_plate():
    mu = numpyro.sample("mu", dist.Normal(0, 1))
    with numpyro.plate("rows", 6, subsample_size=6) as index:
        numpyro.sample("y", dist.Normal(mu, 1), obs=jnp.asarray(Y)[index])


class Row(NamedTuple):
    """A model, the error or warning of NumPyro and its words, and the same for pmcmc."""

    model: Callable
    theirs: type[Exception]
    their_words: str
    ours: type[Exception]
    our_words: str


REFUSED = [
    Row(subsampled, ValueError, "do not support subsampling", ValueError, "plate 'rows' draws a subsample of 2 out"),
    Row(subsampled_latents, ValueError, "do not support subsampling", ValueError, "plate 'rows' draws a subsample"),
    Row(forecast, AssertionError, "^", ValueError, "draws values of site 'y', since .*numpyro.infer.Predictive"),
    Row(masked_forecast, AssertionError, "^", ValueError, "draws values of site 'y', since"),
    Row(
        delta,
        ValueError,
        "'same' has a delta distribution",
        ValueError,
        "'same' has a delta distribution.*deterministic",
    ),
    Row(enumerated_in_turn, RuntimeError, "site k is marked as 'sequential'", ValueError, "site 'k' is marked for seq"),
    Row(counts, RuntimeError, "site count does not have enumerate", ValueError, "'count' is discrete without a finite"),
    Row(same_name_twice, AssertionError, "`mu` duplicated", AssertionError, "`mu` duplicated"),
    Row(on_a_sphere, ValueError, "site 'direction'.*ProjectedNormalReparam", ValueError, "site 'direction'.*Projected"),
    Row(other_shape, ValueError, "ncompatible shapes", ValueError, r"site 'y' has shape \(6,\).*of shape \(4,\)"),
    Row(other_plate, ValueError, "ncompatible shapes", ValueError, "ncompatible shapes"),
    Row(no_distribution, TypeError, "instance of numpyro.dist", TypeError, "instance of numpyro.dist"),
    Row(scan_in_a_plate, NotImplementedError, "control flow", NotImplementedError, "control flow"),
    Row(plate_from_the_left, ValueError, "dim arg must be negative", ValueError, "dim arg must be negative"),
    Row(empty_plate, AssertionError, "size of plate", AssertionError, "size of plate"),
    Row(negative_weight, ValueError, "'scale' argument should be pos", ValueError, "'scale' argument should be pos"),
    Row(mask_of_floats, ValueError, "`mask` should be a bool", ValueError, "`mask` should be a bool"),
    Row(never_finite, RuntimeError, "Cannot find valid initial", ValueError, "not finite at site 'y'"),
    Row(negative_scale, ValueError, "got invalid scale", ValueError, "site 'y'.*got invalid scale"),
    Row(
        no_gradient,
        RuntimeError,
        "Cannot find valid initial",
        ValueError,
        r"at any of 100 random starts. The gradient is not finite with respect to position\['mu'\]\. Check",
    ),
]
WARNED = [
    Row(plate_left_out, UserWarning, "batch dimension -2 at site 'y'", UserWarning, "batch dimension -2 at site 'y'"),
    Row(on_a_circle, UserWarning, "circular sample site 'angle'", UserWarning, "circular sample site 'angle'"),
]
named = lambda row: row.model.__name__
SIZES = dict(num_warmup=20, num_samples=20, num_chains=2, progress_bar=False)


@pytest.mark.parametrize("row", REFUSED, ids=named)
@pytest.mark.filterwarnings("ignore:Some algorithms will automatically enumerate")
@pytest.mark.filterwarnings("ignore:.*Out-of-support")
def test_models_that_both_refuse(row: Row) -> None:
    with pytest.raises(row.theirs, match=row.their_words):
        MCMC(NUTS(row.model), num_warmup=1, num_samples=1, progress_bar=False).run(jax.random.key(0))
    with pytest.raises(row.ours, match=row.our_words):
        pmcmc.parallel_chain(row.model, 0, **SIZES)


@pytest.mark.parametrize("row", WARNED, ids=named)
def test_models_that_both_warn_of(row: Row) -> None:
    with pytest.warns(row.theirs, match=row.their_words):
        initialize_model(jax.random.key(0), row.model)
    with pytest.warns(row.ours, match=row.our_words):
        numpyro_target(row.model, (), {})


@pytest.mark.parametrize(
    "sample",
    [
        lambda: pmcmc.ParallelMCMC(NUTS(subsampled), **SIZES).run(jax.random.key(0)),
        lambda: pmcmc.ParallelMCMC(subsampled, **SIZES).warmup(jax.random.key(0)),
        lambda: pmcmc.parallel_chain(subsampled, 0, kernel=pmcmc.MALA(), **SIZES),
        lambda: pmcmc.parallel_chain(subsampled_mixture, 0, **SIZES),
        lambda: pmcmc.ParallelMCMC(subsampled_mixture, kernel=pmcmc.DiscreteGibbs(), **SIZES).run(jax.random.key(0)),
    ],
    ids=["drop-in", "its warm-up", "another kernel", "discrete sites", "drop-in with Gibbs"],
)
def test_subsampled_plates_are_refused_everywhere(sample: Callable) -> None:
    with pytest.raises(ValueError, match=r"plate 'rows' draws a subsample of 2 out of 6.*substitute\(model, data="):
        sample()


@pytest.mark.parametrize(
    ("model", "words"), [(subsampled_in_scan, "index the arrays before the scan"), (subsampled_in_cond, "substitute")]
)
def test_subsamples_within_control_flow(model: Callable, words: str) -> None:
    """NumPyro samples the posterior of one random subset, the same in every step."""
    initialize_model(jax.random.key(0), model)
    with pytest.raises(ValueError, match=f"plate 'rows' draws a subsample of 2 out of 6.*{words}"):
        numpyro_target(model, (), {})


ACCEPTED = [
    plate_of_given_rows,
    improper,
    moving_bounds,
    whole_plate,
    all_steps,
    blocked,
    blocked_scan,
    dropout,
    dropout_in_scan,
    changed_in_place,
]


@pytest.mark.parametrize("model", ACCEPTED, ids=lambda m: m.__name__)
def test_models_that_both_accept(model: Callable) -> None:
    """Models that are accepted have NumPyro's density."""
    theirs = initialize_model(jax.random.key(0), model)
    target, position = numpyro_target(model, (), {}), theirs.param_info.z
    ours = target.model.logdensity(target.data, position)
    np.testing.assert_allclose(ours, -theirs.param_info.potential_energy, rtol=1e-12)


def test_rows_that_a_handler_around_the_call_gives() -> None:
    position, expected = {"mu": jnp.asarray(0.3)}, numpyro_target(plate_of_given_rows, (), {})
    with numpyro.handlers.substitute(data={"rows": jnp.array([0, 3])}):
        target = numpyro_target(subsampled, (), {})
    ours, given = (x.model.logdensity(x.data, position) for x in (target, expected))
    assert ours == given


def test_a_dict_of_the_users_stays_as_it_is() -> None:
    shared = {"value": 1.0, "within": {"steps": 0}}

    def model():
        state = numpyro.primitives.mutable("state", shared)
        state["value"] = state["within"]["steps"] = numpyro.sample("mu", dist.Normal(0, 1))

    numpyro_target(model, (), {})
    assert shared == {"value": 1.0, "within": {"steps": 0}}


def test_missing_plates_of_discrete_sites_do_no_harm() -> None:
    """NumPyro enumerates and must know what is independent; Gibbs updates one element after the other."""

    def without_a_plate():
        z = numpyro.sample("z", dist.Bernoulli(jnp.array([0.5, 0.5])))
        numpyro.sample("y", dist.Normal(1.0 * z, 1), obs=jnp.zeros(2))

    trace = numpyro.handlers.trace(numpyro.handlers.seed(without_a_plate, 0)).get_trace()
    with pytest.raises(ValueError, match="Missing a plate statement for batch dimension -1 at site 'z'"):
        _validate_model(trace, plate_warning="error")  # as initialize_model does when it enumerates
    numpyro_target(without_a_plate, (), {})


@pytest.mark.filterwarnings("ignore:.*Out-of-support")
def test_values_outside_a_support() -> None:
    """Where the density is not -inf there, only NumPyro's validation notices; pmcmc then refuses as NumPyro does."""
    with numpyro.validation_enabled():
        with pytest.raises(RuntimeError, match="Cannot find valid initial"):
            initialize_model(jax.random.key(0), outside_support)
        with pytest.raises(ValueError, match="not finite at site 'y'"):
            pmcmc.parallel_chain(outside_support, 0, **SIZES)


def model(y=None):
    mu = numpyro.sample("mu", dist.Normal(0, 1))
    numpyro.sample("y", dist.Normal(mu, 1).expand([6]).to_event(1), obs=y)


@pytest.mark.parametrize(
    ("given", "name"),
    [
        (dict(model_args=(map(float, "123"),)), "model_args"),
        (dict(model_kwargs={"y": {"rows": [1.0, iter([2.0])]}}), "model_kwargs"),
    ],
    ids=["map", "within"],
)
def test_iterators_among_the_arguments(given: dict[str, Any], name: str) -> None:
    """NumPyro runs such a model on no data."""
    with pytest.raises(TypeError, match=rf"{name} holds an iterator.*pass list\(\.\.\.\) of it, or an array"):
        pmcmc.parallel_chain(lambda y: model(jnp.asarray(list(y))), 0, **given, **SIZES)


def observe(y):
    mu = numpyro.sample("mu", dist.Normal(0, 1))
    numpyro.sample("y", dist.Normal(mu, 1), obs=jnp.asarray(list(y)))


def weigh(y):
    mu = numpyro.sample("mu", dist.Normal(0, 1))
    numpyro.factor("likelihood", jnp.asarray([-0.5 * (x - mu) ** 2 for x in y]))


@pytest.mark.parametrize(("reads", "site"), [(observe, "'y'"), (weigh, "'likelihood'")], ids=["observed", "factor"])
def test_iterators_elsewhere(reads: Callable, site: str) -> None:
    """In the second run they have no data, or others: the model that was checked would not be the one sampled."""
    rows = SimpleNamespace(y=map(float, (1, 2, 3)))
    for given in (functools.partial(reads, map(float, (1, 2, 3))), lambda: reads(rows.y)):
        with pytest.raises(
            ValueError, match=f"other sites or shapes each time it runs, here at {site}.* make it a list"
        ):
            pmcmc.parallel_chain(given, 0, **SIZES)


START = {"mu": jnp.zeros(3)}  # for three chains
REFUSED_OPTIONS: list[tuple[dict[str, Any], dict[str, Any], type[Exception], str, str]] = [
    (dict(num_warmup=-1), {}, ValueError, "nonnegative", "nonnegative"),
    (dict(thinning=0), {}, ValueError, "thinning must be", "thinning must be"),
    (dict(num_samples=2, thinning=3), {}, ValueError, "greater than thinning", "greater than thinning"),
    (dict(chain_method="parallell"), {}, ValueError, "Only supporting", "Only supporting"),
    ({}, dict(init_params=START), ValueError, "same leading dim", "leading axis num_chains=2"),
    (
        {},
        dict(extra_fields="energy"),
        AssertionError,
        "^$",
        r"extra_fields must be a sequence.*\('energy',\)",
    ),
    ({}, dict(extra_fields=("energie",)), TypeError, "tuple indices", r"no extra_fields \['energie'\]"),
]


@pytest.mark.parametrize(("options", "arguments", "theirs", "their_words", "our_words"), REFUSED_OPTIONS)
def test_options_that_both_refuse(options, arguments, theirs, their_words: str, our_words: str) -> None:
    both = dict(num_warmup=20, num_samples=20, num_chains=2, chain_method="vectorized", progress_bar=False) | options
    with pytest.raises(theirs, match=their_words):
        MCMC(NUTS(model), **both).run(jax.random.key(0), Y, **arguments)
    with pytest.raises((TypeError, ValueError), match=our_words):
        pmcmc.ParallelMCMC(NUTS(model), **both).run(jax.random.key(0), Y, **arguments)


def test_metrics_that_both_refuse() -> None:
    for metric in (jnp.ones(2), jnp.ones((1, 1, 1))):
        sampler = lambda metric=metric: NUTS(model, inverse_mass_matrix=metric, adapt_mass_matrix=False)
        with pytest.raises((ValueError, TypeError, AssertionError)):
            MCMC(sampler(), num_warmup=20, num_samples=20, progress_bar=False).run(jax.random.key(0), Y)
        with pytest.raises(ValueError, match=r"inverse_mass_matrix has shape.*expected \(1,\) or \(1, 1\)"):
            pmcmc.ParallelMCMC(sampler(), **SIZES).run(jax.random.key(0), Y)


def test_what_numpyros_own_constructors_refuse() -> None:
    """Samplers are NumPyro's objects, so these checks run before pmcmc sees them."""
    with pytest.raises(ValueError, match="Only one of `model` or `potential_fn`"):
        NUTS()
    with pytest.raises(ValueError, match="At least one of `num_steps` or `trajectory_length`"):
        HMC(model, trajectory_length=None)
    with pytest.warns(UserWarning, match="step size can't be adapted"):
        HMC(model, num_steps=3)
    with pytest.raises(AssertionError, match="`run` must be called before `get_samples`"):
        pmcmc.ParallelMCMC(NUTS(model), **SIZES).get_samples()
