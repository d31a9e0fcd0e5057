"""From starting positions to tuned chains."""

import warnings
from collections.abc import Callable
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np

from pmcmc._typing import Array, PRNGKey, PyTree
from pmcmc.chain.state import ChainState, Source
from pmcmc.sampling.settings import Settings
from pmcmc.target import Target, check_starts
from pmcmc.warmup import Tuned
from pmcmc.warmup.base import Watch


class WarmupRecord:
    """A `Watch` that keeps what it sees, as positions without any basis."""

    def __init__(self) -> None:
        self._stretches: list[np.ndarray] = []

    def __call__(self, target: Target, path: Array) -> None:
        rows, basis = np.asarray(path), target.basis
        if basis is not None:
            rows = basis.to_positions(rows).astype(rows.dtype)
        self._stretches.append(rows)

    def path(self) -> np.ndarray:
        """(lanes, steps, D)."""
        return np.swapaxes(np.concatenate(self._stretches), 0, 1)


def tune_chains(
    source: Source,
    rng_key: PRNGKey,
    starts: PyTree,
    settings: Settings,
    watch: Watch,
    prepare: Callable[[ChainState], None],
) -> ChainState:
    """Warm up from ``starts``, or take them as they are; returns where the chains start.

    Args:
        source: The model.
        rng_key: The key of the whole run.
        starts: Positions with leading axis num_starts (num_chains without warm-up).
        settings: What the user asked for.
        watch: Called with the draws of warm-up's lanes.
        prepare: Called before warm-up with a state of shapes, if these are known, to compile programs meanwhile.
    """
    settings.kernel.check(source.target)
    source, kernel = source.with_kernel(settings.kernel)
    target, settings = source.target, replace(settings, kernel=kernel)
    check_starts(target, starts)
    kernel.check_start(target, jax.tree.map(lambda x: np.asarray(x)[0], starts))
    warmup_key, chain_key = _split_keys(rng_key)
    if settings.num_warmup and (expected := settings.warmup.tuned_shapes(target, kernel)) is not None:
        prepare(_begin(expected, starts, chain_key, settings, source))
    tuned = _tune(target, warmup_key, starts, settings, watch)
    state = _begin(tuned, starts, chain_key, settings, source)
    unknown = jax.tree.map(lambda x: jnp.asarray(np.asarray(x)[state.own]), state.ensemble)
    return state._replace(unknown=unknown)


def _begin(tuned: Tuned, starts: PyTree, chain_key: PRNGKey, settings: Settings, source: Source) -> ChainState:
    """Arrays, or shapes where that is all there is yet; ``unknown`` is still to be filled in."""
    own = _chain_starts(tuned, starts, settings)
    state = ChainState(tuned.target, tuned.kernel, None, chain_key, 0, 0, tuned.states, own, tuned.timing, source)
    return state._replace(warmup_remark=tuned.remark, num_lost_lanes=tuned.num_lost)


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
