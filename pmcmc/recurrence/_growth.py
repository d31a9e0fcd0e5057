"""Does the recurrence contract along a path? Growth of small distances, and what it means for a residual."""

import jax
import jax.numpy as jnp

from pmcmc._types import Array, PyTree
from pmcmc.recurrence._steps import Steps


def separates(growth_rate: Array, residual: Array, tol: Array | float, length: Array | int) -> Array:
    """Whether nearby paths separate so fast that a solution with this residual may be a pseudo-orbit.

    An error of the size of the residual, made once, grows to ``residual exp(growth_rate T)`` along the path. Where the
    rate is not negative and that exceeds the tolerance, the solution is not the sequential path to that tolerance. A
    rate of NaN, no small distance ever seen, compares False.
    """
    return (growth_rate >= 0) & (residual * jnp.exp(growth_rate * length) > tol)


def tangent_growth(fn, previous: Array, inputs: PyTree, wanted: Array, steps: Steps, num_steps: int = 64) -> Array:
    """Mean of ``log |J v| / |v|`` per step along a known path; NaN where not ``wanted``.

    The path is known, so blocks of about ``num_steps`` steps run as lanes, each from the same kind of start
    direction (all ones): the mean over blocks estimates the largest Lyapunov exponent from below its transient.

    previous: states x[t-1], shape ``(T, D)``. inputs: leading axis T. Each device cuts the steps that it holds.
    """
    length = previous.shape[0]
    num_steps = min(num_steps, length)
    lanes = length // num_steps
    cut = lambda x: jnp.moveaxis(x[: lanes * num_steps].reshape(lanes, num_steps, *x.shape[1:]), 1, 0)

    def push(x, u, v):
        return jax.jvp(lambda x: fn(x, u), (x,), (v,))[1]

    def body(carry, xu):
        v, total = carry
        x, u = xu
        v = jax.vmap(push)(x, u, v)
        norm = jnp.sqrt(jnp.sum(v * v, axis=1))
        safe = jnp.maximum(norm, jnp.finfo(v.dtype).tiny)
        return (v / safe[:, None], total + jnp.log(safe)), None

    def measure():
        v = jnp.ones((lanes, previous.shape[1]), previous.dtype) / jnp.sqrt(previous.shape[1])
        total = jnp.zeros(lanes, previous.dtype)
        xs = (cut(previous), jax.tree.map(cut, inputs))
        (_, total), _ = jax.lax.scan(body, (v, total), xs)
        return jnp.sum(jnp.where(whole, total, 0))

    whole = steps.numbers()[num_steps - 1 :: num_steps] < steps.length  # blocks without padding
    total = steps.total(jax.lax.cond(wanted, measure, lambda: jnp.zeros((), previous.dtype)))
    rate = total / (num_steps * steps.total(jnp.sum(whole)))
    return jnp.where(wanted, rate, jnp.nan).astype(previous.dtype)
