"""Where the draws that a run keeps go.

`Keeper` is the interface. `Draws` keeps draws in memory; `pmcmc.sampling.store` writes them to disk. `Thinned` keeps a
bounded number of draws out of a stream of unknown length.
"""

import abc
import math
from typing import ClassVar, NamedTuple

import jax
import numpy as np

from pmcmc._typing import PyTree
from pmcmc.kernels import Info
from pmcmc.sampling.programs import Engine


class Moves(NamedTuple):
    """Summary of how the kept draws moved. Arrays have one entry per chain, shape (C,).

    Attributes:
        num_draws: Number of draws.
        acceptance_rate: Mean acceptance rate over the draws.
        num_divergent: Number of divergent draws.
        has_margin: Whether the kernel reported the margin of any decision.
    """

    num_draws: np.ndarray
    acceptance_rate: np.ndarray
    num_divergent: np.ndarray
    has_margin: bool


class Keeper(abc.ABC):
    """Base class of the places where the kept draws of a run go.

    Attributes:
        in_step: Whether all chains must be at the same step after each segment. If so, steps that some chains have
            ahead of others are discarded. All chains advance together, so this costs work but no time.
    """

    in_step: ClassVar[bool]

    @abc.abstractmethod
    def add(self, unknowns: PyTree, info: Info, rows: list[slice]) -> None:
        """Keep some draws of a segment, which the next segment overwrites.

        Args:
            unknowns: Unknowns of all steps of the segment, leading axes (C, steps).
            info: Info of all steps, leading axes (C, steps).
            rows: The rows to keep, for each chain.
        """

    @abc.abstractmethod
    def settle(self, finished: bool) -> None:
        """Called after each segment has been added.

        Args:
            finished: Whether it was the last segment.
        """

    @property
    @abc.abstractmethod
    def info(self) -> Info:
        """Info of the newest draws, arrays (C, n)."""

    @property
    @abc.abstractmethod
    def moves(self) -> Moves:
        """Summary of all draws."""

    @property
    @abc.abstractmethod
    def some(self) -> tuple[PyTree, int]:
        """Unknowns of every k-th draw of all chains, (C, n, ...), and k."""


class Thinned:
    """Every ``stride``-th draw out of a growing number of draws; ``stride`` doubles when there are too many.

    Args:
        most: Draws per chain that are kept; there may be up to twice as many before ``stride`` doubles.

    Attributes:
        stride: Distance between two kept draws.
    """

    def __init__(self, most: int):
        self._parts: list[PyTree] = []
        self._most, self._num_seen, self.stride = most, 0, 1

    def add(self, unknowns: PyTree) -> None:
        """Add the draws that follow, (C, n, ...)."""
        first = -self._num_seen % self.stride
        self._num_seen += jax.tree.leaves(unknowns)[0].shape[1]
        self._parts.append(jax.tree.map(lambda x: np.array(x[:, first :: self.stride]), unknowns))
        while self._num_seen > 2 * self._most * self.stride:
            self.stride *= 2
            self._parts = [jax.tree.map(lambda x: x[:, ::2].copy(), self.kept)]

    @property
    def kept(self) -> PyTree:
        """The kept draws, (C, m, ...)."""
        return jax.tree.map(lambda *xs: np.concatenate(xs, axis=1), *self._parts)


def draw_bytes(engine: Engine) -> int:
    """Return the bytes of one draw of all chains."""
    return engine.num_chains * sum(math.prod(s.shape) * s.dtype.itemsize for s in jax.tree.leaves(engine.record_shapes))


class Draws(Keeper):
    """Draws in memory.

    Args:
        engine: Engine of the run; gives the shapes of a draw.
        most: Draws per chain for which memory is allocated.

    Attributes:
        num_kept: Number of draws of each chain so far; shape (C,).
    """

    in_step = False

    def __init__(self, engine: Engine, most: int):
        room = lambda s: np.empty((engine.num_chains, most, *s.shape), s.dtype)
        self._rooms = jax.tree.map(room, engine.record_shapes)
        self.num_kept = np.zeros(engine.num_chains, int)

    def add(self, unknowns, info, rows):
        for chain, some in enumerate(rows):
            begin = self.num_kept[chain]
            end = begin + len(range(some.start, some.stop, some.step))

            def copy(room, x, c=chain, some=some, begin=begin, end=end):
                room[c, begin:end] = x[c, some]

            jax.tree.map(copy, self._rooms, (unknowns, info))
            self.num_kept[chain] = end

    def settle(self, finished):
        pass

    def cut(self) -> None:
        """Drop the draws after the last one that every chain has."""
        self.num_kept[:] = self.num_kept.min()

    @property
    def kept(self) -> tuple[PyTree, Info]:
        """Unknowns and info of the draws that every chain has, (C, n, ...)."""
        return jax.tree.map(lambda x: x[:, : self.num_kept.min()], self._rooms)

    @property
    def info(self):
        return self.kept[1]

    @property
    def some(self):
        return self.kept[0], 1

    @property
    def moves(self):
        info = self.info
        return Moves(
            np.full(len(self.num_kept), info.margin.shape[1]),
            np.asarray(info.acceptance_rate).mean(axis=1),
            np.asarray(info.is_divergent).sum(axis=1),
            bool(np.isfinite(info.margin).any()),
        )
