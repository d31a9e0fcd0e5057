"""`Chain.verify` of thinned chains and of stored info: changes show, in float32 too, and sound chains pass."""

from dataclasses import replace
from functools import cache
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import pmcmc
from pmcmc.chain.verify import ROUNDING
from pmcmc.kernels import UniformLength
from pmcmc.recurrence import MultipleShooting, Sequential
from tests.helpers.targets import gaussian

optimized = pytest.mark.optimized  # these test rounding in float32

HMC = pmcmc.HMC(step_size=0.9, num_integration_steps=2)
STEP32 = ROUNDING * np.finfo(np.float32).eps


@cache
def thinned(thinning: int, dtype: str = "float32", num_draws: int = 20, kernel: Any = HMC) -> pmcmc.Chain:
    return pmcmc.sample(
        gaussian,
        jnp.zeros(3, dtype),
        0,
        kernel=kernel,
        solver=Sequential(),
        num_warmup=0,
        num_samples=num_draws * thinning,
        num_chains=2,
        thinning=thinning,
        progress_bar=False,
    )


def of_density(chain: pmcmc.Chain, logdensity_fn) -> pmcmc.Chain:
    target = pmcmc.Target.from_logdensity(logdensity_fn, jnp.zeros(3, chain.unknowns.dtype))
    return replace(chain, state=chain.state._replace(target=target))


@optimized
@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("thinning", [10, 100, 10_000])
def test_the_tolerance_is_that_of_one_step(thinning: int, dtype: str) -> None:
    """Draws moved by 0.04 sd, another key, another model: with a tolerance that grows per step all of these passed."""
    chain = thinned(thinning, dtype, 8 if thinning == 10_000 else 20)
    found = chain.verify()
    assert found, str(found)
    assert found.tol == ROUNDING * np.finfo(dtype).eps
    assert found.max_difference < found.tol / 10
    sd = chain.unknowns.std(axis=(0, 1))
    last = chain.state._replace(unknown=chain.state.unknown + np.asarray(0.04 * sd, dtype))
    moved = replace(chain, unknowns=chain.unknowns + np.asarray(0.04 * sd, dtype), state=last)
    found = moved.verify()
    assert not found
    assert found.num_mismatched >= found.num_draws
    assert found.num_agreed == 0
    other_key = replace(chain, state=chain.state._replace(rng_key=jax.random.key(1))).verify()
    other_model = of_density(chain, lambda x: 0.95 * gaussian(x)).verify()
    for found in (other_key, other_model):
        assert not found
        assert found.num_agreed <= 1
        assert "state" in found.mismatched_fields


@optimized
def test_one_draw_moved_in_a_thinned_float32_chain() -> None:
    chain = thinned(100)
    draws = chain.unknowns.copy()
    draws[1, 7, 0] += 2 * STEP32 * draws[..., 0].std()
    found = replace(chain, unknowns=draws).verify()
    assert (found.num_mismatched, found.first_mismatch) == (1, (1, 7))  # the next draw does not depend on it


@pytest.mark.parametrize("edit", [1e200, np.inf, np.nan, -1e30])
@pytest.mark.parametrize("warm_up", [0, 60])
def test_no_draw_can_widen_the_tolerance(edit: float, warm_up: int) -> None:
    """When the scale came from the draws, one of 1e200 made it infinite, and all other draws agreed."""
    kernel = HMC if not warm_up else pmcmc.HMC(num_integration_steps=2)
    sizes = dict(num_samples=100, num_chains=2, progress_bar=False)
    chain = pmcmc.sample(gaussian, jnp.zeros(3), 0, kernel=kernel, solver=Sequential(), num_warmup=warm_up, **sizes)
    assert chain.verify()
    draws = chain.unknowns.copy()
    draws[0, 50, 1] = edit
    draws[1, 80, 0] += 1e-10
    found = replace(chain, unknowns=draws).verify()
    assert not found
    assert found.first_mismatch == (0, 50)
    assert found.num_mismatched == 4  # both draws, and their successors


@cache
def with_info(name: str) -> pmcmc.Chain:
    kernel = {
        "HMC": HMC,
        "drawn length": pmcmc.HMC(step_size=0.9, num_integration_steps=UniformLength(1, 3)),
        "MALA": pmcmc.MALA(step_size=0.3),
        "NUTS": pmcmc.NUTS(step_size=0.9, max_num_doublings=3),
    }[name]
    sizes = dict(num_samples=60, num_chains=2, progress_bar=False)
    return pmcmc.sample(gaussian, jnp.zeros(3), 0, kernel=kernel, solver=MultipleShooting(3), num_warmup=0, **sizes)


@pytest.mark.parametrize(
    ("kernel", "field", "change"),
    [
        ("HMC", "acceptance_rate", lambda x: x - 1e-9),
        ("HMC", "acceptance_rate", lambda x: np.nan * x),
        ("HMC", "is_divergent", lambda x: ~x),
        ("HMC", "margin", lambda x: x * (1 + 1e-9)),
        ("HMC", "logdensity", lambda x: x + 1e-9),
        ("HMC", "logdensity", lambda x: 1e200 + 0 * x),
        ("HMC", "energy", lambda x: x + 1e-9),
        ("MALA", "logdensity", lambda x: x - 1e-9),
        ("drawn length", "num_integration_steps", lambda x: x + 1),
        ("NUTS", "num_integration_steps", lambda x: x + 1),
        ("NUTS", "tree_depth", lambda x: x - 1),
        ("NUTS", "acceptance_rate", lambda x: x + 1e-9),
        ("NUTS", "energy", lambda x: x - 1e-9),
    ],
)
def test_stored_info_is_checked(kernel: str, field: str, change) -> None:
    chain = with_info(kernel)
    info = chain.info
    assert chain.verify(), str(chain.verify())
    changed = np.asarray(getattr(info, field)).copy()
    changed[1, 30] = change(changed[1, 30])
    found = replace(chain, info=info._replace(**{field: changed})).verify()
    assert (found.num_mismatched, found.first_mismatch, found.mismatched_fields) == (1, (1, 30), (field,))
    assert f"(differing: {field})" in str(found)
    assert str(found).startswith("119 of 120 draws follow")


@optimized
def test_info_of_a_thinned_float32_chain() -> None:
    chain = thinned(100)
    energy = chain.info.energy.copy()
    energy[0, 3] += 0.1
    found = replace(chain, info=chain.info._replace(energy=energy)).verify()
    assert (found.first_mismatch, found.mismatched_fields) == ((0, 3), ("energy",))


@pytest.mark.parametrize("num_samples", [100, 103])
def test_no_number_is_below_zero(num_samples: int) -> None:
    """If everything is wrong, the last states count too: the count once was -2 of 200 draws."""
    chain = pmcmc.sample(
        gaussian, jnp.zeros(3), 0, kernel=HMC, solver=Sequential(), num_warmup=0, num_samples=num_samples, num_chains=2,
        thinning=4, progress_bar=False,
    )  # fmt: skip
    wrong = replace(chain, state=chain.state._replace(rng_key=jax.random.key(1), unknown=chain.state.unknown + 1))
    found = wrong.verify()
    assert (found.num_mismatched, found.num_mismatched_ends, found.num_agreed) == (found.num_draws + 2, 2, 0)
    assert str(found).startswith("0 of 50 draws follow")
    moved = replace(chain, state=chain.state._replace(unknown=chain.state.unknown + 1)).verify()
    assert not moved
    assert (moved.num_agreed, moved.num_mismatched, moved.num_mismatched_ends) == (moved.num_draws, 2, 2)
    assert "the last state of chain 0 does not follow" in str(moved)


def chaotic(rate: float) -> pmcmc.Gibbs:
    """The logistic map: rounding errors double at nearly every step."""
    noise = lambda key: jax.random.uniform(key)
    return pmcmc.Gibbs({"a": pmcmc.kernels.CustomUpdate(noise, lambda x, u: rate * x["a"] * (1 - x["a"]) + 1e-300 * u)})


def test_what_rounding_decides_is_said_to_be_undecided() -> None:
    """What rounding decides is reported as undecided, neither certified nor wrong; a single step can be judged."""

    def run(thinning: int) -> pmcmc.Chain:
        sizes = dict(num_samples=20 * thinning, num_chains=2, thinning=thinning, progress_bar=False)
        start = {"a": jnp.array(0.3)}
        chain = pmcmc.sample(None, start, 0, kernel=chaotic(3.9), solver=Sequential(), num_warmup=0, **sizes)
        return replace(
            chain, state=chain.state._replace(kernel=chaotic(3.9 * (1 + 1e-15)))
        )  # as if rounded differently

    assert run(1).verify()
    found = run(200).verify()
    assert not found
    assert (found.num_mismatched, found.num_undecided, found.num_agreed) == (0, 40, 0)
    assert found.first_undecided == (0, 0)
    assert "40 draws are undecided, the first of them draw 0 of chain 0: " in str(found)
    assert "Sample in float64, or keep more draws" in str(found)


def test_rounding_that_grows_between_draws_is_allowed_for_as_far_as_it_is_seen_to() -> None:
    """27 steps of a chaotic map turn 1e-16 into about 1e-9: sound draws pass, draws that are further off do not."""
    sizes = dict(num_samples=20 * 27, num_chains=2, thinning=27, progress_bar=False)
    start = {"a": jnp.array(0.3)}
    chain = pmcmc.sample(None, start, 0, kernel=chaotic(3.9), solver=Sequential(), num_warmup=0, **sizes)
    honest = replace(chain, state=chain.state._replace(kernel=chaotic(3.9 * (1 + 2e-16))))
    found = honest.verify()
    assert found, str(found)
    assert found.tol < found.max_difference < 1e-7
    assert "and what rounding grows to between two draws" in str(found)
    draws = chain.unknowns["a"].copy()
    draws[0, 10] += 1e-4
    found = replace(chain, unknowns={"a": draws}).verify()
    assert not found
    assert found.first_mismatch == (0, 10)
