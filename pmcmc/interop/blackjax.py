"""BlackJAX: its algorithms as they are built, and its adaptation."""

import inspect
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from pmcmc._typing import Array, PRNGKey, PyTree, Scalar

KEY_FIELD = "random_generator_arg"


# Algorithms that are given a likelihood, and multiply it by a Gaussian prior of their own.
LIKELIHOOD_STATES = ("EllipSliceState", "MarginalState")


LIKELIHOOD_ALGORITHMS = ("elliptical_slice", "mgrad_gaussian")


# A number that no `jax.random.split` of the step's key reaches: folding in a small one would repeat its first keys.
_KEY_TAG = 0x72616E64


def is_built(algorithm: Any) -> bool:
    """Whether this is a ``SamplingAlgorithm`` (init and step), not a constructor of one."""
    return hasattr(algorithm, "init") and hasattr(algorithm, "step") and not hasattr(algorithm, "sample")


def is_of_blackjax(value: Any) -> bool:
    """Whether a constructor or a setting is a number or a function of BlackJAX's, which reads nothing of the user's."""
    if not callable(value):
        return not is_built(value)
    module = getattr(value, "__module__", None) or type(value).__module__
    return module.split(".")[0] == "blackjax" and not getattr(value, "__closure__", None)


def takes_likelihood(constructor: Any) -> bool:
    """Whether BlackJAX's constructor expects a log likelihood where others expect a log density."""
    import blackjax

    return any(constructor is getattr(blackjax, name, None) for name in LIKELIHOOD_ALGORITHMS)


def as_function(constructor: Any) -> Callable:
    """A hashable callable: BlackJAX's constructors are objects without a hash, their bound ``__call__`` has one."""
    try:
        hash(constructor)
    except TypeError:
        return constructor.__call__
    return constructor


def init_state(algorithm: Any, position: PyTree, rng_key: PRNGKey) -> Any:
    """``algorithm.init``, with a key where it takes one; keys within the state are removed.

    Raises:
        TypeError: the state is no NamedTuple with a field ``position``.
    """
    takes_key = len(inspect.signature(algorithm.init).parameters) > 1
    state = algorithm.init(position, rng_key) if takes_key else algorithm.init(position)
    if "position" not in getattr(state, "_fields", ()):
        raise TypeError(
            f"the algorithm's state must be a NamedTuple with a field 'position', got {type(state).__name__} with "
            f"fields {list(getattr(state, '_fields', ()))}: algorithms that move several positions cannot be used."
        )
    return _without_key(state)


def take_step(algorithm: Any, rng_key: PRNGKey, state: Any) -> tuple[Any, Any]:
    """``algorithm.step``, for states whose key was removed: it is drawn from the step's own key instead."""
    if getattr(state, KEY_FIELD, 0) is None:
        state = state._replace(**{KEY_FIELD: jax.random.fold_in(rng_key, _KEY_TAG)})
    state, info = algorithm.step(rng_key, state)
    return _without_key(state), info


def _without_key(state: Any) -> Any:
    """Keys out of the state; counters, which some sequences of trajectory lengths use, stay in it."""
    leaf = getattr(state, KEY_FIELD, None)
    if leaf is not None and jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):
        return state._replace(**{KEY_FIELD: None})
    return state


def without_caches(state: Any, caches: tuple[str, ...] | None) -> Any:
    """The state with None in place of its caches: those named, or by default ``logdensity*`` and ``*grad*``."""
    if caches is None:
        caches = tuple(name for name in state._fields if name.startswith("logdensity") or "grad" in name)
    unknown = [name for name in caches if name not in state._fields or name == "position"]
    if unknown:
        raise ValueError(f"caches={caches} must name fields of {list(state._fields)} beside 'position'.")
    return state._replace(**dict.fromkeys(caches))


def with_caches(dynamic: Any, fresh: Any) -> Any:
    """Inverse of `without_caches`, given a state that ``init`` made at the same position."""
    return fresh._replace(**{name: x for name, x in dynamic._asdict().items() if x is not None})


class StepInfo(NamedTuple):
    """What BlackJAX says of a step; None where it says nothing."""

    acceptance_rate: Array | None
    is_divergent: Array | None
    logdensity: Array | None
    energy: Array | None
    num_integration_steps: Array | None
    tree_depth: Array | None


def read_info(state: Any, info: Any) -> StepInfo:
    """The fields that infos of the algorithms share, under one name each.

    acceptance_rate, is_divergent: a rate of NaN is that of a NaN proposal: 0, and divergent. Where BlackJAX does not
        say what diverged, a proposal with log density NaN or +inf did.
    logdensity: None where the state's is that of a likelihood.
    """
    get = lambda name: getattr(info, name, None)
    divergent = get("is_divergent")
    if divergent is None and get("nonans") is not None:
        divergent = ~get("nonans")
    proposed = getattr(get("proposal"), "logdensity", None)
    if divergent is None and proposed is not None:
        divergent = jnp.isnan(proposed) | (proposed == jnp.inf)
    rate = get("acceptance_rate")
    if rate is not None:
        divergent = jnp.isnan(rate) if divergent is None else divergent | jnp.isnan(rate)
        rate = jnp.where(jnp.isnan(rate), 0.0, rate)
    return StepInfo(
        acceptance_rate=rate,
        is_divergent=divergent,
        logdensity=None if type(state).__name__ in LIKELIHOOD_STATES else getattr(state, "logdensity", None),
        energy=get("energy"),
        num_integration_steps=get("num_integration_steps"),
        tree_depth=get("num_trajectory_expansions"),
    )


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
