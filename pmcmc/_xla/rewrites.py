"""Rewrites of traced programs that make XLA's CPU backend fast and keep it from hanging.

`in_one_kernel` runs a loop as one kernel; otherwise XLA dispatches every operation of every step separately. For small
models this dispatch takes longer than the arithmetic, and XLA may hand neighbouring operations to two threads, which
then wait for each other. XLA has a pass that compiles loops over less than a kilobyte into one function. Its threshold
cannot be set for a single program, but the attribute with which it marks such loops can.

`few_at_a_time` takes batched matrix factorisations in small parts, to avoid a deadlock in jaxlib. On CPU, jaxlib 0.10.0
to 0.11.0 spreads a batch of LAPACK calls over the thread pool that also runs the program, and the calling thread waits
for them. When as many batches are requested at the same time as there are threads, they all wait for one another, for
ever: on two cores, with four Gaussian processes mapped over chains, within ten calls. A small batch is factorised by
the calling thread itself, so a loop over small parts of the batch cannot deadlock. Every large batch is replaced by a
loop, even one that needs the result of another: such a dependence keeps neither XLA nor other threads from requesting
two batches at once.
"""

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from functools import wraps
from typing import Any, NamedTuple
from weakref import WeakKeyDictionary

import jax
import jax.numpy as jnp
import jaxlib.version
from jax.experimental.xla_metadata import set_xla_metadata
from jax.extend.core import ClosedJaxpr, Jaxpr, Literal, jaxpr_as_fun

from pmcmc._pytree import Array, PyTree
from pmcmc._xla import default_platform, evaluate
from pmcmc._xla.content import inner_programs

# Up to this many lanes (chains, or copies of one), one single-threaded kernel is no slower than other programs.
FEW_LANES = 8
# The pass itself skips matrix products, convolutions, scatters, collectives and library calls. Packages may add
# primitives that are library calls, so the primitives known not to be are listed.
ELEMENTWISE = """abs acos acosh add add_any and asin asinh atan atan2 atanh bitcast_convert_type cbrt ceil clamp clz
convert_element_type copy copy_p cos cosh digamma div eq erf erf_inv erfc exp exp2 expm1 floor ge gt integer_pow
is_finite le lgamma log log1p logistic lt max min mul ne neg nextafter not or population_count pow real
reduce_precision rem round rsqrt select_n shift_left shift_right_arithmetic shift_right_logical sign sin sinh sqrt
square stop_gradient sub tan tanh xor"""


_STRUCTURAL = """broadcast_in_dim concatenate dynamic_slice dynamic_update_slice empty expand_dims gather iota
optimization_barrier pad reshape rev slice split squeeze stack tile transpose unstack"""


REDUCTIONS = """argmax argmin cumlogsumexp cummax cummin cumprod cumsum reduce_and reduce_max reduce_min reduce_or
reduce_prod reduce_sum reduce_xor"""


_CALLING = """checkpoint closed_call cond custom_jvp_call custom_vjp_call custom_vjp_call_jaxpr custom_vmap_call jit
pjit remat2 scan while"""


_RANDOM = "random_bits random_fold_in random_seed random_split random_unwrap random_wrap threefry2x32"
_SIMPLE = frozenset(" ".join((ELEMENTWISE, _STRUCTURAL, REDUCTIONS, _CALLING, _RANDOM)).split())


_OWN: ContextVar[bool] = ContextVar("own", default=False)


@contextmanager
def own_program() -> Iterator[None]:
    """Declare that what is traced is compiled with `pmcmc._xla.compile.compiler_options`.

    Without these options jaxlib 0.10 gives reductions to a library, which fails within a kernel ("Fusion kind not
    implemented on CPU").
    """
    token = _OWN.set(True)
    try:
        yield
    finally:
        _OWN.reset(token)


def in_own_program() -> bool:
    """Whether an `own_program` is being traced in this thread."""
    return _OWN.get()


def in_one_kernel(fn: Callable[..., PyTree], *args: PyTree, largest: int | None = None) -> PyTree:
    """Compute ``fn(*args)`` as one single-threaded kernel if XLA supports it, otherwise unchanged.

    Call it while a program is traced. Sequential sampling of eight schools: 1.9 -> 0.7 us per HMC step, 12 -> 2.6 us
    per NUTS step.

    Args:
        fn: Function of pytrees.
        args: Its arguments.
        largest: Numbers that one operation may make; with a larger one, ``fn`` is computed unchanged, since XLA would
            spread that operation over cores. None: any.
    """
    leaves, treedef = jax.tree.flatten(args)
    program, out = jax.make_jaxpr(lambda *x: fn(*jax.tree.unflatten(treedef, x)), return_shape=True)(*leaves)
    # Values of the program around this one become arguments, also those that `fn` closes over. Arrays that are known by
    # now stay constants within the kernel: XLA aborts if they are arguments of more than some 10 kB.
    values = [*program.consts, *leaves]
    is_argument = [isinstance(x, jax.core.Tracer) for x in values]

    def run(*arguments: Any) -> list[Any]:
        rest = iter(arguments)
        filled = [next(rest) if is_arg else x for x, is_arg in zip(values, is_argument, strict=True)]
        number = len(program.consts)
        return jax.core.eval_jaxpr(program.jaxpr, filled[:number], *filled[number:])

    arguments = [x for x, is_arg in zip(values, is_argument, strict=True) if is_arg]
    is_small = largest is None or _largest_result(program.jaxpr) <= largest
    if default_platform() == "cpu" and is_small and _is_simple(program.jaxpr):
        arguments = jax.lax.optimization_barrier(arguments)  # or XLA could find out that one is a constant
        found = list(map(_mark, jax.jit(lambda *x: _read_all(x, run(*x)))(*arguments)))
    else:
        found = jax.jit(run)(*arguments)
    return jax.tree.unflatten(jax.tree.structure(out), found)


def _read_all(args: PyTree, out: PyTree) -> PyTree:
    """Make ``out`` depend on every array of ``args`` in a way that XLA cannot simplify.

    XLA aborts the process if a kernel has an argument that its simplifications leave unused, such as k in 0 * k.
    """
    total = sum((_first_as_integer(x) for x in jax.tree.leaves(args) if x.size), jnp.zeros((), jnp.int32))
    never = total * (total + 1) & 1 == 1  # one of two consecutive integers is even
    leaves, treedef = jax.tree.flatten(out)
    sizes = [(x.size, number) for number, x in enumerate(leaves) if x.size]
    if sizes:
        _, number = min(sizes)
        leaves[number] = jnp.where(never, jnp.zeros_like(leaves[number]), leaves[number])
    return jax.tree.unflatten(treedef, leaves)


def _first_as_integer(x: Array) -> Array:
    """Return the first entry of an array, converted to int32."""
    x = jax.random.key_data(x) if jnp.issubdtype(x.dtype, jax.dtypes.prng_key) else x
    return x[(0,) * x.ndim].real.astype(jnp.int32)


def _mark(result: Any) -> Any:
    """Mark the call that computes a result."""
    return set_xla_metadata(result, xla_cpu_small_call="true", inlineable="false")


def _is_simple(jaxpr: Any) -> bool:
    """Whether a program consists of the listed primitives only."""
    return all(
        equation.primitive.name in _SIMPLE and all(map(_is_simple, inner_programs(equation))) for equation in jaxpr.eqns
    )


def _largest_result(program: Jaxpr) -> int:
    """Return the size of the largest result of an operation; what loops collect of their rounds does not count."""
    sizes = [0]
    for equation in program.eqns:
        inner = list(inner_programs(equation))
        results = [] if inner else [math.prod(getattr(var.aval, "shape", ())) for var in equation.outvars]
        sizes += [*map(_largest_result, inner), *results]
    return max(sizes)


class _Call(NamedTuple):
    """One LAPACK call.

    Attributes:
        ranks: Number of axes that it takes of each operand.
        cost: Upper bound of its operations, in cubes of the longest axis.
    """

    ranks: tuple[int, ...]
    cost: int


# Primitives that call LAPACK.
_LAPACK = {
    "cholesky": _Call((2,), 1),
    "eig": _Call((2,), 64),
    "eigh": _Call((2,), 64),
    "geqp3": _Call((2, 1), 8),
    "geqrf": _Call((2,), 8),
    "hessenberg": _Call((2,), 64),
    "householder_product": _Call((2, 1), 8),
    "lu": _Call((2,), 1),
    "ormqr": _Call((2, 1, 2), 8),
    "qr": _Call((2,), 8),
    "schur": _Call((2,), 64),
    "svd": _Call((2,), 64),
    "triangular_solve": _Call((2, 2), 1),
    "tridiagonal": _Call((2,), 64),
    "tridiagonal_solve": _Call((1, 1, 1, 2), 64),
}


# Number of operations below which these jaxlibs factorise a batch in the calling thread.
_SMALL = 200_000
# Primitives whose inner programs can be replaced.
_CALLS = frozenset(
    " ".join(
        (
            "call checkpoint closed_call composite cond core_call core_closed_call custom_jvp_call custom_linear_solve",
            "custom_vjp_call custom_vmap_call jit linear_call pjit remat2 scan while",
        )
    ).split()
)


def may_wait_for_ever() -> bool:
    """Whether this jaxlib is one of the versions that can deadlock on CPU."""
    return (0, 10, 0) <= jaxlib.version.__version_info__[:3] <= (0, 11, 0)


def few_at_a_time(fn: Callable[..., PyTree]) -> Callable[..., PyTree]:
    """Return ``fn``, to be traced by ``jax.jit``, with loops over small batches."""

    @wraps(fn)
    def traced(*args: Any, **kwargs: Any) -> PyTree:
        leaves, treedef = jax.tree.flatten((args, kwargs))
        is_traced = [isinstance(x, jax.core.Tracer) for x in leaves]

        def of_traced(*given: Any) -> PyTree:
            rest = iter(given)
            filled = [next(rest) if t else x for x, t in zip(leaves, is_traced, strict=True)]
            args, kwargs = jax.tree.unflatten(treedef, filled)
            return fn(*args, **kwargs)

        # Trace as a function of the traced leaves alone, then run the program with its large batches replaced.
        given = [x for x, t in zip(leaves, is_traced, strict=True) if t]
        program, shapes = jax.make_jaxpr(of_traced, return_shape=True)(*given)
        looped = _Loops().instead_of(program)
        return jax.tree.unflatten(jax.tree.structure(shapes), jaxpr_as_fun(looped)(*given))

    return traced


def _batch_shape(name: str, operands: list[Any]) -> tuple[int, ...]:
    """Return the batch axes of the first operand."""
    shape = operands[0].aval.shape
    return shape[: len(shape) - _LAPACK[name].ranks[0]]


def _at_once(name: str, operands: list[Any]) -> int:
    """Number of LAPACK calls that still make a small batch."""
    call = _LAPACK[name]
    longest = max(max(x.aval.shape[-rank:]) for x, rank in zip(operands, call.ranks, strict=True))
    return max(1, (_SMALL - 1) // (call.cost * max(1, longest) ** 3))


def _is_large(equation: Any) -> bool:
    """Whether the equation is a batch that jaxlib would spread over threads."""
    name, operands = equation.primitive.name, equation.invars
    return name in _LAPACK and math.prod(_batch_shape(name, operands)) > _at_once(name, operands)


# Whether a program contains a large batch.
_KNOWN: WeakKeyDictionary[Jaxpr, bool] = WeakKeyDictionary()


def _holds_large(program: Jaxpr) -> bool:
    """Whether a program, or one that it calls, contains a large batch."""
    if program not in _KNOWN:
        called = lambda equation: inner_programs(equation) if equation.primitive.name in _CALLS else ()
        _KNOWN[program] = any(_is_large(e) or any(map(_holds_large, called(e))) for e in program.eqns)
    return _KNOWN[program]


class _Loops:
    """Replaces large batches in programs by loops. A program that is called twice is replaced once."""

    def __init__(self) -> None:
        self._made: dict[int, tuple[Any, ClosedJaxpr]] = {}  # by id of the old program, which is kept alive

    def instead_of(self, program: ClosedJaxpr) -> ClosedJaxpr:
        """Return the program with its large batches replaced."""
        if not _holds_large(program.jaxpr):
            return program
        if id(program) not in self._made:
            run = lambda *args: self._run(program, args)
            self._made[id(program)] = program, jax.make_jaxpr(run)(*program.in_avals)
        return self._made[id(program)][1]

    def _run(self, program: ClosedJaxpr, args: tuple[Any, ...]) -> list[Any]:
        """Evaluate the program equation by equation, with its large batches replaced."""
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
        """Evaluate one equation: a large batch as a loop, a call with its inner programs replaced."""
        if _is_large(equation):
            return _loop(equation, operands)
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


def _loop(equation: Any, operands: list[Any]) -> Any:
    """Factorise one small batch after the other."""
    name = equation.primitive.name
    batch = _batch_shape(name, operands)
    rows = [x.reshape(math.prod(batch), *x.shape[len(batch) :]) for x in operands]
    call = lambda row: equation.primitive.bind(*row, **equation.params)
    size = _at_once(name, operands)
    out = jax.lax.map(call, rows, batch_size=size if size > 1 else None)
    return jax.tree.map(lambda x: x.reshape(*batch, *x.shape[1:]), out)
