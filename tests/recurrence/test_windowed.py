"""A sliding window gives the same path for less work per iteration, and counts that work."""

from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pmcmc import recurrence as rec
from pmcmc.recurrence import RESULTS, Windowed
from tests.helpers.recurrence_problems import coupled

SEQUENTIAL = rec.Sequential()


def solve(solver, fn, x0, inputs, **options):
    return jax.jit(lambda solver, x0, inputs: solver.solve(fn, x0, inputs, **options))(solver, x0, inputs)


@pytest.mark.parametrize("window", [1, 16])
@pytest.mark.parametrize("solver", [rec.jacobi(), rec.quasi_elk()], ids=["jacobi", "quasi-elk"])
def test_equals_sequential(solver, window, rng_key):
    fn, x0, inputs = coupled(rng_key, 53)
    found = solve(Windowed(solver, window), fn, x0, inputs)
    assert int(found.result) == RESULTS.successful
    assert int(found.stats.certified_steps) == 53
    np.testing.assert_allclose(found.value, solve(SEQUENTIAL, fn, x0, inputs).value, atol=1e-11)


def test_stats_count_windows(rng_key):
    fn, x0, inputs = coupled(rng_key, 53)
    whole, wide = solve(rec.deer(), fn, x0, inputs), solve(Windowed(rec.deer(), 53), fn, x0, inputs)
    assert jax.tree.map(int, whole.stats[:5]) == jax.tree.map(int, wide.stats[:5])
    narrow = solve(Windowed(rec.deer(), 8), fn, x0, inputs)
    assert int(narrow.stats.num_fn_evals) == 8 * int(narrow.stats.num_sequential_steps)
    assert int(narrow.stats.num_iters) > int(whole.stats.num_iters)


def test_budget_keeps_the_prefix(rng_key):
    fn, x0, inputs = coupled(rng_key, 53)
    found = solve(Windowed(rec.deer(max_iters=5, num_iterates=7), 8), fn, x0, inputs)
    prefix = int(found.stats.certified_steps)
    assert int(found.result) == RESULTS.max_iters_reached
    assert 5 <= prefix < 53
    np.testing.assert_allclose(found.value[:prefix], solve(SEQUENTIAL, fn, x0, inputs).value[:prefix], atol=1e-11)
    assert np.isinf(found.residual)
    assert np.isinf(found.residual_profile[-1])
    assert found.iterates.shape == (7, 53, 4)
    np.testing.assert_array_equal(found.iterates[-1], found.value)


def test_solvers_that_are_not_newton_type_are_refused():
    """By the class itself: outside the tests no argument is checked by its annotation."""
    for solver in (rec.MultipleShooting(), rec.Sequential(), rec.Windowed(rec.deer())):
        with pytest.raises(TypeError, match="Windowed needs a Newton-type solver"):
            rec.Windowed.__post_init__(SimpleNamespace(solver=solver, window=16))


def test_exploding_iterates_do_not_certify_what_is_wrong():
    """An exploded window inflates the scale, so that any residual is small relative to it; no error may remain then."""
    fn = lambda x, u: 0.9 * x - 0.05 * x**3 + u
    inputs = (0.5 * jnp.sin(jnp.arange(300.0)))[:, None]
    exact = solve(SEQUENTIAL, fn, jnp.zeros(1), inputs).value
    found = solve(Windowed(rec.deer(), 32), fn, jnp.zeros(1), inputs, initial_guess=jnp.full((300, 1), 4.0))
    assert int(found.result) == RESULTS.successful
    np.testing.assert_allclose(found.value, exact, atol=1e-11)


@pytest.mark.parametrize("first", [0, 900], ids=["at the start", "in the middle"])
@pytest.mark.parametrize("burst", [100.0, 3000.0])
def test_a_burst_does_not_loosen_the_tolerance(burst, first):
    """Relative to the scale of its window, states of a burst were solved at residuals of 100 tolerances of the path."""
    inputs = jax.random.normal(jax.random.key(0), (2000,), jnp.float32).at[first : first + 200].multiply(burst)
    fn, x0 = lambda x, u: 0.5 * x + u, jnp.float32(0)
    found = solve(Windowed(rec.jacobi(max_iters=5000), 64), fn, x0, inputs)
    assert int(found.result) == RESULTS.successful
    assert int(found.stats.certified_steps) == 2000
    residual = np.abs(found.value[1:] - (0.5 * found.value[:-1] + inputs[1:]))
    assert np.all(residual <= 6e-6 + 4 * np.finfo(np.float32).eps * np.abs(found.value[1:]))
    assert int(found.stats.num_iters) < 600
