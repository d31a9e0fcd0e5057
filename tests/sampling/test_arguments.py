"""Bad arguments are refused before any sampling; the message has what was expected, what was given, and what to do."""

import inspect
import re
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import pytest
from numpyro.infer import init_to_median

import pmcmc
from pmcmc.interop.numpyro import numpyro_target
from pmcmc.recurrence import MultipleShooting, RecurrenceSolver, Sequential, deer
from pmcmc.sampling import automatic
from pmcmc.sampling.api import check_strategy
from pmcmc.sampling.settings import Settings
from tests.helpers.targets import ERRORS, eight_schools_model, gaussian, start_like

GOOD = dict(
    target=pmcmc.Target.from_logdensity(gaussian, start_like(gaussian)),
    kernel=None,
    solver="auto",
    num_warmup=1000,
    num_samples=100,
    num_chains=4,
    thinning=1,
    extra_fields=(),
    warmup=None,
)


def test_good_settings_pass() -> None:
    settings = Settings.check(**GOOD)
    assert isinstance(settings.kernel, pmcmc.HMC)
    assert Settings.check(**{**GOOD, "num_samples": np.int32(7)}).num_samples == 7


def test_blocks_of_half_precision_are_refused() -> None:
    """They have no default tolerance, and would fail after warm-up."""
    half = pmcmc.Target.from_logdensity(gaussian, jax.tree.map(lambda x: x.astype(jnp.float16), start_like(gaussian)))
    for solver in (MultipleShooting(), deer()):
        with pytest.raises(ValueError, match=r"states in float16 have no default tolerance.*or say by tol="):
            Settings.check(**{**GOOD, "target": half, "solver": solver})
        assert Settings.check(**{**GOOD, "target": half, "solver": replace(solver, tol=0.1)})
    assert Settings.check(**{**GOOD, "target": half})


def test_half_precision_is_sampled_sequentially(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(automatic, "SHORT_SECONDS", -1.0)
    options = dict(kernel=pmcmc.MALA(step_size=0.3), num_warmup=0, num_samples=300, progress_bar=False)
    chain = pmcmc.sample(lambda x: -0.5 * jnp.sum(x**2), jnp.zeros(2, jnp.float16), 0, **options)
    assert chain.report.reason.startswith("States in float16 are too coarse")
    assert chain.num_samples == 300


class Unregistered(RecurrenceSolver):
    def solve_problem(self, problem):
        return Sequential().solve_problem(problem)


@pytest.mark.parametrize(
    ("change", "error", "words"),
    [
        (dict(solver=Unregistered()), TypeError, "Unregistered is not a pytree.*@pmcmc.register_dataclass"),
        (dict(num_samples=0), ValueError, "num_samples must be at least 1, got 0"),
        (dict(num_samples=-5), ValueError, "at least 1, got -5"),
        (dict(num_chains=0), ValueError, "num_chains must be at least 1"),
        (dict(num_warmup=-1), ValueError, "num_warmup must be at least 0"),
        (dict(thinning=0), ValueError, "thinning must be at least 1"),
        (dict(num_samples=1e4), TypeError, "num_samples must be an integer, got 10000.0"),
        (dict(num_chains=2.5), TypeError, "num_chains must be an integer"),
        (dict(thinning="2"), TypeError, "thinning must be an integer"),
        (dict(num_samples=True), TypeError, "must be an integer, got True"),
        (dict(num_samples=None), TypeError, "must be an integer, got None"),
        (dict(thinning=101), ValueError, "keeps none of num_samples=100"),
        (dict(kernel=pmcmc.HMC), TypeError, r"Write HMC\(\) instead"),
        (dict(kernel="hmc"), TypeError, "kernel must be a pmcmc kernel"),
        (dict(solver="shooting"), TypeError, 'solver must be "auto" or a solver'),
        (dict(solver=Sequential), TypeError, "solver must be"),
        (dict(extra_fields=("energy", "bogus")), ValueError, r"HMC has no extra_fields \['bogus'\]"),
        (dict(warmup=pmcmc.WindowAdaptation), TypeError, "warmup must be a Warmup"),
        (dict(num_warmup=0), ValueError, "pass step_size="),
        (dict(num_warmup=0, kernel=pmcmc.MALA()), ValueError, "pass step_size="),
    ],
    ids=lambda value: str(value)[:40] if isinstance(value, dict) else "",
)
def test_settings_are_checked(change: dict, error: type, words: str) -> None:
    with pytest.raises(error, match=words):
        Settings.check(**{**GOOD, **change})


def test_names_in_an_iterator_are_kept() -> None:
    check = inspect.unwrap(Settings.check)  # without the tests' check of types
    assert check(Settings, **{**GOOD, "extra_fields": iter(("energy",))}).extra_fields == ("energy",)


def sample(**options) -> pmcmc.Chain:
    given = dict(logdensity_fn=gaussian, initial_position=start_like(gaussian), rng_key=0, progress_bar=False)
    return pmcmc.sample(**{**given, **options})


def test_settings_of_models_with_discrete_sites() -> None:
    """What is asked for must fit the kernel that samples, with its updates of discrete sites."""

    def model(continuous):
        z = numpyro.sample("z", dist.Bernoulli(0.3))
        if continuous:
            numpyro.sample("x", dist.Normal(z, 1.0))

    both, discrete = (numpyro_target(model, (continuous,), {}) for continuous in (True, False))
    with pytest.raises(ValueError, match=r"Compose has no extra_fields \['energy'\]: .*accept_prob"):
        Settings.check(**{**GOOD, "target": both, "extra_fields": ("energy",)})
    with pytest.raises(ValueError, match=r"num_warmup=0 tunes nothing, but HMC\(\) has no step size"):
        Settings.check(**{**GOOD, "target": both, "num_warmup": 0})
    settings = Settings.check(**{**GOOD, "target": discrete, "num_warmup": 0})
    assert isinstance(settings.kernel, pmcmc.DiscreteGibbs)


@pytest.mark.parametrize(
    "key",
    [jax.random.split(jax.random.key(0), 4), jax.random.split(jax.random.PRNGKey(0), 4), 0.5, True, None, "0"],
    ids=["keys", "raw keys", "float", "bool", "None", "str"],
)
def test_one_key(key) -> None:
    with pytest.raises(TypeError, match="rng_key must be one JAX key"):
        sample(rng_key=key)


def test_sizes_and_keywords_at_the_edge() -> None:
    with pytest.raises(ValueError, match="num_samples must be at least 1"):
        sample(num_samples=0)
    with pytest.raises(TypeError):  # by the annotation here, by Settings.check in production
        sample(num_samples=10.5)
    with pytest.raises(TypeError, match="num_draws"):
        sample(num_draws=10)
    with pytest.raises(ValueError, match="num_warmup must be 0 or at least 20"):
        sample(num_warmup=10)


@pytest.mark.parametrize(
    "position", [{"a": jnp.zeros(2), "n": jnp.zeros(2, int)}, 3, True], ids=["leaf", "int", "bool"]
)
def test_integer_positions(position) -> None:
    with pytest.raises(TypeError, match="gradient-based kernels need floating leaves"):
        sample(logdensity_fn=lambda x: 0.0, initial_position=position)


def test_empty_positions() -> None:
    with pytest.raises(ValueError, match="nothing to sample"):
        sample(initial_position={})


@pytest.mark.parametrize("logdensity_fn", [lambda x: -(x**2), lambda x: jnp.zeros((), int)], ids=["vector", "integer"])
def test_densities_that_are_no_real_number(logdensity_fn) -> None:
    with pytest.raises(ValueError, match="must return one real number, got shape"):
        sample(logdensity_fn=logdensity_fn)


@pytest.mark.parametrize(
    ("logdensity_fn", "words"),
    [
        (lambda p: jnp.log(-1.0 - p["a"] ** 2) - p["b"] ** 2, "The log density is nan there"),
        (lambda p: p["a"] / jnp.zeros(()) - p["b"] ** 2 + jnp.inf, "The log density is (nan|inf) there"),
        (lambda p: -jnp.inf - p["a"] - p["b"], "The log density is -inf there"),
        (lambda p: -(p["a"] ** 2) - jnp.sqrt(p["b"]), r"gradient is not finite with respect to position\['b'\]"),
    ],
    ids=["NaN", "inf", "-inf", "gradient"],
)
def test_densities_that_are_not_finite_at_the_start(logdensity_fn, words: str) -> None:
    with pytest.raises(ValueError, match=f"cannot be used at any start. .*{words}"):
        sample(logdensity_fn=logdensity_fn, initial_position={"a": 0.0, "b": 0.0})


def test_start_that_is_not_finite() -> None:
    with pytest.raises(ValueError, match="cannot be used at any start"):
        sample(initial_position=jnp.array([0.0, jnp.nan, 0.0]))


@pytest.mark.parametrize(
    "init_params",
    [
        {"mu": 0.0, "tau": 1.0},
        {"mu": 0.0, "tau": 1.0, "z": jnp.zeros(7)},
        {"mu": 0.0, "tau": 1.0, "theta": jnp.zeros(8)},
        {"mu": jnp.zeros(3), "tau": jnp.zeros(3), "z": jnp.zeros((3, 8))},
        jnp.zeros(10),
    ],
    ids=["missing", "shape", "name", "other number of chains", "flat"],
)
def test_init_params(init_params) -> None:
    with pytest.raises(ValueError, match="init_params must hold unconstrained values") as caught:
        pmcmc.parallel_chain(eight_schools_model, 0, model_args=(ERRORS,), init_params=init_params, num_chains=4)
    assert "'z': (8,)" in str(caught.value)


def with_switch():
    numpyro.sample("switch", dist.Bernoulli(0.3))
    numpyro.sample("x", dist.Normal())


@pytest.mark.parametrize(
    ("model", "options", "error", "words"),
    [
        (eight_schools_model, dict(init_params={}, init_strategy=init_to_median), ValueError, "leave one of them out"),
        (with_switch, dict(init_strategy=init_to_median), ValueError, r"discrete sites \['switch'\]: pass init_params"),
    ],
    ids=["both", "discrete"],
)
def test_strategies_that_cannot_be_used(model, options, error, words: str) -> None:
    args = () if model is with_switch else (ERRORS,)
    with pytest.raises(error, match=words):
        pmcmc.parallel_chain(model, 0, model_args=args, **options)
    with pytest.raises(TypeError, match="must be one of NumPyro's, such as init_to_median, got 'median'"):
        check_strategy(GOOD["target"], None, "median")


def test_starts_of_other_numbers_of_chains() -> None:
    for position in (jnp.zeros((3, 2)), 0.0, {"a": np.zeros(4), "b": 1.0}):
        with pytest.raises(ValueError, match=r"init_per_chain=True needs arrays with a leading axis num_chains=4"):
            pmcmc.sample(gaussian, position, 0, num_chains=4, init_per_chain=True)


def spike(p):
    """A coordinate of which every other value is impossible."""
    return jnp.where(p["still"] == 0, 0.0, -jnp.inf) - 0.5 * p["moves"] ** 2


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (
            dict(kernel=pmcmc.HMC(step_size=1e6, num_integration_steps=2)),
            r"no move was accepted .*1e\+06.*step_size=None",
        ),
        (
            dict(logdensity_fn=spike, initial_position={"moves": 0.0, "still": 0.0}),
            r"warm-up never moved .*position\['still'\].*init_params",
        ),
    ],
    ids=["huge step", "spike"],
)
def test_warmup_says_what_was_stuck(options: dict, words: str) -> None:
    with pytest.raises(pmcmc.WarmupError, match=words):
        sample(num_warmup=200, num_samples=100, **options)


@pytest.mark.parametrize(
    "warmup",
    [
        pmcmc.EnsembleAdaptation(inverse_mass_matrix=jnp.ones(3)),
        pmcmc.warmup.Pathfinder(pmcmc.EnsembleAdaptation(inverse_mass_matrix=2.0)),
    ],
    ids=["ensemble", "after Pathfinder"],
)
def test_a_metric_of_a_warmup_that_does_not_run(warmup) -> None:
    with pytest.raises(ValueError, match=r"num_warmup=0 runs no warm-up.*pass it to the kernel"):
        sample(kernel=pmcmc.HMC(step_size=0.5), warmup=warmup, num_warmup=0)


def test_trajectories_that_are_cut() -> None:
    """64 steps of the size given, or of the size tuned, do not reach a time that the user asked for."""
    short = pmcmc.HMC(step_size=0.1, trajectory_length=20.0)
    words = r"time of 6.4 instead of trajectory_length=20, .* or num_integration_steps=200 to take them all"
    with pytest.warns(UserWarning, match=words):
        sample(kernel=short, num_warmup=0, num_samples=10)
    both = pmcmc.Compose([(short, ["a"]), (pmcmc.HMC(step_size=0.5, trajectory_length=20.0), ["b"])])
    logdensity = lambda p: -0.5 * p["a"] ** 2 - 0.5 * p["b"] ** 2
    start = {"a": 0.0, "b": 0.0}
    with pytest.warns(UserWarning, match=words) as caught:
        sample(logdensity_fn=logdensity, initial_position=start, kernel=both, num_warmup=0, num_samples=10)
    assert str(caught[0].message).count("instead of") == 1
    with pytest.warns(UserWarning, match=r"instead of trajectory_length=200, because"):
        sample(kernel=pmcmc.HMC(trajectory_length=200.0), num_warmup=40, num_samples=10)
    sample(kernel=pmcmc.HMC(step_size=0.01), num_warmup=0, num_samples=10)  # nobody asked for the default time


@pytest.mark.parametrize(("step_size", "time", "is_cut"), [(0.02, 1.82, False), (0.01, 1.82, True), (0.02, 3.69, True)])
def test_trajectories_that_are_cut_far_below_what_warm_up_chose(step_size: float, time: float, is_cut: bool) -> None:
    """The time of the tuned kernel counts, which may be longer than the default."""
    tuned = pmcmc.HMC(step_size, 64, trajectory_length=time)
    words = f"instead of trajectory_length={time}, .* reparametrise, or pass num_integration_steps="
    assert bool(re.search(words, pmcmc.HMC().unkept(tuned))) == is_cut
    assert is_cut or not pmcmc.HMC().unkept(tuned)
