"""If the machine stops for a moment, timings, decisions and reports are as if it had not.

Time is counted, not measured: programs take what the machine here says.
"""

import sys
from collections.abc import Callable
from types import SimpleNamespace

import jax.numpy as jnp
import numpy as np
import pytest

import pmcmc
from pmcmc.planning import Costs
from pmcmc.planning.plan import Pace
from pmcmc.recurrence import Sequential
from pmcmc.sampling import automatic, pilot, session
from pmcmc.sampling.engine import Engine
from pmcmc.sampling.pilot import FIRST_STRETCH, NUM_TIMED, TIMING_SECONDS, Head
from pmcmc.sampling.segments import Run
from pmcmc.sampling.settings import as_key
from pmcmc.sampling.threads import Clock
from pmcmc.warmup import lanes, sites
from tests.helpers.targets import gaussian, start_like

# Seconds of a step of all chains, of one more lane, of a call of a program, and of a stall.
STEP, LANE, CALL, STALL = 1e-3, 1e-5, 1e-4, 500.0
SIZES = dict(num_warmup=200, num_chains=2, num_samples=20_000, progress_bar=False)


class CountedRun(Run):
    """A run whose steps take a given time, and one of whose stretches is delayed."""

    def __init__(self, num_steps: int, step: float, stalled: int):
        self.num_steps, self.position, self.step, self.stalled, self.taken = num_steps, np.zeros(1), step, stalled, []
        path = SimpleNamespace(chains=lambda: ({}, None, None))
        self.engine, self.segment = SimpleNamespace(shape_for=lambda *a: None, max_bytes=2**29), path
        self.x = np.zeros((1, 1))

    def take(self, solver, shape, wanted):
        seconds = CALL + wanted * self.step + STALL * (len(self.taken) == self.stalled)
        self.taken.append((wanted, seconds))
        self.position += wanted
        return self.segment, "", Clock(0.0, seconds)


@pytest.mark.parametrize("step", [1e-7, 3e-6, 1e-3, 1.0])
@pytest.mark.parametrize("stalled", range(12))
def test_a_stall_in_any_stretch_is_not_a_step(step: float, stalled: int) -> None:
    """The first stretch, one while stretches still grow, one of those that are timed, or the last."""
    run = CountedRun(10**9, step, stalled)
    found = Head(run).seconds_per_step
    assert step <= found <= 1.05 * step + 1e-8
    lengths = [steps for steps, _ in run.taken]
    timed = lengths[-NUM_TIMED:]
    assert len(set(timed)) == 1
    assert timed[0] == FIRST_STRETCH or timed[0] / 8 * step + CALL < TIMING_SECONDS / NUM_TIMED
    assert len(lengths) - len(set(lengths)) in (NUM_TIMED - 1, NUM_TIMED)  # a stall costs one more stretch
    if stalled >= len(lengths) and step < 1e-3:
        assert sum(seconds for _, seconds in run.taken) < 10 * TIMING_SECONDS


@pytest.mark.parametrize("stalled", [0, 1, 9])
def test_runs_that_end_before_they_are_timed(stalled: int) -> None:
    head = Head(CountedRun(300, 1e-6, stalled))
    assert head.run.done == 300
    assert head.seconds_per_step < 1e-5


@pytest.mark.parametrize(("step", "stretches"), [(1e-7, [1, 2, 4, 8]), (1.0, [1] * 4)])
def test_steps_taken_beside_a_compilation_are_not_timed(step: float, stretches: list[int]) -> None:
    run, quiet = CountedRun(10**9, step, -1), iter([False] * 4 + [True])
    found = Head(run, lambda: next(quiet)).seconds_per_step
    assert [steps for steps, _ in run.taken][:5] == [FIRST_STRETCH * n for n in (*stretches, 1)]
    assert step <= found <= 1.05 * step + 1e-8
    whole = Head(CountedRun(300, step, -1), lambda: False)
    assert whole.run.done == 300
    assert whole.seconds_per_step >= step


def test_pace() -> None:
    pace = Pace()
    assert np.isnan(pace.seconds_per_step)
    for steps, seconds in [(64, 64.0), (1000, 1.0), (1000, 500.0), (1000, 1.1), (3, 1e9)]:
        pace.add(steps, seconds)
    assert pace.seconds_per_step == 1.1e-3


class Machine:
    """Count the time that programs take.

    Args:
        step: Seconds of a sequential step of all chains, a function of the number of the call.
        lanes: Seconds of a step of the blocks' lanes.
        planned: Seconds of such a step as plans expect it.

    Delays are in ``stalls``, by kind of program ("order", "partner", "blocks") and number of the call.
    """

    def __init__(
        self, step: Callable[[int], float] = lambda call: STEP, lanes: float = 2 * STEP, planned: float = 2 * STEP
    ):
        self.step, self.lanes, self.planned, self.now = step, lanes, planned, 0.0
        self.stalls: dict[tuple[str, int], float] = {}
        self.calls = {"order": 0, "partner": 0, "blocks": 0}
        self.following = False

    def spend(self, kind: str, seconds: float) -> float:
        seconds += CALL + self.stalls.get((kind, self.calls[kind]), 0.0)
        self.calls[kind] += 1
        self.now += seconds
        return seconds


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch) -> Callable[..., Machine]:
    """Make a `Machine` on which everything that follows runs. Nothing is compiled in the background."""
    solve, take = Engine.solve, automatic.Run.take

    def use(**options) -> Machine:
        here = Machine(**options)

        def counted(self, solver, shape, x0, first_step, block_length):
            segment, _ = solve(self, solver, shape, x0, first_step, block_length)
            if not isinstance(solver, Sequential):
                steps = int(np.max(segment.stats.num_sequential_steps))
                seconds = here.spend("blocks", steps * here.lanes)
            elif here.following:
                seconds = here.spend("partner", block_length * here.step(0))
            else:
                seconds = here.spend("order", block_length * here.step(here.calls["order"]))
            return segment, Clock(0.0, seconds)

        def own_steps(self, *arguments):
            following, here.following = here.following, False
            found = take(self, *arguments)
            here.following = following
            return found

        def follow(head, own, real=pilot.couple):
            here.following = True
            found = real(head, own)
            here.following = False
            return found

        for module in (pilot, automatic, session):
            monkeypatch.setattr(module, "time", SimpleNamespace(perf_counter=lambda: here.now))
        monkeypatch.setattr(Engine, "solve", counted)
        monkeypatch.setattr(Engine, "compile_seconds", lambda *arguments: 0.0)
        monkeypatch.setattr(automatic.Run, "take", own_steps)
        monkeypatch.setattr(automatic, "couple", follow)
        monkeypatch.setattr(automatic, "num_cores", lambda: 1)
        monkeypatch.setattr(automatic, "is_compiling", lambda: False)
        monkeypatch.setattr(pilot, "SHARE", 0.2)
        costs = lambda self, head: Costs(head.seconds_per_step, here.planned, LANE, 0.0)
        monkeypatch.setattr(automatic.Automatic, "costs", costs)
        return here

    return use


def sample(**options) -> pmcmc.SolveReport:
    return pmcmc.sample(gaussian, start_like(gaussian), 3, **{**SIZES, **options}).report


@pytest.fixture
def undisturbed(machine) -> pmcmc.SolveReport:
    machine()
    report = sample()
    assert report.decision == "shooting"
    assert report.fallback == ""
    assert "at first" not in str(report)
    return report


PLACES = [
    ("order", 0),
    ("order", 2),
    ("order", NUM_TIMED - 1),
    ("order", NUM_TIMED),
    ("partner", 0),
    ("partner", 1),
    ("blocks", 0),
    ("blocks", 1),
]


@pytest.mark.parametrize("place", PLACES, ids=lambda place: f"{place[0]} {place[1]}")
def test_a_stall_changes_no_decision(place, undisturbed, machine) -> None:
    """A stall in the first, a middle or the last timed stretch, in the steps after it, in the pilot or in blocks."""
    stalled = machine()
    stalled.stalls[place] = STALL
    report = sample()
    assert stalled.calls[place[0]] > place[1]
    assert report.plan.chosen.name == undisturbed.plan.chosen.name
    assert report.fallback == ""
    assert report.predicted_sequential_seconds == pytest.approx(undisturbed.predicted_sequential_seconds, rel=0.02)
    assert report.coalescence_steps.size == pytest.approx(undisturbed.coalescence_steps.size, abs=2)
    assert np.all(report.num_sequential_steps < 2 * undisturbed.num_sequential_steps)


def test_stalls_in_every_segment_are_what_blocks_cost(machine) -> None:
    slow = machine()
    slow.stalls |= {("blocks", call): STALL for call in range(100)}
    report = sample()
    assert report.decision == "shooting"
    assert slow.calls["blocks"] == 2
    assert "times as long as sequential sampling would have" in report.fallback


def test_a_machine_that_was_slow_at_first(machine, monkeypatch: pytest.MonkeyPatch) -> None:
    """Most of the timing was delayed, so that blocks seemed cheap; steps taken during a compilation correct this."""
    answers = iter([False] * 40)
    monkeypatch.setattr(Engine, "is_ready", lambda *arguments: next(answers, True))
    machine(step=lambda call: 1.0 if call < NUM_TIMED else STEP, lanes=2.0)
    monkeypatch.setattr(automatic, "num_cores", lambda: 2)
    report = sample()
    assert report.decision == "shooting"
    assert "times as long" in report.fallback
    assert report.predicted_sequential_seconds < report.plan.sequential_seconds / 100
    assert " s at first)" in str(report)


def test_slow_steps_beside_a_compilation_say_nothing(undisturbed, machine, monkeypatch: pytest.MonkeyPatch) -> None:
    """They are draws, and nothing is expected from their time."""
    here = machine(step=lambda call: 10 * STEP if call < 100 else STEP)
    monkeypatch.setattr(automatic, "is_compiling", lambda: here.calls["order"] < 100)
    report = sample()
    assert report.decision == "shooting"
    assert report.fallback == ""
    assert "at first" not in str(report)
    per_step = report.predicted_sequential_seconds / report.plan.num_steps
    assert per_step == pytest.approx(undisturbed.predicted_sequential_seconds / undisturbed.plan.num_steps, rel=0.02)


def test_a_run_that_ends_during_a_compilation(machine, monkeypatch: pytest.MonkeyPatch) -> None:
    machine()
    monkeypatch.setattr(automatic, "is_compiling", lambda: True)
    report = sample()
    assert report.decision == "sequential"
    assert report.reason.startswith("20,000 of 20,000 steps were sampled while programs were being compiled")


def test_the_pilot_takes_a_share_of_what_is_left(machine, monkeypatch: pytest.MonkeyPatch) -> None:
    here = machine()
    monkeypatch.setattr(automatic, "is_compiling", lambda: here.calls["order"] < 290)
    report = sample(num_samples=40_000)
    left = 40_000 - 290 * FIRST_STRETCH
    assert 1 < left * STEP < 3
    assert here.calls["partner"] > 0
    assert report.pilot_seconds < pilot.SHARE * left * STEP + here.calls["partner"] * CALL


def test_a_sequential_plan_is_corrected(machine) -> None:
    machine(step=lambda call: 10.0 if call < NUM_TIMED else STEP, planned=1e3)
    report = sample()
    assert report.decision == "sequential"
    assert report.plan.chosen.seconds > 1e5
    assert report.predicted_seconds == pytest.approx(report.planned_seconds, rel=0.05)
    (line,) = [line for line in str(report).splitlines() if line.startswith("Planned")]
    first, took = report.plan.chosen.seconds, report.planned_seconds
    assert line == f"Planned: {report.predicted_seconds:.2f} s ({first:.2f} s at first), took {took:.2f} s."


def test_steps_that_turn_out_dear_are_planned_anew(machine, monkeypatch: pytest.MonkeyPatch) -> None:
    """Sampled sequentially since steps seemed cheap; in blocks once most of them were not."""
    dear = 400 * STEP
    monkeypatch.setattr(sys.modules["pmcmc.planning.plan"], "_newton_candidates", lambda *arguments: [])
    machine(lanes=dear, planned=dear)
    alone = sample(num_samples=40_000)
    assert alone.decision == "sequential"
    grown = machine(step=lambda call: STEP if call < 13 else dear, lanes=dear, planned=dear)
    report = sample(num_samples=40_000)
    assert grown.calls["order"] > 13
    assert report.decision == "shooting"
    assert report.fallback == ""
    assert report.plan.num_steps < 30_000
    assert report.predicted_seconds == report.plan.chosen.seconds
    value, lower, upper = report.predicted_num_sequential_steps
    assert lower <= value <= upper
    assert np.max(report.num_sequential_steps) < 1.5 * value


class Timed:
    """Replaces a program's ``timed`` by the planted seconds."""

    def __init__(self, real, planted: Callable[[int], float]):
        self.real, self.planted, self.calls = real, planted, 0

    def __call__(self, *arguments, **keywords):
        found, (compiling, _) = self.real(*arguments, **keywords)
        self.calls += 1
        return found, (compiling, self.planted(self.calls - 1))


@pytest.mark.parametrize("num_steps", [48, 96])
@pytest.mark.parametrize("back", [1, 2, 3])
def test_lanes_of_warmup(num_steps: int, back: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """One of the last pieces is delayed, where the last third is one piece or two."""
    pieces = num_steps // lanes.PIECE
    timed = Timed(lanes.run_piece.timed, lambda call: 1.0 + STALL * (call == pieces - back))
    monkeypatch.setattr(lanes.run_piece, "timed", timed)
    target = pmcmc.Target.from_logdensity(gaussian, start_like(gaussian))
    tuned = lanes.tune(target, pmcmc.MALA(), as_key(0), np.zeros((4, 3)), None, num_steps)
    assert timed.calls == pieces
    assert tuned.timing.seconds_per_step == 1.0 / lanes.PIECE


@pytest.mark.parametrize("stalled", range(4))
def test_windows_of_warmup(stalled: int, monkeypatch: pytest.MonkeyPatch) -> None:
    timed = Timed(sites._run_window.timed, lambda call: 1.0 + STALL * (call == stalled))
    monkeypatch.setattr(sites._run_window, "timed", timed)
    kernel = pmcmc.Gibbs({"a": pmcmc.kernels.NormalUpdate(lambda s: (0.0, 1.0))})
    chain = pmcmc.sample(
        None, {"a": jnp.zeros(())}, 0, kernel=kernel, num_warmup=20, num_samples=10, progress_bar=False
    )
    assert chain.state.timing.seconds_per_step == 1.0 / 5
