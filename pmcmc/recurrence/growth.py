"""Does the recurrence contract along a path? Growth of small distances, and what it means for a residual."""

import math

import jax
import jax.numpy as jnp

from pmcmc._typing import Array, PyTree
from pmcmc.recurrence.scan import running
from pmcmc.recurrence.sharding import Steps


def log_growth(distance: Array, before: Array, tol: Array | float) -> Array:
    """Return ``log(distance / before)`` with both clipped to tol / 1024 .. 1: one term of the mean growth rate.

    The floor keeps a merge that happens to be exact from counting as infinite contraction.

    Args:
        distance: Distance of two paths after a step.
        before: Distance before it.
        tol: Tolerance at which paths merge.
    """
    floor = tol * 2.0**-10
    return jnp.log(jnp.maximum(jnp.minimum(distance, 1.0), floor) / jnp.maximum(before, floor))


def separates(growth_rate: Array, residual: Array, tol: Array | float, length: Array | int) -> Array:
    """Whether nearby paths separate so fast that a solution with this residual may be a pseudo-orbit.

    An error of the size of the residual, made once, grows to ``residual exp(growth_rate T)`` along the path. Where the
    rate is not negative and that exceeds the tolerance, the solution is not the sequential path to that tolerance. A
    rate of NaN, no small distance ever seen, compares False.
    """
    return (growth_rate >= 0) & (residual * jnp.exp(growth_rate * length) > tol)


def tangent_growth(
    fn, previous: Array, inputs: PyTree, unit: Array, wanted: Array, steps: Steps, num_steps: int = 64
) -> Array:
    """``log |J v| / |v|`` of each step along a path, ``(own steps,)``; 0 where not ``wanted`` or not defined.

    Blocks of ``num_steps`` steps run as lanes, each from the same direction (one unit in every coordinate). So an entry
    depends on the states before it alone, and a prefix of the path has the growth that it would have by itself.

    previous: states x[t-1], shape ``(own steps, D)``. inputs: leading axis of the same. unit: of the norm, ``(D,)``.
    """
    length, dim = previous.shape
    num_steps = min(num_steps, length)
    lanes = -(-length // num_steps)
    unit = jnp.where((unit > 0) & jnp.isfinite(unit), unit, 1)
    largest = math.log(jnp.finfo(previous.dtype).max)

    def cut(x):
        x = jnp.concatenate([x, jnp.repeat(x[-1:], lanes * num_steps - length, axis=0)])
        return jnp.moveaxis(x.reshape(lanes, num_steps, *x.shape[1:]), 1, 0)

    def push(x, u, v):
        return jax.jvp(lambda x: fn(x, u), (x,), (v * unit,))[1] / unit

    ones = jnp.full((lanes, dim), dim**-0.5, previous.dtype)

    def body(v, xu):
        x, u = xu
        v = jax.vmap(push)(x, u, v)
        # without overflow: the square of a wild derivative is infinite
        size = jnp.max(jnp.abs(v), axis=1)
        v = v / jnp.where((size > 0) & jnp.isfinite(size), size, 1)[:, None]
        norm = jnp.sqrt(jnp.sum(v * v, axis=1))
        log = jnp.clip(jnp.log(size) + jnp.log(norm), -largest, largest)
        defined = jnp.isfinite(norm) & (norm > 0)
        v = jnp.where(defined[:, None], v / jnp.where(defined, norm, 1)[:, None], ones)
        return v, jnp.where(jnp.isnan(log), 0, log)

    def measure():
        _, logs = jax.lax.scan(body, ones, (cut(previous), jax.tree.map(cut, inputs)))
        return logs.T.reshape(-1)[:length].astype(previous.dtype)

    return jax.lax.cond(wanted, measure, lambda: jnp.zeros(length, previous.dtype))


def mean_growth(growth: Array, steps: Steps, num_steps: int = 64) -> Array:
    """Mean of `tangent_growth` over its whole blocks: the largest Lyapunov exponent, from below its transient."""
    num_steps = min(num_steps, growth.shape[0])
    lanes = growth.shape[0] // num_steps
    whole = steps.numbers()[num_steps - 1 :: num_steps][:lanes] < steps.length  # blocks without padding
    total = jnp.where(whole[:, None], growth[: lanes * num_steps].reshape(lanes, num_steps), 0)
    return steps.total(jnp.sum(total)) / (num_steps * steps.total(jnp.sum(whole)))


def amplified(residual: Array, growth: Array, steps: Steps) -> Array:
    """Errors of a path whose steps have these residuals: ``e[t] = exp(growth[t]) e[t-1] + residual[t]``, e[0] = 0."""

    def join(first, second):
        (a1, b1), (a2, b2) = first, second
        return a1 + a2, jnp.logaddexp(b1 + a2, b2)

    return jnp.exp(running(steps, join, (growth, jnp.log(residual)), (0.0, -jnp.inf))[1])
