"""Which results of a program may depend on which of its arguments."""

from typing import Any

from jax.extend.core import Jaxpr, Literal

from pmcmc._xla.content import scan_sizes

# Primitives that call one program with their operands as its arguments.
_CALLS = ("jit", "pjit", "closed_call", "remat", "remat2", "checkpoint", "custom_jvp_call", "custom_vjp_call")


def dependent(program: Jaxpr, marked: list[bool]) -> list[bool]:
    """Return for each result of a program whether it may depend on a marked argument.

    Jitted functions, ``scan`` and ``cond`` are looked into. Of any other operation, ``while_loop`` included, every
    result counts as dependent if an operand is.

    Args:
        program: The program.
        marked: Whether each of its arguments is marked.
    """
    found = {var for var, is_marked in zip(program.invars, marked, strict=True) if is_marked}
    flags = lambda operands: [not isinstance(var, Literal) and var in found for var in operands]
    for equation in program.eqns:
        results = _results(equation, flags(equation.invars))
        found.update(var for var, is_dependent in zip(equation.outvars, results, strict=True) if is_dependent)
    return flags(program.outvars)


def _results(equation: Any, marked: list[bool]) -> list[bool]:
    """Return `dependent` of one operation."""
    name, params = equation.primitive.name, equation.params
    if name in _CALLS and any(marked):
        inner = params["call_jaxpr"] if "call_jaxpr" in params else params["jaxpr"]
        return dependent(getattr(inner, "jaxpr", inner), marked)
    if name == "scan" and any(marked):
        return _of_scan(equation, marked)
    if name == "cond" and not marked[0]:  # the first operand selects the branch
        branches = [dependent(branch.jaxpr, marked[1:]) for branch in params["branches"]]
        return [any(flags) for flags in zip(*branches, strict=True)]
    return [any(marked)] * len(equation.outvars)


def _of_scan(equation: Any, marked: list[bool]) -> list[bool]:
    """Return `dependent` of ``scan``, whose carry may become dependent in later steps."""
    first, size = scan_sizes(equation)
    while True:
        results = dependent(equation.params["jaxpr"].jaxpr, marked)
        carried = [old or new for old, new in zip(marked[first : first + size], results[:size], strict=True)]
        if carried == marked[first : first + size]:
            return results
        marked = [*marked[:first], *carried, *marked[first + size :]]
