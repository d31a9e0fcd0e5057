"""Draws as users see them: constrained sites by name, and statistics of the transitions.

`constrain` turns the kernel's states into the sites of the user's model, and `in_batches` applies it (or any other
program) to many draws. `fields` and `sample_stats` name the statistics as NumPyro and ArviZ do. `judge_mixing` computes
R-hat and effective sample sizes.
"""

import math
from collections.abc import Callable
from typing import Any

import jax
import numpy as np

from pmcmc._typing import PyTree
from pmcmc._xla.compile import tuned_jit
from pmcmc.chain.mixing import Mixing, judge, stride_of
from pmcmc.kernels import Info, Kernel
from pmcmc.kernels.base import PositionKernel
from pmcmc.target import Target

# Number of draws whose positions are computed at a time.
_POSITIONS = 4096


def constrained(target: Target, kernel: Kernel, unknowns: PyTree) -> PyTree:
    """Return the sites of the user's model for unknowns with one leading axis."""
    return jax.vmap(lambda unknown: target.model.constrain(target.data, kernel.position(target, unknown)))(unknowns)


@tuned_jit(static_argnames="sites")
def constrain(target: Target, kernel: Kernel, unknowns: PyTree, *, sites: tuple[str, ...] | None = None) -> PyTree:
    """Compute `constrained` as a compiled program.

    Args:
        target: The target.
        kernel: The kernel that made the draws.
        unknowns: The kernel's states, with one leading axis.
        sites: Names of the sites to return in a dict; what only the others need is not computed. None for all.
    """
    draws = constrained(target, kernel, unknowns)
    return draws if sites is None else {name: by_name(draws)[name] for name in sites}


def site_shapes(target: Target) -> PyTree:
    """Return the shapes of one draw of all sites."""
    return jax.eval_shape(target.model.constrain, target.data, target.spec.template)


def check_sites(target: Target, sites: Any) -> tuple[str, ...]:
    """Return the given names of sites as a tuple.

    Raises:
        ValueError: The model does not have one of the sites.
        TypeError: ``sites`` is not a sequence of names.
    """
    known = by_name(site_shapes(target))
    if isinstance(sites, str) or not all(isinstance(name, str) for name in sites):
        raise TypeError(f"sites must be a sequence of names out of {list(known)}, got {sites!r}.")
    if unknown := [name for name in sites if name not in known]:
        raise ValueError(f"sites: the model has no {unknown}: expected names out of {list(known)}.")
    return tuple(sites)


def by_name(samples: PyTree) -> dict[str, Any]:
    """Return draws, or their shapes, as a flat dict.

    A flat dict is returned as it is. A single array is named ``x``, and a leaf of any other pytree by ``x`` and its
    path.
    """
    if isinstance(samples, dict) and all(hasattr(x, "shape") for x in samples.values()):
        return samples
    leaves = jax.tree_util.tree_leaves_with_path(samples)
    if len(leaves) == 1 and not leaves[0][0]:
        return {"x": leaves[0][1]}
    return {"x" + jax.tree_util.keystr(path): leaf for path, leaf in leaves}


@tuned_jit()
def _positions(target: Target, kernel: Kernel, unknowns: PyTree) -> PyTree:
    """Compute the user's unconstrained positions for unknowns with one leading axis."""
    return jax.vmap(lambda unknown: kernel.position(target, unknown))(unknowns)


def judge_mixing(target: Target, kernel: Kernel, unknowns: PyTree, before: int = 1) -> Mixing:
    """Measure how well draws have mixed, in the unconstrained values of the latent sites.

    Long chains are thinned first, see `stride_of`. For kernels whose unknown is the vector of coordinates no program is
    compiled.

    Args:
        target: The target.
        kernel: The kernel that made the draws.
        unknowns: The kernel's states, leading axes (num_chains, num_draws).
        before: Thinning that was already applied: the unknowns are every ``before``-th draw.
    """
    num_chains, num_draws = jax.tree.leaves(unknowns)[0].shape[:2]
    stride = stride_of(num_chains, num_draws, target.dim)
    rows = jax.tree.map(lambda x: np.asarray(x)[:, stride - 1 :: stride], unknowns)
    if isinstance(kernel, PositionKernel):
        found = target.spec.unravel(rows if target.basis is None else target.basis.to_positions(rows))
    else:
        found = in_batches(lambda x: _positions(target, kernel, x), rows, min(num_chains * num_draws, _POSITIONS))
    return judge(by_name(found), before * stride)


def fields(kernel: Any, info: Info) -> dict[str, Any]:
    """Return the fields of the transitions under NumPyro's names, as far as the kernel has them."""
    found: dict[str, Any] = {
        "diverging": info.is_divergent,
        "accept_prob": info.acceptance_rate,
        "potential_energy": -info.logdensity,
    }
    if info.energy is not None:
        found["energy"] = info.energy
    steps = info.num_integration_steps
    if steps is None:
        steps = kernel.tunables.get("num_integration_steps")
    if steps is not None:
        found["num_steps"] = np.broadcast_to(np.asarray(steps), info.margin.shape)
    if info.tree_depth is not None:
        found["tree_depth"] = info.tree_depth
    return found


def sample_stats(kernel: Any, info: Info) -> dict[str, Any]:
    """Return the fields of the transitions under ArviZ's names, as far as the kernel has them."""
    found = fields(kernel, info)
    stats = {
        "lp": info.logdensity,
        "acceptance_rate": found["accept_prob"],
        "diverging": found["diverging"],
        "accept_margin": info.margin,
    }
    if "step_size" in kernel.tunables:
        stats["step_size"] = np.broadcast_to(np.asarray(kernel.tunables["step_size"]), info.margin.shape)
    if "energy" in found:
        stats["energy"] = found["energy"]
    if "num_steps" in found:
        stats["n_steps"] = found["num_steps"]
    if "tree_depth" in found:
        stats["tree_depth"] = found["tree_depth"]
    return stats


def in_batches(compiled: Callable, tree: PyTree, batch: int) -> PyTree:
    """Apply a program to all rows of leaves (A, B, ...), in batches of one size.

    Args:
        compiled: Maps a pytree with leading axis ``batch`` to another one.
        tree: Arrays with leading axes (A, B).
        batch: Number of rows per batch.

    Returns:
        The results as numpy arrays (A, B, ...).
    """
    first, second = jax.tree.leaves(tree)[0].shape[:2]
    flat, total = jax.tree.map(ungroup, tree), first * second
    whole: PyTree = None
    for start in range(0, total, batch):
        # The last batch repeats the last row, so that all have one shape and one program serves them.
        rows = np.minimum(np.arange(start, start + batch), total - 1)
        part = compiled(jax.tree.map(lambda x: x[rows], flat))  # noqa: B023
        if whole is None:
            whole = jax.tree.map(lambda x: np.empty((total, *x.shape[1:]), x.dtype), part)
        for room, x in zip(jax.tree.leaves(whole), jax.tree.leaves(part), strict=True):
            room[start : start + batch] = np.asarray(x)[: total - start]
    return jax.tree.map(lambda x: x.reshape(first, second, *x.shape[1:]), whole)


def piece(batch: int, num_bytes: int, draws: PyTree) -> int:
    """Return how many draws to compute at a time.

    Args:
        batch: Largest number of draws.
        num_bytes: Bytes that the results may take.
        draws: Shapes of the results for ``batch`` draws.
    """
    size = sum(math.prod(s.shape) * s.dtype.itemsize for s in jax.tree.leaves(draws))
    return max(1, min(batch, batch * num_bytes // max(size, 1)))


def ungroup(x: Any) -> Any:
    """Flatten the first two axes: (num_chains, num_draws, ...) becomes (num_chains * num_draws, ...)."""
    # A length of -1 would be ambiguous if the array is empty.
    return x.reshape(x.shape[0] * x.shape[1], *x.shape[2:])
