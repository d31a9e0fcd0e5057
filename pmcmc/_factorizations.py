"""Batched matrix factorisations one matrix at a time, where jaxlib would otherwise wait for ever.

On a CPU, jaxlib 0.10.0 to 0.11.0 spreads a batch of LAPACK calls over the threads of the pool that also runs the
program, and the thread that asked waits for them. Once as many batches are asked for at once as there are threads, all
of them wait for one another: on two cores, with four Gaussian processes mapped over chains, within ten calls. A single
matrix is factorised by the thread that asks, so a loop over the batch cannot wait. Every batch is looped over: that one
needs the result of another does not keep XLA from asking for both at once, nor other threads from asking for more.
"""

import math
from collections.abc import Callable, Iterator
from functools import wraps
from typing import Any
from weakref import WeakKeyDictionary

import jax
import jaxlib.version
from jax.extend.core import ClosedJaxpr, Jaxpr, Literal, jaxpr_as_fun

from pmcmc._types import PyTree

# Primitives that call LAPACK, with the numbers of axes that one call takes of each operand.
_RANKS = {
    "cholesky": (2,),
    "eig": (2,),
    "eigh": (2,),
    "geqp3": (2, 1),
    "geqrf": (2,),
    "hessenberg": (2,),
    "householder_product": (2, 1),
    "lu": (2,),
    "ormqr": (2, 1, 2),
    "qr": (2,),
    "schur": (2,),
    "svd": (2,),
    "triangular_solve": (2, 2),
    "tridiagonal": (2,),
    "tridiagonal_solve": (1, 1, 1, 2),
}
# Primitives whose own programs can be put in place of others.
_CALLS = frozenset(
    " ".join(
        (
            "call checkpoint closed_call composite cond core_call core_closed_call custom_jvp_call custom_linear_solve",
            "custom_vjp_call custom_vmap_call jit linear_call pjit remat2 scan while",
        )
    ).split()
)


def may_wait_for_ever() -> bool:
    """Whether this jaxlib is one of those that do so on a CPU."""
    return (0, 10, 0) <= jaxlib.version.__version_info__[:3] <= (0, 11, 0)


def one_at_a_time(fn: Callable[..., PyTree]) -> Callable[..., PyTree]:
    """``fn``, to be traced by `jax.jit`, with loops over single matrices."""

    @wraps(fn)
    def traced(*args: Any, **kwargs: Any) -> PyTree:
        leaves, treedef = jax.tree.flatten((args, kwargs))
        is_traced = [isinstance(x, jax.core.Tracer) for x in leaves]

        def of_traced(*given: Any) -> PyTree:
            rest = iter(given)
            filled = [next(rest) if t else x for x, t in zip(leaves, is_traced, strict=True)]
            args, kwargs = jax.tree.unflatten(treedef, filled)
            return fn(*args, **kwargs)

        given = [x for x, t in zip(leaves, is_traced, strict=True) if t]
        program, shapes = jax.make_jaxpr(of_traced, return_shape=True)(*given)
        looped = _Loops().instead_of(program)
        return jax.tree.unflatten(jax.tree.structure(shapes), jaxpr_as_fun(looped)(*given))

    return traced


def _is_batch(equation: Any) -> bool:
    name, operands = equation.primitive.name, equation.invars
    return name in _RANKS and math.prod(_batch_shape(name, operands)) > 1


def _batch_shape(name: str, operands: list[Any]) -> tuple[int, ...]:
    shape = operands[0].aval.shape
    return shape[: len(shape) - _RANKS[name][0]]


# Of a program: whether it asks for any batch.
_KNOWN: WeakKeyDictionary[Jaxpr, bool] = WeakKeyDictionary()


def _holds_batch(program: Jaxpr) -> bool:
    if program not in _KNOWN:
        _KNOWN[program] = any(_is_batch(e) or any(map(_holds_batch, _inner(e))) for e in program.eqns)
    return _KNOWN[program]


def _inner(equation: Any) -> Iterator[Jaxpr]:
    """Programs that an equation calls."""
    if equation.primitive.name in _CALLS:
        for value in equation.params.values():
            for one in value if isinstance(value, tuple) else (value,):
                if isinstance(one, (ClosedJaxpr, Jaxpr)):
                    yield one.jaxpr if isinstance(one, ClosedJaxpr) else one


class _Loops:
    """Programs with loops in the place of batches; one that is called twice stays one."""

    def __init__(self) -> None:
        self._made: dict[int, tuple[Any, ClosedJaxpr]] = {}  # with the old one, whose id is used

    def instead_of(self, program: ClosedJaxpr) -> ClosedJaxpr:
        if not _holds_batch(program.jaxpr):
            return program
        if id(program) not in self._made:
            run = lambda *args: self._run(program, args)
            self._made[id(program)] = program, jax.make_jaxpr(run)(*program.in_avals)
        return self._made[id(program)][1]

    def _run(self, program: ClosedJaxpr, args: tuple[Any, ...]) -> list[Any]:
        values = dict(zip(program.jaxpr.invars, args, strict=True))
        values |= dict(zip(program.jaxpr.constvars, program.consts, strict=True))
        read = lambda v: v.val if isinstance(v, Literal) else values[v]
        for equation in program.jaxpr.eqns:
            operands = [read(v) for v in equation.invars]
            with equation.ctx.manager:
                out = self._call(equation, operands)
            values |= zip(equation.outvars, out if equation.primitive.multiple_results else [out], strict=True)
        return [read(v) for v in program.jaxpr.outvars]

    def _call(self, equation: Any, operands: list[Any]) -> Any:
        if _is_batch(equation):
            return _loop(equation, operands)
        params = equation.params
        if equation.primitive.name in _CALLS:
            params = {key: self._replace(value) for key, value in params.items()}
        return equation.primitive.bind(*operands, **equation.primitive.get_bind_params(params))

    def _replace(self, value: Any) -> Any:
        if isinstance(value, ClosedJaxpr):
            return self.instead_of(value)
        if isinstance(value, Jaxpr):  # without constants
            return self.instead_of(ClosedJaxpr(value, ())).jaxpr
        if isinstance(value, tuple):
            found = [self._replace(one) for one in value]
            return type(value)(*found) if hasattr(value, "_fields") else tuple(found)
        return value


def _loop(equation: Any, operands: list[Any]) -> Any:
    """One matrix of the batch after the other."""
    name = equation.primitive.name
    batch = _batch_shape(name, operands)
    rows = [x.reshape(math.prod(batch), *x.shape[len(batch) :]) for x in operands]
    out = jax.lax.map(lambda row: equation.primitive.bind(*row, **equation.params), rows)
    return jax.tree.map(lambda x: x.reshape(*batch, *x.shape[1:]), out)
