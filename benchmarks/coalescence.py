"""Measure how long it takes until two chains merge under the same noise, by posterior and kernel.

Pairs start at independent draws of N(0, spread^2 I) in the coordinates of warm-up, with the kernel tuned there. They
merge within 1e-6 of a standard deviation (float64). A pair that has not merged after ``--steps`` counts as "-".

    python -m benchmarks.coalescence [--posteriors eight_schools ...] [--kernels NUTS ...] [--save coalescence]
"""

import argparse
from collections.abc import Callable
from typing import Any

import blackjax
import jax
import jax.numpy as jnp
import numpy as np

from benchmarks._harness import save
from benchmarks.posteriors import POSTERIORS, Posterior
from pmcmc import HMC, MALA, NUTS, Chain, Kernel, RandomWalk, from_blackjax
from pmcmc.random.streams import step_noise
from pmcmc.recurrence import Sequential
from pmcmc.stability import Coalescence, coalescence_time


def _elliptical(logdensity_fn: Callable, mean: Any, cov: Any) -> Any:
    """Elliptical slice sampling with prior N(0, I) and the rest of the target as the likelihood."""
    return blackjax.elliptical_slice(lambda x: logdensity_fn(x) + 0.5 * jnp.sum(x**2), mean=mean, cov=cov)


def kernels(dim: int) -> dict[str, Kernel]:
    """Return kernels by name. MCLMC is not tuned: step size 0.3 D^(1/4) and decoherence length sqrt(D)."""
    return {
        "HMC, fixed length": HMC(step_size_jitter=0.0),
        "HMC": HMC(),
        "NUTS": NUTS(),
        "MALA": MALA(),
        "RandomWalk": RandomWalk(),
        "radial walk": RandomWalk(grid_share=0.0, independence_share=None),
        "elliptical slice": from_blackjax(_elliptical, mean=jnp.zeros(dim), cov=jnp.ones(dim)),
        "MCLMC": from_blackjax(blackjax.mclmc, L=dim**0.5, step_size=0.3 * dim**0.25),
    }


def merges(chain: Chain, key: Any, first: Any, second: Any, num_steps: int, tol: float | None) -> Coalescence:
    """Couple pairs of paths of a tuned chain from unknowns with leading axis pairs; tol as in `coalescence_time`."""
    target, tuned, num_pairs = chain.target, chain.kernel, len(jax.tree.leaves(first)[0])
    noise = step_noise(tuned, target, key, jnp.arange(num_steps * num_pairs))
    noise = jax.tree.map(lambda x: x.reshape(num_steps, num_pairs, *x.shape[1:]), noise)
    scale = jax.tree.map(lambda x: np.ones(x.shape[1:]), first)
    return coalescence_time(tuned.transition(target), first, second, noise, scale=scale, tol=tol)


def measure(posterior: Posterior, kernel: Kernel, num_pairs: int, num_steps: int, spread: float) -> dict[str, Any]:
    """Return the merge steps of the pairs; None for pairs that did not merge."""
    chain = posterior.sampler()(0, kernel=kernel, num_samples=1, num_chains=1, solver=Sequential(), progress_bar=False)
    target, tuned = chain.target, chain.kernel
    key, first_key, second_key = jax.random.split(jax.random.key(1), 3)
    start = jax.vmap(lambda y: tuned.unknown(tuned.start(target, y)))
    first, second = (start(spread * jax.random.normal(k, (num_pairs, target.dim))) for k in (first_key, second_key))
    found = merges(chain, key, first, second, num_steps, 1e-6)
    steps = np.asarray(found.steps)
    return {
        "merged": int(np.sum(found.merged)),
        "steps": [int(s) if m else None for s, m in zip(steps, np.asarray(found.merged), strict=True)],
        "step_size": float(np.asarray(getattr(tuned, "step_size", np.nan))),
        "acceptance_rate": float(np.mean(chain.report.acceptance_rate)),
    }


def line(row: dict[str, Any]) -> str:
    """Return the line of one posterior and kernel."""
    steps = sorted(np.inf if s is None else s for s in row["steps"])
    show = lambda s: "-" if s == np.inf else f"{s:,.0f}"
    values = " / ".join(show(s) for s in (steps[0], steps[len(steps) // 2], steps[-1]))
    return (
        f"{row['posterior']:24s} {row['kernel']:18s} D = {row['dim']:4d}  {values}  ({row['merged']} of {len(steps)})"
    )


def main(arguments: list[str] | None = None) -> None:
    """Measure every posterior and kernel, and print and save the rows."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--posteriors", nargs="*", default=list(POSTERIORS), choices=list(POSTERIORS), metavar="NAME")
    parser.add_argument("--kernels", nargs="*", default=list(kernels(1)), choices=list(kernels(1)), metavar="NAME")
    parser.add_argument("--pairs", type=int, default=16)
    parser.add_argument("--steps", type=int, default=2000)
    parser.add_argument("--spread", type=float, default=1.0)
    parser.add_argument("--save", default=None, help="name of the result file, without .json; written after each row")
    options = parser.parse_args(arguments)
    jax.config.update("jax_enable_x64", True)
    rows: list[dict[str, Any]] = []
    for name in options.posteriors:
        posterior = POSTERIORS[name]()
        for label, kernel in kernels(posterior.dim).items():
            if label not in options.kernels:
                continue
            row: dict[str, Any] = {"posterior": name, "dim": posterior.dim, "kernel": label, "spread": options.spread}
            try:
                row |= measure(posterior, kernel, options.pairs, options.steps, options.spread)
            except Exception as error:  # a failing warm-up is a finding, not the end of the benchmark
                print(f"{name:24s} {label:18s} {type(error).__name__}: {error}", flush=True)
                continue
            rows.append(row)
            print(line(row), flush=True)
            if options.save:
                save(options.save, rows)
        jax.clear_caches()


if __name__ == "__main__":
    main()
