"""Pilots with planted merges, and planted costs."""

import jax
import jax.numpy as jnp
import numpy as np

from pmcmc.planning import Costs
from pmcmc.stability import coalescence_time

GPU = Costs(sequential=1e-4, overhead=1e-4, lane=1e-8, compile=1.0)
CPU = Costs(sequential=1e-6, overhead=1e-6, lane=2.5e-7, compile=1.0)


def merging(steps, max_steps: int = 1000):
    """Make a pilot whose pairs merge after these steps and halve their distance at each step."""
    steps = np.asarray(steps)
    start = jnp.asarray(0.99 * 2.0 ** (steps - 10))
    inputs = jax.random.normal(jax.random.key(0), (max_steps, steps.size))
    halve = lambda x, u: 0.5 * x + u
    return coalescence_time(halve, jnp.zeros(steps.size), start, inputs, scale=1.0, tol=2.0**-10)
