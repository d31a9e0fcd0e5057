"""`parallel_chain` with Newton-type solvers: the certified sequential chain, or its prefix and a sequential rest."""

import re
import warnings
from functools import cache
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import pytest

import pmcmc
from pmcmc.recurrence import RESULTS, Sequential, deer, elk, quasi_deer, quasi_elk

LENGTH = 100
SOLVERS = {make.__name__: make for make in (deer, quasi_deer, elk, quasi_elk)}  # with their defaults
GERMAN = Path(__file__).parents[3] / "shared" / "data" / "german_credit_numeric.csv"


def eight_schools(effect, error):
    mu = numpyro.sample("mu", dist.Normal(0, 5))
    tau = numpyro.sample("tau", dist.HalfCauchy(5))
    with numpyro.plate("schools", 8):
        z = numpyro.sample("z", dist.Normal(0, 1))
        numpyro.sample("effect", dist.Normal(mu + tau * z, error), obs=effect)


def logistic(features, good):
    beta = numpyro.sample("beta", dist.Normal(0, 1).expand([features.shape[1]]).to_event(1))
    numpyro.sample("good", dist.Bernoulli(logits=features @ beta), obs=good)


def credit_data():
    """Return German credit if it is next to the repository, else synthetic data of the same size."""
    if GERMAN.exists():
        table = np.loadtxt(GERMAN, delimiter=",", skiprows=1)
        features, good = table[:, :-1], table[:, -1]
        features = (features - features.mean(0)) / features.std(0)
    else:
        rng = np.random.default_rng(0)
        features = rng.standard_normal((200, 24))
        good = (rng.random(200) < 1 / (1 + np.exp(-features @ np.linspace(-0.5, 0.5, 24) - 1))).astype(float)
    return jnp.asarray(np.c_[features, np.ones(len(features))]), jnp.asarray(good)


MODELS = {
    "eight_schools": (
        eight_schools,
        lambda: (
            jnp.array([28.0, 8.0, -3.0, 7.0, -1.0, 1.0, 18.0, 12.0]),
            jnp.array([15.0, 10.0, 16.0, 11.0, 9.0, 11.0, 10.0, 18.0]),
        ),
    ),
    "german_credit": (logistic, credit_data),
}


def chain(name, solver):
    model, data = MODELS[name]
    kernel = pmcmc.MALA() if name == "german_credit" else pmcmc.HMC()
    sizes = dict(num_warmup=100, num_samples=LENGTH, num_chains=2, progress_bar=False)
    return pmcmc.parallel_chain(model, jax.random.key(4), model_args=data(), kernel=kernel, solver=solver, **sizes)


@cache
def reference(name):
    return chain(name, Sequential())


def assert_same(found, expected):
    same = lambda a, b: np.testing.assert_allclose(a, b, rtol=0, atol=1e-8)
    jax.tree.map(same, found.get_samples(), expected.get_samples())
    np.testing.assert_array_equal(found.info.margin > 0, expected.info.margin > 0)


# Dense Jacobians and 25 weights take long to compile; the other solvers show as much on eight schools.
QUICK = [("eight_schools", "quasi_deer")]
every_pair = pytest.mark.parametrize(
    ("name", "solver"),
    [
        pytest.param(name, solver, marks=[] if (name, solver) in QUICK else pytest.mark.slow)
        for name in MODELS
        for solver in SOLVERS
    ],
)


@every_pair
def test_certified_and_equal_to_the_sequential_chain(name, solver):
    found = chain(name, SOLVERS[solver](max_iters=2 * LENGTH))
    report = found.report
    assert_same(found, reference(name))
    assert np.mean(reference(name).info.margin > 0) < 0.99  # some proposals are rejected
    assert report.decision == "newton"
    assert report.fallback == ""
    assert np.all(report.result == RESULTS.successful)
    assert np.all(report.certified_steps == LENGTH)
    assert np.all(report.residual <= 1.2e-13)
    assert np.all((report.num_iters > 0) & (report.num_iters <= 2 * LENGTH))


@every_pair
def test_falls_back_with_the_prefix_kept(name, solver):
    """max_iters is an array, so only the sequential rest is compiled again."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        found = chain(name, SOLVERS[solver](max_iters=5))
    report = found.report
    warned = [re.search("solved only .* in parallel.*raise the budget", str(w.message)) is not None for w in caught]
    assert warned == [True] * int(report.certified_steps.max() < LENGTH / 10)
    assert_same(found, reference(name))
    assert np.all(report.num_iters == 5)
    assert np.any(report.result == RESULTS.max_iters_reached)
    assert "max_iters_reached" in report.fallback
    least, most = report.certified_steps.min(), report.certified_steps.max()
    solved = f"{least:,}" if least == most else f"{least:,} to {most:,}"
    assert f"{solved} steps of each chain had been solved in parallel; " in report.fallback
    assert np.all(report.residual <= 1.2e-13)
    assert np.all(report.certified_steps < LENGTH)
    # By causality. A trust region counts states exact to rounding, and may first repeat a step rounded outside its
    # loop.
    assert np.all(report.certified_steps >= (4 if "elk" in solver else 5))
