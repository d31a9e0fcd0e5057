"""Each associative operator against a loop, exactly where the numbers are integers; Kalman against the textbook."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pmcmc.recurrence.newton import kalman
from pmcmc.recurrence.scan import affine_operator, affine_scan, affine_scan_sequential, apply_affine, compose
from pmcmc.recurrence.sharding import AllSteps

pytestmark = pytest.mark.optimized

# Compiled once per structure, not operation by operation.
scan = jax.jit(lambda a, b, reverse: affine_scan(AllSteps(len(a)), a, b, reverse), static_argnums=2)
scan_sequential = jax.jit(affine_scan_sequential, static_argnums=2)
gains_of = jax.jit(lambda a, *rest: kalman.gains(AllSteps(len(a)), a, *rest))
gains_sequential = jax.jit(kalman.gains_sequential)
means_of = jax.jit(lambda a, *rest: kalman.filter_means(AllSteps(len(a)), a, *rest))
corrections_of = jax.jit(lambda a, *rest: kalman.smoother_corrections(AllSteps(len(a)), a, *rest))

SHAPES = {"dense": (4, 4), "diagonal": (4,), "blocks": (2, 2, 2)}
structures = pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES.keys())


def integers(key, shape, bound=2):
    """Return random integers as floats: sums and products are exact, so results must be equal."""
    return jax.random.randint(key, shape, -bound, bound + 1).astype(float)


@jax.jit
def dense(a):
    """Return the matrices ``(T, D, D)`` that a structured A ``(T, ...)`` of 4 coordinates represents."""
    return jax.vmap(lambda a: jax.vmap(lambda e: apply_affine(a, e), out_axes=1)(jnp.eye(4)))(a)


@structures
@pytest.mark.parametrize("reverse", [False, True])
def test_scan_equals_loop_exactly(shape, reverse, rng_key):
    keys = jax.random.split(rng_key, 2)
    a, b = integers(keys[0], (11, *shape), 1), integers(keys[1], (11, 4))
    found = scan(a, b, reverse)
    np.testing.assert_array_equal(found, scan_sequential(a, b, reverse))
    np.testing.assert_array_equal(found, scan_sequential(dense(a), b, reverse))


@structures
def test_operator_is_associative_and_closed(shape, rng_key):
    keys = jax.random.split(rng_key, 6)
    x, y, z = [(integers(keys[2 * i], (3, *shape)), integers(keys[2 * i + 1], (3, 4))) for i in range(3)]
    left = affine_operator(affine_operator(x, y), z)
    right = affine_operator(x, affine_operator(y, z))
    jax.tree.map(np.testing.assert_array_equal, left, right)
    np.testing.assert_array_equal(dense(compose(y[0], x[0], 2)), dense(y[0]) @ dense(x[0]))


@structures
@pytest.mark.parametrize("strength", [0.0, 1e-3, 2.0])
def test_gains_equal_the_textbook_filter(shape, strength, rng_key):
    a = 0.9 * jax.random.normal(rng_key, (9, *shape))
    found, expected = gains_of(a, strength), gains_sequential(dense(a), strength)
    for x, y in zip(found, expected, strict=True):
        np.testing.assert_allclose(dense(x), y, rtol=1e-10, atol=1e-12)


@structures
def test_kalman_operator_is_associative(shape, rng_key):
    a = kalman.matrices(jax.random.normal(rng_key, (3, *shape)))
    eye = jnp.ones_like(a) if a.ndim == 2 else jnp.broadcast_to(jnp.eye(a.shape[-1]), a.shape)
    operator = jax.jit(kalman._diagonal_operator if a.ndim == 2 else kalman._dense_operator)
    four = lambda x: jnp.concatenate([x[:1], x])
    elements = kalman._elements(AllSteps(4), four(a), jnp.array(0.3), four(eye))
    x, y, z = [jax.tree.map(lambda e: e[i : i + 1], elements) for i in (1, 2, 3)]  # noqa: B023
    left, right = operator(operator(x, y), z), operator(x, operator(y, z))
    if a.ndim > 2:  # roots are unique up to the signs of their columns
        left, right = [(e[0], *(root @ kalman.transposed(root) for root in e[1:])) for e in (left, right)]
    jax.tree.map(lambda p, q: np.testing.assert_allclose(p, q, rtol=1e-10, atol=1e-12), left, right)


@structures
@pytest.mark.parametrize("strength", [1e-3, 2.0])
def test_smoother_is_the_levenberg_marquardt_step(shape, strength, rng_key):
    """Against the normal equations of ``sum |d[t] - A d[t-1] - r|^2 + lambda |d|^2``, assembled densely."""
    length, dim = 7, 4
    keys = jax.random.split(rng_key, 2)
    a, r = jax.random.normal(keys[0], (length, *shape)), jax.random.normal(keys[1], (length, dim))
    gains = gains_of(a, strength)
    carried, pull = means_of(a, r, gains)
    step = carried + r - pull + corrections_of(a, gains, pull, strength)
    system = np.eye(length * dim)
    for t in range(1, length):
        system[t * dim : (t + 1) * dim, (t - 1) * dim : t * dim] = -dense(a)[t]
    normal = system.T @ system + strength * np.eye(length * dim)
    expected = np.linalg.solve(normal, system.T @ np.asarray(r).ravel()).reshape(length, dim)
    np.testing.assert_allclose(step, expected, rtol=1e-9, atol=1e-11)


@structures
def test_filter_means_equal_a_loop(shape, rng_key):
    keys = jax.random.split(rng_key, 2)
    a, r = jax.random.normal(keys[0], (9, *shape)), jax.random.normal(keys[1], (9, 4))
    gains = gains_of(a, 0.5)
    carried, pull = means_of(a, r, gains)
    mean = jnp.zeros(4)
    for t, (matrix, shrink) in enumerate(zip(dense(a), dense(gains.shrink), strict=True)):
        mean = shrink @ (matrix @ mean + r[t])
        np.testing.assert_allclose((carried + r - pull)[t], mean, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.float64])
def test_gains_stay_bounded_where_products_overflow(dtype):
    """120 unstable steps: products of A reach 10^47, covariances at most 1/lambda; the gain is the steady one."""
    a = jnp.full((120, 2, 2), 2.5, dtype) * jnp.eye(2, dtype=dtype)[None]
    found, diagonal = gains_of(a, 0.01), gains_of(a[:, 0], 0.01)
    assert np.isfinite(found.filtered).all()
    assert float(jnp.max(found.filtered)) < 100.001
    predicted = 1.0
    for _ in range(100):  # P- = a^2 P- / (1 + lambda P-) + 1
        predicted = 2.5**2 * predicted / (1 + 0.01 * predicted) + 1
    expected = 1 / (1 + 0.01 * predicted)
    np.testing.assert_allclose(found.shrink[-1], expected * np.eye(2), rtol=1e-5, atol=1e-7)
    np.testing.assert_allclose(diagonal.shrink[-1, 0], expected, rtol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("strength", [1e-5, 1e-4, 1e-2, 1.0])
def test_float32_gains_beside_unstable_directions(strength, rng_key):
    """Covariances range from 1 to 1 / lambda: in float32 their roots keep what their products lose (errors of 3e-2)."""
    keys = jax.random.split(rng_key, 2)
    a = 3 / jnp.sqrt(6) * jax.random.normal(keys[0], (128, 6, 6), jnp.float32)
    r = jax.random.normal(keys[1], (128, 6), jnp.float32)

    def step(a, r):
        carried, pull = means_of(a, r, gains_of(a, jnp.asarray(strength, a.dtype)))
        return carried + r - pull

    expected = step(a.astype(float), r.astype(float))
    assert step(a, r).dtype == jnp.float32
    np.testing.assert_allclose(step(a, r), expected, rtol=0, atol=2e-3 * float(jnp.max(jnp.abs(expected))))


@structures
def test_known_steps_are_those_of_newton(shape, rng_key):
    """The first increments have no noise or penalty; the rest is a path that starts after them."""
    keys = jax.random.split(rng_key, 2)
    a, r = 0.9 * jax.random.normal(keys[0], (9, *shape)), jax.random.normal(keys[1], (9, 4))
    gains = gains_of(a, 0.5, 4)
    carried, pull = means_of(a, r, gains)
    np.testing.assert_allclose((carried + r)[:4], scan(a[:4], r[:4], False), rtol=1e-12, atol=1e-12)
    np.testing.assert_array_equal(pull[:4], 0)
    rest = gains_of(a[4:], 0.5, 0)
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x[4:], y, rtol=1e-12, atol=1e-12), gains, rest)
    np.testing.assert_array_equal(corrections_of(a, gains, pull, 0.5)[:4], 0)
