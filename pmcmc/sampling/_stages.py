"""Warm-up, pilot, solve, report: the stages behind the public functions, timed one by one."""

import time
import warnings
from contextlib import closing
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np

from pmcmc._types import Array, PRNGKey, PyTree
from pmcmc.chain import Chain, ChainState
from pmcmc.kernels import Info
from pmcmc.kernels._stream import chain_keys
from pmcmc.recurrence import MultipleShooting, RecurrenceSolver, Sequential
from pmcmc.report import SolveReport
from pmcmc.sampling._ahead import Ahead
from pmcmc.sampling._auto import Automatic, compile_first
from pmcmc.sampling._engine import Engine
from pmcmc.sampling._memory import check_memory
from pmcmc.sampling._progress import Progress, WarmupRecord
from pmcmc.sampling._run import Draws, Run
from pmcmc.sampling._settings import Settings
from pmcmc.target import Target, check_starts
from pmcmc.warmup import Tuned
from pmcmc.warmup._base import Watch

# A chain whose acceptance probabilities add up to less than this over all of its draws has not moved, unless there are
# too few of them to tell.
STUCK, FEW_DRAWS = 1e-3, 100


class Interrupted(KeyboardInterrupt):
    """Ctrl-C while draws were taken: those that stand are kept in ``chain``.

    A program that has begun is not stopped: the interruption comes when the segment under way has ended. Before the
    first draw was kept, during warm-up for instance, there is nothing to keep and a plain KeyboardInterrupt is raised.

    chain: a `Chain` of the draws so far, which `Chain.extend` continues as if nothing had been.

    Example:
        >>> import jax.numpy as jnp, pmcmc
        >>> try:
        ...     chain = pmcmc.sample(lambda x: -jnp.sum(x**2), jnp.zeros(2), 0, num_samples=100, progress_bar=False)
        ... except pmcmc.Interrupted as stopped:
        ...     chain = stopped.chain
    """

    def __init__(self, chain: Chain, num_wanted: int):
        self.chain, self.num_wanted = chain, num_wanted
        super().__init__(
            f"stopped after {chain.report.num_steps:,} of {num_wanted:,} steps. They are the attribute `chain` of this "
            "exception: chain.extend(...) goes on from there."
        )


def run_stages(
    target: Target,
    rng_key: PRNGKey,
    starts: PyTree,
    settings: Settings,
    progress_bar: bool,
    record: WarmupRecord | None = None,
) -> Chain:
    """Draws from ``starts`` (positions, leading axis num_starts, or num_chains without warm-up).

    record: keeps warm-up's draws for the chain.
    """
    began = time.perf_counter()
    with Progress(settings.num_samples, progress_bar) as progress, closing(Ahead()) as ahead:
        state, remark = _warm_up(target, rng_key, starts, settings, progress, ahead, record)
        return _sample(state, settings, progress, ahead, began, time.perf_counter() - began, remark, record)


def warm_up(target: Target, rng_key: PRNGKey, starts: PyTree, settings: Settings, progress_bar: bool) -> ChainState:
    """Where the chains of `run_stages` with the same arguments begin."""
    with Progress(settings.num_samples, progress_bar) as progress, closing(Ahead()) as ahead:
        return _warm_up(target, rng_key, starts, settings, progress, ahead)[0]


def sample_from(state: ChainState, settings: Settings, progress_bar: bool) -> Chain:
    """Draws that follow a state; the chain holds these alone."""
    with Progress(settings.num_samples, progress_bar) as progress, closing(Ahead()) as ahead:
        return _sample(state, settings, progress, ahead, time.perf_counter(), 0.0)


def extend(chain: Chain, num_samples: int, progress_bar: bool) -> Chain:
    """See `Chain.extend`."""
    solver = "auto" if chain.solver is None else chain.solver
    settings = Settings.check(
        chain.target,
        chain.kernel,
        solver,
        0,
        num_samples,
        chain.num_chains,
        chain.thinning,
        chain.extra_fields,
        None,
        chain.devices,
    )
    try:
        return _join(chain, sample_from(chain.state, settings, progress_bar))
    except Interrupted as stopped:
        raise Interrupted(_join(chain, stopped.chain), num_samples) from stopped


def _join(chain: Chain, more: Chain) -> Chain:
    """One chain of both; what is not draws is that of the second."""
    join = lambda old, new: np.concatenate([old, new], axis=1)
    both = jax.tree.map(join, (chain.unknowns, chain.info), (more.unknowns, more.info))
    report = replace(more.report, warmup_remark=chain.report.warmup_remark)
    return replace(more, unknowns=both[0], info=both[1], report=report, warmup_path=chain.warmup_path)


def _warm_up(
    target: Target,
    rng_key: PRNGKey,
    starts: PyTree,
    settings: Settings,
    progress: Progress,
    ahead: Ahead,
    record: WarmupRecord | None = None,
) -> tuple[ChainState, str]:
    """From ``starts`` to where the chains begin, with warm-up's remark; programs for sampling are compiled beside."""
    settings.kernel.check(target)
    check_starts(target, starts)
    settings.kernel.check_start(target, jax.tree.map(lambda x: np.asarray(x)[0], starts))
    warmup_key, chain_key = _split_keys(rng_key)
    if settings.num_warmup and (expected := settings.warmup.tuned_shapes(target, settings.kernel)) is not None:
        engine = _engine(_begin(expected, chain_key, settings), ahead)
        check_memory(engine, settings.num_samples, settings.num_samples // settings.thinning)
        compile_first(engine, settings.solver, settings.num_samples)

    def watch(target: Target, path: Array) -> None:
        progress.warmed(target, path)
        if record is not None:
            record(target, path)

    tuned = _tune(target, warmup_key, starts, settings, watch)
    state = _begin(tuned, chain_key, settings)
    unknown = jax.tree.map(lambda x: jnp.asarray(np.asarray(x)[state.own]), state.ensemble)
    return state._replace(unknown=unknown), tuned.remark


def _begin(tuned: Tuned, chain_key: PRNGKey, settings: Settings) -> ChainState:
    """Arrays, or shapes where that is all there is yet; ``unknown`` is still to be filled in."""
    own = _chain_starts(tuned, settings)
    return ChainState(tuned.target, tuned.kernel, None, chain_key, 0, 0, tuned.states, own, tuned.timing)


def _sample(
    state: ChainState,
    settings: Settings,
    progress: Progress,
    ahead: Ahead,
    began: float,
    warmup_seconds: float,
    warmup_remark: str = "",
    record: WarmupRecord | None = None,
) -> Chain:
    progress.sample()
    engine = _engine(state, ahead)
    total = state.num_unkept + settings.num_samples
    check_memory(engine, settings.num_samples, total // settings.thinning)
    run = Run(engine, state.unknown, settings.num_samples, settings.thinning, progress, state.num_unkept)
    automatic = Automatic(run, state.own, state.timing, settings.devices) if settings.solver is None else None

    def chain(unknown: PyTree, num_kept: int, num_steps: int, num_unkept: int) -> Chain:
        """The first ``num_kept`` draws; the chains stand at ``unknown``, after ``num_steps`` steps."""
        draws = run.draws
        draws.unknowns, draws.info = jax.tree.map(lambda x: x[:, :num_kept], (draws.unknowns, draws.info))
        after = state._replace(unknown=unknown, num_steps=state.num_steps + num_steps, num_unkept=num_unkept)
        taken = replace(settings, num_samples=num_steps)
        return Chain(
            after,
            draws.unknowns,
            draws.info,
            _report(run, automatic, warmup_remark, taken, warmup_seconds, began),
            settings.thinning,
            settings.solver,
            extend,
            settings.extra_fields,
            warmup_path=None if record is None else record.path(),
            devices=settings.devices or None,
        )

    try:
        if settings.solver is not None:
            run.with_solver(settings.solver)
        elif automatic is not None:
            automatic.execute()
    except KeyboardInterrupt as stopped:
        # back to the last draw that every chain has kept
        if not (kept := int(run.draws.num_kept.min())):
            raise
        x = jax.tree.map(lambda draws: jnp.asarray(draws[:, kept - 1]), run.draws.unknowns)
        steps = kept * settings.thinning - state.num_unkept
        raise Interrupted(chain(x, kept, steps, 0), settings.num_samples) from stopped
    _warn_of_stuck_chains(run.draws.info)
    return chain(run.x, total // settings.thinning, settings.num_samples, total % settings.thinning)


def _warn_of_stuck_chains(info: Info) -> None:
    """Say where a chain accepted nothing: such draws are one point, however many they are.

    Judged by the probabilities, not by the moves: a few draws may stand still by chance.
    """
    rates = np.asarray(info.acceptance_rate)
    stuck = np.flatnonzero(rates.sum(axis=1) < STUCK)
    if stuck.size and rates.shape[1] >= FEW_DRAWS:
        warnings.warn(
            f"chain(s) {', '.join(map(str, stuck))} accepted no move in {rates.shape[1]:,} draws. Leave the step size "
            "and num_warmup to pmcmc (step_size=None, num_warmup=1000), take a smaller step size, or start elsewhere "
            "with init_params.",
            stacklevel=5,  # the caller of `parallel_chain` and `sample`
        )


def _tune(target: Target, rng_key: PRNGKey, starts: PyTree, settings: Settings, watch: Watch) -> Tuned:
    if settings.num_warmup:
        tuned = settings.warmup.run(target, settings.kernel, rng_key, starts, settings.num_warmup, watch)
        if tuned.remark:
            warnings.warn(tuned.remark, stacklevel=5)  # the caller of `parallel_chain` and `sample`
        return jax.block_until_ready(tuned)
    kernel = settings.kernel
    states = jax.vmap(lambda position: kernel.unknown(kernel.init(target, position)))(starts)
    return Tuned(target, kernel, states, jnp.array(jnp.nan))


def _chain_starts(tuned: Tuned, settings: Settings) -> np.ndarray:
    """(C,) lanes of the warm-up's ensemble where the chains start, taken from its different starts in turn."""
    num_states = jax.tree.leaves(tuned.states)[0].shape[0]
    chains = np.arange(settings.num_chains)
    stride = max(1, num_states // settings.warmup.num_starts) if settings.num_warmup else 1
    return (chains * stride + chains * stride // num_states) % num_states


@jax.jit
def _split_keys(rng_key: PRNGKey) -> tuple[PRNGKey, PRNGKey]:
    """For warm-up, and for the chains."""
    warmup_key, chain_key = jax.random.split(rng_key)
    return warmup_key, chain_key


def _engine(state: ChainState, ahead: Ahead) -> Engine:
    """Of a state that is only compiled for, shapes will do."""
    keys = chain_keys(state.rng_key, num_chains=len(state.own))
    return Engine(state.target, state.kernel, keys, state.ensemble, _scale(state), ahead, state.num_steps)


def restarted(state: ChainState, number: int) -> tuple[Engine, PyTree]:
    """An engine of one of the chains, for its steps from the first on, and its unknown before it (1, ...)."""
    keys = chain_keys(state.rng_key, num_chains=len(state.own))[number : number + 1]
    own = state.own[number : number + 1]
    x0 = jax.tree.map(lambda x: jnp.asarray(np.asarray(x)[own]), state.ensemble)
    return Engine(state.target, state.kernel, keys, state.ensemble, _scale(state)), x0


def _scale(state: ChainState) -> PyTree:
    """Of an unknown: one where it is the coordinates in a basis that warm-up found, else not known (None)."""
    if state.target.basis is None or len(jax.tree.leaves(state.ensemble)) > 1:
        return None
    return jax.tree.map(lambda x: np.ones(x.shape[1:], x.dtype), state.ensemble)


def _decision(solver: RecurrenceSolver) -> str:
    return {MultipleShooting: "shooting", Sequential: "sequential"}.get(type(solver), "newton")


def _growth_rate(draws: Draws, num_chains: int) -> np.ndarray:
    """Mean over segments, where any saw a small distance."""
    growth = np.stack(draws.growth) if draws.growth else np.full((1, num_chains), np.nan)
    observed = np.isfinite(growth)
    return np.where(observed, growth, 0.0).sum(0) / np.where(observed.any(0), observed.sum(0), np.nan)


def _report(
    run: Run, automatic: Automatic | None, warmup_remark: str, settings: Settings, warmup_seconds: float, began: float
) -> SolveReport:
    draws, info, chains, clock = run.draws, run.draws.info, settings.num_chains, run.engine.clock
    per_chain = lambda value, dtype=int: np.broadcast_to(np.asarray(value, dtype), (chains,))
    plan = None if automatic is None else automatic.plan
    solver, reason = settings.solver or Sequential(), "Chosen by the caller."
    if automatic is not None:
        solver, reason = (Sequential() if plan is None else plan.solver), automatic.reason
    pilot = None if plan is None else plan.coalescence
    pilot_seconds = 0.0 if automatic is None else automatic.pilot_seconds
    return SolveReport(
        decision=_decision(solver),
        reason=reason,
        plan=plan,
        bias_bound=np.zeros(0) if automatic is None else automatic.bias_bound,
        result=per_chain(draws.result),
        fallback=draws.fallback,
        residual=per_chain(draws.residual, float),
        num_steps=settings.num_samples,
        num_sequential_steps=per_chain(draws.critical_path),
        num_iters=per_chain(draws.num_iters),
        num_sweeps=per_chain(draws.num_sweeps),
        num_blocks=draws.num_blocks,
        certified_steps=per_chain(draws.certified_steps),
        near_ties=per_chain(draws.near_ties) if np.isfinite(info.margin).any() else per_chain(np.nan, float),
        lyapunov_exponent=_growth_rate(draws, chains),
        coalescence_steps=np.zeros(0, int) if pilot is None else np.asarray(pilot.steps),
        acceptance_rate=np.asarray(info.acceptance_rate).mean(axis=1),
        num_divergent=np.asarray(info.is_divergent).sum(axis=1),
        warmup_seconds=warmup_seconds,
        pilot_seconds=pilot_seconds,
        compile_seconds=clock.compile_seconds,
        solve_seconds=clock.run_seconds - pilot_seconds,
        total_seconds=time.perf_counter() - began,
        planned_seconds=0.0 if automatic is None else automatic.seconds,
        warmup_remark=warmup_remark,
        find_diagnosis=None if automatic is None else automatic.find_diagnosis,
    )
