"""Targets of the tests: plain log densities with fixed data, and NumPyro models."""

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import pytest

import pmcmc

COVARIANCE = np.array([[1.0, 0.7, 0.0], [0.7, 2.0, -0.4], [0.0, -0.4, 0.5]])
_PRECISION = np.linalg.inv(COVARIANCE)
GAMMA_SHAPES = (2.0, 3.0)


def gaussian(x):
    """N(0, COVARIANCE) in three dimensions."""
    return -0.5 * x @ jnp.asarray(_PRECISION, x.dtype) @ x


def skewed(x):
    """x[0] and x[1] - x[0] are logs of independent gamma variables: skewed to the left, exact draws available."""
    a, b = GAMMA_SHAPES
    return a * x[0] - jnp.exp(x[0]) + b * (x[1] - x[0]) - jnp.exp(x[1] - x[0])


def skewed_draws(seed: int, num_draws: int) -> np.ndarray:
    """Return independent exact draws of `skewed`, (num_draws, 2)."""
    rng = np.random.default_rng(seed)
    first, second = (np.log(rng.gamma(shape, size=num_draws)) for shape in GAMMA_SHAPES)
    return np.stack([first, first + second], axis=1)


def banana(x):
    """x[0] ~ N(0, 1), x[1] given x[0] ~ N(x[0]^2, 1/2)."""
    return -0.5 * x[0] ** 2 - (x[1] - x[0] ** 2) ** 2


def mixture(x):
    """Equal mixture of N(m, I) at the four corners m = (+-2, +-2)."""
    corners = jnp.asarray([[2.0, 2.0], [2.0, -2.0], [-2.0, 2.0], [-2.0, -2.0]], x.dtype)
    return jax.nn.logsumexp(-0.5 * jnp.sum((x[None] - corners) ** 2, axis=1))


_rng = np.random.default_rng(7)
FEATURES = _rng.normal(size=(40, 4))
LABELS = (_rng.random(40) < 1 / (1 + np.exp(-FEATURES @ [1.0, -0.5, 0.3, 0.0]))).astype(float)
del _rng


def logistic(x):
    """Bayesian logistic regression on 40 synthetic observations, N(0, 1) priors on four weights."""
    logits = jnp.asarray(FEATURES, x.dtype) @ x
    labels = jnp.asarray(LABELS, x.dtype)
    return jnp.sum(labels * logits - jnp.logaddexp(0.0, logits)) - 0.5 * jnp.sum(x**2)


EFFECTS = np.array([28.0, 8.0, -3.0, 7.0, -1.0, 1.0, 18.0, 12.0])
ERRORS = np.array([15.0, 10.0, 16.0, 11.0, 9.0, 11.0, 10.0, 18.0])


def eight_schools(x):
    """Eight schools, non-centred, over {"mu", "log_tau", "z"} with mu scaled to unit prior variance."""
    dtype = x["mu"].dtype
    tau = jnp.exp(x["log_tau"])
    effects = 5 * x["mu"] + tau * x["z"]
    prior = -0.5 * x["mu"] ** 2 - 0.5 * jnp.sum(x["z"] ** 2) + x["log_tau"] - jnp.log1p((tau / 5) ** 2)
    return prior - 0.5 * jnp.sum(((jnp.asarray(EFFECTS, dtype) - effects) / jnp.asarray(ERRORS, dtype)) ** 2)


def funnel(x):
    """Neal's funnel: x[0] ~ N(0, 9), the others given it ~ N(0, exp(x[0])). Coupled chains do not merge on it."""
    rest = x[1:]
    return -(x[0] ** 2) / 18 - 0.5 * jnp.exp(-x[0]) * jnp.sum(rest**2) - 0.5 * rest.size * x[0]


# Chains that start in the neck of a funnel after warm-up may not move; which chains do not depends on the machine.
funnel_may_warn = pytest.mark.filterwarnings(
    "ignore:.*were divergent",
    "ignore:the draws have not mixed",
    "ignore:.*did not move",
    "ignore:.*accepted no move",
    "ignore:.*never moved",
)


def start_like(logdensity_fn, dtype=float):
    """Return a position of zeros for one of the targets above."""
    if logdensity_fn is eight_schools:
        return {"mu": jnp.zeros((), dtype), "log_tau": jnp.zeros((), dtype), "z": jnp.zeros(8, dtype)}
    dim = {gaussian: 3, skewed: 2, banana: 2, mixture: 2, logistic: 4, funnel: 4}[logdensity_fn]
    return jnp.zeros(dim, dtype)


def make_target(logdensity_fn, dtype=float) -> pmcmc.Target:
    """Return the `Target` of one of the log densities above."""
    return pmcmc.Target.from_logdensity(logdensity_fn, start_like(logdensity_fn, dtype))


def eight_schools_model(errors, effects=None):
    """NumPyro's eight schools, non-centred."""
    mu = numpyro.sample("mu", dist.Normal(0, 5))
    tau = numpyro.sample("tau", dist.HalfCauchy(5))
    with numpyro.plate("school", len(errors)):
        z = numpyro.sample("z", dist.Normal(0, 1))
        theta = numpyro.deterministic("theta", mu + tau * z)
        numpyro.sample("effects", dist.Normal(theta, errors), obs=effects)


def logistic_model(features, labels=None):
    """NumPyro's logistic regression with N(0, 1) priors."""
    weights = numpyro.sample("weights", dist.Normal(0, 1).expand([features.shape[1]]).to_event(1))
    numpyro.sample("labels", dist.Bernoulli(logits=features @ weights), obs=labels)
