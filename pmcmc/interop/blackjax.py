"""Use BlackJAX: its sampling algorithms as kernels, its adaptations, Pathfinder and dual averaging.

`pmcmc.kernels.blackjax` builds kernels from `init_state`, `take_step` and `read_info`; `pmcmc.warmup.blackjax` builds
warm-ups from `window_adaptation`, `chees_adaptation` and `pathfinder`. BlackJAX is imported only when a function of
this module needs it.
"""

import inspect
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from pmcmc._pytree import Array, PRNGKey, PyTree, Scalar

KEY_FIELD = "random_generator_arg"
# Algorithms that take a likelihood and multiply it by a Gaussian prior which they define themselves.
LIKELIHOOD_STATES = ("EllipSliceState", "MarginalState")
LIKELIHOOD_ALGORITHMS = ("elliptical_slice", "mgrad_gaussian")
# Folding in a small number would repeat the first keys of a `jax.random.split` of the step's key; none reaches this
# one.
_KEY_TAG = 0x72616E64


def is_built(algorithm: Any) -> bool:
    """Whether this is a ``SamplingAlgorithm`` (init and step), not a constructor of one."""
    return hasattr(algorithm, "init") and hasattr(algorithm, "step") and not hasattr(algorithm, "sample")


def is_of_blackjax(value: Any) -> bool:
    """Whether ``value`` cannot read the user's data: it is a plain setting, or a BlackJAX function without closure."""
    if not callable(value):
        return not is_built(value)
    module = getattr(value, "__module__", None) or type(value).__module__
    return module.split(".")[0] == "blackjax" and not getattr(value, "__closure__", None)


def takes_likelihood(constructor: Any) -> bool:
    """Whether BlackJAX's constructor expects a log likelihood where others expect a log density."""
    import blackjax

    return any(constructor is getattr(blackjax, name, None) for name in LIKELIHOOD_ALGORITHMS)


def as_function(constructor: Any) -> Callable:
    """Return a hashable callable: BlackJAX's constructors have no hash, but their bound ``__call__`` has one."""
    try:
        hash(constructor)
    except TypeError:
        return constructor.__call__
    return constructor


def init_state(algorithm: Any, position: PyTree, rng_key: PRNGKey) -> Any:
    """Call ``algorithm.init``, with a key if it takes one, and remove keys from the state.

    Raises:
        TypeError: The state is not a NamedTuple with a field ``position``.
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
    """Call ``algorithm.step``; where `init_state` removed a key from the state, derive one from the key of the step."""
    if getattr(state, KEY_FIELD, 0) is None:
        state = state._replace(**{KEY_FIELD: jax.random.fold_in(rng_key, _KEY_TAG)})
    state, info = algorithm.step(rng_key, state)
    return _without_key(state), info


def _without_key(state: Any) -> Any:
    """Remove a key from the state. Counters, which some sequences of trajectory lengths use, stay in it."""
    leaf = getattr(state, KEY_FIELD, None)
    if leaf is not None and jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):
        return state._replace(**{KEY_FIELD: None})
    return state


def without_caches(state: Any, caches: tuple[str, ...] | None) -> Any:
    """Return the state with None in place of its caches.

    Args:
        state: State of a BlackJAX algorithm.
        caches: Names of the fields that are caches; None takes those named ``logdensity*`` or ``*grad*``.

    Raises:
        ValueError: A name is no field of the state, or is ``position``.
    """
    if caches is None:
        caches = tuple(name for name in state._fields if name.startswith("logdensity") or "grad" in name)
    unknown = [name for name in caches if name not in state._fields or name == "position"]
    if unknown:
        raise ValueError(f"caches={caches} must name fields of {list(state._fields)} other than 'position'.")
    return state._replace(**dict.fromkeys(caches))


def with_caches(dynamic: Any, fresh: Any) -> Any:
    """Fill in the caches that `without_caches` removed, from a state that ``init`` made at the same position."""
    return fresh._replace(**{name: x for name, x in dynamic._asdict().items() if x is not None})


class StepInfo(NamedTuple):
    """Information about one BlackJAX step under common names; a field is None where the algorithm does not report it.

    Attributes:
        acceptance_rate: Acceptance probability of the step.
        is_divergent: Whether the step diverged.
        logdensity: Log density at the new state.
        energy: Hamiltonian energy.
        num_integration_steps: Leapfrog steps taken.
        tree_depth: Doublings of the NUTS trajectory.
    """

    acceptance_rate: Array | None
    is_divergent: Array | None
    logdensity: Array | None
    energy: Array | None
    num_integration_steps: Array | None
    tree_depth: Array | None


def read_info(state: Any, info: Any) -> StepInfo:
    """Read the fields that the algorithms' infos share.

    An acceptance rate of NaN, from a NaN proposal, counts as 0 and as divergent. Where BlackJAX does not report
    divergences, a proposal with log density NaN or +inf counts as divergent. The log density is None for algorithms
    whose state holds a log likelihood.
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
    """Result of `window_adaptation`.

    Attributes:
        positions: Path of the adaptation; shape (num_steps, D).
        step_size: The step size found.
        acceptance_rate: Acceptance rate of each step; shape (num_steps,).
    """

    positions: Array
    step_size: Array
    acceptance_rate: Array


def window_adaptation(
    logdensity_fn: Callable, rng_key: PRNGKey, position: Array, num_steps: int, *, is_mass_matrix_diagonal: bool
) -> AdaptedPath:
    """Run Stan's window adaptation with NUTS along one chain.

    Source: Hoffman & Gelman (2014) for NUTS; Stan for the windows.
    """
    import blackjax

    adaptation = blackjax.window_adaptation(
        blackjax.nuts,
        logdensity_fn,
        is_mass_matrix_diagonal=is_mass_matrix_diagonal,
        # Keep only the path and the rates: anything else would be (num_steps, ...) of unused memory.
        adaptation_info_fn=lambda state, info, adaptation_state: (state.position, info.acceptance_rate),
    )
    result, info = adaptation.run(rng_key, position, num_steps)
    positions, acceptance_rate = info
    return AdaptedPath(positions, result.parameters["step_size"], acceptance_rate)


class AdaptedTrajectory(NamedTuple):
    """Result of `chees_adaptation`.

    Attributes:
        positions: Positions at which the ensemble ended; shape (lanes, D).
        step_size: The step size found.
        num_integration_steps: Mean number of leapfrog steps of the longest trajectory; a real number.
    """

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
    """Run ChEES on an ensemble: find step size and trajectory length of jittered HMC.

    Source: Hoffman, Radul & Sountsov (2021).
    """
    import blackjax
    import optax

    adaptation = blackjax.chees_adaptation(
        logdensity_fn, positions.shape[0], adaptation_info_fn=lambda state, info, adaptation_state: None
    )
    with jax.numpy_rank_promotion("allow"):  # BlackJAX subtracts means (D,) from positions (lanes, D)
        (states, found), _ = adaptation.run(rng_key, positions, step_size, optax.adam(learning_rate), num_steps)
    return AdaptedTrajectory(states.position, found["step_size"], found["integration_steps_params"][0])


def pathfinder(logdensity_fn: Callable, rng_key: PRNGKey, position: Array) -> tuple[Array, Array]:
    """Run Pathfinder from ``position``; return one draw (D,) of its approximation along L-BFGS, and the ELBO.

    Source: Zhang et al. (2022).
    """
    from blackjax.vi.pathfinder import approximate, sample

    fit_key, draw_key = jax.random.split(rng_key)
    with jax.numpy_rank_promotion("allow"):
        state, _ = approximate(fit_key, logdensity_fn, position)
        draws, _ = sample(draw_key, state, 1)
    return draws[0], state.elbo


class DualAveraging(NamedTuple):
    """BlackJAX's dual averaging of a step size towards an acceptance rate.

    Attributes:
        init: Initial step size to state.
        update: State and acceptance rate to state.
        step_size: State to the current step size.
        final: State to the averaged step size.

    Source: Nesterov (2009).
    """

    init: Callable[[Any], tuple]
    update: Callable[[tuple, Any], tuple]
    step_size: Callable[[tuple], Array]
    final: Callable[[tuple], Array]


def dual_averaging(target_acceptance_rate: Scalar) -> DualAveraging:
    """Return the functions of dual averaging towards ``target_acceptance_rate``; their state is passed explicitly.

    The state is a plain tuple: a program that is loaded from disk then needs no import of BlackJAX, which takes
    a quarter of a second.
    """
    from blackjax.adaptation.step_size import DualAveragingAdaptationState as State
    from blackjax.adaptation.step_size import dual_averaging_adaptation

    init, update, final = dual_averaging_adaptation(target_acceptance_rate)
    return DualAveraging(
        init=lambda step_size: tuple(init(step_size)),
        update=lambda state, rate: tuple(update(State(*state), rate)),
        step_size=lambda state: jax.numpy.exp(State(*state).log_step_size),
        final=lambda state: final(State(*state)),
    )
