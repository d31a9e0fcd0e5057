"""The report of a run: what was decided, why, and what it cost.

`SolveReport` is filled in by `pmcmc.sampling` and printed by the user; docs/report.md explains every line. `Summary` is
the table of statistics by site.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property
from itertools import product
from typing import Any

import numpy as np

from pmcmc._pytree import ArrayLeaf, PyTree
from pmcmc.chain.draws import Mixing, by_name
from pmcmc.interop.numpyro import summary_of
from pmcmc.planning import Plan
from pmcmc.recurrence import RESULTS
from pmcmc.stability import Diagnosis

# Bias that a report calls small, in posterior standard deviations.
SMALL_BIAS = 0.01
# The bias is not judged if fewer than half of the pairs started at least APART standard deviations apart, or if the
# draws' standard deviation differs from that of the warm-up ensemble by more than the factor SPREAD.
APART, SPREAD = 1.0, 2.0
# Nor is it judged if more than this share of the draws is divergent, which also causes a warning.
MANY_DIVERGENCES = 0.01
# Fields that files do not hold, and arrays that do not have one entry per chain.
NOT_STORED = ("plan", "find_diagnosis", "find_mixing")
BY_PAIR = ("bias_bound", "coalescence_steps", "pair_distances")
# A summary needs this many draws per chain.
FEWEST_SUMMARISED = 4
# The critical path is called shorter than the chain from this ratio on.
SHORTER = 1.05
# If a figure was corrected by more than this share, the original one is printed too.
LARGE_CORRECTION = 0.1


@dataclass(frozen=True)
class SolveReport:
    """How the draws of a `Chain` were made; ``print(report)`` shows it as prose.

    Arrays have one entry per chain, unless a shape is given. Times are wall-clock seconds. If a run was interrupted,
    ``num_sequential_steps``, ``num_iters``, ``num_sweeps`` and ``near_ties`` include steps beyond its last common draw.

    Attributes:
        decision: What was planned: "shooting", "newton" or "sequential". A user-defined solver has its own name
            (`recurrence.RecurrenceSolver.decision`).
        reason: Why, in one sentence.
        plan: What "auto" measured and expected, with the figures from before the run; the last plan if the run was
            planned again. None if the caller chose the solver, if the run was too short to plan, and for a chain that
            was loaded: files do not hold plans.
        bias_bound: Bounds on the influence of the start after t = 0, ..., n-1 steps; shape (n,). They bound the
            1-Wasserstein distance to the law that chains from the warm-up ensemble converge to, in standard deviations
            of that ensemble, and are computed from lagged coupled pairs (Biswas, Jacob & Vanetti 2019). Empty without a
            pilot, or if the pilot proves nothing. They do not cover regions that no lane of warm-up found; see
            `bias_doubt`.
        result: `RESULTS` code of the last parallel solve that ended; successful if there was none.
        fallback: Why the parallel solver was abandoned, how many steps had been solved in parallel and sampled
            sequentially by then, and how many were left; "" if it was not.
        residual: Largest ``|x[t] - f(x[t-1], u[t])| / scale`` among the steps solved in parallel, as measured. If a
            solve failed, only its certified steps count. 0 if there are none, NaN if the solver does not report it.
        num_steps: Number of steps per chain.
        num_sequential_steps: Critical path: number of steps taken one after the other, all segments together.
        num_iters: Number of iterations of a Newton-type solver, all segments together; 0 for other solvers.
        num_sweeps: Largest number of repair sweeps of a segment; 0 for solvers without blocks.
        num_blocks: Number of blocks per chain in the last parallel solve; 1 for solvers without blocks.
        certified_steps: Number of steps that were solved in parallel, certified and kept. All others were sampled
            sequentially: the first ones under "auto", those taken while a program was compiled, and the remainder after
            a fallback.
        near_ties: Number of accept decisions within rounding of a tie, which another machine may decide differently;
            NaN if the kernel does not report them.
        lyapunov_exponent: Mean log growth per step of small distances between coupled paths, measured on merging lanes;
            NaN if there were none.
        coalescence_steps: Number of steps until each pair of the pilot merged, the number of steps of the pilot + 1 if
            it did not; shape (pairs,). Empty without a pilot, or if it proves nothing.
        acceptance_rate: Mean acceptance rate of the draws.
        num_divergent: Number of divergent draws.
        warmup_seconds: Time of warm-up.
        pilot_seconds: Time to compute the partners, whose steps are not draws, and to compare them with the chains.
        compile_seconds: Time that the run waited for compilation.
        solve_seconds: Time of sampling.
        total_seconds: Time of the whole run, copies included.
        planned_seconds: Time of everything after the plan, compilation included; compare with `predicted_seconds`. 0
            without a plan.
        warmup_remark: What is doubtful about warm-up and what may help; "" if nothing is. It is also issued as a
            warning.
        num_lost_lanes: Number of times that warm-up moved a lane to the position of another one, see
            `EnsembleAdaptation`.
        num_draws: Number of draws kept per chain.
        pair_distances: Initial distances of the pairs of the pilot, in standard deviations of the warm-up ensemble;
            shape (pairs,). Empty without a pilot, or if it proves nothing.
        spread: Largest ratio, either way, between the standard deviations of the draws and of the warm-up ensemble; NaN
            if unknown.
        num_lanes: Number of lanes of warm-up, whose last states are the ensemble; 0 without warm-up, or if unknown.
        centredness: Smallest and largest centredness c that warm-up chose for the elements of each partially centred
            site, see `AutoReparam`; empty without it, or if the model has no such sites.
        precision: Precision of matrix products that the settings of JAX ask for, if it is below float32 and the device
            may follow it; "" otherwise.
        stored_diagnosis: The `diagnosis` of a chain that was loaded; None for others.
        find_mixing: Computes `mixing`.
        find_diagnosis: Computes `diagnosis`.
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
    num_lanes: int = 0
    centredness: dict[str, tuple[float, float]] = field(default_factory=dict)
    precision: str = ""
    stored_diagnosis: Diagnosis | None = field(default=None, repr=False)
    find_mixing: Callable[[], Mixing] | None = field(default=None, repr=False, compare=False)
    find_diagnosis: Callable[[], Diagnosis] | None = field(default=None, repr=False, compare=False)

    @cached_property
    def diagnosis(self) -> Diagnosis | None:
        """Which sites keep coupled chains apart, and what may help; None if all pairs merged, or without a pilot.

        It is computed on first use, or when the chain is saved or a stream ends, which takes a few seconds because
        small programs are compiled. Files of earlier versions do not hold it: it is None for their chains.
        """
        return self.stored_diagnosis if self.find_diagnosis is None else self.find_diagnosis()

    @cached_property
    def mixing(self) -> Mixing | None:
        """R-hat and effective sample sizes of the draws; None if the draws are not available.

        For a chain that was extended or loaded they are those of all draws; for a chain on disk, those of the last run.
        """
        return None if self.find_mixing is None else self.find_mixing()

    @property
    def bias_doubt(self) -> str:
        """Why ``bias_bound`` should not be relied on; "" if nothing speaks against it."""
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
        """Predicted time of the steps after the plan, compilation included; NaN without a plan.

        If the plan is to sample sequentially, it is corrected by the measured cost of a sequential step
        (``plan.correction``). ``plan.chosen.seconds`` is the figure from before the run.
        """
        if self.plan is None:
            return float("nan")
        sequential = self.plan.solver.is_sequential
        return self.plan.chosen.seconds * (self.plan.correction if sequential else 1.0)

    @property
    def predicted_sequential_seconds(self) -> float:
        """Predicted time of sequential sampling, corrected in the same way; NaN without a plan.

        ``plan.sequential_seconds`` is the figure from before the run.
        """
        return self.plan.sequential_seconds * self.plan.correction if self.plan else float("nan")

    @property
    def predicted_num_sequential_steps(self) -> tuple[float, float, float]:
        """Planned critical path and its 90 % interval, the first steps included; NaN without a plan."""
        if self.plan is None:
            return (float("nan"),) * 3
        first, chosen = self.plan.num_first, self.plan.chosen
        return float(first + chosen.num_steps), float(first + chosen.lower), float(first + chosen.upper)

    def __str__(self) -> str:
        lines = [f"Decision: {self.decision}. {self.reason}"]
        if self.fallback:
            lines.append(f"Fallback: {self.fallback}")
        if self.decision != "sequential":
            lines += self._certificate()
        if self.num_lost_lanes:
            lines.append(
                f"Warm-up: lanes that stayed far below the others in log density were moved to the positions "
                f"of others ({self.num_lost_lanes} in all)."
            )
        if self.warmup_remark:
            lines.append(self.warmup_remark)
        if self.centredness:
            ranges = [f"{name} {_range(*found)}" for name, found in self.centredness.items()]
            lines.append(f"Centredness (0 non-centred, 1 centred): {', '.join(ranges)}.")
        if self.precision:
            lines.append(
                f"Matrix products: {self.precision}, below float32, as jax_default_matmul_precision asks. Blocks merge "
                "only as closely as this rounds."
            )
        lines += self._contraction()
        rate = np.mean(self.acceptance_rate)
        accepted = "" if np.isnan(rate) else f"Acceptance rate {rate:.3f}; "
        lines.append(f"{accepted}{int(np.sum(self.num_divergent))} divergent draws.")
        if self.mixing is not None:
            lines.append(self._mixing(self.mixing))
        lanes = f" ({self.num_lanes} lanes)" if self.num_lanes and self.warmup_seconds else ""
        lines.append(
            f"Seconds: warm-up {self.warmup_seconds:.2f}{lanes}, pilot {self.pilot_seconds:.2f}, compile "
            f"{self.compile_seconds:.2f}, solve {self.solve_seconds:.2f}; {self.total_seconds:.2f} in all."
        )
        if self.plan is not None:
            lines.append(self._planned(self.plan))
        return "\n".join(lines)

    def _planned(self, plan: Plan) -> str:
        """Return the line that compares the plan with the time taken."""
        line = f"Planned: {_corrected(self.predicted_seconds, plan.chosen.seconds)}, took {self.planned_seconds:.2f} s"
        if plan.solver.is_sequential:
            return f"{line}."
        alone = _corrected(self.predicted_sequential_seconds, plan.sequential_seconds)
        return f"{line}; sequential sampling was expected to take {alone}."

    def _certificate(self) -> list[str]:
        """Return the lines on the critical path and the certificate."""
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
        """Return the parts of the certificate on the results of the parallel solves and the numbers of steps."""
        solved, others = self.certified_steps, self.num_steps - self.certified_steps
        ended = np.any(solved) or np.any(self.result)  # a solve whose program failed has no result
        said = [", ".join(what for _, what in by_result(self.result))] if ended else []
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
        """Return the lines on growth rate, bias and diagnosis."""
        rate, error = float("nan"), float("nan")
        if self.plan is not None and self.plan.coalescence is not None:
            rate, error = (float(self.plan.coalescence.growth_rate), float(self.plan.coalescence.growth_error))
        if np.any(np.isfinite(self.lyapunov_exponent)):
            rate, error = float(np.nanmean(self.lyapunov_exponent)), float("nan")  # that of blocks, of unknown error
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
        """Return the line on mixing."""
        return f"Mixing: {'too few draws to judge it' if mixing.has_few_draws else mixing}."

    def _bias(self) -> str:
        """Return the line on the bias of the start."""
        above = np.flatnonzero(self.bias_bound > SMALL_BIAS)  # the bounds need not decrease from step to step
        first = int(above[-1]) + 1 if above.size else 0
        what, region = "Bias left by warm-up", "that the lanes of warm-up found"
        if not self.num_lanes:
            what, region = "Bias of the starts", "where chains and their partners started"
        if first == self.bias_bound.size:
            return f"{what}: not below {SMALL_BIAS} sd within {self.bias_bound.size - 1} steps."
        if self.bias_doubt:
            return f"{what}: not judged, since {self.bias_doubt}."
        return (
            f"{what}: below {SMALL_BIAS} sd from step {first} on, relative to the region {region}; of other regions "
            "this says nothing."
        )

    def _near_ties(self) -> str:
        """Return the part of the certificate on near ties."""
        total = np.sum(self.near_ties)
        return "near ties not counted" if np.isnan(total) else f"{int(total)} near-tie accept decisions in all"

    def _solver_counts(self) -> str:
        """Return the end of the line on the critical path: blocks and sweeps, or iterations."""
        if self.num_blocks > 1:
            sweeps = int(np.max(self.num_sweeps))
            most = f"up to {sweeps}" if sweeps > 1 else f"{sweeps}"
            return f", in {self.num_blocks} blocks with {most} repair sweep(s) a segment."
        if np.any(self.num_iters > 0):
            return f", in {int(np.max(self.num_iters))} iterations."
        return "."


def _corrected(seconds: float, first: float) -> str:
    """Return a figure of a plan as text, and the original one if the correction was large."""
    at_first = f" ({first:.2f} s at first)" if abs(seconds - first) > LARGE_CORRECTION * first else ""
    return f"{seconds:.2f} s{at_first}"


def _range(least: float, most: float) -> str:
    """Return a range of centredness as text, or its one value."""
    return f"{least:.2f}" if least == most else f"{least:.2f} to {most:.2f}"


# Up to this many chains are named by their numbers; more are counted.
MOST_NAMED = 4


def span(counts: Any) -> str:
    """Return numbers of steps, one per chain, as text: the number if they are equal, otherwise the range."""
    least, most = int(np.min(counts)), int(np.max(counts))
    return f"{least:,}" if least == most else f"{least:,} to {most:,}"


def by_result(codes: Any) -> list[tuple[RESULTS, str]]:
    """Return each result with a text that names it and, if results differ, the chains that have it.

    `RESULTS.successful` comes last.

    Args:
        codes: Codes of the chains; shape (C,).
    """
    codes = np.ravel(codes)
    found = sorted(RESULTS(int(code)) for code in np.unique(codes))
    if len(found) == 1:
        return [(found[0], found[0].name)]
    failed = [(code, f"{code.name} in {_chains(np.flatnonzero(codes == code), codes.size)}") for code in found if code]
    others = (RESULTS.successful, f"{RESULTS.successful.name} in the others")
    return failed + [others] * (RESULTS.successful in found)


def _chains(numbers: np.ndarray, total: int) -> str:
    """Return a text that names some of the chains."""
    if len(numbers) > MOST_NAMED:
        return f"{len(numbers)} of {total} chains"
    *first, last = map(str, numbers)
    return f"chains {', '.join(first)} and {last}" if first else f"chain {last}"


class Summary(dict):
    """Statistics by site, ``{site: {statistic: array}}``, as ``numpyro.diagnostics.summary`` returns them.

    It prints as NumPyro's table. The statistics are ``mean``, ``std``, ``median``, both ends of the highest posterior
    density interval (``5.0%`` and ``95.0%`` by default), ``n_eff`` and ``r_hat``; their arrays have the site's shape.

    Attributes:
        num_divergences: Number of divergent draws.

    Example:
        >>> import jax.numpy as jnp, pmcmc
        >>> logdensity = lambda x: -0.5 * jnp.sum(x["a"] ** 2)
        >>> chain = pmcmc.sample(logdensity, {"a": jnp.zeros(2)}, 0, num_samples=100, progress_bar=False)
        >>> summary = chain.summary()
        >>> summary["a"]["mean"].shape, len(str(summary).splitlines())
        ((2,), 6)
    """

    num_divergences: int

    def __init__(self, samples: PyTree, prob: float, is_divergent: ArrayLeaf):
        if (num_draws := np.shape(is_divergent)[1]) < FEWEST_SUMMARISED:
            raise ValueError(
                f"a summary needs at least {FEWEST_SUMMARISED} draws per chain, since R-hat compares halves of chains: "
                f"got {num_draws}. Take more with extend()."
            )
        super().__init__(summary_of(by_name(samples), prob))
        self.num_divergences = int(np.sum(is_divergent))

    def __repr__(self) -> str:
        rows = []
        for site, found in self.items():
            for index in product(*map(range, np.shape(found["mean"]))):
                name = f"{site}[{','.join(map(str, index))}]" if index else site
                rows.append((name, [f"{values[index]:9.2f}" for values in found.values()]))
        width = max([10, *(len(name) for name, _ in rows)])
        header = ("", [f"{name:>9}" for name in next(iter(self.values()), {})])
        table = "\n".join(" ".join([name.rjust(width), *cells]) for name, cells in [header, *rows])
        return f"\n{table}\n\nNumber of divergences: {self.num_divergences}"
