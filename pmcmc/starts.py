"""Positions where chains or warm-up start: whether a target's density and gradient can be used there."""

from functools import partial
from typing import Any

import jax
import numpy as np

from pmcmc._pytree import Array, PyTree, is_real
from pmcmc._xla.compile import tuned_jit
from pmcmc.target import Target


def check_starts(target: Target, starts: PyTree, uses_gradient: bool = True) -> None:
    """Raise if the density or its gradient is not finite at some start, and name the cause.

    Args:
        target: What is sampled. Without a density, starts need only be finite; gradients are those of real leaves.
        starts: Positions, leading axis N.
        uses_gradient: Whether the gradient is needed.

    Raises:
        ValueError: Some or all starts are not usable.
        TypeError: The density has no gradient, or cannot be mapped over positions.
    """
    try:
        values, gradients, usable = evaluate_starts(target, starts, uses_gradient)
    except (TypeError, ValueError, NotImplementedError) as error:
        obstacle = _obstacle(target, starts, uses_gradient)
        raise TypeError(f"the log density works at one position, but {obstacle} ({error})") from error
    if usable.all():
        return
    if not target.model.has_density:
        raise ValueError("the initial position is not finite: start from other values.")
    where = "any start" if not usable.any() else f"{int(np.sum(~usable))} of {len(usable)} starts"
    blame = explain_start(target, starts, values, gradients, int(np.argmin(usable)))
    raise ValueError(
        f"the log density cannot be used at {where}. {blame} Check the model and its data for NaN, a prior "
        "that does not cover the data, or start elsewhere (init_params, or initial_position of pmcmc.sample)."
    )


def explain_start(target: Target, starts: PyTree, values: np.ndarray, gradients: PyTree, number: int) -> str:
    """Say what is not finite at a start: the density, at which site if this is known, or parts of its gradient.

    Args:
        target: What is sampled.
        starts: Positions, leading axis N.
        values: Log densities from `evaluate_starts`; shape (N,).
        gradients: Gradients from `evaluate_starts`.
        number: Number of the start.
    """
    if not np.isfinite(values[number]):
        sites = target.model.explain(target.data, jax.tree.map(lambda x: x[number], starts))
        return f"The log density is {float(values[number])} there. {sites}".rstrip()
    names = [
        jax.tree_util.keystr(path)
        for path, leaf in jax.tree_util.tree_leaves_with_path(gradients)
        if not np.all(np.isfinite(leaf[number]))
    ]
    return f"The gradient is not finite with respect to position{', position'.join(names)}."


def _obstacle(target: Target, starts: PyTree, uses_gradient: bool) -> str:
    """Say why densities and gradients cannot be computed at many starts."""
    try:
        evaluate = partial(_evaluate_start, uses_gradient=uses_gradient)
        jax.eval_shape(evaluate, target, jax.tree.map(lambda x: x[0], starts))
    except (TypeError, ValueError, NotImplementedError):
        return (
            "JAX cannot differentiate it. Write it with JAX operations that have a derivative (scan instead of "
            "while_loop), or define its derivative with jax.custom_jvp. Or use a kernel without gradients and no "
            "warm-up by HMC: RandomWalk(step_size=...) with num_warmup=0, or Compose([(RandomWalk(), sites)])."
        )
    return (
        "jax.vmap cannot map it over several, as chains and blocks require. Use JAX operations, or say how to map "
        "them, for instance by vmap_method= of jax.pure_callback."
    )


def evaluate_starts(
    target: Target, starts: PyTree, uses_gradient: bool = True
) -> tuple[np.ndarray, PyTree, np.ndarray]:
    """Evaluate densities and gradients at starts.

    Args:
        target: What is sampled.
        starts: Positions, leading axis N.
        uses_gradient: Whether the gradient is needed.

    Returns:
        Log densities (N,); gradients of real leaves (N, ...), None for others and if they are not needed; and whether
        all are finite (N,). Without a density, the first is NaN, the second None, and the last says whether the
        position itself is finite.
    """
    if target.model.has_density:
        evaluated = _evaluate_starts(target, starts, uses_gradient=uses_gradient, brief=True)
        values, gradients = jax.tree.map(np.asarray, evaluated)
        judged = [values, *jax.tree.leaves(gradients)]
    else:
        values, gradients = np.full(len(jax.tree.leaves(starts)[0]), np.nan), None
        judged = [np.asarray(x) for x in jax.tree.leaves(starts) if is_real(x)]
    finite = [np.isfinite(x).reshape(len(x), -1).all(axis=1) for x in judged]
    return values, gradients, np.all(finite, axis=0) if finite else np.ones(len(values), bool)


def _evaluate_start(target: Target, position: PyTree, uses_gradient: bool) -> tuple[Array, PyTree]:
    """Return the log density, and its gradient with respect to real leaves (None for others, or if it is not used)."""
    if not uses_gradient:
        return target.model.logdensity(target.data, position), None
    split = lambda keep: jax.tree.map(lambda x: x if is_real(x) == keep else None, position)
    real, discrete = split(True), split(False)
    merge = lambda a, b: b if a is None else a
    logdensity = lambda x: target.model.logdensity(
        target.data, jax.tree.map(merge, x, discrete, is_leaf=lambda leaf: leaf is None)
    )
    return jax.value_and_grad(logdensity)(real)


@tuned_jit()
def _evaluate_starts(target: Target, starts: PyTree, *, uses_gradient: bool) -> Any:
    """Return `_evaluate_start` of all starts."""
    return jax.vmap(lambda position: _evaluate_start(target, position, uses_gradient))(starts)
