"""Kernels sample the posterior: Geweke's joint-distribution test and simulation-based calibration, and planted faults.

Both rest on drawing parameters and data together, with `tests.helpers.studies`. Geweke (2004): a chain that moves the
parameters by the kernel and then draws new data leaves the joint law invariant. Simulation-based calibration (Cook et
al. 2006; Talts et al. 2018; Modrak et al. 2023 for the likelihood as a quantity): the rank of the true parameters among
draws of their posterior is uniform. One program serves both, with lanes that start at the joint law and new data in
each round, or at the prior and the same data throughout.
"""

from dataclasses import dataclass, replace
from typing import NamedTuple

import blackjax
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import pmcmc
from pmcmc._pytree import register_dataclass
from tests.helpers.chains import draw_noise
from tests.helpers.selection import share
from tests.helpers.statistics import z_bound
from tests.helpers.studies import CONJUGATE, NUM_DATA, SCALE, SHAPE, Conjugate, Continuous, Labels, Mixed, Study

pytestmark = pytest.mark.optimized

NUM_LANES, NUM_DRAWS = 8000, 9


def elliptical(logdensity_fn, mean, cov):
    """Elliptical slice sampling of a target whose log density it divides by N(mean, cov)."""
    return blackjax.elliptical_slice(lambda x: logdensity_fn(x) + 0.5 * jnp.sum(x**2), mean=mean, cov=cov)


def ghmc(step_size):
    """Momentum that persists: a share of 0.2 is redrawn in each step."""
    return pmcmc.from_blackjax(
        blackjax.ghmc, step_size=step_size, momentum_inverse_scale=jnp.ones(2), alpha=0.2, delta=0.3
    )


COMPOSE = pmcmc.Compose(
    [
        pmcmc.DiscreteGibbs(supports={"z": [0, 1]}),
        (pmcmc.HMC(step_size=0.6, num_integration_steps=2), ["mu"]),
        (pmcmc.HMC(step_size=0.3, num_integration_steps=2), ["log_v"]),
    ]
)


class Case(NamedTuple):
    """A study with its kernel; ``thinning`` is the number of steps after which draws are almost independent."""

    study: Study
    kernel: pmcmc.kernels.Kernel
    thinning: int


CASES = {
    "MALA": Case(Continuous(), pmcmc.MALA(step_size=0.1), 25),
    "HMC": Case(Continuous(), pmcmc.HMC(step_size=0.3, num_integration_steps=4), 8),
    "NUTS": Case(Continuous(), pmcmc.NUTS(step_size=0.35, max_num_doublings=3), 5),
    "RandomWalk": Case(Continuous(), pmcmc.RandomWalk(0.5, grid_share=0.3, independence_share=0.2), 30),
    "Gibbs": Case(Conjugate(), CONJUGATE, 6),
    "DiscreteGibbs": Case(Labels(), pmcmc.DiscreteGibbs(supports={"z": [0, 1]}), 6),
    "Compose": Case(Mixed(), COMPOSE, 15),
    "elliptical": Case(Continuous(), pmcmc.from_blackjax(elliptical, mean=jnp.zeros(2), cov=jnp.ones(2)), 12),
    "GHMC": Case(Continuous(), ghmc(0.25), 20),
}


@jax.jit
def run(target, kernel, positions, data, noise, normals, renew):
    """Return positions (steps, lanes) after each step, and the data it saw; ``renew`` draws new data after each step.

    Args:
        noise: Leading axes (steps, lanes).
        normals: Leading axes (steps, lanes).
    """

    def lane(x, y, u, normal):
        given = replace(target, data=y)
        new, _ = kernel.step(given, kernel.restore(given, x), u)
        x = kernel.unknown(new)
        position = kernel.position(given, x)
        return (x, jnp.where(renew, target.model.simulate(position, normal), y)), (position, y)

    init = lambda position, y: kernel.unknown(kernel.init(replace(target, data=y), position))
    begin = (jax.vmap(init)(positions, data), data)
    return jax.lax.scan(lambda now, u: jax.vmap(lane)(*now, *u), begin, (noise, normals))[1]


def simulate(case: Case, starts: dict, truth: dict, seed: int, renew: bool):
    """`run` from positions ``starts`` on data drawn at ``truth``; return positions and data (steps, lanes, ...)."""
    target, rng = case.study.target(), np.random.default_rng(seed + 1)
    shape = ((NUM_DRAWS + 1) * case.thinning, NUM_LANES)
    noise = draw_noise(target, case.kernel, seed, shape[0] * shape[1])
    noise = jax.tree.map(lambda u: u.reshape(*shape, *u.shape[1:]), noise)
    data = jax.vmap(case.study.simulate)(jax.tree.map(jnp.asarray, truth), rng.normal(size=(NUM_LANES, NUM_DATA)))
    normals = rng.normal(size=(*shape, NUM_DATA))
    return run(target, case.kernel, starts, data, noise, normals, renew)


def geweke_scores(case: Case, seed: int = 3) -> np.ndarray:
    """Return z-scores of moments of parameters and data together, after many rounds that should keep their law."""
    truth = case.study.draw(np.random.default_rng(seed), NUM_LANES)
    path, data = simulate(case, truth, truth, seed, renew=True)
    position, y = jax.tree.map(lambda x: x[-1], path), np.asarray(data[-1])
    loc, scale = map(np.asarray, jax.vmap(case.study.loc_and_scale)(position))
    residual = (y - loc) / scale[:, None]  # standard normal, independent of the position
    pivots = case.study.pivots(position)
    i, j = np.triu_indices(pivots.shape[1], 1)
    mean, square = np.sqrt(NUM_DATA) * residual.mean(1, keepdims=True), (residual**2).mean(1, keepdims=True) - 1
    columns = [pivots, pivots[:, i] * pivots[:, j], mean, square, mean * pivots, square * pivots, mean * square]
    values = np.concatenate(columns, axis=1)
    return values.mean(0) / (values.std(0) / np.sqrt(NUM_LANES))


def rank_scores(case: Case, seed: int = 5) -> np.ndarray:
    """Return z-scores of the frequencies of ranks, for each parameter and for the likelihood: (quantities, ranks)."""
    rng = np.random.default_rng(seed)
    truth, starts = case.study.draw(rng, NUM_LANES), case.study.draw(rng, NUM_LANES)
    path, data = simulate(case, starts, truth, seed, renew=False)
    draws = jax.tree.map(lambda x: np.asarray(x)[2 * case.thinning - 1 :: case.thinning], path)
    likelihood = jax.vmap(case.study.log_likelihood_of)

    def quantities(position, y):
        pivots, fit = case.study.pivots(position), np.asarray(likelihood(position, y))[:, None]
        found = np.concatenate([pivots, fit], axis=1)
        return found + 1e-9 * rng.random(found.shape)  # breaks ties of integers at random

    expected = quantities(jax.tree.map(jnp.asarray, truth), data[0])
    found = [quantities(jax.tree.map(lambda x: x[k], draws), data[0]) for k in range(NUM_DRAWS)]  # noqa: B023
    rank = np.sum(np.stack(found) < expected[None], axis=0)
    share = 1 / (NUM_DRAWS + 1)
    frequency = np.stack([(rank == r).mean(0) for r in range(NUM_DRAWS + 1)], axis=1)
    return (frequency - share) / np.sqrt(share * (1 - share) / NUM_LANES)


NUM_TESTS = 2 * len(CASES)


@pytest.mark.parametrize("name", share(list(CASES), *(set(CASES) - {"elliptical", "GHMC", "Compose", "RandomWalk"})))
def test_joint_law_of_parameters_and_data_stays(name: str) -> None:
    z = geweke_scores(CASES[name])
    assert np.max(np.abs(z)) < z_bound(NUM_TESTS * z.size)


@pytest.mark.slow  # the same program as Geweke's test, which is more sensitive
@pytest.mark.parametrize("name", CASES)
def test_ranks_are_uniform(name: str) -> None:
    z = rank_scores(CASES[name])
    assert np.max(np.abs(z)) < z_bound(NUM_TESTS * z.size)


class Faulty(pmcmc.kernels.Kernel):
    """A kernel with a fault in its step."""

    def init(self, target, position):
        return self.kernel.init(target, position)

    def sample_noise(self, rng_key, target):
        return self.kernel.sample_noise(rng_key, target)

    def unknown(self, state):
        return self.kernel.unknown(state)

    def restore(self, target, unknown):
        return self.kernel.restore(target, unknown)

    def coordinates(self, unknown):
        return self.kernel.coordinates(unknown)

    def position(self, target, unknown):
        return self.kernel.position(target, unknown)


@register_dataclass
@dataclass(frozen=True)
class WrongRatio(Faulty):
    """Accepts with the square of the acceptance ratio."""

    kernel: pmcmc.kernels.Kernel

    def step(self, target, state, noise):
        return self.kernel.step(target, state, noise._replace(log_uniform=0.5 * noise.log_uniform))


@register_dataclass
@dataclass(frozen=True)
class MomentumKept(Faulty):
    """Does not reverse the momentum after a rejection."""

    kernel: pmcmc.kernels.Kernel

    def step(self, target, state, noise):
        new, info = self.kernel.step(target, state, noise)
        stayed = jnp.all(new.position == state.position)
        return new._replace(momentum=jnp.where(stayed, -new.momentum, new.momentum)), info


@register_dataclass
@dataclass(frozen=True)
class NoiseShared(Faulty):
    """The last kernel of a `Compose` moves by the noise of the one before."""

    kernel: pmcmc.kernels.Kernel

    def step(self, target, state, noise):
        *first, last = noise
        return self.kernel.step(target, state, (*first, last._replace(normal=first[-1].normal)))


def with_wrong_conditional(kernel):
    """The conditional of v without the first of the data, whose number is right."""
    wrong = pmcmc.kernels.InverseGammaUpdate(
        SHAPE + NUM_DATA / 2, lambda x: SCALE + 0.5 * jnp.sum((x["y"][1:] - x["mu"]) ** 2)
    )
    return pmcmc.Gibbs({"mu": kernel.updates[0], "v": wrong})


# The steps of MALA and GHMC are large, so that proposals are rejected.
FAULTS = {
    "wrong accept ratio": CASES["MALA"]._replace(kernel=WrongRatio(pmcmc.MALA(step_size=0.25))),
    "no Jacobian": CASES["MALA"]._replace(study=Continuous(jacobian=False)),
    "momentum not reversed": CASES["GHMC"]._replace(kernel=MomentumKept(ghmc(0.6))),
    "noise of another block": CASES["Compose"]._replace(kernel=NoiseShared(COMPOSE)),
    "wrong conditional": CASES["Gibbs"]._replace(kernel=with_wrong_conditional(CONJUGATE)),
}


@pytest.mark.parametrize("fault", share(list(FAULTS), "wrong accept ratio", "noise of another block"))
def test_sees_a_planted_fault(fault: str) -> None:
    found = {scores.__name__: scores(FAULTS[fault]) for scores in (geweke_scores, rank_scores)}
    print(fault, {name: np.max(np.abs(z)) for name, z in found.items()})
    z = found["geweke_scores"]
    assert np.max(np.abs(z)) > 1.2 * z_bound(NUM_TESTS * z.size)
