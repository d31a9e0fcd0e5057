"""Positions where the chains of a NumPyro model start.

`numpyro_starts` draws continuous sites as NumPyro's ``init_to_uniform`` does, and discrete ones uniformly or from their
prior (`discrete_prior`). `strategy_starts` uses NumPyro's other strategies.
"""

import math
import warnings
from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np

from pmcmc._pytree import Array, PRNGKey, PyTree
from pmcmc._warnings import user_level
from pmcmc._xla.compile import tuned_jit
from pmcmc.interop.numpyro_runs import alone, watched
from pmcmc.random.distributions import at_least_single
from pmcmc.random.streams import fold_key, key_pair, split_key, threefry_2x32
from pmcmc.starts import evaluate_starts, explain_start
from pmcmc.target import Supports, Target

# Draws positions with new values of discrete sites, from a key and positions; leading axis N.
Prior = Callable[[PRNGKey, PyTree], PyTree]

_MAX_TRIES = 100
# Number of tries with uniform discrete sites, after which every other one takes them from the prior.
_UNIFORM_TRIES = 10
# Folded into the key of the starts, for draws from the prior: "prio" in ASCII.
_PRIOR = 0x7072696F


def numpyro_starts(
    target: Target, rng_key: PRNGKey, num_starts: int, uses_gradient: bool = True, prior: Prior | None = None
) -> PyTree:
    """Draw valid unconstrained starts, leading axis ``num_starts``.

    Continuous sites are uniform on (-2, 2) as in NumPyro (`init_to_uniform`), and discrete ones uniform on their
    values. Starts are drawn again up to 100 times where the density or, where it is used, its gradient is not finite.
    From the tenth time on, every other one takes discrete sites from ``prior``: uniform ones may be impossible, as in a
    Markov chain with transitions of probability zero. If no usable start is found for some, they start where others do.
    NumPyro's own function compiles at every call, which took two thirds of a short run.

    Args:
        target: Target of a NumPyro model.
        rng_key: Key of the starts.
        num_starts: Number of starts.
        uses_gradient: Whether the gradient is needed.
        prior: Draws discrete sites, see `discrete_prior`; None if there are none.

    Raises:
        ValueError: No usable start was found at all; the message says what is not finite at the last one.

    Warns:
        UserWarning: Some start where others do.
    """
    starts, usable = None, np.zeros(num_starts, bool)
    for tries in range(_MAX_TRIES):
        drawn = _draw_starts(target, rng_key, np.uint32(tries), num_starts=num_starts, brief=True)
        if prior is not None and tries >= _UNIFORM_TRIES and tries % 2 == 0:
            drawn = prior(fold_key(fold_key(rng_key, _PRIOR), tries), drawn)
        drawn = jax.tree.map(np.asarray, drawn)
        keep = lambda old, new: np.where(usable.reshape(-1, *(1,) * (new.ndim - 1)), old, new)  # noqa: B023
        starts = drawn if starts is None else jax.tree.map(keep, starts, drawn)
        values, gradients, usable = evaluate_starts(target, starts, uses_gradient)
        if usable.all():
            return starts
    blame = explain_start(target, starts, values, gradients, int(np.argmin(usable)))
    if usable.any():
        return _shared(starts, usable, blame)
    raise ValueError(
        f"the log density cannot be used at any of {_MAX_TRIES} random starts. {blame} Check the model and its data "
        "for NaN and values outside a support, or pass starting values by init_params."
    )


def _shared(starts: PyTree, usable: np.ndarray, blame: str) -> PyTree:
    """Return the starts with usable ones in place of the others, in turn, and warn of what is wrong with these."""
    found, missing = np.flatnonzero(usable), np.flatnonzero(~usable)
    warnings.warn(
        f"For {len(missing)} of {len(usable)} random starts the log density could not be used at any of {_MAX_TRIES} "
        f"positions, so they start where others do. {blame} Check the model and its data for values outside a "
        "support, or pass starting values by init_params.",
        stacklevel=user_level(),
    )
    sources = np.arange(len(usable))
    sources[missing] = np.resize(found, len(missing))
    return jax.tree.map(lambda x: x[sources], starts)


@tuned_jit()
def _draw_starts(target: Target, rng_key: PRNGKey, tries: Array, *, num_starts: int) -> PyTree:
    """Draw starts, leading axis num_starts; without the density or jax.random, each of which took longer to compile."""
    supports, template, drawn = dict(target.model.supports), target.spec.template, 0

    def uniform(*shape: int) -> Array:
        nonlocal drawn
        numbers = drawn + jnp.arange(math.prod(shape), dtype=jnp.uint32).reshape(shape)
        drawn += math.prod(shape)
        bits, _ = threefry_2x32(key_pair(rng_key), numbers, tries)
        # Narrower dtypes cannot hold the bits: in float16 they are inf.
        return bits.astype(at_least_single(target.spec.dtype)) * 2.0**-32

    starts = jax.vmap(target.spec.unravel)(4 * uniform(num_starts, target.dim) - 2)
    for name, values in supports.items():
        which = (uniform(num_starts, *template[name].shape) * len(values)).astype(int)
        starts[name] = jnp.asarray(values, template[name].dtype)[jnp.minimum(which, len(values) - 1)]
    return starts


def discrete_prior(model: Callable, args: tuple, kwargs: dict, supports: Supports) -> Prior | None:
    """Return a function that draws the discrete sites of a model from their prior, given the continuous ones.

    Args:
        model: A NumPyro model.
        args: Positional arguments of the model.
        kwargs: Keyword arguments of the model.
        supports: Values of each discrete latent site; if there are none, None is returned.
    """
    if not supports:
        return None

    def draw(rng_key: PRNGKey, position: dict[str, Array]) -> dict[str, Array]:
        from numpyro import handlers, validation_enabled
        from numpyro.infer.util import _unconstrain_reparam

        discrete = {name: position[name].dtype for name, _ in supports}
        continuous = {name: x for name, x in position.items() if name not in discrete}
        seeded = handlers.seed(watched(model), rng_key)
        started = handlers.substitute(seeded, substitute_fn=partial(_unconstrain_reparam, continuous))
        with validation_enabled(False):
            sites = handlers.trace(started).get_trace(*args, **kwargs)
        return {**continuous, **{name: jnp.asarray(sites[name]["value"], dtype) for name, dtype in discrete.items()}}

    drawn = alone(jax.jit(jax.vmap(draw)))

    def prior(rng_key: PRNGKey, positions: PyTree) -> PyTree:
        num_starts = len(jax.tree.leaves(positions)[0])
        return drawn(jnp.stack(split_key(rng_key, num_starts)), positions)

    return prior


@alone
def strategy_starts(
    model: Callable,
    args: tuple,
    kwargs: dict,
    init_strategy: Callable,
    rng_key: PRNGKey,
    num_chains: int,
    uses_gradient: bool,
) -> dict[str, Array] | None:
    """Return starts that NumPyro finds by a strategy such as ``init_to_median``.

    Args:
        model: A NumPyro model without discrete latent sites.
        args: Positional arguments of the model.
        kwargs: Keyword arguments of the model.
        init_strategy: One of NumPyro's strategies, or a function like them.
        rng_key: Key of the run.
        num_chains: Number of starts.
        uses_gradient: Whether the gradient is needed.

    Returns:
        Unconstrained values by site, leading axis num_chains; None for ``init_to_uniform``, which `numpyro_starts`
        draws.

    Raises:
        RuntimeError: NumPyro found no start where the density and, where it is used, its gradient are finite.
    """
    from numpyro.infer.initialization import init_to_uniform
    from numpyro.infer.util import initialize_model

    if init_strategy is init_to_uniform:
        return None
    keys = jax.random.split(jax.random.fold_in(rng_key, 0), num_chains)
    options: dict = dict(model_args=args, model_kwargs=kwargs, validate_grad=uses_gradient)
    return initialize_model(keys, model, init_strategy=init_strategy, **options).param_info.z
