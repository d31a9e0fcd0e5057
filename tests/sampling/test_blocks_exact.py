"""For every kernel whose coupled chains merge, 20,000 steps in blocks are certified and equal the sequential chain."""

from typing import Any, NamedTuple

import blackjax
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from benchmarks.gibbs import SCHOOLS
from pmcmc import HMC, MALA, NUTS, Kernel, RandomWalk, Target, from_blackjax
from pmcmc.recurrence import RESULTS, MultipleShooting, Sequential
from pmcmc.recurrence.solution import default_tolerance
from tests.helpers.chains import draw_noise, solve
from tests.helpers.gibbs import SCHOOLS_START
from tests.helpers.selection import share
from tests.helpers.targets import banana, eight_schools, gaussian, logistic, make_target, mixture

pytestmark = pytest.mark.optimized

LENGTH, NUM_BLOCKS = 20_000, 16
SCALES = np.linspace(0.7, 1.4, 10)
WALK = 2.38 / np.sqrt(10)


def uneven(x):
    """Ten independent normals whose scales a random walk does not know."""
    return -0.5 * jnp.sum((x / SCALES) ** 2)


def elliptical(logdensity_fn, mean, cov):
    """Elliptical slice sampling with N(0, I) split off the target."""
    return blackjax.elliptical_slice(lambda x: logdensity_fn(x) + 0.5 * jnp.sum(x**2), mean=mean, cov=cov)


class Case(NamedTuple):
    target: Target
    kernel: Kernel
    start: Any = None  # None: zeros


UNEVEN = Target.from_logdensity(uneven, jnp.ones(10))
CASES = {
    "NUTS": Case(make_target(eight_schools), NUTS(0.5)),
    "HMC, jittered": Case(make_target(banana), HMC(0.3, 3, step_size_jitter=0.5)),
    "MALA": Case(make_target(mixture), MALA(0.8)),
    "random walk": Case(UNEVEN, RandomWalk(WALK)),
    "random walk without independent steps": Case(UNEVEN, RandomWalk(WALK, independence_share=None)),
    "elliptical slice": Case(make_target(gaussian), from_blackjax(elliptical, mean=jnp.zeros(3), cov=jnp.ones(3))),
    "MCLMC": Case(make_target(logistic), from_blackjax(blackjax.mclmc, L=1.0, step_size=0.8)),
    "dynamic HMC": Case(
        make_target(gaussian), from_blackjax(blackjax.dynamic_hmc, step_size=0.5, inverse_mass_matrix=None)
    ),
    "Gibbs": Case(Target.from_logdensity(None, SCHOOLS_START), SCHOOLS, SCHOOLS_START),
}


@pytest.mark.parametrize("name", share(list(CASES), "HMC, jittered"))
def test_blocks_are_the_sequential_chain(name: str) -> None:
    """Blocks start from the chain's own states in reverse: typical, and far from the right ones."""
    target, kernel, start = CASES[name]
    noise = draw_noise(target, kernel, 5, LENGTH)
    start = jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), target.spec.template) if start is None else start
    x0 = kernel.unknown(kernel.init(target, start))
    chain = solve(target, kernel, Sequential(), x0, noise)
    guess = jax.tree.map(lambda x: x[::-1], chain.value)
    scale = jax.tree.map(lambda x: jnp.std(x, axis=0), chain.value)
    blocks = solve(target, kernel, MultipleShooting(NUM_BLOCKS), x0, noise, guess, scale)
    assert blocks.result == RESULTS.successful
    assert blocks.stats.certified_steps == LENGTH
    assert 0 <= blocks.residual <= default_tolerance(float)
    assert blocks.stats.num_sweeps >= 1
    assert blocks.stats.num_sequential_steps < LENGTH / 3
    close = lambda found, expected, tol: np.testing.assert_allclose(found, expected, rtol=tol, atol=tol)
    jax.tree.map(lambda a, b: close(a, b, 1e-10), blocks.value, chain.value)
    jax.tree.map(lambda a, b: close(a, b, 1e-8), blocks.aux, chain.aux)  # some log densities are about -2,000
    changed = jax.tree.map(lambda x: np.mean(np.diff(x, axis=0) != 0), chain.value)
    assert min(jax.tree.leaves(changed)) > 0.2
