"""Warm-up chooses how far sites are centred; draws, files and continued runs are those of the fixed target."""

from functools import cache
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import pytest
from numpyro.infer import NUTS, init_to_value
from numpyro.infer.util import constrain_fn, potential_energy

import pmcmc
from benchmarks._compilations import compilations
from pmcmc._xla.trace import Trace
from pmcmc.chain.state import model_source
from pmcmc.interop.numpyro import numpyro_target
from pmcmc.numpyro_states import standing
from pmcmc.recurrence import MultipleShooting, Sequential
from pmcmc.sampling.api import model_starts
from pmcmc.sampling.settings import Settings
from pmcmc.target import Place
from pmcmc.warmup import centredness
from pmcmc.warmup.centredness import GRID, NOISE, choose, moved
from pmcmc.warmup.ensemble import Explorer, explore
from pmcmc.warmup.frame import Frame
from pmcmc.warmup.settlement import REMEDY_OF_ENSEMBLE, Verdict, remedy_for, unsettled

OPTIONS = dict(reparam=pmcmc.AutoReparam(), solver=Sequential(), num_chains=2, progress_bar=False)
SIZES = dict(num_warmup=200, num_samples=60)
ROWS = 100
Y = np.random.default_rng(0).normal(1.0, 1.0, (2, ROWS)) * np.array([[1.0], [0.1]])


@pytest.fixture(autouse=True)
def numpyro_broadcasts_over_ranks():
    """Allow rank promotion, which NumPyro's own code needs."""
    with jax.numpy_rank_promotion("allow"):
        yield


def model(y):
    """Three elements: without data, with a few rows, and one that many precise rows determine."""
    mu = numpyro.sample("mu", dist.Normal(0, 1))
    tau = numpyro.sample("tau", dist.LogNormal(0, 0.5))
    x = numpyro.sample("x", dist.Normal(mu, tau).expand([3]).to_event(1))
    numpyro.deterministic("double", 2 * x)
    numpyro.sample("y", dist.Normal(x[1:, None], jnp.array([[10.0], [0.1]])).to_event(2), obs=y)


@cache
def finished() -> pmcmc.Chain:
    return pmcmc.parallel_chain(model, 0, model_args=(Y,), **SIZES, **OPTIONS)


def place(x: np.ndarray, mu: np.ndarray, s: np.ndarray, is_heavy: bool = False) -> Place:
    return Place(x[:, None], ((x - mu) / s)[:, None], mu[:, None], np.log(s)[:, None], np.full(len(x), is_heavy))


def test_prior_draws_are_not_centred_and_determined_elements_are() -> None:
    rng = np.random.default_rng(0)
    mu, s, z = rng.normal(size=1000), np.exp(rng.normal(size=1000)), rng.normal(size=1000)
    assert choose(place(mu + s * z, mu, s)) == 0
    assert choose(place(1 + 0.01 * z, mu, s)) == 1


def test_between_them_the_divergence_of_a_normal_law_is_least() -> None:
    """x given y, with y = x + noise of the prior's size; the divergence is computed from densities of x."""
    rng = np.random.default_rng(0)
    mu, s = rng.normal(size=4000), np.exp(0.5 * rng.normal(size=4000))
    x = (mu + s**2) / (1 + s**2) + s / np.sqrt(1 + s**2) * rng.normal(size=4000)

    def divergence(c: float) -> float:
        """Mean of log q(w), the log density of w's own normal law, turned into one of x, with the sign of a loss."""
        w = c * mu + (x - mu) / s ** (1 - c)
        normal = -((w - w.mean()) ** 2) / (2 * w.var()) - np.log(w.std())
        return -np.mean(normal + np.log(1 / s ** (1 - c)))

    losses = np.array([divergence(c) for c in GRID])
    least = np.argmin(losses)
    assert 0 < least < len(GRID) - 1
    expected = np.argmax(losses <= losses[least] + NOISE / len(x))
    assert choose(place(x, mu, s)) == GRID[expected]


def test_noise_does_not_centre_elements() -> None:
    """Of 512 draws, each of which a lane of warm-up repeats five times; the best form is either end."""
    found = []
    for seed in range(50):
        mu, log_s, z = np.repeat(np.random.default_rng(seed).normal(size=(3, 103)), 5, axis=1)[:, :512]
        s = np.exp(0.5 * log_s)
        found.append((choose(place(mu + s * z, mu, s)), choose(place(0.2 * z, 0.5 * mu, s))))
    non_centred, centred = np.array(found)[..., 0].T
    assert np.mean(non_centred == 0) >= 0.9  # 0.7 of them by the least divergence
    assert centred.min() >= 0.8


def test_the_least_c_within_noise_is_taken() -> None:
    """More draws determine c more closely, from below."""
    rng = np.random.default_rng(0)
    mu, s = rng.normal(size=2**14), np.exp(0.5 * rng.normal(size=2**14))
    x = (mu + s**2) / (1 + s**2) + s / np.sqrt(1 + s**2) * rng.normal(size=2**14)
    found = [choose(place(x[:n], mu[:n], s[:n])).item() for n in (512, 2**14)]
    assert 0 <= found[0] < found[1] < 1


def test_families_without_a_variance_are_centred_by_their_quartiles() -> None:
    for seed in range(20):
        rng = np.random.default_rng(seed)
        mu, s, z = rng.normal(size=512), np.exp(rng.normal(size=512)), rng.standard_cauchy(512)
        assert choose(place(mu + s * z, mu, s, is_heavy=True)) == 0
        assert choose(place(1 + 0.01 * rng.normal(size=512), mu, s, is_heavy=True)) == 1


@pytest.mark.parametrize(("family", "is_heavy"), [(dist.Cauchy, True), (dist.Normal, False)])
def test_families_without_a_variance_are_known(family, is_heavy: bool) -> None:
    def model():
        numpyro.sample("x", family(numpyro.sample("mu", dist.Normal(0, 1)), 1.0))

    target = numpyro_target(model, (), {}, pmcmc.AutoReparam())
    assert bool(target.model.places(target.data, target.spec.unravel(jnp.ones(2)))["x"].is_heavy) == is_heavy


def test_elements_that_do_not_vary_are_not_centred() -> None:
    ones = np.ones(10)
    assert choose(place(ones, 0 * ones, ones)) == 0
    assert choose(place(np.nan * ones, 0 * ones, ones)) == 0


def test_an_element_that_stays_may_have_any_scale() -> None:
    target = numpyro_target(model, (Y,), {}, pmcmc.AutoReparam())
    rows = np.ones((3, target.dim))
    rows[1, 1] = 1e4  # the logarithm of tau, which is infinite
    there = moved(target, rows, {"x": np.array([0.0, 0.0, 0.5])})
    np.testing.assert_array_equal(there[:, :4], rows[:, :4])
    assert not np.isfinite(there[1, 4])
    assert np.isfinite(there[[0, 2], 4]).all()


def test_float32_keeps_draws_in_the_neck_of_a_funnel() -> None:
    """Where x differs from mu by less than float32 resolves."""

    def funnel():
        mu, tau = numpyro.sample("mu", dist.Normal(0, 1)), numpyro.sample("tau", dist.LogNormal(0, 1))
        numpyro.sample("x", dist.Normal(mu, tau))

    with jax.enable_x64(False):
        target, z = numpyro_target(funnel, (), {}, pmcmc.AutoReparam()), np.linspace(-2, 2, 9)
        rows = np.stack([np.full(9, 100.0), np.full(9, np.log(1e-7)), z], axis=1)
        there = moved(target, rows, {"x": np.array(0.25)})
    np.testing.assert_allclose(there[:, 2], 25 + 1e-7**0.25 * z, rtol=1e-6)


def test_draws_are_moved_at_the_same_values() -> None:
    target, rng = numpyro_target(model, (Y,), {}, pmcmc.AutoReparam()), np.random.default_rng(0)
    target = target.with_centredness({"x": np.array([0.2, 0.0, 0.7])})
    rows = rng.normal(size=(7, 100, target.dim))  # more rows than are moved at a time
    there = {"x": np.array([1.0, 0.5, 0.0])}
    other = moved(target, rows, there)
    values = lambda t, rows: jax.vmap(jax.vmap(lambda row: t.constrain(row)["double"]))(jnp.asarray(rows))
    np.testing.assert_allclose(values(target.with_centredness(there), other), values(target, rows), rtol=1e-12)
    assert np.all(np.any(other != rows, axis=(0, 1)) == [False, False, True, True, True])  # sites by name: mu, tau, x
    back = moved(target.with_centredness(there), other, target.centredness)
    np.testing.assert_allclose(back, rows, atol=1e-12)


@pytest.mark.parametrize("rows", [1, 3])
def test_places_are_computed_within_a_budget(rows: int, monkeypatch: pytest.MonkeyPatch) -> None:
    target, path = numpyro_target(model, (Y,), {}, pmcmc.AutoReparam()), np.random.default_rng(0).normal(size=(7, 1, 5))
    there = {"x": np.array([1.0, 0.5, 0.0])}
    expected = moved(target, path, there)
    monkeypatch.setattr(centredness, "PLACES_BYTES", rows * 8 * (5 + 4 * 3))
    seen, compute = [], centredness._places_of_rows
    watched = lambda target, rows: seen.append(len(rows)) or compute(target, rows)
    monkeypatch.setattr(centredness, "_places_of_rows", watched)
    np.testing.assert_allclose(moved(target, path, there), expected, rtol=1e-12)
    assert set(seen) == {rows}


def explorer_after(path: np.ndarray, burn_in: int = 0) -> Explorer:
    """Return the ensemble as it is after a window with this path, in the coordinates of its draws."""
    target = numpyro_target(model, (Y,), {}, pmcmc.AutoReparam())
    explorer = Explorer(target, jax.random.key(0), path[-1], dense=True, num_steps=1000)
    explorer.path, explorer.burn_in, explorer.positions = path, burn_in, path[-1]
    factor = np.linalg.cholesky(np.cov(path[burn_in:].reshape(-1, 5).T))
    explorer.frame = Frame(path[burn_in:].mean(axis=(0, 1)), factor)
    return explorer


def window(num_steps: int, num_lanes: int) -> np.ndarray:
    """Return a path of mu, log tau and z, where the last element of x = mu + tau z is determined."""
    path = np.random.default_rng(0).normal(size=(num_steps, num_lanes, 5))
    path[..., 1] = 0.3 * path[..., 1] + 0.999 * path[..., 0]
    path[..., 4] = (1.0 + 0.001 * path[..., 4] - path[..., 0]) / np.exp(path[..., 1])
    return path


def test_few_lanes_keep_the_correlations_that_they_know() -> None:
    """Although so few draws would show less of them in the coordinates of the sites."""
    path = window(10, 4)
    path[..., 1] = path[..., 0] + 0.01 * path[..., 1]
    path[..., 4] = (1.0 - path[..., 0]) / np.exp(path[..., 1]) + 0.1 * path[..., 4]
    explorer = explorer_after(path)
    explorer.recentre()
    assert explorer.target.centredness["x"][2] == 1
    covariance = explorer.frame.scale @ explorer.frame.scale.T
    assert covariance[0, 1] ** 2 / (covariance[0, 0] * covariance[1, 1]) > 0.999


def test_the_basis_stays_where_the_centredness_does() -> None:
    explorer = explorer_after(window(20, 32))
    explorer.recentre()
    first, target = explorer.frame, explorer.target
    np.testing.assert_array_equal(target.centredness["x"], [0, 0, 1])
    explorer.recentre()
    assert explorer.frame is first
    assert explorer.target is target


def test_positions_that_overflow_in_other_coordinates_keep_the_coordinates() -> None:
    path = window(20, 32)
    path[0, 0, 1] = 1e4  # within the steps that do not count, so the choice does not see it
    explorer = explorer_after(path, burn_in=1)
    explorer.recentre()
    assert np.all(explorer.target.centredness["x"] == 0)
    np.testing.assert_array_equal(explorer.positions, path[-1])
    path[0, 0, 1] = 0.0
    explorer = explorer_after(path, burn_in=1)
    explorer.recentre()
    np.testing.assert_array_equal(explorer.target.centredness["x"], [0, 0, 1])


def test_the_centredness_is_chosen_from_all_of_a_window_without_odd_lanes(monkeypatch: pytest.MonkeyPatch) -> None:
    path, seen, compute = window(33, 32), [], centredness._places
    path[:, 7] = 50.0
    explorer = explorer_after(path)
    explorer.usual[7] = False
    watched = lambda target, rows: seen.append(rows) or compute(target, rows)
    monkeypatch.setattr(centredness, "_places", watched)
    explorer.recentre()
    np.testing.assert_array_equal(seen[0], np.delete(path[::2], 7, axis=1).reshape(-1, 5))
    np.testing.assert_array_equal(explorer.target.centredness["x"], [0, 0, 1])


def test_the_path_is_kept_only_for_partially_centred_sites() -> None:
    target = numpyro_target(model_of_constant_scales, (), {})
    explorer = Explorer(
        target, jax.random.key(0), np.random.default_rng(0).normal(size=(4, 5)), dense=True, num_steps=1000
    )
    explorer.run_window(1)
    assert explorer.finite
    assert explorer.path.size == 0


def test_a_short_warm_up_chooses_the_centredness_twice(monkeypatch: pytest.MonkeyPatch) -> None:
    done: list = []

    def run_window(self: Explorer, num_pieces: int) -> None:
        done.append(num_pieces)
        self.verdict = Verdict(True, True)

    monkeypatch.setattr(Explorer, "run_window", run_window)
    monkeypatch.setattr(Explorer, "recentre", lambda self: done.append("choice"))
    for reparam, lengths in ((pmcmc.AutoReparam(), [2, 3]), (None, [5])):
        done.clear()
        explore(numpyro_target(model, (Y,), {}, reparam), jax.random.key(0), np.zeros((32, 5)), 5, dense=True)
        assert done == [1, *(step for length in lengths for step in ("choice", length))]


def test_a_warm_up_that_did_not_settle_suggests_what_is_possible() -> None:
    said = lambda model, reparam=None, args=(): unsettled(
        100, remedy_for(numpyro_target(model, args, {}, reparam), REMEDY_OF_ENSEMBLE)
    )
    plain, hierarchy = said(model_of_constant_scales), said(model, args=(Y,))
    chosen = said(model, pmcmc.AutoReparam(), (Y,))
    assert all(
        text.startswith("Warm-up did not settle") and "(it was 100)" in text for text in (plain, hierarchy, chosen)
    )
    assert "WindowAdaptation" in plain
    assert "AutoReparam" not in plain
    assert "by reparam=pmcmc.AutoReparam() with the default warm-up." in hierarchy
    assert "WindowAdaptation" not in chosen
    assert "AutoReparam" not in chosen


def test_every_element_is_centred_as_far_as_its_data_reach() -> None:
    chain = finished()
    none, few, many = np.asarray(chain.target.centredness["x"])
    assert none <= 0.1
    assert few < many
    assert many >= 0.9
    assert chain.report.centredness == {"x": pytest.approx((none, many))}
    assert f"Centredness (0 non-centred, 1 centred): x {none:.2f} to {many:.2f}." in str(chain.report)
    draws = chain.get_samples()
    assert {name: x.shape for name, x in draws.items()} == dict(mu=(120,), tau=(120,), x=(120, 3), double=(120, 3))
    np.testing.assert_allclose(draws["double"], 2 * draws["x"])
    assert set(chain.to_arviz().posterior.data_vars) == set(draws)
    assert chain.verify()


def test_blocks_find_the_same_chain() -> None:
    solver = MultipleShooting(num_blocks=2)
    blocks = pmcmc.parallel_chain(model, 0, model_args=(Y,), **SIZES, **{**OPTIONS, "solver": solver})
    np.testing.assert_array_equal(blocks.target.centredness["x"], finished().target.centredness["x"])
    assert np.all(blocks.report.certified_steps > 0)
    np.testing.assert_allclose(blocks.unknowns, finished().unknowns, atol=1e-9)


def test_other_data_compile_nothing() -> None:
    """Nor does another centredness, which other data cause."""
    first = finished()
    with compilations() as compiled:
        second = pmcmc.parallel_chain(model, 0, model_args=(Y + 10,), **SIZES, **OPTIONS)
    assert not compiled
    assert np.any(first.target.centredness["x"] != second.target.centredness["x"])


def test_mixing_is_that_of_the_users_values() -> None:
    chain = finished()
    x = chain.get_samples(group_by_chain=True)["x"]
    ess, element = chain.report.mixing.bulk_ess["x"]
    expected = pmcmc.chain.draws.judge({"x": np.asarray(x)}).bulk_ess["x"]
    np.testing.assert_allclose((ess, *element), (expected[0], *expected[1]), rtol=1e-9)


def test_a_file_keeps_the_centredness(tmp_path: Path) -> None:
    chain = finished()
    chain.save(tmp_path / "chain.npz")
    back = pmcmc.load(tmp_path / "chain.npz", model, model_args=(Y,))
    np.testing.assert_array_equal(back.target.centredness["x"], chain.target.centredness["x"])
    ours, theirs = (c.extend(30, progress_bar=False).get_samples() for c in (back, chain))
    jax.tree.map(np.testing.assert_array_equal, ours, theirs)
    assert back.verify()
    assert back.report.centredness == chain.report.centredness
    flat = lambda y: numpyro.sample("y", dist.Normal(model_of_constant_scales(), 1), obs=y)
    with pytest.raises(ValueError, match=r"has the partially centred sites .*'x'.*pass the model"):
        pmcmc.load(tmp_path / "chain.npz", flat, model_args=(Y[0],))


def model_of_constant_scales():
    """The sites of `model`, none of which depends on another."""
    numpyro.sample("tau", dist.LogNormal(0, 1))
    return numpyro.sample("mu", dist.Normal(0, 1)) + numpyro.sample("x", dist.Normal(0, 1).expand([3]).to_event(1))[0]


@pytest.mark.parametrize(
    ("odd", "words"),
    [
        ([0.0, 0.5, 1.5], r"not a whole file .*its centredness is not within 0 and 1"),
        ([0.0, np.nan, 1.0], r"not a whole file .*its centredness is not within 0 and 1"),
        ([0, 1, 1], r"not a whole file .*its centredness is not within 0 and 1"),
        ([0.5], "has the partially centred sites"),
    ],
)
def test_a_damaged_centredness_is_seen(odd: list, words: str, tmp_path: Path) -> None:
    path = tmp_path / "chain.npz"
    finished().save(path)
    with np.load(path) as file:
        entries = {name: file[name] for name in file.files}
    np.savez(path, **{**entries, "centredness/x": np.array(odd)})
    with pytest.raises(ValueError, match=words):
        pmcmc.load(path, model, model_args=(Y,))


def test_a_stored_chain_is_resumed(tmp_path: Path) -> None:
    pytest.importorskip("zarr")
    chain = finished()
    chain.stream(tmp_path / "run", 40, progress_bar=False)
    back = pmcmc.resume(tmp_path / "run", model, model_args=(Y,), progress_bar=False)
    expected = chain.extend(40, progress_bar=False).get_samples(group_by_chain=True)["x"]
    np.testing.assert_array_equal(back.get_samples(group_by_chain=True)["x"], expected)
    np.testing.assert_array_equal(back.state.target.centredness["x"], chain.target.centredness["x"])


def test_draws_of_warm_up_are_the_users_values() -> None:
    """Although they were made under several degrees of centring."""
    chain = pmcmc.parallel_chain(model, 0, model_args=(Y,), save_warmup=True, **SIZES, **OPTIONS)
    draws = chain.get_warmup_samples()
    rows = chain.target.spec.unravel(jnp.asarray(chain.warmup_path))
    at = lambda *index: jax.tree.map(lambda x: x[index], rows)
    for index in ((0, 0), (3, 40), (31, -1)):
        expected = constrain_fn(model, (Y,), {}, at(*index), return_deterministic=True)
        for name, values in draws.items():
            np.testing.assert_allclose(values[index], expected[name])
    lp = chain.to_arviz().warmup_sample_stats["lp"].values
    np.testing.assert_allclose(lp[3, 40], -potential_energy(model, (Y,), {}, at(3, 40)), rtol=1e-9)


def test_starts_are_the_users_values() -> None:
    source = model_source(model, (Y,), {}, pmcmc.AutoReparam())
    target = source.target
    given = {"mu": 0.5, "tau": -0.3, "x": np.array([1.0, 2.0, 3.0])}
    settings = Settings.check(target, None, "auto", 100, 10, 2, 1, (), None)
    starts = model_starts(source, jax.random.key(0), given, settings).find()
    found = target.unconstrained(jax.tree.map(lambda x: jnp.asarray(x[5]), starts))
    jax.tree.map(np.testing.assert_allclose, found, given)


def test_numpyros_interface_returns_the_users_values(monkeypatch: pytest.MonkeyPatch) -> None:
    make = lambda **more: pmcmc.ParallelMCMC(
        NUTS(model, init_strategy=init_to_value(values={"mu": 0.5})),
        num_samples=40,
        num_warmup=200,
        reparam=pmcmc.AutoReparam(),
        progress_bar=False,
        **more,
    )
    mcmc, parts = make(), make()
    mcmc.run(jax.random.key(0), Y, extra_fields=("z.x", "potential_energy"))
    z, draws = mcmc.get_extra_fields()["z.x"], mcmc.get_samples()
    np.testing.assert_array_equal(z, draws["x"])
    np.testing.assert_allclose(mcmc.last_state.z["x"], draws["x"][-1], rtol=1e-12)  # from another program
    np.testing.assert_allclose(mcmc.last_state.potential_energy, potential_energy(model, (Y,), {}, mcmc.last_state.z))
    state = mcmc.chain.state  # fields of the transitions are of the coordinates in which chains move
    logdensity = state.target.logdensity_fn(jnp.asarray(state.unknown[0]))
    np.testing.assert_allclose(mcmc.get_extra_fields()["potential_energy"][-1], -logdensity, rtol=1e-9)
    assert abs(mcmc.last_state.potential_energy + logdensity) > 0.01
    assert mcmc.last_state.adapt_state is None
    outside = lambda *_: pytest.fail("the model was evaluated outside a compiled program")
    with monkeypatch.context() as patch:
        patch.setattr(Trace, "__call__", outside)
        again = standing(mcmc.chain.state)
    np.testing.assert_array_equal(again.potential_energy, mcmc.last_state.potential_energy)
    parts.warmup(jax.random.key(0), Y)
    parts.run(parts.post_warmup_state.rng_key, Y)
    np.testing.assert_array_equal(parts.get_samples()["x"], draws["x"])
    plain = pmcmc.ParallelMCMC(NUTS(model), num_warmup=200, num_samples=40, progress_bar=False)
    plain.post_warmup_state = parts.last_state
    with pytest.raises(ValueError, match="made with another reparam="):
        plain.run(jax.random.key(0), Y)


def test_what_cannot_be_reparametrised_is_refused() -> None:
    run = lambda **more: pmcmc.parallel_chain(model, 0, model_args=(Y,), **{**SIZES, **OPTIONS, **more})
    with pytest.raises(ValueError, match="num_warmup=0 runs none"):
        run(num_warmup=0, kernel=pmcmc.HMC(step_size=0.1))
    with pytest.raises(ValueError, match="WindowAdaptation does not do: use EnsembleAdaptation"):
        run(warmup=pmcmc.WindowAdaptation())
    fixed = pmcmc.ParallelMCMC(
        NUTS(model, adapt_mass_matrix=False), num_warmup=200, num_samples=40, reparam=pmcmc.AutoReparam()
    )
    with pytest.raises(ValueError, match="leave it out, as well as adapt_mass_matrix=False of a NumPyro kernel, or"):
        fixed.run(jax.random.key(0), Y)
    for metric in (
        dict(kernel=pmcmc.NUTS(inverse_mass_matrix=1.0)),
        dict(warmup=pmcmc.EnsembleAdaptation(None, None, 1.0)),
    ):
        with pytest.raises(ValueError, match="no inverse_mass_matrix can be known"):
            run(**metric)
    with pytest.raises(ValueError, match="needs a kernel over all sites at once"):
        run(kernel=pmcmc.Compose([(pmcmc.HMC(), ["mu", "tau", "x"])]))
