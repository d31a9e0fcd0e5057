"""Everything that works around XLA and JAX: compilation and its caches, traces of user code, fused loops, memory."""

import jax


def default_platform() -> str:
    """Platform of the default device: that of ``jax.default_device`` if set, otherwise the default backend."""
    device = jax.config.jax_default_device  # type: ignore[attr-defined]
    return jax.default_backend() if device is None else getattr(device, "platform", device)
