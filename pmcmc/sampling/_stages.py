"""Warm-up, pilot, solve, report: the stages behind the public functions, timed one by one."""

import time
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from pmcmc._types import Array, PRNGKey, PyTree
from pmcmc.chain import Chain
from pmcmc.recurrence import RESULTS, MultipleShooting, Sequential
from pmcmc.report import SolveReport
from pmcmc.sampling._auto import MAX_PILOT_STEPS, Decision, decide, run_pilot
from pmcmc.sampling._run import Draws, Start, join, run, segment_length
from pmcmc.sampling._settings import Settings
from pmcmc.target import Target, check_starts
from pmcmc.warmup import Tuned


def run_stages(target: Target, rng_key: PRNGKey, starts: PyTree, settings: Settings, progress_bar: bool) -> Chain:
    """Draws from ``starts`` (positions, leading axis num_starts, or num_chains without warm-up)."""
    from tqdm.auto import tqdm

    check_starts(target, jax.vmap(target.coordinates)(starts))
    warmup_key, pilot_key, chain_key = jax.random.split(rng_key, 3)
    clock = time.perf_counter()
    with tqdm(total=settings.num_samples, unit="draw", disable=None if progress_bar else True) as progress:
        progress.set_description("warm-up")
        tuned = _warm_up(target, warmup_key, starts, settings)
        warmup_seconds, clock = time.perf_counter() - clock, time.perf_counter()
        progress.set_description("pilot")
        start = _start(tuned, chain_key, settings)
        length = segment_length(start, settings.num_samples)
        decision = _decide(tuned, pilot_key, start, settings, length)
        pilot_seconds = time.perf_counter() - clock
        progress.set_description("sampling")
        draws = run(start, decision.solver, settings.num_samples, length, settings.thinning, progress)
    unknowns, info = join(draws.unknowns), join(draws.info)
    report = _report(decision, draws, info, settings, warmup_seconds, pilot_seconds)
    return Chain(tuned.target, tuned.kernel, unknowns, info, draws.last_state, report, settings.extra_fields)


def _warm_up(target: Target, rng_key: PRNGKey, starts: PyTree, settings: Settings) -> Tuned:
    if settings.num_warmup:
        tuned = settings.warmup.run(target, settings.kernel, rng_key, starts, settings.num_warmup)
        return jax.block_until_ready(tuned)
    kernel = settings.kernel
    states = jax.vmap(lambda position: kernel.unknown(kernel.init(target, position)))(starts)
    return Tuned(target, kernel, states, jnp.array(jnp.nan))


def _start(tuned: Tuned, chain_key: PRNGKey, settings: Settings) -> Start:
    """Chains start at last states of the warm-up's ensemble, taken from its different starts in turn."""
    num_states = jax.tree.leaves(tuned.states)[0].shape[0]
    chains = np.arange(settings.num_chains)
    stride = max(1, num_states // settings.warmup.num_starts) if settings.num_warmup else 1
    lanes = (chains * stride + chains * stride // num_states) % num_states
    return Start(
        target=tuned.target,
        kernel=tuned.kernel,
        chain_keys=jax.vmap(lambda c: jax.random.fold_in(chain_key, c))(jnp.arange(settings.num_chains)),
        x0=jax.tree.map(lambda x: x[lanes], tuned.states),
        guesses=tuned.states,
        scale=_scale(tuned.target),
    )


def _scale(target: Target) -> Array | None:
    """The posterior's scale in the target's coordinates: one where a basis was found, else not known."""
    return None if target.basis is None else jnp.ones(target.dim, target.spec.dtype)


def _decide(tuned: Tuned, pilot_key: PRNGKey, start: Start, settings: Settings, length: int) -> Decision:
    if settings.solver is not None:
        return Decision(settings.solver, "Chosen by the caller.", np.zeros(0, int))
    if not settings.num_warmup:
        return decide(None, settings.num_samples, length, settings.num_chains, 0)
    pilot = run_pilot(tuned.target, tuned.kernel, pilot_key, tuned.states, start.scale, num_steps=MAX_PILOT_STEPS)
    return decide(pilot, settings.num_samples, length, settings.num_chains, MAX_PILOT_STEPS)


def _report(
    decision: Decision, draws: Draws, info: Any, settings: Settings, warmup_seconds: float, pilot_seconds: float
) -> SolveReport:
    solver, chains = decision.solver, settings.num_chains
    per_chain = lambda value, dtype=int: np.broadcast_to(np.asarray(value, dtype), (chains,))
    names = {MultipleShooting: "shooting", Sequential: "sequential"}
    growth = np.stack(draws.growth) if draws.growth else np.full((1, chains), np.nan)
    observed = np.isfinite(growth)
    exponent = np.where(observed, growth, 0.0).sum(0) / np.where(observed.any(0), observed.sum(0), np.nan)
    return SolveReport(
        decision=names.get(type(solver), "newton"),
        reason=decision.reason,
        result=per_chain(RESULTS.successful if draws.result is None else draws.result),
        fallback=draws.fallback,
        residual=per_chain(draws.residual, float),
        num_steps=settings.num_samples,
        num_sequential_steps=per_chain(draws.critical_path),
        num_iters=per_chain(draws.num_iters),
        num_sweeps=per_chain(draws.num_sweeps),
        num_blocks=draws.num_blocks,
        certified_steps=per_chain(draws.certified_steps),
        near_ties=per_chain(draws.near_ties),
        lyapunov_exponent=exponent,
        coalescence_steps=decision.coalescence_steps,
        acceptance_rate=info.acceptance_rate.mean(axis=1),
        num_divergent=info.is_divergent.sum(axis=1),
        warmup_seconds=warmup_seconds,
        pilot_seconds=pilot_seconds,
        compile_seconds=draws.compile_seconds,
        solve_seconds=draws.solve_seconds,
    )
