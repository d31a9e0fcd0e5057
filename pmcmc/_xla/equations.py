"""Replace equations of a traced program, wherever they are in it: in loops, branches and functions that it calls.

Because the finished program is rewritten, no rules for derivatives and batching are needed.
"""

from collections.abc import Callable, Mapping
from functools import wraps
from typing import Any
from weakref import WeakKeyDictionary

import jax
from jax.extend import source_info_util
from jax.extend.core import ClosedJaxpr, Jaxpr, Literal, jaxpr_as_fun

from pmcmc._pytree import PyTree
from pmcmc._xla import evaluate
from pmcmc._xla.content import inner_programs

# A rule takes an equation and returns what to compute instead, as a function of its operands that returns what the
# primitive returns; None if the equation stays.
Rule = Callable[[Any], Callable[..., Any] | None]
# Primitives whose inner programs are rewritten. Those of others, such as the combiner of a scatter, are not run as
# equations; those of `shard_map` are rewritten where they are traced.
_CALLS = frozenset(
    " ".join(
        (
            "call checkpoint closed_call composite cond core_call core_closed_call custom_jvp_call custom_linear_solve",
            "custom_vjp_call custom_vmap_call jit linear_call pjit remat2 scan while",
        )
    ).split()
)


def replacing(rules: Mapping[str, Rule], fn: Callable[..., PyTree]) -> Callable[..., PyTree]:
    """Return ``fn``, to be traced by ``jax.jit``, with equations of its program replaced.

    Args:
        rules: Rules by the name of the primitive.
        fn: Any function that JAX can trace; arguments that are not traced are passed on as they are.

    Returns:
        The function. Programs in which no rule finds anything to replace are those of ``fn``.
    """

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
        replaced = _Replacing(rules).instead_of(program)
        return jax.tree.unflatten(jax.tree.structure(shapes), jaxpr_as_fun(replaced)(*given))

    return traced


class _Replacing:
    """Replaces equations of programs by rules. A program that is called twice is replaced once."""

    def __init__(self, rules: Mapping[str, Rule]):
        self._rules = rules
        self._found: WeakKeyDictionary[Jaxpr, bool] = WeakKeyDictionary()
        self._made: dict[int, tuple[Any, ClosedJaxpr]] = {}  # by id of the old program, which is kept alive

    def instead_of(self, program: ClosedJaxpr) -> ClosedJaxpr:
        """Return the program with its equations replaced; the program itself if there are none to replace."""
        if not self._finds_any(program.jaxpr):
            return program
        if id(program) not in self._made:
            run = lambda *args: self._run(program, args)
            self._made[id(program)] = program, jax.make_jaxpr(run)(*program.in_avals)
        return self._made[id(program)][1]

    def _instead_of(self, equation: Any) -> Callable[..., Any] | None:
        """Return what its rule says about one equation."""
        rule = self._rules.get(equation.primitive.name)
        return None if rule is None else rule(equation)

    def _finds_any(self, program: Jaxpr) -> bool:
        """Whether something is to be replaced in a program or in one that it calls."""
        if program not in self._found:
            called = lambda equation: inner_programs(equation) if equation.primitive.name in _CALLS else ()
            self._found[program] = any(
                self._instead_of(e) is not None or any(map(self._finds_any, called(e))) for e in program.eqns
            )
        return self._found[program]

    def _run(self, program: ClosedJaxpr, args: tuple[Any, ...]) -> list[Any]:
        """Evaluate the program equation by equation."""
        values = dict(zip(program.jaxpr.invars, args, strict=True))
        values |= dict(zip(program.jaxpr.constvars, program.consts, strict=True))
        read = lambda v: v.val if isinstance(v, Literal) else values[v]
        for equation in program.jaxpr.eqns:
            operands = [read(v) for v in equation.invars]
            source = equation.source_info  # so that profiles and dumps go on naming where an operation was written
            names = source_info_util.current_name_stack() + source.name_stack
            with source_info_util.user_context(source.traceback, name_stack=names), equation.ctx.manager:
                out = self._call(equation, operands)
            values |= zip(equation.outvars, out if equation.primitive.multiple_results else [out], strict=True)
        return [read(v) for v in program.jaxpr.outvars]

    def _call(self, equation: Any, operands: list[Any]) -> Any:
        """Evaluate one equation, or what replaces it; a call with its inner programs replaced."""
        if (instead := self._instead_of(equation)) is not None:
            return instead(*operands)
        params = equation.params
        if equation.primitive.name in _CALLS:
            params = {key: self._replace(value) for key, value in params.items()}
        return evaluate(equation, operands, params)

    def _replace(self, value: Any) -> Any:
        """Replace the programs within a parameter."""
        if isinstance(value, ClosedJaxpr):
            return self.instead_of(value)
        if isinstance(value, Jaxpr):  # without constants
            return self.instead_of(ClosedJaxpr(value, ())).jaxpr
        if isinstance(value, tuple):
            found = [self._replace(one) for one in value]
            return type(value)(*found) if hasattr(value, "_fields") else tuple(found)
        return value
