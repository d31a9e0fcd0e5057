"""Warm-up of kernels over named sites.

`SiteAdaptation` runs the kernel itself, a `Gibbs`, `DiscreteGibbs` or `Compose`, on many lanes in four windows. For a
`Compose`, windows tune the step size of each site group by dual averaging and set its coordinates to the mean and
covariance of its draws, pooled over the lanes. A `Window` holds the result of one of them.

Source: Hoffman & Gelman (2014) for dual averaging; windows as in Stan.
"""

from dataclasses import dataclass, field, replace
from functools import partial
from statistics import median_low
from typing import ClassVar, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from pmcmc._arguments import as_int, check_rate
from pmcmc._pytree import Array, PRNGKey, PyTree, Scalar, all_finite, is_real, register_dataclass
from pmcmc._xla.compile import tuned_jit
from pmcmc.interop.blackjax import dual_averaging
from pmcmc.kernels import Block, Compose, Kernel, SiteKernel
from pmcmc.target import Basis, Target
from pmcmc.warmup.base import (
    LaneTiming,
    Tuned,
    Warmup,
    WarmupError,
    Watch,
    check_metrics,
    ignore,
    path_moments,
    pooled_moments,
)
from pmcmc.warmup.frame import Frame
from pmcmc.warmup.settlement import judge_path, unsettled

NUM_WINDOWS = 4


@register_dataclass
@dataclass(frozen=True)
class SiteAdaptation(Warmup):
    """Four windows of the kernel itself on ``num_starts`` lanes, for `Gibbs`, `DiscreteGibbs` and `Compose`.

    Every lane takes all ``num_warmup`` steps, rounded down to a multiple of four. For site groups whose kernel works on
    vectors (such as HMC, MALA and NUTS), the second half of each of the first two windows, pooled over the lanes, gives
    the mean and covariance that become the group's coordinates. Over the first three windows dual averaging brings the
    group's acceptance rate, averaged over the lanes, to its target. In the last window nothing changes. Kernels without
    tunable parameters are run without adaptation. A remark says so if the last window shows that the coordinates of a
    group whose kernel works on vectors are not right, or that its lanes do not mix (`pmcmc.warmup.settlement`). Groups
    of `Gibbs` and `DiscreteGibbs` are not judged.

    Args:
        dense: Full covariances (True) or their diagonals (False). None: full up to 50 dimensions.
        target_acceptance_rate: Acceptance rate to tune to. None: each kernel's own, such as 0.574 for MALA and 0.8 for
            HMC.
        num_starts: Number of lanes, at least 2. Their last states are starts of chains and blocks. There are more if
            a start is given for each of more chains.

    Raises:
        ValueError: ``num_starts`` is below 2, or ``target_acceptance_rate`` not between 0 and 1.
        TypeError: ``num_starts`` is not an integer, or ``target_acceptance_rate`` is a boolean.

    Source: Hoffman & Gelman (2014) for dual averaging; windows as in Stan.

    Example:
        >>> import pmcmc
        >>> pmcmc.SiteAdaptation(dense=False).num_starts
        32
    """

    dense: bool | None = field(default=None, metadata=dict(static=True))
    target_acceptance_rate: Scalar | None = None
    num_starts: int = field(default=32, metadata=dict(static=True))
    uses_gradient: ClassVar[bool] = False

    def count_starts(self, target, num_given=1):
        return max(self.num_starts, num_given)

    def __post_init__(self):
        check_rate("target_acceptance_rate", self.target_acceptance_rate)
        object.__setattr__(self, "num_starts", as_int("num_starts", self.num_starts, 2))

    def run(
        self,
        target: Target,
        kernel: Kernel,
        rng_key: PRNGKey,
        starts: PyTree,
        num_steps: int,
        watch: Watch = ignore,
        num_given: int = 1,
    ) -> Tuned:
        if num_steps < 20:
            raise ValueError(f"num_warmup must be 0 or at least 20 (for its windows), got {num_steps}.")
        if not isinstance(kernel, SiteKernel):
            raise TypeError(f"SiteAdaptation warms up Gibbs, DiscreteGibbs and Compose, got {type(kernel).__name__}.")
        check_metrics(target, kernel)
        # Start the lanes, with identity bases and dual averaging at its beginning.
        length, last = num_steps // NUM_WINDOWS, NUM_WINDOWS - 1
        num_lanes = len(jax.tree.leaves(starts)[0])
        kernel = self._first_bases(target, kernel)
        rates = tuple(self._rate(target, block) for block in _blocks(kernel))
        averaged = _begin(target, kernel, rates)
        unknowns = _start_lanes(target, _with_steps(target, kernel, averaged, rates, jnp.array(True)), starts)
        seconds: list[float] = []
        paths: tuple = ()
        for number, key in enumerate(jax.random.split(rng_key, NUM_WINDOWS)):
            before, adapting = paths, jnp.array(number != last)
            window, (_, took) = _run_window.timed(
                target, kernel, key, unknowns, averaged, rates, adapting, num_steps=length
            )
            seconds.append(took)
            _check_rates(kernel, window)
            _check_window(target, kernel, window)
            unknowns, averaged, paths = window.unknowns, window.averaged, window.paths
            # New coordinates: restart the lanes in them, and dual averaging.
            if number < last - 1 and isinstance(kernel, Compose):
                positions = _positions(target, kernel, unknowns)
                blocks = zip(kernel.blocks, window.paths, strict=True)
                kernel = replace(kernel, blocks=tuple(self._rebased(*pair) for pair in blocks))
                averaged = _begin(target, kernel, rates)
                ready = _with_steps(target, kernel, averaged, rates, jnp.array(True))
                unknowns = _start_lanes(target, ready, positions)
        # Set the final step sizes, and time a step.
        tuned = _with_steps(target, kernel, averaged, rates, jnp.array(False)).finalize()
        _check_moved(tuned, window)
        # All windows run one program, so if the machine stalls in one of the last three, the others give its time.
        timing = LaneTiming(num_lanes, median_low(seconds[1:]) / length)
        remark = "" if self._is_settled(kernel, before, paths) else unsettled(num_steps)
        return Tuned(target, tuned, unknowns, jnp.nanmean(window.acceptance_rates), timing, remark)

    def _is_settled(self, kernel: Kernel, before: tuple, paths: tuple) -> bool:
        """Return whether the last window shows that all site groups over vectors are explored.

        A group with coordinates of its own is judged in them. One with a metric of the user's has none: its location
        is compared with that of the window before, and its scale is not judged.

        Args:
            kernel: Kernel with the coordinates of the last two windows.
            before: Paths of the window before the last, as in `Window`.
            paths: Paths of the last window.
        """
        for block, earlier, path in zip(_blocks(kernel), before, paths, strict=True):
            if path is None:
                continue
            path, dense = np.asarray(path, float), self._dense(path.shape[-1])
            if block.basis is None:
                frame = Frame(*path_moments(np.asarray(earlier, float), dense))
            else:
                frame = Frame(np.asarray(block.basis.loc, float), np.asarray(block.basis.scale, float))
            coordinates = frame.to_coordinates(path.reshape(-1, path.shape[-1])).reshape(path.shape)
            verdict = judge_path(coordinates, *path_moments(coordinates, dense))
            if not (verdict.settled if _takes_basis(block) else verdict.placed):
                return False
        return True

    def _rate(self, target: Target, block: Block) -> Scalar:
        """Return the acceptance rate to which the step size of a site group is tuned."""
        if self.target_acceptance_rate is not None:
            return self.target_acceptance_rate
        return block.kernel.target_acceptance_rate(block.given(target).dim)

    def _dense(self, dim: int) -> bool:
        """Return whether the covariance of a site group of ``dim`` dimensions is a full matrix."""
        return dim <= 50 if self.dense is None else self.dense

    def _first_bases(self, target: Target, kernel: Kernel) -> Kernel:
        """Return the kernel with identity bases, so that later bases are new numbers in the same program."""
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
        """Return a site group in the coordinates given by the second half of a window, all lanes pooled.

        Args:
            block: The site group.
            path: Positions of the window as vectors; shape (steps, lanes, D). None: its kernel works on sites.
        """
        if path is None or not _takes_basis(block):
            return block
        draws = path[path.shape[0] // 2 :].reshape(-1, path.shape[-1])
        return replace(block, basis=_pooled(draws, dense=self._dense(draws.shape[1])))


class Window(NamedTuple):
    """Result of a window of steps on all lanes; tuples have one entry per site group.

    Attributes:
        unknowns: Unknowns of the lanes after the last step, with leading axis lanes.
        averaged: States of the dual averaging; None for groups that are not tuned.
        paths: Positions as vectors (steps, lanes, D); None for groups whose kernel works on sites.
        acceptance_rates: Mean acceptance rates over steps and lanes; shape (groups,).
        moved: Share of steps that changed the group; shape (groups,).
    """

    unknowns: PyTree
    averaged: tuple
    paths: tuple
    acceptance_rates: Array
    moved: Array


def _blocks(kernel: Kernel) -> tuple[Block, ...]:
    """Return the site groups of a `Compose`; other kernels have none."""
    return kernel.blocks if isinstance(kernel, Compose) else ()


def _takes_basis(block: Block) -> bool:
    """Return whether a site group works on vectors that no metric of the user's acts on already."""
    return not isinstance(block.kernel, SiteKernel) and block.kernel.metric is None


def _begin(target: Target, kernel: Kernel, rates: tuple) -> tuple:
    """Return the initial dual averaging state of each group whose step size is tuned; None for the others."""

    def one(block: Block, rate: Scalar) -> PyTree:
        if block.kernel.is_tuned:
            return None
        first = block.kernel.first_step_size(block.given(target).dim)
        as_leaf = lambda x: jnp.asarray(x, target.spec.dtype if is_real(x) else None)
        return jax.tree.map(as_leaf, dual_averaging(rate).init(first))

    return tuple(map(one, _blocks(kernel), rates))


def _with_steps(target: Target, kernel: Kernel, averaged: tuple, rates: tuple, adapting: Array) -> Kernel:
    """Return the kernel with the current or final step sizes of dual averaging; given step sizes are kept."""
    if not isinstance(kernel, Compose):
        return kernel

    def one(block: Block, state: PyTree, rate: Scalar) -> Block:
        if state is None:
            return block
        averaging = dual_averaging(rate)
        final = block.kernel.final_step_size(averaging.final(state))
        step_size = jnp.where(adapting, averaging.step_size(state), final)
        return replace(block, kernel=block.kernel.with_step_size(jnp.asarray(step_size, target.spec.dtype)))

    return replace(kernel, blocks=tuple(map(one, kernel.blocks, averaged, rates)))


@tuned_jit()
def _start_lanes(target: Target, kernel: Kernel, positions: PyTree) -> PyTree:
    """Return the unknowns of lanes that start at positions with leading axis lanes."""
    return jax.vmap(lambda position: kernel.unknown(kernel.init(target, position)))(positions)


@tuned_jit()
def _positions(target: Target, kernel: Kernel, unknowns: PyTree) -> PyTree:
    """Return the positions of unknowns with leading axis lanes."""
    return jax.vmap(lambda unknown: kernel.position(target, unknown))(unknowns)


@tuned_jit()
def _run_window(
    target: Target,
    kernel: Kernel,
    rng_key: PRNGKey,
    unknowns: PyTree,
    averaged: tuple,
    rates: tuple,
    adapting: Array,
    *,
    num_steps: int,
) -> Window:
    """Run a window on all lanes. The noise of a step is drawn within it: that of a window may not fit into memory.

    Args:
        target: Target to sample.
        kernel: Kernel in its current bases.
        rng_key: Key of the window.
        unknowns: Unknowns of the lanes, with leading axis lanes.
        averaged: States of the dual averaging, one entry per site group.
        rates: Acceptance rates to tune to, one entry per site group.
        adapting: Whether dual averaging continues.
        num_steps: Number of steps.
    """
    blocks = _blocks(kernel)

    def step(now: Kernel, unknown: PyTree, u: PyTree) -> tuple[PyTree, tuple[Array, ...]]:
        """Take one step of one lane; return its unknown and the groups' acceptance rates."""
        if isinstance(now, Compose):
            unknown, infos = now.step_blocks(target, unknown, u)
            return unknown, tuple(info.acceptance_rate for info in infos)
        return now.step(target, unknown, u)[0], ()

    def vectors(unknown: PyTree) -> tuple:
        """Return the position of each group as a vector; None for groups whose kernel works on sites."""
        if not blocks:
            return ()
        given = [block.given(target) for block in blocks]
        return tuple(
            None if isinstance(b.kernel, SiteKernel) else t.spec.ravel(b.kernel.position(t, x))
            for t, b, x in zip(given, blocks, unknown, strict=True)
        )

    def body(carry, keys):
        unknown, averaged = carry
        u = jax.vmap(lambda key: kernel.sample_noise(key, target))(keys)
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

    keys = jax.random.split(rng_key, (num_steps, len(jax.tree.leaves(unknowns)[0])))
    (unknowns, averaged), (paths, seen, changed) = jax.lax.scan(body, (unknowns, averaged), keys)
    mean = lambda values: jnp.stack([jnp.mean(x) for x in values]) if blocks else jnp.full(1, jnp.nan)
    return Window(unknowns, averaged, paths, mean(seen), mean(changed))


def _changed(new: PyTree, old: PyTree) -> Array:
    """Return the share of lanes whose unknown differs anywhere."""
    leaf = lambda a, b: jnp.any((a != b).reshape(a.shape[0], -1), axis=1)
    return jnp.mean(jnp.any(jnp.stack(jax.tree.leaves(jax.tree.map(leaf, new, old))), axis=0))


@partial(jax.jit, static_argnames="dense")
def _pooled(draws: Array, *, dense: bool) -> Basis:
    """Return the basis of draws (N, D)."""
    return Basis(*pooled_moments(draws, dense))


def _check_rates(kernel: Kernel, window: Window) -> None:
    """Raise an error if dual averaging has nothing to go by; its step sizes, and soon the states, are then NaN.

    Raises:
        WarmupError: A site group whose step size is tuned has no acceptance rate.
    """
    for block, rate in zip(_blocks(kernel), window.acceptance_rates, strict=False):
        if not block.kernel.is_tuned and bool(jnp.isnan(rate)):
            who = type(block.kernel).__name__
            raise WarmupError(
                f"the step size of {who} could not be tuned, because it reports no acceptance rate: pass step_size=."
            )


def _check_window(target: Target, kernel: Kernel, window: Window) -> None:
    """Raise an error if the lanes are not usable.

    Raises:
        WarmupError: States are not finite, or some coordinate of a site group never moved in the window.
    """
    if not bool(all_finite(window.unknowns)):
        raise WarmupError(
            "warm-up reached states that are not finite. Check the updates and the density for NaN and overflow, give "
            "every parameter a proper prior, or start elsewhere."
        )
    for block, path, rate in zip(_blocks(kernel), window.paths, window.acceptance_rates, strict=False):
        if path is None or not _takes_basis(block):
            continue
        spec = block.given(target).spec
        stuck = jnp.all(path == path[:1], axis=(0, 1))
        if bool(jnp.any(stuck)):
            flags = jax.tree_util.tree_leaves_with_path(spec.unravel(stuck.astype(spec.dtype)))
            names = ", ".join(f"position{jax.tree_util.keystr(p)}" for p, x in flags if bool(jnp.any(x > 0)))
            raise WarmupError(
                f"warm-up never moved {names} (mean acceptance rate {float(rate):.2f}). Start elsewhere, raise "
                "num_warmup, or check the density for jumps and for constraints that the declared support leaves out."
            )


def _check_moved(kernel: Kernel, window: Window) -> None:
    """Raise an error if a site group cannot be sampled with its tuned step size.

    Raises:
        WarmupError: No move was accepted in the last window.
    """
    for block, moved in zip(_blocks(kernel), window.moved, strict=False):
        if isinstance(block.kernel, SiteKernel):
            continue
        who, step_size = type(block.kernel).__name__, block.kernel.tunables.get("step_size", 0.0)
        if float(moved) == 0.0:
            raise WarmupError(
                f"no move of {who} was accepted at the end of warm-up (step size {float(step_size):.3g}). "
                "Leave step_size=None so that it is tuned, take a smaller one, or start elsewhere."
            )
