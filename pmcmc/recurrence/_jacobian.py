"""What stands for A[t] in the Newton-type recursion: the structure of a Jacobian is a type.

Every structure answers two questions: what A[t] is at a linearisation point (`linearize`), and how the recursion
``e[t] = A[t] e[t-1] + r[t]`` is solved (`recur`). States are vectors here, ``(T, D)`` over time.
"""

import abc
from collections.abc import Callable
from dataclasses import dataclass

import jax
import jax.numpy as jnp

from pmcmc._types import Array, PyTree
from pmcmc.recurrence._scan import affine_scan, apply_affine


class JacobianStructure(abc.ABC):
    """Approximation A[t] of df/dx used by `Newton`.

    The structure decides what a Newton-type iteration costs and how fast it converges: the rate is set by the error
    of the approximation and by the contraction of the recurrence (Gonzalez et al. 2025).
    """

    @abc.abstractmethod
    def linearize(self, fn: Callable, x: Array, inputs: PyTree) -> Array | None:
        """A[t] at every ``x[t-1]``, shape ``(T, ...)``, for ``fn(x, u) -> x``; None where nothing is stored."""

    @abc.abstractmethod
    def recur(self, a: Array | None, r: Array) -> Array:
        """All ``A[t] e[t-1]`` of the recursion ``e[t] = A[t] e[t-1] + r[t]``, e[0] = 0, shape ``(T, D)``."""


def _delayed(e: Array) -> Array:
    return jnp.concatenate([jnp.zeros_like(e[:1]), e[:-1]])


class _Scanned(JacobianStructure):
    def recur(self, a, r):
        return apply_affine(a, _delayed(affine_scan(a, r)))


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Dense(_Scanned):
    """The full Jacobian, D JVPs a step: Newton's method, DEER (Lim et al. 2024).

    T D^2 memory and T D^3 work an iteration; converges quadratically near the solution.
    """

    def linearize(self, fn, x, inputs):
        return jax.vmap(jax.jacfwd(fn))(x, inputs)


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Diagonal(_Scanned):
    """The exact diagonal of the Jacobian, D JVPs a step one after the other: quasi-DEER (Gonzalez et al. 2024).

    T D memory: no D x D matrix is ever formed.
    """

    def linearize(self, fn, x, inputs):
        def column(i):
            basis = jnp.zeros(x.shape[1:], x.dtype).at[i].set(1)
            tangent = lambda x, u: jax.jvp(lambda x: fn(x, u), (x,), (basis,))[1][i]
            return jax.vmap(tangent)(x, inputs)

        return jax.lax.map(column, jnp.arange(x.shape[1])).T


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Identity(JacobianStructure):
    """A = I: Picard iteration, a cumulative sum (Shih et al. 2023).

    No derivative is taken. Suits recurrences whose steps change the state little.
    """

    def linearize(self, fn, x, inputs):
        return None

    def recur(self, a, r):
        return _delayed(jnp.cumsum(r, axis=0))


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Zero(JacobianStructure):
    """A = 0: Jacobi iteration, one evaluation of every step a round.

    No derivative is taken. Suits recurrences that forget their state at once.
    """

    def linearize(self, fn, x, inputs):
        return None

    def recur(self, a, r):
        return jnp.zeros_like(r)
