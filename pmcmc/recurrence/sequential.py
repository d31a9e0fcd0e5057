"""The sequential solver: ``x[t] = fn(x[t-1], inputs[t])``, one step after the other. See `Sequential`."""

import math
from dataclasses import dataclass
from typing import Any, ClassVar

import jax
import jax.numpy as jnp

from pmcmc._pytree import finite_rows, leading_true, real_dtype, register_dataclass, tree_index
from pmcmc._typing import Array
from pmcmc.recurrence.lanes import Lanes, LaneSolver, walk
from pmcmc.recurrence.problem import Problem
from pmcmc.recurrence.solution import RESULTS, Solution, Stats

# Steps per chunk, where the number of steps is traced.
CHUNK = 128


@register_dataclass
@dataclass(frozen=True)
class Sequential(LaneSolver):
    """Evaluate ``x[t] = fn(x[t-1], inputs[t])`` sequentially, t = 1..T, by one scan.

    Several chains run as lanes of the same scan. It needs neither a guess nor contraction: it is the reference for
    tests of all parallel solvers, and the fallback where a parallel solve would not pay.

    Example:
        >>> import jax.numpy as jnp, pmcmc
        >>> solution = pmcmc.recurrence.Sequential().solve(lambda x, u: 0.5 * x + u, 0.0, jnp.ones(3))
        >>> solution.value
        Array([1.  , 1.5 , 1.75], dtype=float32)
    """

    is_sequential: ClassVar[bool] = True
    unit: ClassVar[int] = CHUNK

    @property
    def decision(self):
        return "sequential"

    def blocks_for(self, length):
        return 1

    def solve_problem(self, problem: Problem) -> Solution:
        recurrence = problem.recurrence

        def body(carry, u):
            carry, aux = recurrence.step(carry, u)
            return carry, (recurrence.unknown(carry), aux)

        def one_chain(x0, inputs):
            return jax.lax.scan(body, recurrence.restore(x0), inputs, length=problem.length)[1]

        if problem.num_chains == 1:  # without a lane axis the step of a small model is cheaper
            single = one_chain(tree_index(problem.x0, 0), tree_index(problem.inputs, 0))
            value, aux = jax.tree.map(lambda x: x[None], single)
        else:
            value, aux = jax.vmap(one_chain)(problem.x0, problem.inputs)
        finite = finite_rows(value, 2) & finite_rows(problem.x0)[:, None]
        return _conclude(value, aux, leading_true(finite), problem.length)

    def solve_lanes(self, lanes: Lanes) -> Solution:
        """Solve like `solve_problem`, for a number of steps that may be traced; one lane per chain."""
        recurrence, layout = lanes.recurrence, lanes.layout

        def one(carry: Any, u: Any) -> Any:
            carry, aux = recurrence.step(carry, u)
            return carry, (recurrence.unknown(carry), aux)

        if layout.num_chains == 1:
            first, add = lambda tree: tree_index(tree, 0), lambda tree: jax.tree.map(lambda x: x[None], tree)

            def step(carry, u):
                carry, record = one(carry, first(u))
                return carry, add(record)

            start = recurrence.restore(first(lanes.x0))
            shape, _ = jax.eval_shape(one, start, jax.tree.map(lambda x: x[0, 0], lanes.inputs))
        else:
            step, start = jax.vmap(one), jax.vmap(recurrence.restore)(lanes.x0)
            shape, _ = jax.eval_shape(step, start, jax.tree.map(lambda x: x[:, 0], lanes.inputs))
        start = jax.tree.map(lambda s, c: jnp.asarray(s, c.dtype), start, shape)
        _, (value, aux) = walk(step, start, lanes, math.gcd(layout.capacity, self.unit))
        within = jnp.arange(layout.capacity)[None] < layout.length
        finite = (finite_rows(value, 2) | ~within) & finite_rows(lanes.x0)[:, None]
        return _conclude(value, aux, jnp.minimum(leading_true(finite), layout.length), layout.length)


def _conclude(value: Any, aux: Any, finite_steps: Array, length: int | Array) -> Solution:
    """Return the solution, given the length of the finite prefix of each chain, ``finite_steps`` (C,)."""
    steps = jnp.full(finite_steps.shape, length)
    none = jnp.zeros_like(steps)
    finite, dtype = finite_steps == length, real_dtype(value)
    return Solution(
        value=value,
        aux=aux,
        result=jnp.where(finite, RESULTS.successful, RESULTS.nonfinite),
        residual=jnp.where(finite, 0.0, jnp.inf).astype(dtype),
        stats=Stats(
            num_iters=none,
            num_sweeps=none,
            num_sequential_steps=steps,
            num_fn_evals=steps,
            certified_steps=finite_steps,
            growth_rate=jnp.full(steps.shape, jnp.nan, dtype),
            certified_residual=jnp.zeros(steps.shape, dtype),
        ),
    )
