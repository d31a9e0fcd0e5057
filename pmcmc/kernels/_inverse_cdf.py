"""Discrete values by inverse CDF: one shared uniform moves coupled chains the same way."""

from collections.abc import Sequence
from functools import reduce
from itertools import accumulate
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np

from pmcmc._types import Array, Float

# Up to so many categories are one array each. Programs grow with them: 111 took XLA 18 s to compile, 1.1 by a scan.
MAX_COLUMNS = 8


def check_values(dtype: Any, values: Sequence[int | float], who: str) -> None:
    """Raise where an array of this dtype cannot hold the values, each as itself or, for reals, rounded but apart.

    who: begins the sentence.

    Raises:
        ValueError: it cannot.
    """
    if jnp.issubdtype(dtype, jnp.floating):
        with np.errstate(over="ignore"):  # it is told below
            held = np.asarray(values, float).astype(dtype)
        lost = [v for v, x in zip(values, held, strict=True) if not np.isfinite(x)]
        lost = lost or ([] if len(np.unique(held)) == len(held) else list(values))
    else:
        low, high = (0, 1) if jnp.issubdtype(dtype, bool) else (jnp.iinfo(dtype).min, jnp.iinfo(dtype).max)
        lost = [v for v in values if v != int(v) or not low <= v <= high]
    if lost:
        some = ", ".join(map(str, lost[:3])) + (", ..." if len(lost) > 3 else "")
        raise ValueError(
            f"{who} has dtype {jnp.dtype(dtype)}, which cannot hold {some}: start from an array of another dtype, or "
            "give other values."
        )


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
    draw = _by_columns if logits.shape[-1] <= MAX_COLUMNS else _by_scan
    return draw(logits, uniform)


def _by_columns(logits: Array, uniform: Array) -> DiscreteDraw:
    """In place of a reduction and a scan over a short axis, XLA makes one pass over the elements."""
    columns = [logits[..., k] for k in range(logits.shape[-1])]
    largest = reduce(jnp.maximum, columns)
    steps = list(accumulate(jnp.exp(column - largest) for column in columns))
    total = steps.pop()
    gaps = [uniform - step / total for step in steps]
    nearest = reduce(jnp.minimum, (jnp.abs(gap) for gap in gaps), jnp.full_like(uniform, jnp.inf))
    return DiscreteDraw(
        category=sum(((gap > 0).astype(int) for gap in gaps), jnp.zeros(uniform.shape, int)),
        margin=jnp.min(nearest, initial=jnp.inf),
        failed=~jnp.all(jnp.isfinite(total)),
    )


def _by_scan(logits: Array, uniform: Array) -> DiscreteDraw:
    steps = jnp.cumsum(jnp.exp(logits - jnp.max(logits, axis=-1, keepdims=True)), axis=-1)
    total = steps[..., -1:]
    gaps = uniform[..., None] - steps[..., :-1] / total
    return DiscreteDraw(
        category=jnp.sum(gaps > 0, axis=-1, dtype=int),
        margin=jnp.min(jnp.abs(gaps)),
        failed=~jnp.all(jnp.isfinite(total)),
    )
