"""Compare the forms of hierarchies: as people write them (centred), non-centred, and chosen by `AutoReparam`.

Each model is sampled by HMC in each form. A row has the smallest effective sample size (bulk) per 1,000 gradients, over
the same latent sites in each form, the share of divergent draws, and the steps until pairs of chains merged under the
same noise, from the last states of warm-up's lanes; None for pairs that did not merge within ``--steps``.

The draws of the chosen form are compared with those of the better other form: ``max_z`` is the largest difference of a
mean or a standard deviation in units of its Monte Carlo error, ``z_limit`` what it may be, see `benchmarks.judging`.

    python -m benchmarks.hierarchies [--models funnel ...] [--seeds 0 1] [--save hierarchies]
"""

import argparse
import time
import warnings
from typing import Any

import jax
import numpy as np

import pmcmc
from benchmarks._harness import save, with_others
from benchmarks.coalescence import merges
from benchmarks.hierarchical import FORMS, HIERARCHIES, Hierarchy
from benchmarks.judging import Summary, agreement, columns, summary
from pmcmc.chain.draws import judge
from pmcmc.recurrence import Sequential


def measure(
    hierarchy: Hierarchy, form: str, seed: int, num_samples: int, num_steps: int
) -> tuple[dict[str, Any], Summary]:
    """Return the figures of a model in one form, and the moments of its draws."""
    model, chosen = hierarchy.form(form)
    options: dict[str, Any] = dict(extra_fields=("num_steps",), solver=Sequential(), progress_bar=False)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # forms that do not mix are what is measured
        start = time.perf_counter()
        chain = pmcmc.parallel_chain(model, seed, reparam=chosen, num_samples=num_samples, **options)
        seconds = time.perf_counter() - start
    draws = {
        name: np.asarray(x)
        for name, x in chain.get_samples(group_by_chain=True).items()
        if not name.endswith("_decentered")
    }
    mixing = judge(draws)
    gradients = float(np.sum(chain.get_extra_fields()["num_steps"]))
    ess = min(value for value, _ in mixing.bulk_ess.values())
    lanes: Any = chain.state.ensemble
    first, second = lanes[: len(lanes) // 2], lanes[len(lanes) // 2 :]
    found = merges(chain, jax.random.key(seed + 1), first, second, num_steps, None)
    merged = np.asarray(found.merged)
    moving = {name: x for name, x in columns(draws).items() if np.ptp(x) > 0}
    row = {
        "ess_per_1000_gradients": 1000 * ess / gradients,
        "max_rhat": mixing.max_rhat,
        "divergent": float(np.sum(chain.report.num_divergent)) / (num_samples * chain.num_chains),
        "steps": [int(s) if m else None for s, m in zip(np.asarray(found.steps), merged, strict=True)],
        "centredness": chain.report.centredness,
        "warmup_seconds": chain.report.warmup_seconds,
        "seconds": seconds,
    }
    return row, summary(moving)


def compared(chosen: Summary, other: Summary) -> dict[str, Any]:
    """Return how far the moments of the chosen form are from those of another one, and how far they may be."""
    found = agreement({"chosen": chosen, "other": other})["chosen"]
    largest = max(found["max_z_mean"], found["max_z_sd"])
    return {"max_z": largest, "z_limit": found["z_limit"], "worst": found["worst"]}


def line(row: dict[str, Any]) -> str:
    """Return the line of one model, form and seed."""
    steps = [s for s in row["steps"] if s is not None]
    agrees = f", |z| {row['max_z']:.1f} of {row['z_limit']:.1f} ({row['worst']})" if "max_z" in row else ""
    return (
        f"{row['model']:14s} {row['form']:12s} seed {row['seed']}: {row['ess_per_1000_gradients']:7.1f} per 1,000 "
        f"gradients, R-hat {row['max_rhat']:.3f}, {row['divergent']:.2%} divergent, {len(steps)} of "
        f"{len(row['steps'])} pairs merged{f' within {max(steps)}' if steps else ''}{agrees} {row['centredness'] or ''}"
    )


def main(arguments: list[str] | None = None) -> None:
    """Measure every model in every form, and print and save the rows."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="*", default=list(HIERARCHIES), choices=list(HIERARCHIES), metavar="NAME")
    parser.add_argument("--seeds", nargs="*", type=int, default=[0])
    parser.add_argument("--draws", type=int, default=10_000)
    parser.add_argument("--steps", type=int, default=2000)
    parser.add_argument("--save", default=None, help="name of the result file, without .json; written after each row")
    options = parser.parse_args(arguments)
    rows: list[dict[str, Any]] = []
    for name in options.models:
        for seed in options.seeds:
            moments: dict[str, Summary] = {}
            for form in FORMS:
                found, moments[form] = measure(HIERARCHIES[name](), form, seed, options.draws, options.steps)
                rows.append({"model": name, "form": form, "seed": seed, **found})
                if form == "chosen":  # the last one
                    better = max(rows[-3:-1], key=lambda row: row["ess_per_1000_gradients"])["form"]
                    rows[-1] |= compared(moments["chosen"], moments[better])
                print(line(rows[-1]), flush=True)
                if options.save:
                    save(options.save, with_others(options.save, rows, ("model", "form", "seed")))


if __name__ == "__main__":
    main()
