"""`Chain.verify` accepts sound chains, however they were sampled, and notices the smallest change."""

from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import pmcmc
from pmcmc._xla.rewrites import in_one_kernel
from pmcmc.chain import replay
from pmcmc.random.streams import chain_keys, step_noise
from pmcmc.recurrence import RESULTS, MultipleShooting, Sequential
from pmcmc.sampling import engine, programs
from tests.helpers.targets import gaussian, mixture, start_like

pytestmark = pytest.mark.optimized

KERNEL = pmcmc.HMC(step_size=0.9, num_integration_steps=2)
SIZES = dict(num_warmup=0, num_samples=300, num_chains=2, progress_bar=False)


def run(logdensity_fn=gaussian, start=None, **options) -> pmcmc.Chain:
    start = start_like(logdensity_fn) if start is None else start
    return pmcmc.sample(
        logdensity_fn, start, 0, **{"kernel": KERNEL, "solver": MultipleShooting(4), **SIZES, **options}
    )


@cache
def chain() -> pmcmc.Chain:
    return run()


def with_draws(chain: pmcmc.Chain, unknowns: Any) -> pmcmc.Chain:
    return replace(chain, unknowns=unknowns)


@pytest.mark.parametrize("solver", [MultipleShooting(4), Sequential()], ids=["shooting", "sequential"])
def test_sound_chains(solver) -> None:
    sound = run(solver=solver)
    found = sound.verify()
    assert found
    assert (found.num_steps, found.num_draws, found.num_unverified) == (600, 600, 0)
    assert found.first_mismatch is None
    assert found.max_difference < 2e-13
    assert str(found).startswith("600 of 600 draws follow from the one before")
    assert sound.extend(100, progress_bar=False).verify().num_steps == 800


def test_thinned_chains_are_followed_from_draw_to_draw() -> None:
    thinned = run(thinning=7)
    found = thinned.verify()
    assert found
    assert found.num_draws == 2 * 42
    assert found.num_steps == 600  # 42 draws of 7 steps, and 6 more steps to the last state
    assert thinned.extend(50, progress_bar=False).verify().num_steps == 700
    draws = thinned.unknowns.copy()
    draws[0, 20, 1] += 1e-9
    draws[1, 10, 1] += 1e-9
    found = with_draws(thinned, draws).verify()
    assert (found.num_mismatched, found.first_mismatch) == (4, (1, 10))  # the earliest of all chains


def test_a_loaded_chain(tmp_path: Path) -> None:
    chain().save(tmp_path / "chain.npz")
    assert pmcmc.load(tmp_path / "chain.npz", gaussian).verify() == chain().verify()


@pytest.mark.parametrize("place", [(0, 0, 0), (1, 150, 2), (0, 299, 1)], ids=["first", "middle", "last"])
@pytest.mark.parametrize("change", [1e-11, 1.0, np.nan])
def test_a_changed_state_is_noticed(place, change) -> None:
    draws = chain().unknowns.copy()
    draws[place] += change
    found = with_draws(chain(), draws).verify()
    assert not found
    assert found.first_mismatch == place[:2]
    assert found.num_mismatched == 2  # it does not follow from its predecessor, nor the next draw from it
    assert ("tol=" in str(found)) == (change == 1e-11)  # the others are by far too large for rounding
    assert f"is draw {place[1]} of chain {place[0]}" in str(found)


def test_a_changed_decision_is_noticed() -> None:
    margin = chain().info.margin
    accepted = np.flatnonzero(margin[1] > 0)[10]
    flipped = margin.copy()
    flipped[1, accepted] *= -1
    found = replace(chain(), info=chain().info._replace(margin=flipped)).verify()
    assert (found.num_mismatched, found.first_mismatch) == (1, (1, accepted))
    stayed = chain().unknowns.copy()
    stayed[1, accepted] = stayed[1, accepted - 1]
    assert with_draws(chain(), stayed).verify().first_mismatch == (1, accepted)


def test_a_changed_noise_entry_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Step 40 of block 2 (of 80 steps) of chain 1: the solver certifies the chain of noise that is not the key's."""
    draw = programs.draw_noise.timed

    def spoilt(*args, **options):
        noise, clock = draw(*args, **options)
        return noise._replace(normal=noise.normal.at[4 + 2, 40, 0].add(1e-6)), clock

    monkeypatch.setattr(engine, "num_cores", lambda: 1)  # all chains are one group

    monkeypatch.setattr(programs.draw_noise, "timed", spoilt)
    wrong = run(num_samples=320)
    monkeypatch.undo()
    assert np.all(wrong.report.result == RESULTS.successful)
    found = wrong.verify()
    assert (found.num_mismatched, found.first_mismatch) == (1, (1, 2 * 80 + 40))


def test_start_end_key_kernel_and_density_are_checked() -> None:
    state = chain().state
    moved = jax.tree.map(lambda x: x + 1e-9, state.unknown)
    assert replace(chain(), state=state._replace(unknown=moved)).verify().first_mismatch == (0, 300)
    elsewhere = jax.tree.map(lambda x: x.at[state.own[1]].add(1e-6), state.ensemble)
    assert replace(chain(), state=state._replace(ensemble=elsewhere)).verify().first_mismatch == (1, 0)
    other = replace(chain(), state=state._replace(rng_key=jax.random.key(1)))
    assert other.verify().num_mismatched > 400  # all but the steps that both reject
    tuned = replace(state.kernel, step_size=0.9 * (1 + 1e-9))
    assert replace(chain(), state=state._replace(kernel=tuned)).verify().num_mismatched > 300
    target = pmcmc.Target.from_logdensity(lambda x: gaussian(x) + 1e-9 * x[0], jnp.zeros(3))
    assert replace(chain(), state=state._replace(target=target)).verify().num_mismatched > 300


def test_a_loose_merge_is_seen_and_may_be_allowed() -> None:
    loose = run(solver=MultipleShooting(8, tol=1e-4))
    found = loose.verify()
    assert 1 <= found.num_mismatched <= 14
    assert found.tol < found.max_mismatch <= 1e-4
    assert loose.verify(tol=2e-4)


def test_what_began_at_anothers_end() -> None:
    """The first draw of each chain has no predecessor; a chain of one draw is refused."""
    rest = lambda n: jax.tree.map(lambda x: x[:, -n:], (chain().unknowns, chain().info))
    late = replace(chain(), **dict(zip(("unknowns", "info"), rest(100), strict=True)))
    found = late.verify()
    assert found
    assert (found.num_draws, found.num_unverified) == (198, 2)
    assert "2 draws could not be checked" in str(found)
    with pytest.raises(ValueError, match=r"one draw that began at another's end.*Extend it"):
        replace(chain(), **dict(zip(("unknowns", "info"), rest(1), strict=True))).verify()


@pytest.mark.slow
def test_integers_and_conditional_updates() -> None:
    y = jnp.array([-1.6, -0.4, 0.1, 0.5, 1.2, 2.3])

    def centres(x):
        members = jax.nn.one_hot(x["z"], 2)
        precision = 1 + members.sum(0)
        return y @ members / precision, precision**-0.5

    update = pmcmc.kernels.CategoricalUpdate(lambda x: -0.5 * (y[:, None] - x["mu"][None]) ** 2)
    kernel = pmcmc.Gibbs({"z": update, "mu": pmcmc.kernels.NormalUpdate(centres)})
    found = run(None, {"z": jnp.zeros(6, int), "mu": jnp.array([-1.0, 1.0])}, kernel=kernel)
    assert found.verify()
    draws = {name: x.copy() for name, x in found.unknowns.items()}
    draws["z"][0, 100, 3] ^= 1
    assert with_draws(found, draws).verify().first_mismatch == (0, 100)


def in_float32(kernel: Any, constant: float) -> pmcmc.Chain:
    logdensity_fn = lambda x: mixture(x) + jnp.float32(constant)
    return run(logdensity_fn, jnp.zeros(2, jnp.float32), kernel=kernel, num_samples=3000)


@pytest.mark.filterwarnings("ignore:the draws have not mixed")  # float32 at 1e5
def test_near_ties_of_float32_may_go_either_way() -> None:
    """With a constant of 1e5, log densities are multiples of 1/128: hundreds of near ties, some decided differently."""
    found = in_float32(pmcmc.MALA(step_size=0.8), 1e5)
    assert np.sum(found.report.near_ties) > 100
    assert found.verify()
    margin, bound = found.info.margin, 4 * np.finfo(np.float32).eps * np.abs(found.info.logdensity)
    tie = np.argmax((np.abs(margin) < 0.3 * bound) & (margin > 0), axis=1)
    assert tie[1] > 0
    other = found.unknowns.copy()
    other[1, tie[1]] = other[1, tie[1] - 1]  # losing the tie is allowed, but then the next draw does not follow
    flipped = margin.copy()
    flipped[1, tie[1]] = -1e-6
    info = found.info._replace(margin=flipped)
    seen = replace(found, unknowns=other, info=info).verify()
    assert seen.num_near_ties == found.verify().num_near_ties + 1
    assert seen.max_difference < seen.tol  # measured against the outcome that agrees
    assert (seen.num_mismatched, seen.first_mismatch) == (1, (1, tie[1] + 1))
    third = found.unknowns.copy()
    third[1, tie[1]] += 0.01  # neither branch
    assert replace(found, unknowns=third, info=info).verify().first_mismatch == (1, tie[1])
    lost = int(np.argmax((np.abs(margin[1]) < 0.3 * bound[1]) & (margin[1] < 0) & (np.arange(3000) > 0)))
    state = found.state
    key = chain_keys(state.rng_key, num_chains=2)[1]
    noise = jax.tree.map(lambda u: u[0], step_noise(state.kernel, state.target, key, jnp.array([lost])))
    transition, before = state.kernel.transition(state.target), jnp.asarray(found.unknowns[1, lost - 1])
    won, _ = transition.step(transition.restore(before), noise._replace(log_uniform=jnp.float32(-np.inf)))
    other = found.unknowns.copy()
    other[1, lost] = transition.unknown(won)
    flipped = margin.copy()
    flipped[1, lost] = 1e-6
    seen = replace(found, unknowns=other, info=found.info._replace(margin=flipped)).verify()
    assert (seen.num_mismatched, seen.first_mismatch) == (1, (1, lost + 1))


def test_kernels_that_do_not_tell_ties_say_so(monkeypatch: pytest.MonkeyPatch) -> None:
    """In float32, in the batch shape of the run: two chains of four blocks, few enough lanes for the engine."""
    lanes: list[int] = []

    def spy(fn, *args):
        lanes.append(args[3].shape[1])
        return in_one_kernel(fn, *args)

    monkeypatch.setattr(replay, "in_one_kernel", spy)
    draw = lambda key: jax.random.normal(key, dtype=jnp.float32)
    custom = pmcmc.kernels.CustomUpdate(draw, lambda x, z: 0.5 * x["a"] + 1e-6 * z)
    chain = run(None, {"a": jnp.zeros((), jnp.float32)}, kernel=pmcmc.Gibbs({"a": custom}))
    found = chain.verify()
    assert found
    assert not found.has_margin
    assert found.batch_shape == 8
    draws = chain.unknowns["a"].copy()
    draws[0, 100] += 1e-8
    assert with_draws(chain, {"a": draws}).verify().first_mismatch == (0, 100)  # a hundredth of a standard deviation
    assert lanes == [8, 2, 8]  # as in blocks, as in sequence, and with other rounding
    assert "does not report near ties; steps were taken 8 side by side" in str(found)


def spins(shift: float) -> pmcmc.Gibbs:
    """Two hundred binary values a step in float32, from conditionals that are shifted as another program may round."""
    rng = np.random.default_rng(0)
    field = rng.normal(size=200) + shift * rng.uniform(-1, 1, 200)
    logits = jnp.stack([jnp.zeros(200), field], axis=-1)
    updates = {
        "z": pmcmc.kernels.CategoricalUpdate(lambda x: logits),
        "a": pmcmc.kernels.NormalUpdate(lambda x: (0.0, 1.0)),
    }
    return pmcmc.Gibbs(updates)


def test_each_decision_of_a_step_may_fall_by_itself() -> None:
    """In every second step some decision is a near tie, of which another program decides one in ten otherwise."""
    density = lambda x: jnp.float32(-3000.0) + 0 * x["a"]
    start = {"z": jnp.zeros(200, int), "a": jnp.zeros((), jnp.float32)}
    chain = run(density, start, kernel=spins(0.0), solver=Sequential(), num_samples=1000)
    assert chain.verify()
    rounded = replace(chain, state=chain.state._replace(kernel=spins(1e-3)))
    found = rounded.verify()
    assert found.num_mismatched == 0, str(found)
    assert found.num_near_ties > 20
    assert found.num_undecided < 10
    clear = int(np.argmax(chain.info.margin[0] > 0.01))
    draws = {name: x.copy() for name, x in chain.unknowns.items()}
    draws["z"][0, clear, 3] ^= 1
    found = with_draws(rounded, draws).verify()
    assert (found.num_mismatched, found.first_mismatch) == (1, (0, clear))


def test_half_precision_is_not_verified() -> None:
    """Its default tolerance would accept any state."""
    start = jnp.zeros(2, jnp.float16)
    options = dict(num_warmup=0, num_samples=20, progress_bar=False)
    kernel = pmcmc.MALA(step_size=0.3)
    chain = pmcmc.sample(lambda x: -0.5 * jnp.sum(x**2), start, 0, kernel=kernel, **options)
    with pytest.raises(ValueError, match=r"cannot be verified.*Sample in float32, or say by tol="):
        chain.verify()
    assert chain.verify(tol=0.5)
