"""A chain that is extended later equals the chain of one long run."""

from dataclasses import replace
from functools import cache

import jax
import numpy as np
import pytest

import pmcmc
from pmcmc.recurrence import MultipleShooting, Sequential, deer
from tests.helpers.selection import share
from tests.helpers.targets import gaussian, start_like

SIZES = dict(num_warmup=200, num_chains=2, progress_bar=False)


def run(num_samples, **options) -> pmcmc.Chain:
    return pmcmc.sample(gaussian, start_like(gaussian), 0, **{**SIZES, "num_samples": num_samples, **options})


@cache
def long_run() -> pmcmc.Chain:
    return run(1500, solver=Sequential())


def assert_same(chain: pmcmc.Chain, expected: pmcmc.Chain) -> None:
    close = lambda a, b: np.testing.assert_allclose(a, b, rtol=0, atol=1e-9)
    jax.tree.map(close, chain.get_samples(group_by_chain=True), expected.get_samples(group_by_chain=True))
    jax.tree.map(close, chain.info._replace(margin=0.0), expected.info._replace(margin=0.0))
    jax.tree.map(close, chain.last_state, expected.last_state)
    assert chain.state.num_steps == expected.state.num_steps


@pytest.mark.parametrize(
    "solver",
    share(
        {"sequential": Sequential(), "4 blocks": MultipleShooting(4), "deer": deer(max_iters=300), "auto": "auto"},
        "sequential",
        "4 blocks",
        "auto",
    ),
)
def test_two_runs_are_one(solver) -> None:
    first = run(600, solver=solver)
    both = first.extend(900, progress_bar=False)
    assert_same(both, long_run())
    assert first.num_samples == 600
    assert both.report.num_steps == 900
    assert both.report.warmup_seconds == 0
    np.testing.assert_array_equal(both.report.acceptance_rate, both.info.acceptance_rate[:, 600:].mean(axis=1))


def test_thinning_goes_on_counting() -> None:
    """7 does not divide 100: the extension keeps the same steps as one long run."""
    parts = run(100, solver=Sequential(), thinning=7).extend(301, progress_bar=False).extend(1099, progress_bar=False)
    expected = long_run().get_samples(group_by_chain=True)[:, 6::7]
    np.testing.assert_allclose(parts.get_samples(group_by_chain=True), expected, rtol=0, atol=1e-9)


def test_auto_plans_the_steps_to_come(free_lanes) -> None:
    chain = run(600, solver=Sequential())
    long = run(20_600, solver=Sequential())
    both = replace(chain, solver=None).extend(20_000, progress_bar=False)
    assert both.report.decision == "shooting"
    assert both.report.plan.num_steps < 20_000
    assert_same(both, long)


@pytest.mark.slow
def test_kernels_with_more_than_a_position() -> None:
    kernel = pmcmc.NUTS(step_size=0.5)
    options = dict(kernel=kernel, num_warmup=0, solver=MultipleShooting(4))
    assert_same(run(60, **options).extend(60, progress_bar=False), run(120, **options))


@pytest.mark.parametrize(
    ("num_samples", "error", "words"),
    [(0, ValueError, "at least 1"), (2, ValueError, "one draw in 3 steps"), (True, TypeError, "must be an integer")],
)
def test_wrong_lengths(num_samples, error, words) -> None:
    with pytest.raises(error, match=words):
        run(30, thinning=3, solver=Sequential()).extend(num_samples)


def test_no_chain_takes_so_many_steps_that_its_noise_repeats(tmp_path) -> None:
    """Numbers of steps are words of 32 bits."""
    chain = run(30, solver=Sequential())
    late = replace(chain, state=chain.state._replace(num_steps=2**32 - 5))
    with pytest.raises(ValueError, match=r"at most 5 more, got 6\. Take fewer, or .* another key"):
        late.extend(6, progress_bar=False)
    assert late.extend(5, progress_bar=False).state.num_steps == 2**32
    with pytest.raises(ValueError, match="at most 4,294,967,296 steps"):
        run(2**32 + 1, thinning=2**20)
    pytest.importorskip("zarr")
    with pytest.raises(ValueError, match="at most 5 more"):
        late.stream(tmp_path / "run", 6, progress_bar=False)
