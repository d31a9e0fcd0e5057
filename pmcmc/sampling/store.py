"""Draws written to disk once they are certified, with a checkpoint from which a stopped run continues.

A `Store` is a folder with two parts: ``draws.zarr``, groups of arrays that grow, and ``checkpoint.npz``, which is
replaced as a whole. Draws are first written after the end of the visible arrays, then made visible, then recorded in
the checkpoint. Whenever the process is killed, the draws of the checkpoint are complete, and any later ones are cut off
when the run continues.
"""

import math
import shutil
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from pmcmc._pytree import PyTree
from pmcmc.chain.draws import ENOUGH_DRAWS, by_name, check_sites, constrain, in_batches, sample_stats, site_shapes
from pmcmc.chain.file_format import STORE, Reader, Writer
from pmcmc.chain.state import ChainState, header
from pmcmc.chain.stored import CHECKPOINT, DRAWS, StoredChain
from pmcmc.interop.arviz import DrawArrays, check_zarr, is_without_draws
from pmcmc.kernels import Info
from pmcmc.sampling.engine import Engine
from pmcmc.sampling.segments import Keeper, Moves, Thinned
from pmcmc.target import Target

# Draws are written once they take this many bytes, or this much time has passed since the last checkpoint.
FLUSH_BYTES, FLUSH_SECONDS = 32 * 2**20, 5.0
# Share of the user's memory limit for draws not yet written, and the number of copies made when they are concatenated
# and cut into chunks.
FLUSH_SHARE, COPIES = 1 / 16, 3
LOCK = "lock"
# Largest number of draws constrained at a time.
_CONSTRAIN_BATCH = 8192
# Number of draws per chain that are kept in memory (up to twice as many) to judge how well they have mixed. If they
# take more than the given bytes there are fewer, but still ENOUGH_DRAWS of all chains; and if these take more than
# _MOST_FLUSHES times as much as draws not yet written, only the second number.
_NUM_JUDGED, _FEWEST, _JUDGED_BYTES, _MOST_FLUSHES = 1024, 128, 2**23, 2


class Store(Keeper):
    """A folder to which the draws of a run go, locked for this process until it is closed.

    Args:
        path: The folder; it must exist.

    Attributes:
        last: The `StoredChain` of the last checkpoint; None before the first one.
    """

    in_step = True

    def __init__(self, path: Path):
        check_zarr()
        self.path, self._lock = path, _lock(path)
        self.last: Any = None
        self._pending: Any = None  # the chain of the checkpoint that is being written
        self._arrays: Any = None

    @classmethod
    def new(cls, path: Path) -> "Store":
        """Make a store in a folder that is new, empty, or holds a store that was stopped before it had draws.

        Raises:
            FileExistsError: The folder is not empty.
            ImportError: Zarr is not installed.
            RuntimeError: Another process is writing to the folder.
            ValueError: The run has several processes.
        """
        check_zarr()
        if jax.process_count() > 1:
            raise ValueError("chains of several processes cannot be streamed: extend them, and save one process's.")
        path.mkdir(parents=True, exist_ok=True)
        found = {file.name for file in path.iterdir() if file.suffix != ".part"} - {LOCK}
        is_unused = found == {DRAWS} and is_without_draws(path / DRAWS)
        if found and not is_unused:
            remedy = "choose another folder, or delete this one"
            if CHECKPOINT in found:
                remedy = f"pmcmc.resume(...) continues a run that was stopped; otherwise {remedy}"
            raise FileExistsError(f"{path} is not empty: {remedy}.")
        store = cls(path)
        if is_unused:
            shutil.rmtree(path / DRAWS)
        return store

    def close(self) -> None:
        """Release the folder for other processes."""
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
            num_steps: Number of steps that the run takes.
            num_planned: See `Run`.
            first: Draws that come before those of the run; None if the store has them already. While they are written
                there are checkpoints too, from which `resume` would take those that are missing again.

        Raises:
            ValueError: The folder was already extended beyond the chain.
        """
        state = chain.state
        self._target, self._kernel, self._sites = state.target, state.kernel, chain.sites
        self._num_wanted, self._num_planned = state.num_steps + num_steps, num_planned
        self._flush_bytes, self._certified = flush_bytes(chain.max_memory), -math.inf
        self._batch = self._batch_size(engine)
        found = self._steps_on_disk()
        if found not in (None, state.num_steps):
            raise ValueError(
                f"{self.path} already holds {found:,} steps, and this chain has {state.num_steps:,}: continue the "
                "newer chain, or open it with pmcmc.resume."
            )
        self._open(state)
        self._forget(engine)
        now = there()
        self._waiting: list[dict] = []
        self._num_bytes, self._num_written = 0, chain.num_samples
        self._room = now.num_samples + (now.state.num_unkept + num_steps) // now.thinning
        if first is None:
            self.last = now
        else:
            self._begin_with(now, *first)
            self._forget(engine)
        self._there = there
        self.certify()

    def _begin_with(self, chain: StoredChain, unknowns: PyTree, info: Info) -> None:
        """Write all draws of a chain, given by unknowns and info, with checkpoints at some of them."""
        num_draws, state, begin = chain.num_samples, chain.state, 0
        while begin < num_draws:
            end = min(num_draws, begin + self._batch)
            self.add(unknowns, info, [slice(begin, end, 1)])
            num_steps = state.num_steps - state.num_unkept - (num_draws - end) * chain.thinning
            x = jax.tree.map(lambda rows, end=end: jnp.asarray(rows[:, end - 1]), unknowns)
            there = replace(chain, num_samples=end, state=state._replace(unknown=x, num_steps=num_steps, num_unkept=0))
            self._there, begin = lambda there=there: there, end
            self.settle(False)

    def _steps_on_disk(self) -> int | None:
        """Return the number of steps recorded in the checkpoint; None without a checkpoint."""
        file = self.path / CHECKPOINT
        return Reader(file, STORE).field("num_steps", int, least=0) if file.exists() else None

    def _open(self, state: ChainState) -> None:
        """Open the arrays, and describe them if they are new."""
        target, new = state.target, not (self.path / DRAWS).exists()
        place = state.kernel.position(target, jax.tree.map(lambda x: jnp.asarray(x)[0], state.unknown))
        described = state.source.describe(target, place)
        self._arrays = DrawArrays(self.path / DRAWS, described.dims)
        if new:
            attrs = {"inference_library": "pmcmc", "kernel": type(state.kernel).__name__}
            constants: dict[str, dict[str, Any]] = {
                "observed_data": described.observed,
                "constant_data": described.constant,
            }
            self._arrays.describe(attrs, len(state.own), constants)

    def _forget(self, engine: Engine) -> None:
        """Reset the statistics of earlier draws."""
        none = np.zeros(engine.num_chains)
        self._moves = Moves(none.astype(int), none, none.astype(int), False)
        empty = lambda s: np.empty((engine.num_chains, 0, *s.shape), s.dtype)
        unknowns, self._info = jax.tree.map(empty, engine.record_shapes)
        row = sum(x.dtype.itemsize * math.prod(x.shape[2:]) for x in jax.tree.leaves(unknowns)) * engine.num_chains
        self._thinned = Thinned(num_judged(engine.num_chains, row, self._flush_bytes))
        self._thinned.add(unknowns)

    def _batch_size(self, engine: Engine) -> int:
        """Return the number of draws of one chain to constrain at a time.

        The draws and their copies take a share of the memory for draws not yet written.
        """
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
        """Constrain a batch of draws, update the statistics, and write the waiting draws if they take enough bytes."""
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
        """Write the waiting draws; readers do not see them yet."""
        if self._waiting:
            joined = jax.tree.map(lambda *xs: np.concatenate(xs, axis=1), *self._waiting)
            self._waiting, self._num_bytes = [], 0
            self._arrays.write(self._num_written, joined, self._room)
            self._num_written += joined["sample_stats"]["lp"].shape[1]

    def settle(self, finished):
        if finished or time.perf_counter() - self._certified >= FLUSH_SECONDS:
            self.certify(finished)

    def certify(self, finished: bool = False) -> None:
        """Write a checkpoint with all draws added so far. The last one of a run holds the diagnosis of its pilot."""
        chain = self._there()
        if finished and chain.report.find_diagnosis is not None:
            self.certify()  # the diagnosis takes seconds, in which the process may be stopped
        # Write the draws, show them to readers, and replace the checkpoint, in this order: if the process is killed in
        # between, the old checkpoint still describes draws that exist.
        writer = Writer()
        report = chain.report if finished else replace(chain.report, find_diagnosis=None)
        told = header(writer, chain.state, report, chain.thinning, chain.solver, ())
        self._write()
        self._arrays.show(chain.num_samples)
        wanted = {
            "num_wanted": self._num_wanted,
            "num_planned": self._num_planned,
            "max_memory": chain.max_memory,
            "num_samples": chain.num_samples,
            "kept_sites": list(chain.sites),
        }
        self._pending = chain
        writer.write(self.path / CHECKPOINT, {**told, **wanted}, STORE)
        self.last, self._certified = chain, time.perf_counter()

    def cut(self) -> None:
        """Hide draws after the last checkpoint; without one all of them, if there are any."""
        # A stop between the replacement of the checkpoint and the line after it leaves a checkpoint newer than `last`.
        if self._pending is not None and self._steps_on_disk() == self._pending.state.num_steps:
            self.last = self._pending
        if self._arrays is not None:
            self._arrays.show(0 if self.last is None else self.last.num_samples)

    @property
    def info(self):
        return self._info

    @property
    def moves(self):
        seen = self._moves.num_draws > 0
        return self._moves._replace(acceptance_rate=np.where(seen, self._moves.acceptance_rate, np.nan))

    @property
    def some(self):
        return self._thinned.kept, self._thinned.stride


def num_judged(num_chains: int, row: int, num_bytes: int) -> int:
    """Return how many draws per chain to keep in memory for judging them; there may be up to twice as many.

    Args:
        num_chains: Number of chains.
        row: Bytes of one draw of all chains.
        num_bytes: Number of bytes at which waiting draws are written.
    """
    enough = min(math.ceil(ENOUGH_DRAWS / num_chains), _MOST_FLUSHES * num_bytes // row)
    return max(_FEWEST, enough, min(_NUM_JUDGED, _JUDGED_BYTES // row))


def flush_bytes(max_memory: int | None) -> int:
    """Return the number of bytes at which waiting draws are written."""
    return FLUSH_BYTES if max_memory is None else min(FLUSH_BYTES, int(FLUSH_SHARE * max_memory))


def held_bytes(max_memory: int | None) -> int:
    """Return the bytes used by draws not yet written, copies included."""
    return COPIES * flush_bytes(max_memory)


def check_kept(target: Target, sites: Any) -> tuple[str, ...]:
    """Return the names of the sites to keep: those given, or all.

    Raises:
        ValueError: The model does not have one of the sites, there are none, or a name cannot be used on disk.
        TypeError: ``sites`` is not a sequence of names.
    """
    known = tuple(by_name(site_shapes(target)))
    sites = known if sites is None else check_sites(target, sites)
    if not sites:
        raise ValueError(f"sites is empty: expected names out of {list(known)}.")
    if unfit := [name for name in sites if "/" in name or name in ("chain", "draw")]:
        raise ValueError(
            f"sites {unfit} cannot be arrays on disk, where / separates folders, and chain and draw are axes: rename "
            "them in the model, or leave them out by sites=."
        )
    return sites


def _lock(path: Path) -> Any:
    """Lock a folder by opening a file in it.

    The lock ends when the file is closed, or with the process, however it ends.

    Raises:
        RuntimeError: Another process has the lock.
    """
    try:
        import fcntl
    except ImportError:  # this system has no such locks
        return open(path / LOCK, "w")
    file = open(path / LOCK, "w")  # noqa: SIM115
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        file.close()
        raise RuntimeError(f"another process is writing to {path}: wait for it, or stop it.") from error
    return file
