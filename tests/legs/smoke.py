"""What other versions may break, once each: models, loops, kernels, solvers, the drop-in, ArviZ, files.

`.ci/leg` runs it with other versions of Python and of packages; pytest does not collect it by default.
"""

from functools import cache, partial
from pathlib import Path

import blackjax
import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import pytest
from numpyro.contrib.control_flow import scan
from numpyro.infer import NUTS, Predictive, log_likelihood

import pmcmc
from pmcmc import doctor
from pmcmc._xla import rewrites
from pmcmc._xla.content import inner_programs
from pmcmc._xla.lanes_last import vmap_last
from pmcmc._xla.trace import trace
from pmcmc.interop.arviz import to_arviz
from pmcmc.recurrence import RESULTS, MultipleShooting, Sequential, deer
from pmcmc.sampling import programs
from tests.helpers.sources import run_python

SIZES = dict(num_warmup=100, num_samples=400, num_chains=2, progress_bar=False)
X, GROUP = np.linspace(-1.0, 1.0, 12), np.arange(12) % 3
Y = 0.5 + 0.8 * X + np.array([-0.3, 0.0, 0.3])[GROUP] + 0.4 * np.cos(7.0 * np.arange(12))


def model(x, group, y=None):
    slope = numpyro.sample("slope", dist.Normal(0, 1))
    noise = numpyro.sample("noise", dist.HalfNormal(1.0))
    with numpyro.plate("groups", 3):
        level = numpyro.sample("level", dist.Normal(0, 1))
    numpyro.deterministic("twice", 2 * slope)
    with numpyro.plate("data", len(x)):
        numpyro.sample("y", dist.Normal(level[group] + slope * x, noise), obs=y)


@cache
def chain() -> pmcmc.Chain:
    options = dict(model_args=(X, GROUP), model_kwargs={"y": Y}, solver=MultipleShooting(8), save_warmup=True)
    return pmcmc.parallel_chain(model, 0, **options, **SIZES)


def close(a, b) -> None:
    np.testing.assert_allclose(np.asarray(a), np.asarray(b), rtol=0, atol=1e-8)


def test_versions() -> None:
    assert [finding.text for finding in doctor.versions() if finding.remedy] == []


def test_blocks_are_the_chain_in_order() -> None:
    assert np.all(chain().report.result == RESULTS.successful)
    order = pmcmc.parallel_chain(model, 0, model_args=(X, GROUP), model_kwargs={"y": Y}, solver=Sequential(), **SIZES)
    for name, draws in order.get_samples().items():
        close(chain().get_samples()[name], draws)


def chained(y) -> None:
    scale = numpyro.sample("scale", dist.HalfNormal(1.0))

    def step(level, observed):
        level = numpyro.sample("level", dist.Normal(0.8 * level, scale))
        numpyro.sample("y", dist.Normal(level, 0.5), obs=observed)
        return level, None

    scan(step, 0.0, y)
    numpyro.factor("branches", jax.lax.cond(scale > 1.0, lambda x: -x, lambda x: 0.1 * x, scale))


def test_models_with_loops() -> None:
    """Versions of JAX differ in how a program describes its loops."""
    for reparam in (None, pmcmc.AutoReparam()):
        run = partial(pmcmc.parallel_chain, chained, 0, model_args=(Y,), reparam=reparam, **SIZES)
        blocks, order = run(solver=MultipleShooting(8)), run(solver=Sequential())
        assert np.all(blocks.report.result == RESULTS.successful)
        close(blocks.get_samples()["level"], order.get_samples()["level"])


def loops(x):
    """Of two carries and two constants, so that their order counts; a ``while`` and a conditional beside the scan."""
    advance = lambda carry, y: ((carry[0] + y * x[0], jnp.sin(carry[1]) - x[1:]), carry[0])
    (a, b), c = jax.lax.scan(advance, (x[:2], jnp.ones(2)), jnp.arange(4.0))
    d = jax.lax.while_loop(lambda z: jnp.sum(z) < 3.0, lambda z: z + 0.1 * jnp.abs(x) + 0.1, x)
    return a.sum() + b.sum() + c.sum() + d.sum() + jax.lax.cond(x[0] > 0, jnp.sum, jnp.prod, x)


def test_lanes_last_is_vmap() -> None:
    x = np.random.default_rng(0).normal(size=(3, 5))
    close(vmap_last(loops)(x), jax.vmap(loops, -1, -1)(x))


def test_traces_hold_no_arrays_and_are_found_again() -> None:
    def traced(scale, y):
        return trace(
            lambda x: scale * jax.lax.fori_loop(0, 3, lambda _, z: z + jnp.asarray(y) * x, x).sum(), jnp.ones(4)
        )

    first, again, other = traced(1.5, np.arange(4.0)), traced(1.5, np.arange(4.0)), traced(1.5, np.arange(1.0, 5.0))
    assert first.trace is again.trace
    assert first.content == again.content != other.content
    assert not getattr(first.trace.program, "consts", ())  # from JAX 0.12.0.1, a jaxpr holds its arrays
    close(other(jnp.ones(4)), 1.5 * (4 + 3 * 10.0))


def test_newton() -> None:
    inputs = jax.random.normal(jax.random.key(0), (200, 3))
    step = lambda x, u: 0.7 * jnp.tanh(x) + u
    x0 = jnp.zeros(3)
    close(deer().solve(step, x0, inputs).value, Sequential().solve(step, x0, inputs).value)


def test_kernels() -> None:
    logdensity = lambda x: -0.5 * jnp.sum(x**2)
    for kernel in (pmcmc.MALA(), pmcmc.NUTS(), pmcmc.from_blackjax(blackjax.mala, step_size=None)):
        draws = pmcmc.sample(logdensity, jnp.zeros(2), 0, kernel=kernel, solver=MultipleShooting(4), **SIZES)
        assert np.all(draws.report.result == RESULTS.successful)


@pytest.mark.filterwarnings("ignore")  # ArviZ's own dependencies
def test_arviz(tmp_path: Path) -> None:
    import arviz as az

    predicted = Predictive(model, chain().get_samples())(jax.random.key(1), X, GROUP)
    data = chain().to_arviz(log_likelihood=True, posterior_predictive={"y": predicted["y"]})
    groups = data.groups() if callable(data.groups) else data.groups
    names = ("posterior", "sample_stats", "log_likelihood", "observed_data", "constant_data", "warmup_posterior")
    assert {*names, "posterior_predictive"} <= {name.strip("/") for name in groups}
    assert data["posterior"]["level"].dims == ("chain", "draw", "groups")
    loo = az.loo(data)
    assert np.isfinite(loo.elpd if hasattr(loo, "elpd") else loo.elpd_loo)  # ArviZ 1.x, 0.x
    assert set(az.summary(data, var_names=["slope"]).index) == {"slope"}
    plate = {"a/b": ["group"]}
    scoped = to_arviz({"posterior": {"a/b": np.zeros((2, 3, 4))}}, {}, known=plate, dims={}, coords={"group": range(4)})
    assert {tuple(map(str, x.dims)) for x in scoped["posterior"].data_vars.values()} == {("chain", "draw", "group")}


@pytest.mark.filterwarnings("ignore")
def test_drop_in() -> None:
    import arviz as az

    mcmc = pmcmc.ParallelMCMC(NUTS(model), num_warmup=100, num_samples=50, num_chains=2, progress_bar=False)
    mcmc.run(jax.random.key(0), X, GROUP, y=Y, extra_fields=("potential_energy",))
    mcmc.print_summary()
    assert mcmc.get_extra_fields()["potential_energy"].shape == (100,)
    assert log_likelihood(model, mcmc.get_samples(), X, GROUP, y=Y)["y"].shape == (100, 12)
    data = az.from_numpyro(mcmc)
    close(data["posterior"]["slope"], mcmc.get_samples(group_by_chain=True)["slope"])
    before = mcmc.get_samples(group_by_chain=True)["slope"]
    mcmc.post_warmup_state = mcmc.last_state
    mcmc.run(mcmc.post_warmup_state.rng_key, X, GROUP, y=Y)
    assert not np.any(np.asarray(before) == np.asarray(mcmc.get_samples(group_by_chain=True)["slope"]))


def test_files(tmp_path: Path) -> None:
    chain().save(tmp_path / "chain.npz")
    back = pmcmc.load(tmp_path / "chain.npz", model, model_args=(X, GROUP), model_kwargs={"y": Y})
    close(back.unknowns, chain().unknowns)
    assert back.extend(50, progress_bar=False).num_samples == 450


@pytest.mark.filterwarnings("ignore")
def test_stored_programs(tmp_path: Path) -> None:
    """Another process finds them without tracing."""
    code = (
        "import sys, jax, jax.numpy as jnp, numpy as np, pmcmc\n"
        "from pmcmc._xla import disk\n"
        "fresh = []\n"
        "compiled = disk.Kept.compiled\n"
        "disk.Kept.compiled = lambda self, lowered: (lowered and fresh.append(self), compiled(self, lowered))[1]\n"
        "pmcmc.cache_programs(sys.argv[1])\n"
        "logdensity = lambda x: -0.5 * jnp.sum(x**2)\n"
        "chain = pmcmc.sample(logdensity, jnp.zeros(2), 0, num_samples=50, num_warmup=40, progress_bar=False)\n"
        "print(len(fresh), np.asarray(chain.get_samples()).tolist())"
    )
    first, second = (run_python(code, str(tmp_path)).strip().split("\n")[-1].split(maxsplit=1) for _ in range(2))
    assert int(first[0]) > 4
    assert int(second[0]) == 0
    assert first[1] == second[1]


def test_streams(tmp_path: Path) -> None:
    chain().stream(tmp_path / "run", 50, progress_bar=False)
    stored = pmcmc.resume(tmp_path / "run", model, model_args=(X, GROUP), model_kwargs={"y": Y})
    assert stored.num_samples == 450
    opened, expected = stored.to_arviz(), chain().extend(50, progress_bar=False).to_arviz()
    assert type(opened) is type(expected)
    for group in ("posterior", "sample_stats", "observed_data", "constant_data"):
        assert set(opened[group].data_vars) == set(expected[group].data_vars)
        for name, found in opened[group].data_vars.items():
            assert found.dims == expected[group][name].dims
            close(found, expected[group][name])


def test_sampling_in_order_is_one_kernel(monkeypatch) -> None:
    """A primitive that a version of JAX renames would silently cost a factor of three: list it."""
    unlisted = []

    def names(jaxpr) -> set:
        here = {equation.primitive.name for equation in jaxpr.eqns} - rewrites._SIMPLE
        return here.union(*(names(p) for equation in jaxpr.eqns for p in inner_programs(equation)))

    def spy(fn, *args):
        unlisted.append(names(jax.make_jaxpr(fn)(*args).jaxpr))
        return fn(*args)

    monkeypatch.setattr(programs, "in_one_kernel", spy)
    logdensity = lambda x: -0.5 * jnp.sum(x**2) - jax.nn.softplus(x[0])
    for kernel in (pmcmc.HMC(0.1, 3), pmcmc.NUTS(0.1)):
        options = dict(kernel=kernel, solver=Sequential(), num_warmup=0, num_samples=8, progress_bar=False)
        pmcmc.sample(logdensity, jnp.zeros(3), 0, **options)
    assert unlisted == [set(), set()]
