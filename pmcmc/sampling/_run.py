"""From a tuned kernel to draws: stretches of steps solved one after the other, none of them lost."""

import math
from dataclasses import dataclass, field

import jax
import numpy as np

from pmcmc._types import PyTree
from pmcmc.kernels import Info
from pmcmc.recurrence import RESULTS, MultipleShooting, RecurrenceSolver, Sequential
from pmcmc.recurrence._lanes import LaneSolver
from pmcmc.sampling._engine import Clock, Engine, Segment, Shape
from pmcmc.sampling._progress import Progress


@dataclass
class Draws:
    """What a run collects on its way. Arrays have the chains first; counts are per chain.

    unknowns, info: every kept step, of no meaning behind what was collected.
    """

    unknowns: PyTree
    info: PyTree
    num_kept: np.ndarray
    near_ties: np.ndarray
    critical_path: np.ndarray
    num_iters: np.ndarray
    num_sweeps: np.ndarray
    certified_steps: np.ndarray
    residual: np.ndarray
    result: np.ndarray
    num_blocks: int = 1
    growth: list = field(default_factory=list)
    fallback: str = ""

    @classmethod
    def empty(cls, engine: Engine, num_kept: int) -> "Draws":
        """Room for ``num_kept`` states of every chain."""
        chains = engine.num_chains
        room = lambda s: np.empty((chains, num_kept, *s.shape), s.dtype)
        unknowns, info = jax.tree.map(room, engine.record_shapes)
        zeros = lambda: np.zeros(chains, int)
        return cls(
            unknowns,
            info,
            num_kept=zeros(),
            near_ties=zeros(),
            critical_path=zeros(),
            num_iters=zeros(),
            num_sweeps=zeros(),
            certified_steps=zeros(),
            residual=np.zeros(chains),
            result=np.full(chains, RESULTS.successful),
        )


class Run:
    """Takes ``num_steps`` steps of every chain; ``position`` of them stand, and ``x`` is where they ended.

    Chains stand at the same step until a solve holds longer for some than for others. Every ``thinning``-th state is
    kept; ``num_unkept`` steps went by since the last such one.
    """

    def __init__(
        self, engine: Engine, x0: PyTree, num_steps: int, thinning: int, progress: Progress, num_unkept: int = 0
    ):
        self.engine, self.x, self.num_steps, self.thinning, self.progress = engine, x0, num_steps, thinning, progress
        self.num_unkept = num_unkept
        self.position = np.zeros(engine.num_chains, int)
        self.draws = Draws.empty(engine, (num_unkept + num_steps) // thinning)

    @property
    def done(self) -> int:
        """Steps that stand of every chain."""
        return int(self.position.min())

    @property
    def left(self) -> int:
        """Steps that some chain still has to take."""
        return self.num_steps - self.done

    @property
    def info(self) -> Info:
        """Of the steps kept so far of every chain."""
        return jax.tree.map(lambda x: x[:, : self.draws.num_kept.min()], self.draws.info)

    def with_solver(self, solver: RecurrenceSolver) -> None:
        """The rest of the run by one solver in as few segments as memory allows, sequentially where it fails."""
        if isinstance(solver, Sequential):
            self.sequentially()
            return
        shape = self.engine.shape_for(solver, self.left)
        while self.left:
            _, failed, _ = self.take(solver, shape, self.left)
            if failed:
                self.fall_back(failed)
                return

    def sequentially(self) -> None:
        """The rest of the run in order."""
        shape = self.engine.shape_for(Sequential(), self.num_steps)
        while self.left:
            self.take(Sequential(), shape, self.left)

    def fall_back(self, why: str) -> None:
        """The rest of the run in order, and say so."""
        least, most = self.done, int(self.position.max())
        kept = f"{least:,}" if least == most else f"{least:,} to {most:,}"
        self.draws.fallback = f"{why} The first {kept} steps were kept; the rest was sampled sequentially."
        self.sequentially()

    def take(self, solver: RecurrenceSolver, shape: Shape, wanted: int) -> tuple[Segment, str, Clock]:
        """Solve for ``wanted`` steps of every chain or as many as the shape holds, and keep those that stand.

        Returns the segment, why it did not stand to its end ("" where it did), and the seconds it took.

        Raises:
            RuntimeError: a state is not finite even when sampled sequentially.
        """
        wanted, block_length = min(wanted, self.left), shape.capacity
        if isinstance(solver, LaneSolver):
            unit = math.gcd(shape.capacity, solver.unit)
            block_length = min(shape.capacity, math.ceil(math.ceil(wanted / shape.num_blocks) / unit) * unit)
        wanted = min(wanted, block_length * shape.num_blocks)
        self.progress.solve((jax.tree.structure(solver), shape))
        segment, clock = self.engine.solve(solver, shape, self.x, self.position, block_length)
        codes = np.asarray(segment.solution.result)
        stands = np.where(codes == RESULTS.successful, wanted, np.asarray(segment.solution.stats.certified_steps))
        # chains that are ahead of others may have less to do
        ends = np.minimum(wanted, self.num_steps - self.position)
        keep = np.minimum(stands, ends)
        self._collect(segment, keep, solver)
        if (keep == ends).all():
            return segment, "", clock
        if isinstance(solver, Sequential):
            raise RuntimeError(
                f"a chain reached a state that is not finite at step {self.done + 1}. Check the kernel and the density "
                "there: proposals that are NaN are rejected, so the state itself must have overflowed."
            )
        worst = RESULTS(int(codes[keep < ends][0]))
        return segment, f"{worst.name}: {worst.message}", clock

    def _collect(self, segment: Segment, keep: np.ndarray, solver: RecurrenceSolver) -> None:
        """Copy the first ``keep`` (C,) steps: the segment's own memory is overwritten by the next one."""
        draws, solution, stats = self.draws, segment.solution, segment.solution.stats
        path, info, near_ties = segment.chains((solution.value, solution.aux, segment.near_ties))
        before = self.done
        for chain, steps in enumerate(keep):
            first = -(self.num_unkept + self.position[chain] + 1) % self.thinning
            begin, end = draws.num_kept[chain], draws.num_kept[chain] + len(range(first, steps, self.thinning))

            def copy(room, x, c=chain, rows=slice(first, steps, self.thinning), begin=begin, end=end):
                room[c, begin:end] = x[c, rows]

            jax.tree.map(copy, (draws.unknowns, draws.info), (path, info))
            draws.num_kept[chain] = end
            draws.near_ties[chain] += near_ties[chain, :steps].sum()
        last = lambda old, x: np.stack([x[c, n - 1] if n else old[c] for c, n in enumerate(keep)])
        self.x = jax.tree.map(last, jax.tree.map(np.asarray, self.x), path)
        self.position += keep
        self.progress.update(self.done - before, int(np.max(stats.num_sweeps)))
        if isinstance(solver, Sequential):
            draws.critical_path += keep
            return
        draws.critical_path += np.asarray(stats.num_sequential_steps)
        draws.num_blocks = segment.num_blocks if isinstance(solver, MultipleShooting) else 1
        draws.num_iters = np.maximum(draws.num_iters, np.asarray(stats.num_iters))
        draws.num_sweeps = np.maximum(draws.num_sweeps, np.asarray(stats.num_sweeps))
        draws.certified_steps += keep
        draws.growth.append(np.asarray(stats.growth_rate))
        draws.result = np.asarray(solution.result)
        residual = np.where(draws.result == RESULTS.successful, np.asarray(solution.residual), 0.0)
        draws.residual = np.maximum(draws.residual, residual)
