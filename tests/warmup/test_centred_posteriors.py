"""Hierarchies sampled by `AutoReparam` have the posterior of the form that mixes when it is written by hand."""

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import pytest
from numpyro.diagnostics import effective_sample_size
from numpyro.handlers import reparam
from numpyro.infer.reparam import LocScaleReparam

import pmcmc
from pmcmc.recurrence import Sequential
from tests.helpers.selection import share
from tests.helpers.statistics import z_bound
from tests.helpers.targets import EFFECTS, ERRORS

pytestmark = [pytest.mark.optimized, pytest.mark.filterwarnings("ignore:.*were divergent")]
SIZES = dict(num_samples=3000, solver=Sequential(), progress_bar=False)
rng = np.random.default_rng(0)
SIZE = np.array([2] * 6 + [500] * 2)
GROUP = np.repeat(np.arange(len(SIZE)), SIZE)
ROWS = rng.normal(1.0 + 0.7 * rng.normal(size=len(SIZE))[GROUP], 1.0)
PLACES, TIMES = rng.normal(size=(4, 3, 5)), np.linspace(-1, 1, 15).reshape(3, 5)


@pytest.fixture(autouse=True)
def numpyro_broadcasts_over_ranks():
    """Allow rank promotion, which NumPyro's own code needs."""
    with jax.numpy_rank_promotion("allow"):
        yield


def funnel():
    v = numpyro.sample("v", dist.Normal(0, 3))
    numpyro.sample("x", dist.Normal(0, jnp.exp(v / 2)).expand([4]).to_event(1))


def schools():
    mu, tau = numpyro.sample("mu", dist.Normal(0, 5)), numpyro.sample("tau", dist.HalfCauchy(5))
    theta = numpyro.sample("theta", dist.Normal(mu, tau).expand([8]).to_event(1))
    numpyro.sample("y", dist.Normal(theta, ERRORS).to_event(1), obs=EFFECTS)


def groups():
    mu, tau = numpyro.sample("mu", dist.Normal(0, 5)), numpyro.sample("tau", dist.HalfNormal(2))
    sigma = numpyro.sample("sigma", dist.HalfNormal(2))
    intercept = numpyro.sample("intercept", dist.Normal(mu, tau).expand([len(SIZE)]).to_event(1))
    numpyro.sample("y", dist.Normal(intercept[GROUP], sigma).to_event(1), obs=ROWS)


def student():
    mu, tau = numpyro.sample("mu", dist.Normal(0, 5)), numpyro.sample("tau", dist.HalfNormal(5))
    theta = numpyro.sample("theta", dist.StudentT(4, mu, tau).expand([8]).to_event(1))
    numpyro.sample("y", dist.Normal(theta, ERRORS).to_event(1), obs=EFFECTS)


def nested():
    mu = numpyro.sample("mu", dist.Normal(0, 2))
    tau = numpyro.sample("tau", dist.HalfNormal(1).expand([2]).to_event(1))
    region = numpyro.sample("region", dist.Normal(mu, tau[0]).expand([4]).to_event(1))
    group = numpyro.sample("group", dist.Normal(region[:, None], tau[1]).expand([4, 3]).to_event(2))
    numpyro.sample("y", dist.Normal(group[..., None], 2.0).expand(PLACES.shape).to_event(3), obs=PLACES)


def slopes(centred: bool = True):
    """Intercepts and slopes with a latent correlation."""
    tau = numpyro.sample("tau", dist.LogNormal(-0.5, 0.5).expand([2]).to_event(1))
    factor = tau[:, None] * numpyro.sample("corr", dist.LKJCholesky(2, 2.0))
    mu = numpyro.sample("mu", dist.Normal(0, 2).expand([2]).to_event(1))
    with numpyro.plate("places", 4):
        if centred:
            effect = numpyro.sample("effect", dist.MultivariateNormal(mu, scale_tril=factor))
        else:
            z = numpyro.sample("z", dist.Normal(0, 1).expand([2]).to_event(1))
            effect = numpyro.deterministic("effect", mu + z @ factor.T)
    mean = effect[:, :1, None] + effect[:, 1:, None] * TIMES
    numpyro.sample("y", dist.Normal(mean, 1.0).to_event(3), obs=PLACES)


class Case(NamedTuple):
    """A model as people write it, and in the form that mixes."""

    model: Callable
    by_hand: Callable


NONE = LocScaleReparam(0)
CASES = {
    "funnel": Case(funnel, reparam(funnel, config={"x": NONE})),
    "eight schools": Case(schools, reparam(schools, config={"theta": NONE})),
    "groups of 2 and of 500 rows": Case(groups, groups),
    "StudentT": Case(student, reparam(student, config={"theta": LocScaleReparam(0, shape_params=["df"])})),
    "nested": Case(nested, reparam(nested, config={"region": NONE, "group": NONE})),
    "correlated slopes": Case(slopes, partial(slopes, centred=False)),
}


def statistics(draws: dict) -> tuple[np.ndarray, np.ndarray]:
    """Return means of bounded functions of every element, whose variance is finite, and their squared errors."""
    rows = np.concatenate([np.reshape(x, (*x.shape[:2], -1)) for x in map(np.asarray, draws.values())], axis=2)
    bounded = np.arctan(rows[..., np.ptp(rows, axis=(0, 1)) > 0] / 3)  # a Cholesky factor has constant elements
    values = np.concatenate([bounded, bounded**2], axis=2)
    return values.mean(axis=(0, 1)), values.var(axis=(0, 1)) / effective_sample_size(values)


@pytest.mark.parametrize("case", share(CASES, "groups of 2 and of 500 rows"))
def test_the_posterior_is_that_of_the_form_by_hand(case: Case) -> None:
    chosen = pmcmc.parallel_chain(case.model, 0, reparam=pmcmc.AutoReparam(), **SIZES)
    sites = list(chosen.target.spec.template)
    other = pmcmc.parallel_chain(case.by_hand, 1, **SIZES)
    pick = lambda chain: {name: chain.get_samples(group_by_chain=True)[name] for name in sites}
    (mean, error), (other_mean, other_error) = (statistics(pick(chain)) for chain in (chosen, other))
    assert max(error.max(), other_error.max()) < 0.02**2  # both have mixed, so the comparison says something
    z = (mean - other_mean) / np.sqrt(error + other_error)
    assert np.max(np.abs(z)) < z_bound(len(z) * len(CASES))
    assert chosen.report.mixing.max_rhat < 1.02
    assert np.sum(chosen.report.num_divergent) <= 0.005 * chosen.report.num_draws * 4
