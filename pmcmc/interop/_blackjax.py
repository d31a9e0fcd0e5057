"""BlackJAX's adaptation schemes. BlackJAX is imported when a function here runs, not before."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax

from pmcmc._types import Array, PRNGKey, Scalar


class AdaptedPath(NamedTuple):
    """positions: (num_steps, D) path of the adaptation. step_size: the one found. acceptance_rate: (num_steps,)."""

    positions: Array
    step_size: Array
    acceptance_rate: Array


def window_adaptation(
    logdensity_fn: Callable, rng_key: PRNGKey, position: Array, num_steps: int, *, is_mass_matrix_diagonal: bool
) -> AdaptedPath:
    """Stan's window adaptation with NUTS (Hoffman & Gelman 2014) along one chain."""
    import blackjax

    adaptation = blackjax.window_adaptation(
        blackjax.nuts,
        logdensity_fn,
        is_mass_matrix_diagonal=is_mass_matrix_diagonal,
        # only the path is kept: everything else would be (num_steps, ...) of dead weight
        adaptation_info_fn=lambda state, info, adaptation_state: (state.position, info.acceptance_rate),
    )
    result, info = adaptation.run(rng_key, position, num_steps)
    positions, acceptance_rate = info
    return AdaptedPath(positions, result.parameters["step_size"], acceptance_rate)


class AdaptedTrajectory(NamedTuple):
    """positions: (lanes, D) where the ensemble ended. step_size; num_integration_steps: mean of the longest, real."""

    positions: Array
    step_size: Array
    num_integration_steps: Array


def chees_adaptation(
    logdensity_fn: Callable,
    rng_key: PRNGKey,
    positions: Array,
    num_steps: int,
    *,
    step_size: float,
    learning_rate: float,
) -> AdaptedTrajectory:
    """ChEES (Hoffman, Radul & Sountsov 2021): step size and trajectory length of jittered HMC on an ensemble."""
    import blackjax
    import optax

    adaptation = blackjax.chees_adaptation(
        logdensity_fn, positions.shape[0], adaptation_info_fn=lambda state, info, adaptation_state: None
    )
    with jax.numpy_rank_promotion("allow"):  # it subtracts means (D,) from positions (lanes, D)
        (states, found), _ = adaptation.run(rng_key, positions, step_size, optax.adam(learning_rate), num_steps)
    return AdaptedTrajectory(states.position, found["step_size"], found["integration_steps_params"][0])


def pathfinder(logdensity_fn: Callable, rng_key: PRNGKey, position: Array) -> tuple[Array, Array]:
    """One draw (D,) of Pathfinder's approximation (Zhang et al. 2022) along L-BFGS from ``position``, and its ELBO."""
    from blackjax.vi.pathfinder import approximate, sample

    fit_key, draw_key = jax.random.split(rng_key)
    with jax.numpy_rank_promotion("allow"):
        state, _ = approximate(fit_key, logdensity_fn, position)
        draws, _ = sample(draw_key, state, 1)
    return draws[0], state.elbo


class DualAveraging(NamedTuple):
    """BlackJAX's dual averaging of a step size (Nesterov 2009) towards an acceptance rate."""

    init: Callable[[Any], Any]
    update: Callable[[Any, Any], Any]
    step_size: Callable[[Any], Array]
    final: Callable[[Any], Array]


def dual_averaging(target_acceptance_rate: Scalar) -> DualAveraging:
    """Dual averaging towards ``target_acceptance_rate``: its functions, with the state threaded through."""
    from blackjax.adaptation.step_size import dual_averaging_adaptation

    init, update, final = dual_averaging_adaptation(target_acceptance_rate)
    return DualAveraging(init, update, lambda state: jax.numpy.exp(state.log_step_size), final)
