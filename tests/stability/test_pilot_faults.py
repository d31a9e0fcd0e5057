"""After a pilot that proves nothing chains are sampled sequentially, and no exception discards the draws."""

from dataclasses import dataclass
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import pmcmc
from pmcmc.kernels import Info
from pmcmc.kernels.base import PositionKernel
from pmcmc.recurrence import Sequential
from pmcmc.sampling import automatic, pilot
from pmcmc.stability import coalescence_time
from tests.helpers.targets import gaussian, start_like

pytestmark = pytest.mark.filterwarnings("ignore:the draws have not mixed")

SIZES = dict(num_warmup=200, num_chains=2, progress_bar=False)
NOTHING = "The pilot of coupled chains proves nothing: "


def run(kernel: pmcmc.Kernel, solver, **options) -> pmcmc.Chain:
    sizes = {**SIZES, "num_samples": 4000, **options}
    return pmcmc.sample(gaussian, start_like(gaussian), 3, kernel=kernel, solver=solver, **sizes)


def assert_in_order(chain: pmcmc.Chain, kernel: pmcmc.Kernel, **options) -> None:
    assert chain.report.decision == "sequential"
    assert chain.report.plan.reason == chain.report.reason
    assert chain.report.plan.coalescence is None
    assert chain.report.bias_bound.size == 0
    assert chain.report.reason in str(chain.report)
    np.testing.assert_array_equal(chain.get_samples(), run(kernel, Sequential(), **options).get_samples())


def test_a_kernel_that_moves_slowly_is_sampled(free_lanes) -> None:
    """It is valid, and its steps are below a small distance of float64 (2e-3 sd in float32)."""
    kernel = pmcmc.HMC(step_size=1e-7, num_integration_steps=1)
    normal, start = lambda x: -0.5 * jnp.sum(x**2), jnp.zeros(2)
    sample = lambda solver: pmcmc.sample(normal, start, 0, kernel=kernel, solver=solver, num_samples=4000, **SIZES)
    found = sample("auto")
    assert found.report.decision == "sequential"
    assert found.report.reason.startswith(NOTHING + "chains move ")
    assert "posterior sd a step at the end of the pilot" in found.report.reason
    assert found.report.plan.reason == found.report.reason
    assert found.report.diagnosis is not None
    assert any("sd a step only" in text for text in found.report.diagnosis.suggestions)
    np.testing.assert_array_equal(found.get_samples(), sample(Sequential()).get_samples())


STILL = lambda x, u: x
BLOWN = lambda x, u: 1e100 * x + u
COLLAPSE = lambda x, u: 0.5 * x
HALF_STILL = lambda x, u: jnp.stack([0.5 * x[0] + u[0], x[1], 0.5 * x[2] + u[2]])


def pilot_of(fn):
    inputs = 1 + jax.random.normal(jax.random.key(0), (60, 3, 3))
    return coalescence_time(fn, jnp.zeros((3, 3)), jnp.ones((3, 3)), inputs, scale=jnp.ones(3))


def coinciding():
    """Two pairs that stand still at the same place, and one that moves."""
    inputs = jax.random.normal(jax.random.key(0), (60, 3, 3)).at[:, 1:].set(0)
    second = jnp.zeros((3, 3)).at[0].set(2)
    return coalescence_time(lambda x, u: x + u, jnp.zeros((3, 3)), second, inputs, scale=1.0)


CASES = [
    (lambda: pilot_of(STILL), "no chain moved"),
    (lambda: pilot_of(BLOWN), "3 of 3 coupled pairs of chains reached a state that is NaN or infinite"),
    (lambda: pilot_of(HALF_STILL), "coordinate(s) 1 of the state never moved"),
    (lambda: pilot_of(COLLAPSE), "too little to tell a kernel that moves slowly from one that comes to rest"),
    (coinciding, "only 1 of 3 coupled pairs start from different states"),
]


@pytest.mark.parametrize(("make", "reason"), CASES, ids=[reason[:20] for _, reason in CASES])
def test_every_fault_is_a_reason(make, reason: str, free_lanes, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(automatic, "couple", lambda head, own: pilot.Pilot(make(), "", 0.0))
    kernel = pmcmc.HMC(num_integration_steps=2)
    chain = run(kernel, "auto")
    assert chain.report.reason.startswith(NOTHING)
    assert reason in chain.report.reason
    assert_in_order(chain, kernel)


class Walker(NamedTuple):
    position: jax.Array
    logdensity: jax.Array


@dataclass(frozen=True)
class Toy(PositionKernel):
    """Any map of the position and normal noise, always accepted; traced like a user's own kernel."""

    fn: object

    def restore(self, target, unknown):
        return Walker(unknown, target.logdensity_fn(unknown))

    def sample_noise(self, rng_key, target):
        return jax.random.normal(rng_key, (target.dim,), target.spec.dtype)

    def step(self, target, state, noise):
        new = self.restore(target, self.fn(state.position, noise))
        one = jnp.ones((), new.position.dtype)
        return new, Info(one, jnp.zeros((), bool), jnp.inf * one, new.logdensity)


jax.tree_util.register_static(Toy)


def shrink(x, noise):
    return 0.9 * x


def freeze(x, noise):
    return jnp.append(0.5 * x[:-1] + 0.8 * noise[:-1], x[-1])


def explode(x, noise):
    """A contracting map, except beyond 1e3, where only some states of the ensemble begin: those explode."""
    return jnp.where(jnp.abs(x) > 1e3, 1e3 * x, 0.5 * x + 0.8 * noise)


@pytest.fixture
def ensemble(monkeypatch: pytest.MonkeyPatch):
    """Make warm-up accept everything, and let a test choose the states of its ensemble."""
    monkeypatch.setattr("pmcmc.warmup.lanes.check_tuned", lambda *found: None)

    def place(change) -> None:
        real = pilot._partner_starts
        partners = lambda head, own: [jax.tree.map(change, start) for start in real(head, own)]
        monkeypatch.setattr(pilot, "_partner_starts", partners)

    return place


def test_a_kernel_that_contracts_to_a_point(free_lanes, ensemble) -> None:
    chain = run(Toy(shrink), "auto", num_samples=4000)
    assert "comes to rest at a point" in chain.report.reason or "no chain moved" in chain.report.reason
    assert_in_order(chain, Toy(shrink))


def test_a_coordinate_that_never_moves(free_lanes, ensemble) -> None:
    with pytest.warns(
        UserWarning, match=r"coordinate\(s\) 2 of the state never moved in 4,000 steps of chain\(s\) 0, 1"
    ):
        chain = run(Toy(freeze), "auto")
    assert chain.report.reason.startswith(NOTHING + "coordinate(s) 2 of the state never moved")
    with pytest.warns(UserWarning, match=r"coordinate\(s\) 2 of the state never moved"):
        assert_in_order(chain, Toy(freeze))


def test_partners_that_reach_nan(free_lanes, ensemble) -> None:
    """The chains are fine: partners that are not finite prove nothing and cost no draw."""
    ensemble(lambda x: np.asarray(x) + 1e4)
    chain = run(Toy(explode), "auto")
    assert "coupled pairs of chains reached a state that is NaN or infinite" in chain.report.reason
    assert chain.report.diagnosis is None
    assert_in_order(chain, Toy(explode))


def test_moves_that_return_count() -> None:
    """A segment that ends where it began has moved; one that stands still has not."""
    flip = lambda x, noise: x * jnp.array([-1.0, 1.0, -1.0])
    options = dict(kernel=Toy(flip), solver=Sequential(), num_samples=200, num_warmup=0, num_chains=2)
    with pytest.warns(UserWarning, match=r"coordinate\(s\) 1 of the state never moved in 200 steps of chain\(s\) 0, 1"):
        pmcmc.sample(gaussian, jnp.ones(3), 3, progress_bar=False, **options)


def test_discrete_values_may_stay_whatever_their_dtype(free_lanes) -> None:
    """A site of a support of floats that keeps its value is neither a fault of the pilot nor worth a warning."""
    logdensity = lambda x: -0.5 * x["a"] ** 2 - 50.0 * x["z"]
    kernel = pmcmc.Compose([pmcmc.DiscreteGibbs(supports={"z": [0.0, 1.0]}), (pmcmc.MALA(), ["a"])])
    chain = pmcmc.sample(logdensity, {"a": 0.0, "z": 0.0}, 0, kernel=kernel, num_samples=4000, **SIZES)
    assert np.all(chain.get_samples()["z"] == 0)
    assert not chain.report.reason.startswith(NOTHING)
    assert "coupled pairs of chains merged" in chain.report.reason
