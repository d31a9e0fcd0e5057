"""Whether what is asked for fits into memory, before anything is sampled: the system would only end the process."""

from pathlib import Path

import jax
import numpy as np

from pmcmc.sampling._engine import SEGMENT_BYTES, Engine

# Limit and use of a control group, as a container sees its own: version 2, then version 1.
_GROUPS = (
    ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory.current"),
    ("/sys/fs/cgroup/memory/memory.limit_in_bytes", "/sys/fs/cgroup/memory/memory.usage_in_bytes"),
)


def available_bytes() -> float:
    """Host memory that this process may still take; inf where the system does not tell."""
    found = [float("inf")]
    for line in _read("/proc/meminfo").splitlines():
        if line.startswith("MemAvailable:"):
            found.append(1024.0 * int(line.split()[1]))
    for limit, use in _GROUPS:
        most, taken = _read(limit).strip(), _read(use).strip()
        if most.isdigit() and taken.isdigit():
            found.append(float(most) - float(taken))
    return min(found)


def check_memory(engine: Engine, num_steps: int, num_kept: int) -> None:
    """Raise where the draws and one segment of a solve are larger than what is available.

    engine: of shapes, if there is no more yet. num_kept: draws of each chain.

    Raises:
        MemoryError: how much is needed and available, and what to do.
    """
    one = sum(np.prod(x.shape) * x.dtype.itemsize for x in jax.tree.leaves(engine.record_shapes))
    draws = float(one * num_kept * engine.num_chains)
    step = engine.bytes_per_step
    needed, available = draws + max(step, min(num_steps * step, SEGMENT_BYTES)), available_bytes()
    if needed > available:
        raise MemoryError(
            f"{num_kept:,} draws of {engine.num_chains} chain(s) need about {_size(needed)}, {_size(draws)} of it for "
            f"the draws themselves, and {_size(available)} are available. Keep fewer by thinning=, or sample fewer at "
            "a time: save the chain, load it where there is room, and extend it."
        )


def _read(path: str) -> str:
    try:
        return Path(path).read_text()
    except OSError:
        return ""


def _size(number: float) -> str:
    return f"{number / 2**30:,.1f} GiB" if number >= 2**29 else f"{number / 2**20:,.1f} MiB"
