"""Where lanes of warm-up begin, and which of them chains and their partners start from."""

import numpy as np
import numpyro
import numpyro.distributions as dist
import pytest

import pmcmc
from pmcmc.recurrence import Sequential
from pmcmc.warmup import lanes


def model() -> None:
    numpyro.sample("x", dist.Normal(0, 1).expand([2]).to_event(1))


def run(num_chains: int, **options) -> pmcmc.Chain:
    sizes = dict(num_warmup=40, num_samples=20, num_chains=num_chains, solver=Sequential(), progress_bar=False)
    return pmcmc.parallel_chain(model, 0, **sizes | options)


@pytest.mark.parametrize("warmup", [pmcmc.EnsembleAdaptation(), pmcmc.WindowAdaptation()], ids=["ensemble", "window"])
def test_drawn_starts_belong_to_no_chain(warmup: pmcmc.warmup.Warmup, monkeypatch: pytest.MonkeyPatch) -> None:
    """As many chains as starts: they start apart if the starts were drawn, and from their own if these were given."""
    monkeypatch.setattr(lanes, "LANE_OPERATIONS", 1)
    monkeypatch.setattr(lanes, "start_order", lambda *path: np.array([2, 3, 1, 0]))
    assert run(4, warmup=warmup).state.own.tolist() == [2, 3, 1, 0]
    given = {"x": np.arange(8.0).reshape(4, 2) / 8}
    assert run(4, warmup=warmup, init_params=given).state.own.tolist() == [0, 1, 2, 3]
    assert run(4, warmup=warmup, init_params={"x": 0 * given["x"]}).state.own.tolist() == [2, 3, 1, 0]
