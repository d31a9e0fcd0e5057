"""Partially centred sites have the density of the model as written, changed in variables, and come out as written."""

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import pytest
from jax.test_util import check_grads
from numpyro.contrib.control_flow import cond, scan
from numpyro.infer.reparam import LocScaleReparam
from numpyro.infer.util import constrain_fn, potential_energy

from benchmarks._compilations import compilations
from pmcmc import AutoReparam, Target
from pmcmc._xla.trace import trace
from pmcmc.interop.numpyro import numpyro_target

FAMILIES = {
    "Normal": dist.Normal,
    "LogNormal": dist.LogNormal,
    "StudentT": lambda loc, scale: dist.StudentT(4.0, loc, scale),
    "Laplace": dist.Laplace,
    "Cauchy": dist.Cauchy,
    "Gumbel": dist.Gumbel,
    "Logistic": dist.Logistic,
}


@pytest.fixture(autouse=True)
def numpyro_broadcasts_over_ranks():
    """Allow rank promotion, which NumPyro's own code needs."""
    with jax.numpy_rank_promotion("allow"):
        yield


def hierarchy(family):
    def model():
        mu = numpyro.sample("mu", dist.Normal(0, 1))
        tau = numpyro.sample("tau", dist.HalfNormal(1))
        with numpyro.plate("elements", 4):
            x = numpyro.sample("x", family(mu, tau))
            numpyro.deterministic("double", 2 * x)
            numpyro.sample("y", dist.Normal(x, 1), obs=jnp.arange(4.0))

    return model


def nested():
    """Regions in a country, groups in regions, degrees of freedom that are latent, and plates of two dimensions."""
    mu = numpyro.sample("mu", dist.Normal(0, 1))
    tau = numpyro.sample("tau", dist.HalfCauchy(1).expand([2]).to_event(1))
    freedom = numpyro.sample("freedom", dist.Gamma(2, 0.1))
    with numpyro.plate("regions", 3):
        region = numpyro.sample("region", dist.StudentT(freedom, mu, tau[0]))
    with numpyro.plate("groups", 2, dim=-2), numpyro.plate("regions", 3, dim=-1):
        group = numpyro.sample("group", dist.Normal(region, tau[1]))
    scale = numpyro.sample("scale", dist.LogNormal(group, 1.0).to_event(1))
    numpyro.sample("y", dist.Normal(group, scale).to_event(2), obs=jnp.ones((2, 3)))


def along_time():
    """A random walk in a scan, in a plate within it, with a site whose base distribution is expanded."""
    tau = numpyro.sample("tau", dist.HalfNormal(1))

    def step(before, y):
        with numpyro.plate("series", 3):
            x = numpyro.sample("x", dist.Normal(0.9 * before, tau))
            spread = numpyro.sample("spread", dist.LogNormal(0.0, tau))
        numpyro.sample("y", dist.Normal(jnp.sum(x), jnp.sum(spread)), obs=y)
        return x, None

    scan(step, jnp.zeros(3), jnp.arange(5.0))


def correlated():
    """Intercepts and slopes with a latent correlation, their locations in a plate or shared by it."""
    mu = numpyro.sample("mu", dist.Normal(0, 1).expand([3]).to_event(1))
    tau = numpyro.sample("tau", dist.HalfNormal(1).expand([3]).to_event(1))
    factor = tau[:, None] * numpyro.sample("corr", dist.LKJCholesky(3, 2.0))
    with numpyro.plate("groups", 4):
        x = numpyro.sample("x", dist.MultivariateNormal(mu, scale_tril=factor))
        deep = numpyro.sample("deep", dist.MultivariateNormal(x, covariance_matrix=factor @ factor.T))
        numpyro.sample("y", dist.Normal(deep, 1).to_event(1), obs=jnp.ones((4, 3)))


def correlated_along_time():
    tau = numpyro.sample("tau", dist.HalfNormal(1))

    def step(before, y):
        factor = tau * jnp.array([[1.0, 0.0], [0.5, 0.8]])
        x = numpyro.sample("x", dist.MultivariateNormal(before, scale_tril=factor))
        numpyro.sample("y", dist.Normal(jnp.sum(x), 1.0), obs=y)
        return x, None

    scan(step, jnp.zeros(2), jnp.arange(4.0))


def in_branches():
    """The same site in both branches of a condition that depends on another site."""
    cluster = numpyro.sample("cluster", dist.Normal())
    at = lambda loc: lambda scale: numpyro.sample("x", dist.Normal(loc, scale).expand([2]).to_event(1))
    x = cond(cluster > 0, at(20.0), at(0.0), jnp.exp(cluster))
    numpyro.sample("y", dist.Normal(x, 1.0).to_event(1), obs=jnp.ones(2))


def correlated_about_one_number():
    tau = numpyro.sample("tau", dist.HalfNormal(1))
    covariance = tau**2 * jnp.array([[1.0, 0.5], [0.5, 1.0]])
    x = numpyro.sample("x", dist.MultivariateNormal(0.3, covariance_matrix=covariance))
    numpyro.sample("y", dist.Normal(x, 1).to_event(1), obs=jnp.ones(2))


def anywhere(model) -> tuple[Target, jax.Array]:
    """Return a target whose elements are centred to random degrees, both ends included, and a position of it."""
    target, rng = numpyro_target(model, (), {}, AutoReparam()), np.random.default_rng(0)
    degrees = {name: np.clip(rng.uniform(-0.3, 1.3, c.shape), 0, 1) for name, c in target.centredness.items()}
    return target.with_centredness(degrees), jnp.asarray(rng.normal(scale=0.7, size=target.dim))


MODELS = {**{name: hierarchy(family) for name, family in FAMILIES.items()}, "nested": nested, "scan": along_time}
MODELS |= {"correlated": correlated, "correlated scan": correlated_along_time}
MODELS |= {"cond": in_branches, "scalar location": correlated_about_one_number}


@pytest.mark.parametrize("name", MODELS)
def test_the_density_is_the_models_with_the_jacobian_of_the_map(name: str) -> None:
    model = MODELS[name]
    target, w = anywhere(model)
    natural = lambda w: target.unconstrained(target.spec.unravel(w))

    def expected(w: jax.Array) -> jax.Array:
        volume = jnp.linalg.slogdet(jax.jacobian(lambda w: target.spec.ravel(natural(w)))(w))[1]
        return volume - potential_energy(model, (), {}, natural(w))

    value, gradient = target.value_and_grad(w)
    their_value, their_gradient = jax.value_and_grad(expected)(w)
    np.testing.assert_allclose(value, their_value, rtol=1e-12)
    np.testing.assert_allclose(gradient, their_gradient, rtol=1e-9, atol=1e-11)
    check_grads(lambda w: target.logdensity_fn(jnp.asarray(w)), (w,), order=1, modes=["rev"])  # finite differences
    theirs = constrain_fn(model, (), {}, natural(w), return_deterministic=True)
    jax.tree.map(np.testing.assert_allclose, target.constrain(w), theirs)


@pytest.mark.parametrize("name", ["StudentT", "nested", "scan", "correlated"])
def test_fully_centred_is_as_written(name: str) -> None:
    target, _ = anywhere(MODELS[name])
    plain, x = numpyro_target(MODELS[name], (), {}), jnp.linspace(-1, 1, target.dim)
    np.testing.assert_allclose(target.as_written.logdensity_fn(x), plain.logdensity_fn(x), rtol=1e-12)
    assert target.as_written.spec == plain.spec


def test_sites_are_found_where_location_or_scale_depends_on_other_sites() -> None:
    def model(y):
        mu = numpyro.sample("mu", dist.Normal(0, 1))
        tau = numpyro.sample("tau", dist.HalfNormal(jnp.exp(mu)))  # of no such family
        numpyro.sample("constant", dist.Normal(y[0], y[1]))
        numpyro.sample("location", dist.Normal(mu, 1))
        numpyro.sample("scale", dist.Cauchy(0, jax.jit(lambda x: 2 * x)(tau)))
        numpyro.sample("freedom", dist.StudentT(2 + tau, 0, 1))
        numpyro.sample("wide", dist.MultivariateNormal(mu * jnp.ones(9), jnp.eye(9)))
        numpyro.sample("correlated", dist.MultivariateNormal(jnp.zeros(2), mu**2 * jnp.eye(2)))
        with numpyro.handlers.mask(mask=False):
            numpyro.sample("masked", dist.Normal(mu, tau))
        with numpyro.handlers.scale(scale=0.5):
            numpyro.sample("scaled", dist.Normal(mu, tau))
        with numpyro.handlers.reparam(config={"by_hand": LocScaleReparam(0)}):
            numpyro.sample("by_hand", dist.Normal(mu, tau))
        numpyro.sample("y", dist.Normal(mu, tau), obs=y)

    target = numpyro_target(model, (jnp.ones(3),), {}, AutoReparam())
    assert set(target.centredness) == {"location", "scale", "correlated"}
    assert all(np.all(np.asarray(c) == 0) for c in target.centredness.values())
    scales = target.model.site_scales(target.data, target.spec.unravel(jnp.zeros(target.dim)))
    assert set(scales) == {"mu", "constant", "freedom", "masked", "scaled", "by_hand_decentered"}  # to be blamed


def test_forms_written_by_hand_stay_as_they_are() -> None:
    """Also within a scan, whose other results depend on latent sites, and where a location reads one of them."""

    def model(half, h):
        mu, tau = numpyro.sample("mu", dist.Normal(0, 1)), numpyro.sample("tau", dist.HalfNormal(1))
        with numpyro.handlers.reparam(config={"half": LocScaleReparam(half)}):
            numpyro.sample("half", dist.Normal(mu, tau))

        def step(before, _):
            with numpyro.handlers.reparam(config={"h": LocScaleReparam(h)}):
                value = numpyro.sample("h", dist.Normal(0.9 * before, tau))
            noise = numpyro.sample("noise", dist.Normal(0.0, 1.0))
            return value + tau * noise, None

        scan(step, mu, None, length=4)

    centred = lambda *degrees: set(numpyro_target(model, degrees, {}, AutoReparam()).centredness)
    assert centred(0.5, 0) == set()
    assert centred(1, 1) == {"half", "h"}


@pytest.mark.parametrize(("transition", "grows"), [(lambda x, w: x, False), (lambda x, w: x + w, True)])
def test_dependence_is_followed_through_programs_within(transition, grows: bool) -> None:
    """Through jitted functions, both branches of a condition, and the later steps of a scan."""

    def fn(w):
        def step(carry, w):
            first, second = carry
            return (jax.jit(transition)(first, w), first), (second, 2.0 * w)

        (_, second), (seconds, doubled) = jax.lax.scan(step, (1.0, 2.0), w)
        same = jax.lax.cond(seconds[0] > 0, lambda x, w: (x, w[0]), lambda x, w: (-x, 0.0), 1.0, w)
        softened = jax.nn.relu(second)
        return {"seconds": seconds, "doubled": doubled, "same": same[0], "other": same[1], "softened": softened}

    traced = trace(fn, jnp.ones(3)).trace
    expected = dict(seconds=grows, doubled=True, same=grows, other=True, softened=grows)
    assert {name: traced.part(name).reads_arguments for name in traced.out_shapes} == expected


def test_a_site_without_elements_is_not_partially_centred() -> None:
    def model():
        mu = numpyro.sample("mu", dist.Normal(0, 1))
        numpyro.sample("x", dist.Normal(mu, 1).expand([0]).to_event(1))

    assert not numpyro_target(model, (), {}, AutoReparam()).centredness


def test_a_centredness_of_some_sites_keeps_that_of_the_others() -> None:
    target, _ = anywhere(nested)
    changed = target.with_centredness({"region": np.ones(3)})
    np.testing.assert_array_equal(changed.centredness["group"], target.centredness["group"])
    np.testing.assert_array_equal(changed.centredness["region"], np.ones(3))


def test_a_model_without_such_sites_is_the_plain_model() -> None:
    model = lambda: numpyro.sample("mu", dist.Normal(0, 1))
    assert numpyro_target(model, (), {}, AutoReparam()) == numpyro_target(model, (), {})


def test_another_centredness_or_other_data_compile_nothing() -> None:
    def model(y):
        mu, tau = numpyro.sample("mu", dist.Normal(0, 1)), numpyro.sample("tau", dist.HalfNormal(1))
        with numpyro.plate("elements", len(y)):
            x = numpyro.sample("x", dist.Normal(mu, tau))
            numpyro.sample("y", dist.Normal(x, 1), obs=y)

    make = lambda y: numpyro_target(model, (y,), {}, AutoReparam())
    target, w = make(jnp.arange(3.0)), jnp.ones(5)
    target.value_and_grad(w)
    other = make(jnp.arange(3.0) + 1)
    changed = target.with_centredness({"x": np.array([0.1, 0.5, 1.0])})
    assert other.owner == changed.owner == target.owner
    with compilations() as compiled:
        values = [t.value_and_grad(w)[0] for t in (target, other, changed)]
    assert not compiled
    assert len(set(map(float, values))) == 3
