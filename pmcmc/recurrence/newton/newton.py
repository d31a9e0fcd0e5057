"""Newton-type solvers: all states at once from one linear recursion per iteration.

With the residual ``r[t] = f(x[t-1], u[t]) - x[t]`` of the current iterate and an approximation A[t] of its Jacobian,

    e[t] = A[t] e[t-1] + r[t],   e[0] = 0,          x[t] <- f(x[t-1], u[t]) + A[t] e[t-1]

which is the update ``x'[t] = f(x[t-1]) + A[t] (x'[t-1] - x[t-1])`` of Gonzalez et al. (2025), written for the
increments e: they vanish at the solution, so rounding in the products of A does not disturb it, and a prefix with
e = 0 is f of its predecessor to the last bit. By causality the first k states are exact after k iterations.

Differs from the published code in 1. the stopping rule: the residual at every t, never the increment, and
finiteness on its own; 2. entries that are not finite restart the recursion (see `_iterate`), which keeps the
exact prefix growing; they can delay convergence but never claim it.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field

import jax

from pmcmc._pytree import register_dataclass
from pmcmc._typing import Scalar
from pmcmc.recurrence.newton.basis import Basis, StandardBasis
from pmcmc.recurrence.newton.jacobian import Dense, JacobianStructure
from pmcmc.recurrence.newton.loop import NewtonType, drop_overflow


@register_dataclass
@dataclass(frozen=True)
class Newton(NewtonType):
    """Parallel Newton and its relatives, by the structure of the Jacobian.

    jacobian: `Dense` (DEER), `Diagonal` (quasi-DEER), `HutchinsonDiagonal` (stochastic quasi-DEER), `BlockDiagonal`
        (block quasi-DEER), `Identity` (Picard) or `Zero` (Jacobi).
    tol: largest residual / scale of a solution. None: 32 eps in float32, 512 eps in float64.
    max_iters: budget of iterations. After T iterations every structure is exact. Early stopping is a small budget:
        the result is then `max_iters_reached`, `residual_profile` says how far each step is from holding, and
        `stats.certified_steps` is the prefix that stands.
    basis: coordinates in which the Jacobian is approximated, damped and clipped.
    damping: A[t] <- damping * A[t]; 1 changes nothing, 0 is Jacobi. (`damp_factor` in the code of Zoltowski et al.)
    clip: entries of (the damped) A[t] are clipped to [-clip, clip].
    num_iterates: how many iterates to keep in `Solution.iterates`, the initial guess first; places behind the last
        iterate repeat it.
    devices: that share the steps evenly; the solution is the same, to rounding. None: the one device that JAX uses by
        default.

    Needs real states (integer leaves have no derivative: use `MultipleShooting`). The value and aux of the solution
    can be differentiated, see `_implicit`.

    Raises:
        ValueError: max_iters or num_iterates below 0; damping or clip where A has no entries; no or repeated devices.
        TypeError: integer or boolean leaves in the state.

    Sources: Lim et al. 2024 (DEER), Gonzalez et al. 2024 (quasi-DEER), Gonzalez et al. 2025 (one framework),
    Zoltowski et al. 2025 (MCMC: stochastic and block diagonals, damping, clipping, basis).

    Example:
        >>> import jax.numpy as jnp, pmcmc
        >>> solution = pmcmc.recurrence.Newton().solve(lambda x, u: jnp.tanh(x) + u, 0.0, jnp.ones(100))
        >>> int(solution.stats.num_iters) < 20
        True
    """

    jacobian: JacobianStructure = Dense()
    tol: Scalar | None = None
    max_iters: Scalar = 200
    basis: Basis = StandardBasis()
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
