"""Runs in new processes: start one, read its answer, and measure its seconds. Imports neither JAX nor pmcmc."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from typing import Any

LIMIT_SECONDS = 900


def run_fresh(
    module: str,
    *arguments: str,
    python: str = sys.executable,
    environment: Mapping[str, str | None] | None = None,
    limit: float = LIMIT_SECONDS,
) -> dict[str, Any]:
    """Return what a module prints under ``--one`` in a new interpreter, or why it printed nothing.

    Args:
        module: Name of the module.
        arguments: Arguments after ``--one``.
        python: The interpreter.
        environment: Changes to this process's environment variables; None removes one.
        limit: Seconds after which the process is stopped.
    """
    command = [python, "-m", module, "--one", *arguments]
    variables = {name: value for name, value in (os.environ | (environment or {})).items() if value is not None}
    pipes: Any = dict(stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    with subprocess.Popen(command, env=variables, start_new_session=True, **pipes) as process:
        try:
            out, err = process.communicate(timeout=limit)
        except BaseException as error:
            os.killpg(process.pid, signal.SIGKILL)  # with the processes that it started
            if not isinstance(error, subprocess.TimeoutExpired):
                raise
            return {"error": f"more than {limit:.0f} s"}
    if process.returncode:
        return {"error": err.strip().splitlines()[-1] if err.strip() else "no message"}
    return json.loads(out.strip().splitlines()[-1])


def answer(run: Callable[[str, str, int, int], dict[str, Any]], one: list[str]) -> None:
    """Print a run of a posterior, a method, a seed and a number of draws: what `run_fresh` reads."""
    name, method, seed, num_samples = one
    print(json.dumps(run(name, method, int(seed), int(num_samples))))


class Stopwatch:
    """Wall and processor seconds since it was made; processor seconds include those of processes that have ended."""

    def __init__(self) -> None:
        self._begin, self._cpu = time.perf_counter(), self._processor()

    @staticmethod
    def _processor() -> float:
        return sum(os.times()[:4])

    def read(self) -> dict[str, float]:
        """Return both under the names of the result files."""
        return {"seconds": time.perf_counter() - self._begin, "cpu_seconds": self._processor() - self._cpu}
