"""Random-walk Metropolis: proposals of the right law at any state, chains that merge, and equal solvers."""

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import pytest
from scipy import stats

import pmcmc
from pmcmc import HMC, MALA, RandomWalk, Target
from pmcmc.kernels.metropolis import WalkNoise
from pmcmc.recurrence import Sequential
from tests.helpers.chains import draw_noise, solve
from tests.helpers.statistics import z_bound
from tests.helpers.targets import COVARIANCE, gaussian, make_target, start_like

STEP = 0.7


def normal(x):
    """N(0, I) in any dimension."""
    return -0.5 * jnp.sum(x**2)


def flat(x):
    """A density under which every proposal is accepted."""
    return 0.0 * jnp.sum(x)


def target_of(logdensity_fn, dim: int, dtype=float) -> Target:
    return Target.from_logdensity(logdensity_fn, jnp.zeros(dim, dtype))


def increments(kernel, x, num_draws: int) -> np.ndarray:
    """Return (proposal - x) / h for many noises at one x."""
    target = target_of(flat, x.size, x.dtype)
    noise = draw_noise(target, kernel, 1, num_draws)
    fn = jax.jit(lambda x, u: jax.vmap(lambda u: kernel.step(target, kernel.restore(target, x), u))(u))
    state, info = fn(x, noise)
    assert bool(jnp.all(info.acceptance_rate == 1))
    return np.asarray((state.position - x[None]) / kernel.step_size, float)


WHERE = {
    "far": jnp.array([30.0, -10.0, 4.0, 0.0]),
    "near": jnp.array([0.3, 0.1, -0.2, 0.05]),
    "origin": jnp.zeros(4),
    "underflow": 1e-170 * jnp.array([1.0, 2.0, -1.0, 0.5]),  # |x|^2 is 0
    "subnormal": 1e-155 * jnp.array([1.0, 2.0, -1.0, 0.5]),  # |x|^2 has lost digits
    "single": jnp.array([0.3, 0.1, -0.2, 0.05], jnp.float32),
    "single-underflow": 1e-23 * jnp.array([1.0, 2.0, -1.0, 0.5], jnp.float32),
}


def projections(x) -> np.ndarray:
    """Return unit vectors as columns: the axes, the radius, one across it and one oblique."""
    radius = np.array([1.0, 2.0, -1.0, 0.5]) if not np.any(x) else np.asarray(x, float) / np.max(np.abs(x))
    across = np.array([radius[1], -radius[0], 0.0, 0.0])
    return np.stack([v / np.linalg.norm(v) for v in (*np.eye(4), radius, across, radius + 2 * across + 0.5)], axis=1)


@pytest.mark.parametrize("where", WHERE)
def test_radial_increments_are_standard_normal(where: str) -> None:
    """Mean, covariance, fourth and sixth moments and tails, along the axes, the radius, across it and obliquely."""
    x, num_draws = WHERE[where], 200_000
    along = increments(RandomWalk(STEP, 0.0, None), x, num_draws) @ projections(x)
    shared = projections(x).T @ projections(x)
    i, j = np.triu_indices(7, 1)
    values = [along, along**2 - 1, along**4 - 3, along**6 - 15, (along > 1.5) - stats.norm.sf(1.5)]
    values.append(along[:, i] * along[:, j] - shared[i, j])
    values.append(along[:, i] ** 2 * along[:, j] ** 2 - 1 - 2 * shared[i, j] ** 2)
    z = np.concatenate([v.mean(0) / (v.std(0) / np.sqrt(num_draws)) for v in values])
    assert np.max(np.abs(z)) < z_bound(len(WHERE) * z.size)


@pytest.mark.parametrize("where", WHERE)
def test_grid_increments_are_uniform(where: str) -> None:
    """Uniform on the box around any x, with the variance of the normal moves, and therefore symmetric."""
    x, num_draws = WHERE[where], 200_000
    moves = increments(RandomWalk(STEP, 1.0, None), x, num_draws)
    assert np.max(np.abs(moves)) <= np.sqrt(3) * (1 + 1e-5)
    i, j = np.triu_indices(4, 1)
    values = [moves, moves**2 - 1, moves**3, moves**4 - 9 / 5, (moves > 1) - (1 - 1 / np.sqrt(3)) / 2]
    values += [moves[:, i] * moves[:, j], moves[:, i] ** 2 * moves[:, j] ** 2 - 1]
    z = np.concatenate([v.mean(0) / (v.std(0) / np.sqrt(num_draws)) for v in values])
    assert np.max(np.abs(z)) < z_bound(len(WHERE) * z.size)


def test_the_law_is_seen_to_be_wrong() -> None:
    """The checks above fail for increments whose radial part is scaled by 2 %."""
    x, num_draws = WHERE["near"], 200_000
    moves = increments(RandomWalk(STEP, 0.0, None), x, num_draws)
    radius = projections(x)[:, 4]
    along = (moves + 0.02 * (moves @ radius)[:, None] * radius) @ radius
    assert abs(along.var() - 1) * np.sqrt(num_draws / 2) > z_bound(1)


def test_one_cell_proposes_one_point() -> None:
    """Grid proposals are lattice points, and exactly equal within a cell."""
    target, kernel = target_of(flat, 2), RandomWalk(STEP, 1.0, None)
    width, offset = np.sqrt(12) * STEP, jnp.array([0.3, 0.8])
    noise = WalkNoise(offset, jnp.array(0.1), jnp.array(True), None, None, jnp.array(-1.0))
    x = jax.random.uniform(jax.random.key(0), (500, 2), minval=-10.0, maxval=10.0)
    y = np.asarray(jax.jit(jax.vmap(lambda x: kernel.step(target, kernel.restore(target, x), noise)[0].position))(x))
    places = y / width - np.asarray(offset)
    cell = np.rint(places)
    np.testing.assert_allclose(places, cell, atol=1e-12)
    assert np.max(np.abs(y - x)) <= width / 2
    points = np.unique(y, axis=0)
    assert len(points) == len(np.unique(cell, axis=0)) < 100


def by_hand(logdensity_fn, x, noise, step_size) -> tuple[np.ndarray, np.ndarray]:
    """Metropolis in numpy, one step after the other, as in a textbook."""
    path, accepted, width = [], [], np.sqrt(12) * step_size
    for vector, radial, is_grid, is_independent, _, log_uniform in zip(*noise, strict=True):
        log_hastings = 0.0
        if is_independent:
            y = vector
            log_hastings = stats.norm.logpdf(x).sum() - stats.norm.logpdf(y).sum()
        elif is_grid:
            low = np.floor((x + width / 2) / width - vector)  # the cell that contains x
            y = (low + vector) * width
        else:
            n = x / np.linalg.norm(x)
            across = vector - np.dot(vector, n) * n
            y = x + step_size * (across + radial * n)
        accepted.append(log_uniform < logdensity_fn(y) - logdensity_fn(x) + log_hastings)
        x = y if accepted[-1] else x
        path.append(x)
    return np.array(path), np.array(accepted)


@pytest.mark.parametrize("dim", [1, 2, 5])
def test_parity_with_metropolis_by_hand(dim: int) -> None:
    logdensity_fn = lambda x: -0.5 * np.sum(x**2 * np.arange(1, dim + 1)) - 0.1 * np.sum(x**4)
    target = target_of(lambda x: -0.5 * jnp.sum(x**2 * jnp.arange(1, dim + 1)) - 0.1 * jnp.sum(x**4), dim)
    kernel = RandomWalk(STEP, grid_share=0.4, independence_share=0.2)
    noise, x0 = draw_noise(target, kernel, 2, 300), jnp.linspace(0.2, 0.5, dim)
    found = solve(target, kernel, Sequential(), x0, noise)
    path, accepted = by_hand(logdensity_fn, np.asarray(x0), jax.tree.map(np.asarray, noise), STEP)
    kinds = [noise.is_grid, noise.is_independent, ~noise.is_grid & ~noise.is_independent]
    assert all(0 < accepted[kind].mean() < 1 for kind in kinds)
    np.testing.assert_array_equal(found.aux.margin > 0, accepted)
    np.testing.assert_allclose(found.value, path, rtol=0, atol=1e-10)


def merge_times(logdensity_fn, dim: int, kernel, max_steps: int, dtype=float):
    """Return the merge times of 16 pairs that start with the target's own spread."""
    target, pairs = target_of(logdensity_fn, dim, dtype), 16
    noise = draw_noise(target, kernel, 4, max_steps * pairs)
    noise = jax.tree.map(lambda u: u.reshape(max_steps, pairs, *u.shape[1:]), noise)
    first, second = 1.5 * jax.random.normal(jax.random.key(3), (2, pairs, dim), dtype)
    couple = lambda a, b, u: pmcmc.stability.coalescence_time(
        kernel.transition(target), a, b, u, scale=jnp.ones(dim, dtype)
    )
    return jax.jit(couple)(first, second, noise)


def optimal(dim: int, *shares) -> RandomWalk:
    return RandomWalk(2.38 / np.sqrt(dim), *shares)


@pytest.mark.parametrize("dtype", [jnp.float64, jnp.float32], ids=["float64", "float32"])
@pytest.mark.parametrize(
    ("dim", "bound"),
    [(1, 60), (5, 400), pytest.param(2, 60, marks=pytest.mark.slow), pytest.param(10, 1200, marks=pytest.mark.slow)],
)
def test_random_walk_alone_merges_bitwise(dim: int, bound: int, dtype) -> None:
    """Over 32 pairs the times were at most 10, 17, 113, 262 steps."""
    found = merge_times(normal, dim, optimal(dim, None, None), bound, dtype)
    assert np.all(found.merged)
    assert np.all(found.distance == 0)
    assert np.all(found.dimension_movement > 0)


@pytest.mark.slow
def test_radial_alone() -> None:
    """It merges within rounding at D = 10, more slowly than with the grid, and never at D = 2."""
    found = merge_times(normal, 10, optimal(10, 0.0, None), 2000)
    assert np.all(found.merged)
    assert np.median(found.steps) > 2 * np.median(merge_times(normal, 10, optimal(10, None, None), 2000).steps)
    assert not np.any(merge_times(normal, 2, optimal(2, 0.0, None), 1000).merged)


@pytest.mark.parametrize("dim", [25, pytest.param(100, marks=pytest.mark.slow)])
def test_independent_steps_merge_in_many_dimensions(dim: int) -> None:
    assert np.all(merge_times(normal, dim, optimal(dim), 400).distance == 0)


def test_rates_that_warmup_tunes_to() -> None:
    """Each kernel has its own rate: Roberts & Rosenthal 1998, Stan, Roberts, Gelman & Gilks 1997."""
    assert MALA().target_acceptance_rate(10) == 0.574
    assert HMC().target_acceptance_rate(10) == 0.8
    np.testing.assert_allclose(RandomWalk().target_acceptance_rate(1), 0.44)
    np.testing.assert_allclose(RandomWalk().target_acceptance_rate(1000), 0.234, atol=1e-3)


@pytest.mark.slow
def test_tuned_and_sampled_in_blocks(free_lanes) -> None:
    """The step size is tuned, "auto" finds that chains merge, and the draws have the target's law."""
    chain = pmcmc.sample(
        gaussian, start_like(gaussian), 0, kernel=RandomWalk(), num_warmup=200, num_samples=10_000, num_chains=4,
        progress_bar=False,
    )  # fmt: skip
    rate = RandomWalk().target_acceptance_rate(3)
    assert abs(float(np.mean(chain.report.acceptance_rate)) - rate) < 0.06
    assert chain.report.decision == "shooting"
    np.testing.assert_allclose(np.cov(np.asarray(chain.get_samples()).T), COVARIANCE, atol=0.15)


def test_needs_no_gradient() -> None:
    """The state has no gradient, and the step computes none."""
    target = make_target(gaussian)
    kernel = RandomWalk(STEP)
    state = kernel.init(target, jnp.zeros(3))
    assert state._fields == ("position", "logdensity")
    noise = jax.tree.map(lambda u: u[0], draw_noise(target, kernel, 0, 1))
    values = str(jax.make_jaxpr(lambda s, u: kernel.step(target, s, u))(state, noise))
    once = str(jax.make_jaxpr(target.logdensity_fn)(state.position))
    assert values.count("dot_general") == once.count("dot_general")


def looped(x):
    """A standard normal with a loop that JAX does not differentiate backwards."""
    body = lambda carry: (carry[0] + 1, carry[1] - 0.5 * x["x"][carry[0]] ** 2)
    return jax.lax.while_loop(lambda carry: carry[0] < 2, body, (0, jnp.zeros(())))[1]


GIBBS = pmcmc.Gibbs({"x": pmcmc.kernels.NormalUpdate(lambda x: (jnp.zeros(2), 1.0))})


@pytest.mark.parametrize(
    ("kernel", "num_warmup"),
    [(RandomWalk(1.5), 0), (pmcmc.Compose([(RandomWalk(), ["x"])]), 100), (GIBBS, 100)],
    ids=["RandomWalk", "Compose", "Gibbs"],
)
def test_densities_without_a_gradient(kernel, num_warmup: int) -> None:
    options = dict(kernel=kernel, num_warmup=num_warmup, num_samples=1000, solver=Sequential(), progress_bar=False)
    x = pmcmc.sample(looped, {"x": jnp.zeros(2)}, 0, **options).get_samples()["x"]
    np.testing.assert_allclose(x.std(0), 1.0, atol=0.2)


def test_warm_up_by_hmc_says_what_needs_no_gradient() -> None:
    with pytest.raises(TypeError, match=r"cannot differentiate it.*RandomWalk\(step_size=\.\.\.\) with num_warmup=0"):
        pmcmc.sample(looped, {"x": jnp.zeros(2)}, 0, kernel=RandomWalk(), progress_bar=False)


def test_starts_of_a_model_without_a_gradient() -> None:
    def model():
        x = numpyro.sample("x", dist.Normal(0, 1).expand([2]).to_event(1))
        numpyro.factor("looped", looped({"x": x}))

    options = dict(kernel=RandomWalk(1.0), num_warmup=0, num_samples=20, solver=Sequential(), progress_bar=False)
    assert np.ptp(pmcmc.parallel_chain(model, 0, **options).get_samples()["x"]) > 0
