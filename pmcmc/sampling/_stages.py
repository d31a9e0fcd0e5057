"""Warm-up, pilot, solve, report: the stages behind the public functions, timed one by one."""

import time
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np

from pmcmc._tree import tree_index
from pmcmc._types import Array, PRNGKey, PyTree
from pmcmc.chain import Chain
from pmcmc.kernels import Info
from pmcmc.recurrence import MultipleShooting, RecurrenceSolver, Sequential
from pmcmc.report import SolveReport
from pmcmc.sampling._ahead import Ahead
from pmcmc.sampling._auto import Automatic, compile_ahead
from pmcmc.sampling._engine import Engine
from pmcmc.sampling._run import Draws, Run
from pmcmc.sampling._settings import Settings
from pmcmc.target import Target, check_starts
from pmcmc.warmup import Tuned


def run_stages(target: Target, rng_key: PRNGKey, starts: PyTree, settings: Settings, progress_bar: bool) -> Chain:
    """Draws from ``starts`` (positions, leading axis num_starts, or num_chains without warm-up)."""
    from tqdm.auto import tqdm

    began = time.perf_counter()
    settings.kernel.check(target)
    check_starts(target, starts)
    settings.kernel.check_start(target, tree_index(starts, 0))
    warmup_key, chain_keys = _split_keys(rng_key, num_chains=settings.num_chains)
    clock = time.perf_counter()
    bar = tqdm(total=settings.num_samples, unit="draw", disable=None if progress_bar else True)
    with bar as progress, Ahead() as ahead:
        progress.set_description("warm-up")
        if settings.num_warmup and (expected := settings.warmup.tuned_shapes(target, settings.kernel)) is not None:
            compile_ahead(_engine(expected, chain_keys, ahead), settings.solver, settings.num_samples)
        tuned = _warm_up(target, warmup_key, starts, settings)
        warmup_seconds = time.perf_counter() - clock
        progress.set_description("sampling")
        own = _chain_starts(tuned, settings)
        x0 = jax.tree.map(lambda x: jnp.asarray(np.asarray(x)[own]), tuned.states)
        engine = _engine(tuned, chain_keys, ahead)
        run = Run(engine, x0, settings.num_samples, settings.thinning, progress)
        automatic = None
        if settings.solver is None:
            automatic = Automatic(run, own, tuned.timing)
            automatic.execute()
        else:
            run.with_solver(settings.solver)
    unknowns, info = run.draws.unknowns, run.draws.info
    report = _report(run, automatic, info, settings, warmup_seconds, began)
    return Chain(tuned.target, tuned.kernel, unknowns, info, run.x, report, settings.extra_fields)


def _warm_up(target: Target, rng_key: PRNGKey, starts: PyTree, settings: Settings) -> Tuned:
    if settings.num_warmup:
        tuned = settings.warmup.run(target, settings.kernel, rng_key, starts, settings.num_warmup)
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


@partial(jax.jit, static_argnames="num_chains")
def _split_keys(rng_key: PRNGKey, *, num_chains: int) -> tuple[PRNGKey, Array]:
    """For warm-up, and one for each chain that does not depend on how many there are."""
    warmup_key, chain_key = jax.random.split(rng_key)
    return warmup_key, jax.vmap(lambda c: jax.random.fold_in(chain_key, c))(jnp.arange(num_chains))


def _engine(tuned: Tuned, chain_keys: Array, ahead: Ahead) -> Engine:
    return Engine(tuned.target, tuned.kernel, chain_keys, tuned.states, _scale(tuned), ahead)


def _scale(tuned: Tuned) -> PyTree:
    """Of an unknown: one where it is the coordinates in a basis that warm-up found, else not known (None)."""
    if tuned.target.basis is None or len(jax.tree.leaves(tuned.states)) > 1:
        return None
    return jax.tree.map(lambda x: np.ones(x.shape[1:], x.dtype), tuned.states)


def _decision(solver: RecurrenceSolver) -> str:
    return {MultipleShooting: "shooting", Sequential: "sequential"}.get(type(solver), "newton")


def _growth_rate(draws: Draws, num_chains: int) -> np.ndarray:
    """Mean over segments, where any saw a small distance."""
    growth = np.stack(draws.growth) if draws.growth else np.full((1, num_chains), np.nan)
    observed = np.isfinite(growth)
    return np.where(observed, growth, 0.0).sum(0) / np.where(observed.any(0), observed.sum(0), np.nan)


def _report(
    run: Run, automatic: Automatic | None, info: Info, settings: Settings, warmup_seconds: float, began: float
) -> SolveReport:
    draws, chains, clock = run.draws, settings.num_chains, run.engine.clock
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
        find_diagnosis=None if automatic is None else automatic.find_diagnosis,
    )
