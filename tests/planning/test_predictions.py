"""Predictions from a pilot against solves, their tail model against exact formulas, and a bound on stationarity."""

from functools import cache
from itertools import pairwise

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import stats

import pmcmc
from pmcmc import MALA
from pmcmc.planning import extrapolate_iterations, predict_iterations, predict_sweeps
from pmcmc.planning.predict import ExponentialTail, nonlinear_steps
from pmcmc.recurrence import Dense, Diagonal, Identity, MultipleShooting, Newton, Recurrence, Sequential, Zero
from pmcmc.stability import coalescence_time, wasserstein_bound
from tests.helpers.chains import draw_noise
from tests.helpers.selection import share
from tests.helpers.statistics import z_bound
from tests.helpers.targets import logistic, make_target

LENGTH, NUM_PAIRS, MAX_STEPS = 4096, 32, 400


def mala(logdensity_fn, step_size: float):
    target, kernel = make_target(logdensity_fn), MALA(step_size=step_size)
    return kernel.transition(target), target.dim, lambda seed, n: draw_noise(target, kernel, seed, n)


def isotropic(x):
    return -0.5 * jnp.sum(x**2)


def isotropic_mala():
    target = pmcmc.Target.from_logdensity(isotropic, jnp.zeros(3))
    kernel = MALA(step_size=0.3)
    return kernel.transition(target), 3, lambda seed, n: draw_noise(target, kernel, seed, n)


def network():
    """x' = tanh(W x + u): contracts on average, but not at every step (spectral radius of W about 1.5)."""
    weights = jnp.asarray(1.5 * np.random.default_rng(0).normal(size=(8, 8)) / np.sqrt(8))
    fn = Recurrence(lambda x, u: (jnp.tanh(weights @ x + u), None))
    return fn, 8, lambda seed, n: jax.random.normal(jax.random.key(seed), (n, 8))


PROBLEMS = {"Gaussian-MALA": isotropic_mala, "logistic-MALA": lambda: mala(logistic, 0.1), "network": network}


@cache
def problem(name: str):
    """Return (recurrence, noise, states of one path, their scale)."""
    fn, dim, draw = PROBLEMS[name]()
    path = Sequential().solve(fn, jnp.zeros(dim), draw(5, LENGTH)).value
    return fn, draw, path, jnp.std(path, axis=0)


@cache
def couple(name: str):
    fn, _, _, scale = problem(name)
    return jax.jit(lambda a, b, u: coalescence_time(fn, a, b, u, scale=scale))


def pilot(name: str, seed: int):
    _, draw, path, _ = problem(name)
    inputs = jax.tree.map(lambda u: u.reshape(MAX_STEPS, NUM_PAIRS, *u.shape[1:]), draw(seed, MAX_STEPS * NUM_PAIRS))
    starts = path[jax.random.choice(jax.random.key(seed), LENGTH, (2, NUM_PAIRS), replace=False)]
    return couple(name)(starts[0], starts[1], inputs)


@cache
def solve(name: str, solver):
    fn, _, path, scale = problem(name)
    return jax.jit(lambda u, guess: solver.solve(fn, path[-1], u, scale=scale, initial_guess=guess))


@pytest.mark.parametrize("num_blocks", [pytest.param(32, marks=pytest.mark.slow), 256])
@pytest.mark.parametrize("name", share(list(PROBLEMS), "network"))
def test_shooting(name: str, num_blocks: int) -> None:
    """Critical path within 1.5 for guesses from another path, blocks longer and shorter than a merge time, three seeds.

    The same is true of the steps beyond one block, which the pilot predicts; most are in the interval.
    """
    _, draw, path, _ = problem(name)
    inside = 0
    for seed in (10, 11, 12):
        guess = path[jax.random.permutation(jax.random.key(seed), LENGTH)]
        found = solve(name, MultipleShooting(num_blocks=num_blocks))(draw(100 + seed, LENGTH), guess).stats
        predicted = predict_sweeps(pilot(name, seed), length=LENGTH, num_blocks=num_blocks)
        expected, low, high = predicted.num_sequential_steps
        assert expected / 1.5 < found.num_sequential_steps < expected * 1.5
        merges = found.num_sequential_steps - LENGTH // num_blocks
        assert 1 / 1.5 < merges / (expected - LENGTH // num_blocks) < 1.5
        assert predicted.num_sweeps.value / 1.5 < found.num_sweeps < predicted.num_sweeps.value * 1.5
        inside += low - 3 <= found.num_sequential_steps <= high + 3
    assert inside >= 2


@pytest.mark.parametrize("name", share(list(PROBLEMS), "network"))
def test_newton_and_jacobi(name: str) -> None:
    """Jacobi within 1.5, Newton within 3, both inside their intervals; three seeds."""
    _, draw, path, _ = problem(name)
    for seed in (10, 11, 12):
        inputs = jax.tree.map(lambda u: u[:1024], draw(100 + seed, LENGTH))
        run = lambda jacobian: int(solve(name, Newton(jacobian, max_iters=1024))(inputs, path[:1024]).stats.num_iters)  # noqa: B023
        jacobi = predict_iterations(Zero(), pilot(name, seed), length=1024)
        assert jacobi.value / 1.5 < run(Zero()) < jacobi.value * 1.5
        newton = predict_iterations(Dense(), pilot(name, seed), length=1024)
        assert newton.value / 3 < run(Dense()) < newton.value * 3
        assert newton.lower <= run(Dense()) <= newton.upper


def test_windows() -> None:
    """Iterations of quasi-DEER on the network, extrapolated from windows of 256 steps to 4,096, within 1.5."""
    fn, draw, path, scale = problem("network")
    solver = Newton(Diagonal(), max_iters=256)
    inputs = draw(7, 8 * 256).reshape(8, 256, 8)
    windows = jax.jit(lambda u: solver.solve_batch(fn, path[:8], u, scale=scale).stats.num_iters)(inputs)
    predicted = extrapolate_iterations(windows, window=256, length=LENGTH)
    found = int(solve("network", Newton(Diagonal(), max_iters=1024))(draw(8, LENGTH), path).stats.num_iters)
    assert predicted.value / 1.5 < found < predicted.value * 1.5
    with pytest.raises(ValueError, match="window must be between 1 and length = 100"):
        extrapolate_iterations(windows, window=256, length=100)


def test_structures_are_ordered() -> None:
    found = [predict_iterations(j, pilot("network", 1), length=5000) for j in (Dense(), Diagonal(), Zero(), Identity())]
    assert all(a.value < b.value for a, b in pairwise(found))
    assert found[3].value == 5000
    assert (found[1].lower, found[1].upper) == (found[0].lower, found[2].upper)
    short = predict_iterations(Zero(), pilot("network", 1), length=20)
    assert short == (20, 20, 20)  # never more than T


def test_a_pilot_without_tolerance() -> None:
    """Pairs that had to become equal: the logarithm of the tolerance does not exist."""
    fn = lambda x, u: jnp.round(jnp.tanh(x) + u, 6)
    inputs = jax.random.normal(jax.random.key(0), (400, 16))
    found = coalescence_time(fn, jnp.zeros(16), jnp.ones(16), inputs, scale=1.0, tol=0.0)
    for jacobian in (Dense(), Diagonal()):
        prediction = predict_iterations(jacobian, found, length=1000)
        assert 1 <= prediction.lower <= prediction.value <= prediction.upper <= 1000


def test_longer_runs_take_longer() -> None:
    tries = [predict_iterations(Zero(), pilot("network", 1), length=10**k).value for k in (3, 4, 5, 6)]
    steps = np.diff(tries)
    assert np.all(steps > 0)
    np.testing.assert_allclose(steps, steps[0], rtol=0.05)  # like log T
    paths = [
        predict_sweeps(pilot("network", 1), length=10**6, num_blocks=1000, num_chains=c).num_sequential_steps.value
        for c in (1, 4, 16)
    ]
    assert paths[0] < paths[1] < paths[2]


def test_one_block_and_chaos_are_sequential() -> None:
    one = predict_sweeps(pilot("network", 1), length=1000, num_blocks=1)
    assert one.num_sequential_steps == (1000, 1000, 1000)
    assert one.num_sweeps.value == 0
    chaos = jax.jit(lambda a, b: coalescence_time(lambda x, u: 3.9 * x * (1 - x), a, b, jnp.zeros((300, 8)), scale=1.0))
    start = jnp.linspace(0.2, 0.4, 8)
    away = chaos(start, start + 1e-9)
    assert not jnp.any(away.merged)
    assert away.growth_rate > 0.3
    assert predict_sweeps(away, length=1000, num_blocks=10).num_sequential_steps.value == 1000
    for jacobian in (Dense(), Diagonal(), Zero()):
        assert predict_iterations(jacobian, away, length=1000).value == 1000


def test_nonlinear_steps() -> None:
    """Pair i stands still for 10 i steps, then contracts: the count is 10 i, whatever the rate."""
    wait = Recurrence(lambda x, u: (jnp.where(u > 0, 0.7 * x, x), None))
    inputs = (jnp.arange(300)[:, None] >= 10 * jnp.arange(4)[None]).astype(float)
    found = coalescence_time(wait, jnp.zeros(4), jnp.ones(4), inputs, scale=1.0)
    np.testing.assert_allclose(nonlinear_steps(found), 10 * np.arange(4), atol=1.01)
    never = coalescence_time(wait, jnp.zeros(4), jnp.ones(4), inputs[:20], scale=1.0)
    assert nonlinear_steps(never)[2:].tolist() == [np.inf, np.inf]


@pytest.mark.parametrize("count", [1, 10, 1000])
def test_tail_of_exponential_times(count: int) -> None:
    """From 4,000 exponential times: the mean of the largest is a harmonic number, and its quantiles are known."""
    times = 20 + 7 * stats.expon.ppf((np.arange(4000) + 0.5) / 4000)
    tail = ExponentialTail.fit(times, np.inf)
    harmonic = np.sum(1 / np.arange(1, count + 1))
    np.testing.assert_allclose(tail.expected_maximum(count), 20 + 7 * harmonic, rtol=0.005)
    for probability in (0.05, 0.5, 0.95):
        exact = 20 - 7 * np.log1p(-(probability ** (1 / count)))
        np.testing.assert_allclose(tail.quantile(probability, count), exact, rtol=0.01)
        if exact > tail.threshold:
            np.testing.assert_allclose(tail.exceeds(exact, count), 1 - probability, atol=0.01)


def test_tail_with_censored_times() -> None:
    """Times censored at the limit cause no bias: the mean excess is 7 although a quarter never ended."""
    times = 20 + 7 * stats.expon.ppf((np.arange(4000) + 0.5) / 4000)
    limit = 20 + 7 * np.log(4)
    tail = ExponentialTail.fit(np.where(times <= limit, times, limit + 1), limit)
    np.testing.assert_allclose(tail.mean_excess, 7, rtol=0.01)
    lost = ExponentialTail.fit(np.array([5.0, 101, 101, 101]), 100)
    assert lost.expected_maximum(10) == np.inf
    assert lost.quantile(0.5, 10) == np.inf
    assert lost.exceeds(200, 1000) == pytest.approx(1, abs=1e-6)


def test_tail_intervals_cover() -> None:
    """From only 16 times, nine in ten intervals contain the largest of 200 further times."""
    rng = np.random.default_rng(0)
    inside = 0
    for _ in range(400):
        tail = ExponentialTail.fit(30 + rng.exponential(10, 16), np.inf)
        new = 30 + rng.exponential(10, 200).max()
        inside += tail.quantile(0.05, 200) <= new <= tail.quantile(0.95, 200)
    share = inside / 400
    assert 0.9 - z_bound(1) * np.sqrt(0.09 / 400) - 0.02 < share  # 0.02 because the threshold is estimated, too
    assert share < 0.9 + z_bound(1) * np.sqrt(0.09 / 400)


def test_tail_of_equal_times() -> None:
    tail = ExponentialTail.fit(np.full(16, 40.0), 100)
    assert 40 <= tail.expected_maximum(100) < 43
    with pytest.raises(ValueError, match="at least 2 waiting times"):
        ExponentialTail.fit(np.ones(1), 100)


def folded_normal_mean(mean, deviation):
    """Return E |mean + deviation Z|."""
    return deviation * np.sqrt(2 / np.pi) * np.exp(-0.5 * (mean / deviation) ** 2) + mean * (
        1 - 2 * stats.norm.cdf(-mean / deviation)
    )


@pytest.mark.parametrize(("lag", "sharp"), [(1, 2.0), (5, 1.3), (20, 1.15)])
def test_wasserstein_bound(lag: int, sharp: float) -> None:
    """AR(1) from x0 = 4: W1 of two normals is E |difference of means + difference of deviations Z|.

    The bound is above it and, with a larger lag, close to it. X[L] - Y[0] = 4 (a^L - 1) + sqrt(1 - a^2L) Z exactly.
    """
    a, start, steps = 0.8, 4.0, 60
    ahead = start * (1 - a**lag)
    distances = a ** np.arange(steps) * folded_normal_mean(ahead, np.sqrt(1 - a ** (2 * lag)))
    t = np.arange(1, 25)
    exact = folded_normal_mean(start * a**t, 1 - np.sqrt(1 - a ** (2 * t)))
    found = wasserstein_bound(distances, lag=lag)
    assert np.all(found.bound[t] >= exact)
    assert np.all(found.bound[t] < sharp * exact)
    np.testing.assert_allclose(found.rate, np.log(a), rtol=1e-9)
    full = distances[0] * a ** np.arange(steps) / (1 - a**lag)  # the whole geometric series
    np.testing.assert_allclose(found.bound, full, rtol=1e-9)
    cut = wasserstein_bound(distances[:10], lag=lag)
    np.testing.assert_allclose(cut.bound, full[:10], rtol=1e-9)
    assert np.all(cut.extrapolated > found.extrapolated[:10])


def test_wasserstein_bound_of_coupled_chains() -> None:
    """From `coalescence_time` with a lag of 5, on 2,000 pairs; the pairs' mean is within sampling error."""
    a, lag, pairs = 0.8, 5, 2000
    fn = lambda x, u: a * x + np.sqrt(1 - a**2) * u
    noise = jax.random.normal(jax.random.key(0), (lag + 40, pairs))
    ahead, _ = jax.lax.scan(lambda x, u: (fn(x, u), None), jnp.full(pairs, 4.0), noise[:lag])
    found = coalescence_time(fn, ahead, jnp.full(pairs, 4.0), noise[lag:], scale=1.0, num_checkpoints=0)
    bound = wasserstein_bound(found.distances[: int(found.num_steps) + 1], lag=lag)
    t = np.arange(1, 20)
    exact = folded_normal_mean(4 * a**t, 1 - np.sqrt(1 - a ** (2 * t)))
    assert np.all(bound.bound[t] >= exact)
    assert np.all(bound.bound[t] < 1.35 * exact)


def test_wasserstein_bound_says_when_there_is_none() -> None:
    assert np.all(np.isinf(wasserstein_bound(np.ones(20), lag=1).bound))
    merged = wasserstein_bound(np.array([2.0, 1.0, 0.0]), lag=1)
    assert merged.bound.tolist() == [3, 1, 0]
    assert merged.extrapolated.tolist() == [0, 0, 0]
    with pytest.raises(ValueError, match="without NaN"):
        wasserstein_bound(np.array([1.0, np.nan]), lag=1)
    with pytest.raises(ValueError, match="lag >= 1"):
        wasserstein_bound(np.ones(5), lag=0)


def test_arguments() -> None:
    with pytest.raises(ValueError, match="must be at least 1: 1000, 0, 1"):
        predict_sweeps(pilot("network", 1), length=1000, num_blocks=0)
    with pytest.raises(ValueError, match="length must be at least 1"):
        predict_iterations(Zero(), pilot("network", 1), length=0)
