"""What solvers return (`Solution`, `Stats`, `RESULTS`), and their base class `RecurrenceSolver`.

It also defines what "small" means: the tolerance, and the scale that residuals are relative to. `log_growth` and
`separates` say whether a small residual means that the path is right.
"""

import abc
import enum
from collections.abc import Callable, Sequence
from typing import Any, ClassVar, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from pmcmc._arguments import known_number
from pmcmc._pytree import Array, PyTree, Scalar, is_real, known_values, single_or_wider
from pmcmc.recurrence.problem import Problem, Recurrence, make_problem


class RESULTS(enum.IntEnum):
    """How a solve ended.

    Inside jit it is an integer code. Outside, `message` says what happened and what to do.

    Attributes:
        successful: Every state satisfies the recurrence.
        max_iters_reached: The budget ran out first.
        nonfinite: A state is NaN or infinite.
        stagnated: The iterates stopped changing short of a solution.
        not_contracting: The recurrence is satisfied within the tolerance, but nearby paths separate, or errors add up.

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
        """What happened, and what to do about it, in one sentence each."""
        return _MESSAGES[self]


_MESSAGES = {
    RESULTS.successful: "Every state satisfies the recurrence within the tolerance.",
    RESULTS.max_iters_reached: (
        "The budget of iterations or sweeps ran out before the recurrence held everywhere. Only the first "
        "`certified_steps` states are certified: raise the budget, or continue sequentially from there."
    ),
    RESULTS.nonfinite: (
        "A state of the solution, or the start, is NaN or infinite. Only the first `certified_steps` states are "
        "certified: check x0 and the recurrence there with the sequential solver."
    ),
    RESULTS.stagnated: (
        "The iterates stopped moving although the recurrence does not hold. Damp the Jacobian, use a trust region, "
        "or another solver."
    ),
    RESULTS.not_contracting: (
        "The recurrence holds within the tolerance, but nearby paths separate, or keep their distance while errors add "
        "up, so the solution may be far from the sequential one. Only the first `certified_steps` states are "
        "certified: sample sequentially."
    ),
}


class Stats(NamedTuple):
    """Cost of a solve, and how far it is certified. Scalars, or arrays with one entry per chain.

    Attributes:
        num_iters: Newton-type iterations; 0 for other solvers.
        num_sweeps: Repair sweeps of multiple shooting; 0 for other solvers.
        num_sequential_steps: Critical path: evaluations of the recurrence one after the other.
        num_fn_evals: Evaluations of the recurrence in total.
        certified_steps: Length of the prefix that is the sequential path, whatever `result` says; T if the solve is
            successful. The residual of each of its steps is within the tolerance (or is rounding), and the residuals,
            added up as they grow at the measured rate, are an error below the square root of the tolerance. After a
            Newton-type solve that did not succeed, that error must be within the tolerance itself, and residuals are
            relative to a scale that depends only on the states up to their step (the given scale, or the smaller of the
            measured one and the range of those states), so that wild later states cannot make it count; steps that are
            satisfied exactly always count. Shooting counts whole blocks from the start, or up to the first non-finite
            state; where paths separate, only blocks without inexact merges.
        growth_rate: Mean log growth per step of small distances between paths, a finite-distance estimate of the
            largest Lyapunov exponent; NaN if none was observed.
        certified_residual: Largest residual of the certified steps, on the scale by which they were judged; 0 if there
            are none. None: the solver does not report it.
    """

    num_iters: Array
    num_sweeps: Array
    num_sequential_steps: Array
    num_fn_evals: Array
    certified_steps: Array
    growth_rate: Array
    certified_residual: Array | None = None


class Solution(NamedTuple):
    """States x[1..T], and how far they can be trusted.

    Attributes:
        value: The states, leading axis T.
        aux: What fn returned besides the state, leading axis T, or None.
        result: A `RESULTS` code (integer array).
        residual: Largest ``|x[t] - fn(x[t-1], inputs[t])| / scale`` over all t, as the solver evaluated it. If a
            Newton-type solve did not satisfy all equations, it is on the scale of `Stats.certified_steps`.
        stats: See `Stats`.
        iterates: Newton iterates, leading axis ``num_iterates``, if requested; the initial guess is the first.
        residual_profile: Residual of each step, ``(T,)``, from solvers that judge every step (Newton-type solvers); inf
            where a step was not evaluated or is not finite. None from other solvers.
    """

    value: PyTree
    aux: PyTree
    result: Array
    residual: Array
    stats: Stats
    iterates: PyTree = None
    residual_profile: Array | None = None


class RecurrenceSolver(abc.ABC):
    """Base class of solvers of ``x[t] = fn(x[t-1], inputs[t])``, t = 1..T.

    A solver implements `solve_problem` for a batch of recurrences of one shape; `solve` and `solve_batch` check the
    arguments and call it. It is a frozen dataclass and a pytree whose numbers are leaves: decorate it with
    `pmcmc.register_dataclass`.
    """

    # Whether the solver takes one step after the other, so that its states are correct by definition.
    is_sequential: ClassVar[bool] = False
    # Whether it walks along lanes: the number of steps is an argument of its program, and its buffers can be reused.
    walks: ClassVar[bool] = False
    # Whether it also takes inputs that are drawn where they are needed, see `pmcmc.recurrence.drawn`.
    draws_inputs: ClassVar[bool] = False
    # Whether threads may solve parts of its lanes, see `pmcmc.recurrence.shooting.parts`.
    in_parts: ClassVar[bool] = False
    # Block lengths are multiples of the greatest common divisor of this and the capacity.
    unit: ClassVar[int] = 1

    def blocks_for(self, length: int) -> int:
        """Return the number of blocks into which a path of ``length`` steps is cut."""
        return 1

    def check_dtype(self, dtype: Any) -> None:
        """Raise an error if the solver cannot solve for states of this floating dtype.

        The default accepts all. Called before sampling.

        Raises:
            ValueError: It cannot.
        """
        return None

    def solve_lanes(self, lanes: Any) -> Solution:
        """Solve a batch that is laid out as lanes; see `pmcmc.recurrence.sequential.Lanes`.

        The default solves each chain as a whole, so there is one lane per chain.
        """
        guess = lanes.guess_at
        inputs = lanes.inputs.buffer
        return self.solve_batch(lanes.recurrence, lanes.x0, inputs, initial_guess=guess, scale=lanes.scale)

    def numbers_per_step(self, dim: int) -> int:
        """Numbers that a solve stores for each step of a state of ``dim`` numbers, besides inputs, states and aux.

        Used to size segments. The default is 0: the solver writes nothing else.
        """
        return 0

    @property
    def decision(self) -> str:
        """Name of the solver in reports: "sequential", "shooting", "newton", or the class name for other solvers."""
        return type(self).__name__

    @property
    def shared_by(self) -> Sequence[jax.Device]:
        """Devices that share the work. Empty: JAX's default device alone."""
        return ()

    def with_devices(self, devices: Sequence[jax.Device] | None) -> "RecurrenceSolver":
        """Return this solver with its work shared by these devices; None leaves it unchanged.

        Raises:
            ValueError: The solver cannot share its work.
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
        """Solve many recurrences of one shape at once: x0 ``(C, ...)``, inputs ``(C, T, ...)``.

        Other arguments and errors as in `pmcmc.recurrence.solve`, with the chain axis first.
        """
        return self.solve_problem(make_problem(fn, x0, inputs, length, initial_guess, has_aux, scale))


def default_tolerance(dtype: Any) -> float:
    """Relative tolerance that a contracting recurrence reaches in this precision.

    Coupled paths stop approaching each other at 5 to 8 eps of the state's scale in float32; 32 eps (3.8e-6) is above
    this floor. In float64 it is 512 eps, 1.1e-13. In half precision it is 3 to 25 % of the scale, at which paths are
    not equal; `tolerance_for` does not use it there.
    """
    eps = float(jnp.finfo(dtype).eps)
    return (32 if eps > 1e-8 else 512) * eps


def check_tolerance(tol: Scalar | None, dtype: Any = np.float64) -> None:
    """Raise an error if a tolerance is known to be unusable in this dtype.

    Raises:
        ValueError: It is negative or not finite.
        TypeError: It is a boolean.
    """
    known_number("tol", tol)
    if tol is None or (known := known_values(tol)) is None:
        return
    with np.errstate(over="ignore"):
        known = known.astype(dtype)
    if not np.all((known >= 0) & np.isfinite(known)):
        raise ValueError(
            f"tol must be at least 0 and finite in {jnp.dtype(dtype)}, got {tol}: leave it out for the default, or "
            "pass the largest distance that counts as equal, relative to the scale, such as 1e-6."
        )


def check_tolerance_for(tol: Scalar | None, dtype: Any) -> None:
    """Raise an error if a tolerance cannot be used for states of this dtype.

    Raises:
        ValueError: It is known to be negative or not finite in this dtype; or it is None in half precision.
    """
    wide = single_or_wider(dtype)
    if tol is None and wide != dtype:
        raise ValueError(
            f"states in {jnp.dtype(dtype)} have no default tolerance: rounding keeps paths up to "
            f"{default_tolerance(dtype):.2g} of their scale apart. Use float32 states, or say by tol= what to accept."
        )
    check_tolerance(tol, wide)


def tolerance_for(tol: Scalar | None, dtype: Any) -> Array:
    """Return the tolerance for states of this dtype, in this dtype or float32; None for the default.

    One that is unknown while a program is traced, and turns out as negative or not finite, counts as 0.

    Raises:
        ValueError: See `check_tolerance_for`.
    """
    check_tolerance_for(tol, dtype)
    if tol is None:
        return jnp.asarray(default_tolerance(dtype), single_or_wider(dtype))
    tol = jnp.asarray(tol, single_or_wider(dtype))
    return jnp.where((tol >= 0) & jnp.isfinite(tol), tol, 0)


def typical_scale(path: PyTree) -> PyTree:
    """Scale of each coordinate of a path ``(time, ...)``: the interquartile range over 1.349.

    A tolerance relative to ``|x|`` would call anything converged on a shifted target. The spread of the path is
    invariant to shifts, and quartiles ignore the transients of a poor guess. At most about 4,096 evenly spaced states
    are read. Where the spread is below the resolution of the dtype, as on a constant path, the scale is ``|x|`` or, if
    most states are zero, the range. Solvers limit it further, by the range of states that they know.
    """

    def leaf(x):
        if not is_real(x):
            return jnp.ones(x.shape[1:])
        sample = x[:: max(1, x.shape[0] // 4096)]
        sample = jnp.where(jnp.isfinite(sample), sample, jnp.nan)
        low, high, size = jnp.nanquantile(sample, jnp.array([0.25, 0.75, 0.5], x.dtype), axis=0)
        spread = (high - low) / 1.349
        spread = jnp.where(spread > jnp.finfo(x.dtype).eps * jnp.abs(size), spread, jnp.abs(size))
        spread = jnp.where(spread > 0, spread, jnp.nanmax(sample, axis=0) - jnp.nanmin(sample, axis=0))
        return jnp.where(jnp.isfinite(spread), spread, 1.0).astype(x.dtype)

    return jax.tree.map(leaf, path)


def log_growth(distance: Array, before: Array, tol: Array | float) -> Array:
    """Return ``log(distance / before)`` with both clipped to tol / 1024 .. 1: one term of the mean growth rate.

    The floor keeps a merge that happens to be exact from counting as infinite contraction.

    Args:
        distance: Distance of two paths after a step.
        before: Distance before it.
        tol: Tolerance at which paths merge.
    """
    floor = tol * 2.0**-10
    return jnp.log(jnp.maximum(jnp.minimum(distance, 1.0), floor) / jnp.maximum(before, floor))


def separates(growth_rate: Array, residual: Array, tol: Array | float, length: Array | int) -> Array:
    """Whether nearby paths separate so fast that a solution with this residual may be a pseudo-orbit.

    An error of the size of the residual, made once, grows to ``residual exp(growth_rate T)`` along the path. Where the
    rate is not negative and that exceeds the tolerance, the solution is not the sequential path to that tolerance. A
    rate of NaN, no small distance ever seen, compares False. Residuals of many steps may add up: see `largest_error`.
    """
    return (growth_rate >= 0) & (residual * jnp.exp(growth_rate * length) > tol)


def largest_error(tol: Array | float) -> Array:
    """Largest error of a state, residuals added up as they grow, of a solution: the square root of the tolerance.

    Above it errors are no longer small, and the measured growth of small distances says nothing of them.
    """
    return jnp.maximum(tol, jnp.sqrt(tol))
