"""Groups of chains that are solved at once, each by a thread: the chains are those of one group, to rounding."""

import threading
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import pmcmc
from pmcmc._xla.compile import settings_of_thread
from pmcmc.recurrence import MultipleShooting, Sequential
from pmcmc.sampling import engine as engines
from pmcmc.sampling.engine import Engine
from pmcmc.sampling.programs import solve_noise
from tests.helpers.targets import gaussian

NUM_CHAINS, NUM_BLOCKS, LENGTH = 4, 12, 32


def new_engine() -> Engine:
    target = pmcmc.Target.from_logdensity(gaussian, jnp.zeros(3))
    bank = jnp.asarray(np.random.default_rng(0).standard_normal((8, 3)))
    keys = jax.random.split(jax.random.key(0), NUM_CHAINS)
    return Engine(target, pmcmc.HMC(step_size=0.5, num_integration_steps=3), keys, bank, jnp.ones(3))


def solve(num_groups: int, num_segments: int = 2) -> list[tuple]:
    """Return what segments of one engine hold."""
    engine, solver = new_engine(), MultipleShooting(num_blocks=NUM_BLOCKS)
    shape = engine.shape_for(solver, NUM_BLOCKS * LENGTH)._replace(num_groups=num_groups)
    x, found = engine.guesses[:NUM_CHAINS], []
    for number in range(num_segments):
        first = np.full(NUM_CHAINS, number * NUM_BLOCKS * LENGTH)
        segment, _ = engine.solve(solver, shape, x, first, LENGTH)
        found.append(jax.tree.map(np.array, (segment.chains(), segment.result, segment.residual, segment.stats)))
        x = found[-1][0][0][:, -1]
    return found


@pytest.mark.parametrize("num_groups", [2, 4])
def test_chains_do_not_depend_on_the_number_of_groups(num_groups: int) -> None:
    """Neither do their infos, certificates and counts, also where the buffers of an earlier segment are reused.

    Programs of other numbers of lanes may round differently, and growth is measured down to distances of rounding.
    """
    for found, expected in zip(solve(num_groups), solve(1), strict=True):
        np.testing.assert_allclose(found[-1].growth_rate, expected[-1].growth_rate, rtol=1e-3)
        rest = [(*x[:-1], x[-1]._replace(growth_rate=None)) for x in (found, expected)]
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-9, atol=1e-12), *rest)


def test_groups_run_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each group waits in its thread until the other has begun."""
    both, timed = threading.Barrier(2, timeout=60), solve_noise.timed

    def meet(*args, **kwargs):
        both.wait()
        return timed(*args, **kwargs)

    monkeypatch.setattr(solve_noise, "timed", meet)
    monkeypatch.setattr("pmcmc.sampling.threads.num_cores", lambda: 2)
    solve(2, num_segments=1)


# Groups of 12 blocks need more than 8 lanes each, and so do parts.
BLOCK_THREADS = [(4, 2, (2, 1)), (4, 8, (4, 1)), (6, 4, (1, 4)), (3, 2, (1, 2)), (1, 4, (1, 1)), (2, 1, (1, 1))]


@pytest.mark.parametrize(("num_chains", "cores", "expected"), BLOCK_THREADS)
def test_there_are_as_many_groups_or_parts_as_cores_allow(
    num_chains: int, cores: int, expected: tuple[int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(engines, "num_cores", lambda: cores)
    engine = new_engine()
    engine.chain_keys = jax.random.split(jax.random.key(0), num_chains)
    shape = engine.shape_for(MultipleShooting(num_blocks=NUM_BLOCKS), 1000)
    assert (shape.num_groups, shape.num_parts) == expected
    assert engine.shape_for(MultipleShooting(num_blocks=2), 1000).num_threads == 1  # too few lanes
    assert engine.shape_for(pmcmc.recurrence.deer(), 1000).num_threads == 1


SEQUENTIAL_GROUPS = [(1, 4, 1), (4, 2, 1), (8, 1, 1), (8, 2, 2), (10, 2, 2), (16, 2, 2), (24, 2, 4), (11, 2, 1)]
SEQUENTIAL_GROUPS += [(64, 2, 8), (128, 2, 1)]


@pytest.mark.parametrize(("num_chains", "cores", "expected"), SEQUENTIAL_GROUPS)
def test_sequential_chains_are_split_into_groups_that_are_one_kernel(
    num_chains: int, cores: int, expected: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(engines, "num_cores", lambda: cores)
    engine = new_engine()
    engine.chain_keys = jax.random.split(jax.random.key(0), num_chains)
    assert engine.shape_for(Sequential(), 1000).num_groups == expected


def test_sequential_chains_do_not_depend_on_the_number_of_groups() -> None:
    """Nor on whether there are more groups than threads."""
    engine, length = new_engine(), 50
    shape = engine.shape_for(Sequential(), length)
    found = [
        engine.solve(Sequential(), shape._replace(num_groups=n), engine.guesses[:4], np.zeros(4, int), length)[0]
        for n in (1, 2, 4)
    ]
    whole, *others = (jax.tree.map(np.array, (x.chains(), x.result, x.residual, x.stats)) for x in found)
    for other in others:
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-9, atol=1e-12), other, whole)


def test_a_failure_in_a_thread_is_raised(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(solve_noise, "timed", lambda *args, **kwargs: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        solve(2, num_segments=1)


def test_threads_keep_the_settings_of_their_caller() -> None:
    """``jax.enable_x64`` and ``jax.default_device`` hold in one thread only."""
    enable_x64 = jax.enable_x64 if hasattr(jax, "enable_x64") else jax.experimental.enable_x64
    with enable_x64(False), jax.default_device(jax.devices()[0]):
        target = pmcmc.Target.from_logdensity(gaussian, jnp.zeros(3))
        bank, keys = (
            jnp.asarray(np.random.default_rng(0).standard_normal((8, 3))),
            jax.random.split(jax.random.key(0), 2),
        )
        engine = Engine(target, pmcmc.HMC(step_size=0.5, num_integration_steps=3), keys, bank, jnp.ones(3))
        solver = MultipleShooting(num_blocks=NUM_BLOCKS)
        shape = engine.shape_for(solver, NUM_BLOCKS * LENGTH)._replace(num_groups=2)
        segment, _ = engine.solve(solver, shape, bank[:2], np.zeros(2, int), LENGTH)
        assert segment.chains()[0].dtype == np.float32
        seen = ThreadPoolExecutor(1).submit(enter_and_read, settings_of_thread()).result()
    assert seen == (False, jax.devices()[0])
    assert ThreadPoolExecutor(1).submit(enter_and_read, settings_of_thread()).result() == (True, None)


def enter_and_read(enter) -> tuple:
    with enter():
        return jax.config.jax_enable_x64, jax.config.jax_default_device


def test_threads_have_the_settings_of_the_caller() -> None:
    """Noise of a kernel of the user's own depends on some of them."""
    settings = {
        "threefry_partitionable": False,
        "numpy_dtype_promotion": "strict",
        "numpy_rank_promotion": "raise",
        "default_prng_impl": "rbg",
        "debug_nans": True,
        "debug_infs": True,
    }
    read = lambda: {name: getattr(jax.config, f"jax_{name}") for name in settings}
    with ExitStack() as stack, ThreadPoolExecutor(1) as pool:
        for name, value in settings.items():
            stack.enter_context(getattr(jax, name)(value))
        enter = settings_of_thread()

        def within() -> dict:
            with enter():
                return read()

        assert pool.submit(within).result() == settings
        assert pool.submit(read).result() != settings
