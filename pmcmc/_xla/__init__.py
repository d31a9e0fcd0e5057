"""What works around XLA: programs and their caches, traces of user code, fused loops, memory."""
