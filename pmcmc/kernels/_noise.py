"""Uniform and normal noise of one step from its key, two floats to a hash.

On two CPU cores the noise of a tiny model costs as much as its steps. ``jax.random`` spends one hash on each float and
two on each split; here a hash of the step's key and a counter gives two floats, and nothing is split.
"""

import math

import jax
import jax.numpy as jnp

from pmcmc._threefry import key_pair, threefry_2x32
from pmcmc._types import Array, Float, PRNGKey


def uniforms(rng_key: PRNGKey, count: int, dtype) -> Float[Array, " count"]:
    """``count`` independent uniforms on the open interval (0, 1), a function of the key alone.

    Integers from the hash are centred in their cells, so that 0 and 1 never occur and logs stay finite. 23 bits in
    float32 and 52 in float64, as in ``jax.random.uniform``.
    """
    double = jnp.finfo(dtype).bits > 32
    counter = jnp.arange(count if double else -(-count // 2), dtype=jnp.uint32)
    high, low = threefry_2x32(key_pair(rng_key), counter, jnp.zeros_like(counter))
    if double:
        wide = high.astype(jnp.uint64) << 20 | low.astype(jnp.uint64) >> 12
        return (wide.astype(dtype) + 0.5) * 2.0**-52
    # The centre of a cell, (n + 1/2) 2^-23 with n < 2^23, has 24 bits: exact in float32.
    words = jnp.concatenate([high, low])[:count]
    return (((words >> 9).astype(jnp.float32) + 0.5) * 2.0**-23).astype(dtype)


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


def _horner(coefficients: tuple[float, ...], x: Array) -> Array:
    total = jnp.full_like(x, coefficients[0])
    for coefficient in coefficients[1:]:
        total = coefficient + total * x
    return total
