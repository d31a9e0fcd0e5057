"""Hierarchies as people write them, in centred form, for `benchmarks.hierarchies`; data are synthetic unless named."""

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
from numpyro.contrib.control_flow import scan
from numpyro.handlers import reparam
from numpyro.infer.reparam import LocScaleReparam

import pmcmc
from benchmarks.models import MODELS
from benchmarks.posteriors import POSTERIORS


class Hierarchy(NamedTuple):
    """A model in centred form.

    Attributes:
        model: The model, without arguments.
        sites: The sites that its non-centred form changes.
        by_hand: The non-centred form, where ``LocScaleReparam(0)`` does not make it, as within ``scan``; else None.
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


def varying_intercepts() -> Hierarchy:
    """Radon by county (Gelman & Hill 2007, chapter 12), with the synthetic houses of `benchmarks.models`."""
    data = MODELS["varying_intercepts"]().data()
    county, basement, radon = data["county"], *(data[name].astype(np.float32) for name in ("basement", "radon"))

    def model():
        average, spread = numpyro.sample("average", dist.Normal(0, 2)), numpyro.sample("spread", dist.HalfNormal(1))
        slope, noise = numpyro.sample("slope", dist.Normal(0, 2)), numpyro.sample("noise", dist.HalfNormal(1))
        with numpyro.plate("counties", 85):
            alpha = numpyro.sample("alpha", dist.Normal(average, spread))
        numpyro.sample("y", dist.Normal(alpha[county] + slope * basement, noise), obs=radon)

    return Hierarchy(model, ("alpha",))


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


def heavy_groups() -> Hierarchy:
    """Intercepts of thirty groups of 5 rows by Student's t, two of them far out."""
    rng, group = np.random.default_rng(6), np.repeat(np.arange(30), 5)
    effects = 0.5 * rng.standard_t(4, 30)
    effects[:2] += 6
    rows = (1.0 + effects[group] + rng.normal(size=150)).astype(np.float32)

    def model():
        mu, tau = numpyro.sample("mu", dist.Normal(0, 5)), numpyro.sample("tau", dist.HalfNormal(2))
        sigma = numpyro.sample("sigma", dist.HalfNormal(2))
        with numpyro.plate("groups", 30):
            effect = numpyro.sample("effect", dist.StudentT(4, mu, tau))
        numpyro.sample("y", dist.Normal(effect[group], sigma).to_event(1), obs=rows)

    return Hierarchy(model, ("effect",), reparam(model, config={"effect": LocScaleReparam(0, shape_params=["df"])}))


def nested() -> Hierarchy:
    """Eighty groups of 3 rows in sixteen regions of four countries."""
    rng = np.random.default_rng(7)
    country, region, group = np.repeat(np.arange(4), 4), np.repeat(np.arange(16), 5), np.repeat(np.arange(80), 3)
    levels = (rng.normal(0, 1, 4)[country] + rng.normal(0, 0.3, 16))[region] + rng.normal(0, 0.6, 80)
    rows = (levels[group] + rng.normal(size=240)).astype(np.float32)

    def model():
        mu, sigma = numpyro.sample("mu", dist.Normal(0, 3)), numpyro.sample("sigma", dist.HalfNormal(2))
        spread = numpyro.sample("spread", dist.HalfNormal(1).expand([3]).to_event(1))
        with numpyro.plate("countries", 4):
            of_country = numpyro.sample("of_country", dist.Normal(mu, spread[0]))
        with numpyro.plate("regions", 16):
            of_region = numpyro.sample("of_region", dist.Normal(of_country[country], spread[1]))
        with numpyro.plate("groups", 80):
            of_group = numpyro.sample("of_group", dist.Normal(of_region[region], spread[2]))
        numpyro.sample("y", dist.Normal(of_group[group], sigma).to_event(1), obs=rows)

    return Hierarchy(model, ("of_country", "of_region", "of_group"))


def crossed() -> Hierarchy:
    """Forty people rate twenty things; half of the pairs are seen."""
    rng = np.random.default_rng(8)
    person, thing = np.nonzero(rng.random((40, 20)) < 0.5)
    rows = 0.5 + rng.normal(0, 0.8, 40)[person] + rng.normal(0, 0.2, 20)[thing] + rng.normal(size=len(person))
    rows = rows.astype(np.float32)

    def model():
        mu, sigma = numpyro.sample("mu", dist.Normal(0, 3)), numpyro.sample("sigma", dist.HalfNormal(2))
        spread = numpyro.sample("spread", dist.HalfNormal(1).expand([2]).to_event(1))
        with numpyro.plate("people", 40):
            of_person = numpyro.sample("of_person", dist.Normal(0, spread[0]))
        with numpyro.plate("things", 20):
            of_thing = numpyro.sample("of_thing", dist.Normal(0, spread[1]))
        numpyro.sample("y", dist.Normal(mu + of_person[person] + of_thing[thing], sigma).to_event(1), obs=rows)

    return Hierarchy(model, ("of_person", "of_thing"))


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


def correlated_slopes() -> Hierarchy:
    """Intercepts and slopes of twenty-five groups of 2 to 40 rows, correlated with an LKJ prior."""
    rng, sizes = np.random.default_rng(9), np.repeat([2, 5, 10, 20, 40], 5)
    group = np.repeat(np.arange(25), sizes)
    x = rng.normal(size=len(group)).astype(np.float32)
    lines = rng.multivariate_normal([1.0, 0.5], [[0.5, 0.15], [0.15, 0.1]], 25)
    rows = (lines[group, 0] + lines[group, 1] * x + rng.normal(size=len(group))).astype(np.float32)

    def model(centred=True):
        mu = numpyro.sample("mu", dist.Normal(0, 3).expand([2]).to_event(1))
        tau = numpyro.sample("tau", dist.HalfNormal(1).expand([2]).to_event(1))
        factor = tau[:, None] * numpyro.sample("correlation", dist.LKJCholesky(2, 2.0))
        sigma = numpyro.sample("sigma", dist.HalfNormal(2))
        with numpyro.plate("groups", 25):
            if centred:
                line = numpyro.sample("line", dist.MultivariateNormal(mu, scale_tril=factor))
            else:
                z = numpyro.sample("line_decentered", dist.Normal(0, 1).expand([2]).to_event(1))
                line = numpyro.deterministic("line", mu + z @ factor.T)
        numpyro.sample("y", dist.Normal(line[group, 0] + line[group, 1] * x, sigma).to_event(1), obs=rows)

    return Hierarchy(model, ("line",), partial(model, centred=False))


def item_response() -> Hierarchy:
    """Rasch (1960): 475 students, 25 questions and their average, with latent spreads."""
    rng = np.random.default_rng(10)
    logits = 0.75 + rng.normal(0, 1, (475, 1)) - rng.normal(0, 0.5, 25)
    correct = (rng.random((475, 25)) < 1 / (1 + np.exp(-logits))).astype(np.int32)

    def model():
        average = numpyro.sample("average", dist.Normal(0.75, 1))
        spread = numpyro.sample("spread", dist.HalfNormal(1).expand([2]).to_event(1))
        with numpyro.plate("students", 475):
            ability = numpyro.sample("ability", dist.Normal(0, spread[0]))
        with numpyro.plate("questions", 25):
            difficulty = numpyro.sample("difficulty", dist.Normal(0, spread[1]))
        logits = average + ability[:, None] - difficulty
        numpyro.sample("y", dist.Bernoulli(logits=logits).to_event(2), obs=correct)

    return Hierarchy(model, ("ability", "difficulty"))


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


def regularised_horseshoe() -> Hierarchy:
    """The same regression under the regularised horseshoe (Piironen & Vehtari 2017), with slabs of about 2."""
    features, labels = POSTERIORS["horseshoe"]().arguments

    def model():
        overall = numpyro.sample("overall", dist.HalfCauchy(0.1))
        slab = numpyro.sample("slab", dist.InverseGamma(2, 8))  # variance
        intercept = numpyro.sample("intercept", dist.Normal(0, 2))
        with numpyro.plate("feature", features.shape[1]):
            local = numpyro.sample("local", dist.HalfCauchy(1))
            scale = overall * local * jnp.sqrt(slab / (slab + (overall * local) ** 2))
            weight = numpyro.sample("weight", dist.Normal(0, scale))
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


HIERARCHIES = {
    make.__name__: make
    for make in (
        eight_schools,
        funnel,
        varying_intercepts,
        uneven_groups,
        heavy_groups,
        nested,
        crossed,
        slopes,
        correlated_slopes,
        item_response,
        horseshoe,
        regularised_horseshoe,
        volatility,
    )
}
