"""Measure what a user waits for: whole cold calls without imports, compared with ``numpyro.infer.MCMC(NUTS)``.

Every run has a process to itself, so everything is compiled, and all are in float64: 4 chains of 25,000 draws after
1,000 steps of warm-up each. Seconds run from the call until the constrained draws are in memory. Posteriors are
posteriordb's in ``../shared/posteriordb`` (skipped if absent), where means and standard deviations of the draws are
compared with the reference draws (z-scores), and others without a reference. Methods run alternately, and minima over
``--repeats`` are reported, with CPU seconds, which depend less on a busy machine.

    python -m benchmarks.whole_call [--posteriors NAME ...] [--methods NAME ...] [--repeats 1] [--save NAME] [--quick]
"""

import argparse
import functools
import json
import subprocess
import sys
import time
from collections.abc import Callable
from importlib.util import module_from_spec, spec_from_file_location
from typing import Any, NamedTuple

import jax
import numpy as np

from benchmarks._harness import SHARED, save
from benchmarks.posteriors import POSTERIORS

NUM_CHAINS, NUM_WARMUP = 4, 1000
# The methods to compare with, and pmcmc's default and other warm-ups by name.
NUMPYRO = ("numpyro vectorized", "numpyro sequential")
OURS = {
    "pmcmc": lambda pmcmc: None,
    "chees": lambda pmcmc: pmcmc.warmup.ChEESAdaptation(),
    "pathfinder": lambda pmcmc: pmcmc.warmup.Pathfinder(),
    "ensemble": lambda pmcmc: pmcmc.EnsembleAdaptation(),
    "window": lambda pmcmc: pmcmc.WindowAdaptation(),
}
LIMIT_SECONDS = 900


class Problem(NamedTuple):
    """A NumPyro model with its arguments.

    Attributes:
        model: The model.
        args: Positional arguments.
        kwargs: Keyword arguments.
        reference: Moments of posteriordb's reference draws by name, or None.
    """

    model: Callable
    args: tuple
    kwargs: dict
    reference: dict[str, Any] | None


def eight_schools() -> Problem:
    """Rubin (1981), non-centred, as in NumPyro's own documentation."""
    import numpyro
    import numpyro.distributions as dist

    def model(errors, effects):
        mu = numpyro.sample("mu", dist.Normal(0, 5))
        tau = numpyro.sample("tau", dist.HalfCauchy(5))
        with numpyro.plate("school", 8):
            z = numpyro.sample("z", dist.Normal(0, 1))
            theta: Any = numpyro.deterministic("theta", mu + tau * z)
            numpyro.sample("effect", dist.Normal(theta, errors), obs=effects)

    effects = np.array([28.0, 8.0, -3.0, 7.0, -1.0, 1.0, 18.0, 12.0])
    errors = np.array([15.0, 10.0, 16.0, 11.0, 9.0, 11.0, 10.0, 18.0])
    return Problem(model, (errors, effects), {}, None)


@functools.cache
def posteriordb() -> dict[str, Any]:
    """Return the public posteriors by name; an empty dict if the folder is absent."""
    path = SHARED / "posteriordb" / "posteriors.py"
    if not path.exists():
        print(f"posteriordb's posteriors are absent ({path.parent.name} in the shared folder): skipped.")
        return {}
    spec: Any = spec_from_file_location("posteriordb_posteriors", path)
    module = sys.modules[spec.name] = module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.POSTERIORS


def problem(name: str) -> Problem:
    """Return a posterior by name: eight schools, one of `benchmarks.posteriors`, or one of posteriordb."""
    if name == "eight_schools":
        return eight_schools()
    if name in POSTERIORS:
        found = POSTERIORS[name]()
        if not found.is_density:
            return Problem(found.model, found.arguments, {}, None)
        # NumPyro samples a log density as a factor of a flat site.
        return Problem(functools.partial(_flat_model, found.model, found.dim), (), {}, None)
    found = posteriordb()[name]
    return Problem(found.model, found.model_args, found.model_kwargs, found.reference())


def _flat_model(logdensity: Callable, dim: int) -> None:
    """A log density as a NumPyro model: a factor of a flat site."""
    import numpyro
    import numpyro.distributions as dist

    x = numpyro.sample("x", dist.ImproperUniform(dist.constraints.real_vector, (), (dim,)))
    numpyro.factor("density", logdensity(x))


def run_ours(
    method: str, what: Problem, seed: int, num_samples: int, num_chains: int = NUM_CHAINS
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Run pmcmc; return the draws by site, and the seconds by phase."""
    import pmcmc

    options: dict[str, Any] = dict(
        num_warmup=NUM_WARMUP, num_samples=num_samples, num_chains=num_chains, progress_bar=False
    )
    warmup = OURS[method](pmcmc)
    begin, cpu = time.perf_counter(), time.process_time()
    chain = pmcmc.parallel_chain(
        what.model, seed, model_args=what.args, model_kwargs=what.kwargs, warmup=warmup, **options
    )
    samples = jax.block_until_ready(chain.get_samples(group_by_chain=True))
    seconds, cpu, report = time.perf_counter() - begin, time.process_time() - cpu, chain.report
    parts = {
        "warmup_s": report.warmup_seconds,
        "pilot_s": report.pilot_seconds,
        "compile_s": report.compile_seconds,
        "solve_s": report.solve_seconds,
    }
    steps = getattr(chain.kernel, "num_integration_steps", None)
    return samples, {
        "seconds": seconds,
        "cpu_seconds": cpu,
        **parts,
        "host_s": seconds - sum(parts.values()),
        "decision": report.decision,
        "num_divergent": int(np.sum(report.num_divergent)),
        "acceptance_rate": float(np.mean(report.acceptance_rate)),
        "num_steps": float(np.mean(jax.tree.leaves(steps))) if steps is not None else None,
    }


def run_numpyro(
    method: str, what: Problem, seed: int, num_samples: int, num_chains: int = NUM_CHAINS
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Run NumPyro's NUTS; return the draws by site, and the seconds."""
    from numpyro.infer import MCMC, NUTS

    options: dict[str, Any] = dict(
        num_warmup=NUM_WARMUP, num_samples=num_samples, num_chains=num_chains, progress_bar=False
    )
    begin, cpu = time.perf_counter(), time.process_time()
    mcmc = MCMC(NUTS(what.model), chain_method=method.split()[1], **options)
    mcmc.run(jax.random.key(seed), *what.args, **what.kwargs)
    samples = jax.block_until_ready(mcmc.get_samples(group_by_chain=True))
    seconds, cpu = time.perf_counter() - begin, time.process_time() - cpu
    return samples, {
        "seconds": seconds,
        "cpu_seconds": cpu,
        "num_divergent": int(np.sum(mcmc.get_extra_fields()["diverging"])),
    }


def columns(samples: dict[str, Any]) -> dict[str, np.ndarray]:
    """Return the draws (chains, draws) of every number under Stan's names, such as ``beta[1]``."""
    found = {}
    for site, draws in samples.items():
        draws = np.asarray(draws, float)
        for index in np.ndindex(draws.shape[2:]):
            name = f"{site}[{','.join(str(i + 1) for i in index)}]" if index else site
            found[name] = draws[(slice(None), slice(None), *index)]
    return found


def judge(samples: dict[str, Any], reference: dict[str, Any] | None) -> dict[str, Any]:
    """Return the smallest effective sample size, largest R-hat, and largest |z| of means and standard deviations."""
    from numpyro.diagnostics import effective_sample_size, gelman_rubin

    draws = columns(samples)
    moving = {name: x for name, x in draws.items() if np.ptp(x) > 0}
    ess = {name: float(effective_sample_size(x)) for name, x in moving.items()}
    found: dict[str, Any] = {"min_ess": min(ess.values()), "max_rhat": max(map(gelman_rubin, moving.values()))}
    if reference is None:
        return found
    z_mean, z_sd = [], []
    for i, name in enumerate(map(str, reference["names"])):
        x = draws[name]
        centred = x - x.mean()
        error = np.hypot(x.std() / np.sqrt(ess[name]), reference["mcse_mean"][i])
        z_mean.append((x.mean() - reference["mean"][i]) / error)
        squares = centred**2  # delta method: sd(s) is about sd(s^2) / (2 s)
        error = squares.std() / np.sqrt(effective_sample_size(squares)) / (2 * x.std())
        z_sd.append((x.std() - reference["sd"][i]) / np.hypot(error, reference["mcse_sd"][i]))
    return {**found, "max_z_mean": float(np.max(np.abs(z_mean))), "max_z_sd": float(np.max(np.abs(z_sd)))}


def run_here(name: str, method: str, seed: int, num_samples: int) -> dict[str, Any]:
    """Run one method in this process."""
    jax.config.update("jax_enable_x64", True)
    jax.devices()
    what = problem(name)
    run = run_numpyro if method in NUMPYRO else run_ours
    samples, facts = run(method, what, seed, num_samples)
    return {**facts, **judge(samples, what.reference)}


def run_fresh(module: str, *arguments: str) -> dict[str, Any]:
    """Return what a module prints under ``--one`` in a new interpreter."""
    command = [sys.executable, "-m", module, "--one", *arguments]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=LIMIT_SECONDS)
    except subprocess.TimeoutExpired:
        return {"error": f"more than {LIMIT_SECONDS} s"}
    if done.returncode:
        return {"error": done.stderr.strip().splitlines()[-1] if done.stderr.strip() else "no message"}
    return json.loads(done.stdout.strip().splitlines()[-1])


def answer(run: Callable[[str, str, int, int], dict[str, Any]], one: list[str]) -> None:
    """Print a run of a posterior, a method, a seed and a number of draws: what `run_fresh` reads."""
    name, method, seed, num_samples = one
    print(json.dumps(run(name, method, int(seed), int(num_samples))))


def measure(name: str, methods: list[str], repeats: int, num_samples: int) -> dict[str, Any]:
    """Run all methods on one posterior alternately; keep the fastest run of each, and count the failures."""
    runs: dict[str, list[dict[str, Any]]] = {method: [] for method in methods}
    for seed in range(repeats):
        for method in methods:
            runs[method].append(run_fresh("benchmarks.whole_call", name, method, str(seed), str(num_samples)))
    row: dict[str, Any] = {"posterior": name, "num_samples": num_samples, "runs": {}}
    for method, found in runs.items():
        good = [run for run in found if "error" not in run]
        best = min(good, key=lambda run: run["seconds"]) if good else found[0]
        row["runs"][method] = {**best, "num_failed": len(found) - len(good), "num_runs": len(found)}
    theirs = [row["runs"][m] for m in NUMPYRO if "seconds" in row["runs"].get(m, {})]
    for run in row["runs"].values():
        if "seconds" in run:
            run["ess_per_s"] = run["min_ess"] / run["seconds"]
            for name, key in (("speedup", "seconds"), ("cpu_speedup", "cpu_seconds")):
                run[name] = min(other[key] for other in theirs) / run[key] if theirs else None
    return row


def lines(row: dict[str, Any]) -> str:
    """Return the lines of one posterior."""
    text = [f"{row['posterior']}, {NUM_CHAINS} x {row['num_samples']:,} draws"]
    for method, run in row["runs"].items():
        if "error" in run:
            text.append(f"  {method:20s} failed: {run['error']}")
            continue
        show = lambda key, run=run: f"{run[key]:.1f}" if run.get(key) is not None else "-"
        split = "  ".join(f"{key[:-2]} {show(key)}" for key in run if key.endswith("_s") and key != "ess_per_s")
        text.append(
            f"  {method:20s} {run['seconds']:6.1f} s ({show('cpu_seconds')} cpu)  speed-up {show('speedup')} "
            f"({show('cpu_speedup')})  min ESS {run['min_ess']:8.0f} ({run['ess_per_s']:8.0f} /s)"
            f"  |z| mean {show('max_z_mean')}, sd {show('max_z_sd')}  rhat {run['max_rhat']:.4f}"
            f"  divergent {run['num_divergent']}  failed {run['num_failed']}/{run['num_runs']}  {split}"
        )
    return "\n".join(text)


def main(arguments: list[str] | None = None) -> None:
    """Measure the posteriors, print and save the rows, and print the speed-ups."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--posteriors", nargs="*", default=None, help="posteriordb's, eight_schools, or planner's")
    parser.add_argument("--methods", nargs="*", default=["pmcmc", *NUMPYRO], choices=[*OURS, *NUMPYRO])
    parser.add_argument("--repeats", type=int, default=1, help="runs of each, with seeds 0, 1, ...")
    parser.add_argument("--num-samples", type=int, default=25_000)
    parser.add_argument("--save", default=None, help="name of the result file, without .json")
    parser.add_argument("--quick", action="store_true", help="eight schools alone, 2,000 draws")
    parser.add_argument("--one", nargs=4, default=None, help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if options.one:
        answer(run_here, options.one)
        return
    num_samples = 2000 if options.quick else options.num_samples
    names = options.posteriors or (["eight_schools"] if options.quick else ["eight_schools", *posteriordb()])
    jax.config.update("jax_enable_x64", True)  # as in the runs, so that the file records the right setting
    rows: list[dict[str, Any]] = []
    for name in names:
        rows.append(measure(name, options.methods, options.repeats, num_samples))
        print(lines(rows[-1]), flush=True)
        if options.save:
            save(options.save, rows)
    for method in options.methods:
        found = [row["runs"][method].get("speedup") for row in rows]
        if method in OURS and None not in found:
            print(
                f"{method}: speed-up over NumPyro's faster one: median {np.median(found):.2f}, least {min(found):.2f}"
            )


if __name__ == "__main__":
    main()
