"""A trajectory solved in parallel is the trajectory taken step by step."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pmcmc import HMC
from pmcmc.kernels import ParallelLeapfrog, SequentialLeapfrog, UniformLength
from pmcmc.recurrence import HutchinsonBlockDiagonal, MultipleShooting, Newton
from pmcmc.target import Target
from tests.helpers.selection import share

LENGTH = 24
SOLVERS = {
    "block": ParallelLeapfrog(LENGTH),
    "stochastic": ParallelLeapfrog(LENGTH, Newton(HutchinsonBlockDiagonal(jax.random.key(1)))),
}


def logdensity(x):
    """A coupled and skewed density."""
    return -0.5 * x[0] ** 2 - jnp.cosh(x[1] + 0.3 * x[0]) - 0.5 * x[2] ** 2 - jnp.exp(0.5 * x[2] - x[1])


@jax.jit
def steps(kernel, keys):
    """Take one step of many chains."""
    target = Target.from_logdensity(logdensity, jnp.zeros(3))

    def one(key):
        start_key, noise_key = jax.random.split(key)
        state = kernel.init(target, jax.random.normal(start_key, (3,)))
        return kernel.step(target, state, kernel.sample_noise(noise_key, target))

    return jax.vmap(one)(keys)


@pytest.mark.parametrize("leapfrog", SOLVERS.values(), ids=SOLVERS.keys())
@pytest.mark.parametrize("metric", share({"identity": None, "diagonal": jnp.array([1.0, 0.5, 2.0])}, "diagonal"))
def test_same_step_as_the_sequential_leapfrog(leapfrog, metric, rng_key):
    keys = jax.random.split(rng_key, 128)
    expected, info = steps(HMC(0.7, LENGTH, metric), keys)
    found, found_info = steps(HMC(0.7, None, metric, leapfrog=leapfrog), keys)
    accepted = info.margin > 0
    assert 0 < int(accepted.sum()) < 128  # rejections occur
    np.testing.assert_array_equal(found_info.margin > 0, accepted)
    same = lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-9, atol=1e-9)
    jax.tree.map(same, found, expected)
    same(found_info.acceptance_rate, info.acceptance_rate)
    np.testing.assert_array_equal(found_info.is_divergent, info.is_divergent)
    finite = ~info.is_divergent  # a trajectory that overflows has no energy to compare
    same(found_info.energy[finite], info.energy[finite])


def test_a_trajectory_that_overflows_is_a_divergence(rng_key):
    _, info = steps(HMC(1e3, leapfrog=SOLVERS["block"]), jax.random.split(rng_key, 4))
    assert np.all(info.is_divergent)
    assert np.all(info.acceptance_rate == 0)


def test_static_mistakes_raise():
    with pytest.raises(TypeError, match=r"static number of steps|num_steps"):
        ParallelLeapfrog(jnp.array(8))
    with pytest.raises(ValueError, match="at least 1"):
        ParallelLeapfrog(0)
    with pytest.raises(TypeError, match=r"Newton|solver"):
        ParallelLeapfrog(8, MultipleShooting())
    with pytest.raises(ValueError, match=r"not reversible, got a solver with tol=0.01: leave tol out"):
        ParallelLeapfrog(8, Newton(HutchinsonBlockDiagonal(jax.random.key(1)), tol=1e-2))
    with pytest.raises(ValueError, match="leave num_integration_steps out"):
        HMC(0.1, 9, leapfrog=ParallelLeapfrog(8))
    with pytest.raises(TypeError, match="UniformLength"):
        HMC(0.1, UniformLength(1, 8), leapfrog=ParallelLeapfrog(8))
    assert HMC(0.1, 8, leapfrog=ParallelLeapfrog(8)).num_integration_steps == 8
    assert HMC().leapfrog == SequentialLeapfrog()
