"""`Chain.to_arviz` has the groups and names that ArviZ's functions read."""

from functools import cache
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import pytest
from numpyro.contrib.control_flow import scan
from numpyro.infer import Predictive

import pmcmc
from pmcmc.chain.state import model_source
from pmcmc.interop.arviz import without_slashes
from pmcmc.recurrence import Sequential
from tests.helpers.targets import gaussian, start_like

az = pytest.importorskip("arviz")
pytestmark = pytest.mark.filterwarnings("ignore")  # ArviZ's own dependencies

X = np.random.default_rng(0).normal(size=(6, 3))
Y = X.sum(axis=1)[:, None] + np.arange(2)[None]
SEEN = np.ones((6, 2), bool)
SEEN[0, 0] = False


@pytest.fixture(autouse=True)
def numpyro_broadcasts_over_ranks():
    """Allow rank promotion, which NumPyro's own code needs."""
    with jax.numpy_rank_promotion("allow"):
        yield


def model(x, seen, y=None):
    slopes = numpyro.sample("slopes", dist.Normal(0, 1).expand([3]).to_event(1), infer={"event_dims": ["slope"]})
    with numpyro.plate("place", 2):
        level = numpyro.sample("level", dist.Normal(0, 1))
        numpyro.deterministic("total", jnp.sum(level))
    numpyro.factor("penalty", -jnp.sum(level**4))
    with numpyro.plate("day", 6, dim=-2), numpyro.plate("place", 2, dim=-1), numpyro.handlers.mask(mask=seen):
        numpyro.sample("y", dist.Normal((x @ slopes)[:, None] + level[None], 1.0), obs=y)


@cache
def chain(all_seen: bool = False) -> pmcmc.Chain:
    return pmcmc.parallel_chain(
        model,
        0,
        model_args=(X, SEEN | all_seen),
        model_kwargs={"y": Y},
        num_warmup=100,
        num_samples=200,
        num_chains=2,
        solver=Sequential(),
        progress_bar=False,
    )


def groups(data) -> set[str]:
    return set(data.groups() if callable(data.groups) else data.children)


def test_groups_and_names() -> None:
    data = chain().to_arviz()
    assert groups(data) == {"posterior", "sample_stats", "observed_data", "constant_data"}
    assert data.posterior["slopes"].dims == ("chain", "draw", "slope")
    assert data.posterior["level"].dims == ("chain", "draw", "place")
    assert data.posterior["total"].dims == ("chain", "draw")
    assert data.observed_data["y"].dims == ("day", "place")
    np.testing.assert_array_equal(data.observed_data["y"], Y)
    assert set(data.observed_data.data_vars) == {"y"}  # a factor is not data
    assert set(data.constant_data.data_vars) == {"x", "seen"}
    assert data.attrs["decision"] == "sequential"
    assert data.attrs["num_sequential_steps"] == 200


def test_log_likelihood(monkeypatch: pytest.MonkeyPatch) -> None:
    """Computed in pieces of 5 draws; masked observations have 0, as in NumPyro."""
    monkeypatch.setattr(pmcmc.chain.stored, "LIKELIHOOD_BATCH", 60)
    data = chain().to_arviz(log_likelihood=True)
    found = data.log_likelihood["y"]
    assert found.dims == ("chain", "draw", "day", "place")
    slopes, level = data.posterior["slopes"].values, data.posterior["level"].values
    mean = np.einsum("ij,cdj->cdi", X, slopes)[..., None] + level[:, :, None]
    expected = np.where(SEEN, dist.Normal(mean, 1.0).log_prob(Y), 0.0)
    np.testing.assert_allclose(found, expected, rtol=1e-9)


def test_loo_and_compare() -> None:
    """ArviZ 1.x refuses observations with a constant log likelihood, which masked ones have."""
    data = chain(all_seen=True).to_arviz(log_likelihood=True)
    found = az.loo(data)
    assert np.isfinite(found.elpd_loo if hasattr(found, "elpd_loo") else found.elpd)
    assert len(az.compare({"one": data, "other": data})) == 2


def test_predictive_groups() -> None:
    samples = chain().get_samples()
    after = Predictive(model, samples)(jax.random.key(1), X, SEEN)
    before = Predictive(model, num_samples=50)(jax.random.key(2), X, SEEN)
    data = chain().to_arviz(prior=before, posterior_predictive={"y": after["y"]})
    assert data.posterior_predictive["y"].dims == ("chain", "draw", "day", "place")
    np.testing.assert_array_equal(data.posterior_predictive["y"].values.reshape(400, 6, 2), after["y"])
    assert set(data.prior.data_vars) == {"slopes", "level", "total"}
    assert data.prior_predictive["y"].shape == (1, 50, 6, 2)
    some = chain().to_arviz(sites=["level"], prior=before)  # no site is observed because the posterior lacks it
    assert set(some.posterior.data_vars) == {"level"}
    assert set(some.prior.data_vars) == {"slopes", "level", "total"}
    assert set(some.prior_predictive.data_vars) == set(data.prior_predictive.data_vars)
    with pytest.raises(ValueError, match=r"'y' of shape \(399, 6, 2\): expected 400 draws.*of all draws"):
        chain().to_arviz(posterior_predictive={"y": after["y"][1:]})


def test_changes_in_place_leave_the_chain_alone() -> None:
    whole = chain(all_seen=True)
    before = jax.tree.map(np.array, (whole.get_samples(), whole.info, whole.state.source.constant))
    data = whole.to_arviz()
    for values in (data.posterior["level"], data.sample_stats["lp"], data.constant_data["x"]):
        values *= 1000
    after = (whole.get_samples(), whole.info, whole.state.source.constant)
    jax.tree.map(np.testing.assert_array_equal, after, before)


def test_the_steps_of_a_scan_are_not_called_like_a_plate_of_the_same_length() -> None:
    def walk():
        def step(carry, _):
            with numpyro.plate("series", 4):
                x = numpyro.sample("x", dist.Normal(carry, 1))
                numpyro.deterministic("twice", 2 * x)
            return x, None

        scan(step, jnp.zeros(4), None, length=4)

    kernel = pmcmc.HMC(step_size=0.1, num_integration_steps=2)
    data = pmcmc.parallel_chain(walk, 0, kernel=kernel, num_warmup=0, num_samples=4, progress_bar=False).to_arviz()
    assert not [name for name in ("x", "twice") if "series" in data.posterior[name].dims]


@pytest.mark.parametrize("streamed", [False, True])
def test_plates_of_one_name_and_two_sizes_are_axes_of_their_own(streamed: bool, tmp_path: Path) -> None:
    data = [np.arange(3), np.arange(5)]

    def groups():
        with numpyro.plate("side", 2, dim=-2):
            for k, y in enumerate(data):
                with numpyro.plate("obs", len(y), dim=-1):
                    x = numpyro.sample(f"x{k}", dist.Normal(0, 1))
                    numpyro.sample(f"y{k}", dist.Poisson(jnp.exp(x)), obs=np.stack([y, y]))

    settings = dict(kernel=pmcmc.HMC(step_size=0.1, num_integration_steps=2), num_warmup=0, num_samples=4, num_chains=2)
    chain = pmcmc.parallel_chain(groups, 0, progress_bar=False, solver=Sequential(), **settings)
    if streamed:
        pytest.importorskip("zarr")
        chain = chain.stream(tmp_path / "draws", 4, progress_bar=False)
    found = chain.to_arviz(**({} if streamed else {"log_likelihood": True}))
    for k, y in enumerate(data):
        assert found.observed_data[f"y{k}"].dtype == y.dtype
        np.testing.assert_array_equal(found.observed_data[f"y{k}"], [y, y])
        assert found.posterior[f"x{k}"].dims == ("chain", "draw", "side", f"x{k}_dim_1")
        assert np.isfinite(found.posterior[f"x{k}"]).all()
        assert streamed or np.isfinite(found.log_likelihood[f"y{k}"]).all()


def test_labels_of_the_user() -> None:
    data = chain().to_arviz(coords={"place": ["north", "south"], "side": list("abc")}, dims={"slopes": ["side"]})
    assert list(data.posterior["level"].coords["place"].values) == ["north", "south"]
    assert data.posterior["slopes"].dims == ("chain", "draw", "side")


@pytest.mark.parametrize("event_dims", [[], ["other"]])
def test_labels_of_the_axes_after_those_of_plates(event_dims: list[str]) -> None:
    def groups():
        with numpyro.plate("group", 2):
            z = dist.Normal(0, 1).expand([2]).to_event(1)
            numpyro.sample("z", z, infer={"event_dims": event_dims})
            numpyro.sample("y", z, obs=np.eye(2))

    kernel = pmcmc.HMC(step_size=0.1, num_integration_steps=2)
    chain = pmcmc.parallel_chain(groups, 0, kernel=kernel, num_warmup=0, num_samples=4, progress_bar=False)
    found = chain.to_arviz(dims={"z": ["coef"], "y": ["coef"]}, coords={"group": ["a", "b"], "coef": ["c", "d"]})
    assert found.posterior["z"].dims == ("chain", "draw", "group", "coef")
    assert list(found.posterior["z"].coords["group"].values) == ["a", "b"]
    assert found.observed_data["y"].dims == ("group", "coef")
    assert chain.to_arviz(dims={"z": ["row", "column"]}).posterior["z"].dims == ("chain", "draw", "row", "column")


def test_round_trip_through_a_file(tmp_path: Path) -> None:
    pytest.importorskip("h5netcdf")
    data = chain().to_arviz(log_likelihood=True)
    data.to_netcdf(str(tmp_path / "chain.nc"), **({"engine": "h5netcdf"} if callable(data.groups) else {}))
    back = az.from_netcdf(str(tmp_path / "chain.nc"), **({"engine": "h5netcdf"} if callable(data.groups) else {}))
    assert groups(back) == groups(data)
    for group in groups(data):
        for name, x in data[group].data_vars.items():
            np.testing.assert_array_equal(back[group][name].values, x.values)


def test_plot_trace() -> None:
    plt = pytest.importorskip("matplotlib.pyplot")
    plt.switch_backend("agg")
    az.plot_trace(chain().to_arviz())
    plt.close("all")


def test_a_plain_log_density_has_no_observations() -> None:
    plain = pmcmc.sample(
        gaussian, start_like(gaussian), 0, num_warmup=100, num_samples=20, solver=Sequential(), progress_bar=False
    )
    assert groups(plain.to_arviz()) == {"posterior", "sample_stats"}
    with pytest.raises(ValueError, match="needs a NumPyro model with observed sites"):
        plain.to_arviz(log_likelihood=True)


def test_constants_are_described_as_they_were_passed() -> None:
    """Without 64 bits JAX rounds data; ArviZ gets the user's own."""
    dates, counts = X + 2_450_000.123, Y + 0.1
    counts[0, 0] = np.nan  # masked
    with (jax.enable_x64 if hasattr(jax, "enable_x64") else jax.experimental.enable_x64)(False):
        source = model_source(model, (dates, SEEN), {"y": counts})
        found = source.describe(source.target, {"slopes": jnp.zeros(3), "level": jnp.zeros(2)})
    assert set(found.constant) == {"x", "seen"}  # y is observed
    np.testing.assert_array_equal(found.constant["x"], dates)
    np.testing.assert_array_equal(found.observed["y"], counts)
    assert found.observed["y"].dtype == np.float64


def test_no_sites() -> None:
    """Such as for `arviz.loo`, which reads log likelihoods only."""
    chain = pmcmc.sample(gaussian, start_like(gaussian), 0, num_samples=20, num_warmup=100, progress_bar=False)
    found = chain.to_arviz(sites=[])
    assert found.sample_stats["lp"].shape == (4, 20)
    assert "Number of divergences" in repr(chain.summary(sites=[]))


def test_a_stream_shows_the_data_of_scoped_sites(tmp_path) -> None:
    """NumPyro's `scope` writes slashes into names, which are folders on disk; a plate may be called "draw"."""
    pytest.importorskip("zarr", reason="the zarr extra is not installed")
    y = jnp.arange(5.0)

    def study(theta):
        with numpyro.plate("draw", 5):
            numpyro.sample("y", dist.Normal(theta, 1), obs=y)

    def model():
        theta = numpyro.sample("theta", dist.Normal())
        numpyro.handlers.scope(study, prefix="first")(theta)
        study(theta)

    chain = pmcmc.parallel_chain(model, 0, num_warmup=50, num_samples=10, num_chains=2, progress_bar=False)
    stored = chain.stream(tmp_path / "run", 10, progress_bar=False).to_arviz()
    for name, dim in (("first.y", "first/draw"), ("y", "y_dim_0")):
        np.testing.assert_array_equal(stored.observed_data[name], y)
        assert stored.observed_data[name].dims == (dim,)
    assert stored.posterior.sizes["draw"] == 20


def test_slashes_in_names() -> None:
    assert without_slashes({"a/b/c": 1, "d": 2}) == {"a.b.c": 1, "d": 2}
    assert without_slashes({"a/b": 1, "a.b": 2}) == {"a/b": 1, "a.b": 2}
