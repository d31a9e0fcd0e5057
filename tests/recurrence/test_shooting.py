"""Multiple shooting returns the sequential chain from any guess, and its certificate and counts are correct.

The chains: MALA on a mixture, HMC on a banana with short jittered trajectories (0.3 x 3, factors 0.5-1.5: longer ones
hardly contract there), HMC on eight schools. Acceptance rates 0.75, 0.87, 0.85.
"""

from functools import cache

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pmcmc import HMC, MALA
from pmcmc.recurrence import RESULTS, MultipleShooting, Sequential, abreast, sequential
from pmcmc.recurrence.shooting import repair, solver
from pmcmc.recurrence.shooting.reference import solve_plainly
from tests.helpers.chains import draw_noise, solve, solve_batch, solve_fn, step_residuals
from tests.helpers.targets import banana, eight_schools, make_target, mixture

LENGTH = 100_000
PROBLEMS = {
    "mixture-MALA": (mixture, MALA(step_size=0.8)),
    "banana-HMC": (banana, HMC(step_size=0.3, num_integration_steps=3, step_size_jitter=0.5)),
    "eight-schools-HMC": (eight_schools, HMC(step_size=0.5, num_integration_steps=3)),
}


@cache
def problem(name: str, length: int = LENGTH):
    """Return (target, kernel, x0, noise, sequential chain, states of another chain)."""
    logdensity_fn, kernel = PROBLEMS[name]
    target = make_target(logdensity_fn)
    x0 = jnp.full(target.dim, 0.3)
    noise = draw_noise(target, kernel, 0, length)
    chain = solve(target, kernel, Sequential(), x0, noise)
    other = solve(target, kernel, Sequential(), -x0, draw_noise(target, kernel, 1, length))
    return target, kernel, x0, noise, chain, other.value


def guesses(name: str) -> dict[str, jax.Array]:
    *_, chain, other = problem(name)
    still = jnp.zeros_like(other)
    return {"constant": still, "far away": still + 1e3, "4e-4 off": chain.value + 4e-4, "another chain": other}


@pytest.mark.parametrize("name", PROBLEMS)
def test_problems_are_sensible(name: str) -> None:
    chain = problem(name)[4]
    assert 0.6 < float(chain.aux.acceptance_rate.mean()) < 0.9
    assert 0.5 < float((chain.aux.margin > 0).mean()) < 0.95


@pytest.mark.parametrize("guess", ["constant", "far away", "4e-4 off", "another chain"])
@pytest.mark.parametrize("name", PROBLEMS)
def test_equals_sequential(name: str, guess: str) -> None:
    target, kernel, x0, noise, chain, _ = problem(name)
    scale = jnp.std(chain.value, axis=0)
    solution = solve(target, kernel, MultipleShooting(num_blocks=32), x0, noise, guesses(name)[guess], scale)
    assert solution.result == RESULTS.successful
    assert solution.stats.certified_steps == LENGTH
    np.testing.assert_allclose(solution.value, chain.value, rtol=0, atol=1e-9)
    np.testing.assert_allclose(solution.aux.acceptance_rate, chain.aux.acceptance_rate, rtol=0, atol=1e-9)
    residual = jnp.max(step_residuals(target, kernel, x0, solution.value, noise, scale))
    assert residual <= solution.residual + 1e-13
    assert solution.residual <= 512 * jnp.finfo(float).eps
    if guess != "far away":
        assert solution.stats.num_sequential_steps < LENGTH / 8


@pytest.mark.parametrize("name", PROBLEMS)
def test_loose_residual_is_true(name: str) -> None:
    target, kernel, x0, noise, chain, other = problem(name)
    scale = jnp.std(chain.value, axis=0)
    solver = MultipleShooting(num_blocks=32, tol=1e-5)
    solution = solve(target, kernel, solver, x0, noise, other, scale)
    assert solution.result == RESULTS.successful
    residuals = np.sort(step_residuals(target, kernel, x0, solution.value, noise, scale))
    assert 1e-7 < solution.residual <= 1e-5
    np.testing.assert_allclose(residuals[-1], solution.residual, rtol=1e-6)
    assert np.sum(residuals > 1e-12) <= 31  # at most one splice per block; elsewhere f of the predecessor


@pytest.mark.parametrize(("length", "num_blocks"), [(1000, 7), (1, 1), (1, 4), (11, 8), (21, 20), (1001, 10)])
def test_any_length_and_blocks(length: int, num_blocks: int) -> None:
    """T not a multiple of P, P above T, and last blocks nearly empty: 21 steps in 20 blocks, 1001 in 10."""
    target, kernel, x0, noise, chain, other = problem("mixture-MALA")
    noise, expected = jax.tree.map(lambda u: u[:length], noise), chain.value[:length]
    solution = solve(target, kernel, MultipleShooting(num_blocks=num_blocks), x0, noise, other[:length], jnp.ones(2))
    assert solution.result == RESULTS.successful
    assert solution.stats.certified_steps == length
    assert solution.value.shape == expected.shape
    np.testing.assert_allclose(solution.value, expected, rtol=0, atol=1e-9)


@pytest.mark.parametrize(("length", "num_blocks"), [(960, 10), (1000, 10), (1001, 10), (33, 3)])
def test_the_forms_for_a_gpu_do_the_same(length: int, num_blocks: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Several steps a turn of a loop, in chunks of 32, 4 and 1; repair writes where lanes are active."""
    target, kernel, x0, noise, _, other = problem("mixture-MALA")
    noise, solver = jax.tree.map(lambda u: u[:length], noise), MultipleShooting(num_blocks=num_blocks)
    run = lambda: solve(target, kernel, solver, x0, noise, other[:length], jnp.ones(2))
    expected = run()
    with monkeypatch.context() as patch:
        for module in (abreast, sequential):
            patch.setattr(module, "default_platform", lambda: "gpu")
        jax.clear_caches()
        found = run()
    jax.clear_caches()
    assert found.result == RESULTS.successful
    assert jax.tree.map(int, found.stats[:4]) == jax.tree.map(int, expected.stats[:4])
    np.testing.assert_allclose(found.value, expected.value, rtol=0, atol=1e-12)
    np.testing.assert_allclose(found.aux.margin, expected.aux.margin, rtol=0, atol=1e-10)


def test_chains_are_lanes() -> None:
    """Chains solved together get what each gets alone: states, residual and counts."""
    target, kernel, x0, noise, _, other = problem("mixture-MALA")
    length, starts = 2000, jnp.stack([x0, -x0, 10 * x0])
    stack = lambda tree: jax.tree.map(lambda x: x[: 3 * length].reshape(3, length, *x.shape[1:]), tree)
    noise, guess = stack(noise), stack(other)
    solver = MultipleShooting(num_blocks=16)
    together = solve_batch(target, kernel, solver, starts, noise, guess, jnp.ones(2))
    for c in range(3):
        chain = jax.tree.map(lambda x: x[c], (noise, guess))  # noqa: B023
        alone = solve(target, kernel, solver, starts[c], chain[0], chain[1], jnp.ones(2))
        exact = solve(target, kernel, Sequential(), starts[c], chain[0])
        np.testing.assert_allclose(together.value[c], alone.value, rtol=0, atol=1e-12)
        np.testing.assert_allclose(together.value[c], exact.value, rtol=0, atol=1e-9)
        for field in ("num_sweeps", "num_sequential_steps", "num_fn_evals", "certified_steps"):
            assert getattr(together.stats, field)[c] == getattr(alone.stats, field), field


def affine_step(x, u):
    """Contracts on average and expands at times, so that merges take various lengths."""
    return u["a"] * x + u["b"]


def lattice_step(x, u):
    """A reflected walk on {0, ..., 6} together with a real number: two walks merge exactly, at the walls."""
    place = np.clip if isinstance(x["place"], np.ndarray | np.generic) else jnp.clip
    return {"place": place(x["place"] + u["move"], 0, 6), "real": 0.5 * x["real"] + u["b"] + x["place"]}


def affine_inputs(seed: int, length: int):
    rng = np.random.default_rng(seed)
    return {"a": rng.choice([0.3, 0.7, 1.2], size=length), "b": rng.normal(size=length)}


def lattice_inputs(seed: int, length: int):
    rng = np.random.default_rng(seed)
    return {"move": rng.choice([-1, 0, 1], size=length), "b": rng.normal(size=length)}


RECURRENCES = {
    "affine": (affine_step, affine_inputs, np.float64(5.0), lambda g: 10.0 * g),
    "lattice": (
        lattice_step,
        lattice_inputs,
        {"place": np.int64(3), "real": np.float64(0.0)},
        lambda g: {"place": (np.abs(100 * g) % 7).astype(np.int64), "real": g},
    ),
}


@pytest.mark.parametrize(("length", "num_blocks"), [(96, 8), (57, 8), (61, 5), (40, 40), (59, 20)])
@pytest.mark.parametrize("name", RECURRENCES)
def test_counts_are_those_of_the_rule(name: str, length: int, num_blocks: int) -> None:
    """Path, residual, sweeps, critical path and work against a plain loop over blocks and steps."""
    step, make_inputs, x0, make_guess = RECURRENCES[name]
    solver = MultipleShooting(num_blocks=num_blocks, tol=1e-4)
    run = jax.jit(lambda inputs, guess: solver.solve(step, x0, inputs, initial_guess=guess, scale=unit(x0)))
    for seed in range(8):
        inputs = make_inputs(seed, length)
        guess = make_guess(np.random.default_rng(seed + 100).normal(size=length))
        expected = solve_plainly(step, x0, inputs, guess, num_blocks=num_blocks, tol=1e-4)
        solution = run(inputs, guess)
        assert solution.stats.num_sweeps == expected.num_sweeps
        assert solution.stats.num_sequential_steps == expected.num_sequential_steps
        assert solution.stats.num_fn_evals == expected.num_fn_evals
        assert solution.stats.certified_steps == length
        np.testing.assert_allclose(solution.residual, expected.residual, rtol=1e-9, atol=1e-13)
        for ours, theirs in zip(jax.tree.leaves(solution.value), jax.tree.leaves(expected.path), strict=True):
            np.testing.assert_allclose(ours, theirs, rtol=0, atol=1e-12)


def unit(tree):
    return jax.tree.map(lambda x: np.ones(np.shape(x)), tree)


def test_discrete_leaves_are_equal_at_merges() -> None:
    """The tolerance accepts any real difference, so only the integers decide, and they are exact."""
    step, make_inputs, x0, make_guess = RECURRENCES["lattice"]
    inputs, guess = make_inputs(3, 5000), make_guess(np.random.default_rng(4).normal(size=5000))
    solver = MultipleShooting(num_blocks=20, tol=1e6)
    solution = solve_fn(solver, step, x0, inputs, guess, unit(x0))
    exact = solve_fn(Sequential(), step, x0, inputs)
    np.testing.assert_array_equal(solution.value["place"], exact.value["place"])
    assert solution.residual > 1e-3  # the real leaf was spliced


def tanh_step(x, u):
    return 0.3 * jnp.tanh(x) + u


@pytest.mark.parametrize("extra", [0, 3, 20, 60])
def test_prefix_at_the_budget_of_steps_is_exact(extra: int) -> None:
    """Blocks of 50 steps whose repairs need about 23 more: with a smaller budget only the first block is certified."""
    key = jax.random.key(0)
    inputs, solver = jax.random.normal(key, (400,)), MultipleShooting(num_blocks=8, max_steps=50 + extra)
    found = solve_fn(solver, tanh_step, 0.0, inputs, jnp.full(400, 5.0), 1.0)
    expected = solve_fn(Sequential(), tanh_step, 0.0, inputs).value
    certified = int(found.stats.certified_steps)
    assert found.stats.num_sequential_steps <= 50 + extra
    np.testing.assert_allclose(found.value[:certified], expected[:certified], rtol=0, atol=1e-12)
    if extra < 20:
        assert found.result == RESULTS.max_iters_reached
        assert certified == 50
        assert jnp.any(jnp.abs(found.value[50:] - expected[50:]) > 1e-6)
    elif extra == 60:
        assert found.result == RESULTS.successful
        assert certified == 400


@pytest.mark.parametrize("max_sweeps", [1, 2, 3])
def test_prefix_at_the_cap_is_exact(max_sweeps: int) -> None:
    """From a distant guess on the banana, where lanes stick, a sweep repairs one block: max_sweeps + 1 are exact."""
    target, kernel, x0, noise, chain, other = problem("banana-HMC")
    length, num_blocks = 4000, 40
    noise, exact, far = jax.tree.map(lambda x: x[:length], (noise, chain.value, 1e3 + 0 * other))
    solver = MultipleShooting(num_blocks=num_blocks, max_sweeps=max_sweeps)
    solution = solve(target, kernel, solver, x0, noise, far, jnp.ones(2))
    certified = int(solution.stats.certified_steps)
    assert solution.result == RESULTS.max_iters_reached
    assert not jnp.isfinite(solution.residual)
    assert solution.stats.num_sweeps == max_sweeps
    assert certified == (max_sweeps + 1) * length // num_blocks
    np.testing.assert_allclose(solution.value[:certified], exact[:certified], rtol=0, atol=1e-12)
    assert jnp.max(jnp.abs(solution.value - exact)) > 100


def test_logistic_map_is_not_contracting() -> None:
    """Chance merges of a chaotic map are reported, and what is certified is exact."""
    length = 200_000
    guess = jax.random.uniform(jax.random.key(0), (length,))
    solver = MultipleShooting(num_blocks=100, tol=1e-3)
    x0 = jnp.asarray(0.3)
    step = lambda x, u: 4 * x * (1 - x)
    solution = solve_fn(solver, step, x0, guess=guess, scale=jnp.ones(()), length=length)
    assert solution.stats.num_sweeps < 99  # merges by chance occurred
    assert solution.residual > 0
    assert solution.result == RESULTS.not_contracting
    assert solution.stats.growth_rate > 0.3  # ln 2 along typical paths
    certified = int(solution.stats.certified_steps)
    exact = solve_fn(Sequential(), step, x0, length=length).value
    assert certified < length
    np.testing.assert_array_equal(solution.value[:certified], exact[:certified])


def double(x, u):
    return 2 * x


@pytest.mark.parametrize(("start", "expected"), [(jnp.nan, 0), (jnp.inf, 0), (1.0, 1023)])
def test_nonfinite(start: float, expected: int) -> None:
    """x doubles from 1: overflow at 2^1024, so 1,023 finite steps. T is large: max loses NaN in large arrays."""
    guess = jnp.zeros(8192)
    solution = solve_fn(MultipleShooting(num_blocks=16), double, start, guess=guess, length=8192)
    assert solution.result == RESULTS.nonfinite
    assert solution.stats.certified_steps == expected
    assert not jnp.isfinite(solution.residual)
    if expected:
        np.testing.assert_array_equal(solution.value[:expected], 2.0 ** np.arange(1, expected + 1))
    assert not np.any(np.isfinite(solution.value[expected:]))  # neither remains of a guess nor zeros


def test_nan_rows_in_the_guess_do_not_matter() -> None:
    target, kernel, x0, noise, chain, other = problem("mixture-MALA")
    length = 8000
    noise, exact, other = jax.tree.map(lambda x: x[:length], (noise, chain.value, other))
    for rows in (slice(None), slice(999, 1000), slice(0, None, 2)):
        guess = other.at[rows].set(jnp.nan)
        solution = solve(target, kernel, MultipleShooting(num_blocks=8), x0, noise, guess)
        assert solution.result == RESULTS.successful
        np.testing.assert_allclose(solution.value, exact, rtol=0, atol=1e-9)


@pytest.mark.parametrize(("shift", "size"), [(1e5, 1.0), (0.0, 1e-6), (1e5, 1e-3)])
def test_shift_and_scale_change_nothing(shift: float, size: float) -> None:
    """The certificate is relative to the path's spread; no tolerance relative to |x| accepts a wrong path."""

    def step(x, u):
        y = (x - shift) / size
        return shift + size * (0.9 * y * jnp.cos(y) + u)

    inputs = jax.random.normal(jax.random.key(0), (10_000,))
    guess = shift + 3 * size * jax.random.normal(jax.random.key(1), (10_000,))
    x0 = jnp.asarray(shift)
    tol = max(1e-13, 1e-14 * shift / size)  # a shifted state cannot resolve less than its own rounding
    solution = solve_fn(MultipleShooting(num_blocks=50, tol=tol), step, x0, inputs, guess)
    exact = solve_fn(Sequential(), step, x0, inputs)
    assert solution.result == RESULTS.successful
    assert solution.stats.num_sequential_steps < 2000
    np.testing.assert_allclose((solution.value - exact.value) / size, 0, atol=1e4 * tol)


def test_an_older_splice_is_not_forgotten() -> None:
    """Block 2 merges inexactly at its last step, then, restarted, exactly at its second: the first splice remains."""

    def step(x, kind):
        return jnp.stack([1.5 * x, jnp.where(x > 0, 1.0, 1.5), 1 + 1e-5 * (x - 1), x])[kind]

    kinds = jnp.array([0] * 22 + [0, 1, 2] + [0, 0] + [3] * 6)
    guess = jnp.zeros(33).at[10].set(1.5**11 + 3e-3).at[21].set(-1.0)
    solver = MultipleShooting(num_blocks=3, tol=1e-4)
    solution = solve_fn(solver, step, 1.0, kinds, guess, jnp.ones(()))
    exact = solve_fn(Sequential(), step, 1.0, kinds)
    np.testing.assert_allclose(jnp.max(jnp.abs(solution.value - exact.value)), 1.125e-5, rtol=1e-3)
    assert solution.stats.growth_rate > 0
    assert solution.result == RESULTS.not_contracting


def test_sees_a_planted_fault(monkeypatch: pytest.MonkeyPatch) -> None:
    """A block restarts from the end of the block before its predecessor, reported as solved: both checks notice."""
    inputs, guess = affine_inputs(0, 400), np.random.default_rng(1).normal(size=400)

    def check() -> tuple[int, float, float]:
        step = lambda x, u: 0.7 * jnp.sin(x) + u["b"]  # a new function, so that nothing is compiled yet
        found = solve_fn(MultipleShooting(num_blocks=8), step, 0.0, inputs, guess, 1.0)
        exact = solve_fn(Sequential(), step, 0.0, inputs)
        before = np.append(0.0, found.value[:-1])
        residual = np.max(np.abs(found.value - (0.7 * np.sin(before) + inputs["b"])))
        return int(found.result), float(residual), float(np.max(np.abs(found.value - exact.value)))

    result, residual, error = check()
    assert result == RESULTS.successful
    assert max(residual, error) < 1e-12
    right = repair.successor_starts

    def one_block_early(lanes, end, ran_out):
        return right(lanes, lanes.held.hand_over(end), ran_out)

    for module in (solver, repair):  # after the zeroth sweep, and after each repair sweep
        monkeypatch.setattr(module, "successor_starts", one_block_early)
    result, residual, error = check()
    assert result == RESULTS.successful
    assert min(residual, error) > 0.01


@pytest.mark.parametrize(("platform", "most"), [("cpu", 128), ("gpu", 2048)])
def test_default_number_of_blocks(platform: str, most: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """About sqrt(8 T), with at least 16 steps per block; on a CPU more lanes cost more in repair than they save."""
    monkeypatch.setattr(solver, "default_platform", lambda: platform)
    found = [MultipleShooting().blocks_for(length) for length in (1, 31, 32, 2000, 10**6)]
    assert found == [1, 1, 2, 64, most]
    assert MultipleShooting(num_blocks=1000).blocks_for(10**6) == 1000


def test_count_of_evaluations_of_all_blocks_does_not_overflow() -> None:
    """That of each block fits: 8,192 blocks of 128 steps that never merge take 4.3e9."""
    counts = jnp.asarray([np.arange(8192) * 128, np.ones(8192), [2**31 - 8192, *np.ones(8191)]], jnp.int32)
    np.testing.assert_array_equal(solver._total(counts), [2**31 - 1, 8192, 2**31 - 1])


@pytest.mark.parametrize(("num_blocks", "solved"), [(1000, True), (2000, False)])
def test_errors_of_many_merges_add_up(num_blocks: int, solved: bool) -> None:
    """Each block of a sum merges 0.9 tolerances off: after 1,000 the error is 9e-4, after 2,000 above sqrt(1e-6)."""
    length, tol = 16 * num_blocks, 1e-6
    guess = lambda steps: steps + 1.0 + 0.9 * tol * ((steps + 1) // 16)
    run = jax.jit(
        lambda: MultipleShooting(num_blocks, tol=tol).solve(
            lambda x, u: x + u, 0.0, jnp.ones(length), initial_guess=guess, scale=1.0
        )
    )
    found, exact = run(), np.arange(1.0, length + 1)
    certified = int(found.stats.certified_steps)
    assert found.residual <= tol
    assert np.max(np.abs(found.value[:certified] - exact[:certified])) <= np.sqrt(tol)
    if solved:
        assert found.result == RESULTS.successful
        assert found.value[-1] - exact[-1] > 800 * tol
    else:
        assert found.result == RESULTS.not_contracting
        assert 16 * 1000 < certified < 16 * 1200
        assert np.max(np.abs(found.value - exact)) > np.sqrt(tol)


def test_bound_of_the_error_at_block_ends() -> None:
    """Against the recursion of the bound, block by block, with rates of both signs and none."""
    rng = np.random.default_rng(0)
    splice = rng.uniform(size=(3, 7)) * (rng.uniform(size=(3, 7)) > 0.3)
    rates = np.array([-0.2, 0.05, np.nan])
    layout = solver.Layout(3, 7, 10, 10, 65)
    expected, error = np.zeros((3, 7)), np.zeros(3)
    for block in range(7):
        rate, steps = np.nan_to_num(rates), min(10, 65 - 10 * block)
        error = error * np.exp(rate * steps) + splice[:, block] * np.exp(np.maximum(rate, 0) * 10)
        expected[:, block] = error
    np.testing.assert_allclose(solver._errors(layout, jnp.asarray(splice), jnp.asarray(rates)), expected, rtol=1e-12)
