"""Solve recurrences ``x[t] = fn(x[t-1], inputs[t])``, t = 1..T, for all t at once. Independent of MCMC.

`solve` is the entry point; it takes a function or a `Recurrence` and any `RecurrenceSolver`, and returns a `Solution`
with a `RESULTS` code and `Stats`:

- `MultipleShooting` runs blocks of the path at once and repairs them. It needs no derivative.
- `Newton` and `LevenbergMarquardt` iterate on all states at once, with a `JacobianStructure` that approximates the
  Jacobian. `deer`, `quasi_deer`, `elk`, `quasi_elk`, `picard` and `jacobi` build them by the names of the papers, and
  `Windowed` restricts their iterations to a window. `trust_region` holds the step rules of `LevenbergMarquardt`.
- `Sequential` is the plain loop over t, the reference for the others.
"""

from collections.abc import Callable

from pmcmc._pytree import PyTree
from pmcmc.recurrence.newton import trust_region
from pmcmc.recurrence.newton.hutchinson import HutchinsonBlockDiagonal, HutchinsonDiagonal
from pmcmc.recurrence.newton.jacobian import (
    BlockDiagonal,
    Dense,
    Diagonal,
    Identity,
    JacobianBasis,
    JacobianStructure,
    LinearBasis,
    ScaledBasis,
    Zero,
)
from pmcmc.recurrence.newton.newton import Newton
from pmcmc.recurrence.newton.trust_region import (
    AdaptiveRegularization,
    FixedRegularization,
    LevenbergMarquardt,
    Regularization,
)
from pmcmc.recurrence.newton.windowed import Windowed
from pmcmc.recurrence.problem import Recurrence
from pmcmc.recurrence.sequential import Sequential
from pmcmc.recurrence.shooting.solver import MultipleShooting
from pmcmc.recurrence.solution import RESULTS, RecurrenceSolver, Solution, Stats

__all__ = [
    "RESULTS",
    "AdaptiveRegularization",
    "BlockDiagonal",
    "Dense",
    "Diagonal",
    "FixedRegularization",
    "HutchinsonBlockDiagonal",
    "HutchinsonDiagonal",
    "Identity",
    "JacobianBasis",
    "JacobianStructure",
    "LevenbergMarquardt",
    "LinearBasis",
    "MultipleShooting",
    "Newton",
    "Recurrence",
    "RecurrenceSolver",
    "Regularization",
    "ScaledBasis",
    "Sequential",
    "Solution",
    "Stats",
    "Windowed",
    "Zero",
    "deer",
    "elk",
    "jacobi",
    "picard",
    "quasi_deer",
    "quasi_elk",
    "solve",
    "trust_region",
]


def solve(
    fn: Callable | Recurrence,
    x0: PyTree,
    inputs: PyTree = None,
    *,
    solver: RecurrenceSolver | None = None,
    length: int | None = None,
    initial_guess: PyTree | Callable = None,
    has_aux: bool = False,
    scale: PyTree = None,
) -> Solution:
    """Solve ``x[t] = fn(x[t-1], inputs[t])`` for all states t = 1..T.

    A failed solve is reported by the `result` of the solution, never by an exception, so solve may be used inside jit.

    Value and aux of the solution can be differentiated, in both modes, if the state is real and fn has a forward
    derivative (``jax.jvp``), which parts with `jax.custom_vjp` have not; with ``Sequential()`` as JAX differentiates a
    scan.

    Args:
        fn: ``(x, u) -> x``, or ``(x, u) -> (x, aux)`` with has_aux=True; or a `Recurrence`, whose step carries caches.
        x0: State before the first step, any pytree of real, integer or boolean arrays. Its leaves are cast to the
            dtypes that fn returns; wider ones are refused.
        inputs: Pytree with leading axis T, or None with length=T.
        solver: Any `RecurrenceSolver`. None: ``MultipleShooting()``.
        length: T, required if there are no inputs.
        initial_guess: States for t = 1..T, leading axis T; or a function from step numbers (0..T-1) to states, called
            only for the steps that a solver needs (shooting: its block starts). None: x0 repeated.
        has_aux: Whether fn also returns auxiliary output.
        scale: Typical spread of each coordinate, structure of x0 (leaves broadcast), or one number for all.
            Tolerances are relative to it; where it is 0, only equal numbers are close. None: measured on the path.

    Returns:
        A `Solution`.

    Raises:
        ValueError: Shapes of x0, fn's result, inputs, guess or scale do not fit; length is below 1; the scale is
            negative or not finite; or the state is in half precision and the solver has no tol.
        TypeError: fn is not callable; the state has complex numbers or typed keys, or fn would truncate x0; fn draws
            random numbers from keys of JAX's ``rbg`` generators, which differ under `jax.vmap`; length is no integer; a
            Newton-type solver gets integer or boolean states, or an fn without forward derivative; or a solution with
            such an fn is differentiated.

    Example:
        >>> import jax.numpy as jnp, pmcmc
        >>> solution = pmcmc.recurrence.solve(lambda x, u: jnp.cos(x) + u, 0.0, jnp.zeros(1000))
        >>> solution.value.shape
        (1000,)
    """
    solver = MultipleShooting() if solver is None else solver
    return solver.solve(fn, x0, inputs, length=length, initial_guess=initial_guess, has_aux=has_aux, scale=scale)


def deer(**options) -> Newton:
    """DEER: Newton's method with the full Jacobian.

    Args:
        options: All arguments of `Newton` except ``jacobian``.

    Returns:
        ``Newton(Dense(), ...)``.

    Source: Lim et al. (2024).

    Example:
        >>> deer(max_iters=50).jacobian
        Dense()
    """
    return Newton(Dense(), **options)


def quasi_deer(**options) -> Newton:
    """quasi-DEER: Newton iterations with the diagonal of the Jacobian.

    Args:
        options: All arguments of `Newton` except ``jacobian``.

    Returns:
        ``Newton(Diagonal(), ...)``.

    Source: Gonzalez et al. (2024).

    Example:
        >>> quasi_deer(max_iters=50).jacobian
        Diagonal()
    """
    return Newton(Diagonal(), **options)


def picard(**options) -> Newton:
    """Picard iteration: Newton iterations with A = I.

    Args:
        options: All arguments of `Newton` except ``jacobian``, ``damping`` and ``clip``.

    Returns:
        ``Newton(Identity(), ...)``.

    Source: Shih et al. (2023).

    Example:
        >>> picard(max_iters=50).jacobian
        Identity()
    """
    return Newton(Identity(), **options)


def jacobi(**options) -> Newton:
    """Jacobi iteration: Newton iterations with A = 0.

    Args:
        options: All arguments of `Newton` except ``jacobian``, ``damping`` and ``clip``.

    Returns:
        ``Newton(Zero(), ...)``.

    Example:
        >>> jacobi(max_iters=50).jacobian
        Zero()
    """
    return Newton(Zero(), **options)


def elk(**options) -> LevenbergMarquardt:
    """ELK: the full Jacobian in a trust region.

    With lambda fixed, as published: ``elk(regularization=FixedRegularization(0.1))``.

    Args:
        options: All arguments of `LevenbergMarquardt` except ``jacobian``.

    Returns:
        ``LevenbergMarquardt(Dense(), ...)``.

    Source: Gonzalez et al. (2024).
    """
    return LevenbergMarquardt(Dense(), **options)


def quasi_elk(**options) -> LevenbergMarquardt:
    """quasi-ELK: the diagonal of the Jacobian in a trust region.

    Args:
        options: All arguments of `LevenbergMarquardt` except ``jacobian``.

    Returns:
        ``LevenbergMarquardt(Diagonal(), ...)``.

    Source: Gonzalez et al. (2024).
    """
    return LevenbergMarquardt(Diagonal(), **options)
