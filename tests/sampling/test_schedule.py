"""Same key, same chain: for any blocks, segments, windows and number of chains, given the tuned kernel and the start.

For any devices too: see `tests.helpers.devices`.

In float64 to 1e-10. In float32 two programs round differently, so two chains may separate, but only at an accept
decision within rounding of a tie; from there each is a chain of the kernel.
"""

from functools import cache

import jax.numpy as jnp
import numpy as np
import pytest

import pmcmc
from pmcmc.recurrence import MultipleShooting, Sequential, Windowed, deer
from pmcmc.sampling import engine
from tests.helpers.selection import share
from tests.helpers.targets import gaussian, mixture, start_like

pytestmark = pytest.mark.optimized

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


@pytest.mark.parametrize("num_chains", [pytest.param(1, marks=pytest.mark.slow), 3])
@pytest.mark.parametrize("segment", share({"segments": 2**14, "whole": 2**29}, "segments"))
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
    monkeypatch.setattr(engine, "SEGMENT_BYTES", segment)
    monkeypatch.setattr(engine, "SEQUENTIAL_BYTES", segment)
    chain = run(solver, num_chains)
    np.testing.assert_allclose(chain.unknowns, reference().unknowns[:num_chains], rtol=0, atol=1e-10)
    np.testing.assert_array_equal(chain.info.margin > 0, reference().info.margin[:num_chains] > 0)


@pytest.mark.slow
@pytest.mark.parametrize("window", [40, 250])
def test_windows(window: int) -> None:
    chain = run(Windowed(deer(), window))
    assert chain.report.fallback == ""
    np.testing.assert_allclose(chain.unknowns, reference().unknowns, rtol=0, atol=1e-10)


@cache
def in_float32(num_blocks: int, num_chains: int) -> pmcmc.Chain:
    """Add a constant of 1e4, with which about one decision in a hundred is a near tie."""
    solver = Sequential() if num_blocks == 1 else MultipleShooting(num_blocks)
    return pmcmc.sample(
        with_constant,
        jnp.zeros(2, jnp.float32),
        0,
        kernel=pmcmc.MALA(step_size=0.8),
        solver=solver,
        num_chains=num_chains,
        num_samples=3000,
        num_warmup=0,
        progress_bar=False,
    )


def with_constant(x):
    return mixture(x) + jnp.float32(1e4)


@pytest.mark.filterwarnings("ignore:the draws have not mixed")
@pytest.mark.parametrize(
    ("num_blocks", "num_chains"),
    [(12, 1), *(pytest.param(*case, marks=pytest.mark.slow) for case in [(1, 1), (1, 4), (12, 4)])],
)
def test_float32_parts_at_near_ties_only(num_blocks: int, num_chains: int) -> None:
    chain, expected = in_float32(num_blocks, num_chains), in_float32(1, 4)
    found = chain.verify()
    assert found, str(found)
    for c in range(num_chains):
        apart = np.abs(chain.unknowns[c] - expected.unknowns[c]).max(axis=1) > 1e-3
        for step in np.flatnonzero(apart & ~np.concatenate([[False], apart[:-1]])):
            margins = [abs(info.margin[c, step]) for info in (chain.info, expected.info)]
            size = max(abs(info.logdensity[c, step]) for info in (chain.info, expected.info))
            assert min(margins) <= 16 * np.finfo(np.float32).eps * size
    assert np.sum(chain.report.near_ties) > 5 * num_chains
