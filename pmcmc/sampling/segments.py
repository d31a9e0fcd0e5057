"""From a tuned kernel to draws: stretches of steps solved one after the other, none of them lost."""

import math
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np

from pmcmc._progress import Progress
from pmcmc._pytree import is_real
from pmcmc._typing import PyTree
from pmcmc.chain.report import by_result, span
from pmcmc.planning.schedule import Pace
from pmcmc.recurrence import RESULTS, RecurrenceSolver, Sequential
from pmcmc.sampling.programs import Clock, Engine, Segment, Shape
from pmcmc.sampling.sinks import Keeper


@dataclass
class Counts:
    """What a run counts on its way, per chain.

    certified_steps: solved in parallel; all others were sampled sequentially. residual: the largest among them, NaN
        where a solver did not tell that of a prefix. result: of the last parallel solve. fallback: for the report.
    growth: sum over segments of the growth rates that they saw. num_growths: how many did.
    """

    near_ties: np.ndarray
    critical_path: np.ndarray
    num_iters: np.ndarray
    num_sweeps: np.ndarray
    certified_steps: np.ndarray
    residual: np.ndarray
    result: np.ndarray
    growth: np.ndarray
    num_growths: np.ndarray
    num_blocks: int = 1
    fallback: str = ""

    @classmethod
    def zero(cls, num_chains: int) -> "Counts":
        """Nothing was solved yet."""
        count, total = lambda: np.zeros(num_chains, int), lambda: np.zeros(num_chains)
        return cls(
            near_ties=count(),
            critical_path=count(),
            num_iters=count(),
            num_sweeps=count(),
            certified_steps=count(),
            residual=total(),
            result=np.full(num_chains, RESULTS.successful),
            growth=total(),
            num_growths=count(),
        )


class NonFiniteState(RuntimeError):
    """A chain reached a state that is not finite, sampled sequentially as well.

    A proposal that is NaN is rejected, so the state itself overflowed. Check the kernel and the density there.

    chain: a `Chain` of the draws that all chains have from before; of a stream the `StoredChain` of the last
        checkpoint. None where there are none.

    Example:
        >>> import jax.numpy as jnp, pmcmc
        >>> try:
        ...     chain = pmcmc.sample(lambda x: -jnp.sum(x**2), jnp.zeros(2), 0, num_samples=100, progress_bar=False)
        ... except pmcmc.NonFiniteState as failed:
        ...     chain = failed.chain
    """

    chain: Any = None


class Run:
    """Takes ``num_steps`` steps of every chain; ``position`` of them stand, and ``x`` is where they ended.

    Chains stand at the same step until a solve holds longer for some than for others. Every ``thinning``-th state is
    kept; ``num_unkept`` steps went by since the last such one.
    num_planned: steps that a run had of which these are the last; it is cut into segments as that run was.
    moved: by leaf of an unknown, (C, ...) where chains have moved; true of integers, which may well keep a value.
    in_order: what steps take that are taken in order.
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
        self.draws, self.num_unkept = draws, num_unkept
        self.num_planned = num_steps if num_planned is None else num_planned
        self.position = np.zeros(engine.num_chains, int)
        self.counts = Counts.zero(engine.num_chains)
        self.moved = [np.full(np.shape(x), not is_real(x)) for x in jax.tree.leaves(x0)]
        self.sequential_pace = Pace()

    @property
    def done(self) -> int:
        """Steps that stand of every chain."""
        return int(self.position.min())

    @property
    def left(self) -> int:
        """Steps that some chain still has to take."""
        return self.num_steps - self.done

    def with_solver(self, solver: RecurrenceSolver) -> None:
        """The rest of the run by one solver in as few segments as memory allows, sequentially where it fails."""
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
        """The rest of the run in order."""
        shape = self.engine.shape_for(Sequential(), self.num_planned)
        while self.left:
            self.take(Sequential(), shape, self.left)

    def fall_back(self, why: str) -> None:
        """The rest of the run in order, and say so."""
        solved, left = self.counts.certified_steps, self.num_steps - self.position
        in_order = self.position - solved
        stands = f"{span(solved)} steps of each chain had" if solved.any() else "No step had"
        before = f" and {span(in_order)} sampled sequentially" if in_order.any() else ""
        self.counts.fallback = (
            f"{why} {stands} been solved in parallel{before}; the {span(left)} left were sampled sequentially."
        )
        self.sequentially()

    def take(self, solver: RecurrenceSolver, shape: Shape, wanted: int) -> tuple[Segment, str, Clock]:
        """Solve for ``wanted`` steps of every chain or as many as the shape holds, and keep those that stand.

        Returns the segment, why it did not stand to its end ("" where it did), and the seconds it took.

        Raises:
            NonFiniteState: a state is not finite even when sampled sequentially.
        """
        wanted, block_length = min(wanted, self.left), shape.capacity
        if solver.walks:
            unit = math.gcd(shape.capacity, solver.unit)
            block_length = min(shape.capacity, math.ceil(math.ceil(wanted / shape.num_blocks) / unit) * unit)
        wanted = min(wanted, block_length * shape.num_blocks)
        self.progress.solve((jax.tree.structure(solver), shape))
        segment, clock = self.engine.solve(solver, shape, self.x, self.position, block_length)
        if solver.is_sequential:
            self.sequential_pace.add(wanted, clock.run_seconds)
        codes = np.asarray(segment.solution.result)
        stands = np.where(codes == RESULTS.successful, wanted, np.asarray(segment.solution.stats.certified_steps))
        # chains that are ahead of others may have less to do
        ends = np.minimum(wanted, self.num_steps - self.position)
        result, keep = np.where(stands < ends, codes, RESULTS.successful), np.minimum(stands, ends)
        if self.draws.in_step:
            keep = np.full_like(keep, keep.min())
        self._collect(segment, keep, solver, result)
        self.draws.settle(not self.left)
        if not (stands < ends).any():
            return segment, "", clock
        if solver.is_sequential:
            raise NonFiniteState(
                f"a chain reached a state that is not finite at step {self.done + 1}. Check the kernel and the density "
                "there: proposals that are NaN are rejected, so the state itself must have overflowed. Draws from "
                "before, if there are any, are the attribute `chain` of this exception."
            )
        said = [f"{what}: {code.message.split('. ')[0].rstrip('.')}." for code, what in by_result(result) if code]
        return segment, " ".join(said), clock

    def _collect(self, segment: Segment, keep: np.ndarray, solver: RecurrenceSolver, result: np.ndarray) -> None:
        """Copy the first ``keep`` (C,) steps: the segment's own memory is overwritten by the next one.

        result: (C,) of the steps that were wanted.
        """
        counts, solution, stats = self.counts, segment.solution, segment.solution.stats
        path, info, near_ties = segment.chains((solution.value, solution.aux, segment.near_ties))
        before = self.done
        first = -(self.num_unkept + self.position + 1) % self.thinning
        self.draws.add(path, info, [slice(f, n, self.thinning) for f, n in zip(first, keep, strict=True)])
        counts.near_ties += [ties[:steps].sum() for ties, steps in zip(near_ties, keep, strict=True)]
        last = lambda old, x: np.stack([x[c, n - 1] if n else old[c] for c, n in enumerate(keep)])
        self.x = jax.tree.map(np.asarray, self.x)  # every operation of jax's own is one more program to compile
        self._watch(path, keep)
        self.x = jax.tree.map(last, self.x, path)
        self.position += keep
        self.progress.update(self.done - before, int(np.max(stats.num_sweeps)))
        if solver.is_sequential:
            counts.critical_path += keep
            return
        counts.critical_path += np.asarray(stats.num_sequential_steps)
        counts.num_blocks = segment.num_blocks
        counts.num_iters = np.maximum(counts.num_iters, np.asarray(stats.num_iters))
        counts.num_sweeps = np.maximum(counts.num_sweeps, np.asarray(stats.num_sweeps))
        counts.certified_steps += keep
        growth = np.asarray(stats.growth_rate)
        counts.growth += np.where(np.isfinite(growth), growth, 0.0)
        counts.num_growths += np.isfinite(growth)
        counts.result, held = result, np.asarray(solution.result) == RESULTS.successful
        # where a solve did not hold to its end, of the prefix that did, of which no more is kept
        prefix = np.nan if stats.certified_residual is None else np.asarray(stats.certified_residual)
        residual = np.where(held, np.asarray(solution.residual), prefix)
        counts.residual = np.maximum(counts.residual, np.where(keep > 0, residual, 0.0))

    def _watch(self, path: PyTree, keep: np.ndarray) -> None:
        """See what moved: mostly the ends tell, and what lies between them is looked at only where they do not."""
        for moved, old, x in zip(self.moved, jax.tree.leaves(self.x), jax.tree.leaves(path), strict=True):
            for c, n in enumerate(keep):
                for rows in (slice(max(n - 1, 0), n), slice(0, n)):
                    if not moved[c].all():
                        moved[c] |= (x[c, rows] != old[c]).any(axis=0)
