"""Derivatives through a solve: against finite differences and against derivatives of the sequential scan."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pmcmc import recurrence as rec
from tests.helpers.networks import HIDDEN, gradient, loss, make_network
from tests.helpers.selection import share

SOLVERS = {
    "deer": rec.deer(),
    "quasi-deer": rec.quasi_deer(),
    "quasi-elk": rec.quasi_elk(),
    "windowed": rec.Windowed(rec.deer(), window=7),
}


@pytest.fixture
def network(rng_key):
    return make_network(rng_key)


def close(a, b, tol=1e-10):
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=tol, atol=tol), a, b)
    assert all(np.isfinite(x).all() for x in jax.tree.leaves(a))


@pytest.mark.parametrize("solver", share(SOLVERS, "deer", "quasi-elk"))
def test_reverse_mode_equals_the_sequential_scan(solver, network):
    close(gradient(solver, *network), gradient(rec.Sequential(), *network))


def test_forward_mode_and_finite_differences(network):
    direction = jax.tree.map(jnp.cos, network)
    value, slope = jax.jit(lambda *args: jax.jvp(lambda *a: loss(rec.deer(), *a), args, direction))(*network)
    moved = lambda h: jax.tree.map(lambda x, d: x + h * d, network, direction)
    difference = (loss(rec.Sequential(), *moved(1e-5)) - loss(rec.Sequential(), *moved(-1e-5))) / 2e-5
    np.testing.assert_allclose(value, loss(rec.Sequential(), *network), rtol=1e-10)
    np.testing.assert_allclose(slope, difference, rtol=1e-6)
    inner = jax.tree.map(jnp.vdot, gradient(rec.deer(), *network), direction)
    np.testing.assert_allclose(slope, sum(jax.tree.leaves(inner)), rtol=1e-10)


def test_second_derivatives(network):
    params, x0, inputs = network
    product = lambda solver: jax.jvp(jax.grad(lambda x: loss(solver, params, x, inputs)), (x0,), (jnp.ones(HIDDEN),))[1]
    close(jax.jit(lambda: product(rec.deer()))(), jax.jit(lambda: product(rec.Sequential()))(), 1e-8)


def test_under_vmap_with_integer_inputs():
    """A batch of parameters; inputs with integers and keys, which have no derivative."""
    steps, keys = jnp.arange(11), jax.random.split(jax.random.key(1), 11)

    def final(solver, rate):
        fn = lambda x, u: rate * jnp.sin(x) + 0.1 * u[0] + jax.random.normal(u[1])
        return solver.solve(fn, 0.5, (steps, keys)).value[-1]

    rates = jnp.array([0.2, 0.5, 0.8])
    slopes = jax.jit(jax.vmap(jax.grad(lambda r: final(rec.deer(), r))))(rates)
    close(slopes, jax.jit(jax.vmap(jax.grad(lambda r: final(rec.Sequential(), r))))(rates))


def test_guess_tolerance_and_damping_have_no_derivative():
    fn = lambda x, u: 0.5 * jnp.cos(x)

    def total(guess, damping):
        return jnp.sum(rec.quasi_deer(damping=damping).solve(fn, 0.1, length=9, initial_guess=guess).value)

    slopes = jax.jit(jax.grad(total, argnums=(0, 1)))(jnp.zeros(9), 0.9)
    close(slopes, (jnp.zeros(9), 0.0))
