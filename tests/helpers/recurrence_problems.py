"""Recurrences that the tests of several solvers use."""

from typing import NamedTuple

import jax
import jax.numpy as jnp


def coupled(key, length, dim=4, gain=0.6, dtype=jnp.float64):
    """A contracting, non-diagonal, smooth recurrence ``x[t] = tanh(W x[t-1] + u[t])``; returns fn, x0, inputs."""
    keys = jax.random.split(key, 3)
    w = (gain / jnp.sqrt(dim) * jax.random.normal(keys[0], (dim, dim))).astype(dtype)
    inputs = jax.random.normal(keys[1], (length, dim)).astype(dtype)
    x0 = jax.random.normal(keys[2], (dim,)).astype(dtype)
    return lambda x, u: jnp.tanh(w @ x + u), x0, inputs


class Variant(NamedTuple):
    """Numbers that make many problems of `coupled` in one program, which is compiled once for each solver.

    Attributes:
        weights: As drawn.
        x0: As drawn.
        inputs: As drawn.
        shift: Shift of an affine change of the state.
        size: Scale of an affine change of the state.
        limit: Inputs beyond it give NaN.
    """

    weights: jax.Array
    x0: jax.Array
    inputs: jax.Array
    shift: float = 0.0
    size: float = 1.0
    limit: float = jnp.inf

    @classmethod
    def draw(cls, key, length, dim=4, gain=0.6, **options):
        _, x0, inputs = coupled(key, length, dim, gain)
        weights = gain / jnp.sqrt(dim) * jax.random.normal(jax.random.split(key, 3)[0], (dim, dim))
        return cls(weights, x0, inputs, **options)

    def fn(self, x, u):
        new = self.shift + self.size * jnp.tanh(self.weights @ ((x - self.shift) / self.size) + u)
        return jnp.where(u[0] > self.limit, jnp.nan, new)

    @property
    def start(self):
        return self.shift + self.size * self.x0


@jax.jit
def solve_variant(solver, variant, guess=None):
    """Solve a `Variant` with ``solver``, from x0 everywhere unless a guess is given."""
    guess = jnp.broadcast_to(variant.start, variant.inputs.shape) if guess is None else guess
    return solver.solve(variant.fn, variant.start, variant.inputs, initial_guess=guess)


def gru(key, hidden, features, scale=1.0):
    """Draw the parameters of a gated recurrent unit (Cho et al. 2014)."""
    keys = jax.random.split(key, 2)
    return {
        "w": scale * jax.random.normal(keys[0], (3, hidden, hidden)) / jnp.sqrt(hidden),
        "u": jax.random.normal(keys[1], (3, hidden, features)) / jnp.sqrt(features),
        "b": jnp.zeros((3, hidden)),
    }


def gru_step(params, h, x):
    """One step of the unit: reset and update gates, candidate, blend."""
    into = jnp.einsum("gij,j->gi", params["u"], x) + params["b"]
    reset = jax.nn.sigmoid(params["w"][0] @ h + into[0])
    update = jax.nn.sigmoid(params["w"][1] @ h + into[1])
    candidate = jnp.tanh(params["w"][2] @ (reset * h) + into[2])
    return update * h + (1 - update) * candidate


def henon(x, u):
    """The Henon map (1.4, 0.3), Lyapunov exponent 0.419."""
    return jnp.array([1 - 1.4 * x[0] ** 2 + x[1], 0.3 * x[0]])


def lorenz(x, u, dt=0.01):
    """One Runge-Kutta step of the Lorenz flow (10, 28, 8/3), Lyapunov exponent 0.906 per unit of time."""

    def rate(x):
        return jnp.array([10 * (x[1] - x[0]), x[0] * (28 - x[2]) - x[1], x[0] * x[1] - 8 / 3 * x[2]])

    k1 = rate(x)
    k2 = rate(x + dt / 2 * k1)
    k3 = rate(x + dt / 2 * k2)
    k4 = rate(x + dt * k3)
    return x + dt / 6 * (k1 + 2 * k2 + 2 * k3 + k4)


def transient(length, first, last, growth=2.5, decay=0.5):
    """``x[t] = c[t] x[t-1] + 0.1 sin(3 x[t-1]) + u[t]`` with |c| = growth on steps first..last and decay elsewhere.

    If the unstable stretch is short, the whole contracts, yet products of c over it overflow for large growth.
    """
    index = jnp.arange(length)
    c = jnp.where((index >= first) & (index < last), growth, decay)
    u = 0.1 * jnp.cos(index)
    return (
        lambda x, cu: jnp.tanh(cu[0] * x + 0.1 * jnp.sin(3 * x) + cu[1]),
        jnp.full((1,), 0.3),
        (c[:, None], u[:, None]),
    )
