"""``python -m pmcmc demo``: sample two posteriors from start to end, in parallel, sequentially and with NumPyro's NUTS.

`run` samples the named `EXAMPLES`, prints their reports and a table against NUTS, and saves plots.
"""

import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import numpy as np

import pmcmc
from pmcmc.interop import require

# Every `THINNING`-th draw is kept: long chains are quick to sample but slow to summarise.
THINNING = 20


@dataclass(frozen=True)
class Example:
    """A model with its data.

    Args:
        title: Heading of the output.
        model: The NumPyro model.
        model_kwargs: Its data.
        num_samples: Steps per chain, of which every `THINNING`-th is kept.
        var_names: Sites that are shown.
    """

    title: str
    model: Callable
    model_kwargs: dict
    num_samples: int
    var_names: list[str]


def eight_schools() -> Example:
    """Rubin (1981): effects of coaching in eight schools, non-centred."""
    import numpyro
    import numpyro.distributions as dist

    effect = np.array([28.0, 8.0, -3.0, 7.0, -1.0, 1.0, 18.0, 12.0])
    error = np.array([15.0, 10.0, 16.0, 11.0, 9.0, 11.0, 10.0, 18.0])

    def model(error, effect=None):
        mu = numpyro.sample("mu", dist.Normal(0, 5))
        tau = numpyro.sample("tau", dist.HalfCauchy(5))
        with numpyro.plate("school", 8):
            z = numpyro.sample("z", dist.Normal(0, 1))
            theta = numpyro.deterministic("theta", mu + tau * z)
            numpyro.sample("effect", dist.Normal(theta, error), obs=effect)

    data = {"error": error, "effect": effect}
    return Example("Eight schools, non-centred", model, data, 2_000_000, ["mu", "tau", "theta"])


def logistic() -> Example:
    """Logistic regression on the Wisconsin breast cancer data (569 patients, 30 features) of scikit-learn."""
    import numpyro
    import numpyro.distributions as dist
    from sklearn.datasets import load_breast_cancer

    features, benign = load_breast_cancer(return_X_y=True)
    features = (features - features.mean(0)) / features.std(0)

    def model(features, benign=None):
        intercept = numpyro.sample("intercept", dist.Normal(0, 1))
        beta = numpyro.sample("beta", dist.Normal(0, 1).expand([features.shape[1]]).to_event(1))
        numpyro.sample("benign", dist.Bernoulli(logits=intercept + features @ beta), obs=benign)

    data = {"features": features, "benign": benign}
    return Example("Logistic regression, breast cancer data", model, data, 80_000, ["intercept", "beta"])


EXAMPLES = {"eight_schools": eight_schools, "logistic": logistic}


def check_packages(names: list[str]) -> None:
    """Raise an error if packages that the named examples need are missing.

    Raises:
        ImportError: A package is missing; the message says how to install it.
    """
    data = ("sklearn",) if "logistic" in names else ()
    require(("arviz", "matplotlib", *data), "The demonstration", "pmcmc[demo]")


def run(names: list[str], output: Path, scale: float = 1.0) -> None:
    """Run the named examples and write plots to ``output``; ``scale`` below 1 shortens the runs for tests."""
    check_packages(names)
    print(f"pmcmc {pmcmc.__version__}, jax {jax.__version__}, {jax.device_count()} {jax.default_backend()} device(s)\n")
    output.mkdir(parents=True, exist_ok=True)
    for name in names:
        show(name, EXAMPLES[name](), output, scale)


def show(name: str, example: Example, output: Path, scale: float) -> None:
    """Run one example: parallel, sequential, NUTS, table, plot."""
    num_samples = max(100, int(example.num_samples * scale))
    print(f"=== {example.title}: 4 chains of {num_samples:,} steps, every {THINNING}th kept ===")

    def sample(**options: Any) -> tuple[pmcmc.Chain, float]:
        begin = time.perf_counter()
        chain = pmcmc.parallel_chain(
            example.model, 0, model_kwargs=example.model_kwargs, num_samples=num_samples, thinning=THINNING, **options
        )
        return chain, time.perf_counter() - begin

    chain, seconds = sample()
    print(chain.report)
    sequential, _ = sample(solver=pmcmc.recurrence.Sequential())
    solve, reference = chain.report.solve_seconds, sequential.report.solve_seconds
    print(
        f"The same chains sampled sequentially took {reference:.2f} s to solve (compile "
        f"{sequential.report.compile_seconds:.2f} s), against {solve:.2f} s: {reference / solve:.1f} times as long. "
        f"{_agreement(chain, sequential)}"
    )
    print(f"The whole parallel call, warm-up and compilation included, took {seconds:.1f} s.\n")
    nuts, nuts_seconds = _nuts(example, max(100, int(2_500 * scale)))
    _print_tables(chain, nuts, nuts_seconds, example.var_names)
    path = output / f"{name}.png"
    _plot(chain, example.var_names, path)
    print(f"Trace and posterior: {path}\n")


def _agreement(chain: pmcmc.Chain, sequential: pmcmc.Chain) -> str:
    """Say which share of all draws of two runs agree."""
    gap = np.max(np.abs(chain.unknowns - sequential.unknowns), axis=-1)
    return (
        f"{np.mean(gap < 1e-2):.2%} of all draws agree to 1% of the posterior's scale; the others follow accept "
        f"decisions that {chain.unknowns.dtype} rounding settles either way."
    )


def _nuts(example: Example, num_samples: int) -> tuple[Any, float]:
    """Sample with NumPyro's NUTS; return the MCMC object and its seconds."""
    from numpyro.infer import MCMC, NUTS

    mcmc = MCMC(
        NUTS(example.model),
        num_warmup=1000,
        num_samples=num_samples,
        num_chains=4,
        chain_method="vectorized",
        progress_bar=False,
    )
    begin = time.perf_counter()
    mcmc.run(jax.random.key(1), **example.model_kwargs)
    jax.block_until_ready(mcmc.get_samples())
    return mcmc, time.perf_counter() - begin


def _print_tables(chain: pmcmc.Chain, nuts: Any, nuts_seconds: float, var_names: list[str]) -> None:
    """Print the posterior summaries of both side by side."""
    import arviz as az

    columns = ["mean", "sd", "ess_bulk", "r_hat"]
    ours = az.summary(chain.to_arviz(), var_names=var_names, round_to="none")[columns]
    theirs = az.summary(az.from_numpyro(nuts), var_names=var_names, round_to="none")[columns]
    table = ours.join(theirs.add_suffix(" (NUTS)"))
    print(table.astype(float).round(3).to_string())
    print(f"NUTS: NumPyro, 4 vectorised chains of {nuts.num_samples:,} draws, {nuts_seconds:.1f} s in all.\n")


def _plot(chain: pmcmc.Chain, var_names: list[str], path: Path) -> None:
    """Plot trace and marginal of the first entry of each variable, one colour per chain."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    samples = chain.get_samples(group_by_chain=True)
    fig, axes = plt.subplots(len(var_names), 2, figsize=(11, 2.2 * len(var_names)), squeeze=False, layout="constrained")
    for (marginal, trace), name in zip(axes, var_names, strict=True):
        draws = np.asarray(samples[name])
        label = name if draws.ndim == 2 else f"{name}[0]"
        draws = draws.reshape(*draws.shape[:2], -1)[..., 0]
        edges = np.histogram_bin_edges(np.clip(draws, *np.quantile(draws, [0.001, 0.999])), bins=80)
        shown = slice(None, None, max(1, draws.shape[1] // 2000))
        for number, values in enumerate(draws):
            marginal.hist(values, edges, density=True, histtype="step", label=f"chain {number}")
            trace.plot(np.arange(draws.shape[1])[shown], values[shown], lw=0.4, alpha=0.7)
        marginal.set(title=label, yticks=[])
        trace.set(title=f"{label}, every {shown.step:,}th draw" if shown.step > 1 else label)
    axes[0, 0].legend(fontsize="small", frameon=False)
    axes[-1, 1].set_xlabel("draw")
    fig.savefig(path, dpi=110)
    plt.close(fig)
