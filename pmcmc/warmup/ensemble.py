"""Warm-up by one ensemble: the lanes that tune the kernel's step size also find location and metric beforehand."""

import math
from dataclasses import dataclass, field
from functools import partial
from typing import Any, ClassVar, NamedTuple

import jax
import numpy as np

from pmcmc._pytree import register_dataclass
from pmcmc._typing import ArrayLeaf, PRNGKey, PyTree, Scalar
from pmcmc.kernels import HMC, Kernel
from pmcmc.target import Basis, Target
from pmcmc.warmup.base import Tuned, Warmup, Watch, ignore
from pmcmc.warmup.lanes import (
    NUM_LANES,
    PIECE,
    Exploration,
    LaneEnsemble,
    check_exploration,
    check_metric,
    far_lanes,
    held_lanes,
    is_dense,
    take_metric,
    tune,
    tuned_shapes,
)

# A basis is settled when draws made in it look standard to within this factor, and have mixed to this share.
SETTLED, MIXED = 3.0, 0.2


# A lane that is held far out gets so many more windows, tuned for it, until it is put on another's place.
PATIENCE = 1


# The last window is repeated at most so many times where it did not settle the basis.
MAX_REPEATS = 8


UNSETTLED = (
    "Warm-up did not settle: the last window still moved the posterior's location and scales, so chains may start off "
    "it and move and merge slowly. Raise num_warmup (it was {num_steps}), or try warmup=pmcmc.WindowAdaptation(); "
    "where neither helps, separate modes or a funnel leave no one scale to find: reparametrise."
)


@register_dataclass
@dataclass(frozen=True)
class EnsembleAdaptation(Warmup):
    """Windows over an ensemble of 32 lanes of jittered HMC, then dual averaging of the kernel's own step size.

    1. 32 lanes, each from a start of its own, run HMC. After every 16 steps mean and covariance of all their draws
       become the basis in which they go on, until the basis looks right and the lanes mix (see `SETTLED`, `MIXED`), or
       for a quarter of ``num_steps``. Then come windows of 32, 64, ... steps, a quarter of ``num_steps`` in all; the
       last, at least half of these, gives the target's basis. It is repeated, up to eight times, where it moved it.
       In each window dual averaging of one step size for all begins anew. A lane that does not move counts for half of
       the acceptance rate that is tuned, so that the step size falls until it does. Only if it still does not move in
       the window after that, and its log density is far below that of all that moved, is it put on another's place.
    2. In that basis the lanes run the kernel for a quarter as many steps (at least 102), as in `WindowAdaptation`.

    One program of a few leapfrog steps is compiled, and for HMC both parts run it; NUTS along 4 paths, as in
    `WindowAdaptation`, takes several times as long to compile, and as many steps one after the other.

    dense: full covariance (True) or its diagonal (False). None: full up to 50 dimensions.
    target_acceptance_rate: None: the kernel's own, such as 0.574 for MALA and 0.8 for HMC.
    inverse_mass_matrix: M^{-1}, a number, (D,) or (D, D), about the posterior's (co)variance, kept as it is for any
        kernel: then part 1 finds only where the posterior is. None: found in part 1.

    Source: Stan's windows (Stan Development Team) with moments pooled over chains, as cross-chain warm-up does
    (Zhang et al. 2020); Hoffman & Gelman 2014 for dual averaging.

    Example:
        >>> import jax.numpy as jnp, pmcmc
        >>> warmup = pmcmc.EnsembleAdaptation(dense=False)
        >>> chain = pmcmc.sample(
        ...     lambda x: -0.5 * jnp.sum(x**2), jnp.zeros(2), 0, warmup=warmup, num_samples=100, progress_bar=False
        ... )
        >>> chain.target.basis.scale.shape
        (2,)
    """

    dense: bool | None = field(default=None, metadata=dict(static=True))
    target_acceptance_rate: Scalar | None = None
    inverse_mass_matrix: ArrayLeaf | None = None
    shows_path: ClassVar[bool] = True

    @property
    def num_starts(self) -> int:  # type: ignore[override]
        return NUM_LANES

    def tuned_shapes(self, target: Target, kernel: Kernel) -> Tuned:
        return tuned_shapes(target, kernel, is_dense(target, self.dense), self.inverse_mass_matrix)

    def run(
        self,
        target: Target,
        kernel: Kernel,
        rng_key: PRNGKey,
        starts: PyTree,
        num_steps: int,
        watch: Watch = ignore,
    ) -> Tuned:
        explore_key, step_key = split_key(rng_key, number=2)
        found = explore_basis(
            target, kernel, explore_key, starts, num_steps, self.dense, watch, self.inverse_mass_matrix
        )
        num_tuning, whitened = max(102, num_steps // 4), target.with_basis(found.basis)
        tuned = tune(whitened, found.kernel, step_key, found.lanes, self.target_acceptance_rate, num_tuning, watch)
        return found.told(tuned)


@partial(jax.jit, static_argnames="number")
def split_key(rng_key: PRNGKey, *, number: int) -> tuple[PRNGKey, ...]:
    """`jax.random.split`, unpacked, in one program."""
    return tuple(jax.random.split(rng_key, number))


class Explored(NamedTuple):
    """The kernel without its metric, the basis, the lanes (lanes, D) in it; remark and num_lost as in `Tuned`."""

    kernel: Any
    basis: Basis
    lanes: np.ndarray
    remark: str
    num_lost: int

    def told(self, tuned: Tuned) -> Tuned:
        """What was tuned on these lanes, with what is to be said of how they were found."""
        remark = " ".join(filter(None, (self.remark, tuned.remark)))
        return tuned._replace(remark=remark, num_lost=self.num_lost)


def explore_basis(
    target: Target,
    kernel: Kernel,
    rng_key: PRNGKey,
    starts: PyTree,
    num_steps: int,
    dense: bool | None,
    watch: Watch = ignore,
    metric: ArrayLeaf | None = None,
) -> Explored:
    """The basis found on half of ``num_steps``, or that of the user's metric, see `check_metric`.

    Raises:
        ValueError: too few steps, or a metric that does not fit.
        WarmupError: the posterior cannot be explored.
    """
    if num_steps < 20:
        raise ValueError(f"num_warmup must be 0 or at least 20 (windows need room), got {num_steps}.")
    check_metric(target, kernel, metric)
    num_pieces = max(2, math.ceil(num_steps / (4 * PIECE)))
    found = explore(target, rng_key, _as_rows(starts), num_pieces, is_dense(target, dense), watch)
    check_exploration(target, found)
    is_given = metric is not None or getattr(kernel, "inverse_mass_matrix", None) is not None
    kernel, basis = take_metric(target, kernel, found, metric)
    frame = Frame(np.asarray(basis.loc, float), np.asarray(basis.scale, float))
    remark = "" if found.settled or is_given else UNSETTLED.format(num_steps=num_steps)
    return Explored(kernel, basis, frame.to_coordinates(found.last), remark, found.num_lost)


class Frame:
    """A `Basis` on the host, in float64, for rows of points."""

    def __init__(self, loc: np.ndarray, scale: np.ndarray):
        self.loc, self.scale = loc, scale

    def basis(self, dtype) -> Basis:
        return Basis(np.asarray(self.loc, dtype), np.asarray(self.scale, dtype))

    def to_positions(self, y: np.ndarray) -> np.ndarray:
        return Basis(self.loc, self.scale).to_positions(y)

    def to_coordinates(self, x: np.ndarray) -> np.ndarray:
        centred = x - self.loc
        return np.linalg.solve(self.scale, centred.T).T if self.scale.ndim == 2 else centred / self.scale


class Explorer:
    """An ensemble of HMC on its way into the posterior. positions: (lanes, D) in the user's coordinates.

    The first window runs in the target's own basis, where it has one.
    """

    def __init__(self, target: Target, rng_key: PRNGKey, positions: np.ndarray, dense: bool, watch: Watch = ignore):
        self.target, self.positions, self.dense = target, positions, dense
        self.frame = Frame(np.zeros(target.dim), np.eye(target.dim) if dense else np.ones(target.dim))
        if target.basis is not None:
            self.frame = Frame(np.asarray(target.basis.loc, float), np.asarray(target.basis.scale, float))
        self.lanes = LaneEnsemble(HMC(), rng_key, HMC().target_acceptance_rate(target.dim), watch)
        self.finite, self.settled, self.num_lost = True, False, 0
        self.num_waits = np.zeros(len(positions), int)
        self.movement, self.acceptance_rate = np.zeros(target.dim), 0.0

    def run_window(self, num_pieces: int) -> None:
        """`PIECE` steps a piece; then the basis is that of their draws."""
        if not self.finite:
            return
        target = self.target.with_basis(self.frame.basis(self.target.spec.dtype))
        self.lanes.enter(target, self.frame.to_coordinates(self.positions))
        pieces = [self.lanes.run(adapting=True)[0] for _ in range(num_pieces)]
        path = np.concatenate([np.asarray(piece.path, float) for piece in pieces])
        self.movement = np.ptp(self.frame.to_positions(path), axis=0).max(axis=0)
        acceptance_rate = np.concatenate([piece.acceptance_rate for piece in pieces])
        self.acceptance_rate = float(np.mean(acceptance_rate))
        held = held_lanes(np.mean([piece.moved for piece in pieces], axis=0), acceptance_rate, self.lanes.rate)
        far = far_lanes(held, np.concatenate([piece.logdensity for piece in pieces]), self.target.dim)
        self.num_waits = np.where(far, self.num_waits + 1, 0)
        lost = self.num_waits > PATIENCE
        self.num_waits[lost] = 0
        self.num_lost += int(lost.sum())
        self.positions = self.frame.to_positions(_with_places(path[-1], np.flatnonzero(lost), np.flatnonzero(~held)))
        self.finite = bool(np.all(np.isfinite(path)))
        if self.finite:
            mean, factor = _moments(path, self.dense)
            self.settled = _is_settled(path, mean, factor)
            scale = self.frame.scale @ factor if self.dense else self.frame.scale * factor
            self.frame = Frame(self.frame.to_positions(mean[None])[0], scale)

    def found(self) -> Exploration:
        frame = self.frame
        return Exploration(
            frame.loc, frame.scale, self.positions, self.movement, self.acceptance_rate, self.settled, self.num_lost
        )


def explore(
    target: Target, rng_key: PRNGKey, positions: np.ndarray, num_pieces: int, dense: bool, watch: Watch = ignore
) -> Exploration:
    """Location and metric of the posterior, from positions (lanes, D) in the user's coordinates."""
    explorer = Explorer(target, rng_key, positions, dense, watch)
    for _ in range(num_pieces):
        explorer.run_window(1)
        if explorer.settled:
            break
    lengths = _window_lengths(num_pieces)
    for length in lengths:
        explorer.run_window(length)
    for _ in range(MAX_REPEATS):
        if not explorer.settled:
            explorer.run_window(lengths[-1])
    return explorer.found()


def _window_lengths(num_pieces: int) -> list[int]:
    """2, 4, 8, ... as long as the last window is at least half of all."""
    lengths: list[int] = []
    left = num_pieces
    while left > 6 * 2 ** len(lengths):
        lengths.append(2 * 2 ** len(lengths))
        left -= lengths[-1]
    return [*lengths, left]


def _is_settled(path: np.ndarray, mean: np.ndarray, factor: np.ndarray) -> bool:
    """Whether a path (steps, lanes, D) of this mean and Cholesky factor, (D,) or (D, D), says that its basis is right.

    Standard deviations and means of the draws lie within a factor `SETTLED` of 1, in every direction; and the spread is
    each lane's own, not that between lanes still on their way: a share `MIXED` of the variance in every direction.
    """
    within = (path - path.mean(axis=0)).reshape(-1, path.shape[-1])
    if factor.ndim == 2:
        spread = np.linalg.svd(factor, compute_uv=False)
        whitened = np.linalg.solve(factor, within.T)
        share = np.linalg.eigvalsh(whitened @ whitened.T / len(within))
    else:
        spread, share = factor, np.mean((within / factor) ** 2, axis=0)
    right = np.all((spread < SETTLED) & (spread > 1 / SETTLED)) and np.all(np.abs(mean) < SETTLED)
    return bool(right and share.min() > MIXED)


def _with_places(last: np.ndarray, lost: np.ndarray, moving: np.ndarray) -> np.ndarray:
    """Rows (lanes, D) with those of moving lanes in place of lost ones; both are given by their numbers."""
    last = last.copy()
    if len(lost):  # never all lanes
        last[lost] = last[moving[lost % len(moving)]]
    return last


def _moments(path: np.ndarray, dense: bool) -> tuple[np.ndarray, np.ndarray]:
    """Mean (D,) and Cholesky factor (D, D), or deviations (D,), of the draws, path (steps, lanes, D).

    A coordinate that did not move keeps its scale. The correlation is shrunk towards the identity by
    ``(D / (D + n))^2``, n the effective number of draws: nothing for many draws, however strong the correlation, and
    enough to keep the factor finite for few.
    """
    num_steps, num_lanes, dim = path.shape
    draws = path.reshape(-1, dim)
    mean, deviation = draws.mean(axis=0), draws.std(axis=0)
    deviation = np.where(deviation > 0, deviation, 1.0)
    if not dense:
        return mean, deviation
    z = (path - mean) / deviation
    lagged = np.clip(np.mean(z[1:] * z[:-1], axis=(0, 1)).max(), 0.0, 1.0)
    effective = num_lanes * (1 + (num_steps - 1) * (1 - lagged) / (1 + lagged))
    weight = (dim / (dim + effective)) ** 2
    z = z.reshape(-1, dim)
    correlation = (1 - weight) * (z.T @ z) / len(z)
    np.fill_diagonal(correlation, 1.0)
    return mean, deviation[:, None] * np.linalg.cholesky(correlation)


def _as_rows(positions: PyTree) -> np.ndarray:
    """(lanes, D) in the user's coordinates.

    A pilot pairs lanes of the two halves. Where starts repeat, as those given for four chains do, its first pairs shall
    have different starts, and later ones others again: blocks of four lanes in the second half are turned.
    """
    leaves = [np.asarray(x, float) for x in jax.tree.leaves(positions)]
    rows = np.concatenate([x.reshape(len(x), -1) for x in leaves], axis=1)
    half = np.arange(NUM_LANES // 2)
    turned = 4 * (half // 4) + (half + np.array([2, 1, 3, 0])[half // 4]) % 4
    return rows[np.concatenate([half, NUM_LANES // 2 + turned])]
