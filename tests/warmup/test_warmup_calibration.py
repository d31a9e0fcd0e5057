"""Warm-up and kernel together sample the posterior: simulation-based calibration of whole runs.

Parameters and data are drawn together, by `tests.helpers.studies`. For every data set warm-up starts again from draws
of the prior, tunes kernel and basis, and returns its states. The rank of the true parameters among the draws that
follow is uniform (Talts et al. 2018). The data are leaves of the target, so programs are compiled once for all.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import special

import pmcmc
from pmcmc._pytree import register_dataclass
from pmcmc.chain.state import Source
from pmcmc.recurrence import MultipleShooting
from pmcmc.sampling.session import sample_from, warm_up
from pmcmc.sampling.settings import Settings, Starts
from tests.helpers.statistics import z_bound
from tests.helpers.studies import NUM_DATA, Continuous

pytestmark = pytest.mark.optimized

STUDY = Continuous()
NUM_STUDIES, NUM_FAULTY, NUM_WARMUP, NUM_CHAINS, NUM_KEPT = 400, 150, 60, 8, 4
likelihood = jax.jit(jax.vmap(STUDY.log_likelihood_of, (0, None)))
simulate = jax.jit(STUDY.simulate)


class Case(NamedTuple):
    """A study with its kernel; ``thinning`` is the number of steps after which draws are almost independent."""

    kernel: pmcmc.kernels.Kernel
    thinning: int

    def settings(self, target: pmcmc.Target) -> Settings:
        num_samples, thinning = NUM_KEPT * self.thinning, self.thinning
        solver = MultipleShooting(2)
        return Settings.check(target, self.kernel, solver, NUM_WARMUP, num_samples, NUM_CHAINS, thinning, (), None)


def quantities(position: dict, y) -> np.ndarray:
    """Return (draws, quantities) of positions with leading axis draws: both parameters, and the likelihood."""
    return np.concatenate([STUDY.pivots(position), np.asarray(likelihood(position, y))[:, None]], axis=1)


def scores(case: Case, num_studies: int, fault: Callable = lambda state, before: state) -> np.ndarray:
    """Return z-scores of Legendre polynomials 1 to 4 of the truth's rank among the draws: (polynomials, quantities)."""
    rng, before, ranks = np.random.default_rng(11), None, []
    for number in range(num_studies):
        truth = STUDY.draw(rng, 1)
        y = simulate({name: x[0] for name, x in truth.items()}, rng.normal(size=NUM_DATA))
        target = replace(STUDY.target(), data=y)
        settings = case.settings(target)
        num_starts = settings.warmup.count_starts(target)
        positions = jax.tree.map(jnp.asarray, STUDY.draw(rng, num_starts))
        starts = Starts(lambda: positions, num_starts)  # noqa: B023
        source = Source(lambda: target, target, {})  # noqa: B023
        state = warm_up(source, jax.random.key(number), starts, settings, progress_bar=False)
        chain = sample_from(fault(state, before or state), settings, progress_bar=False)
        below = quantities(chain.get_samples(), y) < quantities(truth, y)
        ranks.append((below.sum(0) + rng.random(below.shape[1])) / (len(below) + 1))
        before = state
    orders = range(1, 5)
    values = np.stack([special.eval_legendre(k, 2 * np.stack(ranks) - 1) * np.sqrt(2 * k + 1) for k in orders])
    return values.mean(1) * np.sqrt(num_studies)


CASES = {
    "HMC": Case(pmcmc.HMC(), 8),
    "NUTS": Case(pmcmc.NUTS(max_num_doublings=3), 8),
    "MALA": Case(pmcmc.MALA(), 12),
    "RandomWalk": Case(pmcmc.RandomWalk(), 24),
}


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:Warm-up did not settle", "ignore:.*did not move", "ignore:.*were divergent")
@pytest.mark.parametrize("name", CASES)
def test_ranks_are_uniform(name: str) -> None:
    z = scores(CASES[name], NUM_STUDIES)
    assert np.max(np.abs(z)) < z_bound(len(CASES) * z.size)


@register_dataclass
@dataclass(frozen=True)
class StillAdapting(pmcmc.HMC):
    """Warm-up whose adaptation continues: the step size follows the state."""

    def step(self, target, state, noise):
        step_size = self.step_size * (1 + 0.6 * jnp.tanh(state.position[0]))
        return pmcmc.HMC(step_size, self.num_integration_steps).step(target, state, noise)


def adaptation_goes_on(state, before):
    kernel = state.kernel
    return state._replace(kernel=StillAdapting(1.5 * kernel.step_size, kernel.num_integration_steps))


def data_of_another_call(state, before):
    """Use the data of another call, as if a program contained the data it was compiled with."""
    return state._replace(target=replace(state.target, data=before.target.data))


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:Warm-up did not settle", "ignore:.*did not move", "ignore:.*were divergent")
@pytest.mark.parametrize("fault", [adaptation_goes_on, data_of_another_call])
def test_sees_a_planted_fault(fault) -> None:
    z = scores(CASES["HMC"], NUM_FAULTY, fault)
    print(fault.__name__, np.max(np.abs(z)))
    assert np.max(np.abs(z)) > 1.2 * z_bound(len(CASES) * z.size)
