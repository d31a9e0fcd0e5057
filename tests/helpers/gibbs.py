"""Gibbs samplers of the tests, with exact answers."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist

import pmcmc
from benchmarks.gibbs import schools_start
from tests.helpers.targets import EFFECTS, ERRORS

NUM_SCHOOLS, NUM_STUDENTS = 8, 20
EFFECT, ERROR = jnp.asarray(EFFECTS), jnp.asarray(ERRORS)


SCHOOLS_START = schools_start()


def schools_logdensity(x):
    """Joint density, written from the model and not from its conditionals."""
    half_chi = lambda s2, nu, scale: -(0.5 * nu + 1) * jnp.log(s2) - 0.5 * nu * scale / s2
    students = -0.5 * NUM_STUDENTS * (jnp.log(x["v"]) + (NUM_STUDENTS * ERROR**2 + (EFFECT - x["theta"]) ** 2) / x["v"])
    schools = -0.5 * (NUM_SCHOOLS * jnp.log(x["tau2"]) + jnp.sum((x["theta"] - x["mu"]) ** 2) / x["tau2"])
    mean = -0.5 * (jnp.log(x["tau2"]) + 0.1 * x["mu"] ** 2 / x["tau2"])
    return jnp.sum(students + half_chi(x["v"], 0.1, 10.0)) + schools + mean + half_chi(x["tau2"], 0.1, 100.0)


# Two normal components with unknown means; the assignments of six points can be enumerated.
POINTS = np.array([-1.6, -0.4, 0.1, 0.5, 1.2, 2.3])
PRIOR_MEAN, WEIGHTS = np.array([-1.0, 1.5]), np.array([0.4, 0.6])


def mixture_loc(x):
    members = jax.nn.one_hot(x["z"], 2)
    precision = 1.0 + jnp.sum(members, axis=0)
    return (jnp.asarray(PRIOR_MEAN) + jnp.asarray(POINTS) @ members) / precision, 1 / jnp.sqrt(precision)


def mixture_logits(x):
    return jnp.log(WEIGHTS)[None] - 0.5 * (jnp.asarray(POINTS)[:, None] - x["mu"][None]) ** 2


MIXTURE = pmcmc.Gibbs(
    {"z": pmcmc.kernels.CategoricalUpdate(mixture_logits), "mu": pmcmc.kernels.NormalUpdate(mixture_loc)}
)
MIXTURE_START = {"z": jnp.zeros(6, int), "mu": jnp.array([-1.0, 1.0])}


def mixture_model(y):
    mu = numpyro.sample("mu", dist.Normal(jnp.asarray(PRIOR_MEAN), 1.0).to_event(1))
    with numpyro.plate("data", len(y)):
        z = numpyro.sample("z", dist.Categorical(jnp.asarray(WEIGHTS)))
        numpyro.deterministic("centre", mu[z])
        numpyro.sample("y", dist.Normal(mu[z], 1.0), obs=y)


def mixture_exact() -> tuple[np.ndarray, np.ndarray]:
    """Return P(z = 1 | y), (6,), and E(mu | y), (2,), from all 64 assignments with the means integrated out."""
    total, ones, means = 0.0, np.zeros(6), np.zeros(2)
    for z in map(np.array, itertools.product((0, 1), repeat=6)):
        log_weight, loc = np.sum(np.log(WEIGHTS[z])), np.zeros(2)
        for k in (0, 1):
            y, precision = POINTS[z == k], 1.0 + np.sum(z == k)
            loc[k] = (PRIOR_MEAN[k] + y.sum()) / precision
            log_weight += 0.5 * (precision * loc[k] ** 2 - np.sum(y**2) - PRIOR_MEAN[k] ** 2 - np.log(precision))
        weight = np.exp(log_weight)
        total, ones, means = total + weight, ones + weight * z, means + weight * loc
    return ones / total, means / total


SIDE, COUPLING, FIELD = 3, 0.35, 0.1


def ising_logdensity(x):
    s = x["spin"]
    bonds = jnp.sum(s[1:] * s[:-1]) + jnp.sum(s[:, 1:] * s[:, :-1])
    return (COUPLING * bonds + FIELD * jnp.sum(s)).astype(float)


def ising_exact() -> tuple[float, float]:
    """Return the mean magnetisation of a spin and the mean product of two opposite corners, over all 512 states."""
    states = np.array(list(itertools.product((-1, 1), repeat=SIDE**2))).reshape(-1, SIDE, SIDE)
    bonds = (states[:, 1:] * states[:, :-1]).sum((1, 2)) + (states[:, :, 1:] * states[:, :, :-1]).sum((1, 2))
    weight = np.exp(COUPLING * bonds + FIELD * states.sum((1, 2)))
    weight /= weight.sum()
    return float(weight @ states.mean((1, 2))), float(weight @ (states[:, 0, 0] * states[:, -1, -1]))


def z_scores(draws, expected) -> np.ndarray:
    """Return z-scores of means of draws (chains, draws, ...), with standard errors from the independent chains."""
    means = np.asarray(draws, float).mean(axis=1)
    error = means.std(axis=0, ddof=1) / np.sqrt(len(means))
    return (means.mean(axis=0) - expected) / error
