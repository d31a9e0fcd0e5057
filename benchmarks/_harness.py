"""Timing in one process: alternating runs, medians and spreads, success stored beside time, JSON out."""

import json
import platform
import time
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

import jax
import numpy as np

RESULTS = Path(__file__).parent / "results"
SHARED = Path(__file__).parents[2] / "shared"


def environment() -> dict[str, Any]:
    """Device and versions a figure belongs to."""
    device = jax.devices()[0]
    return {
        "device": device.device_kind if device.platform != "cpu" else f"cpu, {jax.device_count()} device(s)",
        "cores": len(__import__("os").sched_getaffinity(0)) if hasattr(__import__("os"), "sched_getaffinity") else None,
        "machine": platform.machine(),
        "python": platform.python_version(),
        "jax": jax.__version__,
        "jaxlib": version("jaxlib"),
        "x64": bool(jax.config.read("jax_enable_x64")),
    }


def alternate(
    runs: dict[str, Callable[[], Any]], repeats: int = 5, seconds_of: Callable[[Any], float] | None = None
) -> dict[str, dict[str, float]]:
    """Time each callable ``repeats`` times, A B A B ..., after one run of each that compiles.

    Alternation lets a ratio hold when the machine's speed drifts. Returns first (compile included), median, min, max.
    seconds_of: what a result itself says it took, in place of the wall clock.
    """
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(repeats + 1):
        for name, run in runs.items():
            begin = time.perf_counter()
            result = jax.block_until_ready(run())
            wall = time.perf_counter() - begin
            seconds[name].append(wall if seconds_of is None else seconds_of(result))
    return {
        name: {
            "first_s": times[0],
            "median_s": float(np.median(times[1:])),
            "min_s": min(times[1:]),
            "max_s": max(times[1:]),
        }
        for name, times in seconds.items()
    }


def ratio(timing: dict[str, dict[str, float]], slow: str, fast: str) -> float:
    """Median over median."""
    return timing[slow]["median_s"] / timing[fast]["median_s"]


def save(name: str, rows: list[dict[str, Any]]) -> Path:
    """Write rows with the environment they belong to."""
    RESULTS.mkdir(exist_ok=True)
    path = RESULTS / f"{name}.json"
    path.write_text(json.dumps({"environment": environment(), "rows": rows}, indent=1) + "\n")
    return path
