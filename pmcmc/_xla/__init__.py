"""Everything that works around XLA and JAX: compilation and its caches, traces of user code, fused loops, memory."""
