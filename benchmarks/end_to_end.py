"""Measure the seconds until the worst parameter has a given effective sample size: whole cold calls, all included.

Compared are pmcmc's default, NumPyro's NUTS with sequential or vectorised chains, and BlackJAX's NUTS; warm-up and
compilation count. A short run estimates how many draws per chain are needed; a separate process then takes them, and
another one takes more if they were too few. All runs are in float64, with 1,000 steps of warm-up per chain. Effective
sample sizes are NumPyro's.

    python -m benchmarks.end_to_end [--posteriors NAME ...] [--methods NAME ...] [--ess 10000] [--save NAME]
"""

import argparse
import math
from importlib.util import find_spec
from typing import Any

import jax

from benchmarks._fresh import answer, run_fresh
from benchmarks._harness import save, with_others
from benchmarks.judging import judge
from benchmarks.problems import problem
from benchmarks.samplers import NUM_CHAINS, runner

POSTERIORS = ("eight_schools", "german_credit", "mixture", "stochastic_volatility", "irt")
MANY = (64, 256, 1024)
# Number of chains of each method.
METHODS = {
    "pmcmc": NUM_CHAINS,
    "numpyro sequential": NUM_CHAINS,
    "numpyro vectorized": NUM_CHAINS,
    **{f"numpyro vectorized, {n} chains": n for n in MANY},
    "blackjax": NUM_CHAINS,
}
# Draws of the short run over all chains, and the least number of draws per chain of any run.
PILOT, FEWEST = 4000, 50
MARGIN = 1.15


def run_here(name: str, method: str, seed: int, num_samples: int) -> dict[str, Any]:
    """Run one method in this process."""
    jax.config.update("jax_enable_x64", True)
    jax.devices()
    what, chains = problem(name), METHODS[method]
    method = method.split(",")[0]
    samples, facts = runner(method)(method, what, seed, num_samples, chains)
    return {**facts, **judge(samples, what.reference), "num_samples": num_samples, "num_chains": chains}


def measure(name: str, method: str, target: float) -> dict[str, Any]:
    """Return the run that reached the target, or the last one tried."""
    row: dict[str, Any] = {"suite": "end-to-end", "posterior": name, "method": method, "ess_wanted": target}
    chains = METHODS[method]
    draws = max(FEWEST, PILOT // chains)
    found: dict[str, Any] = {}
    for seed in range(4):
        found = run_fresh("benchmarks.end_to_end", name, method, str(seed), str(draws))
        if "error" in found:
            return row | found
        missing = target / found["min_ess"]
        if seed and missing <= 1:
            break
        draws = max(FEWEST, math.ceil(MARGIN * missing * draws))
    return row | found | {"reached": found["min_ess"] >= target}


def line(row: dict[str, Any]) -> str:
    """Return the line of one posterior and method."""
    start = f"{row['posterior']:24s} {row['method']:32s}"
    if "error" in row:
        return f"{start} failed: {row['error']}"
    return (
        f"{start} {row['seconds']:6.1f} s  min ESS {row['min_ess']:8.0f}{'' if row['reached'] else ' (too few)'}  "
        f"{row['num_chains']:,} x {row['num_samples']:,} draws  rhat {row['max_rhat']:.3f}  "
        f"divergent {row['num_divergent']}"
    )


def main(arguments: list[str] | None = None) -> None:
    """Measure every posterior and method, and print and save the rows."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--posteriors", nargs="*", default=list(POSTERIORS), metavar="NAME")
    parser.add_argument("--methods", nargs="*", default=list(METHODS), choices=list(METHODS), metavar="NAME")
    parser.add_argument("--ess", type=float, default=10_000)
    parser.add_argument("--save", default=None, help="name of the result file, without .json; written after each run")
    parser.add_argument("--one", nargs=4, default=None, help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if options.one:
        answer(run_here, options.one)
        return
    jax.config.update("jax_enable_x64", True)  # as in the runs, so that the file records the right setting
    rows: list[dict[str, Any]] = []
    for name in options.posteriors:
        for method in options.methods:
            if method == "blackjax" and find_spec("blackjax") is None:
                print("blackjax is absent: skipped")
                continue
            rows.append(measure(name, method, options.ess))
            print(line(rows[-1]), flush=True)
            if options.save:
                save(options.save, with_others(options.save, rows, ("posterior", "method", "ess_wanted")))


if __name__ == "__main__":
    main()
