"""Chains longer than memory: streamed draws are those of `Chain.extend`, wherever the run was stopped."""

import inspect
import signal
import subprocess
import sys
import warnings
from functools import cache
from pathlib import Path
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import pytest
import zarr

import pmcmc
from pmcmc.chain.file_format import Writer
from pmcmc.interop.arviz import DrawArrays
from pmcmc.recurrence import MultipleShooting, Sequential
from pmcmc.sampling import automatic, engine, store
from pmcmc.sampling.engine import Engine
from pmcmc.sampling.store import Store
from tests.helpers.streams import KERNEL, NUM_MORE, SIZES, start
from tests.helpers.targets import EFFECTS, ERRORS, eight_schools_model, gaussian, start_like

xarray = pytest.importorskip("xarray")
pytest.importorskip("zarr", reason="the zarr extra is not installed")


@cache
def whole() -> pmcmc.Chain:
    return start(Sequential()).extend(NUM_MORE, progress_bar=False)


@pytest.fixture(autouse=True)
def short_segments(monkeypatch: pytest.MonkeyPatch) -> None:
    """Make segments of about 190 steps, each with a checkpoint, in arrays of several chunks."""
    monkeypatch.setattr(engine, "SEGMENT_BYTES", 2**16)
    monkeypatch.setattr(engine, "SEQUENTIAL_BYTES", 2**16)
    monkeypatch.setattr(store, "FLUSH_SECONDS", 0.0)
    monkeypatch.setattr(store, "FLUSH_BYTES", 2**12)
    monkeypatch.setattr("pmcmc.interop.arviz.CHUNK_BYTES", 2**11)


def assert_whole(chain: pmcmc.StoredChain, exactly: pmcmc.StoredChain | None = None) -> None:
    """Check for the draws of one run in memory, or exactly those of another streamed run."""
    assert chain.num_samples == whole().num_samples
    assert chain.state.num_steps == whole().state.num_steps
    tolerance = 1e-9 if exactly is None else 0.0
    close = lambda a, b: np.testing.assert_allclose(a, b, rtol=0, atol=tolerance)
    expected, stats = whole().get_samples(group_by_chain=True), whole().to_arviz().sample_stats
    if exactly is not None:
        expected, stats = exactly.get_samples(group_by_chain=True)["x"], exactly.to_arviz().sample_stats
    close(chain.get_samples(group_by_chain=True)["x"], expected)
    close(chain.state.unknown, (whole() if exactly is None else exactly).state.unknown)
    found = chain.to_arviz().sample_stats
    assert set(found) == set(stats)
    for name in ("lp", "acceptance_rate", "diverging", "energy", "step_size"):
        close(np.asarray(found[name], float), np.asarray(stats[name], float))


@pytest.mark.parametrize("solver", [Sequential(), MultipleShooting(4), None], ids=["in order", "4 blocks", "auto"])
def test_a_streamed_chain_is_the_extended_one(solver, tmp_path: Path) -> None:
    first = start("auto" if solver is None else solver)
    chain = first.stream(tmp_path / "run", NUM_MORE, progress_bar=False)
    assert_whole(chain)
    extended = first.extend(NUM_MORE, progress_bar=False).report
    for name in ("num_steps", "num_divergent", "num_sweeps", "num_sequential_steps", "certified_steps", "near_ties"):
        np.testing.assert_array_equal(getattr(chain.report, name), getattr(extended, name))
    if isinstance(solver, MultipleShooting):
        assert np.all(chain.report.certified_steps == NUM_MORE)
    np.testing.assert_allclose(chain.report.acceptance_rate, extended.acceptance_rate, rtol=1e-12)
    np.testing.assert_allclose(chain.report.lyapunov_exponent, extended.lyapunov_exponent, rtol=1e-12)


def test_chains_keep_step_where_blocks_fail(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The budget suffices for the blocks of one chain only: both chains go on sequentially from the other's end."""
    with monkeypatch.context() as patch:
        patch.setattr(engine, "SEGMENT_BYTES", 2**17)
        paths = start().extend(192, progress_bar=False).report.num_sequential_steps  # the first segment
    assert paths[0] != paths[1]
    solver = MultipleShooting(4, max_steps=int(np.sort(paths)[0]))
    with pytest.warns(UserWarning, match="MultipleShooting solved only .* in parallel"):
        chain = start(solver).stream(tmp_path / "run", NUM_MORE, progress_bar=False)
    assert chain.report.fallback
    assert_whole(chain)


def test_draws_are_safe_before_the_diagnosis(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Finding out why pairs stayed apart takes seconds, in which the run may be stopped."""
    execute = automatic.Automatic.execute

    def stop() -> None:
        raise ValueError("stopped")

    def with_diagnosis(self) -> None:
        self.find_diagnosis = stop
        execute(self)

    monkeypatch.setattr(automatic.Automatic, "execute", with_diagnosis)
    first = start("auto")
    with pytest.raises(ValueError, match="stopped") as stopped:
        first.stream(tmp_path / "run", NUM_MORE, progress_bar=False)
    assert_whole(stopped.value.chain)


def test_thinning_and_extension_go_on_counting(tmp_path: Path) -> None:
    """3 divides neither 100 nor 901; a state that was streamed from once cannot be streamed from again."""
    first = start().stream(tmp_path / "run", 901, progress_bar=False)
    assert first.num_samples == 1001 // 3
    both = first.extend(1000, progress_bar=False)
    assert_whole(both)
    assert first.get_samples()["x"].shape == (2 * (1001 // 3), 3)
    opened = first.to_arviz()
    assert opened.posterior.sizes["draw"] == opened.sample_stats.sizes["draw"] == 1001 // 3
    assert not isinstance(opened.posterior["x"].variable._data, np.ndarray)  # read only when used
    np.testing.assert_array_equal(opened.posterior["x"], both.to_arviz().posterior["x"][:, : 1001 // 3])
    with pytest.raises(ValueError, match=r"already holds 2,001 steps, and this chain has 1,001"):
        first.extend(10, progress_bar=False)


@pytest.mark.filterwarnings("ignore:.*were divergent")
def test_arviz_and_xarray_open_sites_by_name(tmp_path: Path) -> None:
    model = dict(model_args=(ERRORS,), model_kwargs={"effects": EFFECTS})
    options = {**SIZES, "num_samples": 30}
    chain = pmcmc.parallel_chain(eight_schools_model, 0, **model, solver=Sequential(), **options)
    stored = chain.stream(tmp_path / "run", 70, sites=["theta", "mu"], progress_bar=False)
    expected = chain.extend(70, progress_bar=False).to_arviz()
    opened = stored.to_arviz()
    assert list(stored.get_samples(sites=["mu"])) == ["mu"]
    summary = stored.summary(sites=["mu"])
    np.testing.assert_allclose(summary["mu"]["mean"], np.mean(expected.posterior["mu"]), rtol=1e-12)
    assert summary.num_divergences == expected.sample_stats["diverging"].sum()
    assert set(opened.posterior) == {"theta", "mu"}
    for group in ("posterior", "sample_stats", "observed_data", "constant_data"):
        for name, found in getattr(opened, group).items():
            assert found.dims == getattr(expected, group)[name].dims
            assert not isinstance(found.variable._data, np.ndarray)  # read only when used
            np.testing.assert_allclose(found, getattr(expected, group)[name], rtol=1e-12)
    assert set(opened.sample_stats) == set(expected.sample_stats)
    by_xarray = xarray.open_zarr(tmp_path / "run" / "draws.zarr", group="posterior")
    assert dict(by_xarray.sizes)["draw"] == 100
    assert by_xarray.attrs["inference_library"] == "pmcmc"
    with pytest.raises(ValueError, match=r"no \['tau'\]: expected names out of \['theta', 'mu'\]"):
        stored.get_samples(sites=["tau"])


STUCK = """
import sys, warnings
import jax.numpy as jnp, pmcmc
from pmcmc.sampling import streaming

def stop(outcome):
    raise KeyboardInterrupt

kernel, logdensity = pmcmc.HMC(1e6, 1), lambda x: -jnp.sum(x**2)
options = dict(kernel=kernel, num_warmup=0, num_chains=1, num_samples=10, progress_bar=False)
chain = pmcmc.sample(logdensity, jnp.zeros(2), 0, **options)
execute, streaming.execute = streaming.execute, stop
try:
    chain.stream(sys.argv[1], 200, progress_bar=False)
except pmcmc.Interrupted:
    streaming.execute = execute
with warnings.catch_warnings(record=True) as seen:
    pmcmc.resume(sys.argv[1], logdensity, progress_bar=False)
print([warning.filename for warning in seen])
"""


def test_warnings_of_a_resumed_run_point_at_the_call(tmp_path: Path) -> None:
    command = [sys.executable, "-c", STUCK, str(tmp_path / "run")]
    done = subprocess.run(command, cwd=Path(__file__).parents[2], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "['<string>']"


CHILD = """
import os, signal, sys
import jax
jax.config.update("jax_enable_x64", True)
jax.config.update("jax_numpy_rank_promotion", "raise")
jax.config.update("jax_compilation_cache_dir", sys.argv[3])
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.3)
import pmcmc
from pathlib import Path
from pmcmc.chain.file_format import Writer
from pmcmc.interop.arviz import DrawArrays
from pmcmc.sampling import engine, store
from tests.helpers import streams
from tests.helpers.targets import gaussian
from tests.helpers.compilation import compile_quickly

compile_quickly(sys.argv[4] == "True")
path, moment = Path(sys.argv[1]), sys.argv[2]
engine.SEGMENT_BYTES = engine.SEQUENTIAL_BYTES = 2**16
store.FLUSH_SECONDS, store.FLUSH_BYTES = 0.0, 2**12
owner, name = {"written": (DrawArrays, "show"), "shown": (Writer, "write")}[moment]
method, calls = getattr(owner, name), []

def die(*args):
    calls.append(1)
    if len(calls) == 4:
        os.kill(os.getpid(), signal.SIGKILL)
    method(*args)

setattr(owner, name, die)
if path.exists():
    pmcmc.resume(path, gaussian, progress_bar=False)
else:
    streams.start().stream(path, streams.NUM_MORE, progress_bar=False)
"""


def test_a_killed_run_goes_on(tmp_path: Path) -> None:
    """Killed once with draws written but not shown, and once with draws shown but no checkpoint."""
    settings = (jax.config.jax_compilation_cache_dir, str(jax.config.read("jax_disable_most_optimizations")))
    for moment in ("written", "shown"):
        command = [sys.executable, "-c", CHILD, str(tmp_path / "run"), moment, *settings]
        done = subprocess.run(command, cwd=Path(__file__).parents[2], capture_output=True, text=True, check=False)
        assert done.returncode == -signal.SIGKILL, done.stderr
    opened = xarray.open_zarr(tmp_path / "run" / "draws.zarr", group="posterior")
    assert 100 < opened.sizes["draw"] < 600
    steady = start().stream(tmp_path / "steady", NUM_MORE, progress_bar=False)
    np.testing.assert_array_equal(opened["x"], steady.get_samples(group_by_chain=True)["x"][:, : opened.sizes["draw"]])
    chain = pmcmc.resume(tmp_path / "run", gaussian, progress_bar=False)
    assert chain.report.num_steps < NUM_MORE
    assert_whole(chain, exactly=steady)
    assert_whole(pmcmc.resume(str(tmp_path / "run"), gaussian, progress_bar=False), exactly=steady)


@pytest.mark.parametrize("owner", [Engine, Writer], ids=["in a segment", "before its checkpoint"])
def test_an_interrupted_run_goes_on(owner, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first, full, solve, calls, shapes = start(), whole(), Engine.solve, [], []

    def solve_and_tell(engine, solver, shape, *rest):
        shapes.append(shape)
        return solve(engine, solver, shape, *rest)

    monkeypatch.setattr(Engine, "solve", solve_and_tell)
    name = "solve" if owner is Engine else "write"
    method = getattr(owner, name)

    def interrupt(*args):
        calls.append(1)
        if len(calls) == (4 if owner is Engine else 6):  # the first draws have two checkpoints, and the start a third
            raise KeyboardInterrupt
        return method(*args)

    monkeypatch.setattr(owner, name, interrupt)
    with pytest.raises(pmcmc.Interrupted, match=f"of {NUM_MORE:,} steps") as stopped:
        first.stream(tmp_path / "run", NUM_MORE, progress_bar=False)
    chain = stopped.value.chain
    assert chain.report.num_steps == chain.state.num_steps - 100 > 0
    assert xarray.open_zarr(tmp_path / "run" / "draws.zarr", group="posterior").sizes["draw"] == chain.num_samples
    expected = full.get_samples(group_by_chain=True)[:, : chain.num_samples]
    np.testing.assert_allclose(chain.get_samples(group_by_chain=True)["x"], expected, rtol=0, atol=1e-9)
    assert_whole(pmcmc.resume(tmp_path / "run", gaussian, progress_bar=False))
    assert len(set(shapes)) == 1  # same segments as before the stop


def interrupted(*_) -> None:
    raise KeyboardInterrupt


def test_a_stop_while_the_first_draws_are_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of 33 draws some are in the checkpoint; the others are taken again."""
    first, write, calls = start(), Writer.write, []

    def interrupt(*args):
        calls.append(1)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return write(*args)

    with monkeypatch.context() as patch:
        patch.setattr(Writer, "write", interrupt)
        with pytest.raises(pmcmc.Interrupted, match="after 0 of 1,901 steps") as stopped:
            first.stream(tmp_path / "run", NUM_MORE, progress_bar=False)
    chain = stopped.value.chain
    assert 0 < chain.num_samples < first.num_samples
    assert np.isnan(chain.report.acceptance_rate).all()  # of no draws
    assert "too few draws to judge" in str(chain.report)
    assert_whole(pmcmc.resume(tmp_path / "run", gaussian, progress_bar=False))


@pytest.mark.parametrize("number", [1, 6], ids=["the first", "a later one"])
def test_a_stop_right_after_a_checkpoint(number: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The new checkpoint is in place, and the store has not noted it yet: its draws stay."""
    first, write, calls = start(), Writer.write, []

    def interrupt(*args):
        write(*args)
        calls.append(1)
        if len(calls) == number:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(Writer, "write", interrupt)
        with pytest.raises(KeyboardInterrupt) as stopped:
            first.stream(tmp_path / "run", NUM_MORE, progress_bar=False)
    assert isinstance(stopped.value, pmcmc.Interrupted)
    chain = stopped.value.chain
    assert Store._steps_on_disk(SimpleNamespace(path=chain.path)) == chain.state.num_steps
    assert xarray.open_zarr(tmp_path / "run" / "draws.zarr", group="posterior").sizes["draw"] == chain.num_samples
    expected = whole().get_samples(group_by_chain=True)[:, : chain.num_samples]
    np.testing.assert_allclose(chain.get_samples(group_by_chain=True)["x"], expected, rtol=0, atol=1e-9)
    assert_whole(pmcmc.resume(tmp_path / "run", gaussian, progress_bar=False))


@pytest.mark.parametrize(("where", "moment"), [(DrawArrays, "write"), (DrawArrays, "show"), (Writer, "write")])
def test_a_stop_before_the_first_checkpoint(
    where: type, moment: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nothing has been kept: the same call begins again."""
    first = start(Sequential())
    with monkeypatch.context() as patch:
        patch.setattr(where, moment, interrupted)
        with pytest.raises(KeyboardInterrupt) as stopped:
            first.stream(tmp_path / "run", 30, progress_bar=False)
    assert type(stopped.value) is KeyboardInterrupt
    assert first.stream(tmp_path / "run", 30, progress_bar=False).num_samples == 130 // 3


def test_the_report_of_a_checkpoint_does_not_change_later(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    certify, kept = Store.certify, []

    def certify_and_tell(self, *args):
        certify(self, *args)
        paths = self.last.report.num_sequential_steps
        kept.append((paths, paths.copy()))

    monkeypatch.setattr(Store, "certify", certify_and_tell)
    start().stream(tmp_path / "run", 600, progress_bar=False)
    assert len(kept) > 2
    for now, then in kept:
        np.testing.assert_array_equal(now, then)


def test_half_precision_is_stored_as_readers_know_it(tmp_path: Path) -> None:
    """Neither Zarr nor xarray has bfloat16."""
    kernel, start = pmcmc.MALA(step_size=jnp.asarray(0.5, jnp.bfloat16)), jnp.zeros(3, jnp.bfloat16)
    density = lambda x: -0.5 * jnp.sum(x**2)
    chain = pmcmc.sample(density, start, 0, **{**SIZES, "kernel": kernel}, solver=Sequential())
    chain.stream(tmp_path / "run", 30, progress_bar=False)
    stored = pmcmc.resume(tmp_path / "run", density, progress_bar=False)
    assert stored.state.unknown.dtype == jnp.bfloat16
    longer = chain.extend(30, progress_bar=False)
    for found in (stored.get_samples(True)["x"], longer.to_arviz().posterior["x"]):
        assert found.dtype == np.float32
        np.testing.assert_array_equal(found, np.asarray(longer.get_samples(True), np.float32))


def test_the_last_checkpoint_holds_the_diagnosis(tmp_path: Path, free_lanes) -> None:
    """Of two modes, between which no pair merges; only the last one, since it takes seconds."""
    density = lambda x: jnp.logaddexp(-0.5 * jnp.sum((x - 20) ** 2), -0.5 * jnp.sum((x + 20) ** 2))
    starts = np.array([[20.0], [-20.0]])
    options = dict(kernel=KERNEL, num_warmup=0, num_chains=2, num_samples=100, init_per_chain=True, progress_bar=False)
    calls, diagnose = [], automatic.diagnose

    def counted(*args):
        calls.append(1)
        return diagnose(*args)

    with warnings.catch_warnings(), pytest.MonkeyPatch.context() as patch:
        warnings.simplefilter("ignore")
        patch.setattr(automatic, "diagnose", counted)
        chain = pmcmc.sample(density, starts, 0, **options)
        stored = chain.stream(tmp_path / "run", 8000, progress_bar=False)
        assert len(calls) == 1
        said = str(stored.report)
    assert "Kept apart by: " in said
    assert len(calls) == 1
    assert str(pmcmc.resume(tmp_path / "run", density).report.diagnosis) in said


def test_positions_keyed_by_numbers_have_names(tmp_path: Path) -> None:
    position = {0: np.zeros(2), 1: np.zeros(())}
    chain = pmcmc.sample(lambda x: -sum((y**2).sum() for y in x.values()), position, 0, **SIZES)
    assert set(chain.summary()) == {"x[0]", "x[1]"}
    assert "x[0][1]" in str(chain.summary())
    stored = chain.stream(tmp_path / "run", 30, sites=["x[0]"], progress_bar=False)
    np.testing.assert_array_equal(stored.get_samples(True)["x[0]"][:, :100], chain.get_samples(True)[0])


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("finished") / "run"
    start(Sequential()).stream(path, 300, max_memory=2**24, progress_bar=False)
    return path


def test_what_is_there_is_not_overwritten(finished: Path, tmp_path: Path) -> None:
    with pytest.raises(FileExistsError, match=r"is not empty: pmcmc.resume"):
        start(Sequential()).stream(finished, 300, progress_bar=False)
    (tmp_path / "another's").touch()
    with pytest.raises(FileExistsError, match="is not empty"):
        start(Sequential()).stream(tmp_path, 300, progress_bar=False)
    own = tmp_path / "own"  # draws that xarray wrote, in a format without the names that pmcmc's arrays have
    root = zarr.open_group(own / "draws.zarr", mode="w", attributes={"inference_library": "pmcmc"})
    root.create_array("posterior/x", data=np.zeros((2, 5)))
    with pytest.raises(FileExistsError, match="is not empty"):
        start(Sequential()).stream(own, 300, progress_bar=False)
    assert np.asarray(zarr.open_group(own / "draws.zarr")["posterior/x"]).shape == (2, 5)


def test_draws_without_a_checkpoint(tmp_path: Path) -> None:
    """As after a kill before the first checkpoint: neither call sends the user to the other."""
    first = start(Sequential())
    first.stream(tmp_path / "run", 30, progress_bar=False)
    (tmp_path / "run" / "checkpoint.npz").unlink()
    with pytest.raises(FileNotFoundError, match=r"before its first checkpoint.*delete the folder.*Chain.stream again"):
        pmcmc.resume(tmp_path / "run", gaussian)
    with pytest.raises(FileExistsError, match=r"is not empty: choose another folder, or delete this one\.$"):
        first.stream(tmp_path / "run", 30, progress_bar=False)


def test_no_store(tmp_path: Path, finished: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"holds no checkpoint.npz: no Chain.stream has begun there"):
        pmcmc.resume(tmp_path, gaussian)
    with pytest.raises(ValueError, match=r"is a folder.*with pmcmc.resume"):
        pmcmc.load(finished, gaussian)


def test_another_model(finished: Path) -> None:
    with pytest.raises(ValueError, match="something else: the model"):
        pmcmc.resume(finished, lambda x: 2 * gaussian(x))
    with pytest.raises(ValueError, match="made with the kernel HMC, got MALA"):
        pmcmc.resume(finished, gaussian, kernel=pmcmc.MALA())


def test_a_damaged_checkpoint(tmp_path: Path) -> None:
    start(Sequential()).stream(tmp_path / "run", 30, progress_bar=False)
    file = tmp_path / "run" / "checkpoint.npz"
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(ValueError, match=r"not a whole file of Chain.stream.*restore it from a copy"):
        pmcmc.resume(tmp_path / "run", gaussian)
    start(Sequential()).save(file)
    with pytest.raises(ValueError, match=r"not written by Chain\.stream"):
        pmcmc.resume(tmp_path / "run", gaussian)


def test_one_process_at_a_time(finished: Path) -> None:
    store = Store(finished)
    with pytest.raises(RuntimeError, match="another process is writing"):
        pmcmc.resume(finished, gaussian)
    store.close()
    chain = pmcmc.resume(finished, gaussian)
    assert (chain.num_samples, chain.max_memory) == (400 // 3, 2**24)


def test_a_memory_limit_of_numpys(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """JSON cannot hold its numbers."""
    with monkeypatch.context() as patch:
        patch.setattr("pmcmc.sampling.streaming.execute", interrupted)
        with pytest.raises(pmcmc.Interrupted):
            start(Sequential()).stream(tmp_path / "run", 30, progress_bar=False)
    resume = inspect.unwrap(pmcmc.resume)  # without the tests' check of types
    chain = resume(tmp_path / "run", gaussian, max_memory=np.int64(2**23), progress_bar=False)
    assert chain.max_memory == 2**23
    assert pmcmc.resume(tmp_path / "run", gaussian).max_memory == 2**23
    chain = chain.extend(300, max_memory=2**25, progress_bar=False)
    assert chain.max_memory == 2**25
    assert pmcmc.resume(tmp_path / "run", gaussian).max_memory == 2**25


def slashed():
    numpyro.sample("group/x", dist.Normal(0.0, 1.0))
    numpyro.sample("y", dist.Normal(0.0, 1.0))


@pytest.mark.parametrize(
    ("sites", "error", "words"),
    [
        (["y", "z"], ValueError, r"no \['z'\]: expected names out of"),
        ([], ValueError, "sites is empty"),
        ("y", TypeError, "must be a sequence of names"),
        (None, ValueError, r"\['group/x'\] cannot be arrays on disk"),
    ],
)
def test_sites_that_cannot_be_kept(sites, error, words, tmp_path: Path) -> None:
    chain = pmcmc.parallel_chain(slashed, 0, solver=Sequential(), **{**SIZES, "num_samples": 10})
    with pytest.raises(error, match=words):
        chain.stream(tmp_path / "run", 10, sites=sites)
    assert not (tmp_path / "run").exists()
    assert chain.stream(tmp_path / "run", 10, sites=["y"], progress_bar=False).sites == ("y",)


def test_without_zarr(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "zarr", None)
    with pytest.raises(ImportError, match=r"pip install 'pmcmc\[zarr\]'"):
        start(Sequential()).stream(tmp_path / "run", 30)


def test_more_than_memory_has_room_for(finished: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    chain = pmcmc.resume(finished, gaussian)
    monkeypatch.setattr("pmcmc._xla.memory.available_bytes", lambda: 1000.0)
    with pytest.raises(MemoryError, match=r"the draws need .* are available. Name fewer by sites="):
        chain.get_samples()


def test_a_short_stream_says_how_it_was_sampled(tmp_path: Path) -> None:
    """It ended within the steps that "auto" times first, and its last checkpoint was written before the decision."""
    chain = pmcmc.sample(gaussian, start_like(gaussian), 0, num_samples=100, progress_bar=False)
    stored = chain.stream(tmp_path / "run", 900, progress_bar=False)
    assert stored.report.decision == "sequential"
    assert stored.report.reason.startswith("These are the first steps")


@pytest.mark.parametrize("name", ["chain", "draw"])
def test_sites_named_like_an_axis(name: str, tmp_path: Path) -> None:
    density = lambda x: -0.5 * jnp.sum(x[name] ** 2)
    chain = pmcmc.sample(density, {name: jnp.zeros(2)}, 0, num_samples=100, progress_bar=False)
    with pytest.raises(ValueError, match="chain and draw are axes"):
        chain.stream(tmp_path / "run", 900, progress_bar=False)


def test_fewer_steps_than_thinning(tmp_path: Path) -> None:
    """The error advised another thinning, which these calls do not take."""
    chain = pmcmc.sample(gaussian, start_like(gaussian), 0, num_samples=100, thinning=10, progress_bar=False)
    for call in (chain.extend, lambda n: chain.stream(tmp_path / "run", n)):
        with pytest.raises(ValueError, match="one draw in 10 steps: take at least as many, got 5"):
            call(5)
