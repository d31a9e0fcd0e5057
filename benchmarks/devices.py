"""Blocks shared out to devices against the same blocks on one of them: same noise, same chain, alternating runs.

``XLA_FLAGS=--xla_force_host_platform_device_count=2 python -m benchmarks.devices [--save NAME]``
"""

import argparse
from dataclasses import replace
from functools import partial

import jax
import numpy as np

from benchmarks._harness import alternate, ratio, save
from benchmarks.posteriors import POSTERIORS
from pmcmc import HMC, MALA, NUTS, Chain, Kernel
from pmcmc.recurrence import RESULTS, MultipleShooting, Sequential
from pmcmc.sampling._engine import Engine, Shape

KERNELS: dict[str, Kernel] = {"HMC": HMC(), "NUTS": NUTS(), "MALA": MALA()}


def measure(name: str, kernel: str, num_blocks: int, num_steps: int, repeats: int) -> dict:
    """One chain, tuned by a short run."""
    tuned = POSTERIORS[name]().sampler()(
        0, kernel=KERNELS[kernel], solver=Sequential(), num_samples=100, num_chains=1, progress_bar=False
    )
    engine = _engine(tuned)
    shape = Shape(num_blocks, -(-num_steps // (16 * num_blocks)) * 16)
    solver = MultipleShooting(num_blocks=num_blocks)

    def run(devices):
        its, shares = replace(solver, devices=devices), shape._replace(devices=devices or ())
        segment, clock = engine.solve(its, shares, tuned.state.unknown, np.zeros(1, int), shape.capacity)
        return (
            np.asarray(segment.solution.result)[0],
            np.asarray(segment.solution.stats.num_sequential_steps)[0],
            np.array(segment.chains(segment.near_ties)).sum(),
            clock.run_seconds,
        )

    cases = {"one device": None, "all devices": tuple(jax.devices())}
    timing = alternate({key: partial(run, devices) for key, devices in cases.items()}, repeats, lambda r: r[-1])
    found = {key: run(devices) for key, devices in cases.items()}
    return {
        "posterior": name,
        "kernel": kernel,
        "num_blocks": num_blocks,
        "length": num_blocks * shape.capacity,
        "devices": jax.device_count(),
        "result": {key: RESULTS(int(r[0])).name for key, r in found.items()},
        "num_sequential_steps": {key: int(r[1]) for key, r in found.items()},
        **timing,
        "speedup": ratio(timing, "one device", "all devices"),
    }


def _engine(tuned: Chain) -> Engine:
    state = tuned.state
    keys = jax.random.split(jax.random.key(1), 1)
    scale = jax.tree.map(lambda x: np.ones(x.shape[1:], x.dtype), state.ensemble)
    return Engine(state.target, state.kernel, keys, state.ensemble, scale)


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--posteriors", nargs="*", default=["german_credit", "irt", "eight_schools"])
    parser.add_argument("--kernels", nargs="*", default=["HMC", "NUTS"])
    parser.add_argument("--blocks", type=int, default=64)
    parser.add_argument("--length", type=int, default=20_000)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--save", default=None, help="name of the result file, without .json")
    options = parser.parse_args(arguments)
    rows = []
    for name in options.posteriors:
        for kernel in options.kernels:
            row = measure(name, kernel, options.blocks, options.length, options.repeats)
            times = " ".join(f"{key} {row[key]['median_s']:.3f} s" for key in ("one device", "all devices"))
            print(f"{name:14s} {kernel:5s} {options.blocks} blocks: {times}, {row['speedup']:.2f}x", flush=True)
            rows.append(row)
    if options.save:
        print(save(options.save, rows))


if __name__ == "__main__":
    main()
