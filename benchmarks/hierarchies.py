"""Compare the forms of hierarchies: as people write them (centred), non-centred, and chosen by `AutoReparam`.

Each model is sampled by HMC in each form. A row has the smallest effective sample size (bulk) per 1,000 gradients, over
the same latent sites in each form, the share of divergent draws, and the steps until pairs of chains merged under the
same noise, from the last states of warm-up's lanes; None for pairs that did not merge within ``--steps``.

    python -m benchmarks.hierarchies [--models funnel ...] [--seeds 0 1] [--save hierarchies]
"""

import argparse
import warnings
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
from numpyro.contrib.control_flow import scan
from numpyro.handlers import reparam
from numpyro.infer.reparam import LocScaleReparam

import pmcmc
from benchmarks._harness import save, with_others
from benchmarks.coalescence import merges
from benchmarks.posteriors import POSTERIORS
from pmcmc.chain.draws import judge
from pmcmc.recurrence import Sequential


class Hierarchy(NamedTuple):
    """A model in centred form.

    Attributes:
        model: The model, without arguments.
        sites: The sites that its non-centred form changes.
        by_hand: The non-centred form, where NumPyro's handler does not make it, as within ``scan``; else None.
    """

    model: Callable
    sites: tuple[str, ...]
    by_hand: Callable | None = None

    def form(self, name: str) -> tuple[Callable, pmcmc.AutoReparam | None]:
        """Return the model of a form, and what is passed as ``reparam``."""
        if name == "non-centred":
            return self.by_hand or reparam(self.model, config={s: LocScaleReparam(0) for s in self.sites}), None
        return self.model, pmcmc.AutoReparam() if name == "chosen" else None


FORMS = ("centred", "non-centred", "chosen")


def eight_schools() -> Hierarchy:
    """Rubin (1981)."""
    posterior = POSTERIORS["eight_schools_centred"]()
    return Hierarchy(lambda: posterior.model(*posterior.arguments), ("theta",))


def funnel() -> Hierarchy:
    """Neal (2003), section 8."""

    def model():
        v = numpyro.sample("v", dist.Normal(0, 3))
        with numpyro.plate("elements", 9):
            numpyro.sample("x", dist.Normal(0, jnp.exp(v / 2)))

    return Hierarchy(model, ("x",))


def uneven_groups() -> Hierarchy:
    """Intercepts of ten groups of 2 rows and three of 500."""
    rng, sizes = np.random.default_rng(1), np.array([2] * 10 + [500] * 3)
    group = np.repeat(np.arange(len(sizes)), sizes)
    rows = (rng.normal(1.0, 0.7, len(sizes))[group] + rng.normal(size=len(group))).astype(np.float32)

    def model():
        mu, tau = numpyro.sample("mu", dist.Normal(0, 5)), numpyro.sample("tau", dist.HalfNormal(2))
        sigma = numpyro.sample("sigma", dist.HalfNormal(2))
        with numpyro.plate("groups", len(sizes)):
            effect = numpyro.sample("effect", dist.Normal(mu, tau))
        with numpyro.plate("rows", len(rows)):
            numpyro.sample("y", dist.Normal(effect[group], sigma), obs=rows)

    return Hierarchy(model, ("effect",))


def slopes() -> Hierarchy:
    """Intercepts and slopes of twenty groups of 10 rows with little noise in x."""
    rng = np.random.default_rng(2)
    group, x = np.repeat(np.arange(20), 10), rng.normal(0, 0.3, 200).astype(np.float32)
    rows = rng.normal(1, 0.5, 20)[group] + rng.normal(0.3, 0.2, 20)[group] * x + rng.normal(0, 1, 200)
    rows = rows.astype(np.float32)

    def model():
        mu = numpyro.sample("mu", dist.Normal(0, 5).expand([2]).to_event(1))
        tau = numpyro.sample("tau", dist.HalfNormal(2).expand([2]).to_event(1))
        sigma = numpyro.sample("sigma", dist.HalfNormal(2))
        with numpyro.plate("groups", 20):
            level = numpyro.sample("level", dist.Normal(mu[0], tau[0]))
            slope = numpyro.sample("slope", dist.Normal(mu[1], tau[1]))
        with numpyro.plate("rows", 200):
            numpyro.sample("y", dist.Normal(level[group] + slope[group] * x, sigma), obs=rows)

    return Hierarchy(model, ("level", "slope"))


def horseshoe() -> Hierarchy:
    """Logistic regression under the horseshoe (Carvalho et al. 2010); data as in `benchmarks.posteriors`."""
    features, labels = POSTERIORS["horseshoe"]().arguments

    def model():
        overall = numpyro.sample("overall", dist.HalfCauchy(1))
        intercept = numpyro.sample("intercept", dist.Normal(0, 2))
        with numpyro.plate("feature", features.shape[1]):
            local = numpyro.sample("local", dist.HalfCauchy(1))
            weight = numpyro.sample("weight", dist.Normal(0, overall * local))
        numpyro.sample("label", dist.Bernoulli(logits=intercept + features @ weight), obs=labels)

    return Hierarchy(model, ("weight",))


def volatility() -> Hierarchy:
    """Kim, Shephard & Chib (1998), with log volatilities in a scan; 60 synthetic returns."""
    rng, level = np.random.default_rng(3), np.zeros(60)
    for t in range(1, 60):
        level[t] = 0.95 * level[t - 1] + 0.3 * rng.normal()
    returns = (np.exp(level / 2) * rng.normal(size=60)).astype(np.float32)

    def model(centred=True):
        sigma, phi = numpyro.sample("sigma", dist.HalfNormal(0.5)), numpyro.sample("phi", dist.Beta(20, 1.5))
        mean = numpyro.sample("mean", dist.Normal(0, 1))

        def step(before, y):
            if centred:
                h = numpyro.sample("h", dist.Normal(phi * before, sigma))
            else:
                z = numpyro.sample("h_decentered", dist.Normal(0, 1))
                h = numpyro.deterministic("h", phi * before + sigma * z)
            numpyro.sample("y", dist.Normal(0, jnp.exp((mean + h) / 2)), obs=y)
            return h, None

        scan(step, 0.0, returns)

    return Hierarchy(model, ("h",), partial(model, centred=False))


HIERARCHIES = {make.__name__: make for make in (eight_schools, funnel, uneven_groups, slopes, horseshoe, volatility)}


def measure(hierarchy: Hierarchy, form: str, seed: int, num_samples: int, num_steps: int) -> dict[str, Any]:
    """Return the figures of a model in one form."""
    model, chosen = hierarchy.form(form)
    options: dict[str, Any] = dict(extra_fields=("num_steps",), solver=Sequential(), progress_bar=False)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # forms that do not mix are what is measured
        chain = pmcmc.parallel_chain(model, seed, reparam=chosen, num_samples=num_samples, **options)
    draws = chain.get_samples(group_by_chain=True)
    mixing = judge({name: np.asarray(x) for name, x in draws.items() if not name.endswith("_decentered")})
    gradients = float(np.sum(chain.get_extra_fields()["num_steps"]))
    ess = min(value for value, _ in mixing.bulk_ess.values())
    lanes: Any = chain.state.ensemble
    first, second = lanes[: len(lanes) // 2], lanes[len(lanes) // 2 :]
    found = merges(chain, jax.random.key(seed + 1), first, second, num_steps, None)
    merged = np.asarray(found.merged)
    return {
        "ess_per_1000_gradients": 1000 * ess / gradients,
        "max_rhat": mixing.max_rhat,
        "divergent": float(np.sum(chain.report.num_divergent)) / (num_samples * chain.num_chains),
        "steps": [int(s) if m else None for s, m in zip(np.asarray(found.steps), merged, strict=True)],
        "centredness": chain.report.centredness,
        "warmup_seconds": chain.report.warmup_seconds,
    }


def line(row: dict[str, Any]) -> str:
    """Return the line of one model, form and seed."""
    steps = [s for s in row["steps"] if s is not None]
    return (
        f"{row['model']:14s} {row['form']:12s} seed {row['seed']}: {row['ess_per_1000_gradients']:7.1f} per 1,000 "
        f"gradients, R-hat {row['max_rhat']:.3f}, {row['divergent']:.2%} divergent, {len(steps)} of "
        f"{len(row['steps'])} pairs merged{f' within {max(steps)}' if steps else ''} {row['centredness'] or ''}"
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
        for form in FORMS:
            for seed in options.seeds:
                found = measure(HIERARCHIES[name](), form, seed, options.draws, options.steps)
                rows.append({"model": name, "form": form, "seed": seed, **found})
                print(line(rows[-1]), flush=True)
                if options.save:
                    save(options.save, with_others(options.save, rows, ("model", "form", "seed")))


if __name__ == "__main__":
    main()
