"""Measure what a user waits for: whole calls in new processes, without imports, by pmcmc and by other packages.

Compared are pmcmc's default, its drop-in ``ParallelMCMC(NUTS(model))``, NumPyro's NUTS with vectorised and with
sequential chains, BlackJAX's NUTS, nutpie and Stan, on the models of `benchmarks.models`. nutpie and Stan run in an
environment of their own, made by ``make peers``, and are left out where it is absent. All are in float64 and take 4
chains with 1,000 steps of warm-up each. Seconds run from the call until the constrained draws are in memory,
compilation included; Stan's C++ compilation is apart (``build_s``). CPU seconds depend less on a busy machine.

With ``--cache on``, a first process with another seed fills an empty folder of compiled programs, and a second one is
measured: by ``pmcmc.cache_programs``, by JAX's own options for NumPyro and BlackJAX, and by PyTensor's and numba's for
nutpie. Without the cache that folder is empty. Stan is the same in both.

Seconds to an effective sample size E: with n draws per chain and a smallest effective sample size m, E takes n E / m
draws. If both lengths were measured, the seconds are those of the straight line through them, whose intercept is the
fixed cost; m is that of the longer run. If only one was, they are ``seconds * max(1, E / m)``, an upper bound, and
``bound`` is true. The formula is the same for all methods.

A row, which is a model at one length, fails if its methods disagree: see `benchmarks.judging`. Methods run alternately,
in reversed order every other time. Seconds and effective sample sizes are medians over ``--repeats``.

    python -m benchmarks.whole_call [--models NAME ...] [--methods NAME ...] [--num-samples 1000 25000]
                                    [--cache off on] [--repeats 1] [--save NAME] [--quick]
"""

import argparse
import json
import tempfile
from collections import defaultdict
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

from benchmarks import peers, samplers
from benchmarks._fresh import LIMIT_SECONDS, run_fresh
from benchmarks._harness import RESULTS, SKETCHES, save, with_others
from benchmarks.judging import Summary, agreement, columns, of_reference, quality, summary
from benchmarks.models import MODELS
from benchmarks.problems import Problem, of_model, posteriordb, problem
from benchmarks.samplers import NUM_CHAINS, NUMPYRO

PEERS_PYTHON = RESULTS.parents[1] / "build" / "peers" / "bin" / "python"
STAN_FOLDER = SKETCHES / "stan"
DEFAULT_METHODS = ("pmcmc", samplers.DROP_IN, *NUMPYRO, samplers.BLACKJAX, *peers.METHODS)
WANTED = (400, 4000)
KEYS = ("posterior", "num_samples", "cached")


class Setting(NamedTuple):
    """What a row is measured with.

    Attributes:
        name: Name of the model.
        num_samples: Draws of each chain.
        cached: Whether compiled programs are kept from a first process.
    """

    name: str
    num_samples: int
    cached: bool


def run(setting: Setting, method: str, seed: int, folder: Path, limit: float) -> dict[str, Any]:
    """Run a method in a new process; the draws are saved in ``folder``."""
    cache = str(folder / f"cache-{method.replace(' ', '-')}")
    if not setting.cached:
        cache = tempfile.mkdtemp(dir=folder)
    what = [setting.name, method, str(seed), str(setting.num_samples), *map(str, files(folder))]
    if method in peers.METHODS:
        STAN_FOLDER.mkdir(parents=True, exist_ok=True)
        variables = peers.environment(method, cache, str(STAN_FOLDER))
        python = str(PEERS_PYTHON)
        if method == peers.STAN:  # in a process of its own, because it may take longer than the limit
            built = [setting.name, str(files(folder)[0])]
            run_fresh("benchmarks.peers", "build", *built, python=python, environment=variables)
        return run_fresh("benchmarks.peers", *what, python=python, environment=variables, limit=limit)
    given = cache if setting.cached else ""
    unset = {"JAX_COMPILATION_CACHE_DIR": None}
    return run_fresh("benchmarks.samplers", *what, given, environment=unset, limit=limit)


def files(folder: Path) -> tuple[Path, Path]:
    """Return the files of a model's data and of the draws of one run."""
    return folder / "data.npz", folder / "draws.npz"


def measure(setting: Setting, methods: list[str], repeats: int, limit: float, folder: Path) -> dict[str, Any]:
    """Run all methods alternately; return the medians of each, the failures, and whether the methods agree."""
    what = of_model(setting.name) if setting.name in MODELS else problem(setting.name)
    data_file, draws_file = files(folder)
    if setting.name in MODELS:
        np.savez(data_file, **what.kwargs)
    runs: dict[str, list[dict[str, Any]]] = {method: [] for method in methods}
    for seed in range(repeats):
        found: dict[str, Summary] = {}
        for method in methods if seed % 2 == 0 else methods[::-1]:
            failed: dict[str, Any] = {}
            if setting.cached and seed == 0 and method != peers.STAN:
                failed = {k: v for k, v in run(setting, method, repeats, folder, limit).items() if k == "error"}
            facts = failed or run(setting, method, seed, folder, limit)
            if "error" not in facts:
                draws = columns(dict(np.load(draws_file)))
                if what.reference:
                    draws = {name: draws[name] for name in map(str, what.reference["names"])}
                facts |= quality(draws)
                found[method] = summary(draws)
            runs[method].append(facts)
            what_came = facts.get("error") or f"{facts['seconds']:.1f} s, min ESS {facts['min_ess']:.0f}"
            print(f"    {setting.name}, {method}: {what_came}", flush=True)
        _add_agreement(runs, found, what)
    row = {"posterior": setting.name, "num_samples": setting.num_samples, "cached": setting.cached}
    done = {method: middle(found) for method, found in runs.items()}
    verdicts = [x["agrees"] for x in done.values() if "agrees" in x]
    return row | {"agrees": all(verdicts) if verdicts else None, "runs": done}  # None: nothing to compare with


def _add_agreement(runs: dict[str, list[dict[str, Any]]], found: dict[str, Summary], what: Problem) -> None:
    """Add to the last run of each method how far its draws are from those of the others."""
    reference = of_reference(what.reference) if what.reference else None
    for method, facts in agreement(found, reference).items():
        agrees = max(facts["max_z_mean"], facts["max_z_sd"]) <= facts["z_limit"]
        runs[method][-1] |= facts | {"agrees": agrees}


def middle(found: list[dict[str, Any]]) -> dict[str, Any]:
    """Return the medians of the runs that succeeded, the largest z-scores, and the number of failures."""
    good = [facts for facts in found if "error" not in facts]
    counts = {"num_failed": len(found) - len(good), "num_runs": len(found)}
    if not good:
        return found[0] | counts
    result: dict[str, Any] = {}
    for key in good[0]:
        values = [facts[key] for facts in good if key in facts]
        if key == "agrees":
            result[key] = all(values)
        elif isinstance(values[0], str):
            result[key] = values[0]
        else:
            result[key] = float(max(values) if key.startswith("max_") else np.median(values))
    return result | counts


def seconds_to(wanted: float, one: tuple[int, dict[str, Any]], other: tuple[int, dict[str, Any]] | None) -> float:
    """Return the seconds to an effective sample size; see the module.

    Args:
        wanted: The effective sample size.
        one: Draws per chain, and the run.
        other: The same of another length, if there is one.
    """
    if other is None:
        return one[1]["seconds"] * max(1.0, wanted / one[1]["min_ess"])
    (n, short), (m, long) = sorted((one, other), key=lambda pair: pair[0])
    slope = max(long["seconds"] - short["seconds"], 0.0) / (m - n)
    return max(short["seconds"] + slope * (wanted * m / long["min_ess"] - n), 0.0)


def derive(rows: list[dict[str, Any]]) -> None:
    """Add to every run its effective draws a second, its speed-up over NumPyro, and its seconds to each size."""
    lengths: dict[tuple, list[tuple[int, dict[str, Any]]]] = defaultdict(list)
    for row in rows:
        for method, facts in row["runs"].items():
            if "seconds" in facts:
                lengths[row["posterior"], row["cached"], method].append((row["num_samples"], facts))
    for row in rows:
        theirs = [row["runs"][m] for m in NUMPYRO if "seconds" in row["runs"].get(m, {})]
        for method, facts in row["runs"].items():
            if "seconds" not in facts:
                continue
            facts["ess_per_s"] = facts["min_ess"] / facts["seconds"]
            for name, key in (("speedup", "seconds"), ("cpu_speedup", "cpu_seconds")):
                facts[name] = min(other[key] for other in theirs) / facts[key] if theirs else None
            mine = (row["num_samples"], facts)
            others = [x for x in lengths[row["posterior"], row["cached"], method] if x[0] != row["num_samples"]]
            other = max(others, key=lambda pair: pair[0]) if others else None
            facts["bound"] = other is None
            for wanted in WANTED:
                facts[f"seconds_to_{wanted}"] = seconds_to(wanted, mine, other)


def lines(row: dict[str, Any]) -> str:
    """Return the lines of one row."""
    cache = "warm cache" if row["cached"] else "no cache"
    verdict = "  METHODS DISAGREE" if row["agrees"] is False else ""
    text = [f"{row['posterior']}, {NUM_CHAINS} x {row['num_samples']:,} draws, {cache}{verdict}"]
    for method, facts in row["runs"].items():
        if "error" in facts:
            text.append(f"  {method:20s} failed: {facts['error']}")
            continue
        show = lambda key, facts=facts: f"{facts[key]:.1f}" if facts.get(key) is not None else "-"
        split = "  ".join(f"{key[:-2]} {show(key)}" for key in facts if key.endswith("_s") and key != "ess_per_s")
        to = ", ".join(show(f"seconds_to_{wanted}") for wanted in WANTED)
        text.append(
            f"  {method:20s} {facts['seconds']:6.1f} s ({show('cpu_seconds')} cpu)  to {WANTED}: {to} s  "
            f"min ESS {facts['min_ess']:8.0f}  gradients a draw {show('gradients_per_draw')}  |z| mean "
            f"{show('max_z_mean')}, sd {show('max_z_sd')} of {show('z_limit')}  rhat {facts['max_rhat']:.3f}  "
            f"divergent {facts['num_divergent']:.0f}  failed {facts['num_failed']}/{facts['num_runs']}  {split}"
        )
    return "\n".join(text)


def available(methods: list[str]) -> list[str]:
    """Return the methods that can run here; says which cannot."""
    missing = [method for method in methods if method in peers.METHODS and not PEERS_PYTHON.exists()]
    if missing:
        print(f"left out, because `make peers` was not run: {', '.join(missing)}")
    return [method for method in methods if method not in missing]


def names_here(names: list[str]) -> list[str]:
    """Return the models whose data are here; says which are not."""
    found = []
    for name in names:
        try:
            if name in MODELS:
                MODELS[name]().data()
            elif name not in posteriordb():
                raise SystemExit(f"no model {name!r}: expected one of {[*MODELS, *posteriordb()]}")
            found.append(name)
        except FileNotFoundError as error:
            print(f"{name} is left out: {Path(error.filename).name} is absent from the shared folder")
    return found


def main(arguments: list[str] | None = None) -> None:
    """Measure the models, print and save each row, and print the speed-ups."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="*", default=list(MODELS), help="also names of posteriordb's, by JAX alone")
    choices = [*samplers.METHODS, *peers.METHODS]
    parser.add_argument("--methods", nargs="*", default=list(DEFAULT_METHODS), choices=choices, metavar="NAME")
    parser.add_argument("--num-samples", nargs="*", type=int, default=[1000, 25_000], help="of each chain")
    parser.add_argument("--cache", nargs="*", choices=("off", "on"), default=["off", "on"])
    parser.add_argument("--repeats", type=int, default=1, help="runs of each, with seeds 0, 1, ...")
    parser.add_argument("--limit", type=float, default=LIMIT_SECONDS, help="seconds of one run")
    parser.add_argument("--save", default=None, help="name of the result file, without .json; written after each row")
    parser.add_argument("--quick", action="store_true", help="eight schools alone, 1,000 draws, no cache")
    options = parser.parse_args(arguments)
    if options.quick:
        options.models, options.num_samples, options.cache = ["eight_schools"], [1000], ["off"]
    jax.config.update("jax_enable_x64", True)  # as in the runs, so that the file records the right setting
    methods = available(options.methods)
    versions: dict[str, Any] = {"packages": peers.installed(("numpyro", "blackjax", "numpy"))}
    if set(methods) & set(peers.METHODS):
        versions["peers"] = run_fresh("benchmarks.peers", "versions", python=str(PEERS_PYTHON))
    rows: list[dict[str, Any]] = []
    for num_samples in options.num_samples:
        for cached in (flag == "on" for flag in options.cache):
            for name in names_here(options.models):
                here = [m for m in methods if name in MODELS or m not in peers.METHODS]
                with tempfile.TemporaryDirectory() as folder:
                    setting = Setting(name, num_samples, cached)
                    rows.append(measure(setting, here, options.repeats, options.limit, Path(folder)))
                kept = with_others(options.save, rows, KEYS) if options.save else rows
                derive(kept)
                print(lines(rows[-1]), flush=True)
                if options.save:
                    save(options.save, kept, **versions)
    summarise(rows, methods)


def summarise(rows: list[dict[str, Any]], methods: list[str]) -> None:
    """Print the speed-ups over NumPyro's faster form, and the rows that failed."""
    for method in methods:
        found = [row["runs"].get(method, {}).get("speedup") for row in rows]
        ratios = [x for x in found if x is not None]
        if ratios and method not in NUMPYRO:
            print(
                f"{method}: speed-up over NumPyro's faster one: median {np.median(ratios):.2f}, least {min(ratios):.2f}"
            )
    for row in rows:
        if row["agrees"] is False:
            print(json.dumps({key: row[key] for key in KEYS}), "failed: the methods disagree")


if __name__ == "__main__":
    main()
