"""Warm-up by one ensemble of lanes, which find location and metric before they tune the kernel's step size.

`EnsembleAdaptation` runs up to 32 lanes of HMC in windows of growing length. After each window the mean m and Cholesky
factor F of all draws, in the current coordinates, update the basis ``x = loc + scale y``:

    loc' = loc + scale m,    scale' = scale F

(elementwise for a diagonal basis). `explore` does this, an `Explorer` carries its state, and `explore_basis` also
applies the user's metric. In the basis found, `pmcmc.warmup.lanes.tune` tunes the kernel. Between windows the
centredness of partially centred sites is chosen (`pmcmc.warmup.centredness`).

Source: Stan's windows (Stan Development Team) with moments pooled over chains (Zhang et al. 2020); Hoffman & Gelman
(2014) for dual averaging.
"""

import math
from dataclasses import dataclass, field
from typing import Any, ClassVar, NamedTuple

import jax
import numpy as np

from pmcmc._arguments import check_rate
from pmcmc._pytree import ArrayLeaf, PRNGKey, PyTree, Scalar, register_dataclass
from pmcmc.kernels import HMC, Kernel
from pmcmc.random.streams import split_key
from pmcmc.target import Target
from pmcmc.warmup.base import Tuned, Warmup, Watch, check_metric, ignore, path_moments, take_metric
from pmcmc.warmup.centredness import recentred
from pmcmc.warmup.frame import Frame
from pmcmc.warmup.lanes import (
    NO_LIMIT,
    NUM_LANES,
    PIECE,
    Exploration,
    LaneEnsemble,
    check_exploration,
    is_dense,
    num_lanes,
    tune,
    tuned_shapes,
)
from pmcmc.warmup.settlement import REMEDY, REMEDY_OF_ENSEMBLE, Verdict, judge_path, remedy_for, unsettled
from pmcmc.warmup.stray_lanes import far_lanes, held_lanes
from pmcmc.warmup.trajectories import lengthened, widest

# Number of further windows, with a step size tuned for it, that a lane far out gets before it is moved to another
# lane's position.
PATIENCE = 1
# Largest number of leapfrog steps in the first window where gradients are costly; it doubles with each further one.
SHORTEST = 8
# Largest number of times that the last window is repeated because it did not settle the basis.
MAX_REPEATS = 8


@register_dataclass
@dataclass(frozen=True)
class EnsembleAdaptation(Warmup):
    """Windows over an ensemble of lanes of jittered HMC, then dual averaging of the kernel's own step size.

    There are 32 lanes, or fewer (at least 4) if one log density takes more than about 65,000 operations, see
    `pmcmc.warmup.lanes.num_lanes`.

    1. Exploration: the lanes run HMC, each from its own start. After every 16 steps the mean and covariance of all
       their draws become the basis in which they continue, until the basis looks right and the lanes mix (see
       `pmcmc.warmup.settlement`), or for a quarter of ``num_steps``. With fewer than 32 lanes, trajectories are short
       at first, and only the last 8 of the 16 steps count. Then come windows of 32, 64, ... steps, a quarter of
       ``num_steps`` in total. The last of them, at least half of this quarter, gives the target's basis; as long as it
       does not settle the basis, it is repeated, up to eight times. In each window dual averaging of one step size for
       all lanes starts anew. Lanes that do not move count together for half of the acceptance rate that is tuned, so
       the step size falls until they move. A lane whose log density stays far below that of the others, by more than
       a wider region could make up for (`pmcmc.warmup.stray_lanes.far_lanes`), is moved to another lane's position if
       this is still so one window later. With `AutoReparam`, there are at least two of these longer windows. Before
       each the centredness of its sites is chosen anew, and the basis restarts from the same draws.
       In a diagonal basis with wide directions, trajectories of `HMC` are `lengthened`, unless a metric is given.
    2. Tuning: in that basis the lanes run the kernel for a quarter as many steps (at least 102), as in
       `WindowAdaptation`.

    One program of a few leapfrog steps is compiled, and for HMC and NUTS both parts run it: the step size of NUTS is
    tuned on HMC. NUTS along 4 paths, as in `WindowAdaptation`, takes several times as long to compile, and as many
    steps sequentially.

    Args:
        dense: Full covariance (True) or its diagonal (False). None: full up to 50 dimensions.
        target_acceptance_rate: Acceptance rate to tune to. None: the kernel's own, such as 0.574 for MALA and 0.8 for
            HMC.
        inverse_mass_matrix: M^{-1}, about the posterior's (co)variance; a number, (D,) or (D, D). It is kept as it is
            for any kernel, and part 1 finds only where the posterior is. None: found in part 1.

    Raises:
        ValueError: ``target_acceptance_rate`` is not between 0 and 1.
        TypeError: It is a boolean.

    Source: Stan's windows (Stan Development Team) with moments pooled over chains, as in cross-chain warm-up (Zhang et
    al. 2020); Hoffman & Gelman (2014) for dual averaging.

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
    chooses_centredness: ClassVar[bool] = True

    def __post_init__(self):
        check_rate("target_acceptance_rate", self.target_acceptance_rate)

    def count_starts(self, target, num_given=1):
        return num_lanes(target, num_given)

    def tuned_shapes(self, target: Target, kernel: Kernel, num_starts: int) -> Tuned:
        return tuned_shapes(target, kernel, num_starts, is_dense(target, self.dense), self.inverse_mass_matrix)

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
        explore_key, step_key = split_key(rng_key, 2)
        found = explore_basis(
            target, kernel, explore_key, starts, num_steps, self.dense, watch, self.inverse_mass_matrix, num_given
        )
        num_tuning = max(102, num_steps // 4)
        tuned = tune(found.target, found.kernel, step_key, found.lanes, self.target_acceptance_rate, num_tuning, watch)
        return found.told(tuned)


class Explored(NamedTuple):
    """Result of `explore_basis`.

    Attributes:
        kernel: The kernel without its metric, which is part of the basis.
        target: The target in the basis found, or in that of the user's metric.
        lanes: Coordinates of the lanes of this target; shape (lanes, D).
        remark: What is doubtful about the exploration, as in `Tuned`.
        num_lost: Number of lanes moved to another lane's position, as in `Tuned`.
    """

    kernel: Any
    target: Target
    lanes: np.ndarray
    remark: str
    num_lost: int

    def told(self, tuned: Tuned) -> Tuned:
        """Return a `Tuned` made from these lanes, with the remark and counts of the exploration added."""
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
    num_given: int = 1,
) -> Explored:
    """Return the basis found on half of ``num_steps``, or that of the user's metric.

    Args:
        target: Target to sample.
        kernel: Kernel to tune.
        rng_key: Key of the exploration.
        starts: Positions of the lanes, along the leading axis.
        num_steps: Number of warm-up steps.
        dense: Whether the basis is a full matrix. None: up to 50 dimensions.
        watch: Called with the steps of the lanes.
        metric: Inverse mass matrix given to the warm-up, see `check_metric`.
        num_given: Number of different starts that the user gave, as in `Warmup.run`.

    Returns:
        The kernel (`lengthened` if the basis leaves wide directions), the target in the basis, and the lanes.

    Raises:
        ValueError: There are too few steps, or a metric does not fit.
        WarmupError: The posterior cannot be explored.
    """
    if num_steps < 20:
        raise ValueError(f"num_warmup must be 0 or at least 20 (for its windows), got {num_steps}.")
    check_metric(target, kernel, metric)
    num_pieces = max(2, math.ceil(num_steps / (4 * PIECE)))
    target, found = explore(target, rng_key, _as_rows(starts, num_given), num_pieces, is_dense(target, dense), watch)
    check_exploration(target, found)
    is_given = metric is not None or kernel.metric is not None
    kernel, basis = take_metric(target, kernel, found.mean, found.scale, metric)
    kernel = kernel if is_given else lengthened(kernel, found.widest)
    frame = Frame(np.asarray(basis.loc, float), np.asarray(basis.scale, float))
    remark = ""
    if not (found.verdict.placed if is_given else found.verdict.settled):
        remark = unsettled(num_steps, remedy_for(target, REMEDY if metric is not None else REMEDY_OF_ENSEMBLE))
    return Explored(kernel, target.with_basis(basis), frame.to_coordinates(found.last), remark, found.num_lost)


class Explorer:
    """An ensemble of HMC lanes that explores the posterior.

    The first window runs in the target's own basis, if it has one.

    Args:
        target: Target to sample.
        rng_key: Key of the exploration.
        positions: Starts in the user's coordinates; shape (lanes, D).
        dense: Whether the basis is a full matrix.
        num_steps: Steps of the whole warm-up.
        watch: Called with the steps of the lanes.
    """

    def __init__(
        self,
        target: Target,
        rng_key: PRNGKey,
        positions: np.ndarray,
        dense: bool,
        num_steps: int,
        watch: Watch = ignore,
    ):
        self.target, self.positions, self.dense = target, positions, dense
        self.frame = Frame(np.zeros(target.dim), np.eye(target.dim) if dense else np.ones(target.dim))
        if target.basis is not None:
            self.frame = Frame(np.asarray(target.basis.loc, float), np.asarray(target.basis.scale, float))
        self.lanes = LaneEnsemble(HMC(), rng_key, HMC().target_acceptance_rate(target.dim), watch, num_steps)
        self.finite, self.verdict, self.num_lost = True, Verdict(False, False), 0
        self.num_waits = np.zeros(len(positions), int)
        # Of the last window, where the centredness is to be chosen from it: its path, and the lanes that count.
        self.path, self.burn_in = np.zeros((0, *positions.shape)), 0
        self.lost, self.usual = np.zeros(len(positions), bool), np.ones(len(positions), bool)
        self.sources = np.arange(len(positions))
        self.movement, self.acceptance_rate, self.widest = np.zeros(target.dim), 0.0, 1.0

    def run_window(self, num_pieces: int, longest: int = NO_LIMIT, burn_in: int = 0) -> None:
        """Run a window, then set the basis to the moments of its draws.

        Args:
            num_pieces: Number of pieces of `PIECE` steps.
            longest: Largest number of leapfrog steps of a trajectory.
            burn_in: Number of steps at the beginning that do not count as draws: lanes may be on their way.
        """
        if not self.finite:
            return
        # Run the window in the current basis; dual averaging starts anew.
        target = self.target.with_basis(self.frame.basis(self.target.spec.dtype))
        self.lanes.enter(target, self.frame.to_coordinates(self.positions))
        self.lanes.longest = min(longest, NO_LIMIT)
        pieces = [self.lanes.run(adapting=True)[0] for _ in range(num_pieces)]
        path = np.concatenate([np.asarray(piece.path, float) for piece in pieces])
        positions = self.frame.to_positions(path)
        if self.target.centredness:
            self.path, self.burn_in = positions, burn_in
        self.movement = np.ptp(positions, axis=0).max(axis=0)
        acceptance_rate = np.concatenate([piece.acceptance_rate for piece in pieces])
        self.acceptance_rate = float(np.mean(acceptance_rate, dtype=float))
        # Move lanes that were far out for too long to the positions of lanes that move elsewhere.
        held = held_lanes(np.mean([piece.moved for piece in pieces], axis=0), acceptance_rate, self.lanes.rate)
        far = far_lanes(path, np.concatenate([piece.logdensity for piece in pieces]))
        self.num_waits = np.where(far, self.num_waits + 1, 0)
        lost = self.num_waits > PATIENCE
        self.num_waits[lost] = 0
        self.lost, self.num_lost = lost, self.num_lost + int(lost.sum())
        self.usual = ~held & ~far
        self.sources = _sources(len(lost), np.flatnonzero(lost), np.flatnonzero(self.usual))
        self.positions = self.frame.to_positions(path[-1][self.sources])
        self.finite = bool(np.all(np.isfinite(path)))
        # Update the basis from the draws of the window.
        if self.finite:
            draws = path[burn_in:, ~lost]
            mean, factor = path_moments(draws, self.dense)
            self.verdict = judge_path(draws, mean, factor)
            self.widest = 1.0 if self.dense else widest(draws, factor)
            self.frame = self.frame.followed_by(mean, factor)

    def recentre(self) -> None:
        """Choose the centredness of partially centred sites from the draws of the last window.

        The lanes stay at the same values of the model's sites. The basis becomes the moments of the same draws. If
        they cannot all be represented in the new coordinates, everything stays as it is.
        """
        if not (self.finite and self.target.centredness):
            return
        lanes = self.usual if self.usual.any() else ~self.lost
        target, path = recentred(self.target, self.path, self.path[self.burn_in :, lanes])
        if target is self.target or not np.all(np.isfinite(path)):
            return
        self.target, self.path, self.positions = target, path, path[-1][self.sources]
        draws = path[self.burn_in :, ~self.lost]
        coordinates = self.frame.to_coordinates(draws.reshape(-1, target.dim)).reshape(draws.shape)
        self.frame = self.frame.followed_by(*path_moments(coordinates, self.dense))

    def found(self) -> Exploration:
        """Return what has been found so far."""
        frame = self.frame
        moved = self.movement, self.acceptance_rate, self.verdict, self.num_lost, self.widest
        return Exploration(frame.loc, frame.scale, self.positions, *moved)


def explore(
    target: Target, rng_key: PRNGKey, positions: np.ndarray, num_pieces: int, dense: bool, watch: Watch = ignore
) -> tuple[Target, Exploration]:
    """Find the location and metric of the posterior, and the centredness of partially centred sites.

    Args:
        target: Target to sample.
        rng_key: Key of the exploration.
        positions: Starts in the user's coordinates; shape (lanes, D).
        num_pieces: Number of pieces in each of the two phases, first short windows and then windows of growing length.
        dense: Whether the basis is a full matrix.
        watch: Called with the steps of the lanes.

    Returns:
        The target with the centredness found, and moments and positions in its coordinates.
    """
    explorer = Explorer(target, rng_key, positions, dense, 4 * PIECE * num_pieces, watch)
    # Short windows, until the basis is settled. In a basis that is far too wide the step size is small and trajectories
    # are long. Where gradients are costly, trajectories are therefore short at first, and only the later half of a
    # window counts. Elsewhere they are not: lanes that start near a narrow mode need long ones to reach it.
    is_costly = len(positions) < NUM_LANES
    for number in range(num_pieces):
        if is_costly:
            explorer.run_window(1, longest=SHORTEST * 2**number, burn_in=PIECE // 2)
        else:
            explorer.run_window(1)
        if explorer.verdict.settled:
            break
    # Windows of growing length; the last is repeated until it settles the basis.
    lengths = _window_lengths(num_pieces)
    if target.centredness and len(lengths) == 1:  # the first window chooses it anew for the second
        lengths = [num_pieces // 2, num_pieces - num_pieces // 2]
    for length in lengths:
        explorer.recentre()
        explorer.run_window(length)
    for _ in range(MAX_REPEATS):
        if not explorer.verdict.settled:
            explorer.recentre()
            explorer.run_window(lengths[-1])
    return explorer.target, explorer.found()


def _window_lengths(num_pieces: int) -> list[int]:
    """Return window lengths 2, 4, 8, ... in pieces, the last of them at least half of ``num_pieces``."""
    lengths: list[int] = []
    left = num_pieces
    while left > 6 * 2 ** len(lengths):
        lengths.append(2 * 2 ** len(lengths))
        left -= lengths[-1]
    return [*lengths, left]


def _sources(num_lanes: int, lost: np.ndarray, moving: np.ndarray) -> np.ndarray:
    """Return for each lane the lane whose position it takes: its own, or that of a moving one if it is lost.

    Args:
        num_lanes: Number of lanes.
        lost: Numbers of the lost lanes.
        moving: Numbers of the lanes that move.
    """
    sources = np.arange(num_lanes)
    if len(lost):  # a lane is lost only where better ones move
        sources[lost] = moving[lost % len(moving)]
    return sources


def _as_rows(positions: PyTree, num_given: int) -> np.ndarray:
    """Return positions as rows in the user's coordinates; shape (lanes, D).

    A pilot pairs lanes of the two halves, and the first pairs must have different starts, and so must later ones. If
    the halves have equal starts, as those given for four chains, groups of four lanes in the second half are rotated.
    Otherwise every lane keeps its start: the first pairs differ already, and with more given starts than a half has
    lanes, chains need those of the second half.

    Args:
        positions: Positions with leading axis lanes.
        num_given: Number of different starts that the user gave, as in `Warmup.run`.
    """
    leaves = [np.asarray(x, float) for x in jax.tree.leaves(positions)]
    rows = np.concatenate([x.reshape(len(x), -1) for x in leaves], axis=1)
    half = np.arange(len(rows) // 2)
    if len(half) < 4 or len(half) % num_given:
        return rows
    turned = 4 * (half // 4) + (half + np.array([2, 1, 3, 0])[half // 4]) % 4
    return rows[np.concatenate([half, len(half) + turned])]
