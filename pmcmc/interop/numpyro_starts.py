"""Where chains of a NumPyro model start: positions drawn as NumPyro's init_to_uniform draws them."""

import math

import jax
import jax.numpy as jnp
import numpy as np

from pmcmc._typing import Array, PRNGKey, PyTree
from pmcmc._xla.compile import plain_jit
from pmcmc.random.threefry import key_pair, threefry_2x32
from pmcmc.target import Target, evaluate_starts

_MAX_TRIES = 100


def numpyro_starts(target: Target, rng_key: PRNGKey, num_starts: int) -> PyTree:
    """Draw valid unconstrained starts as NumPyro does (`init_to_uniform`), leading axis ``num_starts``.

    Starts are uniform on (-2, 2), and on the values of a discrete site; they are drawn again up to 100 times where the
    density or its gradient is not finite. NumPyro's own function compiles at every call, which took two thirds of a
    short run.

    Raises:
        ValueError: No start with finite density and gradient was found; the message names the site that is not finite.
    """
    starts, usable = None, np.zeros(num_starts, bool)
    for tries in range(_MAX_TRIES):
        drawn = jax.tree.map(np.asarray, _draw_starts(target, rng_key, jnp.asarray(tries), num_starts=num_starts))
        keep = lambda old, new: np.where(usable.reshape(-1, *(1,) * (new.ndim - 1)), old, new)  # noqa: B023
        starts = drawn if starts is None else jax.tree.map(keep, starts, drawn)
        *_, usable = evaluate_starts(target, starts)
        if usable.all():
            return starts
    centre = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), target.spec.template)
    centre.update({name: jnp.full_like(centre[name], values[0]) for name, values in target.model.supports})
    raise ValueError(
        f"the log density cannot be used at any of {_MAX_TRIES} random starts. "
        f"{target.model.explain(target.data, centre)} Check the model and its data for NaN and values outside a "
        "support, or pass starting values by init_params."
    )


@plain_jit(static_argnames="num_starts")
def _draw_starts(target: Target, rng_key: PRNGKey, tries: Array, *, num_starts: int) -> PyTree:
    """Draw starts, leading axis num_starts; without the density or jax.random, each of which took longer to compile."""
    supports, template, drawn = dict(target.model.supports), target.spec.template, 0

    def uniform(*shape: int) -> Array:
        nonlocal drawn
        numbers = drawn + jnp.arange(math.prod(shape), dtype=jnp.uint32).reshape(shape)
        drawn += math.prod(shape)
        bits, _ = threefry_2x32(key_pair(rng_key), numbers, tries.astype(jnp.uint32))
        return bits.astype(target.spec.dtype) * 2.0**-32

    starts = jax.vmap(target.spec.unravel)(4 * uniform(num_starts, target.dim) - 2)
    for name, values in supports.items():
        which = (uniform(num_starts, *template[name].shape) * len(values)).astype(int)
        starts[name] = jnp.asarray(values, template[name].dtype)[jnp.minimum(which, len(values) - 1)]
    return starts
