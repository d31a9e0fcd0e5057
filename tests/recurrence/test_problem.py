"""What is refused before a solver runs: states that cannot be compared or would be truncated, axes that do not fit."""

import jax
import jax.numpy as jnp
import pytest

from pmcmc import recurrence as rec
from pmcmc._pytree import all_finite, finite_rows
from pmcmc.stability import coalescence_time

SOLVERS = [rec.Sequential(), rec.MultipleShooting(), rec.deer()]
solvers = pytest.mark.parametrize("solver", SOLVERS, ids=["sequential", "shooting", "deer"])


def couple(fn, first, second):
    return coalescence_time(fn, first, second, jnp.zeros((9, 2)), scale=1.0)


@solvers
def test_states_that_cannot_be_compared(solver) -> None:
    """Complex numbers, which grew to NaN and counted as solved, and typed keys."""
    square = lambda z, u: z * z + u
    with pytest.raises(TypeError, match=r"dtype complex128: expected real numbers.*as two leaves"):
        solver.solve(square, 0j, jnp.full(200, 1 + 1j))
    with pytest.raises(TypeError, match="dtype complex128"):
        solver.solve(lambda z, u: jnp.abs(z), 1j, length=9)
    step = lambda x, u: {"key": jax.random.split(x["key"])[0], "y": jax.random.normal(x["key"])}
    with pytest.raises(TypeError, match=r"the state x\['key'\] has dtype key<fry>.*jax.random.key_data"):
        solver.solve(step, {"key": jax.random.key(0), "y": 0.0}, length=5)


def test_a_start_that_would_be_truncated() -> None:
    above = lambda x, u: (x > 0.5).astype(int)
    with pytest.raises(TypeError, match="dtype float64 in x0, and fn returns int64"):
        rec.solve(above, 0.9, length=5)
    with pytest.raises(TypeError, match="dtype float64 in x0, and fn returns int64"):
        couple(above, jnp.zeros(2), jnp.full(2, 0.9))
    assert rec.solve(lambda x, u: 0.5 * x, 1, length=5).value[0] == 0.5


@pytest.mark.parametrize("solver", SOLVERS[:2], ids=["sequential", "shooting"])
def test_the_remedy_for_keys(solver) -> None:
    def step(x, u):
        now, following = jax.random.split(jax.random.wrap_key_data(x["key"]))
        return {"key": jax.random.key_data(following), "y": 0.5 * x["y"] + jax.random.normal(now)}

    start = {"key": jax.random.key_data(jax.random.key(0)), "y": 0.0}
    assert solver.solve(step, start, length=5).result == rec.RESULTS.successful


def test_complex_entries_are_tested_for_finiteness() -> None:
    """Also where states are not checked by their dtype, as in a carry."""
    rows = {"z": jnp.array([1j, jnp.nan * 1j]), "n": jnp.arange(2)}
    assert finite_rows(rows).tolist() == [True, False]
    assert not all_finite(rows)


@solvers
def test_leading_axes_of_a_batch(solver) -> None:
    """A chain of the inputs was left out if x0 had one chain only."""
    decay = lambda x, u: 0.5 * x + u
    with pytest.raises(ValueError, match=r"same leading axis of chains, got \[\(1,\), \(3,\)\]"):
        solver.solve_batch(decay, jnp.zeros((1, 2)), jnp.ones((3, 16, 2)))
    with pytest.raises(ValueError, match="same leading axis of chains"):
        solver.solve_batch(lambda x, u: x, (jnp.zeros((3, 2)), jnp.zeros(2)), length=16)
    with pytest.raises(ValueError, match="same leading axis of chains"):
        solver.solve_batch(lambda x, u: x, (jnp.zeros((3, 2)), jnp.zeros(())), length=16)


@solvers
@pytest.mark.parametrize("x0", [jnp.zeros(0), (), {"a": jnp.zeros((2, 0))}])
def test_a_state_without_numbers(solver, x0) -> None:
    with pytest.raises(ValueError, match="x0 holds no number"):
        solver.solve(lambda x, u: x, x0, length=16)


@solvers
def test_a_leaf_without_numbers_beside_others(solver) -> None:
    x0 = {"empty": jnp.zeros(0), "y": jnp.ones(2)}
    found = solver.solve(lambda x, u: {"empty": x["empty"], "y": 0.5 * x["y"]}, x0, length=16)
    assert found.result == rec.RESULTS.successful
