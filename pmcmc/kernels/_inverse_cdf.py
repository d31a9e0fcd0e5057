"""Discrete values by inverse CDF: one shared uniform moves coupled chains the same way."""

from typing import NamedTuple

import jax.numpy as jnp

from pmcmc._types import Array, Float


class DiscreteDraw(NamedTuple):
    """category: (...) what was drawn. margin: least distance of a uniform to a step of its CDF, a scalar.

    failed: scalar, some probabilities were not finite; what was drawn there means nothing.
    """

    category: Array
    margin: Array
    failed: Array


def inverse_cdf(logits: Float[Array, "*dims K"], uniform: Float[Array, "*dims"]) -> DiscreteDraw:
    """The least k with ``p[0] + ... + p[k] >= u``, p = softmax(logits).

    Monotone in u: under a shared uniform the two draws from two distributions that are ordered keep that order, and
    two that are close differ with a probability near their total variation distance.
    """
    weights = jnp.exp(logits - jnp.max(logits, axis=-1, keepdims=True))
    steps = jnp.cumsum(weights, axis=-1)
    steps = steps[..., :-1] / steps[..., -1:]
    gap = uniform[..., None] - steps
    return DiscreteDraw(
        category=jnp.sum(gap > 0, axis=-1),
        margin=jnp.min(jnp.abs(gap), initial=jnp.inf),
        failed=~jnp.all(jnp.isfinite(weights)),
    )
