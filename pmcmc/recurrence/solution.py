"""What solvers return, and what they are."""

import abc
import enum
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from pmcmc._pytree import is_real
from pmcmc._typing import Array, PyTree
from pmcmc.recurrence.problem import Problem, Recurrence, make_problem


class RESULTS(enum.IntEnum):
    """How a solve ended. Failure is data: a code inside jit, a sentence with a remedy outside.

    successful: every state satisfies the recurrence. max_iters_reached: the budget ran out first. nonfinite: a state is
    NaN or infinite. stagnated: the iterates stopped short of a solution. not_contracting: the recurrence holds within
    the tolerance, but nearby paths separate.

    Example:
        >>> RESULTS(2).name
        'nonfinite'
    """

    successful = 0
    max_iters_reached = 1
    nonfinite = 2
    stagnated = 3
    not_contracting = 4

    @property
    def message(self) -> str:
        """What happened and what to do, in one sentence each."""
        return _MESSAGES[self]


_MESSAGES = {
    RESULTS.successful: "Every state satisfies the recurrence within the tolerance.",
    RESULTS.max_iters_reached: (
        "The budget of iterations or sweeps ran out before the recurrence held everywhere. Only the first "
        "`certified_steps` states stand: raise the budget, or continue sequentially from there."
    ),
    RESULTS.nonfinite: (
        "A state of the solution, or the start, is NaN or infinite. Only the first `certified_steps` states stand: "
        "check x0 and the recurrence there with the sequential solver."
    ),
    RESULTS.stagnated: (
        "The iterates stopped moving although the recurrence does not hold. Damp the Jacobian, use a trust region, "
        "or another solver."
    ),
    RESULTS.not_contracting: (
        "The recurrence holds within the tolerance, but nearby paths separate, so the solution may be a pseudo-orbit "
        "far from the sequential one. Only the first `certified_steps` states stand: sample sequentially."
    ),
}


class Stats(NamedTuple):
    """What a solve cost and how far it is certified. Scalars, or arrays with one entry per chain.

    num_iters: Newton-type iterations (0 for other solvers).
    num_sweeps: repair sweeps of multiple shooting (0 for other solvers).
    num_sequential_steps: critical path, in evaluations of the recurrence one after the other.
    num_fn_evals: evaluations of the recurrence in all.
    certified_steps: length of the prefix that is the sequential path whatever `result` says. All T steps where the
        solve is successful. Else a step counts if every step up to it holds on a scale that depends on the states up
        to it alone (the given one, or the range of those states if that is smaller than the measured one), so that
        wild states behind it cannot make it hold; and if the residuals up to it, carried on by the measured growth of
        small distances, stay within the tolerance. For shooting: whole blocks from the start on, with no splice that
        was not exact where paths separate. Steps that hold exactly always count.
    growth_rate: mean log growth per step of small distances between paths (a finite-distance estimate of the
        largest Lyapunov exponent); NaN where none was observed.
    certified_residual: largest residual of the certified steps, 0 where there are none, on the scale that they were
        judged by; None: the solver does not tell.
    """

    num_iters: Array
    num_sweeps: Array
    num_sequential_steps: Array
    num_fn_evals: Array
    certified_steps: Array
    growth_rate: Array
    certified_residual: Array | None = None


class Solution(NamedTuple):
    """States x[1..T] and how far they can be trusted.

    value: the states, leading axis T.
    aux: what fn returned beside the state, leading axis T, or None.
    result: a `RESULTS` code (integer array).
    residual: max over t of |x[t] - fn(x[t-1], inputs[t])| / scale, as the solver evaluated it. Where a Newton-type
        solve did not hold as a whole, on the scale of `Stats.certified_steps`.
    stats: see `Stats`.
    iterates: Newton iterates, leading axis ``num_iterates``, where asked for; the initial guess is the first.
    residual_profile: the residual of each step, ``(T,)``, where the solver judges every step (Newton-type solvers);
        inf where a step was not evaluated or is not finite.
    """

    value: PyTree
    aux: PyTree
    result: Array
    residual: Array
    stats: Stats
    iterates: PyTree = None
    residual_profile: Array | None = None


class RecurrenceSolver(abc.ABC):
    """Solves ``x[t] = fn(x[t-1], inputs[t])`` for t = 1..T.

    A solver implements `solve_problem` for a batch of recurrences of one shape; `solve` and `solve_batch` check the
    arguments and call it. It is a frozen dataclass and a pytree: numbers are leaves.
    """

    def numbers_per_step(self, dim: int) -> int:
        """How many numbers a solve holds for each step of a state of so many, beside inputs, states and aux.

        Whoever cuts long recurrences into segments asks for it. None where nothing but those is written.
        """
        return 0

    @property
    def decision(self) -> str:
        """What reports call it: "sequential", "shooting", "newton", or, for solvers from elsewhere, their class."""
        return type(self).__name__

    @property
    def shared_by(self) -> Sequence[jax.Device]:
        """Devices that share the work; none of them named: the one that JAX uses by default."""
        return ()

    def with_devices(self, devices: Sequence[jax.Device] | None) -> "RecurrenceSolver":
        """This solver, its work shared by these devices; None: by none that are named.

        Raises:
            ValueError: it cannot share its work.
        """
        if devices is None:
            return self
        raise ValueError(
            f"{type(self).__name__} runs on one device: leave devices out, or pass a solver that shares its work, "
            "MultipleShooting() or a Newton-type one such as quasi_deer()."
        )

    @abc.abstractmethod
    def solve_problem(self, problem: Problem) -> Solution:
        """Solve a validated batch; all fields of the solution have the chain axis first."""

    def solve(
        self,
        fn: Callable | Recurrence,
        x0: PyTree,
        inputs: PyTree = None,
        *,
        length: int | None = None,
        initial_guess: PyTree | Callable = None,
        has_aux: bool = False,
        scale: PyTree = None,
    ) -> Solution:
        """Solve one recurrence; arguments as in `pmcmc.recurrence.solve`."""
        add = lambda tree: jax.tree.map(lambda x: jnp.asarray(x)[None], tree)
        guess = (lambda steps: add(initial_guess(steps))) if callable(initial_guess) else add(initial_guess)
        solution = self.solve_batch(
            fn, add(x0), add(inputs), length=length, initial_guess=guess, has_aux=has_aux, scale=scale
        )
        return jax.tree.map(lambda x: x[0], solution)

    def solve_batch(
        self,
        fn: Callable | Recurrence,
        x0: PyTree,
        inputs: PyTree = None,
        *,
        length: int | None = None,
        initial_guess: PyTree | Callable = None,
        has_aux: bool = False,
        scale: PyTree = None,
    ) -> Solution:
        """Solve many recurrences of one shape at once: x0 ``(C, ...)``, inputs ``(C, T, ...)``."""
        return self.solve_problem(make_problem(fn, x0, inputs, length, initial_guess, has_aux, scale))


def default_tolerance(dtype: Any) -> float:
    """Relative tolerance that a contracting recurrence reaches in this precision.

    Coupled paths stop approaching each other at a floor of 5-8 eps of the state's scale in float32; 32 eps
    (3.8e-6) clears it. In float64 512 eps is 1.1e-13.
    """
    eps = float(jnp.finfo(dtype).eps)
    return (32 if eps > 1e-8 else 512) * eps


def typical_scale(path: PyTree) -> PyTree:
    """Scale of each coordinate from a path ``(time, ...)``: the interquartile range over 1.349.

    A tolerance relative to |x| would call anything converged on a shifted target; the spread of the path is
    invariant to shifts, and quartiles do not see the transients of a poor guess. At most 4,096 evenly spaced
    states are read. Where the spread is below the resolution of the dtype, as on a constant path, it is |x|.
    """

    def leaf(x):
        if not is_real(x):
            return jnp.ones(x.shape[1:])
        sample = x[:: max(1, x.shape[0] // 4096)]
        sample = jnp.where(jnp.isfinite(sample), sample, jnp.nan)
        low, high, size = jnp.nanquantile(sample, jnp.array([0.25, 0.75, 0.5], x.dtype), axis=0)
        spread = (high - low) / 1.349
        spread = jnp.where(spread > jnp.finfo(x.dtype).eps * jnp.abs(size), spread, jnp.abs(size))
        return jnp.where(jnp.isfinite(spread), spread, 1.0).astype(x.dtype)

    return jax.tree.map(leaf, path)
