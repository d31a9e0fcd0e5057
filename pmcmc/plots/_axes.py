"""Axes that were given, or new ones."""

from typing import Any

import numpy as np

from pmcmc._optional import require


def axes_for(ax: Any, num_axes: int = 1, **options: Any) -> np.ndarray:
    """The axes to draw into, an array of ``num_axes``; options: of ``matplotlib.pyplot.subplots``, for new ones.

    Raises:
        ValueError: another number of axes was given.
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
