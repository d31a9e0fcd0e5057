"""Benchmarks. ``python -m benchmarks`` runs the quick subset, ``python -m benchmarks.NAME`` one module in full."""
