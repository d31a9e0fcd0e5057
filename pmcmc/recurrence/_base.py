"""The seam every recurrence solver stands behind: ``x[t] = fn(x[t-1], inputs[t])``, t = 1..T.

Nothing here, or in any file of this room, knows what MCMC is.
"""

import abc
import enum
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from pmcmc._tree import is_real, real_dtype
from pmcmc._types import Array, PyTree


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


def _identity(x):
    return x


@dataclass(frozen=True)
class Staged:
    """A step taken in stages, their number a function of carry and input: begin, advance until finished, conclude.

    All four take and give a batch of lanes at once. The work, all that is known of a step under way, has the lanes on
    the last axis of every leaf, where what is per lane is contiguous; carries, inputs and aux have them first.

    begin: ``(carry, input) -> work``. advance: ``work -> work``; what conclude reads of a finished lane must stay.
    finished: ``work -> (lanes,)``. conclude: ``work -> (carry, aux)``.

    Source: Dance et al. 2025, "Efficiently vectorized MCMC on modern accelerators".
    """

    begin: Callable
    advance: Callable
    finished: Callable
    conclude: Callable


@dataclass(frozen=True)
class Recurrence:
    """A recurrence whose step carries more than the unknown, such as a cached gradient.

    step: ``(carry, input) -> (carry, aux)``, one step.
    unknown: ``carry -> x``, what is solved for, compared and stored.
    restore: ``x -> carry``, rebuilds the caches.
    staged: the same step in stages, where its length varies; solvers that walk lanes then let none wait. Else None.
    """

    step: Callable
    unknown: Callable = _identity
    restore: Callable = _identity
    staged: Staged | None = None

    def __call__(self, x: PyTree, u: PyTree) -> tuple[PyTree, PyTree]:
        """``x[t], aux[t]`` from ``x[t-1]`` without caches."""
        carry, aux = self.step(self.restore(x), u)
        return self.unknown(carry), aux


class Problem(NamedTuple):
    """A validated batch of recurrences: every leading axis is chains, the next one time."""

    recurrence: Recurrence
    x0: PyTree  # (C, ...)
    inputs: PyTree  # (C, T, ...)
    guess: PyTree  # (C, T, ...), or a function of step numbers, or None
    scale: PyTree  # structure of one state, or None: taken from the path itself
    num_chains: int
    length: int

    @property
    def dtype(self) -> Any:
        return real_dtype(self.x0)

    def guess_at(self, steps: Array) -> PyTree:
        """Guessed states after the given steps (numbered from 0), leading axes (C, steps); None without a guess."""
        if self.guess is None:
            return None
        return self.guess(steps) if callable(self.guess) else jax.tree.map(lambda g: g[:, steps], self.guess)


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


def make_problem(fn, x0, inputs, length, guess, has_aux, scale) -> Problem:
    """Check shapes and dtypes of a batch and bring ``fn`` to the form of a `Recurrence`."""
    x0 = jax.tree.map(jnp.asarray, x0)
    inputs = jax.tree.map(jnp.asarray, inputs)
    if not jax.tree.leaves(x0):
        raise ValueError("x0 has no leaves: expected a pytree of arrays, the state before the first step.")
    num_chains = jax.tree.leaves(x0)[0].shape[0]
    length = _length(inputs, length)
    recurrence = as_recurrence(fn, has_aux)
    one = lambda tree, axes: jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape[axes:], x.dtype), tree)
    x_shape = one(x0, 1)
    out = jax.eval_shape(lambda x, u: recurrence(x, u)[0], x_shape, one(inputs, 2))
    if jax.tree.structure(out) != jax.tree.structure(x_shape) or any(
        a.shape != b.shape for a, b in zip(jax.tree.leaves(out), jax.tree.leaves(x_shape), strict=True)
    ):
        raise ValueError(
            f"fn must return a state like x0. Expected {jax.tree.map(lambda s: s.shape, x_shape)}, got "
            f"{jax.tree.map(lambda s: s.shape, out)}. If fn returns (state, aux), pass has_aux=True."
        )
    x0 = jax.tree.map(lambda x, s: x.astype(s.dtype), x0, out)
    guess = _check_guess(guess, out, num_chains, length)
    if scale is not None:
        scale = jax.tree.map(lambda s, x: jnp.asarray(s, x.dtype if is_real(x) else None), scale, out)
    return Problem(recurrence, x0, inputs, guess, scale, num_chains, length)


def as_recurrence(fn: Callable | Recurrence, has_aux: bool = False) -> Recurrence:
    """``fn`` itself if it is a `Recurrence`, else ``(x, u) -> x`` or ``(x, u) -> (x, aux)`` as one without caches."""
    if isinstance(fn, Recurrence):
        return fn
    if not callable(fn):
        raise TypeError(f"fn must be callable as fn(x, u), got {type(fn).__name__}.")
    return Recurrence(fn if has_aux else lambda x, u: (fn(x, u), None))


def _length(inputs: PyTree, length: int | None) -> int:
    leaves = jax.tree.leaves(inputs)
    if any(x.ndim < 2 for x in leaves):
        raise ValueError("every leaf of inputs needs a leading time axis of length T.")
    lengths = {int(x.shape[1]) for x in leaves} | ({length} if length is not None else set())
    if not lengths:
        raise ValueError("without inputs the number of steps is unknown: pass length=T.")
    if len(lengths) > 1:
        raise ValueError(f"the leaves of inputs and length must agree on T, got {sorted(lengths)}.")
    found = lengths.pop()
    if found < 1:
        raise ValueError(f"the number of steps must be at least 1, got {found}.")
    return found


def _check_guess(guess, state, num_chains, length):
    if guess is None:
        return None
    if callable(guess):  # checked on two steps, called by the solver on those it needs
        given, rows = jax.eval_shape(guess, jnp.arange(2)), 2
        checked: Any = lambda steps: jax.tree.map(lambda g, s: jnp.asarray(g, s.dtype), guess(steps), state)
    else:
        given, rows = guess, length
        checked = jax.tree.map(lambda g, s: jnp.asarray(g, s.dtype), guess, state)
    expected = jax.tree.map(lambda s: (num_chains, rows, *s.shape), state)
    if jax.tree.structure(given) != jax.tree.structure(state) or jax.tree.map(jnp.shape, given) != expected:
        raise ValueError(
            "initial_guess must hold one state per step. Expected shapes (without the chain axis) "
            f"{jax.tree.map(lambda s: (rows, *s.shape), state)}, got {jax.tree.map(lambda g: jnp.shape(g)[1:], given)}."
        )
    return checked


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
