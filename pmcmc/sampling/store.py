"""Draws written to disk as they are certified, with a checkpoint from which a run that was stopped goes on.

A store is a folder: ``draws.zarr``, groups of arrays that grow, and ``checkpoint.npz``, which is replaced as a whole.
Draws are written behind the end of the arrays first, then shown, then vouched for by the checkpoint: whenever the
process is killed, the checkpoint's draws stand, and what is beyond them is cut off when the run goes on.
"""

import math
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from pmcmc._typing import PyTree
from pmcmc.chain.draws import by_name, check_sites, constrain, in_batches, sample_stats, site_shapes
from pmcmc.chain.file_format import STORE, Reader, Writer
from pmcmc.chain.state import ChainState, header
from pmcmc.chain.stored import CHECKPOINT, DRAWS, StoredChain
from pmcmc.interop.zarr import DrawArrays, check_zarr
from pmcmc.kernels import Info
from pmcmc.sampling.programs import Engine
from pmcmc.sampling.sinks import Keeper, Moves, Thinned
from pmcmc.target import Target

# Draws wait for each other until they are so many bytes, or so much time has passed since the last checkpoint.
FLUSH_BYTES, FLUSH_SECONDS = 32 * 2**20, 5.0
# Of the user's budget; what waits is joined and cut into chunks, which takes copies.
FLUSH_SHARE, COPIES = 1 / 16, 3
LOCK = "lock"
# Draws made of unknowns at a time, at most.
_CONSTRAIN_BATCH = 8192
# Draws of each chain that are kept in memory, up to twice as many, to judge how well they mixed; fewer where they take
# more than so many bytes.
_NUM_JUDGED, _FEWEST, _JUDGED_BYTES = 1024, 64, 2**23


class Store(Keeper):
    """A folder where the draws of a run go, held by this process alone until it is closed.

    last: what stands, as the checkpoint has it.
    """

    in_step = True

    def __init__(self, path: Path):
        check_zarr()
        self.path, self._lock = path, _lock(path)
        self.last: StoredChain

    @classmethod
    def new(cls, path: Path) -> "Store":
        """In a folder that is empty or not there yet.

        Raises:
            FileExistsError: there is something.
            ImportError: Zarr is not installed.
            RuntimeError: another process is writing there.
            ValueError: a run of several processes.
        """
        check_zarr()
        if jax.process_count() > 1:
            raise ValueError("chains of several processes cannot be streamed: extend them, and save one process's.")
        path.mkdir(parents=True, exist_ok=True)
        if any(file.name != LOCK for file in path.iterdir()):
            raise FileExistsError(
                f"{path} holds something already: pmcmc.resume(...) goes on with a run that was stopped; else choose "
                "another folder, or delete it."
            )
        return cls(path)

    def close(self) -> None:
        """Let others have the folder."""
        self._lock.close()

    def begin(
        self,
        chain: StoredChain,
        there: Callable[[], StoredChain],
        engine: Engine,
        num_steps: int,
        num_planned: int,
        first: tuple[PyTree, Info] | None,
    ) -> None:
        """Prepare for the draws of a run that continues a chain.

        Args:
            chain: The chain that is continued.
            there: Returns the chain as it is at the moment.
            engine: The engine of the run.
            num_steps: Steps that the run takes.
            num_planned: See `Run`.
            first: Draws that come before those of the run; None if there are none.

        Raises:
            ValueError: others have gone on from the chain already.
        """
        state = chain.state
        self._target, self._kernel, self._sites, self._there = state.target, state.kernel, chain.sites, there
        self._num_wanted, self._num_planned = state.num_steps + num_steps, num_planned
        self._flush_bytes = flush_bytes(chain.max_memory)
        self._batch = self._batch_size(engine)
        found = self._steps_on_disk()
        if found not in (None, state.num_steps):
            raise ValueError(
                f"{self.path} has gone on to {found:,} steps, and this chain stands at {state.num_steps:,}: take the "
                "chain that went on, or pmcmc.resume it."
            )
        self._open(state)
        self._forget(engine)
        now = there()
        self._waiting: list[dict] = []
        self._num_bytes, self._num_written = 0, chain.num_samples
        self._room = now.num_samples + (now.state.num_unkept + num_steps) // now.thinning
        if first is not None:
            self.add(*first, [slice(0, now.num_samples, 1)])
            self._forget(engine)
        self.certify()

    def _steps_on_disk(self) -> int | None:
        file = self.path / CHECKPOINT
        return Reader(file, STORE).field("num_steps", int, least=0) if file.exists() else None

    def _open(self, state: ChainState) -> None:
        """The arrays, described where they are new."""
        target, new = state.target, not (self.path / DRAWS).exists()
        place = state.kernel.position(target, jax.tree.map(lambda x: jnp.asarray(x)[0], state.unknown))
        described = state.source.describe(target, place)
        self._arrays = DrawArrays(self.path / DRAWS, described.dims)
        if new:
            attrs = {"inference_library": "pmcmc", "kernel": type(state.kernel).__name__}
            constants = {"observed_data": described.observed, "constant_data": described.constant}
            self._arrays.describe(attrs, len(state.own), constants)

    def _forget(self, engine: Engine) -> None:
        """Of draws that were added before nothing is told any more."""
        none = np.zeros(engine.num_chains)
        self._moves = Moves(none.astype(int), none, none.astype(int), False)
        empty = lambda s: np.empty((engine.num_chains, 0, *s.shape), s.dtype)
        unknowns, self._info = jax.tree.map(empty, engine.record_shapes)
        row = sum(x.dtype.itemsize * math.prod(x.shape[2:]) for x in jax.tree.leaves(unknowns)) * engine.num_chains
        self._thinned = Thinned(max(_FEWEST, min(_NUM_JUDGED, _JUDGED_BYTES // row)))
        self._thinned.add(unknowns)

    def _batch_size(self, engine: Engine) -> int:
        """Draws of one chain that are constrained at a time: sites and their copies take a share of what may wait."""
        shapes = by_name(site_shapes(self._target))
        row = sum(math.prod(shapes[name].shape) * shapes[name].dtype.itemsize for name in self._sites)
        return max(1, min(_CONSTRAIN_BATCH, self._flush_bytes // (4 * max(row, 1))) // engine.num_chains)

    def add(self, unknowns, info, rows):
        kept = rows[0]
        for begin in range(kept.start, kept.stop, self._batch * kept.step):
            some = slice(begin, min(kept.stop, begin + self._batch * kept.step), kept.step)
            part: tuple[PyTree, Info] = jax.tree.map(lambda x, some=some: x[:, some].copy(), (unknowns, info))
            self._add(*part)

    def _add(self, unknowns: PyTree, info: Info) -> None:
        compiled = lambda rows: constrain(self._target, self._kernel, rows, sites=self._sites)
        num_chains = info.margin.shape[0]
        draws = {
            "posterior": in_batches(compiled, unknowns, self._batch * num_chains),
            "sample_stats": sample_stats(self._kernel, info),
        }
        old, num_new = self._moves, info.margin.shape[1]
        total = old.num_draws + num_new
        rate = old.acceptance_rate * old.num_draws + np.asarray(info.acceptance_rate, float).sum(axis=1)
        self._moves = Moves(
            total,
            rate / total,
            old.num_divergent + np.asarray(info.is_divergent).sum(axis=1),
            old.has_margin or bool(np.isfinite(info.margin).any()),
        )
        self._info = info
        self._thinned.add(unknowns)
        self._waiting.append(draws)
        self._num_bytes += sum(x.nbytes for x in jax.tree.leaves(draws))
        if self._num_bytes >= self._flush_bytes:
            self._write()

    def _write(self) -> None:
        """What waits, where nobody sees it yet."""
        if self._waiting:
            joined = jax.tree.map(lambda *xs: np.concatenate(xs, axis=1), *self._waiting)
            self._waiting, self._num_bytes = [], 0
            self._arrays.write(self._num_written, joined, self._room)
            self._num_written += joined["sample_stats"]["lp"].shape[1]

    def settle(self, finished):
        if finished or time.perf_counter() - self._certified >= FLUSH_SECONDS:
            self.certify()

    def certify(self) -> None:
        """All that was added, as what a run goes on from."""
        chain = self._there()
        self._write()
        self._arrays.show(chain.num_samples)
        writer = Writer()
        told = header(writer, chain.state, chain.report, chain.thinning, chain.solver, ())
        wanted = {
            "num_wanted": self._num_wanted,
            "num_planned": self._num_planned,
            "max_memory": chain.max_memory,
            "num_samples": chain.num_samples,
            "kept_sites": list(chain.sites),
        }
        writer.write(self.path / CHECKPOINT, {**told, **wanted}, STORE)
        self.last, self._certified = chain, time.perf_counter()

    def cut(self) -> None:
        """Back to the checkpoint."""
        self._arrays.show(self.last.num_samples)

    @property
    def info(self):
        return self._info

    @property
    def moves(self):
        return self._moves

    @property
    def some(self):
        return self._thinned.kept, self._thinned.stride


def flush_bytes(max_memory: int | None) -> int:
    """Draws that wait at most."""
    return FLUSH_BYTES if max_memory is None else min(FLUSH_BYTES, int(FLUSH_SHARE * max_memory))


def held_bytes(max_memory: int | None) -> int:
    """That waiting draws take."""
    return COPIES * flush_bytes(max_memory)


def check_kept(target: Target, sites: Any) -> tuple[str, ...]:
    """Names of the sites to keep: those given, or all.

    Raises:
        ValueError, TypeError: the model does not have them, or they cannot be named on disk.
    """
    known = tuple(by_name(site_shapes(target)))
    sites = known if sites is None else check_sites(target, sites)
    if not sites:
        raise ValueError(f"sites names none to keep: expected names out of {list(known)}.")
    if slashed := [name for name in sites if "/" in name]:
        raise ValueError(
            f"sites {slashed} cannot be arrays on disk, where / separates folders: rename them in the model, or leave "
            "them out by sites=."
        )
    return sites


def _lock(path: Path) -> Any:
    """An open file that no other process can open so until this one closes it, or ends, however that comes about.

    Raises:
        RuntimeError: another process has it.
    """
    try:
        import fcntl
    except ImportError:  # not on this system
        return open(path / LOCK, "w")
    file = open(path / LOCK, "w")  # noqa: SIM115
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        file.close()
        raise RuntimeError(f"another process is writing to {path}: wait for it, or stop it.") from error
    return file
