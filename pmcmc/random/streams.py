"""Keys of chains and noise of steps: the noise of step t of chain c is a function of the run's key, c and t alone.

Keys are hashed by JAX's threefry-2x32, written as plain arithmetic. On CPU ``jax.random`` runs threefry as a loop whose
every round goes through memory: 47 ns a hash for a million hashes. The same twenty rounds as plain arithmetic fuse into
one pass over registers. The results are identical bit for bit (a test compares them), so keys made here and by
``jax.random`` are interchangeable.

Source: Salmon et al. (2011), "Parallel random numbers: as easy as 1, 2, 3", threefry-2x32-20.
"""

import math
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import Any, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
import numpy as np

from pmcmc._pytree import Array, PRNGKey, PyTree

IMPL = "threefry2x32"
# Steps that a chain can take: their numbers are words of 32 bits, and would repeat after them.
MOST_STEPS = 2**32
_ROTATIONS = ((13, 15, 26, 6), (17, 29, 16, 24))
_PARITY = 0x1BD11BDA


def threefry_2x32(key: Any, first: Any, second: Any) -> tuple[Any, Any]:
    """Hash pairs of 32-bit words elementwise, of JAX or of numpy.

    Args:
        key: Two words, shape ``(2,)``.
        first: First word of each pair.
        second: Second word of each pair, of the same shape.

    Returns:
        Both words of each hash.
    """
    rounds = _rounds if isinstance(first, np.ndarray) else _jitted_rounds
    return rounds(key[0], key[1], first, second)


def _rounds(high: Any, low: Any, first: Any, second: Any) -> tuple[Any, Any]:
    """Return `threefry_2x32` for the key with these words."""
    schedule = (high, low, high ^ low ^ np.uint32(_PARITY))
    x, y = first + schedule[0], second + schedule[1]
    for group in range(5):
        for distance in _ROTATIONS[group % 2]:
            x = x + y
            y = (y << np.uint32(distance)) | (y >> np.uint32(32 - distance))
            y = x ^ y
        x = x + schedule[(group + 1) % 3]
        y = y + schedule[(group + 2) % 3] + np.uint32(group + 1)
    return x, y


# Traced once for each shape: to trace twenty rounds anew takes 7 ms, and 30 ms under ``jax.vmap``.
_jitted_rounds = jax.jit(_rounds, inline=True)


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


# Noise is drawn in pieces: first as many large ones as fit into the block length, each this share of the capacity, then
# small ones of this many steps.
NOISE_PIECE, SMALL_PIECE = 1 / 8, 64


def seed_key(seed: int) -> PRNGKey:
    """Return ``jax.random.key(seed)``, a threefry key, computed in numpy.

    Raises:
        OverflowError: The seed has more than 64 bits.
    """
    seed = int(np.int64(seed))
    wide = jax.config.jax_enable_x64  # type: ignore[attr-defined]
    return _typed(np.array([seed >> 32 if wide else 0, seed], object) & 0xFFFFFFFF)


def fold_key(rng_key: PRNGKey, number: int) -> PRNGKey:
    """Return ``jax.random.fold_in(rng_key, number)``, computed in numpy."""
    return _typed(_folded(rng_key, np.array([number]))[0])


def split_key(rng_key: PRNGKey, number: int) -> list[PRNGKey]:
    """Return the first keys of ``jax.random.split``, computed in numpy."""
    return [_typed(words) for words in _folded(rng_key, np.arange(number))]


def chain_keys(rng_key: PRNGKey, *, num_chains: int) -> Array:
    """Return one key per chain, shape ``(num_chains,)``; the key of a chain does not depend on their number."""
    return _typed(_folded(rng_key, np.arange(num_chains)))


def some_keys(keys: Array, own: slice) -> Array:
    """Return some of the keys of chains, without a program that selects them."""
    return _typed(np.asarray(jax.random.key_data(keys))[own])


def _folded(rng_key: PRNGKey, numbers: np.ndarray) -> np.ndarray:
    """Return the words of ``jax.random.fold_in(rng_key, n)`` for some numbers (n,); shape ``(n, 2)``.

    Hashed in numpy: each operation of JAX on a key would be a program to compile.
    """
    pair, numbers = np.asarray(key_pair(rng_key)), numbers.astype(np.uint32)
    return np.stack(threefry_2x32(pair, np.zeros_like(numbers), numbers), axis=-1)


def _typed(words: np.ndarray) -> PRNGKey:
    """Return typed threefry keys with these words; shape (..., 2)."""
    return jax.random.wrap_key_data(jax.device_put(words.astype(np.uint32)), impl=IMPL)


@runtime_checkable
class DrawsNoise(Protocol):
    """A kernel, as far as its noise is concerned."""

    def sample_noise(self, rng_key: PRNGKey, target: Any) -> PyTree:
        """Return the noise of one step."""
        ...


def step_noise(kernel: DrawsNoise, target: Any, chain_key: Array, steps: Array) -> PyTree:
    """Draw the noise of some steps of a chain.

    Args:
        kernel: Draws the noise of one step from the step's key.
        target: What is sampled.
        chain_key: Key of the chain, see `chain_keys`.
        steps: Numbers of the steps, shape ``(n,)``.

    Returns:
        Noise, leading axis n.
    """
    keys = jax.vmap(partial(fold_in, key_pair(chain_key)))(steps)
    with raw_keys_are_threefry():
        return jax.vmap(lambda key: kernel.sample_noise(key, target))(keys)


def numbered_noise(kernel: DrawsNoise, target: Any, pair: Array, number: Array) -> PyTree:
    """Draw the noise of one step, given the words of its chain's key and its number.

    The same as `step_noise` of one step, for programs that draw the noise of many chains step by step.
    """
    # Without the barrier XLA would hash the step's key once for every number that is drawn from it.
    key = jax.lax.optimization_barrier(fold_in(pair, number))
    with raw_keys_are_threefry():
        return kernel.sample_noise(key, target)


def lane_noise(
    target: Any,
    kernel: DrawsNoise,
    keys: Array,
    first_step: Array,
    block_length: Array,
    buffer: PyTree,
    capacity: int,
) -> PyTree:
    """Draw the noise of some lanes, in pieces of fixed size.

    Args:
        target: What is sampled.
        kernel: Kernel, which draws the noise of a step.
        keys: Key of each lane's chain; shape (lanes,).
        first_step: Number of each lane's first step; shape (lanes,).
        block_length: Steps of each lane.
        buffer: Earlier noise of this shape, which is overwritten.
        capacity: Steps for which the buffer has room.
    """

    def draw_steps(first: Array, num_steps: int) -> PyTree:
        steps = first_step[:, None] + (first + jnp.arange(num_steps))[None]
        return jax.vmap(partial(step_noise, kernel, target))(keys, steps)

    def run_piece(size: int, start: Array | int, number: Array, noise: PyTree) -> PyTree:
        first = jnp.minimum(start + number * size, capacity - size)
        write = lambda buffer, new: jax.lax.dynamic_update_slice_in_dim(buffer, new, first, 1)
        return jax.tree.map(write, noise, draw_steps(first, size))

    large, small = math.ceil(capacity * NOISE_PIECE), min(capacity, SMALL_PIECE)
    whole = block_length // large if large > small else jnp.zeros_like(block_length)
    buffer = jax.lax.fori_loop(0, whole, partial(run_piece, large, 0), buffer)
    rest = -(-(block_length - whole * large) // small)
    return jax.lax.fori_loop(0, rest, partial(run_piece, small, whole * large), buffer)
