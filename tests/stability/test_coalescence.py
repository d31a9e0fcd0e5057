"""Coalescence times of coupled pairs: exact for maps whose times are known."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import stats

import pmcmc
from pmcmc import HMC
from pmcmc.recurrence import Recurrence
from pmcmc.recurrence.solution import default_tolerance
from pmcmc.stability import PilotError, check_pilot, coalescence_time, lyapunov_exponent, site_distances
from tests.helpers.chains import draw_noise
from tests.helpers.statistics import z_bound
from tests.helpers.targets import eight_schools, funnel, make_target, mixture

TOLERANCE = default_tolerance(float)


def couple(fn, first, second, inputs, **options):
    """`coalescence_time` as one program."""
    return jax.jit(lambda *arguments: coalescence_time(fn, *arguments, **options))(first, second, inputs)


halve = Recurrence(lambda x, u: (0.5 * x + u, None))


def test_linear_map() -> None:
    """The distance halves every step: merged at the first t with d 2^-t <= tol, whatever the inputs."""
    distances = jnp.array([1.0, 8.0, 2.0**-40, 1e6])
    inputs = jax.random.normal(jax.random.key(0), (100, 4))
    first = jnp.array([0.0, 0.25, -0.5, 0.0])
    found = couple(halve, first, first + distances, jnp.zeros_like(inputs), scale=1.0)
    np.testing.assert_array_equal(found.steps, np.ceil(np.log2(distances / TOLERANCE)).astype(int))
    assert jnp.all(found.distance <= TOLERANCE)
    coupled = couple(halve, first, first + distances, inputs, scale=1.0)
    assert jnp.all(jnp.abs(coupled.steps - found.steps) <= 3)  # up to rounding


def test_scale_is_the_unit() -> None:
    ones = jnp.ones(1)
    unit, large = (couple(halve, 0 * ones, ones, jnp.zeros((100, 1)), scale=s) for s in (1.0, 2.0**10))
    assert unit.steps[0] - large.steps[0] == 10


def test_pairs_that_do_not_merge() -> None:
    """They have max_steps + 1, and the others the right number."""
    keep = Recurrence(lambda x, u: (jnp.where(u > 0, 0.5 * x, x), None))
    inputs = jnp.stack([jnp.zeros(80), jnp.ones(80)], axis=1)
    found = couple(keep, jnp.zeros(2), jnp.ones(2), inputs, scale=1.0)
    assert found.steps.tolist() == [81, int(np.ceil(-np.log2(TOLERANCE)))]
    assert found.distance[0] == 1.0


def test_pairs_that_are_not_finite_do_not_merge() -> None:
    found = couple(halve, jnp.array([jnp.nan, 0.0]), jnp.array([jnp.nan, 1.0]), jnp.zeros((90, 2)), scale=1.0)
    assert found.steps[0] == 91
    assert found.steps[1] < 90


def test_discrete_leaves_must_be_equal() -> None:
    """A walk on {0, ..., 4} with walls merges when both have been at one wall; its real leaf is at distance zero."""
    walk = Recurrence(lambda x, u: ({"n": jnp.clip(x["n"] + u, 0, 4), "r": 0 * x["r"]}, None))
    first, second = ({"n": jnp.array([n]), "r": jnp.zeros(1)} for n in (0, 3))
    inputs = jnp.array([1, -1, 1, 1, 1, 1, 1, -1, 1])[:, None]
    scale = {"n": jnp.ones(()), "r": jnp.ones(())}
    found = couple(walk, first, second, inputs, scale=scale)
    # 0 3 | 1 4 | 0 3 | 1 4 | 2 4 | 3 4 | 4 4
    assert found.steps.tolist() == [6]


def test_kernels() -> None:
    """HMC merges on the mixture within some tens of steps and not on the funnel, jitted or not."""
    kernel = HMC(step_size=0.8, num_integration_steps=2)
    for logdensity_fn, merges in ((mixture, True), (funnel, False)):
        target = make_target(logdensity_fn)
        noise = jax.tree.map(lambda u: jnp.repeat(u[:, None], 4, axis=1), draw_noise(target, kernel, 0, 500))
        first, second = (2 * jax.random.normal(jax.random.key(s), (4, target.dim)) for s in (1, 2))
        find = jax.jit(lambda a, b, u: coalescence_time(kernel.transition(target), a, b, u, scale=jnp.ones(target.dim)))  # noqa: B023
        found = find(first, second, noise)
        assert jnp.all((found.steps <= 300) if merges else (found.steps == 501))
        np.testing.assert_array_equal(found.steps, find(second, first, noise).steps)


def test_dimensions_merge_at_their_own_times() -> None:
    """Each coordinate shrinks by its own factor; the pair merges with its slowest. Pytree leaves are concatenated."""
    factors = {"a": jnp.array([0.5, 0.25]), "b": jnp.array(0.125)}
    shrink = lambda x, u: jax.tree.map(lambda v, f: v * f, x, factors)
    zero = jax.tree.map(lambda f: jnp.zeros((2, *f.shape)), factors)
    ones = jax.tree.map(jnp.ones_like, zero)
    found = couple(shrink, zero, ones, jnp.zeros((60, 2)), scale=jax.tree.map(jnp.ones_like, factors))
    expected = np.ceil(-np.log2(TOLERANCE) / np.array([1, 2, 3])).astype(int)
    assert found.dimension_steps.tolist() == [expected.tolist()] * 2
    np.testing.assert_array_equal(found.steps, found.dimension_steps.max(axis=1))
    assert found.num_steps == expected[0]  # stops early
    np.testing.assert_allclose(found.distances[: expected[0] + 1, 0], 0.5 ** np.arange(expected[0] + 1))
    assert jnp.all(jnp.isnan(found.distances[expected[0] + 1 :]))


def test_dimension_that_rises_again_is_counted_from_its_last_fall() -> None:
    """x[1] is equal at steps 3 to 5 only, and again from step 8 on, where x[0] has long merged."""
    gap = jnp.array([1, 1, 0, 0, 0, 1, 1, 0, 0.0])[:, None]
    follow = lambda x, u: jnp.stack([0 * x[0], jnp.where(x[2] > 0, u, 0.0), x[2]])
    scale = jnp.array([1.0, 1.0, 1e300])  # x[2] distinguishes the paths and is not compared
    found = couple(follow, jnp.ones((1, 3)), jnp.zeros((1, 3)), gap, scale=scale)
    assert found.steps.tolist() == [3]
    never = couple(follow, jnp.ones((1, 3)), jnp.zeros((1, 3)), gap, scale=scale.at[2].set(1))
    assert never.steps.tolist() == [10]
    assert never.dimension_steps.tolist() == [[1, 8, 10]]


def test_checkpoints_hold_the_states() -> None:
    """Spaced logarithmically from the starts on; NaN after every pair has merged."""
    first, second = jnp.zeros((1, 2)), jnp.ones((1, 2))
    found = couple(halve, first, second, jnp.ones((1000, 1, 2)), scale=jnp.array([1.0, 2.0]))
    steps = np.asarray(found.checkpoints.steps)
    assert (steps[0], steps[1], steps[-1]) == (0, 1, 1000)
    reached = np.asarray(found.checkpoints.reached)
    np.testing.assert_array_equal(reached, steps <= found.steps[0])
    expected = 2 - 2 * 0.5 ** steps[reached]  # x = x / 2 + 1 from 0
    np.testing.assert_allclose(found.checkpoints.first[reached, 0, 0], expected, atol=1e-12)
    profile = found.profile(jnp.array([1.0, 2.0]))
    assert profile.shape == (steps.size, 1, 2)
    np.testing.assert_allclose(profile[reached, 0], 0.5 ** steps[reached][:, None] / np.array([1, 2]), atol=1e-12)
    assert jnp.all(jnp.isnan(profile[~reached]))
    bare = couple(halve, first, second, jnp.ones((1000, 1, 2)), scale=jnp.ones(2), num_checkpoints=0)
    assert bare.checkpoints.first.shape == (0, 1, 2)


def test_growth_of_small_distances() -> None:
    """x' = exp(u) x with u ~ N(-0.4, 0.3^2): the rate is -0.4 despite the overshoot, and its error covers it."""
    scale_by = Recurrence(lambda x, u: (jnp.exp(u) * x, None))
    run = jax.jit(lambda u: coalescence_time(scale_by, jnp.zeros(16), jnp.ones(16), u, scale=1.0))
    z = []
    for seed in range(12):
        found = run(-0.4 + 0.3 * jax.random.normal(jax.random.key(seed), (400, 16)))
        assert jnp.all(found.merged)
        z.append((found.growth_rate + 0.4) / found.growth_error)
    z = np.asarray(z)
    assert np.max(np.abs(z)) < stats.t.isf(stats.norm.sf(z_bound(24)), df=15)
    assert np.abs(z.mean()) * np.sqrt(12) < 1.3 * z_bound(24)  # a t of 15 degrees is 1.07 wide
    assert 0.4 < z.std() < 2.5  # neither far too small nor far too large
    single = couple(scale_by, jnp.zeros(1), jnp.ones(1), jnp.full((400, 1), -0.4), scale=1.0)
    np.testing.assert_allclose(single.growth_rate, -0.4)
    assert jnp.isnan(single.growth_error)


def test_growth_sees_decisions_that_tangents_do_not() -> None:
    """A map of slope 1/4 that jumps by 1/4 where u falls between the paths: tangents see only the slope."""
    jump = Recurrence(lambda x, u: (0.25 + 0.25 * x + jnp.where(u < x, 0.25, 0.0), None))
    inputs = jax.random.uniform(jax.random.key(0), (300, 1024))
    found = couple(jump, jnp.zeros(1024), jnp.full(1024, 0.9), inputs, scale=1.0, tol=1e-2)
    exponent = lyapunov_exponent(jump, 0.3, inputs[:, 0]).exponents[0]
    np.testing.assert_allclose(exponent, np.log(0.25), rtol=1e-6)
    assert jnp.all(found.merged)
    assert found.growth_rate - exponent > 3 * found.growth_error


def test_quantiles() -> None:
    keep = Recurrence(lambda x, u: (jnp.where(u > 0, 0.5 * x, x), None))
    inputs = jnp.stack([jnp.zeros(80), jnp.ones(80), jnp.ones(80), jnp.ones(80)], axis=1)
    found = couple(keep, jnp.zeros(4), jnp.array([1, 1, 2, 4.0]), inputs, scale=1.0)
    merge = int(np.ceil(-np.log2(TOLERANCE)))
    assert found.quantiles(jnp.array([0.25, 0.5, 0.75, 0.76])).tolist() == [merge, merge + 1, merge + 2, np.inf]


def test_movement() -> None:
    walk = lambda x, u: x + u
    inputs = jnp.stack([jnp.full((20, 2), 3.0), jnp.zeros((20, 2))], axis=1)  # only pair 0 moves, by 3 per step
    found = couple(walk, jnp.zeros((2, 2)), jnp.ones((2, 2)), inputs, scale=jnp.array([1.0, 3.0]))
    assert jnp.all(found.movement == jnp.array([[[3.0, 0.0]]]))  # max(3 / 1, 3 / 3)
    np.testing.assert_allclose(found.dimension_movement, [1.5, 0.5])
    assert found.movement.shape == (20, 2, 2)
    lost = couple(walk, jnp.zeros((2, 2)), jnp.ones((2, 2)), inputs.at[:, 1].set(jnp.nan), scale=jnp.array([1.0, 3.0]))
    np.testing.assert_allclose(lost.dimension_movement, [3.0, 1.0])  # of the pair that stays finite


STILL = lambda x, u: x
BLOWN = lambda x, u: 1e100 * x + u
COLLAPSE = lambda x, u: 0.5 * x
HALF_STILL = lambda x, u: jnp.stack([0.5 * x[0] + u[0], x[1]])


@pytest.mark.parametrize(
    ("fn", "message"),
    [
        (STILL, "no chain moved in the 60 steps"),
        (BLOWN, "3 of 3 coupled pairs of chains reached a state that is NaN"),
        (COLLAPSE, "moves slowly from one that comes to rest"),
        (HALF_STILL, r"coordinate\(s\) 1 of the state never moved"),
    ],
)
def test_pilots_that_prove_nothing(fn, message: str) -> None:
    inputs = 1 + jax.random.normal(jax.random.key(0), (60, 3, 2))
    pilot = couple(fn, jnp.zeros((3, 2)), jnp.ones((3, 2)), inputs, scale=jnp.ones(2))
    with pytest.raises(PilotError, match=message):
        check_pilot(pilot)


def test_pilots_that_prove_something() -> None:
    inputs = jax.random.normal(jax.random.key(0), (60, 3, 2))
    drift = lambda x, u: x + u  # moves and never merges: evidence, not an error
    for fn in (drift, lambda x, u: 0.5 * x + u):
        check_pilot(couple(fn, jnp.zeros((3, 2)), jnp.ones((3, 2)), inputs, scale=jnp.ones(2)))


def test_pairs_that_start_together_are_no_evidence() -> None:
    """Whether they move or not, they merge at once; a pilot needs some that do not."""
    inputs = jax.random.normal(jax.random.key(0), (60, 8, 2))
    follow = lambda num_apart, u: couple(
        lambda x, u: 0.5 * x + u, jnp.zeros((8, 2)), jnp.zeros((8, 2)).at[:num_apart].set(2.0), u, scale=1.0
    )
    for u in (inputs, inputs.at[:, 1:].set(0)):
        with pytest.raises(PilotError, match="only 1 of 8 coupled pairs start from different states, too few"):
            check_pilot(follow(1, u))
    found = follow(2, inputs)
    check_pilot(found)
    assert found.started_apart.tolist() == [True] * 2 + [False] * 6


def test_integers_do_not_hide_that_real_coordinates_come_to_rest() -> None:
    flip = lambda x, u: {"n": 1 - x["n"], "x": 0.5 * x["x"]}
    first, second = ({"n": jnp.zeros(3, int), "x": x} for x in (jnp.zeros(3), jnp.ones(3)))
    with pytest.raises(PilotError, match="comes to rest"):
        check_pilot(couple(flip, first, second, jnp.zeros((60, 3)), scale={"n": jnp.ones(()), "x": jnp.ones(())}))


def test_chains_that_move_one_coordinate_a_step_move() -> None:
    """The mean movement of a coordinate is then small where there are many of them."""
    inputs = jnp.broadcast_to(jnp.arange(60)[:, None], (60, 3))
    turn = lambda x, t: x.at[t % 20].set(0.5 * x[t % 20] + 1.0)
    found = couple(turn, jnp.zeros((3, 20)), jnp.full((3, 20), 9.0), inputs, scale=jnp.ones(20), tol=0.1)
    assert np.nanmean(found.dimension_movement) < np.sqrt(0.1)
    check_pilot(found)


def test_arguments() -> None:
    with pytest.raises(ValueError, match="first and second must be states of the same shapes"):
        coalescence_time(STILL, jnp.zeros(2), jnp.zeros(3), jnp.zeros((5, 2)), scale=1.0)
    with pytest.raises(ValueError, match=r"leading axes \(max_steps, pairs\)"):
        coalescence_time(STILL, jnp.zeros(2), jnp.zeros(2), jnp.zeros((5, 3)), scale=1.0)
    with pytest.raises(ValueError, match=r"leading axes \(max_steps, pairs\)"):
        coalescence_time(STILL, jnp.zeros(()), jnp.zeros(()), jnp.zeros((5, 3)), scale=1.0)
    with pytest.raises(ValueError, match="inputs has no steps"):
        coalescence_time(STILL, jnp.zeros(2), jnp.zeros(2), jnp.zeros((0, 2)), scale=1.0)


def test_float32() -> None:
    """The default tolerance and every field have the dtype of the states."""
    inputs = jax.random.normal(jax.random.key(0), (100, 4), jnp.float32)
    found = couple(halve, jnp.zeros(4, jnp.float32), jnp.ones(4, jnp.float32), inputs, scale=1.0)
    assert jnp.all(found.steps <= np.ceil(-np.log2(default_tolerance(jnp.float32))) + 2)
    for field in ("distance", "distances", "growth_rate", "growth_error", "movement", "tol"):
        assert getattr(found, field).dtype == jnp.float32


def test_states_of_two_dtypes() -> None:
    """The second states were truncated to the integers of the first ones, and the pairs merged at once."""
    second, inputs = jnp.array([0.9, -0.7]), jnp.zeros((100, 2))
    found = couple(halve, jnp.array([0, 0]), second, inputs, scale=1.0)
    np.testing.assert_array_equal(found.steps, couple(halve, jnp.zeros(2), second, inputs, scale=1.0).steps)
    assert jnp.all(found.steps > 30)


def test_numpy_arguments_outside_jit() -> None:
    found = coalescence_time(halve, np.zeros(2), np.ones(2), np.zeros((100, 2)), scale=1.0, tol=1e-3)
    assert found.steps.tolist() == [10, 10]


def test_sites_are_unmixed() -> None:
    """Coordinates of a full basis mix the sites; distances of sites do not, in units of the posterior's deviations."""
    target = make_target(eight_schools)
    rng = np.random.default_rng(0)
    lower = np.tril(rng.normal(size=(10, 10)))
    loc = rng.normal(size=10) + 1e3
    names = ["log_tau", "mu", *["z"] * 8]
    a, b = rng.normal(size=(2, 5, 10))
    for scale, matrix in ((lower, lower), (np.abs(np.diag(lower)), np.diag(np.abs(np.diag(lower))))):
        mixed = target.with_basis(pmcmc.target.Basis(jnp.asarray(loc), jnp.asarray(scale)))
        sites = site_distances(mixed, jnp.asarray(a), jnp.asarray(b))
        flat = np.concatenate([sites[name].reshape(5, -1) for name in dict.fromkeys(names)], axis=1)
        expected = np.abs((a - b) @ matrix.T) / np.sqrt(np.diag(matrix @ matrix.T))
        np.testing.assert_allclose(flat, expected, rtol=1e-12)
        given = site_distances(mixed, jnp.asarray(a), jnp.asarray(b), scale={"mu": 2.0, "log_tau": 1.0, "z": 1.0})
        np.testing.assert_allclose(given["mu"], np.abs((a - b) @ matrix.T)[:, 1] / 2, rtol=1e-12)
    plain = site_distances(target, jnp.asarray(a), jnp.asarray(b))
    np.testing.assert_allclose(plain["z"], np.abs(a - b)[:, 2:])
    assert set(site_distances(make_target(mixture), jnp.zeros(2), jnp.ones(2))) == {"position"}


def test_merge_steps_of_sites() -> None:
    """To the resolution of the checkpoints, with coordinates that mix the sites: b merges before a in every basis."""
    target = pmcmc.Target.from_logdensity(lambda x: -(x["a"] ** 2) - x["b"] ** 2, {"a": 0.0, "b": 0.0})
    mixed = target.with_basis(pmcmc.target.Basis(jnp.zeros(2), jnp.array([[1.0, 0.0], [3.0, 1.0]])))
    rates = jnp.array([0.5, 0.1])
    fn = lambda y, u: mixed.coordinates(mixed.spec.unravel(rates * mixed.spec.ravel(mixed.position(y))))
    start = mixed.coordinates({"a": 1.0, "b": 1.0})[None]
    found = couple(fn, jnp.zeros((1, 2)), start, jnp.zeros((64, 1)), scale=1.0, num_checkpoints=200, tol=2e-6)
    sites = site_distances(mixed, found.checkpoints.first, found.checkpoints.second, scale={"a": 1.0, "b": 1.0})
    assert found.dimension_steps.tolist() == [[19, 21]]  # y[1] = b - 3 a merges with the slower site
    assert [int(found.steps_within(sites[name])[0]) for name in ("a", "b")] == [19, 6]
    few = couple(fn, jnp.zeros((1, 2)), start, jnp.zeros((64, 1)), scale=1.0, num_checkpoints=4, tol=2e-6)
    sites = site_distances(mixed, few.checkpoints.first, few.checkpoints.second, scale={"a": 1.0, "b": 1.0})
    assert few.checkpoints.steps.tolist() == [0, 1, 8, 64]
    assert [int(few.steps_within(sites[name])[0]) for name in ("a", "b")] == [21, 8]  # a: when the pair merged
