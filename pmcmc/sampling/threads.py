"""Run programs in several threads, and keep the time. JAX releases Python's lock while a program runs."""

from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from types import TracebackType
from typing import Any, NamedTuple

from pmcmc._xla.compile import num_cores, settings_of_thread


class Clock(NamedTuple):
    """Seconds that programs took.

    Attributes:
        compile_seconds: Seconds of compilation, as far as they were waited for.
        run_seconds: Seconds in which programs ran.
    """

    compile_seconds: float
    run_seconds: float

    def plus(self, other: "Clock") -> "Clock":
        """Return the sums."""
        return Clock(*(a + b for a, b in zip(self, other, strict=True)))


class AtOnce:
    """Runs functions at once, each in a thread with the caller's settings of JAX; a context.

    Args:
        number: Functions that could run at once. There are at most as many threads as cores.

    Attributes:
        clock: Seconds so far; threads that run at once count once.
    """

    def __init__(self, number: int):
        self._num_threads = min(number, num_cores())
        self._threads = ThreadPoolExecutor(self._num_threads)
        self._settings = settings_of_thread()
        self.clock = Clock(0.0, 0.0)

    def __enter__(self) -> "AtOnce":
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._threads.shutdown()

    def count_all(self, seconds: float) -> None:
        """Count what a stretch of ``seconds`` took besides compilation as run time."""
        self.clock = Clock(self.clock.compile_seconds, seconds - self.clock.compile_seconds)

    def __call__(self, fn: Callable[[int], tuple[Any, Clock]], numbers: Iterable[int]) -> list[Any]:
        """Return ``fn(number)[0]`` for all numbers; ``fn`` returns its seconds besides."""

        def run(number: int) -> tuple[Any, Clock]:
            with self._settings():
                return fn(number)

        done = list((self._threads.map if self._num_threads > 1 else map)(run, numbers))
        took = zip(*(clock for _, clock in done), strict=True)
        self.clock = self.clock.plus(Clock(*(max(max(part), sum(part) / self._num_threads) for part in took)))
        return [result for result, _ in done]
