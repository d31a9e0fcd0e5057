"""Gibbs samplers of the benchmarks."""

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist

import pmcmc
from benchmarks import published as zoltowski
from benchmarks.targets import Case
from pmcmc.interop.numpyro import numpyro_target
from pmcmc.target import Target

EFFECT = jnp.array([28.0, 8.0, -3.0, 7.0, -1.0, 1.0, 18.0, 12.0])
ERROR = jnp.array([15.0, 10.0, 16.0, 11.0, 9.0, 11.0, 10.0, 18.0])
WEIGHT = zoltowski.MEAN_CONCENTRATION + zoltowski.NUM_SCHOOLS


def _tau2_scale(x):
    """Scale of the inverse gamma update of tau2."""
    prior = zoltowski.MEAN_DEGREES * zoltowski.MEAN_VARIANCE + zoltowski.MEAN_CONCENTRATION * x["mu"] ** 2
    return 0.5 * (prior + jnp.sum((x["theta"] - x["mu"]) ** 2))


def _theta(x):
    """Mean and standard deviation of the update of theta."""
    variance = 1 / (zoltowski.NUM_STUDENTS / x["v"] + 1 / x["tau2"])
    return variance * (zoltowski.NUM_STUDENTS * EFFECT / x["v"] + x["mu"] / x["tau2"]), jnp.sqrt(variance)


def _v_scale(x):
    """Scale of the inverse gamma update of v."""
    squares = zoltowski.NUM_STUDENTS * ERROR**2 + (EFFECT - x["theta"]) ** 2
    return 0.5 * (zoltowski.SCHOOL_DEGREES * zoltowski.SCHOOL_VARIANCE + zoltowski.NUM_STUDENTS * squares)


# The sampler of `published.gibbs_step` (18 numbers), built from the package's updates.
SCHOOLS = pmcmc.Gibbs(
    {
        "tau2": pmcmc.kernels.InverseGammaUpdate(
            0.5 * (zoltowski.MEAN_DEGREES + zoltowski.NUM_SCHOOLS + 1), _tau2_scale
        ),
        "mu": pmcmc.kernels.NormalUpdate(lambda x: (jnp.sum(x["theta"]) / WEIGHT, jnp.sqrt(x["tau2"] / WEIGHT))),
        "theta": pmcmc.kernels.NormalUpdate(_theta),
        "v": pmcmc.kernels.InverseGammaUpdate(0.5 * (zoltowski.SCHOOL_DEGREES + zoltowski.NUM_STUDENTS), _v_scale),
    }
)


def schools_start() -> dict:
    """Start of the eight schools."""
    return {"theta": jnp.zeros(8), "v": jnp.full(8, 10.0), "mu": jnp.array(0.0), "tau2": jnp.array(100.0)}


def schools_gibbs(length: int = 10**5) -> Case:
    """Eight schools with unknown variances (Zoltowski et al. 2025), Gibbs."""
    start = lambda key, n: jax.tree.map(lambda x: jnp.repeat(x[None], n, axis=0), schools_start())
    return Case("eight schools, Gibbs", Target.from_logdensity(None, schools_start()), SCHOOLS, start, None, length)


NUM_POINTS = 50
CENTRES = np.array([-3.0, 0.0, 3.0])
_rng = np.random.default_rng(0)
POINTS = jnp.asarray(CENTRES[_rng.integers(3, size=NUM_POINTS)] + _rng.normal(size=NUM_POINTS))


def _mixture_logits(x):
    """Logits of the assignments."""
    return jnp.log(x["weight"])[None] - 0.5 * (POINTS[:, None] - x["mu"][None]) ** 2


def _mixture_means(x):
    """Mean and standard deviation of the update of the means."""
    members = jax.nn.one_hot(x["z"], 3)
    precision = 1.0 + jnp.sum(members, axis=0)
    return (jnp.asarray(CENTRES, POINTS.dtype) + jnp.sum(POINTS[:, None] * members, axis=0)) / precision, 1 / jnp.sqrt(
        precision
    )


MIXTURE = pmcmc.Gibbs(
    {
        "z": pmcmc.kernels.CategoricalUpdate(_mixture_logits),
        "mu": pmcmc.kernels.NormalUpdate(_mixture_means),
        "weight": pmcmc.kernels.DirichletUpdate(lambda x: 1.0 + jnp.sum(jax.nn.one_hot(x["z"], 3), axis=0)),
    }
)


def mixture_gibbs(length: int = 10**5) -> Case:
    """Three unit normals with unknown means and weights, 50 points with their assignments, Gibbs."""
    one = {"z": jnp.zeros(NUM_POINTS, int), "mu": jnp.asarray(CENTRES, float), "weight": jnp.full(3, 1 / 3)}
    start = lambda key, n: jax.tree.map(lambda x: jnp.repeat(x[None], n, axis=0), one)
    return Case("mixture with assignments, Gibbs", Target.from_logdensity(None, one), MIXTURE, start, None, length)


def mixture_model(y):
    """The mixture as a NumPyro model."""
    mu = numpyro.sample("mu", dist.Normal(jnp.asarray(CENTRES, float), 1.0).to_event(1))
    weight = numpyro.sample("weight", dist.Dirichlet(jnp.ones(3)))
    with numpyro.plate("points", len(y)):
        z = numpyro.sample("z", dist.Categorical(weight))
        numpyro.sample("y", dist.Normal(mu[z], 1.0), obs=y)


def mixture_numpyro(length: int = 10**5) -> Case:
    """The same mixture from its NumPyro model: assignments updated in parallel, HMC of 4 jittered steps of 0.15."""
    target = numpyro_target(mixture_model, (POINTS,), {})
    inner = pmcmc.HMC(step_size=0.15, num_integration_steps=4)
    kernel = pmcmc.Compose([pmcmc.DiscreteGibbs(independent="z"), (inner, ["mu", "weight"])])
    one = {"z": jnp.zeros(NUM_POINTS, int), "mu": jnp.asarray(CENTRES, float), "weight": jnp.zeros(2)}
    unknown = kernel.init(target, one)
    start = lambda key, n: jax.tree.map(lambda x: jnp.repeat(x[None], n, axis=0), unknown)
    return Case("mixture with assignments, NumPyro", target, kernel, start, None, length)


CASES = {"schools_gibbs": schools_gibbs, "mixture_gibbs": mixture_gibbs, "mixture_numpyro": mixture_numpyro}
