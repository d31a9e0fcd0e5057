"""Warm-up and sampling: the stages behind the public functions, timed one by one."""

import time
import warnings
from contextlib import closing
from dataclasses import replace
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np

from pmcmc._samples import judge_mixing
from pmcmc._state import ChainState, Source
from pmcmc._transformations import refuse_transformation
from pmcmc._types import Array, PRNGKey, PyTree
from pmcmc.chain import Chain, Continuation
from pmcmc.sampling._ahead import Ahead
from pmcmc.sampling._auto import compile_first
from pmcmc.sampling._draws import Draws, draw_bytes
from pmcmc.sampling._memory import fit_memory
from pmcmc.sampling._progress import Progress, WarmupRecord
from pmcmc.sampling._run import NonFiniteState
from pmcmc.sampling._sampling import Interrupted, Sampling, engine_of, settings_of
from pmcmc.sampling._settings import Settings
from pmcmc.sampling._streaming import stream
from pmcmc.target import Target, check_starts
from pmcmc.warmup import Tuned
from pmcmc.warmup._base import Watch


def run_stages(
    source: Source,
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
        state = _warm_up(source, rng_key, starts, settings, progress, ahead, record)
        return _sample(state, settings, progress, ahead, began, time.perf_counter() - began, record)


def warm_up(source: Source, rng_key: PRNGKey, starts: PyTree, settings: Settings, progress_bar: bool) -> ChainState:
    """Where the chains of `run_stages` with the same arguments begin."""
    with Progress(settings.num_samples, progress_bar) as progress, closing(Ahead()) as ahead:
        return _warm_up(source, rng_key, starts, settings, progress, ahead)


def sample_from(state: ChainState, settings: Settings, progress_bar: bool) -> Chain:
    """Draws that follow a state; the chain holds these alone."""
    with Progress(settings.num_samples, progress_bar) as progress, closing(Ahead()) as ahead:
        return _sample(state, settings, progress, ahead, time.perf_counter(), 0.0)


def extend(chain: Chain, num_samples: int, progress_bar: bool) -> Chain:
    """See `Chain.extend`."""
    refuse_transformation("Chain.extend")
    chain.state.source.check()
    settings = settings_of(chain, num_samples, chain.max_memory)
    try:
        return _join(chain, sample_from(chain.state, settings, progress_bar))
    except Interrupted as stopped:
        raise Interrupted(_join(chain, stopped.chain), num_samples) from stopped
    except NonFiniteState as failed:
        failed.chain = chain if failed.chain is None else _join(chain, failed.chain)
        raise


CONTINUATION = Continuation(extend, stream)


def _join(chain: Chain, more: Chain) -> Chain:
    """One chain of both; what is not draws is that of the second."""
    join = lambda old, new: np.concatenate([old, new], axis=1)
    both = jax.tree.map(join, (chain.unknowns, chain.info), (more.unknowns, more.info))
    report = replace(more.report, find_mixing=partial(judge_mixing, more.target, more.kernel, both[0]))
    return replace(more, unknowns=both[0], info=both[1], report=report, warmup_path=chain.warmup_path)


def _warm_up(
    source: Source,
    rng_key: PRNGKey,
    starts: PyTree,
    settings: Settings,
    progress: Progress,
    ahead: Ahead,
    record: WarmupRecord | None = None,
) -> ChainState:
    """From ``starts`` to where the chains begin; programs for sampling are compiled beside."""
    settings.kernel.check(source.target)
    source, kernel = source.with_kernel(settings.kernel)
    target, settings = source.target, replace(settings, kernel=kernel)
    check_starts(target, starts)
    settings.kernel.check_start(target, jax.tree.map(lambda x: np.asarray(x)[0], starts))
    warmup_key, chain_key = _split_keys(rng_key)
    if settings.num_warmup and (expected := settings.warmup.tuned_shapes(target, settings.kernel)) is not None:
        engine = engine_of(_begin(expected, starts, chain_key, settings, source), ahead)
        fit_memory(engine, settings, draw_bytes(engine) * (settings.num_samples // settings.thinning))
        compile_first(engine, settings.solver, settings.num_samples)

    def watch(target: Target, path: Array) -> None:
        progress.warmed(target, path)
        if record is not None:
            record(target, path)

    tuned = _tune(target, warmup_key, starts, settings, watch)
    state = _begin(tuned, starts, chain_key, settings, source)
    unknown = jax.tree.map(lambda x: jnp.asarray(np.asarray(x)[state.own]), state.ensemble)
    return state._replace(unknown=unknown)


def _begin(tuned: Tuned, starts: PyTree, chain_key: PRNGKey, settings: Settings, source: Source) -> ChainState:
    """Arrays, or shapes where that is all there is yet; ``unknown`` is still to be filled in."""
    own = _chain_starts(tuned, starts, settings)
    state = ChainState(tuned.target, tuned.kernel, None, chain_key, 0, 0, tuned.states, own, tuned.timing, source)
    return state._replace(warmup_remark=tuned.remark, num_lost_lanes=tuned.num_lost)


def _sample(
    state: ChainState,
    settings: Settings,
    progress: Progress,
    ahead: Ahead,
    began: float,
    warmup_seconds: float,
    record: WarmupRecord | None = None,
) -> Chain:
    num_kept = (state.num_unkept + settings.num_samples) // settings.thinning
    engine = engine_of(state, ahead)
    fit_memory(engine, settings, draw_bytes(engine) * num_kept)
    draws = Draws(engine, num_kept)
    sampling = Sampling(state, settings, engine, draws, progress, began, warmup_seconds)

    def chain(x: PyTree, num_steps: int) -> Chain:
        after, report = sampling.standing(x, num_steps)
        return Chain(
            after,
            *draws.kept,
            report,
            settings.thinning,
            settings.solver,
            CONTINUATION,
            settings.extra_fields,
            warmup_path=None if record is None else record.path(),
            devices=settings.devices or None,
            max_memory=settings.max_memory,
        )

    def so_far() -> Chain | None:
        draws.cut()
        if not (kept := draws.info.margin.shape[1]):
            return None
        x = jax.tree.map(lambda rows: jnp.asarray(rows[:, -1]), draws.kept[0])
        return chain(x, kept * settings.thinning - state.num_unkept)

    try:
        sampling.execute()
    except KeyboardInterrupt as stopped:
        if (there := so_far()) is None:
            raise
        raise Interrupted(there, settings.num_samples) from stopped
    except NonFiniteState as failed:
        failed.chain = so_far()
        raise
    whole = chain(sampling.run.x, settings.num_samples)
    sampling.warn(whole.report)
    return whole


def _tune(target: Target, rng_key: PRNGKey, starts: PyTree, settings: Settings, watch: Watch) -> Tuned:
    if settings.num_warmup:
        tuned = settings.warmup.run(target, settings.kernel, rng_key, starts, settings.num_warmup, watch)
        if tuned.remark:
            warnings.warn(tuned.remark, stacklevel=5)  # the caller of `parallel_chain` and `sample`
        return jax.block_until_ready(tuned)
    kernel = settings.kernel
    states = jax.vmap(lambda position: kernel.unknown(kernel.init(target, position)))(starts)
    return Tuned(target, kernel, states, jnp.array(jnp.nan))


def _chain_starts(tuned: Tuned, starts: PyTree, settings: Settings) -> np.ndarray:
    """(C,) lanes of the warm-up's ensemble where the chains start.

    Where the lanes keep apart, as far from each other as they are. Else, and where each chain was given a start of its
    own (which a lane descends from), from the ensemble's different starts in turn.
    """
    num_states = jax.tree.leaves(tuned.states)[0].shape[0]
    chains = np.arange(settings.num_chains)
    if tuned.order is not None and not _is_per_chain(starts, settings.num_chains):
        return tuned.order[chains % num_states]
    stride = max(1, num_states // settings.warmup.num_starts) if settings.num_warmup else 1
    return (chains * stride + chains * stride // num_states) % num_states


def _is_per_chain(starts: PyTree, num_chains: int) -> bool:
    """Whether starts (N, ...) are those of the chains, over and over."""
    rows = [np.asarray(x) for x in jax.tree.leaves(starts)]
    repeats = all(np.array_equal(x[num_chains:], x[:-num_chains]) for x in rows)
    return repeats and any(np.any(x != x[:1]) for x in rows)


@jax.jit
def _split_keys(rng_key: PRNGKey) -> tuple[PRNGKey, PRNGKey]:
    """For warm-up, and for the chains."""
    warmup_key, chain_key = jax.random.split(rng_key)
    return warmup_key, chain_key
