"""Keys of any implementation give one threefry stream: blocks, sequential runs and `verify` agree on it."""

from contextlib import ExitStack
from functools import cache
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import pytest
from numpyro.infer import HMC, init_to_sample

import pmcmc
from pmcmc.drop_in import ParallelMCMC
from pmcmc.random.streams import chain_keys, fold_key, key_pair, seed_key, split_key
from pmcmc.recurrence import MultipleShooting, Sequential
from pmcmc.sampling.settings import as_key
from tests.helpers.targets import gaussian, start_like

OTHERS = ("rbg", "unsafe_rbg")
SIZES = dict(num_samples=200, num_chains=2, progress_bar=False)
KERNEL = pmcmc.HMC(step_size=0.9, num_integration_steps=2)
BLOCKS = MultipleShooting(4)


def run(key: Any, solver=BLOCKS, **options) -> pmcmc.Chain:
    options = {"kernel": KERNEL, "num_warmup": 0, **SIZES, **options}
    return pmcmc.sample(gaussian, start_like(gaussian), key, solver=solver, **options)


def key_of(how: str, impl: str, seed: int = 3) -> Any:
    """Make a key, with ``impl`` as JAX's default if the key does not carry it."""
    return {
        "typed": lambda: jax.random.key(seed, impl=impl),
        "raw": lambda: jax.random.PRNGKey(seed),
        "numpy": lambda: np.asarray(jax.random.PRNGKey(seed)),
        "seed": lambda: seed,
    }[how]()


def words(key: Any) -> np.ndarray:
    return np.asarray(jax.random.key_data(key))


@pytest.mark.parametrize("impl", OTHERS)
@pytest.mark.parametrize("how", ["typed", "raw", "numpy", "seed"])
def test_blocks_order_and_verify_agree(how: str, impl: str) -> None:
    with ExitStack() as context:
        if how != "typed":
            context.enter_context(jax.default_prng_impl(impl))
        key = key_of(how, impl)
        blocks, order = run(key), run(key, Sequential())
        np.testing.assert_allclose(blocks.unknowns, order.unknowns, rtol=0, atol=1e-9)
        assert blocks.verify()
        assert order.verify()
        assert str(jax.random.key_impl(blocks.state.rng_key)) == "threefry2x32"


@cache
def threefry_draws() -> np.ndarray:
    return run(jax.random.key(3), Sequential()).unknowns


def test_seeds_and_threefry_keys_do_not_depend_on_the_default() -> None:
    raw = np.asarray(jax.random.PRNGKey(3))
    typed = jax.random.key(3)
    for default in ("threefry2x32", *OTHERS):
        with jax.default_prng_impl(default):
            for key in (3, typed, raw, jnp.asarray(raw)):
                np.testing.assert_array_equal(run(key, Sequential()).unknowns, threefry_draws())


@pytest.mark.parametrize("x64", [True, False])
def test_keys_hashed_in_numpy_are_those_of_jax(x64: bool) -> None:
    words = jax.random.key_data
    with jax.enable_x64(x64):
        for seed in (0, 1, 12345, -1, 2**31 - 1, 2**31, 2**40 + 7):
            key = jax.random.key(seed, impl="threefry2x32")
            np.testing.assert_array_equal(words(seed_key(seed)), words(key))
            for number in (0, 1, 2**31, 2**32 - 1):
                expected = words(jax.random.fold_in(key, np.uint32(number)))
                np.testing.assert_array_equal(words(fold_key(key, number)), expected)
            split = jax.random.split(key, 3)
            np.testing.assert_array_equal([words(k) for k in split_key(key, 3)], words(split))
            np.testing.assert_array_equal(words(chain_keys(key, num_chains=3)), words(split))
        with pytest.raises(OverflowError):
            seed_key(2**64)


def test_every_form_of_a_key_is_one_threefry_key() -> None:
    """Threefry keys are unchanged; others depend on every word; raw and typed keys are the same."""
    np.testing.assert_array_equal(words(as_key(jax.random.key(7))), [0, 7])
    np.testing.assert_array_equal(words(as_key(np.asarray(jax.random.PRNGKey(7)))), [0, 7])
    long = np.arange(1, 5, dtype=np.uint32)
    seen = {tuple(words(as_key(jax.random.wrap_key_data(long, impl=impl)))) for impl in OTHERS}
    assert seen == {tuple(words(as_key(long)))}
    for place in range(4):
        other = long.copy()
        other[place] ^= 1
        seen.add(tuple(words(as_key(other))))
    assert len(seen) == 5
    batch = jax.random.split(jax.random.key(0, impl="rbg"), 3)
    np.testing.assert_array_equal(jax.vmap(key_pair)(batch), [key_pair(key) for key in batch])


@pytest.mark.parametrize("key", [np.zeros(3, np.uint32), np.zeros(2), np.zeros((2, 2), np.uint32), 1.0, True, "0"])
def test_what_is_no_key(key: Any) -> None:
    with pytest.raises(TypeError, match="rng_key must be one JAX key"):
        as_key(key)


Y = np.array([0.8, 1.4, -0.2, 1.1, 0.9])


def model(y=None):
    mu = numpyro.sample("mu", dist.Normal(0, 1))
    numpyro.sample("y", dist.Normal(mu, 1.0), obs=y)


@pytest.fixture
def numpyro_broadcasts_over_ranks():
    with jax.numpy_rank_promotion("allow"):
        yield


@pytest.mark.parametrize("impl", OTHERS)
def test_drop_in(impl: str, numpyro_broadcasts_over_ranks) -> None:
    """A key; a batch of typed, raw or numpy keys, of which the first is used; an init strategy; and continued runs."""

    def draws(key, solver, **options) -> tuple[ParallelMCMC, np.ndarray]:
        sampler = HMC(model, step_size=0.5, num_steps=2, trajectory_length=None, init_strategy=init_to_sample)
        sizes = {**SIZES, "num_samples": 40, "num_warmup": 0, **options}
        mcmc = ParallelMCMC(sampler, **sizes, solver=solver)
        mcmc.run(key, Y)
        return mcmc, np.asarray(mcmc.get_samples(group_by_chain=True)["mu"])

    with jax.default_prng_impl(impl):
        typed = jax.random.split(jax.random.key(0), 2)
        mcmc, expected = draws(typed, Sequential())
        assert mcmc.chain.verify()
        raw = jax.random.key_data(typed)
        for key in (typed[0], raw, np.asarray(raw), raw[0]):
            np.testing.assert_array_equal(draws(key, Sequential())[1], expected)
        np.testing.assert_allclose(draws(typed, BLOCKS)[1], expected, rtol=0, atol=1e-9)
        long = draws(typed, Sequential(), num_samples=80)[1]
        mcmc.post_warmup_state = mcmc.last_state
        mcmc.run(mcmc.last_state.rng_key, Y)
        np.testing.assert_allclose(mcmc.get_samples(group_by_chain=True)["mu"], long[:, 40:], rtol=0, atol=1e-9)


def test_a_models_starts_and_warm_up(numpyro_broadcasts_over_ranks) -> None:
    """The whole of `parallel_chain` with an rbg key is the same in blocks and sequentially."""
    key = jax.random.key(5, impl="unsafe_rbg")
    chains = [
        pmcmc.parallel_chain(model, key, model_args=(Y,), num_warmup=60, solver=solver, **SIZES)
        for solver in (BLOCKS, Sequential())
    ]
    np.testing.assert_allclose(chains[0].unknowns, chains[1].unknowns, rtol=0, atol=1e-9)
    assert chains[0].verify()


@pytest.mark.parametrize("impl", OTHERS)
def test_updates_of_the_users_own(impl: str) -> None:
    """They get raw keys of two words, which ``jax.random`` would refuse or misread under another default."""
    update = pmcmc.kernels.CustomUpdate(jax.random.normal, lambda state, z: 0.5 * state["a"] + z)
    by_key = pmcmc.kernels.CustomUpdate(lambda key: key, lambda state, key: 0.5 * state["b"] + jax.random.normal(key))
    start = {"a": jnp.zeros(()), "b": jnp.zeros(())}
    chain = lambda: pmcmc.sample(
        None, start, 0, kernel=pmcmc.Gibbs({"a": update, "b": by_key}), num_warmup=0, solver=BLOCKS, **SIZES
    )
    expected = chain()
    with jax.default_prng_impl(impl):
        found = chain()
        assert found.verify()
    for name, x in expected.unknowns.items():
        np.testing.assert_array_equal(found.unknowns[name], x)


def crank_nicolson(**settings) -> pmcmc.Kernel:
    """Return the kernel of docs/extending.md, whose noise comes from ``jax.random``."""
    page = (Path(__file__).parents[2] / "docs" / "extending.md").read_text(encoding="utf-8")
    code = page.split("```python\n")[1].split("def logdensity")[0]
    room: dict[str, Any] = {"__name__": __name__}
    exec(code, room)
    return room["CrankNicolson"](**settings)


@pytest.mark.parametrize("impl", OTHERS)
@pytest.mark.parametrize("within", [False, True], ids=["alone", "in a group"])
def test_kernels_of_the_users_own(within: bool, impl: str) -> None:
    """Drawn in a program of its own, step by step, to find shapes, and in both warm-ups."""
    density, start = lambda x: gaussian(x["x"]), {"x": jnp.zeros(3)}
    for step_size, num_warmup, solver in ((0.4, 0, BLOCKS), (None, 24, Sequential())):
        kernel = crank_nicolson(step_size=step_size)
        kernel = pmcmc.Compose([(kernel, ["x"])]) if within else kernel
        options = dict(kernel=kernel, num_warmup=num_warmup, **{**SIZES, "num_samples": 30})
        expected = pmcmc.sample(density, start, 0, solver=Sequential(), **options).get_samples()["x"]
        with jax.default_prng_impl(impl):
            found = pmcmc.sample(density, start, 0, solver=solver, **options).get_samples()["x"]
        np.testing.assert_allclose(found, expected, rtol=0, atol=1e-9)


@pytest.mark.parametrize("impl", OTHERS)
def test_files(impl: str, tmp_path: Path) -> None:
    with jax.default_prng_impl(impl):
        chain = run(jax.random.PRNGKey(1))
        chain.save(tmp_path / "chain.npz")
        longer = chain.extend(50, progress_bar=False)
        back = pmcmc.load(tmp_path / "chain.npz", gaussian)
        assert back.verify()
        np.testing.assert_array_equal(back.extend(50, progress_bar=False).unknowns, longer.unknowns)
        assert longer.verify()
        pytest.importorskip("zarr", reason="the zarr extra is not installed")
        stored = chain.stream(tmp_path / "run", 50, progress_bar=False)
    np.testing.assert_array_equal(stored.get_samples(group_by_chain=True)["x"], longer.unknowns)
    again = pmcmc.resume(tmp_path / "run", gaussian).extend(20, progress_bar=False)
    expected = longer.extend(20, progress_bar=False).unknowns
    np.testing.assert_allclose(again.get_samples(group_by_chain=True)["x"], expected, rtol=0, atol=1e-9)
