"""Memory of the host: what a process may still allocate, and how numbers of bytes are written."""

from pathlib import Path

# Files with the limit, the use and the statistics of a container's control group, and the line of the statistics that
# has the bytes of files that nobody has used lately, which the system drops on demand. Version 2, then version 1.
_GROUPS = (
    ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory.current", "/sys/fs/cgroup/memory.stat", "inactive_file"),
    (
        "/sys/fs/cgroup/memory/memory.limit_in_bytes",
        "/sys/fs/cgroup/memory/memory.usage_in_bytes",
        "/sys/fs/cgroup/memory/memory.stat",
        "total_inactive_file",
    ),
)


def available_bytes() -> float:
    """Return the bytes of host memory that this process may still allocate; inf if the system does not say."""
    found = [float("inf")]
    for line in _read("/proc/meminfo").splitlines():
        if line.startswith("MemAvailable:"):
            found.append(1024.0 * int(line.split()[1]))
    for limit, use, statistics, droppable in _GROUPS:
        most, taken = _read(limit).strip(), _read(use).strip()
        if most.isdigit() and taken.isdigit():
            lines = (line.split() for line in _read(statistics).splitlines())
            dropped = sum(float(words[1]) for words in lines if words[:1] == [droppable])
            found.append(float(most) - float(taken) + dropped)
    return min(found)


def check_available(needed: int, remedy: str) -> None:
    """Raise if less memory is available than the draws need.

    Args:
        needed: Bytes.
        remedy: Last sentence of the error message.

    Raises:
        MemoryError: Fewer than ``needed`` bytes are available.
    """
    if needed > (available := available_bytes()):
        raise MemoryError(f"the draws need {size_text(needed)}, and {size_text(available)} are available. {remedy}")


def size_text(number: float | int) -> str:
    """Format a number of bytes in MiB, or in GiB from 0.5 GiB up."""
    return f"{number / 2**30:,.1f} GiB" if number >= 2**29 else f"{number / 2**20:,.1f} MiB"


def _read(path: str) -> str:
    """Return the text of a file; empty if it cannot be read."""
    try:
        return Path(path).read_text(encoding="utf-8")
    except OSError:
        return ""
