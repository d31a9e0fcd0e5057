"""From a model to draws: the same chain for any solver, blocks, segments and chains, and all its accessors."""

import sys
from functools import cache
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import pytest
from numpyro import diagnostics, infer
from scipy import stats

import pmcmc
from benchmarks._compilations import compilations
from pmcmc.chain.report import Summary
from pmcmc.recurrence import RESULTS, MultipleShooting, Sequential, deer
from pmcmc.sampling import api, engine
from pmcmc.sampling.engine import Engine
from tests.helpers.statistics import z_bound
from tests.helpers.targets import COVARIANCE, funnel, funnel_may_warn, gaussian, start_like

SIZES = dict(num_warmup=200, num_samples=2000, num_chains=4, progress_bar=False)
OBSERVED = jnp.array([0.8, 1.4, -0.2, 1.1, 0.9])


def normal_model(y, unused=None):
    mu = numpyro.sample("mu", dist.Normal(0, 1))
    sigma = numpyro.sample("sigma", dist.HalfNormal(1.0))
    numpyro.deterministic("twice", 2 * mu)
    with numpyro.plate("data", y.shape[0]):
        numpyro.sample("y", dist.Normal(mu, sigma), obs=y)


def gaussian_chain(seed=0, **options) -> pmcmc.Chain:
    return pmcmc.sample(gaussian, start_like(gaussian), seed, **{**SIZES, **options})


@cache
def reference() -> pmcmc.Chain:
    """Return the sequential chain that all other ways must reproduce."""
    return gaussian_chain(solver=Sequential())


@cache
def model_chain() -> pmcmc.Chain:
    fields = ("accept_prob", "potential_energy", "energy", "num_steps")
    return pmcmc.parallel_chain(normal_model, 0, model_args=(OBSERVED,), extra_fields=fields, **SIZES)


def assert_same_chain(chain, expected) -> None:
    np.testing.assert_allclose(chain.get_samples(), expected.get_samples(), rtol=0, atol=1e-9)
    np.testing.assert_array_equal(chain.info.margin > 0, expected.info.margin > 0)


@pytest.mark.parametrize(
    "solver",
    [MultipleShooting(4), MultipleShooting(16), deer(max_iters=300), "auto"],
    ids=["4 blocks", "16 blocks", "deer", "auto"],
)
def test_same_key_same_chain(solver) -> None:
    chain = gaussian_chain(solver=solver)
    assert_same_chain(chain, reference())
    assert np.all(chain.report.result == RESULTS.successful)
    assert chain.report.fallback == ""
    if solver != "auto":
        assert np.all(chain.report.certified_steps == 2000)
        assert np.all(chain.report.residual <= 1.2e-13)
        assert np.all(chain.report.num_sequential_steps < 2000)
        assert np.all(chain.report.lyapunov_exponent < 0)


def test_other_key_other_chain() -> None:
    other = gaussian_chain(seed=jax.random.key(1), solver=Sequential())
    assert not np.any(other.get_samples() == reference().get_samples())
    raw = gaussian_chain(seed=jax.random.PRNGKey(0), solver=Sequential())
    np.testing.assert_array_equal(raw.get_samples(), reference().get_samples())


def test_company_changes_nothing() -> None:
    alone = gaussian_chain(num_chains=1, solver=Sequential())
    first = reference().get_samples(group_by_chain=True)[0]
    np.testing.assert_allclose(alone.get_samples(), first, rtol=0, atol=1e-9)
    chains = reference().get_samples(group_by_chain=True)
    assert len({float(chain[-1, 0]) for chain in chains}) == 4


def test_fallback_keeps_the_prefix() -> None:
    """Blocks of 63 steps that take about 300 to merge: two sweeps do not suffice, the rest is sampled sequentially."""
    slow = pmcmc.HMC(num_integration_steps=2)  # nearly half a period
    with pytest.warns(UserWarning, match="MultipleShooting solved only 189 of 2,000 steps of each chain in parallel"):
        chain = gaussian_chain(kernel=slow, solver=MultipleShooting(num_blocks=32, max_sweeps=2))
    assert_same_chain(chain, gaussian_chain(kernel=slow, solver=Sequential()))
    report = chain.report
    assert np.all((report.certified_steps >= 3 * 63) & (report.certified_steps < 1000))
    assert np.any(report.result == RESULTS.max_iters_reached)
    assert "max_iters_reached" in report.fallback
    assert "Fallback: max_iters_reached" in str(report)


def test_chains_do_not_hold_each_other_back() -> None:
    """A budget of steps that suffices for some chains only: those are certified whole, others go on."""
    paths = gaussian_chain(solver=MultipleShooting(num_blocks=4)).report.num_sequential_steps
    budget = int(np.sort(paths)[1])
    chain = gaussian_chain(solver=MultipleShooting(num_blocks=4, max_steps=budget), thinning=3)
    report, expected = chain.report, reference().get_samples(group_by_chain=True)[:, 2::3]
    np.testing.assert_allclose(chain.get_samples(group_by_chain=True), expected, rtol=0, atol=1e-9)
    whole = report.certified_steps == 2000
    np.testing.assert_array_equal(whole, report.result == RESULTS.successful)
    np.testing.assert_array_equal(whole, paths <= budget)
    assert f"{report.certified_steps.min():,} to 2,000 steps of each chain had been solved" in report.fallback
    # The critical path of each chain: that of the blocks, and the steps that were left.
    np.testing.assert_array_equal(report.num_sequential_steps[whole], paths[whole])
    np.testing.assert_array_equal(report.num_sequential_steps[~whole], budget + 2000 - report.certified_steps[~whole])


@pytest.mark.parametrize("solver", [MultipleShooting(4), Sequential()], ids=["shooting", "sequential"])
def test_segments_change_nothing(solver, monkeypatch: pytest.MonkeyPatch) -> None:
    """Memory for about 200 to 400 steps per segment, the last one short, thinned across their borders."""
    calls, solve = [], Engine.solve
    monkeypatch.setattr(Engine, "solve", lambda *args: calls.append(args) or solve(*args))
    monkeypatch.setattr(engine, "SEGMENT_BYTES", 2**17)
    monkeypatch.setattr(engine, "SEQUENTIAL_BYTES", 2**17)
    chain = gaussian_chain(solver=solver, thinning=3)
    assert len(calls) in range(5, 12)
    assert len({args[2] for args in calls}) == 1  # one shape, so one program
    assert chain.num_samples == 666
    expected = reference().get_samples(group_by_chain=True)[:, 2::3]
    np.testing.assert_allclose(chain.get_samples(group_by_chain=True), expected, rtol=0, atol=1e-9)


def test_thinning_is_slicing() -> None:
    chain = gaussian_chain(thinning=7, solver=Sequential())
    expected = reference().get_samples(group_by_chain=True)[:, 6::7]
    np.testing.assert_array_equal(chain.get_samples(group_by_chain=True), expected)


def test_auto_takes_shooting_where_chains_merge_and_is_right(free_lanes, fresh_programs) -> None:
    """20,000 steps of a Gaussian: shooting; moments within the bands; a second run compiles nothing."""
    run = lambda seed: pmcmc.sample(gaussian, start_like(gaussian), seed, **{**SIZES, "num_samples": 20_000})
    with compilations() as first:
        chain = run(0)
        draws = np.asarray(chain.get_samples(group_by_chain=True))
    with compilations() as second:
        run(1).get_samples(group_by_chain=True)
    assert len(first) >= 5
    assert second == []
    report = chain.report
    assert report.decision == "shooting"
    assert "merged within" in report.reason
    assert 4 <= report.coalescence_steps.size <= 32
    assert np.all(report.num_sequential_steps < 10_000)
    assert np.all(report.certified_steps >= 12_000)  # all but the first steps, which the pilot takes
    products = np.einsum("cti,ctj->ctij", draws, draws).reshape(4, -1, 9)
    functions = np.concatenate([draws, products], axis=-1)
    exact = np.concatenate([np.zeros(3), COVARIANCE.ravel()])
    batches = functions.reshape(160, 500, 12).mean(axis=1)  # batch means: 500 steps are about 50 correlation times
    t = (batches.mean(axis=0) - exact) / (batches.std(axis=0, ddof=1) / np.sqrt(160))
    assert np.max(np.abs(t)) < -stats.t.ppf(stats.norm.sf(z_bound(12)), df=159)


@funnel_may_warn
def test_auto_takes_sequential_where_chains_do_not_merge(free_lanes) -> None:
    chain = pmcmc.sample(funnel, start_like(funnel), 0, **{**SIZES, "num_samples": 20_000})
    assert chain.report.decision == "sequential"
    assert "of 4 coupled pairs" in chain.report.reason
    assert np.all(chain.report.num_sequential_steps == 20_000)


def test_draws_of_a_model() -> None:
    chain = model_chain()
    samples, grouped = chain.get_samples(), chain.get_samples(group_by_chain=True)
    assert set(samples) == {"mu", "sigma", "twice"}
    assert all(x.shape == (8000,) for x in samples.values())
    for name, x in grouped.items():
        assert x.shape == (4, 2000)
        np.testing.assert_array_equal(x.reshape(-1), samples[name])
    assert jnp.all(samples["sigma"] > 0)
    np.testing.assert_allclose(samples["twice"], 2 * samples["mu"])


def test_extra_fields() -> None:
    fields, grouped = model_chain().get_extra_fields(), model_chain().get_extra_fields(group_by_chain=True)
    assert set(fields) == {"diverging", "accept_prob", "potential_energy", "energy", "num_steps"}
    assert all(x.shape == (8000,) for x in fields.values())
    assert all(x.shape == (4, 2000) for x in grouped.values())
    assert fields["diverging"].dtype == bool
    samples = model_chain().get_samples()
    mu, sigma = samples["mu"][:5], samples["sigma"][:5]
    logs = dist.Normal(mu[:, None], sigma[:, None]).log_prob(OBSERVED[None]).sum(1) + dist.Normal(0, 1).log_prob(mu)
    logs = logs + dist.HalfNormal(1.0).log_prob(sigma) + jnp.log(sigma)  # log |d sigma / d log sigma|
    np.testing.assert_allclose(fields["potential_energy"][:5], -logs, rtol=1e-10)
    assert set(reference().get_extra_fields()) == {"diverging"}


def test_a_summary_of_booleans() -> None:
    """They count as 0 and 1."""
    start = {"mu": jnp.array(0.0), "positive": jnp.array(False)}
    drawn = pmcmc.kernels.CustomUpdate(lambda key: jax.random.uniform(key), lambda x, u: u < 0.25)
    mu = pmcmc.kernels.NormalUpdate(lambda x: (1.0, 1.0))
    kernel = pmcmc.Gibbs({"mu": mu, "positive": drawn})
    chain = pmcmc.sample(None, start, 0, kernel=kernel, num_warmup=0, num_samples=100, progress_bar=False)
    share = float(chain.get_samples()["positive"].mean())
    assert chain.summary()["positive"]["mean"] == pytest.approx(share, abs=1e-6)
    assert "positive" in str(chain.summary())


@pytest.mark.parametrize("dtype", [np.float32, np.float16, jnp.bfloat16])
def test_a_summary_of_many_narrow_numbers(dtype) -> None:
    """A million of them, added one after the other in their own precision, have another mean."""
    rng = np.random.default_rng(0)
    draws = (100 + rng.standard_normal((4, 250_000, 2), np.float32)).astype(dtype)
    found = Summary({"x": draws}, 0.9, np.zeros((4, 250_000), bool))["x"]
    np.testing.assert_allclose(found["mean"], draws.astype(float).mean((0, 1)), rtol=1e-9)
    np.testing.assert_allclose(found["std"], draws.astype(float).std((0, 1), ddof=1), rtol=1e-9)


def test_a_summary_of_narrow_integers() -> None:
    """The median is half the sum of two draws."""
    draws = np.random.default_rng(0).permutation(np.tile(np.array([200, 210], np.uint8), 20)).reshape(2, 20)
    found = Summary({"x": draws}, 0.9, np.zeros((2, 20), bool))["x"]
    assert found["median"] == found["mean"] == 205


def test_print_summary(capsys: pytest.CaptureFixture) -> None:
    model_chain().print_summary()
    out = capsys.readouterr().out
    assert all(word in out for word in ("mu", "sigma", "r_hat", "n_eff", "Number of divergences"))
    reference().print_summary()
    assert "x[2]" in capsys.readouterr().out


@pytest.mark.parametrize("chain", [model_chain, reference], ids=["model", "plain"])
def test_summary_is_numpyros(chain, capsys: pytest.CaptureFixture) -> None:
    """The statistics are those of NumPyro, and so is the table."""
    chain, samples = chain(), chain().get_samples(group_by_chain=True)
    samples = samples if isinstance(samples, dict) else {"x": samples}
    found, expected = chain.summary(0.8), diagnostics.summary(samples, prob=0.8, group_by_chain=True)
    assert list(found) == list(expected)
    jax.tree.map(np.testing.assert_array_equal, dict(found), dict(expected))
    diagnostics.print_summary(samples, prob=0.8, group_by_chain=True)
    table = capsys.readouterr().out
    assert repr(found) == f"{table}Number of divergences: {found.num_divergences}"
    assert found.num_divergences == chain.info.is_divergent.sum()
    if chain is model_chain():
        assert list(chain.summary(sites=["sigma"])) == ["sigma"]


def test_a_summary_of_three_draws_is_refused() -> None:
    chain = gaussian_chain(kernel=pmcmc.MALA(step_size=0.5), num_warmup=0, num_samples=3)
    with pytest.raises(ValueError, match=r"at least 4 draws per chain.*got 3\. Take more with extend"):
        chain.print_summary()
    assert chain.extend(1, progress_bar=False).summary()["x"]["mean"].shape == (3,)


@pytest.mark.filterwarnings("ignore")  # ArviZ's own dependencies
def test_arviz() -> None:
    data = model_chain().to_arviz()
    assert {"posterior", "sample_stats"} <= set(data.groups() if callable(data.groups) else data.children)
    assert dict(data.posterior.sizes) == {"chain": 4, "draw": 2000}
    assert set(data.posterior.data_vars) == {"mu", "sigma", "twice"}
    names = {"lp", "acceptance_rate", "diverging", "accept_margin", "step_size", "energy", "n_steps"}
    assert set(data.sample_stats.data_vars) == names
    assert data.attrs["inference_library"] == "pmcmc"
    plain = reference().to_arviz().posterior
    assert plain["x"].shape == (4, 2000, 3)


def test_arviz_1(monkeypatch: pytest.MonkeyPatch) -> None:
    """ArviZ 1.x: one dict of groups, attributes by group."""
    fake = SimpleNamespace(from_dict=lambda data, *, attrs=None, **labels: (data, attrs))
    monkeypatch.setitem(sys.modules, "arviz", fake)
    groups, attrs = reference().to_arviz()
    assert set(groups) == {"posterior", "sample_stats"}
    assert groups["posterior"]["x"].shape == (4, 2000, 3)
    assert all(x.shape == (4, 2000) for x in groups["sample_stats"].values())
    assert set(attrs) == {"/", "posterior", "sample_stats"}


def test_report_reads_as_prose() -> None:
    report = gaussian_chain(solver=MultipleShooting(4)).report
    assert report.decision == "shooting"
    for name in ("result", "residual", "num_sequential_steps", "num_iters", "num_sweeps", "certified_steps"):
        assert getattr(report, name).shape == (4,), name
    for name in ("near_ties", "lyapunov_exponent", "acceptance_rate", "num_divergent"):
        assert getattr(report, name).shape == (4,), name
    assert np.all(report.acceptance_rate > 0.5)
    assert min(report.warmup_seconds, report.pilot_seconds, report.compile_seconds, report.solve_seconds) >= 0
    text = str(report)
    for words in ("Decision: shooting.", "2,000 steps", "in 4 blocks", "Certificate: successful", "Lyapunov"):
        assert words in text, words


def test_starts_of_the_chains() -> None:
    """init_params for one or for every chain, without warm-up: with tiny steps they stay where they start."""
    kernel = pmcmc.HMC(step_size=1e-9, num_integration_steps=1)
    starts = {"mu": jnp.arange(4.0), "sigma": jnp.arange(4.0) / 10}
    common = dict(model_args=(OBSERVED,), kernel=kernel, solver=Sequential(), progress_bar=False)
    run = lambda init: pmcmc.parallel_chain(
        normal_model, 0, init_params=init, num_warmup=0, num_samples=3, num_chains=4, **common
    ).get_samples(group_by_chain=True)
    each, one = run(starts), run({"mu": 0.5, "sigma": 0.0})
    np.testing.assert_allclose(each["mu"][:, -1], starts["mu"], atol=1e-6)
    np.testing.assert_allclose(each["sigma"][:, -1], jnp.exp(starts["sigma"]), atol=1e-6)
    np.testing.assert_allclose(one["mu"], 0.5, atol=1e-6)


TINY = dict(kernel=pmcmc.HMC(step_size=1e-9, num_integration_steps=1), solver=Sequential(), progress_bar=False)
TINY |= dict(num_warmup=0, num_samples=3, num_chains=4)


def test_starts_of_numpyros_strategies() -> None:
    """Chains stay where NumPyro starts them; a function of the site is a strategy too."""
    run = lambda strategy: pmcmc.parallel_chain(
        normal_model, 0, model_args=(OBSERVED,), init_strategy=strategy, **TINY
    ).get_samples(group_by_chain=True)
    np.testing.assert_allclose(run(infer.init_to_value(values={"mu": 0.7, "sigma": 2.0}))["sigma"], 2.0, rtol=1e-6)
    median = run(infer.init_to_median(num_samples=1001))
    np.testing.assert_allclose(median["mu"], 0.0, atol=0.2)
    assert np.ptp(median["mu"][:, -1]) > 0  # one start for each chain
    assert np.all(np.abs(run(infer.init_to_uniform(radius=0.01))["mu"]) < 0.011)
    default = pmcmc.parallel_chain(normal_model, 0, model_args=(OBSERVED,), **TINY).get_samples(group_by_chain=True)
    np.testing.assert_array_equal(run(infer.init_to_uniform)["mu"], default["mu"])


def test_a_strategy_needs_no_derivative_that_nothing_uses() -> None:
    def loops():
        x = numpyro.sample("x", dist.Normal(0, 1).expand([2]).to_event(1))
        numpyro.factor("term", jax.lax.while_loop(lambda f: f > 0, lambda f: -0.5 * jnp.sum(x**2), 1.0))

    run = lambda kernel: pmcmc.parallel_chain(
        loops, 0, init_strategy=infer.init_to_median, **{**TINY, "kernel": pmcmc.Compose([(kernel, ["x"])])}
    ).get_samples()
    assert np.isfinite(run(pmcmc.RandomWalk(step_size=0.5))["x"]).all()
    with pytest.raises((TypeError, ValueError), match="differentiat"):
        run(pmcmc.MALA(step_size=0.5))


@pytest.mark.parametrize("num_warmup", [0, 20])
def test_starts_of_the_chains_of_a_density(num_warmup: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without warm-up chains stay where they start. With one its lanes start there in turn."""
    starts = {"a": np.arange(4.0), "b": jnp.arange(12.0).reshape(4, 3) / 10}
    logdensity = lambda p: -0.5 * (p["a"] ** 2 + jnp.sum(p["b"] ** 2))
    if not num_warmup:
        chain = pmcmc.sample(logdensity, starts, 0, init_per_chain=True, **TINY)
        for name, x in chain.get_samples(group_by_chain=True).items():
            np.testing.assert_allclose(x, np.broadcast_to(np.asarray(starts[name])[:, None], x.shape), atol=1e-6)
        return
    seen, other = [], reference()
    monkeypatch.setattr(api, "sample_new", lambda source, key, starts, *rest: seen.append(starts) or other)
    pmcmc.sample(logdensity, starts, 0, init_per_chain=True, num_chains=4)
    for name, x in starts.items():
        np.testing.assert_array_equal(seen[0].find()[name], np.concatenate([x] * 8))
