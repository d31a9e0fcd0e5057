"""What is refused before a solver runs: states that cannot be compared or would be truncated, axes that do not fit,
scales and tolerances that say nothing, and steps that depend on how many are taken at once."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pmcmc import recurrence as rec
from pmcmc._pytree import all_finite, finite_rows
from pmcmc.recurrence.problem import make_problem
from pmcmc.stability import coalescence_time

SOLVERS = [rec.Sequential(), rec.MultipleShooting(), rec.deer()]
solvers = pytest.mark.parametrize("solver", SOLVERS, ids=["sequential", "shooting", "deer"])


def couple(fn, first, second):
    return coalescence_time(fn, first, second, jnp.zeros((9, 2)), scale=1.0)


@solvers
def test_states_that_cannot_be_compared(solver) -> None:
    """Complex numbers, which grew to NaN and counted as solved, and typed keys."""
    square = lambda z, u: z * z + u
    with pytest.raises(TypeError, match=r"dtype complex128: expected real numbers.*as two leaves"):
        solver.solve(square, 0j, jnp.full(200, 1 + 1j))
    with pytest.raises(TypeError, match="dtype complex128"):
        solver.solve(lambda z, u: jnp.abs(z), 1j, length=9)
    step = lambda x, u: {"key": jax.random.split(x["key"])[0], "y": jax.random.normal(x["key"])}
    with pytest.raises(TypeError, match=r"the state x\['key'\] has dtype key<fry>.*jax.random.key_data"):
        solver.solve(step, {"key": jax.random.key(0), "y": 0.0}, length=5)


def test_a_start_that_would_be_truncated() -> None:
    above = lambda x, u: (x > 0.5).astype(int)
    with pytest.raises(TypeError, match="dtype float64 in x0, and fn returns int64"):
        rec.solve(above, 0.9, length=5)
    with pytest.raises(TypeError, match="dtype float64 in x0, and fn returns int64"):
        couple(above, jnp.zeros(2), jnp.full(2, 0.9))
    assert rec.solve(lambda x, u: 0.5 * x, 1, length=5).value[0] == 0.5


@pytest.mark.parametrize(
    ("before", "after"),
    [("int32", "int8"), ("uint8", "int8"), ("float64", "float32"), ("float16", "bfloat16"), ("int32", "bool")],
)
def test_a_start_of_a_wider_dtype(before, after) -> None:
    """300 became 44 for a step that returns int8. Accepted: what JAX promotes to it, and numbers of Python."""
    step = lambda x, u: (x * 0).astype(after)
    x0 = jnp.asarray(300 if before == "int32" else 1, before)
    with pytest.raises(TypeError, match=f"dtype {before} in x0, and fn returns {after}.*Pass x0 as {after}"):
        rec.Sequential().solve(step, x0, length=5)
    with pytest.raises(TypeError, match=f"dtype {before} in x0, and fn returns {after}"):
        couple(step, jnp.zeros(2, before), jnp.ones(2, before))
    narrow = lambda x, u: (0.5 * x).astype(jnp.float32)
    for start in (0.9, 1, np.int64(3), jnp.float16(2)):
        with jax.numpy_dtype_promotion("standard"):
            found = jax.eval_shape(lambda start=start: rec.Sequential().solve(narrow, start, length=5))
        assert found.value.dtype == jnp.float32


@pytest.mark.parametrize("solver", SOLVERS[:2], ids=["sequential", "shooting"])
def test_the_remedy_for_keys(solver) -> None:
    def step(x, u):
        now, following = jax.random.split(jax.random.wrap_key_data(x["key"]))
        return {"key": jax.random.key_data(following), "y": 0.5 * x["y"] + jax.random.normal(now)}

    start = {"key": jax.random.key_data(jax.random.key(0)), "y": 0.0}
    assert solver.solve(step, start, length=5).result == rec.RESULTS.successful


def test_complex_entries_are_tested_for_finiteness() -> None:
    """Also where states are not checked by their dtype, as in a carry."""
    rows = {"z": jnp.array([1j, jnp.nan * 1j]), "n": jnp.arange(2)}
    assert finite_rows(rows).tolist() == [True, False]
    assert not all_finite(rows)


@solvers
def test_leading_axes_of_a_batch(solver) -> None:
    """A chain of the inputs was left out if x0 had one chain only."""
    decay = lambda x, u: 0.5 * x + u
    with pytest.raises(ValueError, match=r"same leading axis of chains, got \[\(1,\), \(3,\)\]"):
        solver.solve_batch(decay, jnp.zeros((1, 2)), jnp.ones((3, 16, 2)))
    with pytest.raises(ValueError, match="same leading axis of chains"):
        solver.solve_batch(lambda x, u: x, (jnp.zeros((3, 2)), jnp.zeros(2)), length=16)
    with pytest.raises(ValueError, match="same leading axis of chains"):
        solver.solve_batch(lambda x, u: x, (jnp.zeros((3, 2)), jnp.zeros(())), length=16)


@solvers
@pytest.mark.parametrize("x0", [jnp.zeros(0), (), {"a": jnp.zeros((2, 0))}])
def test_a_state_without_numbers(solver, x0) -> None:
    with pytest.raises(ValueError, match="x0 holds no number"):
        solver.solve(lambda x, u: x, x0, length=16)


@solvers
def test_a_leaf_without_numbers_beside_others(solver) -> None:
    x0 = {"empty": jnp.zeros(0), "y": jnp.ones(2)}
    found = solver.solve(lambda x, u: {"empty": x["empty"], "y": 0.5 * x["y"]}, x0, length=16)
    assert found.result == rec.RESULTS.successful


decay = lambda x, u: 0.9 * x + u
single = jnp.float32
PAIR = {"a": jnp.zeros(3), "b": jnp.zeros((2, 3))}
halved = lambda x, u: jax.tree.map(lambda v: 0.5 * v + 1, x)


@solvers
@pytest.mark.parametrize("scale", [-1.0, jnp.inf, jnp.nan, 1e39])
def test_scales_that_certify_anything_or_nothing(solver, scale) -> None:
    """The distance over a negative or an infinite scale is small. 1e39 is infinite in float32."""
    inputs = jnp.ones(100, single)
    with pytest.raises(ValueError, match=r"scale must be positive and finite in float32, got .* or leave scale out"):
        solver.solve(decay, single(0), inputs, scale=scale)
    with pytest.raises(ValueError, match=r"scale\['a'\] must be positive and finite"):
        solver.solve(lambda x, u: x, {"a": single(0)}, length=9, scale={"a": np.array(scale)})
    with pytest.raises(ValueError, match="scale must be positive"):
        coalescence_time(decay, jnp.zeros(2, single), jnp.ones(2, single), jnp.zeros((9, 2), single), scale=scale)


@pytest.mark.parametrize("solver", SOLVERS[1:], ids=["shooting", "deer"])
@pytest.mark.parametrize("scale", [-1.0, jnp.inf, jnp.nan, 0.0])
def test_scales_that_are_not_known_yet(solver, scale) -> None:
    """Within jit they count as 0: only equal states are close."""
    inputs = jax.random.normal(jax.random.key(0), (300,))
    run = jax.jit(lambda scale: solver.solve(decay, 0.0, inputs, scale=scale, initial_guess=jnp.full(300, 5.0)))
    found, exact = run(scale), rec.Sequential().solve(decay, 0.0, inputs).value
    np.testing.assert_allclose(found.value, exact, rtol=0, atol=1e-12)
    assert found.result == rec.RESULTS.successful


@solvers
def test_scales_of_other_forms(solver) -> None:
    """A scale (lanes,) was matched to the lanes of shooting, and one of another structure failed within JAX."""
    for scale in ({"a": 1.0}, [1.0, 1.0], {"a": 1.0, "b": jnp.ones(2)}, jnp.ones(3), {"a": jnp.ones((1, 3)), "b": 1.0}):
        with pytest.raises(ValueError, match=r"scale must be one number, or have the structure.*\(2, 3\)"):
            solver.solve(halved, PAIR, length=16, scale=scale)
    with pytest.raises(ValueError, match=r"scale must be one number.*Expected \(\), got \(4,\)"):
        rec.MultipleShooting(num_blocks=4).solve(decay, 0.0, jnp.ones(64), scale=jnp.ones(4))
    run = lambda scale: jax.jit(lambda: solver.solve(halved, PAIR, length=16, scale=scale).residual)()
    scales = 2, 2.0, {"a": 2.0, "b": jnp.full((2, 1), 2)}, {"a": jnp.full(3, 2), "b": jnp.full(3, 2)}
    assert len({float(run(scale)) for scale in scales}) == 1


def test_scale_of_coupled_pairs_of_several_leaves() -> None:
    first = jax.tree.map(lambda x: jnp.zeros((2, *x.shape)), PAIR)
    second = jax.tree.map(jnp.ones_like, first)
    found = jax.jit(lambda: coalescence_time(halved, first, second, jnp.zeros((60, 2)), scale=2.0))()
    assert found.merged.all()
    assert found.profile(2.0)[0].tolist() == [[0.5] * 9] * 2
    with pytest.raises(ValueError, match="scale must be one number"):
        coalescence_time(halved, first, second, jnp.zeros((60, 2)), scale={"a": 1.0})


@pytest.mark.parametrize("tol", [jnp.nan, jnp.inf, -1e-6, np.array(jnp.nan), 1e39])
def test_tolerances_that_certify_anything_or_nothing(tol) -> None:
    """What is infinite in the state's dtype alone is refused in the solve."""
    makers = [rec.deer, rec.quasi_elk, rec.MultipleShooting, lambda tol: rec.Windowed(rec.deer(tol=tol))]
    for make in makers:
        with pytest.raises(ValueError, match=r"tol must be at least 0 and finite in float.*leave it out"):
            make(tol=tol).solve(decay, single(0), jnp.ones(64, single))
        if tol != 1e39:
            with pytest.raises(ValueError, match="tol must be at least 0"):
                make(tol=tol)
    ones = jnp.ones(2, single)
    with pytest.raises(ValueError, match="tol must be at least 0"):
        coalescence_time(decay, 0 * ones, ones, jnp.zeros((9, 2), single), scale=1.0, tol=tol)
    with pytest.raises(TypeError, match="tol must be a number, got True"):
        rec.deer(tol=True)


@pytest.mark.parametrize("make", [rec.MultipleShooting, rec.deer], ids=["shooting", "deer"])
@pytest.mark.parametrize("tol", [-1.0, jnp.inf, jnp.nan])
def test_tolerances_that_are_not_known_yet(make, tol) -> None:
    inputs = jax.random.normal(jax.random.key(0), (300,))
    run = jax.jit(lambda tol: make(tol=tol).solve(decay, 0.0, inputs, initial_guess=jnp.full(300, 5.0), scale=1.0))
    found, exact = run(tol), rec.Sequential().solve(decay, 0.0, inputs).value
    np.testing.assert_allclose(found.value, exact, rtol=0, atol=1e-12)


@solvers
def test_guesses_of_another_structure(solver) -> None:
    """They failed within JAX, before the message about shapes."""
    guess = {"a": jnp.zeros((16, 3))}
    for wrong in (guess, lambda steps: guess, jnp.zeros(16)):
        with pytest.raises(ValueError, match=r"initial_guess must hold one state per step. Expected.*\(\d+, 3\)"):
            solver.solve(halved, PAIR, length=16, initial_guess=wrong)


@solvers
def test_lengths(solver) -> None:
    for wrong in (2.0, "2", True):
        with pytest.raises(TypeError, match="length must be an integer"):
            make_problem(decay, jnp.zeros(1), jnp.ones((1, 2)), wrong, None, False, None)
    for wrong in (0, -1):
        with pytest.raises(ValueError, match="length must be at least 1"):
            solver.solve(lambda x, u: x, 0.0, length=wrong)
    with pytest.raises(ValueError, match="at least 1, got 0: pass inputs of one step"):
        solver.solve(decay, 0.0, jnp.ones(0))
    with pytest.raises(ValueError, match=r"must agree on T, got \[2, 3\]. Leave length out"):
        solver.solve(decay, 0.0, jnp.ones(2), length=3)


@solvers
@pytest.mark.parametrize("impl", ["rbg", "unsafe_rbg"])
def test_keys_whose_bits_depend_on_how_many_are_drawn(solver, impl) -> None:
    """Under vmap all keys of a batch draw from the first one, so that blocks and the sequential path differed."""
    keys = jax.random.split(jax.random.key(3, impl=impl), 12)
    noisy = lambda x, key: 0.5 * x + jax.random.normal(key)
    with pytest.raises(TypeError, match=r"hardware generators.*threefry2x32.*or draw the numbers beforehand"):
        solver.solve(noisy, 0.0, keys)
    deep = lambda x, key: jax.lax.fori_loop(0, 2, lambda _, x: jax.lax.cond(x > 0, noisy, noisy, x, key), x)
    with pytest.raises(TypeError, match="hardware generators"):
        solver.solve(deep, 0.0, keys)
    for use in (jax.random.split, lambda key: jax.random.fold_in(key, 1), lambda key: jax.random.gamma(key, 2.0)):
        with pytest.raises(TypeError, match="hardware generators"):
            solver.solve(lambda x, key, use=use: (use(key), 0.5 * x)[1], 0.0, keys)
    with jax.default_prng_impl(impl), pytest.raises(TypeError, match="hardware generators"):
        solver.solve(noisy, 0.0, jax.random.key_data(keys))
    with pytest.raises(TypeError, match="by rng_bit_generator"):
        solver.solve(lambda x, u: x + jax.lax.rng_bit_generator(u, ())[1] * 0.0, 0.0, jax.random.key_data(keys))
    with pytest.raises(TypeError, match="hardware generators"):
        coalescence_time(noisy, jnp.zeros(2), jnp.ones(2), keys.reshape(6, 2), scale=1.0)
    # Keys that are passed on draw nothing.
    first = lambda x, key: 0.5 * x + 1e-9 * jax.random.key_data(key)[0]
    assert jax.eval_shape(lambda: solver.solve(first, 0.0, keys)).value.shape == (12,)


@pytest.mark.parametrize("dtype", [jnp.float16, jnp.bfloat16])
def test_half_precision_has_no_default_tolerance(dtype) -> None:
    """It was 3 and 25 % of the scale, at which anything is equal."""
    step, x0, inputs = lambda x, u: (0.5 * x + u).astype(dtype), dtype(0), jnp.ones(64, dtype)
    for solver in (rec.MultipleShooting(), rec.deer(), rec.quasi_elk(), rec.Windowed(rec.deer())):
        with pytest.raises(
            ValueError, match=f"states in {jnp.dtype(dtype)} have no default.*Use float32 states, or say"
        ):
            solver.solve(step, x0, inputs)
    with pytest.raises(ValueError, match="have no default tolerance"):
        coalescence_time(step, jnp.zeros(2, dtype), jnp.ones(2, dtype), jnp.zeros((9, 2), dtype), scale=1.0)
    for solver in (rec.MultipleShooting(num_blocks=4, tol=1e-6), rec.deer(tol=1e-6)):
        guess = jnp.linspace(0, 1, 64, dtype=dtype)
        found = jax.jit(lambda guess, solver=solver: solver.solve(step, x0, inputs, initial_guess=guess, scale=1.0))(
            guess
        )
        assert found.result == rec.RESULTS.successful
        assert found.residual.dtype == found.stats.growth_rate.dtype == jnp.float32
        exact = rec.Sequential().solve(step, x0, inputs).value
        np.testing.assert_allclose(*(np.asarray(x, float) for x in (found.value, exact)), atol=4 * jnp.finfo(dtype).eps)
    assert rec.Sequential().solve(step, x0, inputs).residual.dtype == jnp.float32
