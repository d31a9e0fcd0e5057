"""Parts of the lanes that are solved at once, each by a thread: the path and its certificate are those of one part."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import pmcmc
from benchmarks.gibbs import schools_gibbs
from pmcmc.recurrence import RESULTS, MultipleShooting, Sequential
from pmcmc.sampling import engine as engines
from pmcmc.sampling.engine import Engine
from pmcmc.sampling.programs import Shape
from tests.helpers.targets import gaussian, start_like

NUM_BLOCKS, LENGTH = 48, 32


def bank(dim: int = 3) -> jax.Array:
    return jnp.asarray(np.random.default_rng(0).standard_normal((8, dim)))


def new_engine(kernel: pmcmc.Kernel | None = None, num_chains: int = 1, density: Any = gaussian) -> Engine:
    target = pmcmc.Target.from_logdensity(density, jnp.zeros(3))
    kernel = kernel or pmcmc.HMC(step_size=0.5, num_integration_steps=3)
    return Engine(target, kernel, jax.random.split(jax.random.key(0), num_chains), bank(), jnp.ones(3))


def solve(engine: Engine, num_parts: int, num_segments: int = 2, length: int = LENGTH, **options: Any) -> list[Any]:
    """Return what segments of an engine hold, in numpy."""
    solver = MultipleShooting(num_blocks=NUM_BLOCKS, **options)
    shape = Shape(NUM_BLOCKS, length, num_parts=num_parts)
    shape = shape._replace(draws=engine.draws_noise(solver, NUM_BLOCKS // num_parts))
    x, found = jax.tree.map(lambda x: x[: engine.num_chains], engine.guesses), []
    for number in range(num_segments):
        first = np.full(engine.num_chains, number * NUM_BLOCKS * length)
        segment, _ = engine.solve(solver, shape, x, first, length)
        found.append(jax.tree.map(np.array, (segment.chains(), segment.result, segment.residual, segment.stats)))
        x = jax.tree.map(lambda x: x[:, -1], found[-1][0][0])
    return found


def same(a: Any, b: Any) -> None:
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-8, atol=1e-10), a, b)


KERNELS = {
    "hmc": pmcmc.HMC(step_size=0.5, num_integration_steps=3),
    "mala": pmcmc.MALA(step_size=0.5),
    "walk": pmcmc.RandomWalk(step_size=0.8),
    "nuts": pmcmc.NUTS(step_size=0.5, max_num_doublings=3),
}


@pytest.mark.parametrize("name", KERNELS)
@pytest.mark.parametrize(("num_chains", "num_parts"), [(1, 2), (3, 2), (1, 4), (2, 4)])
def test_chains_do_not_depend_on_the_number_of_parts(name: str, num_chains: int, num_parts: int) -> None:
    """Neither do infos, also where a part ends within a chain, or with one.

    The critical path may be longer: parts wait for each other between their calls.
    """
    whole, parts = (solve(new_engine(KERNELS[name], num_chains), n) for n in (1, num_parts))
    for one, other in zip(whole, parts, strict=True):
        same(other[:2], one[:2])
        assert (other[2] <= 512 * np.finfo(float).eps).all()
        assert (other[3].num_sequential_steps >= one[3].num_sequential_steps).all()
        assert (other[1] == RESULTS.successful).all()
        assert (other[3].certified_steps == NUM_BLOCKS * LENGTH).all()


def test_the_chain_is_that_of_sequential_sampling() -> None:
    engine, length = new_engine(), NUM_BLOCKS * LENGTH
    (found,) = solve(engine, 4, num_segments=1)
    segment, _ = engine.solve(Sequential(), Shape(1, length), engine.guesses[:1], np.zeros(1, int), length)
    np.testing.assert_allclose(found[0][0], segment.chains()[0], atol=1e-10)


def slow(x: jax.Array) -> jax.Array:
    """A density on which steps of this size merge only after several blocks."""
    return -jnp.sum(x**2) / 2 / 30**2


SLOW = pmcmc.MALA(step_size=3.0)


def test_ends_are_handed_on_until_the_last_part_has_them() -> None:
    """Merges take longer than a part has steps, so corrections pass through several parts."""
    one, other = (solve(new_engine(SLOW, density=slow), n, num_segments=1, length=4)[0] for n in (1, 4))
    assert one[3].num_sweeps[0] > NUM_BLOCKS / 4  # a run longer than a part
    assert other[1] == one[1] == RESULTS.successful
    np.testing.assert_allclose(other[0][0], one[0][0], atol=1e-9)


@pytest.mark.parametrize("options", [dict(max_sweeps=2), *(dict(max_steps=n) for n in (5, 8, 12, 30, 61))], ids=str)
@pytest.mark.parametrize(("num_chains", "num_parts"), [(1, 4), (2, 4), (3, 4), (2, 1)])
def test_a_budget_ends_the_repair_of_all_parts(num_chains: int, num_parts: int, options: dict[str, int]) -> None:
    """What is certified then is right, and no less than the blocks whose start is known."""
    engine, steps = new_engine(SLOW, num_chains, slow), NUM_BLOCKS * 4
    (found,) = solve(engine, num_parts, num_segments=1, length=4, **options)
    (path, *_), result, residual, stats = found
    assert (result == RESULTS.max_iters_reached).all()
    assert np.isinf(residual).all()
    assert (stats.certified_steps >= 4).all()
    assert (stats.certified_steps < steps).all()
    shape, x0, first = Shape(1, steps), engine.guesses[:num_chains], np.zeros(num_chains, int)
    truth = engine.solve(Sequential(), shape, x0, first, steps)[0].chains()[0]
    for chain, certified in enumerate(stats.certified_steps):
        np.testing.assert_allclose(path[chain, :certified], truth[chain, :certified], atol=1e-9)
    assert (stats.num_sequential_steps <= options.get("max_steps", np.inf)).all()


@pytest.mark.parametrize("num_parts", [1, 2])
def test_a_finished_chain_stands_where_a_budget_stops_another(num_parts: int) -> None:
    """Merges are longer than a block, so the first chain's last block hands on its end; the other chain takes none."""
    engine, length = new_engine(pmcmc.RandomWalk(step_size=1.0), num_chains=2), 5
    (full,) = solve(engine, num_parts, num_segments=1, length=length)
    slower, faster = full[3].num_sequential_steps
    assert slower > faster + 10
    (found,) = solve(engine, num_parts, num_segments=1, length=length, max_steps=(int(slower) + int(faster)) // 2)
    assert found[3].certified_steps[1] == NUM_BLOCKS * length
    assert found[3].certified_steps[0] < NUM_BLOCKS * length


def test_a_state_that_is_not_finite_ends_the_certified_prefix() -> None:
    """The block of a part that overflows hands on nothing."""
    overflow = lambda x: jnp.where(x[0] > 1.5, jnp.inf, 0.0) + gaussian(x)
    kernel = pmcmc.RandomWalk(step_size=0.8)
    one, other = (solve(new_engine(kernel, density=overflow), n, num_segments=1)[0] for n in (1, 4))
    same(other[1:3], one[1:3])
    same(other[3].certified_steps, one[3].certified_steps)


def test_each_part_measures_the_scale_if_none_is_given() -> None:
    case = schools_gibbs(1000)
    start = case.start(jax.random.key(1), 8)
    engine = Engine(case.target, case.kernel, jax.random.split(jax.random.key(0), 1), start, None)
    one, other = (solve(engine, n, num_segments=1)[0] for n in (1, 2))
    assert one[1] == other[1] == RESULTS.successful
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4), other[0][0], one[0][0])


def test_one_chain_in_blocks_is_cut_into_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    """The public call gives the same draws for any number of cores."""

    def draws(cores: int) -> np.ndarray:
        monkeypatch.setattr(engines, "num_cores", lambda: cores)
        chain = pmcmc.sample(
            gaussian,
            start_like(gaussian),
            0,
            kernel=pmcmc.HMC(),
            solver=MultipleShooting(num_blocks=32),
            num_warmup=200,
            num_samples=2000,
            num_chains=1,
            progress_bar=False,
        )
        assert chain.report.certified_steps.sum() == 2000
        return np.asarray(chain.get_samples())

    np.testing.assert_allclose(draws(2), draws(1), atol=1e-8)


class Walker(MultipleShooting):
    """A solver of a user's that walks blocks in a way of its own."""

    in_parts = False


def test_other_solvers_are_not_called_in_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engines, "num_cores", lambda: 2)
    for num_chains, expected in ((1, (1, 1)), (2, (2, 1))):
        shape = new_engine(num_chains=num_chains).shape_for(Walker(num_blocks=NUM_BLOCKS), 1000)
        assert (shape.num_groups, shape.num_parts) == expected
    assert new_engine().shape_for(MultipleShooting(num_blocks=NUM_BLOCKS), 1000).num_parts == 2


def test_integer_states_compile_one_program(caplog: pytest.LogCaptureFixture) -> None:
    """The measured scale of integers has one dtype in all calls."""
    target = pmcmc.Target.from_logdensity(lambda x: 0.1 * jnp.sum(x["z"]), dict(z=jnp.zeros(2, int)))
    kernel = pmcmc.DiscreteGibbs(supports={"z": [0, 1, 2]})
    bank = dict(z=jnp.asarray(np.random.default_rng(0).integers(0, 3, (8, 2))))
    engine = Engine(target, kernel, jax.random.split(jax.random.key(0), 1), bank, None)
    with jax.log_compiles():
        (found,) = solve(engine, 2, num_segments=1)
    assert found[1] == RESULTS.successful
    assert sum("Compiling jit(solve_part)" in record.getMessage() for record in caplog.records) == 1


@pytest.mark.parametrize(("platform", "capacities"), [("cpu", [2, 25, 63, 64, 112]), ("gpu", [2, 32, 64, 64, 112])])
def test_blocks_have_whole_chunks(platform: str, capacities: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    """Of 16 steps, also in blocks of fewer than four chunks where a loop of single steps costs most."""
    monkeypatch.setattr(engines, "default_platform", lambda: platform)
    solver, lengths = MultipleShooting(num_blocks=100), (200, 2500, 6300, 6400, 10_001)
    assert [new_engine().shape_for(solver, length).capacity for length in lengths] == capacities
