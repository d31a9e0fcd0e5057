"""Means of draws against exact ones: by quadrature in one and two dimensions, in closed form for a conjugate model.

Whole runs in blocks, from one start. Their chains are independent, so the error follows from the chains' means.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
import pytest
from scipy import special, stats

import pmcmc
from pmcmc.recurrence import MultipleShooting
from tests.helpers.statistics import z_bound
from tests.helpers.studies import NUM_DATA, SCALE, SHAPE, Continuous

pytestmark = pytest.mark.optimized

NUM_CHAINS, NUM_SAMPLES, NUM_BURNED, THINNING = 128, 400, 100, 4
Y = jnp.array([2.1, -0.4, 1.7, 3.0])


@dataclass(frozen=True)
class NormalInverseGamma(Continuous):
    """The study with mu ~ N(0, v) instead of N(0, 1): conjugate."""

    def logdensity(self, data, position):
        mu, log_v = position["mu"], position["log_v"]
        prior = 0.5 * mu**2 - 0.5 * mu**2 * jnp.exp(-log_v) - 0.5 * log_v
        return prior + super().logdensity(data, position)


def well(x):
    """Two modes of unequal height, and no other symmetry."""
    return 0.6 * x - (x**2 - 1) ** 2 + 0.3 * jnp.sin(2 * x)


def of_well(x):
    return [x, x**2, x**3, jnp.cos(2 * x), x > 0]


def of_study(mu, log_v):
    return [mu, mu**2, log_v, log_v**2, mu * log_v, mu > 0, jnp.exp(-log_v)]


def mean_by_quadrature(logdensity: Any, functions: list) -> np.ndarray:
    """Return means of functions on an even grid that covers all mass: the trapezoidal rule converges geometrically."""
    weights = np.exp(logdensity - np.max(logdensity))
    return np.array([np.sum(weights * np.asarray(f, float)) / np.sum(weights) for f in functions])


def well_means() -> np.ndarray:
    x = np.linspace(-4, 4, 4001)  # 0 is a point of the grid, and half of it counts for x > 0
    functions = of_well(jnp.asarray(x))
    functions[-1] = np.heaviside(x, 0.5)
    return mean_by_quadrature(np.asarray(well(jnp.asarray(x))), functions)


def study_means() -> np.ndarray:
    mu, log_v = np.meshgrid(np.linspace(-6, 6, 1201), np.linspace(-4, 5, 901), indexing="ij")
    square = np.sum((np.asarray(Y)[:, None, None] - mu) ** 2, axis=0)
    logdensity = -0.5 * mu**2 - (SHAPE + NUM_DATA / 2) * log_v - (SCALE + 0.5 * square) * np.exp(-log_v)
    functions = of_study(mu, log_v)
    functions[5] = np.heaviside(mu, 0.5)
    return mean_by_quadrature(logdensity, functions)


def conjugate_means() -> np.ndarray:
    """mu given v is N(m, v / k), v is InverseGamma(a, b), mu alone is Student's t with 2 a degrees of freedom."""
    y = np.asarray(Y)
    k, a = 1 + NUM_DATA, SHAPE + NUM_DATA / 2
    m = y.sum() / k
    b = SCALE + 0.5 * (np.sum(y**2) - k * m**2)
    log_v = np.log(b) - special.digamma(a)
    positive = stats.t(2 * a, m, np.sqrt(b / (a * k))).sf(0)
    square = m**2 + b / ((a - 1) * k)
    return np.array([m, square, log_v, special.polygamma(1, a) + log_v**2, m * log_v, positive, a / b])


def gibbs(precision: Callable, extra: float) -> pmcmc.Gibbs:
    """Gibbs over mu with prior precision ``precision(v)``, and v with extra / 2 and extra mu^2 / 2 in its update."""

    def conditional_mean(x):
        total = precision(x["v"]) + NUM_DATA / x["v"]
        return jnp.sum(Y) / x["v"] / total, 1 / jnp.sqrt(total)

    scale = lambda x: SCALE + 0.5 * jnp.sum((Y - x["mu"]) ** 2) + 0.5 * extra * x["mu"] ** 2
    updates = {
        "mu": pmcmc.kernels.NormalUpdate(conditional_mean),
        "v": pmcmc.kernels.InverseGammaUpdate(SHAPE + (NUM_DATA + extra) / 2, scale),
    }
    return pmcmc.Gibbs(updates)


class Case(NamedTuple):
    """A run and functions of its draws whose exact means are known."""

    logdensity_fn: Callable | None
    start: Any
    functions: Callable
    means: Callable


def case_of(study: Continuous, means: Callable) -> Case:
    start = {"mu": jnp.array(1.0), "log_v": jnp.array(0.0)}
    return Case(lambda x: study.logdensity(Y, x), start, lambda x: of_study(x["mu"], x["log_v"]), means)


CASES = {
    "well": Case(well, jnp.array(0.5), of_well, well_means),
    "study": case_of(Continuous(), study_means),
    "conjugate": case_of(NormalInverseGamma(), conjugate_means),
}
KERNELS = {
    "MALA": lambda h: pmcmc.MALA(step_size=0.5 * h**2),
    "HMC": lambda h: pmcmc.HMC(step_size=0.7 * h, num_integration_steps=3),
    "NUTS": lambda h: pmcmc.NUTS(step_size=0.7 * h, max_num_doublings=3),
    "RandomWalk": lambda h: pmcmc.RandomWalk(1.5 * h, grid_share=0.3, independence_share=0.2),
}
GIBBS = {"study": gibbs(lambda v: 1.0, 0.0), "conjugate": gibbs(lambda v: 1 / v, 1.0)}
SIZES = {"well": 0.5, "study": 0.45, "conjugate": 0.45}  # about the smallest scale of the target
RUNS = [(target, kernel) for target in CASES for kernel in KERNELS] + [(target, "Gibbs") for target in GIBBS]


def scores(case: Case, kernel: pmcmc.kernels.Kernel) -> np.ndarray:
    """Return the normal quantile of the probability of Student's t, for each mean over chains."""
    sizes = dict(num_warmup=0, num_samples=NUM_SAMPLES, num_chains=NUM_CHAINS, thinning=THINNING, progress_bar=False)
    chain = pmcmc.sample(case.logdensity_fn, case.start, 7, kernel=kernel, solver=MultipleShooting(4), **sizes)
    late = {name: x[:, NUM_BURNED // THINNING :] for name, x in named(chain.get_samples(group_by_chain=True)).items()}
    values = case.functions(late.get("x", late))
    means = np.stack([np.mean(np.asarray(f, float), axis=1) for f in values])  # (functions, chains)
    t = (means.mean(1) - case.means()) / (means.std(1, ddof=1) / np.sqrt(NUM_CHAINS))
    return np.sign(t) * stats.norm.isf(stats.t(NUM_CHAINS - 1).sf(np.abs(t)))


def named(draws: Any) -> dict:
    """Return a study's mu and log v, or x."""
    if not isinstance(draws, dict):
        return {"x": draws}
    return draws if "log_v" in draws else {"mu": draws["mu"], "log_v": jnp.log(draws["v"])}


@pytest.mark.slow
@pytest.mark.parametrize(("target", "kernel"), RUNS)
def test_moments(target: str, kernel: str) -> None:
    case = CASES[target]
    if kernel == "Gibbs":
        case = case._replace(logdensity_fn=None, start={"mu": jnp.array(1.0), "v": jnp.array(1.0)})
        z = scores(case, GIBBS[target])
    else:
        z = scores(case, KERNELS[kernel](SIZES[target]))
    print(target, kernel, np.abs(z).max())
    assert np.max(np.abs(z)) < z_bound(len(RUNS) * z.size)


@pytest.mark.slow
def test_sees_a_planted_fault() -> None:
    """The density of v is used as that of log v."""
    case = CASES["study"]._replace(logdensity_fn=lambda x: replace(Continuous(), jacobian=False).logdensity(Y, x))
    z = scores(case, KERNELS["HMC"](SIZES["study"]))
    assert np.max(np.abs(z)) > 1.2 * z_bound(len(RUNS) * z.size)
