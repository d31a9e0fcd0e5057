"""Newton-type solvers: all states at once from one linear recursion per iteration.

With the residual ``r[t] = f(x[t-1], u[t]) - x[t]`` of the current iterate and an approximation A[t] of its Jacobian,

    e[t] = A[t] e[t-1] + r[t],   e[0] = 0,          x[t] <- f(x[t-1], u[t]) + A[t] e[t-1]

which is the update ``x'[t] = f(x[t-1]) + A[t] (x'[t-1] - x[t-1])`` of Gonzalez et al. (2025), written for the
increments e: they vanish at the solution, so rounding in the products of A does not disturb it, and a prefix with
e = 0 is f of its predecessor to the last bit. By causality the first k states are exact after k iterations.

Differs from the published code in 1. the stopping rule: the residual at every t, never the increment, and
finiteness on its own; 2. entries whose increment overflows take the Jacobi update (A = 0 there), which keeps the
exact prefix growing; they can delay convergence but never claim it.
"""

from dataclasses import dataclass
from typing import NamedTuple

import jax
import jax.numpy as jnp

from pmcmc._tree import RavelSpec, finite_rows, is_real, leading_true, relative_distance, within_rounding
from pmcmc._types import Array, PyTree, Scalar
from pmcmc.recurrence._base import (
    RESULTS,
    Problem,
    RecurrenceSolver,
    Solution,
    Stats,
    default_tolerance,
    typical_scale,
)
from pmcmc.recurrence._growth import tangent_growth
from pmcmc.recurrence._jacobian import Dense, JacobianStructure


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Newton(RecurrenceSolver):
    """Parallel Newton and its relatives, by the structure of the Jacobian.

    jacobian: `Dense` (DEER), `Diagonal` (quasi-DEER), `Identity` (Picard) or `Zero` (Jacobi).
    tol: largest residual / scale of a solution. None: 32 eps in float32, 512 eps in float64.
    max_iters: budget of iterations. After T iterations every structure is exact.

    Needs real states (integer leaves have no derivative: use `MultipleShooting`).

    Raises:
        ValueError: max_iters below 0. TypeError: integer or boolean leaves in the state.

    Sources: Lim et al. 2024 (DEER), Gonzalez et al. 2024 (quasi-DEER), Gonzalez et al. 2025 (one framework).

    Example:
        >>> import jax.numpy as jnp, pmcmc
        >>> solution = pmcmc.recurrence.Newton().solve(lambda x, u: jnp.tanh(x) + u, 0.0, jnp.ones(100))
        >>> int(solution.stats.num_iters) < 20
        True
    """

    jacobian: JacobianStructure = Dense()
    tol: Scalar | None = None
    max_iters: Scalar = 200

    def __post_init__(self):
        if isinstance(self.max_iters, int) and self.max_iters < 0:
            raise ValueError(f"max_iters must be at least 0, got {self.max_iters}.")

    def solve_problem(self, problem: Problem) -> Solution:
        if not all(is_real(x) for x in jax.tree.leaves(problem.x0)):
            raise TypeError(
                "Newton-type solvers need real states, got integer or boolean leaves. Use MultipleShooting()."
            )
        return jax.vmap(lambda x0, inputs, guess: self._solve_one(problem, x0, inputs, guess))(
            problem.x0, problem.inputs, problem.guess
        )

    def _solve_one(self, problem: Problem, x0: PyTree, inputs: PyTree, guess: PyTree) -> Solution:
        spec = RavelSpec.of(x0)
        start = spec.ravel(x0)
        tol = jnp.asarray(default_tolerance(spec.dtype) if self.tol is None else self.tol, spec.dtype)
        if guess is None:
            path = jnp.broadcast_to(start, (problem.length, spec.size))
        else:
            path = jax.vmap(spec.ravel)(guess)
        given_scale = None if problem.scale is None else _ravel_scale(spec, problem.scale)

        def with_aux(x, u):
            x, aux = problem.recurrence(spec.unravel(x), u)
            return spec.ravel(x), aux

        def evaluate(path):
            images, aux = jax.vmap(with_aux)(_previous(start, path), inputs)
            scale = typical_scale(images) if given_scale is None else given_scale
            residual = relative_distance(path, images, scale)
            # No state can satisfy the equation better than its own rounding (a posterior shifted by 1e5).
            return images, aux, residual, (residual <= tol) | within_rounding(path, images)

        def update(now: Iteration) -> Iteration:
            previous = _previous(start, now.path)
            a = self.jacobian.linearize(lambda x, u: with_aux(x, u)[0], previous, inputs)
            correction = self.jacobian.recur(a, now.images - now.path)
            path = now.images + jnp.where(jnp.isfinite(correction), correction, 0.0)
            images, aux, residual, holds = evaluate(path)
            moved = jnp.any(path != now.path) | ~jnp.all(jnp.isfinite(path))
            return Iteration(path, images, aux, residual, holds, moved, now.num_iters + 1)

        def unfinished(now: Iteration) -> Array:
            return ~jnp.all(now.holds) & now.moved & (now.num_iters < self.max_iters)

        images, aux, residual, holds = evaluate(path)
        first = Iteration(path, images, aux, residual, holds, jnp.array(True), jnp.zeros((), int))
        last = jax.lax.while_loop(unfinished, update, first)
        growth_rate = tangent_growth(
            lambda x, u: with_aux(x, u)[0], _previous(start, last.path), inputs, jnp.max(last.residual) > 0
        )
        return _conclude(spec, problem, start, last, growth_rate)


class Iteration(NamedTuple):
    """An iterate and its image under the recurrence."""

    path: Array  # (T, D)
    images: Array  # (T, D): f(x[t-1], u[t])
    aux: PyTree
    residual: Array  # (T,) |x[t] - f(x[t-1])| / scale
    holds: Array  # (T,) whether that is within the tolerance
    moved: Array  # whether the last update changed anything
    num_iters: Array


def _previous(start: Array, path: Array) -> Array:
    return jnp.concatenate([start[None], path[:-1]])


def _ravel_scale(spec: RavelSpec, scale: PyTree) -> Array:
    leaves = jax.tree.leaves(scale)
    full = [jnp.broadcast_to(s, shape) for s, shape in zip(leaves, spec.shapes, strict=True)]
    return spec.ravel(jax.tree.unflatten(spec.treedef, full))


def _conclude(spec, problem, start, last: Iteration, growth_rate) -> Solution:
    finite = finite_rows(last.path) & jnp.all(jnp.isfinite(start))
    converged, exact = jnp.all(last.holds & finite), jnp.all(last.residual == 0)
    separating = (growth_rate >= 0) & ~exact
    result = jnp.select(
        [~jnp.all(finite), converged & separating, converged, ~last.moved],
        [RESULTS.nonfinite, RESULTS.not_contracting, RESULTS.successful, RESULTS.stagnated],
        RESULTS.max_iters_reached,
    )
    stands = finite & jnp.where(separating, last.residual == 0, last.holds)
    finite_residual = jnp.all(jnp.isfinite(last.residual))
    return Solution(
        value=jax.vmap(spec.unravel)(last.path),
        aux=last.aux,
        result=result,
        residual=jnp.where(finite_residual, jnp.max(last.residual), jnp.inf),
        stats=Stats(
            num_iters=last.num_iters,
            num_sweeps=jnp.zeros_like(last.num_iters),
            num_sequential_steps=last.num_iters + 1,
            num_fn_evals=(last.num_iters + 1) * problem.length,
            certified_steps=leading_true(stands),
            growth_rate=growth_rate,
        ),
    )
