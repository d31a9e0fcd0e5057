"""Gibbs: laws of the updates, whole samplers against exact answers, and one chain whatever the solver."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import pytest
from scipy import special, stats

import pmcmc
from benchmarks.gibbs import SCHOOLS
from benchmarks.published import gibbs_step
from pmcmc.interop.numpyro import numpyro_target
from pmcmc.kernels.base import near_tie_bound
from pmcmc.kernels.updates import Site
from pmcmc.random.distributions import _by_columns, _by_scan, inverse_cdf, log_gammas
from pmcmc.recurrence import RESULTS, Sequential, deer
from tests.helpers.chains import draw_noise, solve
from tests.helpers.gibbs import (
    MIXTURE,
    MIXTURE_START,
    SCHOOLS_START,
    mixture_exact,
    schools_logdensity,
    z_scores,
)
from tests.helpers.statistics import z_bound

NUM_DRAWS = 20_000
NORMAL = pmcmc.kernels.NormalUpdate(lambda x: (0.0, 1.0))


def sample(kernel, start, logdensity_fn=None, **options):
    options = {"num_warmup": 100, "num_samples": 200, "solver": Sequential(), "progress_bar": False, **options}
    return pmcmc.sample(logdensity_fn, start, 1, kernel=kernel, **options)


@pytest.mark.parametrize("shape", [0.3, 1.0, 4.55, 30.0])
def test_gammas_have_their_moments(shape: float) -> None:
    keys = jax.random.split(jax.random.key(2), NUM_DRAWS)
    x = np.exp(jax.jit(jax.vmap(lambda key: log_gammas(key, jnp.full(3, shape))))(keys))
    assert np.all(x > 0)
    values = np.stack([x, np.log(x)], axis=-1)
    mean = np.array([shape, stats.loggamma(shape).mean()])
    variance = np.array([shape, stats.loggamma(shape).var()])
    kurtosis = np.array([6 / shape, stats.loggamma(shape).stats("k")])
    of_mean = (values.mean(0) - mean) / np.sqrt(variance / NUM_DRAWS)
    of_variance = (values.var(0) / variance - 1) / np.sqrt((kurtosis + 2) / NUM_DRAWS)
    assert np.max(np.abs([of_mean, of_variance])) < z_bound(4 * 2 * 6)
    correlation = np.corrcoef(x.T)[np.triu_indices(3, 1)] * np.sqrt(NUM_DRAWS)
    assert np.max(np.abs(correlation)) < z_bound(4 * 3)


def test_gammas_are_smooth_in_their_shape() -> None:
    """The derivative of the accepted proposal, against differences, except for the few that flip."""
    keys = jax.random.split(jax.random.key(3), 500)
    at = jax.jit(jax.vmap(lambda key, shape: jnp.exp(log_gammas(key, shape[None])[0]), (0, None)))
    for shape in (0.7, 5.0):
        one = lambda key, a: jnp.exp(log_gammas(key, a[None])[0])
        push = lambda key, a=shape, one=one: jax.jvp(partial(one, key), (jnp.array(a),), (jnp.array(1.0),))[1]
        tangent = jax.jit(jax.vmap(push))(keys)
        difference = (at(keys, jnp.array(shape + 1e-6)) - at(keys, jnp.array(shape - 1e-6))) / 2e-6
        close = np.isclose(tangent, difference, rtol=1e-5, atol=1e-7)
        assert close.sum() >= 498


def test_a_gamma_of_no_shape_is_not_a_number() -> None:
    """No try would ever be accepted, so the loop would not end without a limit."""
    drawn = log_gammas(jax.random.key(4), jnp.array([2.0, jnp.nan, jnp.inf, 0.0, -1.0]))
    np.testing.assert_array_equal(jnp.isfinite(drawn), [True, False, False, False, False])


def test_many_categories_are_drawn_as_few_are() -> None:
    """One column per category, or one scan over all: the same draws and margins, impossible categories included."""
    logits = jnp.where(jax.random.uniform(jax.random.key(5), (500, 6)) < 0.2, -jnp.inf, 0.3 * jnp.arange(6.0))
    uniform = jax.random.uniform(jax.random.key(6), (500,))
    columns, scan = (jax.vmap(draw)(logits, uniform) for draw in (_by_columns, _by_scan))
    np.testing.assert_array_equal(columns.category, scan.category)
    np.testing.assert_allclose(columns.margin, scan.margin, atol=1e-14)
    assert len(np.unique(columns.category)) == 6
    assert inverse_cdf(jnp.zeros(100), jnp.array(0.505)).category == 50
    assert inverse_cdf(jnp.full(100, jnp.nan), jnp.array(0.5)).failed
    for num_categories in (3, 100):
        assert inverse_cdf(jnp.zeros((0, num_categories)), jnp.zeros(0)).category.shape == (0,)


def test_impossible_categories_are_never_drawn() -> None:
    """XLA's cumulative sums of many float32 numbers rise by rounding where a category has no mass."""
    rng = np.random.default_rng(0)
    possible = rng.random(3000) < 0.5
    possible[2000:] = False
    logits = jnp.asarray(np.where(possible, rng.standard_normal(3000), -np.inf), jnp.float32)
    steps = np.asarray(jax.jit(lambda x: jnp.cumsum(jnp.exp(x - jnp.max(x))))(logits))
    rises = np.flatnonzero(np.diff(steps) > 0) + 1
    uniform = jnp.asarray(np.append(steps[rises] / steps[-1], 1 - 2.0**-24), jnp.float32)
    drawn = jax.jit(jax.vmap(lambda u: inverse_cdf(logits, u).category))(uniform)
    assert np.any(~possible[rises])
    assert np.all(possible[np.asarray(drawn)])


TINY = 0.02


@pytest.mark.parametrize("known", [True, False], ids=["number", "function of the state"])
def test_small_concentrations_in_float32(known: bool) -> None:
    """Gammas of shape 0.02 mostly underflow in float32, but their ratios do not: 0 / 0 is never drawn."""
    num, size = 20_000, 3
    concentration = np.float32(TINY) if known else (lambda x: x["x"] + TINY)
    update, site = (
        pmcmc.kernels.DirichletUpdate(concentration),
        Site(jax.ShapeDtypeStruct((size,), jnp.float32), jnp.float32),
    )
    state = {"x": jnp.zeros(size, jnp.float32)}
    one = lambda key: update.draw(state, update.draw_noise(key, site), site).value
    x = np.asarray(jax.jit(jax.vmap(one))(jax.random.split(jax.random.key(7), num)), float)
    assert np.all(np.isfinite(x))
    assert np.min(x) == float(jnp.finfo(jnp.float32).tiny)  # and not 0, whose log would be infinite
    np.testing.assert_allclose(x.sum(axis=1), 1, atol=1e-6)
    law = stats.beta(TINY, (size - 1) * TINY)  # the law of each component
    mean, variance, kurtosis = law.stats("mvk")
    z_mean = (x.mean(0) - mean) / np.sqrt(variance / num)
    z_variance = (((x - mean) ** 2).mean(0) / variance - 1) / np.sqrt((kurtosis + 2) / num)
    assert np.max(np.abs([z_mean, z_variance])) < z_bound(2 * 2 * size)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.float64])
def test_small_shapes_stay_within_the_positive_numbers(dtype) -> None:
    """A draw outside the range of the dtype is its smallest or largest number, as often as the law says."""
    num, info = 20_000, jnp.finfo(dtype)
    site, shape = Site(jax.ShapeDtypeStruct((), dtype), dtype), 0.02 if dtype == jnp.float32 else 0.002
    for update, limit in (
        (pmcmc.kernels.GammaUpdate(shape, 1.0), info.tiny),
        (pmcmc.kernels.InverseGammaUpdate(shape, 1.0), info.max),
    ):
        one = lambda key, update=update: update.draw({}, update.draw_noise(key, site), site).value
        x = np.asarray(jax.jit(jax.vmap(one))(jax.random.split(jax.random.key(8), num)), float)
        assert np.all((x >= info.tiny) & (x <= info.max))
        # P(g < e) = e^a / Gamma(a + 1) for such a small e.
        beyond = np.exp(shape * (np.log(float(info.tiny)) if limit == info.tiny else -np.log(float(info.max))))
        beyond /= special.gamma(shape + 1)
        z = (np.mean(x == float(limit)) - beyond) / np.sqrt(beyond * (1 - beyond) / num)
        assert abs(z) < z_bound(4)
    assert np.isinf(pmcmc.kernels.GammaUpdate(2.0, 0.0).draw({}, jnp.zeros((), dtype), site).value)  # still invalid
    assert np.isnan(pmcmc.kernels.GammaUpdate(2.0, -1.0).draw({}, jnp.zeros((), dtype), site).value)


@pytest.mark.parametrize("dtype", [bool, jnp.int8, jnp.uint8])
def test_more_categories_than_the_site_can_hold(dtype) -> None:
    kernel = pmcmc.Gibbs({"k": pmcmc.kernels.CategoricalUpdate(lambda x: jnp.zeros(300))})
    with pytest.raises(ValueError, match=r"values 0\.\.K-1, and its site has dtype .*cannot hold .*, \.\.\."):
        sample(kernel, {"k": jnp.zeros((), dtype)})


LOGITS = jnp.array([[0.0, 1.0, -1.0], [-2.0, -jnp.inf, 0.5]])
FLAT = {"x": jnp.zeros(2)}
LAWS = {
    "normal": (
        pmcmc.kernels.NormalUpdate(lambda x: (1.0, jnp.array([0.5, 2.0]))),
        [stats.norm(1, 0.5), stats.norm(1, 2)],
    ),
    "gamma": (pmcmc.kernels.GammaUpdate(jnp.array([0.5, 3.0]), 2.0), [stats.gamma(a, scale=0.5) for a in (0.5, 3.0)]),
    "gamma, by key": (
        pmcmc.kernels.GammaUpdate(lambda x: x["x"] + 2.5, lambda x: x["x"] + 2),
        [stats.gamma(2.5, scale=0.5)] * 2,
    ),
    "inverse gamma": (
        pmcmc.kernels.InverseGammaUpdate(3.0, lambda x: x["x"] + 2.0),
        [stats.invgamma(3.0, scale=2.0)] * 2,
    ),
    "dirichlet": (pmcmc.kernels.DirichletUpdate(jnp.array([1.5, 2.5])), [stats.beta(1.5, 2.5), stats.beta(2.5, 1.5)]),
}


def draw_many(update, like, state=FLAT):
    site = Site(jax.ShapeDtypeStruct(like.shape, like.dtype), jnp.zeros(()).dtype)
    keys = jax.random.split(jax.random.key(4), NUM_DRAWS)
    one = lambda key: update.draw(state, update.draw_noise(key, site), site)
    return jax.jit(jax.vmap(one))(keys)


@pytest.mark.parametrize("name", LAWS)
def test_updates_have_their_laws(name: str) -> None:
    update, laws = LAWS[name]
    x = np.asarray(draw_many(update, FLAT["x"]).value)
    for column, law in zip(x.T, laws, strict=True):
        u = law.cdf(column)  # uniform if the law is right
        moments = np.array([u.mean() - 1 / 2, (u**2).mean() - 1 / 3]) / np.sqrt([1 / 12, 4 / 45])
        assert np.max(np.abs(moments)) * np.sqrt(NUM_DRAWS) < z_bound(4 * len(LAWS))


def test_categorical_update() -> None:
    drawn = draw_many(pmcmc.kernels.CategoricalUpdate(lambda x: LOGITS), jnp.zeros(2, int))
    p = np.asarray(jax.nn.softmax(LOGITS))
    frequency = np.stack([(np.asarray(drawn.value) == k).mean(0) for k in range(3)], axis=1)
    possible = p > 0
    assert np.all(frequency[~possible] == 0)
    z = (frequency - p)[possible] / np.sqrt((p * (1 - p) / NUM_DRAWS)[possible])
    assert np.max(np.abs(z)) < z_bound(6)
    assert drawn.value.dtype == int
    assert not np.any(drawn.failed)


def test_inverse_cdf_margin_and_failure() -> None:
    p = np.array([0.2, 0.5, 0.3])
    for u, index, margin in ((0.1, 0, 0.1), (0.25, 1, 0.05), (0.69, 1, 0.01), (0.95, 2, 0.25)):
        drawn = inverse_cdf(jnp.log(p) + 700.0, jnp.array(u))
        assert int(drawn.category) == index
        np.testing.assert_allclose(drawn.margin, margin, atol=1e-12)
    assert int(inverse_cdf(jnp.zeros(1), jnp.array(0.3)).category) == 0
    for bad in ([jnp.nan, 0.0], [-jnp.inf, -jnp.inf], [jnp.inf, 0.0]):
        assert bool(inverse_cdf(jnp.array(bad), jnp.array(0.3)).failed)


def test_near_ties_of_large_logits() -> None:
    """Logits of -1e4 are rounded to 1e-3 in float32, and so are probabilities; without a density only they show it."""
    logits = lambda x: jnp.array([0.0, 0.25, -1e30], jnp.float32) - x["size"]
    kernel = pmcmc.Gibbs({"z": pmcmc.kernels.CategoricalUpdate(logits), "size": NORMAL})
    start = {"z": jnp.int32(0), "size": jnp.float32(0)}
    bare, with_density = (
        pmcmc.Target.from_logdensity(fn, start) for fn in (None, lambda x: jnp.float32(-1e4) + 0 * x["size"])
    )
    border = 1 / (1 + np.exp(0.25))

    def step(target, size: float, distance: float, nudge: float = 0.0) -> tuple[int, float, float]:
        """Return value, margin and its bound for a uniform that is so far from the step of the distribution."""
        noise = kernel.nudge((jnp.float32(border + distance), jnp.float32(0)), jnp.float32(nudge))
        new, info = kernel.step(target, {**start, "size": jnp.float32(size)}, noise)
        return int(new["z"]), float(info.margin), float(near_tie_bound(info))

    for distance, value in ((-1e-3, 0), (1e-3, 1)):
        for target in (bare, with_density):
            found, margin, bound = step(target, 1e4, distance)
            assert found == value
            assert margin < bound
            assert [step(target, 1e4, distance, sign * bound)[0] for sign in (-1, 1)] == [0, 1]  # rounding may decide
        found, margin, bound = step(bare, 0.0, distance)
        assert margin == pytest.approx(1e-3, rel=1e-3)
        assert margin > bound
        assert [step(bare, 0.0, distance, sign * bound)[0] for sign in (-1, 1)] == [value, value]


def test_bad_logits_keep_the_old_value_and_say_so() -> None:
    kernel = pmcmc.Gibbs({"z": pmcmc.kernels.CategoricalUpdate(lambda x: jnp.full((2, 3), jnp.nan))})
    chain = sample(kernel, {"z": jnp.array([2, 1])}, num_samples=20, num_warmup=0, num_chains=1)
    np.testing.assert_array_equal(chain.get_samples()["z"], np.tile([2, 1], (20, 1)))
    assert np.all(chain.get_extra_fields()["diverging"])


def test_schools_step_is_the_published_one() -> None:
    """The same map of the same noise as the hand-written step."""
    target = pmcmc.Target.from_logdensity(None, SCHOOLS_START)
    noise = draw_noise(target, SCHOOLS, 0, 1)
    tau2, mu, theta, v = jax.tree.map(lambda u: u[0], noise)
    theirs = gibbs_step(
        jnp.concatenate([SCHOOLS_START["theta"], SCHOOLS_START["v"], jnp.array([0.0, 100.0])]),
        (jnp.append(theta, mu), jnp.exp(jnp.append(v, tau2))),  # our gammas are given as logs
    )
    new, info = SCHOOLS.step(target, SCHOOLS_START, (tau2, mu, theta, v))
    ours = jnp.concatenate([new["theta"], new["v"], jnp.stack([new["mu"], new["tau2"]])])
    np.testing.assert_allclose(ours, theirs, rtol=1e-13)
    assert np.isnan(info.logdensity)
    assert np.isinf(info.margin)


@pytest.mark.slow
@pytest.mark.optimized  # compiled quickly, rounding keeps a few residuals at 7e-13, above the tolerance
def test_schools_by_newton() -> None:
    """Newton gives the sequential chain: the map is smooth and contracts."""
    target, length = pmcmc.Target.from_logdensity(None, SCHOOLS_START), 20_000
    noise = draw_noise(target, SCHOOLS, 1, length)
    expected = solve(target, SCHOOLS, Sequential(), SCHOOLS_START, noise)
    spread = jax.tree.map(lambda x: jnp.std(x, axis=0), expected.value)
    found = solve(target, SCHOOLS, deer(), SCHOOLS_START, noise, None, spread)
    assert int(found.result) == RESULTS.successful
    gap = jax.tree.map(lambda a, b, s: float(jnp.max(jnp.abs(a - b) / s[None])), found.value, expected.value, spread)
    assert max(jax.tree.leaves(gap)) < 1e-10
    assert int(found.stats.num_iters) < 300  # from a distant start; 123 in practice
    assert float(found.stats.growth_rate) < 0


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:the draws have not mixed")  # there are many short chains
def test_schools_satisfy_stein() -> None:
    """E d log p = 0 for real sites and E x d log p = -1 for positive ones, under the joint density."""
    draws = sample(SCHOOLS, SCHOOLS_START, num_chains=256, num_samples=400).get_samples(group_by_chain=True)
    gradient = jax.jit(jax.vmap(jax.vmap(jax.grad(schools_logdensity))))(draws)
    real = [z_scores(gradient[name], 0.0) for name in ("theta", "mu")]
    positive = [z_scores(gradient[name] * draws[name], -1.0) for name in ("v", "tau2")]
    assert np.max(np.abs(np.concatenate([np.ravel(z) for z in real + positive]))) < z_bound(18)


@pytest.mark.slow
def test_density_is_reported_where_there_is_one() -> None:
    chain = sample(SCHOOLS, SCHOOLS_START, schools_logdensity, num_chains=2, num_samples=20)
    expected = jax.vmap(schools_logdensity)(chain.get_samples())
    np.testing.assert_allclose(np.ravel(chain.info.logdensity), expected, rtol=1e-12)


def test_mixture_matches_enumeration() -> None:
    """Assignments and means against all 64 assignments."""
    chain = sample(MIXTURE, MIXTURE_START, num_chains=256)
    draws, (ones, means) = chain.get_samples(group_by_chain=True), mixture_exact()
    assert draws["z"].dtype == int
    z = np.concatenate([z_scores(draws["z"], ones), z_scores(draws["mu"], means)])
    assert np.max(np.abs(z)) < z_bound(8)


@pytest.mark.usefixtures("free_lanes")
@pytest.mark.slow
def test_auto_finds_blocks_for_discrete_states() -> None:
    """Integer leaves merge by equality, and the chain is the sequential one."""
    options = dict(num_samples=20_000, num_chains=2)
    found, expected = (
        sample(MIXTURE, MIXTURE_START, solver="auto", **options),
        sample(MIXTURE, MIXTURE_START, **options),
    )
    assert found.report.decision == "shooting", found.report
    assert np.all(found.report.result == RESULTS.successful)
    assert not found.report.fallback
    np.testing.assert_array_equal(found.unknowns["z"], expected.unknowns["z"])
    np.testing.assert_allclose(found.unknowns["mu"], expected.unknowns["mu"], rtol=0, atol=1e-10)
    assert np.all(found.report.near_ties == 0)
    assert "near-tie" in str(found.report)


def test_newton_refuses_discrete_states() -> None:
    with pytest.raises(TypeError, match=r"need real states.*MultipleShooting"):
        sample(MIXTURE, MIXTURE_START, solver=deer(), num_samples=20)


def test_custom_update_and_chain_tools() -> None:
    """A user's map with its own noise; summaries and ArviZ take integer and real sites."""
    kernel = pmcmc.Gibbs(
        {
            "n": pmcmc.kernels.CategoricalUpdate(lambda x: jnp.array([0.0, 0.5])),
            "x": pmcmc.kernels.CustomUpdate(jax.random.normal, lambda x, z: x["n"] + 0.5 * z),
        }
    )
    chain = sample(kernel, {"n": 0, "x": 0.0}, num_samples=50)
    assert np.all(np.isnan(chain.info.margin))
    assert np.all(np.isnan(chain.report.near_ties))
    idata = chain.to_arviz()
    assert idata.posterior["n"].shape == (4, 50)
    chain.print_summary()


def test_which_sites_are_discrete() -> None:
    """By their update, whatever their dtype."""
    kernel = pmcmc.Gibbs({"k": pmcmc.kernels.CategoricalUpdate(lambda x: jnp.zeros(2)), "x": NORMAL})
    assert kernel.discrete({"k": np.zeros(3), "x": np.zeros(3)}) == {"k": True, "x": False}
    whole = pmcmc.Compose([pmcmc.DiscreteGibbs(supports={"z": [0.0, 0.5]}), kernel, (pmcmc.MALA(), ["a"])])
    unknown = ({"z": np.zeros(2)}, {"k": np.zeros(()), "x": np.zeros(())}, np.zeros(4))
    assert whole.discrete(unknown) == ({"z": True}, {"k": True, "x": False}, False)


@pytest.mark.parametrize(
    ("updates", "start", "error", "words"),
    [
        ({"a": NORMAL, "c": NORMAL}, {"a": 0.0, "b": 0.0}, ValueError, r"updates \['c'\].*check the names"),
        ({"a": NORMAL}, {"a": 0.0, "b": 0.0}, ValueError, r"no update for \['b'\]"),
        ({"a": NORMAL}, jnp.zeros(2), TypeError, "as a dict"),
        ({}, {"a": 0.0}, ValueError, "at least one update"),
        ({"a": lambda x: x}, {"a": 0.0}, TypeError, "CustomUpdate"),
        (
            {"a": pmcmc.kernels.CustomUpdate(lambda k: k, lambda x, u: jnp.zeros(3))},
            {"a": 0.0},
            ValueError,
            r"update of 'a' must",
        ),
        ({"a": NORMAL}, {"a": 0}, ValueError, r"update of 'a' must return a value like"),
        (
            {"a": pmcmc.kernels.CategoricalUpdate(lambda x: jnp.zeros((2, 2)))},
            {"a": jnp.zeros(3, int)},
            ValueError,
            "last axis",
        ),
        ({"a": NORMAL}, {"a": jnp.nan}, ValueError, "not finite"),
        ({"a": NORMAL}, {"a": {"b": 0.0}}, ValueError, "must be one array.*CustomUpdate"),
    ],
)
def test_errors_say_what_to_do(updates, start, error, words: str) -> None:
    with pytest.raises(error, match=words):
        sample(pmcmc.Gibbs(updates), start, num_samples=10)


def test_errors_of_updates() -> None:
    for wrong in (lambda: pmcmc.kernels.NormalUpdate(1.0), lambda: pmcmc.Gibbs([NORMAL])):
        with pytest.raises(TypeError):  # by the annotation here, by pmcmc's own message in production
            wrong()
    with pytest.raises(TypeError, match="needs a log density"):
        sample(pmcmc.HMC(step_size=0.1), {"a": 0.0})
    with pytest.raises(TypeError, match=r"WindowAdaptation cannot warm up Gibbs.*SiteAdaptation"):
        sample(pmcmc.Gibbs({"a": NORMAL}), {"a": 0.0}, warmup=pmcmc.WindowAdaptation())
    with pytest.raises(TypeError, match=r"SiteAdaptation cannot warm up HMC"):
        sample(pmcmc.HMC(), jnp.zeros(2), lambda x: -jnp.sum(x**2), warmup=pmcmc.SiteAdaptation())


WAITS = np.array([0.3, 1.1, 0.2, 0.7])


def waiting() -> None:
    rate = numpyro.sample("rate", dist.Gamma(2.0, 1.0))
    numpyro.sample("waits", dist.Exponential(rate).expand([len(WAITS)]).to_event(1), obs=WAITS)


def constrained() -> None:
    numpyro.sample("rate", dist.Gamma(2.0, 1.0))
    numpyro.sample("shares", dist.Dirichlet(jnp.ones(3)))
    numpyro.sample("level", dist.Normal(0.0, 1.0).expand([2]).to_event(1))
    numpyro.sample("kind", dist.Categorical(jnp.ones(3) / 3))


@pytest.mark.parametrize(
    ("name", "update"),
    [
        ("rate", pmcmc.kernels.GammaUpdate(2.0, 1.0)),
        ("rate", pmcmc.kernels.InverseGammaUpdate(2.0, 1.0)),
        ("rate", pmcmc.kernels.CategoricalUpdate(lambda x: jnp.zeros(3))),
        ("shares", pmcmc.kernels.DirichletUpdate(jnp.ones(3))),
    ],
)
def test_values_of_sites_that_are_held_unconstrained_are_refused(name: str, update) -> None:
    """A gamma variate in place of its logarithm would be a draw from another posterior."""
    assert numpyro_target(constrained, (), {}).model.transformed == ("rate", "shares")
    rest = [site for site in ("rate", "shares", "level") if site != name]
    kernel = pmcmc.Compose([pmcmc.DiscreteGibbs(), pmcmc.Gibbs({name: update}), (pmcmc.HMC(), rest)])
    words = f"{type(update).__name__} draws .* but positions hold the site '{name}' .* unconstrained.*CustomUpdate"
    with pytest.raises(ValueError, match=words):
        pmcmc.parallel_chain(constrained, 0, kernel=kernel, num_samples=20, progress_bar=False)


def test_a_gamma_site_of_a_model_by_its_logarithm() -> None:
    """The update that the page of `Gibbs` gives, against the conditional of the model."""
    shape, rate = 2.0 + len(WAITS), 1.0 + WAITS.sum()
    update = pmcmc.kernels.CustomUpdate(lambda key: jax.random.loggamma(key, shape), lambda x, g: g - jnp.log(rate))
    options = dict(num_warmup=0, num_samples=2000, solver=Sequential(), progress_bar=False)
    chain = pmcmc.parallel_chain(waiting, 0, kernel=pmcmc.Gibbs({"rate": update}), **options)
    u = stats.gamma(shape, scale=1 / rate).cdf(chain.get_samples()["rate"])  # draws are independent
    moments = np.array([u.mean() - 1 / 2, (u**2).mean() - 1 / 3]) / np.sqrt([1 / 12, 4 / 45])
    assert np.max(np.abs(moments)) * np.sqrt(u.size) < z_bound(2)
