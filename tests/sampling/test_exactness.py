"""Examples found by hypothesis: from any guess, what a solver certifies of any chain is the sequential chain.

Each family is one program for a kernel and a solver; target, step size, seed, start and guess are its arguments. If a
solve is successful, every state is that of the sequential chain; otherwise the certified prefix is.
"""

from functools import cache, partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import pmcmc
from pmcmc._pytree import finite_rows, relative_distance
from pmcmc.recurrence import RESULTS, MultipleShooting, Sequential, Windowed, deer, quasi_deer, quasi_elk
from tests.helpers.problems import DIM, Numbers, random_numbers, target_of

pytestmark = pytest.mark.optimized

LENGTH = 160
# derandomize: the same examples in every run; a failure prints the seed of its problem.
FIXED = settings(
    derandomize=True, deadline=None, max_examples=60, database=None, suppress_health_check=list(HealthCheck)
)


class Case(NamedTuple):
    """Arguments of a family; all are leaves."""

    target: pmcmc.Target
    kernel: Any
    key: Any
    x0: Any
    guess: Any
    scale: Any


@partial(jax.jit, static_argnames="length")
def solve_both(case: Case, solver: Any, *, length: int):
    """Return the solver's path and the sequential one, and residuals of the first, each step evaluated alone."""
    target, kernel = case.target, case.kernel
    noise = jax.vmap(lambda key: kernel.sample_noise(key, target))(jax.random.split(case.key, length))
    transition = kernel.transition(target)
    expected = Sequential().solve(transition, case.x0, noise)
    found = solver.solve(transition, case.x0, noise, initial_guess=case.guess, scale=case.scale)
    before = jax.tree.map(lambda x, start: jnp.concatenate([start[None], x[:-1]]), found.value, case.x0)
    images, _ = jax.vmap(transition)(before, noise)
    residuals = relative_distance(found.value, images, case.scale)
    gaps = relative_distance(found.value, expected.value, case.scale)
    return found._replace(value=None, aux=None), expected.result, residuals, gaps, finite_rows(found.value)


GUESSES = ("constant", "far", "another", "near", "holes", "huge")


def make_guess(kind: str, path: np.ndarray, size: float, rng: np.random.Generator) -> np.ndarray:
    """Make guesses that help, mislead or are not numbers, from ``path``: another chain's states, or scattered ones."""
    if kind == "constant":
        return np.broadcast_to(path[0], path.shape).copy()
    if kind == "far":
        return path + 1e6 * size
    if kind == "near":
        return path + size * 10.0 ** rng.uniform(-14, -1)
    if kind == "holes":
        return np.where(rng.random(len(path))[:, None] < 0.3, np.nan, path)
    if kind == "huge":
        return np.full_like(path, 1e300)
    return path


def draw_case(seed: int, kind: str, kernel: Any, length: int) -> Case:
    """Draw a problem of any kind whose start is inside its support, at a step size from poor to good."""
    rng = np.random.default_rng(seed)
    numbers: Numbers = random_numbers(rng)
    start = numbers.shift + numbers.size * np.minimum(numbers.modes[0], numbers.limit - 0.1)
    spread = numbers.size / np.sqrt(np.max(numbers.slopes))
    factor = 10.0 ** rng.uniform(-1, 0.2)
    step_size = (factor * spread) ** 2 if isinstance(kernel, pmcmc.MALA) else factor * spread
    path = start + spread * rng.normal(size=(length, DIM))
    scale = np.full(DIM, spread)
    guess = make_guess(kind, path, spread, rng)
    key = jax.random.key(seed)
    return Case(target_of(numbers), kernel.with_step_size(step_size), key, *map(jnp.asarray, (start, guess, scale)))


def check(found: Any, sequential_result: Any, residuals: Any, gaps: Any, finite: Any, length: int) -> None:
    """Check the certificate: of the whole path if it is successful, else of its prefix."""
    certified = int(found.stats.certified_steps)
    assert np.all(gaps[:certified] <= 1e-9), "what is certified is not the sequential chain"
    assert np.all(residuals[:certified] <= 1e-10)
    assert np.all(finite[:certified])
    if int(found.result) == RESULTS.successful:
        assert certified == length
        assert int(sequential_result) == RESULTS.successful
    else:
        assert certified < length


HMC, MALA = pmcmc.HMC(step_size=1.0, num_integration_steps=2), pmcmc.MALA(step_size=1.0)
WALK, NUTS = pmcmc.RandomWalk(step_size=1.0), pmcmc.NUTS(step_size=1.0, max_num_doublings=3)
FAMILIES = {
    "HMC-7": (HMC, MultipleShooting(7), LENGTH),
    "MALA-16": (MALA, MultipleShooting(16), LENGTH),
    "walk-5": (WALK, MultipleShooting(5), LENGTH),
    "MALA-deer": (MALA, deer(max_iters=80), 40),
}
SLOW_FAMILIES = {
    "HMC-160": (HMC, MultipleShooting(160), LENGTH),
    "HMC-two-sweeps": (HMC, MultipleShooting(8, max_sweeps=2), LENGTH),
    "NUTS-7": (NUTS, MultipleShooting(7), 80),
    "MALA-quasi-deer": (MALA, quasi_deer(max_iters=60), 40),
    "HMC-quasi-elk": (HMC, quasi_elk(max_iters=60), 40),
    "MALA-windowed": (MALA, Windowed(deer(max_iters=80), window=8), 40),
}


@pytest.mark.parametrize("name", [*FAMILIES, *(pytest.param(name, marks=pytest.mark.slow) for name in SLOW_FAMILIES)])
def test_certified_is_sequential(name: str) -> None:
    kernel, solver, length = (FAMILIES | SLOW_FAMILIES)[name]
    reached = set()

    @FIXED
    @given(st.integers(0, 2**31 - 1), st.sampled_from(GUESSES))
    def holds(seed: int, kind: str) -> None:
        found, *rest = solve_both(draw_case(seed, kind, kernel, length), solver, length=length)
        check(found, *rest, length)
        reached.add(int(found.result))

    holds()
    # With two sweeps only the prefix is certified.
    assert (RESULTS.max_iters_reached if name == "HMC-two-sweeps" else RESULTS.successful) in reached


@cache
def another_chain(seed: int) -> tuple[Case, np.ndarray]:
    case = draw_case(seed, "another", HMC, LENGTH)
    noise = jax.vmap(lambda key: HMC.sample_noise(key, case.target))(jax.random.split(jax.random.key(99), LENGTH))
    path = Sequential().solve(case.kernel.transition(case.target), case.x0, noise).value
    return case, path


@pytest.mark.parametrize("seed", range(3))
def test_another_chains_states_are_no_trap(seed: int) -> None:
    """The guess satisfies the equation at every step, but with other noise."""
    case, path = another_chain(seed)
    found, *rest = solve_both(case._replace(guess=path), MultipleShooting(7), length=LENGTH)
    check(found, *rest, LENGTH)


def test_a_false_certificate_would_be_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    """The check can fail: for a solver that never repairs its blocks and reports them as solved."""
    from pmcmc.recurrence.shooting import solver

    conclude = solver._conclude
    lie = lambda lanes, tol, sweep: conclude(lanes, tol, sweep._replace(active=jnp.zeros_like(sweep.active)))
    monkeypatch.setattr(solver, "_conclude", lie)
    monkeypatch.setattr(
        solver, "repair_sweep", lambda lanes, tol, steps, sweep: sweep._replace(active=sweep.active & False)
    )
    length = LENGTH - 1  # not the program of the other tests
    found, *rest = solve_both(draw_case(0, "far", HMC, length), MultipleShooting(7), length=length)
    with pytest.raises(AssertionError, match="not the sequential chain"):
        check(found, *rest, length)
