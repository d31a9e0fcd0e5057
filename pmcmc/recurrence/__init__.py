"""Recurrences ``x[t] = fn(x[t-1], inputs[t])`` solved for all t at once. Knows nothing of MCMC."""

from collections.abc import Callable

from pmcmc._typing import PyTree
from pmcmc.recurrence.newton.basis import Basis, LinearBasis, ScaledBasis, StandardBasis
from pmcmc.recurrence.newton.hutchinson import FixedProbes, FreshProbes, HutchinsonBlockDiagonal, HutchinsonDiagonal
from pmcmc.recurrence.newton.jacobian import BlockDiagonal, Dense, Diagonal, Identity, JacobianStructure, Zero
from pmcmc.recurrence.newton.newton import Newton
from pmcmc.recurrence.newton.trust_region import (
    AdaptiveRegularization,
    Filter,
    FixedRegularization,
    LevenbergMarquardt,
    Regularization,
    Smoother,
    StepRule,
)
from pmcmc.recurrence.newton.windowed import Windowed
from pmcmc.recurrence.problem import Recurrence, Staged
from pmcmc.recurrence.sequential import Sequential
from pmcmc.recurrence.shooting.solver import MultipleShooting
from pmcmc.recurrence.solution import RESULTS, RecurrenceSolver, Solution, Stats

__all__ = [
    "RESULTS",
    "AdaptiveRegularization",
    "Basis",
    "BlockDiagonal",
    "Dense",
    "Diagonal",
    "Filter",
    "FixedProbes",
    "FixedRegularization",
    "FreshProbes",
    "HutchinsonBlockDiagonal",
    "HutchinsonDiagonal",
    "Identity",
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
    "Smoother",
    "Solution",
    "Staged",
    "StandardBasis",
    "Stats",
    "StepRule",
    "Windowed",
    "Zero",
    "deer",
    "elk",
    "jacobi",
    "picard",
    "quasi_deer",
    "quasi_elk",
    "solve",
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
    """All states of ``x[t] = fn(x[t-1], inputs[t])``, t = 1..T.

    fn: ``(x, u) -> x``, or ``(x, u) -> (x, aux)`` with has_aux=True; or a `Recurrence`, whose step carries caches.
    x0: the state before the first step, any pytree of arrays.
    inputs: pytree with leading axis T, or None with length=T.
    solver: any `RecurrenceSolver`; MultipleShooting() by default.
    initial_guess: states for t = 1..T, leading axis T, or a function from step numbers (0..T-1) to states, which is
        asked only for the steps a solver needs (shooting: its block starts). By default x0 repeated.
    scale: the typical spread of each coordinate, structure of x0 (leaves broadcast). Tolerances are relative to it.
        By default it is measured on the path.

    Returns a `Solution`; failure is its `result`, never an exception, so solve may stand inside jit.

    Raises:
        ValueError: shapes of fn's result, inputs or guess do not fit.

    Example:
        >>> import jax.numpy as jnp, pmcmc
        >>> solution = pmcmc.recurrence.solve(lambda x, u: jnp.cos(x) + u, 0.0, jnp.zeros(1000))
        >>> solution.value.shape
        (1000,)
    """
    solver = MultipleShooting() if solver is None else solver
    return solver.solve(fn, x0, inputs, length=length, initial_guess=initial_guess, has_aux=has_aux, scale=scale)


def deer(**options) -> Newton:
    """DEER (Lim et al. 2024): Newton with the full Jacobian.

    Options: all of `Newton` but the Jacobian.

    Example:
        >>> deer(max_iters=50).jacobian
        Dense()
    """
    return Newton(Dense(), **options)


def quasi_deer(**options) -> Newton:
    """quasi-DEER (Gonzalez et al. 2024): Newton with the Jacobian's diagonal.

    Options: all of `Newton` but the Jacobian.

    Example:
        >>> quasi_deer(max_iters=50).jacobian
        Diagonal()
    """
    return Newton(Diagonal(), **options)


def picard(**options) -> Newton:
    """Picard iteration (Shih et al. 2023): Newton with A = I.

    Options: all of `Newton` but the Jacobian, damping and clip.

    Example:
        >>> picard(max_iters=50).jacobian
        Identity()
    """
    return Newton(Identity(), **options)


def jacobi(**options) -> Newton:
    """Jacobi iteration: Newton with A = 0.

    Options: all of `Newton` but the Jacobian, damping and clip.

    Example:
        >>> jacobi(max_iters=50).jacobian
        Zero()
    """
    return Newton(Zero(), **options)


def elk(**options) -> LevenbergMarquardt:
    """ELK (Gonzalez et al. 2024): the full Jacobian in a trust region. Options of `LevenbergMarquardt`.

    With lambda fixed, as published: ``elk(regularization=FixedRegularization(0.1))``.
    """
    return LevenbergMarquardt(Dense(), **options)


def quasi_elk(**options) -> LevenbergMarquardt:
    """quasi-ELK (Gonzalez et al. 2024): the Jacobian's diagonal in a trust region.

    Options as `elk`.
    """
    return LevenbergMarquardt(Diagonal(), **options)
