"""Chains whose draws are on disk."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from pmcmc._xla.memory import check_available
from pmcmc.chain.draws import ungroup
from pmcmc.chain.report import SolveReport
from pmcmc.chain.state import ChainState
from pmcmc.interop.zarr import open_lazily, read_arrays
from pmcmc.recurrence import RecurrenceSolver

# Within the folder of a store.
DRAWS, CHECKPOINT = "draws.zarr", "checkpoint.npz"


@dataclass(frozen=True)
class StoredChain:
    """Chains whose draws `Chain.stream` wrote to a folder: nothing of them is in memory until it is asked for.

    The folder holds ``draws.zarr``, which xarray and ArviZ open (``xarray.open_zarr(path / "draws.zarr",
    group="posterior")``), at any time, also while the run goes on; and ``checkpoint.npz``, from which `pmcmc.resume`
    goes on. Kernel states are not kept, so there is no ``verify``: the certificate is the ``report``.

    path: of the folder. sites: that were kept. num_samples: draws kept per chain.
    state: where the chains stand after the last step. report: of the steps taken by the last `Chain.stream`,
    `extend` or `pmcmc.resume`. thinning: of every so many steps the last was kept.
    solver: that was asked for; None for "auto".
    max_memory: bytes that what follows may take.
    devices: that share the blocks, or Newton's steps, of what follows; None: none named.

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
        return len(self.state.own)

    def get_samples(self, group_by_chain: bool = False, *, sites: Sequence[str] | None = None) -> dict[str, Any]:
        """Draws of the named sites, or of all that were kept, read into memory.

        Leading axes (num_chains, num_samples) with ``group_by_chain``, else (num_chains * num_samples,).

        Raises:
            ValueError: a site that was not kept.
            MemoryError: they do not fit; before anything is read.
        """
        wanted = self.sites if sites is None else tuple(sites)
        if missing := [name for name in wanted if name not in self.sites]:
            raise ValueError(f"{self.path} has no {missing}: expected names out of {list(self.sites)}.")
        arrays = read_arrays(self.path / DRAWS, "posterior", wanted)
        total = sum(x.dtype.itemsize * x.size for x in arrays.values())
        check_available(total, "Name fewer by sites=, or read a part at a time from to_arviz().")
        draws = {name: x[:, : self.num_samples] for name, x in arrays.items()}
        return {name: jnp.asarray(x if group_by_chain else ungroup(x)) for name, x in draws.items()}

    def to_arviz(self) -> Any:
        """ArviZ's container over the folder: InferenceData on ArviZ 0.x, DataTree on 1.x.

        Groups: posterior, sample_stats as in `Chain.to_arviz`, and a NumPyro model's observed_data and constant_data.
        Arrays are read when they are used, and so far as they are: ``.posterior["mu"].sel(chain=0)[-1000:]``.
        """
        return open_lazily(self.path / DRAWS)

    def extend(self, num_samples: int, *, progress_bar: bool = True) -> "StoredChain":
        """Write ``num_samples`` more steps of every chain behind these: as one long run would; see `Chain.extend`.

        Raises:
            ValueError, TypeError: ``num_samples`` is no integer of at least ``thinning``, or others have gone on from
                here already.
        """
        from pmcmc.sampling.streaming import extend_stored

        return extend_stored(self, num_samples, progress_bar)
