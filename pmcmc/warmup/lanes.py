"""Lanes of one kernel, run in short pieces by one compiled program, and a step size tuned on them.

Every warm-up of a kernel over vectors ends in `tune`: its exploration gives a basis and positions, and on lanes that
start there dual averaging sets the step size of the kernel. With acceptance rates a[t] of the lanes and a target rate
delta, dual averaging drives the running mean of ``delta - a[t]`` to zero.

`run_piece` takes a fixed number of steps, so one program serves warm-ups of any length, and both exploration and tuning
if they use the same kind of kernel. `LaneEnsemble` carries lanes from piece to piece. The functions ``check_*`` raise
errors that name a remedy.

Source: Nesterov (2009) and Hoffman & Gelman (2014) for dual averaging.
"""

import math
from statistics import median_low
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from pmcmc._pytree import Array, ArrayLeaf, PRNGKey, PyTree, Scalar, is_real
from pmcmc._xla.compile import plain_jit, tuned_jit
from pmcmc._xla.content import count_operations
from pmcmc.interop.blackjax import dual_averaging
from pmcmc.kernels import HMC, Kernel
from pmcmc.kernels.base import higher_rate
from pmcmc.random.streams import fold_in, key_pair, raw_keys_are_threefry
from pmcmc.recurrence.abreast import map_lanes, scan_abreast
from pmcmc.target import Target
from pmcmc.warmup.base import LaneTiming, Tuned, WarmupError, Watch, check_metric, ignore, start_order, take_metric
from pmcmc.warmup.settlement import Verdict
from pmcmc.warmup.stray_lanes import half_for_held, held_lanes

# Largest and least number of lanes on which the kernel's step size is adapted, and whose last states are starts of
# chains and blocks; see `num_lanes`.
NUM_LANES, LEAST_LANES = 32, 4
# Operations of the log density that all lanes together may take. On two cores a gradient of 8 lanes took as long as one
# of 4 for a logistic regression of 1e4 rows (1.6e5 operations), and 32 lanes took 64 times as long as 4 for 1e5 rows.
LANE_OPERATIONS = 2**21
# Number of steps in one run of the program, and a number of leapfrog steps that is no limit.
PIECE, NO_LIMIT = 16, 2**30
# Least number of pieces from which the time of a step is taken. They are the last ones, because the number of leapfrog
# steps of HMC depends on the step size.
NUM_TIMED = 5


def num_lanes(target: Target, num_given: int = 1) -> int:
    """Return the number of lanes of warm-up: 32, or fewer if one log density fills the processor.

    It is the largest power of two up to 32 for which the log densities of all lanes take at most `LANE_OPERATIONS`
    operations, and at least 4. The count follows from shapes alone, never from timings, so the same key gives the same
    chain.

    Args:
        target: Target to sample.
        num_given: Number of different starts. There are at least twice as many lanes, up to 32, so that each of the
            first lanes has its own; and never fewer lanes than starts.
    """
    most = LANE_OPERATIONS // max(1, density_operations(target))
    wanted = 2 ** (num_given - 1).bit_length() * 2 if num_given > 1 else 1
    usual = min(NUM_LANES, max(LEAST_LANES, wanted, 2 ** (max(1, most).bit_length() - 1)))
    return max(usual, num_given + num_given % 2)  # an even number: a pilot pairs lanes of the two halves


def density_operations(target: Target) -> int:
    """Return the operations of one log density, as counted by `pmcmc._xla.content.count_operations`."""
    return _density.ask(count_operations, target, jax.ShapeDtypeStruct((target.dim,), target.spec.dtype))


@plain_jit()
def _density(target: Target, y: Array) -> Array:
    """Return the log density at coordinates ``y``, (D,)."""
    return target.logdensity_fn(y)


class Piece(NamedTuple):
    """`PIECE` steps on all lanes.

    Attributes:
        states: Unknowns of the lanes after the last step, with leading axis lanes.
        averaged: State of the dual averaging after the last step.
        path: Coordinates after each step; shape (steps, lanes, D).
        acceptance_rate: Acceptance rates; shape (steps, lanes).
        logdensity: Log densities; shape (steps, lanes).
        moved: Share of the steps that changed the coordinates; shape (lanes,).
    """

    states: PyTree
    averaged: PyTree
    path: Array
    acceptance_rate: Array
    logdensity: Array
    moved: Array


def _with_step(kernel: Any, target: Target, step_size: Scalar) -> Any:
    """Return the kernel with a step size; a step size that was given is kept."""
    if "step_size" not in kernel.tunables:
        return kernel
    step_size = step_size if kernel.step_size is None else kernel.step_size
    return kernel.with_step_size(jnp.asarray(step_size, target.spec.dtype))


@tuned_jit()
def _start_lanes(target: Target, kernel: Any, positions: Array, rate: Scalar) -> tuple[PyTree, PyTree]:
    """Return the unknowns of lanes at positions (lanes, D) in the target's coordinates, and a new dual averaging."""
    averaging = dual_averaging(rate)
    as_leaf = lambda x: jnp.asarray(x, target.spec.dtype if is_real(x) else int)
    averaged = jax.tree.map(as_leaf, averaging.init(kernel.first_step_size(target.dim)))
    ready = _with_step(kernel, target, averaging.step_size(averaged))
    return jax.vmap(lambda y: ready.unknown(ready.start(target, y)))(positions), averaged


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
    longest: Array,
    final_step: Array,
) -> Piece:
    """Take `PIECE` steps of all lanes.

    Args:
        target: Target to sample.
        kernel: Kernel, with a step size of None if it is tuned.
        rng_key: Key of the whole warm-up.
        number: Number of the piece, which determines its noise.
        states: Unknowns of the lanes, with leading axis lanes.
        averaged: State of the dual averaging.
        rate: Acceptance rate to tune to.
        adapting: Whether dual averaging continues; otherwise the step size is ``final_step``.
        weights: Weights of the lanes' acceptance rates in the one that is tuned, with sum 1; shape (lanes,).
        longest: Largest number of leapfrog steps of a trajectory.
        final_step: Step size of the tuned kernel.

    Returns:
        The states after the steps, and what happened on the way.
    """
    averaging = dual_averaging(rate)
    # All noise of the piece is drawn first, from a key for each step and lane.
    num_lanes = jax.tree.leaves(states)[0].shape[0]
    numbers = number * PIECE * num_lanes + jnp.arange(PIECE * num_lanes)
    keys = jax.vmap(lambda n: fold_in(key_pair(rng_key), n))(numbers)
    with raw_keys_are_threefry():
        noise = jax.vmap(lambda key: kernel.sample_noise(key, target))(keys)
    noise = jax.tree.map(lambda x: jnp.moveaxis(x.reshape(PIECE, num_lanes, *x.shape[1:]), 1, -1), noise)
    # The steps follow, with the lanes on the last axis of every value.
    coordinates = lambda state: kernel.coordinates(kernel.unknown(state))
    step_size = lambda averaged: jnp.where(adapting, averaging.step_size(averaged), final_step)

    def step(now, state, noise):
        before = coordinates(state)
        state, info = now.step(target, state, noise)
        after = coordinates(state)
        return state, (after, info.acceptance_rate, info.logdensity, jnp.any(after != before))

    def body(carry, noise):
        state, averaged = carry
        now = _with_step(kernel, target, step_size(averaged)).at_most(longest)
        state, (after, acceptance_rate, logdensity, moved) = map_lanes(step, (None, -1, -1), num_lanes)(
            now, state, noise
        )
        updated = averaging.update(averaged, jnp.sum(weights * acceptance_rate))
        # A count of steps in 64 bit would make the sums of a float32 model wider.
        averaged = jax.tree.map(lambda new, old: jnp.where(adapting, new, old).astype(old.dtype), updated, averaged)
        return (state, averaged), (after, acceptance_rate, logdensity, moved)

    ready = _with_step(kernel, target, step_size(averaged))
    state = jax.vmap(lambda unknown: ready.restore(target, unknown), out_axes=-1)(states)
    (state, averaged), records = scan_abreast(body, (state, averaged), noise, PIECE, num_lanes)
    path, acceptance_rate, logdensity, moved = records
    states = jax.vmap(kernel.unknown, in_axes=-1)(state)
    return Piece(states, averaged, jnp.moveaxis(path, -1, 1), acceptance_rate, logdensity, jnp.mean(moved, axis=0))


class LaneEnsemble:
    """Lanes of one kernel, carried from piece to piece.

    If some lanes are held, they count together as much as all others in the acceptance rate that is tuned, so the step
    size falls until they move.

    Args:
        kernel: Kernel, with a step size of None if it is tuned.
        rng_key: Key of the noise.
        rate: Acceptance rate to tune to, a weighted mean over the lanes.
        watch: Called with the steps of the lanes.
        num_steps: Steps of the whole warm-up. Long ones on large models are compiled as long runs are.

    Attributes:
        longest: Largest number of leapfrog steps of a trajectory; no limit at first.
        final_step: Step size of pieces that do not adapt; none at first.
    """

    def __init__(self, kernel: Any, rng_key: PRNGKey, rate: Scalar, watch: Watch = ignore, num_steps: int = 1000):
        # Rounded, because exploration and tuning count whole pieces, and should run the same program.
        self._length = 2 ** max(0, round(math.log2(max(num_steps, 1) / 1000)))
        self.kernel, self.rng_key, self.rate, self.watch = kernel, rng_key, float(rate), watch
        self._number, self.longest, self.final_step = 0, NO_LIMIT, np.nan
        self._weights: np.ndarray | None = None

    def enter(self, target: Target, positions: np.ndarray) -> None:
        """Put the lanes at coordinates (lanes, D) of a target and restart dual averaging."""
        self.target = target
        positions = np.asarray(positions, target.spec.dtype)
        if self._weights is None:
            self._weights = np.full(len(positions), 1 / len(positions), target.spec.dtype)
            self._is_brief = self._length * len(positions) * density_operations(target) <= LANE_OPERATIONS
        self.states, self.averaged = _start_lanes(target, self.kernel, positions, self.rate, brief=True)

    def run(self, adapting: bool) -> tuple[Piece, float]:
        """Run one more piece.

        Args:
            adapting: Whether dual averaging continues; otherwise steps have the size ``final_step``.

        Returns:
            The piece, and the seconds that it took to run.
        """
        limits = np.asarray(self.longest, np.int32), np.asarray(self.final_step, self.target.spec.dtype)
        arguments = (self.states, self.averaged, self.rate, np.asarray(adapting), self._weights, *limits)
        piece, (_, seconds) = run_piece.timed(
            self.target, self.kernel, self.rng_key, np.asarray(self._number), *arguments, brief=self._is_brief
        )
        self._number += 1
        self.states, self.averaged = piece.states, piece.averaged
        self.watch(self.target, piece.path)
        held = held_lanes(np.asarray(piece.moved), np.asarray(piece.acceptance_rate), self.rate)
        self._weights = half_for_held(held).astype(self.target.spec.dtype)
        return piece, seconds

    def tuned(self, kernel: Any) -> Any:
        """Return a kernel with the final step size and, for HMC, its number of leapfrog steps."""
        return _tuned_kernel(self.target, kernel, self.averaged, self.rate, brief=True)


@tuned_jit()
def _tuned_kernel(target: Target, kernel: Any, averaged: PyTree, rate: Scalar) -> Any:
    """Return the kernel with the final step size of dual averaging; see `LaneEnsemble.tuned`."""
    final = kernel.final_step_size(dual_averaging(rate).final(averaged))
    return _with_step(kernel, target, final).finalize()


def tune(
    target: Target,
    kernel: Kernel,
    rng_key: PRNGKey,
    positions: np.ndarray,
    rate: Scalar | None,
    num_steps: int,
    watch: Watch = ignore,
) -> Tuned:
    """Tune the kernel's step size on lanes, then run them on to decorrelate them.

    Two thirds of the steps adapt the step size; the last third decorrelates the lanes, at the step size of the tuned
    kernel, also where another one runs in its place (`Kernel.tuned_by`). Each third is rounded up to whole pieces of
    `PIECE` steps. The time of a step is the lower median of the last third, extended by earlier pieces to `NUM_TIMED`.

    Args:
        target: Target in the basis of the exploration.
        kernel: Kernel to tune.
        rng_key: Key of the noise.
        positions: Starts of the lanes in the target's coordinates; shape (lanes, D).
        rate: Acceptance rate to tune to. None: the kernel's own.
        num_steps: Number of steps, before rounding; a quarter of those of the whole warm-up.
        watch: Called with the steps of the lanes.

    Returns:
        The tuned kernel and the lanes.

    Raises:
        WarmupError: No step size can be found, states are not finite, or nothing moved in the last third.
    """
    rate = kernel.target_acceptance_rate(target.dim) if rate is None else rate
    stand_in = kernel.tuned_by()
    lanes = LaneEnsemble(stand_in, rng_key, rate, watch, 4 * num_steps)
    lanes.enter(target, positions)
    # Adapt the step size for two thirds of the steps; decorrelate the lanes in the last third.
    third = math.ceil(num_steps / (3 * PIECE))
    before = [lanes.run(adapting=True)[1] for _ in range(2 * third)]
    tuned = lanes.tuned(kernel)
    lanes.final_step = tuned.tunables.get("step_size", np.nan)
    last, times = zip(*(lanes.run(adapting=False) for _ in range(third)), strict=True)
    timed = [*before, *times][-max(third, NUM_TIMED) :]
    # Judge the tuned kernel by the last third.
    acceptance_rate = np.concatenate([np.asarray(piece.acceptance_rate, float) for piece in last])
    moved = np.mean([piece.moved for piece in last], axis=0)
    check_tuned(tuned, lanes.states, np.mean(acceptance_rate), np.mean(moved))
    seconds = median_low(timed) / PIECE
    timing = LaneTiming(len(positions), seconds) if stand_in is kernel else None
    if stand_in is not kernel and isinstance(stand_in, HMC) and stand_in.num_integration_steps is None:
        timing = LaneTiming(len(positions), seconds, stand_in.num_leapfrogs(lanes.final_step))
    order = start_order(*(np.concatenate(parts) for parts in ([p.path for p in last], [p.logdensity for p in last])))
    num_held = int(held_lanes(moved, acceptance_rate, lanes.rate).sum())
    some = 0 < num_held < len(moved)  # if all are held, `check_tuned` has raised
    remark = held_remark(kernel, float(rate), num_held, len(moved)) if some else ""
    return Tuned(target, tuned, lanes.states, np.mean(acceptance_rate), timing, remark, order)


def held_remark(kernel: Kernel, rate: float, num_held: int, num_lanes: int) -> str:
    """Return the remark on lanes that did not move, with what helps for this kernel.

    Args:
        kernel: The kernel before tuning.
        rate: Acceptance rate that it was tuned to.
        num_held: Number of lanes that did not move.
        num_lanes: Number of all lanes.
    """
    remedy = "Raise"
    if kernel.tunables.get("step_size") is not None:
        remedy = "Leave step_size out, so that it is tuned, raise"
    elif kernel.uses_gradient:
        remedy = (
            "Use a smaller step size by aiming at a higher acceptance rate, as in "
            f"warmup=EnsembleAdaptation(target_acceptance_rate={higher_rate(rate):.2g}), raise"
        )
    return (
        f"{num_held} of the {num_lanes} lanes of warm-up did not move in its last third: the step size is too large "
        f"for some region of the posterior, and chains that enter it get stuck. {remedy} num_warmup, or reparametrise."
    )


def check_tuned(kernel: Kernel, states: PyTree, acceptance_rate: Any, moved: Any) -> None:
    """Raise an error if the lanes cannot be sampled from.

    Args:
        kernel: The tuned kernel.
        states: Unknowns of the lanes.
        acceptance_rate: Mean acceptance rate.
        moved: Share of moves that were accepted.

    Raises:
        WarmupError: No step size can be found, states are not finite, or nothing moved.
    """
    step_size = np.asarray(kernel.tunables.get("step_size", ()))
    if np.isnan(step_size).any() and np.isnan(acceptance_rate):
        raise WarmupError(
            "the step size could not be tuned, because the kernel reports no acceptance rate: pass step_size= to it."
        )
    if not all(np.all(np.isfinite(x)) for x in jax.tree.leaves(states) if is_real(x)):
        raise WarmupError("warm-up reached states that are not finite: check the density for NaN and its constraints.")
    if float(moved) == 0.0:
        given = f" (step size {np.max(step_size):.3g})" if step_size.size else ""
        raise WarmupError(
            f"no move was accepted in the last third of warm-up{given}. Leave step_size=None so that it is tuned, take "
            "a smaller one, or start elsewhere (init_params, or initial_position of pmcmc.sample)."
        )


class Exploration(NamedTuple):
    """Pooled moments of an exploration, in the user's coordinates.

    Attributes:
        mean: Mean of the draws; shape (D,).
        scale: Standard deviations (D,), or Cholesky factor of the covariance (D, D).
        last: Positions of the lanes; shape (lanes, D).
        movement: Largest spread within one path; shape (D,).
        acceptance_rate: Mean acceptance rate.
        verdict: Whether more steps would hardly change the moments; all true if this was not checked.
        num_lost: Number of lanes moved to another lane's position, as in `Tuned`.
        widest: Standard deviation along the widest direction, in units of ``scale``, see `pmcmc.warmup.trajectories`.
    """

    mean: Any
    scale: Any
    last: Any
    movement: Any
    acceptance_rate: Any
    verdict: Verdict = Verdict(True, True)
    num_lost: int = 0
    widest: float = 1.0


def check_exploration(target: Target, found: Exploration) -> None:
    """Raise an error if the posterior cannot be explored.

    Raises:
        WarmupError: Positions are not finite (the posterior may be improper), or some coordinate never moved.
    """
    if not all(np.all(np.isfinite(x)) for x in (found.last, found.mean, found.movement)):
        raise WarmupError(
            "warm-up reached positions that are not finite, or whose spread is not. The posterior may be improper: "
            "give every parameter a proper prior."
        )
    stuck = np.asarray(found.movement) == 0
    if stuck.any():
        names = _leaf_names(target, stuck)
        raise WarmupError(
            f"warm-up never moved {names} (mean acceptance rate {float(found.acceptance_rate):.2f}). Start "
            "elsewhere (init_params, or initial_position of pmcmc.sample), raise num_warmup, or check the density for "
            "jumps and for constraints that the declared support leaves out."
        )


def _leaf_names(target: Target, flags: np.ndarray) -> str:
    """Return the names of the leaves of a position that contain a flagged coordinate."""
    tree = target.spec.unravel(jnp.asarray(flags, target.spec.dtype))
    names = [jax.tree_util.keystr(p) for p, x in jax.tree_util.tree_leaves_with_path(tree) if bool(jnp.any(x > 0))]
    return ", ".join(f"position{name}" for name in names)


def is_dense(target: Target, dense: bool | None) -> bool:
    """Return whether the basis is a full matrix: ``dense`` if it is given, else up to 50 dimensions."""
    return target.dim <= 50 if dense is None else dense


def tuned_shapes(target: Target, kernel: Kernel, lanes: int, dense: bool, metric: ArrayLeaf | None = None) -> Tuned:
    """Return a `Tuned` whose arrays have the shapes that `tune` will return; their values mean nothing.

    Args:
        target: Target to sample.
        kernel: Kernel to tune.
        lanes: Number of lanes.
        dense: Whether the basis is a full matrix.
        metric: Inverse mass matrix given to the warm-up, see `check_metric`.
    """
    check_metric(target, kernel, metric)
    dtype, dim = target.spec.dtype, target.dim
    scale = np.eye(dim, dtype=dtype) if dense else np.ones(dim, dtype)
    kernel, basis = take_metric(target, kernel, np.zeros(dim, dtype), scale, metric)
    whitened, positions, rate = target.with_basis(basis), np.zeros((lanes, dim), dtype), 1.0
    states, averaged = _start_lanes.eval_shape(whitened, kernel.tuned_by(), positions, rate, brief=True)
    tuned = _tuned_kernel.eval_shape(whitened, kernel, averaged, rate, brief=True)
    return Tuned(whitened, tuned, states, jax.device_put(np.zeros((), dtype)))
