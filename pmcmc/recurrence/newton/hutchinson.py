"""Stochastic diagonals: the diagonal of a Jacobian from a few Jacobian-vector products.

For z with independent entries of +1 and -1, ``E[z * (J z)] = diag(J)`` (Hutchinson 1990; Bekas et al. 2007). One
probe costs one JVP, about two evaluations of the step, whatever D. The estimate steers the iteration only: the
solution satisfies the recurrence exactly whatever the probes were, so they are no part of a chain's randomness.
"""

import abc
from dataclasses import dataclass, field

import jax
import jax.numpy as jnp

from pmcmc._pytree import register_dataclass
from pmcmc._typing import Array, PRNGKey
from pmcmc.recurrence.newton.jacobian import Scanned, half_size, pushforward


class ProbeSchedule(abc.ABC):
    """Which key the probes of an iteration are drawn from."""

    @abc.abstractmethod
    def key(self, rng_key: PRNGKey, iteration: Array) -> PRNGKey:
        """The key of this iteration."""


@register_dataclass
@dataclass(frozen=True)
class FreshProbes(ProbeSchedule):
    """New probes at every iteration.

    The errors of the diagonal average out along the iterations.
    """

    def key(self, rng_key, iteration):
        return jax.random.fold_in(rng_key, iteration)


@register_dataclass
@dataclass(frozen=True)
class FixedProbes(ProbeSchedule):
    """The same probes at every iteration, as the published code of Zoltowski et al. (2025) does.

    The approximation is then one fixed matrix for a given path.
    """

    def key(self, rng_key, iteration):
        return rng_key


def _check(num_probes):
    if isinstance(num_probes, int) and num_probes < 1:
        raise ValueError(f"num_probes must be at least 1, got {num_probes}. Use Zero() for no derivative.")


@register_dataclass
@dataclass(frozen=True)
class HutchinsonDiagonal(Scanned):
    """Diagonal estimate ``mean over probes of z * (J z)``, one JVP a probe: stochastic quasi-DEER.

    rng_key: key of the probes. Chains of a batch share their probes; steps t do not.
    num_probes: JVPs per step and iteration; the variance of entry i is ``sum of J[i, j]^2, j != i, / num_probes``.
    schedule: `FreshProbes` (default) or `FixedProbes`.

    O(T D) memory. Source: Zoltowski et al. 2025, section 3 (there: fixed probes, one).

    Raises:
        ValueError: num_probes below 1.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> jacobian = HutchinsonDiagonal(jax.random.key(0))
        >>> jacobian.linearize(lambda x, u: x**2, jnp.array([[1.0, 2.0]]), None, 0).tolist()  # exact: J is diagonal
        [[2.0, 4.0]]
    """

    rng_key: PRNGKey
    num_probes: int = field(default=1, metadata=dict(static=True))
    schedule: ProbeSchedule = FreshProbes()

    def __post_init__(self):
        _check(self.num_probes)

    def num_entries(self, dim):
        return dim

    def linearize(self, fn, x, inputs, iteration):
        key = self.schedule.key(self.rng_key, iteration)

        def add(i, total):
            z = jax.random.rademacher(jax.random.fold_in(key, i), x.shape, x.dtype)
            return total + z * jax.vmap(lambda x, u, v: pushforward(fn, x, u, v))(x, inputs, z)

        # a loop: probes must not multiply the memory
        return jax.lax.fori_loop(0, self.num_probes, add, jnp.zeros_like(x)) / self.num_probes


@register_dataclass
@dataclass(frozen=True)
class HutchinsonBlockDiagonal(Scanned):
    """Estimate of `BlockDiagonal`: with ``z`` over one half at a time, ``E[z * (J_pq z)] = diag(J_pq)``.

    Two JVPs a probe whatever D; arguments as `HutchinsonDiagonal`. Source: Zoltowski et al. 2025 (leapfrog).

    Example:
        >>> import jax, jax.numpy as jnp
        >>> swap = lambda x, u: jnp.array([2 * x[1], 3 * x[0]])
        >>> jacobian = HutchinsonBlockDiagonal(jax.random.key(0))
        >>> jacobian.linearize(swap, jnp.zeros((1, 2)), None, 0)[0, :, :, 0].tolist()
        [[0.0, 2.0], [3.0, 0.0]]
    """

    rng_key: PRNGKey
    num_probes: int = field(default=1, metadata=dict(static=True))
    schedule: ProbeSchedule = FreshProbes()

    def __post_init__(self):
        _check(self.num_probes)

    def num_entries(self, dim):
        return 2 * dim

    def linearize(self, fn, x, inputs, iteration):
        key = self.schedule.key(self.rng_key, iteration)
        length, half = x.shape[0], half_size(x)
        push = jax.vmap(lambda x, u, v: pushforward(fn, x, u, v))

        def add(i, total):
            z = jax.random.rademacher(jax.random.fold_in(key, i), (length, half), x.dtype)
            none = jnp.zeros_like(z)
            probes = [jnp.concatenate(pair, axis=1) for pair in ((z, none), (none, z))]
            columns = [push(x, inputs, v).reshape(length, 2, half) for v in probes]
            return total + z[:, None, None] * jnp.stack(columns, axis=2)

        start = jnp.zeros((length, 2, 2, half), x.dtype)
        return jax.lax.fori_loop(0, self.num_probes, add, start) / self.num_probes
