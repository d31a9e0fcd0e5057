"""Small studies whose parameters and data can both be drawn exactly.

    mu ~ N(0, 1),  v ~ InverseGamma(8, 8),  z[i] ~ Bernoulli(0.3),  y[i] ~ N(mu + 1.5 z[i], v),  i = 1..4

A study leaves out what its kernel does not sample: z for kernels with a gradient and for conjugate Gibbs, mu and v for
`DiscreteGibbs`. The data are leaves of the target, so that each lane may have different data.
"""

import abc
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np
from scipy import special

import pmcmc
from pmcmc.target import Model

NUM_DATA, SHAPE, SCALE, ONES, GAP = 4, 8.0, 8.0, 0.3, 1.5


@dataclass(frozen=True)
class Study(Model, abc.ABC):
    """A model that can be simulated."""

    def constrain(self, data, position):
        return position

    def sites(self, data, position):
        return {**position, "y": data}

    def loc_and_scale(self, position):
        """Location and scale of the data given the parameters."""
        mu, v, z = self.mu(position), self.v(position), position.get("z", jnp.zeros(NUM_DATA))
        return mu + GAP * z, jnp.sqrt(v)

    def log_likelihood_of(self, position, y):
        loc, scale = self.loc_and_scale(position)
        return jnp.sum(-0.5 * ((y - loc) / scale) ** 2 - jnp.log(scale))

    def simulate(self, position, normal):
        """Return data made from standard normals (NUM_DATA,)."""
        loc, scale = self.loc_and_scale(position)
        return loc + scale * normal

    def mu(self, position):
        return position["mu"]

    @abc.abstractmethod
    def v(self, position):
        """Variance of the data."""

    @abc.abstractmethod
    def draw(self, rng: np.random.Generator, num: int) -> dict:
        """Draw positions from the prior, leading axis num."""

    @abc.abstractmethod
    def pivots(self, position) -> np.ndarray:
        """Return (lanes, k) functions of positions (leading axis lanes), independent with mean 0 under the prior."""

    @property
    def template(self):
        return jax.tree.map(lambda x: jnp.asarray(x[0]), self.draw(np.random.default_rng(0), 1))

    def target(self) -> pmcmc.Target:
        return pmcmc.Target.build(self, self.template, jnp.zeros(NUM_DATA))


def normal_pivot(mu):
    return special.ndtr(np.asarray(mu)) - 0.5


def variance_pivot(v):
    return special.gammaincc(SHAPE, SCALE / np.asarray(v)) - 0.5


@dataclass(frozen=True)
class Continuous(Study):
    """mu and log v. ``jacobian=False`` plants a fault: the density of v is used as that of log v."""

    jacobian: bool = True

    def logdensity(self, data, position):
        log_v = position["log_v"]
        prior = -0.5 * position["mu"] ** 2 - (SHAPE + 1) * log_v - SCALE * jnp.exp(-log_v)
        return prior + (log_v if self.jacobian else 0.0) + self.log_likelihood_of(position, data)

    def v(self, position):
        return jnp.exp(position["log_v"])

    def draw(self, rng, num):
        return {"log_v": np.log(SCALE / rng.gamma(SHAPE, size=num)), "mu": rng.normal(size=num)}

    def pivots(self, position):
        return np.stack([normal_pivot(position["mu"]), variance_pivot(np.exp(position["log_v"]))], axis=1)


@dataclass(frozen=True)
class Conjugate(Study):
    """mu and v, for their conditionals."""

    def logdensity(self, data, position):
        v = position["v"]
        prior = -0.5 * position["mu"] ** 2 - (SHAPE + 1) * jnp.log(v) - SCALE / v
        return prior + self.log_likelihood_of(position, data)

    def v(self, position):
        return position["v"]

    def draw(self, rng, num):
        return {"mu": rng.normal(size=num), "v": SCALE / rng.gamma(SHAPE, size=num)}

    def pivots(self, position):
        return np.stack([normal_pivot(position["mu"]), variance_pivot(position["v"])], axis=1)


def conditional_mean(x):
    precision = 1.0 + NUM_DATA / x["v"]
    return jnp.sum(x["y"]) / x["v"] / precision, 1 / jnp.sqrt(precision)


CONJUGATE = pmcmc.Gibbs(
    {
        "mu": pmcmc.kernels.NormalUpdate(conditional_mean),
        "v": pmcmc.kernels.InverseGammaUpdate(
            SHAPE + NUM_DATA / 2, lambda x: SCALE + 0.5 * jnp.sum((x["y"] - x["mu"]) ** 2)
        ),
    }
)


@dataclass(frozen=True)
class Labels(Study):
    """z alone, with mu = 0 and v = 1; its elements depend on each other through a bond on a ring."""

    def logdensity(self, data, position):
        z = position["z"].astype(float)
        return jnp.sum(z) * jnp.log(ONES / (1 - ONES)) + self.log_likelihood_of(position, data)

    def loc_and_scale(self, position):
        z = position["z"]
        return GAP * z + jnp.roll(z, 1), jnp.ones(())

    def v(self, position):
        return jnp.ones(())

    def draw(self, rng, num):
        return {"z": (rng.random((num, NUM_DATA)) < ONES).astype(int)}

    def pivots(self, position):
        return np.asarray(position["z"]) - ONES


@dataclass(frozen=True)
class Mixed(Continuous):
    """mu, v and z."""

    def logdensity(self, data, position):
        labels = jnp.sum(position["z"]).astype(float) * jnp.log(ONES / (1 - ONES))
        return labels + super().logdensity(data, position)

    def draw(self, rng, num):
        return {**super().draw(rng, num), "z": (rng.random((num, NUM_DATA)) < ONES).astype(int)}

    def pivots(self, position):
        return np.concatenate([super().pivots(position), np.asarray(position["z"])[:, :2] - ONES], axis=1)
