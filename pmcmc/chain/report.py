"""What was decided, why, and what it cost."""

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np

from pmcmc.chain.mixing import MIN_DRAWS, Mixing
from pmcmc.planning import Plan
from pmcmc.recurrence import RESULTS
from pmcmc.stability import Diagnosis

# Bias, in posterior standard deviations, that a report calls small.
SMALL_BIAS = 0.01
# Nothing is said of it where fewer than half of the pairs started that far apart, where the draws' standard deviation
# is not within this factor of that of warm-up's ensemble, ...
APART, SPREAD = 1.0, 2.0
# ... or above this share of divergent draws, at which a run warns, too.
MANY_DIVERGENCES = 0.01
# Fields that files do not hold, and arrays that have not one entry per chain.
NOT_STORED = ("plan", "find_diagnosis", "find_mixing")
BY_PAIR = ("bias_bound", "coalescence_steps", "pair_distances")
# A critical path this many times shorter than the chain is called so.
SHORTER = 1.05
# Figures that were corrected by more than this share are printed as they were at first, too.
LARGE_CORRECTION = 0.1


@dataclass(frozen=True)
class SolveReport:
    """How the draws of a `Chain` were made. Arrays have one entry per chain; ``print(report)`` reads as prose.

    decision: "shooting", "newton" or "sequential", as was planned; of a solver from elsewhere its own name
        (`recurrence.RecurrenceSolver.decision`). reason: one sentence.
    plan: what "auto" measured and expected, with the figures of before the run; None where the caller chose, or the run
        was too short to plan. Where it was planned anew on the way, the last plan.
    bias_bound: (n,) bounds on what is left of the start t = 0..n-1 steps behind warm-up: 1-Wasserstein distance to the
        law that chains from warm-up's ensemble tend to, in standard deviations of that ensemble, from lagged coupled
        pairs (Biswas, Jacob & Vanetti 2019); empty without a pilot, or after one that proves nothing. Of a region that
        no lane of warm-up found it says nothing; see `bias_doubt`.
    pair_distances: (pairs,) at which the pairs started, in the same unit; empty without a pilot.
    spread: largest ratio, either way, of the draws' standard deviations to those of the ensemble; NaN where unknown.
    result: `RESULTS` of the last parallel solve. fallback: why it was left, how many steps had been solved in parallel
        and sampled sequentially by then, and how many were left; "" where it was not.
    residual: largest |x[t] - f(x[t-1], u[t])| / scale among the steps solved in parallel, as measured; of a solve that
        did not hold to its end, among those that stand. 0 where there are none, NaN where the solver does not tell.
    num_steps: steps per chain. num_draws: of these kept.
    num_sequential_steps: critical path, in steps one after the other.
    num_iters, num_sweeps: of the parallel solver; 0 where it has none. num_blocks: 1 where there are none.
    certified_steps: steps solved in parallel, that is taken by the parallel solver and certified. All others,
        ``num_steps - certified_steps``, were sampled sequentially: the first ones under "auto", those taken while a
        program was compiled, and what was left after a fallback.
    near_ties: accept decisions within rounding of a tie, where another machine may decide otherwise; NaN where the
        kernel does not tell.
    lyapunov_exponent: mean log growth per step of small distances between coupled paths, seen on merging lanes.
    coalescence_steps: steps until each pair of the pilot merged (steps of the pilot + 1: it did not); may be empty.
    acceptance_rate: mean over the draws. *_seconds: wall time; pilot_seconds: of following and
        comparing partners, whose steps are no draws;
        total_seconds: of everything, copies included; planned_seconds: of what followed the plan, compilation
        included, to hold beside `predicted_seconds`.
    warmup_remark: what is doubtful about warm-up and what may help; "" where nothing is. It is a warning, too.
    num_lost_lanes: times that warm-up put one of its lanes on another's place, see `EnsembleAdaptation`.
    """

    decision: str
    reason: str
    plan: Plan | None
    bias_bound: np.ndarray
    result: np.ndarray
    fallback: str
    residual: np.ndarray
    num_steps: int
    num_sequential_steps: np.ndarray
    num_iters: np.ndarray
    num_sweeps: np.ndarray
    num_blocks: int
    certified_steps: np.ndarray
    near_ties: np.ndarray
    lyapunov_exponent: np.ndarray
    coalescence_steps: np.ndarray
    acceptance_rate: np.ndarray
    num_divergent: np.ndarray
    warmup_seconds: float
    pilot_seconds: float
    compile_seconds: float
    solve_seconds: float
    total_seconds: float
    planned_seconds: float
    warmup_remark: str = ""
    num_lost_lanes: int = 0
    num_draws: int = 0
    pair_distances: np.ndarray = field(default_factory=lambda: np.zeros(0))
    spread: float = float("nan")
    find_mixing: Callable[[], Mixing] | None = field(default=None, repr=False, compare=False)
    find_diagnosis: Callable[[], Diagnosis] | None = field(default=None, repr=False, compare=False)

    @cached_property
    def diagnosis(self) -> Diagnosis | None:
        """Which sites keep coupled chains apart and what may help; None where they merge, or nobody looked.

        Worked out when first asked for: it compiles small programs, which takes a few seconds.
        """
        return None if self.find_diagnosis is None else self.find_diagnosis()

    @cached_property
    def mixing(self) -> Mixing | None:
        """R-hat and effective sample sizes of the draws; None where they are not at hand.

        Of a chain that was extended or loaded they are those of all draws, of one on disk those of the last run.
        """
        return None if self.find_mixing is None else self.find_mixing()

    @property
    def bias_doubt(self) -> str:
        """Why ``bias_bound`` is not to be relied on; "" where nothing speaks against it."""
        divergent = float(np.sum(self.num_divergent)) / max(self.num_draws * len(self.num_divergent), 1)
        apart = np.mean(self.pair_distances >= APART) if self.pair_distances.size else np.nan
        if self.warmup_remark:
            return "warm-up is in doubt"
        if divergent > MANY_DIVERGENCES:
            return f"{divergent:.1%} of the draws were divergent"
        if self.spread > SPREAD:
            return f"the spread of the draws is up to {self.spread:.1f} times off that of warm-up's ensemble"
        if self.mixing is not None and self.mixing.doubt:
            return "the draws have not mixed"
        return "coupled pairs did not start apart" if apart < 0.5 else ""

    @property
    def predicted_seconds(self) -> float:
        """What the steps behind the plan should take, compilation included; NaN without a plan.

        Of a plan to sample sequentially, corrected by what a step in order turned out to take (``plan.correction``);
        ``plan.chosen.seconds`` is the figure of before the run.
        """
        if self.plan is None:
            return float("nan")
        sequential = self.plan.solver.is_sequential
        return self.plan.chosen.seconds * (self.plan.correction if sequential else 1.0)

    @property
    def predicted_sequential_seconds(self) -> float:
        """The same for sequential sampling, corrected alike; ``plan.sequential_seconds`` is that of before the run."""
        return self.plan.sequential_seconds * self.plan.correction if self.plan else float("nan")

    @property
    def predicted_num_sequential_steps(self) -> tuple[float, float, float]:
        """Critical path as planned, with its interval of 90 %, the first steps included; NaN without a plan."""
        if self.plan is None:
            return (float("nan"),) * 3
        first, chosen = self.num_steps - self.plan.num_steps, self.plan.chosen
        return float(first + chosen.num_steps), float(first + chosen.lower), float(first + chosen.upper)

    def __str__(self) -> str:
        lines = [f"Decision: {self.decision}. {self.reason}"]
        if self.fallback:
            lines.append(f"Fallback: {self.fallback}")
        if self.decision != "sequential":
            lines += self._certificate()
        if self.num_lost_lanes:
            lines.append(
                f"Warm-up: lanes that did not move, far below the others in log density, were put on the places of "
                f"others ({self.num_lost_lanes} in all)."
            )
        if self.warmup_remark:
            lines.append(self.warmup_remark)
        lines += self._contraction()
        rate = np.mean(self.acceptance_rate)
        accepted = "" if np.isnan(rate) else f"Acceptance rate {rate:.3f}; "
        lines.append(f"{accepted}{int(np.sum(self.num_divergent))} divergent transitions.")
        if self.mixing is not None:
            lines.append(self._mixing(self.mixing))
        lines.append(
            f"Seconds: warm-up {self.warmup_seconds:.2f}, pilot {self.pilot_seconds:.2f}, compile "
            f"{self.compile_seconds:.2f}, solve {self.solve_seconds:.2f}; {self.total_seconds:.2f} in all."
        )
        if self.plan is not None:
            lines.append(self._planned(self.plan))
        return "\n".join(lines)

    def _planned(self, plan: Plan) -> str:
        """What was planned, as corrected, beside what it took."""
        line = f"Planned: {_corrected(self.predicted_seconds, plan.chosen.seconds)}, took {self.planned_seconds:.2f} s"
        if plan.solver.is_sequential:
            return f"{line}."
        alone = _corrected(self.predicted_sequential_seconds, plan.sequential_seconds)
        return f"{line}; sequential sampling was expected to take {alone}."

    def _certificate(self) -> list[str]:
        path, total = int(np.max(self.num_sequential_steps)), self.num_steps
        planned = ""
        if self.plan is not None:
            planned = "; planned {:,.0f}, {:,.0f} to {:,.0f}".format(*self.predicted_num_sequential_steps)
        ratio = total / max(path, 1)
        shorter = f"{ratio:.1f} times shorter" if ratio >= SHORTER else "no shorter"
        return [
            f"Critical path: {path:,} steps one after the other for {total:,} steps of each chain "
            f"({shorter}{planned}){self._solver_counts()}",
            f"Certificate: {'; '.join([*self._solved(), self._near_ties()])}.",
        ]

    def _solved(self) -> list[str]:
        """What became of the parallel solves, and of how many steps."""
        solved, others = self.certified_steps, self.num_steps - self.certified_steps
        said = [", ".join(what for _, what in by_result(self.result))] if np.any(solved) or self.fallback else []
        if not np.any(solved):
            return [*said, f"no step solved in parallel, {span(others)} of each chain sampled sequentially"]
        residual = self.residual[solved > 0]
        if np.all(np.isnan(residual)):
            said.append("residual not measured")
        else:
            where = " where it was measured" if np.any(np.isnan(residual)) else ""
            said.append(f"residual at most {np.nanmax(residual):.2g} of the posterior's scale{where}")
        in_order = f", {span(others)} sampled sequentially" if np.any(others) else ""
        return [*said, f"{span(solved)} steps of each chain solved in parallel and certified{in_order}"]

    def _contraction(self) -> list[str]:
        """Lyapunov exponent, bias and blame."""
        rate, error = float("nan"), float("nan")
        if self.plan is not None and self.plan.coalescence is not None:
            rate, error = (float(self.plan.coalescence.growth_rate), float(self.plan.coalescence.growth_error))
        if np.any(np.isfinite(self.lyapunov_exponent)):
            rate = float(np.nanmean(self.lyapunov_exponent))
        lines = []
        if np.isfinite(rate):
            interval = f" +- {2 * error:.2g}" if np.isfinite(error) else ""
            lines.append(
                f"Coupled paths: small distances change by a factor {np.exp(rate):.3f} a step (Lyapunov exponent "
                f"{rate:.3f}{interval} in nats)."
            )
        if self.bias_bound.size:
            lines.append(self._bias())
        if self.diagnosis is not None:
            lines.append(str(self.diagnosis))
        return lines

    def _mixing(self, mixing: Mixing) -> str:
        few = mixing.num_draws < MIN_DRAWS
        return f"Mixing: {'too few draws to judge it' if few else mixing}."

    def _bias(self) -> str:
        small = np.flatnonzero(self.bias_bound <= SMALL_BIAS)
        if not small.size:
            return f"Bias left by warm-up: not below {SMALL_BIAS} sd within {self.bias_bound.size - 1} steps."
        if self.bias_doubt:
            return f"Bias left by warm-up: not judged, since {self.bias_doubt}."
        return (
            f"Bias left by warm-up: below {SMALL_BIAS} sd from step {small[0]} on, relative to the region that the "
            "lanes of warm-up found; of other regions this says nothing."
        )

    def _near_ties(self) -> str:
        total = np.sum(self.near_ties)
        return "near ties not counted" if np.isnan(total) else f"{int(total)} near-tie accept decisions in all"

    def _solver_counts(self) -> str:
        if self.num_blocks > 1:
            return f", in {self.num_blocks} blocks with {int(np.max(self.num_sweeps))} repair sweep(s)."
        if np.any(self.num_iters > 0):
            return f", in {int(np.max(self.num_iters))} iterations."
        return "."


def _corrected(seconds: float, first: float) -> str:
    """A figure of a plan, and what it was before it was corrected where that is something else."""
    at_first = f" ({first:.2f} s at first)" if abs(seconds - first) > LARGE_CORRECTION * first else ""
    return f"{seconds:.2f} s{at_first}"


# So many chains are named by their numbers, more are counted.
MOST_NAMED = 4


def span(counts: Any) -> str:
    """Numbers of steps, one for each chain: one number where they are the same, else the smallest and the largest."""
    least, most = int(np.min(counts)), int(np.max(counts))
    return f"{least:,}" if least == most else f"{least:,} to {most:,}"


def by_result(codes: Any) -> list[tuple[RESULTS, str]]:
    """Each result with its name and the chains that have it, if not all do; `RESULTS.successful` last.

    codes: (C,) one for each chain.
    """
    codes = np.ravel(codes)
    found = sorted(RESULTS(int(code)) for code in np.unique(codes))
    if len(found) == 1:
        return [(found[0], found[0].name)]
    failed = [(code, f"{code.name} in {_chains(np.flatnonzero(codes == code), codes.size)}") for code in found if code]
    others = (RESULTS.successful, f"{RESULTS.successful.name} in the others")
    return failed + [others] * (RESULTS.successful in found)


def _chains(numbers: np.ndarray, total: int) -> str:
    """Some of the chains, named."""
    if len(numbers) > MOST_NAMED:
        return f"{len(numbers)} of {total} chains"
    *first, last = map(str, numbers)
    return f"chains {', '.join(first)} and {last}" if first else f"chain {last}"
