"""Count what does not depend on a noisy machine: a gate against regressions that takes a minute.

    python -m benchmarks.counts            compare with benchmarks/results/counts.json; exit status 1 if any got worse
    python -m benchmarks.counts --save     write that file again

The counts are, for whole chains by each solver, the critical path, the iterations and the uncertified steps; for a cold
call, the programs that XLA compiles and how often the user's density is traced; for a second call with other numbers,
the same, which must be zero; and for the program that solves blocks, the bytes it needs. All counts are in float64 with
fixed keys, so that they change only if the code or jax changes.
"""

import argparse
import json
import sys
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import pmcmc
from benchmarks._compilations import compilations
from benchmarks._harness import RESULTS, program_bytes, save
from benchmarks._runs import solve_program
from pmcmc.recurrence import MultipleShooting, RecurrenceSolver, Sequential, deer, quasi_deer
from pmcmc.sampling.engine import Engine

# A count that is worse by more than this share fails. Paths differ a little between processors because of rounding.
TOLERANCE = 0.1
DIM = 10


def density(x: jax.Array) -> jax.Array:
    """A Gaussian whose standard deviations span a factor of ten, slightly bent."""
    scale = jnp.logspace(-0.5, 0.5, DIM)
    bent = x.at[1].add(0.1 * x[0] ** 2)
    return -0.5 * jnp.sum((bent / scale) ** 2)


CHAINS: dict[str, tuple[pmcmc.Kernel, RecurrenceSolver, int]] = {
    "HMC, 16 blocks": (pmcmc.HMC(), MultipleShooting(16), 4096),
    "MALA, 16 blocks": (pmcmc.MALA(), MultipleShooting(16), 4096),
    "NUTS, 16 blocks": (pmcmc.NUTS(), MultipleShooting(16), 4096),
    "RandomWalk, 4 blocks": (pmcmc.RandomWalk(), MultipleShooting(4), 4096),
    "MALA, DEER": (pmcmc.MALA(), deer(max_iters=100), 256),
    "MALA, quasi-DEER": (pmcmc.MALA(), quasi_deer(max_iters=100), 256),
}


def paths() -> dict[str, dict[str, float]]:
    """Count the critical path, the iterations and the uncertified steps of every chain."""
    found = {}
    for name, (kernel, solver, num_steps) in CHAINS.items():
        chain = _sample(kernel, solver, num_steps, density)
        report = chain.report
        found[name] = {
            "critical path": float(np.mean(report.num_sequential_steps)),
            "iterations": float(np.mean(report.num_iters)),
            "uncertified steps": float(num_steps - np.min(report.certified_steps)),
        }
    return found


def _sample(kernel: pmcmc.Kernel, solver: Any, num_steps: int, fn: Callable, shift: float = 0.0) -> pmcmc.Chain:
    """Sample a chain after a short warm-up."""
    sizes: dict[str, Any] = dict(num_warmup=200, num_chains=2, num_samples=num_steps)
    return pmcmc.sample(fn, jnp.full(DIM, shift), 0, kernel=kernel, solver=solver, progress_bar=False, **sizes)


def programs() -> dict[str, dict[str, float]]:
    """Count programs and traces of a cold sequential call, a cold call in blocks, and a second call of each."""
    found = {}
    for name, solver in (("sequential", Sequential()), ("16 blocks", MultipleShooting(16))):
        jax.clear_caches()
        traces: list[None] = []

        def counted(x: jax.Array, traces: list = traces) -> jax.Array:
            traces.append(None)
            return density(x)

        for call, shift in (("first call", 0.0), ("second call", 0.5)):
            traces.clear()
            with compilations() as seen:
                _sample(pmcmc.HMC(), solver, 4096, counted, shift)
            found[f"{name}, {call}"] = {"programs compiled": float(len(seen)), "density traced": float(len(traces))}
    return found


def memory() -> dict[str, dict[str, float]]:
    """Return the bytes per state of the chain that the program for blocks needs."""
    chain = _sample(pmcmc.HMC(), Sequential(), 256, density)
    engine, solver = Engine.of(chain.state), MultipleShooting(64)
    shape = engine.shape_for(solver, 2**17)._replace(brief=False)
    program = solve_program(engine, solver, shape)
    states = engine.num_chains * shape.num_blocks * shape.capacity
    return {"HMC, 64 blocks": {what: size / states for what, size in program_bytes(program).items()}}


SUITES: dict[str, Callable[[], dict[str, dict[str, float]]]] = {
    "paths": paths,
    "programs": programs,
    "bytes a state": memory,
}


def compare(now: list[dict[str, Any]], before: list[dict[str, Any]]) -> list[str]:
    """Return one line for each count that got worse; new and missing counts are listed too."""
    key = lambda row: (row["suite"], row["case"], row["count"])
    old, new = ({key(row): row["value"] for row in rows} for rows in (before, now))
    lines = [f"{', '.join(name)}: not in the file; write it anew with --save" for name in new.keys() - old.keys()]
    lines += [f"{', '.join(name)}: no longer counted" for name in old.keys() - new.keys()]
    for name in new.keys() & old.keys():
        if new[name] > old[name] + max(TOLERANCE * abs(old[name]), 0.01):
            lines.append(f"{', '.join(name)}: {old[name]:g} before, {new[name]:g} now")
    return sorted(lines)


def main(arguments: list[str] | None = None) -> int:
    """Count, then compare or save; return the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--save", action="store_true", help="write benchmarks/results/counts.json anew")
    options = parser.parse_args(arguments)
    jax.config.update("jax_enable_x64", True)
    rows: list[dict[str, Any]] = [
        {"suite": suite, "case": case, "count": count, "value": value}
        for suite, run in SUITES.items()
        for case, counts in run().items()
        for count, value in counts.items()
    ]
    for row in rows:
        print("{suite:14s} {case:26s} {count:18s} {value:12.3f}".format(**row))
    if options.save:
        save("counts", rows)
        return 0
    worse = compare(rows, json.loads((RESULTS / "counts.json").read_text())["rows"])
    print("\n".join(worse) or f"None of {len(rows)} counts got worse.")
    return 1 if worse else 0


if __name__ == "__main__":
    sys.exit(main())
