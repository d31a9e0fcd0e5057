"""Draws as users see them: constrained sites by name, and statistics of the transitions under two sets of names."""

from collections.abc import Callable
from typing import Any

import jax
import numpy as np

from pmcmc._jit import tuned_jit
from pmcmc._types import PyTree
from pmcmc.kernels import Info, Kernel
from pmcmc.target import Target


def constrained(target: Target, kernel: Kernel, unknowns: PyTree) -> PyTree:
    """What the user's model calls the draws, of unknowns with one leading axis."""
    return jax.vmap(lambda unknown: target.model.constrain(target.data, kernel.position(target, unknown)))(unknowns)


constrain = tuned_jit()(constrained)


def by_name(samples: PyTree) -> dict[str, Any]:
    """Draws or their shapes as a flat dict: ``x`` for a single array, else the path within the pytree."""
    if isinstance(samples, dict) and all(hasattr(x, "shape") for x in samples.values()):
        return samples
    leaves = jax.tree_util.tree_leaves_with_path(samples)
    if len(leaves) == 1 and not leaves[0][0]:
        return {"x": leaves[0][1]}
    return {"x" + jax.tree_util.keystr(path): leaf for path, leaf in leaves}


def fields(kernel: Any, info: Info) -> dict[str, Any]:
    """Fields of the transitions under NumPyro's names, as far as the kernel has them."""
    found: dict[str, Any] = {
        "diverging": info.is_divergent,
        "accept_prob": info.acceptance_rate,
        "potential_energy": -info.logdensity,
    }
    if info.energy is not None:
        found["energy"] = info.energy
    steps = info.num_integration_steps
    if steps is None:
        steps = getattr(kernel, "num_integration_steps", None)
    if steps is not None:
        found["num_steps"] = np.broadcast_to(np.asarray(steps), info.margin.shape)
    if info.tree_depth is not None:
        found["tree_depth"] = info.tree_depth
    return found


def sample_stats(kernel: Any, info: Info) -> dict[str, Any]:
    """The same fields under ArviZ's names."""
    found = fields(kernel, info)
    stats = {
        "lp": info.logdensity,
        "acceptance_rate": found["accept_prob"],
        "diverging": found["diverging"],
        "accept_margin": info.margin,
    }
    if hasattr(kernel, "step_size"):
        stats["step_size"] = np.broadcast_to(np.asarray(kernel.step_size), info.margin.shape)
    if "energy" in found:
        stats["energy"] = found["energy"]
    if "num_steps" in found:
        stats["n_steps"] = found["num_steps"]
    if "tree_depth" in found:
        stats["tree_depth"] = found["tree_depth"]
    return stats


def in_batches(compiled: Callable, tree: PyTree, batch: int) -> PyTree:
    """``compiled`` of all rows of leaves (A, B, ...), so many at a time; numpy arrays (A, B, ...)."""
    first, second = jax.tree.leaves(tree)[0].shape[:2]
    flat, total = jax.tree.map(ungroup, tree), first * second

    def some(start: int) -> PyTree:
        rows = np.minimum(np.arange(start, start + batch), total - 1)  # one shape, so one compilation
        part = compiled(jax.tree.map(lambda x: x[rows], flat))
        return jax.tree.map(lambda x: np.asarray(x)[: total - start], part)

    parts = [some(start) for start in range(0, total, batch)]
    joined = jax.tree.map(lambda *xs: np.concatenate(xs), *parts)
    return jax.tree.map(lambda x: x.reshape(first, second, *x.shape[1:]), joined)


def ungroup(x: Any) -> Any:
    """Chains one after the other; -1 for their number would not do for arrays that hold nothing."""
    return x.reshape(x.shape[0] * x.shape[1], *x.shape[2:])
