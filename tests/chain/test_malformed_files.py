"""A file that pmcmc would not have written is refused with one sentence, whatever is wrong with it."""

import json
import re
import shutil
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import cache
from importlib.metadata import version
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import pmcmc
from pmcmc.recurrence import HutchinsonDiagonal, LevenbergMarquardt, MultipleShooting, Sequential, trust_region
from tests.helpers.targets import EFFECTS, ERRORS, eight_schools_model, gaussian, start_like

SIZES = dict(num_samples=61, num_chains=2, thinning=2, progress_bar=False)
MODEL = dict(model_args=(ERRORS,), model_kwargs={"effects": EFFECTS})
ODD = (None, True, -1, 0, 3.5, 10**6, "x", [], {}, [1, 2], {"array": "none"}, {"gap": "function"}, {"kind": "HMC"})
# Entries of the report that older files do not have.
LATER = (
    "warmup_remark",
    "digests",
    "num_lost_lanes",
    "num_draws",
    "pair_distances",
    "spread",
    "num_lanes",
    "precision",
    "stored_diagnosis",
)
# Fields of kernels that older files do not have.
ADDED = ("trajectory_length",)
SENTENCE = r"is not a whole file of Chain\.(save|stream): cut short, damaged, or of another program \(.*\)\. "
REMEDY = "(Copy it again from where it was saved|pmcmc replaces it as a whole)"


@cache
def plain_chain() -> pmcmc.Chain:
    return pmcmc.sample(
        gaussian, start_like(gaussian), 3, num_warmup=40, solver=MultipleShooting(4), extra_fields=("energy",), **SIZES
    )


@cache
def model_chain() -> pmcmc.Chain:
    kernel = pmcmc.HMC(step_size=0.3, num_integration_steps=2)
    return pmcmc.parallel_chain(
        eight_schools_model, 3, **MODEL, kernel=kernel, num_warmup=0, solver=Sequential(), **SIZES
    )


def load_plain(path: Path) -> pmcmc.Chain:
    return pmcmc.load(path, gaussian)


def load_model(path: Path) -> pmcmc.Chain:
    return pmcmc.load(path, eight_schools_model, **MODEL)


def read(path: Path) -> tuple[dict, dict]:
    with np.load(path) as file:
        arrays = dict(file)
    return json.loads(str(arrays.pop("header"))), arrays


def write(path: Path, header: Any, arrays: dict) -> None:
    np.savez(path, allow_pickle=False, header=np.array(json.dumps(header)), **arrays)


def refused(path: Path, load: Callable) -> str:
    """Return "" if the file is refused as it should be, else what happened."""
    try:
        load(path)
    except ValueError as error:
        return "" if re.search(SENTENCE + REMEDY, str(error)) else f"ValueError: {error}"
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return "loaded"


def assert_refused(found: dict[tuple, str]) -> None:
    """Check all changes together."""
    wrong = [f"{place}: {said:.150}" for place, said in found.items() if said]
    assert not wrong, "\n".join(wrong)


def places(tree: Any, path: tuple = ()) -> Iterator[tuple]:
    """Return every entry of a header, however deep."""
    items = tree.items() if isinstance(tree, dict) else enumerate(tree) if isinstance(tree, list) else ()
    for key, value in items:
        yield (*path, key)
        yield from places(value, (*path, key))


def at(tree: Any, path: tuple) -> Any:
    for key in path:
        tree = tree[key]
    return tree


def changed(header: dict, path: tuple, value: Any) -> dict:
    copy = json.loads(json.dumps(header))
    at(copy, path[:-1])[path[-1]] = value
    return copy


def dropped(header: dict, path: tuple) -> dict:
    copy = json.loads(json.dumps(header))
    del at(copy, path[:-1])[path[-1]]
    return copy


def array_edits(x: np.ndarray) -> dict[str, np.ndarray]:
    """Return arrays of other shapes, lengths and types."""
    edits = {
        "text": np.full(x.shape, "x"),
        "complex": x.astype(complex),
        "no axes": np.zeros((), x.dtype),
        "one axis more": x[None],
        "empty": np.zeros((0, *x.shape[1:]), x.dtype),
        "longer": np.concatenate([x, x[:1]]) if x.ndim else np.stack([x, x]),
        "shorter": x[:-1] if x.ndim else np.zeros(0, x.dtype),
    }
    if x.ndim > 1:
        edits |= {"fewer draws": x[:, :-1], "last axis": np.concatenate([x, x], axis=-1)}
    return edits


FILES = {"plain": (plain_chain, load_plain), "model": (model_chain, load_model)}


@pytest.fixture(params=FILES)
def saved(request: pytest.FixtureRequest, tmp_path: Path) -> tuple[Path, Callable]:
    make, load = FILES[request.param]
    make().save(tmp_path / "chain.npz")
    return tmp_path / "chain.npz", load


@pytest.fixture(autouse=True)
def no_tracing_twice(monkeypatch: pytest.MonkeyPatch) -> None:
    """Make the target of the model only once, since the model is not tested here."""
    from pmcmc.chain import loading

    source = model_chain().state.source
    monkeypatch.setattr(loading, "model_source", lambda *_: source)


def test_the_file_itself_loads(saved) -> None:
    path, load = saved
    header, arrays = read(path)
    write(path, header, arrays)
    assert load(path).num_samples == 30


def test_arrays(saved) -> None:
    """Each array is dropped, renamed, or changed in shape and type; and one is added that does not belong there."""
    path, load = saved
    header, arrays = read(path)
    wrong = {}
    for name, x in arrays.items():
        rest = {key: value for key, value in arrays.items() if key != name}
        edits: dict[str, dict] = {"dropped": rest, "renamed": {**rest, "other/0": x}}
        edits |= {what: {**rest, name: edit} for what, edit in array_edits(x).items() if edit.shape != x.shape}
        edits |= {what: {**rest, name: array_edits(x)[what]} for what in ("text", "complex")}
        free = ("report/bias_bound", "report/coalescence_steps", "ensemble/0")  # may have any length
        for what, edit in edits.items():
            write(path, header, edit)
            if said := refused(path, load):
                if name in free and what in ("empty", "longer", "shorter"):
                    continue
                wrong[name, what] = said
    write(path, header, {**arrays, "unknowns/1": arrays["unknowns/0"]})
    wrong["unknowns/1", "added"] = refused(path, load)
    write(path, header, {**arrays, "notes": np.zeros(3)})
    wrong["notes", "added"] = refused(path, load)
    assert_refused(wrong)


def test_names_of_earlier_files(tmp_path: Path) -> None:
    """`MultipleShooting` had a field ``merge_tol``, which is ``tol`` now."""
    solver = MultipleShooting(4, tol=1e-5)
    plain_chain().save(tmp_path / "now.npz")
    header, arrays = read(tmp_path / "now.npz")
    items = header["solver"]["items"]
    del items["tol"]
    items["merge_tol"] = 1e-5
    write(tmp_path / "then.npz", header, arrays)
    assert pmcmc.load(tmp_path / "then.npz", gaussian).solver == solver


def test_nuts_of_earlier_files(tmp_path: Path) -> None:
    """`NUTS` had no metric."""
    kernel = pmcmc.NUTS(0.5, inverse_mass_matrix=np.array([1.0, 2.0, 0.5]))
    chain = pmcmc.sample(gaussian, start_like(gaussian), 3, kernel=kernel, num_warmup=0, solver=Sequential(), **SIZES)
    chain.save(tmp_path / "now.npz")
    found = pmcmc.load(tmp_path / "now.npz", gaussian).kernel
    np.testing.assert_array_equal(found.inverse_mass_matrix, kernel.inverse_mass_matrix)
    header, arrays = read(tmp_path / "now.npz")
    del arrays[header["kernel"]["items"].pop("inverse_mass_matrix")["array"]]
    write(tmp_path / "then.npz", header, arrays)
    assert pmcmc.load(tmp_path / "then.npz", gaussian).kernel == pmcmc.NUTS(0.5)


def test_hmc_of_earlier_files(tmp_path: Path) -> None:
    """Without a number of steps, its trajectories took a quarter of a period: 16 steps of 0.1, and 19 now."""
    kernel = pmcmc.HMC(step_size=0.1)
    chain = pmcmc.sample(gaussian, start_like(gaussian), 3, kernel=kernel, num_warmup=0, solver=Sequential(), **SIZES)
    chain.save(tmp_path / "now.npz")
    assert pmcmc.load(tmp_path / "now.npz", gaussian).kernel.default_length() == 19
    header, arrays = read(tmp_path / "now.npz")
    del header["kernel"]["items"]["trajectory_length"]
    write(tmp_path / "then.npz", header, arrays)
    assert pmcmc.load(tmp_path / "then.npz", gaussian).kernel.default_length() == 16


def test_bases_of_earlier_files(tmp_path: Path) -> None:
    """They had no spread, neither that of the target nor those of site groups, and their digests another form."""
    density = lambda x: -0.5 * jnp.sum(x["a"] ** 2) - 0.5 * jnp.sum(x["b"] ** 2)
    start = {"a": jnp.zeros(2), "b": jnp.zeros(1)}
    sizes = {**SIZES, "num_warmup": 40}
    for kernel in (pmcmc.Compose([(pmcmc.HMC(), ["a"]), (pmcmc.HMC(), ["b"])]), pmcmc.HMC()):
        chain = pmcmc.sample(density, start, 3, kernel=kernel, solver=Sequential(), **sizes)
        chain.save(tmp_path / "now.npz")
        header, arrays = read(tmp_path / "now.npz")
        for place in [place for place in places(header) if place[-1] == "spread" and "basis" in place]:
            header = dropped(header, place)
        header["digests"] |= {"versions": {name: version(name) for name in ("jax", "numpyro")}, "the model": "0" * 64}
        write(tmp_path / "then.npz", header, arrays)
        back = pmcmc.load(tmp_path / "then.npz", density, initial_position=start)
        assert back.verify()


BEFORE = {"kind": "StandardBasis", "items": {}}


@pytest.mark.parametrize("schedule", ["FreshProbes", "FixedProbes"])
def test_solvers_of_earlier_files(schedule: str, tmp_path: Path) -> None:
    """The basis was an object where it is None now, and the schedule of probes an object where it is a boolean."""
    fixed_probes = schedule == "FixedProbes"
    jacobian = HutchinsonDiagonal(np.zeros(2, np.uint32), num_probes=2, fixed_probes=fixed_probes)
    solver = LevenbergMarquardt(jacobian, step_rule=trust_region.Smoother())
    replace(plain_chain(), solver=solver).save(tmp_path / "now.npz")
    header, arrays = read(tmp_path / "now.npz")
    header["solver"]["items"]["basis"] = BEFORE
    items = header["solver"]["items"]["jacobian"]["items"]
    del items["fixed_probes"]
    items["schedule"] = {"kind": schedule, "items": {}}
    write(tmp_path / "then.npz", header, arrays)
    for name in ("now.npz", "then.npz"):
        found = pmcmc.load(tmp_path / name, gaussian).solver
        assert (found.basis, found.step_rule) == (None, solver.step_rule)
        assert (found.jacobian.num_probes, found.jacobian.fixed_probes) == (2, fixed_probes)


def test_replaced_objects_stand_only_where_they_may(tmp_path: Path) -> None:
    replace(plain_chain(), solver=LevenbergMarquardt()).save(tmp_path / "chain.npz")
    header, arrays = read(tmp_path / "chain.npz")
    wrong = {}
    for place, value in [("step_rule", BEFORE), ("basis", {**BEFORE, "items": {"scale": 1.0}})]:
        write(tmp_path / "chain.npz", changed(header, ("solver", "items", place), value), arrays)
        wrong[place,] = refused(tmp_path / "chain.npz", load_plain)
    assert_refused({("step_rule",): wrong["step_rule",]})
    assert "is a StandardBasis, which pmcmc does not have" in wrong["basis",]


@pytest.mark.parametrize("share", [6, pytest.param(2, marks=pytest.mark.slow)])
def test_header(share: int, saved) -> None:
    """Each entry, however deep, is dropped or changed in type. A change that leaves the chain as it was is no error."""
    path, load = saved
    header, arrays = read(path)
    wrong = {}
    for number, place in enumerate(places(header)):
        if place[0] in ("format", "version"):
            continue
        now = at(header, place)
        if place[0] not in ("extra_fields", "timing") or len(place) == 1:  # a list may be shorter
            write(path, dropped(header, place), arrays)
            said = refused(path, load)
            # Older files have no digest; a missing digest counts as that of another model.
            allowed = place[-1] in (*LATER, *ADDED) or "with something else" in said
            wrong[(*place, "dropped")] = "" if allowed else said
        for value in ODD[number % share :: share]:
            if value == now or (type(value) is type(now) and type(value) in (bool, str)):
                continue
            if isinstance(value, (int, float)) and isinstance(now, (int, float)):
                continue  # `verify` finds another number of the right type, see below
            write(path, changed(header, place, value), arrays)
            said = refused(path, load)
            if not (said and _is_another_chain(place, now, value, said)):
                wrong[(*place, str(value))] = said
    assert_refused(wrong)


def _is_another_chain(place: tuple, now: Any, value: Any, said: str) -> bool:
    """Whether a changed entry describes another valid chain: then the density or `verify` notices."""
    if place[0] == "digests" and "with something else" in said:
        return True
    if "is not stored in the file: pass" in said:  # a placeholder for a user's function
        return isinstance(value, dict) and "gap" in value
    if "log density at the last states of the chains" in said:
        return place in (("basis",), ("logdensity",))
    settings = place[0] in ("kernel", "solver") and len(place) > 2
    number = (now is None or isinstance(now, (dict, int, float))) and (value is None or type(value) in (int, float))
    return said == "loaded" and ((settings and number) or place in (("timing",), ("solver",), ("extra_fields",)))


def test_numbers_that_contradict_each_other(saved) -> None:
    path, load = saved
    header, arrays = read(path)
    for name, value in (
        ("num_steps", 59),
        ("num_steps", -1),
        ("num_unkept", 2),
        ("num_unkept", -1),
        ("thinning", 0),
        ("thinning", 3),
    ):
        write(path, {**header, name: value}, arrays)
        assert not refused(path, load), name
    for value in ([1.0], [1.0, "x"], [1.0, None], [True, 1.0], 1.0):
        write(path, {**header, "logdensity": value}, arrays)
        assert not refused(path, load)
    for own in ([0, 10**6], [-1, 0], [0.0, 1.0]):
        write(path, header, {**arrays, "own/0": np.array(own)})
        assert not refused(path, load)


def test_other_content(saved, tmp_path: Path) -> None:
    path, load = saved
    header, arrays = read(path)
    content = path.read_bytes()
    for share in np.linspace(0, 0.999, 12):
        path.write_bytes(content[: int(share * len(content))])
        assert not refused(path, load), share
    for text in ("", "[]", "{", "3", "null", '"x"', "[" * 100_000):
        np.savez(path, header=np.array(text), **arrays)
        said = refused(path, load)
        assert not said or "was not written by Chain.save" in said
    for strange in (np.array([json.dumps(header)] * 2), np.zeros(3)):
        np.savez(path, header=strange, **arrays)
        assert not refused(path, load)
    np.save(path.with_suffix(".npy"), np.zeros(3))
    assert not refused(path.with_suffix(".npy"), load)
    path.write_text("a,b\n1,2\n")
    assert not refused(path, load)


def test_a_solver_or_kernel_that_cannot_be(tmp_path: Path) -> None:
    path = tmp_path / "chain.npz"
    plain_chain().save(path)
    header, arrays = read(path)
    kernel, solver = header["kernel"]["items"], header["solver"]["items"]
    assert kernel["step_size"]
    for place, value in (
        (("solver", "items", "num_blocks"), 0),
        (("solver", "items", "num_blocks"), 2.5),
        (("solver", "items", "max_sweeps"), -1),
        (("solver", "kind"), "HMC"),
        (("kernel", "kind"), "MALA"),
        (("kernel", "kind"), "MultipleShooting"),
        (("kernel", "items", "step_size"), None),
        (("kernel", "items", "leapfrog", "kind"), "BranchTaken"),
        (("kernel", "items", "extra"), 1),
    ):
        write(path, changed(header, place, value), arrays)
        assert not refused(path, load_plain), place
    assert solver["num_blocks"] == 4


def test_a_file_with_a_key_of_another_implementation(tmp_path: Path) -> None:
    """A file of an earlier pmcmc. Its draws can be read and extended, but not verified."""
    path = tmp_path / "chain.npz"
    plain_chain().save(path)
    header, arrays = read(path)
    key = jax.random.key_data(jax.random.key(3, impl="rbg"))
    write(path, {**header, "key_impl": "rbg"}, {**arrays, "key/0": np.asarray(key)})
    with pytest.warns(UserWarning, match=r"made with a key of rbg.*extended with new noise.*cannot be verified"):
        chain = load_plain(path)
    np.testing.assert_array_equal(chain.unknowns, plain_chain().unknowns)
    assert not chain.verify()
    assert chain.extend(20, progress_bar=False).num_samples == 40
    for impl, words in (("rbg", arrays["key/0"]), ("threefry2x32", key), ("x", key)):
        write(path, {**header, "key_impl": impl}, {**arrays, "key/0": np.asarray(words)})
        assert not refused(path, load_plain)


def test_a_kernel_of_the_users_own_is_asked_for_again(tmp_path: Path) -> None:
    """A kernel that does not fit the file does not mean that the file is damaged, and the message says so."""
    custom = pmcmc.kernels.CustomUpdate(lambda key: jax.random.normal(key), lambda x, z: 0.5 * x["a"] + z)
    kernel = pmcmc.Gibbs({"a": custom})
    chain = pmcmc.sample(None, {"a": jnp.zeros(())}, 0, kernel=kernel, num_warmup=0, solver=Sequential(), **SIZES)
    chain.save(tmp_path / "chain.npz")
    with pytest.raises(ValueError, match="is not stored in the file: pass kernel="):
        pmcmc.load(tmp_path / "chain.npz", None)
    assert pmcmc.load(tmp_path / "chain.npz", None, kernel=kernel).verify()


@pytest.fixture(scope="module")
def streamed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    pytest.importorskip("zarr", reason="the zarr extra is not installed")
    path = tmp_path_factory.mktemp("streamed") / "run"
    start = replace(plain_chain(), solver=Sequential())
    start.stream(path, 40, max_memory=2**24, progress_bar=False)
    return path


def resume(path: Path) -> pmcmc.StoredChain:
    return pmcmc.resume(path, gaussian, progress_bar=False)


def test_checkpoints(streamed: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    shutil.copytree(streamed, run)
    file = run / "checkpoint.npz"
    header, arrays = read(file)
    assert resume(run).num_samples == 50
    wrong = {}
    added = ("num_wanted", "num_planned", "max_memory", "num_samples", "kept_sites")
    for name in added:
        write(file, dropped(header, (name,)), arrays)
        wrong[name, "dropped"] = refused(run, resume)
        for value in ODD:
            if name == "max_memory" and value in (None, 10**6) and value is not True:
                continue
            if name in ("num_wanted", "num_planned") and value == 10**6:
                continue  # more steps are wanted
            write(file, {**header, name: value}, arrays)
            wrong[name, str(value)] = refused(run, resume)
    for name in arrays:
        write(file, header, {key: x for key, x in arrays.items() if key != name})
        wrong[name, "dropped"] = refused(run, resume)
    for value in (["y"], [1], ["x", "y"]):
        write(file, {**header, "kept_sites": value}, arrays)
        wrong["kept_sites", str(value)] = refused(run, resume)
    assert_refused(wrong)


@pytest.mark.parametrize("damage", ["gone", "without a group", "without an array", "shorter"])
def test_draws_that_a_checkpoint_does_not_find(damage: str, streamed: Path, tmp_path: Path) -> None:
    """The draws were written again with a gap before the next ones, or fewer are there than the checkpoint counts."""
    run = tmp_path / "run"
    shutil.copytree(streamed, run)
    draws = run / "draws.zarr"
    if damage == "shorter":
        import zarr

        x = zarr.open_group(str(draws), mode="r+", use_consolidated=False)["posterior/x"]
        x.resize((2, 10, 3))
        zarr.consolidate_metadata(str(draws), zarr_format=2)
    else:
        shutil.rmtree({"gone": draws, "without a group": draws / "posterior"}.get(damage, draws / "posterior" / "x"))
        if damage != "gone":
            import zarr

            zarr.consolidate_metadata(str(draws), zarr_format=2)
    assert not refused(run, resume)
