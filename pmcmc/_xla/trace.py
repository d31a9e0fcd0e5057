"""Snapshots of the user's functions: traced once when a run begins, with the arrays they read as data.

A Python function may read anything: an attribute, a closure, a global, a column of a data frame. Two calls of the same
function object need not compute the same thing, so the function object cannot identify a compiled program. `trace`
therefore traces a function when it is passed in. The arrays that it reads become leaves (``constants``), and the rest,
the `Trace`, is compared by its content: operations, shapes and numbers. So

- a function that has changed has another trace, and its programs are recompiled;
- other arrays of the same shapes are other leaves, and nothing is compiled;
- later changes to the user's objects do not affect what was traced.

JAX's own caches are out of reach: a function that the user's code passes to ``jax.jit`` or ``jax.lax.scan`` is traced
by JAX once per function object, here as in NumPyro. And the backward rule of a ``jax.custom_vjp`` runs whenever JAX
differentiates: what it reads from outside must not change before the run ends.
"""

import operator
import threading
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any
from weakref import WeakValueDictionary

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend.core import ClosedJaxpr, Jaxpr, Literal

from pmcmc._pytree import Array, PyTree, register_dataclass
from pmcmc._xla import evaluate
from pmcmc._xla.content import Content, Place, shape_of
from pmcmc._xla.dependence import dependent

# Calls of functions that the user's code has jitted.
_JIT = ("jit", "pjit")
# Size in bytes from which arrays with equal content are kept only once.
_LARGE = 4096


class Trace:
    """What a function computes for arguments of given shapes and dtypes, without the arrays that it reads.

    Traces with equal content are equal, and usually the same object.

    Args:
        program: The function as a jaxpr without constants. Its first inputs are the arrays that it reads, the others
            leaves of the arguments.
        reads: For each array that it reads, its index in the list of arrays that a call passes.
        in_tree: Structure of the arguments.
        out_tree: Structure of the result.
        operations: Content of the program, see `Content`.
        held: (place, number) for each number in the program; None instead of a number that is read, as one of the
            last arrays.
    """

    def __init__(
        self, program: Jaxpr, reads: tuple[int, ...], in_tree: Any, out_tree: Any, operations: tuple, held: tuple = ()
    ):
        self.program, self.in_tree, self.out_tree, self._reads, self._held = program, in_tree, out_tree, reads, held
        self.operations = (in_tree, out_tree, operations)
        self.key = (self.operations, held, reads)
        self._hash = hash(self.key)
        self._parts: dict[str, Trace] = {}

    def __hash__(self) -> int:
        return self._hash

    def __eq__(self, other: Any) -> bool:
        return self is other or (isinstance(other, Trace) and self._hash == other._hash and self.key == other.key)

    def __call__(self, constants: list[Array], *args: PyTree) -> PyTree:
        """Evaluate the function with ``constants`` as the arrays that it reads."""
        leaves, in_tree = jax.tree.flatten(args)
        if in_tree != self.in_tree:
            raise TypeError(f"this function was traced for arguments of structure {self.in_tree}, got {in_tree}.")
        read = [constants[number] for number in self._reads]
        given = [_fitted(x, var.aval) for x, var in zip(leaves, self.program.invars[len(read) :], strict=True)]
        return jax.tree.unflatten(self.out_tree, jax.core.eval_jaxpr(self.program, (), *read, *given))

    @property
    def out_shapes(self) -> PyTree:
        """Shapes and dtypes of the result."""
        avals = [var.aval for var in self.program.outvars]
        return jax.tree.unflatten(self.out_tree, [jax.ShapeDtypeStruct(*shape_of(aval)[:2]) for aval in avals])

    @property
    def reads_arguments(self) -> bool:
        """Whether the result may depend on an argument, see `dependent`."""
        num_arguments = len(self.program.invars) - len(self._reads)
        return any(dependent(self.program, [False] * len(self._reads) + [True] * num_arguments))

    @property
    def reads_last(self) -> bool:
        """Whether the result may depend on the last leaf of the arguments, see `dependent`."""
        return any(dependent(self.program, [False] * (len(self.program.invars) - 1) + [True]))

    @property
    def uses_last(self) -> bool:
        """Whether an operation takes the last leaf of the arguments, needed or not."""
        last = self.program.invars[-1]
        return any(var is last for equation in self.program.eqns for var in equation.invars)

    @property
    def without_last(self) -> "Trace":
        """The trace without the last argument, which is one array that no operation takes."""
        program = self.program.replace(invars=self.program.invars[:-1])
        in_tree = jax.tree_util.treedef_tuple(self.in_tree.children()[:-1])
        made = Trace(program, self._reads, in_tree, self.out_tree, self.operations[2], self._held)
        return _KNOWN.setdefault(made.key, made)

    def part(self, name: str) -> "Trace":
        """Return the trace of one entry of the dict that the function returns.

        Equations that only other entries need are dropped. The part takes the constants of the whole.
        """
        if name not in self._parts:
            outputs = jax.tree.unflatten(self.out_tree, self.program.outvars)[name]
            outvars, out_tree = jax.tree.flatten(outputs)
            program = _with_outputs(self.program, outvars)
            operations = (self.operations, name)
            self._parts[name] = Trace(program, self._reads, self.in_tree, out_tree, operations, self._held)
        return self._parts[name]

    def content(self, constants: list[Array]) -> tuple[tuple, tuple]:
        """Return what is computed, and the numbers used; a number counts the same whether it is held or read."""
        read = [Content().of_value(constants[number]) for number in self._reads]
        num_scalars = sum(value is None for _, value in self._held)
        arrays, scalars = read[: len(read) - num_scalars], iter(read[len(read) - num_scalars :])
        return self.operations, (
            tuple((place, next(scalars) if value is None else value) for place, value in self._held),
            tuple(arrays),
        )


def _fitted(x: Any, aval: Any) -> Any:
    """Convert an argument to the traced dtype, and check its shape."""
    if jnp.shape(x) != aval.shape:
        raise TypeError(f"this function was traced for an argument of shape {aval.shape}, got {jnp.shape(x)}.")
    if getattr(x, "dtype", None) == aval.dtype:
        return x
    if jax.dtypes.canonicalize_dtype(aval.dtype) != aval.dtype:
        raise TypeError(
            f"this function was traced in {aval.dtype}, which JAX does not use now: set jax_enable_x64 as it was then, "
            "or use what was made within `with jax.enable_x64(True):` in such a block."
        )
    return jnp.asarray(x, aval.dtype)


@register_dataclass
@dataclass(frozen=True)
class Untraced:
    """A user function that has not been traced yet: a pytree without leaves, compared by identity.

    Attributes:
        fn: The function.
    """

    fn: Callable = field(metadata=dict(static=True))

    def __call__(self, *args: Any) -> Any:
        return self.fn(*args)

    def at(self, *args: PyTree) -> "Traced":
        """Trace the function as it is now, for arguments like these."""
        return trace(self.fn, *args)


@register_dataclass
@dataclass(frozen=True)
class Traced:
    """A user function as it was when it was traced: a pytree whose leaves are the arrays that it reads.

    Attributes:
        trace: What it computes.
        constants: The arrays that it reads.
    """

    trace: Trace = field(metadata=dict(static=True))
    constants: list[Array]

    def __call__(self, *args: PyTree) -> PyTree:
        return self.trace(self.constants, *args)

    def at(self, *args: PyTree) -> "Traced":
        """Return itself: what was traced stays."""
        return self

    @property
    def content(self) -> tuple[tuple, tuple]:
        """See `Trace.content`: equal for functions that compute the same."""
        return self.trace.content(self.constants)


def trace(fn: Callable, *args: PyTree) -> Traced:
    """Trace ``fn`` as it is now.

    Args:
        fn: Any function that JAX can trace.
        args: Its arguments, arrays or shapes.

    Returns:
        The traced function.
    """
    shapes: Any = None

    def fresh(*args: Any) -> Any:  # a new object at each call, since JAX caches traces by function object
        nonlocal shapes
        out = fn(*args)
        shapes = jax.tree.structure(out)
        return out

    # Trace, expose the arrays within jitted functions, drop what is not needed, copy arrays within loops and branches.
    program = jax.make_jaxpr(fresh)(*args)
    if _hides_constants(program.jaxpr):
        program = jax.make_jaxpr(lambda *leaves: _replay(program, leaves))(*program.in_avals)
    program = _with_own_arrays(_needed(program))
    # Numbers that differed between equal programs become constants that are read, like arrays.
    content, scalars = Content().of_whole(program.jaxpr)
    varying = _varying(hash(content), scalars)
    if varying:
        program = _with_scalars_read(program, varying)
    # Keep each array once, and one Trace for each content.
    constants, reads = _distinct(program.consts)
    in_tree = jax.tree.structure(args)
    held = tuple((place, None if place in varying else value) for place, value in scalars.items())
    made = Trace(_without_constants(program.jaxpr), reads, in_tree, shapes, content, held)
    return Traced(_KNOWN.setdefault(made.key, made), constants)


# Traces in use, by their content.
_KNOWN: WeakValueDictionary[tuple, Trace] = WeakValueDictionary()
# Number of programs whose numbers are remembered, the most recently traced.
_MAX_SEEN = 256


# For programs that are equal apart from their numbers: the numbers of the first trace by place, and the places where
# later traces differed. Any choice of places is correct; it decides only what is compiled again.
_seen: OrderedDict[int, tuple[dict, set]] = OrderedDict()
_lock = threading.Lock()


def _varying(content: int, scalars: dict[Place, tuple]) -> tuple[Place, ...]:
    """Return the places where a program's numbers have changed between traces: there they are data, such as a mean."""
    with _lock:
        first, places = _seen.setdefault(content, (scalars, set()))
        _seen.move_to_end(content)
        if len(_seen) > _MAX_SEEN:
            _seen.popitem(last=False)
        places.update(place for place, value in scalars.items() if first.get(place) != value)
        return tuple(sorted(places & scalars.keys()))


def _replay(program: ClosedJaxpr, args: Iterable[Any], read: dict[Place, Any] | None = None) -> list[Any]:
    """Evaluate the program, with calls of jitted functions that contain arrays inlined.

    Args:
        program: The program.
        args: Its arguments.
        read: Operands that replace the numbers at these places.
    """
    values = dict(zip(program.jaxpr.invars, args, strict=True))
    values |= dict(zip(program.jaxpr.constvars, program.consts, strict=True))
    get = lambda var: var.val if isinstance(var, Literal) else values[var]
    for number, equation in enumerate(program.jaxpr.eqns):
        operands = list(map(get, equation.invars))
        for place in range(len(operands)) if read else ():
            operands[place] = read.get((number, place), operands[place])  # type: ignore[union-attr]
        with equation.ctx.manager:
            if equation.primitive.name in _JIT and _holds_arrays(equation.params["jaxpr"]):
                out = _replay(equation.params["jaxpr"], operands)
            else:
                out = evaluate(equation, operands)
                out = out if equation.primitive.multiple_results else [out]
        values |= zip(equation.outvars, out, strict=True)
    return list(map(get, program.jaxpr.outvars))


def _holds_arrays(program: ClosedJaxpr) -> bool:
    """Whether a program contains arrays, its own or those of a jitted function that it calls."""
    return bool(program.consts) or _hides_constants(program.jaxpr)


def _hides_constants(program: Jaxpr) -> bool:
    """Whether the program calls a jitted function that contains arrays."""
    return any(e.primitive.name in _JIT and _holds_arrays(e.params["jaxpr"]) for e in program.eqns)


def _with_scalars_read(program: ClosedJaxpr, places: tuple[Place, ...]) -> ClosedJaxpr:
    """Turn the numbers at these places into the last constants of the program."""
    held = {place: program.jaxpr.eqns[place[0]].invars[place[1]] for place in places}
    scalars = [np.array(var.val, var.aval.dtype) for var in held.values()]
    run = lambda scalars, leaves: _replay(program, leaves, dict(zip(held, scalars, strict=True)))
    made = jax.make_jaxpr(run)(scalars, list(program.in_avals))
    invars, number = made.jaxpr.invars, len(scalars)
    constvars = [*made.jaxpr.constvars, *invars[:number]]
    return ClosedJaxpr(made.jaxpr.replace(constvars=constvars, invars=invars[number:]), [*made.consts, *scalars])


def _needed(program: ClosedJaxpr) -> ClosedJaxpr:
    """Drop equations and constants that no output needs."""
    kept = _with_outputs(program.jaxpr, program.jaxpr.outvars)
    read = {var for equation in kept.eqns for var in equation.invars if not isinstance(var, Literal)}
    read.update(var for var in kept.outvars if not isinstance(var, Literal))
    values = {v: x for v, x in zip(program.jaxpr.constvars, program.consts, strict=True) if v in read}
    return ClosedJaxpr(kept.replace(constvars=list(values)), list(values.values()))


def _distinct(constants: list[Any]) -> tuple[list[Array], tuple[int, ...]]:
    """Return each array once, copied if the user could change it, and the index in that list of each constant."""
    kept: list[Any] = []
    reads = []
    for constant in constants:
        same = (number for number, other in enumerate(kept) if _is_same(constant, other))
        reads.append(next(same, len(kept)))
        if reads[-1] == len(kept):
            kept.append(constant)
    return list(map(_own, kept)), tuple(reads)


def _is_same(a: Any, b: Any) -> bool:
    """Whether two arrays share their memory, or are large and equal bit for bit."""
    if a is b or a.shape != b.shape or a.dtype != b.dtype or _is_opaque(a) or _is_opaque(b):
        return a is b
    a, b = np.asarray(a), np.asarray(b)
    place = lambda x: (x.__array_interface__["data"][0], x.strides)
    if place(a) == place(b) or a.nbytes < _LARGE:
        return place(a) == place(b)
    first, second = (np.ascontiguousarray(x).reshape(-1).view(np.uint8) for x in (a, b))
    return bool(np.array_equal(first, second))


def _is_opaque(x: Any) -> bool:
    """Whether the numbers of an array are unavailable, or only by a copy from another device."""
    if isinstance(x, jax.core.Tracer) or jnp.issubdtype(x.dtype, jax.dtypes.prng_key):
        return True
    return isinstance(x, jax.Array) and any(device.platform != "cpu" for device in x.devices())


def _own(constant: Any) -> Array:
    """Return an array that later changes of the user's arrays do not affect."""
    if isinstance(constant, (jax.Array, jax.core.Tracer)):
        return constant
    return jax.device_put(np.array(constant, copy=True))


def _own_number(operand: Any) -> Any:
    """Return an operand of an equation; if it is an array without axes, which the user may change, as a copy."""
    value = operand.val if isinstance(operand, Literal) else None
    if value is None or isinstance(value, (bool, int, float, complex, np.generic, jax.Array, jax.core.Tracer)):
        return operand
    return Literal(np.array(value, operand.aval.dtype, copy=True), operand.aval)


def _with_own_arrays(program: ClosedJaxpr) -> ClosedJaxpr:
    """Copy the arrays that a program holds as operands, and within loops and branches: they are no constants of it.

    A program that is called twice remains one.
    """
    made_of: dict[int, tuple[Any, Any]] = {}  # by id of the old program, which is kept alive

    def own(value: Any) -> Any:
        """Return a parameter of an equation with its own arrays: itself, if it holds none of the user's."""
        if type(value) in (tuple, list):
            made = type(value)(map(own, value))
            return value if all(map(operator.is_, made, value)) else made
        if not isinstance(value, (ClosedJaxpr, Jaxpr)):
            return value
        if id(value) not in made_of:
            made_of[id(value)] = value, closed(value) if isinstance(value, ClosedJaxpr) else within(value)
        return made_of[id(value)][1]

    def closed(value: ClosedJaxpr) -> ClosedJaxpr:  # from JAX 0.12.0.1, one class with Jaxpr
        theirs = any(not isinstance(x, (jax.Array, jax.core.Tracer)) for x in value.consts)
        inner = within(value.jaxpr)
        return ClosedJaxpr(inner, list(map(_own, value.consts))) if theirs or inner is not value.jaxpr else value

    def within(jaxpr: Jaxpr) -> Jaxpr:
        equations = []
        for equation in jaxpr.eqns:
            params = {key: own(x) for key, x in equation.params.items()}
            invars = list(map(_own_number, equation.invars))
            same = all(map(operator.is_, (*params.values(), *invars), (*equation.params.values(), *equation.invars)))
            equations.append(equation if same else equation.replace(params=params, invars=invars))
        outvars = list(map(_own_number, jaxpr.outvars))
        same = all(map(operator.is_, (*equations, *outvars), (*jaxpr.eqns, *jaxpr.outvars)))
        return jaxpr if same else jaxpr.replace(eqns=equations, outvars=outvars)

    return ClosedJaxpr(within(program.jaxpr), program.consts)


def _without_constants(program: Jaxpr) -> Jaxpr:
    """Turn the constants of a program into its first inputs; from JAX 0.12.0.1, a jaxpr holds their arrays."""
    return program.replace(constvars=[], invars=[*program.constvars, *program.invars])


def _with_outputs(program: Jaxpr, outvars: list[Any]) -> Jaxpr:
    """Keep the equations that these outputs need, and those with effects."""
    needed = {var for var in outvars if not isinstance(var, Literal)}
    kept = []
    for equation in reversed(program.eqns):
        if equation.effects or any(var in needed for var in equation.outvars):
            kept.append(equation)
            needed.update(var for var in equation.invars if not isinstance(var, Literal))
    return program.replace(outvars=list(outvars), eqns=kept[::-1])


def traced_functions(tree: PyTree) -> list[Traced]:
    """Return all traced functions in a pytree."""
    is_function = lambda x: isinstance(x, Traced)
    return [x for x in jax.tree.leaves(tree, is_leaf=is_function) if is_function(x)]


def refuse_transformation(who: str, *arguments: PyTree) -> None:
    """Raise if ``who`` is called while JAX transforms a function around it.

    Args:
        who: Name of the function that is called.
        arguments: Its arguments.

    Raises:
        TypeError: The call is within a transformation. The message says what to do instead.
    """
    leaves = jax.tree.leaves(arguments, is_leaf=lambda x: isinstance(x, Iterator))  # without it JAX warns of iterators
    if any(isinstance(leaf, jax.core.Tracer) for leaf in leaves) or not is_clean():
        raise TypeError(
            f"{who} cannot be called within jax.jit, jax.vmap or jax.grad, since it compiles programs itself and makes "
            "decisions from their results: call it outside; for several data sets or keys in a Python loop, where "
            "equal shapes are compiled once; for several chains pass num_chains."
        )


def is_clean() -> bool:
    """Whether no transformation is under way, as far as JAX reports.

    This complements a look at the arguments, since a closure may contain tracers that the arguments lack.
    """
    try:
        from jax._src.core import trace_state_clean
    except ImportError:  # a private name of JAX, which NumPyro uses too
        return True
    return trace_state_clean()
