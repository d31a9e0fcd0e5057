"""How coupled chains approach each other."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from pmcmc.chain import Chain
from pmcmc.plots._axes import axes_for
from pmcmc.stability import Coalescence, site_distances


def merge_distances(chain: Chain, max_sites: int = 6, *, ax: Any = None) -> Any:
    """How coupled chains approach each other: distance against steps, of every pair and of every site of the model.

    Left: the largest coordinate's distance in posterior standard deviations, one line a pair of the pilot; the merge
    tolerance; the slope of the measured Lyapunov exponent. Right: the median over pairs by site, for the ``max_sites``
    sites that stay apart longest, at the pilot's checkpoints.

    chain: from ``solver="auto"``, of a run long enough to be planned.
    ax: two matplotlib axes to draw into.

    Returns:
        The two axes.

    Raises:
        ValueError: the chain has no pilot.

    Example:
        >>> import jax.numpy as jnp, pmcmc
        >>> chain = pmcmc.sample(lambda x: -0.5 * jnp.sum(x**2), jnp.zeros(2), 0, num_samples=100, progress_bar=False)
        >>> pmcmc.plots.merge_distances(chain)
        Traceback (most recent call last):
        ValueError: this chain has no pilot of coupled chains: ...
    """
    plan = chain.report.plan
    if plan is None or plan.coalescence is None:
        raise ValueError(
            'this chain has no pilot of coupled chains: sample it with solver="auto", and long enough to be planned '
            f"({chain.report.reason})"
        )
    pilot = plan.coalescence
    left, right = both = axes_for(ax, 2, figsize=(11, 4), sharey=True)
    _draw_pairs(left, pilot)
    _draw_sites(right, chain, pilot, max_sites)
    for axes in both:
        axes.axhline(float(pilot.tol), color="0.4", lw=0.8, ls=":")
        axes.set(yscale="log", xlabel="step")
    left.set(ylabel="distance (posterior sd)", title="Pairs of coupled chains")
    right.set(title="Sites of the model, median over pairs")
    return both


def _draw_pairs(axes: Any, pilot: Coalescence) -> None:
    distances, steps = np.asarray(pilot.distances), np.asarray(pilot.steps)
    shown = np.arange(len(distances))[:, None] <= steps
    positive = np.where(shown & (distances > 0), distances, np.nan)
    axes.plot(positive, color="tab:blue", lw=0.6, alpha=0.5)
    axes.plot([], [], color="tab:blue", lw=0.6, label=f"{steps.size} pairs, {int(pilot.merged.sum())} merged")
    rate, near = float(pilot.growth_rate), np.sqrt(float(pilot.tol))
    entered = [int(np.argmax(column < near)) for column in positive.T if np.any(column < near)]
    if np.isfinite(rate) and entered:  # from where the median pair entered the regime of small distances
        after = np.arange(max(1, int(np.log(near) / rate)) if rate < 0 else len(distances))
        label = f"Lyapunov exponent {rate:.3f} a step"
        axes.plot(np.median(entered) + after, near * np.exp(rate * after), color="tab:red", lw=1.5, label=label)
    axes.legend(frameon=False, fontsize="small")


def _draw_sites(axes: Any, chain: Chain, pilot: Coalescence, max_sites: int) -> None:
    points = pilot.checkpoints
    reached = np.asarray(points.reached)
    coordinates = jax.vmap(jax.vmap(chain.kernel.coordinates))
    ends = [coordinates(jax.tree.map(lambda x: jnp.asarray(x)[reached], x)) for x in (points.first, points.second)]
    medians = {
        name: np.median(np.asarray(d).reshape(*d.shape[:2], -1).max(axis=2), axis=1)
        for name, d in site_distances(chain.target, *ends).items()
    }
    slowest = sorted(medians, key=lambda name: -np.sum(np.log(medians[name] + float(pilot.tol))))[:max_sites]
    for name in slowest:
        axes.plot(np.asarray(points.steps)[reached], np.maximum(medians[name], 1e-300), marker=".", label=name)
    axes.legend(frameon=False, fontsize="small")
