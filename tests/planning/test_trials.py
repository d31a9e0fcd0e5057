"""Blocks that may pay, but are not expected to, are tried on a first segment where that risks little."""

import jax.numpy as jnp
import numpy as np
import pytest

import pmcmc
from pmcmc.planning import CostModel, Costs, plan
from pmcmc.planning.plan import LOSS
from pmcmc.recurrence import MultipleShooting, Sequential
from pmcmc.sampling import automatic
from tests.helpers.pilots import merging
from tests.helpers.targets import gaussian

PILOT = merging(np.arange(20, 52))
NUM_STEPS = 10**7
# Lanes are expected to take as long as a sequential step, within a tenth, and may take half of that.
DOUBTFUL = Costs(sequential=1e-6, overhead=1e-8, lane=9.5e-7, compile=0.2, least_lane=0.5)


def test_doubtful_blocks_are_tried() -> None:
    found = plan(NUM_STEPS, 1, DOUBTFUL, PILOT)
    assert isinstance(found.solver, MultipleShooting)
    assert found.chosen.seconds > 0.75 * found.sequential_seconds  # what is printed is what is expected
    hoped = plan(NUM_STEPS, 1, DOUBTFUL._replace(lane=0.5 * DOUBTFUL.lane), PILOT).chosen
    assert f"or {hoped.seconds:.2g} s if lanes are as fast as they may be" in found.reason
    assert "a first segment will tell" in found.reason
    assert found.chosen.solver == hoped.solver


@pytest.mark.parametrize(
    "costs",
    [
        DOUBTFUL._replace(least_lane=1.0),  # there is no doubt
        DOUBTFUL._replace(least_lane=0.85),  # too little to hope for
        DOUBTFUL._replace(compile=1.1 * LOSS * NUM_STEPS * DOUBTFUL.sequential),  # by itself as much as may be lost
        DOUBTFUL._replace(lane=2e-6, least_lane=0.25),  # an eighth of the run would cost twice as much as it saves
    ],
)
def test_trials_risk_a_tenth(costs: Costs) -> None:
    found = plan(NUM_STEPS, 1, costs, PILOT)
    assert isinstance(found.solver, Sequential)
    assert ", but shooting" in found.reason


def test_lanes_on_a_cpu_are_doubtful() -> None:
    known = dict(sequential=1e-6, num_chains=4, compile_seconds=1.0, num_cores=2, lanes=(32, 1e-5))
    assert CostModel().costs(on_cpu=True, **known).least_lane == 0.5
    assert CostModel().costs(on_cpu=False, **known).least_lane == 1.0
    untimed = CostModel().costs(on_cpu=True, **known | dict(lanes=None))
    assert untimed.least_lane == 1.0  # no gain is counted on


def test_a_program_that_is_compiled_costs_nothing() -> None:
    dear = DOUBTFUL._replace(compile=1.1 * LOSS * NUM_STEPS * DOUBTFUL.sequential / (1 - DOUBTFUL.overlap))
    assert isinstance(plan(NUM_STEPS, 1, dear, PILOT).solver, Sequential)
    ready = [c.solver for c in plan(NUM_STEPS, 1, dear, PILOT).candidates if c.name != "sequential"]
    assert isinstance(plan(NUM_STEPS, 1, dear, PILOT, ready=ready).solver, MultipleShooting)


def test_a_trial_that_succeeds_goes_on(monkeypatch: pytest.MonkeyPatch) -> None:
    """Lanes are expected to be dear, so that the plan only tries; in fact they cost next to nothing."""
    doubtful = Costs(1e-3, 1e-6, 2.3e-4, 0.0, least_lane=0.5)
    monkeypatch.setattr(automatic.Automatic, "costs", lambda self, head: doubtful)
    monkeypatch.setattr(automatic.Automatic, "correction", 1.0)
    monkeypatch.setattr(automatic, "SHORT_SECONDS", 0.0)
    monkeypatch.setattr(automatic, "num_cores", lambda: 1)  # no steps are taken while blocks are compiled
    kernel = pmcmc.HMC(step_size=0.5, num_integration_steps=2)
    chain = pmcmc.sample(
        gaussian, jnp.zeros(3), 0, kernel=kernel, num_samples=150_000, num_warmup=200, progress_bar=False
    )
    assert chain.report.decision.startswith("shooting")
    assert "a first segment will tell" in chain.report.reason
    assert chain.report.certified_steps.min() > 100_000
