"""Keys of chains and noise of steps: the noise of step t of chain c is a function of the run's key, c and t alone."""

from functools import partial
from typing import Any, Protocol, runtime_checkable

import jax
import jax.numpy as jnp

from pmcmc._typing import Array, PRNGKey, PyTree
from pmcmc.random.threefry import fold_in, key_pair, raw_keys_are_threefry


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
