"""What a solve certifies is the sequential path: after any budget, from any guess, with and without a scale."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pmcmc import recurrence as rec
from pmcmc.recurrence import RESULTS
from tests.helpers.prefixes import DIM, LENGTH, SOLVERS, draw_cases, judge_cases, run, solve_cases
from tests.helpers.selection import share

SOLVES = 23  # for each solver in each leg: 15 solvers and 3 legs make 1,035
BUDGETS = jnp.arange(1, 13)


def solve_many(solver, fn, x0, guesses, inputs=None, **options):
    """Return solutions for a batch of guesses; numbers of the solver may be a batch as well."""
    solver = jax.tree.map(lambda x: jnp.broadcast_to(x, guesses.shape[:1]), solver)
    one = lambda solver, guess: solver.solve(fn, x0, inputs, initial_guess=guess, length=guess.shape[0], **options)
    return jax.jit(jax.vmap(one))(solver, guesses)


def sequential(fn, x0, length, inputs=None):
    return np.asarray(jax.jit(lambda: rec.Sequential().solve(fn, x0, inputs, length=length).value)())


def certified(solutions) -> np.ndarray:
    return np.where(solutions.result == RESULTS.successful, solutions.value.shape[1], solutions.stats.certified_steps)


def assert_prefixes(solutions, exact, atol) -> None:
    for value, steps in zip(np.asarray(solutions.value), certified(solutions), strict=True):
        np.testing.assert_allclose(value[:steps], exact[:steps], rtol=0, atol=atol)


@pytest.mark.parametrize("dtype", ["float64", "float32"])
@pytest.mark.parametrize("r", [4.0, 2.8])
@pytest.mark.parametrize("name", ["deer", "picard"])
def test_budgets_on_the_logistic_map(name: str, r: float, dtype: str) -> None:
    """Iterates explode to 1e80 after the prefix; relative to their spread, any residual would be small."""
    fn = lambda x, u: r * x * (1 - x)
    guesses = jax.random.uniform(jax.random.key(0), (BUDGETS.size, 256), dtype)
    x0 = jnp.asarray(0.3, dtype)
    found = solve_many({"deer": rec.deer, "picard": rec.picard}[name](max_iters=BUDGETS), fn, x0, guesses)
    exact = sequential(fn, x0, 256)
    assert_prefixes(found, exact, atol=1e-9 if dtype == "float64" else 1e-4)
    assert np.all(certified(found) >= BUDGETS)
    tol = (512 if dtype == "float64" else 32) * np.finfo(dtype).eps
    within = np.cumprod(np.asarray(found.residual_profile) <= tol, axis=1).sum(1)
    if r == 2.8:  # small residuals mean small errors here
        for value, steps in zip(np.asarray(found.value), within, strict=True):
            np.testing.assert_allclose(value[:steps], exact[:steps], rtol=0, atol=1e-9 if dtype == "float64" else 1e-4)


def test_shooting_from_wild_guesses_of_a_map_that_explodes() -> None:
    """Runs from guesses of size 1e3 end at infinity: no block may merge with the finite first part of one."""
    inputs = jax.random.normal(jax.random.key(1), (200,))
    fn = lambda x, u: 0.2 * x**2 + 0.1 * u
    guesses = 1e3 * jax.random.normal(jax.random.key(2), (12, 200))
    found = solve_many(rec.MultipleShooting(num_blocks=8, max_sweeps=BUDGETS), fn, 0.1, guesses, inputs)
    assert_prefixes(found, sequential(fn, 0.1, 200, inputs), atol=1e-11)
    assert np.all(certified(found) >= np.minimum(25 * (BUDGETS + 1), 200))
    assert np.all(found.result[BUDGETS >= 7] == RESULTS.successful)  # the path itself is finite


@pytest.mark.parametrize("size", [1e3, 1e30])
@pytest.mark.parametrize("factor", [0.1, 0.9])
def test_shooting_from_wild_guesses_of_a_map_that_contracts(factor: float, size: float) -> None:
    """At 0.1 the runs come within 512 eps of the guesses' spread, and once counted as solved with errors of 1e4."""
    inputs = jax.random.normal(jax.random.key(1), (200,))
    fn = lambda x, u: factor * x + u
    guesses = size * jax.random.normal(jax.random.key(2), (4, 200))
    found = solve_many(rec.MultipleShooting(num_blocks=8), fn, 0.1, guesses, inputs)
    assert np.all(found.result == RESULTS.successful)
    assert_prefixes(found, sequential(fn, 0.1, 200, inputs), atol=1e-11)


@pytest.mark.parametrize("error", [1e-15, 1e-14, 1e-12])
def test_shooting_from_next_to_a_chaotic_path(error: float) -> None:
    """All blocks are within the tolerance at their first step, before any sign that they separate."""
    fn = lambda x, u: 4.0 * x * (1 - x)
    exact = sequential(fn, 0.3, 200)
    guesses = exact[None] + error * jax.random.normal(jax.random.key(0), (8, 200))
    found = solve_many(rec.MultipleShooting(num_blocks=8), fn, 0.3, guesses)
    assert_prefixes(found, exact, atol=1e-9)


@pytest.mark.parametrize("scale", [1.0, None])
@pytest.mark.parametrize("num_blocks", [64, 32, 22])
def test_short_blocks_next_to_a_chaotic_path(num_blocks: int, scale: float | None) -> None:
    """Blocks of one to three steps: all of them merge before one of them alone has shown that distances grow."""
    fn = lambda x, u: 4 * x * (1 - x)
    x0 = jnp.float32(0.3)
    exact, near = sequential(fn, x0, 64), sequential(fn, x0 + 3e-7, 64)
    assert np.max(np.abs(near - exact)) > 0.5
    found = solve_many(rec.MultipleShooting(num_blocks=num_blocks), fn, x0, near[None], scale=scale)
    assert_prefixes(found, exact, atol=1e-4)


@pytest.mark.parametrize("num_blocks", [200, 70])
def test_short_blocks_of_a_map_that_contracts(num_blocks: int) -> None:
    inputs = jax.random.normal(jax.random.key(1), (200,), "float32")
    fn = lambda x, u: 0.5 * jnp.tanh(x) + u
    found = solve_many(
        rec.MultipleShooting(num_blocks=num_blocks), fn, jnp.float32(0), jnp.zeros((1, 200), "float32"), inputs
    )
    assert np.all(found.result == RESULTS.successful)
    assert np.all(found.stats.growth_rate < 0)
    assert np.all(found.stats.num_sequential_steps < 40)
    assert_prefixes(found, sequential(fn, jnp.float32(0), 200, inputs), atol=2e-5)


@pytest.mark.parametrize("name", ["deer", "quasi-elk"])
def test_windows_leave_nothing_wrong_behind(name: str) -> None:
    """An iterate that explodes within a window inflates the scale of the window."""
    solver = {"deer": rec.deer, "quasi-elk": rec.quasi_elk}[name]
    fn = lambda x, u: 0.2 * x**2 + 0.1 * u
    inputs = jax.random.normal(jax.random.key(1), (200,))
    guesses = 1e3 * jax.random.normal(jax.random.key(2), (12, 200))
    found = solve_many(rec.Windowed(solver(max_iters=BUDGETS), 16), fn, 0.1, guesses, inputs)
    assert_prefixes(found, sequential(fn, 0.1, 200, inputs), atol=1e-11)
    assert np.all(certified(found) >= BUDGETS - 1)


def test_windows_of_a_chaotic_map() -> None:
    """Relative to a window that explodes, rounding looked like 1e-182, and growth by exp(60) like none."""
    fn = lambda x, u: jnp.stack([1 - 1.32 * x[0] ** 2 + x[1], 0.3 * x[0]])
    solver = rec.Windowed(rec.deer(), 24)
    x0 = jax.random.uniform(jax.random.key(0), (64, 2), minval=0.05, maxval=0.95)
    found = jax.jit(jax.vmap(lambda x0: solver.solve(fn, x0, length=200)))(x0)
    assert np.all((found.residual == 0) | (found.residual > 1e-18))  # states are of size 1


def test_the_judge_sees_a_false_certificate() -> None:
    """One sweep of Jacobi reported as solved: its second state is wrong from every guess except good ones."""
    cases = draw_cases(jax.random.split(jax.random.key(0), SOLVES), "float64")
    found = solve_cases(SOLVERS["jacobi"], cases, jnp.ones(SOLVES, int), False)
    assert not np.any(judge_cases(cases, found, False).false)
    lying = found._replace(stats=found.stats._replace(certified_steps=jnp.full(SOLVES, 20)))
    assert np.mean(judge_cases(cases, lying, False).false) > 0.5


LEGS = [("float64", False), ("float32", False), ("float32", True)]
EACH = {f"{name}-{dtype}-{given}": (name, dtype, given) for name in SOLVERS for dtype, given in LEGS}


@pytest.mark.parametrize("leg", share(EACH, "deer-float64-False", "shooting-float64-False"))
def test_no_false_certificate(leg: tuple[str, str, bool]) -> None:
    """Random maps, guesses and budgets; `python -m tests.helpers.prefixes` runs ten times as many."""
    name, dtype, scale_given = leg
    case, _, found = run(name, SOLVES, dtype, scale_given, seed=1)
    assert case.guess.shape == (SOLVES, LENGTH, DIM)
    assert not np.any(found.false & ~found.near_tie)
    assert found.certified.mean() > 10
