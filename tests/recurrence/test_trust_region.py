"""ELK and quasi-ELK: Newton where lambda is zero, stable where Newton explodes."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pmcmc import recurrence as rec
from pmcmc.recurrence import RESULTS, AdaptiveRegularization, Filter, FixedRegularization, LevenbergMarquardt, Smoother
from tests.recurrence.problems import coupled

SEQUENTIAL = rec.Sequential()


def solve(solver, fn, x0, inputs, **options):
    return jax.jit(lambda solver, x0, inputs: solver.solve(fn, x0, inputs, **options))(solver, x0, inputs)


@pytest.mark.parametrize("jacobian", [rec.Dense(), rec.Diagonal(), rec.BlockDiagonal()], ids=["dense", "diag", "block"])
@pytest.mark.parametrize("rule", [Filter(), Smoother()], ids=["filter", "smoother"])
def test_without_regularization_it_is_newton_to_rounding(jacobian, rule, rng_key):
    fn, x0, inputs = coupled(rng_key, 9, dim=2, gain=1.5)
    newton = solve(rec.Newton(jacobian, num_iterates=6), fn, x0, inputs)
    elk = solve(LevenbergMarquardt(jacobian, FixedRegularization(0.0), rule, num_iterates=6), fn, x0, inputs)
    assert int(newton.stats.num_iters) == int(elk.stats.num_iters)
    np.testing.assert_allclose(elk.iterates, newton.iterates, rtol=1e-12, atol=1e-13)


def cubic(x, u):
    """Contracting where the path runs (|x| < 1), with |df/dx| = 1.5 at x = 4 and escape to infinity beyond 6.2."""
    return 0.9 * x - 0.05 * x**3 + u


@pytest.mark.parametrize(
    ("make", "dtype"), [(rec.elk, jnp.float64), (rec.quasi_elk, jnp.float32), (rec.quasi_elk, jnp.float64)]
)
def test_unstable_transient(make, dtype):
    """Linearised along the guess the products of A overflow: DEER explodes, the trust region does not."""
    length = 300  # products of the linearisation reach 1.5^300 = 10^53, and f cubes them
    inputs = (0.5 * jnp.sin(jnp.arange(float(length))))[:, None].astype(dtype)
    x0, guess = jnp.zeros(1, dtype), jnp.full((length, 1), 4.0, dtype)
    exact = SEQUENTIAL.solve(cubic, x0, inputs).value
    newton = solve(rec.deer(num_iterates=8, max_iters=7), cubic, x0, inputs, initial_guess=guess)
    found = solve(make(num_iterates=40), cubic, x0, inputs, initial_guess=guess)
    assert int(newton.result) != RESULTS.successful
    assert float(jnp.max(jnp.abs(newton.iterates[1]))) > 1e30
    assert int(found.result) == RESULTS.successful
    assert int(found.stats.num_iters) < 20
    assert float(jnp.max(jnp.abs(found.iterates))) < 10
    np.testing.assert_allclose(found.value, exact, atol=2e-5 if dtype == jnp.float32 else 1e-11)
    print(make.__name__, dtype.__name__, int(found.stats.num_iters), float(jnp.max(jnp.abs(newton.iterates[1]))))


def test_published_form_converges_where_newton_explodes():
    inputs = (0.5 * jnp.sin(jnp.arange(300.0)))[:, None]
    solver = rec.quasi_elk(regularization=FixedRegularization(0.1), step_rule=Filter())
    found = solve(solver, cubic, jnp.zeros(1), inputs, initial_guess=jnp.full((300, 1), 4.0))
    assert int(found.result) == RESULTS.successful
    assert int(found.stats.num_iters) < 120


def test_float32_steps_agree_with_float64(rng_key):
    run = jax.jit(lambda solver, w, x0, inputs: solver.solve(lambda x, u: jnp.tanh(w @ x + u), x0, inputs).iterates[1])
    keys = jax.random.split(rng_key, 3)
    double = [jax.random.normal(key, shape) for key, shape in zip(keys, [(3, 3), (3,), (33, 3)], strict=True)]
    single = [x.astype(jnp.float32) for x in double]
    for strength in (3.5e-4, 1.0, 1e6):
        solver = rec.elk(regularization=FixedRegularization(strength), num_iterates=2, max_iters=1)
        np.testing.assert_allclose(run(solver, *single), run(solver, *double), rtol=1e-3, atol=1e-3)


def test_adaptive_strength_follows_the_model():
    rule = AdaptiveRegularization()
    none = jnp.zeros((), int)

    def update(after, predicted, lost_after=none):
        trial = rec._trust_region.Trial(jnp.array(1.0), jnp.array(after), jnp.array(predicted), none, lost_after)
        accepted, memory, retry = rule.update(jnp.array(1.0), trial)
        return bool(accepted), float(memory), bool(retry)

    assert update(0.1, 0.1) == (True, 0.1, True)  # as predicted: relax
    assert update(0.7, 0.1) == (True, 1.0, True)  # rho 0.51: keep
    assert update(0.95, 0.1) == (True, 4.0, True)  # hardly better: accept and tighten
    assert update(2.0, 0.1) == (False, 4.0, True)  # worse: reject and tighten
    assert update(0.1, 0.1, none + 1) == (False, 4.0, True)  # lost a step to NaN: reject
    assert not rule.update(jnp.array(1e8), rec._trust_region.Trial(*map(jnp.array, (1.0, 2.0, 0.1, 0, 0))))[2]


def test_merit_never_rises_with_adaptive_strength(rng_key):
    fn, x0, inputs = coupled(rng_key, 13, gain=3.0)
    found = solve(rec.elk(num_iterates=40), fn, x0, inputs)
    previous = jnp.concatenate([jnp.broadcast_to(x0, (40, 1, 4)), found.iterates[:, :-1]], axis=1)
    images = jax.vmap(lambda path: jax.vmap(fn)(path, inputs))(previous)
    merit = jnp.sum((images - found.iterates) ** 2, axis=(1, 2))
    assert np.all(merit[1:] <= merit[:-1] * (1 + 1e-12) + 1e-25)
