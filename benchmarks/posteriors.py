"""Posteriors for the planner: easy and hard to couple, small and large, NumPyro models and plain log densities.

Densities that `benchmarks.targets` has are taken from there. All data are fixed or drawn with a fixed seed.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist

import pmcmc
from benchmarks import targets
from pmcmc.target import Target


@dataclass(frozen=True)
class Posterior:
    """What to sample.

    Args:
        name: Name of the posterior.
        dim: Unconstrained dimension.
        model: A NumPyro model, or a log density over vectors.
        arguments: Arguments of the model.
        is_density: Whether ``model`` is a log density.
    """

    name: str
    dim: int
    model: Callable
    arguments: tuple = ()
    is_density: bool = False

    def sampler(self) -> Callable[..., pmcmc.Chain]:
        """Return ``sample(rng_key, **options)`` for a new function object, for which pmcmc has no compiled programs."""
        model = lambda *arguments: self.model(*arguments)
        if self.is_density:
            return lambda key, **options: pmcmc.sample(model, jnp.zeros(self.dim), key, **options)
        return lambda key, **options: pmcmc.parallel_chain(model, key, model_args=self.arguments, **options)


def _density(name: str, dim: int, logdensity: Callable) -> Posterior:
    """Make a posterior of a log density."""
    return Posterior(name, dim, logdensity, is_density=True)


def _of_target(name: str, target: Target) -> Posterior:
    """Make a posterior of a target's log density."""
    return _density(name, target.dim, target.logdensity_fn)


def eight_schools() -> Posterior:
    """Rubin (1981), non-centred."""
    return _of_target("eight schools", targets.eight_schools().target)


def eight_schools_centred() -> Posterior:
    """Rubin (1981), centred as in Gelman et al. (2013), section 5.5: a funnel of effects over their spread."""
    effects = np.array([28.0, 8.0, -3.0, 7.0, -1.0, 1.0, 18.0, 12.0], np.float32)
    errors = np.array([15.0, 10.0, 16.0, 11.0, 9.0, 11.0, 10.0, 18.0], np.float32)

    def model(errors, effects):
        mu = numpyro.sample("mu", dist.Normal(0, 5))
        tau = numpyro.sample("tau", dist.HalfCauchy(5))
        with numpyro.plate("school", 8):
            theta = numpyro.sample("theta", dist.Normal(mu, tau))
            numpyro.sample("effect", dist.Normal(theta, errors), obs=effects)

    return Posterior("eight schools centred", 10, model, (errors, effects))


def funnel() -> Posterior:
    """Neal (2003), section 8: v ~ N(0, 9), nine others given it ~ N(0, exp(v))."""

    def logdensity(x):
        v, rest = x[0], x[1:]
        return -(v**2) / 18 - 0.5 * jnp.exp(-v) * jnp.sum(rest**2) - 0.5 * rest.size * v

    return _density("funnel", 10, logdensity)


def horseshoe() -> Posterior:
    """Logistic regression under the horseshoe (Carvalho et al. 2010), non-centred; 100 synthetic patients, 20 features.

    The half-Cauchy scales are sampled on the log scale, as NumPyro does.
    """
    rng = np.random.default_rng(1)
    features = rng.standard_normal((100, 20)).astype(np.float32)
    weights = np.r_[2.0, -1.5, 1.0, np.zeros(17)]
    labels = (rng.random(100) < 1 / (1 + np.exp(-features @ weights))).astype(np.int32)

    def model(features, labels):
        overall = numpyro.sample("overall", dist.HalfCauchy(1))
        intercept = numpyro.sample("intercept", dist.Normal(0, 2))
        with numpyro.plate("feature", features.shape[1]):
            local = numpyro.sample("local", dist.HalfCauchy(1))
            z = numpyro.sample("z", dist.Normal(0, 1))
        logits = intercept + features @ (overall * local * z)
        numpyro.sample("label", dist.Bernoulli(logits=logits), obs=labels)

    return Posterior("horseshoe logistic", 42, model, (features, labels))


def banana() -> Posterior:
    """Haario et al. (1999)."""
    return _of_target("banana", targets.banana().target)


def mixture() -> Posterior:
    """Four standard Gaussians at (+-2, +-2), whose modes communicate."""
    return _of_target("mixture", targets.mixture().target)


def separated() -> Posterior:
    """Two standard Gaussians 12 apart: tangents contract everywhere, but paths in different modes do not merge."""
    centres = jnp.array([[-6.0, 0.0], [6.0, 0.0]])
    return _density("separated modes", 2, lambda x: jax.nn.logsumexp(-0.5 * jnp.sum((x - centres) ** 2, -1)))


def irt(students: int = 100, questions: int = 20) -> Posterior:
    """One-parameter logistic item response (Rasch 1960), priors of Stan's user's guide, synthetic answers."""
    rng = np.random.default_rng(2)
    logits = 0.75 + rng.standard_normal((students, 1)) - rng.standard_normal(questions)
    correct = (rng.random((students, questions)) < 1 / (1 + np.exp(-logits))).astype(np.int32)

    def model(correct):
        mean = numpyro.sample("mean", dist.Normal(0.75, 1))
        ability = numpyro.sample("ability", dist.Normal(0, 1).expand([students]).to_event(1))
        difficulty = numpyro.sample("difficulty", dist.Normal(0, 1).expand([questions]).to_event(1))
        numpyro.sample("correct", dist.Bernoulli(logits=mean + ability[:, None] - difficulty), obs=correct)

    return Posterior("IRT 1PL", students + questions + 1, model, (correct,))


def stochastic_volatility() -> Posterior:
    """Kim, Shephard & Chib (1998), non-centred; 100 synthetic returns.

    The autoregression is an associative scan: a loop of 100 steps in every gradient would dominate the time.
    """
    rng = np.random.default_rng(3)
    log_variance = np.zeros(100)
    for t in range(1, 100):
        log_variance[t] = 0.95 * log_variance[t - 1] + 0.25 * rng.standard_normal()
    returns = (np.exp(log_variance / 2 - 0.5) * rng.standard_normal(100)).astype(np.float32)

    def model(returns):
        mean = numpyro.sample("mean", dist.Normal(0, 2))
        persistence = 2 * numpyro.sample("half_persistence", dist.Beta(20, 1.5)) - 1
        spread = numpyro.sample("spread", dist.HalfNormal(1))
        z = numpyro.sample("z", dist.Normal(0, 1).expand([returns.size]).to_event(1))
        first = z[:1] / jnp.sqrt(1 - persistence**2)
        factors = jnp.full(returns.size, persistence)
        join = lambda a, b: (a[0] * b[0], b[0] * a[1] + b[1])
        _, h = jax.lax.associative_scan(join, (factors, jnp.concatenate([first, z[1:]])))
        numpyro.sample("return", dist.Normal(0, jnp.exp((mean + spread * h) / 2)), obs=returns)

    return Posterior("stochastic volatility", 103, model, (returns,))


def german_credit() -> Posterior:
    """Logistic regression on German credit, or on a synthetic data set of the same size; not whitened beforehand."""
    return _of_target("German credit", targets.german_target()[0])


def anisotropic() -> Posterior:
    """N(0, diag(s^2)), s log-spaced from 0.01 to 1 (Neal 2011, section 5.3.3.4 has 0.01 to 1 in 100 dimensions)."""
    scales = jnp.logspace(-2, 0, 50)
    return _density("Gaussian anisotropic", 50, lambda x: -0.5 * jnp.sum((x / scales) ** 2))


def correlated() -> Posterior:
    """A stationary autoregression with coefficient 0.9 in ten dimensions."""

    def logdensity(x):
        return -0.5 * (x[0] ** 2 + jnp.sum((x[1:] - 0.9 * x[:-1]) ** 2) / (1 - 0.9**2))

    return _density("Gaussian correlated", 10, logdensity)


def varying_intercepts() -> Posterior:
    """Regression as on radon data (Gelman & Hill 2007, chapter 12), non-centred; 300 synthetic houses in 30 counties.

    Intercepts are gathered by county, so gradients scatter.
    """
    rng = np.random.default_rng(4)
    county, floor = rng.integers(0, 30, 300).astype(np.int32), rng.integers(0, 2, 300).astype(np.float32)
    radon = 1.5 + 0.4 * rng.standard_normal(30)[county] - 0.7 * floor + 0.7 * rng.standard_normal(300)

    def model(county, floor, radon):
        mean = numpyro.sample("mean", dist.Normal(0, 2))
        spread = numpyro.sample("spread", dist.HalfNormal(1))
        slope = numpyro.sample("slope", dist.Normal(0, 2))
        noise = numpyro.sample("noise", dist.HalfNormal(1))
        z = numpyro.sample("z", dist.Normal(0, 1).expand([30]).to_event(1))
        expected: Any = mean + spread * z[county] + slope * floor
        numpyro.sample("radon", dist.Normal(expected, noise), obs=radon)

    return Posterior("varying intercepts", 34, model, (county, floor, radon.astype(np.float32)))


POSTERIORS: dict[str, Callable[[], Posterior]] = {
    "eight_schools": eight_schools,
    "eight_schools_centred": eight_schools_centred,
    "funnel": funnel,
    "horseshoe": horseshoe,
    "banana": banana,
    "mixture": mixture,
    "separated": separated,
    "irt": irt,
    "stochastic_volatility": stochastic_volatility,
    "german_credit": german_credit,
    "anisotropic": anisotropic,
    "correlated": correlated,
    "varying_intercepts": varying_intercepts,
}
