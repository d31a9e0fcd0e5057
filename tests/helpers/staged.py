"""A recurrence whose steps take varying numbers of stages; it is not a Markov chain.

Each step iterates an affine map zero to six times, as input and state decide; the map expands at times.
"""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np

from pmcmc.recurrence.problem import Recurrence, Staged

X0 = jnp.array([3.0, -1.0])
TURN = np.array([[0.8, -0.6], [0.6, 0.8]])


def count(x, u):
    return jnp.where(x[0] > 0, jnp.minimum(u["count"] + 1, 6), u["count"])


def move(x, gain, push):
    """Move the state; x and push have shape (2,) or (2, lanes)."""
    return jnp.reshape(gain, (1, *gain.shape)) * jnp.tensordot(jnp.asarray(TURN), x, 1) + push


def step(x, u):
    total = count(x, u)
    new = jax.lax.fori_loop(0, total, lambda _, x: move(x, u["gain"], u["push"]), x)
    return new, {"count": total, "doubled": 2 * new}


def begin(x, u):
    x = x.T
    return {"x": x, "left": count(x, u), "total": count(x, u), "gain": u["gain"], "push": u["push"].T}


def advance(work):
    going = work["left"] > 0
    x = jnp.where(going[None], move(work["x"], work["gain"], work["push"]), work["x"])
    return {**work, "x": x, "left": work["left"] - going}


def conclude(work):
    x = work["x"].T
    return x, {"count": work["total"], "doubled": 2 * x}


APART = Recurrence(step, staged=Staged(begin, advance, lambda work: work["left"] == 0, conclude))
IN_STEP = replace(APART, staged=None)


def problem(seed: int, num_chains: int, length: int, largest_gain: float = 0.97):
    """Return inputs and a guess. With the default gains paths merge."""
    rng = np.random.default_rng(seed)
    inputs = {
        "count": rng.integers(0, 6, (num_chains, length)),
        "gain": rng.choice([0.8, 0.97, largest_gain], size=(num_chains, length)),
        "push": rng.normal(size=(num_chains, length, 2)),
    }
    return jax.tree.map(jnp.asarray, inputs), jnp.asarray(5 * rng.normal(size=(num_chains, length, 2)))
