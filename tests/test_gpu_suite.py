"""The first ten minutes on a GPU, rehearsed on a CPU at a tiny size, and the predicted times."""

import json
import subprocess
import sys
from pathlib import Path

import jax
import pytest

from benchmarks import gpu, gpu_checks, gpu_prediction, kernels
from benchmarks._harness import device_name
from benchmarks.gpu_prediction import Costs, predicted_seconds
from pmcmc import doctor
from pmcmc._xla import graphs

ROOT = Path(__file__).parents[1]
COUNTS = {"launches": 10.0, "enqueues": 4.0, "waits": 0.5}
ROW = {"case": "a", "lanes": 1024, **COUNTS, **{f"repair_{key}": 2 * value for key, value in COUNTS.items()}}
COSTS = Costs(launch=1.0, enqueue=3.0, wait=100.0, bandwidth=2.0)


@pytest.fixture
def counted(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    """Write rows as the counted ones."""
    monkeypatch.setattr(gpu_prediction, "RESULTS", tmp_path)
    return lambda *rows: (tmp_path / "gpu_programs.json").write_text(json.dumps({"rows": rows}))


def test_a_prediction_adds_up(counted) -> None:
    """The longer of launches and enqueues, waits and bytes of each step."""
    counted(ROW | {"program": "solve"})
    zeroth, repair = 12.0 + 50.0 + 3.0, 24.0 + 100.0 + 3.0
    assert predicted_seconds("a", False, 7, 2, 6.0, COSTS) == 7 * zeroth + 2 * repair
    assert predicted_seconds("a", True, 7, 2, 6.0, COSTS) == 7 * (10.0 + 3.0) + 2 * (20.0 + 3.0)
    assert predicted_seconds("b", False, 7, 2, 6.0) is None


def test_counts_as_graphs_are_preferred(counted) -> None:
    graph = ROW | dict.fromkeys(("enqueues", "waits", "repair_enqueues", "repair_waits"), 0.0)
    counted(ROW | {"program": "solve"}, graph | {"program": "solve as graphs", "launches": 5.0})
    assert predicted_seconds("a", True, 1, 0, 0.0, COSTS) == 5.0


def test_every_first_case_is_predicted() -> None:
    for name in gpu.FIRST:
        assert predicted_seconds(gpu.ALL_CASES[name]().name, False, 100, 50, 1e6) > 0


def test_rows_are_written_in_order_and_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu, "FIRST", ("mixture",))
    monkeypatch.setattr(gpu_checks, "CHAINS", {"mixture_hmc": 512})
    monkeypatch.setattr(doctor, "faults", lambda: iter([doctor.Finding("A fault.", "A remedy.")]))
    written: list = []
    read = lambda: json.loads((tmp_path / f"{device_name()}_first.json").read_text())["rows"]
    monkeypatch.setattr(gpu, "line", lambda row: written.append(len(read())) or "")
    suite: list = []
    monkeypatch.setattr(kernels, "run", lambda *args, **facts: suite.append((args, facts)))
    gpu.run(0.01, tmp_path)
    fault, *chains, solve = read()
    assert fault == {"suite": "checks", "sound": False, "seen": "A fault. A remedy."}
    assert [("float32" in row["seen"], row["sound"]) for row in chains] == [(True, True), (False, True)]
    assert (solve["suite"], solve["result"], solve["graphs"]) == ("first", "successful", False)
    assert solve["measured_s"] > 0 < solve["predicted_s"]
    assert written == [1, 2, 3, 4]
    ((names, *_), facts), *_ = suite
    assert names == gpu.CASES
    assert facts["faults"][0] == "A fault. A remedy."


def test_a_wrong_chain_is_not_sound(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu_checks, "CHAINS", {"mixture_hmc": 512})
    states = gpu_checks._states
    monkeypatch.setattr(
        gpu_checks, "_states", lambda name, blocks: (states(name, blocks)[0] + bool(blocks), "successful")
    )
    assert not gpu_checks.exactness("mixture_hmc")["sound"]


def test_loops_are_switched_off_and_on_again(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(graphs, "fault", lambda: "")
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    with gpu.loops_as(False):
        assert gpu.compiler_options("gpu") is None
        assert not gpu.runs_graphs()
    assert gpu.compiler_options("gpu") == graphs.OPTIONS
    assert gpu.runs_graphs()
    gpu.compiler_options.cache_clear()


def test_it_needs_neither_arviz_nor_blackjax() -> None:
    code = "import sys; sys.modules['arviz'] = sys.modules['blackjax'] = None; from benchmarks import gpu; gpu.run"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
