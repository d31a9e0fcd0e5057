"""Measure what `import pmcmc` costs in addition to `import jax`: medians over fresh interpreters.

Run: python -m benchmarks.import_time
"""

import statistics
import subprocess
import sys
import time

NUM_RUNS = 7


def timed_run(statement: str) -> float:
    """Return the wall seconds of one fresh interpreter that executes ``statement``."""
    start = time.perf_counter()
    subprocess.run([sys.executable, "-c", statement], check=True)
    return time.perf_counter() - start


def main() -> None:
    """Time both statements alternately, so that a busy spell of the machine affects both, and print three lines."""
    statements = ("import jax", "import jax, pmcmc")
    for statement in statements:  # one run that is not timed writes byte code and warms the file cache
        timed_run(statement)
    runs = [[timed_run(statement) for statement in statements] for _ in range(NUM_RUNS)]
    jax_only, with_pmcmc = (statistics.median(column) for column in zip(*runs, strict=True))
    print(f"import jax         {jax_only:.3f} s (median of {NUM_RUNS})")
    print(f"import jax, pmcmc  {with_pmcmc:.3f} s")
    print(f"difference         {with_pmcmc - jax_only:+.3f} s")


if __name__ == "__main__":
    main()
