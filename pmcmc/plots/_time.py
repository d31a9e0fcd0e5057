"""Where the time of a run goes, beside what was planned; and what blocks save as chains grow longer."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from pmcmc.chain import Chain
from pmcmc.plots._axes import axes_for, plain_numbers
from pmcmc.report import SolveReport


def planned_time(chain: Chain, max_candidates: int = 8, *, ax: Any = None) -> Any:
    """Seconds that each way of sampling was expected to take before the run, and what the one taken took.

    chain: from ``solver="auto"``, of a run long enough to be planned.
    max_candidates: bars beside the one taken, the cheapest first.
    ax: matplotlib axes to draw into.

    Returns:
        The axes.

    Raises:
        ValueError: nothing was planned.

    Example:
        >>> import jax.numpy as jnp, pmcmc
        >>> chain = pmcmc.sample(lambda x: -0.5 * jnp.sum(x**2), jnp.zeros(2), 0, num_samples=100, progress_bar=False)
        >>> pmcmc.plots.planned_time(chain)
        Traceback (most recent call last):
        ValueError: this chain was not planned: ...
    """
    report = chain.report
    if report.plan is None:
        raise ValueError(
            f'this chain was not planned: sample it with solver="auto", and long enough to be planned ({report.reason})'
        )
    plan = report.plan
    shown = [c for c in plan.candidates if c is not plan.chosen][:max_candidates]
    shown = sorted([*shown, plan.chosen], key=lambda c: c.seconds, reverse=True)
    (ax,) = axes_for(ax, figsize=(8, 1.2 + 0.32 * len(shown)))
    colours = ["tab:blue" if c is plan.chosen else "0.75" for c in shown]
    ax.barh([c.name for c in shown], [c.seconds for c in shown], color=colours)
    place = next(i for i, c in enumerate(shown) if c is plan.chosen)
    ax.plot([report.planned_seconds] * 2, [place - 0.45, place + 0.45], color="tab:red", lw=3, label="took")
    ax.bar(0, 0, color="tab:blue", label="planned and taken")
    ax.bar(0, 0, color="0.75", label="planned otherwise")
    seconds = [c.seconds for c in shown] + [report.planned_seconds]
    if max(seconds) > 20 * min(seconds):
        ax.set_xscale("log")
    ax.legend(frameon=False, fontsize="small", loc="upper left", bbox_to_anchor=(1, 1))
    ax.set(
        xlabel="seconds behind the pilot",
        title=f"Warm-up {report.warmup_seconds:.1f} s, pilot {report.pilot_seconds:.1f} s, in all "
        f"{report.total_seconds:.1f} s",
    )
    return ax


def speed_up(runs: Sequence[Chain | Mapping[str, Any]], *, label: str | None = None, ax: Any = None) -> Any:
    """Speed-up over sampling in order against the number of steps T, a line a quantity.

    Of chains two are known: T over the steps taken one after the other, and where the run was planned, the seconds that
    sequential sampling should have taken, by the steps that were taken in order, over those that were taken, pilot and
    compilation included. Of rows of a benchmark it is what they say.

    runs: chains sampled at several ``num_samples``, or mappings with ``length``, ``speedup`` and maybe ``case``, which
        has a line of its own.
    label: put before the names of the lines.
    ax: matplotlib axes to draw into.

    Returns:
        The axes.

    Raises:
        ValueError: there are no runs, or a row lacks ``length`` or ``speedup``.

    Example:
        >>> import pmcmc
        >>> pmcmc.plots.speed_up([{"length": 1000}])
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
        if x.size:  # through the medians, where there are several runs of one length
            medians = [np.median(y[x == length]) for length in lengths]
            ax.plot(lengths, medians, color=colour, label=f"{label}, {name}" if label else name)
    ax.axhline(1, color="0.4", lw=0.8, ls=":")
    ax.set(xscale="log", yscale="log", xlabel="steps T", ylabel="speed-up over sampling in order")
    plain_numbers(ax.yaxis)
    ax.legend(frameon=False, fontsize="small")
    return ax


def _points(run: Chain | Mapping[str, Any]) -> list[tuple[str, tuple[float, float]]]:
    """(name of the line, (T, speed-up))."""
    if isinstance(run, Chain):
        return _report_points(run.report)
    if not {"length", "speedup"} <= set(run):
        raise ValueError(f"a row must have 'length' and 'speedup', got {sorted(run)}.")
    return [(str(run.get("case", "measured")), (float(run["length"]), float(run["speedup"])))]


def _report_points(report: SolveReport) -> list[tuple[str, tuple[float, float]]]:
    steps = float(report.num_steps)
    took = report.planned_seconds + report.pilot_seconds
    seconds = report.predicted_sequential_seconds / took if took > 0 else float("nan")
    return [
        ("steps one after the other", (steps, steps / float(np.max(report.num_sequential_steps)))),
        ("seconds, as predicted in order", (steps, seconds)),
    ]
