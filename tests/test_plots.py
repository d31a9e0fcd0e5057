"""Plots show what was measured, and each draws into the axes it is given."""

from collections.abc import Iterator
from dataclasses import replace
from functools import cache
from pathlib import Path

import jax
import jax.numpy as jnp
import matplotlib
import numpy as np
import pytest

import pmcmc
from pmcmc import plots
from pmcmc.planning import Costs, plan
from pmcmc.plots import _fronts, _recordings
from pmcmc.recurrence import MultipleShooting, Sequential, deer, jacobi
from pmcmc.sampling.engine import Engine
from tests.helpers.targets import gaussian, start_like

matplotlib.use("Agg")
from matplotlib import pyplot as plt


@pytest.fixture(autouse=True)
def closed() -> Iterator[None]:
    yield
    plt.close("all")


@cache
def chain() -> pmcmc.Chain:
    options = dict(num_warmup=100, num_samples=300, num_chains=2, solver=Sequential(), progress_bar=False)
    return pmcmc.sample(gaussian, start_like(gaussian), 0, kernel=pmcmc.MALA(), **options)


@pytest.mark.slow
@pytest.mark.parametrize(("num_blocks", "length"), [(16, 12), (32, 6)])
def test_fronts_are_the_solvers_own_counts(num_blocks: int, length: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """The critical path, and the total number of steps, of the solve that is drawn: all blocks in one thread.

    Threads would share 32 blocks, and their sweeps follow another order.
    """
    monkeypatch.setattr("pmcmc.sampling.engine.num_cores", lambda: 2)
    fronts, depth = _fronts(_recordings(chain(), length, num_blocks, 1), length)
    engine, x0 = Engine.of_one_chain(chain().state, 1)
    solver = MultipleShooting(num_blocks)
    shape = engine.shape_for(solver, 192)._replace(num_parts=1)
    segment, _ = engine.solve(solver, shape, x0, np.zeros(1, int), length)
    stats = segment.stats
    assert depth == stats.num_sequential_steps[0]
    assert sum(front.num_steps for front in fronts) == stats.num_fn_evals[0]
    assert max(front.sweep for front in fronts) == stats.num_sweeps[0] >= 2
    np.testing.assert_allclose(segment.chains()[0][0], chain().unknowns[1, :192], rtol=0, atol=1e-9)
    ax = plots.merge_fronts(chain(), 192, num_blocks, number=1)
    assert ax.get_title() == f"192 steps in {depth}"
    dots = [line for line in ax.lines if line.get_marker() == "o"]
    assert len(dots) == sum(front.merged for front in fronts)


@pytest.mark.parametrize(
    ("options", "words"),
    [({"number": 2}, r"0\.\.1, the chains there are, got 2"), ({"num_steps": 20}, "at least 2 blocks of at least 2")],
)
def test_fronts_refused(options: dict, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        plots.merge_fronts(chain(), **options)


def test_iterates() -> None:
    step, inputs = lambda x, u: 0.5 * jnp.sin(x) + u, jnp.linspace(-1, 1, 2500)
    solution = deer(num_iterates=20).solve(step, 0.0, inputs)
    _, given = plt.subplots()
    ax = plots.newton_iterates(solution, ax=given)
    assert ax is given
    shown = np.asarray(ax.images[0].get_array())
    assert shown.shape == (int(solution.stats.num_iters) + 1, 834)  # three steps per column
    errors = np.abs(np.asarray(solution.iterates)[1, :2499] - np.asarray(solution.value)[:2499]).reshape(-1, 3).max(1)
    spread = np.subtract(*np.quantile(solution.value, [0.75, 0.25])) / 1.349
    np.testing.assert_allclose(shown[1, :833], np.log10(np.clip(errors / spread, np.finfo(float).eps, 1e3)), atol=0.1)
    assert np.all(shown[-1] < -10)
    # Compared with another path the last iterate is wrong.
    off = plots.newton_iterates(solution, solution.value + 1.0, scale=1.0)
    np.testing.assert_allclose(np.asarray(off.images[0].get_array())[-1], 0, atol=1e-9)


def test_iterates_that_diverge_and_those_not_kept() -> None:
    solution = jacobi(num_iterates=4, max_iters=3).solve(lambda x, u: 1e200 * x**3 + u, 1.0, jnp.ones(5))
    assert np.asarray(plots.newton_iterates(solution, jnp.ones(5), scale=1.0).images[0].get_array()).max() == 3
    with pytest.raises(ValueError, match="holds no iterates"):
        plots.newton_iterates(jacobi().solve(lambda x, u: u, 0.0, jnp.ones(5)))


def test_planned_time() -> None:
    made = plan(10**6, 2, Costs(1e-5, 1e-6, 1e-8, 1.0))
    planned = replace(chain(), report=replace(chain().report, plan=made, planned_seconds=3.5))
    ax = plots.planned_time(planned, 2)
    bars = {label.get_text(): bar.get_width() for label, bar in zip(ax.get_yticklabels(), ax.patches, strict=False)}
    assert bars[made.chosen.name] == pytest.approx(made.chosen.seconds)
    assert list(ax.lines[0].get_xdata()) == [3.5, 3.5]
    with pytest.raises(ValueError, match=r"not planned: sample it with solver=.auto."):
        plots.planned_time(chain())


def test_what_a_file_does_not_hold(tmp_path: Path) -> None:
    """A chain that was planned before it was saved is not told to be sampled longer."""
    made = plan(10**6, 2, Costs(1e-5, 1e-6, 1e-8, 1.0))
    planned = replace(chain(), report=replace(chain().report, plan=made, planned_seconds=3.5))
    with pytest.raises(ValueError, match=r"no pilot of coupled chains to plot: .*take more"):
        plots.merge_distances(planned)
    planned.save(tmp_path / "chain.npz")
    loaded = pmcmc.load(tmp_path / "chain.npz", gaussian)
    for plot in (plots.planned_time, plots.merge_distances):
        with pytest.raises(ValueError, match=r"was planned, and loaded from a file, which does not hold the plan"):
            plot(loaded)
    assert np.isnan(loaded.report.predicted_seconds)


def test_speed_up() -> None:
    rows = [{"length": n, "speedup": s, "case": "mixture"} for n, s in [(1000, 2.0), (100, 1.0), (1000, 4.0)]]
    report = replace(chain().report, num_steps=300, num_sequential_steps=np.array([30, 60]))
    ax = plots.speedup([*rows, replace(chain(), report=report)], label="CPU")
    lines = {line.get_label(): line.get_xydata().tolist() for line in ax.lines}
    assert lines["CPU, mixture"] == [[100, 1.0], [1000, 3.0]]
    assert lines["CPU, sequential steps"] == [[300, 5.0]]
    assert "CPU, seconds, predicted sequential" not in lines  # it was not planned
    assert [text.get_text() for text in ax.get_legend().get_texts()] == [x for x in lines if x.startswith("CPU")]


@pytest.mark.parametrize(("runs", "words"), [([], "no runs"), ([{"length": 3}], "'length' and 'speedup', got")])
def test_speed_up_of_nothing(runs: list, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        plots.speedup(runs)


def test_axes_that_are_too_few() -> None:
    _, axes = plt.subplots(1, 3)
    with pytest.raises(ValueError, match="1 matplotlib axes, got 3"):
        plots.speedup([{"length": 1, "speedup": 1.0}], ax=axes)


def test_distances_of_sites_are_those_of_their_positions(free_lanes) -> None:
    """Also for a kernel of site groups, whose state holds the groups in their order and in their own bases."""

    def logdensity(x):
        return -0.5 * jnp.sum((x["mu"] - 1.0) ** 2) / 100 + 0.3 * jnp.sum(x["z"])

    kernel = pmcmc.Compose([pmcmc.DiscreteGibbs(supports={"z": [0, 1]}), (pmcmc.MALA(), ["mu"])])
    made = pmcmc.sample(
        logdensity,
        {"mu": jnp.zeros(2), "z": jnp.zeros(3, int)},
        0,
        kernel=kernel,
        num_warmup=200,
        num_samples=40_000,
        progress_bar=False,
    )
    pilot = made.report.plan.coalescence
    _, axes = plt.subplots()
    plots._draw_sites(axes, made, pilot, 6)
    drawn = {line.get_label(): np.asarray(line.get_ydata()) for line in axes.lines}
    reached = np.asarray(pilot.checkpoints.reached)
    position = jax.vmap(jax.vmap(lambda state: made.kernel.position(made.target, state)))
    at = lambda points: position(jax.tree.map(lambda x: jnp.asarray(x)[reached], points))
    first, second = at(pilot.checkpoints.first), at(pilot.checkpoints.second)
    differs = np.median(np.any(np.asarray(first["z"] != second["z"]), axis=-1).astype(float), axis=1)
    np.testing.assert_array_equal(drawn["z"], np.maximum(differs, 1e-300))
    gap = np.abs(np.asarray(first["mu"] - second["mu"]))
    spread = np.std(np.concatenate([first["mu"], second["mu"]], axis=1), axis=(0, 1))
    np.testing.assert_allclose(drawn["mu"], np.maximum(np.median((gap / spread).max(-1), axis=1), 1e-300), rtol=1e-5)
