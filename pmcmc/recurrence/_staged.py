"""Lanes that advance apart: none waits for the slowest step among them.

Where a step takes a varying number of stages (a NUTS tree), lanes that step together all wait for the longest in
every step. Here each keeps a step number of its own, reads the input of that step and, when the step ends, reports
it; only at the end of the walk do lanes wait, for the largest sum of stages over a block. What a lane computes is what
it would have computed in step with the others.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from pmcmc._types import Array, PyTree
from pmcmc.recurrence._base import Staged
from pmcmc.recurrence._lanes import read_step

# Ended steps are reported and new ones begun when this share of the lanes waits for it.
SHARE = 0.1


def walk_apart(
    staged: Staged, inputs: PyTree, start: PyTree, state: Any, going: Callable, visit: Callable
) -> tuple[PyTree, Any]:
    """Take steps until no lane is going; returns the carries where each stopped, and the last state.

    start: carries. inputs: (lanes, capacity, ...). state: of the caller, with a field ``step``, (lanes,): the number of
    the step that each lane is in. going: ``state -> (lanes,)``, which lanes have a step to take.
    visit: ``(state, carry, aux, arrived) -> state`` for the lanes whose step has ended, the only ones whose number may
    change.
    """

    def body(loop: Any) -> Any:
        state, work = loop
        under_way = going(state)
        enough = jnp.ceil(SHARE * jnp.sum(under_way))

        def few_wait(work: PyTree) -> Array:
            return jnp.sum(under_way & staged.finished(work)) < enough

        work = jax.lax.while_loop(few_wait, staged.advance, work)
        arrived = under_way & staged.finished(work)
        carry, aux = staged.conclude(work)
        state = visit(state, carry, aux, arrived)
        begun = staged.begin(carry, read_step(inputs, state.step))
        again = arrived & going(state)
        wide = lambda x: again.reshape((1,) * (x.ndim - 1) + again.shape)
        return state, jax.tree.map(lambda new, old: jnp.where(wide(new), new, old), begun, work)

    work = staged.begin(start, read_step(inputs, state.step))
    state, work = jax.lax.while_loop(lambda loop: jnp.any(going(loop[0])), body, (state, work))
    return staged.conclude(work)[0], state
