"""Measure a step of a lane on a CPU: noise, steps and both, beside steps written by hand in C and sequential sampling.

All figures are nanoseconds per lane and step, without compilation, medians of alternating runs of the same number of
lane-steps in one process:

    noise, steps     programs of the engine apart, on one core; the steps are those of blocks without repair
    together         the program that does both, as in sampling, on one core
    all cores        the same in as many threads as the engine uses
    C ...            the same in C, with lanes innermost (`lanes_reference.c`), on one core, and on all cores
    sequential       one chain, and four chains, by `Sequential`, noise included

Before anything is timed, noise and steps of C must agree with those of pmcmc up to float32 rounding. Without ``cc`` the
C columns are left out.

    python -m benchmarks.lanes [--cases mixture ...] [--lanes 64 128 256] [--quick] [--save NAME]
"""

import argparse
import gc
import math
import os
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks import gibbs, targets
from benchmarks._harness import RESULTS, SKETCHES, alternate, save, with_others
from benchmarks._reference import CHUNK, Reference, compile_reference, compiler_version
from benchmarks._runs import in_blocks, in_order, noise_and_steps, typical_states, without_repair
from benchmarks.cases import CASES
from benchmarks.targets import Case
from pmcmc._pytree import PyTree
from pmcmc._xla.compile import num_cores
from pmcmc.target import Basis

LANES = (64, 128, 256)
CHECKED_LANES, CHECKED_STEPS = 64, 64  # by which the C steps are compared with pmcmc's
BUSY = 0.5  # a load per core, before the first run, above which figures are not worth keeping


class Plan(NamedTuple):
    """A case of this suite.

    Attributes:
        make: Makes the case of a given length.
        lane_steps: Steps of all lanes together in one run.
        model: Macro of the C steps; None if there are none.
        data: Returns what the C density reads.
    """

    make: Callable[[int], Case]
    lane_steps: int
    model: str | None = None
    data: Callable[[], tuple[Any, ...]] = tuple


def dense_eight_schools(length: int) -> Case:
    """Eight schools by HMC, in a dense basis like that of warm-up."""
    case = targets.eight_schools(length)
    states = np.asarray(typical_states(case), float)
    loc, scale = states.mean(0), np.linalg.cholesky(np.cov(states.T))
    whitened = jnp.asarray(np.linalg.solve(scale, (states - loc).T).T, float)
    target = case.target.with_basis(Basis(jnp.asarray(loc, float), jnp.asarray(scale, float)))
    start = lambda key, n: whitened[jnp.arange(n) % len(whitened)]
    return replace(case, name="eight schools in a dense basis, HMC", target=target, start=start, settle=0)


PLANS: dict[str, Plan] = {
    "mixture": Plan(CASES["mixture"], 2**18, "MIXTURE"),
    "banana": Plan(CASES["banana"], 2**18),
    "eight_schools": Plan(CASES["eight_schools"], 2**18),
    "eight_schools_dense": Plan(dense_eight_schools, 2**18, "EIGHT_SCHOOLS", lambda: (gibbs.EFFECT, gibbs.ERROR)),
    "eight_schools_mala": Plan(CASES["eight_schools_mala"], 2**18),
    "gaussian_10": Plan(CASES["gaussian_10"], 2**18),
    "gaussian_100": Plan(CASES["gaussian_100"], 2**15),
    "german_credit": Plan(CASES["german_credit"], 2**13, "LOGISTIC", lambda: targets.german_data()[::-1]),
    "german_credit_hmc": Plan(CASES["german_credit_hmc"], 2**13),
    "eight_schools_nuts": Plan(CASES["eight_schools_nuts"], 2**15),
    "schools_gibbs": Plan(CASES["schools_gibbs"], 2**16),
}


def measure(name: str, lanes: Sequence[int], folder: Path | None, scale: float, repeats: int) -> list[dict[str, Any]]:
    """Return one row for each number of lanes, all from one alternation.

    Args:
        name: Case, a key of `PLANS`.
        lanes: Numbers of lanes.
        folder: Where C libraries are written; None without a compiler.
        scale: Fraction of the lane-steps of the plan.
        repeats: Timed runs of each callable.
    """
    plan = PLANS[name]
    unit = CHUNK * math.lcm(*lanes)
    lane_steps = max(1, round(plan.lane_steps * scale / unit)) * unit
    case = plan.make(lane_steps)
    bank = typical_states(case)
    c_steps = by_hand(plan, case, bank, folder) if plan.model and folder else None
    sequential = {f"sequential {n}": in_order(case, bank, n, lane_steps // n).seconds for n in (1, 4)}
    runs = {(0, what): run for what, run in sequential.items()}
    for n in lanes:
        runs |= {(n, what): run for what, run in _runs_of(case, bank, n, c_steps).items()}
    timing = alternate({f"{n} {what}": run for (n, what), run in runs.items()}, repeats, lambda s: s)
    scaled = lambda times: {k.removesuffix("_s"): 1e9 * s / lane_steps for k, s in times.items() if k != "first_s"}
    rows = []
    for n in lanes:
        figures = {what: scaled(timing[f"{m} {what}"]) for m, what in runs if m in (0, n)}
        row = {"suite": "lanes", "case": case.name, "lanes": n, "dim": case.dim, "lane_steps": lane_steps, **figures}
        over = {
            "over_c": _over(row, "together", "C together"),
            "over_c_all_cores": _over(row, "all cores", "C all cores"),
        }
        rows.append(row | over)
    return rows


def by_hand(plan: Plan, case: Case, bank: PyTree, folder: Path) -> Callable[..., Reference]:
    """Compile the C steps of a case, check them, and return what makes a `Reference` of starts, steps and a key."""
    make = partial(Reference, compile_reference(str(plan.model), folder), case, plan.data())
    make(_starts(bank, CHECKED_LANES), CHECKED_STEPS, jax.random.key(0)).check()
    return make


def _runs_of(case: Case, bank: PyTree, lanes: int, c_steps: Callable[..., Reference] | None) -> dict[str, Callable]:
    """Return what is timed for one number of lanes, by name; each returns its seconds."""
    threads = in_blocks(case, bank, lanes)
    blocks = replace(threads, in_threads=False)
    noise, steps = noise_and_steps(blocks)
    runs: dict[str, Callable[[], float]] = {
        "noise": noise,
        "steps": steps,
        "together": partial(blocks.seconds, without_repair(blocks)),
        "all cores": partial(threads.seconds, without_repair(threads)),
    }
    if c_steps:
        arguments = _starts(bank, lanes), case.length // lanes, jax.random.key(0)
        alone, shared = c_steps(*arguments), c_steps(*arguments, num_threads=num_cores())
        runs |= {"C noise": _timed(alone.draw), "C steps": _timed(alone.walk), "C together": _timed(alone.sample)}
        runs |= {"C all cores": _timed(shared.sample)}
    return runs


def _starts(bank: PyTree, lanes: int) -> np.ndarray:
    """Return the starts of lanes."""
    return np.resize(np.asarray(bank), (lanes, np.shape(bank)[1]))


def _timed(run: Callable[[], None]) -> Callable[[], float]:
    """Return a function that runs and returns the seconds."""

    def seconds() -> float:
        begin = time.perf_counter()
        run()
        return time.perf_counter() - begin

    return seconds


def _over(row: dict[str, Any], what: str, in_c: str) -> float | None:
    """Return the time of noise and steps over that of C; None without C."""
    return row[what]["median"] / row[in_c]["median"] if in_c in row else None


def line(row: dict[str, Any]) -> str:
    """Return the line of one row."""
    figures = "  ".join(f"{key} {value['median']:.1f}" for key, value in row.items() if isinstance(value, dict))
    return f"{row['case']:36s} {row['lanes']:>4} lanes, ns: {figures}"


def summary(rows: list[dict[str, Any]]) -> str:
    """Return the last line: the best lanes of each case over the best C."""
    parts = []
    for case in dict.fromkeys(row["case"] for row in rows if "C together" in row):
        best = lambda what, case=case: min(row[what]["median"] for row in rows if row["case"] == case)
        part = f"{case} {best('together') / best('C together'):.2f}"
        parts.append(f"{part} (on all cores {best('all cores') / best('C all cores'):.2f})")
    return "pmcmc's lanes over C on one core: " + ("; ".join(parts) or "no C steps were run")


def main(arguments: list[str] | None = None) -> None:
    """Measure the cases, and print and save the rows."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", nargs="*", default=list(PLANS), choices=list(PLANS), metavar="NAME")
    parser.add_argument("--lanes", nargs="*", type=int, default=LANES, help="multiples of 32")
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--quick", action="store_true", help="an eighth of the steps, 5 repeats, into build/benchmarks")
    parser.add_argument("--save", default=None, help="name of the result file, without .json; written after each case")
    options = parser.parse_args(arguments)
    load, version = os.getloadavg()[0], compiler_version()
    print(
        f"load {load:.1f} on {num_cores()} cores" + (": busy, do not keep these figures" * (load > BUSY * num_cores()))
    )
    if version is None:
        print("There is no cc: the steps in C are left out.")
    scale, repeats, folder = (1 / 8, 5, SKETCHES) if options.quick else (1.0, options.repeats, RESULTS)
    facts = {"load_before": load, "packages": {"cc": version} if version else {}}
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as libraries:
        for name in options.cases:
            found = measure(name, options.lanes, Path(libraries) if version else None, scale, repeats)
            rows += found
            print(*map(line, found), sep="\n", flush=True)
            if options.save:
                save(options.save, with_others(options.save, rows, ("case", "lanes"), folder), folder, **facts)
            jax.clear_caches()
            gc.collect()
    print(summary(rows))


if __name__ == "__main__":
    main()
