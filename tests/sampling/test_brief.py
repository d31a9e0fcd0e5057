"""Programs whose runs are shorter than their compilation are compiled with other options, to the same numbers."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import pmcmc
from pmcmc._xla import compile as compiling
from pmcmc.recurrence import MultipleShooting, RecurrenceSolver, Sequential
from pmcmc.sampling.engine import Engine
from pmcmc.sampling.programs import BRIEF_OPERATIONS, operations_of
from pmcmc.warmup import lanes

NUM_CHAINS, NUM_STEPS = 4, 64
SOLVERS = [Sequential(), MultipleShooting(num_blocks=4)]


def new_engine(dim: int = 3) -> Engine:
    target = pmcmc.Target.from_logdensity(lambda x: -0.5 * jnp.sum(x**2), jnp.zeros(dim))
    bank = jnp.asarray(np.random.default_rng(0).standard_normal((8, dim)))
    keys = jax.random.split(jax.random.key(0), NUM_CHAINS)
    return Engine(target, pmcmc.HMC(step_size=0.5, num_integration_steps=3), keys, bank, jnp.ones(dim))


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[bool]:
    """A list that receives, for every new program, whether it was compiled for a brief run."""
    compiling.forget_programs()
    seen: list[bool] = []
    options = compiling.compiler_options
    monkeypatch.setattr(compiling, "compiler_options", lambda where, brief=False: seen.append(brief) or options(where))
    return seen


@pytest.mark.parametrize("solver", SOLVERS, ids=lambda solver: type(solver).__name__)
@pytest.mark.parametrize("brief", [True, False])
def test_short_runs_are_compiled_quickly(solver: RecurrenceSolver, brief: bool, asked: list[bool]) -> None:
    """Those of noise, of the solve, and of a part of it, whether they are compiled ahead or not."""
    engine = new_engine()
    shape = engine.shape_for(solver, NUM_STEPS)
    assert shape.brief
    assert not engine.shape_for(solver, 10**9).brief
    engine._trace(solver, shape._replace(brief=brief))()
    length = shape.capacity if shape.num_blocks == 1 else 16
    first, start = np.zeros(NUM_CHAINS, int), engine.guesses[:NUM_CHAINS]
    ahead = len(asked)
    found, _ = engine.solve(solver, shape._replace(brief=brief), start, first, length)
    assert set(asked) == {brief}
    assert len(asked) == ahead  # no program was compiled anew
    expected, _ = new_engine().solve(Sequential(), engine.shape_for(Sequential(), NUM_STEPS), start, first, NUM_STEPS)
    np.testing.assert_allclose(found.chains()[0], expected.chains()[0], rtol=1e-6, atol=1e-6)


@pytest.mark.optimized
def test_both_kinds_of_programs_sample_the_same_chain() -> None:
    """With the options that users' programs have, up to rounding."""
    found = []
    for brief in (True, False):
        engine = new_engine()
        shape = engine.shape_for(Sequential(), NUM_STEPS)._replace(brief=brief)
        start = engine.guesses[:NUM_CHAINS]
        segment, _ = engine.solve(Sequential(), shape, start, np.zeros(NUM_CHAINS, int), NUM_STEPS)
        found.append(segment.chains()[0])
    np.testing.assert_allclose(*found, rtol=1e-9, atol=1e-9)


def test_long_trajectories_and_newton_are_not_brief() -> None:
    """A Newton solve evaluates steps and their tangents many times over."""
    engine = new_engine()
    assert not engine.shape_for(pmcmc.recurrence.deer(), NUM_STEPS).brief
    longest = max(2**k for k in range(40) if engine.shape_for(Sequential(), 2**k).brief)
    for number in (64, np.int64(64), jnp.asarray(64)):
        engine = new_engine()
        engine.kernel = pmcmc.HMC(step_size=0.5, num_integration_steps=number)
        assert not engine.shape_for(Sequential(), longest).brief


@pytest.mark.parametrize(("found", "stays"), [(64, True), (2**14, False)])
def test_programs_that_were_compiled_before_warm_up_are_used(found: int, stays: bool) -> None:
    """Warm-up finds longer trajectories than were expected: a run that is somewhat longer keeps its programs."""
    engine = new_engine()
    expected = jax.ShapeDtypeStruct((), jnp.int32)
    engine.kernel = pmcmc.HMC(step_size=0.5, num_integration_steps=expected)
    longest = max(2**k for k in range(40) if engine.shape_for(Sequential(), 2**k).brief)
    before = engine.shape_for(Sequential(), longest)
    engine.kernel = pmcmc.HMC(step_size=0.5, num_integration_steps=jnp.asarray(found))
    assert (engine.shape_for(Sequential(), longest) == before) == stays
    fresh = new_engine()
    fresh.kernel = engine.kernel
    assert not fresh.shape_for(Sequential(), longest).brief


def test_what_is_brief_depends_on_steps_chains_and_the_model() -> None:
    """It follows from shapes alone, so that the same call makes the same programs."""
    engine = new_engine()
    count = lambda engine, *more: operations_of(engine.target, engine.kernel, more[1], engine.guesses, more[0])
    one = lambda *case: count(*case) <= BRIEF_OPERATIONS
    longest = max(2**k for k in range(40) if one(engine, 2**k, engine.chain_keys))
    assert 10_000 < longest < BRIEF_OPERATIONS
    assert not one(engine, longest, jnp.tile(engine.chain_keys, 4))
    assert not one(new_engine(dim=64), longest, engine.chain_keys)


@pytest.mark.parametrize(
    ("num_rows", "num_steps", "brief"),
    [(100, 1000, True), (10**6, 1000, False), (10**5, 1000, True), (10**5, 1024, True), (10**5, 100_000, False)],
)
def test_short_warm_up_of_small_models_is_compiled_quickly(
    num_rows: int, num_steps: int, brief: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = jnp.ones(num_rows)
    target = pmcmc.Target.from_logdensity(lambda x: -0.5 * jnp.sum((rows - x[0]) ** 2) / num_rows, jnp.zeros(1))
    found = lanes.LaneEnsemble(pmcmc.HMC(num_integration_steps=2), jax.random.key(0), 0.8, num_steps=num_steps)
    found.enter(target, np.zeros((lanes.LEAST_LANES, 1)))
    seen = []
    timed = lanes.run_piece.timed
    monkeypatch.setattr(
        type(lanes.run_piece), "timed", lambda _, *args, brief, **kwargs: seen.append(brief) or timed(*args, **kwargs)
    )
    found.run(adapting=True)
    assert seen == [brief]


def test_quick_compilation_is_an_option_that_this_version_of_jax_knows() -> None:
    options = compiling.compiler_options("cpu", True)
    assert options is not None
    assert options["xla_cpu_use_fusion_emitters"] is False


def test_unknown_options_are_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    compiling.compiler_options.cache_clear()
    with monkeypatch.context() as patch:
        patch.setattr(compiling, "_QUICK", {"xla_no_such_option": True})
        with_own = compiling.compiler_options("cpu", True)
    compiling.compiler_options.cache_clear()
    assert with_own == compiling.compiler_options("cpu")
