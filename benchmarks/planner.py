"""Measure how well ``solver="auto"`` decides: whole cold calls with "auto" and with every fixed choice.

Each pair of a posterior and a kernel is sampled for about ``--seconds`` of sequential solving. The seconds that count
run from the end of warm-up to the end of the call (pilot, compilation and solve; set-up and warm-up are the same for
all):

    regret = auto / best of all,    speed-up = sequential / auto    (at least 0.9 wanted)
    path   = actual / predicted critical path                       (within a factor 1.5 wanted, in 90 %)

Sequential sampling and "auto" are run alternately, and the run of median seconds counts. Runs that cannot pay off are
skipped, and the reason is recorded.

    python -m benchmarks.planner [--pairs funnel/HMC ...] [--seconds 3] [--save planner_cpu] [--quick]
"""

import argparse
import gc
import math
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import jax
import numpy as np

from benchmarks._harness import save, with_others
from benchmarks.posteriors import POSTERIORS, Posterior
from pmcmc import HMC, MALA, NUTS, Chain, EnsembleAdaptation, Kernel, RandomWalk, Warmup, from_blackjax
from pmcmc._xla.compile import forget_programs
from pmcmc.planning import predict_sweeps
from pmcmc.recurrence import RESULTS, MultipleShooting, RecurrenceSolver, Sequential, quasi_deer
from pmcmc.sampling import automatic

BLOCKS = (16, 64, 256)
# If a solve takes this many times as long as the sequential one, larger numbers of blocks are skipped.
HOPELESS = 3.0
# quasi-DEER evaluates D + 1 steps of every state at each iteration. Beyond these sizes it takes minutes and is not run.
QUASI_DIM, QUASI_STATES, QUASI_ITERS = 12, 10**6, 20
# Numbers kept, over all chains, beyond which the benchmark thins; and the largest number of steps.
MAX_NUMBERS, MAX_STEPS = 2 * 10**7, 5 * 10**7


@dataclass(frozen=True)
class Pair:
    """A posterior with a kernel.

    Args:
        posterior: Makes the posterior.
        kernel: The kernel, not tuned.
        num_chains: Number of chains.
    """

    posterior: Callable[[], Posterior]
    kernel: Kernel
    num_chains: int = 1


def _pairs() -> dict[str, Pair]:
    """Return the pairs by name. A further kernel needs one more line; those of BlackJAX need blackjax."""
    import blackjax

    found = {}

    def add(posterior: str, kernel_name: str, kernel: Kernel, num_chains: int = 1) -> None:
        name = f"{posterior}/{kernel_name}" + (f"/{num_chains}" if num_chains > 1 else "")
        found[name] = Pair(POSTERIORS[posterior], kernel, num_chains)

    for name in POSTERIORS:
        add(name, "HMC", HMC())
    for name in ("eight_schools", "funnel", "banana", "mixture", "separated", "irt", "german_credit"):
        add(name, "MALA", MALA())
    for name in ("anisotropic", "correlated", "varying_intercepts"):
        add(name, "MALA", MALA())
    # Half the period of a whitened Gaussian: x becomes -x, and distances do not change.
    add("correlated", "resonant", HMC(step_size=math.pi / 10, num_integration_steps=10, step_size_jitter=0.0))
    for name in ("eight_schools", "correlated", "german_credit", "funnel"):
        add(name, "NUTS", NUTS())
    walk = blackjax.additive_step_random_walk.normal_random_walk
    for name in ("correlated", "eight_schools", "german_credit"):
        add(name, "RandomWalk", RandomWalk())
    add("correlated", "RWM", from_blackjax(walk, sigma=0.7 * np.ones(10, np.float32)))
    add("correlated", "Barker", from_blackjax(blackjax.barker_proposal, step_size=None))
    for name in ("eight_schools", "anisotropic"):
        add(name, "HMC", HMC(), num_chains=4)
    for name in ("mixture", "german_credit"):
        add(name, "MALA", MALA(), num_chains=4)
    return found


PAIRS = _pairs()
COMPARED = ("sequential", "auto")
QUICK_SOLVERS = (*COMPARED, "64 blocks")
QUICK = ("mixture/MALA", "funnel/HMC", "correlated/resonant", "eight_schools/HMC/4")


@dataclass
class Stopwatch(Warmup):
    """`EnsembleAdaptation` that records when it ended: "auto" decides only about what comes after it."""

    inner: EnsembleAdaptation = field(default_factory=EnsembleAdaptation)
    end: float = 0.0

    def count_starts(self, target: Any, num_given: int = 1) -> int:
        return self.inner.count_starts(target, num_given)

    def tuned_shapes(self, *arguments: Any) -> Any:
        return self.inner.tuned_shapes(*arguments)

    def run(self, *arguments: Any) -> Any:
        tuned = jax.block_until_ready(self.inner.run(*arguments))
        self.end = time.perf_counter()
        return tuned


def measure(
    name: str, pair: Pair, seconds: float, solvers: dict[str, RecurrenceSolver | str], repeats: int
) -> dict[str, Any]:
    """Run a pair with each solver and judge "auto".

    Sequential sampling and "auto" differ by a few percent, and so do two runs of either: they are run alternately.
    """
    posterior = pair.posterior()
    per_step = _seconds_per_step(posterior, pair, seconds)
    num_steps = min(int(float(f"{seconds / per_step:.2g}")), MAX_STEPS)
    runs: dict[str, dict[str, Any]] = {}
    thinning = math.ceil(num_steps * pair.num_chains * (posterior.dim + 8) / MAX_NUMBERS)
    row: dict[str, Any] = {
        "pair": name,
        "posterior": posterior.name,
        "dim": posterior.dim,
        "kernel": type(pair.kernel).__name__,
        "num_chains": pair.num_chains,
        "num_samples": num_steps,
        "thinning": thinning,
        "seconds_per_step": per_step,
        "runs": runs,
    }
    call = partial(timed_call, posterior, pair, num_steps=num_steps, thinning=thinning)
    compared = {label: solvers[label] for label in COMPARED}
    found = [{label: call(solver) for label, solver in compared.items()} for _ in range(repeats)]
    for label in COMPARED:
        runs[label] = _typical([one[label][0] for one in found])
    plan = found[0]["auto"][1]
    for label, solver in solvers.items():
        if label not in COMPARED:
            excuse = _pointless(label, posterior.dim, num_steps, runs)
            runs[label] = {"not_run": excuse} if excuse else call(solver)[0]
    row.update(_judge(runs, plan, pair.num_chains))
    return row


def _typical(runs: list[dict[str, Any]]) -> dict[str, Any]:
    """Return the run of median seconds, with the seconds of all and the median of whole calls; or a failed run."""
    failed = [run for run in runs if "error" in run]
    if failed:
        return failed[0]
    runs = sorted(runs, key=lambda run: run["seconds"])
    every = {f"all_{key}": [run[key] for run in runs] for key in ("seconds", "wall_seconds")}
    return runs[len(runs) // 2] | every | {"wall_seconds": float(np.median(every["all_wall_seconds"]))}


def _solvers() -> dict[str, RecurrenceSolver | str]:
    """Return the solvers in the order in which they run."""
    blocks = {f"{p} blocks": MultipleShooting(num_blocks=p) for p in BLOCKS}
    return {"sequential": Sequential(), "auto": "auto", **blocks, "quasi_deer": quasi_deer(max_iters=QUASI_ITERS)}


def _seconds_per_step(posterior: Posterior, pair: Pair, seconds: float) -> float:
    """Return the seconds per step of sequential sampling, all chains, from a run long enough to be timed."""
    sample, num_steps = posterior.sampler(), 1000
    options = dict(kernel=pair.kernel, solver=Sequential(), num_chains=pair.num_chains, progress_bar=False)
    while True:
        took = sample(0, num_samples=num_steps, **options).report.solve_seconds
        if took > 0.3 * seconds or num_steps >= MAX_STEPS:
            return took / num_steps
        num_steps = min(MAX_STEPS, math.ceil(num_steps * min(30.0, 0.5 * seconds / took)))


def _pointless(label: str, dim: int, num_steps: int, runs: dict[str, dict[str, Any]]) -> str:
    """Return why this solver is not worth running here, or ""."""
    if label == "quasi_deer":
        fits = dim <= QUASI_DIM and num_steps * dim <= QUASI_STATES
        return "" if fits else f"D = {dim}, T = {num_steps:,}: minutes"
    if "blocks" not in label:
        return ""
    blocks, alone = int(label.split()[0]), runs["sequential"].get("solve_seconds", math.inf)
    if num_steps < 16 * blocks:
        return "blocks would be shorter than 16 steps"
    slow = [n for n, r in runs.items() if "blocks" in n and r.get("solve_seconds", 0.0) > HOPELESS * alone]
    return f"{slow[0]} solved more than {HOPELESS:.0f} times as long as sequential sampling" if slow else ""


def timed_call(
    posterior: Posterior, pair: Pair, solver: RecurrenceSolver | str, *, num_steps: int, thinning: int
) -> tuple[dict[str, Any], Any]:
    """Make one whole call with nothing compiled; return its facts and its plan, if any."""
    jax.clear_caches()
    forget_programs()
    gc.collect()
    sample, watch = posterior.sampler(), Stopwatch()
    options: dict[str, Any] = dict(kernel=pair.kernel, num_chains=pair.num_chains, progress_bar=False, warmup=watch)
    begin = time.perf_counter()
    try:
        chain = sample(0, solver=solver, num_samples=num_steps, thinning=thinning, **options)
    except Exception as error:  # a crash of one run is a finding, not the end of the benchmark
        return {"error": f"{type(error).__name__}: {error}", "wall_seconds": time.perf_counter() - begin}, None
    end = time.perf_counter()
    facts = {"seconds": end - watch.end, "wall_seconds": end - begin, **_facts(chain)}
    spent = facts["compile_seconds"] + facts["pilot_seconds"] + facts["solve_seconds"]
    facts["host_seconds"] = facts["seconds"] - spent
    return facts, chain.report.plan


def _facts(chain: Chain) -> dict[str, Any]:
    """Return what the report says, and what the plan predicted."""
    report = chain.report
    facts: dict[str, Any] = {
        "warmup_seconds": report.warmup_seconds,
        "compile_seconds": report.compile_seconds,
        "pilot_seconds": report.pilot_seconds,
        "solve_seconds": report.solve_seconds,
        "decision": report.decision,
        "reason": report.reason,
        "fallback": report.fallback,
        "result": sorted({RESULTS(int(code)).name for code in report.result}),
        "num_blocks": report.num_blocks,
        "num_sequential_steps": int(np.max(report.num_sequential_steps)),
        "acceptance_rate": float(np.mean(report.acceptance_rate)),
    }
    if (plan := report.plan) is not None:
        facts |= {
            "chosen": plan.chosen.name,
            "predicted_path": plan.chosen.num_steps + report.num_steps - plan.num_steps,
            "predicted_seconds": plan.chosen.seconds,
            "predicted_sequential_seconds": plan.sequential_seconds,
            "costs": plan.costs._asdict(),
            "coalescence_steps": report.coalescence_steps.tolist(),
        }
    return facts


def _judge(runs: dict[str, dict[str, Any]], plan: Any, num_chains: int) -> dict[str, Any]:
    """Compute the figures of merit; None where a run is missing."""
    found: dict[str, Any] = {}
    for suffix, key in (("", "seconds"), ("_with_warmup", "wall_seconds")):
        seconds = {name: run[key] for name, run in runs.items() if "error" not in run and key in run}
        best = min(seconds, key=lambda name: seconds[name], default=None)
        auto, alone = seconds.get("auto"), seconds.get("sequential")
        found["best" + suffix] = best
        found["regret" + suffix] = auto / seconds[best] if auto and best else None
        found["speedup" + suffix] = alone / auto if auto and alone else None
    auto_run = runs["auto"]
    found["path"] = None
    if auto_run.get("decision") == "shooting":
        found["path"] = auto_run["num_sequential_steps"] / auto_run["predicted_path"]
    found["fixed_paths"] = _fixed_paths(runs, plan, num_chains)
    return found


def _fixed_paths(runs: dict[str, dict[str, Any]], plan: Any, num_chains: int) -> dict[str, float]:
    """Return actual over predicted critical path for fixed numbers of blocks, if all pairs of the pilot merged."""
    pilot = None if plan is None else plan.coalescence
    if pilot is None or not np.all(pilot.merged):
        return {}
    paths, length = {}, runs["sequential"]["num_sequential_steps"]
    for blocks in BLOCKS:
        run = runs.get(f"{blocks} blocks", {})
        if "num_sequential_steps" in run:
            expected = predict_sweeps(pilot, length=length, num_blocks=blocks, num_chains=num_chains)
            paths[str(blocks)] = run["num_sequential_steps"] / expected.num_sequential_steps.value
    return paths


def line(row: dict[str, Any]) -> str:
    """Return the line of one pair."""
    show = lambda value: "    -" if value is None else f"{value:5.2f}"
    brief = lambda run: f"{run['seconds']:.1f}" if "seconds" in run else ("!" if "error" in run else "-")
    auto = row["runs"]["auto"]
    seconds = ", ".join(f"{name} {brief(run)}" for name, run in row["runs"].items())
    decided = auto.get("chosen", auto.get("decision", "error")) + (" (fell back)" if auto.get("fallback") else "")
    text = (
        f"{row['pair']:28s} T={row['num_samples']:>9,}  regret {show(row['regret'])} ({row['best']}), speed-up "
        f"{show(row['speedup'])}, path {show(row['path'])}; with warm-up: regret {show(row['regret_with_warmup'])}, "
        f"speed-up {show(row['speedup_with_warmup'])}; {decided}; s: {seconds}"
    )
    errors = [f"\n    {name}: {run['error']}" for name, run in row["runs"].items() if "error" in run]
    return text + "".join(errors)


def summary(rows: list[dict[str, Any]]) -> str:
    """Summarise all pairs."""
    have = lambda key: [row[key] for row in rows if row[key] is not None]
    lines = [f"{len(rows)} pairs"]
    for suffix, text in (("", "after warm-up"), ("_with_warmup", "whole call")):
        regret, speedup = have("regret" + suffix), have("speedup" + suffix)
        if regret and speedup:
            slow = sum(s < 0.9 for s in speedup)
            lines.append(
                f"{text}: regret median {np.median(regret):.2f}, worst {max(regret):.2f}; speed-up over sequential "
                f"median {np.median(speedup):.2f}, worst {min(speedup):.2f}, below 0.9 in {slow}"
            )
    fixed = [ratio for row in rows for ratio in row["fixed_paths"].values()]
    for text, ratios in (("auto", have("path")), ("fixed blocks", fixed)):
        if ratios:
            near = np.mean([1 / 1.5 <= ratio <= 1.5 for ratio in ratios])
            lines.append(f"critical path, {text}: {near:.0%} of {len(ratios)} within 1.5 of the prediction")
    return "\n".join(lines)


def main(arguments: list[str] | None = None) -> None:
    """Measure the pairs, print and save the rows, and print the summary."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pairs", nargs="*", default=None, choices=list(PAIRS), metavar="PAIR", help=", ".join(PAIRS))
    parser.add_argument("--seconds", type=float, default=None, help="of sequential solving; 3, or 0.3 with --quick")
    parser.add_argument("--repeats", type=int, default=3, help="of sequential sampling and of auto")
    parser.add_argument(
        "--save", default=None, help="name of the result file, without .json; what it holds of others stays"
    )
    parser.add_argument("--quick", action="store_true", help="four pairs, three solvers, 0.3 s each")
    options = parser.parse_args(arguments)
    seconds = options.seconds or (0.3 if options.quick else 3.0)
    short, automatic.SHORT_SECONDS = automatic.SHORT_SECONDS, min(automatic.SHORT_SECONDS, seconds / 3)
    solvers = {name: solver for name, solver in _solvers().items() if not options.quick or name in QUICK_SOLVERS}
    rows = with_others(options.save, [], ("pair",)) if options.save else []
    try:
        for name in options.pairs or (QUICK if options.quick else PAIRS):
            rows = [row for row in rows if row["pair"] != name] + [
                measure(name, PAIRS[name], seconds, solvers, options.repeats)
            ]
            print(line(rows[-1]), flush=True)
            if options.save:
                save(options.save, rows)
    finally:
        automatic.SHORT_SECONDS = short
    print(summary(rows))


if __name__ == "__main__":
    main()
