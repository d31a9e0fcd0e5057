"""Measure contraction along a single path from its Jacobians J[t].

`lyapunov_exponent` carries orthonormal tangents along the path (Benettin et al., 1980) and returns their mean log
growth per step. `contraction_bound` returns the mean log norm of products of Jacobians, an upper bound on the largest
exponent.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from pmcmc._pytree import Array, PyTree, RavelSpec, all_finite, at_least_single, is_real
from pmcmc.recurrence import Recurrence
from pmcmc.recurrence.problem import make_problem


class LyapunovExponent(NamedTuple):
    """Exponents in nats per step, the largest first.

    Attributes:
        exponents: Mean log growth of the i-th orthonormal direction; shape (k,). -inf: a direction was annihilated.
            NaN: the path or its derivative is not finite.
        standard_error: Standard error by batch means; shape (k,). 0 where the exponent is -inf.
        finite_time: Means over successive batches of the path; shape (num_batches, k). Their spread shows whether
            contraction is even along the path.
        num_steps: Steps that were averaged, after the transient.
    """

    exponents: Array
    standard_error: Array
    finite_time: Array
    num_steps: Array


def lyapunov_exponent(
    fn: Callable | Recurrence,
    x0: PyTree,
    inputs: PyTree = None,
    *,
    length: int | None = None,
    num_exponents: int = 1,
    transient: int | None = None,
    num_batches: int = 32,
    has_aux: bool = False,
) -> LyapunovExponent:
    """Compute the largest Lyapunov exponents of ``x[t] = fn(x[t-1], inputs[t])`` along its path from x0.

    Orthonormal tangents Q are carried along the path and made orthonormal again at every step:

        J[t] Q[t-1] = Q[t] R[t],        exponent i = mean over t of log |R[t, i, i]|

    The sum of all D exponents is the mean of ``log |det J[t]|``. A step costs k JVPs and a QR factorisation; steps are
    taken sequentially.

    A Metropolis step jumps where a decision flips; tangents see only the branch taken (or the kernel's surrogate
    derivative). A negative exponent therefore does not prove that coupled paths merge: see `coalescence_time`, whose
    growth_rate is the same quantity from finite distances.

    Tangents start from a fixed generic frame: no key is needed, and the result is deterministic. A direction lost to
    rounding (a singular Jacobian whose zeros are not exact) shows as an exponent near log eps instead of -inf.

    Args:
        fn: The recurrence, as in `pmcmc.recurrence.solve`.
        x0: The initial state, as in `pmcmc.recurrence.solve`; its leaves must be real.
        inputs: Inputs with leading axis T, as in `pmcmc.recurrence.solve`.
        length: T, as in `pmcmc.recurrence.solve`.
        num_exponents: k, at most the dimension D.
        transient: Steps before the average starts, in which path and tangents settle. None takes a tenth of the path.
        num_batches: Batches of the standard error (batch means: Schmeiser, 1982). Each should be much longer than the
            correlation of the growth; few long ones are safer than many. The error has num_batches - 1 degrees of
            freedom.
        has_aux: Whether ``fn`` returns auxiliary output, as in `pmcmc.recurrence.solve`.

    Returns:
        The exponents with their standard errors.

    Raises:
        TypeError: The state has integer or boolean leaves.
        ValueError: Too few steps; num_exponents not in 1..D; x0 not finite; shapes that do not fit.

    Source: Benettin, Galgani, Giorgilli & Strelcyn (1980); Shimada & Nagashima (1979).

    Example:
        >>> import jax.numpy as jnp, pmcmc
        >>> found = pmcmc.stability.lyapunov_exponent(lambda x, u: 0.5 * x + u, 0.0, jnp.ones(1000))
        >>> round(float(found.exponents[0]), 4)  # log 0.5
        -0.6931
    """
    path = tangent_path(fn, x0, inputs, length, has_aux, transient)
    dim, usable = path.x0.size, path.length - path.transient
    if not 1 <= num_exponents <= dim:
        raise ValueError(f"num_exponents must be between 1 and the dimension {dim} of the state, got {num_exponents}.")
    if num_batches < 2 or usable < 2 * num_batches:
        raise ValueError(
            f"the path is too short: expected at least 2 batches of 2 steps, got {usable} steps after a transient of "
            f"{path.transient} for num_batches={num_batches}. Pass more steps, or lower transient or num_batches."
        )
    # A generic frame, so that no direction of growth is orthogonal to it.
    frame = np.linalg.qr(np.random.default_rng(0).standard_normal((dim, num_exponents)))[0]

    def body(state, u):
        x, q = state
        x, pushforward = jax.linearize(lambda x: path.image(x, u), x)
        q, growth = orthonormalize(jax.vmap(pushforward, in_axes=1, out_axes=1)(q))
        return (x, q), growth

    start = (path.x0, jnp.asarray(frame, path.x0.dtype))
    (last, _), growth = jax.lax.scan(body, start, path.inputs, length=path.length)
    # Batch means over the end of the path; the steps before count as transient.
    batch = usable // num_batches
    batches = growth[path.length - num_batches * batch :].reshape(num_batches, batch, num_exponents)
    finite_time = jnp.mean(batches, axis=1)
    finite_time = jnp.where(jnp.all(jnp.isfinite(last)), finite_time, jnp.nan)
    exponents, standard_error = mean_and_error(finite_time)
    return LyapunovExponent(exponents, standard_error, finite_time, jnp.asarray(num_batches * batch))


class TangentPath(NamedTuple):
    """A checked recurrence on vectors.

    Attributes:
        image: ``(x, u) -> x`` on vectors of shape (D,).
        x0: Initial state; shape (D,).
        inputs: Inputs with leading axis T.
        length: T.
        transient: Steps before the average starts.
    """

    image: Callable
    x0: Array
    inputs: PyTree
    length: int
    transient: int


def tangent_path(fn, x0, inputs, length, has_aux, transient) -> TangentPath:
    """Check the arguments of a function that differentiates along a path."""
    for where, leaf in jax.tree_util.tree_leaves_with_path(x0):
        if not is_real(leaf):
            raise TypeError(
                f"x0{jax.tree_util.keystr(where)} has dtype {jnp.result_type(leaf)}: tangents need real states. "
                "Use coalescence_time instead, which measures how coupled paths merge."
            )
    add = lambda tree: jax.tree.map(lambda x: jnp.asarray(x)[None], tree)
    problem = make_problem(fn, add(x0), add(inputs), length, None, has_aux, None)
    state: Any = jax.tree.map(lambda x: x[0], problem.x0)
    finite = all_finite(state)
    if not isinstance(finite, jax.core.Tracer) and not bool(finite):
        raise ValueError("x0 is NaN or infinite in some entry: expected a finite state to start the path from.")
    transient = problem.length // 10 if transient is None else transient
    if not 0 <= transient < problem.length:
        raise ValueError(f"transient must be between 0 and length - 1 = {problem.length - 1}, got {transient}.")
    spec, recurrence = RavelSpec.of(state), problem.recurrence
    image = lambda x, u: spec.ravel(recurrence(spec.unravel(x), u)[0])
    inputs = jax.tree.map(lambda x: x[0], problem.inputs)
    return TangentPath(image, spec.ravel(state), inputs, problem.length, transient)


def orthonormalize(tangents: Array) -> tuple[Array, Array]:
    """Return Q (D, k) and ``log |diag R|`` (k,) of the QR factorisation; one column needs no factorisation."""
    if tangents.shape[1] > 1:
        q, r = (x.astype(tangents.dtype) for x in jnp.linalg.qr(at_least_single(tangents)))
        return q, jnp.log(jnp.abs(jnp.diagonal(r)))
    largest = jnp.max(jnp.abs(tangents))  # divide by it before squaring: squares of small tangents underflow
    safe = jnp.where(largest == 0, 1, largest)
    norm = safe * jnp.sqrt(jnp.sum((tangents / safe) ** 2))
    return tangents / jnp.where(norm == 0, 1, norm), jnp.log(norm)[None]


def mean_and_error(batch_means: Array) -> tuple[Array, Array]:
    """Return the mean and the standard error over the leading axis; the error is 0 where the mean is -inf."""
    mean = jnp.mean(batch_means, axis=0)
    settled = jnp.where(mean == -jnp.inf, 0.0, batch_means)
    return mean, jnp.std(settled, axis=0, ddof=1) / jnp.sqrt(batch_means.shape[0]).astype(mean.dtype)


class ContractionBound(NamedTuple):
    """Result of `contraction_bound`.

    Attributes:
        bound: The bound, in nats per step.
        standard_error: Standard error over windows, treated as independent.
        by_window: Log norm per step of each window, whose mean is the bound; shape (num_windows,).
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
    """Bound the largest Lyapunov exponent by the mean over windows of ``log |J[t+m] ... J[t+1]|_2 / m``.

    The spectral norm is submultiplicative, so the bound holds exactly for the same steps of the same path, decreases
    when windows are merged (m, 2m, 4m, ...), and tends to the exponent. With m = 1 it is the mean log of the largest
    singular value of one step: negative means that every pair of nearby paths approaches at once, on average. The gap
    to the exponent measures how much paths separate before they contract.

    A step costs D JVPs and a product of D x D matrices, a window one singular value decomposition.

    Args:
        fn: The recurrence, as in `lyapunov_exponent`.
        x0: The initial state, as in `lyapunov_exponent`.
        inputs: Inputs with leading axis T, as in `lyapunov_exponent`.
        length: T, as in `lyapunov_exponent`.
        window: m, the number of steps in a window.
        transient: Steps before the first window. None takes a tenth of the path.
        has_aux: Whether ``fn`` returns auxiliary output.

    Returns:
        The bound with its standard error.

    Raises:
        TypeError: The state has integer or boolean leaves.
        ValueError: Fewer than two windows; x0 not finite; shapes that do not fit.

    Source: Kingman (1973): subadditivity of log norms.

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
            "steps after the transient. Pass more steps or a shorter window."
        )
    identity = jnp.eye(path.x0.size, dtype=path.x0.dtype)

    def push(state, u):
        x, product, log_size = state
        x, pushforward = jax.linearize(lambda x: path.image(x, u), x)
        product = jax.vmap(pushforward, in_axes=1, out_axes=1)(product)
        # Keep the product at size 1 and its log apart: long products overflow or underflow.
        size = jnp.max(jnp.abs(product))
        return (x, product / jnp.where(size == 0, 1, size), log_size + jnp.log(size)), None

    def one_window(x, inputs):
        begin = (x, identity, jnp.zeros((), x.dtype))
        (x, product, log_size), _ = jax.lax.scan(push, begin, inputs, length=window)
        return x, (log_size + jnp.log(jnp.linalg.norm(at_least_single(product), 2).astype(x.dtype))) / window

    # Settle first, then take whole windows up to the end of the path.
    first = path.length - num_windows * window
    settle = lambda x, u: (path.image(x, u), None)
    x, _ = jax.lax.scan(settle, path.x0, jax.tree.map(lambda u: u[:first], path.inputs), length=first)
    windows = jax.tree.map(lambda u: u[first:].reshape(num_windows, window, *u.shape[1:]), path.inputs)
    last, by_window = jax.lax.scan(one_window, x, windows, length=num_windows)
    by_window = jnp.where(jnp.all(jnp.isfinite(last)), by_window, jnp.nan)
    return ContractionBound(*mean_and_error(by_window), by_window)
