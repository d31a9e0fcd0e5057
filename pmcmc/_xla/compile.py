"""``jax.jit`` for this package's programs: compiler options, workarounds for known faults, caches and timings.

Functions whose first argument is a `pmcmc.Target` are decorated with `tuned_jit` or `plain_jit`. Their programs are
kept per target, in `programs_of`, and dropped with the targets that were used least recently.
"""

import ctypes
import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Hashable
from functools import cache, update_wrapper, wraps
from typing import Any

import jax

from pmcmc._xla.factorizations import few_at_a_time, may_wait_for_ever


def default_platform() -> str:
    """Platform of the default device: that of ``jax.default_device`` if set, otherwise the default backend."""
    device = jax.config.jax_default_device  # type: ignore[attr-defined]
    return jax.default_backend() if device is None else getattr(device, "platform", device)


@cache
def compiler_options(platform: str) -> dict[str, Any] | None:
    """Return XLA's compiler options for a platform; None where nothing is known to be better than the defaults.

    On CPU, jaxlib 0.10 hands small reductions to a library that takes 5 times as long as XLA's own loops once there
    are a few hundred lanes (mixture, MALA: 100 against 20 us a step of 1,024 lanes). A jaxlib that does not know the
    option needs none.
    """
    if platform != "cpu":
        return None
    options = {"xla_cpu_experimental_ynn_fusion_type": ""}
    try:
        jax.jit(lambda x: x, compiler_options=options).lower(0.0).compile()
    except jax.errors.JaxRuntimeError:
        return None
    return options


def that_ends(fn: Callable) -> Callable:
    """Return ``fn``, which is about to be traced, protected against the deadlock of some jaxlib versions on CPU.

    See `pmcmc._xla.factorizations`. Elsewhere ``fn`` is returned unchanged.
    """
    return few_at_a_time(fn) if default_platform() == "cpu" and may_wait_for_ever() else fn


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


class TargetJit:
    """``jax.jit`` of a function whose first argument is a target.

    Each target gets its own jitted function, stored in `programs_of`. JAX drops the programs of a function when the
    function is deleted, so this makes the programs of one target removable.

    Args:
        fn: Function ``(target, ...) -> result``.
        tuned: Whether to use `compiler_options` (read on first use, not on import) and `that_ends`. False for
            functions that are called within other programs.
        jit_options: Further arguments of ``jax.jit``.
    """

    def __init__(self, fn: Callable, tuned: bool, **jit_options: Any):
        self._fn, self._tuned, self._jit_options = fn, tuned, jit_options
        update_wrapper(self, fn)

    def _jitted(self, target: Any) -> Any:
        """Return the jitted function of this target on the current platform."""
        platform, programs = default_platform(), programs_of(target)
        if (self, platform) not in programs:
            fn = that_ends(self._fn) if self._tuned else self._fn
            options = compiler_options(platform) if self._tuned else None
            own = wraps(fn)(lambda *args, **kwargs: fn(*args, **kwargs))
            programs.setdefault((self, platform), jax.jit(own, compiler_options=options, **self._jit_options))
        return programs[self, platform]

    def __call__(self, target: Any, *args: Any, **kwargs: Any) -> Any:
        """Call the jitted function of this target."""
        return self._jitted(target)(target, *args, **kwargs)

    def lower(self, target: Any, *args: Any, **kwargs: Any) -> Any:
        """Trace for these arguments. After ``.compile()``, a later call with the same shapes finds the program."""
        return self._jitted(target).lower(target, *args, **kwargs)

    def eval_shape(self, target: Any, *args: Any, **kwargs: Any) -> Any:
        """Return the shapes and dtypes of the result."""
        return self._jitted(target).eval_shape(target, *args, **kwargs)

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
