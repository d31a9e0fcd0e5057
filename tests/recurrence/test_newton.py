"""Newton's options, how its iterations converge, and which result codes it gives where they cannot."""

from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pmcmc import recurrence as rec
from pmcmc._pytree import register_dataclass
from pmcmc.recurrence import RESULTS, Newton
from tests.helpers.recurrence_problems import coupled, gru, gru_step, henon, lorenz

SEQUENTIAL = rec.Sequential()


def solve(solver, fn, x0, inputs=None, **options):
    return jax.jit(lambda solver, x0, inputs: solver.solve(fn, x0, inputs, **options))(solver, x0, inputs)


@register_dataclass
@dataclass(frozen=True)
class Wide(rec.JacobianStructure):
    """0.1 times the identity, in float64 whatever the state."""

    def linearize(self, fn, x, inputs, iteration):
        return jnp.full(x.shape, 0.1, float)

    def recur(self, a, r, steps):
        return rec.Diagonal().recur(a, r, steps).astype(float)


# --- rates


def linear(matrix):
    return lambda x, u: matrix @ x + u


@jax.jit
def last_iterates(solver, matrix, inputs):
    return solver.solve(linear(matrix), jnp.zeros(2), inputs, scale=1.0).iterates[:, -1]


def measured_rate(solver, matrix, length=200):
    """Return the ratio of successive errors at the last step, where the slowest mode, constant in t, dominates."""
    exact = jnp.linalg.solve(jnp.eye(2) - matrix, jnp.ones(2))  # the steady state, which is reached long before
    iterates = last_iterates(solver, matrix, jnp.ones((length, 2)))
    errors = jnp.linalg.norm(iterates - exact[None], axis=1)
    return errors[12] / errors[11]


@pytest.mark.parametrize(
    ("solver", "theory"),
    [
        # x = a x + c swap(x) + 1 with a = 0.5, c = 0.2: slowest mode (1, 1), J = a + c there, A = its approximation.
        # Theory for a constant mode: |J - A| / |1 - A|.
        (rec.jacobi(num_iterates=13), 0.7),
        (rec.quasi_deer(num_iterates=13), 0.2 / 0.5),
        (rec.deer(damping=0.5, num_iterates=13), 0.35 / 0.65),
        (rec.deer(clip=0.1, num_iterates=13), 0.5 / 0.8),
    ],
    ids=["jacobi", "quasi-deer", "damped", "clipped"],
)
def test_linear_rate_is_that_of_the_approximation_error(solver, theory):
    matrix = jnp.array([[0.5, 0.2], [0.2, 0.5]])
    np.testing.assert_allclose(measured_rate(solver, matrix), theory, rtol=1e-3)


@pytest.mark.slow
@pytest.mark.parametrize("strength", [0.05, 1.0])
def test_linear_rate_of_a_fixed_trust_region(strength):
    """With steady gain G = 1 / (1 + lambda P-) and exact A = a, a constant error shrinks by (1 - G) / (1 - G a)."""
    solver = rec.elk(
        regularization=rec.FixedRegularization(strength), step_rule=rec.trust_region.Filter(), num_iterates=13
    )
    a, predicted = 0.7, 1.0
    for _ in range(200):
        predicted = a * a * predicted / (1 + strength * predicted) + 1
    gain = 1 / (1 + strength * predicted)
    rate = measured_rate(solver, a * jnp.eye(2))
    np.testing.assert_allclose(rate, (1 - gain) / (1 - gain * a), rtol=1e-3)


def test_newton_is_quadratic(rng_key):
    fn, x0, inputs = coupled(rng_key, 200, gain=0.9)
    exact = solve(SEQUENTIAL, fn, x0, inputs).value
    guess = exact + 0.05 * jax.random.normal(rng_key, exact.shape)
    iterates = solve(rec.deer(num_iterates=4), fn, x0, inputs, initial_guess=guess).iterates
    errors = jnp.max(jnp.abs(iterates - exact[None]), axis=(1, 2))
    orders = jnp.log(errors[2:] / errors[1:-1]) / jnp.log(errors[1:-1] / errors[:-2])
    assert float(errors[3]) > 1e-14  # above rounding, so that the order can be measured
    assert np.all((orders > 1.7) & (orders < 2.5)), (errors, orders)


def test_prefix_grows_by_one_an_iteration_at_least(rng_key):
    fn, x0, inputs = coupled(rng_key, 30, gain=3.0)
    exact = np.asarray(solve(SEQUENTIAL, fn, x0, inputs).value)
    for jacobian in (rec.Dense(), rec.Zero(), rec.Identity(), rec.HutchinsonDiagonal(rng_key)):
        found = solve(Newton(jacobian, num_iterates=12), fn, x0, inputs)
        iterates = np.asarray(found.iterates)  # numpy, so that no slice is compiled
        for k in range(1, 12):
            np.testing.assert_allclose(iterates[k, :k], exact[:k], atol=1e-12)
        assert int(found.result) == RESULTS.successful or int(found.stats.certified_steps) >= 30


# --- options


def test_hutchinson_is_unbiased_and_fresh_or_fixed(rng_key):
    matrix = jax.random.normal(rng_key, (4, 4))
    x = jnp.zeros((4000, 4))
    fn = lambda x, u: matrix @ x
    estimate = rec.HutchinsonDiagonal(rng_key).linearize(fn, x, None, 0)
    deviation = jnp.sqrt(jnp.sum(matrix**2, 1) - jnp.diag(matrix) ** 2)  # deviation of one probe, in theory
    assert np.all(jnp.abs(estimate.mean(0) - jnp.diag(matrix)) < 5 * deviation / jnp.sqrt(4000.0))
    np.testing.assert_allclose(estimate.std(0), deviation, rtol=0.1)
    four = rec.HutchinsonDiagonal(rng_key, num_probes=4).linearize(fn, x, None, 0)
    np.testing.assert_allclose(four.std(0), deviation / 2, rtol=0.1)
    assert np.any(estimate != rec.HutchinsonDiagonal(rng_key).linearize(fn, x, None, 1))
    fixed = rec.HutchinsonDiagonal(rng_key, fixed_probes=True)
    np.testing.assert_array_equal(fixed.linearize(fn, x, None, 0), fixed.linearize(fn, x, None, 1))


def test_blocks_are_the_blocks_of_the_jacobian(rng_key):
    matrix = jax.random.normal(rng_key, (6, 6))
    found = rec.BlockDiagonal().linearize(lambda x, u: matrix @ x, jnp.zeros((2, 6)), None, 0)[1]
    for p in range(2):
        for q in range(2):
            block = matrix[3 * p : 3 * p + 3, 3 * q : 3 * q + 3]
            np.testing.assert_allclose(found[p, q], jnp.diag(block))
    many = rec.HutchinsonBlockDiagonal(rng_key).linearize(lambda x, u: matrix @ x, jnp.zeros((4000, 6)), None, 0)
    np.testing.assert_allclose(many.mean(0), found, atol=0.2)
    with pytest.raises(ValueError, match="halves"):
        rec.BlockDiagonal().linearize(lambda x, u: x, jnp.zeros((2, 3)), None, 0)


@pytest.mark.slow
def test_blocks_solve_a_leapfrog_that_a_diagonal_cannot(rng_key):
    """Leapfrog on independent coordinates: the 2x2 blocks are the whole Jacobian, so it is Newton."""

    def leapfrog(x, u, h=0.1):
        q, p = jnp.split(x, 2)
        force = lambda q: -q - 0.3 * q**3
        p = p + h / 2 * force(q)
        q = q + h * p
        return jnp.concatenate([q, p + h / 2 * force(q)])

    x0 = jax.random.normal(rng_key, (6,))
    iters = {}
    for jacobian in (rec.Dense(), rec.BlockDiagonal(), rec.Diagonal()):
        found = solve(Newton(jacobian), leapfrog, x0, length=64)
        iters[type(jacobian).__name__] = int(found.stats.num_iters)
        assert int(found.stats.certified_steps) == 64 or int(found.result) == RESULTS.not_contracting
    assert iters["Dense"] == iters["BlockDiagonal"] <= 12
    assert iters["Diagonal"] > 3 * iters["Dense"]


@pytest.mark.parametrize("make", [rec.deer, rec.quasi_deer, rec.elk, rec.picard])
def test_a_basis_of_another_dtype(make):
    """The state keeps its own, as do a Jacobian and its recursion of a wider dtype."""
    basis = rec.LinearBasis.from_matrix(jnp.array([[2.0, 0.0], [0.5, 1.0]]))
    fn = lambda x, u: 0.5 * jnp.tanh(x[::-1]) + u
    inputs = jnp.ones((30, 2), jnp.float32)
    for solver in (make(basis=basis), rec.Newton(Wide())):
        found = solve(solver, fn, jnp.zeros(2, jnp.float32), inputs)
        assert int(found.result) == RESULTS.successful
        assert found.value.dtype == jnp.float32
    assert rec.LinearBasis.from_covariance(jnp.eye(2, dtype=jnp.float16)).matrix.dtype == jnp.float32


def test_basis_makes_a_diagonal_exact(rng_key):
    keys = jax.random.split(rng_key, 2)
    vectors = jax.random.normal(keys[0], (3, 3))
    matrix = vectors @ jnp.diag(jnp.array([0.9, 0.5, -0.4])) @ jnp.linalg.inv(vectors)
    x0, inputs = jnp.zeros(3), jax.random.normal(keys[1], (40, 3))
    plain = solve(rec.quasi_deer(), linear(matrix), x0, inputs)
    based = solve(rec.quasi_deer(basis=rec.LinearBasis.from_matrix(vectors)), linear(matrix), x0, inputs)
    assert int(based.stats.num_iters) <= 3 < int(plain.stats.num_iters)
    np.testing.assert_allclose(based.value, solve(SEQUENTIAL, linear(matrix), x0, inputs).value, atol=1e-11)
    covariance = matrix @ matrix.T + jnp.eye(3)
    for basis in (
        rec.LinearBasis.from_covariance(covariance),
        rec.LinearBasis.from_scale_tril(jnp.linalg.cholesky(covariance)),
        rec.ScaledBasis(jnp.arange(1.0, 4.0)),
    ):
        np.testing.assert_allclose(basis.decode(basis.encode(x0 + 1.0)), jnp.ones(3), atol=1e-12)


def test_iterates_do_not_change_the_result(rng_key):
    fn, x0, inputs = coupled(rng_key, 20)
    plain = solve(rec.deer(), fn, {"x": x0}["x"], inputs)
    kept = solve(rec.deer(num_iterates=30), fn, x0, inputs)
    np.testing.assert_allclose(plain.value, kept.value, rtol=0, atol=1e-13)
    assert plain.iterates is None
    num_iters = int(kept.stats.num_iters)
    np.testing.assert_array_equal(kept.iterates[0], jnp.broadcast_to(x0, (20, 4)))
    np.testing.assert_array_equal(kept.iterates[num_iters], kept.value)
    np.testing.assert_array_equal(kept.iterates[-1], kept.value)
    assert np.any(kept.iterates[num_iters - 1] != kept.value)


@pytest.mark.parametrize(
    ("make", "error", "match"),
    [
        (lambda: rec.deer(max_iters=-1), ValueError, "max_iters"),
        (lambda: rec.deer(num_iterates=-1), ValueError, "num_iterates"),
        (lambda: rec.picard(damping=0.5), ValueError, "Identity"),
        (lambda: rec.jacobi(clip=0.5), ValueError, "Zero"),
        (lambda: rec.HutchinsonDiagonal(jax.random.key(0), num_probes=0), ValueError, "num_probes"),
        (lambda: rec.LinearBasis.from_matrix(jnp.ones((2, 3))), ValueError, "square"),
        (lambda: rec.LevenbergMarquardt(rec.Identity()), TypeError, "Identity"),
        (lambda: rec.Windowed(rec.deer(), window=0), ValueError, "window"),
        (lambda: rec.Windowed(rec.Windowed(rec.deer())), TypeError, "Newton.?[Tt]ype"),
        (lambda: rec.deer().solve(lambda x, u: x, jnp.array(1), length=3), TypeError, "MultipleShooting"),
    ],
)
def test_static_mistakes_raise(make, error, match):
    with pytest.raises((error, TypeError), match=match):
        make()


# --- growth of the iterations with T


def iterations(fn, x0, inputs, length=None):
    return int(solve(rec.deer(max_iters=10_000), fn, x0, inputs, length=length).stats.num_iters)


@pytest.mark.slow
def test_iterations_against_length(rng_key):
    """LLE < 0: they stay constant; LLE > 0: they grow in proportion to T."""
    keys = jax.random.split(rng_key, 2)
    params, features = gru(keys[0], 4, 2), jax.random.normal(keys[1], (512, 2))
    step = lambda h, x: gru_step(params, h, x)
    short, long = (iterations(step, jnp.zeros(4), features[:n]) for n in (64, 512))
    assert long <= short + 2
    short, long = (iterations(henon, jnp.zeros(2), None, n) for n in (64, 256))
    assert long > 2 * short


@pytest.mark.slow
def test_iterations_against_length_of_a_flow():
    """The Lorenz system over 2 and 8 units of time."""
    short, long = (iterations(lorenz, jnp.array([1.0, 2.0, 20.0]), None, n) for n in (200, 800))
    assert long > 2 * short


# --- memory


@pytest.mark.parametrize(
    ("solver", "length", "scale"),
    [
        (rec.quasi_deer(), 10_000, None),  # measured on the path
        (Newton(rec.HutchinsonDiagonal(jax.random.key(0))), 10_000, 1.0),
        pytest.param(rec.quasi_elk(), 10_000, 1.0, marks=pytest.mark.slow),
        (Newton(rec.BlockDiagonal()), 500, 1.0),  # fewer levels of the scan compile faster
    ],
    ids=["quasi-deer", "stochastic", "quasi-elk", "block"],
)
def test_memory_of_diagonal_methods_is_linear_in_the_dimension(solver, length, scale):
    """Compiled, not run: D = 1,000. At T = 10,000 T x D floats are 40 MB, T x D x D would be 40 GB."""
    dim = 1000
    fn = lambda x, u: 0.5 * jnp.tanh(x + 0.3 * jnp.roll(x, 1)) + u
    shapes = jax.ShapeDtypeStruct((dim,), jnp.float32), jax.ShapeDtypeStruct((length, dim), jnp.float32)
    compiled = jax.jit(lambda x0, inputs: solver.solve(fn, x0, inputs, scale=scale).value).lower(*shapes).compile()
    used = compiled.memory_analysis().temp_size_in_bytes / (4 * dim * length)
    assert used < 30  # 8 to 14 in practice; T x D x D would be 1,000
