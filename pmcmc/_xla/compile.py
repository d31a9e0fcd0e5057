"""``jax.jit`` for this package's programs: compiler options, workarounds for known faults, caches and timings.

Functions whose first argument is a `pmcmc.Target` are decorated with `tuned_jit` or `plain_jit`. Their programs are
kept per target, in `programs_of`, and dropped with the targets that were used least recently.

`BackgroundCompiler` compiles in a second thread, alongside work that need not wait for it, such as warm-up.
`cache_programs` keeps programs between processes.
"""

import ctypes
import hashlib
import os
import platform
import re
import sys
import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Hashable
from concurrent import futures
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, suppress
from functools import cache, update_wrapper, wraps
from pathlib import Path
from typing import Any

import jax
import jaxlib
from jax.experimental.compilation_cache import compilation_cache
from jax.extend.core import Jaxpr

from pmcmc._xla import default_platform, factorizations, graphs, precision, scatters
from pmcmc._xla.equations import replacing
from pmcmc._xla.rewrites import own_program

# A program's file that has been empty for longer than this was left by a process that was killed.
WRITING_SECONDS = 60.0
# Ends of the names of JAX's files: a program, and when it was used, which JAX writes if it limits the folder by itself.
_PROGRAM, _USED = "-cache", "-atime"


def num_cores() -> int:
    """Return the number of cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def settings_of_thread() -> Callable[[], ExitStack]:
    """Return a function that enters, in another thread, the settings of JAX that hold in this thread only.

    These are ``with jax.default_device(...)`` and the others that change what is traced or computed, such as
    ``jax.enable_x64(...)``, ``jax.default_matmul_precision(...)`` and ``jax.threefry_partitionable(...)``.
    """
    enable_x64 = getattr(jax if hasattr(jax, "enable_x64") else jax.experimental, "enable_x64")  # noqa: B009  # mypy
    named = dict(
        jax_default_device=jax.default_device,
        jax_enable_x64=enable_x64,
        jax_default_matmul_precision=jax.default_matmul_precision,
        jax_default_prng_impl=jax.default_prng_impl,
        jax_threefry_partitionable=jax.threefry_partitionable,
        jax_numpy_dtype_promotion=jax.numpy_dtype_promotion,
        jax_numpy_rank_promotion=jax.numpy_rank_promotion,
        jax_debug_nans=jax.debug_nans,
        jax_debug_infs=jax.debug_infs,
        jax_disable_jit=jax.disable_jit,
    )
    own = {name: getattr(jax.config, name) for name in named}

    def enter() -> ExitStack:
        stack = ExitStack()
        for name, value in own.items():
            if getattr(jax.config, name) != value:  # else programs of the other thread would not be found
                stack.enter_context(named[name](value))
        return stack

    return enter


class BackgroundCompiler:
    """Run compilations one after the other in a background thread.

    XLA compiles without holding Python's lock. Work in the main thread is therefore slowed down only while a program
    is being traced, and where it needs all cores.
    """

    def __init__(self) -> None:
        self._pool = ThreadPoolExecutor(max_workers=1, thread_name_prefix="pmcmc-compile")
        self._jobs: dict[Hashable, Job] = {}

    def begin(self, name: Hashable, compilation: Callable[[], Callable[[], None] | None]) -> "Job":
        """Submit a compilation, unless one was submitted under this name before; returns its job.

        Args:
            name: Key of the compilation.
            compilation: Reads the user's model (traces it) and returns a function that does the rest, or None. The
                model is not read after ``compilation`` has returned.
        """
        if name not in self._jobs:
            job = Job(compilation, settings_of_thread())
            job.future = self._pool.submit(job.run)
            self.adopt(name, job)
            _unfinished.add(job)
            job.future.add_done_callback(lambda _: _unfinished.discard(job))
        return self._jobs[name]

    def adopt(self, name: Hashable, job: "Job") -> None:
        """Wait for another one's job when this compilation is waited for."""
        self._jobs[name] = job

    def ready(self, name: Hashable) -> bool:
        """Whether there is nothing to wait for: the compilation has ended, or was never submitted."""
        return name not in self._jobs or self._jobs[name].future.done()

    def wait(self, name: Hashable) -> float:
        """Wait until the compilation has ended.

        A failed compilation is not reported here: it fails again, visibly, when its program is needed.

        Returns:
            Seconds waited.
        """
        begin = time.perf_counter()
        if name in self._jobs:
            futures.wait([self._jobs[name].future])
        return time.perf_counter() - begin

    def close(self) -> None:
        """Cancel what has not begun, and wait until no model is being read, so that the caller may use it again."""
        self._pool.shutdown(wait=False, cancel_futures=True)
        for job in self._jobs.values():
            if not job.future.cancelled():
                job.traced.wait()


class Job:
    """A submitted compilation.

    Attributes:
        future: Its end.
        traced: Set once it no longer reads the user's model.
    """

    def __init__(self, compilation: Callable[[], Callable[[], None] | None], settings: Callable[[], ExitStack]):
        self._compilation, self._settings = compilation, settings
        self.traced = threading.Event()
        self.future: futures.Future

    def run(self) -> None:
        """Do all of it."""
        try:
            with self._settings():
                rest = self._compilation()
            self.traced.set()
            if rest is not None:
                rest()
        finally:
            self.traced.set()


_unfinished: set[Job] = set()


def is_compiling() -> bool:
    """Whether this process compiles anything in the background, or is about to; also for runs that have ended."""
    return bool(_unfinished)


# Options on a CPU. jaxlib 0.10 hands small reductions to a library that takes 5 times as long as XLA's own loops once
# there are a few hundred lanes (mixture, MALA: 100 against 20 us a step of 1,024 lanes).
_OWN_LOOPS: dict[str, Any] = {"xla_cpu_experimental_ynn_fusion_type": ""}
# XLA's older generator of loops compiles in two thirds of the time. Its programs take as long, or up to 5 times as long
# where several results share what they are computed from, as in noise (docs/decisions/036).
_QUICK: dict[str, Any] = {"xla_cpu_use_fusion_emitters": False}


@cache
def compiler_options(platform: str, brief: bool = False) -> dict[str, Any] | None:
    """Return XLA's compiler options for a platform; None where nothing is known to be better than the defaults.

    Options that the jaxlib does not know are left out: it needs none of them. On GPUs see `pmcmc._xla.graphs`.

    Args:
        platform: Name of the platform.
        brief: Whether compilation takes longer than the runs of the program.
    """
    if platform == "gpu":
        return None if graphs.fault() else graphs.OPTIONS
    if platform != "cpu":
        return None
    wanted = _OWN_LOOPS | (_QUICK if brief else {})
    if _is_known(wanted):
        return wanted
    return {name: value for name, value in wanted.items() if _is_known({name: value})} or None


def _is_known(options: dict[str, Any]) -> bool:
    """Whether this jaxlib knows all of these compiler options."""
    try:
        jax.jit(lambda x: x, compiler_options=options).lower(0.0).compile()
    except jax.errors.JaxRuntimeError:
        return False
    return True


def adapted(fn: Callable) -> Callable:
    """Return ``fn``, which is about to be traced, with its program adapted to the default platform.

    On a CPU it is protected against the deadlock of some jaxlib versions, see `pmcmc._xla.factorizations`. Elsewhere
    products and additions to few places are changed, see `pmcmc._xla.precision` and `pmcmc._xla.scatters`.
    """
    if default_platform() != "cpu":
        return replacing({**precision.RULES, **scatters.RULES}, fn)
    return replacing(factorizations.RULES, fn) if factorizations.may_wait_for_ever() else fn


def precise(fn: Callable) -> Callable:
    """Return ``fn`` with products of float32 numbers computed in float32, which they are on a CPU."""
    return fn if default_platform() == "cpu" else replacing(precision.RULES, fn)


# Number of targets whose programs are kept, the most recently used: fitting one new model after another must not fill
# the memory.
MAX_TARGETS = 8
_programs: OrderedDict[Hashable, dict[Hashable, Any]] = OrderedDict()
_lock = threading.Lock()


def programs_of(target: Any) -> dict[Hashable, Any]:
    """Return the programs compiled for a target, shared by all targets that differ only in their numbers.

    The dict is empty if the target is new or its programs were dropped.
    """
    with _lock:
        found = _programs.setdefault(target.owner, {})
        _programs.move_to_end(target.owner)
        if len(_programs) > MAX_TARGETS:
            while len(_programs) > MAX_TARGETS:
                _programs.popitem(last=False)
            return_memory()
        return found


def return_memory() -> None:
    """Return freed memory to the system, where the C library can (glibc).

    Compilation allocates and frees in small pieces. Without this, a process that fits one new model after another
    grows by several MiB a fit although nothing is kept.
    """
    trim = _malloc_trim()
    if trim is not None:
        trim(0)


@cache
def _malloc_trim() -> Callable[[int], int] | None:
    """Return glibc's ``malloc_trim``; None with other C libraries."""
    try:
        return ctypes.CDLL(None).malloc_trim
    except (AttributeError, OSError, TypeError):
        return None


def forget_programs() -> None:
    """Drop the programs of all targets."""
    _programs.clear()


def _as_own(fn: Callable) -> Callable:
    """Return ``fn``, traced as an `own_program`."""

    @wraps(fn)
    def traced(*args: Any, **kwargs: Any) -> Any:
        with own_program():
            return fn(*args, **kwargs)

    return traced


class TargetJit:
    """``jax.jit`` of a function whose first argument is a target.

    Each target gets its own jitted function, stored in `programs_of`. JAX drops the programs of a function when the
    function is deleted, so this makes the programs of one target removable.

    Calls, `lower`, `eval_shape` and `timed` take ``brief``: whether compilation will take longer than the runs, see
    `compiler_options`. The programs of both kinds are traced separately.

    Args:
        fn: Function ``(target, ...) -> result``.
        tuned: Whether to use `compiler_options` (read on first use, not on import) and `adapted`. False for functions
            that are called within other programs, which adapt them: only their products are changed.
        jit_options: Further arguments of ``jax.jit``.
    """

    def __init__(self, fn: Callable, tuned: bool, **jit_options: Any):
        self._fn, self._tuned, self._jit_options = fn, tuned, jit_options
        update_wrapper(self, fn)

    def _jitted(self, target: Any, brief: bool = False) -> Any:
        """Return the jitted function of this target on the current platform."""
        platform, programs = default_platform(), programs_of(target)
        name = self, platform, brief
        if name not in programs:
            fn = adapted(self._fn) if self._tuned else precise(self._fn)
            options = compiler_options(platform, brief) if self._tuned else None
            own = _as_own(fn) if self._tuned else wraps(fn)(lambda *args, **kwargs: fn(*args, **kwargs))
            programs.setdefault(name, jax.jit(own, compiler_options=options, **self._jit_options))
        return programs[name]

    def __call__(self, target: Any, *args: Any, brief: bool = False, **kwargs: Any) -> Any:
        """Call the jitted function of this target."""
        return self._jitted(target, brief)(target, *args, **kwargs)

    def lower(self, target: Any, *args: Any, brief: bool = False, **kwargs: Any) -> Any:
        """Trace for these arguments. After ``.compile()``, a later call with the same shapes finds the program."""
        return self._jitted(target, brief).lower(target, *args, **kwargs)

    def eval_shape(self, target: Any, *args: Any, brief: bool = False, **kwargs: Any) -> Any:
        """Return the shapes and dtypes of the result."""
        return self._jitted(target, brief).eval_shape(target, *args, **kwargs)

    def program(self, target: Any, *args: Any, **kwargs: Any) -> Jaxpr:
        """Return the traced program."""
        return self._jitted(target).trace(target, *args, **kwargs).jaxpr.jaxpr

    def timed(self, *args: Any, **kwargs: Any) -> tuple[Any, tuple[float, float]]:
        """Compile and run; return the finished result and ``(seconds of compilation, seconds of the run)``."""
        begin = time.perf_counter()
        self.lower(*args, **kwargs).compile()
        compiled = time.perf_counter()
        result = jax.block_until_ready(self(*args, **kwargs))
        return result, (compiled - begin, time.perf_counter() - compiled)


def tuned_jit(**jit_options: Any) -> Callable[[Callable], TargetJit]:
    """Decorate a function of a target with `TargetJit`, tuned: ``@tuned_jit(static_argnames=...)``."""
    return lambda fn: TargetJit(fn, True, **jit_options)


def plain_jit(**jit_options: Any) -> Callable[[Callable], TargetJit]:
    """Like `tuned_jit`, for functions called within other programs, or too small to be worth tuning."""
    return lambda fn: TargetJit(fn, False, **jit_options)


def cache_programs(folder: str | Path | None = None, *, max_bytes: int = 4 * 2**30) -> Path:
    """Keep compiled programs on disk, so that the next process with the same model and shapes need not compile.

    This switches on JAX's persistent compilation cache for all programs of this process, of other packages, too. Call
    it before sampling. Programs are found by what they compute: new data of the same shapes find them, a changed model
    does not, and no draw depends on the cache. pmcmc never calls this by itself.

    Args:
        folder: Where programs are kept; machines with other processors should not share it. None: the folder that
            ``jax_compilation_cache_dir`` names, if it is set, and otherwise one in the user's cache folder for this
            kind of processor and version of jaxlib.
        max_bytes: If the programs in the folder take more bytes than this, the least recently used are deleted, once,
            at this call. Empty files that a killed process left are deleted as well. Other files in the folder are left
            alone. A process that reads a program while another one writes it warns, and compiles it.

    Returns:
        The folder.

    Raises:
        OSError: The folder cannot be made.

    Example:
        >>> import pmcmc, tempfile
        >>> folder = pmcmc.cache_programs(tempfile.mkdtemp())
    """
    named = folder or jax.config.values["jax_compilation_cache_dir"] or user_folder()
    path = Path(named).expanduser()
    path.mkdir(parents=True, exist_ok=True)
    _delete_unused(path, max_bytes)
    jax.config.update("jax_compilation_cache_dir", str(path))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)  # small programs are many
    jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)
    compilation_cache.reset_cache()  # it may have been found to be off already
    return path


def user_folder() -> Path:
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
    """Whether JAX's cache wrote this file as a program; a folder that the user names may hold anything else."""
    return re.fullmatch(rf".+-[0-9a-f]{{64}}{_PROGRAM}", file.name) is not None and file.is_file()


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
        if not status.st_size and time.time() - status.st_mtime > WRITING_SECONDS:
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
    for file in (program, program.with_name(program.name.removesuffix(_PROGRAM) + _USED)):
        with suppress(FileNotFoundError, PermissionError):
            file.unlink()
