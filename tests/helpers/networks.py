"""A GRU and a loss of all its states, for derivatives through a solve."""

import jax
import jax.numpy as jnp

from tests.helpers.recurrence_problems import gru, gru_step

LENGTH, HIDDEN, FEATURES = 19, 3, 2


def make_network(rng_key):
    keys = jax.random.split(rng_key, 3)
    params = gru(keys[0], HIDDEN, FEATURES)
    return params, jax.random.normal(keys[1], (HIDDEN,)), jax.random.normal(keys[2], (LENGTH, FEATURES))


@jax.jit
def loss(solver, params, x0, inputs):
    """A loss that depends on every state, on aux, on closed-over parameters, inputs and x0."""

    def step(h, x):
        new = gru_step(params, h, x)
        return new, {"energy": jnp.sum(params["b"][0] * new) + h[0] ** 2, "sign": h > 0}

    found = solver.solve(step, x0, inputs, has_aux=True)
    weights = jnp.sin(jnp.arange(float(LENGTH)))
    return jnp.sum(weights[:, None] * found.value**2) + jnp.sum(jnp.cos(found.aux["energy"])) + found.residual


gradient = jax.jit(jax.grad(loss, argnums=(1, 2, 3)))
