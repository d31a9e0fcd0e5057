"""The report's line on the bias that warm-up leaves: relative to the region warm-up found, if it is justified."""

import functools
from dataclasses import replace

import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import pytest

import pmcmc
from pmcmc.chain.draws import judge
from pmcmc.chain.report import SolveReport
from tests.helpers.targets import gaussian, start_like

SIZES = dict(num_warmup=400, progress_bar=False)
SAID = "Bias left by warm-up: below 0.01 sd from step"


@functools.cache
def planned() -> SolveReport:
    """Return the report of a run with a pilot."""
    return pmcmc.sample(
        gaussian, start_like(gaussian), 3, num_samples=20_000, num_warmup=400, progress_bar=False
    ).report


@pytest.fixture
def report(free_lanes) -> SolveReport:
    return planned()


def test_is_said_where_nothing_speaks_against_it(report: SolveReport) -> None:
    assert report.bias_doubt == ""
    assert report.pair_distances.shape == report.coalescence_steps.shape
    assert np.median(report.pair_distances) > 1
    assert 1 <= report.spread < 1.2
    assert SAID in str(report)
    assert "relative to the region that the lanes of warm-up found" in str(report)
    assert "not judged" not in str(report)


def test_without_warm_up_none_is_spoken_of(free_lanes) -> None:
    options = dict(kernel=pmcmc.HMC(step_size=0.9, num_integration_steps=2), num_warmup=0, progress_bar=False)
    starts = np.random.default_rng(0).standard_normal((4, 3))
    chain = pmcmc.sample(gaussian, starts, 0, init_per_chain=True, num_samples=10_000, **options)
    text = str(chain.report)
    assert "Bias of the starts: below 0.01 sd from step" in text
    assert "relative to the region where chains and their partners started" in text
    assert "Seconds: warm-up 0.00, pilot" in text
    assert "lanes" not in text
    assert "lanes" not in str(chain.extend(10_000, progress_bar=False).report)


def test_says_where_it_is_not_small(report: SolveReport) -> None:
    slow = replace(report, bias_bound=np.full(9, 0.5))
    assert "Bias left by warm-up: not below 0.01 sd within 8 steps." in str(slow)
    assert SAID not in str(slow)


def test_is_small_from_the_last_step_at_which_it_is_not(report: SolveReport) -> None:
    """The bounds of later steps may be larger than those of earlier ones."""
    said = lambda *bounds: str(replace(report, bias_bound=np.array(bounds)))
    assert "below 0.01 sd from step 3 on" in said(1, 0.009, 0.5, 0.009)
    assert "below 0.01 sd from step 0 on" in said(0.009, 0.009)
    assert "not below 0.01 sd within 2 steps" in said(1, 0.009, 0.5)


def test_the_interval_is_that_of_the_rate(report: SolveReport) -> None:
    """The error was measured on the pairs of the pilot, whose rate is printed if there were no blocks."""
    line = lambda report: next(line for line in str(report).splitlines() if line.startswith("Coupled paths"))
    assert np.isfinite(report.lyapunov_exponent).any()
    assert "+-" not in line(report)
    pairs = report.plan.coalescence
    alone = line(replace(report, lyapunov_exponent=np.full(4, np.nan)))
    assert f"{float(pairs.growth_rate):.3f} +- {2 * float(pairs.growth_error):.2g} in nats" in alone


def test_a_plan_is_that_of_the_whole_run_after_a_stop(report: SolveReport) -> None:
    """`num_steps` is then the number of steps that were taken."""
    first, least, most = report.plan.num_first, *report.predicted_num_sequential_steps[1:]
    assert 0 < first < least <= most
    assert first + report.plan.num_steps == report.num_steps
    stopped = replace(report, num_steps=first + 1000)
    assert stopped.predicted_num_sequential_steps == report.predicted_num_sequential_steps


def unmixed():
    return judge({"x": np.random.default_rng(0).standard_normal((4, 1000)) + np.arange(4.0)[:, None]})


DOUBTS = {
    "warm-up is in doubt": dict(warmup_remark="Warm-up did not settle."),
    "2.0% of the draws were divergent": dict(num_divergent=np.array([1600, 0, 0, 0])),
    "spread of the draws is up to 3.0 times off": dict(spread=3.0),
    "the draws have not mixed": dict(find_mixing=unmixed),
    "coupled pairs did not start apart": dict(pair_distances=np.array([0.1, 0.2, 4.0])),
}


@pytest.mark.parametrize("doubt", DOUBTS)
def test_is_withheld_where_something_speaks_against_it(report: SolveReport, doubt: str) -> None:
    doubtful = replace(report, **DOUBTS[doubt])
    assert doubt in doubtful.bias_doubt
    assert "Bias left by warm-up: not judged, since" in str(doubtful)
    assert SAID not in str(doubtful)


def far_modes(x):
    """0.3 N(-40, 1) + 0.7 N(40, 1)."""
    return jnp.logaddexp(jnp.log(0.3) - 0.5 * jnp.sum((x + 40) ** 2), jnp.log(0.7) - 0.5 * jnp.sum((x - 40) ** 2))


def test_a_mode_that_no_lane_found_is_not_spoken_for(free_lanes) -> None:
    chain = pmcmc.sample(far_modes, jnp.full(1, -40.0), 1, num_samples=10_000, **SIZES)
    assert np.all(chain.get_samples() < 0)
    (line,) = [line for line in str(chain.report).splitlines() if line.startswith("Bias")]
    assert "relative to the region that the lanes of warm-up found; of other regions this says nothing" in line
    assert "posterior" not in line


@pytest.mark.filterwarnings("ignore:Warm-up did not settle", "ignore:the draws have not mixed")
def test_modes_that_lanes_found_withhold_it(free_lanes) -> None:
    """Pairs of lanes in different modes do not merge, and the draws disagree."""

    def model():
        x = numpyro.sample("x", dist.ImproperUniform(dist.constraints.real_vector, (), (1,)))
        numpyro.factor("modes", far_modes(x))

    starts = jnp.array([[-40.0], [40.0], [40.0], [40.0]])
    chain = pmcmc.parallel_chain(model, 0, init_params={"x": starts}, num_samples=10_000, **SIZES)
    assert len(set(np.sign(chain.get_samples(group_by_chain=True)["x"][:, 0, 0]).tolist())) == 2
    assert SAID not in str(chain.report)
    assert chain.report.mixing.doubt


def test_short_runs_have_none() -> None:
    chain = pmcmc.sample(gaussian, start_like(gaussian), 3, num_samples=50, **SIZES)
    assert "Bias" not in str(chain.report)
    assert np.isnan(chain.report.spread)
