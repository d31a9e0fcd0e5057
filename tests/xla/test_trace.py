"""Traces of user functions are equal if they compute the same, with every array that they read as a leaf."""

import os
import subprocess
import sys
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pmcmc._xla.content import UNKNOWN_ROUNDS, count_operations
from pmcmc._xla.digest import digest
from pmcmc._xla.trace import trace

X = jnp.linspace(-1.0, 1.0, 3)


def same(make, *values) -> bool:
    """Whether the functions that ``make`` returns for these values have one trace, and compute their own values."""
    traced = [trace(make(value), X) for value in values]
    for one, value in zip(traced, values, strict=True):
        np.testing.assert_allclose(one(X), make(value)(X), rtol=1e-12)
        np.testing.assert_allclose(jax.grad(one)(X), jax.grad(make(value))(X), rtol=1e-12)
    return len({one.trace for one in traced}) == 1


def jitted(y):
    inner = jax.jit(lambda x: jnp.sum((x - y) ** 2))
    return lambda x: inner(x) + 1


def nested(y):
    inner = jax.jit(lambda x: jnp.sum((x - y) ** 2))
    outer = jax.jit(lambda x: 2 * inner(x))
    return lambda x: outer(x)


def with_key(y):
    key = jax.random.key(int(y[0]))
    return lambda x: jnp.sum(x * jax.random.normal(key, (3,)))


ARRAYS = {
    "numpy": lambda y: lambda x: jnp.sum((x - np.asarray(y)) ** 2),
    "jax": lambda y: lambda x: jnp.sum((x - jnp.asarray(y)) ** 2),
    "jitted": jitted,
    "jitted twice": nested,
    "scan": lambda y: lambda x: jax.lax.scan(lambda c, z: (c + jnp.sum(z * x * y), None), 0.0, jnp.asarray(y))[0],
    "integers": lambda y: lambda x: jnp.sum(x[np.asarray(y, int) % 3]),
    "key": with_key,
}


@pytest.mark.parametrize("name", ARRAYS)
def test_arrays_are_leaves(name: str) -> None:
    assert same(ARRAYS[name], np.array([1.0, 2.0, 4.0]), np.array([3.0, -1.0, 0.5]))


def test_numbers_become_leaves_where_they_are_seen_to_differ() -> None:
    make = lambda y: lambda x: jnp.sum((x - np.mean(y)) ** 2 / np.std(y) + 0.123 * x)
    columns = [np.array([1.0, 2.0, 4.0]) * scale for scale in (1.0, 1.5, 2.0, 0.1)]
    traces = [trace(make(y), X).trace for y in columns]
    assert traces[0] != traces[1]
    assert traces[1] == traces[2] == traces[3]
    assert same(make, *columns[1:])


def test_what_differs_is_told_apart() -> None:
    @jax.custom_jvp
    def bent(x):
        return jnp.sum(x**2)

    factor = 1.0
    bent.defjvp(lambda x, t: (bent(*x), factor * jnp.sum(2 * x[0] * t[0])))
    other = jax.custom_vjp(lambda x: jnp.sum(x**2))
    other.defvjp(lambda x: (jnp.sum(x**2), x), lambda x, g: (factor * 2 * x * g,))
    found = []
    for factor in (1.0, 3.0, 1.0):  # noqa: B007 read by the rules
        found.append([trace(lambda x, f=f: f(x), X).trace for f in (bent, other)])
    assert found[0] == found[2]
    assert found[0][0] != found[1][0]
    assert found[0][1] != found[1][1]
    for one, two in [
        (lambda x: jnp.sum(x), lambda x: jnp.prod(x)),
        (lambda x: jnp.sum(x + 1), lambda x: jnp.sum(1 - x)),
        (lambda x: jnp.sum(x * 0.0), lambda x: jnp.sum(x * np.zeros(3))),
        (lambda x: jnp.sum(jnp.concatenate([x, x])), lambda x: jnp.sum(jnp.concatenate([x, x[:2]]))),
        (lambda x: {"a": x, "b": 2 * x}, lambda x: {"a": x, "c": 2 * x}),
    ]:
        assert trace(one, X).trace != trace(two, X).trace


def test_what_the_user_changes_later_is_not_seen() -> None:
    y = np.ones(1000)
    traced = trace(lambda x: jnp.sum(x) + jnp.sum(jnp.asarray(y)), X)
    y[:] = 5
    assert traced(X) == 1000


def test_an_array_that_is_read_twice_is_one_leaf() -> None:
    y, copy = np.arange(1000.0), np.arange(1000.0)
    traced = trace(lambda x: jnp.sum(x) + jnp.sum(jnp.asarray(y)) + jnp.sum(jnp.asarray(y) ** 2) + jnp.sum(copy), X)
    assert len(traced.constants) == 1
    zeros = np.array([0.0, -0.0])
    signs = trace(lambda x: jnp.sum(x) + jnp.arctan2(zeros[0:1], -1.0) - jnp.arctan2(zeros[1:2], -1.0), X)
    np.testing.assert_allclose(signs(X), 2 * np.pi)


def test_parts_are_what_they_need() -> None:
    y, z = np.ones(3), np.ones(4)
    traced = trace(lambda x: {"a": jnp.sum(x * y), "b": jnp.sum(jnp.exp(x)) * jnp.asarray(z)}, X)
    a, b = traced.trace.part("a"), traced.trace.part("b")
    assert a(traced.constants, X) == jnp.sum(X)
    assert b(traced.constants, X).shape == (4,)
    assert len(a.program.eqns) + len(b.program.eqns) <= len(traced.trace.program.eqns)
    assert a != b


def test_an_argument_that_nothing_reads_can_be_left_out() -> None:
    key = jax.eval_shape(lambda: jax.random.key(0))
    drawn = lambda key: jax.random.normal(key)
    steps = lambda x, key: jax.lax.scan(lambda c, z: (c + z, drawn(key)), 0.0, x)
    none = trace(lambda x, key: {"a": jnp.sum(x), "b": steps(x, key)[0] * 0 + drawn(key)}["a"], X, key)
    assert not none.trace.uses_last
    assert none.trace.without_last is none.trace.without_last
    assert none.trace.without_last(none.constants, X + 1) == jnp.sum(X + 1)
    some = trace(lambda x, key: dict(zip("ab", steps(x, key), strict=True)), X, key).trace
    assert some.uses_last
    assert not some.part("a").reads_last
    assert some.part("b").reads_last


def test_other_arguments_are_refused() -> None:
    traced = trace(lambda x: jnp.sum(x["a"]), {"a": X})
    with pytest.raises(TypeError, match=r"shape \(3,\), got \(4,\)"):
        traced({"a": jnp.ones(4)})
    with pytest.raises(TypeError, match="structure"):
        traced({"b": X})


def test_callbacks_keep_their_function() -> None:
    def make(factor):
        def fn(x):
            shape = jax.ShapeDtypeStruct((), float)
            return jax.pure_callback(lambda v: np.sum(v) * factor, shape, x, vmap_method="sequential")

        return fn

    one, again, two = (trace(make(factor), X) for factor in (1.0, 1.0, 2.0))
    assert one.trace == again.trace
    assert one.trace != two.trace
    np.testing.assert_allclose([one(X + 1), two(X + 1)], [3.0, 6.0])


def test_another_precision_than_that_of_the_trace() -> None:
    traced = trace(lambda x: jnp.sum(x * np.ones(3)), X)
    enable_x64 = jax.enable_x64 if hasattr(jax, "enable_x64") else jax.experimental.enable_x64
    with enable_x64(False), pytest.raises(TypeError, match="traced in float64, which JAX does not use now: set"):
        traced(jnp.ones(3))


@pytest.mark.parametrize(
    "within",
    [
        lambda helper: lambda x: jax.lax.scan(lambda c, _: (helper(c), None), x, None, length=1)[0],
        lambda helper: lambda x: jax.lax.cond(x[0] < 0, helper, lambda c: c, x),
        lambda helper: lambda x: jax.lax.while_loop(lambda c: c[0] > -2, lambda c: jax.vmap(helper)(c[None])[0] - 9, x),
    ],
    ids=["scan", "cond", "while"],
)
def test_arrays_of_jitted_helpers_within_loops_are_copied(within) -> None:
    """JAX holds the user's own memory there, in a dtype that it does not convert."""
    held = np.ones(3)
    traced = trace(within(jax.jit(lambda c: c * held)), X)
    before = np.array(traced(X))
    held[:] = 5.0
    np.testing.assert_array_equal(jax.jit(lambda x: traced(x))(X), before)


def by_host(host):
    shape = jax.ShapeDtypeStruct((), float)
    return trace(lambda x: jax.pure_callback(host, shape, x, vmap_method="sequential"), X)


DATA, SCALE = np.ones(3), 1.0


def scaled(v):
    return SCALE * np.sum(v * DATA)


def test_callbacks_are_told_apart_by_the_globals_that_they_read(monkeypatch: pytest.MonkeyPatch) -> None:
    """JAX calls them with the globals of that time, so programs of another time or module must not be used."""
    host = lambda v: scaled(v) + sum(DATA[i] for i in range(3))
    first = by_host(host)
    assert by_host(host).trace == first.trace
    monkeypatch.setitem(globals(), "SCALE", 2.0)
    second = by_host(host)
    monkeypatch.setitem(globals(), "DATA", np.ones(3))
    third = by_host(host)
    DATA[:] = 5.0  # in place
    fourth = by_host(host)
    assert len({traced.trace for traced in (first, second, third, fourth)}) == 4
    code, found = compile("host = lambda v: np.sum(v) * factor", "fit.py", "exec"), []
    for factor in (1.0, 2.0, 2.0):
        module = {"np": np, "factor": factor}
        exec(code, module)
        found.append(by_host(module["host"]))
    assert len({traced.trace for traced in found}) == 3
    np.testing.assert_allclose([traced(X + 1) for traced in found], [3.0, 6.0, 6.0])


def test_callbacks_that_are_recursive_or_objects() -> None:
    def walk(n):
        return 1.0 if n < 1 else walk(n - 1)

    assert by_host(lambda v: np.sum(v) * walk(3))(X + 1) == 3.0

    @dataclass(eq=False)
    class Host:
        factor: np.ndarray

        def __call__(self, v):
            return np.sum(v) * self.factor.sum()

    one, other = Host(np.ones(1)), Host(np.ones(1))
    first, second = by_host(one), by_host(other)
    assert by_host(one).trace == first.trace != second.trace
    one.factor[:] = 2.0
    assert by_host(one).trace != first.trace
    assert second(X + 1) == 3.0


def test_frozen_callbacks_count_by_their_fields() -> None:
    """A model may make them anew at each run."""

    @dataclass(frozen=True)
    class Times:
        factor: float

        def __call__(self, v):
            return np.sum(v) * self.factor * SCALE

    first = by_host(Times(2.0))
    assert by_host(Times(2.0)).trace == first.trace
    assert by_host(Times(3.0)).trace != first.trace
    assert first(X + 1) == 6.0


def test_digests_depend_on_the_content_alone() -> None:
    fn = lambda x: jnp.sum(jnp.tanh(x) * np.arange(3.0))
    same, other = lambda x: jnp.sum(jnp.tanh(x) * np.ones(3)), lambda x: jnp.sum(jnp.sinh(x) * np.arange(3.0))
    assert digest(trace(fn, X).trace) == digest(trace(same, X).trace) != digest(trace(other, X).trace)
    assert digest([np.arange(3)]) == digest([jnp.arange(3)]) != digest([np.arange(3.0)])
    code = "; ".join(
        (
            "import jax.numpy as jnp, numpy as np",
            "from pmcmc._xla.digest import digest",
            "from pmcmc._xla.trace import trace",
            "print(digest(trace(lambda x: jnp.sum(jnp.logaddexp(x, 1) * np.arange(3.0)), jnp.ones(3)).trace))",
        )
    )
    said = {subprocess.run([sys.executable, "-c", code], capture_output=True, check=True).stdout for _ in range(2)}
    assert len(said) == 1


ROWS = jax.lax.ScatterDimensionNumbers((), inserted_window_dims=(0,), scatter_dims_to_operand_dims=(0,))


@pytest.mark.parametrize(
    ("fn", "shapes", "expected"),
    [
        (lambda a, b: a @ b, [(3, 4), (4, 5)], 60),
        (lambda a: jnp.linalg.cholesky(a, symmetrize_input=False), [(6, 6)], 6**3),
        (lambda a: jax.scipy.linalg.lu_factor(a)[0], [(9, 9)], 9**3),
        (lambda a: jax.lax.scan(lambda c, x: (c + x, None), a[0], a)[0], [(7, 3)], 7 * 3),
        (lambda a: jax.lax.while_loop(lambda x: x[0] < 1, lambda x: x * 2, a), [(5,)], UNKNOWN_ROUNDS * 5),
        (lambda a: jax.lax.cond(True, lambda x: x * x * x, lambda x: x, a), [(5,)], 10),
    ],
    ids=["product", "cholesky", "lu", "scan", "while", "cond"],
)
def test_operations_are_counted(fn, shapes, expected: int) -> None:
    program = jax.make_jaxpr(fn)(*(jnp.ones(shape) for shape in shapes))
    assert expected <= count_operations(program.jaxpr) <= 5 * expected
    assert count_operations(jax.make_jaxpr(lambda *args: jax.jit(fn)(*args))(*map(jnp.ones, shapes)).jaxpr) >= expected


def test_scatters_count_what_they_add() -> None:
    program = jax.make_jaxpr(lambda x, y: jax.lax.scatter_add(x, jnp.zeros((50, 1), int), y, ROWS))(
        jnp.zeros(3), jnp.ones(50)
    )
    (scatter,) = [equation for equation in program.eqns if equation.primitive.name == "scatter-add"]
    assert count_operations(program.jaxpr.replace(eqns=[scatter])) == 50


def with_gradient(factor: float):
    @jax.custom_gradient
    def fn(x):
        return -0.5 * jnp.sum(x**2), lambda g: (-factor * x * g,)

    return fn


def with_rule(factor: float):
    fn = jax.custom_jvp(jnp.log)
    fn.defjvp(lambda p, t: (fn(*p), factor * t[0]))
    return lambda x: jnp.sum(fn(x))


def with_rules(factor: float):
    fn = jax.custom_jvp(jnp.log)
    fn.defjvps(lambda t, out, x: factor * t)
    return lambda x: jnp.sum(fn(x))


def with_rule_of_spectrum(factor: float):
    power = jax.custom_jvp(lambda z: jnp.sum(jnp.abs(z) ** 2))
    power.defjvp(lambda p, t: (power(*p), factor * jnp.sum(jnp.real(jnp.conj(p[0]) * t[0]))))
    return lambda x: power(jnp.fft.fft(x))


@pytest.mark.parametrize("make", [with_gradient, with_rule, with_rules, with_rule_of_spectrum])
def test_rules_of_the_user_on_functions_of_jax(make) -> None:
    """Their primal functions are in JAX's files, and their values are equal: only the rules tell them apart."""
    x = jnp.arange(1.0, 5.0)
    one, again, other = trace(make(2.0), x), trace(make(2.0), x), trace(make(6.0), x)
    assert one.trace == again.trace
    assert one.trace != other.trace
    np.testing.assert_allclose(jax.grad(other)(x), 3 * jax.grad(one)(x), rtol=1e-6)


def test_how_random_bits_are_made_is_content() -> None:
    fn = lambda x: jnp.sum(x * jax.random.normal(jax.random.key(0), (3,)))
    x = jnp.arange(3.0)
    with jax.threefry_partitionable(False):
        before = trace(fn, x)
    with jax.threefry_partitionable(True):
        after, expected = trace(fn, x), fn(x)
    assert before.trace != after.trace
    np.testing.assert_allclose(after(x), expected, rtol=1e-6)


def test_numbers_in_arrays_are_copied() -> None:
    """An array without axes is an operand of an equation, and was the user's own."""
    number, x = np.array(2.0, np.float32), jnp.ones(3, jnp.float32)
    looped = lambda x: jax.lax.fori_loop(0, 2, lambda i, y: y * jnp.asarray(number), x)
    made = [trace(lambda x: jnp.sum(x) * jnp.asarray(number), x), trace(lambda x: jnp.sum(looped(x)), x)]
    expected = [float(traced(x)) for traced in made]
    number[()] = 5.0
    assert [float(traced(x)) for traced in made] == expected == [6.0, 12.0]


def test_digests_know_the_code_of_callbacks() -> None:
    """Also of constants whose order is another one in each process."""
    shape, x = jax.ShapeDtypeStruct((), jnp.float32), jnp.ones(3, jnp.float32)
    traced = lambda host: trace(lambda x: jax.pure_callback(host, shape, x, vmap_method="sequential"), x).trace
    total, product = traced(lambda v: np.sum(v)), traced(lambda v: np.prod(v))
    assert digest(total) != digest(product)
    assert digest(total) == digest(traced(lambda v: np.sum(v)))
    code = "\n".join(
        (
            "import jax, jax.numpy as jnp, numpy as np",
            "from pmcmc._xla.digest import digest",
            "from pmcmc._xla.trace import trace",
            "host = lambda v: np.float32(str(v) in {'a', 'b', 'c', 'd', 'e'})",
            "call = lambda x: jax.pure_callback(host, jax.ShapeDtypeStruct((), jnp.float32), x)",
            "print(digest(trace(call, jnp.ones(3)).trace))",
        )
    )
    run = lambda seed: subprocess.run(
        [sys.executable, "-c", code], capture_output=True, check=True, env={**os.environ, "PYTHONHASHSEED": seed}
    )
    assert run("1").stdout == run("2").stdout
