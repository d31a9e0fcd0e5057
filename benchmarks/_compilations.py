"""Record what XLA compiles, for counts and for tests."""

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import NamedTuple

import jax


class Compilation(NamedTuple):
    """One compilation.

    Attributes:
        name: Name of the program.
        waited: Whether the main thread waited for it.
    """

    name: str
    waited: bool


@contextmanager
def compilations() -> Iterator[list[Compilation]]:
    """Yield a list that receives every program that XLA compiles, as counted by JAX's monitoring events."""
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
