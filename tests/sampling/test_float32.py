"""Certificates in float32: shooting and Newton on positions that are float32 from the start."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import pmcmc
from pmcmc import HMC, MALA, NUTS, Target
from pmcmc.recurrence import RESULTS, MultipleShooting, Sequential, deer
from pmcmc.sampling.engine import Engine
from pmcmc.sampling.programs import Shape
from tests.helpers.chains import draw_noise, solve, step_residuals
from tests.helpers.selection import share
from tests.helpers.targets import make_target, mixture

pytestmark = pytest.mark.optimized

EPS = float(jnp.finfo(jnp.float32).eps)
TOLERANCE = 32 * EPS


def start(target, kernel, length: int):
    x0 = jnp.zeros(target.dim, jnp.float32)
    noise = draw_noise(target, kernel, 0, length)
    assert all(leaf.dtype == jnp.float32 for leaf in jax.tree.leaves(noise))
    return x0, noise, solve(target, kernel, Sequential(), x0, noise)


def test_shooting_on_the_mixture() -> None:
    """It is certified, each step is correct, and nearly every state is that of the sequential chain."""
    length = 20_000
    target, kernel = make_target(mixture, jnp.float32), MALA(step_size=0.8)
    x0, noise, chain = start(target, kernel, length)
    guess = 3 * jax.random.normal(jax.random.key(2), (length, 2), jnp.float32)
    solution = solve(target, kernel, MultipleShooting(num_blocks=32), x0, noise, guess, jnp.full(2, 2.2, jnp.float32))
    assert solution.value.dtype == chain.value.dtype == jnp.float32
    assert solution.result == RESULTS.successful
    assert solution.residual <= TOLERANCE
    residuals = step_residuals(target, kernel, x0, solution.value, noise, jnp.full(2, 2.2, jnp.float32))
    assert np.mean(residuals > 2 * TOLERANCE) < 1e-3  # an evaluation of one step may decide a near tie differently
    differs = jnp.max(jnp.abs(solution.value - chain.value), axis=1) > 1e-3
    assert jnp.mean(differs) < 0.02


def test_near_ties_are_counted() -> None:
    """Decisions within a few roundings of the log density: none at its natural size, hundreds with 1e5 added."""
    keys, x0 = jax.random.split(jax.random.key(0), 2), jnp.zeros((2, 2), jnp.float32)
    counts = []
    for constant in (0.0, 1e5):
        target = Target.from_logdensity(lambda x: mixture(x) + jnp.float32(constant), jnp.zeros(2, jnp.float32))  # noqa: B023
        kernel = MALA(step_size=0.8)
        segment, _ = Engine(target, kernel, keys, x0, None).solve(
            Sequential(), Shape(1, 3000), x0, np.zeros(2, int), 3000
        )
        _, info, near_ties = segment.chains()
        assert info.margin.dtype == jnp.float32
        bound = 4 * EPS * np.maximum(1.0, np.abs(info.logdensity))
        np.testing.assert_array_equal(near_ties, np.abs(info.margin) <= bound)
        counts.append(int(near_ties.sum()))
    assert counts[0] < 5
    assert counts[1] > 100


SHIFT, SIZE = 1e4, 1e-6


SOLVERS = {"shooting": MultipleShooting(num_blocks=16), "deer": deer(max_iters=60)}


@pytest.mark.parametrize("kind", ["shifted", "tiny", "both"])
@pytest.mark.parametrize("solver", share(SOLVERS, "shooting"))
def test_shift_and_scale(solver, kind: str) -> None:
    """A posterior of sd 1 at 1e4, of sd 1e-6, or below the resolution of float32: what is certified is correct.

    Sequential sampling of these uses the same arithmetic, so the certificate is about that chain.
    """
    shift, size = {"shifted": (SHIFT, 1.0), "tiny": (0.0, SIZE), "both": (SHIFT, SIZE)}[kind]
    length = 2000
    logdensity_fn = lambda x: -0.5 * jnp.sum(((x - jnp.float32(shift)) / jnp.float32(size)) ** 2)
    target = Target.from_logdensity(logdensity_fn, jnp.zeros(2, jnp.float32))
    kernel = HMC(step_size=1.2 * size, num_integration_steps=1)
    x0 = jnp.full(2, shift, jnp.float32)
    noise = draw_noise(target, kernel, 0, length)
    guess = x0[None] + size * 2 * jax.random.normal(jax.random.key(1), (length, 2), jnp.float32)
    solution = solve(target, kernel, solver, x0, noise, guess)
    chain = solve(target, kernel, Sequential(), x0, noise)
    certified = int(solution.stats.certified_steps)
    resolution = max(size * TOLERANCE, 2 * EPS * shift)
    residuals = step_residuals(target, kernel, x0, solution.value, noise, jnp.full(2, size, jnp.float32)) * size
    assert np.mean(residuals[:certified] > 2 * resolution) < 2e-3
    if solution.result == RESULTS.successful:
        assert certified == length
        gap = np.max(np.abs(np.asarray(solution.value, float) - np.asarray(chain.value, float)), axis=1)
        assert np.mean(gap > 50 * resolution) < 0.02
    if kind != "both":
        assert solution.result == RESULTS.successful
        assert float(jnp.std(solution.value)) > 0.5 * size


@pytest.mark.parametrize("kernel", [HMC(), MALA(), NUTS()], ids=["HMC", "MALA", "NUTS"])
def test_float32_positions_in_64_bit_mode(kernel) -> None:
    """Tests run in 64-bit mode: neither warm-up nor the chain makes such positions wider."""
    start = jnp.zeros(3, jnp.float32)
    chain = pmcmc.sample(
        lambda x: -0.5 * jnp.sum(x**2), start, 0, kernel=kernel, num_warmup=100, num_samples=50, progress_bar=False
    )
    assert chain.get_samples().dtype == jnp.float32
    assert chain.kernel.step_size.dtype == jnp.float32
