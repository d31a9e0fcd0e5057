"""Targets from NumPyro models have NumPyro's density, gradient and sites; data of one shape compile once."""

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import pytest
from numpyro.contrib.control_flow import scan
from numpyro.distributions.transforms import OrderedTransform
from numpyro.infer.reparam import LocScaleReparam
from numpyro.infer.util import constrain_fn, log_likelihood, potential_energy

import pmcmc
from benchmarks._compilations import compilations
from pmcmc.chain.state import model_source
from pmcmc.interop.numpyro import numpyro_target
from pmcmc.interop.numpyro_starts import numpyro_starts
from pmcmc.recurrence import Sequential
from pmcmc.sampling.engine import Engine
from pmcmc.sampling.programs import Shape
from pmcmc.starts import check_starts
from tests.helpers.selection import share
from tests.helpers.targets import EFFECTS, ERRORS, FEATURES, LABELS, eight_schools_model, logistic_model


@pytest.fixture(autouse=True)
def numpyro_broadcasts_over_ranks():
    """Allow rank promotion, which NumPyro's own code and models in its style need."""
    with jax.numpy_rank_promotion("allow"):
        yield


Y = np.random.default_rng(0).normal(size=(6, 3))
GROUP = np.array([0, 1, 2, 0, 1, 2])


def constrained_sites(y):
    """One site of every unusual support."""
    with numpyro.plate("columns", 3):
        scale = numpyro.sample("scale", dist.HalfCauchy(2.0))
        rate = numpyro.sample("rate", dist.Beta(2.0, 3.0))
    corr = numpyro.sample("corr", dist.LKJCholesky(3, 1.5))
    weights = numpyro.sample("weights", dist.Dirichlet(jnp.array([1.0, 2.0, 3.0])))
    cut = numpyro.sample(
        "cut", dist.TransformedDistribution(dist.Normal(0, 1).expand([3]).to_event(1), OrderedTransform())
    )
    zero = numpyro.sample("zero", dist.ZeroSumNormal(1.0, (4,)))
    low = numpyro.sample("low", dist.TruncatedNormal(0.0, 1.0, low=0.5, high=2.0))
    numpyro.deterministic("spread", weights * scale)
    factor = low * scale[:, None] * corr
    numpyro.sample("y", dist.MultivariateNormal(cut + zero[:3] * rate, scale_tril=factor), obs=y)


def nested_plates(y, group):
    mu = numpyro.sample("mu", dist.Normal(0, 2))
    with numpyro.plate("groups", 3, dim=-2), numpyro.plate("columns", 3, dim=-1):
        effect = numpyro.sample("effect", dist.StudentT(4, mu, 1))
    with numpyro.plate("rows", 6, dim=-2), numpyro.plate("columns", 3, dim=-1):
        numpyro.sample("y", dist.Normal(effect[group], 1), obs=y)


def masked(y, mask):
    mu = numpyro.sample("mu", dist.Normal(0, 2).expand([3]).to_event(1))
    with numpyro.handlers.mask(mask=mask), numpyro.plate("rows", 6, dim=-2), numpyro.plate("columns", 3):
        numpyro.sample("y", dist.Normal(mu, 1.0), obs=y)
    numpyro.factor("penalty", -jnp.sum(mu**4))


def values_while_traced(y, group):
    """A model that needs the values of an integer array while it is traced."""
    effect = numpyro.sample("effect", dist.Normal(0, 1).expand([len(np.unique(group))]).to_event(1))
    numpyro.sample("y", dist.Normal(effect[group][:, None], 1).to_event(2), obs=y)


def options(y, num_groups=1, centred=True, name="mu", extra=None, scales=(1.0, 2.0)):
    mu = numpyro.sample(name, dist.Normal(0, scales[1]).expand([num_groups]).to_event(1))
    if not centred:
        mu = 2 * mu
    numpyro.sample(
        "y", dist.Normal(mu[0] + (0 if extra is None else extra), scales[0]).expand(y.shape).to_event(2), obs=y
    )


def autoregression(y):
    """A model with sites within a loop."""
    phi = numpyro.sample("phi", dist.Uniform(-1, 1))
    scale = numpyro.sample("scale", dist.HalfNormal(1.0))

    def step(x, now):
        x = numpyro.sample("x", dist.Normal(phi * x, scale))
        numpyro.deterministic("doubled", 2 * x)
        numpyro.sample("y", dist.Normal(x, 1.0), obs=now)
        return x, None

    scan(step, 0.0, y)


def reparametrised(y):
    mu = numpyro.sample("mu", dist.TransformedDistribution(dist.Normal(0, 1), dist.transforms.ExpTransform()))
    with numpyro.handlers.reparam(config={"theta": LocScaleReparam(0.0)}):
        theta = numpyro.sample("theta", dist.Normal(mu, 2.0))
    with numpyro.handlers.scale(scale=0.5), numpyro.plate("rows", len(y)):
        numpyro.sample("y", dist.Normal(theta, 1.0), obs=y)


MODELS = {
    "eight schools": (eight_schools_model, (ERRORS,), {"effects": EFFECTS}),
    "logistic": (logistic_model, (FEATURES,), {"labels": LABELS}),
    "supports": (constrained_sites, (Y,), {}),
    "plates": (nested_plates, (Y, GROUP), {}),
    "masked": (masked, (Y, Y > 0), {}),
    "constants": (values_while_traced, (Y,), {"group": GROUP}),
    "options": (options, (Y, 3), dict(centred=False, name="nu", extra=None, scales=(0.5, 3.0))),
    "loop": (autoregression, (Y[:, 0],), {}),
    "reparametrised": (reparametrised, (Y[:, 0],), {}),
    "jax arrays": (options, (jnp.asarray(Y),), dict(extra=jnp.float64(0.5), num_groups=2)),
}


@pytest.mark.parametrize("name", share(list(MODELS), *(set(MODELS) - {"supports"})))
def test_density_and_sites_are_numpyros(name: str) -> None:
    model, args, kwargs = MODELS[name]
    target = numpyro_target(model, args, kwargs)
    seeded = numpyro.handlers.seed(model, jax.random.key(1))
    theirs = jax.jit(jax.value_and_grad(lambda y: -potential_energy(seeded, args, kwargs, target.spec.unravel(y))))
    sites = jax.jit(lambda y: constrain_fn(seeded, args, kwargs, target.spec.unravel(y), return_deterministic=True))
    ours, our_sites = jax.jit(target.value_and_grad), jax.jit(target.constrain)
    for seed in range(4):
        y = jax.random.uniform(jax.random.key(seed), (target.dim,), minval=-2, maxval=2)
        for a, b in zip(ours(y), theirs(y), strict=True):
            np.testing.assert_allclose(a, b, rtol=1e-11, atol=1e-11)
        expected = sites(y)
        assert set(our_sites(y)) == set(expected)
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-12), our_sites(y), expected)
    observed = log_likelihood(model, jax.tree.map(lambda x: x[None], expected), *args, **kwargs)
    ours_observed = target.model.log_likelihood(target.data, target.position(y))
    for site in ours_observed:
        np.testing.assert_allclose(ours_observed[site], observed[site][0], rtol=1e-12)


def test_starts_are_numpyros_and_usable() -> None:
    for name in ("supports", "constants"):
        model, args, kwargs = MODELS[name]
        target = numpyro_target(model, args, kwargs)
        starts = numpyro_starts(target, jax.random.key(0), 3)
        assert all(np.all(np.abs(x) <= 2) for x in jax.tree.leaves(starts))
        assert all(x.shape[0] == 3 for x in jax.tree.leaves(starts))
        coordinates = jax.vmap(target.coordinates)(starts)
        assert coordinates.shape == (3, target.dim)
        assert len(np.unique(coordinates[:, 0])) == 3
        check_starts(target, starts)
        back = jax.vmap(target.position)(coordinates)
        jax.tree.map(np.testing.assert_array_equal, back, starts)


def test_starts_that_are_not_found_are_those_of_others() -> None:
    """At one random position in 130 the density can be used."""

    def narrow():
        x = numpyro.sample("x", dist.Normal(0, 1))
        numpyro.factor("narrow", jnp.where(x > 1.97, 0.0, -jnp.inf))

    target = numpyro_target(narrow, (), {})
    with pytest.warns(UserWarning, match=r"For \d of 8 random starts .* not finite at site 'narrow'"):
        starts = numpyro_starts(target, jax.random.key(0), 8)
    assert np.all(starts["x"] > 1.97)
    assert 1 < len(np.unique(starts["x"])) < 8


def left_to_right(y):
    """A Markov chain that never goes back: of the uniform sequences one in a million is possible."""
    probs = jnp.array([[0.7, 0.3, 0.0], [0.0, 0.7, 0.3], [0.0, 0.0, 1.0]])
    shift = numpyro.sample("shift", dist.Normal(0, 1))

    def step(state, now):
        state = numpyro.sample("state", dist.Categorical(probs[state]))
        numpyro.sample("y", dist.Normal(state + shift, 1.0), obs=now)
        return state, None

    scan(step, 0, y)


def test_discrete_sites_start_from_their_prior_where_uniform_values_are_impossible() -> None:
    y = np.linspace(0, 2, 24)
    source = model_source(left_to_right, (y,), {})
    with pytest.raises(ValueError, match=r"any of 100 random starts\. The log density is -inf there"):
        numpyro_starts(source.target, jax.random.key(0), 4)
    starts = numpyro_starts(source.target, jax.random.key(0), 4, True, source.prior)
    assert np.all(np.diff(starts["state"], axis=1) >= 0)
    assert len(np.unique(starts["state"], axis=0)) > 1
    assert len(np.unique(starts["shift"])) == 4
    check_starts(source.target, starts)
    chain = pmcmc.parallel_chain(
        left_to_right, 0, model_args=(y,), num_warmup=20, num_samples=20, num_chains=1, progress_bar=False
    )
    assert np.all(np.diff(chain.get_samples()["state"], axis=1) >= 0)
    assert model_source(fine, (Y,), {}).prior is None


def test_what_is_data_and_what_is_constant() -> None:
    """Arrays are data, wherever they come from; numbers, strings and shapes belong to the model."""
    leaves = lambda name: jax.tree.leaves(numpyro_target(*MODELS[name]).data)
    data = lambda name: [x.shape for x in leaves(name) if x.dtype != bool and x.size != 1]
    assert sorted(data("plates")) == [(6,), (6, 3)]
    assert sorted(data("constants")) == [(6,), (6, 3)]  # the integers are needed as values and are read, too
    assert data("options") == data("jax arrays") == [(6, 3)]
    assert () in [x.shape for x in leaves("jax arrays")]


def test_same_shapes_compile_once() -> None:
    """New numbers are new leaves of the same program; another model is a new program."""

    def model(y, group, centred=True):
        effect = numpyro.sample("effect", dist.Normal(0, 1).expand([3]).to_event(1))
        numpyro.sample("y", dist.Normal(effect[group][:, None], 1).to_event(2), obs=y if centred else 2 * y)

    kernel = pmcmc.HMC(step_size=0.2, num_integration_steps=2)

    def solve(y, group, **options):
        target = numpyro_target(model, (y, group), options)
        x0 = jnp.zeros((1, 3))
        keys = jax.random.split(jax.random.key(0), 1)
        with compilations() as compiled:
            segment, _ = Engine(target, kernel, keys, x0, None).solve(
                Sequential(), Shape(1, 10), x0, np.zeros(len(keys), int), 10
            )
        return len(compiled), segment.paths[0][0]

    first, path = solve(Y, GROUP)
    second, other = solve(Y + 1, GROUP[::-1].copy())
    third, _ = solve(Y[:4], GROUP[:4])
    assert first >= 1
    assert second == 0
    assert jnp.any(path != other)
    assert third >= 1


def no_latents(y):
    numpyro.sample("y", dist.Normal(0, 1), obs=y)


def with_counts(y):
    numpyro.sample("x", dist.Normal(0, 1))
    numpyro.sample("count", dist.Poisson(3.0))


def with_uneven_counts(y):
    numpyro.sample("count", dist.Binomial(jnp.array([2, 3]), 0.5).to_event(1))


def with_moving_support(y):
    x = numpyro.sample("x", dist.Normal(0, 1))
    numpyro.sample("k", dist.DiscreteUniform(0, 2 + (x > 0)))


def with_rarely_moving_support(y):
    """The support is that of the random points that a check could look at, and another for one x in 160."""
    x = numpyro.sample("x", dist.Normal(0, 1))
    numpyro.sample("k", dist.DiscreteUniform(0, jnp.where(x > 2.5, 3, 1)).expand([2]).to_event(1))


def with_support_of_a_discrete_site(y):
    n = numpyro.sample("n", dist.Binomial(3, 1e-9))
    numpyro.sample("k", dist.Binomial(1 + n, 0.5))


@pytest.mark.parametrize(
    ("model", "words"),
    [
        (no_latents, "no latent sample sites"),
        (with_counts, "latent site 'count' is discrete without a finite support.*marginalise"),
        (with_uneven_counts, "latent site 'count' is discrete without a finite support that all its elements share"),
        (with_moving_support, r"support of \['k'\] depends on other latent sites"),
        (with_rarely_moving_support, r"support of \['k'\] depends on other latent sites"),
        (with_support_of_a_discrete_site, r"support of \['k'\] depends on other latent sites"),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_models_that_cannot_be_sampled(model, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        pmcmc.parallel_chain(model, 0, model_args=(Y,))


class Spins(dist.constraints.Constraint):
    is_discrete = True

    def __call__(self, x):
        return jnp.abs(x) == 1


class Spin(dist.Distribution):
    """A distribution of the user's own, whose constraint has no bounds to read."""

    support = Spins()
    has_enumerate_support = True

    def sample(self, key, sample_shape=()):
        return 2 * jax.random.bernoulli(key, 0.5, sample_shape).astype(int) - 1

    def log_prob(self, value):
        return jnp.log(jnp.where(value > 0, 0.8, 0.2))

    def enumerate_support(self, expand=True):
        return jnp.array([-1, 1])


def test_a_support_of_the_users_own() -> None:
    chain = pmcmc.parallel_chain(lambda: numpyro.sample("s", Spin()), 0, num_samples=4000, progress_bar=False)
    draws = chain.get_samples()["s"]
    assert set(np.unique(draws)) == {-1, 1}
    assert np.mean(draws > 0) == pytest.approx(0.8, abs=0.05)


def test_no_model() -> None:
    for wrong in (3.0, {"not": "a model"}):
        with pytest.raises(TypeError):  # by the annotation here, by pmcmc's own message in production
            pmcmc.parallel_chain(wrong, 0)


def test_wrong_arguments_of_the_model() -> None:
    with pytest.raises(TypeError, match="errors"):
        pmcmc.parallel_chain(eight_schools_model, 0)
    with pytest.raises(TypeError, match="bogus"):
        pmcmc.parallel_chain(eight_schools_model, 0, model_args=(ERRORS,), model_kwargs={"bogus": 1})


def test_a_chain_that_never_moves_is_not_passed_over() -> None:
    """NumPyro returns it; here it is reported, also without a warm-up."""
    options = dict(num_warmup=0, num_samples=200, num_chains=2, solver=Sequential(), progress_bar=False)
    run = lambda **more: pmcmc.parallel_chain(fine, 0, model_args=(Y,), **{**options, **more})
    with pytest.warns(UserWarning, match=r"chain\(s\) 0, 1 accepted no move in 200 draws.*step_size=None"):
        stuck = run(kernel=pmcmc.MALA(step_size=1e9))
    assert stuck.num_samples == 200  # nothing is lost
    few = run(kernel=pmcmc.MALA(step_size=1e9), num_samples=20)  # too few draws to judge
    assert few.report.acceptance_rate.max() == 0


def negative_scale(y):
    mu = numpyro.sample("mu", dist.Normal(0, 1))
    scale = numpyro.deterministic("scale", -jnp.exp(mu))
    numpyro.sample("measurement", dist.Normal(mu, scale), obs=y)


def fine(y):
    mu = numpyro.sample("mu", dist.Normal(0, 1))
    numpyro.sample("measurement", dist.Normal(mu, 1.0), obs=y)


def broken_factor(y):
    numpyro.sample("mu", dist.Normal(0, 1))
    numpyro.factor("penalty", jnp.nan)


@pytest.mark.parametrize(
    ("model", "y", "site"),
    [
        (negative_scale, np.ones(3), "measurement"),
        (fine, np.array([1.0, np.nan]), "measurement"),
        (fine, np.array([1.0, np.inf]), "measurement"),
        (broken_factor, np.ones(1), "penalty"),
    ],
    ids=["negative scale", "NaN data", "infinite data", "factor"],
)
@pytest.mark.parametrize("given", [False, True], ids=["own starts", "init_params"])
@pytest.mark.filterwarnings("ignore:.*Out-of-support")
def test_density_that_is_never_finite(model, y, site: str, given: bool) -> None:
    """Refused before any sampling, naming the site that is not finite."""
    init = {"mu": 0.3} if given else None
    with pytest.raises(ValueError, match=f"cannot be used at .* start.*at site '{site}'"):
        pmcmc.parallel_chain(model, 0, model_args=(y,), init_params=init)
