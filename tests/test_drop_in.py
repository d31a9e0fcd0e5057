"""`pmcmc.ParallelMCMC` instead of NumPyro's MCMC: what reads its draws, how runs continue, and what is refused."""

import inspect
import pickle
import re
from copy import copy
from dataclasses import dataclass, replace
from functools import cache, partial

import blackjax
import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import pytest
from numpyro.infer import HMC, MCMC, NUTS, BarkerMH, Predictive, init_to_median, init_to_value, log_likelihood
from numpyro.infer.mcmc import MCMCKernel
from numpyro.infer.util import constrain_fn, potential_energy

import pmcmc
from pmcmc import numpyro_samplers
from pmcmc.drop_in import ParallelMCMC
from pmcmc.kernels import ParallelLeapfrog
from pmcmc.numpyro_samplers import _INSTEAD, translate
from pmcmc.recurrence import HutchinsonDiagonal, MultipleShooting, Newton, Sequential
from pmcmc.warmup.settlement import Verdict


@pytest.fixture(autouse=True)
def numpyro_broadcasts_over_ranks():
    """Allow rank promotion, which NumPyro's own code needs."""
    with jax.numpy_rank_promotion("allow"):
        yield


Y = np.array([0.8, 1.4, -0.2, 1.1, 0.9])
SIZES = dict(num_warmup=100, num_samples=90, num_chains=2, progress_bar=False)


def model(y=None, num=5):
    mu = numpyro.sample("mu", dist.Normal(0, 1))
    sigma = numpyro.sample("sigma", dist.HalfNormal(1.0))
    numpyro.deterministic("twice", 2 * mu)
    with numpyro.plate("data", num):
        numpyro.sample("y", dist.Normal(mu, sigma), obs=y)


def make(**options) -> ParallelMCMC:
    return ParallelMCMC(model, **{**SIZES, "kernel": pmcmc.HMC(), "solver": Sequential(), **options})


@cache
def finished() -> ParallelMCMC:
    mcmc = make(thinning=3)
    mcmc.run(jax.random.key(0), Y, extra_fields=("accept_prob", "energy", "z.sigma", "adapt_state.step_size"))
    return mcmc


def test_is_a_numpyro_mcmc() -> None:
    """The private names by which NumPyro's methods and ArviZ read the results of a run still exist."""
    mcmc = finished()
    assert isinstance(mcmc, MCMC)
    assert pmcmc.ParallelMCMC is ParallelMCMC
    theirs = MCMC(NUTS(model), num_warmup=5, num_samples=6, num_chains=1, progress_bar=False)
    theirs.run(jax.random.key(0), Y)
    read = ("_states", "_states_flat", "_last_state", "_args", "_kwargs", "_warmup_state", "_sample_field")
    for name in (*read, "num_chains", "num_samples", "thinning", "sampler"):
        assert hasattr(mcmc, name), name
        assert hasattr(theirs, name), name
    assert theirs._sample_field == mcmc._sample_field == "z"
    assert set(theirs._states) == {"z", "diverging"}
    assert theirs._states["z"]["mu"].shape == (1, 6)
    assert set(mcmc._states["z"]) == set(theirs._states["z"])
    assert theirs._last_state.z.keys() == mcmc.last_state.z.keys()
    ours, names = inspect.signature(ParallelMCMC).parameters, inspect.signature(MCMC).parameters
    assert {name: p.default for name, p in names.items()}.items() <= {n: p.default for n, p in ours.items()}.items()
    for method in ("run", "warmup"):
        assert set(inspect.signature(getattr(MCMC, method)).parameters) == set(
            inspect.signature(getattr(ParallelMCMC, method)).parameters
        )


def test_draws_and_fields() -> None:
    mcmc, chain = finished(), finished().chain
    samples, grouped = mcmc.get_samples(), mcmc.get_samples(group_by_chain=True)
    assert set(samples) == {"mu", "sigma", "twice"}
    assert samples["mu"].shape == (60,)
    for name, x in grouped.items():
        assert x.shape == (2, 30)
        np.testing.assert_array_equal(x, chain.get_samples(group_by_chain=True)[name])
        np.testing.assert_array_equal(x.reshape(-1), samples[name])
    fields = mcmc.get_extra_fields(group_by_chain=True)
    assert set(fields) == {"diverging", "accept_prob", "energy", "z.sigma", "adapt_state.step_size"}
    assert all(x.shape == (2, 30) for x in fields.values())
    np.testing.assert_allclose(jnp.exp(fields["z.sigma"]), grouped["sigma"])
    assert np.all(fields["adapt_state.step_size"] == chain.kernel.step_size)


def test_same_key_same_chain_as_parallel_chain() -> None:
    chain = pmcmc.parallel_chain(
        model, jax.random.key(0), model_args=(Y,), kernel=pmcmc.HMC(), solver=Sequential(), thinning=3, **SIZES
    )
    jax.tree.map(np.testing.assert_array_equal, finished().get_samples(), chain.get_samples())


def test_a_site_left_out() -> None:
    mcmc = make(num_warmup=0, kernel=pmcmc.HMC(step_size=0.1))
    mcmc.run(jax.random.key(0), Y, extra_fields=("~z.twice",))
    assert set(mcmc.get_samples()) == {"mu", "sigma"}
    mcmc.run(jax.random.key(0), Y, extra_fields=iter(("~z.twice", "energy")))  # read more than once
    assert set(mcmc.get_samples()) == {"mu", "sigma"}
    assert set(mcmc.get_extra_fields()) == {"diverging", "energy"}


def test_print_summary(capsys: pytest.CaptureFixture) -> None:
    finished().print_summary()
    shown = capsys.readouterr().out
    assert "mu" in shown
    assert "r_hat" in shown
    assert "Number of divergences" in shown
    assert "twice" not in shown  # no deterministic sites, as in NumPyro
    finished().print_summary(exclude_deterministic=False)
    assert "twice" in capsys.readouterr().out


def test_predictive_and_log_likelihood() -> None:
    mcmc = finished()
    samples = mcmc.get_samples()
    predicted = Predictive(model, samples)(jax.random.key(1))
    assert predicted["y"].shape == (60, 5)
    found = log_likelihood(model, samples, Y)["y"]
    expected = dist.Normal(samples["mu"][:, None], samples["sigma"][:, None]).log_prob(Y[None])
    np.testing.assert_allclose(found, expected)


@pytest.mark.filterwarnings("ignore")  # ArviZ's own dependencies
def test_arviz_from_numpyro() -> None:
    az = pytest.importorskip("arviz")
    data = az.from_numpyro(finished(), log_likelihood=True)
    assert dict(data.posterior.sizes) == {"chain": 2, "draw": 30}
    assert set(data.posterior.data_vars) == {"mu", "sigma", "twice"}
    assert data.log_likelihood["y"].dims == ("chain", "draw", "data")
    assert {"diverging", "acceptance_rate", "step_size", "energy"} <= set(data.sample_stats.data_vars)
    assert data.observed_data["y"].dims == ("data",)
    assert np.isfinite(az.loo(data).elpd_loo if hasattr(az.loo(data), "elpd_loo") else az.loo(data).elpd)


def test_going_on_with_its_own_key_is_one_long_run() -> None:
    """It works as in NumPyro's documentation of post_warmup_state; each run returns its own draws."""
    mcmc = make()
    mcmc.run(jax.random.key(0), Y)
    first = mcmc.get_samples(group_by_chain=True)
    mcmc.post_warmup_state = mcmc.last_state
    mcmc.run(mcmc.post_warmup_state.rng_key, Y)
    second = mcmc.get_samples(group_by_chain=True)
    long = make(num_samples=180)
    long.run(jax.random.key(0), Y)
    both = jax.tree.map(lambda a, b: np.concatenate([a, b], axis=1), first, second)
    close = lambda a, b: np.testing.assert_allclose(a, b, rtol=0, atol=1e-9)
    jax.tree.map(close, both, long.get_samples(group_by_chain=True))


@pytest.mark.parametrize(("thinning", "kept"), [(4, (22, 23, 22)), (7, (12, 13, 13)), (90, (1, 1, 1))])
def test_thinning_goes_on_counting(thinning: int, kept: tuple[int, ...]) -> None:
    """Three runs keep what one run of their total length keeps, whether or not thinning divides the steps of a run."""
    options = dict(num_warmup=0, kernel=pmcmc.HMC(step_size=0.3, num_integration_steps=2), thinning=thinning)
    mcmc, parts = make(**options), []
    for number in range(3):
        mcmc.run(mcmc.last_state.rng_key if number else jax.random.key(0), Y)
        parts.append(mcmc.get_samples(group_by_chain=True)["mu"])
        mcmc.post_warmup_state = mcmc.last_state
        assert mcmc.chain.verify() if kept[number] > 1 else True
    assert tuple(part.shape[1] for part in parts) == kept
    long = make(num_samples=270, **options)
    long.run(jax.random.key(0), Y)
    expected = long.get_samples(group_by_chain=True)["mu"]
    np.testing.assert_allclose(np.concatenate(parts, axis=1), expected, rtol=0, atol=1e-9)


def test_going_on_with_any_other_key_draws_new_noise() -> None:
    """Even with the key of the first run: with the same noise the chains would merge with their own past."""
    mcmc = make(thinning=4)
    mcmc.run(jax.random.key(0), Y)
    first = mcmc.get_samples()["mu"]
    mcmc.post_warmup_state = mcmc.last_state
    mcmc.run(jax.random.key(0), Y)
    assert len(mcmc.get_samples()["mu"]) == len(first) == 44  # 90 // 4 in each chain and run
    assert not np.any(np.isclose(mcmc.get_samples()["mu"], first, atol=1e-6))
    assert mcmc.chain.report.warmup_seconds == 0


def test_warmup_then_run() -> None:
    mcmc = make()
    mcmc.warmup(jax.random.key(0), Y)
    assert mcmc.post_warmup_state is mcmc.last_state
    mcmc.run(mcmc.post_warmup_state.rng_key, Y)
    whole = make()
    whole.run(jax.random.key(0), Y)
    jax.tree.map(np.testing.assert_array_equal, mcmc.get_samples(), whole.get_samples())
    mcmc.run(mcmc.post_warmup_state.rng_key, Y + 1)  # new data, the same tuned kernel
    assert mcmc.get_samples()["mu"].mean() > whole.get_samples()["mu"].mean() + 0.3


def test_states_that_do_not_fit() -> None:
    mcmc = make(num_chains=1)
    mcmc.warmup(jax.random.key(0), Y)
    assert jnp.shape(mcmc.last_state.z["mu"]) == ()  # one chain has no leading axis, as in NumPyro
    other = make()
    other.post_warmup_state = mcmc.last_state
    with pytest.raises(ValueError, match=r"another number of chains.*set it to None"):
        other.run(jax.random.key(0), Y)
    other.post_warmup_state = ("a", "state")
    with pytest.raises(TypeError, match=r"last_state of a ParallelMCMC.*init_params"):
        other.run(jax.random.key(0), Y)
    with pytest.raises(ValueError, match="collect_warmup=True is not possible"):
        mcmc.warmup(jax.random.key(0), Y, collect_warmup=True)
    with pytest.raises(ValueError, match=r"call run\(\) first"):
        _ = make().chain


def test_a_state_whose_values_were_changed() -> None:
    for num_chains in (1, 2):
        mcmc = make(num_warmup=0, num_samples=10, num_chains=num_chains, kernel=pmcmc.HMC(step_size=0.3))
        mcmc.run(jax.random.key(0), Y)
        state = mcmc.last_state
        for z in ({**state.z, "mu": state.z["mu"] + 0.1}, {"mu": state.z["mu"]}, {**state.z, "mu": jnp.zeros(3)}):
            mcmc.post_warmup_state = state._replace(z=z)
            with pytest.raises(ValueError, match=r"z of post_warmup_state was changed.*as init_params= to run\(\)"):
                mcmc.run(jax.random.key(1), Y)
        mcmc.post_warmup_state = state._replace(rng_key=jax.random.key(2))
        mcmc.run(jax.random.key(1), Y)


def test_functions_of_the_sampler() -> None:
    """NumPyro makes them in its own run; here they follow from the arguments that they get."""
    kernel = NUTS(model)
    mcmc = ParallelMCMC(kernel, **SIZES)
    mcmc.run(jax.random.key(0), Y)
    z = mcmc.last_state.z
    last = jax.tree.map(lambda x: x[:, -1], mcmc.get_samples(group_by_chain=True))
    close = lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-9)
    for name in ("postprocess_fn", "get_constrain_fn"):
        jax.tree.map(close, jax.vmap(getattr(mcmc.sampler, name)((Y,), {}))(z), last)
    close(jax.vmap(mcmc.sampler.get_potential_fn((Y,), {}))(z), mcmc.last_state.potential_energy)
    one, other = jax.tree.map(lambda x: x[0], z), ((Y + 1,), {"num": 5})
    close(mcmc.sampler.get_potential_fn(*other)(one), potential_energy(model, *other, one))
    jax.tree.map(
        close, mcmc.sampler.postprocess_fn(*other)(one), constrain_fn(model, *other, one, return_deterministic=True)
    )
    assert kernel.postprocess_fn((Y,), {})(one) is one  # the user's own object is NumPyro's to change


def test_pickles() -> None:
    """As in NumPyro, draws and settings; the chains are left out, and said to be."""
    mcmc = pickle.loads(pickle.dumps(finished()))
    jax.tree.map(np.testing.assert_array_equal, mcmc.get_samples(), finished().get_samples())
    assert set(mcmc.get_extra_fields()) == set(finished().get_extra_fields())
    mcmc.print_summary()
    with pytest.raises(ValueError, match=r"deeply copied ParallelMCMC has no chain: save it by mcmc.chain.save"):
        _ = mcmc.chain
    state = pickle.loads(pickle.dumps(finished().last_state))
    for found in (state, mcmc.last_state):
        jax.tree.map(np.testing.assert_array_equal, found[:2], finished().last_state[:2])
        assert found.rng_key == finished().last_state.rng_key
        with pytest.raises(ValueError, match="a pickled state has no adapt_state"):
            _ = found.adapt_state
        mcmc.post_warmup_state = found
        with pytest.raises(ValueError, match=r"post_warmup_state was pickled.*set it to None to warm up again"):
            mcmc.run(jax.random.key(0), Y)
    mcmc.post_warmup_state = None
    mcmc.run(jax.random.key(0), Y)
    jax.tree.map(np.testing.assert_array_equal, mcmc.get_samples(), finished().get_samples())
    assert mcmc.chain.report.num_steps == 90
    pickle.loads(pickle.dumps(ParallelMCMC(NUTS(model), **SIZES)))
    assert copy(finished()).chain is finished().chain
    assert copy(finished().last_state).chains is finished().last_state.chains


def test_data_that_a_state_cannot_go_on_with() -> None:
    mcmc = make(num_warmup=0, num_samples=10, kernel=pmcmc.HMC(step_size=0.3, num_integration_steps=2))
    mcmc.run(jax.random.key(0), Y)
    mcmc.post_warmup_state = mcmc.last_state
    with pytest.raises(ValueError, match=r"with other data, and .* cannot be used at any start.*state to None\.$"):
        mcmc.run(jax.random.key(1), np.full_like(Y, 1e200))  # its density is zero


def test_a_state_of_a_kernel_with_a_typed_key() -> None:
    solver = Newton(HutchinsonDiagonal(jax.random.key(0)))
    kernel = pmcmc.HMC(step_size=0.3, num_integration_steps=2, leapfrog=ParallelLeapfrog(2, solver))
    mcmc = make(num_warmup=0, num_samples=10, kernel=kernel)
    mcmc.run(jax.random.key(0), Y)
    mcmc.post_warmup_state = mcmc.last_state
    mcmc.run(jax.random.key(1), Y)
    other = make(kernel=replace(kernel, leapfrog=ParallelLeapfrog(2, Newton(HutchinsonDiagonal(jax.random.key(1))))))
    other.post_warmup_state = mcmc.last_state
    with pytest.raises(ValueError, match="make it with the same sampler"):
        other.run(jax.random.key(1), Y)


@pytest.mark.filterwarnings("ignore:.*were divergent")
@pytest.mark.parametrize(
    ("kernel", "words"),
    [
        (pmcmc.HMC(), None),
        (pmcmc.HMC(step_size=0.3), None),
        (pmcmc.HMC(step_size=0.4), r"a state of HMC\(step_size=.*0\.3.*samples by HMC\(step_size=0\.4.*to None"),
        (pmcmc.HMC(num_integration_steps=3), r"a state of HMC\(.*samples by HMC\(.*num_integration_steps=3"),
        (pmcmc.MALA(), "a state of HMC, and this ParallelMCMC samples by MALA: make it with the same"),
        (pmcmc.NUTS(), "a state of HMC, and this ParallelMCMC samples by NUTS"),
        (None, None),
    ],
    ids=str,
)
def test_states_of_another_kernel(kernel, words: str | None) -> None:
    """Settings that the new sampler leaves open are taken from the state; the others must be equal."""
    maker = make(num_warmup=0, kernel=pmcmc.HMC(step_size=0.3, num_integration_steps=2))
    maker.run(jax.random.key(0), Y)
    other = make(kernel=kernel)
    other.post_warmup_state = maker.last_state
    if words is None:
        other.run(jax.random.key(1), Y)
        assert other.chain.kernel.step_size == 0.3
    else:
        with pytest.raises(ValueError, match=words):
            other.run(jax.random.key(1), Y)


def around(value: float) -> pmcmc.Kernel:
    drawn = pmcmc.kernels.NormalUpdate(lambda state: (value, 0.2))
    return pmcmc.Compose([(pmcmc.HMC(step_size=0.3, num_integration_steps=2), ["sigma"]), pmcmc.Gibbs({"mu": drawn})])


@pytest.mark.parametrize(
    ("first", "second", "words"),
    [
        (around(1.0), around(1.0), None),
        (around(1.0), around(9.0), "functions in the kernel compute something else"),
        (pmcmc.from_blackjax(blackjax.mala, step_size=0.1), pmcmc.from_blackjax(blackjax.mala, step_size=0.1), None),
        (
            pmcmc.from_blackjax(blackjax.mala, step_size=0.1),
            pmcmc.from_blackjax(blackjax.barker_proposal, step_size=0.1),
            "a state of BlackJAX.*samples by BlackJAX",
        ),
    ],
    ids=["equal functions", "other functions", "the same algorithm", "another algorithm"],
)
def test_states_of_kernels_with_functions(first: pmcmc.Kernel, second: pmcmc.Kernel, words: str | None) -> None:
    """Functions are those of this sampler, or refused: the state does not bring its own."""
    maker, other = (make(kernel=kernel, num_warmup=0, num_samples=5) for kernel in (first, second))
    maker.run(jax.random.key(0), Y)
    other.post_warmup_state = maker.last_state
    if words is None:
        other.run(jax.random.key(1), Y)
        assert other.chain.state.source.given is second
    else:
        with pytest.raises(ValueError, match=words):
            other.run(jax.random.key(1), Y)


@pmcmc.register_dataclass
@dataclass(frozen=True)
class OwnKernel(pmcmc.HMC):
    """A kernel of the user's own, whose programs are found by all that a step computes, data included."""


def test_other_data_are_no_change_of_a_kernel_of_the_users_own() -> None:
    mcmc = make(kernel=OwnKernel(step_size=0.3, num_integration_steps=2), num_warmup=0, num_samples=5)
    mcmc.run(jax.random.key(0), Y)
    mcmc.post_warmup_state = mcmc.last_state
    mcmc.run(jax.random.key(1), np.append(Y, 1.0), 6)
    mcmc.chain.extend(5, progress_bar=False)


def test_states_in_another_metric() -> None:
    """Warm-up makes a metric the coordinates of the target, where it is compared to rounding."""
    fixed = lambda metric, **rest: ParallelMCMC(
        NUTS(model, inverse_mass_matrix=metric, adapt_mass_matrix=False, dense_mass=metric.ndim == 2),
        **{**SIZES, "num_samples": 5, **rest},
    )
    first = fixed(jnp.array([0.1, 0.3]))
    first.warmup(jax.random.key(0), Y)
    for metric in ([0.1, 0.4], [[0.1, 0.0], [0.0, 0.3]]):
        second = fixed(jnp.array(metric))
        second.post_warmup_state = first.last_state
        with pytest.raises(ValueError, match="another metric than the inverse_mass_matrix of this ParallelMCMC"):
            second.run(jax.random.key(1), Y)
    again = fixed(jnp.array([0.1, 0.3]))
    again.post_warmup_state = first.last_state
    again.run(jax.random.key(1), Y)


def test_new_data_where_a_density_without_a_derivative_is_not_finite() -> None:
    """The sentence is about the data, and not about a derivative that the kernel does not take."""

    def without_derivative(y):
        mu = numpyro.sample("mu", dist.Normal(0, 1))
        shape = jax.ShapeDtypeStruct((), mu.dtype)
        value = jax.pure_callback(lambda x: np.asarray(x), shape, mu, vmap_method="sequential")
        numpyro.factor("likelihood", -0.5 * jnp.sum((y - value) ** 2))

    mcmc = ParallelMCMC(without_derivative, **{**SIZES, "num_warmup": 0}, kernel=pmcmc.RandomWalk(step_size=0.5))
    mcmc.run(jax.random.key(0), Y)
    mcmc.post_warmup_state = mcmc.last_state
    with pytest.raises(ValueError, match="post_warmup_state was made with other data"):
        mcmc.run(jax.random.key(1), np.full_like(Y, np.nan))


@pytest.mark.slow
def test_states_fit_what_warm_up_made_of_the_same_sampler() -> None:
    """Numbers in the state have the precision of the chain, and functions may have been defined again."""

    def compose() -> ParallelMCMC:
        scale = pmcmc.kernels.CustomUpdate(lambda key: jax.random.normal(key), lambda state, z: jnp.exp(0.1 * z))
        kernel = pmcmc.Compose(
            [(pmcmc.HMC(num_integration_steps=2), ["mu"]), (pmcmc.Gibbs({"sigma": scale}), ["sigma"])]
        )
        return make(kernel=kernel)

    for sampler in (lambda: ParallelMCMC(HMC(model, num_steps=3, trajectory_length=None), **SIZES), compose):
        first, second = sampler(), sampler()
        first.warmup(jax.random.key(0), Y)
        second.post_warmup_state = first.last_state
        second.run(jax.random.key(1), Y)
        assert second.chain.report.warmup_seconds == 0


def test_keys_and_starts() -> None:
    """A batch of keys; starting values given, or found by the sampler's strategy: with tiny steps chains stay there."""
    tiny = dict(num_warmup=0, num_samples=2)
    sampler = lambda **options: NUTS(model, step_size=1e-9, max_tree_depth=1, **options)
    start = {"mu": jnp.array([0.1, 0.2]), "sigma": jnp.array([0.0, 0.3])}
    mcmc = ParallelMCMC(sampler(), **{**SIZES, **tiny})
    mcmc.run(jax.random.split(jax.random.key(0), 2), Y, init_params=start)
    np.testing.assert_allclose(mcmc.get_samples(group_by_chain=True)["mu"][:, -1], start["mu"], atol=1e-6)
    value = ParallelMCMC(sampler(init_strategy=init_to_value(values={"mu": 0.7, "sigma": 2.0})), **{**SIZES, **tiny})
    value.run(jax.random.PRNGKey(0), Y)
    np.testing.assert_allclose(value.get_samples()["sigma"], 2.0, rtol=1e-6)


def test_what_numpyros_kernels_become() -> None:
    kernel, warmup = translate(NUTS(model, target_accept_prob=0.9, dense_mass=True, max_tree_depth=7), 100)
    assert kernel == pmcmc.NUTS(max_num_doublings=7)
    assert (warmup.dense, warmup.target_acceptance_rate) == (True, 0.9)
    assert translate(NUTS(model), 100) == (pmcmc.NUTS(), pmcmc.EnsembleAdaptation(False, 0.8))
    assert translate(NUTS(model, step_size=0.3), 100)[0].step_size is None
    assert translate(NUTS(model, step_size=0.3, adapt_step_size=False), 100)[0].step_size == 0.3
    assert translate(NUTS(model, step_size=0.3), 0)[0].step_size == 0.3
    assert translate(NUTS(model, max_tree_depth=(5, 8)), 100)[0].max_num_doublings == 8
    assert translate(HMC(model), 100)[0] == pmcmc.HMC()
    assert translate(HMC(model, num_steps=5, trajectory_length=None), 100)[0].num_integration_steps == 5
    fixed = HMC(model, step_size=0.5, adapt_step_size=False, trajectory_length=1.2)
    assert translate(fixed, 100)[0] == pmcmc.HMC(step_size=1.2 / 3, num_integration_steps=3)
    assert translate(HMC(model, trajectory_length=1.2), 100)[0] == pmcmc.HMC(trajectory_length=1.2)
    unit = r"target_acceptance_rate must lie between 0 and 1, both excluded, got 1\.5"
    with pytest.raises(ValueError, match=unit):
        translate(NUTS(model, target_accept_prob=1.5), 100)
    with pytest.raises(ValueError, match=unit):
        ParallelMCMC(NUTS(model, target_accept_prob=1.5), warmup=pmcmc.WindowAdaptation(), num_warmup=9, num_samples=9)
    with pytest.warns(UserWarning, match="step size can't be adapted"):
        both = HMC(model, num_steps=4, trajectory_length=1.0)
    assert translate(both, 100)[0] == pmcmc.HMC(step_size=0.25, num_integration_steps=4)
    assert translate(HMC(model, num_steps=4, step_size=0.5, adapt_step_size=False), 100)[0] == pmcmc.HMC(0.5, 4)
    metric = jnp.array([1.0, 2.0])
    for sampler in (HMC, NUTS):
        kept = translate(sampler(model, inverse_mass_matrix=metric, adapt_mass_matrix=False), 100)[0]
        np.testing.assert_array_equal(kept.inverse_mass_matrix, metric)
        assert translate(sampler(model, adapt_mass_matrix=False), 100)[0].inverse_mass_matrix == 1.0
        for dense, expected in ((False, np.diag(FULL)), (True, FULL)):
            full = sampler(model, inverse_mass_matrix=FULL, adapt_mass_matrix=False, dense_mass=dense)
            np.testing.assert_array_equal(translate(full, 100)[0].inverse_mass_matrix, expected)


BLOCKS = {("mu",): jnp.ones(1), ("sigma",): jnp.ones(1)}
DIAGONAL, FULL = np.array([4.0, 0.25]), np.array([[1.0, 0.3], [0.3, 0.5]])


def quadratic(inverse_mass_matrix, r):
    return 0.5 * jnp.sum(r**2)


@pytest.mark.parametrize(
    ("make_sampler", "error", "words"),
    [
        (lambda: BarkerMH(model), TypeError, r"BarkerMH has no counterpart.*Pass the model and a pmcmc kernel"),
        (lambda: NUTS(potential_fn=lambda z: z**2), ValueError, r"use pmcmc.sample\(lambda"),
        (lambda: NUTS(model, dense_mass=[("mu", "sigma")]), ValueError, "dense_mass by blocks.*True or False"),
        (lambda: NUTS(model, kinetic_fn=quadratic), ValueError, "kinetic_fn must be the Euclidean one: leave it out"),
        (lambda: NUTS(model, forward_mode_differentiation=True), ValueError, "numpyro's or jax's scan"),
        (
            lambda: HMC(model, inverse_mass_matrix=BLOCKS, adapt_mass_matrix=False),
            ValueError,
            r"pass an array \(D,\)",
        ),
        (lambda: 3.0, TypeError, r"sampler must be numpyro.infer.NUTS\(model\)"),
    ],
)
def test_samplers_without_a_counterpart(make_sampler, error, words) -> None:
    options = {**SIZES, "num_samples": 10}
    if words.startswith("sampler must"):
        with pytest.raises(TypeError):  # by the annotation here, by pmcmc's own message in production
            ParallelMCMC(make_sampler(), **options)
        return
    with pytest.raises(error, match=words):
        ParallelMCMC(make_sampler(), **options)


@pytest.mark.parametrize("name", sorted(set(numpyro.infer.__all__) - {"HMC", "NUTS"}))
def test_what_to_write_instead_of_each_kernel(name: str) -> None:
    kernel = getattr(numpyro.infer, name)
    if not (isinstance(kernel, type) and issubclass(kernel, MCMCKernel)):
        return
    written, rest = _INSTEAD[name]
    update = pmcmc.kernels.NormalUpdate(lambda state: (0.0, 1.0))
    names = dict(pmcmc=pmcmc, blackjax=blackjax, update=update, other_sites=["mu"], sites=["mu"])
    for source in (written, *re.findall(r"kernel=(pmcmc\.\S*\([^;]*\))(?= if |$)", rest)):
        assert isinstance(eval(source, names), pmcmc.Kernel)
    sampler = object.__new__(type("Derived", (kernel,), {}))
    with pytest.raises(TypeError, match=re.escape(f"as in ParallelMCMC(model, kernel={written}, ...){rest}.")):
        translate(sampler, 100)


def test_options_of_adaptation_beside_a_warmup() -> None:
    """A warm-up of the user's own keeps what NumPyro's kernel says, where it leaves it open."""
    warmups = pmcmc.warmup
    asked = dict(target_accept_prob=0.99, dense_mass=True)
    given = lambda warmup, **options: ParallelMCMC(NUTS(model, **options), **SIZES, warmup=warmup)._warmup
    assert given(warmups.WindowAdaptation(), **asked) == warmups.WindowAdaptation(True, 0.99)
    assert given(warmups.EnsembleAdaptation()) == warmups.EnsembleAdaptation(False, 0.8)
    assert given(warmups.EnsembleAdaptation(True, 0.9)) == warmups.EnsembleAdaptation(True, 0.9)  # NumPyro's defaults
    with pytest.raises(ValueError, match=r"target_accept_prob=0.99 of NUTS does not go with .*leave one of them out"):
        given(warmups.EnsembleAdaptation(target_acceptance_rate=0.9), **asked)
    with pytest.raises(ValueError, match=r"dense_mass=True of NUTS does not go with warmup=Pathfinder"):
        given(warmups.Pathfinder(), dense_mass=True)


def test_every_option_of_numpyros_kernels_is_kept_named_or_refused() -> None:
    said = f"{ParallelMCMC.__doc__}{inspect.getsource(numpyro_samplers)}"
    options = [*inspect.signature(HMC.__init__).parameters, *inspect.signature(NUTS.__init__).parameters]
    assert [name for name in options if name != "self" and name not in said] == []


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (dict(sampler=NUTS(model)), "both NUTS and kernel= choose the kernel"),
        (dict(postprocess_fn=lambda z: z), "numpyro.deterministic"),
        (dict(num_warmup=0), "pass step_size="),
        (dict(num_samples=2, thinning=3), "greater than thinning"),
    ],
)
def test_options_that_do_not_go_together(change, words) -> None:
    sampler = change.get("sampler", model)
    with pytest.raises(ValueError, match=words):
        ParallelMCMC(**{**SIZES, "kernel": pmcmc.HMC(), **change, "sampler": sampler}).run(jax.random.key(0), Y)


def test_fields_that_are_not_there() -> None:
    with pytest.raises(ValueError, match=r"HMC has no extra_fields \['tree'\]: expected") as caught:
        make().run(jax.random.key(0), Y, extra_fields=("tree",))
    for name in (*ACCEPTED, "'z.site' for", r"\['mu', 'sigma'\]", "'~z.site' to leave", r"\['mu', 'sigma', 'twice'\]"):
        assert re.search(name, str(caught.value)), name
    with pytest.raises(
        ValueError, match=r"'z.twice' names no site of the model: expected one out of \['mu', 'sigma'\]"
    ):
        make().run(jax.random.key(0), Y, extra_fields=("z.twice",))


def test_the_step_size_of_kernels_without_one_is_no_field() -> None:
    with pytest.raises(
        ValueError, match=r"Compose has no extra_fields \['adapt_state.step_size'\]: expected"
    ) as caught:
        make(kernel=around(1.0), num_warmup=0).run(jax.random.key(0), Y, extra_fields=("adapt_state.step_size",))
    assert str(caught.value).count("adapt_state.step_size") == 1


@pytest.mark.parametrize(
    ("kernel", "takes_leapfrogs"),
    [
        (pmcmc.MALA(step_size=0.1), False),
        (pmcmc.RandomWalk(step_size=0.1), False),
        (pmcmc.from_blackjax(blackjax.mala, step_size=0.1), False),
        (pmcmc.from_blackjax(blackjax.nuts, step_size=0.1, inverse_mass_matrix=jnp.ones(2)), True),
        (pmcmc.HMC(step_size=0.1, num_integration_steps=2), True),
        (pmcmc.NUTS(step_size=0.1), True),
    ],
    ids=["MALA", "RandomWalk", "BlackJAX's MALA", "BlackJAX's NUTS", "HMC", "NUTS"],
)
def test_step_sizes_of_other_units_are_not_in_adapt_state(kernel, takes_leapfrogs: bool) -> None:
    """MALA's h is that of a leapfrog step of sqrt(2 h), and a random walk's is a standard deviation."""
    mcmc = make(kernel=kernel, num_warmup=0, num_samples=5)
    asked = partial(mcmc.run, jax.random.key(0), Y, extra_fields=("adapt_state.step_size",))
    if takes_leapfrogs:
        asked()
        assert np.all(mcmc.last_state.adapt_state.step_size == 0.1)
    else:
        with pytest.raises(ValueError, match="has no extra_fields"):
            asked()
        mcmc.run(jax.random.key(0), Y)
        assert mcmc.last_state.adapt_state is None


# The message lists all fields that exist.
ACCEPTED = ("z", "diverging", "accept_prob", "potential_energy", "energy", "num_steps", "adapt_state.step_size")


def test_every_field_that_is_named_is_accepted() -> None:
    mcmc = make(num_samples=5)
    sites = ("z.mu", "~z.twice", "z.sigma", "~z.mu")
    mcmc.run(jax.random.key(0), Y, extra_fields=(*ACCEPTED, *sites))
    assert set(mcmc.get_extra_fields()) == {*ACCEPTED, "z.mu", "z.sigma"} - {"z"}
    assert set(mcmc.get_samples()) == {"sigma"}
    assert set(ACCEPTED) == {"z", *pmcmc.HMC.extra_fields, "adapt_state.step_size"}


@pytest.mark.parametrize(("sampler", "metric"), [(NUTS, FULL), (HMC, DIAGONAL)], ids=["NUTS, full", "HMC, diagonal"])
def test_a_given_metric_is_kept_while_the_step_size_is_tuned(sampler, metric) -> None:
    """NumPyro's `adapt_state` is read and passed to a second sampler."""
    kept = sampler(model, inverse_mass_matrix=metric, adapt_mass_matrix=False, dense_mass=metric.ndim == 2)
    options = {**SIZES, "num_samples": 40}
    mcmc = ParallelMCMC(kept, **options)
    mcmc.warmup(jax.random.key(0), Y)
    mcmc.run(mcmc.post_warmup_state.rng_key, Y, extra_fields=("adapt_state.step_size", "energy"))
    state = mcmc.last_state.adapt_state
    assert list(state.inverse_mass_matrix) == [("mu", "sigma")]
    np.testing.assert_allclose(state.inverse_mass_matrix["mu", "sigma"], jnp.stack([metric, metric]), rtol=1e-12)
    assert state.step_size.shape == (2,)
    np.testing.assert_array_equal(state.step_size, mcmc.get_extra_fields(True)["adapt_state.step_size"][:, -1])
    again = sampler(
        model,
        step_size=state.step_size[0],
        inverse_mass_matrix=jax.tree.map(lambda x: x[0], state.inverse_mass_matrix),
        adapt_step_size=False,
        adapt_mass_matrix=False,
        dense_mass=metric.ndim == 2,
        **({"num_steps": 4} if sampler is HMC else {}),
    )
    theirs = MCMC(again, num_warmup=0, num_samples=2, progress_bar=False)
    theirs.run(jax.random.key(1), Y)
    taken = theirs.last_state.adapt_state.inverse_mass_matrix
    np.testing.assert_allclose(taken["mu", "sigma"], metric, rtol=1e-12)
    second = ParallelMCMC(again, **{**options, "num_warmup": 0, "num_chains": 1})
    second.run(jax.random.key(1), Y, init_params={"mu": 0.5, "sigma": 0.0})
    state = second.last_state.adapt_state  # the state of one chain has no leading axis
    np.testing.assert_allclose(state.inverse_mass_matrix["mu", "sigma"], metric, rtol=1e-12)
    assert state.step_size.shape == ()
    assert second.chain.report.acceptance_rate.mean() > 0.3


def test_a_metric_of_the_warmup_is_kept_beside_a_sampler_that_adapts_none() -> None:
    sampler = NUTS(model, adapt_mass_matrix=False)
    mcmc = ParallelMCMC(sampler, **SIZES, warmup=pmcmc.EnsembleAdaptation(inverse_mass_matrix=DIAGONAL))
    mcmc.warmup(jax.random.key(0), Y)
    found = mcmc.last_state.adapt_state.inverse_mass_matrix["mu", "sigma"]
    np.testing.assert_allclose(found, np.stack([DIAGONAL, DIAGONAL]), rtol=1e-12)


def test_what_warmup_had_to_say_stays_with_its_state(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pmcmc.warmup.ensemble.judge_path", lambda *found: Verdict(False, False))
    mcmc = ParallelMCMC(model, num_warmup=20, num_samples=50, progress_bar=False)
    with pytest.warns(UserWarning, match="did not settle"):
        mcmc.warmup(jax.random.key(0), Y)
    mcmc.run(mcmc.post_warmup_state.rng_key, Y)
    assert "did not settle" in mcmc.chain.report.warmup_remark


def test_a_given_metric_acts_without_warmup() -> None:
    """A leapfrog step of size h moves by h M^-1 p, with p of covariance M: by a deviation of h sqrt(M^-1)."""
    metric = jnp.array([9.0, 0.01])
    start = {"mu": jnp.array(0.5), "sigma": jnp.array(0.0)}
    sizes = dict(num_warmup=0, num_samples=400, num_chains=1, solver=Sequential(), progress_bar=False)
    moved = {}
    for name, given in {"unit": jnp.ones(2), "given": metric}.items():
        sampler = NUTS(model, step_size=1e-4, max_tree_depth=1, inverse_mass_matrix=given)
        mcmc = ParallelMCMC(sampler, **sizes)
        mcmc.run(jax.random.key(0), Y, init_params=start, extra_fields=("z.mu", "z.sigma"))
        path = mcmc.get_extra_fields()
        moved[name] = [np.std(np.diff(path[f"z.{site}"])) for site in ("mu", "sigma")]
    ratios = np.array(moved["given"]) / np.array(moved["unit"])
    np.testing.assert_allclose(ratios, np.sqrt(metric), rtol=0.02)


def test_metrics_that_do_not_fit() -> None:
    options = {**SIZES, "num_samples": 10}
    over_one = NUTS(model, inverse_mass_matrix={("mu",): jnp.ones(1)}, adapt_mass_matrix=False)
    with pytest.raises(ValueError, match=r"over the sites \[\('mu',\)\]: expected one entry for \[\('mu', 'sigma'\)\]"):
        ParallelMCMC(over_one, **options).run(jax.random.key(0), Y)
    for num_warmup in (20, 0):
        wrong = NUTS(model, step_size=0.5, inverse_mass_matrix=jnp.ones(3), adapt_mass_matrix=False)
        with pytest.raises(ValueError, match=r"inverse_mass_matrix has shape \(3,\): expected \(2,\) or \(2, 2\)"):
            ParallelMCMC(wrong, **{**options, "num_warmup": num_warmup}).run(jax.random.key(0), Y)
    twice = dict(kernel=pmcmc.HMC(inverse_mass_matrix=1.0), warmup=pmcmc.EnsembleAdaptation(inverse_mass_matrix=1.0))
    with pytest.raises(ValueError, match="inverse_mass_matrix is given twice"):
        make(**twice).run(jax.random.key(0), Y)


@pytest.mark.parametrize("metric", [BLOCKS, {("mu",): jnp.ones(1)}])
def test_a_metric_by_sites_is_accepted_where_it_is_adapted(metric) -> None:
    """NumPyro only starts from it, and pmcmc starts elsewhere."""
    sampler = HMC(model, inverse_mass_matrix=metric)
    mcmc = ParallelMCMC(sampler, **{**SIZES, "num_samples": 10, "solver": Sequential()})
    mcmc.run(jax.random.key(0), Y)
    assert mcmc.get_samples()["mu"].shape == (20,)
    with pytest.raises(ValueError, match="inverse_mass_matrix"):
        ParallelMCMC(sampler, num_warmup=0, num_samples=10, progress_bar=False).run(jax.random.key(0), Y)


def test_discrete_sites_beside_a_fitting_warmup() -> None:
    """A user who passes the warm-up of Gibbs knows that the sites are drawn by Gibbs."""
    mcmc = ParallelMCMC(HMC(with_discrete), **{**SIZES, "num_samples": 10}, warmup=pmcmc.SiteAdaptation())
    mcmc.run(jax.random.key(0), Y)
    assert set(mcmc.get_samples()) == {"x", "cluster"}
    assert mcmc.last_state.adapt_state is None  # several kernels, each with a step size and a metric


def test_a_strategy_beside_discrete_sites() -> None:
    sampler = HMC(with_discrete, init_strategy=init_to_median)
    with pytest.raises(ValueError, match=r"finds no values for the discrete sites \['cluster'\]: pass init_params"):
        ParallelMCMC(sampler, **SIZES, warmup=pmcmc.SiteAdaptation()).run(jax.random.key(0), Y)


def no_latents(y):
    numpyro.sample("y", dist.Normal(0, 1), obs=y)


def with_discrete(y):
    numpyro.sample("x", dist.Normal(0, 1))
    numpyro.sample("cluster", dist.Categorical(jnp.ones(3) / 3))


def nan_data(y):
    mu = numpyro.sample("mu", dist.Normal(0, 1))
    numpyro.sample("count", dist.Normal(mu, 1.0), obs=np.where(y > 1, np.nan, y))


def invalid_scale(y):
    mu = numpyro.sample("mu", dist.Normal(0, 1))
    numpyro.sample("count", dist.Normal(mu, -1.0), obs=y)


def same_name_twice(y):
    numpyro.sample("mu", dist.Normal(0, 1))
    numpyro.sample("mu", dist.Normal(0, 1))


@pytest.mark.parametrize(
    ("broken", "error", "words"),
    [
        (no_latents, ValueError, "no latent sample sites: there is nothing to sample. Check"),
        (with_discrete, ValueError, r"sites, here \['cluster'\].*Write ParallelMCMC\(model, \.\.\.\) instead of Par"),
        (invalid_scale, ValueError, "check the parameters of the distribution at site 'count'.*invalid scale"),
        (nan_data, ValueError, "not finite at site 'count'.*init_params"),
        (same_name_twice, AssertionError, "all sites must have unique names but got `mu` duplicated"),  # NumPyro's own
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
@pytest.mark.filterwarnings("ignore:.*Out-of-support")
def test_models_that_cannot_be_sampled(broken, error, words: str) -> None:
    mcmc = ParallelMCMC(NUTS(broken), **SIZES)
    with pytest.raises(error, match=words):
        mcmc.run(jax.random.key(0), Y)


def test_no_accepted_move_is_an_error() -> None:
    """NumPyro returns a chain that never moved."""
    with pytest.raises(pmcmc.WarmupError, match=r"no move was accepted.*Leave step_size=None"):
        make(kernel=pmcmc.HMC(step_size=1e9)).run(jax.random.key(0), Y)


def test_blocks_and_auto_give_the_same_draws() -> None:
    blocks = make(solver=MultipleShooting(4), thinning=3)
    blocks.run(jax.random.key(0), Y)
    close = lambda a, b: np.testing.assert_allclose(a, b, rtol=0, atol=1e-9)
    jax.tree.map(close, blocks.get_samples(), finished().get_samples())


@pytest.mark.filterwarnings("ignore:the draws have not mixed")
def test_lengthened_trajectories_go_on() -> None:
    """Those of HMC in a diagonal metric with a wide direction, which the sampler did not ask for."""

    def model(shared):
        mean = numpyro.sample("mean", dist.Normal(0, 1))
        with numpyro.plate("coordinates", 60):
            numpyro.sample("x", dist.Normal(shared * mean, 0.3))

    mcmc = pmcmc.ParallelMCMC(HMC(model), num_warmup=300, num_samples=100, num_chains=2, progress_bar=False)
    mcmc.warmup(jax.random.key(0), 1.0)
    mcmc.run(jax.random.key(1), 1.0)
    assert mcmc.chain.kernel.trajectory_length > 2
    mcmc.post_warmup_state = mcmc.last_state
    mcmc.run(jax.random.key(2), 1.0)
    other = pmcmc.ParallelMCMC(
        HMC(model, trajectory_length=1.0), num_warmup=300, num_samples=100, num_chains=2, progress_bar=False
    )
    other.post_warmup_state = mcmc.last_state
    with pytest.raises(ValueError, match="post_warmup_state is a state of HMC"):
        other.run(jax.random.key(2), 1.0)
