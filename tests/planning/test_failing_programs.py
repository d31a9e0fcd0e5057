"""What happens when a program fails in the middle of a run: no draw is lost, and "auto" goes on sequentially."""

from dataclasses import replace
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import pmcmc
from pmcmc.planning import Plan, plan
from pmcmc.planning.plan import Candidate, schedule
from pmcmc.recurrence import MultipleShooting, Sequential, deer
from pmcmc.sampling import automatic, engine, pilot, store
from pmcmc.sampling.engine import Engine
from tests.helpers.pilots import merging
from tests.helpers.targets import gaussian, start_like

SIZES = dict(kernel=pmcmc.HMC(step_size=0.9, num_integration_steps=2), num_warmup=0, num_chains=2, progress_bar=False)


def sample(solver, num_samples: int = 8000, **options) -> pmcmc.Chain:
    sizes = {**SIZES, **options}
    return pmcmc.sample(gaussian, start_like(gaussian), 3, solver=solver, num_samples=num_samples, **sizes)


@pytest.fixture
def failing(monkeypatch: pytest.MonkeyPatch):
    """Make programs fail: those of a kind of solver, or one call."""
    solve, calls = Engine.solve, []
    monkeypatch.setattr(engine, "SEGMENT_BYTES", 2**16)
    monkeypatch.setattr(engine, "SEQUENTIAL_BYTES", 2**16)

    def fail(*, solvers: type = object, number: int | None = None) -> None:
        def counted(self, solver, *args):
            calls.append(solver)
            if isinstance(solver, solvers) and len(calls) == (number or len(calls)):
                raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory.\nDetails follow.")
            return solve(self, solver, *args)

        monkeypatch.setattr(Engine, "solve", counted)

    return fail


def test_auto_goes_on_sequentially(failing, free_lanes, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(automatic, "couple", lambda head, own: pilot.Pilot(merging(np.arange(2, 34)), "", 0.0))
    whole = sample(Sequential())
    failing(solvers=MultipleShooting)
    chain = sample("auto")
    assert chain.report.fallback.startswith("A program of the solver failed (RESOURCE_EXHAUSTED: Out of memory). ")
    np.testing.assert_allclose(chain.get_samples(), whole.get_samples(), rtol=0, atol=1e-9)
    assert chain.verify()
    (said,) = [line for line in str(chain.report).splitlines() if line.startswith("Certificate")]
    assert said.startswith("Certificate: no step solved in parallel, 8,000 of each chain sampled sequentially; ")


@pytest.mark.parametrize("solver", [MultipleShooting(4), Sequential(), "auto"], ids=["shooting", "sequential", "auto"])
def test_draws_before_an_error_are_kept(solver, failing) -> None:
    whole = sample(Sequential())
    failing(number=3)
    with pytest.raises(jax.errors.JaxRuntimeError, match="RESOURCE_EXHAUSTED") as failed:
        sample(solver)
    chain = failed.value.chain
    assert 0 < chain.num_samples < 8000
    assert "attribute `chain`" in "".join(failed.value.__notes__)
    expected = whole.get_samples(group_by_chain=True)[:, : chain.num_samples]
    np.testing.assert_allclose(chain.get_samples(group_by_chain=True), expected, rtol=0, atol=1e-9)
    assert chain.verify()


def test_a_callback_that_fails_loses_no_draws(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []
    monkeypatch.setattr(engine, "SEQUENTIAL_BYTES", 2**16)

    def host(x):
        calls.append(1)
        if len(calls) > 5000:
            raise OSError("the licence server is away")
        return np.asarray(-0.5 * np.sum(x**2, axis=-1), x.dtype)

    density = lambda x: jax.pure_callback(host, jax.ShapeDtypeStruct((), x.dtype), x, vmap_method="expand_dims")
    options = dict(kernel=pmcmc.RandomWalk(step_size=0.5), num_warmup=0, num_chains=1, progress_bar=False)
    with pytest.raises(Exception, match="licence server") as failed:
        pmcmc.sample(density, jnp.zeros(2), 0, solver=Sequential(), num_samples=20_000, **options)
    assert 2000 < failed.value.chain.num_samples <= 5000


def test_a_streamed_run_keeps_its_draws(failing, tmp_path: Path) -> None:
    chain, whole = sample(Sequential(), num_samples=100), sample(Sequential())
    failing(number=4)
    with pytest.raises(jax.errors.JaxRuntimeError) as failed:
        chain.stream(tmp_path / "run", 7900, progress_bar=False)
    assert 100 <= failed.value.chain.num_samples < 8000
    stored = pmcmc.resume(tmp_path / "run", gaussian, initial_position=start_like(gaussian), progress_bar=False)
    found = stored.to_arviz()["posterior"]["x"]
    np.testing.assert_allclose(found, whole.get_samples(group_by_chain=True), rtol=0, atol=1e-9)


def test_newton_is_not_chosen_without_forward_derivatives(free_lanes, monkeypatch: pytest.MonkeyPatch) -> None:
    """A gradient by `jax.custom_vjp` has none. Planted: a plan that prefers DEER where it is considered."""

    @jax.custom_vjp
    def density(x):
        return -0.5 * jnp.sum(x**2)

    density.defvjp(lambda x: (density(x), x), lambda x, g: (-g * x,))
    dims = []

    def planted(num_steps, num_chains, costs, coalescence, *, dim, **options) -> Plan:
        dims.append(dim)
        found = plan(num_steps, num_chains, costs, coalescence, dim=None, **options)
        if dim is None:
            return found
        best = Candidate("DEER", deer(), 1.0, 1.0, 1.0, 0.0)
        return replace(found, chosen=best)

    monkeypatch.setattr(automatic, "plan", planted)
    monkeypatch.setattr(automatic, "couple", lambda head, own: pilot.Pilot(merging(np.arange(2, 34)), "", 0.0))
    options = dict(kernel=pmcmc.MALA(step_size=0.5), num_warmup=0, num_chains=2, progress_bar=False)
    for fn, expected in ((density, [3, None]), (lambda x: -0.5 * jnp.sum(x**2), [3])):
        dims.clear()
        chain = pmcmc.sample(fn, jnp.zeros(3), 0, num_samples=4000, **options)
        assert dims == expected
        assert chain.num_samples == 4000


def test_the_pilot_keeps_to_the_memory(free_lanes, monkeypatch: pytest.MonkeyPatch) -> None:
    """It kept 262,176 steps of the chains in any case, and copies of them."""
    held, kept = [], pilot.Head.extend

    def watched(self, num_steps):
        found = kept(self, num_steps)
        held.append(sum(x.nbytes for path in self._paths for x in jax.tree.leaves(path)))
        return found

    monkeypatch.setattr(pilot.Head, "extend", watched)
    walk = lambda x: -0.5 * jnp.sum(jnp.diff(x) ** 2) - 0.01 * jnp.sum(x**2)
    options = dict(kernel=pmcmc.HMC(step_size=0.2, num_integration_steps=1), num_warmup=40, num_chains=2)
    options |= dict(num_samples=20_000, thinning=500, progress_bar=False)
    for max_memory, excuse in ((2**25, False), (2**21 + 2**20, True)):
        held.clear()
        chain = pmcmc.sample(walk, jnp.zeros(300), 0, max_memory=max_memory, **options)
        assert 0 < max(held) < max_memory / 6
        assert ("too large to keep" in chain.report.reason) == excuse


def test_segments_are_bounded_by_memory_to_the_end() -> None:
    """After 1,000 segments, one took all that was left, so that a plan short of memory seemed cheap."""
    found = schedule(10**7, 64, 60.0, 0.2, 2000)
    assert sum(found) == 10**7
    assert max(found) <= 2000
    assert len(schedule(10**12, 4, 60.0, 0.9, 1)) < 3 * 10**6  # a plan that nobody chooses is not enumerated


def test_what_fails_while_draws_are_stored_is_no_reason_to_fall_back(free_lanes, tmp_path: Path, monkeypatch) -> None:
    """The steps would be taken and stored again."""
    chain = sample(Sequential(), num_samples=100)
    monkeypatch.setattr(automatic, "couple", lambda head, own: pilot.Pilot(merging(np.arange(2, 34)), "", 0.0))
    constrain, in_parallel, left = store.constrain, automatic.Automatic.in_parallel, []

    def begun(self, planned):
        left.append(1)  # one failure, in the first batch of the blocks
        return in_parallel(self, planned)

    def failing_once(*args, **options):
        if left and left.pop():
            raise jax.errors.JaxRuntimeError("no memory")
        return constrain(*args, **options)

    monkeypatch.setattr(automatic.Automatic, "in_parallel", begun)
    monkeypatch.setattr(store, "constrain", failing_once)
    monkeypatch.setattr(store, "_CONSTRAIN_BATCH", 256)
    with pytest.raises(jax.errors.JaxRuntimeError, match="no memory"):
        replace(chain, solver=None).stream(tmp_path / "run", 8000, progress_bar=False)
