"""Large batches of factorisations run as loops, whatever construct contains them."""

import os
import re
import subprocess
import sys
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.scipy.linalg import solve_triangular

from pmcmc._xla import factorizations
from pmcmc._xla.equations import replacing
from pmcmc._xla.factorizations import may_wait_for_ever
from pmcmc.recurrence import MultipleShooting, deer

few_at_a_time = partial(replacing, factorizations.RULES)
spd = lambda x: x @ x.mT + jnp.broadcast_to(jnp.eye(x.shape[-1]), x.shape)


@jax.custom_batching.custom_vmap
def inverse_with_rule(x):
    return jnp.linalg.inv(x)


inverse_with_rule.def_vmap(lambda size, batched, x: (jnp.linalg.inv(x), True))
HELD = {
    "cholesky": lambda x: (jnp.linalg.cholesky(spd(x)), jnp.linalg.cholesky(spd(x + 1))),
    "triangular": lambda x: (solve_triangular(x, x[..., :1]), solve_triangular(x.mT, x, lower=True)),
    "lu, qr": lambda x: (jnp.linalg.inv(x), jnp.linalg.qr(x), jnp.linalg.slogdet(x)),
    "svd, eigh": lambda x: (jnp.linalg.svd(x), jnp.linalg.eigvalsh(spd(x))),
    "eig": lambda x: (jnp.linalg.eigvals(x), jnp.linalg.eigvals(x + 1), jax.scipy.linalg.schur(x[0])),
    "tridiagonal": lambda x: [
        jax.lax.linalg.tridiagonal_solve(x[..., 0] * shift, x[..., 1] + 3, x[..., 2] * shift, x) for shift in (0.1, 0.2)
    ],
    "in a loop": lambda x: jax.lax.scan(
        lambda c, _: (jnp.linalg.inv(c) + jnp.linalg.qr(x)[1], c[0]), x, None, length=3
    ),
    "in branches": lambda x: (
        jax.lax.cond(x[0, 0, 0] > 9, lambda y: y, lambda y: jnp.linalg.inv(y) + spd(y), x) + jnp.linalg.inv(x)
    ),
    "under rematerialisation": lambda x: jax.grad(lambda y: jax.checkpoint(HELD["total"])(y))(x),
    "total": lambda x: jnp.sum(jnp.linalg.inv(x)) + jnp.sum(jnp.linalg.cholesky(spd(x))),
    "one after the other": lambda x: jnp.linalg.inv(jnp.linalg.inv(x)),
    "a rule of its own": lambda x: jax.vmap(inverse_with_rule)(x),
    "a composite": lambda x: jax.lax.composite(jnp.linalg.inv, "tests.inverse")(x),
    "nothing in it": lambda x: (jnp.linalg.inv(x), jnp.linalg.qr(x[:, :0]), jnp.linalg.cholesky(x[:, :0, :0])),
    "one that is shared": lambda x: (jax.jit(spd)(jnp.linalg.inv(x)), jnp.linalg.inv(x + 1), jnp.linalg.inv(x)),
}
NONE = {"single matrices": lambda x: (jnp.linalg.inv(x[0]), jnp.linalg.inv(x[1])), "no matrix": lambda x: x + 1}
CALL = re.compile(r"@lapack_[a-z](\w+)_ffi\(.*?\) .*?: \(tensor<([0-9x]+)xf")


def batches(program, x) -> list[str]:
    """Return the leading shapes of LAPACK's calls, except those of single matrices."""
    calls = [(name, shape.split("x")) for name, shape in CALL.findall(jax.jit(program).lower(x).as_text())]
    leading = ["x".join(shape[: len(shape) - (1 if name == "gtsv" else 2)]) for name, shape in calls]
    return [shape for shape in leading if shape not in ("", "1")]


@pytest.fixture(autouse=True)
def nothing_is_small(monkeypatch: pytest.MonkeyPatch) -> None:
    small_is(1, monkeypatch)


def small_is(number: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(factorizations, "_SMALL", number)


@pytest.fixture
def matrices(rng_key: jax.Array) -> jax.Array:
    return jax.random.normal(rng_key, (6, 4, 4)) + 3 * jnp.eye(4)[None]


@pytest.mark.parametrize("name", HELD)
def test_the_same_numbers_without_batches(name: str, matrices: jax.Array) -> None:
    fn = HELD[name]
    assert batches(fn, matrices)
    assert not batches(few_at_a_time(fn), matrices)
    expected, found = (jax.tree.leaves(jax.jit(f)(matrices)) for f in (fn, few_at_a_time(fn)))
    for one, other in zip(expected, found, strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("name", NONE)
def test_programs_that_need_no_loops_are_left_alone(name: str, matrices: jax.Array) -> None:
    fn = NONE[name]
    assert batches(few_at_a_time(fn), matrices) == batches(fn, matrices)


def test_small_batches_stay(rng_key: jax.Array, monkeypatch: pytest.MonkeyPatch) -> None:
    """199 matrices of 10 x 10 are the largest batch below 200,000 operations."""
    small_is(200_000, monkeypatch)
    fn = lambda x: jnp.linalg.cholesky(spd(x))
    few, many = (jax.random.normal(rng_key, (number, 10, 10)) for number in (199, 500))
    assert batches(few_at_a_time(fn), few) == ["199"]
    assert sorted(batches(few_at_a_time(fn), many)) == ["102", "199"]
    np.testing.assert_allclose(jax.jit(few_at_a_time(fn))(many), jax.jit(fn)(many), rtol=1e-10)


def test_arguments_keep_their_places(matrices: jax.Array) -> None:
    fn = lambda x, how, *, add=None, scale: {how: scale * HELD["total"](x), "add": add, "static": jnp.arange(len(how))}
    jitted = jax.jit(few_at_a_time(fn), static_argnames="how")
    found = jitted(matrices, "here", scale=2.0)
    assert set(found) == {"here", "add", "static"}
    assert found["add"] is None
    np.testing.assert_allclose(found["here"], 2 * HELD["total"](matrices), rtol=1e-10)


def test_primitives_have_the_names_that_jax_gives_them() -> None:
    from jax.extend.core import primitives

    known = {p.name for p in vars(primitives).values() if isinstance(p, jax.extend.core.Primitive)}
    missing = set(factorizations._LAPACK) - known
    assert missing <= {"geqp3", "geqrf", "ormqr"}, missing  # not public


PROCESSES = """
import jax, jax.numpy as jnp
from jax.scipy.linalg import solve_triangular
from pmcmc import Target
from pmcmc._xla.compile import tuned_jit

def process(scale):
    x = jnp.linspace(0, 1, 40)
    factor = jnp.linalg.cholesky(jnp.exp(-0.5 * ((x[:, None] - x) / scale) ** 2) + 0.1 * jnp.eye(40))
    return jnp.sum(solve_triangular(factor, x, lower=True) ** 2) + jnp.sum(jnp.log(jnp.diag(factor)))

target = Target.from_logdensity(lambda scales: sum(map(process, scales)), jnp.ones(4))
program = tuned_jit()(lambda target, scales: jax.vmap(target.value_and_grad)(scales))
scales = jax.random.uniform(jax.random.key(0), (36, 4), minval=0.1)
for _ in range(200):
    jax.block_until_ready(program(target, scales))
"""


@pytest.mark.skipif(not may_wait_for_ever(), reason="this jaxlib does not")
@pytest.mark.slow
def test_gaussian_processes_on_two_threads_end() -> None:
    """With `jax.jit` they do not: within about ten calls both threads wait for each other."""
    done = subprocess.run(
        [sys.executable, "-c", PROCESSES], env={**os.environ, "NPROC": "2"}, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr[-2000:]


@pytest.mark.skipif(not may_wait_for_ever(), reason="this jaxlib does not")
def test_no_device_of_several_asks_for_a_batch() -> None:
    matrix = lambda x: spd(jnp.outer(x, x))
    step = lambda x, u: 0.5 * x + jnp.diag(jnp.linalg.cholesky(matrix(x + u))) + jnp.linalg.inv(matrix(x))[0]
    for solver in (MultipleShooting(num_blocks=4, devices=jax.devices()), deer(devices=jax.devices())):
        assert not batches(lambda u, solver=solver: solver.solve(step, jnp.ones(3), u).value, jnp.ones((32, 3)))
    assert batches(lambda u: MultipleShooting(num_blocks=4).solve(step, jnp.ones(3), u).value, jnp.ones((32, 3)))
