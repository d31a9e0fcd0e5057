"""Multiple shooting against sequential sampling of the same chain, noise included on both sides.

``python -m benchmarks.shooting [--cases mixture banana] [--blocks 125 250 500] [--scale 0.1]``
"""

import argparse
from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks import gibbs, targets
from benchmarks._harness import alternate, ratio, save
from benchmarks.targets import Case
from pmcmc._types import PyTree
from pmcmc.recurrence import RESULTS, MultipleShooting, Sequential
from pmcmc.recurrence._lanes import LaneSolver
from pmcmc.sampling._engine import Clock, Engine, Segment, Shape

CASES = {**targets.CASES, **gibbs.CASES}


def measure(case: Case, blocks: list[int], repeats: int) -> list[dict]:
    """One row per number of blocks: seconds, ratio, certificate, depth and work."""
    bank = _typical_states(case)
    engine = Engine(case.target, case.kernel, jax.random.split(jax.random.key(0), 1), bank, case.scale)
    x0 = jax.tree.map(lambda x: x[:1], bank)
    run = lambda solver: _chain(engine, solver, x0, case.length)
    solvers = {"sequential": Sequential(), **{str(p): MultipleShooting(num_blocks=p) for p in blocks}}
    # the engine's own clock: looking its programs up takes some 50 ms a call, on either side
    runs: dict[str, Callable] = {name: partial(run, solver) for name, solver in solvers.items()}
    timing = alternate(runs, repeats, seconds_of=lambda result: result[1].run_seconds)
    rows = []
    for p in blocks:
        solution = run(solvers[str(p)])[0].solution
        stats = jax.tree.map(lambda x: x[0], solution.stats)
        rows.append(
            {
                "case": case.name,
                "length": case.length,
                "num_blocks": p,
                "result": RESULTS(int(solution.result[0])).name,
                "residual": float(solution.residual[0]),
                "acceptance_rate": float(jnp.mean(solution.aux.acceptance_rate)),
                "num_sequential_steps": int(stats.num_sequential_steps),
                "block_length": -(-case.length // p),
                "num_sweeps": int(stats.num_sweeps),
                "evaluations_per_step": int(stats.num_fn_evals) / case.length,
                "growth_rate": float(stats.growth_rate),
                "sequential": timing["sequential"],
                "shooting": timing[str(p)],
                "speedup": ratio(timing, "sequential", str(p)),
            }
        )
    return rows


def _chain(engine: Engine, solver: LaneSolver, x0: PyTree, num_steps: int) -> tuple[Segment, Clock]:
    """Noise and solve, as `pmcmc.sample` runs them."""
    num_blocks = solver.blocks_for(num_steps)
    unit = solver.unit if num_steps >= 4 * solver.unit * num_blocks else 1
    block_length = -(-num_steps // (num_blocks * unit)) * unit
    return engine.solve(solver, Shape(num_blocks, block_length), x0, np.zeros(engine.num_chains, int), block_length)


def _typical_states(case: Case, num_states: int = 64, num_steps: int = 2000) -> PyTree:
    """Last states of an ensemble of chains: what warm-up would hand over."""
    starts = case.start(jax.random.key(1), num_states)
    engine = Engine(case.target, case.kernel, jax.random.split(jax.random.key(2), num_states), starts, case.scale)
    segment, _ = _chain(engine, Sequential(), starts, num_steps)
    return jax.tree.map(lambda x: jnp.asarray(x[:, -1]), segment.chains(segment.solution.value))


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--cases", nargs="*", default=list(CASES))
    parser.add_argument("--blocks", nargs="*", type=int, default=[125, 250, 500])
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--scale", type=float, default=1.0, help="fraction of the full lengths")
    parser.add_argument("--save", default=None, help="name of the result file, without .json")
    options = parser.parse_args(arguments)
    rows = []
    for name in options.cases:
        case = CASES[name]()
        case = case.__class__(**{**case.__dict__, "length": max(1000, int(case.length * options.scale))})
        found = measure(case, options.blocks, options.repeats)
        for row in found:
            print(
                f"{row['case']:22s} T={row['length']:>8,} P={row['num_blocks']:>5}  {row['speedup']:5.2f}x  "
                f"({row['sequential']['median_s']:.3f} s / {row['shooting']['median_s']:.3f} s)  {row['result']}, "
                f"depth {row['num_sequential_steps']:,}, {row['num_sweeps']} sweeps, "
                f"work {row['evaluations_per_step']:.2f}, acceptance {row['acceptance_rate']:.2f}",
                flush=True,
            )
        rows += found
    best = {row["case"]: max(r["speedup"] for r in rows if r["case"] == row["case"]) for row in rows}
    print("best:", ", ".join(f"{case} {np.round(value, 2)}x" for case, value in best.items()))
    if options.save:
        print(save(options.save, rows))


if __name__ == "__main__":
    main()
