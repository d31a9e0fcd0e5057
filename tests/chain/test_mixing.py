"""R-hat and effective sample sizes agree with ArviZ, and a run warns of what its draws lack."""

import re
import warnings

import arviz
import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import pytest

import pmcmc
import pmcmc.chain.draws as draws_module
from pmcmc.chain.draws import judge, judge_mixing, measure
from pmcmc.recurrence import Sequential
from pmcmc.sampling.segments import Thinned
from pmcmc.sampling.store import num_judged

QUIET = dict(progress_bar=False, num_warmup=400)


def autoregressive(rho: float, shape: tuple[int, int, int]) -> np.ndarray:
    noise = np.random.default_rng(0).standard_normal(shape)
    x = noise.copy()
    for t in range(1, shape[1]):
        x[:, t] = rho * x[:, t - 1] + np.sqrt(1 - rho**2) * noise[:, t]
    return x


SERIES = {
    **{f"rho={rho}, {n} draws": autoregressive(rho, (4, n, 3)) for rho in (-0.8, 0, 0.5, 0.99) for n in (10, 100, 997)},
    "ties": np.round(autoregressive(0.7, (4, 500, 2)), 1),
    "two values": (autoregressive(0.9, (4, 500, 2)) > 1).astype(float),
    "a rare value": (autoregressive(0.5, (4, 500, 2)) < 2.2).astype(float),
    "chains apart": autoregressive(0.5, (4, 300, 2)) + np.arange(4.0)[:, None, None],
}


@pytest.mark.parametrize("name", SERIES)
def test_measures_are_those_of_arviz(name: str) -> None:
    draws = SERIES[name]
    data = arviz.convert_to_dataset({"x": draws})
    found = measure(draws)
    np.testing.assert_allclose(found.rhat, arviz.rhat(data)["x"], rtol=1e-10)
    np.testing.assert_allclose(found.bulk_ess, arviz.ess(data)["x"], rtol=1e-10)
    # A draw that equals the quantile may count on either side of it.
    rtol = 1e-10 if draws.shape[1] > 10 else 0.1
    np.testing.assert_allclose(found.tail_ess, arviz.ess(data, method="tail")["x"], rtol=rtol)


def test_one_chain_is_judged_by_its_halves() -> None:
    draws = autoregressive(0.5, (1, 1000, 2))
    halves = np.concatenate([draws[:, :500], draws[:, 500:]])
    np.testing.assert_allclose(measure(draws).bulk_ess, arviz.ess({"x": draws})["x"], rtol=1e-10)
    assert np.all(np.abs(measure(draws).rhat - arviz.rhat({"x": halves}, method="rank")["x"]) < 0.02)
    assert np.all(measure(np.linspace(0, 1, 1000)[None, :, None]).rhat > 1.5)


def test_the_worst_element_of_each_site_is_named() -> None:
    rng = np.random.default_rng(0)
    theta = rng.standard_normal((4, 500, 2, 3))
    theta[..., 1, 2] += 3 * np.arange(4)[:, None]
    still = np.ones((4, 500))
    found = judge({"theta": theta, "mu": rng.standard_normal((4, 500)), "still": still})
    assert found.rhat["theta"][1] == found.bulk_ess["theta"][1] == (1, 2)
    assert found.rhat["mu"][1] == ()
    assert "still" not in found.rhat
    assert found.max_rhat > 1.5
    assert "theta[1, 2]" in found.doubt
    assert "mu" not in found.doubt
    assert judge({"mu": rng.standard_normal((4, 500))}).doubt == ""
    assert judge({"theta": theta[:, :101]}).doubt
    assert judge({"mu": autoregressive(0.7, (4, 101, 1))}).doubt == ""
    few = judge({"theta": theta[:, :99]})
    assert few.doubt == ""
    assert not few.is_judged
    assert not judge({"still": still}).is_judged


def test_values_that_do_not_vary_in_every_respect() -> None:
    """Draws of two values in halves, at equal distances from the median; and chains that each stand still."""
    coin = judge({"x": np.random.default_rng(0).permutation(np.arange(1000) % 2).reshape(2, 500)})
    assert coin.max_rhat < 1.02
    assert coin.doubt == ""
    still = judge({"x": np.repeat(np.arange(3.0)[:, None], 200, axis=1)})
    assert still.max_rhat > 1e6
    assert still.num_apart == 1
    assert "R-hat above 100 (x)" in still.doubt


def test_an_element_without_tails_does_not_hide_the_worst() -> None:
    """Of a value that 99 in 100 draws have, both quantiles are the largest draw."""
    slow, rare = autoregressive(0.9, (4, 500, 1)), autoregressive(0.0, (4, 500, 1)) < 2.3
    found = judge({"x": np.concatenate([rare, slow], axis=2)})
    assert found.tail_ess["x"] == (pytest.approx(measure(slow).tail_ess[0]), (1,))


def test_no_draws_are_not_judged() -> None:
    target = pmcmc.Target.from_logdensity(None, {"x": 0.0})
    kernel = pmcmc.Gibbs({"x": pmcmc.kernels.NormalUpdate(lambda x: (0.0, 1.0))})
    assert not judge_mixing(target, kernel, {"x": np.zeros((2, 0))}).is_judged


def test_an_extension_is_judged_with_the_draws_before() -> None:
    """By themselves its 2,400 draws have an effective sample size of about 60."""
    kernel = pmcmc.HMC(step_size=0.3, num_integration_steps=1)
    options = dict(kernel=kernel, solver=Sequential(), num_warmup=0, num_samples=20_000, progress_bar=False)
    chain = pmcmc.sample(lambda x: -0.5 * jnp.sum(x**2), jnp.zeros(1), 0, **options)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        longer = chain.extend(600, progress_bar=False)
    assert judge({"x": longer.unknowns[:, 20_000:]}).doubt
    assert longer.report.mixing.num_draws == 82_400


def test_columns_are_looked_at_in_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    sites = {"x": autoregressive(0.7, (4, 200, 7))}
    whole = judge(sites)
    monkeypatch.setattr(draws_module, "MAX_COLUMNS", 3)
    assert judge(sites) == whole


def test_of_many_draws_some_are_looked_at() -> None:
    draws = autoregressive(0.9, (2, 100_000, 20))
    target = pmcmc.Target.from_logdensity(lambda x: -jnp.sum(x**2), jnp.zeros(20))
    found = judge_mixing(target, pmcmc.HMC(), draws)
    assert found.stride == 100_000 // (draws_module.MAX_NUMBERS // 40)
    assert found.num_draws * 20 <= 1.1 * draws_module.MAX_NUMBERS
    assert f"one in {found.stride}" in str(found)
    whole = measure(draws)
    assert found.min_ess < whole.bulk_ess.min()


@pytest.mark.parametrize(("num_chains", "dim"), [(1, 300), (4, 300), (1, 1100)])
def test_wide_posteriors_are_judged_by_all_draws(num_chains: int, dim: int) -> None:
    """Some of 20,000 draws are looked at: enough to see a small effective sample size, and not too few to judge."""
    target = pmcmc.Target.from_logdensity(lambda x: -jnp.sum(x**2), jnp.zeros(dim))
    num_draws = 20_000 // num_chains
    draws = np.random.default_rng(0).standard_normal((num_chains, num_draws, dim), np.float32)
    good = judge_mixing(target, pmcmc.HMC(), draws)
    assert good.stride > 1
    assert good.is_judged
    assert good.doubt == ""
    draws[..., 7] = autoregressive(0.99, (num_chains, num_draws, 1))[..., 0]
    bad = judge_mixing(target, pmcmc.HMC(), draws)
    assert bad.num_apart == 0
    assert bad.min_ess < 400
    assert "have not mixed" in bad.doubt


def test_few_draws_of_many_are_judged_by_their_share() -> None:
    """A stream may keep 512 draws of 51,200, of which 400 would not be effective if all were independent."""
    draws = autoregressive(0.0, (4, 128, 50))
    assert measure(draws).bulk_ess.min() < 400
    assert judge({"x": draws}, 100).doubt == ""
    assert judge({"x": draws}).doubt == ""
    slow = autoregressive(0.9, (4, 128, 1))
    assert "effective sample size" in judge({"x": slow}, 100).doubt
    assert judge({"x": slow}).doubt == ""
    assert not judge({"x": slow[:, :50]}).is_judged
    assert judge({"x": slow[:, :50]}, 2).is_judged


@pytest.mark.parametrize("cut", [(1000,), (1, 2, 3, 994), (7,) * 142])
def test_thinned_keeps_draws_at_one_distance(cut: tuple[int, ...]) -> None:
    rows = np.arange(2 * 1000).reshape(2, 1000)
    thinned, first = Thinned(50), 0
    for size in cut:
        thinned.add({"x": rows[:, first : first + size]})
        first += size
    assert 50 <= thinned.kept["x"].shape[1] <= 100
    np.testing.assert_array_equal(thinned.kept["x"], rows[:, : first : thinned.stride])


def cauchy(x):
    """Return draws with tails that a chain of a thousand steps cannot have explored, whatever its key."""
    return -jnp.sum(jnp.log1p(x**2))


def test_heavy_tails_warn() -> None:
    run = lambda **options: pmcmc.sample(cauchy, jnp.zeros(5), 3, num_samples=1000, **QUIET, **options)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        chain = run()
    (said,) = [str(w.message) for w in caught if "mixed" in str(w.message)]
    assert re.search(r"have not mixed: R-hat at most \d\.\d+ \(x\[\d\]\).*Take more draws", said)
    assert chain.report.mixing.doubt == said
    assert str(chain.report.mixing) in str(chain.report)


def test_good_draws_do_not() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        chain = pmcmc.sample(lambda x: -0.5 * jnp.sum(x**2), jnp.zeros(5), 0, num_samples=1000, **QUIET)
    assert chain.report.mixing.doubt == ""
    assert "Mixing: R-hat at most 1.0" in str(chain.report)
    few = pmcmc.sample(lambda x: -0.5 * jnp.sum(x**2), jnp.zeros(5), 0, num_samples=90, **QUIET)
    assert "Mixing: too few draws" in str(few.report)


def model(y):
    mu = numpyro.sample("mu", dist.Normal(0, 1))
    k = numpyro.sample("k", dist.Categorical(jnp.ones(3) / 3))
    numpyro.sample("y", dist.Normal(mu + k, 1), obs=y)


def test_discrete_sites_are_judged_and_files_keep_what_was_found(tmp_path) -> None:
    options = dict(num_samples=2000, solver=Sequential(), **QUIET)
    chain = pmcmc.parallel_chain(model, 0, model_args=(1.0,), **options)
    assert set(chain.report.mixing.rhat) == {"mu", "k"}
    draws = {name: np.asarray(x, float) for name, x in chain.get_samples(True).items()}
    data = arviz.convert_to_dataset(draws)
    for name in draws:
        np.testing.assert_allclose(chain.report.mixing.rhat[name][0], arviz.rhat(data)[name], rtol=1e-6)
        np.testing.assert_allclose(chain.report.mixing.bulk_ess[name][0], arviz.ess(data)[name], rtol=1e-6)
    chain.save(tmp_path / "chain")
    again = pmcmc.load(tmp_path / "chain", model, model_args=(1.0,))
    assert again.report.mixing == chain.report.mixing
    more = chain.extend(2000, progress_bar=False)
    assert more.report.mixing.num_draws == 16_000


def test_streams_keep_enough_draws() -> None:
    """Of all chains 2,000, unless memory is short."""
    assert num_judged(1, 8, 2**25) == 2000
    assert num_judged(4, 32, 2**25) == 1024
    assert num_judged(1, 4 * 10_000, 2**25) == 1677  # 64 MiB
    assert num_judged(3, 12 * 5_000, 2**25) == 667
    assert num_judged(64, 256 * 5_000, 2**25) == num_judged(4, 16 * 10**6, 2**25) == 128


@pytest.mark.filterwarnings("ignore:the draws have not mixed")
def test_streams_are_judged(tmp_path) -> None:
    pytest.importorskip("zarr")
    chain = pmcmc.sample(cauchy, jnp.zeros(2), 0, num_samples=100, **QUIET)
    stored = chain.stream(tmp_path / "run", 5000, progress_bar=False)
    found = stored.report.mixing
    assert found.stride > 1
    draws = np.asarray(stored.get_samples(group_by_chain=True)["x"])
    whole = judge({"x": draws[:, 100 :: found.stride]}, found.stride)
    assert found.rhat["x"][0] == pytest.approx(whole.rhat["x"][0], rel=1e-6)


def test_wide_posteriors_are_judged_when_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pmcmc.sampling.reporting.MOST_JUDGED", 100)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        chain = pmcmc.sample(cauchy, jnp.zeros(5), 3, num_samples=1000, **QUIET)
    assert not [w for w in caught if "mixed" in str(w.message)]
    assert chain.report.mixing.doubt
    assert jax.tree.leaves(chain.unknowns)[0].shape == (4, 1000, 5)
