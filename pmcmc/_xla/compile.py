"""jit as this package's programs want it: compiler options, known faults avoided, and the time they take."""

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
    """Of the device that computes unless told otherwise: that of `jax.default_device`, or else the default backend."""
    device = jax.config.jax_default_device  # type: ignore[attr-defined]
    return jax.default_backend() if device is None else getattr(device, "platform", device)


@cache
def compiler_options(platform: str) -> dict[str, Any] | None:
    """Options for XLA on a platform; None where nothing is known to be better than its defaults.

    On CPU jaxlib 0.10 hands small reductions to a library that takes 5 times as long as XLA's own loops once there
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
    """``fn``, to be traced: as it is, but for a CPU with some versions of jaxlib; see `_factorizations`."""
    return few_at_a_time(fn) if default_platform() == "cpu" and may_wait_for_ever() else fn


# Targets whose programs are kept, the last that were used: fits of ever new models must not fill the memory.
MAX_TARGETS = 8


_programs: OrderedDict[Hashable, dict[Hashable, Any]] = OrderedDict()


_lock = threading.Lock()


def programs_of(target: Any) -> dict[Hashable, Any]:
    """What was compiled for a target, and for others that differ in their numbers only; empty once it was dropped."""
    with _lock:
        found = _programs.setdefault(target.owner, {})
        _programs.move_to_end(target.owner)
        if len(_programs) > MAX_TARGETS:
            while len(_programs) > MAX_TARGETS:
                _programs.popitem(last=False)
            return_memory()
        return found


def return_memory() -> None:
    """Give what was freed back to the system, where the C library can (glibc).

    Compilation allocates and frees in small pieces, so without this a process that fits ever new models grows by
    several MiB a fit although nothing is kept.
    """
    trim = _malloc_trim()
    if trim is not None:
        trim(0)


@cache
def _malloc_trim() -> Callable[[int], int] | None:
    try:
        return ctypes.CDLL(None).malloc_trim
    except (AttributeError, OSError, TypeError):
        return None


def forget_programs() -> None:
    """Drop them all."""
    _programs.clear()


class TargetJit:
    """``jax.jit`` of a function whose first argument is a target.

    Each target has a jitted function of its own, which `programs_of` keeps, so that its programs can be dropped: JAX
    drops those of a function when the function goes.

    tuned: with `compiler_options`, read on use and not on import, and with `that_ends`. False for functions that other
        programs call.
    """

    def __init__(self, fn: Callable, tuned: bool, **jit_options: Any):
        self._fn, self._tuned, self._jit_options = fn, tuned, jit_options
        update_wrapper(self, fn)

    def _jitted(self, target: Any) -> Any:
        platform, programs = default_platform(), programs_of(target)
        if (self, platform) not in programs:
            fn = that_ends(self._fn) if self._tuned else self._fn
            options = compiler_options(platform) if self._tuned else None
            own = wraps(fn)(lambda *args, **kwargs: fn(*args, **kwargs))
            programs.setdefault((self, platform), jax.jit(own, compiler_options=options, **self._jit_options))
        return programs[self, platform]

    def __call__(self, target: Any, *args: Any, **kwargs: Any) -> Any:
        return self._jitted(target)(target, *args, **kwargs)

    def lower(self, target: Any, *args: Any, **kwargs: Any) -> Any:
        """Traced for these arguments; ``compile()`` it, and a later call with the same shapes finds the program."""
        return self._jitted(target).lower(target, *args, **kwargs)

    def eval_shape(self, target: Any, *args: Any, **kwargs: Any) -> Any:
        """Shapes and dtypes of the result."""
        return self._jitted(target).eval_shape(target, *args, **kwargs)

    def timed(self, *args: Any, **kwargs: Any) -> tuple[Any, tuple[float, float]]:
        """The finished result, with the seconds of compiling and of running."""
        begin = time.perf_counter()
        self.lower(*args, **kwargs).compile()
        compiled = time.perf_counter()
        result = jax.block_until_ready(self(*args, **kwargs))
        return result, (compiled - begin, time.perf_counter() - compiled)


def tuned_jit(**jit_options: Any) -> Callable[[Callable], TargetJit]:
    """Decorator of a function of a target: ``@tuned_jit(static_argnames=...)``."""
    return lambda fn: TargetJit(fn, True, **jit_options)


def plain_jit(**jit_options: Any) -> Callable[[Callable], TargetJit]:
    """The same for functions that other programs call, or that are too small to be tuned."""
    return lambda fn: TargetJit(fn, False, **jit_options)
