"""No two steps share noise: the noise of a run's steps is independent over blocks, segments and chains.

The kernel of these tests forgets its state and moves to its noise, so that the draws of a run in blocks are the
innovations as each step received them. Noise used twice, at any distance, is a correlation of two of its series at that
lag; the spectrum gives the correlations at all lags at once.
"""

from dataclasses import dataclass, replace
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
import pytest
from scipy import stats

import pmcmc
from pmcmc._pytree import Array, register_dataclass
from pmcmc.kernels.base import PositionKernel
from pmcmc.random.distributions import normals, uniforms
from pmcmc.recurrence import MultipleShooting
from pmcmc.sampling import engine, programs
from tests.helpers.statistics import TEST_FAILURE_RATE, z_bound

pytestmark = pytest.mark.optimized

NUM_CHAINS, NUM_STEPS, NUM_BLOCKS, DIM = 3, 3072, 256, 2
NUM_TESTS = 2
STEP_BYTES = 100 * NUM_CHAINS  # about 100 bytes a step and chain: segments of some 1,000 steps


class Place(NamedTuple):
    position: Array


@register_dataclass
@dataclass(frozen=True)
class Innovations(PositionKernel):
    """x' = u: independent draws of N(0, I)."""

    def restore(self, target, unknown):
        return Place(unknown)

    def sample_noise(self, rng_key, target):
        return normals(uniforms(rng_key, target.dim, target.spec.dtype))

    def step(self, target, state, noise):
        one = jnp.ones((), noise.dtype)
        return Place(noise), pmcmc.Info(one, one < 0, jnp.inf * one, target.logdensity_fn(noise))


def sample(**options) -> pmcmc.Chain:
    options = dict(num_samples=NUM_STEPS, solver=MultipleShooting(NUM_BLOCKS)) | options
    return pmcmc.sample(
        lambda x: -0.5 * jnp.sum(x**2),
        jnp.zeros(DIM),
        0,
        kernel=Innovations(),
        num_warmup=0,
        num_chains=NUM_CHAINS,
        progress_bar=False,
        **options,
    )


def lagged_scores(draws: np.ndarray) -> np.ndarray:
    """Return z-scores of the correlation of any series of draws (series, T) with any at any lag up to T/2.

    The series are made standard by their probability transforms. These are bounded, so that means of T/2 and more
    products are normal as far out as the bound lies.
    """
    num_series, length = draws.shape
    uniform = np.sqrt(12) * (stats.norm.cdf(draws) - 0.5)
    spectrum = np.fft.rfft(uniform, 2 * length)
    sums = np.fft.irfft(spectrum[:, None].conj() * spectrum[None], 2 * length)[..., : length // 2]
    z = sums / np.sqrt(length - np.arange(length // 2))
    same_step = z[..., 0][np.triu_indices(num_series, 1)]
    return np.concatenate([same_step, z[..., 1:].ravel()])


def series(chain: pmcmc.Chain) -> np.ndarray:
    return np.moveaxis(chain.get_samples(group_by_chain=True), 1, 2).reshape(NUM_CHAINS * DIM, -1)


def in_segments(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engine, "SEGMENT_BYTES", 1024 * STEP_BYTES)


def extended() -> pmcmc.Chain:
    return sample(num_samples=NUM_STEPS // 2).extend(NUM_STEPS // 2, progress_bar=False)


@pytest.mark.parametrize("run", [sample, extended])
def test_innovations_are_independent(run, monkeypatch: pytest.MonkeyPatch) -> None:
    in_segments(monkeypatch)
    chain = run()
    assert np.all(chain.report.num_sweeps > 0)
    draws = series(chain)
    z = lagged_scores(draws)
    assert np.max(np.abs(z)) < z_bound(NUM_TESTS * z.size)
    assert stats.kstest(draws.ravel(), "norm").pvalue > TEST_FAILURE_RATE / NUM_TESTS


def every_block_alike(chain, first_step, block_length):
    """All blocks use the noise of the first."""
    block = jnp.arange(first_step.size) % NUM_BLOCKS
    return chain, first_step - block * block_length


def one_step_early(chain, first_step, block_length):
    """Blocks begin a step early, so that neighbours share the noise at their boundary."""
    return chain, first_step - jnp.arange(first_step.size) % NUM_BLOCKS


def segments_alike(chain, first_step, block_length):
    """Every segment counts its steps from 0."""
    return chain, first_step - first_step[0]


def chains_alike(chain, first_step, block_length):
    """All chains use one key."""
    return jnp.zeros_like(chain), first_step


@pytest.mark.filterwarnings("ignore:the draws have not mixed")
@pytest.mark.parametrize("fault", [every_block_alike, one_step_early, segments_alike, chains_alike])
def test_sees_a_planted_fault(fault, fresh_programs, monkeypatch: pytest.MonkeyPatch) -> None:
    in_segments(monkeypatch)
    right = programs._first_of_lanes
    wrong = lambda held, first_step: fault(*right(held, first_step), held.layout.block_length)
    monkeypatch.setattr(programs, "_first_of_lanes", wrong)
    z = lagged_scores(series(sample()))
    print(fault.__name__, np.max(np.abs(z)))
    assert np.max(np.abs(z)) > 1.2 * z_bound(NUM_TESTS * z.size)


def test_sees_a_stream_begun_anew() -> None:
    """A chain is extended with the noise that it began with."""
    chain = sample(num_samples=NUM_STEPS // 4)
    again = replace(chain, state=chain.state._replace(num_steps=0)).extend(NUM_STEPS // 4 * 3, progress_bar=False)
    z = lagged_scores(series(again))
    assert np.max(np.abs(z)) > 1.2 * z_bound(NUM_TESTS * z.size)
