"""Warm-up within a run: from starting positions to the state from which tuned chains are sampled.

`tune_chains` runs the warm-up that the settings ask for and chooses where the chains start. `WarmupRecord` keeps the
draws of warm-up for the user.
"""

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
    """A `Watch` that keeps the draws of warm-up, converted from the target's coordinates to positions."""

    def __init__(self) -> None:
        self._stretches: list[np.ndarray] = []

    def __call__(self, target: Target, path: Array) -> None:
        rows, basis = np.asarray(path), target.basis
        if basis is not None:
            rows = basis.to_positions(rows).astype(rows.dtype)
        self._stretches.append(rows)

    def path(self) -> np.ndarray:
        """Return the positions of all steps so far; shape (lanes, steps, D)."""
        return np.swapaxes(np.concatenate(self._stretches), 0, 1)


def tune_chains(
    source: Source,
    rng_key: PRNGKey,
    starts: PyTree,
    settings: Settings,
    watch: Watch,
    prepare: Callable[[ChainState], None],
) -> ChainState:
    """Warm up from ``starts``, or sample from them directly if there is no warm-up.

    Args:
        source: The model.
        rng_key: The key of the whole run.
        starts: Positions with leading axis num_starts (num_chains without warm-up).
        settings: What the user asked for.
        watch: Called with the draws of warm-up's lanes.
        prepare: Called before warm-up with a state that holds shapes, if they are known, so that programs are compiled
            during warm-up.

    Returns:
        The state in which the chains start.

    Raises:
        TypeError, ValueError: The kernel does not fit the target, or the density is not finite at a start.
        WarmupError: The posterior cannot be sampled like this.

    Warns:
        UserWarning: The result of warm-up is doubtful.
    """
    # Check the kernel and the starts before warm-up.
    settings.kernel.check(source.target)
    source, kernel = source.with_kernel(settings.kernel)
    target, settings = source.target, replace(settings, kernel=kernel)
    check_starts(target, starts)
    kernel.check_start(target, jax.tree.map(lambda x: np.asarray(x)[0], starts))
    warmup_key, chain_key = _split_keys(rng_key)
    # Compile for sampling while warm-up runs.
    if settings.num_warmup and (expected := settings.warmup.tuned_shapes(target, kernel)) is not None:
        prepare(_begin(expected, starts, chain_key, settings, source))
    # Warm up, and start the chains from lanes of the ensemble.
    tuned = _tune(target, warmup_key, starts, settings, watch)
    state = _begin(tuned, starts, chain_key, settings, source)
    unknown = jax.tree.map(lambda x: jnp.asarray(np.asarray(x)[state.own]), state.ensemble)
    return state._replace(unknown=unknown)


def _begin(tuned: Tuned, starts: PyTree, chain_key: PRNGKey, settings: Settings, source: Source) -> ChainState:
    """Return the first state of the chains, without ``unknown``; it holds shapes if ``tuned`` does."""
    own = _chain_starts(tuned, starts, settings)
    state = ChainState(tuned.target, tuned.kernel, None, chain_key, 0, 0, tuned.states, own, tuned.timing, source)
    return state._replace(warmup_remark=tuned.remark, num_lost_lanes=tuned.num_lost)


def _tune(target: Target, rng_key: PRNGKey, starts: PyTree, settings: Settings, watch: Watch) -> Tuned:
    """Run the warm-up; without warm-up, return the kernel as it is with the states at ``starts``."""
    if settings.num_warmup:
        tuned = settings.warmup.run(target, settings.kernel, rng_key, starts, settings.num_warmup, watch)
        if tuned.remark:
            warnings.warn(tuned.remark, stacklevel=5)  # the caller of `parallel_chain` and `sample`
        return jax.block_until_ready(tuned)
    kernel = settings.kernel
    states = jax.vmap(lambda position: kernel.unknown(kernel.init(target, position)))(starts)
    return Tuned(target, kernel, states, jnp.array(jnp.nan))


def _chain_starts(tuned: Tuned, starts: PyTree, settings: Settings) -> np.ndarray:
    """Return the lanes of the ensemble from which the chains start; shape (C,).

    If the lanes have not mixed, chains start in the order of `Tuned.order`, far apart. Otherwise, and always if the
    user gave each chain its own start, consecutive chains take lanes that descend from consecutive starts.
    """
    num_states = jax.tree.leaves(tuned.states)[0].shape[0]
    chains = np.arange(settings.num_chains)
    if tuned.order is not None and not _is_per_chain(starts, settings.num_chains):
        return tuned.order[chains % num_states]
    stride = max(1, num_states // settings.warmup.num_starts) if settings.num_warmup else 1
    return (chains * stride + chains * stride // num_states) % num_states


def _is_per_chain(starts: PyTree, num_chains: int) -> bool:
    """Whether starts (N, ...) repeat ``num_chains`` starts, one per chain, that are not all equal."""
    rows = [np.asarray(x) for x in jax.tree.leaves(starts)]
    repeats = all(np.array_equal(x[num_chains:], x[:-num_chains]) for x in rows)
    return repeats and any(np.any(x != x[:1]) for x in rows)


@jax.jit
def _split_keys(rng_key: PRNGKey) -> tuple[PRNGKey, PRNGKey]:
    """Return the key of warm-up and the key of the chains."""
    warmup_key, chain_key = jax.random.split(rng_key)
    return warmup_key, chain_key
