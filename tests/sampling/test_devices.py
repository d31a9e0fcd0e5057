"""Blocks or steps distributed over devices give the chain of one device, with as many collectives for any length."""

import os
import socket
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from benchmarks._compilations import compilations
from pmcmc import HMC, load, sample
from pmcmc.recurrence import MultipleShooting, Sequential, Windowed, deer, elk, quasi_deer
from pmcmc.sampling import settings
from tests.helpers.targets import gaussian

PROGRAMS = ("jit(draw_noise)", "jit(solve_noise)")
ROOT = Path(__file__).parents[2]


def start(module: str, *arguments: str, num_devices: int) -> subprocess.Popen:
    """Start a separate process, since the number of CPU devices is fixed before jax starts."""
    environment = {
        **os.environ,
        "JAX_ENABLE_X64": "1",
        "JAX_COMPILATION_CACHE_DIR": jax.config.jax_compilation_cache_dir,
        "XLA_FLAGS": f"--xla_force_host_platform_device_count={num_devices}",
    }
    command = [sys.executable, "-m", module, *arguments]
    return subprocess.Popen(
        command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )


def finish(process: subprocess.Popen) -> None:
    output, _ = process.communicate()
    assert process.returncode == 0, output[-4000:]


QUICK = ("collectives", "shared_steps")
SLOW = ("solutions", "chains", "planned", "more_shared_steps", "step_collectives", "gradients", "newton_chains")


@pytest.mark.parametrize("check", [*QUICK, *(pytest.param(check, marks=pytest.mark.slow) for check in SLOW)])
def test_on_eight_devices(check: str) -> None:
    finish(start("tests.helpers.devices", check, num_devices=8))


@pytest.mark.slow
def test_in_two_processes() -> None:
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = str(free.getsockname()[1])
    processes = [start("tests.helpers.processes", port, number, num_devices=1) for number in ("0", "1")]
    for process in processes:
        finish(process)


def test_rejects_devices_that_cannot_be_used() -> None:
    run = lambda **options: sample(gaussian, jnp.zeros(3), 0, num_samples=100, progress_bar=False, **options)
    with pytest.raises(TypeError, match="devices"):
        run(devices=2)
    with pytest.raises(ValueError, match="devices is empty"):
        run(devices=[])
    with pytest.raises(ValueError, match="Sequential runs on one device"):
        run(devices=jax.devices(), solver=Sequential())
    with pytest.raises(ValueError, match="Windowed runs on one device"):
        run(devices=jax.devices(), solver=Windowed(deer()))
    with pytest.raises(ValueError, match="Drop devices"):
        Windowed(deer(devices=jax.devices()))
    for make in (MultipleShooting, deer, elk):
        with pytest.raises(ValueError, match="differ"):
            make(devices=2 * jax.devices())
        with pytest.raises(ValueError, match="at least one"):
            make(devices=[])


def test_devices_of_another_platform(monkeypatch: pytest.MonkeyPatch) -> None:
    """Programs are compiled for the default device: float32 products of a GPU, for instance, would not be asked for."""
    monkeypatch.setattr(settings, "default_platform", lambda: "gpu")
    with pytest.raises(ValueError, match=r"platform \['cpu'\].*jax.default_device"):
        sample(gaussian, jnp.zeros(3), 0, devices=jax.devices("cpu"), num_samples=100, progress_bar=False)


@pytest.mark.slow
def test_auto_shares_blocks(free_lanes, fresh_programs) -> None:
    """The one device of this process, if named, takes the same path as several. Segments share a program for blocks."""
    options = dict(kernel=HMC(step_size=0.5, num_integration_steps=3), num_warmup=100, num_chains=2, progress_bar=False)
    run = lambda devices: sample(gaussian, jnp.zeros(3), 0, num_samples=20_000, devices=devices, **options)
    alone = run(None)
    with compilations() as seen:
        shared = run(jax.devices())
    assert [c.name for c in seen if c.name in PROGRAMS] == list(PROGRAMS)
    assert alone.report.decision == shared.report.decision == "shooting"
    assert shared.report.fallback == ""
    np.testing.assert_allclose(shared.unknowns, alone.unknowns, rtol=0, atol=1e-9)


def test_a_file_holds_no_devices(tmp_path) -> None:
    solver = quasi_deer(max_iters=100, devices=jax.devices())
    options = dict(kernel=HMC(step_size=0.5, num_integration_steps=3), num_warmup=0, num_chains=1, progress_bar=False)
    chain = sample(gaussian, jnp.zeros(3), 0, num_samples=100, solver=solver, **options)
    chain.save(tmp_path / "chain")
    assert load(tmp_path / "chain", gaussian).solver == quasi_deer(max_iters=100)
