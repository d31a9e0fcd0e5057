"""jit as this package's programs want it: compiler options, known faults avoided, and the time they take."""

import time
from collections.abc import Callable
from functools import cache, update_wrapper
from typing import Any

import jax

from pmcmc._factorizations import few_at_a_time, may_wait_for_ever


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


class TunedJit:
    """``jax.jit`` that reads `compiler_options` on use, not on import."""

    def __init__(self, fn: Callable, **jit_options: Any):
        self._fn, self._jit_options = fn, jit_options
        self._jitted: dict[str, Any] = {}  # by platform
        update_wrapper(self, fn)

    @property
    def jitted(self) -> Any:
        platform = default_platform()
        if platform not in self._jitted:
            options = compiler_options(platform)
            self._jitted[platform] = jax.jit(that_ends(self._fn), compiler_options=options, **self._jit_options)
        return self._jitted[platform]

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self.jitted(*args, **kwargs)

    def lower(self, *args: Any, **kwargs: Any) -> Any:
        """Traced for these arguments; ``compile()`` it, and a later call with the same shapes finds the program."""
        return self.jitted.lower(*args, **kwargs)

    def compile(self, *args: Any, **kwargs: Any) -> None:
        """Compile for these arguments; a later call with the same shapes finds the program."""
        self.lower(*args, **kwargs).compile()

    def timed(self, *args: Any, **kwargs: Any) -> tuple[Any, tuple[float, float]]:
        """The finished result, with the seconds of compiling and of running."""
        begin = time.perf_counter()
        self.compile(*args, **kwargs)
        compiled = time.perf_counter()
        result = jax.block_until_ready(self(*args, **kwargs))
        return result, (compiled - begin, time.perf_counter() - compiled)


def tuned_jit(**jit_options: Any) -> Callable[[Callable], TunedJit]:
    """Decorator: ``@tuned_jit(static_argnames=...)``."""
    return lambda fn: TunedJit(fn, **jit_options)
