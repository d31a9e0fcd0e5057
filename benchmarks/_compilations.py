"""What XLA is asked to compile, for counts and for tests."""

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import NamedTuple

import jax


class Compilation(NamedTuple):
    """A program by its name, and whether the main thread waited for it."""

    name: str
    waited: bool


@contextmanager
def compilations() -> Iterator[list[Compilation]]:
    """The programs that XLA is handed, from its own count."""
    seen: list[Compilation] = []

    def listen(event: str, duration_secs: float, **details: str | int) -> None:
        if event == "/jax/core/compile/backend_compile_duration":
            seen.append(
                Compilation(str(details.get("fun_name", "")), threading.current_thread() is threading.main_thread())
            )

    jax.monitoring.register_event_duration_secs_listener(listen)
    try:
        yield seen
    finally:
        jax.monitoring.unregister_event_duration_listener(listen)
