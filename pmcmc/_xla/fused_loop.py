"""A loop as one kernel: on a CPU, XLA otherwise dispatches every operation of every step by itself.

For small models that dispatch takes longer than the arithmetic, and XLA may hand neighbouring operations to two
threads, which then wait for each other. XLA has a pass that compiles loops over less than a kilobyte into one function;
its threshold is out of reach of a single program, but what it marks loops with is not.
"""

from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental.xla_metadata import set_xla_metadata

from pmcmc._typing import Array, PyTree
from pmcmc._xla.compile import default_platform

# Chains, or copies of one, that one kernel of one thread takes through their steps no slower than other programs would.
FEW_LANES = 8


# What the pass itself would leave alone are matrix products, convolutions, scatters, collectives and calls of
# libraries. Packages may add primitives that are such calls, so those known to be none are listed.
_ELEMENTWISE = """abs acos acosh add add_any and asin asinh atan atan2 atanh bitcast_convert_type cbrt ceil clamp clz
convert_element_type copy copy_p cos cosh digamma div eq erf erf_inv erfc exp exp2 expm1 floor ge gt integer_pow
is_finite le lgamma log log1p logistic lt max min mul ne neg nextafter not or population_count pow real
reduce_precision rem round rsqrt select_n shift_left shift_right_arithmetic shift_right_logical sign sin sinh sqrt
square stop_gradient sub tan tanh xor"""


_STRUCTURAL = """broadcast_in_dim concatenate dynamic_slice dynamic_update_slice empty expand_dims gather iota
optimization_barrier pad reshape rev slice split squeeze stack tile transpose unstack"""


_REDUCTIONS = """argmax argmin cumlogsumexp cummax cummin cumprod cumsum reduce_and reduce_max reduce_min reduce_or
reduce_prod reduce_sum reduce_xor"""


_CALLS = """checkpoint closed_call cond custom_jvp_call custom_vjp_call custom_vjp_call_jaxpr custom_vmap_call jit pjit
remat2 scan while"""


_RANDOM = "random_bits random_fold_in random_seed random_split random_unwrap random_wrap threefry2x32"


_SIMPLE = frozenset(" ".join((_ELEMENTWISE, _STRUCTURAL, _REDUCTIONS, _CALLS, _RANDOM)).split())


def in_one_kernel(fn: Callable[..., PyTree], *args: PyTree) -> PyTree:
    """``fn(*args)``, within a program, by one kernel of one thread where XLA can do that; else as ever.

    Eight schools in order: 1.9 -> 0.7 us a step of HMC, 12 -> 2.6 of NUTS. Not for many lanes: see docs/decisions/004.
    """
    jitted = jax.jit(fn)  # traced once: later calls find the program
    if default_platform() != "cpu" or not _is_simple(jax.make_jaxpr(jitted)(*jax.tree.map(jax.typeof, args)).jaxpr):
        return jitted(*args)
    return jax.tree.map(_mark, jax.jit(lambda *args: _read_all(args, jitted(*args)))(*args))


def _read_all(args: PyTree, out: PyTree) -> PyTree:
    """``out``, made to depend on every array of ``args`` in a way that XLA cannot see through.

    XLA aborts the process where a kernel has an argument that its simplifications leave unused, such as k in 0 * k.
    """
    total = sum((_first_as_integer(x) for x in jax.tree.leaves(args) if x.size), jnp.zeros((), jnp.int32))
    never = total * (total + 1) & 1 == 1  # one of two neighbours is even
    leaves, treedef = jax.tree.flatten(out)
    sizes = [(x.size, number) for number, x in enumerate(leaves) if x.size]
    if sizes:
        _, number = min(sizes)
        leaves[number] = jnp.where(never, jnp.zeros_like(leaves[number]), leaves[number])
    return jax.tree.unflatten(treedef, leaves)


def _first_as_integer(x: Array) -> Array:
    """Whatever an array begins with."""
    x = jax.random.key_data(x) if jnp.issubdtype(x.dtype, jax.dtypes.prng_key) else x
    return x[(0,) * x.ndim].real.astype(jnp.int32)


def _mark(result: Any) -> Any:
    """Mark the call behind a result."""
    return set_xla_metadata(result, xla_cpu_small_call="true", inlineable="false")


def _is_simple(jaxpr: Any) -> bool:
    return all(
        equation.primitive.name in _SIMPLE and all(map(_is_simple, _inner(equation.params))) for equation in jaxpr.eqns
    )


def _inner(params: dict[str, Any]) -> Iterator[Any]:
    """Programs among an equation's parameters."""
    for value in params.values():
        for one in value if isinstance(value, (tuple, list)) else (value,):
            inner = getattr(one, "jaxpr", one)
            if hasattr(inner, "eqns"):
                yield inner
