"""``vmap_last``: ``jax.vmap`` with the mapped axis last in every intermediate value.

Paths that are stepped side by side, here called lanes, are many small problems: a state of ten numbers, times a hundred
lanes. A processor is fast where its innermost loop runs over lanes: all lanes do the same, and none reads the numbers
of another, so eight or sixteen go through one instruction. ``jax.vmap`` moves the mapped axis to the front at every
broadcast, reduction and product. XLA's innermost loop then runs over the ten numbers, and LLVM makes scalar code of it.
Neither ``in_axes=-1`` nor a layout of the arguments in memory changes that.

`vmap_last` traces the function for one lane and evaluates the program equation by equation. A value is either shared by
all lanes, and computed once, or `Wide`: an array with one more axis, the lanes, at the end. Axes of one lane keep their
numbers, because the new axis comes after them. So most rules say little (`pmcmc._xla.lane_rules`): a reduction keeps
its axes, a slice takes the whole last axis, a product of a shared matrix with wide vectors is one product of matrices.

Which values of a loop are wide is found before the loop is built (`_wide_outputs`). A counter stays shared although the
state beside it is wide, so reading at a counter is a slice and no gather. If lanes disagree on whether a loop goes on,
it goes on until the last lane has ended, and lanes that have ended keep their values, as under ``jax.vmap``. A
conditional of which lanes take different branches computes all branches. One whose branches are those of platforms
(``jax.lax.platform_dependent``) is left to ``jax.vmap``: only the branch of the own platform may be compiled.

Primitives without a rule (factorisations, convolutions, gathers at indices that differ between lanes) are handed to
``jax.vmap``, which is always right. The tests compare both, for values and gradients.
"""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend.core import ClosedJaxpr, Jaxpr, Literal

from pmcmc._pytree import Array, PyTree
from pmcmc._xla.content import scan_sizes
from pmcmc._xla.lane_rules import RULES, Wide, bind, is_wide, lane_shape, raw, widen


def vmap_last(fn: Callable[..., PyTree], in_axes: int | Sequence[int | None] = -1) -> Callable[..., PyTree]:
    """Return what ``jax.vmap(fn, in_axes, out_axes=-1)`` does, with the mapped axis last in between, too.

    Args:
        fn: Function of pytrees for one lane. Arrays that it closes over are shared by the lanes.
        in_axes: For all arguments, or for each: -1 if lanes are the last axis of its leaves, None if it is shared.

    Returns:
        A function of the same arguments, in which mapped leaves have shape ``(..., lanes)``. Its results have this
        shape, too.

    Raises:
        ValueError: No argument is mapped, or the number of lanes differs between leaves (when called).

    Example:
        >>> import jax.numpy as jnp
        >>> norms = vmap_last(lambda x: jnp.sum(x**2))(jnp.ones((3, 5)))
        >>> norms.shape
        (5,)
    """

    def mapped(*args: PyTree) -> PyTree:
        axes = tuple(in_axes) if isinstance(in_axes, Sequence) else (in_axes,) * len(args)
        flags = [axis is not None for arg, axis in zip(args, axes, strict=True) for _ in jax.tree.leaves(arg)]
        leaves, treedef = jax.tree.flatten(args)
        sizes = {jnp.shape(x)[-1:] for x, wide in zip(leaves, flags, strict=True) if wide}
        if len(sizes) != 1 or () in sizes:
            raise ValueError(f"all mapped leaves need the same last axis, the lanes; got {sorted(sizes)}.")
        one = [_one_lane(x) if wide else jax.typeof(x) for x, wide in zip(leaves, flags, strict=True)]
        program, shapes = jax.make_jaxpr(lambda *a: fn(*jax.tree.unflatten(treedef, a)), return_shape=True)(*one)
        lanes = _Lanes(*sizes.pop())
        values = lanes.run_widely(
            program, [Wide(jnp.asarray(x)) if w else x for x, w in zip(leaves, flags, strict=True)]
        )
        return jax.tree.unflatten(jax.tree.structure(shapes), values)

    return mapped


def _one_lane(x: Any) -> jax.ShapeDtypeStruct:
    """Return the shape of one lane of a leaf."""
    whole = jax.typeof(x)
    return jax.ShapeDtypeStruct(whole.shape[:-1], whole.dtype, weak_type=getattr(whole, "weak_type", False))


# Calls of programs that are evaluated in place, and the parameters of any call that may hold the program.
_CALLS = frozenset(("checkpoint", "closed_call", "core_call", "jit", "pjit", "remat2"))
_PROGRAM = ("jaxpr", "call_jaxpr", "fun_jaxpr")


def _called(equation: Any) -> ClosedJaxpr:
    """Return the program that an equation calls."""
    program = next(equation.params[name] for name in _PROGRAM if name in equation.params)
    return program if isinstance(program, ClosedJaxpr) else ClosedJaxpr(program, ())


class _Lanes:
    """Evaluates programs for a number of lanes.

    Args:
        size: Number of lanes.
    """

    def __init__(self, size: int):
        self.size = size

    def run(self, program: ClosedJaxpr, operands: Sequence[Any]) -> list[Any]:
        """Evaluate a program.

        Args:
            program: The program of one lane.
            operands: Its arguments, each an array that is shared, or `Wide`.

        Returns:
            Its results, each shared or `Wide`.
        """
        values = dict(zip(program.jaxpr.invars, operands, strict=True))
        values |= dict(zip(program.jaxpr.constvars, program.consts, strict=True))
        read = lambda var: _number(var) if isinstance(var, Literal) else values[var]
        for equation in program.jaxpr.eqns:
            given = [read(var) for var in equation.invars]
            with equation.ctx.manager:
                out = self._evaluate(equation, given) if any(map(is_wide, given)) else bind(equation, *given)
            values |= zip(equation.outvars, out, strict=True)
        return [read(var) for var in program.jaxpr.outvars]

    def run_widely(self, program: ClosedJaxpr, operands: Sequence[Any]) -> list[Array]:
        """Evaluate a program; returns arrays (..., lanes) whatever its results depend on."""
        out = self.run(program, operands)
        return [widen(x, lane_shape(var), self.size).value for x, var in zip(out, program.jaxpr.outvars, strict=True)]

    def _evaluate(self, equation: Any, operands: list[Any]) -> list[Any]:
        """Evaluate an equation of which an operand is wide."""
        name = equation.primitive.name
        if name in _CALLS:
            return self.run(_called(equation), operands)
        out = NotImplemented
        if name in _CALLING:
            out = _CALLING[name](self, equation, operands)
        elif name in RULES:
            out = RULES[name](equation, operands, self.size)
        return self._by_vmap(equation, operands) if out is NotImplemented else out

    def _by_vmap(self, equation: Any, operands: list[Any]) -> list[Any]:
        """Evaluate an equation by ``jax.vmap``."""
        axes = tuple(-1 if is_wide(x) else None for x in operands)
        call = jax.vmap(lambda *given: bind(equation, *given), in_axes=axes, out_axes=-1)
        return list(map(Wide, call(*map(raw, operands))))

    def widen_some(self, values: Sequence[Any], flags: Sequence[bool], variables: Sequence[Any]) -> list[Any]:
        """Widen the values that are flagged."""
        triples = zip(values, flags, variables, strict=True)
        return [widen(x, lane_shape(var), self.size) if wide else x for x, wide, var in triples]


def _number(var: Any) -> Any:
    """Return the number in a program as an array of its dtype."""
    return np.asarray(var.val, var.aval.dtype)


def _wide_outputs(program: Jaxpr, flags: Sequence[bool]) -> list[bool]:
    """Return which results of a program are wide, given which arguments are; without evaluating it."""
    wide = dict(zip(program.invars, flags, strict=True))
    found = lambda var: not isinstance(var, Literal) and wide.get(var, False)
    for equation in program.eqns:
        wide |= zip(equation.outvars, _wide_results(equation, list(map(found, equation.invars))), strict=True)
    return list(map(found, program.outvars))


def _wide_results(equation: Any, flags: list[bool]) -> list[bool]:
    """Return which results of an equation are wide."""
    name, params = equation.primitive.name, equation.params
    if not any(flags):
        return [False] * len(equation.outvars)
    if name in _CALLS:
        return _wide_outputs(_called(equation).jaxpr, flags)
    if name == "scan":
        consts, carry, xs = _scan_operands(equation, flags)
        carry = _wide_carry(params["jaxpr"].jaxpr, consts, carry, xs)
        return carry + _wide_outputs(params["jaxpr"].jaxpr, [*consts, *carry, *xs])[len(carry) :]
    if name == "while":
        return _wide_while(equation, flags)[0]
    if name == "cond" and not flags[0] and not _by_platform(equation):
        branches = [_wide_outputs(branch.jaxpr, flags[1:]) for branch in params["branches"]]
        return list(map(any, zip(*branches, strict=True)))
    if name == "optimization_barrier":
        return flags
    return [True] * len(equation.outvars)


def _wide_carry(body: Jaxpr, consts: list[bool], carry: list[bool], xs: list[bool]) -> list[bool]:
    """Return which carries of a loop become wide in some round."""
    out = _wide_outputs(body, [*consts, *carry, *xs])[: len(carry)]
    wider = [a or b for a, b in zip(carry, out, strict=True)]
    return carry if wider == carry else _wide_carry(body, consts, wider, xs)


def _wide_while(equation: Any, flags: list[bool]) -> tuple[list[bool], bool]:
    """Return which carries of a while loop become wide, and whether lanes may disagree on whether it goes on."""
    params = equation.params
    test, rest = _split(flags, params["cond_nconsts"])
    consts, carry = _split(rest, params["body_nconsts"])
    carry = _wide_carry(params["body_jaxpr"].jaxpr, consts, carry, [])
    (disagree,) = _wide_outputs(params["cond_jaxpr"].jaxpr, [*test, *carry])
    return ([True] * len(carry) if disagree else carry), disagree


def _split(values: list[Any], number: int) -> tuple[list[Any], list[Any]]:
    """Return the first ``number`` values, and the others."""
    return values[:number], values[number:]


def _scan_operands(equation: Any, operands: list[Any]) -> tuple[list[Any], list[Any], list[Any]]:
    """Return the constants, the first carry and the inputs among the operands of a scan."""
    num_consts, num_carry = scan_sizes(equation)
    consts, rest = _split(operands, num_consts)
    return consts, *_split(rest, num_carry)


def _scan(lanes: _Lanes, equation: Any, operands: list[Any]) -> list[Any]:
    """A scan; carries that become wide in some round are wide from the first."""
    params, program = equation.params, equation.params["jaxpr"]
    consts, carry, xs = _scan_operands(equation, operands)
    flags, results = _wide_results(equation, list(map(is_wide, operands))), program.jaxpr.outvars
    number = len(carry)

    def body(carry: list[Any], x: list[Any]) -> tuple[list[Any], list[Any]]:
        return _split(lanes.widen_some(lanes.run(program, [*consts, *carry, *x]), flags, results), number)

    start = lanes.widen_some(carry, flags[:number], results[:number])
    options = dict(length=params["length"], reverse=params["reverse"], unroll=params["unroll"])
    last, kept = jax.lax.scan(body, start, xs, **options)
    return [*last, *kept]


def _while(lanes: _Lanes, equation: Any, operands: list[Any]) -> list[Any]:
    """A while loop; lanes that have ended keep their values."""
    params = equation.params
    test_consts, rest = _split(operands, params["cond_nconsts"])
    consts, carry = _split(rest, params["body_nconsts"])
    (wide, disagree), body = _wide_while(equation, list(map(is_wide, operands))), params["body_jaxpr"]

    def going(carry: list[Any]) -> Any:
        (on,) = lanes.run(params["cond_jaxpr"], [*test_consts, *carry])
        return on

    def advance(carry: list[Any]) -> list[Any]:
        new = lanes.widen_some(lanes.run(body, [*consts, *carry]), wide, body.jaxpr.outvars)
        if not disagree:
            return new
        on = going(carry)
        return [_chosen(on, [old, value], lanes.size) for old, value in zip(carry, new, strict=True)]

    start = lanes.widen_some(carry, wide, body.jaxpr.outvars)
    return jax.lax.while_loop(lambda carry: jnp.any(raw(going(carry))), advance, start)


def _by_platform(equation: Any) -> bool:
    """Whether a conditional is ``jax.lax.platform_dependent``: its other branches may not compile on this platform."""
    return equation.params.get("branches_platforms") is not None


def _cond(lanes: _Lanes, equation: Any, operands: list[Any]) -> Any:
    """A conditional: one branch if the lanes agree, otherwise all branches and a choice."""
    if _by_platform(equation):
        return NotImplemented
    (which, *given), branches, results = operands, equation.params["branches"], equation.outvars
    flags = _wide_results(equation, list(map(is_wide, operands)))
    run = lambda branch, given: lanes.widen_some(lanes.run(branch, given), flags, results)
    if is_wide(which):
        found = [run(branch, given) for branch in branches]
        return [_chosen(which, list(values), lanes.size) for values in zip(*found, strict=True)]
    return jax.lax.switch(which, [lambda *given, branch=branch: run(branch, given) for branch in branches], *given)


def _chosen(which: Wide, values: list[Wide], size: int) -> Wide:
    """Return one of several wide values, by the lanes' numbers."""
    shape = values[0].value.shape[:-1]
    return Wide(jax.lax.select_n(widen(which, shape, size).value, *map(raw, values)))


def _custom(lanes: _Lanes, equation: Any, operands: list[Any]) -> Any:
    """A function with a derivative of its own, which derivatives of the whole keep."""
    if not all(map(_is_inexact, equation.outvars)):
        return NotImplemented
    program, flags = _called(equation), list(map(is_wide, operands))
    axes = tuple(-1 if wide else None for wide in flags)
    again = lambda values: [Wide(x) if wide else x for x, wide in zip(values, flags, strict=True)]
    run = lambda *values: lanes.run_widely(program, again(values))
    call = _with_jvp(equation, run, axes) if "jvp" in equation.primitive.name else _with_vjp(equation, run, axes)
    return list(map(Wide, call(*map(raw, operands))))


def _is_inexact(var: Any) -> bool:
    """Whether an operand or a result has a derivative."""
    return jnp.issubdtype(var.aval.dtype, jnp.inexact)


def _pulled_apart(equation: Any) -> tuple[Callable, Callable]:
    """Return how to choose the operands that have a derivative, and ``values -> (equation as their function)``."""
    flags = list(map(_is_inexact, equation.invars))
    chosen = lambda values: tuple(x for x, flag in zip(values, flags, strict=True) if flag)

    def around(values: Sequence[Any]) -> Callable:
        def at(*moving: Any) -> list[Any]:
            rest = iter(moving)
            return bind(equation, *(next(rest) if flag else x for x, flag in zip(values, flags, strict=True)))

        return at

    return chosen, around


def _with_jvp(equation: Any, run: Callable, axes: tuple[int | None, ...]) -> Callable:
    """Return ``run`` with the forward derivative of an equation."""
    call, (chosen, around) = jax.custom_jvp(run), _pulled_apart(equation)

    def of_one(values: Any, tangents: Any) -> Any:
        return jax.jvp(around(values), chosen(values), tangents)

    of_lanes = jax.vmap(of_one, in_axes=(axes, chosen(axes)), out_axes=-1)
    call.defjvp(lambda values, tangents: of_lanes(tuple(values), chosen(tangents)))
    return call


def _with_vjp(equation: Any, run: Callable, axes: tuple[int | None, ...]) -> Callable:
    """Return ``run`` with the backward derivative of an equation; shared operands get the sum over lanes."""
    call, (chosen, around) = jax.custom_vjp(run), _pulled_apart(equation)

    def of_one(values: Any, cotangents: Any) -> Any:
        return jax.vjp(around(values), *chosen(values))[1](cotangents)

    def backward(values: Any, cotangents: Any) -> Any:
        found = jax.vmap(of_one, in_axes=(axes, -1), out_axes=-1)(values, cotangents)
        rest = iter(jnp.sum(x, -1) if axis is None else x for x, axis in zip(found, chosen(axes), strict=True))
        return tuple(next(rest) if _is_inexact(var) else None for var in equation.invars)

    call.defvjp(lambda *values: (run(*values), values), backward)
    return call


# The rules of equations that call programs in other ways than once.
_CALLING: dict[str, Callable[[_Lanes, Any, list[Any]], Any]] = {
    **dict.fromkeys(("custom_jvp_call", "custom_vjp_call", "custom_vjp_call_jaxpr"), _custom),
    "scan": _scan,
    "while": _while,
    "cond": _cond,
}
