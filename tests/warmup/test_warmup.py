"""Warm-up finds what is right on targets with known answers, badly scaled ones included, and reports where it fails."""

import functools
import itertools
import math
import sys
import warnings
from dataclasses import replace
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import pytest
from numpyro.diagnostics import effective_sample_size

import pmcmc
from benchmarks._compilations import compilations
from pmcmc import EnsembleAdaptation, WindowAdaptation
from pmcmc.kernels import UniformLength
from pmcmc.recurrence import MultipleShooting, Sequential
from pmcmc.warmup import ChEESAdaptation, Pathfinder, base, ensemble, lanes
from pmcmc.warmup.base import start_order
from pmcmc.warmup.settlement import Verdict, judge_path
from pmcmc.warmup.stray_lanes import far_lanes, half_for_held, held_lanes
from tests.helpers.selection import share
from tests.helpers.statistics import z_bound
from tests.helpers.targets import COVARIANCE, gaussian, logistic, mixture, start_like

SIZES = dict(num_warmup=400, num_samples=1000, num_chains=4, progress_bar=False, solver=Sequential())
SCHEMES = {
    "ensemble": EnsembleAdaptation(),
    "window": WindowAdaptation(),
    "chees": ChEESAdaptation(),
    "pathfinder": Pathfinder(),
}


@functools.cache
def gaussian_chain(scheme: str) -> pmcmc.Chain:
    return pmcmc.sample(gaussian, start_like(gaussian), 0, warmup=SCHEMES[scheme], **SIZES)


@pytest.mark.parametrize("scheme", share(list(SCHEMES), "ensemble", "chees"))
def test_basis_and_step_size_of_a_gaussian(scheme: str) -> None:
    """The covariance; and on 32 lanes the acceptance rate asked for (ChEES: a harmonic mean of 0.651)."""
    chain = gaussian_chain(scheme)
    np.testing.assert_allclose(chain.target.basis.covariance, COVARIANCE, atol=0.35)
    rate = float(np.mean(chain.report.acceptance_rate))
    assert (0.6 if scheme == "chees" else 0.7) < rate < 0.93
    # After whitening HMC takes about two steps: the step size is near one, never tiny.
    assert 0.3 < float(chain.kernel.step_size) < 2
    assert chain.report.num_divergent.sum() == 0


def test_trajectories_of_a_gaussian_do_not_turn_back() -> None:
    """Two steps of 1.3, the size tuned, took nearly half a period, after which squares are about the same."""
    chain = gaussian_chain("ensemble")
    taken = float(chain.kernel.step_size) * int(chain.kernel.num_integration_steps)
    assert taken == pytest.approx(math.acos(-1 / 4), rel=1e-5)
    draws = np.asarray(chain.get_samples(group_by_chain=True), float)
    squares = (draws - draws.mean(axis=(0, 1))) ** 2
    assert min(effective_sample_size(squares)) > 0.35 * draws[..., 0].size


def test_a_given_step_size_is_kept() -> None:
    """Only a tuned step size is shortened, also where the number of steps is left out."""
    chain = pmcmc.sample(
        gaussian, start_like(gaussian), 0, kernel=pmcmc.HMC(step_size=1.0), **{**SIZES, "num_samples": 10}
    )
    assert float(chain.kernel.step_size) == 1.0
    assert int(chain.kernel.num_integration_steps) == 2


def test_chees_finds_the_length_of_a_gaussian() -> None:
    """Uniform lengths on (0, T) on N(0, I): the criterion is 2 (1 - sin(2T) / 2T), largest at T = 2.247."""
    kernel = gaussian_chain("chees").kernel
    steps = kernel.num_integration_steps
    assert isinstance(steps, UniformLength)
    assert int(steps.low) == 1
    step_size = float(kernel.step_size)
    assert 2.247 * 0.6 < step_size * int(steps.high) < 2.247 * 1.5 + step_size  # steps are whole, so up to one too long


@pytest.mark.parametrize("scheme", share(["ensemble", "chees"], "ensemble"))
def test_same_chain_whatever_the_solver(scheme: str) -> None:
    """The tuned kernel, drawn lengths included, is one deterministic map."""
    options = {**SIZES, "solver": MultipleShooting(8)}
    chain = pmcmc.sample(gaussian, start_like(gaussian), 0, warmup=SCHEMES[scheme], **options)
    np.testing.assert_allclose(chain.get_samples(), gaussian_chain(scheme).get_samples(), rtol=0, atol=1e-9)


@pytest.mark.slow
def test_chees_keeps_a_given_step_size() -> None:
    chain = pmcmc.sample(logistic, jnp.zeros(4), 0, kernel=pmcmc.HMC(0.25), warmup=ChEESAdaptation(), **SIZES)
    assert chain.kernel.step_size == 0.25
    assert 3 <= int(chain.kernel.num_integration_steps.high) <= 30


LOCS, SCALES = np.array([0.0, 1e4, -50.0]), np.array([1e-6, 1.0, 1e3])


@pytest.mark.parametrize(
    ("scheme", "kind"),
    [
        ("ensemble", "scales"),
        *(
            pytest.param(*case, marks=pytest.mark.slow)
            for case in [("ensemble", "shift"), ("ensemble", "tiny"), ("chees", "scales"), ("pathfinder", "scales")]
        ),
    ],
)
def test_bad_scales(scheme: str, kind: str) -> None:
    """A mean 10,000 standard deviations away, standard deviations of 1e-6, scales nine orders of magnitude apart."""
    loc, scale = {"shift": (1e4, np.ones(3)), "tiny": (0.0, np.full(3, 1e-6)), "scales": (LOCS, SCALES)}[kind]
    logdensity = lambda x: -0.5 * jnp.sum(((x - loc) / scale) ** 2)
    chain = pmcmc.sample(logdensity, jnp.zeros(3), 0, warmup=SCHEMES[scheme], **{**SIZES, "num_warmup": 1000})
    z = (np.asarray(chain.get_samples(group_by_chain=True)) - loc) / scale
    ess = effective_sample_size(z)
    assert np.all(ess > 400)
    assert np.all(np.abs(z.mean((0, 1))) * np.sqrt(ess) < z_bound(15))
    np.testing.assert_allclose(z.std((0, 1)), 1, atol=0.2)


def test_warm_up_that_did_not_settle_says_so() -> None:
    """Scales twelve orders of magnitude apart in 60 dimensions: too much for 20 steps, but not for 400."""
    scale = np.logspace(-6, 6, 60)
    logdensity = lambda x: -0.5 * jnp.sum((x / scale) ** 2)
    run = lambda **options: pmcmc.sample(logdensity, jnp.zeros(60), 0, **options)
    options = {**SIZES, "num_samples": 20}
    with pytest.warns(UserWarning, match=r"did not settle.*Raise num_warmup \(it was 20\)") as caught:
        chain = run(**{**options, "num_warmup": 20})
    for report in (chain.report, chain.extend(20, progress_bar=False).report):
        assert report.warmup_remark == str(caught[0].message)
        assert report.warmup_remark in str(report)
    enough = run(**options).report
    assert enough.warmup_remark == ""
    assert "settle" not in str(enough)


def test_modes_that_communicate_stay_occupied() -> None:
    """All four modes are among the 32 states from which chains and blocks start."""
    target = pmcmc.Target.from_logdensity(mixture, jnp.zeros(2))
    starts = jax.random.uniform(jax.random.key(1), (32, 2), minval=-2, maxval=2)
    tuned = EnsembleAdaptation().run(target, pmcmc.HMC(), jax.random.key(0), starts, 400)
    x = np.asarray(jax.vmap(tuned.target.position)(tuned.states))
    assert len({tuple(signs) for signs in np.sign(x)}) == 4
    assert tuned.timing.num_lanes == 32
    assert tuned.timing.seconds_per_step > 0


def test_pairs_of_lanes_come_from_different_starts_and_from_the_same() -> None:
    """One of each half, where four starts repeat; all 32 starts are used once."""
    rows = ensemble._as_rows({"a": np.arange(32.0) % 4}, 4)[:, 0]
    assert np.all(rows[:12] != rows[16:28])
    np.testing.assert_array_equal(rows[12:16], rows[28:])
    np.testing.assert_array_equal(np.sort(ensemble._as_rows(np.arange(32.0), 1)[:, 0]), np.arange(32))


def test_lanes_are_held_by_what_they_refuse() -> None:
    moved, acceptance_rate = np.array([0.9, 0.0, 0.0, 0.0]), np.full((16, 4), 0.8)
    acceptance_rate[:, 1:3] = 1e-3
    held = held_lanes(moved, acceptance_rate, 0.8)
    assert held.tolist() == [False, True, True, False]  # the last one was only unlucky
    assert not held_lanes(moved, np.full((16, 4), np.nan), 0.8).any()  # a kernel without a rate
    # A sum of bfloat16 numbers stands still after some hundred of them.
    assert not held_lanes(moved, np.full((600, 4), 0.1, jnp.bfloat16), 0.8).any()


def test_lanes_are_far_out_if_a_wider_region_could_not_make_up_for_their_density() -> None:
    """A third lane has a log density that is lower by a gap, and moves in a region of another width."""
    rng = np.random.default_rng(0)

    def is_far(gap: float, width: float, dim: int = 4, climbed: float = 0.0) -> bool:
        path, logdensity = rng.standard_normal((160, 5, dim)), -0.5 * rng.chisquare(dim, (160, 5))
        path[:, 2] *= width
        logdensity[:, 2] += np.linspace(-climbed, 0.0, 160) - gap
        far = far_lanes(path, logdensity)
        assert not np.delete(far, 2).any()
        return bool(far[2])

    assert is_far(100, width=0.0)  # it does not move
    assert is_far(100, width=1.0)
    assert not is_far(20, width=1.0)
    assert not is_far(100, width=1.0, dim=40)
    assert not is_far(100, width=1e8)  # its mass may be larger: 4 log(1e8) = 74
    assert is_far(1e3, width=1e8)
    assert is_far(300, width=1.0, climbed=10)
    assert not is_far(300, width=1.0, climbed=100)  # it is on its way


def test_no_lane_is_far_out_where_nothing_can_be_told() -> None:
    path, logdensity = np.zeros((16, 4, 2)), np.full((16, 4), -5.0)
    logdensity[:, 2] = -1e6
    assert not far_lanes(path, logdensity).any()  # the others do not move
    assert not far_lanes(path + np.random.default_rng(0).standard_normal((4, 2)), logdensity).any()  # whatever rounding
    path = np.random.default_rng(0).standard_normal(path.shape)
    assert far_lanes(path, logdensity).tolist() == [False, False, True, False]
    logdensity[:, 2] = np.nan
    assert not far_lanes(path, logdensity).any()
    assert not far_lanes(path, np.full((16, 4), np.nan)).any()


@pytest.mark.parametrize("seed", range(3))
def test_one_lane_in_a_poor_mode_does_not_spoil_the_basis(seed: int) -> None:
    """One lane moves in a mode that is 300 nats lower. It is moved elsewhere, and warm-up settles."""
    logdensity = lambda x: jnp.logaddexp(-0.5 * jnp.sum(x**2), -300 - 0.5 * jnp.sum((x - 1e3) ** 2))
    target = pmcmc.Target.from_logdensity(logdensity, jnp.zeros(3))
    starts = np.random.default_rng(seed).standard_normal((32, 3))
    starts[5] += 1e3
    tuned = EnsembleAdaptation().run(target, pmcmc.HMC(), jax.random.key(seed), starts, 400)
    assert tuned.num_lost == 1
    assert tuned.remark == ""
    np.testing.assert_allclose(np.diag(tuned.target.basis.scale), 1, rtol=0.5)


def test_what_helps_held_lanes_depends_on_the_kernel() -> None:
    """Only a step size that is tuned along gradients follows a higher acceptance rate."""
    said = lambda kernel, rate: lanes.held_remark(kernel, rate, 3, 32)
    assert said(pmcmc.HMC(), 0.8).startswith("3 of the 32 lanes of warm-up did not move")
    assert "EnsembleAdaptation(target_acceptance_rate=0.95), raise num_warmup" in said(pmcmc.HMC(), 0.8)
    assert "EnsembleAdaptation(target_acceptance_rate=0.89), raise num_warmup" in said(pmcmc.MALA(), 0.574)
    assert "get stuck. Leave step_size out, so that it is tuned, raise num_warmup" in said(pmcmc.HMC(1.0), 0.8)
    assert "get stuck. Raise num_warmup, or reparametrise." in said(pmcmc.RandomWalk(), 0.3)


def test_held_lanes_count_for_half() -> None:
    np.testing.assert_allclose(half_for_held(np.zeros(4, bool)), 0.25)
    np.testing.assert_allclose(half_for_held(np.ones(4, bool)), 0.25)
    np.testing.assert_allclose(half_for_held(np.array([True, False, False, False])), [1 / 2, 1 / 6, 1 / 6, 1 / 6])


def narrow_mode():
    """Two modes of equal mass; nine coordinates are 90 times narrower in the left one."""
    centres = jnp.array([-2.4, -0.4])
    a = numpyro.sample("a", dist.MixtureSameFamily(dist.Categorical(jnp.ones(2) / 2), dist.Normal(centres, 0.25)))
    numpyro.sample("z", dist.Normal(0, jnp.where(a < -1.4, 0.011, 1.0)).expand([9]).to_event(1))


@pytest.mark.filterwarnings("ignore:.*were divergent", "ignore:.*accepted no move", "ignore:.*did not move")
@pytest.mark.filterwarnings("ignore:Warm-up did not settle")
@pytest.mark.parametrize("seed", range(3))
def test_a_narrow_mode_is_kept_and_seen(seed: int) -> None:
    """None of its lanes is moved to another mode, a chain starts there, and R-hat shows it."""
    run = lambda: pmcmc.parallel_chain(narrow_mode, seed, num_samples=1000, save_warmup=True, progress_bar=False)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        chain = run()
    lanes = np.asarray(chain.get_warmup_samples()["a"]) < -1.4
    np.testing.assert_array_equal(lanes[:, 0], lanes[:, -1])
    assert lanes[:, 0].any()
    left = (np.asarray(chain.get_samples(group_by_chain=True)["a"]) < -1.4).mean(axis=1)
    assert set(left) == {0.0, 1.0}
    assert chain.report.mixing.rhat["a"][0] > 1.4 or any("accepted no move" in str(w.message) for w in caught)
    assert any("did not settle" in str(w.message) or "did not move" in str(w.message) for w in caught)


def test_lanes_in_the_far_tails_are_put_elsewhere_and_counted() -> None:
    """Half of the starts are where no step, however small, is accepted, at a log density of -5,000 and less."""

    def logdensity(x):
        outside = jnp.sum(x**2) > 400
        rough = -5e3 - 1e3 * jnp.sin(1e6 * x[0]) ** 2
        return jnp.where(outside, rough, -0.5 * jnp.sum(jnp.where(outside, 0.0, x) ** 2))

    target = pmcmc.Target.from_logdensity(logdensity, jnp.zeros(2))
    starts = np.repeat([[0.0, 0.0], [30.0, 30.0]], 16, axis=0)
    tuned = EnsembleAdaptation().run(target, pmcmc.HMC(), jax.random.key(0), starts, 400)
    assert tuned.num_lost >= 16
    assert np.max(np.abs(jax.vmap(tuned.target.position)(tuned.states))) < 6
    report = pmcmc.sample(gaussian, start_like(gaussian), 0, **SIZES | dict(num_samples=50)).report
    assert report.num_lost_lanes == 0
    assert "(7 in all)" not in str(report)
    assert "to the positions of others (7 in all)" in str(replace(report, num_lost_lanes=7))


def test_chains_start_where_lanes_keep_apart() -> None:
    """In every mode, the most frequent first; lanes far out in the tails last; any order where lanes have mixed."""
    rng = np.random.default_rng(0)
    path, logdensity = rng.standard_normal((96, 32, 5)), -0.5 * rng.chisquare(5, (96, 32))
    assert start_order(path, logdensity) is None
    path[:, 10:13, 2] += 12
    path[:, 20, 2] -= 12
    order = start_order(path, logdensity)
    assert sorted(order) == list(range(32))
    assert order[:3].tolist() == [0, 10, 20]
    logdensity[:, 20] -= 50
    order = start_order(path, logdensity)
    assert order[:2].tolist() == [0, 10]
    assert order[-1] == 20


def test_chains_start_in_modes_by_turns_and_given_starts_are_kept() -> None:
    # Far enough apart that the long steps at the beginning of warm-up do not reach the other mode by chance.
    logdensity = lambda x: jnp.logaddexp(-0.5 * jnp.sum((x - 2e4) ** 2), -0.5 * jnp.sum((x + 2e4) ** 2))

    def model():
        x = numpyro.sample("x", dist.ImproperUniform(dist.constraints.real_vector, (), (2,)))
        numpyro.factor("f", logdensity(x))

    for starts in ([1, 1, -1, 1], [-1, 1, 1, 1], [1, -1, -1, 1]):
        given = 2e4 * jnp.repeat(jnp.array(starts, float)[:, None], 2, axis=1)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            chain = pmcmc.parallel_chain(model, 0, init_params={"x": given}, num_samples=50, progress_bar=False)
        assert np.sign(chain.get_samples(True)["x"][:, 0, 0]).tolist() == starts


def test_moments_and_when_they_are_settled() -> None:
    rng = np.random.default_rng(0)
    factor = np.array([[1.0, 0.0], [0.999, np.sqrt(1 - 0.999**2)]])
    path = rng.standard_normal((200, 32, 2))
    mean, found = base.path_moments(path @ factor.T + 3, dense=True)
    np.testing.assert_allclose(mean, 3, atol=0.1)
    np.testing.assert_allclose(found, factor, atol=0.03)  # hardly any shrinkage: 0.999 must stay 0.999
    assert judge_path(path, *base.path_moments(path, dense=True)) == Verdict(True, True)
    assert judge_path(path @ factor.T, *base.path_moments(path @ factor.T, dense=True)) == Verdict(False, True)
    assert judge_path(path + 4, *base.path_moments(path + 4, dense=False)) == Verdict(False, False)
    still = rng.standard_normal((1, 32, 2)) + 0.05 * path  # the spread is that of the starts, not of the target
    for dense in (True, False):
        assert judge_path(still, *base.path_moments(still, dense=dense)) == Verdict(False, False)
    few = base.path_moments(rng.standard_normal((16, 32, 1)) + np.zeros(8), dense=True)[1]
    assert np.all(np.isfinite(few))


@pytest.mark.parametrize("num_pieces", [1, 2, 5, 6, 7, 16, 21, 100])
def test_windows_double_and_the_last_is_half(num_pieces: int) -> None:
    lengths = ensemble._window_lengths(num_pieces)
    assert sum(lengths) == num_pieces
    assert 2 * lengths[-1] >= num_pieces
    assert all(b >= 2 * a for a, b in itertools.pairwise(lengths))


@pytest.mark.parametrize("kernel", [pmcmc.MALA(), pmcmc.HMC(num_integration_steps=4)], ids=["MALA", "fixed length"])
def test_chees_takes_hmc_alone(kernel) -> None:
    with pytest.raises(ValueError, match="tunes the trajectory length of HMC"):
        pmcmc.sample(gaussian, start_like(gaussian), 0, kernel=kernel, warmup=ChEESAdaptation(), **SIZES)


@pytest.mark.slow
def test_pathfinder_leaves_errors_to_what_follows() -> None:
    spike = lambda x: jnp.where(x[0] == 0, 0.0, -jnp.inf) - 0.5 * x[1] ** 2
    with pytest.raises(pmcmc.WarmupError, match="warm-up never moved"):
        pmcmc.sample(spike, jnp.zeros(2), 0, warmup=Pathfinder(), **SIZES)


POSTERIORDB = Path(__file__).parents[3] / "shared" / "posteriordb"
NAMES = [
    "kidiq-kidscore_momiq",
    "nes1972-nes",
    "mesquite-mesquite",
    "earnings-earn_height",
    "kidiq_with_mom_work-kidscore_interaction_z",
]


@functools.cache
def posteriors() -> dict[str, Any]:
    path = POSTERIORDB / "posteriors.py"
    if not path.exists():
        pytest.skip(f"posteriordb's posteriors are not at ../shared/{POSTERIORDB.name}")
    spec: Any = spec_from_file_location("posteriordb_posteriors", path)
    module = sys.modules[spec.name] = module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.POSTERIORS


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.slow
def test_draws_agree_with_posteriordb(name: str) -> None:
    """Means against the reference draws, after a warm-up from dispersed starts; chains agree with each other."""
    posterior = posteriors()[name]
    reference = posterior.reference()
    options = {**SIZES, "num_warmup": 1000, "num_samples": 4000}
    chain = pmcmc.parallel_chain(
        posterior.model, 5, model_args=posterior.model_args, model_kwargs=posterior.model_kwargs, **options
    )
    draws = chain.get_samples(group_by_chain=True)
    for i, label in enumerate(map(str, reference["names"])):
        site, _, index = label.partition("[")
        x = np.asarray(draws[site])
        x = x[..., int(index[:-1]) - 1] if index else x
        ess = effective_sample_size(x)
        assert ess > 1000
        error = np.hypot(x.std() / np.sqrt(ess), reference["mcse_mean"][i])
        assert abs(x.mean() - reference["mean"][i]) / error < z_bound(30)


def many_rows(num_rows: int) -> pmcmc.Target:
    rows = jnp.asarray(np.random.default_rng(0).standard_normal((num_rows, 4)))
    return pmcmc.Target.from_logdensity(lambda x: -jnp.sum(jnp.logaddexp(0, rows @ x)) - jnp.sum(x**2), jnp.zeros(4))


@pytest.mark.parametrize(("num_rows", "expected"), [(100, 32), (6_000, 16), (13_000, 8), (200_000, 4)])
def test_dear_densities_get_fewer_lanes(num_rows: int, expected: int) -> None:
    target = many_rows(num_rows)
    assert lanes.num_lanes(target) == expected
    for warmup in (EnsembleAdaptation(), ChEESAdaptation(), Pathfinder()):
        assert warmup.count_starts(target) == expected
    assert WindowAdaptation(num_starts=6).count_starts(target) == min(6, expected)


@pytest.mark.parametrize("warmup", [EnsembleAdaptation(), WindowAdaptation(num_starts=8)], ids=["ensemble", "window"])
def test_few_lanes_find_the_posterior(warmup: pmcmc.warmup.Warmup, monkeypatch: pytest.MonkeyPatch) -> None:
    """Four lanes, begun at one start, and more chains than lanes; the shapes are those that were compiled for."""
    monkeypatch.setattr(lanes, "LANE_OPERATIONS", 1)
    fn = lambda x: -0.5 * jnp.sum(((x - 3) / jnp.array([1e-3, 1.0, 1e3])) ** 2)
    options = dict(num_warmup=400, num_samples=2000, num_chains=6, warmup=warmup, progress_bar=False)
    chain = pmcmc.sample(fn, jnp.zeros(3), 0, **options)
    assert len(chain.state.ensemble) == 4
    assert " (4 lanes), pilot" in str(chain.report)
    expected = warmup.tuned_shapes(chain.target, pmcmc.HMC(), warmup.count_starts(chain.target))
    assert jax.tree.map(jnp.shape, expected.states) == jax.tree.map(jnp.shape, chain.state.ensemble)
    draws = (np.asarray(chain.get_samples()) - 3) / np.array([1e-3, 1.0, 1e3])[None]
    assert np.all(np.abs(draws.mean(0)) < 0.1)
    assert np.all(np.abs(draws.std(0) - 1) < 0.1)


def test_first_trajectories_are_short_where_gradients_are_dear(monkeypatch: pytest.MonkeyPatch) -> None:
    limits: list[int] = []
    run = lanes.LaneEnsemble.run
    monkeypatch.setattr(
        lanes.LaneEnsemble, "run", lambda self, adapting: (limits.append(self.longest), run(self, adapting))[1]
    )
    narrow = lambda x: -0.5 * jnp.sum((x / 1e-3) ** 2)
    options = dict(num_warmup=200, num_samples=20, progress_bar=False)
    pmcmc.sample(narrow, jnp.ones(3), 0, **options)
    assert set(limits) == {lanes.NO_LIMIT}
    limits.clear()
    monkeypatch.setattr(lanes, "LANE_OPERATIONS", 1)
    pmcmc.sample(narrow, jnp.ones(3), 0, **options)
    assert limits[:2] == [8, 16]
    assert limits[-1] == lanes.NO_LIMIT


def test_nuts_is_tuned_on_hmc() -> None:
    """Its program is compiled once, for sampling, and it accepts about what was asked for."""
    jax.clear_caches()
    with compilations() as seen:
        chain = pmcmc.sample(
            lambda x: -0.5 * jnp.sum(x**2), jnp.zeros(5), 0, kernel=pmcmc.NUTS(), solver=Sequential(), num_samples=2000,
            progress_bar=False,
        )  # fmt: skip
    assert [program.name for program in seen].count("jit(run_piece)") == 1
    assert chain.state.timing.num_leapfrogs >= 1  # those of HMC, whose lanes were timed
    assert 0.76 < np.mean(chain.report.acceptance_rate) < 0.9


def test_nuts_is_judged_at_its_own_step_size(monkeypatch: pytest.MonkeyPatch) -> None:
    """The last third of tuning is that of HMC with the step size of NUTS, which HMC alone would shorten to 0.9."""
    pieces, run = [], lanes.LaneEnsemble.run

    def spy(self, adapting: bool):
        before = self.states, self._number
        pieces.append((*before, run(self, adapting)))
        return pieces[-1][-1]

    monkeypatch.setattr(lanes.LaneEnsemble, "run", spy)
    target, key = pmcmc.Target.from_logdensity(lambda x: -0.5 * jnp.sum(x**2), jnp.zeros(2)), jax.random.key(0)
    kernel = lanes.tune(target, pmcmc.NUTS(), key, np.zeros((8, 2)), None, 102).kernel
    assert float(kernel.step_size) > 0.95
    given = lanes.LaneEnsemble(replace(pmcmc.NUTS().tuned_by(), step_size=kernel.step_size), key, 0.8)
    given.enter(target, np.zeros((8, 2)))
    given.states, given._number, (expected, _) = pieces[-1]
    np.testing.assert_allclose(run(given, adapting=False)[0].path, expected.path, rtol=1e-6)


def test_every_given_start_is_used_with_few_lanes(monkeypatch: pytest.MonkeyPatch) -> None:
    """Six chains in six separate modes stay there, although four lanes would do for the model."""
    monkeypatch.setattr(lanes, "LANE_OPERATIONS", 1)
    modes = 100.0 * jnp.arange(6)
    fn = lambda x: jax.nn.logsumexp(-0.5 * (x[0] - modes) ** 2) - 0.5 * x[1] ** 2
    starts = jnp.stack([modes, jnp.zeros(6)], axis=1)
    kernel = pmcmc.HMC(step_size=0.5, num_integration_steps=3, inverse_mass_matrix=jnp.ones(2))
    options = dict(kernel=kernel, num_warmup=100, num_samples=200, num_chains=6, progress_bar=False)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        chain = pmcmc.sample(fn, starts, 0, init_per_chain=True, solver=Sequential(), **options)
    means = np.asarray(chain.get_samples(group_by_chain=True))[..., 0].mean(axis=1)
    np.testing.assert_allclose(means, modes, atol=2)
