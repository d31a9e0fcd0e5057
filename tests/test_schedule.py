"""Same key, same chain to 1e-10: for any blocks, segments and company, given the tuned kernel and the start."""

from functools import cache

import numpy as np
import pytest

import pmcmc
from pmcmc.recurrence import MultipleShooting, Sequential
from pmcmc.sampling import _engine
from tests._targets import gaussian, start_like

KERNEL = pmcmc.HMC(step_size=0.9, num_integration_steps=2)


def run(solver, num_chains: int = 3, num_samples: int = 600, **options) -> pmcmc.Chain:
    sizes = dict(num_warmup=0, kernel=KERNEL, progress_bar=False)
    return pmcmc.sample(
        gaussian,
        start_like(gaussian),
        0,
        solver=solver,
        num_chains=num_chains,
        num_samples=num_samples,
        **sizes,
        **options,
    )


@cache
def reference() -> pmcmc.Chain:
    return run(Sequential())


@pytest.mark.parametrize("num_chains", [1, 3])
@pytest.mark.parametrize("segment", [2**14, 2**29], ids=["segments", "whole"])
@pytest.mark.parametrize(
    "solver",
    [
        Sequential(),
        MultipleShooting(2),
        MultipleShooting(37),
    ],
    ids=["sequential", "2 blocks", "37 blocks"],
)
def test_float64(solver, segment: int, num_chains: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_engine, "SEGMENT_BYTES", segment)
    monkeypatch.setattr(_engine, "SEQUENTIAL_BYTES", segment)
    chain = run(solver, num_chains)
    np.testing.assert_allclose(chain.unknowns, reference().unknowns[:num_chains], rtol=0, atol=1e-10)
    np.testing.assert_array_equal(chain.info.margin > 0, reference().info.margin[:num_chains] > 0)
