"""A chain saved in one process and loaded in another continues unchanged; what does not fit is refused."""

import json
import subprocess
import sys
from collections import OrderedDict, defaultdict
from dataclasses import dataclass, field, replace
from functools import cache
from pathlib import Path

import blackjax
import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import pytest

import pmcmc
from pmcmc.kernels import ParallelLeapfrog
from pmcmc.recurrence import HutchinsonDiagonal, MultipleShooting, Newton, Sequential
from pmcmc.stability import Diagnosis, SiteDistance
from tests.helpers.targets import EFFECTS, ERRORS, eight_schools_model, gaussian, start_like

MODEL = dict(model_args=(ERRORS,), model_kwargs={"effects": EFFECTS})
SIZES = dict(num_warmup=100, num_samples=60, num_chains=2, progress_bar=False)


@cache
def model_chain() -> pmcmc.Chain:
    odd = {**SIZES, "num_samples": 61}  # one step after the last kept draw
    return pmcmc.parallel_chain(
        eight_schools_model, 0, **MODEL, extra_fields=("energy",), thinning=2, solver=MultipleShooting(4), **odd
    )


@cache
def plain_chain() -> pmcmc.Chain:
    return pmcmc.sample(gaussian, start_like(gaussian), jax.random.key(3, impl="rbg"), solver=Sequential(), **SIZES)


def state_arrays(chain: pmcmc.Chain) -> tuple:
    return chain.state._replace(target=None, kernel=None, source=None, rng_key=jax.random.key_data(chain.state.rng_key))


def assert_equal(chain: pmcmc.Chain, expected: pmcmc.Chain) -> None:
    for name in ("unknowns", "info", "last_state"):
        ours, theirs = getattr(chain, name), getattr(expected, name)
        assert jax.tree.structure(ours) == jax.tree.structure(theirs)
        jax.tree.map(np.testing.assert_array_equal, ours, theirs)
    assert jax.tree.structure(chain.kernel) == jax.tree.structure(expected.kernel)
    jax.tree.map(np.testing.assert_array_equal, chain.kernel, expected.kernel)
    jax.tree.map(np.testing.assert_array_equal, state_arrays(chain), state_arrays(expected))
    assert (chain.thinning, chain.extra_fields) == (expected.thinning, expected.extra_fields)
    assert jax.tree.structure(chain.solver) == jax.tree.structure(expected.solver)


@pytest.mark.parametrize("setting", ["plain", True, (2, 3)])
def test_blackjax_settings_of_any_kind_are_read(setting: object, tmp_path: Path) -> None:
    def make(logdensity_fn, step_size, extra):
        return blackjax.mala(logdensity_fn, step_size)

    kernel = pmcmc.from_blackjax(make, step_size=0.5, extra=setting)
    options = dict(num_warmup=0, num_samples=20, progress_bar=False)
    chain = pmcmc.sample(gaussian, start_like(gaussian), 0, kernel=kernel, **options)
    chain.save(tmp_path / "chain.npz")
    again = pmcmc.load(tmp_path / "chain.npz", gaussian, kernel=kernel)
    np.testing.assert_array_equal(again.get_samples(), chain.get_samples())


def test_a_model_comes_back(tmp_path: Path) -> None:
    chain = model_chain()
    chain.save(tmp_path / "chain.npz")
    back = pmcmc.load(tmp_path / "chain.npz", eight_schools_model, **MODEL)
    assert_equal(back, chain)
    assert str(back.report) == str(chain.report)
    fields = back.get_extra_fields()
    jax.tree.map(np.testing.assert_array_equal, fields, chain.get_extra_fields())
    jax.tree.map(np.testing.assert_array_equal, back.get_samples(), chain.get_samples())
    assert_equal(back.extend(61, progress_bar=False), chain.extend(61, progress_bar=False))
    assert [file.name for file in tmp_path.iterdir()] == ["chain.npz"]


def test_a_log_density_and_its_key_come_back(tmp_path: Path) -> None:
    plain_chain().save(tmp_path / "chain")
    back = pmcmc.load(str(tmp_path / "chain"), gaussian)
    assert_equal(back, plain_chain())
    assert_equal(back.extend(60, progress_bar=False), plain_chain().extend(60, progress_bar=False))


def test_a_number_of_steps_that_no_warm_up_fixed(tmp_path: Path) -> None:
    """The default of `HMC` follows from its step size: steps are those with that number, which is known afterwards."""
    options = dict(solver=Sequential(), extra_fields=("num_steps",), **{**SIZES, "num_warmup": 0, "num_samples": 20})
    run = lambda length: pmcmc.sample(gaussian, start_like(gaussian), 0, kernel=pmcmc.HMC(0.5, length), **options)
    chain, expected = run(None), run(4)
    np.testing.assert_array_equal(chain.unknowns, expected.unknowns)
    assert np.all(chain.get_extra_fields()["num_steps"] == 4)
    chain.save(tmp_path / "chain.npz")
    back = pmcmc.load(tmp_path / "chain.npz", gaussian)
    assert_equal(back.extend(20, progress_bar=False), chain.extend(20, progress_bar=False))


ELSEWHERE = """
import sys, jax
jax.config.update("jax_enable_x64", True)
jax.config.update("jax_numpy_rank_promotion", "raise")
import numpy as np, pmcmc
from tests.helpers.targets import gaussian
chain = pmcmc.load(sys.argv[1], gaussian).extend(60, progress_bar=False)
np.save(sys.argv[2], chain.get_samples())
"""


def test_another_process_goes_on(tmp_path: Path) -> None:
    plain_chain().save(tmp_path / "chain.npz")
    command = [sys.executable, "-c", ELSEWHERE, str(tmp_path / "chain.npz"), str(tmp_path / "draws.npy")]
    done = subprocess.run(command, cwd=Path(__file__).parents[2], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    expected = plain_chain().extend(60, progress_bar=False).get_samples()
    np.testing.assert_allclose(np.load(tmp_path / "draws.npy"), expected, rtol=0, atol=1e-9)


def mixture(y):
    rate = numpyro.sample("rate", dist.Beta(2.0, 2.0))
    with numpyro.plate("rows", len(y)):
        side = numpyro.sample("side", dist.Bernoulli(rate))
        numpyro.sample("y", dist.Normal(2.0 * side, 1.0), obs=y)


@pytest.mark.slow
def test_composed_kernels_over_discrete_sites_come_back(tmp_path: Path) -> None:
    """The kernel was composed automatically, so the caller could not pass it again."""
    y = jnp.array([-0.5, 2.2, 1.9])
    with jax.numpy_rank_promotion("allow"):
        chain = pmcmc.parallel_chain(mixture, 0, model_args=(y,), solver=Sequential(), **SIZES)
        chain.save(tmp_path / "chain.npz")
        back = pmcmc.load(tmp_path / "chain.npz", mixture, model_args=(y,))
        assert_equal(back.extend(20, progress_bar=False), chain.extend(20, progress_bar=False))


def test_a_kernel_that_discrete_sites_were_added_to_comes_back(tmp_path: Path) -> None:
    def model():
        kind = numpyro.sample("kind", dist.Bernoulli(0.3))
        numpyro.sample("x", dist.Normal(1.0 * kind, 1))

    kernel = pmcmc.from_blackjax(blackjax.mala, step_size=0.5)
    chain = pmcmc.parallel_chain(model, 0, kernel=kernel, **{**SIZES, "num_samples": 10, "num_warmup": 0})
    assert isinstance(chain.kernel, pmcmc.Compose)
    chain.save(tmp_path / "chain.npz")
    assert_equal(pmcmc.load(tmp_path / "chain.npz", model, kernel=kernel), chain)


def test_no_log_density_comes_back(tmp_path: Path) -> None:
    kernel = pmcmc.Gibbs(
        {
            "x": pmcmc.kernels.NormalUpdate(lambda p: (p["y"], 1.0)),
            "y": pmcmc.kernels.NormalUpdate(lambda p: (0.5 * p["x"], 1.0)),
        }
    )
    start = {"x": jnp.array(0.0), "y": jnp.array(0.0)}
    chain = pmcmc.sample(None, start, 0, kernel=kernel, solver=Sequential(), **SIZES)
    chain.save(tmp_path / "chain.npz")
    back = pmcmc.load(tmp_path / "chain.npz", None, kernel=kernel)
    assert_equal(back.extend(20, progress_bar=False), chain.extend(20, progress_bar=False))


def elliptical(logdensity_fn, mean, cov):
    return blackjax.elliptical_slice(lambda x: logdensity_fn(x) + 0.5 * jnp.sum(x**2), mean=mean, cov=cov)


def test_what_is_not_stored_is_asked_for(tmp_path: Path) -> None:
    """A kernel with a user's function: its arrays are stored, the function is not."""
    kernel = pmcmc.from_blackjax(elliptical, mean=jnp.zeros(3), cov=jnp.ones(3))
    chain = pmcmc.sample(gaussian, start_like(gaussian), 0, kernel=kernel, solver=Sequential(), **SIZES)
    chain.save(tmp_path / "chain.npz")
    with pytest.raises(ValueError, match="holds a function, which is not stored in the file: pass kernel="):
        pmcmc.load(tmp_path / "chain.npz", gaussian)
    with pytest.raises(ValueError, match="made with the kernel BlackJAX, got HMC"):
        pmcmc.load(tmp_path / "chain.npz", gaussian, kernel=pmcmc.HMC())
    back = pmcmc.load(tmp_path / "chain.npz", gaussian, kernel=kernel)
    assert_equal(back.extend(20, progress_bar=False), chain.extend(20, progress_bar=False))


@pmcmc.register_dataclass
@dataclass(frozen=True)
class Plain(pmcmc.kernels.hmc.SequentialLeapfrog):
    """An integrator of the user's own."""


def test_tuned_kernels_with_a_part_of_the_users_own_come_back(tmp_path: Path) -> None:
    """Their part is recognised although warm-up has changed the numbers beside it; and after a second save."""
    kernel = pmcmc.HMC(leapfrog=Plain())
    options = dict(solver=Sequential(), num_warmup=100, num_samples=20, num_chains=2, progress_bar=False)
    chain = pmcmc.sample(gaussian, start_like(gaussian), 0, kernel=kernel, **options)
    chain.save(tmp_path / "chain.npz")
    back = pmcmc.load(tmp_path / "chain.npz", gaussian, kernel=kernel)
    expected = chain.extend(20, progress_bar=False)
    assert_equal(back.extend(20, progress_bar=False), expected)
    back.save(tmp_path / "again.npz")
    again = pmcmc.load(tmp_path / "again.npz", gaussian, kernel=kernel)
    assert_equal(again.extend(20, progress_bar=False), expected)


def test_typed_keys_in_solver_and_kernel_come_back(tmp_path: Path) -> None:
    """A key is an array that numpy cannot read."""
    probes = lambda seed: Newton(HutchinsonDiagonal(jax.random.key(seed, impl="rbg")))
    kernel = pmcmc.HMC(step_size=0.5, num_integration_steps=2, leapfrog=ParallelLeapfrog(2, probes(1)))
    sizes = {**SIZES, "num_warmup": 0, "num_samples": 10}
    chain = pmcmc.sample(gaussian, start_like(gaussian), 0, kernel=kernel, solver=Sequential(), **sizes)
    chain = replace(chain, solver=probes(2))
    chain.save(tmp_path / "chain.npz")
    back = pmcmc.load(tmp_path / "chain.npz", gaussian)
    assert back.solver.jacobian.rng_key == chain.solver.jacobian.rng_key
    assert back.kernel.leapfrog.solver.jacobian.rng_key == kernel.leapfrog.solver.jacobian.rng_key


@pytest.mark.parametrize("kind", [OrderedDict, lambda x: defaultdict(float, x)], ids=["OrderedDict", "defaultdict"])
def test_other_dicts_than_plain_ones_are_asked_for(kind, tmp_path: Path) -> None:
    """Read as a plain dict, an OrderedDict would have its leaves in another order."""
    start, sizes = kind({"b": jnp.zeros(2), "a": jnp.zeros(1)}), {**SIZES, "num_warmup": 0, "num_samples": 10}
    density = lambda x: -jnp.sum(x["a"] ** 2) - 2 * jnp.sum((x["b"] - 1) ** 2)
    chain = pmcmc.sample(density, start, 0, kernel=pmcmc.MALA(step_size=0.3), solver=Sequential(), **sizes)
    chain.save(tmp_path / "chain.npz")
    with pytest.raises(ValueError, match=r"[dD]ict, which is not stored in the file: pass initial_position="):
        pmcmc.load(tmp_path / "chain.npz", density)
    back = pmcmc.load(tmp_path / "chain.npz", density, initial_position=start)
    assert type(back.get_samples()) is type(start)
    jax.tree.map(np.testing.assert_array_equal, back.get_samples(), chain.get_samples())
    assert back.verify()


def test_the_diagnosis_comes_back(tmp_path: Path) -> None:
    """It is computed for the file if nobody asked for it before, and stays through a second save."""
    found = Diagnosis({"b": SiteDistance(4.0, 3, 8), "z": SiteDistance(0.5, 8, 8, True)}, ("Run longer.", "Or not."))
    chain = replace(plain_chain(), report=replace(plain_chain().report, find_diagnosis=lambda: found))
    chain.save(tmp_path / "chain.npz")
    back = pmcmc.load(tmp_path / "chain.npz", gaussian)
    assert back.report.diagnosis == found
    assert str(back.report) == str(chain.report)
    assert "Kept apart by: b (4 sd in 3 of 8 pairs)" in str(back.report)
    back.save(tmp_path / "again.npz")
    assert pmcmc.load(tmp_path / "again.npz", gaussian).report.diagnosis == found
    plain_chain().save(tmp_path / "plain.npz")
    assert pmcmc.load(tmp_path / "plain.npz", gaussian).report.diagnosis is None


def test_a_diagnosis_that_fails_keeps_no_draws_from_being_saved(tmp_path: Path) -> None:
    def fail():
        raise jax.errors.JaxRuntimeError("out of memory")

    chain = replace(plain_chain(), report=replace(plain_chain().report, find_diagnosis=fail))
    chain.save(tmp_path / "chain.npz")
    assert_equal(pmcmc.load(tmp_path / "chain.npz", gaussian), plain_chain())


def narrow_chain(dtype) -> pmcmc.Chain:
    kernel = pmcmc.MALA(step_size=jnp.asarray(0.5, dtype))
    options = dict(kernel=kernel, num_warmup=0, num_samples=600, num_chains=2, solver=Sequential(), progress_bar=False)
    return pmcmc.sample(lambda x: -0.5 * jnp.sum(x**2), jnp.zeros(3, dtype), 0, **options)


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16], ids=["bfloat16", "float16"])
def test_half_precision_comes_back(dtype, tmp_path: Path) -> None:
    """numpy's files do not know bfloat16, in which a mean of 600 acceptance rates stands still."""
    chain = narrow_chain(dtype)
    assert chain.unknowns.dtype == dtype
    exact = np.asarray(chain.info.acceptance_rate, float).mean(axis=1)
    np.testing.assert_allclose(chain.report.acceptance_rate, exact, rtol=1e-12)
    chain.save(tmp_path / "chain.npz")
    back = pmcmc.load(tmp_path / "chain.npz", lambda x: -0.5 * jnp.sum(x**2))
    assert back.unknowns.dtype == back.last_state.dtype == dtype
    assert_equal(back, chain)
    assert_equal(back.extend(20, progress_bar=False), chain.extend(20, progress_bar=False))


@pytest.mark.parametrize(
    "change", [{"unknowns/0": "float16"}, {"unknowns/0": ["bfloat16"]}, {"none": "bfloat16"}, {"own/0": "bfloat16"}, 3]
)
def test_wrong_dtypes_are_refused(change, tmp_path: Path) -> None:
    narrow_chain(jnp.bfloat16).save(tmp_path / "chain.npz")
    with np.load(tmp_path / "chain.npz") as file:
        arrays = dict(file)
    header = json.loads(str(arrays["header"]))
    dtypes = header["dtypes"] | change if isinstance(change, dict) else change
    np.savez(tmp_path / "chain.npz", **arrays | {"header": np.array(json.dumps({**header, "dtypes": dtypes}))})
    with pytest.raises(ValueError, match="not a whole file of"):
        pmcmc.load(tmp_path / "chain.npz", lambda x: -0.5 * jnp.sum(x**2))


@pmcmc.register_dataclass
@dataclass(frozen=True)
class Slower(pmcmc.MALA):
    """A kernel of the user's own, which may be out of order."""

    share: float = 0.5
    broken: bool = field(default=False, metadata=dict(static=True))

    def step(self, target, state, noise):
        if self.broken:
            raise ZeroDivisionError("out of order")
        return super().step(target, state, noise._replace(normal=self.share * noise.normal))


def test_a_kernel_that_raises_is_not_a_damaged_file(tmp_path: Path) -> None:
    """And a damaged file is not a fault of a kernel that was passed and works."""
    path = tmp_path / "chain.npz"
    sizes = {**SIZES, "num_warmup": 0}
    chain = pmcmc.sample(gaussian, start_like(gaussian), 0, kernel=Slower(0.3), solver=Sequential(), **sizes)
    chain.save(path)
    assert pmcmc.load(path, gaussian, kernel=Slower()).num_samples == 60
    with np.load(path) as file:
        arrays = dict(file)
    header = json.loads(str(arrays["header"]))
    for field_name, value, kernel, error, words in (
        ("broken", True, Slower(broken=True), ZeroDivisionError, "out of order"),
        ("broken", True, Slower(), ValueError, "not a whole file"),
        ("share", "half", Slower(), ValueError, "not a whole file"),
    ):
        changed = json.loads(json.dumps(header))
        changed["kernel"]["items"][field_name] = value
        np.savez(path, **arrays | {"header": np.array(json.dumps(changed))})
        with pytest.raises(error, match=words) as raised:
            pmcmc.load(path, gaussian, kernel=kernel)
        notes = getattr(raised.value, "__notes__", [])
        assert any("chain.npz is not to blame" in note for note in notes) == (error is ZeroDivisionError)


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    model_chain().save(tmp_path / "chain.npz")
    return tmp_path / "chain.npz"


def test_a_file_is_replaced_as_a_whole_or_not_at_all(saved: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = saved.read_bytes()
    with saved.open("rb") as held:
        replace(model_chain(), extra_fields=()).save(saved)
        assert held.read() == before  # readers still see the old one
    before = saved.read_bytes()

    def run_out(file, **arrays):
        file.write(b"begun")
        raise OSError("no space left")

    monkeypatch.setattr(np, "savez", run_out)
    with pytest.raises(OSError, match="no space left"):
        model_chain().save(saved)
    assert saved.read_bytes() == before
    assert list(saved.parent.iterdir()) == [saved]


@pytest.mark.parametrize("share", [0.0, 0.3, 0.999])
def test_a_file_cut_short(saved: Path, share: float) -> None:
    content = saved.read_bytes()
    saved.write_bytes(content[: int(share * len(content))])
    with pytest.raises(ValueError, match=r"not a whole file of Chain.save.*Copy it again"):
        pmcmc.load(saved, eight_schools_model, **MODEL)


def test_a_damaged_file(saved: Path) -> None:
    content = bytearray(saved.read_bytes())
    content[content.find(np.asarray(model_chain().unknowns).tobytes()[:64]) + 20] ^= 1
    saved.write_bytes(content)
    with pytest.raises(ValueError, match="not a whole file"):
        pmcmc.load(saved, eight_schools_model, **MODEL)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (dict(version=2), "has version 2 of the format.*reads version 1"),
        (dict(format="x"), "not written by Chain.save"),
    ],
)
def test_another_version(saved: Path, change: dict, words: str) -> None:
    with np.load(saved) as file:
        arrays = dict(file)
    header = json.dumps({**json.loads(str(arrays.pop("header"))), **change})
    np.savez(saved, header=np.array(header), **arrays)
    with pytest.raises(ValueError, match=words):
        pmcmc.load(saved, eight_schools_model, **MODEL)


def test_another_file(tmp_path: Path) -> None:
    np.savez(tmp_path / "draws.npz", x=np.zeros(3))
    with pytest.raises(ValueError, match="of another program"):
        pmcmc.load(tmp_path / "draws.npz", gaussian)
    with pytest.raises(FileNotFoundError):
        pmcmc.load(tmp_path / "none.npz", gaussian)


def regression(x, labels, shift=0.0):
    slope = numpyro.sample("slope", dist.Normal(0, 1))
    numpyro.deterministic("shifted", slope + shift)
    numpyro.sample("y", dist.Bernoulli(logits=slope * x), obs=labels)


def test_small_changes_are_refused(tmp_path: Path) -> None:
    """One label of 3,000, or data that only a deterministic site reads: neither shows in the density at a point."""
    rng = np.random.default_rng(0)
    x, labels, path = rng.normal(size=3000), rng.integers(0, 2, size=3000), tmp_path / "chain.npz"
    options = dict(model_args=(x, labels), kernel=pmcmc.HMC(step_size=0.01, num_integration_steps=2))
    chain = pmcmc.parallel_chain(regression, 0, num_warmup=0, num_samples=10, progress_bar=False, **options)
    chain.save(path)
    pmcmc.load(path, regression, model_args=(x, labels))
    flipped = labels.copy()
    flipped[1234] ^= 1
    with pytest.raises(ValueError, match="something else: argument 'labels' differ"):
        pmcmc.load(path, regression, model_args=(x, flipped))
    with pytest.raises(ValueError, match="something else: numbers that it reads differ"):
        pmcmc.load(path, regression, model_args=(x, labels), model_kwargs=dict(shift=0.5))
    pmcmc.load(path, regression, model_args=(x, labels), model_kwargs=dict(shift=0.0))
    with pytest.raises(ValueError, match="something else: numbers that it reads differ"):
        pmcmc.load(path, lambda x, labels: regression(x, flipped), model_args=(x, labels))


def test_functions_in_the_kernel_are_compared(tmp_path: Path) -> None:
    kernel = lambda y: pmcmc.Gibbs({"a": pmcmc.kernels.NormalUpdate(lambda s: (jnp.mean(y), 1.0))})
    first, second = kernel(jnp.zeros(3)), kernel(jnp.ones(3))
    chain = pmcmc.sample(None, {"a": 0.0}, 0, kernel=first, num_warmup=0, num_samples=10, progress_bar=False)
    chain.save(tmp_path / "chain.npz")
    pmcmc.load(tmp_path / "chain.npz", None, kernel=first)
    with pytest.raises(ValueError, match="something else: functions in the kernel differ"):
        pmcmc.load(tmp_path / "chain.npz", None, kernel=second)


@pmcmc.register_dataclass
@dataclass(frozen=True)
class Whitened(pmcmc.HMC):
    """A class of the user's own, compared by what its whole step computes."""


def test_a_number_of_the_model_that_became_data_is_no_change_of_the_kernel(tmp_path: Path) -> None:
    """The mean is part of the model until a second call passes another one."""

    def model(y):
        mu = numpyro.sample("mu", dist.Normal(np.mean(y), 1))
        numpyro.sample("y", dist.Normal(mu, 1), obs=y)

    kernel = Whitened(step_size=0.3, num_integration_steps=2)
    run = lambda y: pmcmc.parallel_chain(model, 0, model_args=(y,), kernel=kernel, **{**SIZES, "num_warmup": 0})
    ones, nines = np.ones(4), np.full(4, 9.0)
    chain = run(ones)
    chain.save(tmp_path / "chain.npz")
    run(nines)
    assert_equal(pmcmc.load(tmp_path / "chain.npz", model, model_args=(ones,), kernel=kernel), chain)


def test_another_model(saved: Path, tmp_path: Path) -> None:
    seven = dict(model_args=(ERRORS[:7],), model_kwargs={"effects": EFFECTS[:7]})
    with pytest.raises(ValueError, match=r"differ at \['z'\]: expected .*\[8\].* got .*\[7\].*Pass the model"):
        pmcmc.load(saved, eight_schools_model, **seven)
    with pytest.raises(ValueError, match=r"something else: argument 'effects' differ. Pass the model"):
        pmcmc.load(saved, eight_schools_model, model_args=(ERRORS,), model_kwargs={"effects": EFFECTS + 1})
    plain_chain().save(tmp_path / "plain.npz")
    with (
        (jax.enable_x64 if hasattr(jax, "enable_x64") else jax.experimental.enable_x64)(False),
        pytest.raises(ValueError, match=r"sampled in \['float64'\].*jax_enable_x64"),
    ):
        pmcmc.load(tmp_path / "plain.npz", gaussian, initial_position=jnp.zeros(3, jnp.float32))
