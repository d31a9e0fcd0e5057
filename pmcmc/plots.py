"""Plot what a run measured. Matplotlib is imported only when a function of this module runs.

`merge_distances` shows how coupled chains approach each other, `merge_fronts` how blocks are solved and repaired,
`newton_iterates` the error of Newton's iterates, `planned_time` the candidates of the plan, and `speedup` the speed-up
against the number of steps. As in ArviZ, each draws into the axes given by ``ax``, or into new ones, and returns them.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from pmcmc._pytree import PyTree, real_dtype, relative_distance
from pmcmc.chain.chain import Chain
from pmcmc.chain.report import SolveReport
from pmcmc.interop import require
from pmcmc.planning import Plan
from pmcmc.recurrence import MultipleShooting, Solution
from pmcmc.recurrence.solution import typical_scale
from pmcmc.sampling.engine import Engine
from pmcmc.stability import Coalescence
from pmcmc.stability.diagnosis import coordinates_of, distances_by_site

__all__ = ["merge_distances", "merge_fronts", "newton_iterates", "planned_time", "speedup"]


def axes_for(ax: Any, num_axes: int = 1, **options: Any) -> np.ndarray:
    """Return the axes to draw into, an array of ``num_axes``.

    Args:
        ax: Axes to draw into; None makes new ones.
        num_axes: Number of axes needed.
        **options: Options of ``matplotlib.pyplot.subplots`` for new axes.

    Raises:
        ValueError: Another number of axes was given.
        ImportError: Matplotlib is not installed.
    """
    if ax is None:
        require(("matplotlib",), "pmcmc.plots", "pmcmc[plots]")
        import matplotlib.pyplot as plt

        _, ax = plt.subplots(1, num_axes, layout="constrained", **options)
    axes = np.atleast_1d(np.asarray(ax, dtype=object)).ravel()
    if len(axes) != num_axes:
        raise ValueError(f"ax must be {num_axes} matplotlib axes, got {len(axes)}: make them with plt.subplots.")
    return axes


def plain_numbers(axis: Any) -> None:
    """Write 20 instead of 2 x 10^1 on a logarithmic axis."""
    from matplotlib.ticker import LogFormatter

    axis.set_major_formatter(LogFormatter(labelOnlyBase=False))
    axis.set_minor_formatter(LogFormatter(labelOnlyBase=False, minor_thresholds=(1.5, 0.5)))


def merge_distances(chain: Chain, max_sites: int = 6, *, ax: Any = None) -> Any:
    """Plot how coupled chains approach each other: distance against steps, for every pair and every site of the model.

    Left: the distance of the largest coordinate in posterior standard deviations, one line for each pair of the pilot;
    the merge tolerance; the slope of the measured Lyapunov exponent. Right: the median over pairs by site at the
    pilot's checkpoints, for the ``max_sites`` sites that stay apart longest.

    Args:
        chain: A chain sampled with ``solver="auto"`` in a run long enough to be planned.
        max_sites: Number of sites to show.
        ax: Two matplotlib axes to draw into.

    Returns:
        The two axes.

    Raises:
        ValueError: The chain has no pilot, or was loaded from a file, which does not hold it.

    Example:
        >>> import jax.numpy as jnp, pmcmc
        >>> chain = pmcmc.sample(lambda x: -0.5 * jnp.sum(x**2), jnp.zeros(2), 0, num_samples=100, progress_bar=False)
        >>> pmcmc.plots.merge_distances(chain)
        Traceback (most recent call last):
        ValueError: this chain has no pilot of coupled chains: ...
    """
    plan = _plan_of(chain.report, "this chain has no pilot of coupled chains")
    if (pilot := plan.coalescence) is None:
        raise ValueError(
            f"this chain has no pilot of coupled chains to plot: {chain.report.reason} Do what this says, or take more "
            "draws."
        )
    left, right = both = axes_for(ax, 2, figsize=(11, 4), sharey=True)
    _draw_pairs(left, pilot)
    _draw_sites(right, chain, pilot, max_sites)
    for axes in both:
        axes.axhline(float(pilot.tol), color="0.4", lw=0.8, ls=":")
        axes.set(yscale="log", xlabel="step")
    left.set(ylabel="distance (posterior sd)", title="Pairs of coupled chains")
    right.set(title="Sites of the model, median over pairs")
    return both


def _plan_of(report: SolveReport, without: str) -> Plan:
    """Return the plan of a run.

    Args:
        report: The report of the run.
        without: What the error says of a chain without a plan.

    Raises:
        ValueError: There is none.
    """
    if report.plan is not None:
        return report.plan
    if report.planned_seconds > 0:
        raise ValueError(
            "this chain was planned, and loaded from a file, which does not hold the plan and its pilot: plot them "
            'before the chain is saved, or sample it again with solver="auto" and the same key.'
        )
    raise ValueError(f'{without}: sample it with solver="auto", and long enough to be planned ({report.reason})')


def _draw_pairs(axes: Any, pilot: Coalescence) -> None:
    """Plot the distance of every pair and the slope of the growth rate."""
    distances, steps = np.asarray(pilot.distances), np.asarray(pilot.steps)
    shown = np.arange(len(distances))[:, None] <= steps
    positive = np.where(shown & (distances > 0), distances, np.nan)
    axes.plot(positive, color="tab:blue", lw=0.6, alpha=0.5)
    axes.plot([], [], color="tab:blue", lw=0.6, label=f"{steps.size} pairs, {int(pilot.merged.sum())} merged")
    rate, near = float(pilot.growth_rate), np.sqrt(float(pilot.tol))
    entered = [int(np.argmax(column < near)) for column in positive.T if np.any(column < near)]
    if np.isfinite(rate) and entered:  # start the slope where the median pair entered the regime of small distances
        after = np.arange(max(1, int(np.log(near) / rate)) if rate < 0 else len(distances))
        label = f"Lyapunov exponent {rate:.3f} a step"
        axes.plot(np.median(entered) + after, near * np.exp(rate * after), color="tab:red", lw=1.5, label=label)
    axes.legend(frameon=False, fontsize="small")


def _draw_sites(axes: Any, chain: Chain, pilot: Coalescence, max_sites: int) -> None:
    """Plot the median distance of the sites that stay apart longest."""
    points = pilot.checkpoints
    reached = np.asarray(points.reached)
    sides = [jax.tree.map(lambda x: jnp.asarray(x)[reached], x) for x in (points.first, points.second)]
    paths = [coordinates_of(chain.target, chain.kernel, side) for side in sides]
    found = distances_by_site(chain.target, paths)
    medians = {name: np.median(d.max(axis=2), axis=1) for name, (d, _) in found.items() if d.size}
    slowest = sorted(medians, key=lambda name: -np.sum(np.log(medians[name] + float(pilot.tol))))[:max_sites]
    for name in slowest:
        axes.plot(np.asarray(points.steps)[reached], np.maximum(medians[name], 1e-300), marker=".", label=name)
    axes.legend(frameon=False, fontsize="small")


class Front(NamedTuple):
    """One run of one block.

    Attributes:
        sweep: Sweep that the run belongs to; 0 for the first, from guesses.
        block: Number of the block.
        begin: Steps taken sequentially before the run began.
        num_steps: Steps of the run, from the start of the block.
        merged: Whether the run merged with the recorded states.
    """

    sweep: int
    block: int
    begin: int
    num_steps: int
    merged: bool


def merge_fronts(chain: Chain, num_steps: int = 2048, num_blocks: int = 16, *, number: int = 0, ax: Any = None) -> Any:
    """Plot space and time of shooting: the step of the chain against the steps taken sequentially.

    The first steps of a chain are solved again in blocks, once for every sweep. All blocks run at once (grey), then
    repairs start from the ends of their predecessors and run until they merge (dots) with what was recorded. Sequential
    sampling would follow the dashed line.

    Args:
        chain: Its noise and tuned kernel are used; its draws are not.
        num_steps: Steps to show.
        num_blocks: Number of blocks to solve them in.
        number: Number of the chain to show.
        ax: Matplotlib axes to draw into.

    Returns:
        The axes.

    Raises:
        ValueError: There is no chain of this number, or a block has fewer than two steps.

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
    (ax,) = axes_for(ax, figsize=(9, 4))  # checked first, since the next line samples
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
    ax.plot([0, 1.1 * depth], [0, 1.1 * depth], color="0.3", lw=0.8, ls="--", label="sequential")
    ax.set(
        xlim=(0, length * num_blocks),
        ylim=(0, 1.1 * depth),
        xlabel="step of the chain",
        ylabel="sequential steps",
        title=f"{length * num_blocks:,} steps in {depth:,}",
    )
    ax.legend(frameon=False, fontsize="small", loc="upper left", bbox_to_anchor=(1, 1))
    return ax


def _recordings(chain: Chain, length: int, num_blocks: int, number: int) -> list[PyTree]:
    """Return what is recorded after each sweep, including sweep 0; arrays (num_blocks, length, ...)."""
    engine, x0 = Engine.of_one_chain(chain.state, number)
    recordings: list[PyTree] = []
    for sweep in range(num_blocks + 1):
        # Sweep 0 has a budget of one block's steps, which leaves nothing for repairs. Both limits are arrays, so that
        # all sweeps run the same program.
        most = jnp.asarray(length if sweep == 0 else num_blocks * (num_blocks + 1) * length)
        solver = MultipleShooting(num_blocks, max_sweeps=jnp.asarray(max(sweep, 1)), max_steps=most)
        shape = engine.shape_for(solver, num_blocks * length)._replace(num_parts=1)  # sweeps of all blocks at once
        segment, _ = engine.solve(solver, shape, x0, np.zeros(1, int), length)
        blocks = lambda x: x.reshape(num_blocks, length, *x.shape[2:]).copy()
        recordings.append(jax.tree.map(blocks, segment.chains()[0]))
        if int(segment.stats.num_sweeps[0]) < sweep:
            break
    return recordings


def _fronts(recordings: list[PyTree], length: int) -> tuple[list[Front], int]:
    """Return all runs of blocks, and the number of steps taken sequentially.

    A repair wrote exactly where two successive recordings differ.
    """
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
        taken = np.minimum(written + 1, length)  # the step at which a repair merges is taken but not written
        fronts += [Front(sweep, int(b), depth, int(taken[b]), bool(merged[b])) for b in np.flatnonzero(active)]
        depth += int(taken[active].max())
        active = np.concatenate([[False], (active & ~merged)[:-1]])
    return fronts, depth


# Largest number of columns of the picture. A column shows the largest error of its steps.
MAX_COLUMNS = 1000


def newton_iterates(solution: Solution, path: PyTree = None, *, scale: PyTree = None, ax: Any = None) -> Any:
    """Plot a heat map of the error of Newton's iterates against the chain, over time t and iteration.

    Below the staircase of solved states (by causality, k iterations solve at least the first k states) contraction
    shows as columns that darken all at once; without contraction a front moves one step per iteration.

    Args:
        solution: Solution of a Newton-type solver with ``num_iterates`` set, as in ``deer(num_iterates=20)``.
        path: The chain to compare with, states with leading axis T; by default the solution itself.
        scale: Spread of each coordinate, the unit of errors; by default that of the path.
        ax: Matplotlib axes to draw into.

    Returns:
        The axes.

    Raises:
        ValueError: The solution holds no iterates.

    Example:
        >>> import jax.numpy as jnp, pmcmc
        >>> solution = pmcmc.recurrence.deer().solve(lambda x, u: 0.5 * x + u, 0.0, jnp.ones(9))
        >>> pmcmc.plots.newton_iterates(solution)
        Traceback (most recent call last):
        ValueError: the solution holds no iterates: ...
    """
    if solution.iterates is None:
        raise ValueError(
            "the solution holds no iterates: solve with a Newton-type solver that keeps them, such as "
            "pmcmc.recurrence.deer(num_iterates=20)."
        )
    path = solution.value if path is None else path
    errors = _errors(solution.iterates, path, typical_scale(path) if scale is None else scale)
    num_iterates, length = errors.shape
    stop = min(num_iterates, int(solution.stats.num_iters) + 1)  # rows after the last iterate repeat it
    width = -(-length // MAX_COLUMNS)
    padded = np.pad(errors[:stop], ((0, 0), (0, -length % width)), mode="edge")
    columns = padded.reshape(stop, -1, width).max(axis=2)
    eps = float(jnp.finfo(real_dtype(path)).eps)
    (ax,) = axes_for(ax, figsize=(8, 3.5))
    image = ax.imshow(
        np.log10(np.clip(columns, eps, 1e3)),
        aspect="auto",
        origin="lower",
        interpolation="nearest",
        extent=(0.5, columns.shape[1] * width + 0.5, -0.5, stop - 0.5),
        cmap="viridis",
        vmin=np.log10(eps),
        vmax=1,
    )
    ax.figure.colorbar(image, ax=ax, label="log10 error (sd of the path)")
    ax.set(xlabel="step t", ylabel="iteration", title="Iterates against the chain", xlim=(0.5, length + 0.5))
    ax.yaxis.get_major_locator().set_params(integer=True)
    return ax


def _errors(iterates: PyTree, path: PyTree, scale: PyTree) -> np.ndarray:
    """Return the largest coordinate's difference, (num_iterates, T); inf where an iterate is not finite."""
    one = lambda iterate: relative_distance(iterate, path, scale)
    return np.asarray(jax.jit(lambda tree: jax.lax.map(one, tree))(iterates))


def planned_time(chain: Chain, max_candidates: int = 8, *, ax: Any = None) -> Any:
    """Plot the seconds that each way of sampling was predicted to take, and the seconds that the chosen one took.

    Args:
        chain: A chain sampled with ``solver="auto"`` in a run long enough to be planned.
        max_candidates: Number of bars besides the chosen one, the cheapest first.
        ax: Matplotlib axes to draw into.

    Returns:
        The axes.

    Raises:
        ValueError: The chain was not planned, or was loaded from a file, which does not hold the plan.

    Example:
        >>> import jax.numpy as jnp, pmcmc
        >>> chain = pmcmc.sample(lambda x: -0.5 * jnp.sum(x**2), jnp.zeros(2), 0, num_samples=100, progress_bar=False)
        >>> pmcmc.plots.planned_time(chain)
        Traceback (most recent call last):
        ValueError: this chain was not planned: ...
    """
    report = chain.report
    plan = _plan_of(report, "this chain was not planned")
    shown = [c for c in plan.candidates if c is not plan.chosen][:max_candidates]
    shown = sorted([*shown, plan.chosen], key=lambda c: c.seconds, reverse=True)
    (ax,) = axes_for(ax, figsize=(8, 1.2 + 0.32 * len(shown)))
    colours = ["tab:blue" if c is plan.chosen else "0.75" for c in shown]
    ax.barh([c.name for c in shown], [c.seconds for c in shown], color=colours)
    place = next(i for i, c in enumerate(shown) if c is plan.chosen)
    ax.plot([report.planned_seconds] * 2, [place - 0.45, place + 0.45], color="tab:red", lw=3, label="took")
    ax.bar(0, 0, color="tab:blue", label="predicted, chosen")
    ax.bar(0, 0, color="0.75", label="predicted, others")
    seconds = [c.seconds for c in shown] + [report.planned_seconds]
    if max(seconds) > 20 * min(seconds):
        ax.set_xscale("log")
    ax.legend(frameon=False, fontsize="small", loc="upper left", bbox_to_anchor=(1, 1))
    ax.set(
        xlabel="seconds after the pilot",
        title=f"Warm-up {report.warmup_seconds:.1f} s, pilot {report.pilot_seconds:.1f} s, total "
        f"{report.total_seconds:.1f} s",
    )
    return ax


def speedup(runs: Sequence[Chain | Mapping[str, Any]], *, label: str | None = None, ax: Any = None) -> Any:
    """Plot the speed-up over sequential sampling against the number of steps T, one line for each quantity.

    A chain gives up to two quantities: T over the critical path, and, if its report has a plan, the predicted seconds
    of sequential sampling over the seconds taken, pilot and compilation included. Rows of a benchmark give the speed-up
    that they hold.

    Args:
        runs: Chains sampled with several ``num_samples``, or mappings with ``length``, ``speedup`` and optionally
            ``case``; each case has its own line.
        label: Text before the names of the lines.
        ax: Matplotlib axes to draw into.

    Returns:
        The axes.

    Raises:
        ValueError: There are no runs, or a row lacks ``length`` or ``speedup``.

    Example:
        >>> import pmcmc
        >>> pmcmc.plots.speedup([{"length": 1000}])
        Traceback (most recent call last):
        ValueError: a row must have 'length' and 'speedup', got ['length'].
    """
    lines: dict[str, list[tuple[float, float]]] = {}
    for run in runs:
        for name, point in _points(run):
            lines.setdefault(name, []).append(point)
    if not lines:
        raise ValueError("there are no runs to draw: expected chains or rows of a benchmark.")
    (ax,) = axes_for(ax, figsize=(6, 4))
    for number, (name, points) in enumerate(lines.items()):
        x, y = np.array([point for point in points if np.isfinite(point[1])]).reshape(-1, 2).T
        lengths = np.unique(x)
        colour = f"C{number % 10}"
        ax.plot(x, y, marker="o", ms=4, ls="", color=colour)
        if x.size:  # the line goes through the medians of runs of the same length
            medians = [np.median(y[x == length]) for length in lengths]
            ax.plot(lengths, medians, color=colour, label=f"{label}, {name}" if label else name)
    ax.axhline(1, color="0.4", lw=0.8, ls=":")
    ax.set(xscale="log", yscale="log", xlabel="steps T", ylabel="speed-up over sequential sampling")
    plain_numbers(ax.yaxis)
    ax.legend(frameon=False, fontsize="small")
    return ax


def _points(run: Chain | Mapping[str, Any]) -> list[tuple[str, tuple[float, float]]]:
    """Return (name of the line, (T, speed-up)) for each quantity of a run."""
    if isinstance(run, Chain):
        return _report_points(run.report)
    if not {"length", "speedup"} <= set(run):
        raise ValueError(f"a row must have 'length' and 'speedup', got {sorted(run)}.")
    return [(str(run.get("case", "measured")), (float(run["length"]), float(run["speedup"])))]


def _report_points(report: SolveReport) -> list[tuple[str, tuple[float, float]]]:
    """Return the points of a chain's report."""
    steps = float(report.num_steps)
    took = report.planned_seconds + report.pilot_seconds
    seconds = report.predicted_sequential_seconds / took if took > 0 else float("nan")
    return [
        ("sequential steps", (steps, steps / float(np.max(report.num_sequential_steps)))),
        ("seconds, predicted sequential", (steps, seconds)),
    ]
