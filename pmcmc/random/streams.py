"""Keys of chains and noise of steps: the noise of step t of chain c is a function of the run's key, c and t alone."""

import math
from functools import partial
from typing import Any, Protocol, runtime_checkable

import jax
import jax.numpy as jnp

from pmcmc._typing import Array, PRNGKey, PyTree
from pmcmc.random.threefry import fold_in, key_pair, raw_keys_are_threefry

# Noise is drawn in pieces: first as many large ones as fit into the block length, each this share of the capacity, then
# small ones of this many steps.
NOISE_PIECE, SMALL_PIECE = 1 / 8, 64


@partial(jax.jit, static_argnames="num_chains")
def chain_keys(rng_key: PRNGKey, *, num_chains: int) -> Array:
    """Return one key per chain, shape ``(num_chains,)``; the key of a chain does not depend on their number."""
    return jax.vmap(lambda c: jax.random.fold_in(rng_key, c))(jnp.arange(num_chains))


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
        target: Any to sample.
        kernel: DrawsNoise, which draws the noise of a step.
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
