"""`cache_programs`: the folder of compiled programs, JAX's and this package's, and what is deleted from it."""

import hashlib
import os
import platform
import re
import sys
import time
from contextlib import suppress
from pathlib import Path

import jax
import jaxlib
from jax.experimental.compilation_cache import compilation_cache

from pmcmc._xla import disk
from pmcmc._xla.identity import processor

# A program's file that has been empty for longer than this was left by a process that was killed.
WRITING_SECONDS = 60.0
# Ends of the names of JAX's files: a program, and when it was used, which JAX writes if it limits the folder by itself.
PROGRAM, USED = "-cache", "-atime"


def cache_programs(folder: str | Path | None = None, *, max_bytes: int = 4 * 2**30) -> Path:
    """Keep compiled programs on disk, so that the next process with the same model and shapes need not compile.

    Call it before sampling. Programs are found by what they compute: new data of the same shapes find them, a changed
    model does not, and no draw depends on them. Programs of pmcmc are found without tracing them, unless they contain
    functions, classes or primitives of yours or run on several devices. The others are left to JAX's persistent
    compilation cache, which this switches on for the whole process, for other packages, too. Whoever can write to the
    folder can run code in your processes. pmcmc never calls this by itself.

    Args:
        folder: Where programs are kept; machines with other processors should not share it. None: the folder that
            ``jax_compilation_cache_dir`` names, if it is set, and otherwise one in the user's cache folder for this
            kind of processor and version of jaxlib.
        max_bytes: If the programs in the folder take more bytes than this, the least recently used are deleted, once,
            at this call. Unfinished files that a killed process left are deleted as well. Other files in the folder are
            left alone. A process that reads a program of JAX's cache while another one writes it warns, and compiles
            it.

    Returns:
        The folder.

    Raises:
        OSError: The folder cannot be made.

    Example:
        >>> import pmcmc, tempfile
        >>> folder = pmcmc.cache_programs(tempfile.mkdtemp())
    """
    named = folder or jax.config.values["jax_compilation_cache_dir"] or user_folder()
    path = Path(named).expanduser().absolute()
    path.mkdir(parents=True, exist_ok=True)
    _delete_unused(path, max_bytes)
    jax.config.update("jax_compilation_cache_dir", str(path))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)  # small programs are many
    jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)
    compilation_cache.reset_cache()  # it may have been found to be off already
    disk.keep_in(path)
    return path


def user_folder() -> Path:
    """Return a folder for programs of this machine: those of another processor may not run here."""
    if sys.platform == "win32":
        root = Path(os.environ.get("LOCALAPPDATA", "~"))
    elif sys.platform == "darwin":
        root = Path("~/Library/Caches")
    else:
        root = Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache")
    kind = hashlib.sha256("\n".join((platform.machine(), processor(), jaxlib.__version__)).encode()).hexdigest()
    return root.expanduser() / "pmcmc" / f"programs-{kind[:12]}"


def _is_program(file: Path) -> bool:
    """Whether this file is a program of JAX's cache or of `disk`; a folder that the user names may hold others."""
    ends = rf"({PROGRAM}|{disk.SUFFIX}(\.\w+)?)"  # the last is a file that was not written to its end
    return re.fullmatch(rf".+-[0-9a-f]{{64}}{ends}", file.name) is not None and file.is_file()


def _delete_unused(folder: Path, max_bytes: int) -> None:
    """Delete the programs that were not used for longest, until the others take at most ``max_bytes``.

    JAX reads an empty file, left by a process that was killed, as a broken program, warns, and never replaces it.
    """
    found = []
    for file in filter(_is_program, folder.iterdir()):
        try:
            status = file.stat()
        except FileNotFoundError:  # another process has deleted it
            continue
        is_whole = status.st_size and file.name.endswith((PROGRAM, disk.SUFFIX))
        if not is_whole and time.time() - status.st_mtime > WRITING_SECONDS:
            _delete(file)
            continue
        found.append((max(status.st_atime, status.st_mtime), status.st_size, file))
    total = sum(size for _, size, _ in found)
    for _, size, file in sorted(found, key=lambda entry: entry[0]):
        if total <= max_bytes:
            break
        _delete(file)
        total -= size


def _delete(program: Path) -> None:
    """Delete a program and when it was used, unless it is gone or the folder belongs to somebody else."""
    for file in (program, program.with_name(program.name.removesuffix(PROGRAM) + USED)):
        with suppress(FileNotFoundError, PermissionError):
            file.unlink()
