"""Lyapunov exponents of systems whose exponents are known, and bounds that must be satisfied exactly."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import special, stats

from pmcmc import MALA
from pmcmc.recurrence import Recurrence
from pmcmc.stability import contraction_bound, lyapunov_exponent
from tests.helpers.chains import draw_noise
from tests.helpers.statistics import z_bound
from tests.helpers.targets import COVARIANCE, gaussian, make_target

henon = lambda x, u: jnp.stack([1 - 1.4 * x[0] ** 2 + x[1], 0.3 * x[0]])
logistic = lambda x, u: 4 * x * (1 - x)


def lorenz(x):
    return jnp.stack([10 * (x[1] - x[0]), x[0] * (28 - x[2]) - x[1], x[0] * x[1] - 8 / 3 * x[2]])


def runge_kutta(x, h):
    k1 = lorenz(x)
    k2 = lorenz(x + h / 2 * k1)
    k3 = lorenz(x + h / 2 * k2)
    k4 = lorenz(x + h * k3)
    return x + h / 6 * (k1 + 2 * k2 + 2 * k3 + k4)


@pytest.mark.parametrize(
    ("fn", "x0", "inputs", "length", "expected"),
    [
        (logistic, 0.3, None, 20_000, np.log(2)),
        (henon, jnp.array([0.1, 0.1]), None, 100_000, 0.419),  # Sprott 2003
        (runge_kutta, jnp.array([1.0, 1.0, 20.0]), jnp.full(200_000, 0.01), None, 0.00906),  # 0.906 per unit of time
    ],
    ids=["logistic", "Henon", "Lorenz"],
)
def test_chaotic_maps(fn, x0, inputs, length, expected) -> None:
    found = lyapunov_exponent(fn, x0, inputs, length=length)
    np.testing.assert_allclose(found.exponents[0], expected, rtol=0.02)
    assert jnp.abs(found.exponents[0] - expected) < 4 * found.standard_error[0]
    assert found.standard_error[0] < 0.02 * expected
    np.testing.assert_allclose(found.finite_time.mean(), found.exponents[0])


def test_spectrum_sums_to_the_log_determinant() -> None:
    """Henon: |det J| = 0.3 at every step. Lorenz: the divergence of the flow is -(10 + 1 + 8/3)."""
    found = lyapunov_exponent(henon, jnp.array([0.1, 0.1]), length=2000, num_exponents=2)
    np.testing.assert_allclose(found.exponents.sum(), np.log(0.3), rtol=1e-12)
    steps = jnp.full(2000, 0.005)
    found = lyapunov_exponent(runge_kutta, jnp.array([1.0, 1.0, 20.0]), steps, num_exponents=3)
    np.testing.assert_allclose(found.exponents.sum() / 0.005, -(11 + 8 / 3), rtol=1e-4)


@pytest.mark.parametrize("num_exponents", [1, 2, 5])
def test_linear_map(num_exponents: int) -> None:
    """Sorted logs of the moduli of the eigenvalues, for a matrix whose eigenvectors are far from orthogonal."""
    moduli = np.array([1.1, 0.9, 0.6, 0.3, 0.05])
    vectors = np.random.default_rng(1).normal(size=(5, 5))
    matrix = jnp.asarray(vectors @ np.diag(moduli) @ np.linalg.inv(vectors))
    found = lyapunov_exponent(
        lambda x, u: matrix @ x, jnp.ones(5) * 1e-3, length=600, transient=400, num_exponents=num_exponents
    )
    np.testing.assert_allclose(found.exponents, np.log(moduli[:num_exponents]), atol=1e-12)
    assert jnp.all(found.standard_error < 1e-12)


def test_pairs_of_complex_eigenvalues() -> None:
    angle, modulus = 1.0, 0.8
    rotation = modulus * jnp.array([[jnp.cos(angle), -2 * jnp.sin(angle)], [jnp.sin(angle) / 2, jnp.cos(angle)]])
    found = lyapunov_exponent(lambda x, u: rotation @ x, jnp.ones(2), length=64 * 32, transient=0, num_exponents=2)
    np.testing.assert_allclose(found.exponents.mean(), np.log(modulus), rtol=1e-12)
    np.testing.assert_allclose(found.exponents, np.log(modulus), atol=2e-3)


def test_pytree_states_and_transient() -> None:
    """The frame is generic: a block-diagonal map has the exponent of its larger block, whichever leaf that is in."""
    fn = lambda x, u: {"a": 0.3 * x["a"] + u, "b": 0.9 * x["b"]}
    found = lyapunov_exponent(fn, {"a": jnp.zeros(2), "b": 0.0}, jnp.ones(200), transient=100)
    np.testing.assert_allclose(found.exponents, np.log([0.9]), atol=1e-12)
    assert found.num_steps == 96  # 32 batches of 3


def test_products_of_random_matrices() -> None:
    """Gaussian matrices: exponent i is log s + (log 2 + digamma((D - i + 1) / 2)) / 2 (Newman 1986)."""
    matrices = 0.5 * jax.random.normal(jax.random.key(0), (20_000, 3, 3))
    found = lyapunov_exponent(lambda x, u: 0 * x + u @ x * 1e-3, jnp.ones(3), 1e3 * matrices, num_exponents=3)
    expected = np.log(0.5) + (np.log(2) + special.digamma(np.array([3, 2, 1]) / 2)) / 2
    z = (found.exponents - expected) / found.standard_error
    assert jnp.max(jnp.abs(z)) < stats.t.isf(stats.norm.sf(z_bound(3)), df=31)


def test_standard_error_covers() -> None:
    """x' = exp(u) x with autocorrelated u: naive errors would be 3 times too small, batch means are not."""
    rho, num_seeds = 0.8, 40
    noise = jax.random.normal(jax.random.key(1), (num_seeds, 8000))
    _, u = jax.lax.scan(lambda v, e: (rho * v + e, rho * v + e), jnp.zeros(num_seeds), noise.T)
    scale_by = lambda x, u: jnp.exp(u) * x
    measure = jax.jit(jax.vmap(lambda u: lyapunov_exponent(scale_by, 1.0, u)[:2]))
    exponents, errors = measure(-0.5 + 0.1 * u.T)
    z = np.asarray((exponents + 0.5) / errors)[:, 0]
    assert np.max(np.abs(z)) < stats.t.isf(stats.norm.sf(z_bound(num_seeds)), df=31)
    covered = np.sum(np.abs(z) < stats.t.isf(0.025, df=31))
    assert covered >= stats.binom.ppf(1e-6, num_seeds, 0.93)
    assert 0.6 < z.std() < 1.6


def test_annihilation_is_minus_infinity() -> None:
    """A single Jacobian of zero gives -inf; if only one direction is lost, the other exponent remains."""
    zero_once = lambda x, u: jnp.where(u > 0, 0.5 * x, 0.0)
    found = lyapunov_exponent(zero_once, jnp.ones(2), jnp.ones(400).at[300].set(0.0), num_exponents=2)
    assert found.exponents.tolist() == [-np.inf, -np.inf]
    assert found.standard_error.tolist() == [0, 0]
    assert jnp.isfinite(found.finite_time[0, 0])
    single = lyapunov_exponent(zero_once, 1.0, jnp.ones(400).at[300].set(0.0))
    assert single.exponents[0] == -np.inf
    forget = lambda x, u: jnp.stack([0.5 * x[0], 0.0 * x[1]])
    found = lyapunov_exponent(forget, jnp.ones(2), length=400, num_exponents=1)
    np.testing.assert_allclose(found.exponents, np.log(0.5), rtol=1e-12)
    assert contraction_bound(zero_once, jnp.ones(2), jnp.zeros(100), window=5).bound == -np.inf


def test_paths_that_blow_up_are_nan() -> None:
    square = lambda x, u: x**2
    assert jnp.isnan(lyapunov_exponent(square, 2.0, length=200).exponents[0])
    assert jnp.isnan(contraction_bound(square, 2.0, length=200).bound)


def test_contraction_bound_is_above_the_exponent_and_falls() -> None:
    """Exactly, on the same steps of the same path; with windows of one step it is the mean log of the largest |J|."""
    x0 = jnp.array([0.1, 0.1])
    exponent = lyapunov_exponent(henon, x0, length=4096, transient=0).exponents[0]
    bounds = [contraction_bound(henon, x0, length=4096, transient=0, window=m).bound for m in (1, 4, 16, 64, 256)]
    assert np.all(np.diff(bounds) < 0)
    assert bounds[-1] > exponent
    assert bounds[-1] - exponent < 0.01
    path = [x0]
    for _ in range(19):  # few steps, since rounding grows with the path
        path.append(henon(path[-1], None))
    jacobians = jax.vmap(jax.jacfwd(lambda x: henon(x, None)))(jnp.stack(path))
    expected = np.log(np.linalg.svd(jacobians, compute_uv=False)[:, 0])
    found = contraction_bound(henon, x0, length=20, transient=0)
    np.testing.assert_allclose(found.by_window, expected, rtol=1e-10)


def test_window_longer_than_floats_reach() -> None:
    found = contraction_bound(lambda x, u: 1e-30 * x, jnp.ones(2), length=100, window=50, transient=0)
    np.testing.assert_allclose(found.bound, np.log(1e-30), rtol=1e-12)


def test_kernel() -> None:
    """MALA on a Gaussian: an accepted step contracts by I - h precision, and a rejected one counts 0."""
    target, kernel = make_target(gaussian), MALA(step_size=0.2)
    noise = draw_noise(target, kernel, 0, 4000)
    found = lyapunov_exponent(kernel.transition(target), jnp.zeros(3), noise, num_exponents=3)
    recurrence = kernel.transition(target)
    _, margins = jax.lax.scan(lambda s, u: (lambda new: (new[0], new[1].margin))(recurrence.step(s, u)),
                              recurrence.restore(jnp.zeros(3)), noise)  # fmt: skip
    accepted = float(jnp.mean(margins[400:] > 0))
    moduli = np.abs(1 - 0.2 * np.linalg.eigvalsh(np.linalg.inv(COVARIANCE)))
    np.testing.assert_allclose(found.exponents, accepted * np.sort(np.log(moduli))[::-1], rtol=0.02)


def test_float32() -> None:
    found = lyapunov_exponent(logistic, jnp.float32(0.3), length=20_000)
    assert found.exponents.dtype == jnp.float32
    np.testing.assert_allclose(found.exponents[0], np.log(2), rtol=0.05)
    tiny = lyapunov_exponent(lambda x, u: 1e-30 * x, jnp.float32(1), length=100)
    np.testing.assert_allclose(tiny.exponents, np.log([1e-30]), rtol=1e-5)


def test_half_precision() -> None:
    """LAPACK has none: frames and norms are computed in float32."""
    fn = lambda x, u: x * jnp.array([0.5, 0.25], jnp.float16)
    found = lyapunov_exponent(fn, jnp.ones(2, jnp.float16), length=100, num_exponents=2)
    np.testing.assert_allclose(found.exponents, np.log([0.5, 0.25]), rtol=0.02)
    np.testing.assert_allclose(
        contraction_bound(fn, jnp.ones(2, jnp.float16), length=100).bound, np.log(0.5), rtol=0.02
    )


def test_arguments() -> None:
    walk = Recurrence(lambda x, u: ({"n": x["n"] + 1, "r": x["r"]}, None))
    with pytest.raises(TypeError, match=r"x0\['n'\] has dtype int.*coalescence_time"):
        lyapunov_exponent(walk, {"n": 1, "r": 0.0}, length=100)
    with pytest.raises(ValueError, match=r"path is too short.*got 9 steps"):
        lyapunov_exponent(logistic, 0.3, length=10)
    with pytest.raises(ValueError, match="num_exponents must be between 1 and the dimension 1"):
        lyapunov_exponent(logistic, 0.3, length=1000, num_exponents=2)
    with pytest.raises(ValueError, match="x0 is NaN or infinite"):
        lyapunov_exponent(logistic, np.nan, length=1000)
    with pytest.raises(ValueError, match="transient must be between 0 and"):
        lyapunov_exponent(logistic, 0.3, length=1000, transient=1000)
    with pytest.raises(ValueError, match="at least 2 windows, got window=600"):
        contraction_bound(logistic, 0.3, length=1000, window=600)
    with pytest.raises(ValueError, match="at least 2 windows, got window=0"):
        contraction_bound(logistic, 0.3, length=1000, window=0)
    with pytest.raises(ValueError, match="pass length=T"):
        lyapunov_exponent(logistic, 0.3)
