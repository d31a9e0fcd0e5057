"""The pilot: the chains' own first steps, and partners that follow them from elsewhere under the same noise.

The first steps are sampled sequentially and stand. They are timed, and other states of the warm-up's ensemble take the
same steps with the same noise by the same program, so a pilot compiles nothing and wastes only the partners' steps.
Each partner of a chain follows it over a window of its own, so all pairs see different noise.

The chains are at least `LAG` steps ahead of their partners: both start as warm-up left them, but the chains have moved
on before they share their noise. So the distances of the pairs also bound the bias left after warm-up (see
`pmcmc.stability.wasserstein_bound`; a longer lag has fewer terms, so the bound for the shortest holds).
"""

import math
import time
from statistics import median_low
from typing import NamedTuple

import jax
import numpy as np

from pmcmc._pytree import real_dtype
from pmcmc._typing import PyTree
from pmcmc.recurrence import Sequential
from pmcmc.recurrence.solution import default_tolerance
from pmcmc.sampling.segments import Run
from pmcmc.stability import Coalescence, wasserstein_bound
from pmcmc.stability.evidence import coalescence_of_paths, gaps_by_dimension

# Sequential sampling is timed over so many stretches of one length, which take about this long or longer in all.
NUM_TIMED, TIMING_SECONDS = 5, 0.1
# Pairs to couple: the first few say how long a merge takes, the others follow as far as time permits.
FIRST_PAIRS, NUM_PAIRS = 4, 32
# The share of the run that partners' steps may take.
SHARE = 0.03
# Steps that the chains are ahead of their partners.
LAG = 32
# A pair is followed in stretches that double from the fewest steps that one program takes, and no further than this.
FIRST_STRETCH, MAX_STEPS = Sequential.unit, 8192
# Steps of the chains that pairs may be compared with.
MAX_KEPT = LAG + NUM_PAIRS * MAX_STEPS


class Head:
    """The chains' first steps, sampled in order. Their path is kept as far as a pilot may want to see it.

    seconds_per_step: of all chains, the lower median over `NUM_TIMED` stretches of the first length that is long enough
        to be timed. So up to two of them may be held up by something else.
    seconds: all that was sampled took, with what the host does about it.
    """

    def __init__(self, run: Run):
        self.run, self.shape = run, run.engine.shape_for(Sequential(), run.num_steps)
        self.seconds = 0.0
        self._paths: list[PyTree] = []
        self.seconds_per_step = self._time()

    def _time(self) -> float:
        """Take the steps that are timed; returns the seconds that one takes."""
        length, every, timed = FIRST_STRETCH, list[float](), list[float]()
        while self.run.left and len(timed) < NUM_TIMED:
            before, seconds = self.run.done, self.extend(length)
            timed.append(seconds / (self.run.done - before))
            every.append(timed[-1])
            if seconds < TIMING_SECONDS / NUM_TIMED:  # too short, however long others of this length were held up
                length, timed = 8 * length, []
        return median_low(timed) if len(timed) == NUM_TIMED else min(every)

    def extend(self, num_steps: int) -> float:
        """As many more steps; returns the seconds they took."""
        begin, seconds, end = time.perf_counter(), 0.0, min(self.run.done + num_steps, self.run.num_steps)
        while self.run.done < end:
            first = self.run.done
            segment, _, clock = self.run.take(Sequential(), self.shape, end - first)
            seconds += clock.run_seconds
            keep = min(self.run.done, MAX_KEPT) - first
            if keep > 0:
                path = segment.chains(segment.solution.value)
                self._paths.append(jax.tree.map(lambda x, n=keep: x[:, :n].copy(), path))
        self.seconds += time.perf_counter() - begin
        return seconds

    def path(self, first: int, num_steps: int) -> PyTree:
        """Unknowns (C, num_steps, ...) of the steps from number ``first`` on; samples them if need be."""
        missing = first + num_steps - self.run.done
        if missing > 0:
            self.extend(missing)
        parts, begin, end = [], 0, first + num_steps
        for path in self._paths:
            length = jax.tree.leaves(path)[0].shape[1]
            if begin < end and first < begin + length:
                some = slice(max(first - begin, 0), end - begin)
                parts.append(jax.tree.map(lambda x, some=some: x[:, some], path))
            begin += length
        return jax.tree.map(lambda *xs: xs[0] if len(xs) == 1 else np.concatenate(xs, axis=1), *parts)


class Couple:
    """Partners of all chains over one window of steps, from number ``first`` on, until all have ``merged``.

    path: (C, steps, ...). What follows a merge is the chain's own path, and is not run.
    run_seconds: of the programs that followed. num_calls: of these; call: the shortest, of any steps.
    """

    def __init__(self, head: Head, first: int, start: PyTree):
        self.head, self.first, self.start = head, first, start
        self.run_seconds, self.num_calls, self.call = 0.0, 0, np.inf
        self.path = jax.tree.map(lambda x: np.asarray(x)[:, None][:, :0], start)
        self._close = np.zeros(head.run.engine.num_chains, bool)

    @property
    def num_steps(self) -> int:
        return jax.tree.leaves(self.path)[0].shape[1]

    @property
    def merged(self) -> bool:
        return bool(self._close.all())

    def follow(self, num_steps: int, scale: PyTree, tol: float) -> None:
        """Take the partners to ``num_steps`` steps in all, and see which have met their chains."""
        engine, shape = self.head.run.engine, self.head.shape
        while self.num_steps < num_steps:
            begin, sampling, done = time.perf_counter(), self.head.seconds, self.num_steps
            x = jax.tree.map(lambda v: v[:, -1], self.path) if done else self.start
            steps = min(num_steps - done, shape.capacity)
            numbers = np.full(engine.num_chains, self.first + done)
            segment, clock = engine.solve(Sequential(), shape, x, numbers, steps)
            new = jax.tree.map(lambda v, n=steps: v[:, :n], segment.chains(segment.solution.value))
            self.path = jax.tree.map(lambda old, v: np.concatenate([old, v], axis=1), self.path, new)
            chains = self.head.path(self.first + done, steps)
            flat = lambda tree: jax.tree.map(lambda v: v.reshape(-1, *v.shape[2:]), tree)
            distances = gaps_by_dimension(flat(chains), flat(new), scale).max(axis=1)
            self._close |= (distances.reshape(-1, steps) <= tol).any(axis=1)
            seconds = time.perf_counter() - begin - (self.head.seconds - sampling)
            self.num_calls, self.call = self.num_calls + 1, min(self.call, seconds)
            self.run_seconds += clock.run_seconds

    def pairs(self, num_steps: int) -> tuple[PyTree, PyTree]:
        """Chains and partners, (C, num_steps + 1, ...): where they stand before the window, then its steps."""
        before = jax.tree.map(lambda x: np.asarray(x)[:, None], self.start)
        chains = self.head.path(self.first - 1, num_steps + 1)
        follow = lambda a, b, c: np.concatenate([a, b[:, :num_steps], c[:, 1 + b.shape[1] :]], axis=1)
        return chains, jax.tree.map(follow, before, self.path, chains)


class Pilot(NamedTuple):
    """coalescence: None where no partner could be followed, which ``excuse`` explains.

    seconds: that following and comparing the partners took; the chains' own steps are draws, and not counted.
    run_seconds: of these the partners' programs.
    """

    coalescence: Coalescence | None
    excuse: str
    seconds: float = 0.0
    run_seconds: float = 0.0


def couple(head: Head, own: np.ndarray) -> Pilot:
    """Pairs of the chains with partners from other states of the ensemble, as many as the pilot's share pays for.

    own: (C,) the places of the chains' starts in the engine's bank of guesses.
    """
    begin, sampling = time.perf_counter(), head.seconds
    run, chains = head.run, head.run.engine.num_chains
    starts = _partner_starts(run, own)
    budget = int(SHARE * run.num_steps)
    few = min(len(starts), math.ceil(FIRST_PAIRS / chains))
    if few * chains < 2:
        return Pilot(None, "There are not enough states of an ensemble to couple the chain with.")
    longest = min(budget // few, MAX_STEPS, run.num_steps // (len(starts) + 1) - LAG)
    if longest < FIRST_STRETCH // 2:
        return Pilot(None, f"A run of {run.num_steps:,} steps has no time to couple chains first.")
    window = lambda k, steps: LAG + k * steps
    couples = [Couple(head, window(k, longest), start) for k, start in enumerate(starts[:few])]
    scale = run.engine.scale
    if scale is None:
        scale = _spread(head.path(0, min(run.done, LAG + longest)))
    tol = default_tolerance(real_dtype(starts[0]))

    def follow(num_steps: int) -> int:
        for one in couples:
            if not one.merged:
                one.follow(num_steps, scale, tol)
        return num_steps

    num_open = lambda: sum(not one.merged for one in couples)
    # a call takes a while whatever its steps: of cheap ones, that of tens of thousands; and what one should take is
    # counted, not what it took: a stall is not work
    call = lambda: min(one.call for one in couples)
    price = lambda steps: call() + steps * head.seconds_per_step
    taken = lambda: sum(one.num_calls * call() + one.num_steps * head.seconds_per_step for one in couples)
    left = lambda: budget * head.seconds_per_step - taken()
    steps = follow(min(FIRST_STRETCH, longest))
    while steps < longest and num_open():
        steps = follow(min(2 * steps, longest))
    if not num_open():  # now that a merge has a length, more pairs of twice that, and the slowest to their end
        steps = min(2 * steps, longest)
        while True:
            single = sum(one.num_calls for one in couples) == 1  # which may have been held up: a second one tells
            there, paid = len(couples) - few, max(0, int(0.75 * left() / price(steps)))
            more, first = starts[len(couples) :][: 1 if single else paid], window(few, longest) + there * steps
            couples += [Couple(head, first + k * steps, start) for k, start in enumerate(more)]
            follow(steps)
            if not (single and more):
                break
        while steps < longest and 0 < num_open() * price(steps) <= left():
            steps = follow(min(2 * steps, longest))
    both = zip(*(one.pairs(steps) for one in couples), strict=True)
    paths = [jax.tree.map(lambda *xs: np.concatenate(xs), *side) for side in both]
    found = coalescence_of_paths(*paths, scale=scale, tol=tol)
    seconds = time.perf_counter() - begin - (head.seconds - sampling)
    return Pilot(found, "", seconds, sum(one.run_seconds for one in couples))


def _partner_starts(run: Run, own: np.ndarray) -> list[PyTree]:
    """Other states of the ensemble for all chains, as many sets as there should be partners."""
    guesses = jax.tree.map(np.asarray, run.engine.guesses)
    bank = jax.tree.leaves(guesses)[0].shape[0]
    wanted = min(math.ceil(NUM_PAIRS / run.engine.num_chains), bank - 1)
    # halfway round the bank first: lanes of its two halves descend from different starts
    lanes = [(own + bank // 2 + k * max(1, bank // (2 * max(wanted, 1)))) % bank for k in range(wanted)]
    return [jax.tree.map(lambda g, i=i: g[i], guesses) for i in lanes if not np.any(i == own)]


def bias_after_warmup(pilot: Coalescence) -> np.ndarray:
    """(n,) bounds on the 1-Wasserstein distance between the law of a state t steps behind warm-up and the posterior.

    In posterior standard deviations of the coordinate that differs most, as the distances of the pilot are. inf where
    pairs do not approach each other.
    """
    steps = np.arange(pilot.distances.shape[0])[:, None]
    distances = np.where(steps < np.asarray(pilot.steps), pilot.distances, 0.0)  # merged pairs stay together
    return wasserstein_bound(distances, lag=LAG).bound


def _spread(path: PyTree) -> PyTree:
    """Scale where warm-up knows none: standard deviation over the first steps, 1 where nothing moved."""

    def leaf(x):
        spread = np.std(np.asarray(x, float), axis=(0, 1))
        return np.where(spread > 0, spread, 1.0)

    return jax.tree.map(leaf, path)
