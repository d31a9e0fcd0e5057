"""The noise of a step: uniforms on the open interval, independent across keys and counts, with JAX's hash."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import stats

from pmcmc import HMC, MALA, NUTS, DiscreteGibbs, Target
from pmcmc.kernels import CategoricalUpdate, UniformLength
from pmcmc.kernels.updates import Site
from pmcmc.random.distributions import inverse_cdf, normals, uniforms
from pmcmc.random.streams import fold_in, key_pair
from tests.helpers.chains import draw_noise
from tests.helpers.statistics import TEST_FAILURE_RATE, z_bound
from tests.helpers.targets import gaussian, make_target

NUM_KEYS = 40_000
dtypes = pytest.mark.parametrize("dtype", [jnp.float32, jnp.float64], ids=["float32", "float64"])


def draw(dtype) -> np.ndarray:
    """Return (keys, 5) uniforms of consecutive keys, as a chain draws them."""
    keys = jax.vmap(lambda t: fold_in(key_pair(jax.random.key(3)), t))(jnp.arange(NUM_KEYS))
    return np.asarray(jax.jit(jax.vmap(lambda key: uniforms(key, 5, dtype)))(keys))


@dtypes
def test_uniforms(dtype) -> None:
    """Open interval, moments, Kolmogorov-Smirnov, and no correlation across counts or neighbouring keys."""
    u = draw(dtype)
    assert u.dtype == dtype
    assert u.min() > 0
    assert u.max() < 1
    centred = (u.astype(float) - 0.5) * np.sqrt(12)
    z = [*(centred.mean(0) * np.sqrt(NUM_KEYS)), *((centred**2).mean(0) - 1) * np.sqrt(NUM_KEYS / 0.8)]
    z += [np.mean(centred[:, i] * centred[:, j]) * np.sqrt(NUM_KEYS) for i in range(5) for j in range(i)]
    z += [np.mean(centred[1:, i] * centred[:-1, j]) * np.sqrt(NUM_KEYS - 1) for i in range(5) for j in range(5)]
    assert np.max(np.abs(z)) < z_bound(len(z))
    for column in u.T:
        assert stats.kstest(column, "uniform").pvalue > TEST_FAILURE_RATE / 5


@dtypes
def test_normals(dtype) -> None:
    z = np.asarray(normals(jnp.asarray(draw(dtype)))).astype(float)
    assert np.all(np.isfinite(z))
    spread = {1: 1.0, 2: 2.0, 3: 15.0, 4: 96.0}  # variances of the powers of a standard normal
    mean = {1: 0.0, 2: 1.0, 3: 0.0, 4: 3.0}
    scores = [(np.mean(z**k, 0) - mean[k]) / np.sqrt(spread[k] / NUM_KEYS) for k in mean]
    assert np.max(np.abs(scores)) < z_bound(20)
    for column in z.T:
        assert stats.kstest(column, "norm").pvalue > TEST_FAILURE_RATE / 5


@dtypes
def test_extreme_cells_stay_finite(dtype) -> None:
    """In the first and last cell of the interval logs and normals are finite, and symmetric."""
    bits = 23 if dtype == jnp.float32 else 52
    ends = jnp.asarray([2.0 ** -(bits + 1), 1 - 2.0 ** -(bits + 1)], dtype)
    assert jnp.all(jnp.isfinite(jnp.log(ends)))
    low, high = normals(ends)
    assert low == -high
    np.testing.assert_allclose(low, stats.norm.ppf(float(ends[0])), rtol=1e-4 if bits == 23 else 1e-12)


@dtypes
@pytest.mark.parametrize("count", [1, 2, 5])
def test_typed_and_raw_keys_agree(dtype, count: int) -> None:
    typed, raw = jax.random.key(5), jax.random.PRNGKey(5)
    np.testing.assert_array_equal(uniforms(typed, count, dtype), uniforms(raw, count, dtype))
    assert uniforms(typed, count, dtype).shape == (count,)
    other = uniforms(jax.random.key(6), count, dtype)
    assert not jnp.any(uniforms(typed, count, dtype) == other)
    wide = uniforms(jax.random.key(5, impl="rbg"), count, dtype)  # four words: hashed down
    assert jnp.all((wide > 0) & (wide < 1))


def test_hash_is_that_of_jax() -> None:
    """fold_in is equal to the bit, so that keys made here and by jax.random are interchangeable."""
    key = jax.random.key(11)
    for number in (0, 1, 12345, 2**31 - 1):
        ours = fold_in(key_pair(key), jnp.asarray(number))
        np.testing.assert_array_equal(ours, jax.random.key_data(jax.random.fold_in(key, number)))


@pytest.mark.parametrize(
    "kernel",
    [MALA(step_size=0.1), HMC(step_size=0.1), HMC(step_size=0.1, num_integration_steps=UniformLength(1, 4))],
    ids=["MALA", "HMC", "HMC-uniform-length"],
)
def test_parts_of_a_kernels_noise_are_independent(kernel) -> None:
    """No number is used twice: all parts, made standard, are uncorrelated, their squares included."""
    noise = draw_noise(make_target(gaussian), kernel, 2, NUM_KEYS)
    parts = {"exp": jnp.exp(noise.log_uniform)[:, None], "normal": noise.normal}
    if isinstance(kernel, HMC):
        parts["jitter"] = noise.jitter[:, None]
        if noise.length is not None:
            parts["length"] = noise.length[:, None]
    x = np.asarray(jnp.concatenate(list(parts.values()), axis=1))
    x = (x - x.mean(0)) / x.std(0)
    pairs = [(i, j) for i in range(x.shape[1]) for j in range(i)]
    z = [np.mean(x[:, i] * x[:, j]) * np.sqrt(NUM_KEYS) for i, j in pairs]
    squares = (x**2 - 1) / (x**2).std(0)
    z += [np.mean(squares[:, i] * squares[:, j]) * np.sqrt(NUM_KEYS) for i, j in pairs]
    assert np.max(np.abs(z)) < z_bound(len(z))


@pytest.mark.parametrize("dtype", [jnp.float16, jnp.bfloat16], ids=["float16", "bfloat16"])
def test_half_precision(dtype) -> None:
    """Uniforms are rounded, but not to 1, and normals are rounded from float32: finite and symmetric."""
    u = draw(dtype)
    assert u.dtype == dtype
    assert np.all((u > 0) & (u < 1))
    assert np.all(np.isfinite(np.asarray(normals(jnp.asarray(u))).astype(float)))
    target = make_target(gaussian, dtype)
    keys = jax.random.split(jax.random.key(0), NUM_KEYS)
    for kernel in (MALA(step_size=0.5), HMC(step_size=0.5), NUTS(step_size=0.5)):
        noise = jax.jit(jax.vmap(lambda key, kernel=kernel: kernel.sample_noise(key, target)))(keys)
        z = np.asarray(noise[0])
        assert z.dtype == dtype
        z = z.astype(float)
        assert min(z.max(), -z.min()) > 3.5
        assert np.abs(z).max() < 6
        assert np.abs(z.mean(0)).max() * np.sqrt(NUM_KEYS) < z_bound(9)


@pytest.mark.parametrize("dtype", [jnp.float16, jnp.bfloat16], ids=["float16", "bfloat16"])
def test_rare_categories_in_half_precision(dtype) -> None:
    """One of 3 and one of 20 categories, the last of them with a probability below the dtype's rounding of 1."""
    rare, number = 2.0**-13, 2**18
    site = Site(jax.ShapeDtypeStruct((number,), jnp.int32), dtype)
    for count in (3, 20):
        logits = jnp.log(jnp.array([*[(1 - rare) / (count - 1)] * (count - 1), rare])).astype(dtype)
        update = CategoricalUpdate(lambda x: jnp.broadcast_to(x, (number, len(x))))
        drawn = jax.jit(lambda key, x: update.draw(x, update.draw_noise(key, site), site))(jax.random.key(0), logits)  # noqa: B023
        share = float(jax.nn.softmax(logits.astype(float))[-1])
        times = int(np.sum(np.asarray(drawn.value) == count - 1))
        assert abs(times - number * share) < z_bound(4) * np.sqrt(number * share)


def test_random_choices_are_not_rounded_to_half_precision() -> None:
    dtype = jnp.bfloat16
    sites = {"z": jnp.zeros((2**12,), int), "x": jnp.zeros((), dtype)}
    target = Target.from_logdensity(lambda p: jnp.sum(jnp.where(p["z"] == 1, -9.0, 0.0)).astype(dtype), sites)
    (u,) = DiscreteGibbs(supports={"z": [0, 1]}).sample_noise(jax.random.key(0), target)
    length = (
        HMC(step_size=0.5, num_integration_steps=UniformLength(1, 999))
        .sample_noise(jax.random.key(0), make_target(gaussian, dtype))
        .length
    )
    assert u.dtype == length.dtype == jnp.float32
    for count in (2, 20):  # log densities in half precision, as those of `DiscreteGibbs`
        logits = jnp.where(jnp.arange(count) == count - 1, -9.0, 0.0).astype(dtype)
        assert int(inverse_cdf(logits, jnp.float32(1 - 1e-6)).category) == count - 1
