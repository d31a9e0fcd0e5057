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
    "shooting": rec.MultipleShooting(num_blocks=4),
}


@pytest.fixture
def network(rng_key):
    return make_network(rng_key)


def close(a, b, tol=1e-10):
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=tol, atol=tol), a, b)
    assert all(np.isfinite(x).all() for x in jax.tree.leaves(a))


@pytest.mark.parametrize("solver", share(SOLVERS, "deer", "shooting"))
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


def test_forward_mode_of_the_default_solver():
    """Tangents that ran along with the blocks were those of the guesses: 1.0 at step 17."""
    path = lambda solver: lambda shift: rec.solve(lambda x, u: jnp.tanh(0.9 * x + shift), 0.0, length=64, solver=solver)
    slopes = lambda solver: jax.jvp(lambda shift: path(solver)(shift).value, (0.0,), (1.0,))[1]
    default = slopes(None)
    close(default, slopes(rec.Sequential()))
    assert default[17] > 8


def test_second_derivatives(network):
    params, x0, inputs = network
    product = lambda solver: jax.jvp(jax.grad(lambda x: loss(solver, params, x, inputs)), (x0,), (jnp.ones(HIDDEN),))[1]
    exact = jax.jit(lambda: product(rec.Sequential()))()
    for solver in (SOLVERS["deer"], SOLVERS["shooting"]):
        close(jax.jit(lambda solver=solver: product(solver))(), exact, 1e-8)


@pytest.mark.parametrize("solver", [SOLVERS["deer"], SOLVERS["shooting"]], ids=["deer", "shooting"])
def test_under_vmap_with_integer_inputs(solver):
    """A batch of parameters; inputs with integers and keys, which have no derivative."""
    steps, keys = jnp.arange(11), jax.random.split(jax.random.key(1), 11)

    def final(solver, rate):
        fn = lambda x, u: rate * jnp.sin(x) + 0.1 * u[0] + jax.random.normal(u[1])
        return solver.solve(fn, 0.5, (steps, keys)).value[-1]

    rates = jnp.array([0.2, 0.5, 0.8])
    slopes = jax.jit(jax.vmap(jax.grad(lambda r: final(solver, r))))(rates)
    close(slopes, jax.jit(jax.vmap(jax.grad(lambda r: final(rec.Sequential(), r))))(rates))


def test_guess_tolerance_and_damping_have_no_derivative():
    fn = lambda x, u: 0.5 * jnp.cos(x)

    def total(guess, damping):
        return jnp.sum(rec.quasi_deer(damping=damping).solve(fn, 0.1, length=9, initial_guess=guess).value)

    slopes = jax.jit(jax.grad(total, argnums=(0, 1)))(jnp.zeros(9), 0.9)
    close(slopes, (jnp.zeros(9), 0.0))


def test_a_batch_of_pytrees_in_blocks():
    """Leaves of two dtypes, chains with starts of their own, and a recurrence that carries a cache."""
    step = lambda carry, u: ((0.5 * jnp.tanh(carry[0]) + u, carry[1] * jnp.float32(0.9)), carry[2])
    carries = rec.Recurrence(
        lambda carry, u: ((*step(carry, u)[0], jnp.sum(step(carry, u)[0][0])), carry[2]),
        unknown=lambda carry: {"a": carry[0], "b": carry[1]},
        restore=lambda x: (x["a"], x["b"], jnp.sum(x["a"])),
    )
    x0 = {"a": jnp.ones((3, 2)), "b": jnp.arange(3, dtype=jnp.float32)}
    inputs = jax.random.normal(jax.random.key(0), (3, 40, 2))

    def loss(solver, x0, inputs):
        found = solver.solve_batch(carries, x0, inputs)
        return jnp.sum(found.value["a"] ** 2) + jnp.sum(found.value["b"]) + jnp.sum(jnp.sin(found.aux))

    slopes = lambda solver: jax.jit(jax.grad(lambda *a: loss(solver, *a), argnums=(0, 1)))(x0, inputs)
    close(slopes(rec.MultipleShooting(num_blocks=4)), slopes(rec.Sequential()), 1e-6)


def test_discrete_states_in_blocks_have_no_derivative():
    step = lambda x, u: {"n": x["n"] + 1, "y": 0.5 * x["y"] + u}
    solver = rec.MultipleShooting(num_blocks=4)
    final = lambda u: solver.solve(step, {"n": 0, "y": 0.0}, u).value["y"][-1]
    assert final(jnp.ones(30)) > 1.9
    for derivative in (jax.grad(final), lambda u: jax.jvp(final, (u,), (u,))):
        with pytest.raises(TypeError, match=r"got integer or boolean leaves. Use Sequential\(\)"):
            derivative(jnp.ones(30))


@jax.custom_vjp
def backward_only(x):
    return 0.5 * jnp.tanh(x)


backward_only.defvjp(lambda x: (backward_only(x), x), lambda x, g: (0.5 * g / jnp.cosh(x) ** 2,))


def test_a_step_without_forward_derivative():
    """Derivatives by `jax.custom_vjp`: JAX's error does not say what to do."""
    step = lambda x, u: backward_only(x) + u
    final = lambda u, solver: solver.solve(step, 0.0, u).value[-1]
    inputs, shooting = jnp.linspace(0, 1, 30), rec.MultipleShooting(num_blocks=4)
    np.testing.assert_allclose(final(inputs, shooting), final(inputs, rec.Sequential()), rtol=1e-12)
    for derivative in (jax.grad(final), jax.jit(jax.grad(final), static_argnums=1)):
        with pytest.raises(TypeError, match=r"the derivative of a solution takes.*Use Sequential\(\).*jax.custom_jvp"):
            derivative(inputs, shooting)
        assert np.isfinite(derivative(inputs, rec.Sequential())).all()
    for solver in (rec.deer(), rec.quasi_deer(), rec.jacobi(), rec.Windowed(rec.deer(), window=7)):
        with pytest.raises(TypeError, match=r"a Newton-type solver takes.*Use MultipleShooting\(\)"):
            final(inputs, solver)


def test_a_forward_derivative_that_is_not_needed():
    """A function with a backward rule alone, of something else than the state."""
    step = lambda x, u: 0.5 * x + jax.lax.stop_gradient(backward_only(jax.lax.stop_gradient(x))) + u
    inputs = jnp.linspace(0, 1, 30)
    found = rec.quasi_deer().solve(step, 0.0, inputs)
    np.testing.assert_allclose(found.value, rec.Sequential().solve(step, 0.0, inputs).value, rtol=1e-12)
