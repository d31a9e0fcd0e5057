"""Sampling within `jax.jit`, `jax.vmap` or `jax.grad` is refused with one sentence, before anything is traced."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import pytest

import pmcmc
from pmcmc.recurrence import Sequential

SIZES = dict(num_warmup=0, num_samples=10, num_chains=1, progress_bar=False)
KERNEL = pmcmc.MALA(step_size=0.1)


def model(y):
    mu = numpyro.sample("mu", dist.Normal(0, 1))
    numpyro.sample("y", dist.Normal(mu, 1), obs=y)


def by_parallel_chain(y):
    chain = pmcmc.parallel_chain(model, 0, model_args=(y,), kernel=KERNEL, solver=Sequential(), **SIZES)
    return chain.get_samples()["mu"]


def by_drop_in(y):
    mcmc = pmcmc.ParallelMCMC(model, kernel=KERNEL, **SIZES)
    mcmc.run(jax.random.key(0), y)
    return mcmc.get_samples()["mu"]


def by_sample(y):
    return pmcmc.sample(lambda x: -0.5 * (x - y) ** 2, 0.0, 0, kernel=KERNEL, **SIZES).get_samples()


@pytest.mark.parametrize("transform", [jax.jit, jax.vmap, jax.jacfwd], ids=["jit", "vmap", "derivative"])
@pytest.mark.parametrize(
    ("run", "name"),
    [(by_parallel_chain, "parallel_chain"), (by_drop_in, "ParallelMCMC.run"), (by_sample, "sample")],
    ids=["parallel_chain", "drop-in", "sample"],  # the last one hides the tracer in a closure
)
def test_calls_within_transformations(run: Callable, name: str, transform: Callable) -> None:
    y = jnp.zeros(3) if transform is jax.vmap else jnp.array(0.0)
    with pytest.raises(TypeError, match=rf"^{name} cannot be called within jax.jit.*in a Python loop.*num_chains"):
        transform(run)(y)


def test_a_key_of_many() -> None:
    run = lambda key: pmcmc.sample(lambda x: -(x**2), 0.0, key, kernel=KERNEL, **SIZES).get_samples()
    with pytest.raises(TypeError, match=r"sample cannot be called within jax.jit, jax.vmap"):
        jax.vmap(run)(jax.random.split(jax.random.key(0), 2))


def test_what_goes_on_from_a_chain(tmp_path) -> None:
    logdensity = lambda x: -(x**2)
    chain = pmcmc.sample(logdensity, 0.0, 0, kernel=KERNEL, solver=Sequential(), **SIZES)
    chain.save(tmp_path / "chain.npz")
    calls = {
        "Chain.extend": lambda: chain.extend(10, progress_bar=False),
        "Chain.verify": chain.verify,
        "Chain.stream": lambda: chain.stream(tmp_path / "folder", 10, progress_bar=False),
        "load": lambda: pmcmc.load(tmp_path / "chain.npz", logdensity),
        "resume": lambda: pmcmc.resume(tmp_path, logdensity),
    }
    for name, call in calls.items():
        with pytest.raises(TypeError, match=rf"^{name} cannot be called within"):
            jax.jit(lambda _, call=call: call())(0.0)
    assert chain.extend(10, progress_bar=False).num_samples == 20  # the refused calls changed nothing


def test_loops_are_the_remedy() -> None:
    means = [float(by_parallel_chain(y).mean()) for y in (np.float64(-3.0), np.float64(3.0))]
    assert means[0] < means[1]
