"""Everything that works around XLA and JAX: compilation and its caches, traces of user code, fused loops, memory."""

from typing import Any

import jax


def evaluate(equation: Any, operands: Any, params: Any = None) -> Any:
    """Evaluate the primitive of an equation of a traced program on other operands, and with other parameters if given.

    Returns:
        The result, a list if the primitive has several.
    """
    found = equation.primitive.get_bind_params(equation.params if params is None else params)
    functions, params = found if isinstance(found, tuple) else ((), found)  # jax before 0.9.2 takes functions apart
    return equation.primitive.bind(*functions, *operands, **params)


def default_platform() -> str:
    """Platform of the default device: that of ``jax.default_device`` if set, otherwise the default backend."""
    device = jax.config.jax_default_device  # type: ignore[attr-defined]
    return jax.default_backend() if device is None else getattr(device, "platform", device)
