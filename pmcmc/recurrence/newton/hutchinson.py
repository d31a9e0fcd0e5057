"""Stochastic diagonals: the diagonal of a Jacobian from a few Jacobian-vector products.

For z with independent entries of +1 and -1, ``E[z * (J z)] = diag(J)`` (Hutchinson 1990; Bekas et al. 2007). One probe
costs one JVP, about two evaluations of the step, independent of D. The estimate only steers the iteration: the solution
satisfies the recurrence whatever the probes were, so they do not contribute to a chain's randomness.

`HutchinsonDiagonal` estimates `Diagonal`, `HutchinsonBlockDiagonal` estimates `BlockDiagonal`.
"""

from dataclasses import dataclass, field

import jax
import jax.numpy as jnp

from pmcmc._arguments import check_int
from pmcmc._pytree import Array, PRNGKey, register_dataclass
from pmcmc.recurrence.newton.jacobian import Scanned, half_size, pushforward


@dataclass(frozen=True)
class Hutchinson(Scanned):
    """Base class of the estimates, with their common options."""

    rng_key: PRNGKey
    num_probes: int = field(default=1, metadata=dict(static=True))
    fixed_probes: bool = field(default=False, metadata=dict(static=True))

    def __post_init__(self):
        check_int("num_probes", self.num_probes, 1, "Use Zero() for no derivative.")

    def key(self, iteration: Array | int) -> PRNGKey:
        """Return the key of the probes of this iteration."""
        return self.rng_key if self.fixed_probes else jax.random.fold_in(self.rng_key, iteration)


@register_dataclass
@dataclass(frozen=True)
class HutchinsonDiagonal(Hutchinson):
    """Diagonal estimate ``mean over probes of z * (J z)``, one JVP per probe: stochastic quasi-DEER.

    It needs O(T D) memory.

    Args:
        rng_key: Key of the probes. The chains of a batch share their probes, and so do the devices that share the steps
            of a path; the steps of one device do not.
        num_probes: JVPs per step and iteration. The variance of entry i is
            ``sum over j != i of J[i, j]^2 / num_probes``.
        fixed_probes: Whether all iterations share their probes, so that the estimate is one fixed matrix for a given
            path, as in the published code. By default each iteration draws new ones, and their errors average out.

    Raises:
        ValueError: num_probes is below 1.
        TypeError: It is a number but no integer.

    Source: Zoltowski et al. (2025), section 3, with one fixed probe.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> jacobian = HutchinsonDiagonal(jax.random.key(0))
        >>> jacobian.linearize(lambda x, u: x**2, jnp.array([[1.0, 2.0]]), None, 0).tolist()  # exact: J is diagonal
        [[2.0, 4.0]]
    """

    def num_entries(self, dim):
        return dim

    def linearize(self, fn, x, inputs, iteration):
        key = self.key(iteration)

        def add(i, total):
            z = jax.random.rademacher(jax.random.fold_in(key, i), x.shape, x.dtype)
            return total + z * jax.vmap(lambda x, u, v: pushforward(fn, x, u, v))(x, inputs, z)

        # a loop rather than vmap, so that memory does not grow with the number of probes
        return jax.lax.fori_loop(0, self.num_probes, add, jnp.zeros_like(x)) / self.num_probes


@register_dataclass
@dataclass(frozen=True)
class HutchinsonBlockDiagonal(Hutchinson):
    """Estimate of `BlockDiagonal`: with z nonzero in one half at a time, ``E[z * (J_pq z)] = diag(J_pq)``.

    It takes two JVPs per probe, independent of D.

    Args:
        rng_key: Key of the probes. The chains of a batch share their probes, and so do the devices that share the steps
            of a path; the steps of one device do not.
        num_probes: Pairs of JVPs per step and iteration.
        fixed_probes: Whether all iterations share their probes, so that the estimate is one fixed matrix for a given
            path, as in the published code. By default each iteration draws new ones, and their errors average out.

    Raises:
        ValueError: num_probes is below 1; or, in a solve, D is odd.
        TypeError: It is a number but no integer.

    Source: Zoltowski et al. (2025), for leapfrog steps.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> swap = lambda x, u: jnp.array([2 * x[1], 3 * x[0]])
        >>> jacobian = HutchinsonBlockDiagonal(jax.random.key(0))
        >>> jacobian.linearize(swap, jnp.zeros((1, 2)), None, 0)[0, :, :, 0].tolist()
        [[0.0, 2.0], [3.0, 0.0]]
    """

    def num_entries(self, dim):
        return 2 * dim

    def linearize(self, fn, x, inputs, iteration):
        key = self.key(iteration)
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
