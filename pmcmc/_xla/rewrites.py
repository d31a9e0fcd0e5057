"""Loops as one kernel of XLA's CPU backend.

Otherwise XLA dispatches every operation of every step separately. For small
models this dispatch takes longer than the arithmetic, and XLA may hand neighbouring operations to two threads, which
then wait for each other. XLA has a pass that compiles loops over less than a kilobyte into one function. Its threshold
cannot be set for a single program, but the attribute with which it marks such loops can.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental.xla_metadata import set_xla_metadata
from jax.extend.core import Jaxpr

from pmcmc._pytree import Array, PyTree
from pmcmc._xla import default_platform
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
optimization_barrier pad random_unwrap random_wrap reshape rev slice split squeeze stack tile transpose unstack"""


REDUCTIONS = """argmax argmin cumlogsumexp cummax cummin cumprod cumsum reduce_and reduce_max reduce_min reduce_or
reduce_prod reduce_sum reduce_xor"""


_CALLS = "checkpoint closed_call custom_jvp_call custom_vjp_call custom_vjp_call_jaxpr custom_vmap_call jit pjit remat2"


_LOOPS = "cond scan while"


_RANDOM = "random_bits random_fold_in random_seed random_split threefry2x32"
_STRAIGHT = frozenset(" ".join((ELEMENTWISE, _STRUCTURAL, REDUCTIONS, _CALLS)).split())
_SIMPLE = _STRAIGHT | frozenset(" ".join((_LOOPS, _RANDOM)).split())
# Products, and what reading at indices becomes in a gradient.
_WIDE = _SIMPLE | frozenset(
    ["dot_general", "scatter", "scatter-add", "scatter-max", "scatter-min", "scatter-mul", "scatter-sub"]
)


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
    if default_platform() == "cpu" and is_small and _consists_of(_SIMPLE, program.jaxpr):
        arguments = jax.lax.optimization_barrier(arguments)  # or XLA could find out that one is a constant
        found = _called_as_kernel(lambda *x: _read_all(x, run(*x)), arguments, len(program.jaxpr.outvars))
    else:
        found = jax.jit(run)(*arguments)
    return jax.tree.unflatten(jax.tree.structure(out), found)


def _called_as_kernel(fn: Callable[..., list[Any]], arguments: Sequence[Any], num_results: int) -> list[Any]:
    """Call ``fn`` as one kernel.

    A kernel with one result gets another: XLA may cut an only result into parts for several cores, and then passes too
    few arguments to the kernel ("Incorrect number of arguments passed to called function").
    """
    if num_results != 1:
        return list(map(_mark, jax.jit(fn)(*arguments)))
    result, second = map(_mark, jax.jit(lambda *x: [*fn(*x), jnp.zeros((), bool)])(*arguments))
    return [jax.lax.select(second, result, result)]  # reads the second, which JAX would drop otherwise


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


def _consists_of(primitives: frozenset[str], program: Jaxpr) -> bool:
    """Whether a program, with those that it calls, consists of the listed primitives only."""
    return all(
        equation.primitive.name in primitives
        and all(_consists_of(primitives, inner) for inner in inner_programs(equation))
        for equation in program.eqns
    )


def is_straight(program: Jaxpr) -> bool:
    """Whether a program is elementwise apart from reductions and shapes: no loops, branches, products or library calls.

    Hashes of ``jax.random`` are not, since XLA makes loops of them.
    """
    return _consists_of(_STRAIGHT, program)


def gains_from_lanes(program: Jaxpr) -> bool:
    """Whether the operations of a program are those that take less time per lane where lanes are many.

    Factorisations, sorts and calls of the host do not: a lane takes about as long as by itself.
    """
    return _consists_of(_WIDE, program)


def _largest_result(program: Jaxpr) -> int:
    """Return the size of the largest result of an operation; what loops collect of their rounds does not count."""
    sizes = [0]
    for equation in program.eqns:
        inner = list(inner_programs(equation))
        results = [] if inner else [math.prod(getattr(var.aval, "shape", ())) for var in equation.outvars]
        sizes += [*map(_largest_result, inner), *results]
    return max(sizes)
