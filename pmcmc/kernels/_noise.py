"""Uniform and normal noise of one step from its key, two floats to a hash.

On two CPU cores the noise of a tiny model costs as much as its steps. ``jax.random`` spends one hash on each float and
two on each split; here a hash of the step's key and a counter gives two floats, and nothing is split.
"""

import jax
import jax.numpy as jnp

from pmcmc._threefry import key_pair, threefry_2x32
from pmcmc._types import Array, PRNGKey


def uniforms(rng_key: PRNGKey, count: int, dtype) -> Array:
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


def normals(uniform: Array) -> Array:
    """Standard normals from uniforms by the inverse distribution function, ``sqrt(2) erfinv(2 u - 1)``."""
    return jnp.sqrt(jnp.asarray(2.0, uniform.dtype)) * jax.lax.erf_inv(2 * uniform - 1)
