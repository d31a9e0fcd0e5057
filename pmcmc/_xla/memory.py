"""Host memory: how much there is."""

from pathlib import Path

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


def check_available(needed: int, remedy: str) -> None:
    """Raise where so many bytes are not to be had.

    Raises:
        MemoryError: with the remedy.
    """
    if needed > (available := available_bytes()):
        raise MemoryError(f"the draws need {size_text(needed)}, and {size_text(available)} are available. {remedy}")


def _read(path: str) -> str:
    try:
        return Path(path).read_text()
    except OSError:
        return ""


def size_text(number: float | int) -> str:
    """For people: a number of bytes in MiB, or in GiB from half of one on."""
    return f"{number / 2**30:,.1f} GiB" if number >= 2**29 else f"{number / 2**20:,.1f} MiB"
