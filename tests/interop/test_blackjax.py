"""BlackJAX's algorithms as kernels: the same chain from the same keys, also in blocks; what does not merge is found."""

from dataclasses import replace

import blackjax
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import pmcmc
from pmcmc import NUTS, Target, from_blackjax
from pmcmc.recurrence import Sequential
from tests.helpers.chains import draw_noise, solve
from tests.helpers.selection import share
from tests.helpers.targets import COVARIANCE, gaussian, make_target, start_like

ONES = jnp.ones(3)
TARGET = make_target(gaussian)
START = jnp.array([0.5, -1.0, 0.2])


def elliptical(logdensity_fn, mean, cov):
    """Elliptical slice sampling with N(0, I) split off the target."""
    return blackjax.elliptical_slice(lambda x: logdensity_fn(x) + 0.5 * jnp.sum(x**2), mean=mean, cov=cov)


random_walk = blackjax.additive_step_random_walk.normal_random_walk

# A kernel, and the same algorithm as BlackJAX makes it from a log density.
CASES = {
    "nuts": (
        from_blackjax(blackjax.nuts, step_size=0.5, inverse_mass_matrix=None),
        lambda f: blackjax.nuts(f, 0.5, ONES),
    ),
    "nuts-shallow": (
        from_blackjax(blackjax.nuts, step_size=0.1, inverse_mass_matrix=None, max_num_doublings=2),
        lambda f: blackjax.nuts(f, 0.1, ONES, max_num_doublings=2),
    ),
    "random-walk": (from_blackjax(random_walk, sigma=0.8 * ONES), lambda f: random_walk(f, 0.8 * ONES)),
    "rmh": (
        from_blackjax(blackjax.rmh, proposal_generator=lambda key, x: x + jax.random.normal(key, x.shape)),
        lambda f: blackjax.rmh(f, lambda key, x: x + jax.random.normal(key, x.shape)),
    ),
    "barker": (from_blackjax(blackjax.barker_proposal, step_size=0.8), lambda f: blackjax.barker_proposal(f, 0.8)),
    "elliptical": (
        from_blackjax(elliptical, mean=0 * ONES, cov=ONES),
        lambda f: elliptical(f, 0 * ONES, ONES),
    ),
    "mclmc": (from_blackjax(blackjax.mclmc, L=1.0, step_size=0.8), lambda f: blackjax.mclmc(f, L=1.0, step_size=0.8)),
    "ghmc": (
        from_blackjax(blackjax.ghmc, step_size=0.6, momentum_inverse_scale=ONES, alpha=0.5, delta=0.3),
        lambda f: blackjax.ghmc(f, 0.6, ONES, 0.5, 0.3),
    ),
    "dynamic-hmc": (
        from_blackjax(blackjax.dynamic_hmc, step_size=0.5, inverse_mass_matrix=None),
        lambda f: blackjax.dynamic_hmc(f, 0.5, ONES),
    ),
}


def run_blackjax(algorithm, state, keys):
    """Return states and infos of BlackJAX's own loop. A key in the state is drawn from each step's key."""
    named = "random_generator_arg" in state._fields
    tag = 0x72616E64

    def step(state, key):
        if named:
            state = state._replace(random_generator_arg=jax.random.fold_in(key, tag))
        state, info = algorithm.step(key, state)
        shown = state._replace(random_generator_arg=None) if named else state
        return state, (shown, info)

    return jax.jit(lambda state: jax.lax.scan(step, state, keys)[1])(state)


@pytest.mark.parametrize("name", share(list(CASES), "random-walk", "elliptical", "mclmc", "ghmc", "dynamic-hmc"))
def test_equals_blackjax_with_the_same_keys(name: str) -> None:
    kernel, build = CASES[name]
    keys = jax.random.split(jax.random.key(3), 100)
    noise = jax.vmap(lambda key: kernel.sample_noise(key, TARGET))(keys)
    begin = kernel.init(TARGET, START)
    x0 = kernel.unknown(begin)
    solution = solve(TARGET, kernel, Sequential(), x0, noise)

    full = begin
    if "random_generator_arg" in begin._fields:
        assert begin.random_generator_arg is None
        full = begin._replace(random_generator_arg=jax.random.key(0))
    expected, info = run_blackjax(build(TARGET.logdensity_fn), full, keys)

    moved = np.any(np.diff(expected.position, axis=0) != 0, axis=1)
    assert moved.sum() > 30
    dynamic = kernel.unknown(expected)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=0, atol=1e-10), solution.value, dynamic)
    # Solvers iterate only on what is not a function of the position: restoring the rest gives the state back.
    restored = jax.vmap(lambda x: kernel.restore(TARGET, x))(solution.value)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=0, atol=1e-10), restored, expected)

    ours = solution.aux
    assert np.all(np.isnan(ours.margin))
    density = jax.vmap(TARGET.logdensity_fn)(expected.position)  # of elliptical slice too
    np.testing.assert_allclose(ours.logdensity, density, rtol=0, atol=1e-10)
    for field, theirs in (
        ("acceptance_rate", "acceptance_rate"),
        ("is_divergent", "is_divergent"),
        ("energy", "energy"),
        ("num_integration_steps", "num_integration_steps"),
        ("tree_depth", "num_trajectory_expansions"),
    ):
        if hasattr(info, theirs):
            np.testing.assert_allclose(getattr(ours, field), getattr(info, theirs), rtol=0, atol=1e-9)
        elif field == "acceptance_rate":
            assert np.all(np.isnan(ours.acceptance_rate))
        elif field == "is_divergent":
            assert not np.any(ours.is_divergent)
        else:
            assert getattr(ours, field) is None


def test_unknowns_are_the_dynamic_fields() -> None:
    fields = lambda name: {
        field
        for field, x in CASES[name][0].unknown(CASES[name][0].init(TARGET, START))._asdict().items()
        if x is not None
    }
    for name in ("nuts", "random-walk", "barker", "elliptical", "dynamic-hmc"):
        assert fields(name) == {"position"}
    assert fields("mclmc") == {"position", "momentum"}
    assert fields("ghmc") == {"position", "momentum", "slice"}
    momenta = [CASES["ghmc"][0].init(TARGET, x * START).momentum for x in (1.0, 2.0)]
    assert not np.allclose(*momenta)


def test_noise_is_the_key_typed_or_raw() -> None:
    kernel = CASES["nuts"][0]
    for key in (jax.random.key(7), jax.random.PRNGKey(7)):
        np.testing.assert_array_equal(kernel.sample_noise(key, TARGET), jax.random.PRNGKey(7))


def starts_of(kernel, seed: int, count: int):
    y = 2 * jax.random.normal(jax.random.key(seed), (count, 3))
    return jax.vmap(lambda y: kernel.unknown(kernel.start(TARGET, y)))(y)


def couple(name: str, num_steps: int):
    kernel, pairs = CASES[name][0], 4
    noise = jax.tree.map(
        lambda u: u.reshape(num_steps, pairs, *u.shape[1:]), draw_noise(TARGET, kernel, 2, num_steps * pairs)
    )
    fn = lambda a, b, u: pmcmc.stability.coalescence_time(kernel.transition(TARGET), a, b, u, scale=_ones_like(a))
    return jax.jit(fn)(starts_of(kernel, 3, pairs), starts_of(kernel, 4, pairs), noise)


def _ones_like(states):
    return jax.tree.map(lambda x: jnp.ones(x.shape[1:], x.dtype), states)


def test_merges_under_common_keys() -> None:
    """Control for the next test."""
    found = couple("elliptical", 1000)
    assert np.all(found.steps < 300)
    assert found.growth_rate < -0.1


@pytest.mark.parametrize("name", share(["random-walk", "barker", "ghmc"], "ghmc"))
def test_does_not_merge_under_common_keys(name: str) -> None:
    """Random increments added to both paths keep them apart; GHMC's slice variable is never redrawn."""
    found = couple(name, 1000)
    assert not np.any(found.merged)
    assert np.all(found.distance > 1e-3)
    assert np.all(found.dimension_movement > 0)


SIZES = dict(num_warmup=100, num_chains=4, progress_bar=False)


@pytest.mark.parametrize("name", share(["random-walk", "barker"], "random-walk"))
def test_auto_samples_sequentially_what_does_not_merge(name: str, free_lanes) -> None:
    chain = pmcmc.sample(gaussian, start_like(gaussian), 0, kernel=CASES[name][0], num_samples=5_000, **SIZES)
    assert chain.report.decision == "sequential"
    assert "of 4 coupled pairs" in chain.report.reason
    assert np.all(chain.report.coalescence_steps > 100)
    assert np.all(chain.report.acceptance_rate > 0.2)


@pytest.mark.slow
def test_nuts_is_tuned_and_sampled_in_blocks(free_lanes) -> None:
    """Shooting under "auto", a step size tuned to 0.8, NumPyro's names for fields and ArviZ's for statistics."""
    names = ("num_steps", "tree_depth", "accept_prob", "energy", "potential_energy")
    chain = pmcmc.sample(
        gaussian, start_like(gaussian), 0, kernel=NUTS(), num_samples=10_000, extra_fields=names, **SIZES
    )
    report = chain.report
    assert report.decision == "shooting"
    assert np.all(report.certified_steps > 5_000)
    assert np.all(report.num_sequential_steps < 5_000)
    assert np.all(np.isnan(report.near_ties))
    assert "near ties not counted" in str(report)
    assert 0 < float(chain.kernel.step_size) < 3
    assert 0.7 < float(np.mean(report.acceptance_rate)) < 0.92
    np.testing.assert_allclose(np.cov(np.asarray(chain.get_samples()).T), COVARIANCE, atol=0.15)
    fields = chain.get_extra_fields(group_by_chain=True)
    assert set(fields) == {"diverging", *names}
    assert all(x.shape == (4, 10_000) for x in fields.values())
    depth, steps = np.asarray(fields["tree_depth"]), np.asarray(fields["num_steps"])
    assert depth.min() >= 1
    assert np.all((steps >= 2 ** (depth - 1)) & (steps <= 2**depth))
    assert np.all(fields["energy"] >= fields["potential_energy"])  # kinetic energy is not negative
    stats = chain.to_arviz()["sample_stats"]
    for name, field in (("n_steps", "num_steps"), ("tree_depth", "tree_depth"), ("energy", "energy")):
        np.testing.assert_array_equal(stats[name], fields[field])
    assert {"lp", "acceptance_rate", "diverging", "step_size"} <= set(stats)


@pytest.mark.slow
def test_step_size_of_a_constructor_is_tuned() -> None:
    warmup = pmcmc.WindowAdaptation(target_acceptance_rate=0.6)
    kernel = from_blackjax(blackjax.barker_proposal, step_size=None)
    chain = pmcmc.sample(gaussian, start_like(gaussian), 0, kernel=kernel, warmup=warmup, num_samples=500, **SIZES)
    assert abs(np.mean(chain.report.acceptance_rate) - 0.6) < 0.1
    with pytest.raises(ValueError, match=r"does not report \['energy'\]"):
        replace(chain, extra_fields=("energy",)).get_extra_fields()
    untunable = from_blackjax(blackjax.mclmc, L=1.0, step_size=None)
    with pytest.raises(pmcmc.WarmupError, match="reports no acceptance rate"):
        pmcmc.sample(gaussian, start_like(gaussian), 0, kernel=untunable, num_samples=10, **SIZES)


def test_an_algorithm_already_built() -> None:
    """It gives the same chain as its constructor, over a pytree; without warm-up, since it takes no basis."""
    over_tree = lambda p: gaussian(jnp.concatenate([p["a"][None], p["b"]]))
    position = {"a": jnp.array(0.3), "b": jnp.array([1.0, -1.0])}
    built = from_blackjax(blackjax.elliptical_slice(over_tree, mean=0 * ONES, cov=ONES))
    chain = pmcmc.sample(over_tree, position, 2, kernel=built, num_samples=50, **{**SIZES, "num_warmup": 0})
    draws = chain.get_samples(group_by_chain=True)
    assert draws["b"].shape == (4, 50, 2)
    product = lambda f: blackjax.elliptical_slice(f, mean=0 * ONES, cov=ONES)
    flat = pmcmc.sample(
        gaussian,
        jnp.array([0.3, 1.0, -1.0]),
        2,
        kernel=from_blackjax(product),
        num_samples=50,
        **{**SIZES, "num_warmup": 0},
    )
    joined = np.concatenate([draws["a"][..., None], draws["b"]], axis=-1)
    np.testing.assert_allclose(joined, flat.get_samples(group_by_chain=True), rtol=0, atol=1e-12)
    np.testing.assert_allclose(chain.info.logdensity, jax.vmap(jax.vmap(gaussian))(joined), rtol=0, atol=1e-12)
    with pytest.raises(ValueError, match="cannot be warmed up"):
        pmcmc.sample(over_tree, position, 2, kernel=built, num_samples=50, **SIZES)
    basis = pmcmc.target.Basis(jnp.zeros(3), jnp.ones(3))
    with pytest.raises(ValueError, match="whitened coordinates"):
        built.init(Target.from_logdensity(over_tree, position).with_basis(basis), position)


def test_parameters_are_leaves_or_static() -> None:
    kernel = from_blackjax(blackjax.nuts, step_size=0.5, inverse_mass_matrix=ONES, max_num_doublings=3)
    assert len(jax.tree.leaves(kernel)) == 2
    traces = []

    @jax.jit
    def step(kernel, state, noise):
        traces.append(1)
        return kernel.step(TARGET, state, noise)[0].position

    state, noise = kernel.init(TARGET, START), kernel.sample_noise(jax.random.key(0), TARGET)
    first, again = step(kernel, state, noise), step(kernel.with_step_size(0.25), state, noise)
    step(from_blackjax(blackjax.nuts, step_size=0.1, inverse_mass_matrix=2 * ONES, max_num_doublings=3), state, noise)
    assert len(traces) == 1
    assert not np.allclose(first, again)


def test_caches_can_be_named() -> None:
    """If the slice of GHMC counted as a cache, init would redraw it: the argument decides."""
    parameters = dict(step_size=0.6, momentum_inverse_scale=ONES, alpha=0.5, delta=0.3)
    kernel = from_blackjax(blackjax.ghmc, caches=("logdensity", "logdensity_grad", "slice"), **parameters)
    unknown = kernel.unknown(kernel.init(TARGET, START))
    assert unknown.slice is None
    assert unknown.momentum is not None
    wrong = from_blackjax(blackjax.ghmc, caches=("momenta",), **parameters)
    with pytest.raises(ValueError, match="must name fields of"):
        wrong.unknown(wrong.init(TARGET, START))


def test_gradients_are_asked_for_by_algorithms_that_use_them() -> None:
    without = {name for name, (kernel, _) in CASES.items() if not kernel.uses_gradient}
    assert without == {"random-walk", "rmh", "elliptical"}
    built = blackjax.additive_step_random_walk(gaussian, lambda key, x: x)
    assert from_blackjax(built).uses_gradient  # its state is unknown before it has a position
    assert not from_blackjax(built, uses_gradient=False).uses_gradient
    assert from_blackjax(random_walk, sigma=ONES, uses_gradient=True).uses_gradient


def loops(position):
    """A standard normal density that JAX cannot differentiate in reverse mode."""
    return jax.lax.while_loop(lambda f: f > 0, lambda f: -0.5 * jnp.sum(position["x"] ** 2), 1.0)


def kink(position):
    """A density whose gradient is NaN at 0."""
    return -jnp.sqrt(jnp.sum(position["x"] ** 2))


@pytest.mark.parametrize("logdensity", [loops, kink])
@pytest.mark.parametrize("in_compose", [False, True])
def test_random_walks_need_no_derivative(logdensity, in_compose: bool) -> None:
    def sample(kernel):
        kernel = pmcmc.Compose([(kernel, ["x"])]) if in_compose else kernel
        sizes = dict(num_warmup=0, num_samples=20, num_chains=2, solver=Sequential(), progress_bar=False)
        return pmcmc.sample(logdensity, {"x": jnp.zeros(2)}, 0, kernel=kernel, **sizes)

    assert np.ptp(sample(from_blackjax(random_walk, sigma=jnp.ones(2))).get_samples()["x"]) > 0.5
    with pytest.raises((TypeError, ValueError), match=r"cannot differentiate it|gradient is not finite"):
        sample(from_blackjax(blackjax.mala, step_size=0.1))


def test_nan_proposals_are_rejected_and_count_as_divergent() -> None:
    """BlackJAX reports an acceptance rate of NaN for them, which would break the tuning of a step size."""
    bad = Target.from_logdensity(lambda x: jnp.where(x[0] > 0.5, jnp.nan, -0.5 * jnp.sum(x**2)), START)
    kernel = CASES["barker"][0]
    noise = draw_noise(bad, kernel, 0, 200)
    solution = solve(bad, kernel, Sequential(), kernel.unknown(kernel.init(bad, 0 * START)), noise)
    broken = np.asarray(solution.aux.is_divergent)
    assert 20 < broken.sum() < 180
    np.testing.assert_array_equal(solution.aux.acceptance_rate[broken], 0.0)
    assert np.all(solution.aux.acceptance_rate[~broken] > 0)
    assert np.all(solution.value.position[:, 0] <= 0.5)


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: from_blackjax(3.0), TypeError, "SamplingAlgorithm or a constructor"),
        (lambda: from_blackjax(blackjax.nuts(gaussian, 0.1, ONES), step_size=0.3), TypeError, "already built"),
        (lambda: from_blackjax(blackjax.elliptical_slice, mean=ONES, cov=ONES), ValueError, "log likelihood"),
        (lambda: from_blackjax(blackjax.barker_proposal, step_size=0), ValueError, "positive"),
        (lambda: from_blackjax(blackjax.barker_proposal, step_size={1}), TypeError, "hashable"),
        (lambda: from_blackjax(lambda f: f).init(TARGET, START), TypeError, "must return a SamplingAlgorithm"),
        (
            lambda: from_blackjax(blackjax.orbital_hmc, step_size=0.1, inverse_mass_matrix=None, period=4).init(
                TARGET, START
            ),
            TypeError,
            "field 'position'",
        ),
    ],
)
def test_mistakes_are_refused(make, error, message: str) -> None:
    with pytest.raises(error, match=message):
        make()
