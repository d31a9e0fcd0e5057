"""Reports of runs that the parallel solver did not finish: which chains, how many steps, which residuals."""

from dataclasses import dataclass, field, replace
from functools import cache

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import pmcmc
from pmcmc import recurrence
from pmcmc.chain.report import SolveReport, by_result, span
from pmcmc.planning import Costs, plan
from pmcmc.recurrence import RESULTS, MultipleShooting, Sequential, deer
from pmcmc.sampling.segments import Run
from tests.helpers.targets import gaussian, start_like

LENGTH = 400
KERNEL = pmcmc.HMC(step_size=0.4, num_integration_steps=3)
SIZES = dict(kernel=KERNEL, num_warmup=0, num_samples=LENGTH, num_chains=4, progress_bar=False)


def run(solver, **options) -> pmcmc.Chain:
    return pmcmc.sample(gaussian, start_like(gaussian), 0, solver=solver, **{**SIZES, **options})


@cache
def blocks() -> pmcmc.Chain:
    return run(MultipleShooting(4))


@pmcmc.register_dataclass
@dataclass(frozen=True)
class Quits(recurrence.RecurrenceSolver):
    """A user's own solver: correct as far as it certifies, with the given result codes."""

    certified: tuple[int, ...] = field(metadata=dict(static=True))
    codes: tuple[int, ...] = field(metadata=dict(static=True))

    def solve_problem(self, problem):
        found = Sequential().solve_problem(problem)
        stats = found.stats._replace(certified_steps=jnp.array(self.certified), certified_residual=None)
        return found._replace(result=jnp.array(self.codes), stats=stats)


def line(report: SolveReport, start: str) -> str:
    """Return the one line of a report that begins with ``start``, or ""."""
    found = [text for text in str(report).splitlines() if text.startswith(start)]
    assert len(found) <= 1
    return found[0] if found else ""


def test_nothing_failed() -> None:
    report = blocks().report
    assert line(report, "Fallback") == ""
    said = line(report, "Certificate")
    assert said.startswith("Certificate: successful; residual at most ")
    assert f"scale; {LENGTH} steps of each chain solved in parallel and certified; 0 near-tie" in said
    assert "sequentially" not in said
    assert f"for {LENGTH} steps of each chain (" in line(report, "Critical path")
    assert " times shorter), in 4 blocks with 1 repair sweep(s) a segment." in line(report, "Critical path")
    assert line(report, "Planned") == ""


def test_one_chain_fails_and_the_others_do_not() -> None:
    paths = blocks().report.num_sequential_steps
    slowest, budget = int(np.argmax(paths)), int(np.sort(paths)[-2])
    chain = run(MultipleShooting(4, max_steps=budget))  # most of it is certified: no warning
    np.testing.assert_allclose(chain.get_samples(), blocks().get_samples(), rtol=0, atol=1e-9)
    report = chain.report
    solved = int(report.certified_steps[slowest])
    assert LENGTH / 10 < solved < LENGTH
    assert np.all(np.delete(report.certified_steps, slowest) == LENGTH)
    assert line(report, "Fallback") == (
        f"Fallback: max_iters_reached in chain {slowest}: The budget of iterations or sweeps ran out before the "
        f"recurrence held everywhere. {solved} to {LENGTH} steps of each chain had been solved in parallel; 0 to "
        f"{LENGTH - solved} were left to sequential sampling."
    )
    said = line(report, "Certificate")
    assert f"Certificate: max_iters_reached in chain {slowest}, successful in the others; residual at most" in said
    assert f"{solved} to {LENGTH} steps of each chain solved in parallel and certified, 0 to {LENGTH - solved} " in said
    # Measured on the certified blocks, which differs from the tolerance.
    whole = np.delete(np.arange(4), slowest)
    np.testing.assert_array_equal(report.residual[whole], blocks().report.residual[whole])
    assert np.all(report.residual <= np.max(blocks().report.residual))


def test_newton_with_a_small_budget() -> None:
    with pytest.warns(
        UserWarning, match="Newton solved only .* steps of each chain in parallel; the others.*raise the"
    ):
        report = run(deer(max_iters=1), num_samples=2000).report
    assert np.all((report.certified_steps >= 1) & (report.certified_steps < 200))
    solved, left = span(report.certified_steps), span(2000 - report.certified_steps)
    assert f" {solved} steps of each chain had been solved in parallel; {left} were left" in line(report, "Fallback")
    certificate = line(report, "Certificate")
    assert (
        f"; {solved} steps of each chain solved in parallel and certified, {left} sampled sequentially;" in certificate
    )
    assert "(no shorter), in 1 iterations." in line(report, "Critical path")
    assert np.all(report.residual < 512 * np.finfo(float).eps / 4)  # a measured value, not the tolerance
    more = run(deer(max_iters=3), num_samples=2000).report  # most of some chains: in the report, without a warning
    failed = more.certified_steps < 2000
    assert np.any(failed)
    assert np.max(more.certified_steps) == 2000
    assert "successful in the others" in line(more, "Certificate")
    np.testing.assert_array_equal(failed, more.result == RESULTS.max_iters_reached)


def test_iterations_of_all_segments_count(monkeypatch: pytest.MonkeyPatch) -> None:
    """As their critical path does; of repair sweeps the largest number in a segment is given."""
    taken, take = [], Run.take

    def watched(self, solver, *args):
        found = take(self, solver, *args)
        taken.append(found[0].stats)
        return found

    monkeypatch.setattr(Run, "take", watched)
    monkeypatch.setattr("pmcmc.sampling.engine.SEGMENT_BYTES", 2**15)
    report = run(deer(max_iters=300)).report
    assert len(taken) > 1
    np.testing.assert_array_equal(report.num_iters, sum(stats.num_iters for stats in taken))
    np.testing.assert_array_equal(report.num_sequential_steps, sum(stats.num_sequential_steps for stats in taken))
    assert f", in {np.max(report.num_iters)} iterations." in line(report, "Critical path")
    taken.clear()
    report = run(MultipleShooting(8), num_samples=2000).report
    assert len(taken) > 1
    np.testing.assert_array_equal(report.num_sweeps, np.max([stats.num_sweeps for stats in taken], axis=0))
    several = replace(report, num_sweeps=np.array([1, 3, 2, 1]))
    assert ", in 8 blocks with up to 3 repair sweep(s) a segment." in line(several, "Critical path")


def separated(x):
    return jnp.logaddexp(-0.5 * jnp.sum((x - 20) ** 2), -0.5 * jnp.sum((x + 20) ** 2))


@pytest.mark.filterwarnings("ignore:the draws have not mixed")
def test_blocks_of_a_chain_that_does_not_contract() -> None:
    """Starts of blocks are guessed in both modes, and no block that is in the wrong one merges."""
    starts = jnp.array([[20.0, 20.0], [-20.0, -20.0]])
    with pytest.warns(UserWarning, match="MultipleShooting solved only .* sampled sequentially"):
        chain = pmcmc.sample(
            separated,
            starts[0],
            0,
            solver=MultipleShooting(32, max_sweeps=1),
            **{**SIZES, "kernel": pmcmc.RandomWalk(0.1)},
        )
    assert np.all(chain.report.certified_steps < LENGTH / 10)
    assert "max_iters_reached" in line(chain.report, "Fallback")


@pytest.mark.parametrize("codes", [(4, 4, 4, 4), (4, 3, 4, 2)])
def test_nothing_was_solved_in_parallel(codes) -> None:
    """By a user's own solver."""
    with pytest.warns(
        UserWarning, match=r"^Quits solved none of 400 steps of each chain in parallel; .*Or leave"
    ) as seen:
        report = run(Quits((0, 0, 0, 0), codes)).report
    assert len(seen) == 1
    assert RESULTS.not_contracting.message in str(seen[0].message)
    assert report.decision == "Quits"
    failed = set(codes)
    assert all(RESULTS(code).name in line(report, "Fallback") for code in failed)
    assert " No step had been solved in parallel; 400 were left to sequential sampling." in line(report, "Fallback")
    said = line(report, "Certificate")
    assert "; no step solved in parallel, 400 of each chain sampled sequentially; " in said
    assert "residual" not in said


def test_a_solver_that_does_not_tell_its_residual() -> None:
    report = run(Quits((100, LENGTH, 100, LENGTH), (3, 0, 3, 0))).report
    assert "residual at most 0 of the posterior's scale where it was measured; 100 to 400" in line(
        report, "Certificate"
    )
    assert "stagnated in chains 0 and 2, successful in the others" in line(report, "Certificate")
    np.testing.assert_array_equal(report.residual, [np.nan, 0, np.nan, 0])
    report = run(Quits((100,) * 4, (3,) * 4)).report
    assert "stagnated; residual not measured; 100 steps of each chain solved" in line(report, "Certificate")


def test_what_came_before_a_fallback_is_counted_apart(free_lanes, monkeypatch: pytest.MonkeyPatch) -> None:
    """First steps of "auto" do not count as solved in parallel, and "auto" warns of nothing."""
    from pmcmc.sampling import automatic

    monkeypatch.setattr(automatic.Automatic, "costs", lambda self, head: Costs(1e-12, 1e-12, 1e-14, 0.0))
    report = run("auto", num_samples=20_000, num_warmup=200, num_chains=3, kernel=pmcmc.HMC()).report
    solved, first = report.certified_steps, report.num_steps - report.plan.num_steps
    assert np.all((solved > 0) & (first > 0))
    left = report.num_steps - solved - first
    assert (
        f"{span(solved)} steps of each chain had been solved in parallel and {first:,} sampled sequentially; "
        f"{span(left)} were left to sequential sampling."
    ) in report.fallback
    assert f"certified, {span(report.num_steps - solved)} sampled sequentially; " in line(report, "Certificate")


def test_plans_as_they_are_said() -> None:
    made = plan(10**6, 2, Costs(1e-5, 1e-6, 1e-8, 1.0))
    planned = replace(blocks().report, plan=made, planned_seconds=9.5)
    assert line(planned, "Planned") == "Planned: 10.00 s, took 9.50 s."
    slower = replace(planned, plan=replace(made, correction=1.2))
    assert line(slower, "Planned") == "Planned: 12.00 s (10.00 s at first), took 9.50 s."
    assert line(replace(planned, plan=replace(made, correction=1.05)), "Planned") == "Planned: 10.50 s, took 9.50 s."
    chosen = made.chosen._replace(solver=MultipleShooting(4), seconds=2.0)
    other = replace(made, chosen=chosen, correction=0.5, num_first=500)
    blocks_planned = replace(planned, plan=other, num_steps=10**6 + 500)
    assert "; planned 1,000,500, 1,000,500 to 1,000,500), in 4" in line(blocks_planned, "Critical path")
    assert line(blocks_planned, "Planned") == (
        "Planned: 2.00 s, took 9.50 s; sequential sampling was expected to take 5.00 s (10.00 s at first)."
    )


def test_steps_and_chains_in_words() -> None:
    assert span([3000, 3000]) == "3,000"
    assert span([5, 3000, 7]) == "5 to 3,000"
    words = lambda *codes: ", ".join(what for _, what in by_result(np.array(codes)))
    assert words(0, 0) == "successful"
    assert words(1) == "max_iters_reached"
    assert words(4, 0, 4, 2) == "nonfinite in chain 3, not_contracting in chains 0 and 2, successful in the others"
    assert words(1, 2) == "max_iters_reached in chain 0, nonfinite in chain 1"
    assert words(*[1] * 3, 0) == "max_iters_reached in chains 0, 1 and 2, successful in the others"
    assert words(*[1] * 9, *[0] * 3) == "max_iters_reached in 9 of 12 chains, successful in the others"


@pytest.mark.parametrize(
    "solver", [deer(max_iters=6), MultipleShooting(8, max_sweeps=1), MultipleShooting(8, max_steps=60)]
)
def test_residuals_of_a_prefix_are_measured(solver) -> None:
    """They equal those from evaluating the equation on the prefix."""
    step = lambda x, u: 0.9 * jnp.sin(2.0 * x) + u
    inputs = jax.random.normal(jax.random.key(2), (64,)) / 4
    found = solver.solve(step, 0.1, inputs, scale=1.0)
    steps = int(found.stats.certified_steps)
    assert found.result != RESULTS.successful
    assert 0 < steps < 64
    before = jnp.concatenate([jnp.array([0.1]), found.value[:-1]])
    residual = jnp.abs(found.value - jax.vmap(step)(before, inputs))
    assert float(found.stats.certified_residual) == pytest.approx(float(residual[:steps].max()), rel=0.5, abs=1e-16)


@pytest.mark.parametrize("solver", [deer(max_iters=100), MultipleShooting(8), Sequential()])
def test_residuals_of_a_whole_path(solver) -> None:
    inputs = jax.random.normal(jax.random.key(2), (400,))
    found = solver.solve(lambda x, u: 0.8 * jnp.sin(x) + u, 0.1, inputs, scale=1.0)
    assert found.result == RESULTS.successful
    assert found.stats.certified_residual == found.residual
