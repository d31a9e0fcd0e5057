"""Every solver with every Jacobian returns the sequential path, inside any JAX transformation."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pmcmc import recurrence as rec
from pmcmc.recurrence import RESULTS, Newton
from tests.helpers.recurrence_problems import coupled
from tests.helpers.selection import share

PROBES = jax.random.key(7)
SOLVERS = {
    "sequential": rec.Sequential(),
    "shooting": rec.MultipleShooting(num_blocks=4),
    "deer": rec.deer(),
    "deer-basis-damped-clipped": rec.deer(basis=rec.ScaledBasis(2.0), damping=0.9, clip=0.5),
    "quasi-deer": rec.quasi_deer(),
    "stochastic": Newton(rec.HutchinsonDiagonal(PROBES, num_probes=2, fixed_probes=True)),
    "block": Newton(rec.BlockDiagonal()),
    "stochastic-block": Newton(rec.HutchinsonBlockDiagonal(PROBES)),
    "picard": rec.picard(),
    "jacobi": rec.jacobi(),
    "elk": rec.elk(step_rule=rec.trust_region.Filter()),
    "quasi-elk": rec.quasi_elk(),
    "windowed": rec.Windowed(rec.deer(), window=4),
}
SEQUENTIAL = rec.Sequential()
every_solver = pytest.mark.parametrize("solver", SOLVERS.values(), ids=SOLVERS.keys())
# One of each kind of solver. Their other Jacobians run in the plain test, and in all tests of the slow leg.
every_kind = pytest.mark.parametrize("solver", share(SOLVERS, "sequential", "shooting", "deer", "quasi-elk"))


def solve(solver, fn, x0, inputs=None, **options):
    return jax.jit(lambda solver, x0, inputs: solver.solve(fn, x0, inputs, **options))(solver, x0, inputs)


def chain_of(tree, chain):
    return jax.tree.map(lambda x: x[chain], tree)


def check(solution, expected, tol):
    assert int(solution.result) == RESULTS.successful
    assert int(solution.stats.certified_steps) == jax.tree.leaves(expected)[0].shape[0]
    assert float(solution.residual) <= tol
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=tol, atol=tol), solution.value, expected)
    assert jax.tree.map(lambda x: x.dtype, solution.value) == jax.tree.map(lambda x: x.dtype, expected)


@every_solver
def test_equals_sequential(solver, rng_key):
    fn, x0, inputs = coupled(rng_key, 13)  # not a power of two
    check(solve(solver, fn, x0, inputs), solve(SEQUENTIAL, fn, x0, inputs).value, 1e-11)


@every_kind
def test_float32_under_vmap_with_guess_and_scale(solver, rng_key):
    fn, _, _ = coupled(rng_key, 6, dtype=jnp.float32)
    normal = lambda index, *shape: jax.random.normal(jax.random.fold_in(rng_key, index), shape, jnp.float32)
    x0, inputs, guess = normal(0, 2, 4), normal(1, 2, 6, 4), normal(2, 2, 6, 4)
    one = lambda solver, x, u, g: solver.solve(fn, x, u, initial_guess=g, scale=jnp.full(4, 0.5))
    found = jax.jit(jax.vmap(one, in_axes=(None, 0, 0, 0)))(solver, x0, inputs, guess)
    for chain in range(2):
        expected = solve(SEQUENTIAL, fn, x0[chain], inputs[chain]).value
        check(chain_of(found, chain), expected, 3e-5)


@every_kind
def test_batch_of_pytrees_with_aux(solver, rng_key):
    keys = jax.random.split(rng_key, 3)
    shape = (2, 7)
    inputs = {"push": jax.random.normal(keys[0], (*shape, 2)), "key": jax.random.split(keys[1], shape)}
    x0 = {"position": jax.random.normal(keys[2], (2, 2)), "momentum": (jnp.ones(2), jnp.zeros((2, 1)))}

    def fn(x, u):
        p, (a, b) = x["position"], x["momentum"]
        a = 0.3 * jnp.sin(a) + 0.2 * p[0] + 0.1 * jax.random.normal(u["key"])
        new = {"position": 0.5 * jnp.cos(p) + 0.1 * b + u["push"], "momentum": (a, 0.4 * b + 0.1 * p[1:])}
        return new, {"total": jnp.sum(p), "positive": a > 0}

    expected = SEQUENTIAL.solve_batch(fn, x0, inputs, has_aux=True)
    found = jax.jit(lambda solver: solver.solve_batch(fn, x0, inputs, has_aux=True))(solver)
    for chain in range(2):
        check(chain_of(found, chain), chain_of(expected, chain).value, 1e-11)
    np.testing.assert_allclose(found.aux["total"], expected.aux["total"], atol=1e-11)
    np.testing.assert_array_equal(found.aux["positive"], expected.aux["positive"])


@every_solver
def test_one_step_of_a_scalar_without_inputs(solver):
    fn, x0 = (lambda x, u: jnp.cos(x)), 0.5
    if isinstance(getattr(solver, "jacobian", None), rec.BlockDiagonal | rec.HutchinsonBlockDiagonal):
        x0 = jnp.array([0.5, 0.1])  # blocks need two halves
    found = jax.jit(lambda solver: solver.solve(fn, x0, length=1))(solver)
    check(found, solve(SEQUENTIAL, fn, x0, length=1).value, 1e-11)
