"""Loops run as graphs only where a self-test in another process says that they do; none does on a CPU."""

import subprocess
import sys
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import pytest

from pmcmc._xla import compile as compiling
from pmcmc._xla import graphs
from pmcmc._xla.compile import compiler_options


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch):
    """Pretend that the default device is a CUDA card; yields the commands of self-tests, which end with ``status``."""
    seen = SimpleNamespace(commands=[], status=0, error=None)
    card = SimpleNamespace(client=SimpleNamespace(platform_version="PJRT C API\ncuda 12090"), local_hardware_id=3)

    def run(command, **options):
        seen.commands.append(command)
        assert options["env"]["XLA_PYTHON_CLIENT_PREALLOCATE"] == "false"
        if seen.error:
            raise seen.error
        return SimpleNamespace(returncode=seen.status, stderr="F0000 some check failed\ngraph_exec_ is nullptr\n")

    monkeypatch.setattr(jax, "local_devices", lambda *args, **options: [card])
    monkeypatch.setattr(graphs.subprocess, "run", run)
    clear()
    yield seen
    clear()


def clear() -> None:
    graphs._fault_of.cache_clear()
    compiling.compiler_options.cache_clear()


def test_options_follow_the_self_test(asked: SimpleNamespace) -> None:
    assert compiler_options("gpu") == graphs.OPTIONS
    assert compiler_options("gpu") is not None
    assert asked.commands == [[sys.executable, "-P", graphs.__file__, "3"]]  # once per process


@pytest.mark.parametrize("status", [1, -6, 134])
def test_a_self_test_that_dies_leaves_the_defaults(asked: SimpleNamespace, status: int) -> None:
    asked.status = status
    assert compiler_options("gpu") is None
    assert graphs.fault() == f"the self-test ended with status {status}: graph_exec_ is nullptr"


def test_a_self_test_that_hangs_leaves_the_defaults(asked: SimpleNamespace) -> None:
    asked.error = subprocess.TimeoutExpired("python", 120)
    assert compiler_options("gpu") is None
    assert "timed out" in graphs.fault()


def test_other_platforms_are_not_tested(asked: SimpleNamespace, monkeypatch: pytest.MonkeyPatch) -> None:
    rocm = SimpleNamespace(client=SimpleNamespace(platform_version="rocm 70000"), local_hardware_id=0)
    monkeypatch.setattr(jax, "local_devices", lambda *args, **options: [rocm])
    assert compiler_options("gpu") is None
    assert compiler_options("tpu") is None
    assert asked.commands == []


def test_the_self_test_sees_a_wrong_result() -> None:
    graphs.self_test({})
    with pytest.raises(RuntimeError, match="run 2 of the loop differs"):
        graphs.self_test({}, lambda x, turns: graphs.loop(x, jnp.minimum(turns, 3)))


def test_the_process_of_the_self_test_needs_only_this_file() -> None:
    """It refuses to test anything but a CUDA device."""
    command = [sys.executable, "-P", graphs.__file__, "99"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert "no CUDA device" in done.stderr
    said = graphs.run_apart([sys.executable, "-c", "import os; os.abort()"])
    assert said.startswith("the self-test ended with status -6")
