"""SiteAdaptation holds the noise of one step, and says first what is wrong with the kernel."""

from dataclasses import dataclass

import jax
import jax.numpy as jnp
import pytest

import pmcmc
from pmcmc.warmup import sites

NORMAL = pmcmc.Gibbs({"b": pmcmc.kernels.NormalUpdate(lambda x: (jnp.sum(x["a"]), 1.0))})


def test_noise_of_a_window_is_not_held() -> None:
    """By the compiler's count, a longer window takes hardly more memory."""
    size, lanes = 10_000, 8
    update = pmcmc.kernels.CategoricalUpdate(lambda x: jnp.zeros((size, 3)))
    kernel = pmcmc.Gibbs({"z": update})
    target = pmcmc.Target.from_logdensity(None, {"z": jnp.zeros(size, int)})
    kernel = kernel.traced(target)
    unknowns = {"z": jax.ShapeDtypeStruct((lanes, size), int)}

    def held(num_steps: int) -> int:
        lowered = sites._run_window.lower(
            target, kernel, jax.random.key(0), unknowns, (), (), jnp.array(True), num_steps=num_steps
        )
        found = lowered.compile().memory_analysis()
        return found.temp_size_in_bytes + found.output_size_in_bytes + found.argument_size_in_bytes

    noise_of_a_step = lanes * size * 8
    assert held(64) - held(32) < noise_of_a_step


@pmcmc.register_dataclass
@dataclass(frozen=True)
class Silent(pmcmc.HMC):
    """A kernel that reports no acceptance rate, as many of BlackJAX's."""

    def step(self, target, state, noise):
        state, info = super().step(target, state, noise)
        return state, info._replace(acceptance_rate=jnp.full_like(info.acceptance_rate, jnp.nan))


@pytest.mark.parametrize("metric", [None, 1.0], ids=["own coordinates", "given metric"])
def test_a_group_that_cannot_be_tuned_is_named(metric) -> None:
    kernel = pmcmc.Compose([(Silent(inverse_mass_matrix=metric), ["a"]), NORMAL])
    logdensity = lambda x: -0.5 * jnp.sum(x["a"] ** 2) - 0.5 * (x["b"] - jnp.sum(x["a"])) ** 2
    with pytest.raises(pmcmc.WarmupError, match=r"step size of Silent .* reports no acceptance rate: pass step_size="):
        pmcmc.sample(logdensity, {"a": jnp.zeros(2), "b": 0.0}, 0, kernel=kernel, num_warmup=100, num_samples=10)
