"""ELK and quasi-ELK: equal to Newton where lambda is zero, stable where Newton explodes."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pmcmc import recurrence as rec
from pmcmc.recurrence import RESULTS, AdaptiveRegularization, FixedRegularization, LevenbergMarquardt
from pmcmc.recurrence.newton import trust_region
from pmcmc.recurrence.newton.trust_region import Filter, Smoother
from tests.helpers.recurrence_problems import coupled

SEQUENTIAL = rec.Sequential()


def solve(solver, fn, x0, inputs, **options):
    return jax.jit(lambda solver, x0, inputs: solver.solve(fn, x0, inputs, **options))(solver, x0, inputs)


@pytest.mark.parametrize("jacobian", [rec.Dense(), rec.Diagonal(), rec.BlockDiagonal()], ids=["dense", "diag", "block"])
@pytest.mark.parametrize(
    "rule", [Filter(), pytest.param(Smoother(), marks=pytest.mark.slow)], ids=["filter", "smoother"]
)
def test_without_regularization_it_is_newton_to_rounding(jacobian, rule, rng_key):
    fn, x0, inputs = coupled(rng_key, 9, dim=2, gain=1.5)
    newton = solve(rec.Newton(jacobian, num_iterates=6), fn, x0, inputs)
    elk = solve(
        LevenbergMarquardt(jacobian, regularization=FixedRegularization(0.0), step_rule=rule, num_iterates=6),
        fn,
        x0,
        inputs,
    )
    assert int(newton.stats.num_iters) == int(elk.stats.num_iters)
    np.testing.assert_allclose(elk.iterates, newton.iterates, rtol=1e-12, atol=1e-13)


def cubic(x, u):
    """Contracts where the path runs (|x| < 1), with |df/dx| = 1.5 at x = 4 and escape to infinity beyond 6.2."""
    return 0.9 * x - 0.05 * x**3 + u


@pytest.mark.parametrize(
    ("make", "dtype"),
    [  # the state is one number, for which quasi-ELK is ELK
        pytest.param(rec.elk, jnp.float64, marks=pytest.mark.slow),
        pytest.param(rec.quasi_elk, jnp.float32, marks=pytest.mark.slow),
        (rec.quasi_elk, jnp.float64),
    ],
)
def test_unstable_transient(make, dtype):
    """Linearised along the guess the products of A overflow: DEER explodes, the trust region does not."""
    length = 300  # products of the linearisation reach 1.5^300 = 10^53, and f cubes them
    inputs = (0.5 * jnp.sin(jnp.arange(float(length))))[:, None].astype(dtype)
    x0, guess = jnp.zeros(1, dtype), jnp.full((length, 1), 4.0, dtype)
    exact = solve(SEQUENTIAL, cubic, x0, inputs).value
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
    solver = rec.quasi_elk(regularization=FixedRegularization(0.1))
    found = solve(solver, cubic, jnp.zeros(1), inputs, initial_guess=jnp.full((300, 1), 4.0))
    assert int(found.result) == RESULTS.successful
    assert int(found.stats.num_iters) < 120


@pytest.mark.parametrize("dtype", [jnp.float16, jnp.bfloat16])
@pytest.mark.parametrize("rule", [Filter(), Smoother()], ids=["filter", "smoother"])
def test_half_precision(rule, dtype):
    """LAPACK has none: covariances are computed in float32."""
    fn = lambda x, u: (0.5 * jnp.tanh(x[::-1]) + u).astype(dtype)
    found = solve(rec.elk(step_rule=rule, tol=1e-3), fn, jnp.zeros(2, dtype), jnp.ones((64, 2), dtype))
    assert int(found.result) == RESULTS.successful
    assert found.value.dtype == dtype


@pytest.mark.slow
def test_float32_steps_agree_with_float64(rng_key):
    run = jax.jit(lambda solver, w, x0, inputs: solver.solve(lambda x, u: jnp.tanh(w @ x + u), x0, inputs).iterates[1])
    keys = jax.random.split(rng_key, 3)
    double = [jax.random.normal(key, shape) for key, shape in zip(keys, [(3, 3), (3,), (33, 3)], strict=True)]
    single = [x.astype(jnp.float32) for x in double]
    for strength in (3.5e-4, 1.0, 1e6):
        solver = rec.elk(regularization=FixedRegularization(strength), num_iterates=2, max_iters=1)
        np.testing.assert_allclose(run(solver, *single), run(solver, *double), rtol=1e-3, atol=1e-3)


def trial(before, after, predicted, lost_after=0):
    return trust_region.Trial(*map(jnp.array, (before, after, predicted, 0, lost_after)))


def test_adaptive_strength_follows_the_model():
    rule = AdaptiveRegularization(history=2)

    def update(*args, memory=rule.begin(jnp.float64)):  # noqa: B008
        accepted, memory, retry = rule.update(memory, trial(*args))
        return bool(accepted), float(memory.strength), bool(retry), memory

    assert update(1.0, 0.1, 0.1)[:3] == (True, 0.1, True)  # as predicted: relax
    assert update(1.0, 0.7, 0.1)[:3] == (True, 1.0, True)  # rho 0.51: keep
    assert update(1.0, 0.95, 0.1)[:3] == (True, 4.0, True)  # hardly better: accept and tighten
    assert update(1.0, 2.0, 0.1)[:3] == (False, 4.0, True)  # worse: reject and tighten
    assert update(1.0, 0.1, 0.1, 1)[:3] == (False, 4.0, True)  # lost a step to NaN: reject
    largest = rule.begin(jnp.float64)._replace(strength=jnp.array(1e8))
    assert update(1.0, 2.0, 0.1, memory=largest)[:3] == (False, 1e8, False)  # nothing left to try
    after_one = update(1.0, 0.5, 0.1)[3]
    assert update(0.5, 0.7, 0.1, memory=after_one)[0]  # worse than the last, better than the one before
    assert not update(0.5, 1.1, 0.1, memory=after_one)[0]
    after_two = update(0.5, 0.4, 0.1, memory=after_one)[3]
    assert not update(0.4, 0.7, 0.1, memory=after_two)[0]  # forgotten
    with pytest.raises(ValueError, match="history"):
        AdaptiveRegularization(history=0)


@pytest.mark.parametrize("history", [1, 3])
def test_merit_stays_below_those_before(history, rng_key):
    """After the prefix, whose extension may raise it: below the largest of the last ``history`` iterates."""
    fn, x0, inputs = coupled(rng_key, 13, gain=1.5)
    rule = AdaptiveRegularization(history=history)
    found = solve(rec.elk(regularization=rule, num_iterates=14), fn, x0, inputs)
    previous = jnp.concatenate([jnp.broadcast_to(x0, (14, 1, 4)), found.iterates[:, :-1]], axis=1)
    images = jax.vmap(lambda path: jax.vmap(fn)(path, inputs))(previous)
    merit = np.asarray(jnp.sum((images - found.iterates) ** 2, axis=(1, 2)))
    for k in range(1, 14):
        assert merit[k] <= max(merit[max(0, k - history) : k]) * (1 + 1e-12) + 1e-25


# --- the exact prefix


def wells(length):
    """Two wells, a path in one of them, a guess in the other: phi must rise before it falls."""
    inputs = 0.3 * jax.random.normal(jax.random.key(1), (length, 1))
    return lambda x, u: jnp.tanh(2 * x + u), jnp.full((1,), 0.5), inputs, jnp.full((length, 1), -1.0)


@pytest.mark.parametrize(
    "regularization",
    [AdaptiveRegularization(), AdaptiveRegularization(history=1, smallest=1e6)],
    ids=["default", "monotone"],
)
@pytest.mark.parametrize("rule", [Filter(), Smoother()], ids=["filter", "smoother"])
def test_exact_prefix_grows_by_a_step_an_iteration(regularization, rule):
    """With any strength, also where steps are rejected: after k iterations k states are exact, after T all."""
    fn, x0, inputs, guess = wells(60)
    solver = rec.quasi_elk(regularization=regularization, step_rule=rule, num_iterates=61, max_iters=60)
    found = solve(solver, fn, x0, inputs, initial_guess=guess)
    exact = np.asarray(solve(SEQUENTIAL, fn, x0, inputs).value)
    iterates = np.asarray(found.iterates)
    for k in range(1, 61):
        np.testing.assert_allclose(iterates[k, :k], exact[:k], atol=1e-12)
    assert int(found.result) == RESULTS.successful


@pytest.mark.slow
@pytest.mark.parametrize("make", [rec.elk, rec.quasi_elk])
def test_default_solves_what_a_monotone_rule_does_not(make):
    """Folds and flips: the logistic map from a bad guess, two wells, and jumps of the recurrence itself."""
    logistic = lambda x, u: 2.8 * x * (1 - x)
    for seed in (0, 1):
        guess = jax.random.uniform(jax.random.key(seed), (200,))
        found = solve(make(), logistic, 0.3, None, length=200, initial_guess=guess)
        assert int(found.result) == RESULTS.successful
        assert int(found.stats.num_iters) < 60
    fn, x0, inputs, guess = wells(100)
    found = solve(make(), fn, x0, inputs, initial_guess=guess)
    assert int(found.result) == RESULTS.successful
    jumps = lambda x, u: 0.7 * x + u + jnp.where(x > 0.5, -1.0, 0.3)
    inputs = jax.random.normal(jax.random.key(2), (200, 1))
    found = solve(make(), jumps, jnp.zeros(1), inputs)
    assert int(found.result) == RESULTS.successful
    np.testing.assert_allclose(found.value, solve(SEQUENTIAL, jumps, jnp.zeros(1), inputs).value, atol=1e-11)


def test_a_region_too_small_to_move_stagnates(rng_key):
    fn, x0, inputs = coupled(rng_key, 20)
    found = solve(rec.elk(regularization=FixedRegularization(1e30)), fn, x0, inputs)
    assert int(found.result) == RESULTS.stagnated
    assert int(found.stats.num_iters) < 5
    assert float(found.residual) > 1e-3
    assert int(found.stats.certified_steps) == 0
