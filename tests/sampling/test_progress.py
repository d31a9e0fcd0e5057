"""The progress bar, and the draws of warm-up on request."""

import io
import sys
from functools import cache

import arviz as az
import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import pytest

import pmcmc
from pmcmc.recurrence import MultipleShooting

SIZES = dict(num_warmup=100, num_samples=800, num_chains=2)


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def model(y):
    with numpyro.plate("school", 3):
        mu = numpyro.sample("mu", dist.Normal(0, 1))
        tau = numpyro.sample("tau", dist.HalfNormal(1.0))
        numpyro.deterministic("twice", 2 * mu)
        numpyro.sample("y", dist.Normal(mu, 1.0 + tau), obs=y)


def run(**options) -> pmcmc.Chain:
    options = {"solver": MultipleShooting(4), "save_warmup": True, **SIZES, **options}
    return pmcmc.parallel_chain(model, 0, model_args=(jnp.array([0.8, 1.4, -0.2]),), **options)


def bar(monkeypatch: pytest.MonkeyPatch, stream: io.StringIO, **options) -> tuple[str, pmcmc.Chain]:
    monkeypatch.setattr(sys, "stderr", stream)
    chain = run(**options)
    monkeypatch.undo()
    return stream.getvalue(), chain


@cache
def saved() -> pmcmc.Chain:
    return run(progress_bar=False)


def test_bar_in_a_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    text, chain = bar(monkeypatch, Terminal())
    shown = text.split("\r")
    stages = ("warm-up:   0%", "compile and sample:   0%", "compile and sample: 100%")
    places = [next(i for i, line in enumerate(shown) if line.startswith(stage)) for stage in stages]
    assert places == sorted(places)
    last = shown[-1]
    assert "800/800" in last
    assert "step/s" in last  # with thinning they are not draws
    assert f"sweeps: {chain.report.num_sweeps.max()}" in last
    assert any("steps]" in line for line in shown[: places[1]])


@pytest.mark.parametrize(("stream", "show"), [(io.StringIO, True), (Terminal, False)])
def test_quiet(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture, stream: type, show: bool) -> None:
    assert bar(monkeypatch, stream(), progress_bar=show)[0] == ""
    assert capsys.readouterr() == ("", "")


def test_widget_in_a_notebook(monkeypatch: pytest.MonkeyPatch) -> None:
    from tqdm import auto

    class Widget(auto.tqdm):  # what tqdm.auto gives in a notebook
        pass

    monkeypatch.setattr(auto, "tqdm", Widget)
    assert "800/800" in bar(monkeypatch, io.StringIO())[0]


def test_saving_changes_no_draw() -> None:
    np.testing.assert_array_equal(saved().unknowns, run(progress_bar=False, save_warmup=False).unknowns)


def test_warmup_draws() -> None:
    draws = saved().get_warmup_samples()
    lanes, steps = draws["mu"].shape[:2]
    assert lanes == 32
    assert steps > 100  # a hundred steps tune the step size alone
    assert draws["mu"].shape == draws["tau"].shape == (32, steps, 3)
    np.testing.assert_array_equal(draws["twice"], 2 * draws["mu"])
    assert np.all(draws["tau"] > 0)
    # The last third is the tuned kernel in the posterior: as spread out as the chains, wherever lanes started.
    settled = np.log(draws["tau"][:, -30:]).std(axis=(0, 1))
    chains = np.log(saved().get_samples()["tau"]).std(axis=0)
    np.testing.assert_allclose(settled, chains, rtol=0.5)
    # It ends where the chains begin: the last of the lanes are the ensemble.
    ends = jax.vmap(lambda x: saved().kernel.position(saved().target, x))(saved().state.ensemble)
    np.testing.assert_allclose(draws["mu"][:, -1], ends["mu"], rtol=0, atol=1e-10)


@pytest.mark.filterwarnings("ignore")  # ArviZ's own dependencies
def test_warmup_groups() -> None:
    data = saved().to_arviz()
    draws = saved().get_warmup_samples()
    assert data.warmup_posterior["mu"].dims == ("chain", "draw", "school")
    np.testing.assert_array_equal(data.warmup_posterior["mu"], draws["mu"])
    lp = data.warmup_sample_stats["lp"]
    assert lp.shape == draws["mu"].shape[:2]
    own = data.sample_stats["lp"].values
    assert own.mean() - 5 * own.std() < lp.values[:, -30:].mean() < own.max()
    assert set(az.summary(data, var_names=["mu"]).index) == {"mu[0]", "mu[1]", "mu[2]"}
    longer = saved().extend(20, progress_bar=False)
    np.testing.assert_array_equal(longer.get_warmup_samples()["mu"], draws["mu"])


def test_pathfinder_keeps_what_comes_behind_it() -> None:
    assert pmcmc.warmup.Pathfinder().shows_path
    assert not pmcmc.warmup.Pathfinder(then=pmcmc.WindowAdaptation()).shows_path


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"warmup": pmcmc.WindowAdaptation()}, r"not possible with WindowAdaptation, .*: use EnsembleAdaptation\(\)"),
        ({"num_warmup": 0, "kernel": pmcmc.MALA(step_size=0.1)}, "there is no warm-up to save"),
    ],
)
def test_refused(options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        run(progress_bar=False, **options)


def test_not_kept_unless_asked() -> None:
    chain = run(progress_bar=False, save_warmup=False)
    with pytest.raises(ValueError, match="save_warmup=True"):
        chain.get_warmup_samples()
