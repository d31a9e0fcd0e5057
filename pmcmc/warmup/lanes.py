"""Lanes of one kernel, run in short pieces by one compiled program; a step size tuned on them.

Every warm-up ends here: its exploration gives a basis and positions, and on lanes that start there dual averaging sets
the step size of the kernel at hand. `run_piece` takes a fixed number of steps, so one program serves warm-ups of any
length, and exploration and tuning alike where both use the same kind of kernel.
"""

import math
from dataclasses import replace
from statistics import median_low
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from pmcmc._pytree import is_real
from pmcmc._typing import Array, ArrayLeaf, PRNGKey, PyTree, Scalar
from pmcmc._xla.compile import tuned_jit
from pmcmc.interop.blackjax import dual_averaging
from pmcmc.kernels import HMC, Kernel
from pmcmc.random.threefry import fold_in, key_pair, raw_keys_are_threefry
from pmcmc.target import Basis, Target
from pmcmc.warmup.base import LaneTiming, Tuned, WarmupError, Watch, ignore
from pmcmc.warmup.starts import start_order

# Lanes on which the kernel's own step size is adapted and whose last states seed chains and blocks.
NUM_LANES = 32


# Steps of one run of the program.
PIECE = 16


# A lane is held where it did not move in a piece and its mean acceptance rate was below this share of the target.
HELD = 0.1


# A held lane is far out where its log density lies this much, and another nat a dimension, below all that the moving
# lanes visited meanwhile. It waits for a smaller step size, so where it is the posterior is not wider than where they
# are, and holds less than about exp(-20) of the mass.
FAR = 20.0


HELD_STILL = (
    "{num_held} of the {num_lanes} lanes of warm-up did not move in its last third: there is a region of the posterior "
    "that the step size does not resolve, and chains that enter it stand still. Take smaller steps by a higher "
    "acceptance rate, as in warmup=EnsembleAdaptation(target_acceptance_rate=0.95), raise num_warmup, or reparametrise."
)


# Pieces that say what a step takes, at least: the last ones, since the length of HMC depends on the step size.
NUM_TIMED = 5


class Piece(NamedTuple):
    """`PIECE` steps on all lanes.

    averaged: state of the dual averaging. path: (steps, lanes, D) coordinates. acceptance_rate: (steps, lanes).
    logdensity: (steps, lanes). moved: (lanes,) share of the steps that changed the coordinates.
    """

    states: PyTree
    averaged: PyTree
    path: Array
    acceptance_rate: Array
    logdensity: Array
    moved: Array


def _with_step(kernel: Any, target: Target, averaged: PyTree, averaging: Any, adapting: Array) -> Any:
    """The kernel with the step size of the moment, or with its own where that is given or where it has none."""
    if not hasattr(kernel, "step_size"):
        return kernel
    step_size = kernel.step_size
    if step_size is None:
        step_size = jnp.where(adapting, averaging.step_size(averaged), averaging.final(averaged))
    return kernel.with_step_size(jnp.asarray(step_size, target.spec.dtype))


@tuned_jit()
def _start_lanes(target: Target, kernel: Any, positions: Array, averaged: PyTree, rate: Scalar) -> PyTree:
    ready = _with_step(kernel, target, averaged, dual_averaging(rate), jnp.array(True))
    return jax.vmap(lambda y: ready.unknown(ready.start(target, y)))(positions)


@tuned_jit()
def run_piece(
    target: Target,
    kernel: Any,
    rng_key: PRNGKey,
    number: Array,
    states: PyTree,
    averaged: PyTree,
    rate: Scalar,
    adapting: Array,
    weights: Array,
) -> Piece:
    """`PIECE` steps of all lanes from unknowns ``states``, under noise that belongs to the piece of this number.

    weights: (lanes,), sum 1: of their acceptance rates in the one that is tuned.
    """
    averaging = dual_averaging(rate)
    num_lanes = jax.tree.leaves(states)[0].shape[0]
    numbers = number * PIECE * num_lanes + jnp.arange(PIECE * num_lanes)
    keys = jax.vmap(lambda n: fold_in(key_pair(rng_key), n))(numbers)
    with raw_keys_are_threefry():
        noise = jax.vmap(lambda key: kernel.sample_noise(key, target))(keys)
    noise = jax.tree.map(lambda x: x.reshape(PIECE, num_lanes, *x.shape[1:]), noise)
    coordinates = jax.vmap(lambda state: kernel.coordinates(kernel.unknown(state)))

    def body(carry, noise):
        state, averaged = carry
        now, before = _with_step(kernel, target, averaged, averaging, adapting), coordinates(state)
        state, info = jax.vmap(lambda s, n: now.step(target, s, n))(state, noise)
        after = coordinates(state)
        updated = averaging.update(averaged, jnp.sum(weights * info.acceptance_rate))
        averaged = jax.tree.map(lambda new, old: jnp.where(adapting, new, old), updated, averaged)
        moved = jnp.any(after != before, axis=1)
        return (state, averaged), (after, info.acceptance_rate, info.logdensity, moved)

    ready = _with_step(kernel, target, averaged, averaging, adapting)
    state = jax.vmap(lambda unknown: ready.restore(target, unknown))(states)
    (state, averaged), (path, acceptance, logdensity, moved) = jax.lax.scan(body, (state, averaged), noise)
    return Piece(jax.vmap(kernel.unknown)(state), averaged, path, acceptance, logdensity, jnp.mean(moved, axis=0))


def held_lanes(moved: np.ndarray, acceptance_rate: np.ndarray, rate: float) -> np.ndarray:
    """(lanes,) whether a lane did not move, and not by chance.

    moved: (lanes,) share of its steps that did. acceptance_rate: (steps, lanes). rate: that is aimed at.
    """
    return (moved == 0) & (np.mean(acceptance_rate, axis=0) < HELD * rate)


def half_for_held(held: np.ndarray) -> np.ndarray:
    """(lanes,) weights of sum 1: half for the held lanes together, where there are any, and half for the others."""
    groups = [group for group in (held, ~held) if group.any()]
    return np.sum([group / group.sum() for group in groups], axis=0) / len(groups)


def far_lanes(held: np.ndarray, logdensity: np.ndarray, dim: int) -> np.ndarray:
    """(lanes,) which of the held lanes the posterior has no mass for, see `FAR`; none where every lane is held.

    logdensity: (steps, lanes).
    """
    if held.all():
        return np.zeros_like(held)
    return held & (logdensity[-1] < np.min(logdensity[:, ~held]) - FAR - dim)  # not where it is NaN


class LaneEnsemble:
    """Lanes of one kernel, carried from piece to piece.

    rate: acceptance rate to tune to, on average over the lanes. Where some are held, they count as much as all others
    together: the step size falls until they move.
    """

    def __init__(self, kernel: Any, rng_key: PRNGKey | None, rate: Scalar, watch: Watch = ignore):
        self.kernel, self.rng_key, self.rate, self.watch = kernel, rng_key, float(rate), watch
        self._averaging, self._number = dual_averaging(self.rate), 0
        self._weights: np.ndarray | None = None

    def enter(self, target: Target, positions: np.ndarray) -> None:
        """Put the lanes at coordinates (lanes, D) of a target; dual averaging begins anew."""
        self.target, self.averaged = target, self.first_average(target)
        positions = np.asarray(positions, target.spec.dtype)
        if self._weights is None:
            self._weights = np.full(len(positions), 1 / len(positions), target.spec.dtype)
        self.states = _start_lanes(target, self.kernel, positions, self.averaged, self.rate)

    def first_average(self, target: Target) -> PyTree:
        """The state that dual averaging begins with."""
        as_leaf = lambda x: np.asarray(x, target.spec.dtype if is_real(x) else int)
        return jax.tree.map(as_leaf, self._averaging.init(self.kernel.first_step_size(target.dim)))

    def run(self, adapting: bool) -> tuple[Piece, float]:
        """One more piece, and the seconds that its run took."""
        arguments = (self.states, self.averaged, self.rate, np.asarray(adapting), self._weights)
        piece, (_, seconds) = run_piece.timed(
            self.target, self.kernel, self.rng_key, np.asarray(self._number), *arguments
        )
        self._number += 1
        self.states, self.averaged = piece.states, piece.averaged
        self.watch(self.target, piece.path)
        held = held_lanes(np.asarray(piece.moved), np.asarray(piece.acceptance_rate), self.rate)
        self._weights = half_for_held(held).astype(self.target.spec.dtype)
        return piece, seconds

    def tuned_kernel(self) -> Any:
        return _tuned_kernel(self.target, self.kernel, self.averaged, self.rate)


@tuned_jit()
def _tuned_kernel(target: Target, kernel: Any, averaged: PyTree, rate: Scalar) -> Any:
    tuned = _with_step(kernel, target, averaged, dual_averaging(rate), jnp.array(False))
    if isinstance(kernel, HMC) and kernel.num_integration_steps is None:
        tuned = replace(tuned, num_integration_steps=tuned.default_length())
    return tuned


def tune(
    target: Target,
    kernel: Kernel,
    rng_key: PRNGKey,
    positions: np.ndarray,
    rate: Scalar | None,
    num_steps: int,
    watch: Watch = ignore,
) -> Tuned:
    """The kernel's step size, on lanes from ``positions`` (lanes, D): two thirds of the steps adapt.

    The last third decorrelates the lanes. What a step takes is the lower median of its pieces, and of a few before them
    where it has less than `NUM_TIMED`. rate: None for the kernel's own.

    Raises:
        WarmupError: no step size can be found, states are not finite, or nothing moved in the last third.
    """
    rate = kernel.target_acceptance_rate(target.dim) if rate is None else rate
    lanes = LaneEnsemble(kernel, rng_key, rate, watch)
    lanes.enter(target, positions)
    third = math.ceil(num_steps / (3 * PIECE))
    before = [lanes.run(adapting=True)[1] for _ in range(2 * third)]
    last, seconds = zip(*(lanes.run(adapting=False) for _ in range(third)), strict=True)
    timed = [*before, *seconds][-max(third, NUM_TIMED) :]
    tuned = lanes.tuned_kernel()
    acceptance_rate = np.concatenate([piece.acceptance_rate for piece in last])
    moved = np.mean([piece.moved for piece in last], axis=0)
    check_tuned(tuned, lanes.states, np.mean(acceptance_rate), np.mean(moved))
    timing = LaneTiming(len(positions), median_low(timed) / PIECE)
    order = start_order(*(np.concatenate(parts) for parts in ([p.path for p in last], [p.logdensity for p in last])))
    num_held = int(held_lanes(moved, acceptance_rate, lanes.rate).sum())
    some = 0 < num_held < len(moved)  # of all of them `check_tuned` speaks
    remark = HELD_STILL.format(num_held=num_held, num_lanes=len(moved)) if some else ""
    return Tuned(target, tuned, lanes.states, jnp.asarray(np.mean(acceptance_rate)), timing, remark, order)


def check_tuned(kernel: Kernel, states: PyTree, acceptance_rate: Any, moved: Any) -> None:
    """Raise where the lanes are not fit to sample from; moved: share of moves that were accepted."""
    step_size = np.asarray(getattr(kernel, "step_size", ()))
    if np.isnan(step_size).any() and np.isnan(acceptance_rate):
        raise WarmupError(
            "the step size could not be tuned, because the kernel reports no acceptance rate: pass step_size= to it."
        )
    if not all(np.all(np.isfinite(x)) for x in jax.tree.leaves(states) if is_real(x)):
        raise WarmupError("warm-up reached states that are not finite: check the density for NaN and its constraints.")
    if float(moved) == 0.0:
        given = f" (step size {np.max(step_size):.3g})" if step_size.size else ""
        raise WarmupError(
            f"no move was accepted in the last third of warm-up{given}. Leave step_size=None so that "
            "it is tuned, take a smaller one, or start elsewhere with init_params."
        )


class Exploration(NamedTuple):
    """Pooled moments, in the target's coordinates.

    mean: (D,). scale: (D,) standard deviations or (D, D) Cholesky factor. last: (lanes, D).
    movement: (D,) largest spread within one path. acceptance_rate: mean.
    settled: whether more steps would hardly move the moments, as far as anybody looked. num_lost: as in `Tuned`.
    """

    mean: Any
    scale: Any
    last: Any
    movement: Any
    acceptance_rate: Any
    settled: bool = True
    num_lost: int = 0


def check_exploration(target: Target, found: Exploration) -> None:
    """Raise where the posterior cannot be explored: improper, or stuck in some coordinate."""
    if not all(np.all(np.isfinite(x)) for x in (found.last, found.mean, found.movement)):
        raise WarmupError(
            "warm-up reached positions, or a spread of them, that are not finite. The posterior may be improper: give "
            "every parameter a proper prior."
        )
    stuck = np.asarray(found.movement) == 0
    if stuck.any():
        names = _leaf_names(target, stuck)
        raise WarmupError(
            f"warm-up never moved {names} (mean acceptance rate {float(found.acceptance_rate):.2f}). Start it "
            "elsewhere with init_params, lengthen num_warmup, or check the density for steps and constraints that its "
            "support does not state."
        )


def _leaf_names(target: Target, flags: np.ndarray) -> str:
    tree = target.spec.unravel(jnp.asarray(flags, target.spec.dtype))
    names = [jax.tree_util.keystr(p) for p, x in jax.tree_util.tree_leaves_with_path(tree) if bool(jnp.any(x > 0))]
    return ", ".join(f"position{name}" for name in names)


def is_dense(target: Target, dense: bool | None) -> bool:
    """Whether the basis is a full matrix: as told, else up to 50 dimensions."""
    return target.dim <= 50 if dense is None else dense


def check_metric(target: Target, kernel: Kernel, metric: ArrayLeaf | None = None) -> None:
    """The user's metric must fit the target and be positive definite: said before an hour of warm-up, not after.

    metric: given to the warm-up; None: that of the kernel, if it has one.

    Raises:
        ValueError: it does not, or there are two.
    """
    own = getattr(kernel, "inverse_mass_matrix", None)
    if own is not None and metric is not None:
        raise ValueError("inverse_mass_matrix is given twice, to the kernel and to warmup=: leave one of them out.")
    metric = own if metric is None else metric
    if metric is None:
        return
    metric = np.asarray(metric)
    if metric.shape not in ((), (target.dim,), (target.dim, target.dim)):
        raise ValueError(
            f"inverse_mass_matrix has shape {metric.shape}: expected ({target.dim},) or ({target.dim}, {target.dim}), "
            "the number of unconstrained parameters."
        )
    values = np.linalg.eigvalsh(metric) if metric.ndim == 2 else metric
    if not np.all(np.isfinite(values) & (values > 0)):
        raise ValueError("inverse_mass_matrix is not positive definite: it stands for the posterior's covariance.")


def take_metric(
    target: Target, kernel: Kernel, found: Exploration, metric: ArrayLeaf | None = None
) -> tuple[Kernel, Basis]:
    """The basis explored, or the user's metric made a basis: one place where a metric acts.

    metric: as of `check_metric`.
    """
    scale = found.scale
    if isinstance(kernel, HMC) and kernel.inverse_mass_matrix is not None:
        metric = kernel.inverse_mass_matrix
        kernel = replace(kernel, inverse_mass_matrix=None)
    if metric is not None:
        scale = scale_of_metric(metric, target.dim)
    return kernel, Basis(*(jnp.asarray(np.asarray(x, target.spec.dtype)) for x in (found.mean, scale)))


def scale_of_metric(metric: ArrayLeaf, dim: int) -> np.ndarray:
    """The scale of the basis whose `Basis.covariance` is an inverse mass matrix: (dim,), or (dim, dim) for a full one.

    metric: a number, (dim,) or (dim, dim).
    """
    metric = np.asarray(metric, float)
    return np.linalg.cholesky(metric) if metric.ndim == 2 else np.broadcast_to(np.sqrt(metric), (dim,))


def tuned_shapes(target: Target, kernel: Kernel, dense: bool, metric: ArrayLeaf | None = None) -> Tuned:
    """What `tune` will return in a basis of this shape, as far as its shapes are concerned.

    metric: as of `check_metric`.
    """
    check_metric(target, kernel, metric)
    dtype, dim = target.spec.dtype, target.dim
    scale = np.eye(dim, dtype=dtype) if dense else np.ones(dim, dtype)
    none = np.zeros(dim, dtype)
    kernel, basis = take_metric(target, kernel, Exploration(none, scale, none, none, none), metric)
    whitened, lanes = target.with_basis(basis), LaneEnsemble(kernel, None, 1.0)
    averaged = lanes.first_average(whitened)
    tuned = _tuned_kernel.eval_shape(whitened, kernel, averaged, lanes.rate)
    positions = np.zeros((NUM_LANES, dim), dtype)
    states = _start_lanes.eval_shape(whitened, kernel, positions, averaged, lanes.rate)
    return Tuned(whitened, tuned, states, jnp.asarray(np.zeros((), dtype)))
