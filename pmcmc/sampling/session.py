"""One run of tuned chains, wherever its draws go, and what can be told of it."""

import time
import warnings
from dataclasses import replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from pmcmc._progress import Progress
from pmcmc._typing import PyTree
from pmcmc._xla.background import Ahead
from pmcmc.chain.chain import Chain
from pmcmc.chain.draws import judge_mixing
from pmcmc.chain.mixing import stride_of
from pmcmc.chain.report import MANY_DIVERGENCES, SolveReport, by_result, span
from pmcmc.chain.state import ChainState
from pmcmc.chain.stored import StoredChain
from pmcmc.kernels import Compose, Kernel, RandomWalk, SiteKernel
from pmcmc.random.streams import chain_keys
from pmcmc.recurrence import Sequential
from pmcmc.sampling.automatic import Automatic
from pmcmc.sampling.programs import Engine
from pmcmc.sampling.segments import Counts, Run
from pmcmc.sampling.settings import Settings
from pmcmc.sampling.sinks import Keeper

# A chain whose acceptance probabilities add up to less than this over all of its draws has not moved, unless there are
# too few of them to tell.
STUCK, FEW_DRAWS = 1e-3, 100


# A run looks at how its draws have mixed where this takes no more numbers; for others it is worked out when asked for.
MOST_JUDGED = 2**22


# A solver of the user's own choice that failed before it had solved this share of any chain is warned of.
SMALL_SHARE = 0.1


class Interrupted(KeyboardInterrupt):
    """Ctrl-C while draws were taken: those that stand are kept in ``chain``.

    A program that has begun is not stopped: the interruption comes when the segment under way has ended. Before the
    first draw was kept, during warm-up for instance, there is nothing to keep and a plain KeyboardInterrupt is raised.

    chain: a `Chain` of the draws so far, which `Chain.extend` continues as if nothing had been; from `Chain.stream` the
        `StoredChain` of the last checkpoint, from which `resume` goes on, too.

    Example:
        >>> import jax.numpy as jnp, pmcmc
        >>> try:
        ...     chain = pmcmc.sample(lambda x: -jnp.sum(x**2), jnp.zeros(2), 0, num_samples=100, progress_bar=False)
        ... except pmcmc.Interrupted as stopped:
        ...     chain = stopped.chain
    """

    def __init__(self, chain: Chain | StoredChain, num_wanted: int):
        self.chain: Any = chain
        self.num_wanted = num_wanted
        super().__init__(
            f"stopped after {chain.report.num_steps:,} of {num_wanted:,} steps. They are the attribute `chain` of this "
            "exception: chain.extend(...) goes on from there."
        )


def settings_of(chain: Chain | StoredChain, num_samples: Any, max_memory: Any) -> Settings:
    """For steps that follow a chain."""
    return Settings.check(
        chain.state.target,
        chain.state.kernel,
        "auto" if chain.solver is None else chain.solver,
        0,
        num_samples,
        chain.num_chains,
        chain.thinning,
        chain.extra_fields if isinstance(chain, Chain) else (),
        None,
        chain.devices,
        max_memory,
    )


def engine_of(state: ChainState, ahead: Ahead) -> Engine:
    """Of a state that is only compiled for, shapes will do."""
    keys = chain_keys(state.rng_key, num_chains=len(state.own))
    return Engine(state.target, state.kernel, keys, state.ensemble, scale_of(state), ahead, state.num_steps)


def restarted(state: ChainState, number: int) -> tuple[Engine, PyTree]:
    """An engine of one of the chains, for its steps from the first on, and its unknown before it (1, ...)."""
    keys = chain_keys(state.rng_key, num_chains=len(state.own))[number : number + 1]
    own = state.own[number : number + 1]
    x0 = jax.tree.map(lambda x: jnp.asarray(np.asarray(x)[own]), state.ensemble)
    return Engine(state.target, state.kernel, keys, state.ensemble, scale_of(state)), x0


def scale_of(state: ChainState) -> PyTree:
    """Of an unknown: one where it is the coordinates in a basis that warm-up found, else not known (None)."""
    if state.target.basis is None or len(jax.tree.leaves(state.ensemble)) > 1:
        return None
    return jax.tree.map(lambda x: np.ones(x.shape[1:], x.dtype), state.ensemble)


class Sampling:
    """Steps of all chains from a state on.

    num_planned: see `Run`. began, warmup_seconds: for the report.
    """

    def __init__(
        self,
        state: ChainState,
        settings: Settings,
        engine: Engine,
        draws: Keeper,
        progress: Progress,
        began: float,
        warmup_seconds: float,
        num_planned: int | None = None,
    ):
        progress.sample()
        self.state, self.settings, self.began, self.warmup_seconds = state, settings, began, warmup_seconds
        self.run = Run(
            engine,
            state.unknown,
            settings.num_samples,
            settings.thinning,
            progress,
            draws,
            state.num_unkept,
            num_planned,
        )
        self.automatic: Automatic | None = None
        if settings.solver is None:
            self.automatic = Automatic(self.run, state.own, state.timing, settings.devices)

    def execute(self) -> None:
        """Take all steps."""
        if self.settings.solver is not None:
            self.run.with_solver(self.settings.solver)
        elif self.automatic is not None:
            self.automatic.execute()

    def standing(self, x: PyTree, num_steps: int) -> tuple[ChainState, SolveReport]:
        """The chains stand at ``x``, after so many of the steps."""
        state = self.state
        num_unkept = (state.num_unkept + num_steps) % self.settings.thinning
        after = state._replace(unknown=x, num_steps=state.num_steps + num_steps, num_unkept=num_unkept)
        return after, self._report(num_steps)

    def warn(self, report: SolveReport) -> None:
        """Say what is doubtful about the draws, once all are taken; for the caller of `parallel_chain` and `sample`.

        report: of these draws.
        """
        self._warn_of_failed_solver()
        if not self._warn_of_stuck_chains():
            self._warn_of_still_coordinates()
            self._warn_of_divergences()
            self._warn_of_mixing(report)

    def _warn_of_mixing(self, report: SolveReport) -> None:
        chains, dim = self.settings.num_chains, self.state.target.dim
        num_draws = int(self.run.draws.moves.num_draws[0])
        looked_at = chains * dim * (num_draws // stride_of(chains, num_draws, dim))
        if looked_at <= MOST_JUDGED and report.mixing is not None and report.mixing.doubt:
            warnings.warn(report.mixing.doubt, stacklevel=6)

    def _warn_of_failed_solver(self) -> None:
        """Say where a solver that the user chose left all of the run, or nearly so, to sequential sampling."""
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
            stacklevel=6,
        )

    def _warn_of_divergences(self) -> None:
        moves = self.run.draws.moves
        num_divergent, num_draws = int(np.sum(moves.num_divergent)), int(np.sum(moves.num_draws))
        few = num_draws < FEW_DRAWS or num_divergent <= MANY_DIVERGENCES * num_draws
        if few or not _divergences_tell(self.state.kernel):
            return
        if isinstance(self.state.kernel, SiteKernel):
            cause = (
                "A divergence is a conditional whose probabilities are not finite, where the old value was kept, or a "
                "divergent transition of a block: check the updates for NaN and overflow, and reparametrise."
            )
        else:
            cause = (
                "The step size does not resolve some region of the posterior, which draws may miss: reparametrise (a "
                "non-centred form, for instance), or take smaller steps by a higher acceptance rate, as in "
                "warmup=EnsembleAdaptation(target_acceptance_rate=0.95) or numpyro.infer.NUTS(model, "
                "target_accept_prob=0.95)."
            )
        warnings.warn(
            f"{num_divergent:,} of {num_draws:,} draws ({num_divergent / num_draws:.1%}) were divergent. {cause}",
            stacklevel=6,
        )

    def _warn_of_stuck_chains(self) -> bool:
        """Say where a chain accepted nothing, and whether any did: such draws are one point, however many they are.

        Judged by the probabilities, not by the moves: a few draws may stand still by chance.
        """
        moves = self.run.draws.moves
        num_draws = int(moves.num_draws[0])
        stuck = np.flatnonzero(moves.acceptance_rate * num_draws < STUCK)
        is_stuck = bool(stuck.size) and num_draws >= FEW_DRAWS
        if is_stuck:
            warnings.warn(
                f"chain(s) {', '.join(map(str, stuck))} accepted no move in {num_draws:,} draws. Leave the step size "
                "and num_warmup to pmcmc (step_size=None, num_warmup=1000), take a smaller step size, or start "
                "elsewhere with init_params.",
                stacklevel=6,
            )
        return is_stuck

    def _warn_of_still_coordinates(self) -> None:
        """Say where some coordinates of a chain kept their value while others moved."""
        flat = [np.reshape(moved, (len(moved), -1)) for moved in self.run.moved]
        still = ~np.concatenate(flat, axis=1)
        if self.run.num_steps < FEW_DRAWS or not still.any():
            return
        names = lambda flags: ", ".join(map(str, np.flatnonzero(flags)[:8]))
        warnings.warn(
            f"coordinate(s) {names(still.any(axis=0))} of the state never moved in {self.run.num_steps:,} steps of "
            f"chain(s) {names(still.any(axis=1))}, so the draws do not explore them. Check that the kernel updates "
            "them.",
            stacklevel=6,
        )

    def _report(self, num_steps: int) -> SolveReport:
        run, automatic, settings = self.run, self.automatic, self.settings
        counts, moves, chains, clock = run.counts, run.draws.moves, settings.num_chains, run.engine.clock
        per_chain = lambda value, dtype=int: np.broadcast_to(np.asarray(value, dtype), (chains,))
        plan = None if automatic is None else automatic.plan
        solver, reason = settings.solver or Sequential(), "Chosen by the caller."
        if automatic is not None:
            solver, reason = (Sequential() if plan is None else plan.solver), automatic.reason
        pilot = None if plan is None else plan.coalescence
        return SolveReport(
            decision=solver.decision,
            reason=reason,
            plan=None if automatic is None or plan is None else replace(plan, correction=automatic.correction),
            bias_bound=np.zeros(0) if automatic is None else automatic.bias_bound,
            result=per_chain(counts.result),
            fallback=counts.fallback,
            residual=per_chain(counts.residual, float),
            num_steps=num_steps,
            num_sequential_steps=per_chain(counts.critical_path),
            num_iters=per_chain(counts.num_iters),
            num_sweeps=per_chain(counts.num_sweeps),
            num_blocks=counts.num_blocks,
            certified_steps=per_chain(np.minimum(counts.certified_steps, num_steps)),
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
            num_draws=int(moves.num_draws[0]),
            pair_distances=np.zeros(0) if pilot is None else np.asarray(pilot.distances)[0],
            spread=_spread(self.state, run.draws.some[0]),
            find_mixing=partial(judge_mixing, self.state.target, self.state.kernel, *run.draws.some),
            find_diagnosis=None if automatic is None else automatic.find_diagnosis,
        )


def _spread(state: ChainState, unknowns: PyTree) -> float:
    """The largest ratio, either way, of the draws' standard deviation to that of warm-up's ensemble.

    Over the coordinates; NaN where warm-up found no basis, or too few draws moved. unknowns: (C, n, ...).
    """
    if scale_of(state) is None or jax.tree.leaves(unknowns)[0].shape[1] < FEW_DRAWS:
        return float("nan")
    (rows,) = jax.tree.leaves(unknowns)
    stride = stride_of(rows.shape[0], rows.shape[1], rows[0, 0].size)
    deviation = np.std(rows[:, ::stride], axis=(0, 1), dtype=float)
    with np.errstate(divide="ignore"):
        return float(np.max(np.maximum(deviation, 1 / deviation)))


def _divergences_tell(kernel: Kernel) -> bool:
    """Whether a divergence is a fault; a random walk loses much log density by a proposal that is merely far off."""
    if isinstance(kernel, Compose):
        return any(_divergences_tell(block.kernel) for block in kernel.blocks)
    return not isinstance(kernel, RandomWalk)


def _growth_rate(counts: Counts) -> np.ndarray:
    """Mean over segments, where any saw a small distance."""
    return np.where(counts.num_growths > 0, counts.growth, np.nan) / np.maximum(counts.num_growths, 1)
