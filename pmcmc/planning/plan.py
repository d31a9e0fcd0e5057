"""Choose a solver for a run by expected seconds, and the length of the segments that it is solved in.

This is arithmetic on measurements; nothing is run. `plan` compares sequential sampling with blocks of every power of
two, on one device and on all, and with DEER and quasi-DEER. The result is a `Plan` of `Candidate` entries.

`allowance` is the rule: a parallel solve may take the time saved so far plus the share `LOSS` of a sequential run, and
is given up when it has. `next_segment` chooses segments of blocks that should need no more than that. For a plan,
`schedule` applies it to a run in which merges occur as predicted; `pmcmc.sampling.automatic` applies it to the time
that a run has really saved. Newton's method solves a run at once, so it is considered only if a tenth of the run's
sequential time should do. `Pace` estimates the
seconds of a step from stretches, some of which may be delayed by a stalling machine.
"""

import math
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import jax
import numpy as np

from pmcmc._pytree import Scalar
from pmcmc.planning.costs import Costs, segment_cost
from pmcmc.planning.predict import Prediction, longest_of, merge_tail, merge_times, predict_iterations
from pmcmc.recurrence import (
    Dense,
    Diagonal,
    MultipleShooting,
    Newton,
    RecurrenceSolver,
    Sequential,
    Windowed,
    deer,
    quasi_deer,
)
from pmcmc.stability.coalescence import Coalescence

# The first segment is at most this share of a run.
FIRST_SHARE = 1 / 8
# Time that a failing solve may cost beyond the time saved so far, as a share of a sequential run.
LOSS = 0.1
# Predicted merges for which a segment can wait within its allowance: some are twice as long.
RESERVE = 2
# Segments of a plan whose lengths are computed one by one.
MANY = 1000


def allowance(num_steps: int, saved: Scalar) -> Scalar:
    """Return what a parallel solve may cost, in sequential steps; then it is given up.

    Args:
        num_steps: T, all steps planned for.
        saved: Time saved so far, in sequential steps; it may be negative.
    """
    return LOSS * num_steps + max(saved, 0.0)


def next_segment(
    num_steps: int, done: int, saved: Scalar, step: Scalar, num_blocks: int, merge: Scalar, max_steps: Scalar
) -> int:
    """Return the number of steps of the next segment.

    Its zeroth sweep and `RESERVE` merges as predicted cost at most the `allowance`. The first segment is at most T / 8.

    Args:
        num_steps: T, all steps planned for.
        done: Steps solved so far.
        saved: Time saved so far, in sequential steps; it may be negative.
        step: Cost of a step of all lanes, in sequential steps.
        num_blocks: P, blocks per chain.
        merge: Steps until the slowest lane of a segment has merged, as predicted.
        max_steps: Steps for which a solve has memory.
    """
    length = num_blocks * (allowance(num_steps, saved) / step - RESERVE * merge)
    if not done:
        length = min(length, FIRST_SHARE * num_steps)
    return max(1, int(min(num_steps - done, length, max_steps)))


def schedule(num_steps: int, num_blocks: int, merge: Scalar, step: Scalar, max_steps: Scalar) -> list[int]:
    """Return the lengths of the segments of a run in which merges occur as predicted.

    Args:
        num_steps: T, steps per chain.
        num_blocks: P, blocks per chain.
        merge: Steps until the slowest lane of a segment has merged.
        step: Cost of a step of all lanes, in sequential steps.
        max_steps: Steps for which a solve has memory.
    """
    segments: list[int] = []
    done, saved = 0, 0.0
    while done < num_steps:
        length = next_segment(num_steps, done, saved, step, num_blocks, merge, max_steps)
        segments.append(length)
        done += length
        saved += length * (1 - segment_cost(step, num_blocks, merge, length))
        if len(segments) == MANY:  # the others are as long as the last one; longer only where there would be millions
            left = num_steps - done
            length = max(length, left // MANY**2)
            return [*segments, *[length] * (left // length), *[left % length] * (left % length > 0)]
    return segments


class Pace:
    """Seconds per step from stretches of steps, robust to a machine that stalls during some of them."""

    def __init__(self) -> None:
        self._steps: list[int] = []
        self._rates: list[float] = []

    def add(self, num_steps: int, seconds: float) -> None:
        """Add a stretch of ``num_steps`` steps that took ``seconds``."""
        self._steps.append(num_steps)
        self._rates.append(seconds / num_steps)

    @property
    def seconds_per_step(self) -> float:
        """Lower median of the seconds per step, over all steps; NaN if there are none.

        Each step counts with the mean of its stretch. So short stretches, which mostly measure the time of a call,
        count little.
        """
        if not self._steps:
            return float("nan")
        order = np.argsort(self._rates)
        count = np.cumsum(np.asarray(self._steps)[order])
        return float(np.asarray(self._rates)[order][np.searchsorted(count, count[-1] / 2)])


# Numbers of blocks that are considered.
BLOCK_COUNTS = tuple(2**i for i in range(1, 15))
# Windows of Newton's method shorter than this are not considered.
MIN_WINDOW = 256
# Probability of the predicted intervals.
LEVEL = 0.9
# A candidate is chosen only if it should save more than this share of a sequential run, because predicted seconds are
# sometimes wrong by a quarter.
MARGIN = 0.25


class Candidate(NamedTuple):
    """A solver that a plan considers, and its predicted cost.

    Attributes:
        name: Name in tables and reasons.
        solver: The solver.
        num_steps: Expected critical path: steps that are taken one after the other.
        lower: Lower end of its 90 % interval.
        upper: Upper end of its 90 % interval.
        seconds: Expected seconds, including compilation.
        merge: Expected number of steps until the slowest lane of a segment has merged; 0 for solvers without blocks.
    """

    name: str
    solver: RecurrenceSolver
    num_steps: float
    lower: float
    upper: float
    seconds: float
    merge: float = 0.0


@dataclass(frozen=True)
class Plan:
    """How a run will be solved, the expected cost, and the alternatives.

    ``print(plan)`` shows the candidates in the order of ``candidates`` and marks the chosen one by ``>``. To use
    another one, pass its solver to `pmcmc.parallel_chain` or `pmcmc.sample`.

    Attributes:
        chosen: The chosen candidate.
        reason: Why it was chosen, in one sentence.
        candidates: All candidates, the cheapest first.
        num_steps: Steps per chain that were planned for.
        costs: Costs of steps from which the seconds were computed.
        coalescence: The pilot; None if there was none, or if it proves nothing (`check_pilot`).
        correction: Seconds of a sequential step as measured during the run, over those it was planned with. The other
            figures of a plan are not corrected.
        num_first: Steps per chain that were taken before the plan.
    """

    chosen: Candidate
    reason: str
    candidates: tuple[Candidate, ...]
    num_steps: int
    costs: Costs
    coalescence: Coalescence | None
    correction: float = 1.0
    num_first: int = 0

    @property
    def solver(self) -> RecurrenceSolver:
        """The solver of the chosen candidate."""
        return self.chosen.solver

    @property
    def sequential_seconds(self) -> float:
        """Expected seconds of sequential sampling."""
        return self.num_steps * self.costs.sequential

    def __str__(self) -> str:
        width = max(24, *(len(c.name) for c in self.candidates))
        lines = [self.reason, f"  {'':{width}s} {'steps in sequence':>22s} {'seconds':>9s}"]
        for c in self.candidates:
            mark = ">" if c is self.chosen else " "
            lines.append(f"{mark} {c.name:{width}s} {c.num_steps:22,.0f} {c.seconds:9.2f}")
        return "\n".join(lines)


def plan(
    num_steps: int,
    num_chains: int,
    costs: Costs,
    coalescence: Coalescence | None = None,
    *,
    dim: int | None = None,
    max_steps: Callable[[RecurrenceSolver], Scalar] | None = None,
    device_sets: Sequence[Sequence[jax.Device]] = ((),),
    ready: Collection[RecurrenceSolver] = (),
) -> Plan:
    """Choose the fastest of sequential sampling, blocks on one or more devices, DEER and quasi-DEER.

    A sequential run takes ``T s`` seconds. P blocks take one compilation, during which some sequential steps are taken,
    and ``(S + M) b`` seconds for each segment of S P steps, where M is the merge time of the slowest of C (P - 1) lanes
    (as in `predict_sweeps`) and b are the seconds of a step of all lanes, `Costs.blocks_step`.

    DEER and quasi-DEER take their predicted iterations (`predict_iterations`), and are considered if these cost at most
    the `allowance`. Each of these is a step of C T (1 + D)
    lanes, for the map and its D tangents, and log2(T) overheads for the scan. If T states do not fit into memory, they
    are considered with windows that slide along the path (`Windowed`). Trust regions (ELK) are not considered: in 77
    measured cases in which paths merge, none was the cheapest (docs/decisions/018).

    A parallel solver is chosen only if every pair of the pilot merged and it should save more than a quarter of the
    seconds of the sequential run. Blocks that would do so with lanes as fast as they may be (`Costs.least_lane`) are
    chosen, too, if that risks no more than `LOSS`: the run falls back after their first segment if they do not pay.
    Pairs of the pilot that start within the tolerance of each other do not count.

    Args:
        num_steps: T, steps per chain that are left.
        num_chains: C, the number of chains.
        costs: s, the seconds of a step of lanes, and those of a compilation.
        coalescence: The pilot; None if nothing is known about merges.
        dim: D, real entries of a state. None: Newton's method is not considered.
        max_steps: Steps per chain for which one solve has memory, as a function of the solver. None: any number.
        device_sets: Sets of devices among which the plan chooses; the devices of a set share the blocks. An empty set
            is the default device.
        ready: Solvers from `block_solvers` whose program is compiled, or has been compiling since warm-up: the plan
            counts no compilation for them.

    Returns:
        The `Plan`.

    Raises:
        ValueError: ``num_steps`` or ``num_chains`` is below 1, or fewer than two pairs of the pilot start apart.

    Example:
        >>> from pmcmc.planning import Costs, plan
        >>> plan(10**6, 1, Costs(sequential=2e-6, overhead=2e-6, lane=1e-7, compile=1.0)).reason
        'Nothing is known of how coupled chains merge.'
    """
    if min(num_steps, num_chains) < 1:
        raise ValueError(f"num_steps and num_chains must be at least 1, got {num_steps} and {num_chains}.")
    alone = Candidate("sequential", Sequential(), num_steps, num_steps, num_steps, num_steps * costs.sequential)
    conclude = lambda chosen, reason, others=(): Plan(
        chosen, reason, tuple(sorted((alone, *others), key=lambda c: c.seconds)), num_steps, costs, coalescence
    )
    if coalescence is None:
        return conclude(alone, "Nothing is known of how coupled chains merge.")
    steps = merge_times(coalescence)
    if num_open := int(np.sum(steps > coalescence.max_steps)):
        return conclude(
            alone,
            f"Only {steps.size - num_open} of {steps.size} coupled pairs of chains merged within "
            f"{coalescence.max_steps:,} steps, as far as the pilot followed them: too slow to plan blocks.",
        )
    merging = (
        f"All {steps.size} coupled pairs of chains merged within {int(steps.max()):,} steps (median "
        f"{int(np.median(steps)):,})"
    )
    most = max_steps or (lambda solver: num_steps)
    others = _block_candidates(num_steps, num_chains, costs, coalescence, most, device_sets, ready)
    if dim is not None:
        others += _newton_candidates(num_steps, num_chains, costs, coalescence, dim, most)
    if not others:
        return conclude(alone, f"{merging}: too many for blocks in a run of {num_steps:,} steps.")
    best = min(others, key=lambda c: c.seconds)
    compared = f"{best.name} should take {best.seconds:.2g} s and sequential sampling {alone.seconds:.2g} s"
    if best.seconds < (1 - MARGIN) * alone.seconds:
        return conclude(best, f"{merging}; {compared}.", others)
    least = _block_candidates(
        num_steps, num_chains, costs._replace(lane=costs.least_lane * costs.lane), coalescence, most, device_sets, ready
    )
    if tried := _worth_a_trial(alone, others, least, costs, ready):
        named, hoped = tried
        return conclude(
            named,
            f"{merging}; {named.name} should take {named.seconds:.2g} s, or {hoped:.2g} s if lanes are as fast as they "
            f"may be, and sequential sampling {alone.seconds:.2g} s: a first segment will tell.",
            others,
        )
    return conclude(alone, f"{merging}, but {compared}.", others)


def _worth_a_trial(
    alone: Candidate,
    others: Sequence[Candidate],
    least: Sequence[Candidate],
    costs: Costs,
    ready: Collection[RecurrenceSolver],
) -> tuple[Candidate, float] | None:
    """Return the blocks to try although they are not expected to save enough, and the seconds hoped for; else None.

    They are tried if they would save enough with lanes as fast as they may be, and if the trial, which is a compilation
    and the first segment, is not expected to lose more than the share `LOSS` of a sequential run.

    Args:
        alone: Sequential sampling.
        others: Candidates by the expected costs.
        least: Candidates in blocks by the least costs.
        costs: The expected costs.
        ready: Solvers whose program is compiled, or has been compiling since warm-up.
    """
    if costs.least_lane == 1.0 or not least:
        return None
    hoped = min(least, key=lambda c: c.seconds)
    named = next((c for c in others if c.solver == hoped.solver), None)
    if named is None or hoped.seconds >= (1 - MARGIN) * alone.seconds:
        return None
    compilation = 0.0 if named.solver in ready else (1 - costs.overlap) * costs.compile
    loss = compilation + FIRST_SHARE * max(named.seconds - alone.seconds, 0.0)
    return (named, hoped.seconds) if loss <= LOSS * alone.seconds else None


def block_solvers(device_sets: Sequence[Sequence[jax.Device]]) -> list[MultipleShooting]:
    """Return the shooting solvers to choose from: for each set of devices, each number of blocks in `BLOCK_COUNTS`.

    Each device gets at least one block; the number of blocks is rounded up to a multiple of the number of devices.
    """
    every = [(p, devices) for devices in device_sets for p in BLOCK_COUNTS if p >= len(devices)]
    solvers = [MultipleShooting(num_blocks=p, devices=tuple(devices) or None) for p, devices in every]
    return [replace(solver, num_blocks=solver.blocks_for(p)) for solver, (p, _) in zip(solvers, every, strict=True)]


def _block_candidates(
    num_steps: int,
    num_chains: int,
    costs: Costs,
    coalescence: Coalescence,
    max_steps: Callable[[RecurrenceSolver], Scalar],
    device_sets: Sequence[Sequence[jax.Device]],
    ready: Collection[RecurrenceSolver],
) -> list[Candidate]:
    """Return the candidates that solve in blocks; arguments as in `plan`."""
    found = []
    # The merge times of the pilot's pairs predict that of the slowest lane.
    tail = merge_tail(coalescence)
    most = max_steps(MultipleShooting())
    for solver in block_solvers(device_sets):
        num_blocks, num_devices = solver.blocks_for(num_steps), max(1, len(solver.shared_by))
        if num_devices == 1 and num_blocks > 2 and num_chains * num_blocks > costs.most_lanes:
            continue
        merge, low, high = longest_of(tail, num_chains * (num_blocks - 1), LEVEL)
        if num_blocks * max(MultipleShooting.unit, merge) > num_steps / 2:  # repair would be half of all work
            continue
        # Sequential steps are taken while the program is compiled; the segments follow.
        compilation = 0.0 if solver in ready else costs.compile
        in_order = min(num_steps, int(costs.overlap * compilation / costs.sequential))
        step = costs.blocks_step(num_blocks * num_chains, num_devices)
        segments = schedule(num_steps - in_order, num_blocks, merge, step / costs.sequential, most)
        plain = sum(MultipleShooting.unit * -(-s // (num_blocks * MultipleShooting.unit)) for s in segments)
        path, lower, upper = (plain + len(segments) * steps for steps in (merge, low, high))
        shared = f" on {num_devices} devices" if num_devices > 1 else ""
        found.append(
            Candidate(
                f"shooting, {num_blocks} blocks{shared}",
                solver,
                in_order + path,
                in_order + lower,
                in_order + upper,
                compilation + path * step,
                merge,
            )
        )
    return found


def _newton_candidates(
    num_steps: int,
    num_chains: int,
    costs: Costs,
    coalescence: Coalescence,
    dim: int,
    max_steps: Callable[[RecurrenceSolver], Scalar],
) -> list[Candidate]:
    """Return the candidates that use Newton's method; arguments as in `plan`."""
    found: list[Candidate] = []
    for name, make, structure in (("DEER", deer, Dense()), ("quasi-DEER", quasi_deer, Diagonal())):
        window = _window(make(), num_steps, max_steps)
        if window < MIN_WINDOW:
            continue
        windows = math.ceil(num_steps / window)
        count = Prediction(*(windows * k for k in predict_iterations(structure, coalescence, length=window)))
        iteration = costs.step(num_chains * window * (1 + dim)) + costs.overhead * math.log2(window)
        allowed = int(allowance(num_steps, 0.0) * costs.sequential / iteration)
        if count.value > allowed:
            continue
        newton = make(max_iters=allowed)
        seconds = count.value * iteration + costs.compile
        if windows == 1:
            found.append(Candidate(name, newton, *count, seconds))
        else:
            name = f"{name}, windows of {window:,} steps"
            found.append(Candidate(name, Windowed(newton, window), *count, seconds))
    return found


def _window(newton: Newton, num_steps: int, max_steps: Callable[[RecurrenceSolver], Scalar]) -> int:
    """Return the number of steps for which an iteration has memory: all, or a window.

    A window must fit into the memory that the whole path leaves.
    """
    if num_steps <= max_steps(newton):
        return num_steps
    path = num_steps / max_steps(Windowed(newton))
    return int((1 - path) * max_steps(newton))
