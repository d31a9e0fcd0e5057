"""Run all benchmarks by one command.

python -m benchmarks                    a small subset in minutes; its files go to build/benchmarks
python -m benchmarks --suite kernels    one suite in full, into benchmarks/results
python -m benchmarks --all              every suite in full: hours
python -m benchmarks --gpu              a ten-minute suite for GPUs, into benchmarks/results/<device>.json
"""

import argparse
from collections.abc import Callable

from benchmarks import end_to_end, import_time, kernels, lanes, memory, scaling, solvers
from benchmarks._harness import RESULTS, SKETCHES, device_name
from benchmarks.gpu import run as run_gpu

# Suites in full, by name; each takes the command line of its module.
SUITES: dict[str, Callable[[list[str]], None]] = {
    "solvers": solvers.main,
    "kernels": kernels.main,
    "lanes": lanes.main,
    "end-to-end": end_to_end.main,
    "scaling": scaling.main,
    "memory": memory.main,
}
QUICK_CASES = ("mixture", "eight_schools", "eight_schools_nuts", "schools_gibbs", "german_credit")


def quick(scale: float) -> None:
    """Run small versions of every suite; most of the time goes into compilation."""
    import_time.main()
    effort = kernels.Effort(repeats=5, seconds=2.0)
    kernels.run(QUICK_CASES, (64, 256), 0.5 * scale, effort, f"kernels_{device_name()}", SKETCHES)
    scaling.main(["--axes", "length", "--scale", str(0.01 * scale), "--seconds", "1"])
    memory.main(["--cases", "mixture", "--draws", str(int(20_000 * scale))])
    end_to_end.main(["--posteriors", "eight_schools", "--methods", "pmcmc", "numpyro vectorized", "--ess", "1000"])


def file_of(suite: str) -> str:
    """Name the result file of a suite; iterations ("solvers") are the same on every device up to rounding."""
    return suite if suite == "solvers" else f"{suite.replace('-', '_')}_{device_name()}"


def main(arguments: list[str] | None = None) -> None:
    """Parse the command line and run what it asks for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    what = parser.add_mutually_exclusive_group()
    what.add_argument("--all", action="store_true", help="every suite in full")
    what.add_argument(
        "--suite", choices=list(SUITES), help="one suite in full; more options: python -m benchmarks.NAME"
    )
    what.add_argument("--gpu", action="store_true", help="sequential on CPU and on GPU, shooting with many blocks")
    parser.add_argument("--scale", type=float, default=1.0, help="of --gpu and of the subset: fraction of the lengths")
    options = parser.parse_args(arguments)
    if options.gpu:
        run_gpu(options.scale, RESULTS if options.scale == 1.0 else SKETCHES)
    elif options.all or options.suite:
        for name in SUITES if options.all else [options.suite]:
            SUITES[name](["--save", file_of(name)])
    else:
        quick(options.scale)


if __name__ == "__main__":
    main()
