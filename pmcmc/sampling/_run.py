"""From a tuned kernel to draws: segments solved one after the other, with a sequential fallback that loses nothing."""

import math
import time
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from pmcmc._jit import TunedJit
from pmcmc._types import Array, PyTree
from pmcmc.kernels import Kernel
from pmcmc.recurrence import RESULTS, MultipleShooting, RecurrenceSolver, Sequential
from pmcmc.recurrence._shooting import CHUNK
from pmcmc.sampling._segment import Segment, draw_noise, solve_segment
from pmcmc.target import Target

# Noise, states and info of one segment, for all chains: what one solve may hold at a time.
SEGMENT_BYTES = 512 * 2**20


class Start(NamedTuple):
    """Where a run begins. guesses: a bank of unknowns. scale: of the unknown, or None where it is not known."""

    target: Target
    kernel: Kernel
    chain_keys: Array
    x0: PyTree
    guesses: PyTree
    scale: Array | None


@dataclass
class Draws:
    """What a run collects on its way."""

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
    compile_seconds: float = 0.0
    solve_seconds: float = 0.0
    last_state: PyTree = None


def segment_length(start: Start, num_steps: int) -> int:
    """Steps per segment: the run cut evenly into as few pieces as the budget of bytes allows."""
    target, kernel = start.target, start.kernel
    key = jax.eval_shape(lambda: start.chain_keys[0])
    noise = jax.eval_shape(lambda k: kernel.sample_noise(k, target), key)
    x0 = jax.eval_shape(lambda x: jax.tree.map(lambda v: v[0], x), start.x0)
    _, info = jax.eval_shape(lambda x, n: kernel.transition(target)(x, n), x0, noise)
    per_step = sum(math.prod(s.shape) * s.dtype.itemsize for s in jax.tree.leaves((noise, x0, x0, info)))
    pieces = math.ceil(num_steps * per_step * len(start.chain_keys) / SEGMENT_BYTES)
    return math.ceil(num_steps / pieces)


def run(start: Start, solver: RecurrenceSolver, num_steps: int, length: int, thinning: int, progress: Any) -> Draws:
    """Sample ``num_steps`` steps of every chain in segments of ``length``.

    Where a segment is not solved, its certified prefix is kept and the rest of the run is sampled sequentially.

    Raises:
        RuntimeError: a state is not finite even when sampled sequentially.
    """
    draws, done, x = Draws(), 0, start.x0
    if isinstance(solver, MultipleShooting) and solver.num_blocks:
        # a whole number of chunks a block: spares the padding of a last block, and is written fastest
        unit = solver.num_blocks * (CHUNK if length >= 4 * CHUNK * solver.num_blocks else 1)
        length = math.ceil(length / unit) * unit
        draws.num_blocks = solver.num_blocks
    while done < num_steps:
        segment = _timed_segment(start, solver, x, done, length, draws)
        wanted = min(length, num_steps - done)
        keep = _certified(segment, wanted)
        _collect(draws, segment, done, keep, thinning, isinstance(solver, Sequential))
        if keep:
            x = jax.tree.map(lambda v, keep=keep: v[:, keep - 1], segment.solution.value)
        done += keep
        progress.update(keep)
        if keep < wanted:
            solver = _fall_back(draws, segment, solver, done, num_steps)
    draws.last_state = x
    return draws


def _timed_segment(start: Start, solver, x, done: int, length: int, draws: Draws) -> Segment:
    def timed(program: TunedJit, *args: Any, **static: Any) -> Any:
        begin = time.perf_counter()
        program.compile(*args, **static)
        compiled = time.perf_counter()
        result = jax.block_until_ready(program(*args, **static))
        draws.compile_seconds += compiled - begin
        draws.solve_seconds += time.perf_counter() - compiled
        return result

    target, kernel, first = start.target, start.kernel, jnp.asarray(done)
    noise = timed(draw_noise, target, kernel, start.chain_keys, first, num_steps=length)
    return timed(solve_segment, target, kernel, solver, noise, x, first, start.guesses, start.scale)


def _certified(segment: Segment, wanted: int) -> int:
    """Steps of the segment that stand for every chain."""
    solved = np.asarray(segment.solution.result) == RESULTS.successful
    steps = np.where(solved, wanted, np.asarray(segment.solution.stats.certified_steps))
    return int(min(wanted, steps.min()))


def _collect(draws: Draws, segment: Segment, done: int, keep: int, thinning: int, sequential: bool) -> None:
    solution, stats = segment.solution, segment.solution.stats
    first = -(done + 1) % thinning
    cut = lambda tree: jax.tree.map(lambda v: np.asarray(v[:, first:keep:thinning]), tree)
    draws.unknowns.append(cut(solution.value))
    draws.info.append(cut(solution.aux))
    draws.near_ties = draws.near_ties + np.asarray(jnp.sum(segment.near_ties[:, :keep], axis=1))
    draws.critical_path = draws.critical_path + np.asarray(stats.num_sequential_steps)
    if sequential:
        return
    draws.num_iters = np.maximum(draws.num_iters, np.asarray(stats.num_iters))
    draws.num_sweeps = np.maximum(draws.num_sweeps, np.asarray(stats.num_sweeps))
    draws.certified_steps = draws.certified_steps + np.full(len(solution.result), keep)
    draws.growth.append(np.asarray(stats.growth_rate))
    draws.result = np.asarray(solution.result)
    if (draws.result == RESULTS.successful).all():
        draws.residual = np.maximum(draws.residual, np.asarray(solution.residual))


def _fall_back(draws: Draws, segment: Segment, solver, done: int, num_steps: int) -> RecurrenceSolver:
    codes = np.asarray(segment.solution.result)
    worst = RESULTS(int(codes[codes != RESULTS.successful][0]))
    if isinstance(solver, Sequential):
        raise RuntimeError(
            f"a chain reached a state that is not finite at step {done + 1}. Check the kernel and the density there: "
            "proposals that are NaN are rejected, so the state itself must have overflowed."
        )
    draws.fallback = (
        f"{worst.name}: {worst.message} The first {done:,} steps were kept; the remaining {num_steps - done:,} were "
        "sampled sequentially."
    )
    return Sequential()


def join(parts: list) -> Any:
    """Segments joined along the draw axis."""
    return parts[0] if len(parts) == 1 else jax.tree.map(lambda *xs: np.concatenate(xs, axis=1), *parts)
