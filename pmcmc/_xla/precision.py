"""Products of float32 numbers in float32, on devices that would round their operands first.

By default XLA computes products on GPUs in TF32, which cuts operands to 10 bits, and on TPUs in bfloat16; a product of
one vector it may compute in float32. With operands of 10 bits coupled chains stay about 1e-3 apart and never merge, and
one lane and many lanes compute different functions. So every program that evaluates a model asks for float32, except
for products whose precision is chosen: by ``precision=`` in the model, by ``jax_default_matmul_precision`` or by
``jax.default_matmul_precision`` around the call.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from pmcmc._xla import default_platform

# Names of float32 among the values of jax_default_matmul_precision; other names cut operands of float32 products.
FULL = ("highest", "float32", "F32_F32_F32")
_WIDE = (jnp.float32, jnp.complex64)


def in_full(equation: Any) -> Callable[..., Any] | None:
    """Return the product with all bits of its operands; None if nothing is cut, or if its precision was chosen.

    A rule of `pmcmc._xla.equations`.
    """
    if equation.params["precision"] is not None or any(v.aval.dtype not in _WIDE for v in equation.invars[:2]):
        return None
    params = equation.params | {"precision": (jax.lax.Precision.HIGHEST, jax.lax.Precision.HIGHEST)}
    return partial(equation.primitive.bind, **params)


RULES = {"dot_general": in_full, "conv_general_dilated": in_full}


def asked_for() -> str:
    """Return the precision below float32 that the user's settings of JAX ask for; "" if they do not, or on a CPU."""
    asked = jax.config.jax_default_matmul_precision  # type: ignore[attr-defined]
    return "" if asked is None or asked in FULL or default_platform() == "cpu" else str(asked)
