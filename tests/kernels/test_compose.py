"""Compose: each kernel sees the newest values of other sites, warm-up tunes each, and the solver does not matter."""

from dataclasses import dataclass

import blackjax
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import pmcmc
from pmcmc.kernels import Block
from pmcmc.kernels.gibbs import _combine
from pmcmc.recurrence import RESULTS, MultipleShooting, Sequential
from tests.helpers.chains import draw_noise, solve
from tests.helpers.gibbs import z_scores
from tests.helpers.selection import share
from tests.helpers.statistics import z_bound
from tests.helpers.targets import COVARIANCE, gaussian

PRECISION = np.linalg.inv(COVARIANCE)


def joint(x):
    """The Gaussian of tests.helpers.targets over a site of two and a site of one."""
    return gaussian(jnp.concatenate([x["a"], x["b"][None]]))


def update_b(x):
    """Update of b given a."""
    scale = 1 / np.sqrt(PRECISION[2, 2])
    return -(jnp.asarray(PRECISION[2, :2]) @ x["a"]) * scale**2, scale


START = {"a": jnp.zeros(2), "b": jnp.array(0.0)}
GIBBS = pmcmc.Gibbs({"b": pmcmc.kernels.NormalUpdate(update_b)})
BLOCKS = {
    "HMC and Gibbs": [GIBBS, (pmcmc.HMC(step_size=0.7, num_integration_steps=3), ["a"])],
    "MALA twice": [(pmcmc.MALA(step_size=0.4), ["a"]), (pmcmc.MALA(step_size=0.5), "b")],
    "NUTS and MALA": [(pmcmc.NUTS(step_size=0.6, max_num_doublings=3), ["a"]), (pmcmc.MALA(step_size=0.5), ["b"])],
    "GHMC and Gibbs": [
        (
            pmcmc.from_blackjax(blackjax.ghmc, step_size=0.4, momentum_inverse_scale=jnp.ones(2), alpha=0.9, delta=0.1),
            ["a"],
        ),
        GIBBS,
    ],
}


def sample(kernel, **options):
    options = {"num_warmup": 100, "num_samples": 200, "solver": Sequential(), "progress_bar": False, **options}
    return pmcmc.sample(joint, START, 1, kernel=kernel, **options)


LIMIT = 1.0  # read by a kernel


@pmcmc.register_dataclass
@dataclass(frozen=True)
class Clipped(pmcmc.Compose):
    """A class of the user's own: b stays within limits of its own and of a global."""

    limit: float = 0.5

    def step(self, target, state, noise):
        (a, b), info = super().step(target, state, noise)
        return (a, jax.tree.map(lambda x: jnp.clip(x, -self.limit * LIMIT, self.limit * LIMIT), b)), info


@pmcmc.register_dataclass
@dataclass(frozen=True)
class Shifted(pmcmc.kernels.CustomUpdate):
    shift: float = 0.0

    def draw(self, state, noise, site):
        drawn = super().draw(state, noise, site)
        return drawn._replace(value=drawn.value + self.shift)


def test_classes_derived_from_pmcmcs_own_are_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    """What they override is what is sampled, as it is at the call."""
    blocks = (Block(pmcmc.HMC(), ("a",)), Block(GIBBS))
    largest = lambda: float(jnp.max(jnp.abs(sample(Clipped(blocks, 0.25), num_samples=20).get_samples()["b"])))
    assert largest() == 0.25
    monkeypatch.setitem(globals(), "LIMIT", 2.0)
    assert largest() == 0.5
    update = Shifted(lambda key: jax.random.normal(key), lambda x, z: 0.1 * z, 5.0)
    chain = sample(pmcmc.Compose([(pmcmc.MALA(0.4), ["a"]), pmcmc.Gibbs({"b": update})]), num_samples=20, num_warmup=0)
    assert abs(chain.get_samples()["b"].mean() - 5) < 1


@pytest.mark.filterwarnings("ignore:the draws have not mixed")  # there are many short chains
@pytest.mark.parametrize("name", share(list(BLOCKS), "HMC and Gibbs"))
def test_blocks_sample_the_joint(name: str) -> None:
    """First and second moments; warm-up gives a basis to every kernel that takes one."""
    chain = sample(pmcmc.Compose(BLOCKS[name]), num_chains=256)
    draws = chain.get_samples(group_by_chain=True)
    x = np.concatenate([draws["a"], np.asarray(draws["b"])[..., None]], axis=-1)
    products = x[..., :, None] * x[..., None, :]
    z = np.concatenate([z_scores(x, 0.0), z_scores(products, COVARIANCE)[np.triu_indices(3)]])
    assert np.max(np.abs(z)) < z_bound(9 * len(BLOCKS))
    for block in chain.kernel.blocks:
        assert (block.basis is None) == isinstance(block.kernel, pmcmc.Gibbs)
    if name != "GHMC and Gibbs":
        rate = chain.report.acceptance_rate
        assert np.all((rate > 0.3) & (rate < 1))


def test_step_is_that_of_its_blocks() -> None:
    """A step equals the step of each kernel alone on its conditional target, with fresh caches."""
    target, kernel = pmcmc.Target.from_logdensity(joint, START), pmcmc.Compose(BLOCKS["MALA twice"])
    noise = jax.tree.map(lambda u: u[0], draw_noise(target, kernel, 0, 1))
    position = {"a": jnp.array([0.3, -0.8]), "b": jnp.array(0.5)}
    new, info = kernel.step(target, kernel.init(target, position), noise)
    for block, u in zip(kernel.blocks, noise, strict=True):
        (name,) = block.sites
        others = {k: v for k, v in position.items() if k != name}
        alone = pmcmc.Target.from_logdensity(lambda x, o=others: joint({**o, **x}), {name: position[name]})
        state, said = block.kernel.step(alone, block.kernel.init(alone, {name: position[name]}), u)
        position = {**position, **alone.position(state.position)}
    found = kernel.position(target, new)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-13), found, position)
    np.testing.assert_allclose(info.logdensity, joint(position), rtol=1e-12)
    np.testing.assert_allclose(said.logdensity, joint(position), rtol=1e-12)


def test_shooting_gives_the_sequential_chain() -> None:
    target, kernel = pmcmc.Target.from_logdensity(joint, START), pmcmc.Compose(BLOCKS["HMC and Gibbs"])
    noise, x0 = draw_noise(target, kernel, 2, 20_000), kernel.init(target, START)
    expected = solve(target, kernel, Sequential(), x0, noise)
    found = solve(target, kernel, MultipleShooting(num_blocks=40), x0, noise)
    assert int(found.result) == RESULTS.successful
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=0, atol=1e-10), found.value, expected.value)
    assert int(found.stats.num_sequential_steps) < 5_000
    assert 0.5 < float(jnp.mean(expected.aux.acceptance_rate)) < 1


def test_what_is_said_of_a_step() -> None:
    def info(rate, divergent, margin, logdensity):
        return pmcmc.Info(*map(jnp.asarray, (rate, divergent, margin, logdensity)))

    both = _combine((info(0.4, False, -0.2, -1.0), info(jnp.nan, True, 0.1, -3.0)), float)
    assert (float(both.acceptance_rate), bool(both.is_divergent)) == (0.4, True)
    assert (float(both.margin), float(both.logdensity)) == (0.1, -3.0)
    assert np.isnan(_combine((info(0.4, False, 0.2, 0.0), info(1.0, False, jnp.nan, 0.0)), float).margin)


def test_warm_up_tunes_each_block() -> None:
    """Scales far apart, step sizes left open: acceptance near its target in both groups, coordinates about right."""

    def stretched(x):
        return joint({"a": x["a"] / 100.0, "b": x["b"] * 50.0})

    kernel = pmcmc.Compose([(pmcmc.HMC(), ["a"]), (pmcmc.MALA(), ["b"])])
    chain = pmcmc.sample(
        stretched, START, 1, kernel=kernel, num_warmup=400, num_samples=500, num_chains=16, solver=Sequential(),
        progress_bar=False,
    )  # fmt: skip
    first, second = chain.kernel.blocks
    np.testing.assert_allclose(
        jnp.sqrt(jnp.diagonal(first.basis.covariance)), 100 * np.sqrt(np.diag(COVARIANCE)[:2]), rtol=0.3
    )
    np.testing.assert_allclose(second.basis.scale.ravel(), np.sqrt(COVARIANCE[2, 2]) / 50, rtol=0.3)
    assert first.kernel.num_integration_steps is not None
    # Means of the two targets, 0.8 and 0.574.
    assert 0.55 < float(np.mean(chain.report.acceptance_rate)) < 0.8
    again = chain.kernel.blocks[1].kernel.step_size
    assert 0 < float(again) < 10


def test_given_tunables_are_kept() -> None:
    metric = jnp.diag(jnp.array([1.0, 2.0]))
    inner = pmcmc.HMC(step_size=0.6, num_integration_steps=2, inverse_mass_matrix=metric)
    chain = sample(pmcmc.Compose([(inner, ["a"]), GIBBS]), num_samples=50)
    first, _ = chain.kernel.blocks
    assert first.basis is None
    assert first.kernel.step_size == 0.6
    np.testing.assert_array_equal(first.kernel.inverse_mass_matrix, metric)


HMC = pmcmc.HMC(step_size=0.1)


@pytest.mark.parametrize(
    ("blocks", "error", "words"),
    [
        ([(HMC, ["a"])], ValueError, r"no update for \['b'\]"),
        ([(HMC, ["a", "b"]), GIBBS], ValueError, r"updates \['b'\] more than once"),
        ([(HMC, ["a", "c"]), GIBBS], ValueError, r"updates \['c'\], but the position has sites \['a', 'b'\]"),
        ([HMC, GIBBS], TypeError, r"HMC does not name its sites: write the pair"),
        ([pmcmc.Compose([GIBBS]), (HMC, ["a"])], TypeError, "not a Compose"),
        (
            [(HMC, ["a"]), (pmcmc.HMC(inverse_mass_matrix=jnp.ones(3)), ["b"])],
            ValueError,
            r"shape \(3,\): expected \(1,\)",
        ),
        ([], TypeError, "must be a list"),
        ([("a", HMC)], TypeError, r"a pair \(kernel, sites\)"),
    ],
)
def test_errors_say_what_to_do(blocks, error, words: str) -> None:
    with pytest.raises(error, match=words):
        sample(pmcmc.Compose(blocks), num_samples=10)


@pytest.mark.parametrize("num_warmup", [0, 100])
@pytest.mark.parametrize(
    ("metric", "words"),
    [([1.0, -1.0], "not positive definite.*for the sites"), (np.ones(3), r"has shape \(3,\): expected \(2,\)")],
)
def test_metrics_of_blocks_are_checked(metric, words: str, num_warmup: int) -> None:
    kernel = pmcmc.Compose([(pmcmc.HMC(0.1, 2, inverse_mass_matrix=np.array(metric)), ["a"]), GIBBS])
    with pytest.raises(ValueError, match=words):
        sample(kernel, num_warmup=num_warmup)


def test_errors_of_blocks() -> None:
    with pytest.raises(ValueError, match="num_warmup=0 tunes nothing"):
        sample(pmcmc.Compose([(pmcmc.HMC(), ["a"]), GIBBS]), num_warmup=0)
    built = pmcmc.from_blackjax(blackjax.mala(joint, 0.1))
    with pytest.raises(ValueError, match="Pass its constructor"):
        sample(pmcmc.Compose([(built, ["a"]), GIBBS]))
    whole = pmcmc.Compose([(HMC, ["a"]), (HMC, ["n"])])
    with pytest.raises(TypeError, match=r"position\['n'\] has dtype int.*need floating leaves.*DiscreteGibbs"):
        pmcmc.sample(lambda x: -jnp.sum(x["a"] ** 2), {"a": 0.0, "n": 3}, 0, kernel=whole, num_warmup=0)
    assert Block(GIBBS).basis is None
