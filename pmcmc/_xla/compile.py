"""``jax.jit`` for this package's programs: compiler options, workarounds for known faults, caches and timings.

Functions whose first argument is a `pmcmc.Target` are decorated with `tuned_jit` or `plain_jit`. Their programs are
kept per target, in `programs_of`, and dropped with the targets that were used least recently.

`BackgroundCompiler` compiles in a second thread, alongside work that need not wait for it, such as warm-up. Programs on
disk are found without tracing, see `pmcmc._xla.disk`.
"""

import ctypes
import inspect
import os
import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Hashable
from concurrent import futures
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from functools import cache, update_wrapper, wraps
from typing import Any

import jax

from pmcmc._xla import default_platform, disk, factorizations, graphs, precision, scatters
from pmcmc._xla.equations import replacing
from pmcmc._xla.rewrites import own_program


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
    """``jax.jit`` of a function whose first argument is a target, and whose keyword-only arguments are static.

    Each target gets its own jitted function, stored in `programs_of`. JAX drops the programs of a function when the
    function is deleted, so this makes the programs of one target removable. Programs on disk are used without tracing
    the function, if they are kept there (`pmcmc.cache_programs`).

    Calls, `lower`, `eval_shape` and `timed` take ``brief``: whether compilation will take longer than the runs, see
    `compiler_options`. The programs of both kinds are traced separately.

    Args:
        fn: Function ``(target, ...) -> result``.
        tuned: Whether to use `compiler_options` (read on first use, not on import) and `adapted`. False for functions
            that are called within other programs, which adapt them: only their products are changed.
        donated: Name of the argument whose memory is overwritten; None if there is none.
    """

    def __init__(self, fn: Callable, tuned: bool, donated: str | None = None):
        self._fn, self._tuned, self._donated = fn, tuned, donated
        self._static = [x.name for x in inspect.signature(fn).parameters.values() if x.kind is x.KEYWORD_ONLY]
        update_wrapper(self, fn)

    def _options(self, brief: bool) -> dict[str, Any] | None:
        """Return the compiler options."""
        return compiler_options(default_platform(), brief) if self._tuned else None

    def _jitted(self, target: Any, brief: bool = False) -> Any:
        """Return the jitted function of this target on the current platform."""
        programs = programs_of(target)
        name = self, default_platform(), brief
        if name not in programs:
            programs.setdefault(name, self._new(brief))
        return programs[name]

    def _new(self, brief: bool) -> Any:
        """Return the function, jitted anew."""
        fn = adapted(self._fn) if self._tuned else precise(self._fn)
        own = _as_own(fn) if self._tuned else wraps(fn)(lambda *args, **kwargs: fn(*args, **kwargs))
        options = self._options(brief)
        return jax.jit(own, static_argnames=self._static, donate_argnames=self._donated, compiler_options=options)

    def _kept(self, target: Any, brief: bool, args: tuple, static: dict[str, Any]) -> disk.Kept | None:
        """Return the program of these arguments that is kept on disk, or will be; None if JAX is to find it."""
        if not disk.is_on():
            return None
        about = f"{self._tuned} {self._options(brief)}"
        signature = disk.Signature(self._fn, about, (target, *args), static)
        return signature.kept_in(programs_of(target), lambda: self._new(brief))

    def __call__(self, target: Any, *args: Any, brief: bool = False, **static: Any) -> Any:
        """Call the jitted function of this target."""
        kept = self._kept(target, brief, args, static)
        if kept is None:
            return self._jitted(target, brief)(target, *args, **static)
        return kept.run((target, *args), static)

    def lower(self, target: Any, *args: Any, brief: bool = False, **static: Any) -> Any:
        """Trace for these arguments. After ``.compile()``, a later call with the same shapes finds the program."""
        return (self._kept(target, brief, args, static) or self._jitted(target, brief)).lower(target, *args, **static)

    def eval_shape(self, target: Any, *args: Any, brief: bool = False, **static: Any) -> Any:
        """Return the shapes and dtypes of the result."""
        answer = lambda jitted: jitted.eval_shape(target, *args, **static)
        kept = self._kept(target, brief, args, static)
        return answer(self._jitted(target, brief)) if kept is None else kept.answer("shapes", answer)

    def ask(self, question: Callable[..., Any], target: Any, *args: Any, **options: Any) -> Any:
        """Return the answer to a question about the traced program, a function without static arguments.

        Args:
            question: Function ``(program, **options) -> answer`` of this package.
            target: The target.
            args: Arguments for which the program is traced.
            options: Further arguments of the question.
        """
        answer = lambda jitted: question(jitted.trace(target, *args).jaxpr.jaxpr, **options)
        kept = self._kept(target, False, args, {})
        return answer(self._jitted(target)) if kept is None else kept.answer(f"{question.__name__} {options}", answer)

    def timed(self, *args: Any, **kwargs: Any) -> tuple[Any, tuple[float, float]]:
        """Compile and run; return the finished result and ``(seconds of compilation, seconds of the run)``."""
        begin = time.perf_counter()
        self.lower(*args, **kwargs).compile()
        compiled = time.perf_counter()
        result = jax.block_until_ready(self(*args, **kwargs))
        return result, (compiled - begin, time.perf_counter() - compiled)


def tuned_jit(donated: str | None = None) -> Callable[[Callable], TargetJit]:
    """Decorate a function of a target with `TargetJit`, tuned."""
    return lambda fn: TargetJit(fn, True, donated)


def plain_jit() -> Callable[[Callable], TargetJit]:
    """Like `tuned_jit`, for functions called within other programs, or too small to be worth tuning."""
    return lambda fn: TargetJit(fn, False)
