"""Blocks of multiple shooting on their way: which steps are taken when, and where repairs merge."""

import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from pmcmc._types import PyTree
from pmcmc.chain import Chain
from pmcmc.plots._axes import axes_for
from pmcmc.recurrence import MultipleShooting
from pmcmc.sampling._sampling import restarted


class Front(NamedTuple):
    """One run of one block: so many steps from its start, begun when so many had been taken one after the other."""

    sweep: int
    block: int
    begin: int
    num_steps: int
    merged: bool


def merge_fronts(chain: Chain, num_steps: int = 2048, num_blocks: int = 16, *, number: int = 0, ax: Any = None) -> Any:
    """Space and time of shooting: the step of the chain against the steps taken one after the other.

    The first steps of a chain are solved again in blocks, once for every sweep. All blocks run at once (grey), then
    repairs start from the ends of their predecessors and run until they merge (dots) with what was recorded. Sequential
    sampling would follow the dashed line.

    chain: its noise and tuned kernel are used; the draws themselves are not.
    num_steps, num_blocks: of the picture.
    number: which of the chains.
    ax: matplotlib axes to draw into.

    Returns:
        The axes.

    Raises:
        ValueError: there is no such chain, or fewer than two steps a block.

    Example:
        >>> import jax.numpy as jnp, pmcmc
        >>> chain = pmcmc.sample(lambda x: -0.5 * jnp.sum(x**2), jnp.zeros(2), 0, num_samples=100, progress_bar=False)
        >>> pmcmc.plots.merge_fronts(chain, number=4)
        Traceback (most recent call last):
        ValueError: number must lie in 0..3, the chains there are, got 4.
    """
    if not 0 <= number < chain.num_chains:
        raise ValueError(f"number must lie in 0..{chain.num_chains - 1}, the chains there are, got {number}.")
    if num_blocks < 2 or num_steps < 2 * num_blocks:
        raise ValueError(
            f"num_steps={num_steps} in num_blocks={num_blocks}: expected at least 2 blocks of at least 2 steps."
        )
    (ax,) = axes_for(ax, figsize=(9, 4))  # first: what follows samples
    length = math.ceil(num_steps / num_blocks)
    fronts, depth = _fronts(_recordings(chain, length, num_blocks, number), length)
    last = fronts[-1].sweep
    for front in fronts:
        start = front.block * length
        colour = "0.7" if front.sweep == 0 else f"C{(front.sweep - 1) % 10}"
        end = (start + front.num_steps, front.begin + front.num_steps)
        ax.plot([start, end[0]], [front.begin, end[1]], color=colour, lw=1.2)
        if front.merged:
            ax.plot(*end, marker="o", ms=3.5, color=colour)
    for sweep in range(last + 1):
        label = f"sweep {sweep}" if sweep else "all blocks from guesses"
        ax.plot([], [], color="0.7" if sweep == 0 else f"C{(sweep - 1) % 10}", label=label)
    ax.plot([0, 1.1 * depth], [0, 1.1 * depth], color="0.3", lw=0.8, ls="--", label="in order")
    ax.set(
        xlim=(0, length * num_blocks),
        ylim=(0, 1.1 * depth),
        xlabel="step of the chain",
        ylabel="steps one after the other",
        title=f"{length * num_blocks:,} steps in {depth:,}",
    )
    ax.legend(frameon=False, fontsize="small", loc="upper left", bbox_to_anchor=(1, 1))
    return ax


def _recordings(chain: Chain, length: int, num_blocks: int, number: int) -> list[PyTree]:
    """What is recorded after each sweep, the zeroth included; arrays (num_blocks, length, ...)."""
    engine, x0 = restarted(chain.state, number)
    recordings: list[PyTree] = []
    for sweep in range(num_blocks + 1):
        # a budget of one block's steps leaves nothing for repairs; both limits are numbers of one program
        most = jnp.asarray(length if sweep == 0 else num_blocks * (num_blocks + 1) * length)
        solver = MultipleShooting(num_blocks, max_sweeps=jnp.asarray(max(sweep, 1)), max_steps=most)
        shape = engine.shape_for(solver, num_blocks * length)
        segment, _ = engine.solve(solver, shape, x0, np.zeros(1, int), length)
        blocks = lambda x: np.asarray(x)[:, :length].copy()
        recordings.append(jax.tree.map(blocks, segment.solution.value))
        if int(segment.solution.stats.num_sweeps[0]) < sweep:
            break
    return recordings


def _fronts(recordings: list[PyTree], length: int) -> tuple[list[Front], int]:
    """All runs of blocks, and the steps taken one after the other: a repair wrote where two recordings differ."""
    num_blocks = jax.tree.leaves(recordings[0])[0].shape[0]
    fronts = [Front(0, block, 0, length, False) for block in range(num_blocks)]
    active, depth = np.arange(num_blocks) > 0, length
    for sweep in range(1, len(recordings)):
        if not active.any():
            break
        differs = np.zeros((num_blocks, length), bool)
        for old, new in zip(*map(jax.tree.leaves, recordings[sweep - 1 : sweep + 1]), strict=True):
            differs |= (old != new).reshape(num_blocks, length, -1).any(axis=2)
        written = np.where(differs.any(axis=1), length - np.argmax(differs[:, ::-1], axis=1), 0)
        merged = written < length
        taken = np.minimum(written + 1, length)  # the step that merges is taken and not written
        fronts += [Front(sweep, int(b), depth, int(taken[b]), bool(merged[b])) for b in np.flatnonzero(active)]
        depth += int(taken[active].max())
        active = np.concatenate([[False], (active & ~merged)[:-1]])
    return fronts, depth
