"""Coalescence times of coupled pairs: exact on maps whose times are known by hand."""

import jax
import jax.numpy as jnp
import numpy as np

from pmcmc import HMC
from pmcmc.recurrence import Recurrence
from pmcmc.recurrence._base import default_tolerance
from pmcmc.stability import coalescence_steps
from tests._chains import draw_noise
from tests._targets import funnel, make_target, mixture

TOLERANCE = default_tolerance(float)
halve = Recurrence(lambda x, u: (0.5 * x + u, None))


def test_linear_map() -> None:
    """The distance halves every step: merged at the first t with d 2^-t <= tol, whatever the inputs."""
    distances = jnp.array([1.0, 8.0, 2.0**-40, 1e6])
    inputs = jax.random.normal(jax.random.key(0), (100, 4))
    first = jnp.array([0.0, 0.25, -0.5, 0.0])
    found = coalescence_steps(halve, first, first + distances, jnp.zeros_like(inputs), jnp.ones(()))
    np.testing.assert_array_equal(found.steps, np.ceil(np.log2(distances / TOLERANCE)).astype(int))
    assert jnp.all(found.distance <= TOLERANCE)
    coupled = coalescence_steps(halve, first, first + distances, inputs, jnp.ones(()))
    assert jnp.all(jnp.abs(coupled.steps - found.steps) <= 3)  # but for rounding


def test_scale_is_the_unit() -> None:
    ones = jnp.ones(1)
    unit, large = (
        coalescence_steps(halve, 0 * ones, ones, jnp.zeros((100, 1)), jnp.asarray(s)) for s in (1.0, 2.0**10)
    )
    assert unit.steps[0] - large.steps[0] == 10


def test_pairs_that_do_not_merge() -> None:
    """max_steps + 1 for them, the right number for the others."""
    keep = Recurrence(lambda x, u: (jnp.where(u > 0, 0.5 * x, x), None))
    inputs = jnp.stack([jnp.zeros(80), jnp.ones(80)], axis=1)
    found = coalescence_steps(keep, jnp.zeros(2), jnp.ones(2), inputs, jnp.ones(()))
    assert found.steps.tolist() == [81, int(np.ceil(-np.log2(TOLERANCE)))]
    assert found.distance[0] == 1.0


def test_pairs_that_are_not_finite_do_not_merge() -> None:
    found = coalescence_steps(
        halve, jnp.array([jnp.nan, 0.0]), jnp.array([jnp.nan, 1.0]), jnp.zeros((90, 2)), jnp.ones(())
    )
    assert found.steps[0] == 91
    assert found.steps[1] < 90


def test_discrete_leaves_must_be_equal() -> None:
    """A walk on {0, ..., 4} with walls merges when both have been at one wall; its real leaf is at distance zero."""
    walk = Recurrence(lambda x, u: ({"n": jnp.clip(x["n"] + u, 0, 4), "r": 0 * x["r"]}, None))
    first, second = ({"n": jnp.array([n]), "r": jnp.zeros(1)} for n in (0, 3))
    inputs = jnp.array([1, -1, 1, 1, 1, 1, 1, -1, 1])[:, None]
    scale = {"n": jnp.ones(()), "r": jnp.ones(())}
    found = coalescence_steps(walk, first, second, inputs, scale)
    # 0 3 | 1 4 | 0 3 | 1 4 | 2 4 | 3 4 | 4 4
    assert found.steps.tolist() == [6]


def test_kernels() -> None:
    """HMC merges on the mixture within some tens of steps, and not on the funnel: twice the same, jitted or not."""
    kernel = HMC(step_size=0.8, num_integration_steps=2)
    for logdensity_fn, merges in ((mixture, True), (funnel, False)):
        target = make_target(logdensity_fn)
        noise = jax.tree.map(lambda u: jnp.repeat(u[:, None], 4, axis=1), draw_noise(target, kernel, 0, 500))
        first, second = (2 * jax.random.normal(jax.random.key(s), (4, target.dim)) for s in (1, 2))
        find = jax.jit(lambda a, b, u: coalescence_steps(kernel.transition(target), a, b, u, jnp.ones(target.dim)))  # noqa: B023
        found = find(first, second, noise)
        assert jnp.all((found.steps <= 300) if merges else (found.steps == 501))
        np.testing.assert_array_equal(found.steps, find(second, first, noise).steps)
