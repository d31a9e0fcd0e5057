"""Chains and their certificates for the tests, each compiled once per shape."""

from functools import partial

import jax
import jax.numpy as jnp

from pmcmc._pytree import relative_distance


@jax.jit
def solve(target, kernel, solver, x0, noise, guess=None, scale=None):
    """Solve one chain by any solver."""
    return solver.solve(kernel.transition(target), x0, noise, initial_guess=guess, scale=scale)


@jax.jit
def solve_batch(target, kernel, solver, x0, noise, guess=None, scale=None):
    """Solve several chains as lanes."""
    return solver.solve_batch(kernel.transition(target), x0, noise, initial_guess=guess, scale=scale)


@partial(jax.jit, static_argnames=("fn", "length"))
def solve_fn(solver, fn, x0, inputs=None, guess=None, scale=None, length=None):
    """Solve any recurrence. Compiled as a whole: run eagerly, a solve is several hundred small programs."""
    return solver.solve(fn, x0, inputs, length=length, initial_guess=guess, scale=scale)


def draw_noise(target, kernel, seed: int, num_steps: int):
    """Draw the noise of ``num_steps`` steps, leading axis num_steps."""
    return _draw(target, kernel, jax.random.split(jax.random.key(seed), num_steps))


@jax.jit
def _draw(target, kernel, keys):
    return jax.vmap(lambda key: kernel.sample_noise(key, target))(keys)


@jax.jit
def step_residuals(target, kernel, x0, path, noise, scale):
    """Return |x[t] - f(x[t-1], u[t])| / scale for every step, each evaluated separately."""
    before = jnp.concatenate([x0[None], path[:-1]])
    images, _ = jax.vmap(kernel.transition(target))(before, noise)
    return relative_distance(path, images, scale)
