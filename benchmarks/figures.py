"""Draw the figures of the documentation from the result files alone: ``python -m benchmarks.figures``."""

import json
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks._harness import RESULTS

FIGURES = Path(__file__).parents[1] / "docs" / "figures"
METHODS = ["DEER", "ELK", "quasi-DEER", "quasi-ELK", "Jacobi"]


def iterations(path: Path) -> None:
    """Plot iterations over T against the Lyapunov exponent of systems and chains, and DEER's iterations against T."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    systems, chains = _converged("recurrence_iterations"), _converged("chain_iterations")
    figure, (left, middle, right) = plt.subplots(1, 3, figsize=(15, 4.2), layout="constrained")
    _against_exponent(left, systems, "Systems")
    _against_exponent(middle, chains, "MALA and HMC chains")
    _against_length(right, systems)
    path.parent.mkdir(exist_ok=True)
    figure.savefig(path, dpi=110)
    plt.close(figure)


def _converged(name: str) -> list[dict]:
    """Return the successful rows of a result file."""
    rows = json.loads((RESULTS / f"{name}.json").read_text())["rows"]
    return [row for row in rows if row["result"] == "successful"]


def _against_exponent(axes: Any, rows: list[dict], title: str) -> None:
    """Plot iterations at the T of most rows, one marker for each method, each system at its own exponent."""
    length = 256
    for method in METHODS:
        found = [r for r in rows if r["solver"] == method and r["length"] == length]
        x = [r["lyapunov_exponent"] for r in found]
        axes.scatter(x, [r["num_iters"] / length for r in found], s=18, alpha=0.7, label=method)
    axes.axvline(0, color="0.4", lw=0.8, ls=":")
    axes.set(xlabel="largest Lyapunov exponent a step", ylabel="iterations / T", yscale="log")
    axes.set_xscale("symlog", linthresh=0.05)
    axes.set_xticks([-0.5, -0.1, 0, 0.1, 0.5], ["-0.5", "-0.1", "0", "0.1", "0.5"])
    axes.set_title(f"{title}, T = {length}")
    axes.legend(frameon=False, fontsize="small")


def _against_length(axes: Any, rows: list[dict]) -> None:
    """Plot iterations of DEER, one line for each system (median over seeds), coloured by its exponent."""
    import matplotlib.pyplot as plt

    deer = [r for r in rows if r["solver"] == "DEER"]
    colours = plt.get_cmap("coolwarm")
    for problem in dict.fromkeys(r["problem"] for r in deer):
        mine = [r for r in deer if r["problem"] == problem]
        lengths = sorted({r["length"] for r in mine})
        if len(lengths) < 3:
            continue
        counts = [np.median([r["num_iters"] for r in mine if r["length"] == n]) for n in lengths]
        exponent = float(np.median([r["lyapunov_exponent"] for r in mine]))
        axes.plot(lengths, counts, marker=".", color=colours(0.5 + 0.5 * np.tanh(10 * exponent)), lw=1)
    axes.plot([64, 1024], [64, 1024], color="0.4", lw=0.8, ls=":", label="T")
    axes.set(xlabel="T", ylabel="iterations", xscale="log", yscale="log")
    axes.set_title("DEER (red: exponent above zero, blue: below)")
    axes.legend(frameon=False, fontsize="small")


def efficiency(name: str, path: Path) -> None:
    """Plot efficiency against mean coalescence time for the cases of one result file, one colour for each T."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    rows = [r for r in json.loads((RESULTS / f"{name}.json").read_text())["rows"] if r["result"] == "successful"]
    figure, axes = plt.subplots(figsize=(8, 4.8), layout="constrained")
    for length in sorted({r["length"] for r in rows}):
        mine = [r for r in rows if r["length"] == length]
        x, y = [r["coalescence_mean"] for r in mine], [r["efficiency"] for r in mine]
        axes.scatter(x, y, s=24, label=f"T = {length:,}")
        for row in mine:
            where = (row["coalescence_mean"], row["efficiency"])
            axes.annotate(row["case"], where, (4, 3), textcoords="offset points", fontsize=6)
    axes.axvline(100, color="0.4", lw=0.8, ls=":")
    axes.set(xlabel="mean coalescence time, steps", ylabel="efficiency against the limit", xscale="log", ylim=(0, 1.05))
    axes.set_xlim(right=2 * axes.get_xlim()[1])  # leaves room for names
    axes.legend(frameon=False, fontsize="small", loc="lower left")
    path.parent.mkdir(exist_ok=True)
    figure.savefig(path, dpi=110)
    plt.close(figure)


if __name__ == "__main__":
    iterations(FIGURES / "iterations.png")
    efficiency("kernels_cpu", FIGURES / "efficiency.png")
