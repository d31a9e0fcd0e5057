"""Sites and likelihoods of all draws, computed in batches that bound the memory used.

`constrain_draws` and `log_likelihoods` take the kernel's states of a chain, `constrain_warmup` and `warmup_logdensity`
the unconstrained positions of the lanes of warm-up.
"""

from collections.abc import Callable
from typing import Any

import jax
import numpy as np

from pmcmc._typing import Array, PyTree
from pmcmc._xla.compile import TargetJit, tuned_jit
from pmcmc.chain.draws import constrain, in_batches, piece
from pmcmc.kernels import Kernel
from pmcmc.target import Target

# Number of draws constrained at a time, and their bytes: limits the memory of models with large deterministic sites.
CONSTRAIN_BATCH, CONSTRAIN_BYTES = 65_536, 2**26
# Numbers (observations times draws) in one batch of log likelihoods.
LIKELIHOOD_BATCH = 2**22


def constrain_draws(target: Target, kernel: Kernel, unknowns: PyTree, sites: tuple[str, ...] | None) -> PyTree:
    """Return the constrained values of sites, or of all if None, as numpy arrays (num_chains, num_samples, ...)."""
    compiled = lambda rows: constrain(target, kernel, rows, sites=sites)
    batch = min(_num_draws(unknowns), CONSTRAIN_BATCH)
    rows = jax.tree.map(lambda x: jax.ShapeDtypeStruct((batch, *x.shape[2:]), x.dtype), unknowns)
    # Shapes of a full batch: if a full batch fits, as it usually does, this trace is the program's own.
    draws = constrain.eval_shape(target, kernel, rows, sites=sites)
    return _of_each_draw(compiled, unknowns, piece(batch, CONSTRAIN_BYTES, draws))


def log_likelihoods(target: Target, kernel: Kernel, unknowns: PyTree) -> PyTree:
    """Return the log likelihood of every observation at every draw, by site.

    Raises:
        ValueError: The model has no observed sites.
    """
    shapes = _likelihood_rows.eval_shape(target, kernel, jax.tree.map(lambda x: x[0, :1], unknowns))
    if not shapes:
        raise ValueError(
            "log_likelihood=True needs a NumPyro model with observed sites: a plain log density does not tell its "
            "observations apart."
        )
    size = sum(x.size for x in jax.tree.leaves(shapes))
    compiled = lambda rows: _likelihood_rows(target, kernel, rows)
    return _of_each_draw(compiled, unknowns, max(1, LIKELIHOOD_BATCH // size))


def constrain_warmup(target: Target, path: np.ndarray) -> PyTree:
    """Return the sites at unconstrained positions (lanes, steps, D), with leading axes (lanes, steps)."""
    return _of_each_position(_constrain_rows, target, path)


def warmup_logdensity(target: Target, path: np.ndarray) -> np.ndarray:
    """Return the log densities (lanes, steps) of unconstrained positions (lanes, steps, D)."""
    return _of_each_position(_logdensity_rows, target, path)


def _num_draws(unknowns: PyTree) -> int:
    first, second = jax.tree.leaves(unknowns)[0].shape[:2]
    return first * second


def _of_each_draw(compiled: Callable, unknowns: PyTree, most: int) -> PyTree:
    """Apply a compiled function of unknowns to all draws, at most ``most`` at a time."""
    return in_batches(compiled, unknowns, min(_num_draws(unknowns), most))


def _of_each_position(compiled: TargetJit, target: Target, path: Any) -> PyTree:
    """Apply a compiled function of target and positions (N, D) to a path (lanes, steps, D)."""
    batch = min(path[..., 0].size, CONSTRAIN_BATCH)
    rows = jax.ShapeDtypeStruct((batch, path.shape[-1]), path.dtype)
    batch = piece(batch, CONSTRAIN_BYTES, compiled.eval_shape(target, rows))
    return in_batches(lambda rows: compiled(target, rows), path, batch)


@tuned_jit()
def _likelihood_rows(target: Target, kernel: Kernel, unknowns: PyTree) -> PyTree:
    """Compute the log likelihood of every observation for unknowns with one leading axis."""
    one = lambda unknown: target.model.log_likelihood(target.data, kernel.position(target, unknown))
    return jax.vmap(one)(unknowns)


@tuned_jit()
def _constrain_rows(target: Target, rows: Array) -> PyTree:
    """Return the sites at unconstrained positions (N, D) in the coordinates of the user's model, without a basis."""
    return jax.vmap(lambda row: target.model.constrain(target.data, target.spec.unravel(row)))(rows)


@tuned_jit()
def _logdensity_rows(target: Target, rows: Array) -> Array:
    """Return the log densities of unconstrained positions (N, D)."""
    return jax.vmap(lambda row: target.model.logdensity(target.data, target.spec.unravel(row)))(rows)
