"""The explicit hash equals JAX's own to the bit."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.extend.random import threefry_2x32 as jax_threefry

from pmcmc.random.streams import fold_in, key_pair, threefry_2x32

pytestmark = pytest.mark.optimized


def test_hash_equals_jax(rng_key: jax.Array) -> None:
    words = jax.random.bits(rng_key, (2, 1000), jnp.uint32)
    pair = jax.random.key_data(rng_key)
    ours = jnp.concatenate(threefry_2x32(pair, words[0], words[1]))
    np.testing.assert_array_equal(ours, jax_threefry(pair, words.reshape(-1)))


@pytest.mark.parametrize("seed", [0, 12345])
def test_fold_in_equals_jax(seed: int) -> None:
    key = jax.random.key(seed)
    for number in (0, 1, 2**31 + 7):
        theirs = jax.random.key_data(jax.random.fold_in(key, number))
        np.testing.assert_array_equal(fold_in(key_pair(key), jnp.asarray(number)), theirs)


def test_raw_and_typed_keys_agree_and_other_implementations_work(rng_key: jax.Array) -> None:
    np.testing.assert_array_equal(key_pair(jax.random.key_data(rng_key)), key_pair(rng_key))
    rbg = key_pair(jax.random.key(3, impl="rbg"))
    assert rbg.shape == (2,)
    assert not np.array_equal(rbg, key_pair(jax.random.key(4, impl="rbg")))
