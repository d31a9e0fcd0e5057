"""Keep compiled programs between processes, in JAX's persistent compilation cache; see `cache_programs`."""

import hashlib
import os
import platform
import re
import sys
from pathlib import Path

import jax
import jaxlib
from jax.experimental.compilation_cache import compilation_cache


def cache_programs(folder: str | Path | None = None, *, max_bytes: int = 4 * 2**30) -> Path:
    """Keep compiled programs on disk, so that the next process with the same model and shapes need not compile.

    This switches on JAX's persistent compilation cache for all programs of this process, of other packages, too. Call
    it before sampling. Programs are found by what they compute: new data of the same shapes find them, a changed model
    does not, and no draw depends on the cache. pmcmc never calls this by itself.

    Args:
        folder: Where programs are kept; machines with other processors should not share it. None: the folder that
            ``jax_compilation_cache_dir`` names, if it is set, and otherwise one in the user's cache folder for this
            kind of processor and version of jaxlib.
        max_bytes: Programs that were not used for longest are deleted if the programs in the folder take more bytes
            than this. Done once, at this call. Other files in the folder are left alone.

    Returns:
        The folder.

    Raises:
        OSError: The folder cannot be made.

    Example:
        >>> import pmcmc, tempfile
        >>> folder = pmcmc.cache_programs(tempfile.mkdtemp())
    """
    named = folder or jax.config.values["jax_compilation_cache_dir"] or _user_folder()
    path = Path(named).expanduser()
    path.mkdir(parents=True, exist_ok=True)
    _delete_unused(path, max_bytes)
    jax.config.update("jax_compilation_cache_dir", str(path))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)  # small programs are many
    jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)
    compilation_cache.reset_cache()  # it may have been found to be off already
    return path


def _user_folder() -> Path:
    """Return a folder for programs of this machine: those of another processor may not run here."""
    if sys.platform == "win32":
        root = Path(os.environ.get("LOCALAPPDATA", "~"))
    elif sys.platform == "darwin":
        root = Path("~/Library/Caches")
    else:
        root = Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache")
    kind = hashlib.sha256("\n".join((platform.machine(), _processor(), jaxlib.__version__)).encode()).hexdigest()
    return root.expanduser() / "pmcmc" / f"programs-{kind[:12]}"


def _processor() -> str:
    """Return the instruction sets of the processor, or its name where the system does not list them."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor()
    return next((line for line in lines if line.startswith(("flags", "Features"))), platform.processor())


def _is_program(file: Path) -> bool:
    """Whether JAX's cache wrote this file; a folder that the user names may hold anything else."""
    return re.fullmatch(r".+-[0-9a-f]{64}-(cache|atime)", file.name) is not None and file.is_file()


def _delete_unused(folder: Path, max_bytes: int) -> None:
    """Delete the programs that were not used for longest, until the others take at most ``max_bytes``."""
    found = []
    for file in filter(_is_program, folder.iterdir()):
        try:
            status = file.stat()
        except FileNotFoundError:  # another process has deleted it
            continue
        found.append((max(status.st_atime, status.st_mtime), status.st_size, file))
    total = sum(size for _, size, _ in found)
    for _, size, file in sorted(found, key=lambda entry: entry[0]):
        if total <= max_bytes:
            break
        file.unlink(missing_ok=True)
        total -= size
