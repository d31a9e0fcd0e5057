"""Two compiled programs: draw the noise of a stretch of steps, solve for its states."""

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp

from pmcmc._jit import tuned_jit
from pmcmc._threefry import fold_in, key_pair
from pmcmc._types import Array, PyTree
from pmcmc.kernels import Kernel
from pmcmc.recurrence import RecurrenceSolver, Solution
from pmcmc.target import Target


class Segment(NamedTuple):
    """The states of steps ``first_step .. first_step + num_steps - 1`` of every chain, and the solve behind them."""

    solution: Solution  # value and aux: leading axes (chains, steps)
    near_ties: Array  # (chains, steps) accept decisions within rounding of a tie


def step_noise(kernel: Kernel, target: Target, chain_key: Array, steps: Array) -> PyTree:
    """Noise of the given steps: a function of the chain's key and the step's number alone."""
    keys = jax.vmap(partial(fold_in, key_pair(chain_key)))(steps)
    return jax.vmap(lambda key: kernel.sample_noise(key, target))(keys)


@tuned_jit(static_argnames="num_steps")
def draw_noise(target: Target, kernel: Kernel, chain_keys: Array, first_step: Array, *, num_steps: int) -> PyTree:
    """Noise of ``num_steps`` steps of all chains from number ``first_step`` on, leading axes (C, num_steps).

    chain_keys: (C,) keys. A program of its own: drawn within `solve_segment` it cost 14 of 61 ms on 10^6 MALA steps.
    """
    steps = first_step + jnp.arange(num_steps)
    return jax.vmap(lambda key: step_noise(kernel, target, key, steps))(chain_keys)


@tuned_jit()
def solve_segment(
    target: Target,
    kernel: Kernel,
    solver: RecurrenceSolver,
    noise: PyTree,
    x0: PyTree,
    first_step: Array,
    guesses: PyTree,
    scale: PyTree,
) -> Segment:
    """The states of all chains under ``noise``, leading axes (C, T).

    x0: unknowns, leading axis C. first_step: number of the first step.
    guesses: a bank of unknowns, leading axis N, from which initial guesses are drawn (they cannot change the result).
    """
    num_chains = jax.tree.leaves(x0)[0].shape[0]
    num_guesses = jax.tree.leaves(guesses)[0].shape[0]

    def guess(index):
        # neighbouring steps get different guesses, and so does the same step of different chains
        pick = (jnp.arange(num_chains)[:, None] * 7919 + (first_step + index)[None] * 31) % num_guesses
        return jax.tree.map(lambda x: x[pick], guesses)

    solution = solver.solve_batch(kernel.transition(target), x0, noise, initial_guess=guess, scale=scale)
    info = solution.aux
    eps = jnp.finfo(info.margin.dtype).eps
    # log alpha is a difference of log densities: it carries a few roundings at their size
    near = jnp.abs(info.margin) <= 4 * eps * jnp.maximum(1.0, jnp.abs(info.logdensity))
    return Segment(solution, near)
