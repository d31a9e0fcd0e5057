"""Any budget in bytes is kept, or refused before anything runs."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import pmcmc
from pmcmc.recurrence import MultipleShooting, Sequential, deer, elk, quasi_deer, quasi_elk
from pmcmc.sampling.engine import Engine
from pmcmc.sampling.programs import Shape, solve_noise
from pmcmc.target import Target
from tests.helpers.targets import gaussian, start_like

KERNEL = pmcmc.HMC(step_size=0.9, num_integration_steps=2)


def run(**options) -> pmcmc.Chain:
    sizes = dict(kernel=KERNEL, num_warmup=0, num_chains=2, num_samples=1500, thinning=3, progress_bar=False)
    return pmcmc.sample(gaussian, start_like(gaussian), 0, **{**sizes, **options})


@pytest.mark.parametrize("solver", [Sequential(), MultipleShooting(4)], ids=["in order", "4 blocks"])
def test_segments_fit(solver, monkeypatch: pytest.MonkeyPatch) -> None:
    expected, solve, held = run(solver=solver), Engine.solve, []

    def solve_and_weigh(engine, solver, shape, *rest):
        noise, record = engine._buffer_shapes(shape)
        held.append(sum(math.prod(x.shape) * x.dtype.itemsize for x in jax.tree.leaves((noise, record, record))))
        return solve(engine, solver, shape, *rest)

    monkeypatch.setattr(Engine, "solve", solve_and_weigh)
    chain = run(solver=solver, max_memory=2**18)
    kept = chain.unknowns.nbytes + sum(x.nbytes for x in jax.tree.leaves(chain.info))
    rounding = 128 * 2 * 400 if isinstance(solver, Sequential) else 4 * 2 * 400  # up to whole chunks of steps
    assert len(held) > 1
    assert max(held) + kept <= 2**18 + rounding
    np.testing.assert_allclose(chain.unknowns, expected.unknowns, rtol=0, atol=1e-9)
    held.clear()
    chain.extend(1500, progress_bar=False)
    assert len(held) > 1


@pytest.mark.parametrize("num_warmup", [0, 100])
def test_a_budget_that_holds_nothing(num_warmup: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pmcmc.EnsembleAdaptation, "run", lambda *args: pytest.fail("warm-up has begun"))
    with pytest.raises(MemoryError, match=r"max_memory is 0\.0 MiB, and the least is .* for draws.*thinning="):
        run(num_warmup=num_warmup, max_memory=30_000)


@pytest.mark.parametrize(("given", "error"), [(0, ValueError), (True, TypeError)])
def test_what_is_no_budget(given, error) -> None:
    with pytest.raises(error, match="max_memory must be"):
        run(max_memory=given)


@pytest.mark.slow
@pytest.mark.parametrize(
    "solver", [deer(), quasi_deer(), elk(), quasi_elk()], ids=["deer", "quasi-deer", "elk", "quasi-elk"]
)
def test_what_newton_holds_is_counted(solver) -> None:
    """Against the compiler's own count, from the difference between two lengths."""
    dim, chains = 6, 2
    target = Target.from_logdensity(gaussian_of_any, jnp.zeros(dim))
    engine = Engine(target, KERNEL, jax.random.split(jax.random.key(0), chains), jnp.zeros((8, dim)), None)
    number = jax.ShapeDtypeStruct((), jnp.result_type(int))
    numbers, x0 = jax.ShapeDtypeStruct((chains,), number.dtype), jax.ShapeDtypeStruct((chains, dim), float)

    def held(length: int) -> int:
        shape = Shape(1, length)
        noise, _ = engine._buffer_shapes(shape)
        lowered = solve_noise.lower(
            target, KERNEL, solver, noise, x0, numbers, numbers, number, engine.guesses, None, None, shape=shape
        )
        found = lowered.compile().memory_analysis()
        return found.temp_size_in_bytes + found.output_size_in_bytes + found.argument_size_in_bytes

    per_step = (held(128) - held(64)) / 64
    assert 0.4 * engine.bytes_per_step(solver) < per_step < 1.1 * engine.bytes_per_step(solver)


def gaussian_of_any(x):
    return -0.5 * jnp.sum(x**2)
