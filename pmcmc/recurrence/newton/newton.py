"""Parallel Newton iterations: all states at once from one linear recursion per iteration.

With the residual ``r[t] = f(x[t-1], u[t]) - x[t]`` of the current iterate and an approximation A[t] of its Jacobian,

    e[t] = A[t] e[t-1] + r[t],   e[0] = 0,          x[t] <- f(x[t-1], u[t]) + A[t] e[t-1]

This is the update ``x'[t] = f(x[t-1]) + A[t] (x'[t-1] - x[t-1])`` of Gonzalez et al. (2025), written for the increments
e. They vanish at the solution, so rounding in the products of A does not disturb it, and where e = 0 on a prefix, each
of its states is f of its predecessor to the last bit. By causality the first k states are exact after k iterations. The
solver is `Newton`. `NewtonType` is its base class, shared with `LevenbergMarquardt`: the loop evaluates an iterate,
lets the solver accept or reject it, and stops when every equation is satisfied, when nothing changes, or when the
budget is spent.

Entries that are not finite restart the linear recursion. The policy acts on iterates only:

1. A row of r or A that is NaN or infinite counts as zero in the linear recursion, which therefore restarts after it and
   does not carry the NaN to the end of the path.
2. A correction that overflows is dropped: that entry takes the Jacobi update ``x[t] <- f(x[t-1], u[t])``.
3. An entry of the new iterate that is still not finite is replaced by that of x[0]: its last finite value is often
   already on the way to overflow.

None of this can lead to a false success: a step counts only if its equation is satisfied when evaluated again, and if f
itself is not finite after a prefix that is satisfied, the solve ends as `nonfinite`. The exact prefix still grows by at
least one step per iteration, because e = 0 there and nothing within it is restarted.

Differences from the published code: 1. the stopping rule is the residual at every t, never the increment, and
finiteness is tested separately; 2. entries that are not finite restart the recursion, which keeps the exact prefix
growing. This can delay convergence, but never leads to a false success.
"""

import abc
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from pmcmc._arguments import check_int
from pmcmc._pytree import Array, PyTree, Scalar, finite_rows, register_dataclass
from pmcmc.recurrence.newton.equations import Course, Evaluation, System, blocked_at, conclude
from pmcmc.recurrence.newton.implicit_diff import VectorSolver
from pmcmc.recurrence.newton.jacobian import Dense, Identity, JacobianBasis, JacobianStructure, Zero
from pmcmc.recurrence.sharding import distinct
from pmcmc.recurrence.solution import check_tolerance


class Iterate(NamedTuple):
    """State of the loop.

    Attributes:
        now: The current iterate, evaluated.
        memory: What a solver remembers between iterations, such as the strength of its trust region.
        moving: Whether another iteration can change anything.
        solved: Whether every equation is satisfied.
        blocked: See `blocked_at`.
        num_iters: Number of iterations so far.
        iterates: Stored iterates, (num_iterates, T, D), or None.
    """

    now: Evaluation
    memory: PyTree
    moving: Array
    solved: Array
    blocked: Array
    num_iters: Array
    iterates: Array | None


@dataclass(frozen=True)
class NewtonType(VectorSolver):
    """Base class of `Newton` and `LevenbergMarquardt`, with their common options."""

    jacobian: JacobianStructure = Dense()
    tol: Scalar | None = None
    max_iters: Scalar = 200
    basis: JacobianBasis | None = None
    damping: Scalar | None = None
    clip: Scalar | None = None
    num_iterates: int = field(default=0, metadata=dict(static=True))
    devices: Sequence[jax.Device] | None = field(default=None, metadata=dict(static=True))

    def __post_init__(self):
        check_int("max_iters", self.max_iters, 0)
        check_int("num_iterates", self.num_iterates, 0)
        check_tolerance(self.tol)
        if self.devices is not None:
            object.__setattr__(self, "devices", distinct(self.devices))
        if isinstance(self.jacobian, Identity | Zero) and not (self.damping is None and self.clip is None):
            raise ValueError(
                f"damping and clip act on the entries of a Jacobian; {type(self.jacobian).__name__}() has none. "
                "Drop them, or use Diagonal()."
            )

    @property
    def decision(self):
        return "newton"

    @property
    def shared_by(self):
        return self.devices or ()

    def with_devices(self, devices):
        return replace(self, devices=devices)

    def numbers_per_step(self, dim):
        # From XLA's memory analysis for Dense and the diagonals, D = 4 and 24, on a CPU: the affine scan stores four
        # A[t], and iterates, images, residuals and similar arrays amount to 13 to 17 states.
        return 4 * self.jacobian.num_entries(dim) + 17 * dim + 16

    @abc.abstractmethod
    def begin(self, system: System) -> PyTree:
        """Return the memory before the first iteration."""

    @abc.abstractmethod
    def propose(self, system: System, it: Iterate) -> tuple[Array, Any]:
        """Return the next path ``(T, D)``, and what `judge` needs to know about it."""

    @abc.abstractmethod
    def judge(
        self, system: System, it: Iterate, candidate: Evaluation, plan: Any
    ) -> tuple[Evaluation, PyTree, Array | bool]:
        """Return the next iterate, the new memory, and whether to continue even if the path does not change."""

    @property
    def tolerance(self):
        return self.tol

    def start(self, system: System, guess: Array) -> Iterate:
        """Evaluate the guess."""
        now = system.evaluate(guess)
        store = jnp.broadcast_to(guess, (self.num_iterates, *guess.shape)) if self.num_iterates else None
        none = jnp.zeros((), int)
        solved = system.steps.all(now.holds)
        return Iterate(now, self.begin(system), jnp.array(True), solved, blocked_at(system, now), none, store)

    def advance(self, system: System, it: Iterate) -> Iterate:
        """Do one iteration: propose, evaluate, judge."""
        path, plan = self.propose(system, it)
        path = path.astype(system.start.dtype)
        path = jnp.where(jnp.isfinite(path), path, jnp.broadcast_to(system.start, path.shape))
        # Every step of the candidate is evaluated: the residual, not the increment, decides whether it is a solution.
        candidate = system.evaluate(path)
        now, memory, retry = self.judge(system, it, candidate, plan)
        blocked = blocked_at(system, now)
        moving = system.steps.any(jnp.any(now.path != it.now.path, axis=1)) | retry
        # Stop if f is not finite twice at the same step after a correct prefix: no iteration can change that.
        moving = moving & ((blocked == system.length) | (blocked != it.blocked))
        solved, num_iters = system.steps.all(now.holds), it.num_iters + 1
        return Iterate(now, memory, moving, solved, blocked, num_iters, record(it.iterates, now.path, num_iters))

    def unfinished(self, it: Iterate) -> Array:
        """Whether to iterate again."""
        return ~it.solved & it.moving & (it.num_iters < self.max_iters)

    def run(self, system, guess, guess_given):
        first = self.start(system, guess)
        first = first._replace(moving=jnp.all(jnp.isfinite(system.start)))
        last = jax.lax.while_loop(self.unfinished, lambda it: self.advance(system, it), first)
        course = Course(last.moving, last.blocked, last.num_iters, last.num_iters + 1, system.length)
        return conclude(system, last.now, course, finish(last.iterates, last.now.path, last.num_iters))

    def encode(self, dx: Array) -> Array:
        """Map increments ``(..., D)`` to the basis, in the dtype of the state whatever that of the basis."""
        return dx if self.basis is None else jnp.vectorize(self.basis.encode, signature="(d)->(d)")(dx).astype(dx.dtype)

    def decode(self, dz: Array) -> Array:
        """Map increments ``(..., D)`` back, in the dtype of the state."""
        return dz if self.basis is None else jnp.vectorize(self.basis.decode, signature="(d)->(d)")(dz).astype(dz.dtype)

    def linearize(self, system: System, it: Iterate) -> tuple[Array | None, Array]:
        """Return A and r in the basis: damped, clipped, and restarted where they are not finite.

        Returns:
            A[t] in the solver's structure, or None if nothing is stored; and the residuals, shape (T, D).
        """
        x, inputs = system.previous(it.now.path), system.inputs
        fn: Callable = system.image
        if self.basis is not None:
            # linearise in the increment, at 0, so that the point of linearisation is x to the last bit
            fn = lambda dz, xu: self.encode(system.image(xu[0] + self.decode(dz), xu[1]))
            x, inputs = jnp.zeros_like(x), (x, inputs)
        a = self.jacobian.linearize(fn, x, inputs, it.num_iters)
        if a is not None:
            a = a if self.damping is None else (self.damping * a).astype(a.dtype)
            a = a if self.clip is None else jnp.clip(a, -self.clip, self.clip).astype(a.dtype)
            a = _restart(a.astype(x.dtype))
        return a, _restart(self.encode(it.now.images - it.now.path))


def _restart(rows: Array) -> Array:
    """Set rows that are not finite to zero, where the recursion restarts."""
    return jnp.where(finite_rows(rows).reshape((-1,) + (1,) * (rows.ndim - 1)), rows, 0.0)


def drop_overflow(correction: Array) -> Array:
    """Set corrections that are not finite to zero; these entries take the Jacobi update."""
    return jnp.where(jnp.isfinite(correction), correction, 0.0)


def record(iterates: Array | None, path: Array, index: Array) -> Array | None:
    """Store an iterate if there is room for it."""
    if iterates is None:
        return None
    return iterates.at[index].set(path, mode="drop")


def finish(iterates: Array | None, path: Array, num_iters: Array) -> Array | None:
    """Fill the unused places with the last iterate."""
    if iterates is None:
        return None
    behind = jnp.arange(iterates.shape[0]) > num_iters
    return jnp.where(behind[:, None, None], path, iterates)


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
        tol: Largest residual / scale of a solution. None: 32 eps in float32, 512 eps in float64; states in half
            precision need one.
        max_iters: Budget of iterations. After T iterations every structure is exact. A small budget stops early: the
            result is then `max_iters_reached`, `residual_profile` is the residual of each step, and
            `stats.certified_steps` the length of the certified prefix.
        basis: Coordinates in which the Jacobian is approximated, damped and clipped. None: those of the state.
        damping: A[t] <- damping A[t]; 1 changes nothing, 0 is Jacobi. (``damp_factor`` in the code of Zoltowski et al.)
        clip: Entries of the (damped) A[t] are clipped to [-clip, clip].
        num_iterates: Number of iterates to keep in `Solution.iterates`, the initial guess first. If there are fewer,
            the last one is repeated.
        devices: Devices that share the steps evenly; the solution is the same, to rounding. None: JAX's default device.

    Raises:
        ValueError: max_iters or num_iterates is below 0; tol is negative or not finite; damping or clip is given
            although A has no entries; devices are empty or repeated; or, in a solve, the state is in half precision and
            there is no tol.
        TypeError: max_iters or num_iterates is a number but no integer; or, in a solve, the state has integer or
            boolean leaves, or fn has no forward derivative.

    Sources: Lim et al. (2024) (DEER); Gonzalez et al. (2024) (quasi-DEER); Gonzalez et al. (2025) (one framework);
    Zoltowski et al. (2025) (MCMC: stochastic and block diagonals, damping, clipping, basis).

    Example:
        >>> import jax.numpy as jnp, pmcmc
        >>> solution = pmcmc.recurrence.Newton().solve(lambda x, u: jnp.tanh(x) + u, 0.0, jnp.ones(100))
        >>> int(solution.stats.num_iters) < 20
        True
    """

    def begin(self, system):
        return None

    def propose(self, system, it):
        a, r = self.linearize(system, it)
        correction = self.decode(self.jacobian.recur(a, r, system.steps))
        return it.now.images + drop_overflow(correction), None

    def judge(self, system, it, candidate, plan):
        return candidate, None, False
