"""The benchmark suites at a tiny size: rows have what the tables need, files keep what is not measured again."""

import json
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import numpyro
import pytest

from benchmarks import __main__ as command
from benchmarks import gpu, judging, kernels, lanes, whole_call
from benchmarks._harness import alternate, save, with_others
from benchmarks._reference import compiler_version
from benchmarks._runs import Run
from benchmarks.cases import CASES
from benchmarks.hierarchical import HIERARCHIES
from benchmarks.models import MODELS
from pmcmc.interop.numpyro import numpyro_target
from pmcmc.recurrence import Sequential
from tests.helpers.selection import share
from tests.helpers.sources import run_python

sys.path.append(str(Path(__file__).parents[1] / "docs" / "_ext"))
pytest.importorskip("sphinx", reason="the docs extra is not installed")

import benchmark_tables


@pytest.fixture(scope="module")
def measured() -> tuple[dict, list]:
    """Measure one row, and record the timings it is computed from."""
    timings: list[dict] = []

    def remember(*args, **options):
        timings.append(alternate(*args, **options))
        return dict(timings[-1])

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(kernels, "alternate", remember)
        return kernels.measure("mixture", (8,), scale=0.02, effort=kernels.Effort(repeats=3, seconds=0.5)), timings


@pytest.fixture
def row(measured: tuple) -> dict:
    return measured[0]


def test_a_case_is_held_against_its_limits(measured: tuple) -> None:
    row, timings = measured
    assert row["result"] == "successful"
    assert row["length"] == 2000
    assert row["num_blocks"] == 8
    assert row["num_sequential_steps"] > row["block_length"] == 256  # 250 rounded up to chunks of 16
    assert 1 < row["evaluations_per_step"] < 3
    limit = min(row["blocks_alone"]["median_s"], row["vmapped_chains"]["median_s"])
    assert row["efficiency"] == pytest.approx(limit / row["shooting"]["median_s"])
    (tried,) = row["tried"]
    assert row["efficiency_at_best"] == pytest.approx(tried["limit"]["median_s"] / tried["shooting"]["median_s"])
    assert tried["merge_longest"] == tried["num_sequential_steps"] - tried["block_length"]
    timed = row["sequential_steps_timed"]  # in whole chunks of 128; fewer than all if the machine is slow just now
    assert timed % 128 == 0
    assert timed <= 2048
    assert row["sequential"]["median_s"] == pytest.approx(timings[-1]["sequential"]["median_s"] * 2000 / timed)
    assert row["bytes_per_draw"] > 2 * 2 * 8  # state and noise of two numbers
    assert row["speedup_over_best"] is None  # no second device


def test_steps_that_are_scaled_up_pay_for_no_large_buffers() -> None:
    """10 us per step and 0.3 s per call: 1.5 s suffice for about 150,000 steps, in buffers of that size."""

    class Slow(Run):
        def seconds(self, solver=None, block_length=None):
            return 0.3 + 1e-5 * (block_length or self.shape.capacity)

    whole = Slow(CASES["mixture"](), None, Sequential(), 1_000_000)
    timed = kernels._affordable(whole, 1.5)
    assert timed.shape.capacity == pytest.approx(150_000, rel=0.01)
    assert kernels._affordable(timed, 1.6) is timed


def test_without_repair_blocks_take_no_further_step() -> None:
    from benchmarks._runs import in_blocks, typical_states, without_repair

    case = CASES["mixture"](2000)
    run = in_blocks(case, typical_states(case), 8)
    both = [run(solver)[0].stats for solver in (None, without_repair(run))]
    repaired, alone = ((int(s.num_sequential_steps[0]), int(s.num_fn_evals[0])) for s in both)
    assert alone == (256, 2048)
    assert repaired > alone


def test_beside_another_device_the_cpu_is_timed_too(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    timing = kernels._on_cpu("mixture", 2000, kernels.Effort(repeats=1, seconds=0.1))
    assert timing is not None
    assert timing["median_s"] > 0


def test_rows_become_a_table_and_a_file(row: dict, tmp_path: Path) -> None:
    other = row | {"case": "another"}
    save("here", [row | {"speedup": -1.0}, other], tmp_path)
    path = save("here", with_others("here", [row], ("case", "length"), tmp_path), tmp_path, faults=["none"])
    stored = json.loads(path.read_text(encoding="utf-8"))
    assert stored["environment"]["faults"] == ["none"]
    assert [r["case"] for r in stored["rows"]] == ["another", row["case"]]
    assert stored["rows"][1]["speedup"] == row["speedup"]
    (header, *body), _ = benchmark_tables.render(path)
    assert len(body) == 2
    assert body[1][header.index("efficiency vs own lanes")] == benchmark_tables.number(row["efficiency"])


AGREEMENT = """
import pathlib
from dataclasses import replace

import jax

from benchmarks import lanes

plan = lanes.PLANS[{name!r}]
case = plan.make(4096)
starts = case.start(jax.random.key(0), 64)
reference = lanes.by_hand(plan, case, starts, pathlib.Path({folder!r}))(starts, 16, jax.random.key(1))
reference.case = replace(case, kernel=case.kernel.with_step_size(1.001 * case.kernel.step_size))
try:
    reference.check()
except ArithmeticError as error:
    print(error)
"""


@pytest.mark.skipif(compiler_version() is None, reason="there is no C compiler")
@pytest.mark.parametrize("name", share([name for name, plan in lanes.PLANS.items() if plan.model], "mixture"))
def test_steps_by_hand_are_those_of_the_kernel(name: str, tmp_path: Path) -> None:
    """In float32; C steps whose step size is off by a thousandth are refused."""
    found = run_python(AGREEMENT.format(name=name, folder=str(tmp_path)))
    assert "of the C steps differ from pmcmc's by" in found


def test_lanes_are_timed_without_a_compiler(tmp_path: Path) -> None:
    rows = lanes.measure("mixture", (32, 64), None, scale=2**-8, repeats=1)
    assert [row["lanes"] for row in rows] == [32, 64]
    for row in rows:
        assert row["lane_steps"] == 1024
        assert row["over_c"] is None
        assert min(row[what]["median"] for what in ("noise", "steps", "together", "sequential 1", "sequential 4")) > 0
    assert lanes.summary(rows).endswith("no C steps were run")
    by_hand = [row | {"C together": {"median": 2.0}, "C all cores": {"median": 1.0}} for row in rows]
    best, shared = (min(row[what]["median"] for row in rows) for what in ("together", "all cores"))
    assert f"mixture, MALA {best / 2:.2f} (on all cores {shared:.2f})" in lanes.summary(by_hand)
    (header, *body), _ = benchmark_tables.render(save("lanes", by_hand, tmp_path))
    assert body[0][header.index("C ns")] == "2.00"


def test_names_of_cases_and_suites_exist() -> None:
    assert set(gpu.CASES) | set(command.QUICK_CASES) <= set(CASES)
    assert command.file_of("end-to-end").startswith("end_to_end_")


def test_a_budget_leaves_three_runs() -> None:
    calls: list[str] = []
    timing = alternate({"a": lambda: calls.append("a"), "b": lambda: calls.append("b")}, repeats=9, budget=0.0)
    assert calls == ["a", "b"] * 4
    assert set(timing) == {"a", "b"}


def test_the_run_that_compiles_is_told_apart() -> None:
    seconds = iter([100.0, 1.0, 5.0, 2.0])
    timing = alternate({"a": lambda: next(seconds)}, repeats=3, seconds_of=lambda s: s)
    assert timing == {"a": {"first_s": 100.0, "median_s": 2.0, "min_s": 1.0, "max_s": 5.0}}


def test_peers_need_neither_jax_nor_pmcmc() -> None:
    code = "import sys, benchmarks.peers; assert not {'jax', 'pmcmc', 'numpyro'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True, cwd=Path(__file__).parents[1])


@pytest.mark.parametrize("name", [name for name in MODELS if name != "logistic_100_000"])
def test_models_have_the_sites_that_are_compared(name: str) -> None:
    model = MODELS[name]()
    try:
        data = model.data()
    except FileNotFoundError:
        pytest.skip("the shared data are absent")
    start = numpyro.handlers.substitute(model.numpyro, data={"beta": np.zeros(2)} if name == "kidiq" else {})
    sites = numpyro.handlers.trace(numpyro.handlers.seed(start, 0)).get_trace(**data)
    assert set(model.parameters) <= set(sites)
    assert all(np.isfinite(site["value"]).all() for site in sites.values() if site["type"] != "plate")
    assert all(size > 0 for key, size in model.stan_data(data).items() if key in model.sizes)
    again = model.data()
    assert all((data[key] == again[key]).all() for key in data)


def test_draws_that_differ_are_found() -> None:
    rng = np.random.default_rng(0)
    draws = lambda shift=0.0, scale=1.0: {f"x[{i}]": shift + scale * rng.standard_normal((4, 500)) for i in range(50)}
    good = {name: judging.summary(draws()) for name in "abc"}
    for facts in judging.agreement(good).values():
        assert max(facts["max_z_mean"], facts["max_z_sd"]) < facts["z_limit"] < 6
    for wrong, key in ((draws(shift=0.3), "max_z_mean"), (draws(scale=1.2), "max_z_sd")):
        found = judging.agreement({**good, "d": judging.summary(wrong)})
        assert found["d"][key] > found["d"]["z_limit"]
        assert found["d"][key] == max(facts[key] for facts in found.values())
    assert judging.agreement({"a": good["a"]}) == {}
    assert judging.agreement({"a": good["a"]}, good["b"])["a"]["max_z_mean"] < 6


def test_seconds_to_a_sample_size_separate_the_fixed_cost() -> None:
    short, long = (1000, {"seconds": 4.0, "min_ess": 500.0}), (11_000, {"seconds": 9.0, "min_ess": 5500.0})
    assert whole_call.seconds_to(4000, short, None) == pytest.approx(32.0)
    assert whole_call.seconds_to(100, short, None) == 4.0
    assert whole_call.seconds_to(2000, short, long) == pytest.approx(3.5 + 2.0)  # 4,000 draws of 0.5 ms
    assert whole_call.seconds_to(2000, long, short) == whole_call.seconds_to(2000, short, long)


def test_whole_calls_become_rows_and_a_table(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Three methods: one samples another posterior, and one fails."""
    rng = np.random.default_rng(0)
    asked: list[tuple[str, int]] = []

    def run(setting, method, seed, folder, limit):
        asked.append((method, seed))
        if method == "stan":
            return {"error": "no compiler"}
        theta = rng.standard_normal((4, setting.num_samples, 8)) + (method == "blackjax")
        np.savez(whole_call.files(folder)[1], theta=theta)
        return {"seconds": 1.0 + seed, "cpu_seconds": 1.0, "num_divergent": 0, "decision": "sequential"}

    monkeypatch.setattr(whole_call, "run", run)
    methods, rows = ["pmcmc", "numpyro vectorized", "numpyro sequential", "blackjax", "stan"], []
    for num_samples, cached in ((200, False), (400, False), (200, True)):
        setting = whole_call.Setting("eight_schools", num_samples, cached)
        rows.append(whole_call.measure(setting, methods, 2, 60, tmp_path))
    assert asked[:10] == [(m, 0) for m in methods] + [(m, 1) for m in methods[::-1]]
    assert asked[20:22] == [("pmcmc", 2), ("pmcmc", 0)]  # another seed fills the cache
    whole_call.derive(rows)
    for row in rows:
        assert not row["agrees"]
        assert row["runs"]["pmcmc"]["seconds"] == 1.5
        assert row["runs"]["pmcmc"]["speedup"] == 1.0
        assert row["runs"]["pmcmc"]["decision"] == "sequential"
        assert row["runs"]["stan"] == {"error": "no compiler", "num_failed": 2, "num_runs": 2}
        assert "DISAGREE" in whole_call.lines(row)
    assert [row["runs"]["pmcmc"]["bound"] for row in rows] == [False, False, True]
    (header, *body), source = benchmark_tables.render(save("calls", rows, tmp_path, peers={"nutpie": "0.0"}))
    assert "nutpie 0.0" in source
    assert len(body) == 3
    monkeypatch.setitem(benchmark_tables.TABLES, "calls", benchmark_tables.whole_calls)
    (header, *body), _ = benchmark_tables.render(tmp_path / "calls.json")
    assert [line[0] for line in body] == ["eight schools, 200", "eight schools, 400", "eight schools, 200, cache"]
    assert body[0][header.index("blackjax, seconds")] == "1.50 (differs)"
    assert body[0][header.index("stan, seconds")] == "failed"
    assert all(len(part[0]) <= 8 for part in benchmark_tables.parts([header, *body]))


@pytest.mark.parametrize("name", HIERARCHIES)
def test_forms_of_hierarchies_differ_at_the_named_sites(name: str) -> None:
    hierarchy = HIERARCHIES[name]()
    with jax.numpy_rank_promotion("allow"):
        model, reparam = hierarchy.form("chosen")
        chosen = numpyro_target(model, (), {}, reparam)
        by_hand = numpyro_target(hierarchy.form("non-centred")[0], (), {})
    assert set(chosen.centredness) == set(hierarchy.sites)
    changed = {f"{site}_decentered" for site in hierarchy.sites}
    assert changed == set(by_hand.spec.template) - set(chosen.spec.template)
