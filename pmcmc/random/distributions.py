"""Uniform and normal noise of one step from its key, two floats to a hash.

On two CPU cores the noise of a tiny model costs as much as its steps. ``jax.random`` spends one hash on each float and
two on each split; here a hash of the step's key and a counter gives two floats, and nothing is split.
"""

import math
from collections.abc import Sequence
from functools import reduce
from itertools import accumulate
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from pmcmc._typing import Array, Float, PRNGKey
from pmcmc.random.threefry import key_pair, threefry_2x32


def uniforms(rng_key: PRNGKey, count: int, dtype) -> Float[Array, " count"]:
    """``count`` independent uniforms on the open interval (0, 1), a function of the key alone.

    Integers from the hash are centred in their cells, so that 0 and 1 never occur and logs stay finite. 23 bits in
    float32 and 52 in float64, as in ``jax.random.uniform``.
    """
    double = jnp.finfo(dtype).bits > 32
    counter = jnp.arange(count if double else -(-count // 2), dtype=jnp.uint32)
    high, low = threefry_2x32(key_pair(rng_key), counter, jnp.zeros_like(counter))
    if double:
        return _from_words(high, low, dtype)
    words = jnp.concatenate([high, low])[:count]
    return _from_word(words, dtype)


def _from_word(word: Array, dtype) -> Array:
    # The centre of a cell, (n + 1/2) 2^-23 with n < 2^23, has 24 bits: exact in float32.
    return (((word >> 9).astype(jnp.float32) + 0.5) * 2.0**-23).astype(dtype)


def _from_words(high: Array, low: Array, dtype) -> Array:
    wide = high.astype(jnp.uint64) << 20 | low.astype(jnp.uint64) >> 12
    return (wide.astype(dtype) + 0.5) * 2.0**-52


def uniform_array(rng_key: PRNGKey, shape: tuple[int, ...], dtype) -> Array:
    """Uniforms as those of `uniforms`, a hash for each, for numbers that go straight into further arithmetic.

    XLA fuses the concatenation in `uniforms` into a reader that is alone, and then neither vectorises nor hashes once:
    nine normals took 290 ns on CPU by halves and 55 by twice the hashes.
    """
    return _uniform_pair(rng_key, shape, dtype, 0)[0]


def _uniform_pair(rng_key: PRNGKey, shape: tuple[int, ...], dtype, stream: Array | int) -> tuple[Array, Array]:
    """Two arrays of uniforms, independent of those of every other ``stream``; 0 is that of `uniform_array`."""
    size = math.prod(shape)
    counter = jnp.arange(size, dtype=jnp.uint32).reshape(shape)
    second = jnp.full_like(counter, stream)
    high, low = threefry_2x32(key_pair(rng_key), counter, second)
    if jnp.finfo(dtype).bits <= 32:
        return _from_word(high, dtype), _from_word(low, dtype)
    return _from_words(high, low, dtype), _from_words(
        *threefry_2x32(key_pair(rng_key), counter + jnp.uint32(size), second), dtype
    )


def jax_uniforms(pair: Array, index: Array, dtype) -> Array:
    """``jax.random.uniform(key, shape, dtype)`` on [0, 1) at the flat ``index``."""
    high, low = threefry_2x32(pair, jnp.zeros_like(index), index)
    if jnp.finfo(dtype).bits > 32:
        wide = high.astype(jnp.uint64) << 20 | low.astype(jnp.uint64) >> 12
        return wide.astype(dtype) * 2.0**-52
    return (((high ^ low) >> 9).astype(jnp.float32) * 2.0**-23).astype(dtype)


def jax_normals(pair: Array, count: int, dtype) -> Float[Array, " count"]:
    """``jax.random.normal(key, (count,), dtype)``, to the rounding of `normals`."""
    uniform = jax_uniforms(pair, jnp.arange(count, dtype=jnp.uint32), dtype)
    return normals(jnp.maximum(uniform, jnp.finfo(dtype).eps / 4))  # 0 would be minus infinity


# Coefficients of Giles 2012, table 5 (single precision), highest power first: around w = 2.5, and in sqrt(w) around 3.
_CENTRAL = (
    2.81022636e-08, 3.43273939e-07, -3.5233877e-06, -4.39150654e-06, 0.00021858087, -0.00125372503, -0.00417768164,
    0.246640727, 1.50140941,
)  # fmt: skip


_TAIL = (
    -0.000200214257, 0.000100950558, 0.00134934322, -0.00367342844, 0.00573950773, -0.0076224613, 0.00943887047,
    1.00167406, 2.83297682,
)  # fmt: skip


def normals(uniform: Array) -> Array:
    """Standard normals from uniforms by the inverse distribution function, ``sqrt(2) erfinv(2 u - 1)``.

    In float32 by the polynomials of Giles (2012, "Approximating the erfinv function"), which XLA uses too, but with
    ``w = -log(4 u (1 - u))`` where XLA takes a log1p that its CPU compiler does not vectorise: 33 instead of 115 ns
    for the noise of a step in ten dimensions. w enters the polynomials as it is, so log loses nothing against log1p.
    """
    root_two = jnp.asarray(math.sqrt(2), uniform.dtype)
    if uniform.dtype != jnp.float32:
        return root_two * jax.lax.erf_inv(2 * uniform - 1)
    w = -jnp.log(4 * uniform * (1 - uniform))
    central, tail = _horner(_CENTRAL, w - 2.5), _horner(_TAIL, jnp.sqrt(w) - 3)
    return root_two * (2 * uniform - 1) * jnp.where(w < 5, central, tail)


def log_gammas(rng_key: PRNGKey, shape: Float[Array, "*dims"]) -> Float[Array, "*dims"]:
    """Logs of gamma variates of unit rate by the method of Marsaglia & Tsang (2000), all elements side by side.

    With d = a - 1/3, c = 1 / sqrt(9 d): ``d (1 + c z)^3`` for a normal z is accepted with a probability that is above
    0.95 for every a >= 1, else drawn again; below 1 by ``log G(a) = log G(a + 1) + log(U) / a``. In logs, since a
    variate of a small shape is often below every positive number of the dtype: one in six of shape 0.02 in float32.
    `jax.random.gamma` runs one element after the other on CPU, at 680 ns a draw.

    Differentiable forward in the shape: the derivative is that of the proposal accepted. NaN where the shape is not a
    positive number, for which no try would ever be accepted.
    """
    valid = (shape > 0) & jnp.isfinite(shape)
    shape = jnp.where(valid, shape, 1.0)
    small = shape < 1
    d = jnp.where(small, shape + 1, shape) - jnp.asarray(1 / 3, shape.dtype)
    c = 1 / jnp.sqrt(9 * d)

    def propose(stream: Array | int) -> Array:
        """One try each, 0 where it is rejected: a second output would have XLA hash a second time."""
        u, v = _uniform_pair(rng_key, shape.shape, shape.dtype, stream)
        z = normals(u)
        cube = (1 + c * z) ** 3
        log_cube = jnp.log(jnp.where(cube > 0, cube, 1.0))
        accepted = (cube > 0) & (jnp.log(v) < 0.5 * z**2 + d * (1 - cube + log_cube))
        return jnp.where(accepted, d * cube, 0.0)

    def again(state: tuple) -> tuple:
        stream, value = state
        return stream + 1, jnp.where(value > 0, value, propose(stream))

    first = (jnp.asarray(2, jnp.uint32), propose(1))
    _, value = jax.lax.while_loop(lambda state: ~jnp.all(state[1] > 0), again, first)

    def boost(log_value: Array) -> Array:
        power, _ = _uniform_pair(rng_key, shape.shape, shape.dtype, 2**32 - 1)  # a stream that no round will reach
        return jnp.where(small, log_value + jnp.log(power) / shape, log_value)

    drawn = jax.lax.cond(jnp.any(small), boost, lambda log_value: log_value, jnp.log(value))
    return jnp.where(valid, drawn, jnp.nan)


def _horner(coefficients: tuple[float, ...], x: Array) -> Array:
    total = jnp.full_like(x, coefficients[0])
    for coefficient in coefficients[1:]:
        total = coefficient + total * x
    return total


# Up to so many categories are one array each. Programs grow with them: 111 took XLA 18 s to compile, 1.1 by a scan.
MAX_COLUMNS = 8


def check_values(dtype: Any, values: Sequence[int | float], who: str) -> None:
    """Raise where an array of this dtype cannot hold the values, each as itself or, for reals, rounded but apart.

    who: begins the sentence.

    Raises:
        ValueError: it cannot.
    """
    if jnp.issubdtype(dtype, jnp.floating):
        with np.errstate(over="ignore"):  # it is told below
            held = np.asarray(values, float).astype(dtype)
        lost = [v for v, x in zip(values, held, strict=True) if not np.isfinite(x)]
        lost = lost or ([] if len(np.unique(held)) == len(held) else list(values))
    else:
        low, high = (0, 1) if jnp.issubdtype(dtype, bool) else (jnp.iinfo(dtype).min, jnp.iinfo(dtype).max)
        lost = [v for v in values if v != int(v) or not low <= v <= high]
    if lost:
        some = ", ".join(map(str, lost[:3])) + (", ..." if len(lost) > 3 else "")
        raise ValueError(
            f"{who} has dtype {jnp.dtype(dtype)}, which cannot hold {some}: start from an array of another dtype, or "
            "give other values."
        )


class DiscreteDraw(NamedTuple):
    """category: (...) what was drawn. margin: least distance of a uniform to a step of its CDF, a scalar.

    failed: scalar, some probabilities were not finite; what was drawn there means nothing.
    """

    category: Array
    margin: Array
    failed: Array


def inverse_cdf(logits: Float[Array, "*dims K"], uniform: Float[Array, "*dims"]) -> DiscreteDraw:
    """The least k with ``p[0] + ... + p[k] >= u``, p = softmax(logits).

    Monotone in u: under a shared uniform the two draws from two distributions that are ordered keep that order, and
    two that are close differ with a probability near their total variation distance.
    """
    draw = _by_columns if logits.shape[-1] <= MAX_COLUMNS else _by_scan
    return draw(logits, uniform)


def _by_columns(logits: Array, uniform: Array) -> DiscreteDraw:
    """In place of a reduction and a scan over a short axis, XLA makes one pass over the elements."""
    columns = [logits[..., k] for k in range(logits.shape[-1])]
    largest = reduce(jnp.maximum, columns)
    steps = list(accumulate(jnp.exp(column - largest) for column in columns))
    total = steps.pop()
    gaps = [uniform - step / total for step in steps]
    nearest = reduce(jnp.minimum, (jnp.abs(gap) for gap in gaps), jnp.full_like(uniform, jnp.inf))
    return DiscreteDraw(
        category=sum(((gap > 0).astype(int) for gap in gaps), jnp.zeros(uniform.shape, int)),
        margin=jnp.min(nearest, initial=jnp.inf),
        failed=~jnp.all(jnp.isfinite(total)),
    )


def _by_scan(logits: Array, uniform: Array) -> DiscreteDraw:
    steps = jnp.cumsum(jnp.exp(logits - jnp.max(logits, axis=-1, keepdims=True)), axis=-1)
    total = steps[..., -1:]
    gaps = uniform[..., None] - steps[..., :-1] / total
    return DiscreteDraw(
        category=jnp.sum(gaps > 0, axis=-1, dtype=int),
        margin=jnp.min(jnp.abs(gaps)),
        failed=~jnp.all(jnp.isfinite(total)),
    )
