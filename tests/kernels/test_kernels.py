"""Every kernel is a deterministic, differentiable map of its noise, rejects what is not finite, and equals BlackJAX."""

import math
from dataclasses import replace
from functools import partial

import blackjax
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pmcmc import HMC, MALA, RandomWalk, Target
from pmcmc.kernels import BranchTaken, Info, ParallelLeapfrog, StraightThrough, UniformLength
from pmcmc.kernels.base import near_tie_bound
from pmcmc.kernels.metropolis import select
from pmcmc.target import Model
from tests.helpers.chains import draw_noise
from tests.helpers.selection import share
from tests.helpers.targets import COVARIANCE, banana, eight_schools, gaussian, make_target, skewed

DIAGONAL = np.diag(COVARIANCE)
KERNELS = {
    "MALA": MALA(step_size=0.3),
    "HMC": HMC(step_size=0.6, num_integration_steps=3, step_size_jitter=0.0),
    "HMC-default-length": HMC(step_size=0.6),
    "HMC-uniform-length": HMC(step_size=0.6, num_integration_steps=UniformLength(1, 4)),
    "HMC-diagonal": HMC(step_size=0.6, num_integration_steps=3, inverse_mass_matrix=jnp.asarray(DIAGONAL)),
    "HMC-dense": HMC(step_size=0.6, num_integration_steps=3, inverse_mass_matrix=jnp.asarray(COVARIANCE)),
    "RandomWalk": RandomWalk(step_size=0.8, grid_share=0.3, independence_share=0.2),
}
every_kernel = pytest.mark.parametrize("kernel", KERNELS.values(), ids=KERNELS)


@jax.jit
def step(target, kernel, state, noise):
    return kernel.step(target, state, noise)


@jax.jit
def step_each(target, kernel, state, noise):
    """Step from one state with many noises."""
    return jax.vmap(lambda u: kernel.step(target, state, u))(noise)


@jax.jit
def push_each(target, kernel, x, noise, tangent):
    """Return the tangent of the step at x for many noises."""
    fn = lambda u: jax.jvp(lambda x: kernel.transition(target)(x, u)[0], (x,), (tangent,))[1]
    return jax.vmap(fn)(noise)


@jax.jit
def run(target, kernel, state, noise):
    return jax.lax.scan(lambda s, u: kernel.step(target, s, u), state, noise)


@every_kernel
def test_step_is_a_map_of_its_noise(kernel) -> None:
    target = make_target(gaussian)
    state = kernel.init(target, jnp.array([0.5, -1.0, 0.2]))
    noise = draw_noise(target, kernel, 1, 64)
    new, info = step_each(target, kernel, state, noise)
    again, _ = step_each(target, kernel, state, noise)
    np.testing.assert_array_equal(new.position, again.position)
    for t in range(3):
        one = jax.tree.map(lambda u: u[t], noise)  # noqa: B023
        for by in (step, lambda *args: args[1].step(args[0], *args[2:])):  # compiled, and called directly
            alone, alone_info = by(target, kernel, state, one)
            np.testing.assert_allclose(alone.position, new.position[t], rtol=0, atol=1e-13)
            np.testing.assert_allclose(alone_info.margin, info.margin[t], rtol=0, atol=1e-11)
    moved = jnp.any(new.position != state.position[None], axis=1)
    np.testing.assert_array_equal(moved, info.margin > 0)
    rate = jnp.exp(jnp.minimum(info.margin + noise.log_uniform, 0.0))
    np.testing.assert_allclose(info.acceptance_rate, rate, rtol=0, atol=1e-13)
    np.testing.assert_array_equal(info.logdensity, new.logdensity)


@every_kernel
def test_restore_inverts_unknown(kernel) -> None:
    target = make_target(gaussian)
    state, _ = run(target, kernel, kernel.init(target, jnp.array([0.5, -1.0, 0.2])), draw_noise(target, kernel, 2, 20))
    restored = kernel.restore(target, kernel.unknown(state))
    jax.tree.map(partial(np.testing.assert_allclose, rtol=0, atol=1e-13), restored, state)
    np.testing.assert_array_equal(kernel.coordinates(kernel.unknown(state)), state.position)


@every_kernel
def test_derivative_is_that_of_the_branch_taken(kernel) -> None:
    """JVPs against central differences of the step itself, for accepted and rejected moves."""
    target = make_target(gaussian)
    noise = draw_noise(target, kernel, 3, 400)
    x, v = jnp.array([1.5, -2.0, 0.4]), jnp.array([0.3, 1.0, -0.5])
    at = lambda eps: step_each(target, kernel, kernel.restore(target, x + eps * v), noise)
    (above, up), (below, down) = at(1e-6), at(-1e-6)
    settled = (up.margin > 0) == (down.margin > 0)
    assert settled.sum() > 390
    assert 0 < (up.margin > 0).sum() < 400
    difference = (above.position - below.position) / 2e-6
    tangent = push_each(target, kernel, x, noise, v)
    np.testing.assert_allclose(tangent[settled], difference[settled], rtol=0, atol=1e-7)


@every_kernel
def test_numbers_are_leaves(kernel) -> None:
    """Another step size, metric or jitter does not trace again."""
    traces = []

    @jax.jit
    def traced(kernel, state, noise):
        traces.append(1)
        return kernel.step(target, state, noise)

    target = make_target(gaussian)
    state = kernel.init(target, jnp.zeros(3))
    noise = jax.tree.map(lambda u: u[0], draw_noise(target, kernel, 4, 1))
    traced(kernel, state, noise)
    traced(jax.tree.map(lambda leaf: 2 * leaf if isinstance(leaf, int) else 0.5 * leaf, kernel), state, noise)
    assert len(traces) == 1
    assert all(isinstance(leaf, int | float | jax.Array) for leaf in jax.tree.leaves(kernel))


class BadRegion(Model):
    """A standard normal whose value or gradient is bad where x[0] > 1; the data select NaN, inf, -inf, or 0."""

    def logdensity(self, data, position):
        bad, good = position[0] > 1, -0.5 * jnp.sum(position**2)
        # sqrt at 0 with a zero derivative inside: the gradient is inf * 0, while the value is finite.
        nan_gradient = jnp.sqrt(jnp.where(bad & (data == 0), 0.0 * position[0], 1.0))
        return jnp.where(bad & (data != 0), data, good) + nan_gradient

    def constrain(self, data, position):
        return position


BAD_REGION = Target.build(BadRegion(), jnp.zeros(3), jnp.array(0.0))
bad_values = pytest.mark.parametrize("value", [jnp.nan, jnp.inf, -jnp.inf, 0.0], ids=["nan", "inf", "-inf", "gradient"])


@bad_values
@pytest.mark.parametrize("name", ["MALA", "HMC", "HMC-uniform-length", "RandomWalk"])
def test_bad_proposals_are_rejected(name: str, value: float) -> None:
    """They are rejected and counted as divergent, and leave no NaN in state or tangent."""
    if name == "RandomWalk" and value == 0.0:
        pytest.skip("reads no gradient")
    kernel, target = KERNELS[name], replace(BAD_REGION, data=jnp.array(value))
    state = kernel.init(target, jnp.array([0.7, 0.1, -0.3]))
    noise = draw_noise(target, kernel, 5, 500)
    new, info = step_each(target, kernel, state, noise)
    broken = info.is_divergent
    assert 20 < broken.sum() < 480
    np.testing.assert_array_equal(new.position[broken], jnp.broadcast_to(state.position, (broken.sum(), 3)))
    np.testing.assert_array_equal(info.acceptance_rate[broken], 0.0)
    assert not jnp.any(info.margin[broken] > 0)
    assert jnp.all(new.position[:, 0] <= 1)
    assert all(jnp.all(jnp.isfinite(leaf)) for leaf in new)
    assert jnp.all(info.acceptance_rate[~broken] > 0)
    for surrogate in (BranchTaken(), StraightThrough()):
        tangent = push_each(target, replace(kernel, surrogate=surrogate), state.position, noise, jnp.ones(3))
        assert jnp.all(jnp.isfinite(tangent))
        np.testing.assert_array_equal(tangent[broken], 1.0)


@bad_values
def test_divergent_are_exactly_the_bad_proposals(value: float) -> None:
    target, h = replace(BAD_REGION, data=jnp.array(value)), 0.3
    kernel = MALA(step_size=h)
    x = jnp.array([0.7, 0.1, -0.3])
    noise = draw_noise(target, kernel, 6, 500)
    _, info = step_each(target, kernel, kernel.restore(target, x), noise)
    proposal = (x - h * x)[None] + np.sqrt(2 * h) * noise.normal
    np.testing.assert_array_equal(info.is_divergent, proposal[:, 0] > 1)


def test_lost_energy_is_divergent() -> None:
    """A finite proposal with a log density that is 1,000 lower."""
    target = make_target(gaussian)
    kernel = HMC(step_size=30.0, num_integration_steps=2)
    _, info = step_each(target, kernel, kernel.init(target, jnp.ones(3)), draw_noise(target, kernel, 0, 50))
    assert jnp.all(jnp.isfinite(info.energy))
    np.testing.assert_array_equal(
        info.is_divergent, info.margin < -1000 - draw_noise(target, kernel, 0, 50).log_uniform
    )
    assert info.is_divergent.sum() > 25


@every_kernel
def test_scalar_and_pytree_positions(kernel) -> None:
    """The structure of a position changes nothing: the same noise gives the same chain as on the flat vector."""
    flat = make_target(gaussian)
    tree = Target.from_logdensity(
        lambda p: gaussian(jnp.concatenate([p["a"][None], p["b"][0]])), {"a": 0.0, "b": (jnp.zeros(2),)}
    )
    noise = draw_noise(flat, kernel, 7, 30)
    of_flat, _ = run(flat, kernel, kernel.init(flat, jnp.array([0.1, 0.2, 0.3])), noise)
    of_tree, _ = run(tree, kernel, kernel.init(tree, {"a": 0.1, "b": (jnp.array([0.2, 0.3]),)}), noise)
    np.testing.assert_allclose(of_flat.position, of_tree.position, rtol=0, atol=1e-13)
    if getattr(kernel, "inverse_mass_matrix", None) is None:
        scalar = Target.from_logdensity(lambda x: -0.5 * x**2, 0.0)
        state, info = run(scalar, kernel, kernel.init(scalar, 0.3), draw_noise(scalar, kernel, 8, 30))
        assert scalar.position(state.position).shape == ()
        assert jnp.any(info.margin > 0)


@jax.jit
def blackjax_noise(keys, position):
    """Return the normal and the uniform that blackjax.mala and blackjax.hmc draw from a step's key."""

    def one(key):
        for_normal, for_uniform = jax.random.split(key)
        return jax.random.normal(for_normal, position.shape), jax.random.uniform(for_uniform)

    return jax.vmap(one)(keys)


@pytest.mark.parametrize("logdensity_fn", share({f.__name__: f for f in (gaussian, skewed, banana)}, "skewed"))
@pytest.mark.parametrize("name", ["MALA", "HMC-diagonal", "HMC-dense"])
def test_parity_with_blackjax(name: str, logdensity_fn) -> None:
    """200 steps, rejections included, from BlackJAX's own random numbers."""
    target = make_target(logdensity_fn)
    metric = jnp.asarray(DIAGONAL if name == "HMC-diagonal" else COVARIANCE)[: target.dim]
    metric = metric[..., : target.dim]
    position = jnp.full(target.dim, 0.4)
    keys = jax.random.split(jax.random.key(9), 200)
    normal, uniform = blackjax_noise(keys, position)
    h = {gaussian: 0.35, skewed: 0.25, banana: 0.1}[logdensity_fn]  # smaller steps where larger ones amplify rounding
    if name == "MALA":
        kernel, theirs = MALA(step_size=h), blackjax.mala(logdensity_fn, h)
    else:
        h = 2 * h
        kernel = HMC(step_size=h, num_integration_steps=4, inverse_mass_matrix=metric, step_size_jitter=0.0)
        theirs = blackjax.hmc(logdensity_fn, h, metric, 4)
    noise = draw_noise(target, kernel, 0, 200)._replace(normal=normal, log_uniform=jnp.log(uniform))

    @jax.jit
    def both(noise, keys):
        ours = lambda s, u: (lambda new: (new[0], (new[0].position, new[1])))(kernel.step(target, s, u))
        other = lambda s, k: (lambda new: (new[0], (new[0].position, new[1])))(theirs.step(k, s))
        return (
            jax.lax.scan(ours, kernel.init(target, position), noise)[1],
            jax.lax.scan(other, theirs.init(position), keys)[1],
        )

    (path, info), (expected, expected_info) = both(noise, keys)
    assert 0 < int(jnp.sum(~expected_info.is_accepted)) < 195
    np.testing.assert_array_equal(info.margin > 0, expected_info.is_accepted)
    np.testing.assert_allclose(path, expected, rtol=0, atol=1e-10)
    np.testing.assert_allclose(info.acceptance_rate, expected_info.acceptance_rate, rtol=0, atol=1e-9)
    if name != "MALA":
        kept = np.asarray(
            expected_info.is_accepted
        )  # BlackJAX reports the proposal's energy, pmcmc that of the kept state
        np.testing.assert_allclose(info.energy[kept], expected_info.energy[kept], rtol=1e-9)


@pytest.mark.parametrize("temperature", [1.0, 0.2])
@pytest.mark.parametrize("sign", [1.0, -1.0])
def test_surrogates_against_their_formula(sign: float, temperature: float) -> None:
    """select's tangent is the derivative of w p + (1 - w) c, w = sigmoid(m / T); its value is the hard choice."""
    margin, proposal, current = (lambda t: sign * (0.3 + t**2)), jnp.sin, (lambda t: jnp.exp(-t))
    weight = lambda t: jax.nn.sigmoid(margin(t) / temperature)
    blend = lambda t: weight(t) * proposal(t) + (1 - weight(t)) * current(t)
    chosen = proposal if sign > 0 else current
    for t in (jnp.array(0.8), jnp.array(-1.3)):
        for surrogate, smooth in ((StraightThrough(temperature), blend), (BranchTaken(), chosen)):
            hard = lambda t: select(surrogate, margin(t), proposal(t), current(t))  # noqa: B023
            value, tangent = jax.jvp(hard, (t,), (jnp.array(1.0),))
            assert value == chosen(t)
            np.testing.assert_allclose(tangent, (smooth(t + 1e-6) - smooth(t - 1e-6)) / 2e-6, atol=1e-8)


def test_straight_through_in_a_kernel() -> None:
    """MALA's tangent under the surrogate is that of the blended step, and its chain is the hard one."""
    target, h = make_target(skewed), 0.4
    kernel, hard = MALA(step_size=h, surrogate=StraightThrough(0.7)), MALA(step_size=h)
    noise = draw_noise(target, kernel, 11, 60)
    x, v = jnp.array([0.5, 2.0]), jnp.array([1.0, -0.6])

    def blend(x):
        margin = step_each(target, kernel, kernel.restore(target, x), noise)[1].margin
        proposal = (x + h * target.value_and_grad(x)[1])[None] + np.sqrt(2 * h) * noise.normal
        weight = jax.nn.sigmoid(margin / 0.7)[:, None]
        return weight * proposal + (1 - weight) * x[None]

    difference = (blend(x + 1e-6 * v) - blend(x - 1e-6 * v)) / 2e-6
    np.testing.assert_allclose(push_each(target, kernel, x, noise, v), difference, rtol=1e-6, atol=1e-7)
    state = kernel.restore(target, x)
    soft, _ = run(target, kernel, state, noise)
    np.testing.assert_array_equal(soft.position, run(target, hard, state, noise)[0].position)


def test_bad_tunables_are_refused() -> None:
    for build in (
        lambda: MALA(step_size=0.0),
        lambda: MALA(step_size=-1),
        lambda: HMC(step_size=float("nan")),
        lambda: RandomWalk(step_size=0.0),
        lambda: RandomWalk(grid_share=-0.1),
        lambda: RandomWalk(independence_share=1.1),
        lambda: HMC(num_integration_steps=0),
        lambda: HMC(step_size_jitter=1.0),
        lambda: UniformLength(0, 3),
        lambda: UniformLength(4, 3),
    ):
        with pytest.raises(ValueError, match=r"got"):
            build()


def test_eight_schools_lengths() -> None:
    """Drawn lengths cover low..high; the default length is the number of steps that a time of 1.82 takes."""
    target = make_target(eight_schools)
    kernel = HMC(step_size=0.1, num_integration_steps=UniformLength(2, 5))
    _, info = step_each(target, kernel, kernel.restore(target, jnp.zeros(10)), draw_noise(target, kernel, 1, 400))
    assert sorted(set(info.num_integration_steps.tolist())) == [2, 3, 4, 5]
    assert [int(HMC(step_size=h).default_length()) for h in (0.01, 0.1, 0.5, 2.0)] == [64, 19, 4, 1]


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_final_step_size_of_hmc(dtype) -> None:
    """Warm-up's last step size is shortened until as many steps take 1.82, and they do not become more by rounding."""
    tuned = np.concatenate([np.geomspace(0.003, 4, 997), math.acos(-1 / 4) / np.arange(1, 65)]).astype(dtype)
    final = np.asarray(HMC().final_step_size(jnp.asarray(tuned)))
    lengths = np.asarray(HMC(step_size=tuned).default_length())
    assert final.dtype == tuned.dtype
    assert np.all(final <= tuned)
    np.testing.assert_array_equal(HMC(step_size=final).default_length(), lengths)
    takes = np.where(lengths < 64, math.acos(-1 / 4), np.minimum(64 * tuned, math.acos(-1 / 4)))
    np.testing.assert_allclose(final * lengths, takes, rtol=2e-4)


@pytest.mark.parametrize(
    "kernel",
    [
        HMC(num_integration_steps=2),
        HMC(num_integration_steps=UniformLength(1, 4)),
        HMC(leapfrog=ParallelLeapfrog(4)),
        MALA(),
    ],
    ids=["fixed", "uniform", "parallel", "MALA"],
)
def test_a_given_length_keeps_the_tuned_step_size(kernel) -> None:
    assert kernel.final_step_size(jnp.array(1.25)) == 1.25


def test_near_ties_are_bounded_whatever_the_log_density() -> None:
    """By a few roundings of its size; of a size of one where it is NaN, because it is not reported, or infinite."""
    logdensity = jnp.array([0.0, -100.0, jnp.nan, jnp.inf, -jnp.inf])
    info = Info(acceptance_rate=1.0, is_divergent=False, margin=jnp.zeros(5), logdensity=logdensity)
    eps = jnp.finfo(logdensity.dtype).eps
    np.testing.assert_allclose(near_tie_bound(info), 4 * eps * np.array([1, 100, 1, 1, 1]))
