"""Lanes that advance independently give what lanes in step give: states, records, certificates and counts.

The recurrence is not a Markov chain: each step iterates an affine map zero to six times, as input and state decide; the
map expands at times.
"""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pmcmc.recurrence import RESULTS, MultipleShooting, Sequential
from tests.helpers.staged import APART, IN_STEP, X0, advance, problem


@jax.jit
def solve_both(solver, inputs, guess):
    starts = jnp.broadcast_to(X0, (len(guess), 2))
    run = lambda fn: solver.solve_batch(fn, starts, inputs, initial_guess=guess, scale=jnp.ones(2))
    return run(APART), run(IN_STEP), Sequential().solve_batch(IN_STEP, starts, inputs)


def check_equal(ours, theirs) -> None:
    """Compare everything in two solutions, NaN included. Growth is measured at distances that rounding changes."""
    np.testing.assert_allclose(ours.stats.growth_rate, theirs.stats.growth_rate, rtol=1e-2)
    ours, theirs = (s._replace(stats=s.stats._replace(growth_rate=None)) for s in (ours, theirs))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-9, atol=1e-12), ours, theirs)
    np.testing.assert_array_equal(ours.result, theirs.result)
    for field in ("num_sweeps", "num_sequential_steps", "num_fn_evals", "certified_steps"):
        np.testing.assert_array_equal(getattr(ours.stats, field), getattr(theirs.stats, field), err_msg=field)


@pytest.mark.parametrize(("length", "num_blocks"), [(400, 8), (57, 8), (21, 20), (400, 1)])
def test_equals_lanes_in_step(length: int, num_blocks: int) -> None:
    """Several chains, blocks of any length, last blocks nearly empty, steps without a stage."""
    for seed in range(3):
        inputs, guess = problem(seed, 3, length)
        apart, in_step, exact = solve_both(MultipleShooting(num_blocks=num_blocks, tol=1e-6), inputs, guess)
        check_equal(apart, in_step)
        assert np.all(apart.result == RESULTS.successful)
        assert np.all(apart.stats.certified_steps == length)
        np.testing.assert_allclose(apart.value, exact.value, rtol=0, atol=1e-4)
        assert np.any(exact.aux["count"] == 0)
        if length > 100 and num_blocks > 1:
            assert np.all(apart.residual > 0)  # merges took place, within the tolerance but not exactly


def test_equals_sequential() -> None:
    inputs, guess = problem(7, 2, 2000)
    apart, _, exact = solve_both(MultipleShooting(num_blocks=16), inputs, guess)
    assert np.all(apart.result == RESULTS.successful)
    np.testing.assert_allclose(apart.value, exact.value, rtol=0, atol=1e-10)
    np.testing.assert_array_equal(apart.aux["count"], exact.aux["count"])
    np.testing.assert_allclose(apart.aux["doubled"], 2 * exact.value, rtol=0, atol=1e-10)
    assert np.all(apart.stats.num_sequential_steps < 1000)


@pytest.mark.parametrize("budget", [{"max_steps": 50 + n} for n in (0, 1, 3, 10)] + [{"max_sweeps": 1}])
def test_budgets_run_out_where_they_do_in_step(budget) -> None:
    """When the budget ends early, the same blocks are pending and the same prefix is certified."""
    inputs, guess = problem(1, 2, 400, largest_gain=1.1)
    apart, in_step, exact = solve_both(MultipleShooting(num_blocks=8, **budget), inputs, guess)
    check_equal(apart, in_step)
    assert np.any(apart.result == RESULTS.max_iters_reached)
    for chain, certified in enumerate(np.asarray(apart.stats.certified_steps)):
        assert certified >= 50
        np.testing.assert_allclose(apart.value[chain, :certified], exact.value[chain, :certified], rtol=0, atol=1e-9)


def test_nonfinite_states_end_the_prefix() -> None:
    """A push of infinity in one chain ends that chain's prefix and leaves the other chain unchanged."""
    inputs, guess = problem(2, 2, 400)
    inputs["push"] = inputs["push"].at[1, 170].set(jnp.inf)
    inputs["count"] = inputs["count"].at[1, 170].set(2)
    apart, in_step, exact = solve_both(MultipleShooting(num_blocks=8), inputs, guess)
    check_equal(apart, in_step)
    np.testing.assert_array_equal(apart.result, [RESULTS.successful, RESULTS.nonfinite])
    np.testing.assert_array_equal(apart.stats.certified_steps, [400, 170])
    np.testing.assert_allclose(apart.value[0], exact.value[0], rtol=0, atol=1e-9)


def test_lanes_do_not_wait() -> None:
    """Two lanes whose long steps alternate: hardly more stages are run than the larger of their sums."""
    length, stages = 40, []
    inputs, guess = problem(3, 1, 2 * length)
    even = jnp.arange(2 * length) % 2 == jnp.arange(2 * length) // length
    inputs["count"] = jnp.where(even, 19, 0)[None]

    def counted(work):
        jax.debug.callback(lambda: stages.append(1))
        return advance(work)

    fn = replace(APART, staged=replace(APART.staged, advance=counted))
    solver = MultipleShooting(num_blocks=2, max_steps=length)  # sweep 0 alone
    found = solver.solve_batch(fn, X0[None], inputs, initial_guess=guess)
    jax.block_until_ready(found)
    jax.effects_barrier()
    counts = found.aux["count"].reshape(2, length)
    needed, in_step = jnp.max(jnp.sum(counts, axis=1)), jnp.sum(jnp.max(counts, axis=0))
    assert needed < 0.7 * in_step
    assert needed <= len(stages) < 1.15 * needed
