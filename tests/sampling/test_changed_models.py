"""The model that is sampled is the user's model at the time of the call, whatever it was at an earlier one.

Each case fits data whose posterior mean is 1, changes them in one of the ways in which a model can change between two
calls, and fits again: the mean must be 9. Under a flat prior with 20 observations of unit variance the mean is known,
and its Monte Carlo error is below 0.02.
"""

import gc
import weakref
from dataclasses import dataclass
from types import SimpleNamespace

import blackjax
import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import pytest
from numpyro.infer import NUTS

import pmcmc
from benchmarks._compilations import compilations
from pmcmc import Target
from pmcmc._xla import compile
from pmcmc.kernels.hmc import Leapfrog
from pmcmc.kernels.metropolis import GradientState
from pmcmc.kernels.updates import Drawn
from pmcmc.recurrence import MultipleShooting, Sequential, deer
from pmcmc.stability import coalescence_time, lyapunov_exponent

ONES, NINES = np.full(20, 1.0), np.full(20, 9.0)
TOLERANCE = 0.1  # five Monte Carlo errors
Y = ONES  # read by a model


@pytest.fixture(autouse=True)
def numpyro_broadcasts_over_ranks():
    with jax.numpy_rank_promotion("allow"):
        yield


def observe(y) -> None:
    mu = numpyro.sample("mu", dist.Normal(0, 100))
    numpyro.sample("y", dist.Normal(mu, 1), obs=y)


def mean_of(chain: pmcmc.Chain) -> float:
    samples = chain.get_samples()
    return float(np.mean(samples["mu"] if isinstance(samples, dict) else samples))


def fit(model, *args, **kwargs) -> float:
    options = dict(num_warmup=100, num_samples=400, progress_bar=False)
    return mean_of(pmcmc.parallel_chain(model, 0, model_args=args, model_kwargs=kwargs, **options))


def by_argument():
    return lambda y: fit(observe, y)


def by_keyword():
    return lambda y: fit(observe, y=y)


def by_jax_array():
    return lambda y: fit(observe, jnp.asarray(y))


def by_list():
    return lambda y: fit(lambda values: observe(np.asarray(values)), y.tolist())


def by_attribute():
    class Dose:
        def model(self):
            observe(self.y)

    dose = Dose()

    def run(y):
        dose.y = y
        return fit(dose.model)

    return run


def by_object_argument():
    config = SimpleNamespace(y=ONES)

    def run(y):
        config.y = y
        return fit(lambda given: observe(given.y), config)

    return run


def by_dict_argument():
    frame = {}
    model = lambda table: observe(table["dose"])

    def run(y):
        frame["dose"] = y
        return fit(model, frame)

    return run


def by_data_frame():
    frame = pytest.importorskip("pandas").DataFrame({"dose": ONES})
    model = lambda table: observe(table["dose"].to_numpy())

    def run(y):
        frame["dose"] = y
        return fit(model, frame)

    return run


def by_closure():
    held = ONES

    def model():
        observe(held)

    def run(y):
        nonlocal held
        held = y
        return fit(model)

    return run


def by_fresh_function():
    def run(y):
        return fit(lambda: observe(y))

    return run


def by_global():
    def model():
        observe(Y)

    def run(y):
        global Y
        Y = y
        return fit(model)

    return run


def by_memory():
    held = np.ones(20)

    def run(y):
        held[:] = y
        return fit(observe, held)

    return run


def by_jitted_helper():
    def run(y):
        helper = jax.jit(lambda mu: -0.5 * jnp.sum((mu - y) ** 2))

        def model():
            numpyro.factor("likelihood", helper(numpyro.sample("mu", dist.Normal(0, 100))))

        return fit(model)

    return run


def by_handler():
    def model():
        mu = numpyro.sample("mu", dist.Normal(0, 100))
        with numpyro.plate("rows", 20):
            numpyro.sample("y", dist.Normal(mu, 1))

    def run(y):
        with numpyro.handlers.condition(data={"y": jnp.asarray(y)}):
            return fit(model)

    return run


def by_drop_in():
    mcmc = pmcmc.ParallelMCMC(NUTS(observe), num_warmup=100, num_samples=800)

    def run(y):
        mcmc.run(jax.random.key(0), y)
        return float(np.mean(mcmc.get_samples()["mu"]))

    return run


def by_continued_drop_in():
    class Dose:
        def model(self):
            observe(self.y)

    dose, mcmc = Dose(), None

    def run(y):
        nonlocal mcmc
        dose.y = y
        if mcmc is None:
            mcmc = pmcmc.ParallelMCMC(NUTS(dose.model), num_warmup=100, num_samples=800)
        mcmc.run(jax.random.key(0))
        mcmc.post_warmup_state = mcmc.last_state
        return float(np.mean(mcmc.get_samples()["mu"][100:]))

    return run


def by_learnt_density():
    class Flow:
        def logdensity(self, x):
            return -0.5 * jnp.sum((x - self.y) ** 2)

    flow = Flow()

    def run(y):
        flow.y = jnp.asarray(y)
        options = dict(num_warmup=100, num_samples=400, progress_bar=False)
        return mean_of(pmcmc.sample(flow.logdensity, jnp.zeros(()), 0, **options))

    return run


def gibbs(update, y):
    options = dict(num_warmup=100, num_samples=400, progress_bar=False)
    return mean_of(pmcmc.sample(None, {"mu": 0.0}, 0, kernel=pmcmc.Gibbs({"mu": update}), **options))


def by_gibbs_update():
    data = SimpleNamespace()
    update = pmcmc.kernels.NormalUpdate(lambda x: (jnp.mean(data.y), 20**-0.5))

    def run(y):
        data.y = jnp.asarray(y)
        return gibbs(update, y)

    return run


def by_custom_update():
    data = SimpleNamespace()
    update = pmcmc.kernels.CustomUpdate(jax.random.normal, lambda x, z: jnp.mean(jnp.asarray(data.y)) + 20**-0.5 * z)

    def run(y):
        data.y = y
        return gibbs(update, y)

    return run


def by_update_within_compose():
    data = SimpleNamespace()
    update = pmcmc.kernels.NormalUpdate(lambda x: (jnp.mean(data.y) + 0 * x["b"], 20**-0.5))
    kernel = pmcmc.Compose([pmcmc.Gibbs({"mu": update}), (pmcmc.HMC(step_size=0.5, num_integration_steps=2), ["b"])])
    logdensity = lambda x: -0.5 * jnp.sum((x["mu"] - data.y) ** 2) - 0.5 * x["b"] ** 2

    def run(y):
        data.y = jnp.asarray(y)
        options = dict(num_warmup=0, num_samples=400, progress_bar=False)
        return mean_of(pmcmc.sample(logdensity, {"mu": 1.0, "b": 0.0}, 0, kernel=kernel, **options))

    return run


def by_update_of_the_users_own():
    data = SimpleNamespace()

    @pmcmc.register_dataclass
    @dataclass(frozen=True)
    class Around(pmcmc.kernels.Update):
        def draw_noise(self, rng_key, site):
            return jax.random.normal(rng_key, site.shape, site.dtype)

        def draw(self, state, noise, site):
            return Drawn(jnp.mean(jnp.asarray(data.y)) + 20**-0.5 * noise)

    def run(y):
        data.y = y
        return gibbs(Around(), y)

    return run


def by_integrator_of_the_users_own():
    data = SimpleNamespace()

    @pmcmc.register_dataclass
    @dataclass(frozen=True)
    class Jump(Leapfrog):
        """Keeps the energy of a flat density."""

        def check(self, num_integration_steps):
            pass

        def length(self, asked):
            return asked

        def integrate(self, target, state, momentum, step_size, length, velocity):
            position = jnp.mean(jnp.asarray(data.y)) + 20**-0.5 * momentum
            return GradientState(position, *target.value_and_grad(position)), momentum

    kernel = pmcmc.HMC(step_size=0.5, num_integration_steps=1, leapfrog=Jump())

    def run(y):
        data.y = y
        return blackjax_run(kernel, lambda x: 0.0 * jnp.sum(x))

    return run


def blackjax_run(kernel, logdensity) -> float:
    options = dict(num_warmup=0, num_samples=3000, progress_bar=False, solver=Sequential())
    chain = pmcmc.sample(logdensity, jnp.full(1, 5.0), 0, kernel=kernel, **options)
    return float(np.mean(chain.get_samples(group_by_chain=True)[:, 500:]))


def by_built_algorithm():
    data = SimpleNamespace()
    logdensity = lambda x: -0.5 * jnp.sum((x - data.y) ** 2)
    kernel = pmcmc.from_blackjax(blackjax.hmc(logdensity, 0.15, jnp.ones(1), 4))

    def run(y):
        data.y = jnp.asarray(y)
        return blackjax_run(kernel, logdensity)

    return run


def by_constructor():
    data = SimpleNamespace()
    tilted = lambda logdensity, **options: blackjax.hmc(
        lambda x: logdensity(x) - 0.5 * jnp.sum((x - data.y) ** 2), **options
    )
    kernel = pmcmc.from_blackjax(tilted, step_size=0.15, inverse_mass_matrix=jnp.ones(1), num_integration_steps=4)

    def run(y):
        data.y = jnp.asarray(y)
        return blackjax_run(kernel, lambda x: 0.0 * jnp.sum(x))

    return run


WAYS = {
    name.removeprefix("by_"): make
    for name, make in dict(globals()).items()
    if name.startswith("by_") and callable(make)
}
# Such a step is identified by what it computes, arrays included; a mean that is a Python number counts as a number.
COMPILE_ANEW = ("built_algorithm", "constructor", "update_of_the_users_own", "integrator_of_the_users_own")


@pytest.mark.parametrize("way", WAYS)
def test_the_model_is_the_one_of_the_call(way: str) -> None:
    run = WAYS[way]()
    assert abs(run(ONES) - 1) < TOLERANCE
    with compilations() as compiled:
        second = run(NINES)
    assert abs(second - 9) < TOLERANCE
    if way not in COMPILE_ANEW:
        assert not compiled
    assert abs(run(ONES) - 1) < TOLERANCE


def test_a_column_mean_is_data_from_the_second_fit_on() -> None:
    def model(y):
        mu = numpyro.sample("mu", dist.Normal(np.mean(y), 0.01))
        numpyro.sample("y", dist.Normal(mu, 1), obs=y)

    fits = []
    for value in (1.0, 9.0, 3.7):
        with compilations() as compiled:
            found = fit(model, np.full(20, value))
        assert abs(found - value) < TOLERANCE
        fits.append(len(compiled))
    assert fits[2] == 0


def test_a_number_that_became_data_is_no_change() -> None:
    scale = 2.0

    def model():
        numpyro.sample("mu", dist.Normal(scale, 1))

    options = dict(num_warmup=100, num_samples=100, progress_bar=False)
    chain = pmcmc.parallel_chain(model, 0, **options)
    for scale in (3.0, 4.0):  # noqa: B007 read by the model
        pmcmc.parallel_chain(model, 0, **options)
    with pytest.raises(ValueError, match="it reads other numbers"):
        chain.verify()
    scale = 2.0
    assert chain.verify()
    assert chain.extend(10, progress_bar=False).verify()


class Dose:
    """Its deterministic site shows which data the model had when draws were constrained."""

    def __init__(self):
        self.y = ONES

    def model(self):
        mu = numpyro.sample("mu", dist.Normal(0, 100))
        numpyro.deterministic("shifted", mu + self.y[0])
        numpyro.sample("y", dist.Normal(mu, 1), obs=self.y)


def chain_of(dose: Dose) -> pmcmc.Chain:
    return pmcmc.parallel_chain(dose.model, 0, num_warmup=100, num_samples=100, progress_bar=False)


def test_a_chain_stays_with_its_model() -> None:
    """Sites, likelihood and data of a chain are those of its call, also when they are read later."""
    dose = Dose()
    chain, expected = chain_of(dose), chain_of(dose)
    before = expected.to_arviz(log_likelihood=True)
    dose.y = NINES
    after = chain.to_arviz(log_likelihood=True)
    for group in ("posterior", "log_likelihood", "observed_data"):
        for name in before[group].data_vars:
            np.testing.assert_array_equal(before[group][name], after[group][name])
    np.testing.assert_allclose(chain.get_samples()["shifted"], chain.get_samples()["mu"] + 1)


CHANGES = {
    "data": lambda dose: setattr(dose, "y", NINES),
    "in place": lambda dose: dose.y.__setitem__(3, 2.0),
    "shape": lambda dose: setattr(dose, "y", np.ones(21)),
    "model": lambda dose: setattr(dose, "model", lambda: observe(dose.y)),
}


@pytest.mark.parametrize("change", ["data", "in place", "shape"])
def test_extend_and_verify_say_that_the_model_has_changed(change: str, tmp_path) -> None:
    dose = Dose()
    dose.y = ONES.copy()
    chain = chain_of(dose)
    assert chain.verify()
    chain.extend(10, progress_bar=False)
    chain.save(tmp_path / "chain.npz")
    pmcmc.load(tmp_path / "chain.npz", dose.model)
    CHANGES[change](dose)
    more = dict(num_samples=10, progress_bar=False)
    for ask in (chain.verify, lambda: chain.extend(**more), lambda: chain.stream(tmp_path / "run", **more)):
        with pytest.raises(ValueError, match="the model has changed since this chain was sampled"):
            ask()
    with pytest.raises(ValueError, match=r"model|data"):
        pmcmc.load(tmp_path / "chain.npz", dose.model)


def test_stored_chains_say_that_the_model_has_changed(tmp_path) -> None:
    pytest.importorskip("zarr")
    dose = Dose()
    dose.y = ONES.copy()
    stored = chain_of(dose).stream(tmp_path / "run", 10, progress_bar=False)
    stored = stored.extend(10, progress_bar=False)
    dose.y = NINES
    with pytest.raises(ValueError, match="the model has changed since this chain was sampled"):
        stored.extend(10, progress_bar=False)


def test_extend_and_verify_say_that_the_kernel_has_changed() -> None:
    data = SimpleNamespace(y=jnp.asarray(ONES))
    update = pmcmc.kernels.NormalUpdate(lambda x: (jnp.mean(data.y), 1.0))
    options = dict(kernel=pmcmc.Gibbs({"mu": update}), num_warmup=0, num_samples=100, progress_bar=False)
    chain = pmcmc.sample(None, {"mu": 0.0}, 0, **options)
    assert chain.verify()
    data.y = jnp.asarray(NINES)
    for ask in (chain.verify, lambda: chain.extend(10, progress_bar=False)):
        with pytest.raises(ValueError, match="functions in the kernel have changed"):
            ask()


def drawn(shape: np.ndarray) -> tuple[pmcmc.Kernel, None]:
    return pmcmc.Gibbs({"t": pmcmc.kernels.GammaUpdate(shape, rate=1.0)}), None


def whitened(metric: np.ndarray) -> tuple[pmcmc.Kernel, object]:
    return pmcmc.HMC(0.5, 2, inverse_mass_matrix=metric), lambda x: -0.5 * jnp.sum(x["t"] ** 2)


def of_blackjax(mean: np.ndarray) -> tuple[pmcmc.Kernel, object]:
    elliptical = lambda density, mean, cov: blackjax.elliptical_slice(lambda x: 0.0 * density(x), mean=mean, cov=cov)
    return pmcmc.from_blackjax(elliptical, mean=mean, cov=np.full(3, 2.0)), lambda x: -0.5 * jnp.sum(x["t"] ** 2)


@pytest.mark.parametrize("make", [drawn, whitened, of_blackjax])
def test_arrays_in_a_kernel_are_those_of_the_call(make) -> None:
    """The user fills them with other numbers afterwards: the chain keeps the first, and its extension is refused."""
    held, options = np.full(3, 2.0), dict(num_warmup=0, num_samples=20, progress_bar=False, solver=Sequential())
    kernel, logdensity = make(held)
    chain = pmcmc.sample(logdensity, {"t": np.ones(3)}, 0, kernel=kernel, **options)
    held += 7.0
    for ask in (chain.verify, lambda: chain.extend(20, progress_bar=False)):
        with pytest.raises(ValueError, match="arrays in the kernel have changed since this chain was sampled"):
            ask()
    held -= 7.0
    assert chain.verify()
    held += 7.0
    assert all(np.all(x == 2.0) for x in jax.tree.leaves(chain.kernel) if isinstance(x, np.ndarray))


class Step:
    factor = 0.5

    def __call__(self, x, u):
        return self.factor * jnp.tanh(x) + u


@pytest.mark.parametrize("solver", [Sequential(), MultipleShooting(4), deer()], ids=["sequential", "shooting", "deer"])
def test_a_recurrence_is_the_one_of_the_call(solver) -> None:
    step, inputs = Step(), jax.random.normal(jax.random.key(0), (256,))
    for step.factor in (0.5, 0.9):
        expected, x = [], 0.0
        for u in np.asarray(inputs):
            expected.append(x := step.factor * np.tanh(x) + u)
        found = pmcmc.recurrence.solve(step, jnp.zeros(()), inputs, solver=solver)
        np.testing.assert_allclose(found.value, expected, atol=1e-10)


def test_stability_is_of_the_step_of_the_call() -> None:
    step, inputs = Step(), jax.random.normal(jax.random.key(0), (512,))
    found = []
    for step.factor in (0.5, 0.9):
        fresh = lambda x, u, factor=step.factor: factor * jnp.tanh(x) + u
        ask = lambda fn: jax.tree.map(
            np.asarray,
            (
                lyapunov_exponent(fn, jnp.zeros(()), inputs),
                coalescence_time(fn, jnp.zeros(4), jnp.ones(4), jnp.stack([inputs] * 4, 1), scale=1.0).steps,
            ),
        )
        found.append(ask(step))
        jax.tree.map(np.testing.assert_array_equal, found[-1], ask(fresh))
    assert not np.array_equal(found[0][1], found[1][1])


def doubled_days(t, y) -> None:
    """A slope of 2 per day over Julian dates, which float32 cannot distinguish."""
    slope = numpyro.sample("mu", dist.Normal(0, 100))
    numpyro.sample("y", dist.Normal(slope * (t - t[0]), 0.1), obs=y)


def billions(n, y) -> None:
    slope = numpyro.sample("mu", dist.Normal(0, 100))
    numpyro.sample("y", dist.Normal(slope * (n / 1e9), 0.1), obs=y)


def test_numpy_computes_in_the_users_precision() -> None:
    days = 2_460_000.5 + np.linspace(0, 3, 40)
    counts = np.arange(1, 41) * 150_000_000
    assert counts.max() > 2**32
    with jax.enable_x64(False):
        assert abs(fit(doubled_days, days, 2 * (days - days[0])) - 2) < 0.1
        assert abs(fit(billions, counts, 2 * (counts / 1e9)) - 2) < 0.1


def test_arguments_are_the_users_own_objects() -> None:
    """Everything here works in NumPyro, and failed when arrays were traced before the model saw them."""
    group = np.array([0, 1, 2, 1, 0])
    table = np.array([1.0, 2.0, 3.0])
    y = np.array([1.0, 2.0, 3.0, 2.0, 1.0])
    masked = np.ma.masked_invalid([1.0, np.nan, 3.0, 2.0, 1.0])

    def model(y, group, table, masked):
        assert isinstance(y, np.ndarray)
        assert y.dtype == np.float64
        own = y.copy()
        own[0] = 1.0
        offset = table[group[0]]
        effect = numpyro.sample("mu", dist.Normal(0, 10).expand([group.max() + 1]).to_event(1))
        numpyro.sample("first", dist.Normal(effect[group] + offset - 1, 1).mask(~masked.mask), obs=masked.filled(0.0))
        numpyro.sample("second", dist.Normal(effect[group], 1).to_event(1), obs=own)

    options = dict(model_args=(y, group, table, masked), num_warmup=100, num_samples=400, progress_bar=False)
    chain = pmcmc.parallel_chain(model, 0, **options)
    assert chain.get_samples()["mu"].shape == (1600, 3)
    assert np.isfinite(chain.get_samples()["mu"]).all()
    rows = [(np.r_[y[group == k], masked[group == k].compressed()]) for k in range(3)]
    expected = [row.sum() / (len(row) + 0.01) for row in rows]
    np.testing.assert_allclose(np.mean(chain.get_samples()["mu"], axis=0), expected, atol=0.2)


def test_programs_of_old_models_are_dropped() -> None:
    """New models must not fill the memory; a target whose programs were dropped compiles them again."""
    fresh = lambda power: Target.from_logdensity(lambda x: -jnp.sum(sum(x**p for p in range(2, power))), jnp.ones(2))
    targets = [fresh(power) for power in range(3, 4 + compile.MAX_TARGETS)]
    expected = targets[0].logdensity_fn(jnp.ones(2))
    first = [weakref.ref(jitted) for jitted in compile.programs_of(targets[0]).values()]
    assert first
    for target in targets[1:]:
        target.logdensity_fn(jnp.ones(2))
    gc.collect()
    assert len(compile._programs) == compile.MAX_TARGETS
    assert [jitted() for jitted in first] == [None] * len(first)
    assert targets[0].logdensity_fn(jnp.ones(2)) == expected


SWEEPS = 3


@pmcmc.register_dataclass
@dataclass(frozen=True)
class Reads(pmcmc.recurrence.RecurrenceSolver):
    """A solver of the user's own that reads a global."""

    def solve_problem(self, problem):
        found = Sequential().solve_problem(problem)
        return found._replace(stats=found.stats._replace(num_sweeps=found.stats.num_sweeps + SWEEPS))


def test_a_solver_of_the_users_own_computes_what_it_does_at_the_call(monkeypatch: pytest.MonkeyPatch) -> None:
    settings = dict(kernel=pmcmc.MALA(step_size=0.5), num_warmup=0, num_chains=2, num_samples=40, progress_bar=False)
    run = lambda: pmcmc.sample(lambda x: -0.5 * x**2, jnp.zeros(()), 0, solver=Reads(), **settings)
    assert run().report.num_sweeps.tolist() == [3, 3]
    monkeypatch.setitem(globals(), "SWEEPS", 5)
    chain = run()
    assert chain.report.num_sweeps.tolist() == [5, 5]
    monkeypatch.setitem(globals(), "SWEEPS", 7)
    assert chain.extend(40).report.num_sweeps.tolist() == [7, 7]
