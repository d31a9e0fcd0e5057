"""Convert a batch of recurrences to vectors and back, and differentiate through the solution.

At a solution ``x[t] = f(x[t-1], u[t], theta)`` for every t. Differentiating the equation rather than the iterations,

    dx[t] = J[t] dx[t-1] + v[t],    v[t] = (df/du) du[t] + (df/dtheta) dtheta,    dx[0] given,

is one affine recursion, so the derivative takes one more scan, whatever the solver did and however many iterations it
took. Reverse mode is the transpose of that scan. It uses the full Jacobian, T D^2 memory, also after a diagonal solve,
because only the full Jacobian gives the derivative. States and aux output can be differentiated, also twice, with
respect to x0, the inputs and the values that fn closes over, which are found by tracing it once. Residual, result and
stats have derivative zero. The guess, the tolerance and the solver's numbers do not affect the solution, so the
derivative with respect to them is zero too.

The derivative is that of the equation at the states found. It is meaningless if `result` is not successful. It is taken
in forward mode, also for reverse mode, so fn needs a forward derivative; see `forward_derivative`.

`solve_differentiably` is the entry point of Newton-type solvers. Multiple shooting gives its solutions the same
derivative, `tangents_of_equation`, in `pmcmc.recurrence.shooting.derivative`.

Sources: implicit function theorem; Lim et al. (2024), section 3.1 (one scan forward, its dual backward).
"""

import abc
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple, TypeVar

import jax.extend
import jax.numpy as jnp
from jax.custom_derivatives import zero_from_primal

from pmcmc._pytree import Array, PyTree, RavelSpec, Scalar, is_real
from pmcmc._xla.content import every_equation
from pmcmc.recurrence.newton.equations import Outcome, System
from pmcmc.recurrence.problem import Problem
from pmcmc.recurrence.scan import affine_scan
from pmcmc.recurrence.sharding import AllSteps, Steps, over_steps
from pmcmc.recurrence.solution import RecurrenceSolver, Solution, check_tolerance_for, tolerance_for

# The steps axis of value, aux, result, residual, stats, iterates and residual_profile in a batch of solutions; -1 for
# none.
STEP_AXES = Solution._make((1, 1, -1, -1, -1, 2, 1))


# Primitives whose derivative in forward mode may be missing.
_ONE_WAY = frozenset({"custom_vjp_call", "custom_vjp_call_jaxpr", "io_callback", "pure_callback"})
Result = TypeVar("Result")


def forward_derivative(compute: Callable[[], Result], purpose: str, remedy: str) -> Result:
    """Return ``compute()``, which takes the forward derivative of fn.

    Args:
        compute: The computation.
        purpose: What the derivative is for.
        remedy: What to use instead.

    Raises:
        TypeError: fn has no forward derivative.
    """
    try:
        return compute()
    except (TypeError, ValueError, NotImplementedError) as error:
        raise TypeError(
            f"{purpose} takes the forward derivative (jax.jvp) of fn, which JAX cannot compute: {error} Use {remedy}, "
            "or give the part of fn that has none, such as one with jax.custom_vjp, a derivative by jax.custom_jvp."
        ) from error


class Traced(NamedTuple):
    """fn on vectors as a jaxpr, whose arguments include the values that fn closes over.

    Attributes:
        jaxpr: The program.
        out_tree: Structure of its result.
    """

    jaxpr: Any
    out_tree: Any

    def bind(self, consts: list):
        """Return ``(x, u) -> (x, aux)`` with these closed-over values."""
        closed = jax.extend.core.ClosedJaxpr(self.jaxpr, consts)

        def fn(x, u):
            flat = jax.extend.core.jaxpr_as_fun(closed)(*jax.tree.leaves((x, u)))
            return jax.tree.unflatten(self.out_tree, flat)

        return fn


class Setup(NamedTuple):
    """The static part of a solve.

    Attributes:
        traced: fn as a program.
        steps: Operations across steps, on one device or several.
        guess_given: Whether there is an initial guess.
    """

    traced: Traced
    steps: Steps
    guess_given: bool


class Arguments(NamedTuple):
    """Everything that the states depend on.

    Attributes:
        consts: Values that fn closes over.
        start: x[0], (D,).
        inputs: Leading axis T.
    """

    consts: list
    start: Array
    inputs: PyTree


def _abstract(tree: PyTree, axes: int) -> PyTree:
    """Return the shapes without this number of leading axes."""
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape[axes:], x.dtype), tree)


def state_spec(problem: Problem) -> RavelSpec:
    """Return how a state of one chain maps to a vector."""
    return RavelSpec.of(_abstract(problem.x0, 1))


def trace_on_vectors(spec: RavelSpec, problem: Problem) -> tuple[Traced, list]:
    """Return fn on vectors as a program, and the values that it closes over."""

    def fn(x, u):
        x, aux = problem.recurrence(spec.unravel(x), u)
        return spec.ravel(x), aux

    start = jax.ShapeDtypeStruct((spec.size,), spec.dtype)
    closed, out = jax.make_jaxpr(fn, return_shape=True)(start, _abstract(problem.inputs, 2))
    return Traced(closed.jaxpr, jax.tree.structure(out)), list(closed.consts)


class VectorSolver(RecurrenceSolver):
    """A solver for real states, one chain at a time, whose solution can be differentiated."""

    @abc.abstractmethod
    def run(self, system: System, guess: Array, guess_given: bool) -> Outcome:
        """Solve one chain.

        Args:
            system: The equations.
            guess: Initial guess, ``(T, D)``.
            guess_given: Whether the user gave it; otherwise it is x[0] repeated.
        """

    @property
    @abc.abstractmethod
    def tolerance(self) -> Scalar | None:
        """Largest residual / scale of a solution; None: that of the dtype."""

    def check_dtype(self, dtype):
        check_tolerance_for(self.tolerance, dtype)

    def solve_problem(self, problem: Problem) -> Solution:
        self.check_dtype(problem.dtype)
        if not all(is_real(x) for x in jax.tree.leaves(problem.x0)):
            raise TypeError(
                "Newton-type solvers need real states, got integer or boolean leaves. Use MultipleShooting()."
            )
        return solve_differentiably(self, problem)


def solve_differentiably(solver: VectorSolver, problem: Problem) -> Solution:
    """Run ``solver.run`` on every chain of the batch, and make the solution differentiable.

    Args:
        solver: The solver. If it has devices, they share the steps.
        problem: The batch.
    """
    spec = state_spec(problem)
    traced, consts = trace_on_vectors(spec, problem)
    _check_derivative(traced, consts, spec, problem)
    start = jax.vmap(spec.ravel)(problem.x0)
    scale = None if problem.scale is None else _ravel_scale(spec, problem.scale)

    def solve(steps: Steps, whole: PyTree, own: PyTree) -> Solution:
        consts, scale, start = whole
        setup = Setup(traced, steps, own[1] is not None)
        one_chain = lambda start, inputs, guess: _solve_one(
            setup, solver, spec, Arguments(consts, start, inputs), guess, scale
        )
        if problem.num_chains == 1:  # without a lane axis a lax.cond stays a branch instead of computing both sides
            single = one_chain(*jax.tree.map(lambda x: x[0], (start, *own)))
            return jax.tree.map(lambda x: x[None], single)
        return jax.vmap(one_chain)(start, *own)

    whole = (consts, scale, start)
    shared = (problem.inputs, problem.guess_at(jnp.arange(problem.length)))
    if not solver.shared_by:
        return solve(AllSteps(problem.length), whole, shared)
    return over_steps(solver.shared_by, solve, whole, shared, STEP_AXES, problem.length)


def _check_derivative(traced: Traced, consts: list, spec: RavelSpec, problem: Problem) -> None:
    """Raise an error if fn may have no forward derivative with respect to the state, and has none.

    Raises:
        TypeError: It has none.
    """
    if any(equation.primitive.name in _ONE_WAY for equation in every_equation(traced.jaxpr)):
        fn = traced.bind(consts)
        tangent = jax.vmap(jax.jacfwd(lambda x, u: fn(x, u)[0]))
        state = jax.ShapeDtypeStruct((1, spec.size), spec.dtype)
        some = jax.tree.map(lambda u: jax.ShapeDtypeStruct((1, *u.shape), u.dtype), _abstract(problem.inputs, 2))
        forward_derivative(
            lambda: jax.eval_shape(tangent, state, some), "a Newton-type solver", "MultipleShooting(), which takes none"
        )


def _solve_one(
    setup: Setup, solver: VectorSolver, spec: RavelSpec, arguments: Arguments, guess: PyTree, scale: Array | None
) -> Solution:
    """Solve one chain, converting guess and solution."""
    if guess is None:
        path = jnp.broadcast_to(arguments.start, (setup.steps.num_own, spec.size))
    else:
        path = jax.vmap(spec.ravel)(guess)
    outcome = _solve(setup, solver, arguments, jax.lax.stop_gradient(path), scale)
    restore = jax.vmap(spec.unravel)
    return Solution(
        value=restore(outcome.path),
        aux=outcome.aux,
        result=outcome.result,
        residual=outcome.residual,
        stats=outcome.stats,
        iterates=None if outcome.iterates is None else jax.vmap(restore)(outcome.iterates),
        residual_profile=outcome.residual_profile,
    )


def _ravel_scale(spec: RavelSpec, scale: PyTree) -> Array:
    """Broadcast the scale to the state's shapes and convert it to a vector."""
    leaves = jax.tree.leaves(scale)
    full = [jnp.broadcast_to(s, shape) for s, shape in zip(leaves, spec.shapes, strict=True)]
    return spec.ravel(jax.tree.unflatten(spec.treedef, full))


@partial(jax.custom_jvp, nondiff_argnums=(0,))
def _solve(setup: Setup, solver: VectorSolver, arguments: Arguments, guess: Array, scale: Array | None) -> Outcome:
    """Run the solver on vectors; its derivative is `_solve_jvp`."""
    fn, tol = setup.traced.bind(arguments.consts), tolerance_for(solver.tolerance, arguments.start.dtype)
    system = System(fn, arguments.start, arguments.inputs, scale, tol, setup.steps)
    return solver.run(system, guess, setup.guess_given)


@_solve.defjvp
def _solve_jvp(setup: Setup, primals, tangents):
    """Derivative of `_solve`: v from one JVP of all equations, then the affine scan."""
    arguments, dots = primals[1], tangents[1]
    outcome = _solve(setup, *primals)
    path_dot, aux_dot = tangents_of_equation(setup.traced, setup.steps, outcome.path, arguments, dots)
    zeros = jax.tree.map(zero_from_primal, outcome)
    return outcome, zeros._replace(path=path_dot, aux=aux_dot)


def tangents_of_equation(
    traced: Traced, steps: Steps, path: Array, arguments: Arguments, dots: Any
) -> tuple[Array, PyTree]:
    """Return the tangents of a path that satisfies its equations, (T, D), and those of aux.

    Args:
        traced: fn on vectors.
        steps: Operations across steps, on one device or several.
        path: x[1..T], (T, D).
        arguments: What the path depends on.
        dots: Tangents of the arguments.

    Raises:
        TypeError: fn has no forward derivative.
    """

    def images(arguments, path):
        fn = traced.bind(arguments.consts)
        return jax.vmap(fn)(steps.delayed(path, arguments.start), arguments.inputs)

    def jacobians():
        fn = traced.bind(arguments.consts)
        previous = steps.delayed(path, arguments.start)
        return jax.vmap(jax.jacfwd(lambda x, u: fn(x, u)[0]))(previous, arguments.inputs)

    def tangents():
        _, (v, _) = jax.jvp(images, (arguments, path), (dots, jnp.zeros_like(path)))
        path_dot = affine_scan(steps, jacobians(), v)
        return path_dot, jax.jvp(images, (arguments, path), (dots, path_dot))[1][1]

    return forward_derivative(
        tangents, "the derivative of a solution", "Sequential(), which is differentiated as a scan"
    )
