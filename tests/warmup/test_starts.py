"""Where lanes of warm-up begin, and which of them chains and their partners start from."""

import math
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import pytest

import pmcmc
from benchmarks._compilations import compilations
from pmcmc._xla.compile import forget_programs
from pmcmc._xla.rewrites import FEW_LANES
from pmcmc.recurrence import MultipleShooting, Sequential
from pmcmc.sampling.pilot import partner_shifts
from pmcmc.warmup import lanes
from pmcmc.warmup.base import start_order
from tests.helpers.sources import run_python

PROGRAMS = ("jit(draw_noise)", "jit(solve_noise)")


def model() -> None:
    numpyro.sample("x", dist.Normal(0, 1).expand([2]).to_event(1))


def run(num_chains: int, **options) -> pmcmc.Chain:
    sizes = dict(num_warmup=40, num_samples=20, num_chains=num_chains, solver=Sequential(), progress_bar=False)
    return pmcmc.parallel_chain(model, 0, **sizes | options)


@pytest.mark.parametrize("warmup", [pmcmc.EnsembleAdaptation(), pmcmc.WindowAdaptation()], ids=["ensemble", "window"])
def test_drawn_starts_belong_to_no_chain(warmup: pmcmc.warmup.Warmup, monkeypatch: pytest.MonkeyPatch) -> None:
    """As many chains as starts: they start apart if the starts were drawn, and from their own if these were given."""
    monkeypatch.setattr(lanes, "LANE_OPERATIONS", 1)
    monkeypatch.setattr(lanes, "start_order", lambda *path: np.array([2, 3, 1, 0]))
    assert run(4, warmup=warmup).state.own.tolist() == [2, 3, 1, 0]
    given = {"x": np.arange(8.0).reshape(4, 2) / 8}
    assert run(4, warmup=warmup, init_params=given).state.own.tolist() == [0, 1, 2, 3]
    assert run(4, warmup=warmup, init_params={"x": 0 * given["x"]}).state.own.tolist() == [2, 3, 1, 0]


@pytest.mark.parametrize("num_chains", [3, 20])
def test_given_starts_stay_with_their_chains(num_chains: int) -> None:
    """So far apart that no lane reaches another's mode; pairs half of the ensemble apart have different starts."""
    modes = 1e3 * jnp.arange(num_chains)
    fn = lambda x: jax.nn.logsumexp(-0.5 * (x[0] - modes) ** 2) - 0.5 * x[1] ** 2
    starts = jnp.stack([modes, jnp.zeros(num_chains)], axis=1)
    kernel = pmcmc.HMC(step_size=0.5, num_integration_steps=3, inverse_mass_matrix=jnp.ones(2))
    options = dict(kernel=kernel, num_warmup=40, num_samples=20, num_chains=num_chains, progress_bar=False)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        chain = pmcmc.sample(fn, starts, 0, init_per_chain=True, solver=Sequential(), **options)
    draws = np.asarray(chain.get_samples(group_by_chain=True))[..., 0]
    np.testing.assert_allclose(draws, np.broadcast_to(modes[:, None], draws.shape), atol=10)
    lanes = np.asarray(jax.vmap(chain.target.position)(chain.state.ensemble))[:, 0]
    partners = lanes[(chain.state.own + 16) % 32]
    assert np.all(np.abs(lanes[chain.state.own] - partners) > 500)


UNIT = pmcmc.HMC(step_size=0.5, num_integration_steps=3, inverse_mass_matrix=np.ones(1))


@pytest.mark.parametrize(
    ("kernel", "warmup", "num_chains"),
    [
        (UNIT, pmcmc.EnsembleAdaptation(), 35),
        (UNIT, pmcmc.WindowAdaptation(num_starts=2), 5),
        (pmcmc.Compose([(UNIT, ["x"])]), pmcmc.SiteAdaptation(num_starts=2), 5),
    ],
    ids=["ensemble", "window", "site"],
)
def test_more_given_starts_than_a_warm_up_would_have(kernel, warmup, num_chains: int) -> None:
    """Modes so far apart that no lane leaves its own."""
    modes = 1e3 * jnp.arange(num_chains)
    fn = lambda x: jax.nn.logsumexp(-0.5 * (x["x"] - modes) ** 2)
    options = dict(kernel=kernel, warmup=warmup, num_warmup=40, num_samples=10, num_chains=num_chains)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        chain = pmcmc.sample(
            fn, {"x": modes}, 0, init_per_chain=True, solver=Sequential(), progress_bar=False, **options
        )
    draws = np.asarray(chain.get_samples(group_by_chain=True)["x"])
    np.testing.assert_allclose(draws, np.broadcast_to(modes[:, None], draws.shape), atol=10)


def test_a_warm_up_that_leaves_out_given_starts() -> None:
    class Few(pmcmc.EnsembleAdaptation):
        def count_starts(self, target, num_given=1):
            return 4

    with pytest.raises(ValueError, match=r"Few runs from 4 starts, but one is given for each of 5 chains: pass"):
        run(5, warmup=Few(), init_params={"x": np.zeros((5, 2))})


DOUBTS = """
import warnings
import jax.numpy as jnp, numpyro, numpyro.distributions as dist, pmcmc

class Doubtful(pmcmc.EnsembleAdaptation):
    def run(self, *args, **options):
        return super().run(*args, **options)._replace(remark="doubtful")

def narrow():
    x = numpyro.sample("x", dist.Normal(0, 1))
    numpyro.factor("narrow", jnp.where(x > 1.97, 0.0, -jnp.inf))

def without_plate():
    with numpyro.plate("rows", 3):
        numpyro.sample("x", dist.Normal(jnp.zeros((2, 3)), 1))

with warnings.catch_warnings(record=True) as seen:
    warnings.simplefilter("always")
    options = dict(num_samples=5, num_chains=8, progress_bar=False)
    pmcmc.parallel_chain(narrow, 0, kernel=pmcmc.HMC(0.1), num_warmup=0, **options)
    pmcmc.sample(lambda x: -jnp.sum(x**2), jnp.zeros(2), 0, warmup=Doubtful(), num_warmup=20, **options)
    chain = pmcmc.parallel_chain(without_plate, 0, kernel=pmcmc.HMC(0.1), num_warmup=0, **options)
    assert len(seen) == 3
    chain.extend(5, progress_bar=False)
print([warning.filename for warning in seen])
"""


def test_doubts_point_at_the_call() -> None:
    """Not at a line of pmcmc's own, whether they arise before warm-up or in it; those on the model are said once."""
    assert run_python(DOUBTS).strip() == "['<string>', '<string>', '<string>']"


@pytest.mark.parametrize("num_chains", [1, 2, 4, 7, 40])
@pytest.mark.parametrize("num_states", [1, 2, 3, 4, 8, 16, 30, 32])
def test_all_partners_that_there_are(num_states: int, num_chains: int) -> None:
    shifts = partner_shifts(num_states, num_chains)
    assert len(shifts) == min(math.ceil(32 / num_chains), num_states - 1)
    assert len({0, *shifts}) == 1 + len(shifts)
    assert all(0 < shift < num_states for shift in shifts)
    assert shifts[:1] == [num_states // 2][: len(shifts)]


def test_four_lanes_show_no_outlier() -> None:
    """One lane in the far tails: eight lanes put it last, four take it for a mode, as `start_order` says."""
    path = np.random.default_rng(0).standard_normal((96, 8, 2))
    path[:, 1] -= 12
    logdensity = -0.5 * np.sum(path**2, axis=2)
    assert start_order(path, logdensity)[-1] == 1
    assert start_order(path[:, :4], logdensity[:, :4])[1] == 1


@pytest.mark.parametrize(
    ("warmup", "num_chains"),
    [(pmcmc.WindowAdaptation(num_starts=3), 2), (pmcmc.EnsembleAdaptation(), 6)],
    ids=["starts that do not divide the lanes", "more lanes for given starts"],
)
def test_programs_are_compiled_for_the_lanes_that_there_are(
    warmup: pmcmc.warmup.Warmup, num_chains: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each program of sampling once, during warm-up: the ensemble has as many states as were promised."""
    monkeypatch.setattr(lanes, "LANE_OPERATIONS", 1)
    given = {"x": np.arange(2.0 * num_chains).reshape(num_chains, 2) / 8}
    jax.clear_caches()
    forget_programs()
    with compilations() as seen:
        chain = run(num_chains, warmup=warmup, init_params=given, solver=MultipleShooting(2))
    assert len(chain.state.own) == num_chains
    blocks_draw_noise = num_chains * 2 > FEW_LANES
    expected = PROGRAMS[1:] if blocks_draw_noise else PROGRAMS
    assert sorted(program.name for program in seen if program.name in PROGRAMS) == sorted(expected)
