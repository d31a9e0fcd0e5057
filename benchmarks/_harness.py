"""Timing and result files: alternating runs in one process, medians and spreads, bytes, and rows in JSON.

Every row records whether its run succeeded, besides its times.
"""

import json
import os
import platform
import re
import resource
import time
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

import jax
import numpy as np

RESULTS = Path(__file__).parent / "results"
SKETCHES = Path(__file__).parents[1] / "build" / "benchmarks"  # small runs, which are not kept
SHARED = Path(__file__).parents[2] / "shared"


def device_name() -> str:
    """Return the name of JAX's default device as part of a file name: ``cpu``, ``nvidia-h100-80gb-hbm3``."""
    return re.sub(r"[^a-z0-9]+", "-", jax.devices()[0].device_kind.lower()).strip("-")


def environment() -> dict[str, Any]:
    """Return the device and the versions that figures belong to."""
    device = jax.devices()[0]
    return {
        "device": device.device_kind if device.platform != "cpu" else f"cpu, {jax.device_count()} device(s)",
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else None,
        "machine": platform.machine(),
        "python": platform.python_version(),
        "jax": jax.__version__,
        "jaxlib": version("jaxlib"),
        "x64": bool(jax.config.read("jax_enable_x64")),
    }


def peak_bytes() -> dict[str, int]:
    """Return the largest resident memory of this process so far, and of the device if it keeps count."""
    stats = jax.devices()[0].memory_stats() or {}
    device = {"device": stats["peak_bytes_in_use"]} if "peak_bytes_in_use" in stats else {}
    status = Path("/proc/self/status")  # getrusage includes what the parent used when it forked
    found = re.search(r"VmHWM:\s*(\d+)", status.read_text()) if status.exists() else None
    resident = int(found[1]) if found else resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return {"resident": 1024 * resident, **device}


def program_bytes(program: Any) -> dict[str, int]:
    """Return the bytes of a compiled program's arguments, and of what it needs besides them."""
    stats = program.memory_analysis()
    fresh = stats.temp_size_in_bytes + stats.output_size_in_bytes - stats.alias_size_in_bytes
    return {"arguments": stats.argument_size_in_bytes, "beside them": fresh}


def alternate(
    runs: dict[str, Callable[[], Any]],
    repeats: int = 5,
    seconds_of: Callable[[Any], float] | None = None,
    budget: float = float("inf"),
) -> dict[str, dict[str, float]]:
    """Time each callable ``repeats`` times, A B A B ..., after one run of each that compiles.

    Because runs alternate, ratios stay valid when the machine's speed drifts.

    Args:
        runs: Callables by name.
        repeats: Timed runs of each.
        seconds_of: Seconds of a result, used instead of the wall clock.
        budget: Seconds after which three timed runs of each are enough.

    Returns:
        First (compilation included), median, smallest and largest seconds of each.
    """
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    began = time.perf_counter()
    for number in range(repeats + 1):
        if number > 3 and time.perf_counter() - began > budget:
            break
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
    """Return the ratio of two medians."""
    return timing[slow]["median_s"] / timing[fast]["median_s"]


def with_others(name: str, rows: list[dict[str, Any]], keys: tuple[str, ...], folder: Path = RESULTS) -> list[dict]:
    """Prepend the rows of the result file that these do not replace: those that differ from all of them in some key."""
    path = folder / f"{name}.json"
    what = lambda row: [row.get(key) for key in keys]
    new = [what(row) for row in rows]
    old = json.loads(path.read_text())["rows"] if path.exists() else []
    return [row for row in old if what(row) not in new] + rows


def save(name: str, rows: list[dict[str, Any]], folder: Path = RESULTS, **facts: Any) -> Path:
    """Write rows with the environment they belong to, and facts about it."""
    folder.mkdir(exist_ok=True, parents=True)
    path = folder / f"{name}.json"
    path.write_text(json.dumps({"environment": environment() | facts, "rows": rows}, indent=1) + "\n")
    return path
