"""The samplers that have an environment of their own (``make peers``): nutpie on PyMC and numba, and Stan by pystan.

Imports neither JAX nor pmcmc. nutpie's seconds include the construction and compilation of the PyMC model. Stan's C++
compilation is apart, in ``build_s``: httpstan keeps the compiled models in the folder that `benchmarks.whole_call`
names, so ``build_s`` is that of the first run.
"""

import argparse
import hashlib
import json
import os
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks._fresh import Stopwatch
from benchmarks.models import MODELS, Model

NUM_CHAINS, NUM_WARMUP = 4, 1000
NUTPIE, STAN = "nutpie", "stan"
METHODS = (NUTPIE, STAN)
PACKAGES = ("nutpie", "pymc", "pytensor", "numba", "pystan", "httpstan", "numpy")

Outcome = tuple[dict[str, Any], dict[str, Any]]


def environment(method: str, cache: str, stan_folder: str) -> dict[str, str]:
    """Return the variables that keep a method's compiled code in a folder: an empty folder makes a cold run."""
    if method == STAN:
        return {"XDG_CACHE_HOME": stan_folder}
    return {"PYTENSOR_FLAGS": f"base_compiledir={cache}", "NUMBA_CACHE_DIR": f"{cache}/numba"}


def run_nutpie(model: Model, data: dict[str, np.ndarray], seed: int, num_samples: int) -> Outcome:
    """Run nutpie."""
    import nutpie
    import pymc
    import pytensor.link.numba  # noqa: F401  (imports are not part of the call)

    watch = Stopwatch()
    with pymc.Model() as context:
        model.pymc(**data)
    compiled = nutpie.compile_pymc_model(context, backend="numba")
    built = watch.read()["seconds"]
    options: dict[str, Any] = dict(tune=NUM_WARMUP, draws=num_samples, chains=NUM_CHAINS, progress_bar=False)
    trace = nutpie.sample(compiled, seed=seed, **options)
    samples = {name: trace.posterior[name].values for name in model.parameters}
    seconds, stats = watch.read(), trace.sample_stats
    return samples, {
        **seconds,
        "compile_s": built,
        "num_divergent": int(stats["diverging"].values.sum()),
        "gradients_per_draw": float(stats["n_steps"].values.mean()),
    }


def build(model: Model, data: dict[str, np.ndarray], seed: int) -> tuple[Any, float]:
    """Return Stan's compiled model with its data, and the seconds of the first compilation."""
    import stan

    watch = Stopwatch()
    posterior = stan.build(model.stan, data=model.stan_data(data), random_seed=seed + 1)
    return posterior, _first(model.stan, watch.read()["seconds"])


def run_stan(model: Model, data: dict[str, np.ndarray], seed: int, num_samples: int) -> Outcome:
    """Run Stan."""
    posterior, build_s = build(model, data, seed)
    # httpstan keeps draws, too, and returns those of an equal earlier call.
    for fit in Path(os.environ["XDG_CACHE_HOME"]).glob("httpstan/*/models/*/fits/*"):
        fit.unlink()
    watch = Stopwatch()
    fit = posterior.sample(num_chains=NUM_CHAINS, num_samples=num_samples, num_warmup=NUM_WARMUP)
    samples = {name: _by_chain(fit[name], fit.dims[fit.param_names.index(name)]) for name in model.parameters}
    return samples, {
        **watch.read(),
        "build_s": build_s,
        "num_divergent": int(fit["divergent__"].sum()),
        "gradients_per_draw": float(fit["n_leapfrog__"].mean()),
    }


def _by_chain(draws: np.ndarray, shape: list[int]) -> np.ndarray:
    """Turn pystan's draws, (*shape, draws times chains) with chains fastest, into (chains, draws, *shape)."""
    return np.moveaxis(draws.reshape(*shape, -1, NUM_CHAINS), (-1, -2), (0, 1))


def _first(code: str, seconds: float) -> float:
    """Return the seconds of the first build of this program, which are kept in a file beside the compiled models."""
    folder = Path(os.environ.get("XDG_CACHE_HOME", "~/.cache")).expanduser()
    path = folder / f"seconds-{hashlib.sha256(code.encode()).hexdigest()[:16]}.txt"
    if not path.exists():
        path.write_text(f"{seconds:.2f}")
    return float(path.read_text())


def installed(packages: tuple[str, ...] = PACKAGES) -> dict[str, str]:
    """Return the versions of those packages that this environment has."""
    found = {}
    for name in packages:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


def main() -> None:
    """Print one run, or the versions: what `benchmarks.whole_call` reads."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--one", nargs="*", required=True)
    one = parser.parse_args().one
    if one == ["versions"]:
        print(json.dumps(installed()))
        return
    if one[0] == "build":
        print(json.dumps({"build_s": build(MODELS[one[1]](), dict(np.load(one[2])), 0)[1]}))
        return
    name, method, seed, num_samples, data, draws = one
    model = MODELS[name]()
    run = run_stan if method == STAN else run_nutpie
    samples, facts = run(model, dict(np.load(data)), int(seed), int(num_samples))
    np.savez(draws, **samples)
    print(json.dumps(facts))


if __name__ == "__main__":
    main()
