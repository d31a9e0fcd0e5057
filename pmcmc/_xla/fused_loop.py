"""Run a loop as one kernel; on CPU, XLA otherwise dispatches every operation of every step separately.

For small models this dispatch takes longer than the arithmetic, and XLA may hand neighbouring operations to two
threads, which then wait for each other. XLA has a pass that compiles loops over less than a kilobyte into one function.
Its threshold cannot be set for a single program, but the attribute with which it marks such loops can.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental.xla_metadata import set_xla_metadata

from pmcmc._typing import Array, PyTree
from pmcmc._xla.compile import default_platform
from pmcmc._xla.content import inner_programs

# Up to this many lanes (chains, or copies of one), one single-threaded kernel is no slower than other programs.
FEW_LANES = 8
# The pass itself skips matrix products, convolutions, scatters, collectives and library calls. Packages may add
# primitives that are library calls, so the primitives known not to be are listed.
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
    """Compute ``fn(*args)`` as one single-threaded kernel if XLA supports it, otherwise unchanged.

    Call it while a program is traced. Sequential sampling of eight schools: 1.9 -> 0.7 us per HMC step, 12 -> 2.6 us
    per NUTS step. It does not pay for many lanes: see docs/decisions/004.
    """
    jitted = jax.jit(fn)  # traced once: later calls find the program
    if default_platform() != "cpu" or not _is_simple(jax.make_jaxpr(jitted)(*jax.tree.map(jax.typeof, args)).jaxpr):
        return jitted(*args)
    return jax.tree.map(_mark, jax.jit(lambda *args: _read_all(args, jitted(*args)))(*args))


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
