"""Unusual but legal input is sampled correctly; what cannot be sampled is refused with what to do."""

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import pytest

import pmcmc
from pmcmc.recurrence import MultipleShooting, Sequential
from tests.helpers.targets import gaussian, start_like

KERNEL = pmcmc.HMC(step_size=0.8, num_integration_steps=2)


def sample(logdensity_fn, start, **options) -> pmcmc.Chain:
    sizes = dict(kernel=KERNEL, solver=MultipleShooting(4), num_warmup=0, num_samples=200, num_chains=2)
    return pmcmc.sample(logdensity_fn, start, 0, **{**sizes, "progress_bar": False, **options})


def squares(x):
    return -0.5 * jnp.sum(x**2)


def test_a_number_is_a_state() -> None:
    chain = sample(lambda x: -0.5 * x**2, 0.3)
    assert chain.get_samples(group_by_chain=True).shape == (2, 200)
    assert chain.verify()


@pytest.mark.parametrize("start", [jnp.zeros(0), {"a": jnp.zeros((3, 0))}], ids=["array", "dict"])
def test_states_that_hold_nothing(start) -> None:
    with pytest.raises(ValueError, match="holds no numbers: there is nothing to sample"):
        sample(lambda x: jnp.zeros(()), start)


def test_empty_leaves_beside_others() -> None:
    chain = sample(lambda x: squares(x["b"]), {"a": jnp.zeros((3, 0)), "b": jnp.zeros(2)})
    assert chain.get_samples()["a"].shape == (400, 3, 0)
    assert chain.get_samples()["b"].shape == (400, 2)


def test_boolean_leaves(tmp_path: Path) -> None:
    kernel = pmcmc.Compose([pmcmc.DiscreteGibbs(supports={"b": [False, True]}), (KERNEL, ["x"])])
    logdensity_fn = lambda p: jnp.where(p["b"], 0.5, 0.0) - 0.5 * (p["x"] - p["b"]) ** 2
    chain = sample(logdensity_fn, {"b": jnp.array(True), "x": jnp.array(0.0)}, kernel=kernel)
    draws = chain.get_samples()["b"]
    assert draws.dtype == bool
    assert 0.3 < float(draws.mean()) < 0.9
    assert chain.verify()
    chain.save(tmp_path / "chain.npz")
    np.testing.assert_array_equal(pmcmc.load(tmp_path / "chain.npz", logdensity_fn).get_samples()["b"], draws)


def test_empty_discrete_leaves() -> None:
    """Also of more categories than are drawn by columns, and in the spread by which states are verified."""
    updates = {
        "b": pmcmc.kernels.NormalUpdate(lambda state: (0.0, 1.0)),
        "c": pmcmc.kernels.NormalUpdate(lambda state: (jnp.zeros((2, 0)), 1.0)),
        "d": pmcmc.kernels.CategoricalUpdate(lambda state: jnp.zeros((0, 10))),
    }
    labels = pmcmc.DiscreteGibbs(supports={"a": range(10)})
    chain = sample(
        lambda p: squares(p["b"]) + 0.0 * jnp.sum(p["a"]),
        {"a": jnp.zeros((3, 0), int), "b": jnp.zeros(()), "c": jnp.zeros((2, 0)), "d": jnp.zeros(0, int)},
        kernel=pmcmc.Compose([labels, pmcmc.Gibbs(updates)]),
    )
    assert chain.get_samples()["a"].shape == (400, 3, 0)
    assert chain.verify()


def with_cliff(x):
    """Twice as high on one side: the gradient does not see it, the decision does."""
    return squares(x) + jnp.where(x[0] > 0, jnp.log(2.0), 0.0)


def test_discontinuous_densities() -> None:
    chain = sample(with_cliff, jnp.zeros(1), num_samples=8000, num_chains=4)
    above = np.asarray(chain.get_samples(group_by_chain=True)[..., 0] > 0)
    means = above.reshape(80, 400).mean(axis=1)
    assert abs(means.mean() - 2 / 3) < 6 * means.std(ddof=1) / np.sqrt(80)
    assert chain.verify()


@jax.custom_vjp
def own_gradient(x):
    return squares(x)


own_gradient.defvjp(lambda x: (squares(x), x), lambda x, g: (-g * x,))


def test_custom_gradients_are_used() -> None:
    np.testing.assert_allclose(
        sample(own_gradient, jnp.zeros(2)).unknowns, sample(squares, jnp.zeros(2)).unknowns, rtol=0, atol=1e-10
    )


def called_back(x, **options):
    host = lambda v: np.asarray(-0.5 * np.sum(np.square(v)), v.dtype)
    return jax.pure_callback(host, jax.ShapeDtypeStruct((), x.dtype), x, **options)


def with_gradient(fn):
    given = jax.custom_jvp(fn)
    given.defjvp(lambda at, along: (given(*at), -jnp.sum(at[0] * along[0])))
    return given


@pytest.mark.parametrize(
    ("logdensity_fn", "words"),
    [
        (called_back, "cannot differentiate it.*custom_jvp"),
        (
            lambda x: jax.lax.while_loop(lambda s: s > 1, lambda s: s / 2, jnp.sum(x)),
            "cannot differentiate.*while_loop",
        ),
        (with_gradient(called_back), "jax.vmap cannot map it over several.*vmap_method="),
    ],
    ids=["callback", "loop", "no vmap"],
)
def test_densities_that_jax_cannot_take_apart(logdensity_fn, words: str) -> None:
    with pytest.raises(TypeError, match=words):
        sample(logdensity_fn, jnp.zeros(2))


def test_a_callback_that_can_be_mapped() -> None:
    mapped = with_gradient(lambda x: called_back(x, vmap_method="sequential"))
    chain = sample(mapped, jnp.zeros(2), num_samples=20, solver=Sequential())
    expected = sample(squares, jnp.zeros(2), num_samples=20, solver=Sequential())
    np.testing.assert_allclose(chain.unknowns, expected.unknowns, rtol=0, atol=1e-10)


def test_float32_positions_stay_float32() -> None:
    chain = sample(gaussian, start_like(gaussian, jnp.float32))
    assert chain.get_samples().dtype == jnp.float32
    assert chain.info.logdensity.dtype == np.float32
    assert chain.verify()


@pytest.mark.slow
@pytest.mark.parametrize("size", [1e-9, 1e9])
def test_warmup_finds_any_scale(size: float) -> None:
    """From the mode, without knowing the scale."""
    chain = sample(lambda x: squares(x / size), jnp.zeros(2), kernel=None, num_warmup=400, solver=Sequential())
    assert 0.5 < float(np.std(chain.get_samples()) / size) < 2
    assert chain.verify()


@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_odd_arguments_of_a_model() -> None:
    """A key, integers that nothing depends on (see `in_one_kernel`), an empty array."""

    def model(key, counts, nothing):
        x = numpyro.sample("x", dist.Normal(0, 1).expand([2]).to_event(1))
        numpyro.factor("shift", jnp.sum(jax.random.uniform(key, (2,)) * x) + jnp.sum(0 * counts) + jnp.sum(nothing))

    arguments = dict(kernel=KERNEL, num_warmup=0, num_samples=50, num_chains=1, progress_bar=False, solver=Sequential())
    run = lambda seed: pmcmc.parallel_chain(
        model, 0, model_args=(jax.random.key(seed), jnp.arange(3), jnp.zeros(0)), **arguments
    )
    first, second = run(1), run(2)
    assert first.verify()
    assert second.verify()
    assert not np.array_equal(first.unknowns, second.unknowns)
