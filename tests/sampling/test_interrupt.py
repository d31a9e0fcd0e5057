"""Ctrl-C loses nothing that was certified, and a request that is too large is refused before anything is sampled."""

import warnings
from dataclasses import dataclass
from functools import cache
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import pmcmc
from pmcmc._pytree import Array, register_dataclass
from pmcmc._xla import memory as _host
from pmcmc.kernels.base import PositionKernel
from pmcmc.recurrence import MultipleShooting, Sequential
from pmcmc.sampling import engine, settings
from pmcmc.sampling.engine import Engine
from pmcmc.sampling.reporting import Outcome
from pmcmc.sampling.segments import Draws
from pmcmc.sampling.session import Session
from tests.helpers.targets import gaussian, start_like

KERNEL = pmcmc.HMC(step_size=0.9, num_integration_steps=2)


def run(num_samples: int, **options) -> pmcmc.Chain:
    sizes = dict(kernel=KERNEL, num_warmup=0, num_chains=2, progress_bar=False, thinning=3)
    return pmcmc.sample(gaussian, start_like(gaussian), 0, num_samples=num_samples, **{**sizes, **options})


@cache
def whole() -> pmcmc.Chain:
    return run(2000, solver=Sequential())


@pytest.fixture
def interrupted_after(monkeypatch: pytest.MonkeyPatch):
    """Run in segments of about 300 steps, with Ctrl-C in one of them."""
    monkeypatch.setattr(engine, "SEGMENT_BYTES", 2**16)
    monkeypatch.setattr(engine, "SEQUENTIAL_BYTES", 2**16)
    solve, calls = Engine.solve, []

    def interrupt(number: int) -> None:
        def counted(*args):
            calls.append(1)
            if len(calls) == number:
                raise KeyboardInterrupt
            return solve(*args)

        monkeypatch.setattr(Engine, "solve", counted)

    return interrupt


@pytest.mark.parametrize("solver", [MultipleShooting(4), Sequential(), "auto"], ids=["shooting", "sequential", "auto"])
def test_what_stands_is_kept_and_goes_on(solver, interrupted_after) -> None:
    interrupted_after(3)
    with pytest.raises(pmcmc.Interrupted, match=r"stopped after \d+ of 2,000 steps.*chain.extend") as stopped:
        run(2000, solver=solver)
    chain = stopped.value.chain
    done = chain.state.num_steps
    assert 100 < done < 1900
    assert done == 3 * chain.num_samples == chain.report.num_steps
    assert chain.verify()
    longer = chain.extend(2000 - done, progress_bar=False)
    close = lambda a, b: np.testing.assert_allclose(a, b, rtol=0, atol=1e-9)
    jax.tree.map(close, (longer.unknowns, longer.last_state), (whole().unknowns, whole().last_state))


def test_an_extension_keeps_the_draws_before(interrupted_after) -> None:
    first = run(500, solver=Sequential())
    interrupted_after(2)
    with pytest.raises(pmcmc.Interrupted, match="of 1,500 steps") as stopped:
        first.extend(1500, progress_bar=False)
    chain = stopped.value.chain
    assert chain.num_samples > first.num_samples
    np.testing.assert_allclose(chain.unknowns, whole().unknowns[:, : chain.num_samples], rtol=0, atol=1e-9)
    assert chain.verify()


def test_chains_that_stand_at_different_steps_go_back_to_the_last_common_draw(interrupted_after) -> None:
    """The budget suffices for the blocks of one chain only, and Ctrl-C comes before the other has caught up."""
    wide = dict(num_samples=300, num_chains=4, thinning=1)
    paths = run(solver=MultipleShooting(4), **wide).report.num_sequential_steps
    interrupted_after(2)
    with pytest.raises(pmcmc.Interrupted) as stopped:
        run(solver=MultipleShooting(4, max_steps=int(np.sort(paths)[1])), **wide)
    chain = stopped.value.chain
    assert 0 < chain.num_samples < 300
    assert chain.verify()


def test_finished_draws_survive_a_stop_while_they_are_judged(monkeypatch: pytest.MonkeyPatch, tmp_path) -> None:
    first, close = run(500, solver=Sequential()), lambda a, b: np.testing.assert_allclose(a, b, rtol=0, atol=1e-9)

    def interrupt(*args):
        raise KeyboardInterrupt

    monkeypatch.setattr(Outcome, "warn", interrupt)
    with pytest.raises(pmcmc.Interrupted) as stopped:
        first.extend(1500, progress_bar=False)
    close(stopped.value.chain.unknowns, whole().unknowns)
    pytest.importorskip("zarr")
    with pytest.raises(pmcmc.Interrupted) as stopped:
        first.stream(tmp_path / "run", 1500, progress_bar=False)
    assert stopped.value.chain.num_samples == whole().num_samples


def test_finished_draws_survive_a_warning_that_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    whole()
    monkeypatch.setattr(Outcome, "warn", lambda *args: warnings.warn("doubtful", stacklevel=2))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(UserWarning, match="doubtful") as raised:
            run(2000, solver=Sequential())
    np.testing.assert_array_equal(raised.value.chain.unknowns, whole().unknowns)
    assert "attribute `chain`" in raised.value.__notes__[0]


def test_steps_that_are_cut_off_do_not_count_as_certified() -> None:
    """100 steps in order, then 200 in blocks, cut to the first 150."""
    chain, blocks = run(30, solver=Sequential()), MultipleShooting(4)
    with Session(settings.settings_of(chain, 300, None), False, chain.state.num_steps) as session:
        engine = session.engine_for(chain.state, lambda _: 0)
        outcome = session.start(chain.state, engine, Draws(engine, 100))
        outcome.run.take(Sequential(), engine.shape_for(Sequential(), 300), 100)
        outcome.run.take(blocks, engine.shape_for(blocks, 300), 200)
        assert outcome.report(150).certified_steps.tolist() == [50, 50]
        assert outcome.report(300).certified_steps.tolist() == [200, 200]


def test_before_the_first_draw_there_is_nothing_to_keep(interrupted_after, monkeypatch: pytest.MonkeyPatch) -> None:
    interrupted_after(1)
    with pytest.raises(KeyboardInterrupt) as stopped:
        run(2000, solver=Sequential())
    assert type(stopped.value) is KeyboardInterrupt

    def interrupt(*args):
        raise KeyboardInterrupt

    monkeypatch.setattr(pmcmc.EnsembleAdaptation, "run", interrupt)
    with pytest.raises(KeyboardInterrupt) as stopped:
        run(2000, num_warmup=100)
    assert type(stopped.value) is KeyboardInterrupt


@pytest.mark.parametrize("num_warmup", [0, 100])
def test_more_than_memory_holds(num_warmup: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Refused before warm-up; a draw takes 24 + 41 bytes of position and info."""
    monkeypatch.setattr(pmcmc.EnsembleAdaptation, "run", lambda *args: pytest.fail("warm-up has begun"))
    monkeypatch.setattr(settings, "available_bytes", lambda: 2.0**36)
    with pytest.raises(MemoryError, match=r"steps of 2 chain\(s\) need about .* GiB .*are available.*thinning="):
        run(2**32, num_warmup=num_warmup)
    monkeypatch.setattr(settings, "available_bytes", lambda: 1000.0)
    with pytest.raises(MemoryError, match="draws"):
        run(100, solver=Sequential())


def test_a_solve_takes_less_where_little_is_available(monkeypatch: pytest.MonkeyPatch) -> None:
    """A run in segments needs memory for its draws and for one segment."""
    monkeypatch.setattr(settings, "available_bytes", lambda: 3e5)
    chain = run(20_000, solver=Sequential(), thinning=100)
    np.testing.assert_array_equal(chain.get_samples(), run(20_000, solver=Sequential(), thinning=100).get_samples())


def test_an_extension_counts_the_draws_before_it() -> None:
    """A draw of both chains takes 130 bytes."""
    chain = run(3000, solver=Sequential(), thinning=1, max_memory=600_000)
    with pytest.raises(MemoryError, match=r"max_memory is .* for draws"):
        chain.extend(3000, progress_bar=False)
    longer = chain.extend(3000, max_memory=1_200_000, progress_bar=False)
    assert (longer.num_samples, longer.max_memory) == (6000, 1_200_000)


def test_available_memory_is_the_least_of_system_and_group(monkeypatch: pytest.MonkeyPatch, tmp_path) -> None:
    assert _host.available_bytes() > 2**20
    limit, use, statistics = tmp_path / "limit", tmp_path / "use", tmp_path / "statistics"
    monkeypatch.setattr(_host, "_GROUPS", ((str(limit), str(use), str(statistics), "inactive_file"),))
    limit.write_text("5000\n")
    use.write_text("2000\n")
    assert _host.available_bytes() == 3000
    statistics.write_text("anon 100\ninactive_file 700\nactive_file 1000\n")
    assert _host.available_bytes() == 3700
    limit.write_text("max\n")
    assert _host.available_bytes() > 2**20
    monkeypatch.setattr(_host, "_read", lambda path: "")
    assert _host.available_bytes() == float("inf")


class Place(NamedTuple):
    position: Array


@register_dataclass
@dataclass(frozen=True)
class Explodes(PositionKernel):
    """x' = 1e10 x, which overflows at step 31 from x = 1."""

    def restore(self, target, unknown):
        return Place(unknown)

    def sample_noise(self, rng_key, target):
        return jnp.zeros(())

    def step(self, target, state, noise):
        one = jnp.ones((), noise.dtype)
        return Place(1e10 * state.position), pmcmc.Info(one, one < 0, jnp.inf * one, noise)


@pytest.mark.filterwarnings("ignore:overflow", "ignore:invalid value")
@pytest.mark.parametrize("solver", [Sequential(), MultipleShooting(4)], ids=["sequential", "shooting"])
def test_a_state_that_overflows_loses_nothing(solver, tmp_path) -> None:
    options = dict(kernel=Explodes(), num_warmup=0, num_chains=2, progress_bar=False)
    density = lambda x: 0.0 * jnp.sum(x)
    run = lambda start, n: pmcmc.sample(density, jnp.full(1, start), 0, num_samples=n, solver=solver, **options)
    with pytest.raises(pmcmc.NonFiniteState, match=r"not finite at step 31.*attribute `chain`") as failed:
        run(1.0, 100)
    chain = failed.value.chain
    assert chain.num_samples == chain.report.num_steps == 30
    np.testing.assert_allclose(chain.unknowns[0, :, 0], 10.0 ** np.arange(10, 301, 10), rtol=1e-12)
    with pytest.raises(pmcmc.NonFiniteState, match="at step 31") as failed:
        run(1.0, 20).extend(50, progress_bar=False)
    assert failed.value.chain.num_samples == 30
    with pytest.raises(pmcmc.NonFiniteState) as failed:
        run(1e300, 5)
    assert failed.value.chain is None
    pytest.importorskip("zarr")
    with pytest.raises(pmcmc.NonFiniteState) as failed:
        run(1.0, 20).stream(tmp_path / "run", 50, progress_bar=False)
    assert 20 <= failed.value.chain.num_samples <= 30
    # The second chain overflows first, and is named, also where all chains must be at the same step.
    starts = dict(init_per_chain=True, num_samples=20, solver=solver, **options)
    for other in (1e50, 0.0):  # 0 never overflows
        apart = pmcmc.sample(density, jnp.array([[other], [1e100]]), 0, **starts)
        for call in (apart.extend, lambda n, **o: apart.stream(tmp_path / f"{other}", n, **o)):  # noqa: B023
            with pytest.raises(pmcmc.NonFiniteState, match=r"chain 1 .* at step 21"):
                call(50, progress_bar=False)
