"""The reference: one step after the other."""

from dataclasses import dataclass

import jax
import jax.numpy as jnp

from pmcmc._tree import finite_rows, leading_true, tree_index
from pmcmc.recurrence._base import RESULTS, Problem, RecurrenceSolver, Solution, Stats


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Sequential(RecurrenceSolver):
    """Evaluate ``x[t] = fn(x[t-1], inputs[t])`` for t = 1, 2, ..., T in order, by one scan.

    Several chains run as lanes of the same scan. Needs no guess and no contraction: the twin that every
    parallel solver is tested against, and the fallback where parallel would not pay.

    Example:
        >>> import jax.numpy as jnp, pmcmc
        >>> solution = pmcmc.recurrence.Sequential().solve(lambda x, u: 0.5 * x + u, 0.0, jnp.ones(3))
        >>> solution.value
        Array([1.  , 1.5 , 1.75], dtype=float32)
    """

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
        steps = jnp.full(problem.num_chains, problem.length)
        none = jnp.zeros_like(steps)
        return Solution(
            value=value,
            aux=aux,
            result=jnp.where(jnp.all(finite, 1), RESULTS.successful, RESULTS.nonfinite),
            residual=jnp.where(jnp.all(finite, 1), 0.0, jnp.inf).astype(problem.dtype),
            stats=Stats(
                num_iters=none,
                num_sweeps=none,
                num_sequential_steps=steps,
                num_fn_evals=steps,
                certified_steps=leading_true(finite),
                growth_rate=jnp.full(problem.num_chains, jnp.nan, problem.dtype),
            ),
        )
