"""An upper bound of the largest Lyapunov exponent, from norms of Jacobians."""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

from pmcmc._types import Array, PyTree
from pmcmc.recurrence import Recurrence
from pmcmc.stability._lyapunov import mean_and_error, tangent_path


class ContractionBound(NamedTuple):
    """bound: nats per step. standard_error: over windows as if they were independent.

    by_window: (num_windows,) log norm per step of each window; its mean is the bound.
    """

    bound: Array
    standard_error: Array
    by_window: Array


def contraction_bound(
    fn: Callable | Recurrence,
    x0: PyTree,
    inputs: PyTree = None,
    *,
    length: int | None = None,
    window: int = 1,
    transient: int | None = None,
    has_aux: bool = False,
) -> ContractionBound:
    """Mean over windows of ``log |J[t+m] ... J[t+1]|_2 / m``: at least the largest Lyapunov exponent.

    The spectral norm is submultiplicative, so the bound holds exactly for the same steps of the same path, decreases
    when windows are joined (m, 2m, 4m, ...), and tends to the exponent. With m = 1 it is the mean log of the largest
    singular value of one step: negative means that every pair of nearby paths approaches at once, on average. The gap
    to the exponent says how much paths separate before they contract.

    Costs D JVPs and a product of D x D matrices a step, and a singular value decomposition a window.

    fn, x0, inputs, length, transient, has_aux: as in `lyapunov_exponent`. window: m, steps.

    Raises:
        TypeError: integer or boolean leaves in the state.
        ValueError: fewer than two windows; x0 not finite; shapes that do not fit.

    Source: subadditivity of log norms (Kingman 1973).

    Example:
        >>> import jax.numpy as jnp, pmcmc
        >>> shear = jnp.array([[0.5, 4.0], [0.0, 0.5]])  # contracts in the end, not at once
        >>> fn = lambda x, u: shear @ x
        >>> bounds = [pmcmc.stability.contraction_bound(fn, jnp.ones(2), length=64, window=m).bound for m in (1, 16)]
        >>> [round(float(bound), 1) for bound in bounds]
        [1.4, -0.4]
    """
    path = tangent_path(fn, x0, inputs, length, has_aux, transient)
    num_windows = (path.length - path.transient) // window if window >= 1 else 0
    if num_windows < 2:
        raise ValueError(
            f"expected window >= 1 and at least 2 windows, got window={window} and {path.length - path.transient} "
            "steps behind the transient. Pass more steps or a shorter window."
        )
    identity = jnp.eye(path.x0.size, dtype=path.x0.dtype)

    def push(state, u):
        x, product, log_size = state
        x, pushforward = jax.linearize(lambda x: path.image(x, u), x)
        product = jax.vmap(pushforward, in_axes=1, out_axes=1)(product)
        size = jnp.max(jnp.abs(product))
        return (x, product / jnp.where(size == 0, 1, size), log_size + jnp.log(size)), None

    def one_window(x, inputs):
        begin = (x, identity, jnp.zeros((), x.dtype))
        (x, product, log_size), _ = jax.lax.scan(push, begin, inputs, length=window)
        return x, (log_size + jnp.log(jnp.linalg.norm(product, 2))) / window

    first = path.length - num_windows * window
    settle = lambda x, u: (path.image(x, u), None)
    x, _ = jax.lax.scan(settle, path.x0, jax.tree.map(lambda u: u[:first], path.inputs), length=first)
    windows = jax.tree.map(lambda u: u[first:].reshape(num_windows, window, *u.shape[1:]), path.inputs)
    last, by_window = jax.lax.scan(one_window, x, windows, length=num_windows)
    by_window = jnp.where(jnp.all(jnp.isfinite(last)), by_window, jnp.nan)
    return ContractionBound(*mean_and_error(by_window), by_window)
