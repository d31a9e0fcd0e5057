"""Kernels leave a skewed target invariant: chains that start at exact draws keep its moments.

Every check must also fail for a kernel with a planted fault, or it would prove nothing.
"""

from dataclasses import dataclass

import blackjax
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import special

from pmcmc import HMC, MALA, NUTS, Info, RandomWalk, from_blackjax
from pmcmc._pytree import register_dataclass
from pmcmc.kernels import UniformLength
from pmcmc.kernels.metropolis import GradientState
from tests.helpers.chains import draw_noise
from tests.helpers.selection import share
from tests.helpers.statistics import z_bound
from tests.helpers.targets import GAMMA_SHAPES, make_target, skewed, skewed_draws

pytestmark = pytest.mark.optimized

NUM_CHAINS, NUM_STEPS = 40_000, 6
KERNELS = {
    "MALA": MALA(step_size=0.25),
    "HMC": HMC(step_size=0.6, num_integration_steps=2),
    "HMC-uniform-length": HMC(step_size=0.6, num_integration_steps=UniformLength(1, 4), step_size_jitter=0.0),
    "RandomWalk": RandomWalk(0.6, grid_share=0.3, independence_share=0.2),
    "RandomWalk-radial": RandomWalk(0.8, grid_share=0.0, independence_share=None),
    "RandomWalk-grid": RandomWalk(0.6, grid_share=1.0, independence_share=None),
    "NUTS": NUTS(step_size=0.5, max_num_doublings=4),
    "dynamic HMC": from_blackjax(blackjax.dynamic_hmc, step_size=0.4, inverse_mass_matrix=None),
}


@jax.jit
def run(target, kernel, starts, noise):
    """Return positions after NUM_STEPS steps, and the share of steps that moved; noise is (steps, chains, ...)."""

    def step(state, u):
        new, _ = jax.vmap(lambda s, u: kernel.step(target, s, u))(state, u)
        return new, jnp.mean(jnp.any(new.position != state.position, axis=1))

    state, moved = jax.lax.scan(step, jax.vmap(lambda x: kernel.start(target, x))(starts), noise)
    return state.position, jnp.mean(moved)


def scores(kernel, seed: int) -> tuple[np.ndarray, float]:
    """Return z-scores of eleven moments against exact values, and the share of accepted moves."""
    target = make_target(skewed)
    starts = jnp.asarray(skewed_draws(seed, NUM_CHAINS))
    noise = draw_noise(target, kernel, seed, NUM_STEPS * NUM_CHAINS)
    noise = jax.tree.map(lambda u: u.reshape(NUM_STEPS, NUM_CHAINS, *u.shape[1:]), noise)
    x, accepted = run(target, kernel, starts, noise)
    x = np.asarray(x)
    # y[0], y[1] are logs of independent gamma variables: mean digamma(a), variance trigamma(a), E exp(y) = a.
    shapes = np.array(GAMMA_SHAPES)
    y = np.stack([x[:, 0], x[:, 1] - x[:, 0]], axis=1) - special.digamma(shapes)
    variance, third = special.polygamma(1, shapes), special.polygamma(2, shapes)
    functions = [y, y**2 - variance, y**3 - third, np.exp(y + special.digamma(shapes)) - shapes]
    functions += [(y[:, :1] * y[:, 1:]), (y > 0) - special.gammaincc(shapes, np.exp(special.digamma(shapes)))]
    values = np.concatenate(functions, axis=1)
    return values.mean(0) / (values.std(0) / np.sqrt(NUM_CHAINS)), float(accepted)


# The other kernels are covered by Geweke's test, see test_calibration.py.
@pytest.mark.parametrize(
    "name", share(list(KERNELS), "MALA", "HMC-uniform-length", "RandomWalk-radial", "RandomWalk-grid", "dynamic HMC")
)
def test_leaves_the_target_invariant(name: str) -> None:
    z, accepted = scores(KERNELS[name], seed=3)
    assert 0.4 < accepted < 0.95
    assert np.max(np.abs(z)) < z_bound(len(KERNELS) * z.size)


@register_dataclass
@dataclass(frozen=True)
class FaultyMALA(MALA):
    """MALA without the backward term of its acceptance ratio."""

    def step(self, target, state, noise):
        h = self.step_size
        position = state.position + h * state.gradient + jnp.sqrt(2 * h) * noise.normal
        proposal = GradientState(position, *target.value_and_grad(position))
        margin = proposal.logdensity - state.logdensity - noise.log_uniform
        new = jax.tree.map(lambda p, c: jnp.where(margin > 0, p, c), proposal, state)
        return new, Info(jnp.exp(margin), margin < -1000, margin, new.logdensity)


@register_dataclass
@dataclass(frozen=True)
class FaultyHMC(HMC):
    """HMC whose step size depends on the state, so that the reversed trajectory does not return."""

    def step(self, target, state, noise):
        faulty = HMC(self.step_size * (1 + 0.3 * jnp.tanh(state.position[0])), 2, step_size_jitter=0.0)
        return faulty.step(target, state, noise)


@register_dataclass
@dataclass(frozen=True)
class FaultyRandomWalk(RandomWalk):
    """A random walk whose independent steps are accepted as if they were symmetric."""

    def step(self, target, state, noise):
        independent = noise.is_independent
        proposal = self.restore(target, jnp.where(independent, noise.vector, state.position + 0.8 * noise.vector))
        margin = proposal.logdensity - state.logdensity - noise.log_uniform
        new = jax.tree.map(lambda p, c: jnp.where(margin > 0, p, c), proposal, state)
        return new, Info(jnp.exp(margin), margin < -1000, margin, new.logdensity)


@pytest.mark.parametrize(
    "kernel",
    share({"MALA": FaultyMALA(0.25), "HMC": FaultyHMC(0.5), "RandomWalk": FaultyRandomWalk(0.8, 0.0, 0.2)}, "MALA"),
)
def test_sees_a_planted_fault(kernel) -> None:
    z, accepted = scores(kernel, seed=3)
    assert 0.4 < accepted < 0.99
    assert np.max(np.abs(z)) > 2 * z_bound(len(KERNELS) * z.size)
