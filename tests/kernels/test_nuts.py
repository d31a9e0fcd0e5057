"""NUTS as a state machine is BlackJAX's chain from its keys: as a step, as lanes, and in blocks with lanes apart."""

import gc
import weakref
from dataclasses import replace

import blackjax
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pmcmc import NUTS, Target
from pmcmc._xla.compile import forget_programs
from pmcmc.recurrence import RESULTS, MultipleShooting, Sequential
from tests.helpers.chains import draw_noise, solve
from tests.helpers.selection import share
from tests.helpers.targets import COVARIANCE, banana, eight_schools, gaussian, logistic, make_target, mixture

HALF_NORMAL = Target.from_logdensity(lambda x: -0.5 * jnp.sum(x**2), jnp.zeros(1))  # D = 1


def blackjax_chain(target, kernel, x0, keys):
    """Return states before and after every step, and infos, of BlackJAX's own loop."""
    metric = jnp.ones(target.dim) if kernel.metric is None else kernel.metric
    algorithm = blackjax.nuts(
        target.logdensity_fn, kernel.step_size, metric, max_num_doublings=kernel.max_num_doublings
    )

    def step(state, key):
        new, info = algorithm.step(key, state)
        return new, (state, new, info)

    return jax.jit(lambda x: jax.lax.scan(step, algorithm.init(x), keys)[1])(x0)


def check_info(ours, theirs) -> None:
    for name, their_name in (
        ("acceptance_rate", "acceptance_rate"),
        ("is_divergent", "is_divergent"),
        ("energy", "energy"),
        ("num_integration_steps", "num_integration_steps"),
        ("tree_depth", "num_trajectory_expansions"),
    ):
        np.testing.assert_allclose(getattr(ours, name), getattr(theirs, their_name), rtol=0, atol=1e-9, err_msg=name)


PARITY = {
    "gaussian": (make_target(gaussian), NUTS(0.5)),
    "shallow": (make_target(gaussian), NUTS(0.1, max_num_doublings=2)),
    "one doubling": (make_target(gaussian), NUTS(0.3, max_num_doublings=1)),
    "deep": (make_target(gaussian), NUTS(0.02)),  # 127 leapfrog steps and more
    "one dimension": (HALF_NORMAL, NUTS(0.4)),
    "banana": (make_target(banana), NUTS(0.2)),
    "logistic": (make_target(logistic), NUTS(0.3)),
    "mixture": (make_target(mixture), NUTS(0.6)),
    "diagonal metric": (make_target(gaussian), NUTS(0.4, inverse_mass_matrix=jnp.diagonal(COVARIANCE))),
    "dense metric": (make_target(gaussian), NUTS(0.4, inverse_mass_matrix=jnp.asarray(COVARIANCE))),
}


@pytest.mark.parametrize(
    "name",
    share(list(PARITY), "gaussian", "one doubling", "one dimension", "logistic", "diagonal metric", "dense metric"),
)
def test_equals_blackjax_with_the_same_keys(name: str) -> None:
    target, kernel = PARITY[name]
    keys, x0 = jax.random.split(jax.random.key(3), 100), jnp.full(target.dim, 0.4)
    _, expected, info = blackjax_chain(target, kernel, x0, keys)
    noise = jax.vmap(lambda key: kernel.sample_noise(key, target))(keys)
    found = solve(target, kernel, Sequential(), x0, noise)
    np.testing.assert_allclose(found.value, expected.position, rtol=0, atol=1e-10)
    np.testing.assert_allclose(found.aux.logdensity, expected.logdensity, rtol=0, atol=1e-10)
    momentum = jax.vmap(kernel._momentum)(noise.momentum)
    np.testing.assert_allclose(momentum, info.momentum, rtol=0, atol=1e-12)
    check_info(found.aux, info)
    assert np.mean(np.any(np.diff(expected.position, axis=0) != 0, axis=1)) > 0.3
    assert np.all(np.isnan(found.aux.margin))
    if name == "deep":
        assert np.max(info.num_trajectory_expansions) >= 7


@pytest.mark.parametrize("name", share(["gaussian", "banana", "mixture"], "banana"))
def test_equals_blackjax_where_trajectories_diverge(name: str) -> None:
    """Steps too large for the target, one at a time: unstable trajectories amplify rounding from step to step."""
    target, _ = PARITY[name]
    kernel = NUTS(1.5 if name != "mixture" else 2.5)
    keys = jax.random.split(jax.random.key(3), 300)
    before, expected, info = blackjax_chain(target, kernel, jnp.full(target.dim, 0.4), keys)
    one = lambda x, key: kernel.step(target, kernel.restore(target, x), kernel.sample_noise(key, target))
    state, ours = jax.jit(jax.vmap(one))(before.position, keys)
    np.testing.assert_allclose(state.position, expected.position, rtol=0, atol=1e-9)
    check_info(ours, info)
    assert np.any(info.is_divergent)
    assert not np.all(info.is_divergent)


BLOCKS = {
    "gaussian": (make_target(gaussian), NUTS(0.5)),
    "eight schools": (make_target(eight_schools), NUTS(0.5)),
    "shallow": (make_target(logistic), NUTS(0.15, max_num_doublings=3)),
}


def solve_in_step(target, kernel, solver, x0, noise, guess, scale):
    """Solve by the same solver on the same step without its stages."""
    transition = replace(kernel.transition(target), staged=None)
    run = lambda x0, noise, guess: solver.solve(transition, x0, noise, initial_guess=guess, scale=scale)
    return jax.jit(run)(x0, noise, guess)


@pytest.mark.slow
@pytest.mark.parametrize("name", BLOCKS)
def test_lanes_apart_give_the_sequential_chain(name: str) -> None:
    """They also give what lanes in step give: sweeps, critical path, evaluations, residual."""
    target, kernel = BLOCKS[name]
    length, scale = 2048, jnp.ones(target.dim)
    noise, x0 = draw_noise(target, kernel, 5, length), jnp.full(target.dim, 0.3)
    guess = 2 * jax.random.normal(jax.random.key(1), (length, target.dim))
    solver = MultipleShooting(num_blocks=8)
    exact = solve(target, kernel, Sequential(), x0, noise)
    apart = solve(target, kernel, solver, x0, noise, guess, scale)
    in_step = solve_in_step(target, kernel, solver, x0, noise, guess, scale)
    assert apart.result == RESULTS.successful
    assert apart.stats.certified_steps == length
    assert apart.stats.num_sequential_steps < length // 2
    assert np.ptp(exact.aux.num_integration_steps) >= 3  # the lanes do run apart
    np.testing.assert_allclose(apart.value, exact.value, rtol=0, atol=1e-10)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=0, atol=1e-9), apart.aux, exact.aux)
    assert apart.residual <= 512 * jnp.finfo(float).eps
    for field in ("num_sweeps", "num_sequential_steps", "num_fn_evals", "certified_steps"):
        assert getattr(apart.stats, field) == getattr(in_step.stats, field), field


@pytest.mark.parametrize("bad", share({"nan": jnp.nan, "inf": jnp.inf, "-inf": -jnp.inf}, "nan"))
def test_bad_regions_are_rejected_and_count_as_divergent(bad: float) -> None:
    """Half the plane has no usable density: no state is there, from a loop and from lanes alike."""
    target = Target.from_logdensity(lambda x: jnp.where(x[0] > 0.5, bad, -0.5 * jnp.sum(x**2)), jnp.zeros(2))
    kernel, length = NUTS(0.6), 512
    noise, x0 = draw_noise(target, kernel, 0, length), jnp.array([-0.2, 0.1])
    exact = solve(target, kernel, Sequential(), x0, noise)
    assert exact.result == RESULTS.successful
    assert np.all(exact.value[:, 0] <= 0.5)
    assert 50 < np.sum(exact.aux.is_divergent) < 450
    for field in ("acceptance_rate", "logdensity", "energy"):
        assert np.all(np.isfinite(getattr(exact.aux, field))), field
    guess = jnp.broadcast_to(jnp.array([-1.0, 1.0]), (length, 2))
    apart = solve(target, kernel, MultipleShooting(num_blocks=4), x0, noise, guess, jnp.ones(2))
    np.testing.assert_allclose(apart.value, exact.value, rtol=0, atol=1e-10)
    np.testing.assert_array_equal(apart.aux.is_divergent, exact.aux.is_divergent)


def test_a_gradient_that_is_not_finite_is_a_divergence() -> None:
    """sqrt has an infinite derivative at 0, where the density is finite: the chain could never leave such a state."""
    target = Target.from_logdensity(lambda x: -jnp.sum(jnp.sqrt(jnp.maximum(x, 0.0)) + 0.5 * x**2), jnp.zeros(1))
    kernel = NUTS(0.5)
    noise = draw_noise(target, kernel, 0, 200)
    chain = solve(target, kernel, Sequential(), jnp.array([0.7]), noise)
    assert np.sum(chain.aux.is_divergent) > 20
    assert np.all(np.isfinite(jax.vmap(target.value_and_grad)(chain.value)[1]))


def test_deepest_tree() -> None:
    """Steps so small that no trajectory turns: all doublings are taken, 2^K - 1 leapfrog steps."""
    target, kernel = make_target(gaussian), NUTS(1e-4, max_num_doublings=4)
    info = solve(target, kernel, Sequential(), jnp.ones(3), draw_noise(target, kernel, 0, 20)).aux
    np.testing.assert_array_equal(info.tree_depth, 4)
    np.testing.assert_array_equal(info.num_integration_steps, 15)


def test_lanes_of_a_batch_are_the_single_steps() -> None:
    target, kernel = make_target(eight_schools), NUTS(0.4)
    noise = draw_noise(target, kernel, 1, 32)
    x = jax.random.normal(jax.random.key(0), (32, 10))
    step = lambda x, u: kernel.step(target, kernel.restore(target, x), u)
    together = jax.jit(jax.vmap(step))(x, noise)
    alone = jax.jit(lambda x, u: jax.lax.map(lambda xu: step(*xu), (x, u)))(x, noise)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=0, atol=1e-11), together, alone)
    restored = jax.vmap(lambda x: kernel.restore(target, x))(jax.vmap(kernel.unknown)(alone[0]))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=0, atol=1e-11), restored, alone[0])


@pytest.mark.parametrize("full", [False, True], ids=["diagonal", "full"])
def test_a_metric_is_a_change_of_coordinates(full: bool) -> None:
    """A metric M^-1 = L L^T gives the same chain as coordinates x = L y without one, in lanes as well."""
    metric = COVARIANCE if full else np.diag(np.diag(COVARIANCE))
    scale_tril, plain, target = jnp.linalg.cholesky(jnp.asarray(metric)), NUTS(0.5), make_target(gaussian)
    kernel = NUTS(0.5, inverse_mass_matrix=metric if full else np.diag(metric))
    whitened = Target.from_logdensity(lambda y: gaussian(scale_tril @ y), jnp.zeros(3))
    noise, y = draw_noise(target, kernel, 4, 64), jax.random.normal(jax.random.key(1), (64, 3))
    step = lambda target, kernel: jax.jit(jax.vmap(lambda x, u: kernel.step(target, kernel.restore(target, x), u)))
    expected, expected_info = step(whitened, plain)(y, noise)
    found, info = step(target, kernel)(y @ scale_tril.T, noise)
    np.testing.assert_allclose(found.position, expected.position @ scale_tril.T, rtol=0, atol=1e-9)
    np.testing.assert_array_equal(info.num_integration_steps, expected_info.num_integration_steps)
    np.testing.assert_allclose(info.acceptance_rate, expected_info.acceptance_rate, rtol=0, atol=1e-9)
    assert np.ptp(info.num_integration_steps) >= 2


def test_derivative_is_that_of_the_branch_taken() -> None:
    target, kernel = make_target(banana), NUTS(0.3)
    noise, v = draw_noise(target, kernel, 3, 50), jnp.array([0.3, -0.5])
    at = lambda x: jax.vmap(lambda u: kernel.transition(target)(x, u))(noise)
    x = jnp.array([0.4, 0.3])
    _, (tangent, _) = jax.jit(lambda x: jax.jvp(at, (x,), (v,)))(x)
    (above, up), (below, down) = (jax.jit(at)(x + eps * v) for eps in (1e-6, -1e-6))
    same = (up.num_integration_steps == down.num_integration_steps) & (np.max(np.abs(above - below), axis=1) < 1e-3)
    assert same.sum() > 40
    np.testing.assert_allclose(tangent[same], ((above - below) / 2e-6)[same], rtol=0, atol=1e-6)


@pytest.mark.slow
def test_float32() -> None:
    """Blocks of a float32 chain are certified, and nearly every state is the sequential one."""
    target, kernel, length = make_target(mixture, jnp.float32), NUTS(0.6), 4000
    noise, x0 = draw_noise(target, kernel, 0, length), jnp.zeros(2, jnp.float32)
    assert noise.momentum.dtype == jnp.float32
    assert abs(float(jnp.mean(noise.momentum**2)) - 1) < 0.1
    guess = 3 * jax.random.normal(jax.random.key(2), (length, 2), jnp.float32)
    exact = solve(target, kernel, Sequential(), x0, noise)
    blocks = solve(target, kernel, MultipleShooting(num_blocks=8), x0, noise, guess, jnp.full(2, 2.2, jnp.float32))
    assert blocks.value.dtype == exact.value.dtype == jnp.float32
    assert blocks.result == RESULTS.successful
    assert jnp.mean(jnp.max(jnp.abs(blocks.value - exact.value), axis=1) > 1e-3) < 0.05


def test_numbers_are_leaves_and_mistakes_are_refused() -> None:
    assert len(jax.tree.leaves(NUTS(0.5))) == 1
    assert jax.tree.structure(NUTS(0.5)) != jax.tree.structure(NUTS(0.5, 3))
    with pytest.raises(ValueError, match="positive"):
        NUTS(step_size=-1.0)
    with pytest.raises(ValueError, match="at least 1"):
        NUTS(max_num_doublings=0)


def test_steps_of_old_models_are_not_kept() -> None:
    """A traced step holds its model no longer than its program does."""

    def traced() -> weakref.ref:
        target = Target.from_logdensity(lambda x: -jnp.sum(x**4), jnp.zeros(2))
        kernel = NUTS(step_size=0.1)
        noise = jax.vmap(lambda key: kernel.sample_noise(key, target))(jax.random.split(jax.random.key(0), 3))
        step = lambda u: kernel.step(target, kernel.init(target, jnp.zeros(2)), u)
        jax.make_jaxpr(jax.vmap(step))(noise)
        return weakref.ref(target.model)

    model = traced()
    forget_programs()
    jax.clear_caches()
    gc.collect()
    assert model() is None
