"""Neural modules of NumPyro: weights with priors are sampled, other parameters are constants."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import pytest
from numpyro.contrib import module

import pmcmc
from tests.helpers.statistics import z_bound

PRIOR, NOISE = 3.0, 0.3
X = np.linspace(-1, 1, 30)[:, None]
Y = 0.5 + 2 * X[:, 0] + 0.1 * np.sin(7 * X[:, 0])


@pytest.fixture(autouse=True)
def numpyro_broadcasts_over_ranks():
    with jax.numpy_rank_promotion("allow"):
        yield


def observe(mean) -> None:
    numpyro.sample("y", dist.Normal(mean, NOISE), obs=Y)


def flax_linear(prior) -> None:
    linen = pytest.importorskip("flax.linen")
    observe(module.random_flax_module("net", linen.Dense(1), prior, input_shape=(1,))(X)[:, 0])


def nnx_linear(prior) -> None:
    nnx = pytest.importorskip("flax.nnx")
    observe(module.random_nnx_module("net", nnx.Linear(1, 1, rngs=nnx.Rngs(0)), prior)(X)[:, 0])


def equinox_linear(prior) -> None:
    equinox = pytest.importorskip("equinox")
    net = module.random_eqx_module("net", equinox.nn.Linear(1, 1, key=jax.random.key(0)), prior)
    observe(jax.vmap(net)(X)[:, 0])


def haiku_linear(prior) -> None:
    haiku = pytest.importorskip("haiku")
    observe(
        module.random_haiku_module("net", haiku.transform(lambda x: haiku.Linear(1)(x)), prior, input_shape=(1,))(X)[
            :, 0
        ]
    )


@pytest.mark.parametrize("model", [flax_linear, nnx_linear, equinox_linear, haiku_linear])
def test_weights_are_sampled(model: Callable) -> None:
    """A linear module is a Bayesian regression, whose posterior is known."""
    chain = pmcmc.parallel_chain(
        model, 0, model_args=(dist.Normal(0, PRIOR),), num_warmup=300, num_samples=500, progress_bar=False
    )
    design = np.hstack([np.ones_like(X), X])
    covariance = np.linalg.inv(design.T @ design / NOISE**2 + np.eye(2) / PRIOR**2)
    mean = covariance @ design.T @ Y / NOISE**2
    draws = {name: np.ravel(x) for name, x in chain.get_samples().items()}
    bias, weight = sorted(draws, key=lambda name: "bias" not in name and not name.endswith("/b"))
    for name, expected, variance in zip((bias, weight), mean, np.diag(covariance), strict=True):
        independent = len(draws[name]) / 10  # a lower bound: HMC draws are nearly independent here
        assert abs(draws[name].mean() - expected) < z_bound(8) * np.sqrt(variance / independent)
    assert chain.verify()


def test_weights_without_a_prior_are_constants() -> None:
    """They have the values at which the module starts them, as in NumPyro, the same in every call."""
    pytest.importorskip("flax")
    names = {"kernel": dist.Normal(0, PRIOR)}
    options = dict(model_args=(names,), num_warmup=100, num_samples=100, progress_bar=False)
    chain = pmcmc.parallel_chain(flax_linear, 0, **options)
    assert list(chain.get_samples()) == ["net/kernel"]
    np.testing.assert_array_equal(
        chain.get_samples()["net/kernel"], pmcmc.parallel_chain(flax_linear, 0, **options).get_samples()["net/kernel"]
    )


def test_parameters_are_constants() -> None:
    def model():
        slope = numpyro.param("slope", 2.0, constraint=dist.constraints.positive)
        offset = numpyro.primitives.mutable("offset", {"value": jnp.asarray(1.0)})
        level = numpyro.sample("level", dist.Normal(0, PRIOR))
        observe(slope * X[:, 0] + offset["value"] + level)

    chain = pmcmc.parallel_chain(model, 0, num_warmup=300, num_samples=500, progress_bar=False)
    variance = 1 / (len(X) / NOISE**2 + 1 / PRIOR**2)
    expected = variance * np.sum(Y - 2 * X[:, 0] - 1) / NOISE**2
    draws = chain.get_samples()
    assert list(draws) == ["level"]
    assert abs(np.mean(draws["level"]) - expected) < z_bound(1) * np.sqrt(variance / (len(draws["level"]) / 10))
