"""Figures of the documentation, into docs/figures: ``python -m benchmarks.figures [NAME ...]``.

`blocks` and `funnel` sample small chains, in seconds; the others are drawn from the committed result files alone.
"""

import argparse
import json
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import matplotlib
import numpy as np
from matplotlib import pyplot as plt

import pmcmc
from benchmarks._harness import RESULTS
from benchmarks.hierarchical import HIERARCHIES
from pmcmc.recurrence import MultipleShooting, Sequential, solve

FIGURES = Path(__file__).parents[1] / "docs" / "figures"
METHODS = ["DEER", "ELK", "quasi-DEER", "quasi-ELK", "Jacobi"]


def _successful(name: str) -> list[dict]:
    """The rows of a result file whose solve succeeded."""
    rows = json.loads((RESULTS / f"{name}.json").read_text(encoding="utf-8"))["rows"]
    return [row for row in rows if row["result"] == "successful"]


def blocks(num_blocks: int = 6, length: int = 64) -> Any:
    """How multiple shooting works: a random walk on a mixture of two normal distributions.

    Above: the paths of all blocks from guessed starts, and the chain of sequential sampling. Below: which step is
    computed when.
    """
    path, guessed, merges, critical_path = _solved_blocks(num_blocks, length)
    total = num_blocks * length
    figure, (above, below) = plt.subplots(2, 1, figsize=(9.5, 6), sharex=True, layout="constrained")
    above.plot(np.arange(1, total + 1), path, color="0.82", lw=5, label="the chain that sequential sampling gives")
    below.plot([0, total], [0, total], color="0.45", lw=1, ls="--")
    for block, merge in enumerate(merges):
        colour, start = f"C{block}", block * length
        steps = np.arange(start + 1, start + length + 1)
        above.plot(steps, guessed[block], color=colour, lw=1.2)
        above.plot(steps[0], guessed[block, 0], marker="o", ms=5, mfc="white", color=colour)
        below.plot([start, start + length], [0, length], color=colour, lw=1.8)
        if block:
            above.plot(steps[:merge], path[start : start + merge], color="black", lw=1.4)
            above.plot(steps[merge - 1], path[start + merge - 1], marker="o", ms=5, color="black")
            below.plot([start, start + merge], [length, length + merge], color="black", lw=1.8)
            below.plot(start + merge, length + merge, marker="o", ms=5, color="black")
            for axes in (above, below):
                axes.axvline(start, color="0.88", lw=0.8, zorder=0)
    above.plot([], [], color="C0", lw=1.2, marker="o", ms=5, mfc="white", label="blocks, run at once from guesses")
    above.plot([], [], color="black", lw=1.4, marker="o", ms=5, label="repairs, until they merge")
    above.legend(frameon=False, ncols=3, loc="lower center", bbox_to_anchor=(0.5, 1))
    above.set(ylabel="state x[t]")
    below.axhline(critical_path, color="0.45", lw=0.8, ls=":")
    near = dict(textcoords="offset points", ha="right")
    below.annotate(f"blocks: {total} steps in {critical_path}", (total, critical_path), (-6, 5), **near)
    below.annotate(f"sequential sampling: {total} steps in {total}", (0.8 * total, 0.8 * total), (-12, 0), **near)
    below.set(xlabel="step t of the chain", ylabel="sequential steps", xlim=(-2, total + 2), ylim=(0, total))
    return figure


def _solved_blocks(num_blocks: int, length: int) -> tuple[np.ndarray, np.ndarray, list[int], int]:
    """The chain (T,), the paths of the blocks from their guesses (P, S), the repairs' steps (P,), the critical path.

    Raises:
        RuntimeError: The solver's chain or critical path is not what the paths show.
    """
    log_density = lambda x: jnp.logaddexp(-0.5 * ((x - 1.5) / 0.6) ** 2, -0.5 * ((x + 1.5) / 0.6) ** 2)
    target, kernel = pmcmc.Target.from_logdensity(log_density, 0.0), pmcmc.RandomWalk(step_size=0.9)
    recurrence = kernel.transition(target)
    keys = jax.random.split(jax.random.key(10), num_blocks * length)
    noise = jax.vmap(lambda key: kernel.sample_noise(key, target))(keys)
    guesses = 2 * jax.random.normal(jax.random.key(11), (num_blocks, 1))

    def run(first: int, num_steps: int) -> np.ndarray:
        inputs = jax.tree.map(lambda x: x[first : first + num_steps], noise)
        return np.asarray(solve(recurrence, guesses[first // length], inputs, solver=Sequential()).value)[:, 0]

    path = run(0, num_blocks * length)
    guessed = np.stack([run(block * length, length) for block in range(num_blocks)])
    equal = guessed == path.reshape(num_blocks, length)
    merges = [0, *(int(np.argmax(row)) + 1 for row in equal[1:])]
    solution = solve(
        recurrence,
        guesses[0],
        noise,
        solver=MultipleShooting(num_blocks),
        initial_guess=lambda step: guesses[jnp.minimum((step + 1) // length, num_blocks - 1)],
    )
    critical_path = int(solution.stats.num_sequential_steps)
    if not (
        np.array_equal(solution.value[:, 0], path) and equal[:, -1].all() and critical_path == length + max(merges)
    ):
        raise RuntimeError("the solver's chain or critical path differs from the picture's: choose another seed.")
    return path, guessed, merges, critical_path


def funnel(num_samples: int = 2500) -> Any:
    """Eight schools, written centred: draws of a chain in these coordinates, and of one that chose its own."""
    hierarchy = HIERARCHIES["eight_schools"]()
    chains = {}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that the centred form does not mix is what is drawn
        for form in ("centred", "chosen"):
            model, reparam = hierarchy.form(form)
            chains[form] = pmcmc.parallel_chain(
                model, 0, reparam=reparam, num_samples=num_samples, solver=Sequential(), progress_bar=False
            )
    draws = {form: chain.get_samples() for form, chain in chains.items()}
    mu, tau, theta = (np.asarray(draws["chosen"][name]) for name in ("mu", "tau", "theta"))
    c = float(np.asarray(chains["chosen"].target.centredness["theta"])[0])
    own = c * mu + tau ** (c - 1) * (theta[:, 0] - mu)
    centred, label = draws["centred"], r"$\theta_1$"
    figure, panels = plt.subplots(1, 3, figsize=(11, 3.8), sharey=True, layout="constrained")
    shown = [
        (centred["theta"][:, 0], centred["tau"], "centred", label),
        (theta[:, 0], tau, "AutoReparam", label),
        (own, tau, f"AutoReparam: its coordinates, c = {c:.2g}", "$w_1$"),
    ]
    for panel, (x, scale, title, label) in zip(panels, shown, strict=True):
        panel.plot(x, np.log(scale), ".", ms=1.5, alpha=0.4, rasterized=True)
        panel.set(title=title, xlabel=label, ylim=(-6, 5))
    panels[0].set(ylabel=r"$\log\,\tau$")
    return figure


def gain(length: int = 100_000) -> Any:
    """Sequential steps and seconds of blocks against sequential sampling: all measured pairs at one T."""
    rows = [row for row in _successful("kernels_cpu") if row["length"] == length]
    rows.sort(key=lambda row: row["speedup"])
    names, places = [row["case"] for row in rows], np.arange(len(rows))
    figure, (left, right) = plt.subplots(1, 2, figsize=(9.5, 5), sharey=True, layout="constrained")
    left.hlines(places, [row["num_sequential_steps"] for row in rows], length, color="0.8", lw=1.5)
    left.plot([length] * len(rows), places, "o", color="0.45", label="sequential sampling")
    left.plot([row["num_sequential_steps"] for row in rows], places, "o", color="C0", label="blocks")
    left.set(xscale="log", xlabel="sequential steps", yticks=places, yticklabels=names, xlim=(400, 2 * length))
    left.legend(frameon=False, ncols=2, loc="lower center", bbox_to_anchor=(0.5, 1))
    speedups = np.array([row["speedup"] for row in rows])
    right.barh(places, speedups - 1, left=1, height=0.55, color=np.where(speedups > 1, "C0", "0.6"))
    for place, speedup in zip(places, speedups, strict=True):
        right.annotate(
            f"{speedup:.2f}",
            (speedup, place),
            (4 if speedup > 1 else -4, 0),
            textcoords="offset points",
            ha="left" if speedup > 1 else "right",
            va="center",
            fontsize="small",
        )
    right.axvline(1, color="0.3", lw=0.8)
    right.set(xlabel="speed-up on two CPU cores", xlim=(0, 1.15 * speedups.max()))
    return figure


def efficiency(name: str = "kernels_cpu") -> Any:
    """Mean coalescence time and efficiency of the cases of one result file, the quickest to merge on top."""
    rows = _successful(name)
    time = lambda case: min(row["coalescence_mean"] for row in rows if row["case"] == case)
    cases = sorted({row["case"] for row in rows}, key=time, reverse=True)
    figure, (left, right) = plt.subplots(1, 2, figsize=(9.5, 5), sharey=True, layout="constrained")
    for number, length in enumerate(sorted({row["length"] for row in rows})):
        mine = [row for row in rows if row["length"] == length]
        places = [cases.index(row["case"]) for row in mine]
        style = dict(color=f"C{number}", ls="", marker="os^D"[number % 4], label=f"T = {length:,}")
        left.plot([row["coalescence_mean"] for row in mine], places, **style)
        right.plot([row["efficiency"] for row in mine], places, **style)
    left.set(xlabel="mean coalescence time (steps)", xscale="log", yticks=range(len(cases)), yticklabels=cases)
    right.set(xlabel="efficiency vs own lanes", xlim=(0, 1.05))
    right.legend(frameon=False, loc="lower left")
    for axes in (left, right):
        axes.grid(color="0.92")
        axes.set_axisbelow(True)
    return figure


def iterations() -> Any:
    """Iterations over T against the Lyapunov exponent, of systems and chains; DEER against T."""
    systems, chains = _successful("recurrence_iterations"), _successful("chain_iterations")
    figure, (left, middle, right) = plt.subplots(1, 3, figsize=(11.5, 4.4), layout="constrained")
    _against_exponent(left, systems, "Systems")
    _against_exponent(middle, chains, "MALA and HMC chains")
    _against_length(right, systems)
    handles, labels = left.get_legend_handles_labels()
    figure.legend(handles, labels, frameon=False, ncols=len(METHODS), loc="outside lower left")
    return figure


def _against_exponent(axes: Any, rows: list[dict], title: str) -> None:
    """At the T of most rows, one marker a method, each system at its own exponent."""
    length = 256
    for method, marker in zip(METHODS, "osv^x", strict=True):
        found = [r for r in rows if r["solver"] == method and r["length"] == length]
        x = [r["lyapunov_exponent"] for r in found]
        axes.scatter(x, [r["num_iters"] / length for r in found], s=22, alpha=0.7, marker=marker, label=method)
    axes.axvline(0, color="0.4", lw=0.8, ls=":")
    axes.set(xlabel="largest Lyapunov exponent (nats a step)", ylabel="iterations / T", yscale="log")
    axes.set_xscale("symlog", linthresh=0.05)
    axes.set_xticks([-0.5, -0.1, 0, 0.1, 0.5], ["-0.5", "-0.1", "0", "0.1", "0.5"])
    axes.set_title(f"{title}, T = {length}")


def _against_length(axes: Any, rows: list[dict]) -> None:
    """DEER: one line a system (median over seeds), coloured by its exponent."""
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
    axes.plot([64, 1024], [64, 1024], color="0.4", lw=0.8, ls=":", label="T iterations")
    axes.set(xlabel="T", ylabel="iterations", xscale="log", yscale="log")
    axes.set_title("DEER (red: exponent above zero, blue: below)", fontsize="medium")
    axes.legend(frameon=False, fontsize="small")


ALL: dict[str, Callable[[], Any]] = {
    "blocks": blocks,
    "funnel": funnel,
    "gain": gain,
    "efficiency": efficiency,
    "iterations": iterations,
}


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("names", nargs="*", metavar="NAME", default=list(ALL), help="all by default")
    matplotlib.use("Agg")  # no window
    FIGURES.mkdir(exist_ok=True)
    for name in parser.parse_args(arguments).names:
        figure = ALL[name]()
        figure.savefig(FIGURES / f"{name}.png", dpi=110)
        plt.close(figure)


if __name__ == "__main__":
    main()
