"""Additions to few places, such as the gradient of ``alpha[index]``, as native atomic operations of a GPU.

XLA moves the operation that makes the updates of a scatter into its combiner. The gradient of ``y - alpha[index]`` adds
negated numbers, and the combiner that subtracts them has no native atomic operation: it becomes a loop of
compare-and-swap, which is hundreds of times slower where many numbers meet (jax issue 38806; seen in jaxlib 0.10.2,
0.11.1, 0.11.2 and 0.12.0.1). A barrier keeps the operation out of the combiner. From jaxlib 0.11.1 on the addition is
then native; 0.10.2 to 0.11.0 compile the loop in any case.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp


def apart(equation: Any) -> Callable[..., Any] | None:
    """Return the scatter with its updates behind a barrier; None for integers, which are added natively.

    A rule of `pmcmc._xla.equations`.
    """
    if not jnp.issubdtype(equation.invars[0].aval.dtype, jnp.inexact):
        return None
    scatter = partial(equation.primitive.bind, **equation.params)
    return lambda operand, indices, updates: scatter(operand, indices, jax.lax.optimization_barrier(updates))


RULES = {"scatter-add": apart}
