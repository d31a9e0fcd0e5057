"""From a tuned kernel to draws: stretches of steps solved one after the other, none of them lost."""

import math
from dataclasses import dataclass, field
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from pmcmc._types import PyTree
from pmcmc.recurrence import RESULTS, MultipleShooting, RecurrenceSolver, Sequential
from pmcmc.recurrence._lanes import LaneSolver
from pmcmc.sampling._engine import Clock, Engine, Segment, Shape


@dataclass
class Draws:
    """What a run collects on its way; counts are per chain."""

    unknowns: list = field(default_factory=list)
    info: list = field(default_factory=list)
    near_ties: Any = 0
    critical_path: Any = 0
    num_iters: Any = 0
    num_sweeps: Any = 0
    num_blocks: int = 1
    certified_steps: Any = 0
    residual: Any = 0.0
    growth: list = field(default_factory=list)
    result: Any = None
    fallback: str = ""


class Run:
    """Takes ``num_steps`` steps of every chain; ``done`` of them stand, and ``x`` is where they ended.

    Every ``thinning``-th state is kept. progress: a bar with ``update(steps)``.
    """

    def __init__(self, engine: Engine, x0: PyTree, num_steps: int, thinning: int, progress: Any):
        self.engine, self.x, self.num_steps, self.thinning, self.progress = engine, x0, num_steps, thinning, progress
        self.done, self.draws = 0, Draws()

    @property
    def left(self) -> int:
        return self.num_steps - self.done

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
        self.draws.fallback = (
            f"{why} The first {self.done:,} steps were kept; the remaining {self.left:,} were sampled sequentially."
        )
        self.sequentially()

    def take(self, solver: RecurrenceSolver, shape: Shape, wanted: int) -> tuple[Segment, str, Clock]:
        """Solve for ``wanted`` steps or as many as the shape holds, and keep those that stand.

        Returns the segment, why it did not stand to its end ("" where it did), and the seconds it took.

        Raises:
            RuntimeError: a state is not finite even when sampled sequentially.
        """
        wanted, block_length = min(wanted, self.left), shape.capacity
        if isinstance(solver, LaneSolver):
            unit = math.gcd(shape.capacity, solver.unit)
            block_length = min(shape.capacity, math.ceil(math.ceil(wanted / shape.num_blocks) / unit) * unit)
        wanted = min(wanted, block_length * shape.num_blocks)
        segment, clock = self.engine.solve(solver, shape, self.x, self.done, block_length)
        codes = np.asarray(segment.solution.result)
        stands = np.where(codes == RESULTS.successful, wanted, np.asarray(segment.solution.stats.certified_steps))
        keep = int(min(wanted, stands.min()))
        self._collect(segment, keep, solver)
        if keep == wanted:
            return segment, "", clock
        if isinstance(solver, Sequential):
            raise RuntimeError(
                f"a chain reached a state that is not finite at step {self.done + 1}. Check the kernel and the density "
                "there: proposals that are NaN are rejected, so the state itself must have overflowed."
            )
        worst = RESULTS(int(codes[codes != RESULTS.successful][0]))
        return segment, f"{worst.name}: {worst.message}", clock

    def _collect(self, segment: Segment, keep: int, solver: RecurrenceSolver) -> None:
        draws, solution, stats = self.draws, segment.solution, segment.solution.stats
        first = -(self.done + 1) % self.thinning
        path, info, near_ties = segment.chains((solution.value, solution.aux, segment.near_ties))
        cut = lambda tree: jax.tree.map(lambda v: v[:, first : keep : self.thinning].copy(), tree)
        draws.unknowns.append(cut(path))
        draws.info.append(cut(info))
        draws.near_ties = draws.near_ties + near_ties[:, :keep].sum(axis=1)
        in_order = isinstance(solver, Sequential)
        draws.critical_path = draws.critical_path + (keep if in_order else np.asarray(stats.num_sequential_steps))
        if keep:
            self.x = jax.tree.map(lambda v: jnp.array(v[:, keep - 1]), path)  # a copy: the path is overwritten
        self.done += keep
        self.progress.update(keep)
        if in_order:
            return
        draws.num_blocks = segment.num_blocks if isinstance(solver, MultipleShooting) else 1
        draws.num_iters = np.maximum(draws.num_iters, np.asarray(stats.num_iters))
        draws.num_sweeps = np.maximum(draws.num_sweeps, np.asarray(stats.num_sweeps))
        draws.certified_steps = draws.certified_steps + np.full(len(solution.result), keep)
        draws.growth.append(np.asarray(stats.growth_rate))
        draws.result = np.asarray(solution.result)
        if (draws.result == RESULTS.successful).all():
            draws.residual = np.maximum(draws.residual, np.asarray(solution.residual))


def join(parts: list) -> Any:
    """Segments joined along the draw axis."""
    return parts[0] if len(parts) == 1 else jax.tree.map(lambda *xs: np.concatenate(xs, axis=1), *parts)
