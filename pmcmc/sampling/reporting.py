"""The report of a run, and warnings about doubtful draws.

`Outcome` holds a run with its settings. `Outcome.report` makes the `SolveReport` at any time, `Outcome.warn` judges the
draws once all are taken.
"""

import time
import warnings
from dataclasses import dataclass, replace
from functools import partial

import jax
import numpy as np

from pmcmc._pytree import PyTree
from pmcmc._warnings import user_level
from pmcmc._xla.precision import asked_for
from pmcmc.chain.draws import judge_mixing, stride_of
from pmcmc.chain.report import MANY_DIVERGENCES, SolveReport, by_result, span
from pmcmc.chain.state import ChainState
from pmcmc.kernels import SiteKernel
from pmcmc.kernels.base import higher_rate
from pmcmc.recurrence import Sequential
from pmcmc.sampling.automatic import Automatic
from pmcmc.sampling.segments import Counts, Run
from pmcmc.sampling.settings import Settings

# A chain is stuck if its acceptance probabilities add up to less than the first number over all its draws. With fewer
# draws than the second number, nothing is concluded.
STUCK, FEW_DRAWS = 1e-3, 100
# Mixing is judged at the end of a run if at most this many numbers are needed; otherwise when the user asks for it.
MOST_JUDGED = 2**23
# The user is warned about the chosen solver if it failed before it had solved this share of the steps of any chain.
SMALL_SHARE = 0.1


@dataclass
class Outcome:
    """What a run was asked for and what it has done.

    Attributes:
        state: Where the chains started.
        settings: What the user asked for.
        run: The segments taken so far, and their counts.
        automatic: The decisions of ``solver="auto"``; None for a solver that the user chose.
        began: Time at which the call began, in seconds of `time.perf_counter`.
        warmup_seconds: Time that warm-up took.
    """

    state: ChainState
    settings: Settings
    run: Run
    automatic: Automatic | None
    began: float
    warmup_seconds: float

    def after(self, x: PyTree, num_steps: int) -> tuple[ChainState, SolveReport]:
        """Return the state and the report after a number of steps.

        Args:
            x: Unknowns of the chains after these steps, leading axis C.
            num_steps: Steps since the chains started.
        """
        num_unkept = (self.state.num_unkept + num_steps) % self.settings.thinning
        total = self.state.num_steps + num_steps
        return self.state._replace(unknown=x, num_steps=total, num_unkept=num_unkept), self.report(num_steps)

    def warn(self, report: SolveReport, num_draws: int) -> None:
        """Warn about doubtful draws, once all are taken.

        Args:
            report: Report of these draws.
            num_draws: Draws per chain whose mixing the report judges: also those before this run if they are in memory.

        Warns:
            UserWarning: The chosen solver failed early, a chain is stuck, a coordinate never moved, many draws were
                divergent, or the chains have not mixed.
        """
        self._warn_of_failed_solver()
        if not self._warn_of_stuck_chains():
            self._warn_of_still_coordinates()
            self._warn_of_divergences()
            self._warn_of_mixing(report, num_draws)

    def _warn_of_mixing(self, report: SolveReport, num_draws: int) -> None:
        """Warn if the draws have not mixed, unless that takes too long to find out; see `MOST_JUDGED`."""
        chains, dim = self.settings.num_chains, self.state.target.dim
        looked_at = chains * dim * (num_draws // stride_of(chains, num_draws, dim))
        if looked_at <= MOST_JUDGED and report.mixing is not None and report.mixing.doubt:
            warnings.warn(report.mixing.doubt, stacklevel=user_level())

    def _warn_of_failed_solver(self) -> None:
        """Warn if a solver that the user chose left all of the run, or nearly all, to sequential sampling."""
        solver, counts, num_steps = self.settings.solver, self.run.counts, self.run.num_steps
        solved = counts.certified_steps
        if solver is None or not counts.fallback or np.max(solved) >= SMALL_SHARE * num_steps:
            return
        share = f"only {span(solved)}" if np.any(solved) else "none"
        messages = " ".join(f"{what}: {code.message}" for code, what in by_result(counts.result) if code)
        warnings.warn(
            f"{type(solver).__name__} solved {share} of {num_steps:,} steps of each chain in parallel; the others were "
            f"sampled sequentially, which gives the same draws and saves no time. {messages} Or leave the choice to "
            'solver="auto".',
            stacklevel=user_level(),
        )

    def _warn_of_divergences(self) -> None:
        """Warn if many draws were divergent."""
        moves = self.run.draws.moves
        num_divergent, num_draws = int(np.sum(moves.num_divergent)), int(np.sum(moves.num_draws))
        few = num_draws < FEW_DRAWS or num_divergent <= MANY_DIVERGENCES * num_draws
        if few or not self.state.kernel.divergences_matter:
            return
        if isinstance(self.state.kernel, SiteKernel):
            cause = (
                "A divergence is a conditional whose probabilities are not finite, where the old value was kept, or a "
                "divergent transition of a site group: check the updates for NaN and overflow, and reparametrise."
            )
        else:
            kernel, by = self.state.kernel, ""
            if kernel.uses_gradient:
                rate = f"{higher_rate(kernel.target_acceptance_rate(self.state.target.dim)):.2g}"
                by = (
                    f" by a higher acceptance rate, as in warmup=EnsembleAdaptation(target_acceptance_rate={rate}) or "
                    f"numpyro.infer.NUTS(model, target_accept_prob={rate})"
                )
            cause = (
                "The step size does not resolve some region of the posterior, which draws may miss: reparametrise (a "
                f"non-centred form, for instance), or take smaller steps{by}."
            )
        warnings.warn(
            f"{num_divergent:,} of {num_draws:,} draws ({num_divergent / num_draws:.1%}) were divergent. {cause}",
            stacklevel=user_level(),
        )

    def _warn_of_stuck_chains(self) -> bool:
        """Warn if a chain accepted no move, so that all its draws are one point.

        Chains are judged by their acceptance probabilities, not by their moves: a few proposals may be rejected by
        chance.

        Returns:
            Whether any chain accepted no move.
        """
        moves = self.run.draws.moves
        num_draws = int(moves.num_draws[0])
        stuck = np.flatnonzero(moves.acceptance_rate * num_draws < STUCK)
        is_stuck = bool(stuck.size) and num_draws >= FEW_DRAWS
        if is_stuck:
            warnings.warn(
                f"chain(s) {', '.join(map(str, stuck))} accepted no move in {num_draws:,} draws. Leave the step size "
                "and num_warmup to pmcmc (step_size=None, num_warmup=1000), take a smaller step size, or start "
                "elsewhere (init_params, or initial_position of pmcmc.sample).",
                stacklevel=user_level(),
            )
        return is_stuck

    def _warn_of_still_coordinates(self) -> None:
        """Warn if some coordinates of a chain never changed their value."""
        flat = [np.reshape(moved, (len(moved), -1)) for moved in self.run.moved]
        still = ~np.concatenate(flat, axis=1)
        if self.run.num_steps < FEW_DRAWS or not still.any():
            return
        names = lambda flags: ", ".join(map(str, np.flatnonzero(flags)[:8]))
        warnings.warn(
            f"coordinate(s) {names(still.any(axis=0))} of the state never moved in {self.run.num_steps:,} steps of "
            f"chain(s) {names(still.any(axis=1))}, so the draws do not explore them. Check that the kernel updates "
            "them.",
            stacklevel=user_level(),
        )

    def report(self, num_steps: int) -> SolveReport:
        """Return the report of the run so far.

        Args:
            num_steps: Steps per chain of the draws that are reported.
        """
        run, automatic, settings = self.run, self.automatic, self.settings
        counts, moves, chains, clock = run.counts, run.draws.moves, settings.num_chains, run.engine.clock
        per_chain = lambda value, dtype=int: np.full(chains, value, dtype)  # a copy: the counts go on
        plan = None if automatic is None else automatic.plan
        solver, reason = settings.solver or Sequential(), "Chosen by the caller."
        if automatic is not None:
            solver, reason = (Sequential() if plan is None else plan.solver), automatic.reason
        pilot = None if plan is None else plan.coalescence
        if automatic is not None and plan is not None:
            plan = replace(plan, correction=automatic.correction, num_first=run.num_steps - plan.num_steps)
        return SolveReport(
            decision=solver.decision,
            reason=reason,
            plan=plan,
            bias_bound=np.zeros(0) if automatic is None else automatic.bias_bound,
            result=per_chain(counts.result),
            fallback=counts.fallback,
            residual=per_chain(counts.residual, float),
            num_steps=num_steps,
            num_sequential_steps=per_chain(counts.critical_path),
            num_iters=per_chain(counts.num_iters),
            num_sweeps=per_chain(counts.num_sweeps),
            num_blocks=counts.num_blocks,
            certified_steps=per_chain(np.clip(num_steps - counts.solved_from, 0, counts.certified_steps)),
            near_ties=per_chain(counts.near_ties) if moves.has_margin else per_chain(np.nan, float),
            lyapunov_exponent=_growth_rate(counts),
            coalescence_steps=np.zeros(0, int) if pilot is None else np.asarray(pilot.steps),
            acceptance_rate=moves.acceptance_rate,
            num_divergent=moves.num_divergent,
            warmup_seconds=self.warmup_seconds,
            pilot_seconds=0.0 if automatic is None else automatic.pilot_seconds,
            compile_seconds=clock.compile_seconds,
            solve_seconds=clock.run_seconds - (0.0 if automatic is None else automatic.partner_seconds),
            total_seconds=time.perf_counter() - self.began,
            planned_seconds=0.0 if automatic is None else automatic.seconds,
            warmup_remark=self.state.warmup_remark,
            num_lost_lanes=self.state.num_lost_lanes,
            num_lanes=self.state.num_lanes,
            centredness={
                name: (round(float(np.min(c)), 2), round(float(np.max(c)), 2))
                for name, c in self.state.target.centredness.items()
            },
            precision=asked_for(),
            num_draws=int(moves.num_draws[0]),
            pair_distances=np.zeros(0) if pilot is None else np.asarray(pilot.distances)[0],
            spread=_spread(self.state, run.draws.some[0]),
            find_mixing=partial(judge_mixing, self.state.target, self.state.kernel, *run.draws.some),
            find_diagnosis=None if automatic is None else automatic.find_diagnosis,
        )


def _spread(state: ChainState, unknowns: PyTree) -> float:
    """Largest ratio, either way, between the standard deviations of the draws and of warm-up's ensemble.

    The ensemble has the standard deviations `ChainState.scale`.

    Args:
        state: Where the chains started.
        unknowns: Draws; shape (C, n, ...).

    Returns:
        The largest ratio over the coordinates; NaN if warm-up found no basis, or if there are too few draws.
    """
    if state.scale is None or jax.tree.leaves(unknowns)[0].shape[1] < FEW_DRAWS:
        return float("nan")
    (rows,), (scale,) = jax.tree.leaves(unknowns), jax.tree.leaves(state.scale)
    stride = stride_of(rows.shape[0], rows.shape[1], rows[0, 0].size)
    deviation = np.std(rows[:, ::stride], axis=(0, 1), dtype=float) / scale
    with np.errstate(divide="ignore"):
        return float(np.max(np.maximum(deviation, 1 / deviation)))


def _growth_rate(counts: Counts) -> np.ndarray:
    """Mean growth rate over the segments that measured one, shape (C,); NaN for chains without any."""
    return np.where(counts.num_growths > 0, counts.growth, np.nan) / np.maximum(counts.num_growths, 1)
