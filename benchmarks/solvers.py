"""Count iterations of the parallel-Newton solvers on problems of their literature, against the published code's counts.

Our count: iterations until ``|x[t] - f(x[t-1], u[t])| <= 1e-4 + 1e-3 |x[t]|`` in every coordinate at every t. Published
count: iterations until an iterate moves by no more than that. Run

    python -m benchmarks.solvers [--problems german banana] [--seeds 10] [--first-seed 100] [--save solvers]

A row names its seeds. Choices (the banana's clip) were made on seeds 0-9, so seeds from 100 are the fair test; --save
keeps the rows of the file that belong to other problems or other seeds.
"""

import argparse
import time
from dataclasses import replace
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks._harness import save, with_others
from benchmarks.published import PROBLEMS, Problem
from pmcmc.recurrence import RESULTS

ABSOLUTE, RELATIVE = 1e-4, 1e-3


def count(problem: Problem, budget: int, key: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Return the iterations until the residual is small elementwise (budget + 1: never), and the solve's own result.

    The solver's tolerance is relative to each coordinate's spread, so it is set below ours; all iterates are kept and
    checked here one by one.
    """
    start_key, input_key, guess_key, probe_key = jax.random.split(key, 4)
    x0, inputs = problem.start(start_key), problem.inputs(input_key, problem.length)
    guess = problem.guess(guess_key, x0, problem.length)
    solver = replace(problem.solver(probe_key), tol=1e-5, max_iters=budget, num_iterates=budget + 1)
    found = solver.solve(problem.fn, x0, inputs, initial_guess=guess)

    def unsolved(k):
        path = found.iterates[jnp.minimum(k, budget)]
        images = jax.vmap(problem.fn)(jnp.concatenate([x0[None], path[:-1]]), inputs)
        small = jnp.all(jnp.abs(images - path) <= ABSOLUTE + RELATIVE * jnp.abs(path))
        return ~small & (k <= found.stats.num_iters)

    solved_at = jax.lax.while_loop(unsolved, lambda k: k + 1, 0)
    return jnp.where(solved_at > found.stats.num_iters, budget + 1, solved_at), found.result


def measure(problem: Problem, seeds: list[int], budget: int) -> dict:
    """Return one row of the table."""
    run = jax.jit(partial(count, problem, budget))
    begin = time.perf_counter()
    found = [run(jax.random.key(seed)) for seed in seeds]
    counts = [int(c) for c, _ in found]
    median = float(np.median(counts))
    return {
        "problem": problem.name,
        "method": problem.method,
        "length": problem.length,
        "seeds": [seeds[0], seeds[-1]],
        "counts": counts,
        "min_median_max": [min(counts), median, max(counts)],
        "unsolved": sum(c > budget for c in counts),
        "published": problem.published,
        "ratio_of_medians": median / problem.published[1],
        "results": sorted({RESULTS(int(r)).name for _, r in found}),
        "seconds": time.perf_counter() - begin,
    }


def main(arguments: list[str] | None = None) -> None:
    """Count every problem, and print and save the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--problems", nargs="*", default=list(PROBLEMS))
    parser.add_argument("--seeds", type=int, default=10)
    parser.add_argument("--first-seed", type=int, default=0)
    parser.add_argument("--budget", type=int, default=300, help="iterations allowed")
    parser.add_argument("--save", default=None, help="name of the result file, without .json")
    options = parser.parse_args(arguments)
    seeds = list(range(options.first_seed, options.first_seed + options.seeds))
    rows = []
    print(f"{'problem':22s} {'method':32s} {'T':>7s}  {'ours':>14s}  {'published':>14s}  ratio")
    for name in options.problems:
        row = measure(PROBLEMS[name](), seeds, options.budget)
        ours, published = ("/".join(f"{c:g}" for c in row[key]) for key in ("min_median_max", "published"))
        print(
            f"{row['problem']:22s} {row['method']:32s} {row['length']:>7,}  {ours:>14s}  {published:>14s}  "
            f"{row['ratio_of_medians']:.2f}  ({row['seconds']:.0f} s)",
            flush=True,
        )
        rows.append(row)
        if options.save:
            save(options.save, with_others(options.save, rows, ("problem", "method", "length", "seeds")))


if __name__ == "__main__":
    main()
