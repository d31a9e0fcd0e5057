"""The user's functions as they were when a run began: traced once, with their arrays as data.

A Python function may read anything: an attribute, a closure, a global, a column of a data frame. Two calls of the same
function object need not compute the same thing, so no program may be found again by the function alone. Here a function
is traced at the call. The arrays that it reads become leaves (``constants``), and the rest, the `Trace`, is compared by
its content: operations, shapes and numbers. So

- a function that has changed has another trace, and programs are compiled for it;
- other arrays of the same shapes are other leaves, and nothing is compiled;
- what was traced stays as it was, whatever becomes of the user's objects.

What JAX itself remembers is out of reach: a function that the user's own code hands to ``jax.jit`` or ``jax.lax.scan``
is traced by JAX once for each function object, here as in NumPyro.
"""

import hashlib
from collections import OrderedDict
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any
from weakref import WeakValueDictionary

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend.core import ClosedJaxpr, Jaxpr, Literal

from pmcmc._pytree import register_dataclass
from pmcmc._typing import Array, PyTree
from pmcmc._xla.content import Content, Place, shape_of

# Calls of functions that the user's own code has jitted.
_JIT = ("jit", "pjit")


# Bytes from which on an array that occurs twice is kept once.
_LARGE = 4096


class Trace:
    """What a function does to arguments of given shapes and dtypes, without the arrays that it read.

    Two traces of equal content are equal, and usually one object.
    """

    def __init__(
        self, program: Jaxpr, reads: tuple[int, ...], in_tree: Any, out_tree: Any, operations: tuple, held: tuple = ()
    ):
        """operations: see `Content`. reads: of each constant of the program, its number among those handed over.

        held: numbers of the program by place, None for those that it reads: the last of its constants.
        """
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
        """The function's value, with these arrays in the place of those that it read."""
        leaves, in_tree = jax.tree.flatten(args)
        if in_tree != self.in_tree:
            raise TypeError(f"this function was traced for arguments of structure {self.in_tree}, got {in_tree}.")
        given = [_fitted(x, var.aval) for x, var in zip(leaves, self.program.invars, strict=True)]
        read = [constants[number] for number in self._reads]
        return jax.tree.unflatten(self.out_tree, jax.core.eval_jaxpr(self.program, read, *given))

    @property
    def out_shapes(self) -> PyTree:
        """Shapes and dtypes of what the function returns."""
        avals = [var.aval for var in self.program.outvars]
        return jax.tree.unflatten(self.out_tree, [jax.ShapeDtypeStruct(*shape_of(aval)[:2]) for aval in avals])

    def part(self, name: str) -> "Trace":
        """One entry of the dict that the function returns, without what only others need.

        It takes the constants of the whole.
        """
        if name not in self._parts:
            outputs = jax.tree.unflatten(self.out_tree, self.program.outvars)[name]
            outvars, out_tree = jax.tree.flatten(outputs)
            program = _with_outputs(self.program, outvars)
            operations = (self.operations, name)
            self._parts[name] = Trace(program, self._reads, self.in_tree, out_tree, operations, self._held)
        return self._parts[name]

    def content(self, constants: list[Array]) -> tuple[tuple, tuple]:
        """What is computed, and with which numbers; the same whether a number is held or read."""
        read = [Content().of_value(constants[number]) for number in self._reads]
        num_scalars = sum(value is None for _, value in self._held)
        arrays, scalars = read[: len(read) - num_scalars], iter(read[len(read) - num_scalars :])
        return self.operations, (
            tuple((place, next(scalars) if value is None else value) for place, value in self._held),
            tuple(arrays),
        )


def _fitted(x: Any, aval: Any) -> Any:
    if jnp.shape(x) != aval.shape:
        raise TypeError(f"this function was traced for an argument of shape {aval.shape}, got {jnp.shape(x)}.")
    return x if getattr(x, "dtype", None) == aval.dtype else jnp.asarray(x, aval.dtype)


@register_dataclass
@dataclass(frozen=True)
class Untraced:
    """A function of the user's that was not traced yet: a pytree without leaves, compared by identity."""

    fn: Callable = field(metadata=dict(static=True))

    def __call__(self, *args: Any) -> Any:
        return self.fn(*args)

    def at(self, *args: PyTree) -> "Traced":
        """As it is now, for arguments like these."""
        return trace(self.fn, *args)


@register_dataclass
@dataclass(frozen=True)
class Traced:
    """A function of the user's as it was when it was traced: a pytree whose leaves are the arrays that it read."""

    trace: Trace = field(metadata=dict(static=True))
    constants: list[Array]

    def __call__(self, *args: PyTree) -> PyTree:
        return self.trace(self.constants, *args)

    def at(self, *args: PyTree) -> "Traced":
        return self

    @property
    def content(self) -> tuple[tuple, tuple]:
        """See `Trace.content`: equal for functions that compute the same."""
        return self.trace.content(self.constants)


def trace(fn: Callable, *args: PyTree) -> Traced:
    """``fn`` as it is now.

    Args:
        fn: any function that JAX can trace.
        args: its arguments, arrays or shapes.
    """
    shapes: Any = None

    def fresh(*args: Any) -> Any:  # a new object at each call: JAX remembers the traces of old ones
        nonlocal shapes
        out = fn(*args)
        shapes = jax.tree.structure(out)
        return out

    program = jax.make_jaxpr(fresh)(*args)
    if _hides_constants(program.jaxpr):
        program = jax.make_jaxpr(lambda *leaves: _replay(program, leaves))(*program.in_avals)
    program = _needed(program)
    content, scalars = Content().of_whole(program.jaxpr)
    varying = _varying(hash(content), scalars)
    if varying:
        program = _with_scalars_read(program, varying)
    constants, reads = _distinct(program.consts)
    in_tree = jax.tree.structure(args)
    held = tuple((place, None if place in varying else value) for place, value in scalars.items())
    made = Trace(program.jaxpr, reads, in_tree, shapes, content, held)
    return Traced(_KNOWN.setdefault(made.key, made), constants)


# Traces that are in use, by their content.
_KNOWN: WeakValueDictionary[tuple, Trace] = WeakValueDictionary()


# Numbers that a program has not read but holds: those of earlier traces that were equal but for them, by place, and the
# places where they have differed. Any places would be right; which they are decides what is compiled anew.
_MAX_SEEN = 256


_seen: OrderedDict[int, tuple[dict, set]] = OrderedDict()


def _varying(content: int, scalars: dict[Place, tuple]) -> tuple[Place, ...]:
    """Where a program's numbers were not always the same: there they are data, such as the mean of a column."""
    first, places = _seen.setdefault(content, (scalars, set()))
    _seen.move_to_end(content)
    if len(_seen) > _MAX_SEEN:
        _seen.popitem(last=False)
    places.update(place for place, value in scalars.items() if first.get(place) != value)
    return tuple(sorted(places & scalars.keys()))


def _replay(program: ClosedJaxpr, args: Iterable[Any], read: dict[Place, Any] | None = None) -> list[Any]:
    """The program's results, with calls of jitted functions that hold arrays in line.

    read: operands in the place of numbers.
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
                out = equation.primitive.bind(*operands, **equation.primitive.get_bind_params(equation.params))
                out = out if equation.primitive.multiple_results else [out]
        values |= zip(equation.outvars, out, strict=True)
    return list(map(get, program.jaxpr.outvars))


def _holds_arrays(program: ClosedJaxpr) -> bool:
    return bool(program.consts) or _hides_constants(program.jaxpr)


def _hides_constants(program: Jaxpr) -> bool:
    """Whether a jitted function that it calls holds arrays."""
    return any(e.primitive.name in _JIT and _holds_arrays(e.params["jaxpr"]) for e in program.eqns)


def _with_scalars_read(program: ClosedJaxpr, places: tuple[Place, ...]) -> ClosedJaxpr:
    """Numbers of the program as constants that it reads."""
    held = {place: program.jaxpr.eqns[place[0]].invars[place[1]] for place in places}
    scalars = [np.array(var.val, var.aval.dtype) for var in held.values()]
    run = lambda scalars, leaves: _replay(program, leaves, dict(zip(held, scalars, strict=True)))
    made = jax.make_jaxpr(run)(scalars, list(program.in_avals))
    invars, number = made.jaxpr.invars, len(scalars)
    constvars = [*made.jaxpr.constvars, *invars[:number]]
    return ClosedJaxpr(made.jaxpr.replace(constvars=constvars, invars=invars[number:]), [*made.consts, *scalars])


def _needed(program: ClosedJaxpr) -> ClosedJaxpr:
    """The program without equations and constants that nothing needs."""
    kept = _with_outputs(program.jaxpr, program.jaxpr.outvars)
    read = {var for equation in kept.eqns for var in equation.invars if not isinstance(var, Literal)}
    read.update(var for var in kept.outvars if not isinstance(var, Literal))
    values = {v: x for v, x in zip(program.jaxpr.constvars, program.consts, strict=True) if v in read}
    return ClosedJaxpr(kept.replace(constvars=list(values)), list(values.values()))


def _distinct(constants: list[Any]) -> tuple[list[Array], tuple[int, ...]]:
    """Each array once, as a copy where the user's could change it, and which one each of ``constants`` is."""
    kept: list[Any] = []
    reads = []
    for constant in constants:
        same = (number for number, other in enumerate(kept) if _is_same(constant, other))
        reads.append(next(same, len(kept)))
        if reads[-1] == len(kept):
            kept.append(constant)
    return list(map(_own, kept)), tuple(reads)


def _is_same(a: Any, b: Any) -> bool:
    """Whether two arrays are one in memory, or large and the same bit for bit."""
    if a is b or a.shape != b.shape or a.dtype != b.dtype or _is_opaque(a) or _is_opaque(b):
        return a is b
    a, b = np.asarray(a), np.asarray(b)
    place = lambda x: (x.__array_interface__["data"][0], x.strides)
    if place(a) == place(b) or a.nbytes < _LARGE:
        return place(a) == place(b)
    first, second = (np.ascontiguousarray(x).reshape(-1).view(np.uint8) for x in (a, b))
    return bool(np.array_equal(first, second))


def _is_opaque(x: Any) -> bool:
    """Whether the numbers of an array are not to be had here, or only by a copy from another device."""
    if isinstance(x, jax.core.Tracer) or jnp.issubdtype(x.dtype, jax.dtypes.prng_key):
        return True
    return isinstance(x, jax.Array) and any(device.platform != "cpu" for device in x.devices())


def _own(constant: Any) -> Array:
    """An array that changes with nothing of the user's."""
    if isinstance(constant, (jax.Array, jax.core.Tracer)):
        return constant
    return jnp.asarray(np.array(constant, copy=True))


def _with_outputs(program: Jaxpr, outvars: list[Any]) -> Jaxpr:
    """The equations that some outputs need, and those with effects."""
    needed = {var for var in outvars if not isinstance(var, Literal)}
    kept = []
    for equation in reversed(program.eqns):
        if equation.effects or any(var in needed for var in equation.outvars):
            kept.append(equation)
            needed.update(var for var in equation.invars if not isinstance(var, Literal))
    return program.replace(outvars=list(outvars), eqns=kept[::-1])


def traced_functions(tree: PyTree) -> list[Traced]:
    """All traced functions in a pytree."""
    is_function = lambda x: isinstance(x, Traced)
    return [x for x in jax.tree.leaves(tree, is_leaf=is_function) if is_function(x)]


def digest(value: Any) -> str:
    """A short text for a trace, arrays, or tuples of them, in every process with one version of JAX the same."""
    return hashlib.sha256(_stable(Content().of_value(value)).encode()).hexdigest()


def _stable(value: Any) -> str:
    """Text of a content without addresses."""
    if isinstance(value, Trace):
        return _stable(value.key)
    if isinstance(value, tuple):
        return f"({','.join(map(_stable, value))})"
    if isinstance(value, (str, bytes, int)):
        return repr(value)
    if isinstance(value, type):
        return value.__qualname__
    text = repr(value)
    return type(value).__qualname__ if " at 0x" in text else text


def refuse_transformation(who: str, *arguments: PyTree) -> None:
    """Raise where ``who`` is called while JAX transforms a function around it.

    Raises:
        TypeError: with what to do instead.
    """
    if any(isinstance(leaf, jax.core.Tracer) for leaf in jax.tree.leaves(arguments)) or not _is_clean():
        raise TypeError(
            f"{who} cannot be called within jax.jit, jax.vmap or jax.grad, since it compiles programs of its own and "
            "decides by what they return: call it outside; for several data sets or keys in a Python loop, where equal "
            "shapes are compiled once; for several chains pass num_chains."
        )


def _is_clean() -> bool:
    """No transformation is under way, as far as JAX tells: a closure may hold what its arguments do not show."""
    try:
        from jax._src.core import trace_state_clean
    except ImportError:  # a private name, which NumPyro uses too
        return True
    return trace_state_clean()
