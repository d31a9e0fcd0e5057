"""Time a solve distributed over devices against the same solve on one device: same noise, same chain, alternating runs.

The blocks are distributed, or the steps for Newton's methods. "Cores busy" is processor time over wall time on one
device: what XLA already distributes over the cores of a CPU cannot be gained by a second device of that CPU.

    XLA_FLAGS=--xla_force_host_platform_device_count=2 python -m benchmarks.devices [--solvers NAME ...] [--save NAME]
"""

import argparse
import time
from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import jax
import numpy as np

from benchmarks._harness import alternate, ratio, save, with_others
from benchmarks.posteriors import POSTERIORS
from pmcmc import HMC, MALA, NUTS, Chain, Kernel
from pmcmc.recurrence import RESULTS, MultipleShooting, RecurrenceSolver, Sequential, deer, quasi_deer
from pmcmc.sampling.engine import Engine, Segment
from pmcmc.sampling.programs import Shape

KERNELS: dict[str, Kernel] = {"HMC": HMC(), "NUTS": NUTS(), "MALA": MALA()}
SOLVERS: dict[str, Callable[[int], RecurrenceSolver]] = {
    "shooting": lambda num_blocks: MultipleShooting(num_blocks=num_blocks),
    "deer": lambda num_blocks: deer(),
    "quasi_deer": lambda num_blocks: quasi_deer(),
}


def measure(name: str, kernel: str, solver: RecurrenceSolver, num_steps: int, repeats: int) -> dict:
    """Measure one chain, tuned by a short run."""
    tuned = POSTERIORS[name]().sampler()(
        0, kernel=KERNELS[kernel], solver=Sequential(), num_samples=100, num_chains=1, progress_bar=False
    )
    engine = _engine(tuned)

    def run(devices):
        shared = solver.with_devices(devices)
        shape = engine.shape_for(shared, num_steps)
        begin, wall = time.process_time(), time.perf_counter()
        segment, clock = engine.solve(shared, shape, tuned.state.unknown, np.zeros(1, int), shape.capacity)
        cores_busy = (time.process_time() - begin) / (time.perf_counter() - wall)
        return Run(segment, clock.run_seconds, cores_busy, shape)

    cases = {"one device": None, "all devices": tuple(jax.devices())}
    timing = alternate({key: partial(run, devices) for key, devices in cases.items()}, repeats, lambda r: r.seconds)
    found = {key: run(devices) for key, devices in cases.items()}
    one = found["one device"]
    return {
        "suite": "devices",
        "posterior": name,
        "kernel": kernel,
        "num_blocks": one.shape.num_blocks,
        "length": one.shape.num_blocks * one.shape.capacity,
        "devices": jax.device_count(),
        "result": {key: RESULTS(int(r.segment.result[0])).name for key, r in found.items()},
        "num_sequential_steps": {key: int(r.segment.stats.num_sequential_steps[0]) for key, r in found.items()},
        **timing,
        "cores_busy": one.cores_busy,
        "speedup": ratio(timing, "one device", "all devices"),
    }


class Run(NamedTuple):
    """One solve.

    Attributes:
        segment: What was solved.
        seconds: Seconds by the engine's clock.
        cores_busy: Processor time over wall time.
        shape: Shape of the program.
    """

    segment: Segment
    seconds: float
    cores_busy: float
    shape: Shape


def _engine(tuned: Chain) -> Engine:
    """Return an engine for one chain with the tuned kernel."""
    state = tuned.state
    keys = jax.random.split(jax.random.key(1), 1)
    scale = jax.tree.map(lambda x: np.ones(x.shape[1:], x.dtype), state.ensemble)
    return Engine(state.target, state.kernel, keys, state.ensemble, scale)


def main(arguments: list[str] | None = None) -> None:
    """Measure every posterior, kernel and solver, and print and save the rows."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--posteriors", nargs="*", default=["german_credit", "irt", "eight_schools"])
    parser.add_argument("--kernels", nargs="*", default=["HMC", "NUTS"])
    parser.add_argument("--solvers", nargs="*", default=["shooting"], choices=list(SOLVERS))
    parser.add_argument("--blocks", type=int, default=64, help="of shooting")
    parser.add_argument("--length", type=int, default=20_000)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--save", default=None, help="name of the result file, without .json; written after each case")
    options = parser.parse_args(arguments)
    rows: list[dict] = []
    for name in options.posteriors:
        for kernel in options.kernels:
            for solver in options.solvers:
                row = measure(name, kernel, SOLVERS[solver](options.blocks), options.length, options.repeats)
                rows.append(row | {"solver": solver})
                print(line(rows[-1]), flush=True)
                if options.save:
                    save(options.save, with_others(options.save, rows, ("posterior", "kernel", "solver", "length")))


def line(row: dict) -> str:
    """Return the line of one case."""
    times = " ".join(f"{key} {1000 * row[key]['median_s']:.1f} ms" for key in ("one device", "all devices"))
    return (
        f"{row['posterior']:14s} {row['kernel']:5s} {row['solver']:10s} T={row['length']:,}: {times}, "
        f"{row['speedup']:.2f}x, {row['cores_busy']:.1f} cores busy on one, {row['result']['all devices']}"
    )


if __name__ == "__main__":
    main()
