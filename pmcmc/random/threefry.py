"""JAX's own hash, written out.

``jax.random`` runs threefry on CPU as a loop whose every round goes through memory: 47 ns a hash for a million
hashes. The same twenty rounds as plain arithmetic fuse into one pass over registers. The numbers are the same to the
bit (a test compares them), so keys made here and keys made by ``jax.random`` are interchangeable.

Source: Salmon et al. 2011, "Parallel random numbers: as easy as 1, 2, 3", threefry-2x32-20.
"""

from contextlib import AbstractContextManager, nullcontext

import jax
import jax.numpy as jnp

from pmcmc._typing import Array, PRNGKey

IMPL = "threefry2x32"


_ROTATIONS = ((13, 15, 26, 6), (17, 29, 16, 24))


_PARITY = 0x1BD11BDA


def threefry_2x32(key: Array, first: Array, second: Array) -> tuple[Array, Array]:
    """Hash pairs of 32-bit words elementwise under a key of two words, shape ``(2,)``."""
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
    """The two words of a threefry key, typed or raw; the words of a longer key are hashed down to two.

    Hashed here and not by the key's own implementation: bits of ``rbg`` under `jax.vmap` are others than alone.
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
    """The same key, typed, where it is a threefry key; else one made of its words. Not for batches of keys."""
    typed = jnp.issubdtype(rng_key.dtype, jax.dtypes.prng_key)
    if typed and str(jax.random.key_impl(rng_key)) == IMPL:
        return rng_key
    return jax.random.wrap_key_data(key_pair(rng_key), impl=IMPL)


def raw_keys_are_threefry() -> AbstractContextManager:
    """Within it ``jax.random`` takes the raw keys (2,) of steps for what they are, whatever its default is."""
    if jax.config.jax_default_prng_impl == IMPL:  # type: ignore[attr-defined]
        return nullcontext()
    return jax.default_prng_impl(IMPL)


def fold_in(pair: Array, number: Array) -> Array:
    """``jax.random.fold_in`` of a threefry key: the raw key ``(2,)`` of one step."""
    return jnp.stack(threefry_2x32(pair, jnp.uint32(0), number.astype(jnp.uint32)))
