"""The pilot: the chain's own first steps, and partners that follow them from elsewhere under the same noise.

The first steps are sampled sequentially and stand. They are timed, and other states of the warm-up's ensemble take the
same steps with the same noise by the same program, so a pilot compiles nothing and wastes only the partners' steps.

The chains are `LAG` steps ahead of their partners: both start as warm-up left them, but the chains have moved on before
they share their noise. So the distances of the pairs also bound the bias left after warm-up (see
`pmcmc.stability.wasserstein_bound`).
"""

import math

import jax
import jax.numpy as jnp
import numpy as np

from pmcmc._types import PyTree
from pmcmc.recurrence import Sequential
from pmcmc.recurrence._base import default_tolerance
from pmcmc.sampling._engine import Shape
from pmcmc.sampling._run import Run
from pmcmc.stability import Coalescence, wasserstein_bound
from pmcmc.stability._paths import coalescence_of_paths

# A stretch of sequential sampling this long is timed well enough.
TIMING_SECONDS = 0.05
# Pairs to couple, and the share of the run that their partners' steps may take.
NUM_PAIRS, SHARE = 32, 0.03
# Steps that the chains are ahead of their partners.
LAG = 32
# Steps after which the partners look whether all have merged.
STAGES = (128, 512, 2048, 8192)


class Head:
    """The chains' first steps, sampled in order.

    seconds_per_step: of all chains, as last timed.
    """

    def __init__(self, run: Run):
        self.run, self.x0, self.seconds_per_step = run, run.x, math.nan
        self.shape = run.shape_for(Sequential(), run.num_steps)
        self._paths: list[PyTree] = []
        wanted = STAGES[0]
        while run.left and self.extend(wanted) < TIMING_SECONDS:
            wanted *= 8

    def extend(self, num_steps: int) -> float:
        """As many more steps; returns the seconds they took."""
        before, seconds, end = self.run.done, 0.0, min(self.run.done + num_steps, self.run.num_steps)
        while self.run.done < end:
            first = self.run.done
            segment, _, clock = self.run.take(Sequential(), self.shape, end - first)
            seconds += clock.run_seconds
            if first < LAG + STAGES[-1]:
                path, keep = segment.chains(segment.solution.value), self.run.done - first
                self._paths.append(jax.tree.map(lambda x, n=keep: x[:, :n].copy(), path))
        self.seconds_per_step = seconds / (end - before)
        return seconds

    def path(self, first: int, num_steps: int) -> PyTree:
        """Unknowns (C, num_steps, ...) of the steps from number ``first`` on; at most the last stage of a pilot."""
        missing = first + num_steps - self.run.done
        if missing > 0:
            self.extend(missing)
        return jax.tree.map(lambda *xs: np.concatenate(xs, axis=1)[:, first : first + num_steps], *self._paths)


def couple(head: Head, own: np.ndarray) -> Coalescence | None:
    """Pairs of the chains' first steps with partners from other states of the ensemble.

    own: (C,) the places of the chains' starts in the engine's bank of guesses.

    Returns None where there is no other state, or no time to follow one.
    """
    run, engine = head.run, head.run.engine
    bank = jax.tree.leaves(engine.guesses)[0].shape[0]
    num_partners = min(math.ceil(NUM_PAIRS / engine.num_chains), bank - 1)
    budget = min(int(SHARE * run.num_steps / max(num_partners, 1)), run.num_steps - LAG)
    if num_partners < 1 or budget < 16:
        return None
    # halfway round the bank first: lanes of its two halves descend from different starts
    turn = lambda k: (own + bank // 2 + k * max(1, bank // (2 * num_partners))) % bank
    lanes = [turn(k) for k in range(num_partners)]
    starts = [jax.tree.map(lambda g, i=i: g[i], engine.guesses) for i in lanes]
    starts = [s for s, i in zip(starts, lanes, strict=True) if not np.any(np.asarray(i) == np.asarray(own))]
    if not starts:
        return None
    states = list(starts)
    paths: list[list[PyTree]] = [[] for _ in starts]
    done, found = 0, None
    for stage in STAGES:
        wanted = min(stage, budget) - done
        if wanted <= 0:
            break
        for k, x in enumerate(states):
            path = _follow(run, head.shape, x, LAG + done, wanted)
            paths[k].append(path)
            states[k] = jax.tree.map(lambda v: jnp.asarray(v[:, -1]), path)
        done += wanted
        found = _compare(head, starts, paths, done, engine.scale)
        if bool(np.all(found.merged)):
            break
    return found


def bias_after_warmup(pilot: Coalescence) -> np.ndarray:
    """(n,) bounds on the 1-Wasserstein distance between the law of a state t steps behind warm-up and the posterior.

    In posterior standard deviations of the coordinate that differs most, as the distances of the pilot are. inf where
    pairs do not approach each other.
    """
    steps = np.arange(pilot.distances.shape[0])[:, None]
    distances = np.where(steps < np.asarray(pilot.steps), pilot.distances, 0.0)  # merged pairs stay together
    return wasserstein_bound(distances, lag=LAG).bound


def _follow(run: Run, shape: Shape, x: PyTree, first: int, num_steps: int) -> PyTree:
    parts, done = [], 0
    while done < num_steps:
        steps = min(num_steps - done, shape.capacity)
        segment, _ = run.engine.solve(Sequential(), shape, x, first + done, steps)
        parts.append(jax.tree.map(np.copy, segment.chains(segment.solution.value)))
        x = jax.tree.map(lambda v: jnp.asarray(v[:, -1]), parts[-1])
        done += steps
    return jax.tree.map(lambda *xs: np.concatenate(xs, axis=1), *parts)


def _compare(head: Head, starts: list, paths: list, num_steps: int, scale: PyTree) -> Coalescence:
    """Pairs (partners * C): all against the chains' own first steps."""

    steps_first = lambda path: np.swapaxes(path, 0, 1)  # (steps + 1, C, ...)
    join = lambda start, *parts: steps_first(np.concatenate([np.asarray(start)[:, None], *parts], axis=1))
    second = [jax.tree.map(join, start, *parts) for start, parts in zip(starts, paths, strict=True)]
    second = jax.tree.map(lambda *xs: np.concatenate(xs, axis=1), *second)
    own = jax.tree.map(steps_first, head.path(LAG - 1, num_steps + 1))
    first = jax.tree.map(lambda x: np.concatenate([x] * len(starts), axis=1), own)
    dtype = jax.tree.leaves(own)[0].dtype
    scale = _spread(own) if scale is None else scale
    return coalescence_of_paths(first, second, scale=scale, tol=default_tolerance(dtype))


def _spread(path: PyTree) -> PyTree:
    """Scale where warm-up knows none: standard deviation over the first steps, 1 where nothing moved."""

    def leaf(x):
        spread = np.std(np.asarray(x, float), axis=(0, 1))
        return np.where(spread > 0, spread, 1.0)

    return jax.tree.map(leaf, path)
