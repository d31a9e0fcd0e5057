"""The samplers that run on JAX: pmcmc's, NumPyro's and BlackJAX's NUTS. Each returns draws by site, and facts.

Seconds run from the call until the constrained draws are in memory. ``gradients_per_draw`` counts after warm-up.
"""

import argparse
import json
from collections.abc import Callable
from typing import Any

import jax
import numpy as np

from benchmarks._fresh import Stopwatch
from benchmarks.models import MODELS
from benchmarks.problems import Problem, of_model, problem

NUM_CHAINS, NUM_WARMUP = 4, 1000
NUMPYRO = ("numpyro vectorized", "numpyro sequential")
DROP_IN, BLACKJAX = "drop-in", "blackjax"
# pmcmc's default and other warm-ups by name.
OURS: dict[str, Callable[[Any], Any]] = {
    "pmcmc": lambda pmcmc: None,
    "chees": lambda pmcmc: pmcmc.warmup.ChEESAdaptation(),
    "pathfinder": lambda pmcmc: pmcmc.warmup.Pathfinder(),
    "ensemble": lambda pmcmc: pmcmc.EnsembleAdaptation(),
    "window": lambda pmcmc: pmcmc.WindowAdaptation(),
}
METHODS = (*OURS, DROP_IN, *NUMPYRO, BLACKJAX)

Outcome = tuple[dict[str, Any], dict[str, Any]]


def run_ours(method: str, what: Problem, seed: int, num_samples: int, num_chains: int = NUM_CHAINS) -> Outcome:
    """Run ``pmcmc.parallel_chain``."""
    import pmcmc

    warmup = OURS[method](pmcmc)
    options = _options(num_samples, num_chains) | {"warmup": warmup, "extra_fields": ("num_steps",)}
    watch = Stopwatch()
    chain = pmcmc.parallel_chain(what.model, seed, model_args=what.args, model_kwargs=what.kwargs, **options)
    samples = jax.block_until_ready(chain.get_samples(group_by_chain=True))
    return samples, _facts_of(chain, watch.read())


def run_drop_in(method: str, what: Problem, seed: int, num_samples: int, num_chains: int = NUM_CHAINS) -> Outcome:
    """Run ``pmcmc.ParallelMCMC`` with NumPyro's NUTS."""
    from numpyro.infer import NUTS

    import pmcmc

    pmcmc.ParallelMCMC  # noqa: B018  (the import is not part of the call)
    watch = Stopwatch()
    mcmc = pmcmc.ParallelMCMC(NUTS(what.model), **_options(num_samples, num_chains))
    mcmc.run(jax.random.key(seed), *what.args, extra_fields=("num_steps",), **what.kwargs)
    samples = jax.block_until_ready(mcmc.get_samples(group_by_chain=True))
    return samples, _facts_of(mcmc.chain, watch.read())


def _options(num_samples: int, num_chains: int) -> dict[str, Any]:
    return dict(num_warmup=NUM_WARMUP, num_samples=num_samples, num_chains=num_chains, progress_bar=False)


def _facts_of(chain: Any, seconds: dict[str, float]) -> dict[str, Any]:
    """Return the seconds by phase, and what the report says."""
    report = chain.report
    parts = {
        "warmup_s": report.warmup_seconds,
        "pilot_s": report.pilot_seconds,
        "compile_s": report.compile_seconds,
        "solve_s": report.solve_seconds,
    }
    return {
        **seconds,
        **parts,
        "host_s": seconds["seconds"] - sum(parts.values()),
        "decision": report.decision,
        "num_divergent": int(np.sum(report.num_divergent)),
        "acceptance_rate": float(np.mean(report.acceptance_rate)),
        "gradients_per_draw": float(np.mean(chain.get_extra_fields()["num_steps"])),
    }


def run_numpyro(method: str, what: Problem, seed: int, num_samples: int, num_chains: int = NUM_CHAINS) -> Outcome:
    """Run NumPyro's NUTS, with the chain method that the name of the method ends with."""
    from numpyro.infer import MCMC, NUTS

    watch = Stopwatch()
    mcmc = MCMC(NUTS(what.model), chain_method=method.split()[1], **_options(num_samples, num_chains))
    mcmc.run(jax.random.key(seed), *what.args, extra_fields=("num_steps",), **what.kwargs)
    samples = jax.block_until_ready(mcmc.get_samples(group_by_chain=True))
    seconds, fields = watch.read(), mcmc.get_extra_fields()
    return samples, {
        **seconds,
        "num_divergent": int(np.sum(fields["diverging"])),
        "gradients_per_draw": float(np.mean(fields["num_steps"])),
    }


def run_blackjax(method: str, what: Problem, seed: int, num_samples: int, num_chains: int = NUM_CHAINS) -> Outcome:
    """Run BlackJAX's window adaptation and NUTS, vectorised over chains, in one compiled program."""
    import blackjax
    from numpyro.infer.util import initialize_model

    watch = Stopwatch()
    init_key, run_key = jax.random.split(jax.random.PRNGKey(seed))
    init_keys = jax.random.split(init_key, num_chains)
    model = initialize_model(init_keys, what.model, model_args=what.args, model_kwargs=what.kwargs)
    logdensity = lambda z: -model.potential_fn(z)

    @jax.jit
    @jax.vmap
    def chain(key, start):
        warm_key, key = jax.random.split(key)
        warmup = blackjax.window_adaptation(blackjax.nuts, logdensity)
        (state, parameters), _ = warmup.run(warm_key, start, NUM_WARMUP)
        kernel = blackjax.nuts(logdensity, **parameters)

        def step(state, key):
            state, info = kernel.step(key, state)
            return state, (model.postprocess_fn(state.position), info.is_divergent, info.num_integration_steps)

        return jax.lax.scan(step, state, jax.random.split(key, num_samples))[1]

    found = chain(jax.random.split(run_key, num_chains), model.param_info.z)
    samples, divergent, gradients = jax.block_until_ready(found)
    return samples, {
        **watch.read(),
        "num_divergent": int(np.sum(divergent)),
        "gradients_per_draw": float(np.mean(gradients)),
    }


def runner(method: str) -> Callable[..., Outcome]:
    """Return the function that runs a method."""
    if method in OURS:
        return run_ours
    return {DROP_IN: run_drop_in, BLACKJAX: run_blackjax}.get(method, run_numpyro)


def cache_in(method: str, folder: str) -> None:
    """Switch on the cache of compiled programs: by pmcmc for its own methods, and with JAX's options for others."""
    if method in OURS or method == DROP_IN:
        import pmcmc

        pmcmc.cache_programs(folder)
        return
    jax.config.update("jax_compilation_cache_dir", folder)
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
    jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)


def run_here(name: str, method: str, seed: int, num_samples: int, data: str, draws: str, cache: str) -> dict[str, Any]:
    """Run one method in this process and save its draws.

    Args:
        name: Name of the model.
        method: Name of the method.
        seed: Seed.
        num_samples: Draws of each chain.
        data: File of the model's data.
        draws: File for the draws.
        cache: Folder of compiled programs, or empty for none.
    """
    jax.config.update("jax_enable_x64", True)
    if cache:
        cache_in(method, cache)
    jax.devices()
    what = of_model(name, dict(np.load(data))) if name in MODELS else problem(name)
    samples, facts = runner(method)(method, what, seed, num_samples)
    kept: dict[str, Any] = {site: np.asarray(samples[site]) for site in what.parameters or samples}
    np.savez(draws, **kept)
    return facts


def main() -> None:
    """Print one run: what `benchmarks.whole_call` reads."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--one", nargs=7, required=True)
    name, method, seed, num_samples, *files = parser.parse_args().one
    print(json.dumps(run_here(name, method, int(seed), int(num_samples), *files)))


if __name__ == "__main__":
    main()
