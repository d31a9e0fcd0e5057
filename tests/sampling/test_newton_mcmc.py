"""Every Newton-type solver returns the sequential chain within T iterations, and never certifies a wrong one."""

from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pmcmc import HMC, MALA, Target
from pmcmc._pytree import register_dataclass
from pmcmc.recurrence import (
    RESULTS,
    JacobianStructure,
    MultipleShooting,
    Newton,
    Sequential,
    Windowed,
    deer,
    elk,
    jacobi,
    picard,
    quasi_deer,
    quasi_elk,
)
from tests.helpers.chains import draw_noise, solve, step_residuals
from tests.helpers.targets import banana, eight_schools, gaussian, logistic, make_target, skewed

LENGTH = 48
SOLVERS = {make.__name__: make(max_iters=LENGTH) for make in (deer, quasi_deer, picard, jacobi)}
# (step size of MALA, of HMC with three leapfrog steps): large enough that proposals are rejected
STEPS = {
    gaussian: (0.5, 0.9),
    skewed: (0.3, 0.6),
    banana: (0.15, 0.4),
    logistic: (0.06, 0.45),
    eight_schools: (0.4, 0.7),
}


def half_line(x):
    """An exponential law: -inf outside its support."""
    return jnp.sum(jnp.where(x > 0, -x, -jnp.inf))


def with_hole(x):
    """A Gaussian whose log density and gradient are NaN in a region that it would visit."""
    return -0.5 * jnp.sum(x**2) + 0.0 * jnp.sqrt(1.5 - x[0])


def kernel_of(name: str, logdensity_fn):
    for_mala, for_hmc = STEPS[logdensity_fn]
    return MALA(step_size=for_mala) if name == "MALA" else HMC(step_size=for_hmc, num_integration_steps=3)


# Every solver runs on every target with one of the kernels, and Newton's method also with the other one: compiling
# takes most of the time.
CASES = [
    ("MALA", gaussian, SOLVERS),
    ("HMC", gaussian, ["deer"]),
    ("MALA", skewed, ["deer"]),
    ("HMC", skewed, SOLVERS),
    ("MALA", banana, SOLVERS),
    ("HMC", banana, ["deer"]),
    ("MALA", logistic, ["deer"]),
    ("HMC", logistic, SOLVERS),
    ("MALA", eight_schools, SOLVERS),
    ("HMC", eight_schools, ["deer"]),
]
QUICK = [("HMC", gaussian), ("MALA", banana)]
PARAMETERS = [
    pytest.param(*case, id=f"{case[0]}-{case[1].__name__}", marks=() if case[:2] in QUICK else pytest.mark.slow)
    for case in CASES
]


@pytest.mark.parametrize(("name", "logdensity_fn", "solvers"), PARAMETERS)
def test_equals_sequential(name: str, logdensity_fn, solvers) -> None:
    target, kernel = make_target(logdensity_fn), kernel_of(name, logdensity_fn)
    x0 = jnp.full(target.dim, 0.3)
    noise = draw_noise(target, kernel, 1, LENGTH)
    exact = solve(target, kernel, Sequential(), x0, noise)
    assert 0 < int(jnp.sum(exact.aux.margin < 0)) < LENGTH
    scale = jnp.std(exact.value, axis=0)
    guess = x0[None] + 0.5 * jax.random.normal(jax.random.key(5), (LENGTH, target.dim))
    for solver_name in solvers:
        solution = solve(target, kernel, SOLVERS[solver_name], x0, noise, guess, scale)
        assert solution.result == RESULTS.successful, solver_name
        np.testing.assert_allclose(solution.value, exact.value, rtol=0, atol=1e-8, err_msg=solver_name)
        np.testing.assert_array_equal(solution.aux.margin > 0, exact.aux.margin > 0)
        residual = jnp.max(step_residuals(target, kernel, x0, solution.value, noise, scale))
        np.testing.assert_allclose(residual, solution.residual, rtol=0, atol=1e-13)
        assert solution.stats.num_iters <= LENGTH
        assert solution.stats.certified_steps == LENGTH


@pytest.mark.parametrize("seed", [0, pytest.param(1, marks=pytest.mark.slow)])
def test_undamped_newton_is_not_fooled(seed: int) -> None:
    """float32, 2,000 steps of the banana: whatever is reported as solved or certified satisfies the equation.

    Published code stops here on an increment that is small relative to |x|.
    """
    target, kernel = make_target(banana, jnp.float32), MALA(step_size=0.15)
    x0 = jnp.full(2, 0.3, jnp.float32)
    noise = draw_noise(target, kernel, seed, 2000)
    scale = jnp.asarray([1.0, 1.5], jnp.float32)
    tol = 32 * jnp.finfo(jnp.float32).eps
    unsolved = 0
    for max_iters in (0, 1, 3, 10, 40, 200):
        solution = solve(target, kernel, deer(max_iters=max_iters), x0, noise, None, scale)
        assert solution.value.dtype == jnp.float32
        residuals = step_residuals(target, kernel, x0, solution.value, noise, scale)
        certified = int(solution.stats.certified_steps)
        assert jnp.all(residuals[:certified] <= 2 * tol)
        if solution.result == RESULTS.successful:
            assert certified == 2000
        else:
            unsolved += 1
            assert certified < 2000 or solution.result == RESULTS.not_contracting
            assert certified >= min(max_iters, 2000) or solution.result == RESULTS.not_contracting
    assert unsolved >= 3


@register_dataclass
@dataclass(frozen=True)
class Frozen(JacobianStructure):
    """A correction that undoes every update: the increment is zero from the start."""

    def linearize(self, fn, x, inputs, iteration):
        return None

    def recur(self, a, r, steps):
        return -r


def test_no_increment_is_no_solution() -> None:
    """Iterates that do not move while the equation is not satisfied are stagnated."""
    target, kernel = make_target(gaussian), MALA(step_size=0.3)
    noise, guess = draw_noise(target, kernel, 0, LENGTH), jnp.full((LENGTH, 3), 5.0)
    solution = solve(target, kernel, Newton(Frozen(), max_iters=30), jnp.zeros(3), noise, guess, jnp.ones(3))
    assert solution.result == RESULTS.stagnated
    assert solution.residual > 0.1
    assert solution.stats.certified_steps == 0
    assert solution.stats.num_iters < 30


BAD = {"deer": deer(), "quasi_deer": quasi_deer(), "elk": elk(), "quasi_elk": quasi_elk()}
BAD |= {"windowed": Windowed(quasi_deer(), window=16), "shooting": MultipleShooting(num_blocks=4)}


@pytest.mark.parametrize("logdensity_fn", [half_line, with_hole])
@pytest.mark.parametrize("solver", BAD.values(), ids=BAD.keys())
def test_bad_regions_of_the_log_density(solver, logdensity_fn) -> None:
    """Proposals that are NaN or outside the support are rejected, also from a guess there."""
    target = Target.from_logdensity(logdensity_fn, jnp.full(2, 0.5))
    kernel, x0, scale = MALA(step_size=0.8), jnp.full(2, 0.5), jnp.ones(2)
    noise = draw_noise(target, kernel, 3, LENGTH)
    exact = solve(target, kernel, Sequential(), x0, noise)
    assert jnp.all(jnp.isfinite(exact.value))
    assert int(jnp.sum(~(exact.aux.margin > -jnp.inf))) > 0  # some are rejected for this reason
    for sign in (-1.0, 1.0):
        guess = sign * (2.0 + jax.random.uniform(jax.random.key(5), (LENGTH, 2)))
        inside = (sign > 0) == (logdensity_fn is half_line)
        assert bool(jnp.all(jnp.isfinite(jax.vmap(logdensity_fn)(guess)))) == inside
        solution = solve(target, kernel, solver, x0, noise, guess, scale)
        assert solution.result == RESULTS.successful
        assert solution.stats.certified_steps == LENGTH
        np.testing.assert_allclose(solution.value, exact.value, rtol=0, atol=1e-8)
        np.testing.assert_array_equal(solution.aux.margin > 0, exact.aux.margin > 0)
