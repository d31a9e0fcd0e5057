"""Sample from a tuned kernel in segments, stretches of steps that are solved one after the other.

`Run` takes all steps of all chains. After each segment it keeps the certified steps and passes the draws to a `Keeper`;
if a parallel solver fails, the remaining steps are sampled sequentially. `Counts` adds up what the segments report.

`Keeper` is the interface of the places where draws go. `Draws` keeps them in memory; `pmcmc.sampling.store` writes them
to disk. `Thinned` keeps a bounded number of draws out of a stream of unknown length.
"""

import abc
import math
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple

import jax
import numpy as np

from pmcmc._progress import Progress
from pmcmc._pytree import PyTree
from pmcmc.chain.report import by_result, span
from pmcmc.kernels import Info
from pmcmc.planning.plan import Pace
from pmcmc.recurrence import RESULTS, RecurrenceSolver, Sequential
from pmcmc.sampling.engine import Engine, Segment
from pmcmc.sampling.programs import Shape
from pmcmc.sampling.threads import Clock


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
        """Info of the newest draws of the run, arrays (C, n)."""

    @property
    @abc.abstractmethod
    def moves(self) -> Moves:
        """Summary of all draws of the run."""

    @property
    @abc.abstractmethod
    def some(self) -> tuple[PyTree, int]:
        """Unknowns of every k-th draw of all chains, (C, n, ...), and k; in memory also of the draws before the run."""


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
    """Draws in memory, after those of the chain that the run extends.

    Args:
        engine: Engine of the run; gives the shapes of a draw.
        most: Draws per chain of this run for which memory is allocated.
        first: Unknowns and info of the draws before this run, which are copied; None if there are none.

    Attributes:
        num_kept: Number of draws of each chain so far, those before this run included; shape (C,).
    """

    in_step = False

    def __init__(self, engine: Engine, most: int, first: tuple[PyTree, Info] | None = None):
        self._num_before = 0 if first is None else first[1].margin.shape[1]
        room = lambda s: np.empty((engine.num_chains, self._num_before + most, *s.shape), s.dtype)
        self._rooms = jax.tree.map(room, engine.record_shapes)
        self.num_kept = np.full(engine.num_chains, self._num_before)
        if first is not None:
            jax.tree.map(lambda room, x: room.__setitem__(np.s_[:, : self._num_before], x), self._rooms, first)

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
    def num_new(self) -> int:
        """Number of draws of this run that every chain has."""
        return int(self.num_kept.min()) - self._num_before

    @property
    def kept(self) -> tuple[PyTree, Info]:
        """Unknowns and info of the draws that every chain has, (C, n, ...)."""
        return jax.tree.map(lambda x: x[:, : self.num_kept.min()], self._rooms)

    @property
    def info(self):
        return jax.tree.map(lambda x: x[:, self._num_before :], self.kept[1])

    @property
    def some(self):
        return self.kept[0], 1

    @property
    def moves(self):
        info = self.info
        return Moves(
            np.full(len(self.num_kept), info.margin.shape[1]),
            np.asarray(info.acceptance_rate, float).mean(axis=1),
            np.asarray(info.is_divergent).sum(axis=1),
            bool(np.isfinite(info.margin).any()),
        )


@dataclass
class Counts:
    """Totals of a run over its segments. Arrays have one entry per chain, shape (C,).

    Attributes:
        near_ties: Accept decisions within rounding of a tie.
        num_leapfrogs: Leapfrog steps; NaN if the kernel does not count them.
        critical_path: Steps taken one after the other.
        num_iters: Newton-type iterations.
        num_sweeps: Largest number of repair sweeps of a segment.
        certified_steps: Steps solved in parallel and kept; all others were sampled sequentially.
        solved_from: Number of the first of them. They are one stretch: a run that leaves a parallel solver does not
            come back to one.
        residual: Largest residual of the certified steps; NaN if a solver did not report that of a prefix.
        result: `RESULTS` code of the last parallel solve that ended; successful if there was none.
        growth: Sum of the growth rates of the segments that measured one.
        num_growths: Number of these segments.
        num_blocks: Blocks per chain of the last parallel solve; 1 if there was none.
        fallback: Why and when the parallel solver was left, for the report; "" if it was not.
    """

    near_ties: np.ndarray
    num_leapfrogs: np.ndarray
    critical_path: np.ndarray
    num_iters: np.ndarray
    num_sweeps: np.ndarray
    certified_steps: np.ndarray
    solved_from: np.ndarray
    residual: np.ndarray
    result: np.ndarray
    growth: np.ndarray
    num_growths: np.ndarray
    num_blocks: int = 1
    fallback: str = ""

    @classmethod
    def zero(cls, num_chains: int) -> "Counts":
        """Return the totals before the first segment."""
        count, total = lambda: np.zeros(num_chains, int), lambda: np.zeros(num_chains)
        return cls(
            near_ties=count(),
            num_leapfrogs=total(),
            critical_path=count(),
            num_iters=count(),
            num_sweeps=count(),
            certified_steps=count(),
            solved_from=count(),
            residual=total(),
            result=np.full(num_chains, RESULTS.successful),
            growth=total(),
            num_growths=count(),
        )


class NonFiniteState(RuntimeError):
    """A chain sampled sequentially reached a state that is not finite.

    Attributes:
        chain: A `Chain` of the earlier draws, as far as all chains have them; for a stream the `StoredChain` of the
            last checkpoint. None if there are no such draws.

    Example:
        >>> import jax.numpy as jnp, pmcmc
        >>> try:
        ...     chain = pmcmc.sample(lambda x: -jnp.sum(x**2), jnp.zeros(2), 0, num_samples=100, progress_bar=False)
        ... except pmcmc.NonFiniteState as failed:
        ...     chain = failed.chain
    """

    chain: Any = None


class Run:
    """One run: ``num_steps`` steps of every chain, taken in segments.

    Chains are at the same step until a solve is certified further for some chains than for others. Every
    ``thinning``-th state is kept.

    Args:
        engine: Engine of the run.
        x0: Unknowns before the first step, leading axis C.
        num_steps: Steps per chain.
        thinning: Steps per kept draw.
        progress: Progress bar.
        draws: Where kept draws go.
        num_unkept: Steps since the last kept draw, taken before this run.
        num_planned: Steps of an interrupted run that this run finishes; the segments have the same lengths as in that
            run. None: ``num_steps``.

    Attributes:
        x: Unknowns after the last final step of each chain, leading axis C.
        position: Steps of each chain that are final; shape (C,).
        counts: Totals over the segments.
        moved: For each leaf of an unknown, which entries moved, or are discrete and may keep their value; (C, ...).
        sequential_pace: Seconds of a sequential step.
        is_solving: Whether a segment is being solved, so that none of it is stored.
    """

    def __init__(
        self,
        engine: Engine,
        x0: PyTree,
        num_steps: int,
        thinning: int,
        progress: Progress,
        draws: Keeper,
        num_unkept: int = 0,
        num_planned: int | None = None,
    ):
        self.engine, self.x, self.num_steps, self.thinning, self.progress = engine, x0, num_steps, thinning, progress
        self.draws, self.num_unkept, self.is_solving = draws, num_unkept, False
        self.num_planned = num_steps if num_planned is None else num_planned
        self.position = np.zeros(engine.num_chains, int)
        self.counts = Counts.zero(engine.num_chains)
        kept = jax.tree.map(lambda x, flag: np.full(np.shape(x), flag), x0, engine.kernel.discrete(x0))
        self.moved = jax.tree.leaves(kept)
        self.sequential_pace = Pace()

    @property
    def done(self) -> int:
        """Number of steps that are final in every chain."""
        return int(self.position.min())

    @property
    def left(self) -> int:
        """Number of steps that the chain furthest behind still has to take."""
        return self.num_steps - self.done

    def with_solver(self, solver: RecurrenceSolver) -> None:
        """Take the remaining steps by one solver, in as few segments as memory allows.

        If a segment fails, the rest is sampled sequentially.
        """
        if solver.is_sequential:
            self.sequentially()
            return
        shape = self.engine.shape_for(solver, self.num_planned)
        while self.left:
            _, failed, _ = self.take(solver, shape, self.left)
            if failed:
                self.fall_back(failed)
                return

    def sequentially(self) -> None:
        """Sample the remaining steps sequentially."""
        shape = self.engine.shape_for(Sequential(), self.num_planned)
        while self.left:
            self.take(Sequential(), shape, self.left)

    def fall_back(self, why: str) -> None:
        """Sample the remaining steps sequentially, and record why for the report."""
        solved, left = self.counts.certified_steps, self.num_steps - self.position
        in_order = self.position - solved
        stands = f"{span(solved)} steps of each chain had" if solved.any() else "No step had"
        before = f" and {span(in_order)} sampled sequentially" if in_order.any() else ""
        self.counts.fallback = (
            f"{why} {stands} been solved in parallel{before}; {span(left)} were left to sequential sampling."
        )
        self.sequentially()

    def take(self, solver: RecurrenceSolver, shape: Shape, wanted: int) -> tuple[Segment, str, Clock]:
        """Solve one segment and keep its certified steps.

        Args:
            solver: Solver of this segment.
            shape: Shape for which its programs are compiled.
            wanted: Steps per chain; fewer are taken if fewer are left, or if the shape has no room for them.

        Returns:
            The segment, why not all of its steps were certified ("" if all were), and the seconds it took.

        Raises:
            NonFiniteState: A state is not finite even when sampled sequentially.
        """
        # Choose the block length: solvers that walk take any multiple of their unit up to the capacity.
        wanted, block_length = min(wanted, self.left), shape.capacity
        if solver.walks:
            unit = math.gcd(shape.capacity, solver.unit)
            block_length = min(shape.capacity, math.ceil(math.ceil(wanted / shape.num_blocks) / unit) * unit)
        wanted = min(wanted, block_length * shape.num_blocks)
        self.progress.solve((jax.tree.structure(solver), shape))
        self.is_solving = True
        segment, clock = self.engine.solve(solver, shape, self.x, self.position, block_length)
        self.is_solving = False
        if solver.is_sequential:
            self.sequential_pace.add(wanted, clock.run_seconds)
        # Keep what is certified: all steps of a successful chain, otherwise a prefix.
        stands = np.where(segment.result == RESULTS.successful, wanted, segment.stats.certified_steps)
        # Chains that are ahead of others may have fewer steps left than were solved for.
        ends = np.minimum(wanted, self.num_steps - self.position)
        result, keep = np.where(stands < ends, segment.result, RESULTS.successful), np.minimum(stands, ends)
        if self.draws.in_step:
            keep = np.full_like(keep, keep.min())
        self._collect(segment, keep, solver, result)
        self.draws.settle(not self.left)
        if not (stands < ends).any():
            return segment, "", clock
        if solver.is_sequential:
            finite = self.position - keep + stands  # steps of each chain
            chain = int(np.argmin(np.where(stands < ends, finite, np.max(finite) + 1)))
            step = self.engine.origin + int(finite[chain]) + 1
            raise NonFiniteState(
                f"chain {chain} reached a state that is not finite at step {step}. NaN proposals are rejected, so the "
                "state itself overflowed: check kernel and density. Earlier draws are its attribute `chain`."
            )
        said = [f"{what}: {code.message.split('. ')[0].rstrip('.')}." for code, what in by_result(result) if code]
        return segment, " ".join(said), clock

    def _collect(self, segment: Segment, keep: np.ndarray, solver: RecurrenceSolver, result: np.ndarray) -> None:
        """Keep the first steps of a segment: copy their draws and update positions and counts.

        Args:
            segment: The segment, whose memory is overwritten by the next one.
            keep: Number of steps to keep; shape (C,).
            solver: Solver of the segment.
            result: `RESULTS` codes of the steps that were wanted; shape (C,).
        """
        # Copy the draws, which are the states after every `thinning`-th step.
        counts, stats = self.counts, segment.stats
        path, info, near_ties = segment.chains()
        before = self.done
        first = -(self.num_unkept + self.position + 1) % self.thinning
        self.draws.add(path, info, [slice(f, n, self.thinning) for f, n in zip(first, keep, strict=True)])
        total = lambda x: np.array([row[:steps].sum() for row, steps in zip(x, keep, strict=True)])
        counts.near_ties += total(near_ties)
        counts.num_leapfrogs += np.nan if info.num_integration_steps is None else total(info.num_integration_steps)
        # Move to the last kept state, and note which coordinates moved.
        last = lambda old, x: np.stack([x[c, n - 1] if n else old[c] for c, n in enumerate(keep)])
        self.x = jax.tree.map(np.asarray, self.x)  # in numpy: every JAX operation is a program to compile
        self._watch(path, keep)
        self.x = jax.tree.map(last, self.x, path)
        self.position += keep
        self.progress.update(self.done - before, int(stats.num_sweeps.max()))
        # Add to the counts; sequential steps need no certificate.
        if solver.is_sequential:
            counts.critical_path += keep
            return
        counts.critical_path += stats.num_sequential_steps
        counts.num_blocks = segment.num_blocks
        counts.num_iters += stats.num_iters
        counts.num_sweeps = np.maximum(counts.num_sweeps, stats.num_sweeps)
        counts.solved_from = np.where(counts.certified_steps > 0, counts.solved_from, self.position - keep)
        counts.certified_steps += keep
        growth = stats.growth_rate
        counts.growth += np.where(np.isfinite(growth), growth, 0.0)
        counts.num_growths += np.isfinite(growth)
        counts.result, held = result, segment.result == RESULTS.successful
        # If a solve failed, the residual is that of its certified prefix, which contains the kept steps.
        prefix = np.nan if stats.certified_residual is None else stats.certified_residual
        residual = np.where(held, segment.residual, prefix)
        counts.residual = np.maximum(counts.residual, np.where(keep > 0, residual, 0.0))

    def _watch(self, path: PyTree, keep: np.ndarray) -> None:
        """Update `moved` by the last kept step, and by all kept steps if that one leaves an entry unmoved."""
        for moved, old, x in zip(self.moved, jax.tree.leaves(self.x), jax.tree.leaves(path), strict=True):
            for c, n in enumerate(keep):
                for rows in (slice(max(n - 1, 0), n), slice(0, n)):
                    if not moved[c].all():
                        moved[c] |= (x[c, rows] != old[c]).any(axis=0)
