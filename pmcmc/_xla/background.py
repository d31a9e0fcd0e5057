"""Programs compiled in a second thread, beside what need not wait for them: warm-up, or steps taken in order."""

import os
import threading
import time
from collections.abc import Callable, Hashable
from concurrent.futures import Future, ThreadPoolExecutor


def num_cores() -> int:
    """Cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


class BackgroundCompiler:
    """Runs compilations one after the other without being waited for.

    XLA compiles without holding Python's lock, so what runs meanwhile is slowed by the tracing of a program alone.
    """

    def __init__(self) -> None:
        self._pool = ThreadPoolExecutor(max_workers=1, thread_name_prefix="pmcmc-compile")
        self._jobs: dict[Hashable, _Job] = {}

    def begin(self, name: Hashable, compilation: Callable[[], Callable[[], None] | None]) -> None:
        """Once for each name. What reads the user's model is done when ``compilation`` returns; the rest it returns."""
        if name not in self._jobs:
            job = self._jobs[name] = _Job(compilation)
            job.future = self._pool.submit(job.run)

    def ready(self, name: Hashable) -> bool:
        """Whether it has ended; so too where it was never begun, since there is nothing to wait for."""
        return name not in self._jobs or self._jobs[name].future.done()

    def wait(self, name: Hashable) -> float:
        """Until it has ended; returns the seconds that took.

        A compilation that failed is not reported: it fails again, and is seen, where its program is wanted.
        """
        begin = time.perf_counter()
        if name in self._jobs:
            self._jobs[name].future.exception()
        return time.perf_counter() - begin

    def close(self) -> None:
        """Begin nothing more, and wait until no model is being read: the caller may go on to use it."""
        self._pool.shutdown(wait=False, cancel_futures=True)
        for job in self._jobs.values():
            if not job.future.cancelled():
                job.traced.wait()


class _Job:
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
