"""Compilation in a second thread, alongside work that need not wait for it, such as warm-up or sequential steps."""

import os
import threading
import time
from collections.abc import Callable, Hashable
from concurrent.futures import Future, ThreadPoolExecutor


def num_cores() -> int:
    """Return the number of cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


class BackgroundCompiler:
    """Run compilations one after the other in a background thread.

    XLA compiles without holding Python's lock. Work in the main thread is therefore slowed down only while a program
    is being traced.
    """

    def __init__(self) -> None:
        self._pool = ThreadPoolExecutor(max_workers=1, thread_name_prefix="pmcmc-compile")
        self._jobs: dict[Hashable, _Job] = {}

    def begin(self, name: Hashable, compilation: Callable[[], Callable[[], None] | None]) -> None:
        """Submit a compilation, unless one was submitted under this name before.

        Args:
            name: Key of the compilation.
            compilation: Reads the user's model (traces it) and returns a function that does the rest, or None. The
                model is not read after ``compilation`` has returned.
        """
        if name not in self._jobs:
            job = self._jobs[name] = _Job(compilation)
            job.future = self._pool.submit(job.run)

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
            self._jobs[name].future.exception()
        return time.perf_counter() - begin

    def close(self) -> None:
        """Cancel what has not begun, and wait until no model is being read, so that the caller may use it again."""
        self._pool.shutdown(wait=False, cancel_futures=True)
        for job in self._jobs.values():
            if not job.future.cancelled():
                job.traced.wait()


class _Job:
    """A submitted compilation; ``traced`` is set once it no longer reads the user's model."""

    def __init__(self, compilation: Callable[[], Callable[[], None] | None]):
        self._compilation = compilation
        self.traced = threading.Event()
        self.future: Future

    def run(self) -> None:
        try:
            rest = self._compilation()
            self.traced.set()
            if rest is not None:
                rest()
        finally:
            self.traced.set()
