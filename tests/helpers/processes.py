"""One of two processes with one CPU device each that solve together.

Run as ``python -m tests.helpers.processes PORT NUMBER``.

See test_devices.py.
"""

import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pmcmc import HMC, sample
from pmcmc.recurrence import RESULTS, MultipleShooting, quasi_deer
from tests.helpers.compilation import compile_quickly


def logdensity(x):
    return -0.5 * jnp.sum(x**2) - 0.1 * jnp.sum(x**4)


def draws(solver, devices) -> np.ndarray:
    """Return the chain, tuned and extended, on these devices."""
    chain = sample(
        logdensity,
        jnp.ones(2),
        0,
        kernel=HMC(num_integration_steps=2),
        solver=solver,
        num_warmup=200,
        num_chains=1,
        num_samples=400,
        devices=devices,
        progress_bar=False,
    )
    chain = chain.extend(100, progress_bar=False)
    assert np.all(chain.report.result == RESULTS.successful)
    return np.asarray(chain.get_samples())


if __name__ == "__main__":
    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    jax.distributed.initialize(
        f"localhost:{sys.argv[1]}", num_processes=2, process_id=int(sys.argv[2]), heartbeat_timeout_seconds=600
    )
    assert len(jax.devices()) == 2
    assert len(jax.local_devices()) == 1
    compile_quickly(True)
    for solver in (MultipleShooting(num_blocks=8), quasi_deer()):
        np.testing.assert_allclose(draws(solver, jax.devices()), draws(solver, None), rtol=0, atol=1e-9)
    with pytest.raises(ValueError, match="timings"):
        sample(logdensity, jnp.ones(2), 0, num_samples=400, devices=jax.devices(), progress_bar=False)
