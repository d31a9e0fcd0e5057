"""Parallel Newton iterations: all states at once from one linear recursion per iteration.

With the residual ``r[t] = f(x[t-1], u[t]) - x[t]`` of the current iterate and an approximation A[t] of its Jacobian,

    e[t] = A[t] e[t-1] + r[t],   e[0] = 0,          x[t] <- f(x[t-1], u[t]) + A[t] e[t-1]

This is the update ``x'[t] = f(x[t-1]) + A[t] (x'[t-1] - x[t-1])`` of Gonzalez et al. (2025), written for the
increments e. They vanish at the solution, so rounding in the products of A does not disturb it, and where e = 0 on a
prefix, each of its states is f of its predecessor to the last bit. By causality the first k states are exact after k
iterations. The solver is `Newton`; the options that it shares with others are in `pmcmc.recurrence.newton.loop`.

Differences from the published code: 1. the stopping rule is the residual at every t, never the increment, and
finiteness is tested separately; 2. entries that are not finite restart the recursion (see
`pmcmc.recurrence.newton.loop`), which keeps the exact prefix growing. This can delay convergence, but never leads to a
false success.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field

import jax

from pmcmc._pytree import register_dataclass
from pmcmc._typing import Scalar
from pmcmc.recurrence.newton.basis import JacobianBasis, StandardBasis
from pmcmc.recurrence.newton.jacobian import Dense, JacobianStructure
from pmcmc.recurrence.newton.loop import NewtonType, drop_overflow


@register_dataclass
@dataclass(frozen=True)
class Newton(NewtonType):
    """Parallel Newton and its relatives, which differ in the structure of the Jacobian.

    Iterates ``e[t] = A[t] e[t-1] + r[t]``, ``x[t] <- f(x[t-1], u[t]) + A[t] e[t-1]``, with the residual
    ``r[t] = f(x[t-1], u[t]) - x[t]``. States must be real (integer leaves have no derivative: use `MultipleShooting`).
    The value and aux of the solution can be differentiated with respect to x0, the inputs and the values that fn closes
    over, at the cost of one scan with the full Jacobian.

    Args:
        jacobian: `Dense` (DEER), `Diagonal` (quasi-DEER), `HutchinsonDiagonal` (stochastic quasi-DEER), `BlockDiagonal`
            (block quasi-DEER), `HutchinsonBlockDiagonal`, `Identity` (Picard) or `Zero` (Jacobi).
        tol: Largest residual / scale of a solution. None: 32 eps in float32, 512 eps in float64.
        max_iters: Budget of iterations. After T iterations every structure is exact. A small budget stops early: the
            result is then `max_iters_reached`, `residual_profile` is the residual of each step, and
            `stats.certified_steps` the length of the certified prefix.
        basis: Coordinates in which the Jacobian is approximated, damped and clipped.
        damping: A[t] <- damping A[t]; 1 changes nothing, 0 is Jacobi. (``damp_factor`` in the code of Zoltowski et al.)
        clip: Entries of the (damped) A[t] are clipped to [-clip, clip].
        num_iterates: Number of iterates to keep in `Solution.iterates`, the initial guess first. If there are fewer,
            the last one is repeated.
        devices: Devices that share the steps evenly; the solution is the same, to rounding. None: JAX's default device.

    Raises:
        ValueError: max_iters or num_iterates is below 0; damping or clip is given although A has no entries; devices
            are empty or repeated.
        TypeError: In a solve, if the state has integer or boolean leaves.

    Sources: Lim et al. (2024) (DEER); Gonzalez et al. (2024) (quasi-DEER); Gonzalez et al. (2025) (one framework);
    Zoltowski et al. (2025) (MCMC: stochastic and block diagonals, damping, clipping, basis).

    Example:
        >>> import jax.numpy as jnp, pmcmc
        >>> solution = pmcmc.recurrence.Newton().solve(lambda x, u: jnp.tanh(x) + u, 0.0, jnp.ones(100))
        >>> int(solution.stats.num_iters) < 20
        True
    """

    jacobian: JacobianStructure = Dense()
    tol: Scalar | None = None
    max_iters: Scalar = 200
    basis: JacobianBasis = StandardBasis()
    damping: Scalar | None = None
    clip: Scalar | None = None
    num_iterates: int = field(default=0, metadata=dict(static=True))
    devices: Sequence[jax.Device] | None = field(default=None, metadata=dict(static=True))

    def __post_init__(self):
        self.check()

    def begin(self, system):
        return None

    def propose(self, system, it):
        a, r = self.linearize(system, it)
        correction = jax.vmap(self.basis.decode)(self.jacobian.recur(a, r, system.steps))
        return it.now.images + drop_overflow(correction), None

    def judge(self, system, it, candidate, plan):
        return candidate, None, False
