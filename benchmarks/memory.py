"""Measure bytes: what the compiled programs of each case need per draw, and the peak memory of whole calls.

Programs: noise, states and info of a step, and what XLA needs besides them; compiled, never run. Calls: 4 chains of HMC
on a Gaussian with D = 10, with more and more draws. Each call has a process to itself, whose peak resident memory is
read at the end.

    python -m benchmarks.memory [--cases NAME ...] [--draws 100000 1000000 ...] [--save NAME]
"""

import argparse
import json
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp

import pmcmc
from benchmarks._fresh import run_fresh
from benchmarks._harness import peak_bytes, program_bytes, save, with_others
from benchmarks._runs import in_blocks, in_order, solve_program
from benchmarks.cases import CASES

QUICK_CASES = ("mixture", "banana", "eight_schools", "eight_schools_nuts", "schools_gibbs", "german_credit")
LENGTH, NUM_BLOCKS, DIM = 2**14, 64, 10


def programs(name: str) -> list[dict[str, Any]]:
    """Return the bytes per draw of the programs for blocks and for sequential sampling."""
    case = replace(CASES[name](), length=LENGTH)
    bank = case.start(jax.random.key(0), NUM_BLOCKS)
    rows = []
    for what, run in (("blocks", in_blocks(case, bank, NUM_BLOCKS)), ("in order", in_order(case, bank))):
        found = program_bytes(solve_program(run.engine, run.solver, run.shape))
        states = run.shape.num_blocks * run.shape.capacity
        rows.append(
            {
                "suite": "memory",
                "what": f"{case.name}, {what}",
                "dim": case.dim,
                **{f"bytes_{key.replace(' ', '_')}": size / states for key, size in found.items()},
            }
        )
    return rows


def call(num_samples: int) -> dict[str, Any]:
    """Sample in this process, which has run nothing else, and return its peak memory."""
    before = peak_bytes()["resident"]
    density = lambda x: -0.5 * jnp.sum(x**2)
    chain = pmcmc.sample(density, jnp.zeros(DIM), 0, num_samples=num_samples, num_chains=4, progress_bar=False)
    peak = peak_bytes()
    draws = jax.tree.leaves(chain.get_samples())[0].nbytes
    return {"resident": peak["resident"], "before": before, "draws": draws, "decision": chain.report.decision}


def main(arguments: list[str] | None = None) -> None:
    """Measure programs and calls, and print and save the rows."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", nargs="*", default=list(QUICK_CASES), metavar="NAME")
    parser.add_argument("--draws", nargs="*", type=int, default=[25_000, 250_000, 2_500_000], help="of each chain")
    parser.add_argument("--save", default=None, help="name of the result file, without .json")
    parser.add_argument("--one", type=int, default=None, help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if options.one:
        print(json.dumps(call(options.one)))
        return
    rows: list[dict[str, Any]] = []
    for name in options.cases:
        rows += programs(name)
        jax.clear_caches()
    for num_samples in options.draws:
        found = run_fresh("benchmarks.memory", str(num_samples))
        rows.append({"suite": "memory", "what": f"4 chains x {num_samples:,} draws, D = {DIM}", "dim": DIM, **found})
    for row in rows:
        text = ", ".join(f"{key} {value:,.0f}" for key, value in row.items() if isinstance(value, int | float))
        print(f"{row['what']:44s} {text}", flush=True)
    if options.save:
        save(options.save, with_others(options.save, rows, ("what",)))


if __name__ == "__main__":
    main()
