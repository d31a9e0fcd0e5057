"""Measure time against T, D, chains, blocks and devices, along one axis at a time.

One chain is solved in blocks unless the axis states otherwise.

python -m benchmarks.scaling [--axes length dim chains blocks devices] [--scale 0.1] [--save NAME]
"""

import argparse
import os
import subprocess
import sys
from dataclasses import replace
from typing import Any, NamedTuple

import jax

from benchmarks._harness import save, with_others
from benchmarks._runs import typical_states
from benchmarks.cases import CASES
from benchmarks.kernels import MIN_BLOCK, Effort, against_all


class Point(NamedTuple):
    """What to run at one point of an axis.

    Attributes:
        case: Name of the case.
        num_blocks: Blocks per chain.
        length: Steps; None for the case's own.
        num_chains: Number of chains.
    """

    case: str
    num_blocks: int
    length: int | None = None
    num_chains: int = 1


AXES: dict[str, dict[int, Point]] = {
    "length": {n: Point("mixture", min(512, n // MIN_BLOCK), n) for n in (10**3, 10**4, 10**5, 10**6, 10**7)},
    "dim": {d: Point(f"gaussian_{d}", 64, min(10**5, 10**8 // d)) for d in (10, 100, 1000, 10_000)},
    "chains": {c: Point("eight_schools", max(16, 256 // c), 10**5 // c, c) for c in (1, 4, 16)},
    "blocks": {p: Point("eight_schools", p, 10**5) for p in (16, 64, 256, 1024, 4096)},
}


def measure(axis: str, value: int, point: Point, scale: float, effort: Effort) -> dict[str, Any]:
    """Return the row of one point."""
    case = CASES[point.case]()
    length = max(MIN_BLOCK * point.num_blocks, int((point.length or case.length) * scale))
    case = replace(case, length=length)
    found = against_all(case, typical_states(case), point.num_blocks, effort, point.num_chains)
    sizes = {"length": length, "num_chains": point.num_chains, "dim": case.dim}
    return {"suite": "scaling", "axis": axis, "value": value, "case": case.name, **sizes, **found}


def line(row: dict[str, Any]) -> str:
    """Return the line of one point."""
    return (
        f"{row['axis']:7s} {row['value']:>10,}  {row['case']:24s} T={row['length']:>10,}  {row['num_chains']:>3} x "
        f"{row['num_blocks']:>5} blocks  {1000 * row['shooting']['median_s']:9.1f} ms  {row['speedup']:6.2f}x  "
        f"efficiency vs own lanes {row['efficiency']:.2f}  {row['result']}"
    )


def devices(scale: float) -> None:
    """Run `benchmarks.devices` in a separate process, in which each core of a CPU is a device."""
    flags = f"--xla_force_host_platform_device_count={min(8, os.cpu_count() or 1)}"
    environment = os.environ | ({"XLA_FLAGS": flags} if jax.default_backend() == "cpu" else {})
    command = [sys.executable, "-m", "benchmarks.devices", "--length", str(max(1024, int(20_000 * scale)))]
    subprocess.run(command, env=environment, check=True)


def main(arguments: list[str] | None = None) -> None:
    """Measure every axis, and print and save the rows."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--axes", nargs="*", default=[*AXES, "devices"], choices=[*AXES, "devices"])
    parser.add_argument("--scale", type=float, default=1.0, help="fraction of the full lengths")
    parser.add_argument("--seconds", type=float, default=Effort().seconds, help="for one comparison")
    parser.add_argument("--save", default=None, help="name of the result file, without .json; written after each point")
    options = parser.parse_args(arguments)
    rows: list[dict[str, Any]] = []
    for axis in options.axes:
        for value, point in AXES.get(axis, {}).items():
            rows.append(measure(axis, value, point, options.scale, Effort(seconds=options.seconds)))
            print(line(rows[-1]), flush=True)
            if options.save:
                save(options.save, with_others(options.save, rows, ("axis", "value")))
            jax.clear_caches()
    if "devices" in options.axes:
        devices(options.scale)


if __name__ == "__main__":
    main()
