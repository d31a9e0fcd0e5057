"""A metric of the user's is no statement about the posterior: tolerances, distances and reports keep to its spread."""

from dataclasses import replace
from pathlib import Path

import blackjax
import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import pytest
from numpyro.infer import NUTS

import pmcmc
from pmcmc.recurrence import RESULTS, MultipleShooting, Sequential
from pmcmc.stability import site_distances
from pmcmc.warmup.base import spread_between

CORRELATED = np.array([[1.0, 0.6, 0.0], [0.6, 1.0, -0.3], [0.0, -0.3, 1.0]])
PRECISION = np.linalg.inv(CORRELATED)


def density(sd: float):
    return lambda x: -0.5 * (x / sd) @ jnp.asarray(PRECISION, x.dtype) @ (x / sd)


def sampled(sd: float, kernel: pmcmc.Kernel, solver, **options) -> pmcmc.Chain:
    sizes = dict(num_warmup=200, num_samples=2000, num_chains=2, progress_bar=False)
    return pmcmc.sample(density(sd), jnp.zeros(3), 0, kernel=kernel, solver=solver, **{**sizes, **options})


KERNELS = {
    "HMC": lambda sd: pmcmc.HMC(step_size=0.5 * sd, num_integration_steps=3, inverse_mass_matrix=1.0),
    "NUTS": lambda sd: pmcmc.NUTS(inverse_mass_matrix=np.ones(3)),
    "MALA": lambda sd: pmcmc.MALA(),
}
WARMUP = {"MALA": pmcmc.EnsembleAdaptation(inverse_mass_matrix=np.eye(3))}


@pytest.mark.parametrize("name", KERNELS)
@pytest.mark.parametrize("sd", [1e-5, 1e5])
def test_certificates_are_in_units_of_the_posterior(name: str, sd: float) -> None:
    """float32: with sd = 1e5 and the metric as the unit, rounding alone would exceed the tolerances; with 1e-5 none."""
    kernel, warmup = KERNELS[name](sd), WARMUP.get(name)
    blocks, order = (sampled(sd, kernel, solver, warmup=warmup) for solver in (MultipleShooting(16), Sequential()))
    assert np.all(blocks.report.result == RESULTS.successful)
    np.testing.assert_allclose(jax.tree.leaves(blocks.state.scale)[0], sd, rtol=0.3)
    differ = np.abs(blocks.get_samples() - order.get_samples()).max(axis=-1) > 1e-3 * sd
    assert np.mean(differ) < 0.02  # after a near tie
    assert blocks.verify()
    assert blocks.report.spread < 1.5


@pytest.mark.parametrize("sd", [1e-5, 1e5])
def test_verification_finds_a_moved_draw(sd: float) -> None:
    chain = sampled(sd, KERNELS["HMC"](sd), Sequential())
    unknowns = np.array(chain.unknowns)
    unknowns[1, 700, 2] += 0.02 * sd
    found = replace(chain, unknowns=unknowns).verify()
    assert not found
    assert found.first_mismatch == (1, 700)


def test_files_keep_the_spread(tmp_path: Path) -> None:
    chain = sampled(1e-5, KERNELS["HMC"](1e-5), Sequential())
    chain.save(tmp_path / "chain.npz")
    back = pmcmc.load(tmp_path / "chain.npz", density(1e-5), initial_position=jnp.zeros(3))
    np.testing.assert_array_equal(back.state.target.basis.spread, chain.state.target.basis.spread)
    assert back.verify()


def test_distances_of_sites() -> None:
    chain = sampled(1e-5, KERNELS["NUTS"](1e-5), Sequential(), num_samples=100)
    one = jnp.asarray([1e-5, 0.0, 0.0])
    (found,) = site_distances(chain.target, one, jnp.zeros(3)).values()
    np.testing.assert_allclose(found, [1.0, 0.0, 0.0], rtol=0.3)


def test_without_a_metric_the_unit_is_the_basis() -> None:
    chain = sampled(1e-5, pmcmc.HMC(), Sequential(), num_samples=100)
    assert chain.state.target.basis.spread is None
    np.testing.assert_array_equal(jax.tree.leaves(chain.state.scale)[0], 1.0)


@pytest.mark.filterwarnings("ignore")
def test_numpyro_without_adaptation_of_the_metric() -> None:
    def model():
        numpyro.sample("x", dist.Normal(0, 1e-4).expand([2]).to_event(1))

    mcmc = pmcmc.ParallelMCMC(
        NUTS(model, adapt_mass_matrix=False), num_warmup=200, num_samples=500, num_chains=2, progress_bar=False
    )
    mcmc.run(jax.random.key(0))
    np.testing.assert_allclose(jax.tree.leaves(mcmc.chain.state.scale)[0], 1e-4, rtol=0.3)
    assert mcmc.chain.verify()


def test_spread_between() -> None:
    """Moments of draws of one law in the coordinates of another basis."""
    rng = np.random.default_rng(0)
    explored, given = np.tril(rng.normal(size=(4, 4))) + 3 * np.eye(4), np.tril(rng.normal(size=(4, 4))) + 3 * np.eye(4)
    draws = rng.normal(size=(100_000, 4))
    for scale in (given, np.diag(given)):
        for law in (explored, np.diag(explored)):
            x = draws @ law.T if law.ndim == 2 else draws * law
            y = np.linalg.solve(scale, x.T).T if scale.ndim == 2 else x / scale
            np.testing.assert_allclose(spread_between(scale, law), y.std(axis=0), rtol=0.02)


def test_a_metric_of_blackjax_takes_effect_once() -> None:
    """Given to BlackJAX's constructor, it is the basis, like that of `HMC`; it was applied again within the basis."""
    sd = np.array([100.0, 1.0, 0.01])
    f = lambda x: -0.5 * jnp.sum((x / sd) ** 2)
    kernel = pmcmc.from_blackjax(blackjax.hmc, step_size=None, inverse_mass_matrix=sd**2, num_integration_steps=4)
    chain = pmcmc.sample(
        f, jnp.zeros(3), 0, kernel=kernel, num_warmup=200, num_samples=2000, num_chains=2, progress_bar=False
    )
    np.testing.assert_allclose(chain.target.basis.scale, sd, rtol=1e-6)
    assert chain.kernel.parameters["inverse_mass_matrix"] is None
    assert 0.3 < chain.kernel.step_size < 2
    np.testing.assert_allclose(np.std(chain.get_samples(), axis=0) / sd, 1.0, rtol=0.2)
    bad = pmcmc.from_blackjax(blackjax.hmc, step_size=None, inverse_mass_matrix=np.ones(2), num_integration_steps=4)
    with pytest.raises(ValueError, match="inverse_mass_matrix has shape"):
        pmcmc.sample(f, jnp.zeros(3), 0, kernel=bad, num_samples=100, progress_bar=False)
