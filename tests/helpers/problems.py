"""One log density for many problems: a program compiled for its shapes serves all numbers in it."""

from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

import pmcmc
from pmcmc.target import Model

DIM, NUM_MODES = 2, 2


class Numbers(NamedTuple):
    """Numbers that select a problem; leaves of the target.

    Attributes:
        modes: Centres, in units of size; shape (NUM_MODES, DIM).
        weights: Logs of the weights; shape (NUM_MODES,).
        slopes: Precisions; shape (DIM,).
        bend: Curvature of the banana.
        size: Scale of the whole.
        shift: Shift of the whole.
        step: Height of a discontinuity at the first mode.
        limit: Largest value of y[1]; above it the log density is ``beyond``.
        beyond: NaN or -inf.
    """

    modes: Any
    weights: Any
    slopes: Any
    bend: Any = 0.0
    size: Any = 1.0
    shift: Any = 0.0
    step: Any = 0.0
    limit: Any = np.inf
    beyond: Any = np.nan


@dataclass(frozen=True)
class ManyInOne(Model):
    """A mixture of Gaussians, bent, cut, scaled and shifted as the numbers say."""

    def logdensity(self, data, position):
        y = (position - data.shift) / data.size
        bent = y.at[1].add(-data.bend * y[0] ** 2)
        squares = jnp.sum(data.slopes[None] * (bent[None] - data.modes) ** 2, axis=1)
        smooth = jax.nn.logsumexp(data.weights - 0.5 * squares) + jnp.where(y[0] > data.modes[0, 0], data.step, 0.0)
        return jnp.where(y[1] > data.limit, data.beyond, smooth)

    def constrain(self, data, position):
        return position


def target_of(numbers: Numbers, dtype: Any = float) -> pmcmc.Target:
    numbers = jax.tree.map(lambda x: jnp.asarray(x, dtype), numbers)
    return pmcmc.Target.build(ManyInOne(), jnp.zeros(DIM, dtype), numbers)


def random_numbers(rng: np.random.Generator) -> Numbers:
    """Draw a problem of any kind, hard ones included, with sizes over 24 orders of magnitude."""
    kind = rng.choice(["gaussian", "banana", "modes", "cliff", "nan", "support"])
    apart = rng.uniform(2, 6) if kind == "modes" else 0.0
    size = 10.0 ** rng.uniform(-12, 12) if rng.random() < 0.3 else 1.0
    return Numbers(
        modes=apart * rng.normal(size=(NUM_MODES, DIM)),
        weights=rng.normal(size=NUM_MODES),
        slopes=10.0 ** rng.uniform(-2, 2, size=DIM),
        bend=rng.uniform(0, 2) if kind == "banana" else 0.0,
        size=size,
        shift=size * rng.choice([0.0, 10.0, 1e3]) if rng.random() < 0.3 else 0.0,
        step=rng.uniform(-3, 3) if kind == "cliff" else 0.0,
        limit=rng.uniform(0.5, 2) if kind in ("nan", "support") else np.inf,
        beyond=np.nan if kind == "nan" else -np.inf,
    )
