"""Chains whose draws are in a folder on disk.

`StoredChain` is what `Chain.stream` and `pmcmc.resume` return. It reads draws only when they are requested.

The functions above it compute sites and likelihoods of all draws in batches that bound the memory used.
`constrain_draws` and `log_likelihoods` take the kernel's states of a chain, `constrain_warmup` and `warmup_logdensity`
the unconstrained positions of the lanes of warm-up.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from pmcmc._pytree import Array, PyTree
from pmcmc._xla.compile import TargetJit, tuned_jit
from pmcmc._xla.memory import check_available
from pmcmc.chain.draws import constrain, in_batches, piece, ungroup
from pmcmc.chain.report import SolveReport, Summary
from pmcmc.chain.state import ChainState
from pmcmc.interop.arviz import open_lazily, read_arrays
from pmcmc.kernels import Kernel
from pmcmc.recurrence import RecurrenceSolver
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


# Names within the folder of a store.
DRAWS, CHECKPOINT = "draws.zarr", "checkpoint.npz"


@dataclass(frozen=True)
class StoredChain:
    """Chains whose draws `Chain.stream` wrote to a folder. Draws are read into memory only when they are requested.

    The folder holds two things. ``draws.zarr`` can be opened by xarray and ArviZ (``xarray.open_zarr(path /
    "draws.zarr", group="posterior")``) at any time, also during the run. ``checkpoint.npz`` is what `pmcmc.resume`
    continues from. The kernel's states are not kept, so there is no ``verify``: the certificate is the ``report``.

    Attributes:
        path: The folder.
        sites: Names of the sites that were kept.
        num_samples: Number of draws kept per chain.
        state: State of the chains after the last step.
        report: Report on the steps taken by the last `Chain.stream`, `extend` or `pmcmc.resume`.
        thinning: Every ``thinning``-th step was kept.
        solver: The solver that was asked for; None for "auto".
        max_memory: Bytes that may be used when the chain is continued; None for the defaults of `pmcmc.parallel_chain`.
        devices: Devices that share the blocks, or the steps of Newton's method, when the chain is continued; None if
            none were named.

    Example:
        >>> import jax.numpy as jnp, pmcmc, tempfile
        >>> logdensity = lambda x: -0.5 * jnp.sum(x["a"] ** 2)
        >>> short = pmcmc.sample(logdensity, {"a": jnp.zeros(3)}, 0, num_samples=100, progress_bar=False)
        >>> long = short.stream(tempfile.mkdtemp(), 900, progress_bar=False)
        >>> long.get_samples()["a"].shape
        (4000, 3)
    """

    path: Path
    sites: tuple[str, ...]
    num_samples: int
    state: ChainState = field(repr=False)
    report: SolveReport = field(repr=False)
    thinning: int
    solver: RecurrenceSolver | None
    max_memory: int | None = None
    devices: Sequence[jax.Device] | None = None

    @property
    def num_chains(self) -> int:
        """Number of chains."""
        return len(self.state.own)

    def get_samples(self, group_by_chain: bool = False, *, sites: Sequence[str] | None = None) -> dict[str, Any]:
        """Read draws into memory.

        Args:
            group_by_chain: Whether chains are a separate axis.
            sites: Names of the sites to read; None for all that were kept.

        Returns:
            Draws by site, with leading axes (num_chains, num_samples) if ``group_by_chain``, otherwise
            (num_chains * num_samples,).

        Raises:
            ValueError: One of the sites was not kept.
            MemoryError: The draws do not fit into memory; raised before anything is read.
        """
        wanted = self.sites if sites is None else tuple(sites)
        if missing := [name for name in wanted if name not in self.sites]:
            raise ValueError(f"{self.path} has no {missing}: expected names out of {list(self.sites)}.")
        arrays = read_arrays(self.path / DRAWS, "posterior", wanted)
        row = sum(x.dtype.itemsize * math.prod(x.shape[2:]) for x in arrays.values())
        total = row * self.num_chains * self.num_samples
        check_available(total, "Name fewer by sites=, or read a part at a time from to_arviz().")
        draws = {name: x[:, : self.num_samples] for name, x in arrays.items()}
        return {name: jnp.asarray(x if group_by_chain else ungroup(x)) for name, x in draws.items()}

    def summary(self, prob: float = 0.9, *, sites: Sequence[str] | None = None) -> Summary:
        """Return what `Chain.summary` returns, of draws that are read into memory.

        Args:
            prob: Probability of the highest posterior density interval.
            sites: Names of the sites to read; None for all that were kept.

        Raises:
            ValueError: One of the sites was not kept, or there are fewer than four draws per chain.
            MemoryError: The draws do not fit into memory; raised before anything is read.
        """
        divergent = read_arrays(self.path / DRAWS, "sample_stats", ["diverging"])["diverging"]
        return Summary(self.get_samples(True, sites=sites), prob, np.asarray(divergent[:, : self.num_samples]))

    def to_arviz(self) -> Any:
        """Open the folder in ArviZ's container: InferenceData for ArviZ 0.x, DataTree for 1.x.

        The groups are posterior and sample_stats, as in `Chain.to_arviz`, and observed_data and constant_data of a
        NumPyro model. The draws are the ``num_samples`` of this chain, also if the folder was extended since. Only the
        parts of arrays that are used are read: ``.posterior["mu"].sel(chain=0)[-1000:]``.
        """
        return open_lazily(self.path / DRAWS, self.num_samples)

    def extend(self, num_samples: int, *, max_memory: int | None = None, progress_bar: bool = True) -> "StoredChain":
        """Continue every chain by ``num_samples`` steps, as one long run would, and append the draws to the folder.

        See `Chain.extend`.

        Args:
            num_samples: Number of new steps per chain.
            max_memory: Memory limit in bytes, as for `pmcmc.parallel_chain`; None for the limit of this chain.
            progress_bar: Whether to show progress in terminals and notebooks.

        Returns:
            A new `StoredChain` with all draws. Its ``report`` covers the new steps only.

        Raises:
            ValueError: ``num_samples`` is less than ``thinning``, a chain would have more than 2^32 steps, the model
                has changed since the chain was sampled, or the folder was already extended beyond this chain.
            TypeError: ``num_samples`` or ``max_memory`` is not an integer.
            RuntimeError: Another process is writing to the folder.
            MemoryError: The shortest segment does not fit into memory; raised before any sampling.
            Interrupted: Ctrl-C; its ``chain`` holds the draws of the last checkpoint.
            NonFiniteState: A chain reached a state that is not finite; its ``chain`` holds the draws of the last
                checkpoint.
        """
        from pmcmc.sampling.streaming import extend_stored

        return extend_stored(self, num_samples, max_memory, progress_bar)
