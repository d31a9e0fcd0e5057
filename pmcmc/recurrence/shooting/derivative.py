"""The derivative of a solution by multiple shooting: that of the equation at the states found.

The solve itself is a constant: its loops have no reverse mode, and a tangent that runs along with the blocks is wrong,
since merges compare states and not tangents. `differentiable` gives the solution the implicit derivative of
Newton-type solvers instead, see `pmcmc.recurrence.newton.implicit_diff`. It costs nothing unless it is asked for.
"""

from collections.abc import Callable
from functools import partial

import jax
import jax.extend

from pmcmc._pytree import PyTree, RavelSpec, is_real
from pmcmc.recurrence.newton.implicit_diff import (
    Arguments,
    Traced,
    state_spec,
    tangents_of_equation,
    trace_on_vectors,
)
from pmcmc.recurrence.problem import Problem
from pmcmc.recurrence.sharding import AllSteps
from pmcmc.recurrence.solution import Solution


def differentiable(solve: Callable[[Problem], Solution], problem: Problem) -> Solution:
    """Return ``solve(problem)`` with the derivative of the equation.

    It is the derivative of value and aux with respect to x0, the inputs and the values that fn closes over; everything
    else has derivative zero. Derivatives of states with integers or booleans are refused with a TypeError.
    """
    run = lambda x0, inputs: solve(problem._replace(x0=x0, inputs=inputs))
    closed, out = jax.make_jaxpr(run, return_shape=True)(problem.x0, problem.inputs)
    consts, x0, inputs = jax.lax.stop_gradient((closed.consts, problem.x0, problem.inputs))
    program = jax.extend.core.jaxpr_as_fun(jax.extend.core.ClosedJaxpr(closed.jaxpr, consts))
    found = jax.tree.unflatten(jax.tree.structure(out), program(*jax.tree.leaves((x0, inputs))))
    if not all(is_real(x) for x in jax.tree.leaves(problem.x0)):
        value, aux = _refuse((closed.consts, problem.x0, problem.inputs), (found.value, found.aux))
        return found._replace(value=value, aux=aux)
    spec = state_spec(problem)
    traced, consts = trace_on_vectors(spec, problem)

    def one_chain(x0, inputs, value, aux):
        return _attach(traced, spec, Arguments(consts, spec.ravel(x0), inputs), value, aux)

    value, aux = jax.vmap(one_chain)(problem.x0, problem.inputs, found.value, found.aux)
    return found._replace(value=value, aux=aux)


@partial(jax.custom_jvp, nondiff_argnums=(0, 1))
def _attach(traced: Traced, spec: RavelSpec, arguments: Arguments, value: PyTree, aux: PyTree) -> tuple[PyTree, PyTree]:
    """Return states and aux of one chain; the derivative is `_attach_jvp`."""
    return value, aux


@_attach.defjvp
def _attach_jvp(traced: Traced, spec: RavelSpec, primals, tangents):
    """Derivative of the equation at the states, with respect to the arguments alone."""
    value, aux = _attach(traced, spec, *primals)  # so that it can be differentiated again
    path = jax.vmap(spec.ravel)(value)
    path_dot, aux_dot = tangents_of_equation(traced, AllSteps(path.shape[0]), path, primals[0], tangents[0])
    return (value, aux), (spec.unravel(path_dot), aux_dot)


@jax.custom_jvp
def _refuse(arguments: PyTree, solution: PyTree) -> PyTree:
    """Return the solution, which cannot be differentiated with respect to these arguments."""
    return solution


@_refuse.defjvp
def _refuse_jvp(primals, tangents):
    raise TypeError(
        "MultipleShooting() differentiates solutions of real states, got integer or boolean leaves. Use Sequential(), "
        "which is differentiated as a scan; or, if the solution is to be a constant, jax.lax.stop_gradient on x0, the "
        "inputs and what fn closes over."
    )
