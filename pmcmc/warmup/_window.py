"""Warm-up in two parts: BlackJAX's window adaptation for the metric, dual averaging for the kernel at hand."""

from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from pmcmc._jit import tuned_jit
from pmcmc._tree import is_real, register_dataclass
from pmcmc._types import Array, PRNGKey, PyTree, Scalar
from pmcmc.interop._blackjax import dual_averaging, window_adaptation
from pmcmc.kernels import HMC, Kernel
from pmcmc.target import Basis, Target
from pmcmc.warmup._base import LaneTiming, Tuned, Warmup, WarmupError

# Lanes on which the kernel's own step size is adapted and whose last states seed chains and blocks.
NUM_LANES = 32


@register_dataclass
@dataclass(frozen=True)
class WindowAdaptation(Warmup):
    """Stan's windows with NUTS for location and metric, then dual averaging of the kernel's own step size.

    1. From each of ``num_starts`` starts BlackJAX's window adaptation runs NUTS for ``num_steps`` steps. The second
       halves of these paths, pooled, give the mean and covariance that become the target's basis.
    2. In that basis 32 lanes of the kernel run for a quarter as many steps (at least 102). Over the first two thirds
       dual averaging brings their mean acceptance rate to the kernel's target; the rest decorrelates the lanes.

    dense: full covariance (True) or its diagonal (False). None: full up to 50 dimensions.
    target_acceptance_rate: None: the kernel's own, such as 0.574 for MALA and 0.8 for HMC.
    num_starts: size of the first ensemble.

    Sources: Hoffman & Gelman 2014 (dual averaging); Stan Development Team (windows).
    """

    dense: bool | None = field(default=None, metadata=dict(static=True))
    target_acceptance_rate: Scalar | None = None
    num_starts: int = field(default=4, metadata=dict(static=True))

    def __post_init__(self):
        if not 1 <= self.num_starts <= NUM_LANES:
            raise ValueError(f"num_starts must lie in 1..{NUM_LANES}, got {self.num_starts}.")

    def is_dense(self, target: Target) -> bool:
        """Whether the basis is a full matrix."""
        return target.dim <= 50 if self.dense is None else self.dense

    def tuned_shapes(self, target: Target, kernel: Kernel) -> Tuned:
        dtype, dim = target.spec.dtype, target.dim
        scale = jnp.ones((dim, dim) if self.is_dense(target) else dim, dtype)

        def shapes(scale: Array) -> Tuned:
            tuned, basis = _take_metric(kernel, jnp.zeros(dim, dtype), scale)
            whitened = target.with_basis(basis)
            tuned = _with_length(_take_step(tuned, target, 1.0))
            states = jax.vmap(lambda y: tuned.unknown(tuned.start(whitened, y)))(jnp.zeros((NUM_LANES, dim), dtype))
            return Tuned(whitened, tuned, states, scale[0])

        return jax.eval_shape(shapes, scale)

    def run(self, target: Target, kernel: Kernel, rng_key: PRNGKey, starts: PyTree, num_steps: int) -> Tuned:
        if num_steps < 20:
            raise ValueError(f"num_warmup must be 0 or at least 20 (windows need room), got {num_steps}.")
        _check_metric(target, kernel)
        metric_key, step_key = jax.random.split(rng_key)
        positions = jax.vmap(target.coordinates)(starts)
        ensemble = _explore(target, metric_key, positions, num_steps=num_steps, dense=self.is_dense(target))
        _check_exploration(target, ensemble)
        kernel, basis = _take_metric(kernel, ensemble.mean, ensemble.scale)
        whitened = target.with_basis(basis)
        rate = self.target_acceptance_rate
        if rate is None:
            rate = kernel.target_acceptance_rate(target.dim)
        lanes = jax.vmap(basis.to_coordinates)(ensemble.last)
        tuned = _adapt_step(whitened, kernel, step_key, lanes, rate, max(102, num_steps // 4))
        _check_tuned(tuned)
        timing = LaneTiming(len(lanes), tuned.seconds_per_step)
        return Tuned(whitened, tuned.kernel, tuned.states, tuned.acceptance_rate, timing)


class Ensemble(NamedTuple):
    """Pooled moments of the first part, in the target's coordinates."""

    mean: Array
    scale: Array  # (D,) standard deviations or (D, D) Cholesky factor
    last: Array  # (lanes, D)
    acceptance_rate: Array  # (starts,)
    movement: Array  # (D,) largest within-path spread over the paths


@tuned_jit(static_argnames=("num_steps", "dense"))
def _explore(target: Target, rng_key: PRNGKey, positions: Array, *, num_steps: int, dense: bool) -> Ensemble:
    def one(key, position):
        path = window_adaptation(target.logdensity_fn, key, position, num_steps, is_mass_matrix_diagonal=not dense)
        return path.positions, jnp.mean(path.acceptance_rate)

    num_starts = positions.shape[0]
    paths, acceptance_rate = jax.vmap(one)(jax.random.split(rng_key, num_starts), positions)
    late = paths[:, num_steps // 2 :]
    draws = late.reshape(-1, late.shape[-1])
    mean = jnp.mean(draws, axis=0)
    centred = draws - mean[None]
    variance = jnp.mean(centred**2, axis=0)
    scale = jnp.sqrt(variance)
    if dense:
        # Shrinkage towards the diagonal keeps the factor finite when there are few draws for the dimension.
        weight = target.dim / (target.dim + draws.shape[0])
        standardised = centred / scale[None]
        correlation = standardised.T @ standardised / draws.shape[0]
        correlation = (1 - weight) * correlation + weight * jnp.eye(target.dim, dtype=draws.dtype)
        scale = scale[:, None] * jnp.linalg.cholesky(correlation)
    per_start = NUM_LANES // num_starts
    spaced = jnp.linspace(num_steps // 2, num_steps - 1, per_start).astype(int)
    last = paths[:, spaced].reshape(num_starts * per_start, -1)
    return Ensemble(mean, scale, last, acceptance_rate, jnp.max(jnp.std(late, axis=1), axis=0))


def _check_metric(target: Target, kernel: Kernel) -> None:
    """The user's metric must fit the target and be positive definite: said before an hour of warm-up, not after."""
    metric = getattr(kernel, "inverse_mass_matrix", None)
    if metric is None:
        return
    metric = jnp.asarray(metric)
    if metric.shape not in ((), (target.dim,), (target.dim, target.dim)):
        raise ValueError(
            f"inverse_mass_matrix has shape {metric.shape}: expected ({target.dim},) or ({target.dim}, {target.dim}), "
            "the number of unconstrained parameters."
        )
    root = jnp.linalg.cholesky(metric) if metric.ndim == 2 else jnp.sqrt(metric)
    if not bool(jnp.all(jnp.isfinite(root))) or not bool(
        jnp.all(jnp.diagonal(root) > 0 if root.ndim == 2 else root > 0)
    ):
        raise ValueError("inverse_mass_matrix is not positive definite: it stands for the posterior's covariance.")


def _check_exploration(target: Target, ensemble: Ensemble) -> None:
    if not all(bool(jnp.all(jnp.isfinite(x))) for x in (ensemble.last, ensemble.mean, ensemble.movement)):
        raise WarmupError(
            "warm-up reached positions, or a spread of them, that are not finite. The posterior may be improper: give "
            "every parameter a proper prior."
        )
    stuck = ensemble.movement == 0
    if bool(jnp.any(stuck)):
        names = _leaf_names(target, stuck)
        rate = float(jnp.mean(ensemble.acceptance_rate))
        raise WarmupError(
            f"warm-up never moved {names} (mean acceptance rate {rate:.2f}). Start it elsewhere with init_params, "
            "lengthen num_warmup, or check the density for steps and constraints that its support does not state."
        )


def _leaf_names(target: Target, flags: Array) -> str:
    tree = target.spec.unravel(flags.astype(target.spec.dtype))
    names = [jax.tree_util.keystr(p) for p, x in jax.tree_util.tree_leaves_with_path(tree) if bool(jnp.any(x > 0))]
    return ", ".join(f"position{name}" for name in names)


def _take_metric(kernel: Kernel, mean: Array, scale: Array) -> tuple[Kernel, Basis]:
    """The ensemble's basis, or the user's metric made a basis: one place where a metric acts."""
    if isinstance(kernel, HMC) and kernel.inverse_mass_matrix is not None:
        metric = jnp.asarray(kernel.inverse_mass_matrix, mean.dtype)
        scale = jnp.linalg.cholesky(metric) if metric.ndim == 2 else jnp.broadcast_to(jnp.sqrt(metric), mean.shape)
        return replace(kernel, inverse_mass_matrix=None), Basis(mean, scale)
    return kernel, Basis(mean, scale)


class Stepped(NamedTuple):
    kernel: Kernel
    states: PyTree
    acceptance_rate: Array
    moved: Array
    seconds_per_step: float


class Third(NamedTuple):
    """A third of the steps on all lanes. averaged: state of the dual averaging."""

    states: PyTree
    averaged: PyTree
    acceptance_rate: Array
    moved: Array


def _adapt_step(
    target: Target, kernel: Any, rng_key: PRNGKey, positions: Array, rate: Scalar, num_steps: int
) -> Stepped:
    """Two thirds of the steps adapt the step size, the last third is timed: three runs of one program."""
    averaging = dual_averaging(rate)
    as_leaf = lambda x: jnp.asarray(x, target.spec.dtype if is_real(x) else None)
    averaged = jax.tree.map(as_leaf, averaging.init(kernel.first_step_size(target.dim)))
    noise = _lane_noise(target, kernel, rng_key, num_lanes=len(positions), num_steps=num_steps)
    states = _start_lanes(target, _with_step(kernel, target, averaged, averaging, jnp.array(True)), positions)
    third, length, seconds = Third(states, averaged, jnp.array(0.0), jnp.array(0.0)), num_steps // 3, 0.0
    for number in range(3):
        part = jax.tree.map(lambda x, n=number: x[n * length : (n + 1) * length], noise)
        adapting = jnp.array(number < 2)
        third, (_, seconds) = _run_third.timed(target, kernel, part, third.states, third.averaged, rate, adapting)
    tuned = _with_length(_with_step(kernel, target, third.averaged, averaging, jnp.array(False)))
    return Stepped(tuned, third.states, third.acceptance_rate, third.moved, seconds / length)


def _with_step(kernel: Any, target: Target, averaged: PyTree, averaging: Any, adapting: Array) -> Any:
    """The kernel with the step size of the moment."""
    return _take_step(kernel, target, jnp.where(adapting, averaging.step_size(averaged), averaging.final(averaged)))


def _take_step(kernel: Any, target: Target, step_size: Scalar) -> Any:
    """The kernel with this step size, or with its own where that is given or where it has none."""
    if not hasattr(kernel, "step_size"):
        return kernel
    step_size = step_size if kernel.step_size is None else kernel.step_size
    return kernel.with_step_size(jnp.asarray(step_size, target.spec.dtype))


def _with_length(kernel: Any) -> Any:
    """The kernel with a number of integration steps that fits its step size, where it has one and was given none."""
    if isinstance(kernel, HMC) and kernel.num_integration_steps is None:
        return replace(kernel, num_integration_steps=kernel.default_length())
    return kernel


@tuned_jit()
def _start_lanes(target: Target, kernel: Any, positions: Array) -> PyTree:
    return jax.vmap(lambda y: kernel.unknown(kernel.start(target, y)))(positions)


@tuned_jit(static_argnames=("num_lanes", "num_steps"))
def _lane_noise(target: Target, kernel: Kernel, rng_key: PRNGKey, *, num_lanes: int, num_steps: int) -> PyTree:
    """Leading axes (num_steps, num_lanes)."""
    keys = jax.vmap(lambda key: jax.random.split(key, num_steps))(jax.random.split(rng_key, num_lanes))
    return jax.vmap(jax.vmap(lambda key: kernel.sample_noise(key, target)), in_axes=1)(keys)


@tuned_jit()
def _run_third(
    target: Target, kernel: Any, noise: PyTree, states: PyTree, averaged: PyTree, rate: Scalar, adapting: Array
) -> Third:
    averaging = dual_averaging(rate)
    coordinates = jax.vmap(lambda state: kernel.coordinates(kernel.unknown(state)))

    def body(carry, noise):
        state, averaged = carry
        now, before = _with_step(kernel, target, averaged, averaging, adapting), coordinates(state)
        state, info = jax.vmap(lambda s, n: now.step(target, s, n))(state, noise)
        moved = jnp.mean(jnp.any(coordinates(state) != before, axis=1))
        acceptance = jnp.mean(info.acceptance_rate)
        updated = averaging.update(averaged, acceptance)
        averaged = jax.tree.map(lambda new, old: jnp.where(adapting, new, old), updated, averaged)
        return (state, averaged), (acceptance, moved)

    ready = _with_step(kernel, target, averaged, averaging, adapting)
    state = jax.vmap(lambda unknown: ready.restore(target, unknown))(states)
    (state, averaged), (acceptance, moved) = jax.lax.scan(body, (state, averaged), noise)
    return Third(jax.vmap(kernel.unknown)(state), averaged, jnp.mean(acceptance), jnp.mean(moved))


def _check_tuned(tuned: Stepped) -> None:
    step_size = np.asarray(getattr(tuned.kernel, "step_size", ()))
    if np.isnan(step_size).any() and np.isnan(tuned.acceptance_rate):
        raise WarmupError(
            "the step size could not be tuned, because the kernel reports no acceptance rate: pass step_size= to it."
        )
    if not all(bool(jnp.all(jnp.isfinite(x))) for x in jax.tree.leaves(tuned.states)):
        raise WarmupError("warm-up reached states that are not finite: check the density for NaN and its constraints.")
    if float(tuned.moved) == 0.0:
        given = f" (step size {np.max(step_size):.3g})" if step_size.size else ""
        raise WarmupError(
            f"no move was accepted in the last third of warm-up{given}. Leave step_size=None so that "
            "it is tuned, take a smaller one, or start elsewhere with init_params."
        )
