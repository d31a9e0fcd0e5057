"""Discrete sites by inverse CDF: against enumeration, in parallel and sequentially, and from NumPyro models."""

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import pytest
from scipy import stats

import pmcmc
from pmcmc.interop.numpyro import numpyro_target
from pmcmc.recurrence import RESULTS, MultipleShooting, Sequential
from tests.helpers.chains import draw_noise, solve
from tests.helpers.gibbs import (
    POINTS,
    SIDE,
    ising_exact,
    ising_logdensity,
    mixture_exact,
    mixture_model,
    z_scores,
)
from tests.helpers.statistics import z_bound


@pytest.fixture(autouse=True)
def numpyro_broadcasts_over_ranks():
    with jax.numpy_rank_promotion("allow"):
        yield


OPTIONS = dict(num_warmup=100, num_samples=200, solver=Sequential(), progress_bar=False)
ISING = pmcmc.DiscreteGibbs(supports={"spin": [-1, 1]})
ISING_START = {"spin": jnp.ones((SIDE, SIDE), int)}
ABREAST = pmcmc.Compose([pmcmc.DiscreteGibbs(independent="z"), (pmcmc.HMC(), ["mu"])])


@pytest.mark.parametrize("kernel", [None, ABREAST], ids=["in order", "side by side"])
@pytest.mark.slow
def test_mixture_model_matches_enumeration(kernel) -> None:
    """A NumPyro model with discrete assignments, without changes."""
    chain = pmcmc.parallel_chain(mixture_model, 0, model_args=(POINTS,), kernel=kernel, num_chains=256, **OPTIONS)
    draws, (ones, means) = chain.get_samples(group_by_chain=True), mixture_exact()
    assert draws["z"].dtype == int
    z = np.concatenate([z_scores(draws["z"], ones), z_scores(draws["mu"], means)])
    assert np.max(np.abs(z)) < z_bound(16)
    picked = np.take_along_axis(np.asarray(draws["mu"]), np.asarray(draws["z"]), axis=-1)
    np.testing.assert_array_equal(draws["centre"], picked)
    assert chain.kernel.blocks[0].names(chain.target) == ("z",)
    assert float(np.mean(chain.get_extra_fields()["diverging"] == 0)) > 0.5


def test_side_by_side_is_in_order() -> None:
    """For independent elements the same uniforms give the same draws, updated together or one by one."""
    target = numpyro_target(mixture_model, (POINTS,), {})
    state = {"z": jnp.array([0, 1, 1, 0, 1, 0]), "mu": jnp.array([-0.7, 0.9])}
    each, whole = pmcmc.DiscreteGibbs(), pmcmc.DiscreteGibbs(independent=["z"])
    given = target.given(("z",), {"mu": state["mu"]})
    noise = draw_noise(given, each, 0, 50)
    step = lambda kernel: jax.vmap(lambda u: kernel.step(given, {"z": state["z"]}, u))(noise)
    (a, said), (b, also) = step(each), step(whole)
    np.testing.assert_array_equal(a["z"], b["z"])
    assert len(np.unique(np.asarray(a["z"]), axis=0)) > 5
    np.testing.assert_allclose(said.margin, also.margin, rtol=0, atol=1e-12)
    np.testing.assert_allclose(
        said.logdensity, jax.vmap(lambda z: given.model.logdensity(given.data, z))(a), rtol=1e-12
    )
    np.testing.assert_array_equal(said.logdensity, also.logdensity)


def test_shooting_gives_the_sequential_chain_of_a_model() -> None:
    target = numpyro_target(mixture_model, (POINTS,), {})
    kernel = pmcmc.Compose(
        [pmcmc.DiscreteGibbs(independent="z"), (pmcmc.HMC(step_size=0.5, num_integration_steps=3), ["mu"])]
    )
    start = {"z": jnp.zeros(6, int), "mu": jnp.array([-1.0, 1.0])}
    noise, x0 = draw_noise(target, kernel, 3, 20_000), kernel.init(target, start)
    expected = solve(target, kernel, Sequential(), x0, noise)
    found = solve(target, kernel, MultipleShooting(num_blocks=40), x0, noise)
    assert int(found.result) == RESULTS.successful
    np.testing.assert_array_equal(found.value[0]["z"], expected.value[0]["z"])
    np.testing.assert_allclose(found.value[1], expected.value[1], rtol=0, atol=1e-10)
    assert int(found.stats.num_sequential_steps) < 10_000


def test_ising_matches_enumeration() -> None:
    chain = pmcmc.sample(ising_logdensity, ISING_START, 0, kernel=ISING, num_chains=256, **OPTIONS)
    s = np.asarray(chain.get_samples(group_by_chain=True)["spin"])
    magnetisation, corners = ising_exact()
    z = [z_scores(s.mean((2, 3)), magnetisation), z_scores(s[:, :, 0, 0] * s[:, :, -1, -1], corners)]
    assert np.max(np.abs(z)) < z_bound(2)
    assert set(np.unique(s)) == {-1, 1}


@pytest.mark.usefixtures("free_lanes")
def test_ising_in_blocks() -> None:
    """All leaves are integers: merges are exact."""
    options = {**OPTIONS, "num_samples": 20_000, "num_chains": 2}
    run = lambda solver: pmcmc.sample(ising_logdensity, ISING_START, 0, kernel=ISING, **{**options, "solver": solver})
    found, expected = run("auto"), run(Sequential())
    assert found.report.decision == "shooting", found.report
    assert np.all(found.report.residual == 0)
    np.testing.assert_array_equal(found.unknowns["spin"], expected.unknowns["spin"])


def counts(y):
    """A model with supports of every kind and no continuous site."""
    with numpyro.plate("rows", 2):
        k = numpyro.sample("k", dist.Binomial(3, 0.4))
    on = numpyro.sample("on", dist.Bernoulli(0.3).expand([2]).to_event(1))
    level = numpyro.sample("level", dist.DiscreteUniform(2, 4))
    numpyro.sample("y", dist.Normal(jnp.sum(k) + 2.0 * on[0] - on[1] + level, 1.0), obs=y)


def test_model_without_continuous_sites() -> None:
    """All 4 * 4 * 2 * 2 * 3 states, with NumPyro's own probabilities."""
    chain = pmcmc.parallel_chain(counts, 1, model_args=(6.5,), num_chains=256, **OPTIONS)
    assert isinstance(chain.kernel, pmcmc.DiscreteGibbs)
    grid = np.stack(np.meshgrid(*[range(4)] * 2, *[range(2)] * 2, range(2, 5), indexing="ij"), -1).reshape(-1, 5)
    log_p = stats.binom.logpmf(grid[:, :2], 3, 0.4).sum(1) + stats.bernoulli.logpmf(grid[:, 2:4], 0.3).sum(1)
    log_p += stats.norm.logpdf(6.5, grid[:, :2].sum(1) + 2 * grid[:, 2] - grid[:, 3] + grid[:, 4])
    p = np.exp(log_p - log_p.max())
    draws = chain.get_samples(group_by_chain=True)
    x = np.concatenate([draws["k"], draws["on"], np.asarray(draws["level"])[..., None]], axis=-1)
    assert np.max(np.abs(z_scores(x, p @ grid / p.sum()))) < z_bound(5)
    values = jax.vmap(jax.vmap(lambda d: chain.target.model.logdensity(chain.target.data, d)))(draws)
    np.testing.assert_allclose(chain.info.logdensity, values, rtol=1e-10)


def test_given_kernel_and_starts() -> None:
    """A gradient kernel gets updates of the discrete sites in addition; init_params may have integers."""
    init = {"z": np.array([0, 0, 1, 1, 1, 1]), "mu": np.array([-1.0, 1.0])}
    chain = pmcmc.parallel_chain(
        mixture_model, 0, model_args=(POINTS,), kernel=pmcmc.MALA(step_size=0.2), init_params=init, num_warmup=0,
        num_samples=20, solver=Sequential(), progress_bar=False,
    )  # fmt: skip
    assert isinstance(chain.kernel.blocks[1].kernel, pmcmc.MALA)
    assert chain.get_samples()["z"].shape == (80, 6)
    chain.print_summary()
    assert chain.to_arviz().posterior["z"].dtype == int


def coupled(y):
    """The elements of z are in a plate, but each depends on the next one."""
    with numpyro.plate("data", len(y)):
        z = numpyro.sample("z", dist.Bernoulli(0.3))
        numpyro.sample("y", dist.Normal(z + 0.5 * jnp.roll(z, 1), 1.0), obs=y)


def counted(y):
    """A site outside the plate depends on all elements."""
    with numpyro.plate("data", 6):
        z = numpyro.sample("z", dist.Bernoulli(0.3))
    numpyro.sample("total", dist.Normal(jnp.sum(z), 1.0), obs=2.0)


def without_plate(y):
    z = numpyro.sample("z", dist.Bernoulli(0.3 * jnp.ones(6)))
    numpyro.sample("y", dist.Normal(z, 1.0), obs=y)


@pytest.mark.parametrize(
    ("model", "words"),
    [
        (coupled, "elements of 'z' are not independent"),
        (counted, "elements of 'z' are not independent"),
        (without_plate, "no plate declares independent"),
    ],
)
def test_elements_that_are_not_independent(model, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        pmcmc.parallel_chain(model, 0, model_args=(POINTS,), kernel=pmcmc.DiscreteGibbs(independent="z"), **OPTIONS)


def test_coupling_below_the_rounding_of_the_density() -> None:
    """In float32 the log density of 10,000 rows rounds by nearly as much as conditionals differ."""
    kernel, num_rows = pmcmc.DiscreteGibbs(independent="z"), 10_000
    y, z = np.linspace(-2, 2, num_rows, dtype=np.float32), np.zeros(num_rows, np.int32)
    with jax.enable_x64(False):
        with pytest.raises(ValueError, match="elements of 'z' are not independent"):
            kernel.check_start(numpyro_target(coupled, (y,), {}), {"z": z})
        kernel.check_start(numpyro_target(mixture_model, (y,), {}), {"z": z, "mu": np.zeros(2, np.float32)})


@pytest.mark.parametrize("by_place", [True, False])
def test_neighbours_that_must_differ_are_not_independent(by_place: bool) -> None:
    """At random values of all elements the density is zero whatever the value of one."""

    def model():
        with numpyro.plate("places", 20):
            z = numpyro.sample("z", dist.Categorical(jnp.ones(3) / 3))
            if by_place:
                numpyro.factor("differ", jnp.where(z == jnp.roll(z, 1), -jnp.inf, 0.0))
        if not by_place:
            numpyro.factor("differ", jnp.where(jnp.any(z == jnp.roll(z, 1)), -jnp.inf, 0.0))

    target, start = numpyro_target(model, (), {}), {"z": np.arange(20) % 2}
    with pytest.raises(ValueError, match="elements of 'z' are not independent"):
        pmcmc.DiscreteGibbs(independent="z").check_start(target, start)


@pytest.mark.parametrize(
    ("kernel", "error", "words"),
    [
        (pmcmc.DiscreteGibbs(), ValueError, r"pass DiscreteGibbs\(supports="),
        (pmcmc.DiscreteGibbs(supports={"spin": [0.5, 1]}), ValueError, "'spin' .*dtype int64, which cannot hold 0.5:"),
        (pmcmc.DiscreteGibbs(supports={"spins": [0, 1]}), ValueError, r"updates \['spins'\]"),
        (pmcmc.DiscreteGibbs(supports={"spin": [0, 1]}, independent="s"), ValueError, r"independent names \['s'\]"),
        (pmcmc.DiscreteGibbs(supports={"spin": [0, 1]}, independent="spin"), ValueError, "needs a NumPyro model"),
        (pmcmc.HMC(), TypeError, "has dtype int64.*DiscreteGibbs"),
    ],
)
def test_errors_say_what_to_do(kernel, error, words: str) -> None:
    with pytest.raises(error, match=words):
        pmcmc.sample(ising_logdensity, ISING_START, 0, kernel=kernel, progress_bar=False)


def test_errors_of_supports() -> None:
    with pytest.raises(TypeError, match="needs a log density"):
        pmcmc.sample(None, ISING_START, 0, kernel=ISING)
    for wrong in ("ab", 3, []):
        with pytest.raises(TypeError, match="list of numbers"):
            pmcmc.DiscreteGibbs(supports={"spin": wrong})
    for repeated in ([0, 1, 1], [0, 0.0], [True, 1]):  # a repeated value would be drawn twice as often
        with pytest.raises(ValueError, match=r"has \[.*\] more than once.*weights belong in the log density"):
            pmcmc.DiscreteGibbs(supports={"spin": repeated})
    with pytest.raises(ValueError, match=r"finite numbers, got \[nan, inf\]"):
        pmcmc.DiscreteGibbs(supports={"spin": [0, np.nan, np.inf]})


@pytest.mark.parametrize(
    ("dtype", "support", "lost"),
    [
        (jnp.int8, [0, 300], "300"),
        (jnp.uint8, [-1, 0], "-1"),
        (jnp.int32, [0, 2**31], "2147483648"),
        (jnp.int16, [0, 0.5], "0.5"),
        (bool, [0, 1, 2], "2"),
        (jnp.float32, [0.0, 1e39], "1e\\+39"),
        (jnp.float32, [16777216, 16777217], "16777216, 16777217"),  # equal in float32
    ],
    ids=str,
)
def test_supports_outside_the_dtype_of_the_site(dtype, support: list, lost: str) -> None:
    start = {"z": jnp.zeros(2, dtype)}
    with pytest.raises(ValueError, match=rf"site 'z' .*has dtype {jnp.dtype(dtype)}, which cannot hold {lost}: "):
        pmcmc.sample(lambda x: 0.0, start, 0, kernel=pmcmc.DiscreteGibbs({"z": support}), progress_bar=False)


def test_supports_that_are_rounded_but_apart() -> None:
    start = {"z": jnp.zeros((), jnp.float32)}
    kernel = pmcmc.DiscreteGibbs({"z": [0.1, 0.7]})
    chain = pmcmc.sample(lambda x: 0.0 * x["z"], start, 0, kernel=kernel, **{**OPTIONS, "num_samples": 50})
    assert set(np.unique(chain.get_samples()["z"])) == {np.float32(0.1), np.float32(0.7)}


def one_bad_value():
    """The density of the first element is NaN at 1; the second element does not affect it."""
    with numpyro.plate("data", 2):
        z = numpyro.sample("z", dist.Categorical(jnp.ones(3) / 3))
        numpyro.factor("bad", jnp.where((z == 1) & (jnp.arange(2) == 0), jnp.nan, 0.0))


@pytest.mark.parametrize("independent", [(), ("z",)], ids=["in order", "side by side"])
@pytest.mark.filterwarnings("ignore:.*were divergent")
def test_one_value_of_nan_density_keeps_the_old_value_and_says_so(independent: tuple) -> None:
    """Like `CategoricalUpdate`; a value with density -inf is just never drawn."""
    start = {"z": jnp.array([2, 0])}
    chain = pmcmc.parallel_chain(
        one_bad_value,
        0,
        kernel=pmcmc.DiscreteGibbs(independent=independent),
        init_params=start,
        **{**OPTIONS, "num_warmup": 0, "num_samples": 100, "num_chains": 1},
    )
    z = np.asarray(chain.get_samples()["z"])
    assert set(z[:, 0]) == {2}
    # Updated together, all elements are one draw; one by one, each is a draw.
    assert set(z[:, 1]) == ({0} if independent else {0, 1, 2})
    assert chain.report.num_divergent[0] == 100
