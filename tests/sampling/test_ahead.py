"""Programs compiled during warm-up are the ones that sampling uses, and do not change the result."""

import threading
import time
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import pytest

import pmcmc
import pmcmc._xla.compile as compile_module
from benchmarks._compilations import compilations
from pmcmc._xla.compile import BackgroundCompiler, forget_programs
from pmcmc.interop.numpyro import numpyro_target
from pmcmc.planning import Costs, plan
from pmcmc.recurrence import MultipleShooting, Sequential
from pmcmc.sampling import api, automatic, engine
from pmcmc.sampling.engine import Engine
from tests.helpers.pilots import CPU, merging
from tests.helpers.selection import share
from tests.helpers.targets import gaussian, start_like

SIZES = dict(num_warmup=200, num_chains=2, progress_bar=False)
PROGRAMS = ("jit(draw_noise)", "jit(solve_noise)")


def test_jobs_run_once_and_in_order() -> None:
    ahead, seen, gate = BackgroundCompiler(), [], threading.Event()
    ahead.begin("first", lambda: gate.wait() and seen.append(1))
    ahead.begin("second", lambda: seen.append(2))
    ahead.begin("first", lambda: seen.append(3))
    assert not ahead.ready("first")
    assert not ahead.ready("second")
    assert ahead.ready("never begun")
    assert ahead.wait("never begun") < 1.0
    gate.set()
    ahead.wait("second")
    assert seen == [1, 2]
    assert ahead.ready("first")


def test_a_failed_job_is_silent() -> None:
    ahead = BackgroundCompiler()
    ahead.begin("broken", lambda: 1 / 0)
    ahead.wait("broken")
    assert ahead.ready("broken")
    ahead.begin("next", lambda: time.sleep(0.01))
    assert ahead.wait("next") >= 0.005


def test_a_thread_that_does_not_start_leaves_no_job(monkeypatch: pytest.MonkeyPatch) -> None:
    """As when the user presses Ctrl-C just then: the exception arrives."""
    ahead = BackgroundCompiler()

    def stop(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(ahead._pool, "submit", stop)
    with pytest.raises(KeyboardInterrupt):
        ahead.begin("first", lambda: None)
    ahead.close()
    assert ahead.ready("first")
    assert not compile_module.is_compiling()


def test_closing_waits_for_what_reads_the_model_alone() -> None:
    """Jobs that have not begun are dropped; a compilation that runs may finish later."""
    ahead, seen = BackgroundCompiler(), []
    began, read, compiled = (threading.Event() for _ in range(3))

    def job():
        began.set()
        read.wait()
        seen.append("read")
        return lambda: compiled.wait() and seen.append("compiled")

    ahead.begin("first", job)
    ahead.begin("second", lambda: seen.append("second"))
    began.wait()
    with ThreadPoolExecutor() as pool:
        closed = pool.submit(ahead.close)
        assert not closed.done()
        read.set()
        closed.result(timeout=60)
    assert seen == ["read"]
    compiled.set()
    ahead.wait("first")
    assert seen == ["read", "compiled"]


def test_models_run_one_at_a_time() -> None:
    """All threads share NumPyro's stack of handlers: two models at once would see each other's sites."""

    def slow(y):
        mu = numpyro.sample("mu", dist.Normal(0, 1))
        time.sleep(0.01)
        numpyro.sample("y", dist.Normal(mu, 1), obs=y)

    targets = [numpyro_target(slow, (jnp.array(float(y)),), {}) for y in range(4)]
    place = jnp.array([0.5])
    expected = [float(target.logdensity_fn(place)) for target in targets]
    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(lambda target: float(target.logdensity_fn(place)), targets * 5))
    assert found == expected * 5


KERNELS = {
    "HMC": pmcmc.HMC(),
    "HMC-given": pmcmc.HMC(num_integration_steps=3, inverse_mass_matrix=np.ones(3)),
    "MALA": pmcmc.MALA(step_size=0.3),
    "NUTS": pmcmc.NUTS(),
}


@pytest.fixture
def two_cores(free_lanes, monkeypatch: pytest.MonkeyPatch) -> None:
    """Lanes are cheap, but not as cheap as Newton's method needs, and programs are compiled in a second thread."""
    monkeypatch.setattr(automatic, "num_cores", lambda: 2)
    monkeypatch.setattr(engine, "num_cores", lambda: 2)
    monkeypatch.setattr(automatic.Automatic, "costs", lambda self, head: Costs(1e-3, 1e-3, 1e-5, 0.0))


def test_one_chain_in_parts_waits_for_no_program(two_cores) -> None:
    """The program of a part is called several times, and compiled once, ahead of time."""
    jax.clear_caches()
    with compilations() as seen:
        options = dict(num_warmup=200, num_chains=1, num_samples=4000, progress_bar=False)
        pmcmc.sample(gaussian, start_like(gaussian), 3, kernel=pmcmc.HMC(), solver=MultipleShooting(32), **options)
    of_parts = [(name, waited) for name, waited in seen if name in ("jit(solve_part)", "jit(conclude_parts)")]
    assert sorted(of_parts) == [("jit(conclude_parts)", False), ("jit(solve_part)", False)]


@pytest.mark.parametrize("kernel", share(KERNELS, "HMC"))
@pytest.mark.parametrize("solver", ["auto", MultipleShooting(4), Sequential()], ids=["auto", "blocks", "sequential"])
def test_sampling_waits_for_no_program_twice(kernel, solver, two_cores, monkeypatch: pytest.MonkeyPatch) -> None:
    """What was compiled for shapes is found for arrays: nothing is compiled when it is needed."""
    pools, pool = [], ThreadPoolExecutor
    monkeypatch.setattr(
        compile_module, "ThreadPoolExecutor", lambda **options: pools.append(pool(**options)) or pools[-1]
    )
    jax.clear_caches()
    with compilations() as seen:
        arguments = dict(kernel=kernel, solver=solver, num_samples=20_000, **SIZES)
        chain = pmcmc.sample(gaussian, start_like(gaussian), 3, **arguments)
        pools[0].shutdown()  # a program that was ready too late has ended as well
    beside = [name for name, waited in seen if not waited and name in PROGRAMS]
    both = solver == "auto" and chain.report.decision == "shooting"
    of_blocks = PROGRAMS if kernel == KERNELS["NUTS"] else PROGRAMS[1:]  # other kernels' noise is drawn in the solve
    assert sorted(beside) == sorted((*PROGRAMS, *of_blocks) if both else PROGRAMS)
    assert both or solver != "auto" or kernel != KERNELS["HMC"]
    if chain.report.decision != "newton":  # Newton's program is compiled when it is needed
        assert not [name for name, waited in seen if waited and name in PROGRAMS]


def test_plans_know_what_is_compiled(free_lanes, monkeypatch: pytest.MonkeyPatch) -> None:
    """A compilation that outweighs every gain does not count against blocks if an earlier run has done it."""
    forget_programs()
    sample = partial(pmcmc.sample, gaussian, start_like(gaussian), kernel=pmcmc.HMC(), **SIZES)
    assert sample(3, num_samples=20_000).report.decision == "shooting"
    monkeypatch.setattr(automatic.Automatic, "costs", lambda self, head: Costs(1e6, 1e6, 1e4, 1e15))
    again, other = sample(4, num_samples=20_000).report, sample(4, num_samples=10_000).report
    assert (again.decision, other.decision) == ("shooting", "sequential")
    assert again.plan.chosen.seconds < 1e15


@pytest.fixture
def begun(two_cores, monkeypatch: pytest.MonkeyPatch) -> list:
    """The solvers whose programs were compiled ahead, in order; a run of 20,000 steps counts as long."""
    solvers: list = []
    ahead = Engine.compile_ahead

    def compile_ahead(self, solver, shape):
        solvers.append(solver)
        ahead(self, solver, shape)
        self.background.wait((jax.tree.structure(solver), shape))  # so that no steps are taken in the meantime

    monkeypatch.setattr(Engine, "compile_ahead", compile_ahead)
    monkeypatch.setattr(automatic, "LONG_OPERATIONS", 2**20)
    monkeypatch.setattr(automatic, "LIKELY_LANES", 16)
    return solvers


def engine_of_two_chains() -> Engine:
    target = pmcmc.Target.from_logdensity(gaussian, start_like(gaussian))
    keys = jax.random.split(jax.random.key(0), 2)
    return Engine(target, pmcmc.HMC(step_size=0.5, num_integration_steps=3), keys, jnp.zeros((4, 3)), None)


def test_blocks_of_a_long_run_are_compiled_during_warm_up(begun: list, monkeypatch: pytest.MonkeyPatch) -> None:
    """The plan then counts no compilation for them, and the chain is the one that sequential sampling gives."""
    forget_programs()
    monkeypatch.setattr(automatic.Automatic, "costs", lambda self, head: Costs(1e-3, 1e-3, 1e-5, 1e15))
    run = lambda solver: pmcmc.sample(gaussian, start_like(gaussian), 3, num_samples=20_000, solver=solver, **SIZES)
    chain = run("auto")
    assert begun == [Sequential(), *[MultipleShooting(num_blocks=8, max_steps=1)] * 2]  # the second time by the plan
    assert (chain.report.decision, chain.report.plan.solver.num_blocks) == ("shooting", 8)
    assert not chain.report.fallback
    np.testing.assert_allclose(chain.get_samples(), run(Sequential()).get_samples(), rtol=0, atol=1e-9)


@pytest.mark.parametrize("why", ["", "short", "short blocks", "one core", "lanes", "solver", "devices", "no gain"])
def test_only_likely_blocks_are_compiled(why: str, begun: list, monkeypatch: pytest.MonkeyPatch) -> None:
    """For a long run by "auto" on a CPU with several cores, whose blocks are long and whose steps gain from lanes."""
    monkeypatch.setattr(Engine, "_trace", lambda *_: None)
    solver, devices = Sequential() if why == "solver" else None, jax.devices()[:1] if why == "devices" else ()
    if why == "no gain":
        monkeypatch.setattr(automatic, "lanes_gain", lambda *model: False)
    setting, value = {
        "short": ("LONG_OPERATIONS", 2**40),
        "short blocks": ("LIKELY_STEPS", 2501),  # the eight blocks have 2,500
        "one core": ("num_cores", lambda: 1),
        "lanes": ("LIKELY_LANES", 3),
    }.get(why, ("LIKELY_STEPS", 2500))
    monkeypatch.setattr(automatic, setting, value)
    run = engine_of_two_chains()
    automatic.compile_first(run, solver, 20_000, devices)
    assert begun == [Sequential(), *([] if why else [MultipleShooting(num_blocks=8, max_steps=1)])]


def test_plans_know_what_is_being_compiled(begun: list, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also in another run, as in ``mcmc.warmup(...)`` and then ``mcmc.run(...)``, which compiles nothing again."""
    gate, traced = threading.Event(), []
    monkeypatch.setattr(BackgroundCompiler, "wait", lambda *_: None)
    monkeypatch.setattr(Engine, "_trace", lambda _, *program: traced.append(program) or gate.wait)
    first, second = engine_of_two_chains(), engine_of_two_chains()
    plans = automatic.Automatic.__new__(automatic.Automatic)  # without a run, of which the plan asks this only
    plans.run, plans.devices = SimpleNamespace(engine=second, num_steps=20_000), ()
    forget_programs()
    assert not compile_module.is_compiling()
    assert plans.compiled_blocks() == set()
    automatic.compile_first(first, None, 20_000)
    first.background.close()
    assert compile_module.is_compiling()
    assert plans.compiled_blocks() == set()  # the program of blocks was waiting, so it is cancelled
    automatic.compile_first(second, None, 20_000)
    assert plans.compiled_blocks() == {MultipleShooting(num_blocks=8)}
    gate.set()
    for run in (first, second):
        run.background._pool.shutdown()
    assert [solver.is_sequential for solver, _ in traced] == [True, False]
    assert not compile_module.is_compiling()
    assert plans.compiled_blocks() == set()


def test_other_data_is_another_program() -> None:
    """The model and its static parts are equal, so shapes must distinguish the programs."""

    def model(y):
        numpyro.sample("y", dist.Normal(numpyro.sample("mu", dist.Normal(0, 1)), 1), obs=y)

    def engine(length: int) -> Engine:
        target = numpyro_target(model, (jnp.zeros(length),), {})
        return Engine(
            target, pmcmc.MALA(step_size=0.5), jax.random.split(jax.random.key(0), 1), jnp.zeros((2, 1)), None
        )

    forget_programs()
    first, shape = engine(3), engine(3).shape_for(Sequential(), 128)
    assert first.compile_seconds(Sequential(), shape) is None
    first.solve(Sequential(), shape, jnp.zeros((1, 1)), np.zeros(1, int), 128)
    assert engine(3).compile_seconds(Sequential(), shape) > 0
    assert engine(4).compile_seconds(Sequential(), shape) is None


def test_same_chain_whatever_is_compiled_when(two_cores, monkeypatch: pytest.MonkeyPatch) -> None:
    """Sequential steps until the program for blocks is ready, then blocks: the chain is the same."""
    answers = iter([False, False])
    monkeypatch.setattr(automatic.Engine, "is_ready", lambda self, *program: next(answers, True))
    run = lambda solver: pmcmc.sample(gaussian, start_like(gaussian), 3, num_samples=100_000, solver=solver, **SIZES)
    chain, alone = run("auto"), run(Sequential())
    assert chain.report.decision == "shooting"
    assert not chain.report.fallback
    assert chain.report.num_blocks > 1
    np.testing.assert_allclose(chain.get_samples(), alone.get_samples(), rtol=0, atol=1e-9)


def test_steps_in_order_beside_a_compilation() -> None:
    """Part of the compile time of a program is used for steps, which the blocks then need not take."""
    pilot, alone = merging(np.arange(20, 52)), CPU._replace(compile=2.0)
    beside = alone._replace(overlap=0.5)
    first, second = (plan(5 * 10**6, 1, costs, pilot).candidates for costs in (alone, beside))
    in_order = 1.0 / CPU.sequential
    assert min(c.seconds for c in second) < min(c.seconds for c in first)
    for c in second:
        if c.name.startswith("shooting"):
            assert c.seconds == pytest.approx(2.0 + (c.num_steps - in_order) * CPU.step(c.solver.num_blocks))
    # If the run would end during compilation, blocks gain nothing.
    late = plan(10**6, 1, CPU._replace(compile=30.0, overlap=1.0), pilot)
    assert isinstance(late.solver, Sequential)
    assert all(c.num_steps == 10**6 for c in late.candidates if "DEER" not in c.name)


@pytest.mark.slow
def test_shapes_are_those_of_warmup() -> None:
    target = pmcmc.Target.from_logdensity(gaussian, start_like(gaussian))
    warmups = pmcmc.WindowAdaptation(), pmcmc.EnsembleAdaptation(), pmcmc.EnsembleAdaptation(dense=False)
    for warmup in warmups:
        starts = jnp.zeros((warmup.count_starts(target), 3))
        for kernel in KERNELS.values():
            promised = warmup.tuned_shapes(target, kernel, len(starts))
            tuned = warmup.run(target, kernel, jax.random.key(0), starts, 100)
            for shape, found in zip(promised[:3], tuned[:3], strict=True):
                assert jax.tree.structure(shape) == jax.tree.structure(found)
                same = lambda s, x: s.shape == jnp.shape(x) and s.dtype == jnp.result_type(x)
                assert all(jax.tree.leaves(jax.tree.map(same, shape, found)))


def test_compilation_begins_before_starts_are_found(monkeypatch: pytest.MonkeyPatch) -> None:
    """Drawn starts are evaluated, which needs a program of its own; the programs of sampling do not wait for it."""
    events: list[str] = []
    drawn, ahead = api.numpyro_starts, Engine.compile_ahead

    def draw(*arguments):
        events.append("starts")
        return drawn(*arguments)

    def compile_ahead(self, *program):
        events.append("compilation")
        return ahead(self, *program)

    monkeypatch.setattr(api, "numpyro_starts", draw)
    monkeypatch.setattr(Engine, "compile_ahead", compile_ahead)
    pmcmc.parallel_chain(lambda: numpyro.sample("x", dist.Normal(0, 1)), 0, num_samples=20, **SIZES)
    assert events == ["compilation", "starts"]
