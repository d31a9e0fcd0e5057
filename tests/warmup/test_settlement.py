"""Warm-ups say where they have not found the posterior: separate modes, whatever was given, and with every warm-up."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import pmcmc
from pmcmc import EnsembleAdaptation, SiteAdaptation, WindowAdaptation
from pmcmc.recurrence import Sequential
from pmcmc.warmup import ChEESAdaptation, base
from pmcmc.warmup.settlement import NORMAL_QUARTILES, Verdict, judge_halves, judge_path
from tests.helpers.selection import share
from tests.helpers.targets import COVARIANCE, eight_schools, gaussian, make_target, start_like

OPTIONS = dict(num_warmup=400, num_samples=20, num_chains=1, solver=Sequential(), progress_bar=False)


def two_modes(x):
    """Two modes 28 standard deviations apart, which no chain crosses. One chain, in one of them, cannot show it."""
    return jnp.logaddexp(-0.5 * jnp.sum((x - 10) ** 2), -0.5 * jnp.sum((x + 10) ** 2))


MODES: dict[str, Any] = {
    "nothing given": dict(),
    "metric of the kernel": dict(kernel=pmcmc.HMC(inverse_mass_matrix=1.0)),
    "metric of the warm-up": dict(warmup=EnsembleAdaptation(inverse_mass_matrix=jnp.ones(2))),
    "ChEES": dict(warmup=ChEESAdaptation(), kernel=pmcmc.HMC(inverse_mass_matrix=1.0)),
    "windows": dict(warmup=WindowAdaptation()),
    "windows with a metric": dict(warmup=WindowAdaptation(), kernel=pmcmc.HMC(inverse_mass_matrix=1.0)),
}


@pytest.mark.parametrize("given", share(MODES, "metric of the kernel", "metric of the warm-up", "windows"))
def test_separate_modes_are_seen_with_one_chain(given: dict) -> None:
    with pytest.warns(UserWarning, match=r"did not settle.*its lanes kept apart.*Raise num_warmup") as caught:
        chain = pmcmc.sample(two_modes, jnp.zeros(2), 0, **OPTIONS, **given)
    said = next(str(one.message) for one in caught if "did not settle" in str(one.message))
    assert chain.report.warmup_remark.startswith(said)
    warmup = given.get("warmup", EnsembleAdaptation())
    assert ("WindowAdaptation" in said) == (warmup.metric is None and not isinstance(warmup, WindowAdaptation))


@pytest.mark.parametrize("metric", [None, 1.0], ids=["none given", "given"])
def test_separate_modes_are_seen_in_a_group_of_sites(metric) -> None:
    kernel = pmcmc.Compose(
        [
            (pmcmc.HMC(inverse_mass_matrix=metric), ["a"]),
            pmcmc.Gibbs({"b": pmcmc.kernels.NormalUpdate(lambda x: (0.5 * jnp.sum(x["a"]), 1.0))}),
        ]
    )
    logdensity = lambda x: two_modes(x["a"]) - 0.5 * (x["b"] - 0.5 * jnp.sum(x["a"])) ** 2
    with pytest.warns(UserWarning, match="did not settle") as caught:
        pmcmc.sample(logdensity, {"a": jnp.zeros(2), "b": 0.0}, 0, kernel=kernel, **OPTIONS)
    assert "WindowAdaptation" not in str(caught[0].message)


FINE = {
    "ensemble, wide metric": (gaussian, EnsembleAdaptation(), pmcmc.HMC(inverse_mass_matrix=100 * COVARIANCE)),
    "ensemble, narrow metric": (gaussian, EnsembleAdaptation(), pmcmc.HMC(inverse_mass_matrix=COVARIANCE / 100)),
    "ensemble, metric of eight schools": (eight_schools, EnsembleAdaptation(), pmcmc.HMC(inverse_mass_matrix=100.0)),
    "windows, Gaussian": (gaussian, WindowAdaptation(), pmcmc.HMC()),
    "windows, one start": (gaussian, WindowAdaptation(num_starts=1), pmcmc.HMC()),
    "windows, wide metric": (gaussian, WindowAdaptation(), pmcmc.HMC(inverse_mass_matrix=100 * COVARIANCE)),
    "windows, eight schools": (eight_schools, WindowAdaptation(), pmcmc.HMC()),
    "windows, diagonal": (eight_schools, WindowAdaptation(dense=False), pmcmc.MALA()),
    "sites, HMC": (
        eight_schools,
        SiteAdaptation(),
        pmcmc.Compose([(pmcmc.HMC(), ["mu", "log_tau"]), (pmcmc.MALA(), ["z"])]),
    ),
    "sites, wide metric": (
        eight_schools,
        SiteAdaptation(),
        pmcmc.Compose([(pmcmc.HMC(inverse_mass_matrix=100.0), ["mu", "log_tau"]), (pmcmc.NUTS(), ["z"])]),
    ),
}


@pytest.mark.parametrize("case", share(FINE, "ensemble, wide metric", "windows, eight schools", "sites, HMC"))
@pytest.mark.parametrize("num_steps", [100, 400])
def test_what_was_found_is_not_doubted(case: tuple, num_steps: int) -> None:
    logdensity, warmup, kernel = case
    target = make_target(logdensity)
    for seed in range(3):
        number = warmup.count_starts(target)
        spread = lambda x: jax.random.uniform(jax.random.key(seed), (number, *x.shape), minval=-2, maxval=2)  # noqa: B023
        starts = jax.tree.map(spread, start_like(logdensity))
        assert warmup.run(target, kernel, jax.random.key(seed), starts, num_steps).remark == ""


def test_scales_do_not_count_where_they_are_given(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pmcmc.warmup.ensemble.judge_path", lambda *found: Verdict(False, True))
    target = make_target(gaussian)
    run = lambda kernel: EnsembleAdaptation().run(target, kernel, jax.random.key(0), np.zeros((32, 3)), 40).remark
    assert run(pmcmc.HMC(inverse_mass_matrix=COVARIANCE)) == ""
    assert "did not settle" in run(pmcmc.HMC())


def test_verdict_of_a_path() -> None:
    """A location is found within standard deviations of the draws, if these are wider than the basis."""
    path = np.random.default_rng(0).standard_normal((100, 32, 2))
    judge = lambda x, dense: judge_path(x, *base.path_moments(x, dense))
    for dense in (True, False):
        assert judge(path, dense) == Verdict(True, True)
        assert judge(10 * path + 20, dense) == Verdict(False, True)
        assert judge(10 * path + 40, dense) == Verdict(False, False)
        assert judge(path / 10, dense) == Verdict(False, True)
        apart = path + 4 * np.sign(np.arange(32) - 15.5)[:, None]
        assert judge(apart, dense) == Verdict(False, False)


def test_verdict_of_halves() -> None:
    """Of 1 to 32 paths: none is doubted by chance; drifts, changes of scale and separate modes are seen."""
    rng = np.random.default_rng(0)
    for number, dim in ((1, 1), (4, 3), (4, 50), (32, 100)):
        path = rng.standard_normal((number, 200, dim))

        def judge(path: np.ndarray, dense: bool) -> Verdict:
            lower, median, upper = np.quantile(path.reshape(len(path), 2, 100, -1), [0.25, 0.5, 0.75], axis=2)
            scale = base.path_moments(np.swapaxes(path, 0, 1), dense)[1]
            return judge_halves(median, ((upper - lower) / NORMAL_QUARTILES) ** 2, scale)

        later = (np.arange(200) >= 100)[:, None]
        for dense in (True, False):
            assert judge(path, dense) == Verdict(True, True)
            assert judge(rng.standard_cauchy(path.shape), dense) == Verdict(True, True)
            assert judge(path * np.where(later, 10, 1), dense) == Verdict(False, True)
            assert judge(path + 4 * later, dense) == Verdict(False, False)
            if number > 1:
                sides = np.where(np.arange(number) % 2, 4, -4)[:, None, None] * (np.arange(dim) == 0)
                assert judge(path + sides, dense) == Verdict(False, False)
        if number > 1 and dim > 1:  # along a diagonal, which no coordinate shows
            turn = np.where(np.arange(number) % 2, 1, -1)[:, None, None] * np.array([1.0, -1.0] + [0.0] * (dim - 2))
            narrow = path.copy()
            narrow[..., 1] = narrow[..., 0] + 0.05 * narrow[..., 1]
            assert judge(narrow, True) == Verdict(True, True)
            assert not judge(narrow + 0.3 * turn, True).placed
