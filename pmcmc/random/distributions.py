"""Uniform, normal, gamma and discrete draws for one step, from the step's key.

On two CPU cores the noise of a tiny model costs as much as its steps. ``jax.random`` spends one hash on each float and
two on each split. Here `uniforms` gets two floats from one hash of the step's key and a counter, and nothing is split.
`normals` and `inverse_cdf` transform uniforms, `log_gammas` takes a key. `jax_uniforms` and `jax_normals` reproduce the
numbers of ``jax.random``.
"""

import math
from collections.abc import Sequence
from functools import partial, reduce
from itertools import accumulate
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from pmcmc._pytree import Array, Float, PRNGKey
from pmcmc.random.streams import key_pair, threefry_2x32


def uniforms(rng_key: PRNGKey, count: int, dtype) -> Float[Array, " count"]:
    """Return ``count`` independent uniforms on the open interval (0, 1), a function of the key alone.

    Integers from the hash are centred in their cells, so that 0 and 1 never occur and logs stay finite. There are 23
    bits in float32 and 52 in float64, as in ``jax.random.uniform``. Those of narrower dtypes are `rounded`.
    """
    double = jnp.finfo(dtype).bits > 32
    counter = jnp.arange(count if double else -(-count // 2), dtype=jnp.uint32)
    high, low = threefry_2x32(key_pair(rng_key), counter, jnp.zeros_like(counter))
    if double:
        return _from_words(high, low, dtype)
    words = jnp.concatenate([high, low])[:count]
    return _from_word(words, dtype)


def _from_word(word: Array, dtype) -> Array:
    """Convert 32-bit words to uniforms of at most 32 bits."""
    # The centre of a cell, (n + 1/2) 2^-23 with n < 2^23, has 24 bits: exact in float32.
    return rounded(((word >> 9).astype(jnp.float32) + 0.5) * 2.0**-23, dtype)


def at_least_single(dtype: Any) -> Any:
    """Return the dtype to compute noise in: float32 for narrower ones, in which normals would have few values."""
    return jnp.promote_types(dtype, jnp.float32)


def rounded(uniform: Array, dtype: Any) -> Array:
    """Round uniforms to a narrower dtype, but not to 1."""
    if uniform.dtype == dtype:
        return uniform
    return jnp.minimum(uniform.astype(dtype), jnp.asarray(1 - float(jnp.finfo(dtype).epsneg), dtype))


def _from_words(high: Array, low: Array, dtype) -> Array:
    """Convert pairs of 32-bit words to float64 uniforms."""
    wide = high.astype(jnp.uint64) << 20 | low.astype(jnp.uint64) >> 12
    return (wide.astype(dtype) + 0.5) * 2.0**-52


def uniform_array(rng_key: PRNGKey, shape: tuple[int, ...], dtype) -> Array:
    """Return uniforms like those of `uniforms`, one hash each, for use in further arithmetic.

    XLA fuses the concatenation in `uniforms` into its reader if there is only one, and then neither vectorises nor
    hashes only once: nine normals took 290 ns on CPU from `uniforms`, and 55 ns with twice the hashes.
    """
    return _uniform_pair(rng_key, shape, dtype, 0)[0]


def _uniform_pair(rng_key: PRNGKey, shape: tuple[int, ...], dtype, stream: Array | int) -> tuple[Array, Array]:
    """Return two arrays of uniforms, independent of those of other streams; 0 is the stream of `uniform_array`."""
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
    """Return ``jax.random.uniform(key, shape, dtype)`` on [0, 1) at the flat ``index``."""
    high, low = threefry_2x32(pair, jnp.zeros_like(index), index)
    if jnp.finfo(dtype).bits > 32:
        wide = high.astype(jnp.uint64) << 20 | low.astype(jnp.uint64) >> 12
        return wide.astype(dtype) * 2.0**-52
    return rounded(((high ^ low) >> 9).astype(jnp.float32) * 2.0**-23, dtype)


def jax_normals(pair: Array, count: int, dtype) -> Float[Array, " count"]:
    """Return ``jax.random.normal(key, (count,), dtype)``, up to the rounding of `normals`; at least in float32."""
    uniform = jax_uniforms(pair, jnp.arange(count, dtype=jnp.uint32), at_least_single(dtype))
    least = jnp.finfo(uniform.dtype).eps / 4  # u = 0 would give minus infinity
    return normals(jnp.maximum(uniform, least)).astype(dtype)


# Coefficients of Giles 2012, table 5 (single precision), highest power first: around w = 2.5, and in sqrt(w) around 3.
_CENTRAL = (
    2.81022636e-08, 3.43273939e-07, -3.5233877e-06, -4.39150654e-06, 0.00021858087, -0.00125372503, -0.00417768164,
    0.246640727, 1.50140941,
)  # fmt: skip


_TAIL = (
    -0.000200214257, 0.000100950558, 0.00134934322, -0.00367342844, 0.00573950773, -0.0076224613, 0.00943887047,
    1.00167406, 2.83297682,
)  # fmt: skip


@partial(jax.jit, inline=True)  # traced once for each shape
def normals(uniform: Array) -> Array:
    """Transform uniforms to standard normals by the inverse distribution function, ``sqrt(2) erfinv(2 u - 1)``.

    In float32 it uses the polynomials of Giles, as XLA does, but with ``w = -log(4 u (1 - u))`` where XLA calls log1p,
    which its CPU compiler does not vectorise: 33 instead of 115 ns for the noise of a step in ten dimensions. The
    polynomials take w itself, so log loses no accuracy against log1p.

    Source: Giles (2012), "Approximating the erfinv function".
    """
    if (wide := at_least_single(uniform.dtype)) != uniform.dtype:
        return normals(uniform.astype(wide)).astype(uniform.dtype)
    root_two = jnp.asarray(math.sqrt(2), uniform.dtype)
    if uniform.dtype != jnp.float32:
        return root_two * jax.lax.erf_inv(2 * uniform - 1)
    w = -jnp.log(4 * uniform * (1 - uniform))
    central, tail = _horner(_CENTRAL, w - 2.5), _horner(_TAIL, jnp.sqrt(w) - 3)
    return root_two * (2 * uniform - 1) * jnp.where(w < 5, central, tail)


def log_gammas(rng_key: PRNGKey, shape: Float[Array, "*dims"]) -> Float[Array, "*dims"]:
    """Return logs of gamma variates of unit rate, all elements side by side.

    Method of Marsaglia & Tsang. With d = a - 1/3 and c = 1 / sqrt(9 d), the proposal is ``d (1 + c z)^3`` for a normal
    z. It is accepted with a probability above 0.95 for every a >= 1, otherwise drawn again. Shapes below 1 follow from
    ``log G(a) = log G(a + 1) + log(U) / a``. Logs, because a variate of a small shape is often below every positive
    number of the dtype: one in six of shape 0.02 in float32. ``jax.random.gamma`` draws one element after the other on
    CPU, at 680 ns a draw.

    Forward-mode differentiable in the shape parameter: the derivative is that of the accepted proposal.

    Args:
        rng_key: Key of the draws.
        shape: Shape parameters a, an array of any dimensions.

    Returns:
        Logs of the variates, an array like ``shape``; NaN where the shape parameter is not a positive number, for which
        no proposal would ever be accepted.

    Source: Marsaglia & Tsang (2000).
    """
    valid, dtype = (shape > 0) & jnp.isfinite(shape), shape.dtype
    shape = jnp.where(valid, shape, 1.0).astype(at_least_single(dtype))
    small = shape < 1
    d = jnp.where(small, shape + 1, shape) - jnp.asarray(1 / 3, shape.dtype)
    c = 1 / jnp.sqrt(9 * d)

    def propose(stream: Array | int) -> Array:
        """Propose every element once, 0 where rejected; a second output would make XLA hash twice."""
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
        power, _ = _uniform_pair(rng_key, shape.shape, shape.dtype, 2**32 - 1)  # a stream that no round reaches
        return jnp.where(small, log_value + jnp.log(power) / shape, log_value)

    drawn = jax.lax.cond(jnp.any(small), boost, lambda log_value: log_value, jnp.log(value))
    return jnp.where(valid, drawn, jnp.nan).astype(dtype)


def _horner(coefficients: tuple[float, ...], x: Array) -> Array:
    """Evaluate a polynomial, highest power first."""
    total = jnp.full_like(x, coefficients[0])
    for coefficient in coefficients[1:]:
        total = coefficient + total * x
    return total


# Up to this many categories, each is a separate array. Programs grow with their number: with 111 categories XLA
# compiled for 18 s, against 1.1 s with a scan.
MAX_COLUMNS = 8


def check_values(dtype: Any, values: Sequence[int | float], who: str) -> None:
    """Raise if an array of this dtype cannot represent the values.

    Integers must be exact. Reals may be rounded, but must stay finite and distinct.

    Args:
        dtype: Dtype of the array.
        values: The values.
        who: The subject of the error message.

    Raises:
        ValueError: A value cannot be represented.
    """
    if jnp.issubdtype(dtype, jnp.floating):
        with np.errstate(over="ignore"):  # overflow is reported below
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
    """Draws of `inverse_cdf`.

    Attributes:
        category: Drawn categories, the shape of the uniforms.
        margin: Distance of each uniform to the nearest step of its distribution function; inf for a single category.
        failed: Whether some probabilities were not finite, a scalar; the categories drawn from them are meaningless.
    """

    category: Array
    margin: Array
    failed: Array


def inverse_cdf(logits: Float[Array, "*dims K"], uniform: Float[Array, "*dims"]) -> DiscreteDraw:
    """Return the least k with ``p[0] + ... + p[k] >= u`` and p[k] > 0, p = softmax(logits).

    Monotone in u. Under a shared uniform, draws from two ordered distributions are ordered too, and draws from two
    distributions p and q with the distribution functions F_p and F_q differ with a probability of at most

        sum_k |F_p(k) - F_q(k)|

    which is exact if they differ by one category at most. For two categories this is the total variation distance, the
    least of all couplings. For more it may be larger, and depends on the order of the categories. Computed at least in
    float32: in narrower dtypes rare categories would be rounded away. The uniforms should not have been rounded to one
    either.

    Args:
        logits: Unnormalised log probabilities of K categories, shape ``(..., K)``.
        uniform: Uniforms u on (0, 1), shape ``(...)``.

    Returns:
        Categories, shape ``(...)``, and how close they were to another outcome.
    """
    draw = _by_columns if logits.shape[-1] <= MAX_COLUMNS else _by_scan
    return draw(logits.astype(at_least_single(logits.dtype)), uniform.astype(at_least_single(uniform.dtype)))


def _by_columns(logits: Array, uniform: Array) -> DiscreteDraw:
    """Draw with one array per category: XLA makes one pass, instead of a reduction and a scan over a short axis."""
    columns = [logits[..., k] for k in range(logits.shape[-1])]
    largest = reduce(jnp.maximum, columns)
    steps = list(accumulate(jnp.exp(column - largest) for column in columns))
    total = steps.pop()
    gaps = [uniform - step / total for step in steps]
    nearest = reduce(jnp.minimum, (jnp.abs(gap) for gap in gaps), jnp.full_like(uniform, jnp.inf))
    return DiscreteDraw(
        category=sum(((gap > 0).astype(int) for gap in gaps), jnp.zeros(uniform.shape, int)),
        margin=nearest,
        failed=~jnp.all(jnp.isfinite(total)),
    )


def _by_scan(logits: Array, uniform: Array) -> DiscreteDraw:
    """Draw with a cumulative sum over the categories.

    XLA adds in an order of its own, so that by rounding a step may be higher than the one before without any mass.
    """
    weights = jnp.exp(logits - jnp.max(logits, axis=-1, keepdims=True))
    steps = jnp.cumsum(weights, axis=-1)
    total = steps[..., -1:]
    gaps = uniform[..., None] - steps / total
    number, possible = jnp.arange(logits.shape[-1]), weights > 0
    last = jnp.max(jnp.where(possible, number, 0), axis=-1)
    category = jnp.min(jnp.where(possible & ~(gaps > 0), number, last[..., None]), axis=-1)
    return DiscreteDraw(
        category=category.astype(int),
        margin=jnp.min(jnp.abs(gaps[..., :-1]), axis=-1, initial=jnp.inf),
        failed=~jnp.all(jnp.isfinite(total)),
    )
