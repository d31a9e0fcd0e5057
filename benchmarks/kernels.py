"""Measure how close each kernel gets to the embarrassingly parallel limit, and its speed-up over sequential sampling.

One chain of T steps is solved in P blocks; noise and solve are timed, warm-up and compilation are not. It is compared
with

    sequential   the same chain sequentially; if that is slow, fewer steps of it, scaled up to T
    limit        P independent chains of T / P steps, the faster of two programs: the blocks without repair, and P
                 vmapped sequential chains
    efficiency   limit over shooting, at the P that is best for shooting; and relative to the limit at its own best P

in alternating runs, by medians. The limit is that of pmcmc's own lanes; `benchmarks.lanes` compares these with C.
Coalescence: mean steps until the repair of a block merges, in the longest blocks run.

    python -m benchmarks.kernels [--cases mixture banana] [--blocks 64 256 1024] [--scale 0.1] [--save NAME]
"""

import argparse
import gc
import time
from collections.abc import Callable, Iterable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks._harness import RESULTS as FOLDER
from benchmarks._harness import alternate, peak_bytes, ratio, save, with_others
from benchmarks._runs import Run, compile_all, in_blocks, in_order, typical_states, without_repair
from benchmarks.cases import CASES
from benchmarks.targets import Case
from pmcmc._pytree import PyTree
from pmcmc.recurrence import RESULTS

BLOCKS = (64, 128, 256, 512)
MIN_BLOCK = 16


class Effort(NamedTuple):
    """How long to measure.

    Attributes:
        repeats: Timed runs of each callable.
        seconds: Seconds for one comparison; a quarter of them for one sequential run.
    """

    repeats: int = 7
    seconds: float = 4.0


def measure(name: str, blocks: Iterable[int], scale: float = 1.0, effort: Effort | None = None) -> dict[str, Any]:
    """Return one row: the best number of blocks, and all that were tried."""
    effort = effort or Effort()
    case = CASES[name]()
    case = replace(case, length=max(500, int(case.length * scale)))
    bank = typical_states(case)
    counts = [p for p in blocks if case.length >= MIN_BLOCK * p] or [max(2, case.length // MIN_BLOCK)]
    runs = [in_blocks(case, bank, p) for p in counts]
    tried = [{"compile_s": s, **_blocks(run, effort)} for run, s in zip(runs, compile_all(runs), strict=True)]
    best = min(tried, key=lambda row: row["shooting"]["median_s"])
    limits = min(tried, key=lambda row: row["limit"]["median_s"])
    row = {
        "suite": "kernels",
        "case": case.name,
        "dim": case.dim,
        "length": case.length,
        **against_all(case, bank, best["num_blocks"], effort),
        "best_limit": limits["limit"],
        "best_limit_blocks": limits["num_blocks"],
        "coalescence_mean": tried[0]["merge_mean"],
        "coalescence_longest": tried[0]["merge_longest"],
        "tried": tried,
        "peak_bytes": peak_bytes(),
    }
    seconds = row["shooting"]["median_s"]
    on_cpu = _on_cpu(name, case.length, effort)
    fastest = None if on_cpu is None else min(on_cpu["median_s"], row["sequential"]["median_s"])
    return row | {
        "efficiency_at_best": limits["limit"]["median_s"] / best["shooting"]["median_s"],
        "sequential_on_cpu": on_cpu,
        "speedup_over_best": None if fastest is None else fastest / seconds,
    }


def _blocks(run: Run, effort: Effort) -> dict[str, Any]:
    """Time shooting and its sweep 0 alone, which is the same program."""
    alone = partial(run.seconds, without_repair(run))
    timing = alternate({"shooting": run.seconds, "limit": alone}, effort.repeats, lambda s: s, effort.seconds)
    found = {"num_blocks": run.shape.num_blocks, **timing, **_facts(run)}
    del run.engine  # frees its buffers
    return found


def _facts(run: Run) -> dict[str, Any]:
    """Return certificate, critical path and work of a solve."""
    segment = run()[0]
    stats = jax.tree.map(lambda x: x[0], segment.stats)  # the first chain's
    blocks, length = run.shape.num_blocks, run.shape.capacity
    evaluations, depth = int(stats.num_fn_evals), int(stats.num_sequential_steps)
    return {
        "result": RESULTS(int(segment.result[0])).name,
        "residual": float(segment.residual[0]),
        "acceptance_rate": _finite(np.mean(segment.chains()[1].acceptance_rate)),
        "block_length": length,
        "num_sequential_steps": depth,
        "num_sweeps": int(stats.num_sweeps),
        "evaluations_per_step": evaluations / (blocks * length),
        "growth_rate": _finite(stats.growth_rate),
        "merge_mean": (evaluations - blocks * length) / max(1, blocks - 1),
        "merge_longest": depth - length,
    }


def _finite(value: jax.Array) -> float | None:
    """Return a number for JSON, or None if it is not finite: Gibbs updates have no acceptance rate."""
    return float(value) if bool(jnp.isfinite(value)) else None


def against_all(case: Case, bank: PyTree, num_blocks: int, effort: Effort, num_chains: int = 1) -> dict[str, Any]:
    """Time shooting with one P against both programs of the limit and sequential sampling."""
    run, ordered = in_blocks(case, bank, num_blocks, num_chains), in_order(case, bank, num_chains)
    chains = replace(in_order(case, bank, num_blocks * num_chains, run.shape.capacity), in_threads=False)
    compile_s = dict(zip(("sequential", "vmapped_chains"), compile_all([ordered, chains]), strict=True))
    ordered = _affordable(ordered, effort.seconds / 4)
    steps = ordered.shape.capacity
    runs: dict[str, Callable[[], Any]] = {
        "sequential": ordered.seconds,
        "shooting": run.seconds,
        "blocks_alone": partial(run.seconds, without_repair(run)),
        "vmapped_chains": chains.seconds,
    }
    timing = alternate(runs, effort.repeats, lambda s: s, 2 * effort.seconds)
    timing["sequential"] = {key: s * case.length / steps for key, s in timing["sequential"].items()}
    limit = min(("blocks_alone", "vmapped_chains"), key=lambda name: timing[name]["median_s"])
    found = _facts(run)
    return {
        **found,
        "num_blocks": num_blocks,
        **timing,
        "limit": timing[limit],
        "limit_is": limit,
        "sequential_steps_timed": steps,
        "speedup": ratio(timing, "sequential", "shooting"),
        "share_of_path": ratio(timing, "sequential", "shooting") * found["num_sequential_steps"] / case.length,
        "efficiency": ratio(timing, limit, "shooting"),
        "repair_step_cost": _repair_step(timing, found),
        "compile_s": compile_s,
        "bytes_per_draw": run.bytes_per_draw(),
    }


def _repair_step(timing: dict[str, dict[str, float]], found: dict[str, Any]) -> float | None:
    """Return the time of a repair step over that of a block step: 1 if comparing and rewriting cost nothing."""
    steps = found["merge_longest"]
    alone, all_of_it = timing["blocks_alone"]["median_s"], timing["shooting"]["median_s"]
    return (all_of_it - alone) / steps / (alone / found["block_length"]) if steps else None


def _affordable(ordered: Run, seconds: float) -> Run:
    """Return a sequential run of as many steps as take about ``seconds``, or of all of them.

    The shorter run has its own buffers: the fixed cost of a call with large buffers would otherwise be scaled up with
    its steps.
    """
    unit, length = ordered.solver.unit, ordered.shape.capacity
    steps, call = min(length, 2 * unit), min(ordered.seconds(None, unit) for _ in range(2))
    while steps < length:
        ordered.seconds(None, steps)
        took = ordered.seconds(None, steps) - call
        if took > seconds / 10:
            steps = max(unit, min(length, int(steps * seconds / took)) // unit * unit)
            return replace(ordered, num_steps=steps) if steps < length else ordered
        steps = min(length, 10 * steps)
    return ordered


def _on_cpu(name: str, length: int, effort: Effort) -> dict[str, float] | None:
    """Time sequential sampling on this machine's CPU; None if JAX uses it anyway, or has no access to it."""
    if jax.default_backend() == "cpu":
        return None
    try:
        cpu = jax.devices("cpu")[0]
    except RuntimeError:  # JAX_PLATFORMS leaves it out
        return None
    with jax.default_device(cpu):
        case = replace(CASES[name](), length=length)  # made again, because its arrays belong to a device
        ordered = _affordable(in_order(case, typical_states(case)), effort.seconds / 4)
        timing = alternate({"cpu": ordered.seconds}, effort.repeats, lambda s: s, effort.seconds)
    return {key: s * length / ordered.shape.capacity for key, s in timing["cpu"].items()}


def line(row: dict[str, Any]) -> str:
    """Return the line of one case."""
    return (
        f"{row['case']:34s} T={row['length']:>9,} P={row['num_blocks']:>5}  {row['speedup']:6.2f}x  "
        f"efficiency vs own lanes {row['efficiency']:.2f} ({row['efficiency_at_best']:.2f} of the best limit, "
        f"P={row['best_limit_blocks']})  {1000 * row['sequential']['median_s']:.1f} / "
        f"{1000 * row['shooting']['median_s']:.1f} ms  {row['result']}, "
        f"coalescence {row['coalescence_mean']:.0f} (longest {row['coalescence_longest']:,}), depth "
        f"{row['num_sequential_steps']:,}, {row['num_sweeps']} sweeps, work {row['evaluations_per_step']:.2f}, "
        f"acceptance {row['acceptance_rate'] or float('nan'):.2f}, {row['bytes_per_draw']:.0f} B a draw"
    )


def run(
    names: Iterable[str],
    blocks: Iterable[int] = BLOCKS,
    scale: float = 1.0,
    effort: Effort | None = None,
    save_as: str | None = None,
    folder: Path = FOLDER,
    minutes: float = float("inf"),
    **facts: Any,
) -> list[dict[str, Any]]:
    """Measure all cases; print and save each row.

    No case begins after ``minutes``.
    """
    rows: list[dict[str, Any]] = []
    began = time.perf_counter()
    for name in names:
        if time.perf_counter() - began > 60 * minutes:
            print(f"{name}: not measured, {minutes:g} minutes are over", flush=True)
            continue
        rows.append(measure(name, blocks, scale, effort))
        print(line(rows[-1]), flush=True)
        if save_as:
            save(save_as, with_others(save_as, rows, ("suite", "case", "length"), folder), folder, **facts)
        jax.clear_caches()
        gc.collect()
    return rows


def main(arguments: list[str] | None = None) -> None:
    """Parse the command line and run the cases."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", nargs="*", default=list(CASES), choices=list(CASES), metavar="NAME")
    parser.add_argument("--blocks", nargs="*", type=int, default=BLOCKS)
    parser.add_argument("--repeats", type=int, default=Effort().repeats)
    parser.add_argument("--seconds", type=float, default=Effort().seconds, help="for one comparison")
    parser.add_argument("--scale", type=float, default=1.0, help="fraction of the full lengths")
    parser.add_argument("--save", default=None, help="name of the result file, without .json; written after each case")
    options = parser.parse_args(arguments)
    run(options.cases, options.blocks, options.scale, Effort(options.repeats, options.seconds), options.save)


if __name__ == "__main__":
    main()
