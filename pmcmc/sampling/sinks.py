"""What becomes of the draws that a run keeps: arrays in memory here, a store on disk in `_store`."""

import abc
import math
from typing import ClassVar, NamedTuple

import jax
import numpy as np

from pmcmc._typing import PyTree
from pmcmc.kernels import Info
from pmcmc.sampling.programs import Engine


class Moves(NamedTuple):
    """How the kept draws of each chain moved, (C,) arrays.

    num_draws: they are means and sums over. has_margin: whether the kernel told the margin of a decision anywhere.
    """

    num_draws: np.ndarray
    acceptance_rate: np.ndarray
    num_divergent: np.ndarray
    has_margin: bool


class Keeper(abc.ABC):
    """Where the kept draws of a run go.

    in_step: whether the chains must stand at the same step behind every segment. Then what some have ahead of others
        is given up; chains advance side by side, so that costs work and no time.
    """

    in_step: ClassVar[bool]

    @abc.abstractmethod
    def add(self, unknowns: PyTree, info: Info, rows: list[slice]) -> None:
        """Keep those rows of each chain's (steps, ...) arrays, which the next segment overwrites."""

    @abc.abstractmethod
    def settle(self, finished: bool) -> None:
        """Take note that a whole segment has been added; ``finished`` says whether it was the last one."""

    @property
    @abc.abstractmethod
    def info(self) -> Info:
        """Of the newest draws, (C, n) arrays."""

    @property
    @abc.abstractmethod
    def moves(self) -> Moves:
        """Of all draws."""

    @property
    @abc.abstractmethod
    def some(self) -> tuple[PyTree, int]:
        """Unknowns of every so manieth draw of all chains, (C, n, ...), and that number."""


class Thinned:
    """Every so manieth of ever more draws, ``most`` of a chain or up to twice as many; stride: that number."""

    def __init__(self, most: int):
        self._parts: list[PyTree] = []
        self._most, self._num_seen, self.stride = most, 0, 1

    def add(self, unknowns: PyTree) -> None:
        """The draws that follow, (C, n, ...)."""
        first = -self._num_seen % self.stride
        self._num_seen += jax.tree.leaves(unknowns)[0].shape[1]
        self._parts.append(jax.tree.map(lambda x: np.array(x[:, first :: self.stride]), unknowns))
        while self._num_seen > 2 * self._most * self.stride:
            self.stride *= 2
            self._parts = [jax.tree.map(lambda x: x[:, ::2].copy(), self.kept)]

    @property
    def kept(self) -> PyTree:
        """(C, m, ...)."""
        return jax.tree.map(lambda *xs: np.concatenate(xs, axis=1), *self._parts)


def draw_bytes(engine: Engine) -> int:
    """One draw of all chains."""
    return engine.num_chains * sum(math.prod(s.shape) * s.dtype.itemsize for s in jax.tree.leaves(engine.record_shapes))


class Draws(Keeper):
    """Room for ``most`` states of every chain in memory. num_kept: (C,), those that are there."""

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
        """Back to the last draw that every chain has."""
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
