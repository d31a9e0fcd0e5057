"""The content of a traced program, as a value that can be compared and hashed.

`Content` turns a jaxpr into nested tuples: primitives, shapes, parameters and numbers, without names or addresses.
Two programs with equal content compute the same.
"""

import dis
import enum
import hashlib
import math
import os
import sys
import sysconfig
from collections.abc import Callable, Iterator
from dataclasses import fields, is_dataclass
from types import CodeType, ModuleType
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend.core import ClosedJaxpr, Jaxpr, Literal, Primitive, jaxpr_as_fun

# Assumed rounds of a loop whose number of rounds is found while it runs, and primitives that take n^3 operations.
UNKNOWN_ROUNDS = 64
FACTORIZATIONS = frozenset(
    ("cholesky", "eig", "eigh", "geqrf", "householder_product", "lu", "qr", "schur", "svd", "triangular_solve")
)
# A function with custom derivative rules is compared by its derivatives up to this order: gradients, and the Jacobians
# of steps that use them.
_MAX_ORDER = 3
# Functions in these folders have derivative rules that do not change between two calls.
_LIBRARIES = (os.path.join(os.path.dirname(str(jax.__file__)), ""),)
# What functions in these folders read as globals does not change between two calls.
INSTALLED = tuple(os.path.join(sysconfig.get_path(name), "") for name in ("stdlib", "purelib", "platlib"))
# But rules that a user gives to `jax.custom_gradient` or ``defjvps`` are functions of this file.
_RULES_OF_OTHERS = "custom_derivatives.py"
_CUSTOM_RULES = ("custom_jvp_call", "custom_vjp_call", "custom_vjp_call_jaxpr")
# Parameters that do not affect what is computed. Of the last two, only `scan_sizes` does.
_LABELS = frozenset(("name", "debug_info", "ft_in", "ft_out"))
# The primitives of JAX, and those of others, that were met so far.
_PRIMITIVES: set[Primitive] = set()
_OTHERS: set[Primitive] = set()


# Where an operand occurs in a program: (number of the equation, number of the operand).
Place = tuple[int, int]


class ById:
    """An object compared by identity, and kept alive so that no other object gets its address."""

    def __init__(self, value: Any):
        self.value = value

    def __hash__(self) -> int:
        return id(self.value)

    def __eq__(self, other: Any) -> bool:
        return isinstance(other, ById) and self.value is other.value

    def __repr__(self) -> str:
        return type(self.value).__qualname__


class Content:
    """Programs and what they contain as nested tuples, equal if the programs compute the same.

    Args:
        order: Order of the derivative being inspected; 0 for the function itself.
    """

    def __init__(self, order: int = 0):
        self._order = order
        self._functions: dict[int, int] = {}  # numbers of the user's functions met so far, by id

    def of_whole(self, program: Jaxpr) -> tuple[tuple, dict[Place, tuple]]:
        """Return the content of a program without its numeric operands, and those operands by their place."""
        scalars: dict[Place, tuple] = {}
        return self.of_program(program, scalars), scalars

    def of_program(self, program: Jaxpr, scalars: dict[Place, tuple] | None = None) -> tuple:
        """Return the content of a program.

        Args:
            program: The program.
            scalars: If given, numeric operands that could as well be inputs are stored here instead.
        """
        numbers: dict[Any, int] = {}

        def name(var: Any) -> Any:
            if isinstance(var, Literal):
                return shape_of(var.aval), self._of_array(var.val)
            return numbers.setdefault(var, len(numbers))

        def operand(place: Place, equation: Any, var: Any) -> Any:
            if scalars is None or not isinstance(var, Literal) or not _may_be_read(equation, var):
                return name(var)
            scalars[place] = self._of_array(np.asarray(var.val, shape_of(var.aval)[1]))
            return shape_of(var.aval)

        inputs = tuple((name(var), shape_of(var.aval)) for var in (*program.constvars, *program.invars))
        equations = tuple(
            (
                _name_of(equation.primitive),
                tuple(operand((number, place), equation, var) for place, var in enumerate(equation.invars)),
                tuple((name(var), shape_of(var.aval)) for var in equation.outvars),
                self._of_params(equation),
            )
            for number, equation in enumerate(program.eqns)
        )
        return inputs, equations, tuple(map(name, program.outvars))

    def _of_params(self, equation: Any) -> tuple:
        """Return the parameters of an equation and, for custom derivative rules of the user's, their derivatives."""
        params = {key: value for key, value in equation.params.items() if key not in _LABELS}
        if equation.primitive.name == "scan":
            params["sizes"] = scan_sizes(equation)
        if equation.primitive.name.startswith(("random_", "threefry")):
            params["partitionable"] = bool(equation.ctx.threefry_partitionable)
        rules: tuple = ()
        if equation.primitive.name in _CUSTOM_RULES:
            inner = next(value for value in params.values() if isinstance(value, (ClosedJaxpr, Jaxpr)))
            params = {"function": inner}
            if self._order < _MAX_ORDER and not _is_library(equation, inner):
                rules = tuple(map(Content(self._order + 1).of_value, _derivatives(equation)))
        return tuple((key, self.of_value(params[key])) for key in sorted(params)), rules

    def of_value(self, value: Any) -> Any:
        """Return the content of anything that can be a parameter of an equation."""
        if isinstance(value, ClosedJaxpr):
            return self.of_program(value.jaxpr), tuple(self._of_array(x) for x in value.consts)
        if isinstance(value, Jaxpr):
            return self.of_program(value)
        if isinstance(value, (tuple, list)):
            return type(value).__qualname__, tuple(map(self.of_value, value))
        if isinstance(value, dict):
            return "dict", tuple((repr(key), self.of_value(x)) for key, x in value.items())
        if value is None or isinstance(value, (bool, int, float, complex, str, bytes)):
            return type(value).__qualname__, repr(value)  # distinguishes 0.0 from -0.0, and 1 from True
        if hasattr(value, "dtype") and hasattr(value, "shape") and not isinstance(value, jax.core.Tracer):
            has_numbers = isinstance(value, jax.Array) or hasattr(value, "__array__")
            return self._of_array(value) if has_numbers else ("shape", *shape_of(value))
        if isinstance(value, (enum.Enum, np.dtype)):
            return type(value).__qualname__, repr(value)
        return self._of_object(value)

    def _of_object(self, value: Any) -> Any:
        """Return the content of a function by its code, of a dataclass by its fields, of other objects by equality."""
        if hasattr(value, "__code__") and not hasattr(value, "__self__"):
            return self._of_function(value)
        if is_dataclass(value) and not isinstance(value, type):
            content = type(value), tuple((f.name, self.of_value(getattr(value, f.name))) for f in fields(value))
            called = getattr(type(value), "__call__", None)  # noqa: B004
            if called is None or type(value).__module__.split(".")[0] == "jax":
                return content
            frozen = getattr(type(value), "__dataclass_params__").frozen and hasattr(called, "__code__")  # noqa: B009
            return (self._of_function(called) if frozen else ById(value)), content
        try:
            hash(value)
        except TypeError:
            return ById(value)
        return type(value), value

    def _of_function(self, value: Any) -> Any:
        """Return the content of a function that runs in Python: its code, and what it reads when it is called.

        Each run of a model may create its functions anew. Functions of equal code in two modules differ if they read
        globals, since those of one module may change without the other's. A function that occurs again, as in itself,
        counts by its number.
        """
        code = value.__code__
        defaults = (*(value.__defaults__ or ()), *(value.__kwdefaults__ or {}).values())
        known = (*defaults, *map(_cell, value.__closure__ or ()))
        if code.co_filename.startswith(INSTALLED):
            return "function", code, tuple(map(self._of_held, known))
        if id(value) in self._functions:
            return "function", self._functions[id(value)]
        self._functions[id(value)] = len(self._functions)
        held, names = value.__globals__, _global_names(code)
        read = tuple((name, held[name]) for name in names if name in held and not isinstance(held[name], ModuleType))
        module = (ById(held), tuple((name, self._of_held(x)) for name, x in read)) if read else ()
        return "function", code, tuple(map(self._of_held, known)), module

    def _of_held(self, value: Any) -> Any:
        """Return the content of what a callback refers to; objects that can change before it runs count by identity."""
        if isinstance(value, tuple):
            return type(value), tuple(map(self._of_held, value))
        if isinstance(value, np.ndarray) and value.dtype != object:
            return ById(value), self._of_array(value)
        fixed = value is None or isinstance(value, (bool, int, float, complex, str, bytes))
        return self.of_value(value) if fixed or hasattr(value, "__code__") else ById(value)

    def _of_array(self, value: Any) -> tuple:
        """Return shape, dtype and content of an array that is not a leaf; large arrays count by their hash."""
        if isinstance(value, jax.core.Tracer):
            return "tracer", ById(value)
        if jnp.issubdtype(getattr(value, "dtype", np.dtype("O")), jax.dtypes.prng_key):
            return str(value.dtype), self._of_array(jax.random.key_data(value))
        array = np.asarray(value)
        content = array.tobytes() if array.nbytes <= 64 else hashlib.sha256(array.tobytes()).digest()
        return array.shape, str(array.dtype), content


def _name_of(primitive: Any) -> Any:
    """Return the name of a primitive; one of another package is an object of its own, whatever its name."""
    if primitive not in _PRIMITIVES and primitive not in _OTHERS:  # JAX may have imported more by now
        modules = [module for name, module in list(sys.modules.items()) if name.split(".")[0] == "jax"]
        found = [x for module in modules for x in list(getattr(module, "__dict__", {}).values())]
        _PRIMITIVES.update(x for x in found if isinstance(x, Primitive))
        if primitive not in _PRIMITIVES:
            _OTHERS.add(primitive)
    return primitive.name if primitive in _PRIMITIVES else (primitive.name, ById(primitive))


def _may_be_read(equation: Any, var: Any) -> bool:
    """Whether a numeric operand could as well be an array input; not true of operands of loops and calls."""
    values = [x for value in equation.params.values() for x in (value if isinstance(value, tuple) else (value,))]
    has_program = any(isinstance(value, (ClosedJaxpr, Jaxpr)) for value in values)
    return not has_program and not equation.effects and jnp.issubdtype(var.aval.dtype, jnp.number)


def _global_names(code: CodeType) -> list[str]:
    """Return the names of globals that a function reads, or functions within it."""
    inner = [name for x in code.co_consts if isinstance(x, CodeType) for name in _global_names(x)]
    return sorted({*inner, *(i.argval for i in dis.get_instructions(code) if i.opname in ("LOAD_GLOBAL", "LOAD_NAME"))})


def _cell(cell: Any) -> Any:
    """Return the content of a closure cell."""
    try:
        return cell.cell_contents
    except ValueError:  # not filled yet
        return None


def inner_programs(equation: Any) -> Iterator[Jaxpr]:
    """Yield the programs among an equation's parameters, such as the body of a loop."""
    for value in equation.params.values():
        for one in value if isinstance(value, (tuple, list)) else (value,):
            if isinstance(one, (ClosedJaxpr, Jaxpr)):
                yield one.jaxpr if isinstance(one, ClosedJaxpr) else one


def every_equation(program: Jaxpr) -> Iterator[Any]:
    """Yield the equations of a program and of the programs within it, each of these programs once."""
    seen, waiting = set(), [program]
    while waiting:
        if id(one := waiting.pop()) in seen:
            continue
        seen.add(id(one))
        for equation in one.eqns:
            yield equation
            waiting += inner_programs(equation)


def scan_sizes(equation: Any) -> tuple[int, int]:
    """Return how many operands of a scan are constants, and how many are carried."""
    params = equation.params
    if "ft_in" in params:  # from JAX 0.12.0.1
        consts, carry, _ = params["ft_in"].unpack()
        return len(consts), len(carry)
    return params["num_consts"], params["num_carry"]


def count_operations(program: Jaxpr, unknown_rounds: int = UNKNOWN_ROUNDS) -> int:
    """Estimate the arithmetic operations of a program, from its shapes alone.

    Products count their multiplications, factorisations of n x n matrices n^3, and other operations the numbers they
    read or write. Of the branches of a conditional only the longest counts.

    Args:
        program: The program.
        unknown_rounds: Assumed rounds of a loop whose number of rounds is not known.
    """
    return sum(_operations(equation, unknown_rounds) for equation in program.eqns)


def _operations(equation: Any, unknown_rounds: int) -> int:
    """Return the operations of one equation of a program."""
    name = equation.primitive.name
    is_combined = name.startswith(("scatter", "reduce", "select_and"))  # their programs combine two numbers
    inner = [] if is_combined else [count_operations(x, unknown_rounds) for x in inner_programs(equation)]
    if inner:
        rounds = equation.params["length"] if name == "scan" else unknown_rounds if name == "while" else 1
        return rounds * (max(inner) if name in ("cond", "custom_jvp_call", "custom_vjp_call") else sum(inner))
    sizes = [math.prod(getattr(var.aval, "shape", ())) for var in (*equation.invars, *equation.outvars)]
    if name == "dot_general":
        (contracted, _), _ = equation.params["dimension_numbers"]
        shape = equation.invars[0].aval.shape
        return sizes[-1] * math.prod(shape[axis] for axis in contracted)
    if name in FACTORIZATIONS:
        return sizes[-1 if name == "triangular_solve" else 0] * equation.invars[0].aval.shape[-1]
    return max(sizes, default=0)


def shape_of(aval: Any) -> tuple:
    """Return shape, dtype and weak type of an abstract value."""
    if not hasattr(aval, "shape"):
        return (str(aval),)
    return aval.shape, str(aval.dtype), bool(getattr(aval, "weak_type", False))


def _is_library(equation: Any, program: ClosedJaxpr | Jaxpr) -> bool:
    """Whether a function and its custom derivative rules belong to JAX, as far as their source files say."""
    inner = program.jaxpr if isinstance(program, ClosedJaxpr) else program
    rules = [
        x for x in equation.params.values() if hasattr(x, "debug_info") and not isinstance(x, (ClosedJaxpr, Jaxpr))
    ]
    sources = [str(getattr(x.debug_info, "func_filename", None)) for x in (inner, *rules)]
    return bool(rules) and all(x.startswith(_LIBRARIES) and not x.endswith(_RULES_OF_OTHERS) for x in sources)


def _derivatives(equation: Any) -> Iterator[ClosedJaxpr]:
    """Yield programs that expose the custom rules of an equation: forward for custom_jvp, backward for custom_vjp."""
    invars = list(dict.fromkeys(var for var in equation.invars if not isinstance(var, Literal)))
    outvars = [var for var in equation.outvars if type(var).__name__ != "DropVar"]
    shapes = [jax.ShapeDtypeStruct(var.aval.shape, var.aval.dtype) for var in invars]
    empty = jax.make_jaxpr(lambda *xs: xs)(*shapes).jaxpr
    run = jaxpr_as_fun(ClosedJaxpr(empty.replace(invars=invars, outvars=outvars, eqns=[equation]), ()))
    real = [n for n, s in enumerate(shapes) if jnp.issubdtype(s.dtype, jnp.inexact)]

    def of_real(xs: list[Any]) -> Callable:
        def call(*moving: Any) -> list[Any]:
            filled = list(xs)
            for n, x in zip(real, moving, strict=True):
                filled[n] = x
            return [out for out in run(*filled) if jnp.issubdtype(jnp.result_type(out), jnp.inexact)]

        return call

    moving = [shapes[n] for n in real]
    if equation.primitive.name == "custom_jvp_call":
        yield jax.make_jaxpr(lambda xs, ts: jax.jvp(of_real(xs), [xs[n] for n in real], ts))(shapes, moving)
        return
    outs = jax.eval_shape(lambda xs: of_real(xs)(*[xs[n] for n in real]), shapes)
    yield jax.make_jaxpr(lambda xs, cs: jax.vjp(of_real(xs), *[xs[n] for n in real])[1](cs))(shapes, outs)
