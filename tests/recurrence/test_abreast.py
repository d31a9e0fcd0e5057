"""Lanes side by side: the same numbers as by ``jax.vmap``, in the form that the step and the platform ask for."""

from contextlib import nullcontext

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pmcmc._xla.rewrites import FEW_LANES, own_program
from pmcmc.recurrence import MultipleShooting, Sequential, abreast
from pmcmc.recurrence.abreast import LARGEST, map_lanes, scan_abreast, step_abreast, walk_abreast, while_abreast
from pmcmc.recurrence.problem import Recurrence
from pmcmc.recurrence.sequential import Lanes, Layout, Stored, walk
from pmcmc.recurrence.sharding import AllLanes

MARK = 'xla_cpu_small_call = "true"'
CHUNK, MANY = 4, FEW_LANES + 3
MATRIX = np.linspace(-0.2, 0.2, 9).reshape(3, 3)


def step(carry, u):
    """A step of an array, an integer and a flag; one number of the input is not read."""
    x, count, flag = carry
    x = jnp.tanh(jnp.sum(MATRIX * x[None], 1)) + jnp.where(flag, u["noise"], 0.5 * u["noise"])
    return (x, count + u["number"], x[0] > 0), (x, dict(count=count, energy=jnp.sum(x**2)))


def lanes_of(num_lanes, capacity=12, block_length=12, buffers=None):
    inputs = dict(
        noise=jnp.sin(jnp.arange(num_lanes * capacity * 3.0)).reshape(num_lanes, capacity, 3),
        number=jnp.arange(num_lanes * capacity).reshape(num_lanes, capacity),
        unread=jnp.ones((num_lanes, capacity, 2)),
    )
    layout = Layout(1, num_lanes, capacity, block_length, num_lanes * block_length)
    lanes = Lanes(Recurrence(step), None, Stored(inputs), None, None, layout, buffers, held=AllLanes(layout))
    carry = jnp.cos(jnp.arange(num_lanes * 3.0)).reshape(num_lanes, 3), jnp.arange(num_lanes), jnp.arange(num_lanes) > 2
    return carry, lanes


@pytest.mark.parametrize("block_length", [12, 8])
@pytest.mark.parametrize("num_lanes", [1, FEW_LANES, MANY])
def test_walks_agree(num_lanes, block_length):
    carry, lanes = lanes_of(num_lanes, block_length=block_length)
    found = jax.jit(lambda: walk_abreast(step, carry, lanes, CHUNK))()
    expected = jax.jit(lambda: walk(jax.vmap(step), carry, lanes, CHUNK))()
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-13), found, expected)
    assert jax.tree.map(lambda x: x.dtype, found) == jax.tree.map(lambda x: x.dtype, expected)


def test_buffers_are_overwritten():
    carry, lanes = lanes_of(MANY, block_length=8)
    _, record = jax.eval_shape(lambda: walk_abreast(step, carry, lanes, CHUNK))
    carry, lanes = lanes_of(MANY, block_length=8, buffers=jax.tree.map(lambda x: jnp.full(x.shape, 7, x.dtype), record))
    _, record = jax.jit(lambda: walk_abreast(step, carry, lanes, CHUNK))()
    assert all(np.all(np.asarray(x[:, 8:]) == 7) for x in jax.tree.leaves(record))


def test_one_step_agrees():
    carry, lanes = lanes_of(MANY)
    u = lanes.inputs.of_step(0)
    found, expected = step_abreast(step, MANY)(carry, u), jax.vmap(step)(carry, u)
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-13), found, expected)


def lowered(step, num_lanes, own=own_program):
    """The program of a walk, whose arrays are its arguments; by default one of the package's own."""
    carry, lanes = lanes_of(num_lanes)
    walk_all = jax.jit(lambda c, u: walk_abreast(step, c, lanes._replace(inputs=u), CHUNK))
    with own():
        return walk_all.lower(carry, lanes.inputs).as_text()


def with_product(carry, u):
    matrix = jnp.ones((40, 40))
    return (carry[0] + (matrix @ jnp.tile(u["noise"], 14)[:40])[:3], *carry[1:]), None


def with_scatter(carry, u):
    return (carry[0].at[carry[1] % 3].add(u["noise"][0]), *carry[1:]), None


def with_large_operation(carry, u):
    return (carry[0] + jnp.sum(jnp.sin(u["noise"][0] * jnp.arange(LARGEST // MANY + 1.0))), *carry[1:]), None


@pytest.mark.skipif(jax.default_backend() != "cpu", reason="other devices have no such kernels")
def test_chunks_are_kernels_unless_the_step_is_better_off_without():
    assert MARK in lowered(step, MANY)
    assert MARK not in lowered(step, FEW_LANES)
    for other in (with_product, with_scatter, with_large_operation):
        assert MARK not in lowered(other, MANY)
    assert MARK not in lowered(step, MANY, own=nullcontext)


@pytest.mark.optimized
def test_programs_of_the_users_compile():
    """XLA makes a library call of this reduction unless an option says otherwise, and fails within a kernel."""
    matrix = np.linspace(-1, 1, 64 * 64).reshape(64, 64) / 40
    mix = lambda x, u: jnp.tanh(jnp.sum(matrix * x[:, None], 0) + u)
    inputs = jnp.asarray(np.random.default_rng(0).standard_normal((1024, 64)))
    solve = jax.jit(lambda u: MultipleShooting(num_blocks=64).solve(mix, jnp.zeros(64), u))
    exact = jax.jit(lambda u: Sequential().solve(mix, jnp.zeros(64), u))
    np.testing.assert_allclose(solve(inputs).value, exact(inputs).value, atol=1e-10)


def test_other_platforms_keep_vmap(monkeypatch):
    monkeypatch.setattr(abreast, "default_platform", lambda: "gpu")
    monkeypatch.setattr(abreast, "vmap_last", None)
    test_walks_agree(MANY, 12)
    assert MARK not in lowered(step, MANY)


@pytest.mark.parametrize("num_lanes", [1, FEW_LANES, MANY])
def test_scans_over_lanes_that_share_a_carry_agree(num_lanes):
    """As in warm-up, where the step size is shared, and depends on all lanes."""
    rng = np.random.default_rng(0)
    states, noise = jnp.asarray(rng.normal(size=(3, num_lanes))), jnp.asarray(rng.normal(size=(5, 3, num_lanes)))
    one = lambda size, x, u: (jnp.tanh(x + size * u), jnp.sum(x))

    def body(batched, carry, u):
        x, size = carry
        x, total = batched(size, x, u)
        return (x, size / (1 + jnp.mean(total) ** 2)), total

    def found():
        batched = map_lanes(one, (None, -1, -1), num_lanes)
        return scan_abreast(lambda c, u: body(batched, c, u), (states, jnp.asarray(0.5)), noise, 5, num_lanes)

    def expected():
        batched = jax.vmap(one, (None, -1, -1), out_axes=-1)
        return jax.lax.scan(lambda c, u: body(batched, c, u), (states, jnp.asarray(0.5)), noise)

    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-13), jax.jit(found)(), jax.jit(expected)())
    assert MARK not in jax.jit(found).lower().as_text()
    with own_program():
        assert (MARK in jax.jit(lambda: found()).lower().as_text()) == (num_lanes > FEW_LANES)


@pytest.mark.parametrize("num_lanes", [FEW_LANES, MANY])
def test_a_loop_of_many_lanes_is_one_kernel(num_lanes):
    """In pmcmc's own programs only; and the numbers are those of the loop, also where it closes over others."""
    start = jnp.cos(jnp.arange(3.0 * num_lanes)).reshape(3, num_lanes)

    def run(x, factor):
        body = lambda x: jnp.where(jnp.abs(x) > 0.1, factor * x, x)
        return while_abreast(lambda x: jnp.any(jnp.abs(x) > 0.1), body, x, num_lanes)

    with own_program():
        own = jax.jit(run).lower(start, 0.5)
    assert (MARK in own.as_text()) == (num_lanes == MANY and jax.default_backend() == "cpu")
    assert MARK not in jax.jit(lambda x, factor: run(x, factor)).lower(start, 0.5).as_text()
    expected = np.asarray(start)
    while np.any(np.abs(expected) > 0.1):
        expected = np.where(np.abs(expected) > 0.1, 0.5 * expected, expected)
    np.testing.assert_array_equal(own.compile()(start, 0.5), expected)
