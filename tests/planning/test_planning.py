"""Plans: their arithmetic, the pilot they rest on, their execution under guard, and reports without merges."""

import math
import time
from unittest.mock import Mock

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import pytest

import pmcmc
from pmcmc.planning import CostModel, Costs, plan, predict_iterations
from pmcmc.planning.plan import next_segment, schedule
from pmcmc.recurrence import RESULTS, Dense, MultipleShooting, Sequential, Windowed, deer, quasi_deer
from pmcmc.sampling import automatic, pilot, segments
from pmcmc.stability import coalescence_time
from pmcmc.stability.evidence import coalescence_of_paths
from tests.helpers.pilots import CPU, GPU, merging
from tests.helpers.targets import funnel, funnel_may_warn, gaussian, start_like

SIZES = dict(num_warmup=200, num_chains=2, progress_bar=False)


def test_free_lanes_are_taken() -> None:
    found = plan(10**6, 1, GPU, merging(np.arange(20, 52)))
    assert isinstance(found.solver, MultipleShooting)
    assert found.solver.num_blocks >= 1024
    assert found.chosen is found.candidates[0]
    assert found.chosen.seconds < found.sequential_seconds / 20
    blocks = [c for c in found.candidates if c.name != "sequential"]
    assert all(c.lower <= c.num_steps <= c.upper for c in blocks)
    # One compilation, then steps of this many lanes.
    for c in blocks:
        assert c.seconds == pytest.approx(GPU.compile + c.num_steps * GPU.step(c.solver.num_blocks))
    assert "All 32 coupled pairs" in found.reason
    text = str(found)
    assert "> shooting" in text
    assert "  sequential" in text


def test_lanes_that_cost_as_much_are_not() -> None:
    dear = CPU._replace(lane=1e-6)
    found = plan(10**7, 1, dear, merging(np.arange(20, 52)))
    assert isinstance(found.solver, Sequential)
    assert "but shooting" in found.reason
    assert isinstance(plan(10**7, 1, CPU, merging(np.arange(20, 52))).solver, MultipleShooting)


def test_compilation_must_pay() -> None:
    pilot = merging(np.arange(20, 52))
    assert isinstance(plan(10**6, 1, CPU, pilot).solver, Sequential)  # 1 s against 1 s of compilation
    assert isinstance(plan(10**6, 1, CPU._replace(compile=0.0), pilot).solver, MultipleShooting)


def test_pairs_that_do_not_merge() -> None:
    steps = np.append(np.arange(20, 51), 200)
    found = plan(10**6, 1, GPU, merging(steps, max_steps=100))
    assert isinstance(found.solver, Sequential)
    assert "Only 31 of 32" in found.reason
    assert "within 100 steps, as far as the pilot followed them" in found.reason
    assert isinstance(plan(10**6, 1, GPU).solver, Sequential)


def test_pairs_that_start_together_do_not_count() -> None:
    """They merge at once, and would make merges seem quick."""
    apart, together = np.arange(20, 52), np.zeros(32, int)
    expected, found = (plan(10**6, 1, GPU, merging(steps), dim=1) for steps in (apart, np.append(together, apart)))
    assert found.reason == expected.reason
    for one, other in zip(found.candidates, expected.candidates, strict=True):
        assert (one.name, one.num_steps) == (other.name, pytest.approx(other.num_steps))
    with pytest.raises(ValueError, match="at least 2 pairs that start apart, got 1: couple more chains"):
        plan(1000, 1, GPU, merging([0, 20, 0, 0]))


def test_nothing_to_plan() -> None:
    with pytest.raises(ValueError, match="at least 1"):
        plan(0, 1, GPU)
    with pytest.raises(ValueError, match="at least 2"):
        plan(1000, 1, GPU, merging([20]))


def test_merges_too_long_for_the_run() -> None:
    found = plan(1000, 1, GPU._replace(compile=0.0), merging(np.arange(500, 532)))
    assert isinstance(found.solver, Sequential)
    assert "too many for blocks" in found.reason


def test_newton_where_merges_are_long_and_lanes_free() -> None:
    """Affine, so Newton takes few iterations; merging is too slow for blocks to be worth repairing."""
    keys = jax.random.split(jax.random.key(1), 2)
    inputs = jax.random.normal(keys[0], (6000, 32))
    pilot = coalescence_time(lambda x, u: 0.99 * x + u, jnp.zeros(32), jnp.ones(32), inputs, scale=1.0, tol=1e-13)
    free = Costs(1e-4, 1e-4, 1e-12, 0.0)
    found = plan(10_000, 1, free, pilot, dim=1)
    assert found.chosen.name == "DEER"
    assert found.chosen.num_steps < 20
    assert found.solver.max_iters >= 20
    assert plan(10_000, 1, free, pilot).chosen.name != "DEER"
    full = plan(10_000, 1, free, pilot, dim=100, max_steps=lambda solver: 9_999)
    assert [c for c in full.candidates if "DEER" in c.name] == []
    dear = plan(10_000, 1, free._replace(lane=1e-4), pilot, dim=1)
    assert dear.chosen.name == "sequential"


def test_jacobians_that_do_not_fit_come_in_windows() -> None:
    """The memory of a solve per step decides, not its Jacobians alone."""
    keys = jax.random.split(jax.random.key(1), 2)
    inputs = jax.random.normal(keys[0], (6000, 32))
    pilot = coalescence_time(lambda x, u: 0.99 * x + u, jnp.zeros(32), jnp.ones(32), inputs, scale=1.0, tol=1e-13)
    free = Costs(1e-4, 1e-5, 1e-12, 0.0)

    def memory(numbers, dim=100):
        """Steps that fit into memory, with ten numbers per step of noise and the like besides the solver's."""
        return lambda solver: numbers / (10 + solver.numbers_per_step(dim))

    found = plan(10_000, 1, free, pilot, dim=100, max_steps=memory(4.5e7))
    whole, windows = (next(c for c in found.candidates if c.name.startswith(name)) for name in ("quasi-DEER", "DEER"))
    window = windows.solver.window
    path = 10_000 * (10 + Windowed(deer()).numbers_per_step(100))
    assert 0.99 * 4.5e7 < path + window * (10 + deer().numbers_per_step(100)) <= 4.5e7
    assert windows.name == f"DEER, windows of {window:,} steps"
    assert isinstance(windows.solver, Windowed)
    assert not isinstance(whole.solver, Windowed)
    assert windows.num_steps == math.ceil(10_000 / window) * predict_iterations(Dense(), pilot, length=window).value
    # Jacobians of 100 steps at a time are not worth a plan.
    few = plan(10_000, 1, free, pilot, dim=100, max_steps=memory(8e6))
    assert not any(c.name.startswith("DEER") for c in few.candidates)


@pytest.mark.parametrize(("structure", "dim"), [(deer, 24), (quasi_deer, 4)])
def test_what_windows_hold(structure, dim: int) -> None:
    """XLA's own count does not exceed the estimate for path and window, and is above a third of it."""
    solver = Windowed(structure(max_iters=50), window=512)
    step = lambda x, u: jnp.tanh(x @ (0.5 * jnp.eye(dim) + 0.1 / dim)) + u
    inputs = jax.ShapeDtypeStruct((8192, dim), float)
    program = jax.jit(lambda u: solver.solve(step, jnp.zeros(dim), u, scale=jnp.ones(dim))).lower(inputs).compile()
    numbers = program.memory_analysis().temp_size_in_bytes / 8
    said = 8192 * solver.numbers_per_step(dim) + 512 * solver.solver.numbers_per_step(dim)
    assert said / 3 <= numbers <= said


EIGHT = tuple(Mock(jax.Device) for _ in range(8))


def test_devices_are_a_choice() -> None:
    """Blocks on all devices or on one, by what a step of that many lanes takes there."""
    pilot = merging(np.arange(20, 52))
    shared = CPU._replace(device_overhead=1e-6, device_gain=0.5)
    found = plan(10**7, 2, shared, pilot, device_sets=[(), EIGHT])
    blocks = lambda plan: [c for c in plan.candidates if c.name != "sequential"]
    one, all_of_them = ([c for c in blocks(found) if (c.solver.devices or ()) == d] for d in ((), EIGHT))
    assert {c.solver.num_blocks for c in all_of_them} == {c.solver.num_blocks for c in one} - {2, 4}
    for c in all_of_them:
        number = c.solver.num_blocks
        assert c.name == f"shooting, {number} blocks on 8 devices"
        assert c.seconds == pytest.approx(1.0 + c.num_steps * (1e-6 + 1e-6 + 2 * number * 2.5e-7 / 4.5))
    assert found.solver.devices == EIGHT
    assert f"{found.chosen.name} should take" in found.reason
    rows = str(found).splitlines()[1:]
    assert f"> {found.chosen.name} " in rows[1]
    assert len({len(row) for row in rows}) == 1  # columns are aligned for names of any length
    dear = plan(10**7, 2, shared._replace(device_overhead=1.0), pilot, device_sets=[(), EIGHT])
    assert dear.solver.devices is None
    named = plan(10**7, 2, shared, pilot, device_sets=[EIGHT[:3]])
    assert all(c.solver.num_blocks % 3 == 0 and c.name.endswith("on 3 devices") for c in blocks(named))
    compiled = plan(10**7, 2, shared, pilot, device_sets=[(), EIGHT], ready={one[0].solver})
    before, after = ({c.name: c.seconds for c in blocks(each)} for each in (found, compiled))
    assert {name for name in after if after[name] != before[name]} == {one[0].name}
    assert after[one[0].name] == pytest.approx(before[one[0].name] - 1.0)


@pytest.mark.parametrize("lanes", [(32, 5e-5), (32, 1.2e-5), None], ids=["lanes", "fast lanes", "no lanes"])
def test_groups_of_chains_make_lanes_cheaper(lanes) -> None:
    """On a CPU two threads take less than half of the time from a lane of blocks, and nothing from other lanes."""
    seconds = dict(on_cpu=True, sequential=1e-5, num_chains=4, compile_seconds=1.0, num_cores=2, lanes=lanes)
    alone, shared = (CostModel().costs(**seconds, num_threads=n) for n in (1, 2))
    assert alone.step(64) == shared.step(64)
    assert alone.blocks_step(64) == pytest.approx(alone.step(64 + alone.spare))
    assert shared.blocks_step(64, 2) == alone.step(64, 2)  # devices that share the lanes have no groups
    if lanes is None:
        assert shared == alone  # what was not timed is not counted on
    else:
        assert alone.blocks_step(64) / 2 < shared.blocks_step(64) < alone.blocks_step(64)
    on_gpu = seconds | dict(on_cpu=False)
    assert CostModel().costs(**on_gpu, num_threads=2) == CostModel().costs(**on_gpu)


def test_lanes_of_warmup_tell_the_cost_of_lanes() -> None:
    """Their time less a fixed part, but at least a share of it."""
    model = CostModel()
    lane = lambda seconds: (
        model.costs(
            on_cpu=True, sequential=1e-5, num_chains=4, compile_seconds=1.0, num_cores=2, lanes=(32, seconds)
        ).lane
    )
    assert lane(1e-3) == pytest.approx(model.cpu_lane_ratio * (1e-3 - model.cpu_warmup_overhead) / 32)
    assert lane(1e-6) == pytest.approx(model.cpu_lane_ratio * model.least_lane_share * 1e-6 / 32)


def test_a_lane_that_gains_takes_a_share_of_a_sequential_step() -> None:
    """Warm-up's lanes run in a program that is compiled quickly, which says little of those of blocks."""
    model, known = CostModel(), dict(sequential=4e-6, num_chains=4, compile_seconds=1.0, num_cores=2)
    costs = lambda seconds, gain: model.costs(on_cpu=True, **known, lanes=(32, seconds), lanes_gain=gain)
    slow, fast = 1e-4, 2e-5
    each = lambda found: (found.blocks_step(100) - found.blocks_step(50)) / 50
    assert each(costs(slow, True)) == pytest.approx(model.cpu_block_share * 1e-6)
    assert each(costs(slow, False)) > 1e-6
    assert costs(slow, True).step(64) == costs(slow, False).step(64)  # that of other lanes, as in Newton's method
    assert costs(fast, True) == costs(fast, False)
    assert model.costs(on_cpu=False, **known, lanes=(32, slow), lanes_gain=True) == model.costs(
        on_cpu=False, **known, lanes=(32, slow)
    )


@pytest.mark.parametrize("num_chains", [1, 4, 300])
def test_blocks_of_a_cpu_stay_in_its_caches(num_chains: int) -> None:
    costs = Costs(1e-6 * num_chains, 1e-8, 1e-7, 0.1, most_lanes=256)
    found = plan(10**7, num_chains, costs, merging(np.arange(20, 52)))
    blocks = {c.solver.num_blocks for c in found.candidates if isinstance(c.solver, MultipleShooting)}
    assert max(blocks) == max(2, 256 // num_chains)
    assert isinstance(found.solver, MultipleShooting)


def test_few_lanes_cost_more_each() -> None:
    """What a step takes besides its lanes makes many blocks better than few."""
    pilot, costs = merging(np.arange(20, 52)), Costs(1e-6, 1e-8, 4e-7, 0.1)
    blocks = [plan(10**6, 1, costs._replace(spare=n), pilot).solver.num_blocks for n in (0.0, 16.0)]
    assert blocks[0] < blocks[1]


def test_lanes_of_nuts_cost_what_its_trees_cost() -> None:
    """Gradients cost what they cost in warm-up's HMC; the tree and the number of leapfrog steps are those of NUTS."""
    model, seconds = CostModel(), 32 * 1e-5 + CostModel().cpu_warmup_overhead
    known = dict(sequential=1e-5, num_chains=4, compile_seconds=1.0, num_cores=2, lanes=(32, seconds))
    lane = lambda taken: model.costs(on_cpu=True, **known, leapfrogs=(taken, 3.0)).lane
    gradient = (model.cpu_lane_ratio * 1e-5 - model.cpu_step_lane) / 3
    assert lane(7.0) == pytest.approx(7 * (gradient + model.cpu_tree_lane))
    assert lane(14.0) == pytest.approx(2 * lane(7.0))
    assert lane(0.1) == pytest.approx(model.least_tree_share * 1e-5 / 4)  # the tree is never for nothing
    on_gpu = lambda leapfrogs: model.costs(on_cpu=False, **known, leapfrogs=leapfrogs).overhead
    assert on_gpu((6.0, 3.0)) == known["sequential"]  # where only a sequential step of NUTS was measured
    assert on_gpu(None) == seconds


def test_which_devices_are_a_choice(monkeypatch: pytest.MonkeyPatch) -> None:
    """CPU devices up to the number of cores, all of other kinds; only those the user named; one for each process."""
    devices = lambda platform: [Mock(jax.Device, platform=platform) for _ in range(8)]
    cpus, gpus = devices("cpu"), devices("gpu")
    sets = lambda named=(): automatic.device_sets(named)
    monkeypatch.setattr(automatic, "num_cores", lambda: 2)
    monkeypatch.setattr(automatic, "default_devices", lambda: cpus)
    assert sets() == [(), tuple(cpus[:2])]
    assert sets(cpus[:4]) == [cpus[:4]]
    monkeypatch.setattr(automatic, "default_devices", lambda: gpus)
    assert sets() == [(), tuple(gpus)]
    monkeypatch.setattr(automatic, "default_devices", lambda: gpus[3:4])
    assert sets() == [()]
    monkeypatch.setattr(automatic, "default_devices", lambda: gpus)
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    assert sets() == [()]


def test_a_device_set_as_default_is_kept_to() -> None:
    device = jax.devices()[0]
    assert automatic.default_devices() == jax.local_devices()
    with jax.default_device(device):
        assert automatic.default_devices() == [device]


def test_newton_may_take_what_any_solve_may() -> None:
    """A run that fails costs a tenth of a sequential run at most; where more is needed, it is not considered."""
    keys = jax.random.split(jax.random.key(1), 2)
    inputs = jax.random.normal(keys[0], (6000, 32))
    pilot = coalescence_time(lambda x, u: 0.99 * x + u, jnp.zeros(32), jnp.ones(32), inputs, scale=1.0, tol=1e-13)
    for overhead in (1e-6, 1e-5, 1e-4, 1e-3, 1e-2):
        costs = Costs(1e-4, overhead, 1e-12, 0.0)
        newton = [c for c in plan(10_000, 1, costs, pilot, dim=1).candidates if c.name == "DEER"]
        iteration = overhead * (1 + math.log2(10_000))
        assert bool(newton) == (overhead < 5e-3)
        for candidate in newton:
            assert candidate.num_steps <= candidate.solver.max_iters
            assert candidate.solver.max_iters * iteration <= 0.1 * 10_000 * costs.sequential


def test_segments_risk_a_tenth() -> None:
    """Any segment could fail next, and would cost at most what was saved and a tenth of a sequential run."""
    for step in (2.0, 50.0, 150.0):  # cost of a step of 256 lanes, in sequential steps
        segments = schedule(10**6, 256, 50.0, step, 10**6)
        assert sum(segments) == 10**6
        assert segments[0] <= 10**6 / 8
        spent, done = 0.0, 0
        for length in segments:
            allowed = 0.1 * 10**6 + max(done - spent, 0.0)
            assert step * (length / 256 + 2 * 50) <= allowed  # two merges can be waited for
            spent, done = spent + step * (length / 256 + 50), done + length
    assert len(schedule(10**6, 256, 50.0, 2.0, 10**6)) == 2
    assert next_segment(1000, 900, 800.0, 1.0, 10, 5.0, 1000) == 100
    assert next_segment(1000, 500, 0.0, 1.0, 10, 5.0, 1000) == 500  # 100 steps are allowed, ten are for merges
    assert next_segment(1000, 100, 0.0, 5.0, 10, 5.0, 1000) == 100
    assert next_segment(1000, 100, 0.0, 20.0, 10, 5.0, 1000) == 1  # merges alone would take more than is allowed


def test_paths_tell_what_a_run_tells() -> None:
    """`coalescence_of_paths` of the recorded paths equals `coalescence_time`, field by field."""
    keys = jax.random.split(jax.random.key(0), 4)
    first, second = 3 * jax.random.normal(keys[0], (2, 6, 3))
    inputs = jax.random.normal(keys[1], (200, 6, 3))
    matrix = 0.8 * jnp.linalg.qr(jax.random.normal(keys[2], (3, 3)))[0]
    step = lambda x, u: jnp.tanh(matrix @ x) + 0.3 * u
    scale = jnp.array([1.0, 2.0, 0.5])
    expected = coalescence_time(step, first, second, inputs, scale=scale, tol=1e-6)
    many = jax.vmap(step)
    paths = [
        np.concatenate([x[None], jax.lax.scan(lambda x, u: (many(x, u),) * 2, x, inputs)[1]]) for x in (first, second)
    ]
    stop = int(expected.num_steps)
    assert 20 < stop < 200
    until = lambda n: [np.swapaxes(path[:n], 0, 1) for path in paths]
    found = coalescence_of_paths(*until(stop + 1), scale=scale, tol=1e-6)
    np.testing.assert_array_equal(found.steps, expected.steps)
    np.testing.assert_array_equal(found.dimension_steps, expected.dimension_steps)
    np.testing.assert_allclose(found.distances, expected.distances[: stop + 1], rtol=1e-9)
    np.testing.assert_allclose(found.growth_rate, expected.growth_rate, rtol=1e-9)
    np.testing.assert_allclose(found.growth_error, expected.growth_error, rtol=1e-9)
    np.testing.assert_allclose(found.movement, expected.movement[:stop], rtol=1e-9)
    np.testing.assert_allclose(found.dimension_movement, expected.dimension_movement, rtol=1e-9)
    short = coalescence_of_paths(*until(10), scale=scale, tol=1e-6)
    assert not short.merged.any()
    assert np.all(short.steps == 10)


def assert_same(chain: pmcmc.Chain, expected: pmcmc.Chain) -> None:
    np.testing.assert_allclose(chain.get_samples(), expected.get_samples(), rtol=0, atol=1e-9)


@pytest.mark.parametrize("step", [0.5, 4.0, 10.0])
def test_a_failing_segment_takes_its_allowance_at_most(
    step: float, free_lanes, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Planted costs: a step of all lanes takes ``step`` sequential steps; merges take longer than the pilot says."""
    short, attempts, take = merging(np.arange(2, 34)), [], segments.Run.take

    def recorded(self, solver, shape, wanted):
        found = take(self, solver, shape, wanted)
        if isinstance(solver, MultipleShooting):
            attempts.append((solver, int(np.max(found[0].stats.num_sequential_steps))))
        return found

    monkeypatch.setattr(segments.Run, "take", recorded)
    monkeypatch.setattr(automatic, "couple", lambda head, own: pilot.Pilot(short, "", 0.0))
    monkeypatch.setattr(automatic.Automatic, "costs", lambda self, head: Costs(1e-3, step * 1e-3, 1e-15, 0.0))
    monkeypatch.setattr(automatic, "plan", lambda *a, dim, **options: plan(*a, dim=None, **options))
    options = dict(kernel=pmcmc.HMC(num_integration_steps=2), num_samples=20_000, **SIZES)
    pmcmc.sample(gaussian, start_like(gaussian), 3, solver="auto", **options)
    first, taken = attempts[0]
    assert first.max_steps >= taken
    assert first.max_steps * step <= 0.1 * 20_000 * 1.05  # to rounding of blocks to whole chunks


def test_a_plan_that_fails_loses_nothing(free_lanes, monkeypatch: pytest.MonkeyPatch) -> None:
    """Blocks of a chain whose pairs take about 300 steps to merge, under a pilot that says 20, at a loss."""
    short = merging(np.arange(2, 34))
    monkeypatch.setattr(automatic, "couple", lambda head, own: pilot.Pilot(short, "", 0.0))
    monkeypatch.setattr(automatic.Automatic, "costs", lambda self, head: Costs(1e-12, 1e-12, 1e-14, 0.0))
    options = dict(kernel=pmcmc.HMC(num_integration_steps=2), num_samples=8000, **SIZES)  # nearly half a period
    run = lambda solver: pmcmc.sample(gaussian, start_like(gaussian), 3, solver=solver, **options)
    chain = run("auto")
    assert chain.report.decision == "shooting"
    assert np.any(chain.report.result == RESULTS.max_iters_reached)
    assert "max_iters_reached" in chain.report.fallback
    assert np.all(chain.report.certified_steps < 1100)
    # The first segment is an eighth of the run, and it was given up after a few of its predicted merges.
    assert np.all(chain.report.num_sequential_steps < 8000 + 1000)
    assert_same(chain, run(Sequential()))


def test_a_slow_merge_ends_a_segment_not_the_run(free_lanes, monkeypatch: pytest.MonkeyPatch) -> None:
    """The failed segment certified more than it cost, so blocks go on from there."""
    short, taken, take = merging(np.arange(20, 52)), [], segments.Run.take
    monkeypatch.setattr(automatic, "couple", lambda head, own: pilot.Pilot(short, "", 0.0))
    monkeypatch.setattr(segments.Run, "take", lambda *a: taken.append(take(*a)) or taken[-1])
    kernel = pmcmc.HMC(step_size=0.49, num_integration_steps=1, step_size_jitter=0.0)  # short steps
    options = dict(kernel=kernel, num_samples=20_000, **SIZES)
    run = lambda solver: pmcmc.sample(gaussian, start_like(gaussian), 3, solver=solver, **options)
    chain = run("auto")
    failed = [why for segment, why, _ in taken if why]
    assert failed
    assert all("max_iters_reached" in why for why in failed)
    assert chain.report.fallback == ""
    assert np.all(chain.report.result == RESULTS.successful)
    assert np.all(chain.report.num_sequential_steps < 20_000)
    assert np.all((chain.report.residual > 0) & (chain.report.residual <= 512 * np.finfo(float).eps))
    assert_same(chain, run(Sequential()))


def test_blocks_slower_than_planned_are_left(free_lanes, monkeypatch: pytest.MonkeyPatch) -> None:
    """Segments take longer than sequential sampling would: their steps are kept, the rest is sampled sequentially."""
    monkeypatch.setattr(automatic.Automatic, "costs", lambda self, head: Costs(1e-12, 1e-12, 1e-14, 0.0))
    run = lambda solver: pmcmc.sample(gaussian, start_like(gaussian), 3, num_samples=20_000, solver=solver, **SIZES)
    chain = run("auto")
    assert chain.report.decision == "shooting"
    assert "times as long" in chain.report.fallback or "max_iters_reached" in chain.report.fallback
    assert np.all((chain.report.certified_steps > 1000) & (chain.report.certified_steps < 4000))
    assert_same(chain, run(Sequential()))


def test_the_pilot_does_not_disturb_the_timing(free_lanes, monkeypatch: pytest.MonkeyPatch) -> None:
    """Few steps are sampled for a partner, so neither their overhead nor comparing counts as the time of a step."""
    seen, real, compare = [], pilot.couple, pilot.coalescence_of_paths

    def couple(head, own):
        done, timed = head.run.done, head.seconds_per_step
        found = real(head, own)
        seen.append((head.run.done - done, head.seconds_per_step / timed))
        return found

    monkeypatch.setattr(automatic, "couple", couple)
    monkeypatch.setattr(pilot, "coalescence_of_paths", lambda *a, **k: time.sleep(2) or compare(*a, **k))
    report = pmcmc.sample(gaussian, start_like(gaussian), 3, num_samples=8000, **SIZES).report
    assert report.pilot_seconds > 2
    assert report.solve_seconds > 0
    ((more, ratio),) = seen
    assert more > 0  # it did sample further
    assert ratio == 1


@pytest.mark.slow
def test_slow_pairs_are_followed_to_their_merge(free_lanes, monkeypatch: pytest.MonkeyPatch) -> None:
    """A pair slower than the first ones does not end the pilot, and merged pairs are not followed."""
    couples, real = [], pilot.Couple
    monkeypatch.setattr(pilot, "Couple", lambda *arguments: couples.append(real(*arguments)) or couples[-1])
    monkeypatch.setattr(pilot, "FIRST_STRETCH", 2)
    options = dict(kernel=pmcmc.RandomWalk(), num_samples=60_000, num_warmup=200, num_chains=1, progress_bar=False)
    found = pmcmc.sample(gaussian, start_like(gaussian), 1, **options).report
    lengths = [one.num_steps for one in couples]
    assert len(set(lengths)) > 2
    assert np.all(found.plan.coalescence.merged)
    scale, steps = couples[0].head.run.engine.scale, []
    for one in couples:
        one.follow(max(lengths), scale, 0.0)
        steps += coalescence_of_paths(*one.pairs(max(lengths)), scale=scale, tol=1e-10).steps.tolist()
    assert found.coalescence_steps.tolist() == steps


def test_short_runs_have_no_pilot() -> None:
    chain = pmcmc.sample(gaussian, start_like(gaussian), 3, num_samples=500, **SIZES)
    assert chain.report.plan is None
    assert chain.report.decision == "sequential"
    assert "too short" in chain.report.reason
    assert np.isnan(chain.report.predicted_seconds)


def separated(x):
    """Two modes 40 standard deviations apart."""
    return jnp.logaddexp(-0.5 * jnp.sum((x - 20) ** 2), -0.5 * jnp.sum((x + 20) ** 2))


def two_modes():
    x = numpyro.sample("x", dist.ImproperUniform(dist.constraints.real_vector, (), (2,)))
    numpyro.factor("modes", separated(x))


@pytest.mark.filterwarnings("ignore:the draws have not mixed")
def test_separated_modes_do_not_merge(free_lanes) -> None:
    """Each mode contracts (the exponent is negative), and pairs in different modes stay there."""
    kernel = pmcmc.HMC(step_size=0.5, num_integration_steps=3)
    starts = jnp.array([[20.0, 20.0], [-20.0, -20.0], [20.0, 20.0], [-20.0, -20.0]])
    with pytest.warns(UserWarning, match="did not settle.*separate modes"):
        chain = pmcmc.parallel_chain(
            two_modes, 0, init_params={"x": starts}, num_samples=40_000, **{**SIZES, "num_chains": 4}
        )
    assert chain.report.decision == "sequential"
    assert not np.all(chain.report.plan.coalescence.merged)
    assert any("separate modes" in text for text in chain.report.diagnosis.suggestions)
    target = pmcmc.Target.from_logdensity(separated, starts[0])
    keys = jax.random.split(jax.random.key(0), (500, 2))
    noise = jax.vmap(jax.vmap(lambda key: kernel.sample_noise(key, target)))(keys)
    pairs = coalescence_time(kernel.transition(target), starts[:2], -starts[:2], noise, scale=jnp.ones(2))
    assert not pairs.merged.any()
    same = coalescence_time(kernel.transition(target), starts[:2], starts[:2] + 0.5, noise, scale=jnp.ones(2))
    assert same.merged.all()
    assert same.growth_rate < 0


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:the draws have not mixed")  # |x| changes slowly
def test_resonant_length_does_not_contract(free_lanes) -> None:
    """Half a period of a Gaussian maps every x to -x."""
    normal = lambda x: -0.5 * jnp.sum(x**2)
    kernel = pmcmc.HMC(
        step_size=np.pi / 60, num_integration_steps=60, step_size_jitter=0.0, inverse_mass_matrix=np.ones(2)
    )
    chain = pmcmc.sample(normal, jnp.zeros(2), 0, kernel=kernel, num_samples=4000, **SIZES)
    assert chain.report.decision == "sequential"
    assert any("step_size_jitter" in text for text in chain.report.diagnosis.suggestions)


def test_a_pilot_that_stands_still_is_no_error(free_lanes, monkeypatch: pytest.MonkeyPatch) -> None:
    """Steps so long that none is accepted: no evidence of contraction, and a warning about the draws."""
    monkeypatch.setattr("pmcmc.warmup.lanes.check_tuned", lambda *found: None)
    with pytest.warns(UserWarning, match="accepted no move"):
        chain = pmcmc.sample(
            gaussian, start_like(gaussian), 3, kernel=pmcmc.MALA(step_size=1e6), num_samples=4000, **SIZES
        )
    assert chain.report.decision == "sequential"
    assert "no chain moved" in chain.report.reason


def centred(error, effect):
    mu = numpyro.sample("mu", dist.Normal(0, 5))
    tau = numpyro.sample("tau", dist.HalfCauchy(5))
    with numpyro.plate("school", 8):
        theta = numpyro.sample("theta", dist.Normal(mu, tau))
        numpyro.sample("effect", dist.Normal(theta, error), obs=effect)


@pytest.mark.filterwarnings("ignore:the draws have not mixed", "ignore:.*did not move", "ignore:.*accepted no move")
@funnel_may_warn
def test_the_report_says_what_keeps_chains_apart(free_lanes) -> None:
    """Four pairs of a run do not always show it, and which runs do depends on the processor's rounding."""
    effect = jnp.array([28.0, 8, -3, 7, -1, 1, 18, 12])
    error = jnp.array([15.0, 10, 16, 11, 9, 11, 10, 18])
    named, advised = [], []
    for seed in range(1, 5):
        chain = pmcmc.parallel_chain(centred, seed, model_args=(error, effect), num_samples=4000, **SIZES)
        report = chain.report
        if report.diagnosis is None:
            continue
        assert report.decision == "sequential"
        assert "Kept apart by" in str(report)
        assert report.bias_bound[-1] > 0.01
        assert "Bias left by warm-up: not" in str(report)  # below 0.01 sd, or not judged
        ranks = [(-site.num_apart, -site.distance) for site in report.diagnosis.sites.values()]
        assert ranks == sorted(ranks)
        named.append(set(report.diagnosis.sites))
        advised += [text for text in report.diagnosis.suggestions if "reparam=pmcmc.AutoReparam()" in text]
    assert len(named) >= 2
    assert {"tau", "theta"} <= set.union(*named) <= {"mu", "tau", "theta"}
    assert advised
    assert all("'theta'" in text and "'mu'" not in text for text in advised)


def test_the_report_of_a_plan(free_lanes) -> None:
    chain = pmcmc.sample(gaussian, start_like(gaussian), 3, num_samples=20_000, **SIZES)
    report = chain.report
    value, lower, upper = report.predicted_num_sequential_steps
    assert lower <= value <= upper
    assert 1 / 1.5 < np.max(report.num_sequential_steps) / value < 1.5
    assert report.bias_bound[0] > 1
    assert report.bias_bound[-1] < 1e-6
    assert report.diagnosis is None
    for words in ("Planned:", "planned", "Bias left by warm-up: below 0.01"):
        assert words in str(report), words


@funnel_may_warn
def test_funnel_stays_sequential(free_lanes) -> None:
    chain = pmcmc.sample(funnel, start_like(funnel), 0, num_samples=4000, **SIZES)
    assert chain.report.decision == "sequential"
    assert not chain.report.plan.coalescence.merged.all()


def test_picture_of_merges(free_lanes) -> None:
    """One line for each pair with its distances, one line for each site."""
    import matplotlib

    matplotlib.use("Agg")
    chain = pmcmc.sample(gaussian, start_like(gaussian), 3, num_samples=20_000, **SIZES)
    left, right = pmcmc.plots.merge_distances(chain)
    pilot = chain.report.plan.coalescence
    merges = np.asarray(pilot.steps)
    shown = np.stack([line.get_ydata() for line in left.lines[: merges.size]], axis=1)
    for pair, steps in enumerate(merges):
        np.testing.assert_allclose(shown[: steps + 1, pair], pilot.distances[: steps + 1, pair])
        assert np.all(np.isnan(shown[steps + 1 :, pair]))
    assert [text.get_text() for text in right.get_legend().get_texts()] == ["position"]
    matplotlib.pyplot.close(left.figure)
