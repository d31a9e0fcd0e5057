"""Uniform and normal noise of one step from its key, two numbers to a hash.

On two CPU cores the noise of a tiny model costs as much as its steps. `jax.random` spends one threefry hash for each
float and two for each split; here one hash of the step's key and a counter gives two floats, and nothing is split.
The hash is JAX's own; the quality of the numbers is that of `jax.random.uniform` (23 or 52 bits).
"""

import jax
import jax.numpy as jnp
from jax.extend.random import threefry_2x32

from pmcmc._types import Array, PRNGKey


def uniforms(rng_key: PRNGKey, count: int, dtype) -> Array:
    """``count`` independent uniforms on the open interval (0, 1), a function of the key alone.

    Integers from the hash are centred in their cells, so that 0 and 1 never occur and logs stay finite.
    """
    double = jnp.finfo(dtype).bits > 32
    num_hashes = count if double else -(-count // 2)
    counter = jnp.concatenate([jnp.arange(num_hashes, dtype=jnp.uint32), jnp.zeros(num_hashes, jnp.uint32)])
    words = threefry_2x32(_key_pair(rng_key), counter)
    if double:
        high, low = words[:num_hashes].astype(jnp.uint64), words[num_hashes:].astype(jnp.uint64)
        return ((high << 20 | low >> 12).astype(dtype) + 0.5) * 2.0**-52
    # The centre of a cell, (n + 1/2) 2^-23 with n < 2^23, has 24 bits: exact in float32.
    return (((words[:count] >> 9).astype(jnp.float32) + 0.5) * 2.0**-23).astype(dtype)


def normals(uniform: Array) -> Array:
    """Standard normals from uniforms by the inverse distribution function, ``sqrt(2) erfinv(2 u - 1)``."""
    return jnp.sqrt(jnp.asarray(2.0, uniform.dtype)) * jax.lax.erf_inv(2 * uniform - 1)


def _key_pair(rng_key: PRNGKey) -> Array:
    data = rng_key if jnp.issubdtype(rng_key.dtype, jnp.uint32) else jax.random.key_data(rng_key)
    # Keys of another implementation (rbg has four words) are hashed down to the two that threefry takes.
    return data if data.shape == (2,) else jax.random.bits(rng_key, (2,), jnp.uint32)
