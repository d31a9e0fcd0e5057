"""JAX's hash threefry-2x32, written as plain arithmetic.

On CPU ``jax.random`` runs threefry as a loop whose every round goes through memory: 47 ns a hash for a million
hashes. The same twenty rounds as plain arithmetic fuse into one pass over registers. The results are identical bit for
bit (a test compares them), so keys made here and by ``jax.random`` are interchangeable.

Source: Salmon et al. (2011), "Parallel random numbers: as easy as 1, 2, 3", threefry-2x32-20.
"""

from contextlib import AbstractContextManager, nullcontext

import jax
import jax.numpy as jnp

from pmcmc._typing import Array, PRNGKey

IMPL = "threefry2x32"
_ROTATIONS = ((13, 15, 26, 6), (17, 29, 16, 24))
_PARITY = 0x1BD11BDA


def threefry_2x32(key: Array, first: Array, second: Array) -> tuple[Array, Array]:
    """Hash pairs of 32-bit words elementwise.

    Args:
        key: Two words, shape ``(2,)``.
        first: First word of each pair.
        second: Second word of each pair, of the same shape.

    Returns:
        Both words of each hash.
    """
    schedule = (key[0], key[1], key[0] ^ key[1] ^ jnp.uint32(_PARITY))
    x, y = first + schedule[0], second + schedule[1]
    for group in range(5):
        for distance in _ROTATIONS[group % 2]:
            x = x + y
            y = (y << jnp.uint32(distance)) | (y >> jnp.uint32(32 - distance))
            y = x ^ y
        x = x + schedule[(group + 1) % 3]
        y = y + schedule[(group + 2) % 3] + jnp.uint32(group + 1)
    return x, y


def key_pair(rng_key: PRNGKey) -> Array:
    """Return a key, typed or raw, as two words; a longer key is hashed down to two.

    It is hashed here rather than by the key's own implementation, because ``rbg`` gives other bits under ``jax.vmap``
    than without.
    """
    data = rng_key if jnp.issubdtype(rng_key.dtype, jnp.uint32) else jax.random.key_data(rng_key)
    if data.shape == (2,):
        return data
    words = jnp.concatenate([data, jnp.zeros(data.size % 2, jnp.uint32)])
    pair = jnp.array([data.size, 0], jnp.uint32)
    for place in range(0, words.size, 2):
        pair = jnp.stack(threefry_2x32(pair, words[place], words[place + 1]))
    return pair


def threefry_key(rng_key: PRNGKey) -> PRNGKey:
    """Return the key itself if it is a typed threefry key, otherwise a typed one made of its words.

    Not for batches of keys.
    """
    typed = jnp.issubdtype(rng_key.dtype, jax.dtypes.prng_key)
    if typed and str(jax.random.key_impl(rng_key)) == IMPL:
        return rng_key
    return jax.random.wrap_key_data(key_pair(rng_key), impl=IMPL)


def raw_keys_are_threefry() -> AbstractContextManager:
    """Context in which ``jax.random`` reads raw keys ``(2,)`` as threefry keys, whatever its default implementation."""
    if jax.config.jax_default_prng_impl == IMPL:  # type: ignore[attr-defined]
        return nullcontext()
    return jax.default_prng_impl(IMPL)


def fold_in(pair: Array, number: Array) -> Array:
    """Fold ``number`` into a raw threefry key as ``jax.random.fold_in`` does; returns a raw key ``(2,)``."""
    return jnp.stack(threefry_2x32(pair, jnp.uint32(0), number.astype(jnp.uint32)))
