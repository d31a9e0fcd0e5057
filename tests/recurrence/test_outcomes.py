"""Every RESULTS code is reached, and bad input is never reported as solved."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pmcmc import recurrence as rec
from pmcmc.recurrence import RESULTS
from pmcmc.recurrence.newton.equations import times
from tests.helpers.recurrence_problems import Variant, solve_variant, transient

SEQUENTIAL = rec.Sequential()
SOLVERS = {
    "deer": rec.deer(),
    "quasi-elk": rec.quasi_elk(),
    "windowed": rec.Windowed(rec.quasi_deer(), window=16),
}
SHOOTING = {"shooting": rec.MultipleShooting(num_blocks=4)}
with_shooting = pytest.mark.parametrize("solver", (SOLVERS | SHOOTING).values(), ids=(SOLVERS | SHOOTING).keys())
some_solvers = pytest.mark.parametrize("solver", SOLVERS.values(), ids=SOLVERS.keys())


def solve(solver, fn, x0, inputs=None, **options):
    return jax.jit(lambda solver, x0, inputs: solver.solve(fn, x0, inputs, **options))(solver, x0, inputs)


def test_nan_behind_step_4096_is_not_converged():
    """On CPU jnp.max drops NaN for n >= 4,096."""
    inputs = jnp.zeros(6000).at[5000].set(1.0)
    fn = lambda x, u: jnp.where(u > 0, jnp.nan, 0.5 * jnp.cos(x))
    for solver in (rec.deer(), rec.jacobi(), rec.quasi_elk()):
        found = solve(solver, fn, 0.0, inputs)
        assert int(found.result) == RESULTS.nonfinite
        assert int(found.stats.certified_steps) == 5000
        assert np.isinf(found.residual)
        assert np.isfinite(found.value[:5000]).all()
        assert np.isnan(found.value[5000:]).all()


@some_solvers
def test_nan_region(solver, rng_key):
    variant = Variant.draw(rng_key, 40, limit=1.5)
    first = int(jnp.argmax(variant.inputs[:, 0] > 1.5))
    found = solve_variant(solver, variant)
    assert int(found.result) == RESULTS.nonfinite
    assert int(found.stats.certified_steps) == first
    assert int(solve_variant(SEQUENTIAL, variant).stats.certified_steps) == first


@some_solvers
def test_nan_start(solver, rng_key):
    variant = Variant.draw(rng_key, 40)
    for value in (jnp.nan, jnp.inf):
        found = solve_variant(solver, variant._replace(x0=variant.x0.at[1].set(value)))
        assert int(found.result) == RESULTS.nonfinite
        assert int(found.stats.certified_steps) == 0
        assert int(found.stats.num_iters) == 0


@some_solvers
def test_nan_row_in_the_guess_costs_little(solver, rng_key):
    variant = Variant.draw(rng_key, 40)
    exact = solve_variant(SEQUENTIAL, variant).value
    clean = solve_variant(solver, variant, jnp.zeros_like(exact))
    dirty = solve_variant(solver, variant, jnp.zeros_like(exact).at[5].set(jnp.nan))
    assert int(dirty.result) == RESULTS.successful
    assert int(dirty.stats.num_iters) <= int(clean.stats.num_iters) + 3
    np.testing.assert_allclose(dirty.value, exact, atol=1e-11)


@some_solvers
@pytest.mark.parametrize("max_iters", [0, 3])
def test_budget_ends(solver, max_iters, rng_key):
    variant = Variant.draw(rng_key, 40, gain=1.5)
    found = solve_variant(type(solver)(**{**vars(solver), **_budget(solver, max_iters)}), variant)
    assert int(found.result) == RESULTS.max_iters_reached
    assert int(found.stats.num_iters) == max_iters
    prefix = int(found.stats.certified_steps)
    assert prefix < 40
    profile = found.residual_profile
    assert profile.shape == (40,)
    assert np.all(profile[:prefix] < 1e-12)
    assert profile[prefix] > 1e-13
    assert found.residual == jnp.max(profile)
    np.testing.assert_allclose(found.value[:prefix], solve_variant(SEQUENTIAL, variant).value[:prefix], atol=1e-11)


def _budget(solver, max_iters):
    if isinstance(solver, rec.Windowed):
        return {"solver": rec.quasi_deer(max_iters=max_iters)}
    return {"max_iters": max_iters}


def test_a_path_that_must_switch_wells():
    """The merit is flat to rounding far from the solution: a trust region gets there step by step."""
    fn, x0, inputs = transient(200, 60, 100)
    for solver in (rec.deer(), rec.quasi_elk()):  # the state is one number: quasi-ELK is ELK
        found = solve(solver, fn, x0, inputs)
        assert int(found.result) == RESULTS.successful
        assert int(found.stats.num_iters) < 100


def test_pseudo_orbit_is_not_called_solved():
    """A chaotic path that satisfies the equation only to 1e-9 is not a reliable solution."""
    fn = lambda x, u: 4.0 * x * (1 - x)
    orbit = solve(SEQUENTIAL, fn, 0.3, length=60).value
    found = solve(rec.deer(tol=1e-6), fn, 0.3, length=60, initial_guess=orbit + 1e-10)
    assert int(found.result) == RESULTS.not_contracting
    np.testing.assert_allclose(found.stats.growth_rate, np.log(2), rtol=0.2)
    exact = solve(rec.deer(), fn, 0.3, length=60)
    assert int(exact.result) == RESULTS.successful  # exact: residual 0 everywhere
    assert float(exact.residual) == 0
    np.testing.assert_array_equal(exact.value, orbit)


@with_shooting
@pytest.mark.parametrize("tol", [0.0, 1e-14])
def test_a_tolerance_below_rounding(solver, tol):
    """What agrees to rounding is satisfied, and its errors shrink."""
    inputs = jax.random.normal(jax.random.key(0), (300,), jnp.float32)
    fn, x0 = lambda x, u: 0.5 * x + u, jnp.float32(0)
    windowed = isinstance(solver, rec.Windowed)
    solver = replace(solver, solver=rec.quasi_deer(tol=tol)) if windowed else replace(solver, tol=tol)
    found = solve(solver, fn, x0, inputs)
    assert int(found.result) == RESULTS.successful
    np.testing.assert_allclose(found.value, solve(SEQUENTIAL, fn, x0, inputs).value, atol=1e-5)


def test_count_of_evaluations_does_not_overflow():
    """50,000 iterations on as many steps are more than 32 bits hold."""
    assert int(times(jnp.int32(3), 100)) == 300
    assert 2**31 - 50_000 <= int(times(jnp.int32(50_001), 50_000)) < 2**31


@some_solvers
def test_pseudo_orbit_of_a_difference(solver):
    """The Jacobian of a map of x[0] - x[1] maps (1, 1) to zero, the direction from which growth was once measured."""

    def fn(x, u):
        d = x[0] - x[1]
        return jnp.stack([4 * d * (1 - d), 0 * d])

    x0 = jnp.array([0.3, 0], jnp.float32)
    near = solve(SEQUENTIAL, fn, x0 + jnp.array([3e-7, 0], jnp.float32), length=64).value
    exact = solve(SEQUENTIAL, fn, x0, length=64).value
    assert np.max(np.abs(near - exact)) > 0.5
    found = solve(solver, fn, x0, length=64, initial_guess=near, scale=jnp.ones(2, jnp.float32))
    assert int(found.result) == RESULTS.not_contracting
    certified = int(found.stats.certified_steps)
    np.testing.assert_allclose(found.value[:certified], exact[:certified], atol=1e-4)


@some_solvers
def test_pseudo_orbit_beside_coordinates_that_contract(solver):
    """One of eight coordinates grows, by 2 in 64 steps: less than the share of a random direction that is lost."""
    moves = jnp.arange(64 * 30) % 64 == 0
    fn = lambda x, u: jnp.concatenate([jnp.where(u, 4 * x[:1] * (1 - x[:1]), x[:1]), 0.5 * x[1:] + 0.3])
    x0 = jnp.full(8, 0.3, jnp.float32)
    near, exact = (solve(SEQUENTIAL, fn, x0.at[0].add(error), moves).value for error in (3e-7, 0))
    assert np.max(np.abs(near - exact)) > 0.5
    found = solve(solver, fn, x0, moves, initial_guess=near, scale=jnp.ones(8, jnp.float32))
    assert int(found.result) == RESULTS.not_contracting
    certified = int(found.stats.certified_steps)
    np.testing.assert_allclose(found.value[:certified], exact[:certified], atol=1e-4)


@pytest.mark.parametrize("name", ["deer", "jacobi", "windowed", "shooting"])
def test_a_path_that_stands_still_is_not_called_solved(name):
    """Equal images have no spread, and relative to 300 a step of 1e-3 looks like none."""
    solver = (SOLVERS | SHOOTING | {"jacobi": rec.jacobi()})[name]
    fn, x0 = lambda x, u: x - 1e-3 * (x - 299.0), jnp.float32(300)
    exact, found = (solve(each, fn, x0, length=500) for each in (SEQUENTIAL, solver))
    assert found.value.dtype == jnp.float32
    certified = int(found.stats.certified_steps)
    np.testing.assert_allclose(found.value[:certified], exact.value[:certified], atol=5e-3)
    expected = RESULTS.max_iters_reached if name == "jacobi" else RESULTS.successful  # 200 iterations reach 200 steps
    assert int(found.result) == expected


@pytest.mark.parametrize("solver", [rec.deer(), rec.quasi_elk()], ids=["deer", "quasi-elk"])
def test_a_coordinate_that_is_mostly_zero(solver):
    """Its quartiles are zero, and so was its scale: it had to be equal to the last bit."""

    def fn(x, u):
        a = 0.5 * jnp.tanh(x[0]) + u
        return jnp.stack([a, jnp.where(u > 2, 0.7 * a, 0.0)])

    inputs = jax.random.normal(jax.random.key(0), (300,), jnp.float32)
    found = solve(solver, fn, jnp.zeros(2, jnp.float32), inputs)
    alone = solve(solver, lambda x, u: 0.5 * jnp.tanh(x) + u, jnp.float32(0), inputs)
    assert int(found.result) == RESULTS.successful
    assert int(found.stats.num_iters) <= int(alone.stats.num_iters)
    np.testing.assert_allclose(found.value[:, 0], alone.value, atol=1e-5)


@with_shooting
@pytest.mark.parametrize(("shift", "size"), [(1e5, 1.0), (0.0, 1e-6)], ids=["shifted", "scaled"])
def test_shift_and_scale_do_not_matter(solver, shift, size, rng_key):
    variant = Variant.draw(rng_key, 40)
    plain = solve_variant(solver, variant)
    moved = solve_variant(solver, variant._replace(shift=shift, size=size))
    assert int(moved.result) == RESULTS.successful
    assert abs(int(moved.stats.num_iters) - int(plain.stats.num_iters)) <= max(3, int(plain.stats.num_iters) // 2)
    np.testing.assert_allclose((moved.value - shift) / size, plain.value, atol=1e-9)


@with_shooting
def test_shift_in_float32(solver, rng_key):
    single = jax.tree.map(lambda x: jnp.asarray(x, jnp.float32), Variant.draw(rng_key, 40, shift=1e4))
    found = solve_variant(solver, single)
    assert found.value.dtype == jnp.float32
    assert int(found.result) == RESULTS.successful
    np.testing.assert_allclose(found.value, solve_variant(SEQUENTIAL, single).value, atol=8e-3)
    # With a tolerance relative to |x| the first iterate would count as converged.
    assert int(found.stats.num_iters + found.stats.num_sweeps) > 0


@pytest.mark.slow
def test_raw_and_typed_keys_as_inputs():
    fn = lambda x, key: 0.5 * x + jax.random.normal(key)
    typed = jax.random.split(jax.random.key(3), 12)
    raw = jax.random.key_data(typed)
    for solver in (rec.deer(), rec.quasi_elk(), *SHOOTING.values()):
        found = [solve(solver, fn, 0.0, keys).value for keys in (typed, raw)]
        np.testing.assert_array_equal(*found)


@pytest.mark.slow
def test_default_arguments():
    for solver in (rec.Newton(), rec.LevenbergMarquardt(), rec.Windowed(rec.Newton()), rec.MultipleShooting()):
        assert int(solver.solve(lambda x, u: 0.5 * x + 1, 0.0, length=5).result) == RESULTS.successful


@pytest.mark.parametrize("kind", [int, np.int64])
def test_numbers_below_the_least_are_refused(kind) -> None:
    """Python's integers and numpy's; arrays, whose values may be unknown, pass."""
    zero, less = kind(0), kind(-1)
    for make in (
        lambda: rec.MultipleShooting(max_sweeps=zero),
        lambda: rec.MultipleShooting(max_steps=zero),
        lambda: rec.deer(max_iters=less),
    ):
        with pytest.raises(ValueError, match="must be at least"):
            make()
    assert rec.MultipleShooting(max_sweeps=jnp.asarray(0)).max_sweeps == 0
    for make in (lambda: rec.MultipleShooting(max_sweeps=1.5), lambda: rec.deer(max_iters=True)):
        with pytest.raises(TypeError, match="must be an integer"):
            make()


def _declared_flat(x):
    """x, whose declared derivative is 0."""
    return x


declared_flat = jax.custom_jvp(_declared_flat)
declared_flat.defjvp(lambda x, t: (x[0], 0 * t[0]))


@some_solvers
@pytest.mark.parametrize("hidden", [jax.lax.stop_gradient, declared_flat], ids=["stop_gradient", "custom_jvp"])
@pytest.mark.parametrize("dtype", ["float64", "float32"])
def test_pseudo_orbit_of_a_map_whose_derivative_is_declared(solver, hidden, dtype):
    """Tangents say that the map forgets its state."""
    fn = lambda x, u: 4 * hidden(x) * (1 - hidden(x))
    x0, error = jnp.asarray(0.3, dtype), 3e-14 if dtype == "float64" else 3e-7
    near, exact = (solve(SEQUENTIAL, fn, x0 + e, length=100).value for e in (error, 0))
    assert np.max(np.abs(near - exact)) > 0.5
    found = solve(solver, fn, x0, length=100, initial_guess=near, scale=1.0)
    assert int(found.result) == RESULTS.not_contracting
    np.testing.assert_allclose(found.stats.growth_rate, np.log(2), rtol=0.3)
    certified = int(found.stats.certified_steps)
    np.testing.assert_allclose(found.value[:certified], exact[:certified], atol=1e-4)
    # The prefix of a solve that fails.
    wrong_later = near.at[60:].set(0.5)
    budget = {"solver": rec.quasi_deer(max_iters=0)} if isinstance(solver, rec.Windowed) else {"max_iters": 0}
    found = solve(replace(solver, **budget), fn, x0, length=100, initial_guess=wrong_later, scale=1.0)
    certified = int(found.stats.certified_steps)
    np.testing.assert_allclose(found.value[:certified], exact[:certified], atol=1e-4)


@pytest.mark.parametrize("dtype", ["float64", "float32"])
def test_decisions_next_to_the_path_are_no_growth(dtype):
    """Some of 20,000 accept decisions fall otherwise within the reach of the finite differences."""

    def fn(x, u):
        proposed = 0.9 * x + 0.4 * u[:2]
        return jnp.where(u[2] < jnp.sum(jnp.cos(x)), proposed, x)

    inputs = jax.random.normal(jax.random.key(0), (20_000, 3), dtype)
    found = solve(rec.deer(), fn, jnp.zeros(2, dtype), inputs)
    assert int(found.result) == RESULTS.successful
    assert -0.1 < found.stats.growth_rate < -0.03


@pytest.mark.parametrize("shift", [0.0, 1e3])
def test_a_sum_does_not_separate(shift):
    """Distances stay as they are, and differences of float32 numbers have noise."""
    inputs = jax.random.normal(jax.random.key(0), (4000, 20), jnp.float32)
    found = solve(rec.picard(), lambda x, u: x + u, jnp.full(20, shift, jnp.float32), inputs)
    assert int(found.result) == RESULTS.successful
