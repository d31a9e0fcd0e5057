"""The first ten minutes on a GPU: ``python -m benchmarks --gpu``.

In this order, each result written at once, and nothing begun after nine minutes:

1. checks (`benchmarks.gpu_checks`): loops as graphs run three times, products, scatters, chains against the CPU;
2. eight schools, German credit and the mixture, T = 100,000, with loops as graphs and driven by the host, beside the
   predicted time (`benchmarks.gpu_prediction`);
3. the suite of `benchmarks.kernels`: these and other cases against sequential sampling on the GPU and on the CPU in the
   same process (fewer steps, scaled up, where T would take long) and the embarrassingly parallel limit.

Files are ``results/<device>_first.json`` for the first two and ``results/<device>.json``. It needs neither ArviZ nor
BlackJAX.
"""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import numpy as np

from benchmarks import kernels
from benchmarks._harness import alternate, device_name, save
from benchmarks._runs import compile_all, in_blocks, typical_states
from benchmarks.cases import CASES as ALL_CASES
from benchmarks.gpu_checks import checks
from benchmarks.gpu_prediction import predicted_seconds
from pmcmc._xla import graphs
from pmcmc._xla.compile import compiler_options, forget_programs
from pmcmc.recurrence import RESULTS

# The most important first: the time may run out before the last ones.
FIRST = ("eight_schools", "german_credit", "mixture")
CASES = (
    *("german_credit", "german_credit_hmc", "eight_schools", "schools_gibbs", "mixture", "german_credit_nuts"),
    *("eight_schools_nuts", "banana", "mixture_hmc", "banana_nuts"),
)
BLOCKS = (256, 1024, 4096)
FIRST_BLOCKS = 1024


def run(scale: float, folder: Path, minutes: float = 9.0) -> None:
    """Check, measure the first cases twice, then run the suite; every result is saved at once."""
    began = time.perf_counter()
    left = lambda: minutes - (time.perf_counter() - began) / 60
    if jax.default_backend() == "cpu":
        print("No GPU is seen by JAX: this is a rehearsal on the CPU.")
    rows: list[dict[str, Any]] = []
    for row in first_rows(scale):
        rows.append(row)
        save(f"{device_name()}_first", rows, folder)
        print(line(row), flush=True)
        if left() <= 0:
            break
    faults = [row["seen"] for row in rows if row["suite"] == "checks"]
    blocks = [p for p in BLOCKS if p * kernels.MIN_BLOCK <= scale * 10**5]
    effort, name = kernels.Effort(repeats=5, seconds=4.0), device_name()
    kernels.run(CASES, blocks, scale, effort, name, folder, left(), faults=faults)
    print(f"{folder / name}.json")


def first_rows(scale: float) -> Iterator[dict[str, Any]]:
    """Yield the rows of the checks and of the first cases."""
    yield from checks()
    for name in FIRST:
        for as_graphs in (True, False) if runs_graphs() else (False,):
            yield solve_row(name, scale, as_graphs)


def runs_graphs() -> bool:
    """Whether loops run as graphs on the default device."""
    return jax.default_backend() == "gpu" and not graphs.fault()


@contextmanager
def loops_as(as_graphs: bool) -> Iterator[None]:
    """Compile loops as graphs, or to be driven by the host."""
    before = graphs.fault
    if not as_graphs:
        graphs.fault = lambda: "switched off"  # type: ignore[assignment]
    try:
        _compile_anew()
        yield
    finally:
        graphs.fault = before
        _compile_anew()


def _compile_anew() -> None:
    """Forget options and programs."""
    compiler_options.cache_clear()
    forget_programs()
    jax.clear_caches()


def solve_row(name: str, scale: float, as_graphs: bool) -> dict[str, Any]:
    """Time the solve of a case, and predict its time."""
    with loops_as(as_graphs):
        case = ALL_CASES[name]()
        case = replace(case, length=max(500, int(case.length * scale)))
        run = in_blocks(case, typical_states(case), min(FIRST_BLOCKS, max(2, case.length // kernels.MIN_BLOCK)))
        (compile_s,) = compile_all([run])
        timing = alternate({"solve": run.seconds}, repeats=3, seconds_of=lambda seconds: seconds)["solve"]
        segment, _ = run()
    blocks, length = run.shape.num_blocks, run.shape.capacity
    repair_steps = int(np.max(segment.stats.num_sequential_steps)) - length
    predicted = predicted_seconds(
        case.name, as_graphs, length, repair_steps, blocks * run.engine.bytes_per_step(run.solver)
    )
    return {
        "suite": "first",
        "case": case.name,
        "length": case.length,
        "num_blocks": blocks,
        "graphs": as_graphs,
        "result": RESULTS(int(segment.result[0])).name,
        "block_length": length,
        "repair_steps": repair_steps,
        "measured_s": timing["median_s"],
        "predicted_s": predicted,
        "compile_s": compile_s,
    }


def line(row: dict[str, Any]) -> str:
    """Return the printed line of a row."""
    if row["suite"] == "checks":
        return f"{'ok ' if row['sound'] else '!! '} {row['seen']}"
    predicted = "not predicted" if row["predicted_s"] is None else f"predicted {1000 * row['predicted_s']:.1f} ms"
    return (
        f"{row['case']}, T={row['length']:,}, P={row['num_blocks']:,}, {'graphs' if row['graphs'] else 'host'}: "
        f"{1000 * row['measured_s']:.1f} ms, {predicted} ({row['block_length']} + {row['repair_steps']} steps), "
        f"{row['result']}, compiled in {row['compile_s']:.0f} s"
    )
