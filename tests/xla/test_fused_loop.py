"""Loops as one kernel give the same numbers, and the programs of every pmcmc kernel are simple enough for it."""

import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import pmcmc
from pmcmc import HMC, MALA, NUTS, RandomWalk
from pmcmc._xla import rewrites
from pmcmc._xla.content import inner_programs
from pmcmc._xla.rewrites import gains_from_lanes, in_one_kernel
from pmcmc.random.distributions import normals, uniforms
from pmcmc.recurrence import Sequential
from pmcmc.sampling import programs
from tests.helpers.selection import share

pytestmark = [
    pytest.mark.optimized,
    pytest.mark.skipif(jax.default_backend() != "cpu", reason="other devices have no such kernels"),
]
KERNELS = {"HMC": HMC(0.1, 3), "MALA": MALA(0.1), "NUTS": NUTS(0.1), "RandomWalk": RandomWalk(0.1)}
MARK = 'xla_cpu_small_call = "true"'


def _loop(matrix, x, num_steps):
    return jax.lax.fori_loop(0, num_steps, lambda i, x: jnp.tanh(jnp.sum(matrix * x[None, :], axis=1)) + i, x)


def test_simple_loops_are_marked_and_give_the_same_numbers():
    arguments = jnp.linspace(-1.0, 1.0, 900).reshape(30, 30), jnp.arange(30.0), 50
    marked = jax.jit(lambda *a: in_one_kernel(_loop, *a))
    assert MARK in marked.lower(*arguments).as_text()
    np.testing.assert_allclose(marked(*arguments), jax.jit(_loop)(*arguments), rtol=1e-12)


@pytest.mark.parametrize(
    "call",
    [
        lambda x: x @ x,
        lambda x: jnp.linalg.cholesky(x @ x.T + jnp.eye(3)),
        lambda x: x.at[jnp.arange(3) % 2].add(1.0),
        lambda x: jax.pure_callback(np.sin, x, x),
    ],
    ids=["product", "library", "scatter", "callback"],
)
def test_what_such_a_kernel_cannot_hold_is_left_to_xla(call):
    program = jax.jit(lambda x: in_one_kernel(lambda x: jax.lax.fori_loop(0, 3, lambda i, x: call(x), x), x))
    assert MARK not in program.lower(jnp.eye(3)).as_text()
    program(jnp.eye(3))


@pytest.mark.parametrize(("largest", "marked"), [(30, False), (900, True), (None, True)])
def test_large_operations_are_left_to_xla(largest, marked):
    program = jax.jit(lambda *a: in_one_kernel(lambda *a: _loop(*a, 50), *a, largest=largest))
    assert (MARK in program.lower(jnp.eye(30), jnp.arange(30.0)).as_text()) == marked


UNUSED = """
import jax, jax.numpy as jnp, numpy as np
from pmcmc._xla.compile import compiler_options
from pmcmc._xla.rewrites import gains_from_lanes, in_one_kernel

def step(k, mask, key, x):
    return jnp.tanh(x) + 0 * k + 0 * mask + 0 * jax.random.key_data(key).astype(int).sum()

def loop(*args):
    return jax.lax.fori_loop(0, 9, lambda i, x: step(*args[:3], x), args[3]), jnp.zeros(0)

arguments = jnp.arange(4), jnp.array([True]), jax.random.key(0), jnp.ones(4), jnp.zeros(0)
program = jax.jit(lambda *a: in_one_kernel(loop, *a), compiler_options=compiler_options("cpu"))
assert "small_call" in program.lower(*arguments).as_text()
found, expected = program(*arguments)[0], jax.jit(loop)(*arguments)[0]
assert jnp.all(found == expected), (found, expected)

# What the function closes over: values of the program around it, unused, and large constants, known now or by XLA.
known, words = np.arange(4000), jnp.arange(4)

def closing(k, x):
    folded = jnp.asarray(known)[::-1] * 2
    step = lambda x, a, b: jnp.tanh(x) + 0 * k[0] + (known + a + b + folded) / 1e4
    inner = lambda x, a, b: jax.lax.fori_loop(0, 9, lambda i, x: step(x, a, b), x)
    return inner, x, known, folded

def marked(k, x):
    inner, *args = closing(k, x)
    return in_one_kernel(inner, *args)

def plain(k, x):
    inner, *args = closing(k, x)
    return inner(*args)

program = jax.jit(marked, compiler_options=compiler_options("cpu"))
assert "small_call" in program.lower(words, jnp.ones(4000)).as_text()
found, expected = program(words, jnp.ones(4000)), jax.jit(plain)(words, jnp.ones(4000))
assert jnp.allclose(found, expected, rtol=1e-5), (found, expected)
"""


def test_arguments_that_xla_simplifies_away():
    """XLA ends the process if such a kernel has an argument that is never read, hence the separate process."""
    done = subprocess.run([sys.executable, "-c", UNUSED], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]


def test_an_only_result_that_xla_would_share_among_cores():
    """It has enough arithmetic for two cores, and XLA would then pass too few arguments to the kernel."""
    keys = jnp.arange(1024, dtype=jnp.uint32).reshape(2, 512)
    draw = lambda keys: normals(jax.vmap(lambda key: uniforms(key, 10, jnp.float32), -1, -1)(keys))
    program = jax.jit(lambda keys: in_one_kernel(draw, keys))
    assert MARK in program.lower(keys).as_text()
    np.testing.assert_array_equal(program(keys), jax.jit(draw)(keys))


def test_the_function_is_traced_once():
    traced = []

    def fn(x):
        traced.append(x)
        return jnp.sin(x)

    jax.jit(lambda x: in_one_kernel(fn, x))(jnp.ones(2))
    assert len(traced) == 1


def test_the_default_device_decides_and_not_the_default_backend(monkeypatch):
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    lowered = lambda: jax.jit(lambda *a: in_one_kernel(_loop, *a)).lower(jnp.eye(3), jnp.arange(3.0), 50).as_text()
    assert MARK not in lowered()
    for cpu in ("cpu", jax.devices("cpu")[0]):
        with jax.default_device(cpu):
            assert MARK in lowered()


@pytest.mark.parametrize("kernel", share(KERNELS, "HMC", "RandomWalk"))
def test_sampling_a_small_model_in_order_is_one_kernel(kernel, monkeypatch):
    """A primitive that is not listed would silently cost a factor of three."""
    unlisted = []

    def spy(fn, *args):
        unlisted.append(_unlisted(jax.make_jaxpr(fn)(*args).jaxpr))
        return fn(*args)

    monkeypatch.setattr(programs, "in_one_kernel", spy)
    logdensity = lambda x: -0.5 * jnp.sum(x**2) - jax.nn.softplus(x[0])
    options = dict(kernel=kernel, solver=Sequential(), num_warmup=0, num_samples=8, progress_bar=False)
    pmcmc.sample(logdensity, jnp.zeros(3), 0, **options)
    assert unlisted == [set()]


def _unlisted(jaxpr):
    here = {equation.primitive.name for equation in jaxpr.eqns} - rewrites._SIMPLE
    return here.union(*(_unlisted(inner) for equation in jaxpr.eqns for inner in inner_programs(equation)))


def test_which_steps_gain_from_lanes() -> None:
    """Products, gathers and loops do; factorisations, sorts and calls of the host take as long for each lane."""
    rows, index = jnp.ones((20, 3)), jnp.arange(20) % 3
    lower = lambda x: jnp.linalg.cholesky(jnp.eye(3) + jnp.outer(x, x))
    gains = {
        "product": lambda x: jnp.sum(jnp.log1p(jnp.exp(rows @ x))),
        "gather": lambda x: jnp.sum(jnp.square(x[index])),
        "loop": lambda x: jax.lax.fori_loop(0, 5, lambda _, y: jnp.sin(y), x).sum(),
    }
    do_not = {
        "factorisation": lambda x: lower(x).sum(),
        "sort": lambda x: jnp.sort(x)[0],
        "callback": lambda x: jax.pure_callback(np.sum, jax.ShapeDtypeStruct((), x.dtype), x),
    }
    for name, fn in (gains | do_not).items():
        derivative = fn if name == "callback" else jax.grad(fn)
        program = jax.make_jaxpr(derivative)(jnp.ones(3)).jaxpr
        assert gains_from_lanes(program) == (name in gains), name
