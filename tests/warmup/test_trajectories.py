"""Trajectories of HMC are longer where a diagonal basis leaves wide directions."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import pmcmc
from pmcmc.kernels.hmc import TRAJECTORY_LENGTH, UniformLength
from pmcmc.warmup.trajectories import lengthened, widest

DIM = 60


def correlated(correlation: float) -> np.ndarray:
    """Covariance of DIM coordinates with equal correlations."""
    return (1 - correlation) * np.eye(DIM) + correlation


def path_of(covariance: np.ndarray, num_lanes: int, num_steps: int = 150) -> np.ndarray:
    factor = np.linalg.cholesky(covariance)
    return np.random.default_rng(0).standard_normal((num_steps, num_lanes, len(covariance))) @ factor.T


@pytest.mark.parametrize("num_lanes", [4, 32])
@pytest.mark.parametrize("correlation", [0.3, 0.9])
def test_the_widest_direction_is_measured(num_lanes: int, correlation: float) -> None:
    """Units of the coordinates do not matter."""
    expected = np.sqrt(1 + (DIM - 1) * correlation)
    path = path_of(correlated(correlation), num_lanes)
    assert widest(path, np.ones(DIM)) == pytest.approx(expected, rel=0.2)
    units = np.exp(np.random.default_rng(1).standard_normal(DIM))
    assert widest(path * units, units) == pytest.approx(expected, rel=0.2)


@pytest.mark.parametrize("dim", [60, 2000])
def test_independent_coordinates_are_not_wide_by_chance(dim: int) -> None:
    """Although the widest direction of 256 rows in 2,000 dimensions has a variance of 14 in these rows."""
    path = np.random.default_rng(0).standard_normal((64, 4, dim))
    assert widest(path, np.ones(dim)) == pytest.approx(1.0, abs=0.15)


def test_separate_modes_are_no_width() -> None:
    path = path_of(np.eye(DIM), 8)
    path[:, :4] += 10.0
    assert widest(path, path.reshape(-1, DIM).std(axis=0)) < 1.0


def test_one_lane_shows_nothing() -> None:
    assert widest(path_of(correlated(0.9), 1), np.ones(DIM)) == 1.0


def test_trajectories_are_lengthened_only_where_they_are_left_to_warm_up() -> None:
    """The widest direction then has the correlation 0.7 between draws, at an acceptance rate of 0.8."""
    assert lengthened(pmcmc.HMC(), 1.0).trajectory_length == TRAJECTORY_LENGTH
    assert lengthened(pmcmc.HMC(), 2.0).trajectory_length == TRAJECTORY_LENGTH
    longer = lengthened(pmcmc.HMC(), 5.0).trajectory_length
    assert 0.8 * np.cos(longer / 5.0) + 0.2 == pytest.approx(0.7)
    for kernel in (
        pmcmc.HMC(num_integration_steps=4),
        pmcmc.HMC(num_integration_steps=UniformLength(1, 4)),
        pmcmc.HMC(trajectory_length=1.0),
        pmcmc.HMC(leapfrog=pmcmc.kernels.ParallelLeapfrog(16)),
        pmcmc.NUTS(),
        pmcmc.MALA(),
    ):
        assert lengthened(kernel, 5.0) is kernel


def sampled(correlation: float, **options) -> pmcmc.Chain:
    precision = jnp.asarray(np.linalg.inv(correlated(correlation)))
    return pmcmc.sample(
        lambda x: -0.5 * x @ precision @ x,
        jnp.zeros(DIM),
        0,
        num_samples=1500,
        num_chains=4,
        progress_bar=False,
        solver=pmcmc.recurrence.Sequential(),
        **options,
    )


def test_wide_directions_mix() -> None:
    """The mean of the coordinates, 7.3 wide, has a lag-one correlation of about 0.7; 0.98 with the usual length."""
    chain = sampled(0.9)
    assert 4.0 < chain.kernel.trajectory_length < 8.0
    mean = np.asarray(chain.get_samples(group_by_chain=True)).mean(axis=-1)
    assert np.corrcoef(mean[:, 1:].ravel(), mean[:, :-1].ravel())[0, 1] < 0.85
    assert mean.var() == pytest.approx(0.9 + 0.1 / DIM, rel=0.25)


@pytest.mark.filterwarnings("ignore:the draws have not mixed")
def test_others_keep_the_usual_length() -> None:
    """Those without wide directions, in a dense basis, or in a metric of the user's own."""
    assert sampled(0.0).kernel.trajectory_length == pytest.approx(TRAJECTORY_LENGTH)
    for warmup in (pmcmc.EnsembleAdaptation(dense=True), pmcmc.EnsembleAdaptation(inverse_mass_matrix=np.ones(DIM))):
        assert sampled(0.9, warmup=warmup).kernel.trajectory_length == pytest.approx(TRAJECTORY_LENGTH)


@pytest.mark.filterwarnings("ignore:the draws have not mixed")
def test_the_length_is_data() -> None:
    """The tuned kernel has the shapes for which its programs were compiled ahead."""
    short, long = (jax.tree.map(jnp.result_type, sampled(r, num_warmup=200).kernel) for r in (0.0, 0.9))
    assert short == long
