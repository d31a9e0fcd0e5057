"""Benchmarks. ``python -m benchmarks`` runs a quick subset, ``python -m benchmarks.NAME`` one module in full."""
