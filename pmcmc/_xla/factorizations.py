"""Batches of matrix factorisations in small parts, because some versions of jaxlib deadlock on large ones.

On CPU, jaxlib 0.10.0 to 0.11.0 spreads a batch of LAPACK calls over the thread pool that also runs the program, and the
calling thread waits for them. When as many batches are requested at the same time as there are threads, they all wait
for one another, for ever: on two cores, with four Gaussian processes mapped over chains, within ten calls. A small
batch is factorised by the calling thread itself, so a loop over small parts of the batch cannot deadlock. Every large
batch is replaced by a loop, even one that needs the result of another: such a dependence keeps neither XLA nor other
threads from requesting two batches at once.
"""

import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jaxlib.version

from pmcmc._xla import evaluate


def may_wait_for_ever() -> bool:
    """Whether this jaxlib is one of the versions that can deadlock on CPU."""
    return (0, 10, 0) <= jaxlib.version.__version_info__[:3] <= (0, 11, 0)


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


def _batch_shape(name: str, operands: Sequence[Any]) -> tuple[int, ...]:
    """Return the batch axes of the first operand."""
    shape = operands[0].aval.shape
    return shape[: len(shape) - _LAPACK[name].ranks[0]]


def _at_once(name: str, operands: Sequence[Any]) -> int:
    """Number of LAPACK calls that still make a small batch."""
    call = _LAPACK[name]
    longest = max(max(x.aval.shape[-rank:]) for x, rank in zip(operands, call.ranks, strict=True))
    return max(1, (_SMALL - 1) // (call.cost * max(1, longest) ** 3))


def _is_large(equation: Any) -> bool:
    """Whether the equation is a batch that jaxlib would spread over threads."""
    name, operands = equation.primitive.name, equation.invars
    return name in _LAPACK and math.prod(_batch_shape(name, operands)) > _at_once(name, operands)


def in_small_parts(equation: Any) -> Callable[..., Any] | None:
    """Return the loop that factorises one small batch after the other; None if the batch is small.

    A rule of `pmcmc._xla.equations`.
    """
    return partial(_loop, equation) if _is_large(equation) else None


def _loop(equation: Any, *operands: Any) -> Any:
    """Factorise one small batch after the other."""
    name = equation.primitive.name
    batch = _batch_shape(name, operands)
    rows = [x.reshape(math.prod(batch), *x.shape[len(batch) :]) for x in operands]
    size = _at_once(name, operands)
    out = jax.lax.map(partial(evaluate, equation), rows, batch_size=size if size > 1 else None)
    return jax.tree.map(lambda x: x.reshape(*batch, *x.shape[1:]), out)


RULES = dict.fromkeys(_LAPACK, in_small_parts)
