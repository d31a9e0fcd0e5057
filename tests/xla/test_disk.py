"""Programs that are found on disk without tracing: the same draws, and never another model's program."""

import os
import pickle
from collections import namedtuple
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import pytest
from jax.extend.core import Primitive
from jax.interpreters import mlir

import pmcmc
from pmcmc._pytree import register_dataclass
from pmcmc._xla import disk, identity
from pmcmc._xla.compile import TargetJit, forget_programs
from pmcmc.target import _value_and_grad as target_value_and_grad
from tests.helpers.sources import run_python

# Runs are far too short for good draws.
pytestmark = pytest.mark.filterwarnings("ignore:.*(draws|divergent)")

SIGMA = np.array([15.0, 10, 16, 11])


@pytest.fixture
def folder(tmp_path: Path, fresh_programs: None) -> Iterator[Path]:
    """Keep programs in a folder of this test."""
    disk.keep_in(tmp_path)
    yield tmp_path
    disk.keep_in(None)


@pytest.fixture
def in_new_process(monkeypatch: pytest.MonkeyPatch) -> Callable:
    """Return a function that calls another one as a new process would, and the names of the functions it traced."""
    traced: list[str] = []
    new = TargetJit._new

    class Counting:
        def __init__(self, name: str, fn: Any):
            self._name, self._fn = name, fn

        def __call__(self, *args: Any, **kwargs: Any) -> Any:
            if not any(isinstance(x, jax.core.Tracer) for x in jax.tree.leaves((args, kwargs))):
                traced.append(self._name)
            return self._fn(*args, **kwargs)

        def __getattr__(self, name: str) -> Any:
            if name in ("lower", "trace", "eval_shape"):
                traced.append(self._name)
            return getattr(self._fn, name)

    monkeypatch.setattr(TargetJit, "_new", lambda self, brief: Counting(self._fn.__name__, new(self, brief)))

    def call(fn: Callable) -> tuple[Any, list[str]]:
        forget_programs()
        traced.clear()
        return fn(), list(traced)

    return call


def schools(scale: float = 5.0, prior: Any = dist.HalfCauchy) -> Callable:
    def model(sigma: Any, y: Any = None) -> None:
        mu = numpyro.sample("mu", dist.Normal(0, scale))
        tau = numpyro.sample("tau", prior(5.0))
        with numpyro.plate("school", len(sigma)):
            z = numpyro.sample("z", dist.Normal(0, 1))
            numpyro.sample("y", dist.Normal(mu + tau * z, sigma), obs=y)

    return model


EIGHT_SCHOOLS = schools()


def draws(model: Callable = EIGHT_SCHOOLS, y: float = 3.0, **options: Any) -> np.ndarray:
    options = (
        dict(num_samples=60, num_warmup=60, num_chains=2, progress_bar=False, solver=pmcmc.recurrence.Sequential())
        | options
    )
    chain = pmcmc.parallel_chain(model, 1, model_args=(SIGMA, y * np.arange(4.0)), **options)
    return np.asarray(chain.get_samples()["mu"])


def gradient() -> np.ndarray:
    """The quickest of the programs, which are all stored in the same way."""
    factors = jnp.arange(1.0, 4.0)
    target = pmcmc.Target.from_logdensity(lambda x: -0.5 * jnp.sum(factors * x**2), jnp.zeros(3))
    return np.asarray(target.value_and_grad(jnp.ones(3))[1])


@pytest.mark.parametrize(
    "kernel",
    [
        pytest.param(pmcmc.HMC(), id="HMC"),
        pytest.param(pmcmc.NUTS(max_num_doublings=4), id="NUTS", marks=pytest.mark.slow),
        pytest.param(pmcmc.RandomWalk(), id="RandomWalk", marks=pytest.mark.slow),
        pytest.param(
            pmcmc.Compose([(pmcmc.MALA(), ["mu", "tau"]), (pmcmc.RandomWalk(), ["z"])]),
            id="Compose",
            marks=pytest.mark.slow,
        ),
    ],
)
def test_a_second_process_traces_nothing(folder: Path, in_new_process: Callable, kernel: Any) -> None:
    one = partial(draws, kernel=kernel)
    (first, traced), (second, again) = in_new_process(one), in_new_process(one)
    disk.keep_in(None)
    without, _ = in_new_process(one)
    assert len(set(traced)) > 5
    assert again == []
    assert np.array_equal(first, second)
    assert np.array_equal(first, without)


def test_blocks(folder: Path, in_new_process: Callable) -> None:
    one = partial(draws, num_samples=1024, solver=pmcmc.recurrence.MultipleShooting(num_blocks=8))
    (first, _), (second, again) = in_new_process(one), in_new_process(one)
    assert again == []
    assert np.array_equal(first, second)


FACTORIZATION = """
import sys
import jax.numpy as jnp, numpy as np, pmcmc
pmcmc.cache_programs(sys.argv[1])
def logdensity(x):
    factor = jnp.linalg.cholesky(jnp.eye(3) + jnp.exp(x["scale"]) * jnp.ones((3, 3)))
    return -0.5 * x["scale"] ** 2 - jnp.sum(jnp.log(jnp.diagonal(factor)))
chain = pmcmc.sample(logdensity, {"scale": jnp.zeros(())}, 0, num_samples=50, num_warmup=40, progress_bar=False)
print(np.asarray(chain.get_samples()["scale"]).tolist())
"""


def test_libraries_are_loaded_with_their_programs(tmp_path: Path) -> None:
    """JAX looks for LAPACK when it lowers a factorisation; a stored program that calls it ended the process."""
    first, second = (run_python(FACTORIZATION, str(tmp_path)) for _ in range(2))
    assert list(tmp_path.glob("*run_piece*-program"))
    assert first == second


SHORT = """
import sys
import jax, jax.numpy as jnp, numpy as np, pmcmc
def run():
    chain = pmcmc.sample(
        lambda x: -0.5 * jnp.sum(x**2), jnp.zeros(2), 0, num_samples=50, num_warmup=40, progress_bar=False
    )
    return np.asarray(chain.get_samples())
"""


# What is compiled, also instead of a stored program that fails.
COUNTING = """
from pmcmc._xla import disk
compiled, made = disk.Kept.compiled, []
disk.Kept.compiled = lambda self, lowered: (made.append(self._path.name), compiled(self, lowered))[1]
"""


def test_one_of_several_devices(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A program for one device is loaded for this device alone."""
    monkeypatch.setenv("XLA_FLAGS", "--xla_force_host_platform_device_count=2")
    code = (
        f"{SHORT}{COUNTING}pmcmc.cache_programs(sys.argv[1])\nfirst = run()\n"
        "with jax.default_device(jax.devices()[1]):\n    second = run()\n"
        "print(len(made), np.array_equal(first, second), first.tolist())"
    )
    (made, first), (again, second) = (run_python(code, str(tmp_path)).split(maxsplit=1) for _ in range(2))
    assert int(made) > 10
    assert int(again) == 0
    assert first == second
    assert first.startswith("True")


@pytest.mark.slow
def test_programs_that_jax_has_loaded_are_not_stored(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A program from JAX's cache would lack its functions, if it was serialised."""
    by_jax = f"{SHORT}\njax.config.update('jax_persistent_cache_min_compile_time_secs', 0.0)\nfirst = run()\n"
    switched_on = "pmcmc.cache_programs(sys.argv[1])\nprint(np.array_equal(first, run()))"
    monkeypatch.setenv("JAX_COMPILATION_CACHE_DIR", str(tmp_path))
    run_python(by_jax, str(tmp_path))
    assert run_python(by_jax + switched_on, str(tmp_path)).strip() == "True"
    found = f"{SHORT}{COUNTING}pmcmc.cache_programs(sys.argv[1])\nrun()\nprint(len(made))"
    assert run_python(found, str(tmp_path)).strip() == "0"


@pytest.mark.parametrize("changed", ["source", "flags"])
def test_what_may_not_be_what_was_imported_is_not_stored(
    folder: Path, monkeypatch: pytest.MonkeyPatch, changed: str
) -> None:
    if changed == "source":
        monkeypatch.setattr(identity, "_IMPORTED", 0.0)
    else:
        monkeypatch.setenv("XLA_FLAGS", "--xla_cpu_enable_fast_math=true")
    target = pmcmc.Target.from_logdensity(lambda x: -0.5 * jnp.sum(x**2), jnp.zeros(2))
    target.value_and_grad(jnp.zeros(2))
    assert list(folder.iterdir()) == []
    monkeypatch.undo()
    forget_programs()
    target.value_and_grad(jnp.zeros(2))
    assert len(list(folder.iterdir())) == 1


def test_primitives_of_others_are_left_to_jax(folder: Path) -> None:
    """Whatever their names: what they compute is said elsewhere."""
    mine = Primitive("sin")
    mine.def_impl(jnp.sin)
    mine.def_abstract_eval(lambda x: x)
    mlir.register_lowering(mine, mlir.lower_fun(lambda x: 2 * x, multiple_results=False))
    for fn in (jnp.sin, mine.bind):
        target = pmcmc.Target.from_logdensity(lambda x, fn=fn: jnp.sum(fn(x)), jnp.zeros(2))
        assert target.logdensity_fn(jnp.ones(2)) == pytest.approx(2 * np.sin(1.0) if fn is jnp.sin else 4.0)
        assert len(list(folder.iterdir())) == 1


def test_results_stay_where_arguments_must(folder: Path) -> None:
    """Results are bound to a device only if an argument is, whichever came first."""
    target = pmcmc.Target.from_logdensity(lambda x: -0.5 * jnp.sum(x**2), jnp.zeros(2))
    free = jnp.ones(2)
    bound = jax.device_put(free, jax.devices()[0])
    for _ in range(2):
        assert [target.value_and_grad(x)[1].committed for x in (bound, free)] == [True, False]
        forget_programs()
    assert len(list(folder.iterdir())) == 2


def test_a_device_by_context(folder: Path, in_new_process: Callable) -> None:
    for _ in range(2):
        with jax.default_device(jax.devices()[0]):
            _, traced = in_new_process(gradient)
    assert traced == []


def test_flags_for_more_devices_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    before = identity.versions()
    monkeypatch.setenv("XLA_FLAGS", f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count=3")
    assert identity.versions() == before


def test_files_that_cannot_be_read(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An editor may keep links to nowhere beside the source."""

    def refuse(self: Path, **_: Any) -> None:
        raise FileNotFoundError(self)

    target = pmcmc.Target.from_logdensity(lambda x: -0.5 * jnp.sum(x**2), jnp.zeros(2))
    with monkeypatch.context() as patched:
        patched.setattr(Path, "stat", refuse)
        target.value_and_grad(jnp.zeros(2))
    assert list(folder.iterdir()) == []


def test_a_program_that_fails_is_stored_anew(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where its arguments were given away, so that this call fails."""

    def fail(target: Any, x: Any) -> None:
        x.delete()
        raise RuntimeError("not here")

    target = pmcmc.Target.from_logdensity(lambda x: -0.5 * jnp.sum(x**2), jnp.zeros(2))
    target.value_and_grad(jnp.zeros(2))
    forget_programs()
    with monkeypatch.context() as patched:
        patched.setattr(disk.serialize_executable, "deserialize_and_load", lambda *args, **kwargs: fail)
        with pytest.raises(RuntimeError, match="not here"):
            target.value_and_grad(jnp.zeros(2))
    assert list(folder.iterdir()) == []
    assert target.value_and_grad(jnp.ones(2))[0] == -1.0
    assert len(list(folder.iterdir())) == 1


def test_plans_know_how_long_programs_took_to_compile(folder: Path, in_new_process: Callable) -> None:
    """Those of blocks may not be stored yet."""
    seconds = []
    target = pmcmc.Target.from_logdensity(lambda x: -0.5 * jnp.sum(x**2), jnp.zeros(2))
    for _ in range(2):
        lowered = target_value_and_grad.lower(target, jnp.zeros(2))
        lowered.compile()
        seconds.append(lowered.seconds)
        forget_programs()
    assert seconds[0] == 0.0 < seconds[1]


def test_names_of_libraries() -> None:
    text = 'x = stablehlo.custom_call @lapack_dpotrf_ffi(%0)\ny = stablehlo.custom_call @"my::own"(%1)'
    assert disk._libraries(Mock(as_text=lambda: text)) == {"lapack_dpotrf_ffi", '"my::own"'}


@pytest.mark.skipif(not hasattr(jax, "set_mesh"), reason="no meshes as contexts")
def test_meshes_are_left_to_jax(folder: Path) -> None:
    target = pmcmc.Target.from_logdensity(lambda x: -0.5 * jnp.sum(x**2), jnp.zeros(2))
    x = jnp.zeros(2)
    with jax.set_mesh(jax.make_mesh((1,), ("a",))):
        target.logdensity_fn(x)
    assert list(folder.iterdir()) == []


CHANGES: dict[str, Callable[[], np.ndarray]] = {
    "number": lambda: draws(schools(7.0)),
    "distribution": lambda: draws(schools(prior=dist.HalfNormal)),
    "data": lambda: draws(y=-2.0),
    "kernel": lambda: draws(kernel=pmcmc.MALA()),
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_what_has_changed_is_not_found(folder: Path, in_new_process: Callable, change: Callable) -> None:
    in_new_process(draws)
    found, traced = in_new_process(change)
    disk.keep_in(None)
    assert np.array_equal(found, in_new_process(change)[0])
    assert (traced == []) == (change is CHANGES["data"])


@pytest.mark.parametrize(
    "setting",
    [
        lambda: jax.default_matmul_precision("bfloat16"),
        lambda: jax.enable_x64(False) if hasattr(jax, "enable_x64") else jax.experimental.enable_x64(False),
        lambda: jax.threefry_partitionable(not jax.config.jax_threefry_partitionable),
    ],
    ids=["precision", "x64", "partitionable"],
)
def test_settings_of_jax_are_part_of_a_program(folder: Path, in_new_process: Callable, setting: Callable) -> None:
    in_new_process(gradient)
    with setting():
        assert in_new_process(gradient)[1]


@pytest.mark.parametrize("part", ["source", "versions", "machine"])
def test_other_source_version_or_machine(
    folder: Path, in_new_process: Callable, monkeypatch: pytest.MonkeyPatch, part: str
) -> None:
    """JAX's own cache may still know the programs, which then cannot be stored: they are compiled."""
    first, _ = in_new_process(gradient)
    monkeypatch.setattr(identity, part, lambda: "another one")
    other, traced = in_new_process(gradient)
    again, nothing = in_new_process(gradient)
    assert traced
    assert nothing == []
    assert np.array_equal(first, other)
    assert np.array_equal(first, again)


@pytest.mark.parametrize("broken", [b"", b"no pickle"])
def test_broken_files_are_replaced(folder: Path, in_new_process: Callable, broken: bytes) -> None:
    first, _ = in_new_process(gradient)
    for file in folder.glob("*_value_and_grad*-program"):
        file.write_bytes(broken)
    second, traced = in_new_process(gradient)
    assert set(traced) == {"_value_and_grad"}
    assert in_new_process(gradient)[1] == []
    assert np.array_equal(first, second)


@pytest.mark.parametrize("content", [3, (b"no program", None, set(), 0.0)])
def test_programs_that_cannot_be_loaded_are_left_to_jax(folder: Path, in_new_process: Callable, content: Any) -> None:
    first, _ = in_new_process(gradient)
    for file in folder.glob("*_value_and_grad*-program"):
        file.write_bytes(pickle.dumps(content))
    second, traced = in_new_process(gradient)
    assert set(traced) == {"_value_and_grad"}
    assert np.array_equal(first, second)


def test_loaded_programs_that_fail_are_made_anew(
    folder: Path, in_new_process: Callable, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Errors that come only when a program runs, as where it was loaded for other devices."""

    def fail(*args: Any) -> None:
        raise RuntimeError("not here")

    first, _ = in_new_process(gradient)
    with monkeypatch.context() as patched:
        patched.setattr(disk.serialize_executable, "deserialize_and_load", lambda *args, **kwargs: fail)
        second, _ = in_new_process(gradient)
    third, traced = in_new_process(gradient)
    assert traced == []
    assert np.array_equal(first, second)
    assert np.array_equal(first, third)


def test_programs_that_cannot_be_stored_are_left_to_jax(
    folder: Path, in_new_process: Callable, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(program: Any) -> None:
        raise ValueError("not here")

    monkeypatch.setattr(disk.serialize_executable, "serialize", refuse)
    monkeypatch.setattr(disk, "_rename", renamed := Mock(wraps=disk._rename))
    first, _ = in_new_process(gradient)
    assert renamed.called
    renamed.reset_mock()
    second, traced = in_new_process(gradient)
    assert traced
    assert not renamed.called
    assert np.array_equal(first, second)


def test_a_folder_that_is_gone(folder: Path, in_new_process: Callable) -> None:
    disk.keep_in(folder / "gone")
    with_store, _ = in_new_process(gradient)
    disk.keep_in(None)
    assert np.array_equal(with_store, in_new_process(gradient)[0])


def test_functions_of_the_user_are_left_to_jax(folder: Path, in_new_process: Callable) -> None:
    """A callback of the model may do something else in another process."""
    factor = 1.0

    def model(sigma: Any, y: Any = None) -> None:
        mu = numpyro.sample("mu", dist.Normal(0, 5))
        shape = jax.ShapeDtypeStruct((), jnp.result_type(float))
        numpyro.deterministic(
            "seen",
            jax.pure_callback(lambda x: np.asarray(factor * x, shape.dtype), shape, mu, vmap_method="sequential"),
        )
        numpyro.sample("y", dist.Normal(mu, sigma), obs=y)

    one = partial(draws, model, num_chains=1)
    in_new_process(one)
    assert "run_piece" in in_new_process(one)[1]


@register_dataclass
@dataclass(frozen=True)
class Slower(pmcmc.MALA):
    """A kernel of the user's: the code of its class may change."""


def test_kernels_of_the_user_are_left_to_jax(folder: Path, in_new_process: Callable) -> None:
    one = partial(draws, kernel=Slower(step_size=0.3))
    in_new_process(one)
    assert {"draw_noise", "solve_noise"} <= set(in_new_process(one)[1])


Pair = namedtuple("Pair", "a b")


@pytest.mark.parametrize(
    ("one", "other"),
    [
        (1, 1.0),
        (1, True),
        (0.0, -0.0),
        ("1", 1),
        ((1, 2), [1, 2]),
        ((1, (2, 3)), ((1, 2), 3)),
        (("a", "b,c"), ("a,b", "c")),
        (np.float32(1), 1.0),
        (Pair(1, 2), (1, 2)),
        (jax.tree.structure((1, [2])), jax.tree.structure([1, [2]])),
        (jax.tree.structure({"a": 1}), jax.tree.structure({"b": 1})),
        (jax.tree.structure(None), jax.tree.structure(1)),
        (pmcmc.HMC, pmcmc.MALA),
    ],
)
def test_texts_differ(one: Any, other: Any) -> None:
    assert identity.text_of(one) != identity.text_of(other)


@pytest.mark.parametrize("value", [lambda: 0, object(), Slower, jax.devices()[0], np.zeros(2), partial(draws)])
def test_values_without_text(value: Any) -> None:
    with pytest.raises(identity.Unrecognisable):
        identity.text_of(value)
