"""Which solver "auto" takes: shooting where a short pilot of coupled chains merges well within the run."""

import math
from typing import NamedTuple

import jax
import numpy as np

from pmcmc._jit import tuned_jit
from pmcmc._types import Array, PRNGKey, PyTree
from pmcmc.kernels import Kernel
from pmcmc.recurrence import MultipleShooting, RecurrenceSolver, Sequential
from pmcmc.stability import Coalescence, coalescence_time
from pmcmc.target import Target

MAX_PILOT_STEPS = 1000
# A run must be this many times longer than its slowest merge before blocks of it are worth repairing.
MIN_RUN_OVER_MERGE = 32
# Sweeps "auto" allows before it finishes sequentially: where merges arrive as in the pilot, two or three suffice.
MAX_SWEEPS = 8


class Decision(NamedTuple):
    """solver, and one sentence why. coalescence_steps: of the pilot's pairs."""

    solver: RecurrenceSolver
    reason: str
    coalescence_steps: np.ndarray


@tuned_jit(static_argnames="num_steps")
def run_pilot(target: Target, kernel: Kernel, rng_key: PRNGKey, states: PyTree, scale: Array, *, num_steps: int):
    """Couple the first half of the ensemble's lanes with the second half, under common noise."""
    num_pairs = jax.tree.leaves(states)[0].shape[0] // 2
    keys = jax.vmap(lambda key: jax.random.split(key, num_pairs))(jax.random.split(rng_key, num_steps))
    noise = jax.vmap(jax.vmap(lambda key: kernel.sample_noise(key, target)))(keys)
    first = jax.tree.map(lambda x: x[:num_pairs], states)
    second = jax.tree.map(lambda x: x[num_pairs : 2 * num_pairs], states)
    return coalescence_time(kernel.transition(target), first, second, noise, scale=scale, num_checkpoints=0)


def decide(pilot: Coalescence | None, num_steps: int, length: int, num_chains: int, pilot_steps: int) -> Decision:
    """Shooting if every pair of the pilot merged within 1/32 of the run, solved ``length`` steps at a time."""
    if pilot is None:
        return Decision(
            Sequential(),
            f"A run of {num_steps:,} steps without a warmed-up ensemble is sampled sequentially: nothing is known of "
            "how coupled chains merge.",
            np.zeros(0, int),
        )
    steps = np.asarray(pilot.steps)
    merged = steps <= pilot_steps
    if not merged.all():
        reason = (
            f"Only {merged.sum()} of {merged.size} coupled pairs of chains merged within {pilot_steps:,} steps, so "
            "blocks of this chain would not join."
        )
        return Decision(Sequential(), reason, steps)
    slowest = int(steps.max())
    if length < MIN_RUN_OVER_MERGE * slowest:
        reason = (
            f"Coupled chains take up to {slowest:,} steps to merge: too many for a run of {num_steps:,} steps to gain "
            "by blocks."
        )
        return Decision(Sequential(), reason, steps)
    blocks = choose_num_blocks(length, slowest, num_chains)
    reason = (
        f"All {merged.size} coupled pairs of chains merged within {slowest:,} steps (median "
        f"{int(np.median(steps)):,}), well within {num_steps:,}."
    )
    return Decision(MultipleShooting(num_blocks=blocks, max_sweeps=MAX_SWEEPS), reason, steps)


def choose_num_blocks(num_steps: int, slowest_merge: int, num_chains: int) -> int:
    """P near the minimum of (T/P + t_c)(a + b C P), a power of two, with blocks of at least two merges.

    a: the overhead of a step whatever its lanes, b: the cost of one lane in it. On two CPU cores a/b was 50-150
    lanes on models of 2 to 25 dimensions; on a GPU it is thousands.
    """
    overhead_in_lanes = 128 if jax.default_backend() == "cpu" else 8192
    best = math.sqrt(num_steps * overhead_in_lanes / (max(slowest_merge, 1) * num_chains))
    best = max(2.0, min(best, num_steps / (2 * max(slowest_merge, 8))))
    return 2 ** int(math.log2(best))
