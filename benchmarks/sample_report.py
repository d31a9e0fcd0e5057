"""The report that docs/report.md explains: ``python -m benchmarks.sample_report``, on an idle machine.

Writes docs/reports/eight_schools.txt and eight_schools_plan.txt. The page quotes numbers of both: change them, too.
"""

import argparse
import os
from pathlib import Path

import pmcmc
from pmcmc.demo import eight_schools

REPORTS = Path(__file__).parents[1] / "docs" / "reports"


def main(arguments: list[str] | None = None) -> None:
    """Sample eight schools as the page shows, and write what the report and its plan print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--num-samples", type=int, default=12_000_000)
    parser.add_argument("--folder", type=Path, default=REPORTS)
    options = parser.parse_args(arguments)
    print(f"load before the run: {os.getloadavg()[0]:.2f}, on {os.cpu_count()} cores")
    example = eight_schools()
    chain = pmcmc.parallel_chain(
        example.model,
        0,
        model_kwargs=example.model_kwargs,
        num_chains=1,
        num_samples=options.num_samples,
        thinning=10,
        progress_bar=False,
    )
    report = chain.report
    if report.plan is None:
        raise SystemExit(f"the run was not planned: raise --num-samples ({report.reason})")
    options.folder.mkdir(parents=True, exist_ok=True)
    for name, text in {"eight_schools": report, "eight_schools_plan": report.plan}.items():
        (options.folder / f"{name}.txt").write_text(f"{text}\n", encoding="utf-8")
        print(text, end="\n\n")


if __name__ == "__main__":
    main()
