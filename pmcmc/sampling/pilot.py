"""The pilot of ``solver="auto"``: do chains that start elsewhere merge with these, under the same noise?

The pilot consists of the first steps of the chains and of partners. The chains' first steps are sampled sequentially
(`Head`), kept as draws, and timed. Partners start from other states of the warm-up ensemble and take the same steps,
with the same noise and the same program (`Couple`). So a pilot compiles nothing, and only the partners' steps are
wasted. Each partner of a chain follows it over a separate window, so all pairs see different noise. `couple` runs the
pilot.

The chains are at least `LAG` steps ahead of their partners. Both start where warm-up left them, but the chains have
moved on before they share their noise. The distances of the pairs therefore also bound the bias left after warm-up
(`bias_after_warmup`). The lag is longer for later windows, and the bound of `pmcmc.stability.wasserstein_bound` has
fewer terms for a longer lag, so the bound for the shortest lag holds for all.
"""

import math
import time
from collections.abc import Callable
from statistics import median_low
from typing import NamedTuple

import jax
import numpy as np

from pmcmc._pytree import PyTree, real_dtype
from pmcmc.planning.plan import Pace
from pmcmc.recurrence import Sequential
from pmcmc.recurrence.solution import default_tolerance
from pmcmc.sampling.segments import Run
from pmcmc.stability import Coalescence, wasserstein_bound
from pmcmc.stability.evidence import coalescence_of_paths, gaps_by_dimension

# Sequential sampling is timed over this many stretches of equal length, which take at least about this long in total.
NUM_TIMED, TIMING_SECONDS = 5, 0.1
# Until the machine is quiet, steps are taken in stretches of about this many seconds.
WAITING_SECONDS = 0.1
# Number of pairs to couple: the first ones show how long a merge takes, the others follow as far as time permits.
FIRST_PAIRS, NUM_PAIRS = 4, 32
# Share of the run that the steps of partners may take.
SHARE = 0.03
# Number of steps that the chains are ahead of their partners.
LAG = 32
# A pair is followed in stretches that double in length, starting from the fewest steps that one program takes, up to
# this many steps.
FIRST_STRETCH, MAX_STEPS = Sequential.unit, 8192
# Largest number of steps of the chains that are kept, because pairs may be compared with them.
MAX_KEPT = LAG + NUM_PAIRS * MAX_STEPS
# Copies of these steps that comparing them takes at the same time: of chains and partners, in parts and joined.
COPIES = 6


class Head:
    """The chains' first steps, sampled sequentially. Their path is kept as far as a pilot may need it.

    Args:
        run: The run, whose first steps are taken.
        is_quiet: Whether nothing else is being computed. Steps that are taken before that are not timed.

    Attributes:
        num_kept: Largest number of steps whose path is kept, as many as a solve has memory for, copies included.
        seconds_per_step: Time of a step of all chains: the lower median over `NUM_TIMED` stretches of the first length
            that is long enough to be timed. So up to two of them may be delayed by something else.
        seconds: Time that all sampling took, including the work on the host.
        num_waited: Number of steps that were taken before anything was timed.
    """

    def __init__(self, run: Run, is_quiet: Callable[[], bool] = lambda: True):
        self.run, self.shape = run, run.engine.shape_for(Sequential(), run.num_steps)
        self.seconds, self.num_waited = 0.0, 0
        self.num_kept = min(MAX_KEPT, run.engine.max_bytes // (COPIES * sum(x.nbytes for x in jax.tree.leaves(run.x))))
        self._paths: list[PyTree] = []
        self.seconds_per_step = self._time(is_quiet)

    def _time(self, is_quiet: Callable[[], bool]) -> float:
        """Take the steps that are timed; returns the seconds per step."""
        length, every, timed = FIRST_STRETCH, list[float](), list[float]()
        while self.run.left and not is_quiet():
            before, seconds = self.run.done, self.extend(length)
            every.append(seconds / (self.run.done - before))
            length *= 2 if seconds < WAITING_SECONDS else 1
        self.num_waited = self.run.done if every else 0
        if self.run.left and every:  # what was measured so far says nothing about later steps
            length, every, self.run.sequential_pace = FIRST_STRETCH, [], Pace()
        while self.run.left and len(timed) < NUM_TIMED:
            before, seconds = self.run.done, self.extend(length)
            timed.append(seconds / (self.run.done - before))
            every.append(timed[-1])
            # One fast stretch shows that the length is too short: others may have been delayed, none can be too fast.
            if seconds < TIMING_SECONDS / NUM_TIMED:
                length, timed = 8 * length, []
        return median_low(timed) if len(timed) == NUM_TIMED else min(every)

    def extend(self, num_steps: int) -> float:
        """Take ``num_steps`` more steps; returns the seconds they took."""
        begin, seconds, end = time.perf_counter(), 0.0, min(self.run.done + num_steps, self.run.num_steps)
        while self.run.done < end:
            first = self.run.done
            segment, _, clock = self.run.take(Sequential(), self.shape, end - first)
            seconds += clock.run_seconds
            keep = min(self.run.done, self.num_kept) - first
            if keep > 0:
                path = segment.chains()[0]
                self._paths.append(jax.tree.map(lambda x, n=keep: x[:, :n].copy(), path))
        self.seconds += time.perf_counter() - begin
        return seconds

    def path(self, first: int, num_steps: int) -> PyTree:
        """Return the unknowns (C, num_steps, ...) of the steps from number ``first`` on; missing steps are sampled."""
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
    """One partner of each chain over one window of steps, followed until all have merged.

    Args:
        head: The chains' first steps.
        first: Number of the first step of the window.
        start: Unknowns of the partners before the window, leading axis C.

    Attributes:
        path: Unknowns of the partners; shape (C, steps, ...). Once all have merged, what follows equals the path of the
            chains and is not computed.
        run_seconds: Time in programs.
        num_calls: Number of calls of programs.
        call: Time of the shortest call, whatever its number of steps.
    """

    def __init__(self, head: Head, first: int, start: PyTree):
        self.head, self.first, self.start = head, first, start
        self.run_seconds, self.num_calls, self.call = 0.0, 0, np.inf
        self.path = jax.tree.map(lambda x: np.asarray(x)[:, None][:, :0], start)
        self._close = np.zeros(head.run.engine.num_chains, bool)

    @property
    def num_steps(self) -> int:
        """Number of steps that the partners have taken."""
        return jax.tree.leaves(self.path)[0].shape[1]

    @property
    def merged(self) -> bool:
        """Whether every partner has merged with its chain."""
        return bool(self._close.all())

    def follow(self, num_steps: int, scale: PyTree, tol: float) -> None:
        """Take the partners to ``num_steps`` steps in total, and record which have merged with their chains.

        Args:
            num_steps: Total number of steps.
            scale: Scale of the unknowns.
            tol: Largest distance that counts as merged.
        """
        engine, shape = self.head.run.engine, self.head.shape
        while self.num_steps < num_steps:
            begin, sampling, done = time.perf_counter(), self.head.seconds, self.num_steps
            # Take the next steps of the partners, with the noise of the chains.
            x = jax.tree.map(lambda v: v[:, -1], self.path) if done else self.start
            steps = min(num_steps - done, shape.capacity)
            numbers = np.full(engine.num_chains, self.first + done)
            segment, clock = engine.solve(Sequential(), shape, x, numbers, steps)
            new = jax.tree.map(lambda v, n=steps: v[:, :n], segment.chains()[0])
            self.path = jax.tree.map(lambda old, v: np.concatenate([old, v], axis=1), self.path, new)
            # Compare them with the chains, whose own steps are sampled now if they are missing.
            chains = self.head.path(self.first + done, steps)
            flat = lambda tree: jax.tree.map(lambda v: v.reshape(-1, *v.shape[2:]), tree)
            distances = gaps_by_dimension(flat(chains), flat(new), scale).max(axis=1)
            self._close |= (distances.reshape(-1, steps) <= tol).any(axis=1)
            # The time that sampling the chains took does not count.
            seconds = time.perf_counter() - begin - (self.head.seconds - sampling)
            self.num_calls, self.call = self.num_calls + 1, min(self.call, seconds)
            self.run_seconds += clock.run_seconds

    def pairs(self, num_steps: int) -> tuple[PyTree, PyTree]:
        """Return the paths of chains and partners, each of shape (C, num_steps + 1, ...).

        The first entry is the state before the window.
        """
        before = jax.tree.map(lambda x: np.asarray(x)[:, None], self.start)
        chains = self.head.path(self.first - 1, num_steps + 1)
        follow = lambda a, b, c: np.concatenate([a, b[:, :num_steps], c[:, 1 + b.shape[1] :]], axis=1)
        return chains, jax.tree.map(follow, before, self.path, chains)


class Pilot(NamedTuple):
    """Result of `couple`.

    Attributes:
        coalescence: How the pairs approached each other; None if no partner could be followed.
        excuse: Why there is no coalescence; "" if there is one.
        seconds: Time to follow and compare the partners. The chains' own steps are draws and do not count.
        run_seconds: Part of it spent in the partners' programs.
    """

    coalescence: Coalescence | None
    excuse: str
    seconds: float = 0.0
    run_seconds: float = 0.0


def couple(head: Head, own: np.ndarray) -> Pilot:
    """Couple the chains with as many partners as fit into the pilot's share of the run.

    Args:
        head: The chains' first steps.
        own: Numbers of the chains' starts in the engine's bank of guesses; shape (C,).
    """
    # Check that there are partners, and time for the first pairs.
    begin, sampling = time.perf_counter(), head.seconds
    run, chains = head.run, head.run.engine.num_chains
    starts = _partner_starts(run, own)
    budget = int(SHARE * run.left)
    few = min(len(starts), math.ceil(FIRST_PAIRS / chains))
    if few * chains < 2:
        return Pilot(None, "The ensemble has too few states to couple the chain with.")
    room = head.num_kept - LAG
    longest, excuse = _longest_window(head, len(starts), few, budget)
    if excuse:
        return Pilot(None, excuse)
    # Set up the first pairs. Window k starts LAG + k * steps steps after the start of the chains.
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
    # Costs. Every call has a fixed cost, which for cheap steps equals that of tens of thousands of them. The expected
    # time is counted, not the measured one, because a stall is not work.
    call = lambda: min(one.call for one in couples)
    price = lambda steps: call() + steps * head.seconds_per_step
    taken = lambda: sum(one.num_calls * call() + one.num_steps * head.seconds_per_step for one in couples)
    left = lambda: budget * head.seconds_per_step - taken()
    # Follow the first pairs until they merge.
    steps = follow(min(FIRST_STRETCH, longest))
    while steps < longest and num_open():
        steps = follow(min(2 * steps, longest))
    # The merge time is now known: add pairs with windows of twice that length, and follow the slowest to their end.
    if not num_open():
        steps = min(2 * steps, longest)
        while True:
            # If there was only one call, it may have been delayed: add one more pair to see, before adding others.
            single = sum(one.num_calls for one in couples) == 1
            there, paid = len(couples) - few, max(0, int(0.75 * left() / price(steps)))
            fit = max(0, (room - (few + 1) * longest) // steps - there)
            more = starts[len(couples) :][: min(fit, 1 if single else paid)]
            first = window(few, longest) + there * steps
            couples += [Couple(head, first + k * steps, start) for k, start in enumerate(more)]
            follow(steps)
            if not (single and more):
                break
        while steps < longest and 0 < num_open() * price(steps) <= left():
            steps = follow(min(2 * steps, longest))
    # Compute the distances of all pairs.
    both = zip(*(one.pairs(steps) for one in couples), strict=True)
    paths = [jax.tree.map(lambda *xs: np.concatenate(xs), *side) for side in both]
    found = coalescence_of_paths(*paths, scale=scale, tol=tol, discrete=run.engine.kernel.discrete(paths[0]))
    seconds = time.perf_counter() - begin - (head.seconds - sampling)
    return Pilot(found, "", seconds, sum(one.run_seconds for one in couples))


def _longest_window(head: Head, num_starts: int, few: int, budget: int) -> tuple[int, str]:
    """Return the largest number of steps for which the ``few`` first pairs are followed, and why it is too small.

    Windows lie within the steps that are kept. If memory is short, the first pairs take half of them.
    """
    longest = min(budget // few, MAX_STEPS, head.run.num_steps // (num_starts + 1) - LAG)
    room, least = head.num_kept - LAG, FIRST_STRETCH // 2
    held = max(room // num_starts, room // (2 * few))
    if held < min(longest, least):
        return held, "The states are too large to keep enough of them for coupling chains: raise max_memory=."
    short = f"A run of {head.run.num_steps:,} steps is too short to couple chains first."
    return min(longest, held), short if longest < least else ""


def _partner_starts(run: Run, own: np.ndarray) -> list[PyTree]:
    """Return other states of the ensemble: one set, with a state for each chain, per partner."""
    guesses = jax.tree.map(np.asarray, run.engine.guesses)
    bank = jax.tree.leaves(guesses)[0].shape[0]
    lanes = [(own + shift) % bank for shift in partner_shifts(bank, run.engine.num_chains)]
    return [jax.tree.map(lambda g, i=i: g[i], guesses) for i in lanes]


def partner_shifts(num_states: int, num_chains: int) -> list[int]:
    """Return by how many states a chain's partners are ahead of it in the ensemble, which is taken as a ring.

    There are as many as give `NUM_PAIRS` pairs, but no state is its own partner, nor a partner of one chain twice: an
    ensemble of four states has three. They begin half of the ensemble apart, because lanes of its two halves descend
    from different starts.

    Args:
        num_states: Number of states of the ensemble.
        num_chains: Number of chains.
    """
    wanted = min(math.ceil(NUM_PAIRS / num_chains), num_states - 1)
    stride = max(1, num_states // (2 * max(wanted, 1)))
    shifts = ((num_states // 2 + k * stride) % num_states for k in range(num_states))
    return list(dict.fromkeys(filter(None, shifts)))[:wanted]


def bias_after_warmup(pilot: Coalescence) -> np.ndarray:
    """Bound the 1-Wasserstein distance between the law of the state t steps after warm-up and the posterior.

    Args:
        pilot: Distances of the pairs.

    Returns:
        Bounds by t, shape (n,), in posterior standard deviations of the coordinate that differs most, like the
        distances of the pilot. They are inf if pairs do not approach each other.
    """
    steps = np.arange(pilot.distances.shape[0])[:, None]
    distances = np.where(steps < np.asarray(pilot.steps), pilot.distances, 0.0)  # merged pairs stay together
    return wasserstein_bound(distances, lag=LAG).bound


def _spread(path: PyTree) -> PyTree:
    """Estimate the scale if warm-up found none: standard deviations over the first steps, 1 where nothing moved."""

    def leaf(x):
        spread = np.std(np.asarray(x, float), axis=(0, 1))
        return np.where(spread > 0, spread, 1.0)

    return jax.tree.map(leaf, path)
