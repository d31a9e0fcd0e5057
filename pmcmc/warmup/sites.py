"""Warm-up of kernels over named sites: burn-in on lanes, and each block's own step size and coordinates."""

from dataclasses import dataclass, field, replace
from functools import partial
from statistics import median_low
from typing import NamedTuple

import jax
import jax.numpy as jnp

from pmcmc._pytree import all_finite, is_real, register_dataclass
from pmcmc._typing import Array, PRNGKey, PyTree, Scalar
from pmcmc._xla.compile import tuned_jit
from pmcmc.interop.blackjax import dual_averaging
from pmcmc.kernels import HMC, Block, Compose, Kernel, SiteKernel
from pmcmc.target import Basis, Target
from pmcmc.warmup.base import LaneTiming, Tuned, Warmup, WarmupError, Watch, ignore

NUM_WINDOWS = 4


@register_dataclass
@dataclass(frozen=True)
class BlockAdaptation(Warmup):
    """Four windows of the kernel itself on ``num_starts`` lanes, for `Gibbs`, `DiscreteGibbs` and `Compose`.

    Every lane takes all ``num_warmup`` steps. For blocks whose kernel has a gradient (HMC, MALA, NUTS), the second half
    of each of the first two windows, pooled over the lanes, gives mean and covariance, which become the block's
    coordinates; and over the first three windows dual averaging brings the block's acceptance rate, averaged over the
    lanes, to its target. In the last window nothing changes. Blocks without tunables only burn in.

    dense: full covariances (True) or their diagonals (False). None: full up to 50 dimensions.
    target_acceptance_rate: None: each kernel's own, such as 0.574 for MALA and 0.8 for HMC.
    num_starts: lanes, whose last states seed chains and blocks.

    Source: Hoffman & Gelman 2014 (dual averaging); windows after Stan.

    Example:
        >>> import pmcmc
        >>> pmcmc.BlockAdaptation(dense=False).num_starts
        32
    """

    dense: bool | None = field(default=None, metadata=dict(static=True))
    target_acceptance_rate: Scalar | None = None
    num_starts: int = field(default=32, metadata=dict(static=True))

    def __post_init__(self):
        if self.num_starts < 2:
            raise ValueError(f"num_starts must be at least 2, got {self.num_starts}.")

    def run(
        self,
        target: Target,
        kernel: Kernel,
        rng_key: PRNGKey,
        starts: PyTree,
        num_steps: int,
        watch: Watch = ignore,
    ) -> Tuned:
        if num_steps < 20:
            raise ValueError(f"num_warmup must be 0 or at least 20 (windows need room), got {num_steps}.")
        if not isinstance(kernel, SiteKernel):
            raise TypeError(f"BlockAdaptation warms up Gibbs, DiscreteGibbs and Compose, got {type(kernel).__name__}.")
        _check_metrics(target, kernel)
        length, last = num_steps // NUM_WINDOWS, NUM_WINDOWS - 1
        kernel = self._first_bases(target, kernel)
        rates = tuple(self._rate(target, block) for block in _blocks(kernel))
        averaged = _begin(target, kernel, rates)
        unknowns = _start_lanes(target, _with_steps(target, kernel, averaged, rates, jnp.array(True)), starts)
        seconds: list[float] = []
        for number, key in enumerate(jax.random.split(rng_key, NUM_WINDOWS)):
            noise = _draw_noise(target, kernel, key, num_lanes=self.num_starts, num_steps=length)
            adapting = jnp.array(number != last)
            window, (_, took) = _run_window.timed(target, kernel, noise, unknowns, averaged, rates, adapting)
            seconds.append(took)
            _check_window(target, kernel, window)
            unknowns, averaged = window.unknowns, window.averaged
            if number < last - 1 and isinstance(kernel, Compose):
                positions = _positions(target, kernel, unknowns)
                blocks = zip(kernel.blocks, window.paths, strict=True)
                kernel = replace(kernel, blocks=tuple(self._rebased(*pair) for pair in blocks))
                averaged = _begin(target, kernel, rates)
                ready = _with_steps(target, kernel, averaged, rates, jnp.array(True))
                unknowns = _start_lanes(target, ready, positions)
        tuned = _finished(_with_steps(target, kernel, averaged, rates, jnp.array(False)))
        _check_moved(tuned, window)
        # all windows are one program; where the machine stalled in one of the last three, the others tell
        timing = LaneTiming(self.num_starts, median_low(seconds[1:]) / length)
        return Tuned(target, tuned, unknowns, jnp.nanmean(window.acceptance_rates), timing)

    def _rate(self, target: Target, block: Block) -> Scalar:
        if self.target_acceptance_rate is not None:
            return self.target_acceptance_rate
        return block.kernel.target_acceptance_rate(block.given(target).dim)

    def _dense(self, dim: int) -> bool:
        return dim <= 50 if self.dense is None else self.dense

    def _first_bases(self, target: Target, kernel: Kernel) -> Kernel:
        """The identity, so that later bases are new numbers in the same program."""
        if not isinstance(kernel, Compose):
            return kernel

        def with_basis(block: Block) -> Block:
            if not _takes_basis(block):
                return block
            spec = block.given(target).spec
            scale = jnp.eye(spec.size, dtype=spec.dtype) if self._dense(spec.size) else jnp.ones(spec.size, spec.dtype)
            return replace(block, basis=Basis(jnp.zeros(spec.size, spec.dtype), scale))

        return replace(kernel, blocks=tuple(map(with_basis, kernel.blocks)))

    def _rebased(self, block: Block, path: Array | None) -> Block:
        """In the coordinates of the second half of a window, all lanes pooled. path: (steps, lanes, D)."""
        if path is None:
            return block
        draws = path[path.shape[0] // 2 :].reshape(-1, path.shape[-1])
        return replace(block, basis=_pooled(draws, dense=self._dense(draws.shape[1])))


class Window(NamedTuple):
    """What a window of steps on all lanes left; tuples have one entry per block.

    averaged: states of the dual averaging. paths: of blocks that take a basis, positions as vectors (steps, lanes, D).
    acceptance_rates, moved: (blocks,) means over steps and lanes; moved: share of steps that changed the block.
    """

    unknowns: PyTree
    averaged: tuple
    paths: tuple
    acceptance_rates: Array
    moved: Array


def _blocks(kernel: Kernel) -> tuple[Block, ...]:
    return kernel.blocks if isinstance(kernel, Compose) else ()


def _takes_basis(block: Block) -> bool:
    """Vectors, unless the user's metric already acts on them."""
    return not isinstance(block.kernel, SiteKernel) and getattr(block.kernel, "inverse_mass_matrix", None) is None


def _begin(target: Target, kernel: Kernel, rates: tuple) -> tuple:
    """Dual averaging of each block whose step size is to be found; None for the others."""

    def one(block: Block, rate: Scalar) -> PyTree:
        if block.kernel.is_tuned:
            return None
        first = block.kernel.first_step_size(block.given(target).dim)
        as_leaf = lambda x: jnp.asarray(x, target.spec.dtype if is_real(x) else None)
        return jax.tree.map(as_leaf, dual_averaging(rate).init(first))

    return tuple(map(one, _blocks(kernel), rates))


def _with_steps(target: Target, kernel: Kernel, averaged: tuple, rates: tuple, adapting: Array) -> Kernel:
    """The kernel with the step sizes of the moment, given ones kept."""
    if not isinstance(kernel, Compose):
        return kernel

    def one(block: Block, state: PyTree, rate: Scalar) -> Block:
        if state is None:
            return block
        averaging = dual_averaging(rate)
        step_size = jnp.where(adapting, averaging.step_size(state), averaging.final(state))
        return replace(block, kernel=block.kernel.with_step_size(jnp.asarray(step_size, target.spec.dtype)))

    return replace(kernel, blocks=tuple(map(one, kernel.blocks, averaged, rates)))


@tuned_jit()
def _start_lanes(target: Target, kernel: Kernel, positions: PyTree) -> PyTree:
    return jax.vmap(lambda position: kernel.unknown(kernel.init(target, position)))(positions)


@tuned_jit()
def _positions(target: Target, kernel: Kernel, unknowns: PyTree) -> PyTree:
    return jax.vmap(lambda unknown: kernel.position(target, unknown))(unknowns)


@tuned_jit(static_argnames=("num_lanes", "num_steps"))
def _draw_noise(target: Target, kernel: Kernel, rng_key: PRNGKey, *, num_lanes: int, num_steps: int) -> PyTree:
    """Leading axes (num_steps, num_lanes)."""
    keys = jax.random.split(rng_key, (num_steps, num_lanes))
    return jax.vmap(jax.vmap(lambda key: kernel.sample_noise(key, target)))(keys)


@tuned_jit()
def _run_window(
    target: Target, kernel: Kernel, noise: PyTree, unknowns: PyTree, averaged: tuple, rates: tuple, adapting: Array
) -> Window:
    blocks = _blocks(kernel)

    def step(now: Kernel, unknown: PyTree, u: PyTree) -> tuple[PyTree, tuple[Array, ...]]:
        if isinstance(now, Compose):
            unknown, infos = now.step_blocks(target, unknown, u)
            return unknown, tuple(info.acceptance_rate for info in infos)
        return now.step(target, unknown, u)[0], ()

    def vectors(unknown: PyTree) -> tuple:
        if not blocks:
            return ()
        given = [block.given(target) for block in blocks]
        return tuple(
            t.spec.ravel(b.kernel.position(t, x)) if _takes_basis(b) else None
            for t, b, x in zip(given, blocks, unknown, strict=True)
        )

    def body(carry, u):
        unknown, averaged = carry
        now = _with_steps(target, kernel, averaged, rates, adapting)
        new, rates_seen = jax.vmap(lambda x, n: step(now, x, n))(unknown, u)
        seen = tuple(jnp.mean(rate) for rate in rates_seen)
        updated = tuple(
            None if state is None else dual_averaging(rate).update(state, mean)
            for state, rate, mean in zip(averaged, rates, seen, strict=True)
        )
        averaged = jax.tree.map(lambda a, b: jnp.where(adapting, a, b), updated, averaged)
        changed = tuple(_changed(a, b) for a, b in zip(new, unknown, strict=True)) if blocks else ()
        return (new, averaged), (jax.vmap(vectors)(new), seen, changed)

    (unknowns, averaged), (paths, seen, changed) = jax.lax.scan(body, (unknowns, averaged), noise)
    mean = lambda values: jnp.stack([jnp.mean(x) for x in values]) if blocks else jnp.full(1, jnp.nan)
    return Window(unknowns, averaged, paths, mean(seen), mean(changed))


def _changed(new: PyTree, old: PyTree) -> Array:
    """Share of lanes whose unknown differs anywhere."""
    leaf = lambda a, b: jnp.any((a != b).reshape(a.shape[0], -1), axis=1)
    return jnp.mean(jnp.any(jnp.stack(jax.tree.leaves(jax.tree.map(leaf, new, old))), axis=0))


@partial(jax.jit, static_argnames="dense")
def _pooled(draws: Array, *, dense: bool) -> Basis:
    """Mean and standard deviations of draws (N, D), or Cholesky factor of their covariance."""
    mean = jnp.mean(draws, axis=0)
    centred = draws - mean[None]
    scale = jnp.sqrt(jnp.mean(centred**2, axis=0))
    if not dense:
        return Basis(mean, scale)
    # shrinkage towards the diagonal keeps the factor finite when there are few draws for the dimension
    count, dim = draws.shape
    weight = dim / (dim + count)
    standardised = centred / scale[None]
    correlation = (1 - weight) * standardised.T @ standardised / count + weight * jnp.eye(dim, dtype=draws.dtype)
    return Basis(mean, scale[:, None] * jnp.linalg.cholesky(correlation))


def _finished(kernel: Kernel) -> Kernel:
    """Lengths that were derived from the step size become numbers."""
    if not isinstance(kernel, Compose):
        return kernel

    def one(block: Block) -> Block:
        inner = block.kernel
        if isinstance(inner, HMC) and inner.num_integration_steps is None:
            return replace(block, kernel=replace(inner, num_integration_steps=inner.default_length()))
        return block

    return replace(kernel, blocks=tuple(map(one, kernel.blocks)))


def _check_window(target: Target, kernel: Kernel, window: Window) -> None:
    if not bool(all_finite(window.unknowns)):
        raise WarmupError(
            "warm-up reached states that are not finite. Check the updates and the density for NaN and overflow, give "
            "every parameter a proper prior, or start elsewhere."
        )
    for block, path, rate in zip(_blocks(kernel), window.paths, window.acceptance_rates, strict=False):
        if path is None:
            continue
        spec = block.given(target).spec
        stuck = jnp.all(path == path[:1], axis=(0, 1))
        if bool(jnp.any(stuck)):
            flags = jax.tree_util.tree_leaves_with_path(spec.unravel(stuck.astype(spec.dtype)))
            names = ", ".join(f"position{jax.tree_util.keystr(p)}" for p, x in flags if bool(jnp.any(x > 0)))
            raise WarmupError(
                f"warm-up never moved {names} (mean acceptance rate {float(rate):.2f}). Start it elsewhere, lengthen "
                "num_warmup, or check the density for steps and constraints that its support does not state."
            )


def _check_moved(kernel: Kernel, window: Window) -> None:
    for block, moved in zip(_blocks(kernel), window.moved, strict=False):
        if isinstance(block.kernel, SiteKernel):
            continue
        who, step_size = type(block.kernel).__name__, getattr(block.kernel, "step_size", 0.0)
        if bool(jnp.isnan(jnp.asarray(step_size))):
            raise WarmupError(
                f"the step size of {who} could not be tuned, because it reports no acceptance rate: pass step_size=."
            )
        if float(moved) == 0.0:
            raise WarmupError(
                f"no move of the block {who} was accepted at the end of warm-up (step size {float(step_size):.3g}). "
                "Leave step_size=None so that it is tuned, take a smaller one, or start elsewhere."
            )


def _check_metrics(target: Target, kernel: Kernel) -> None:
    for block in _blocks(kernel):
        metric, dim = getattr(block.kernel, "inverse_mass_matrix", None), block.given(target).dim
        if metric is not None and jnp.shape(metric) not in ((), (dim,), (dim, dim)):
            raise ValueError(
                f"inverse_mass_matrix of the block {block.names(target)} has shape {jnp.shape(metric)}: expected "
                f"({dim},) or ({dim}, {dim}), the number of its parameters."
            )
