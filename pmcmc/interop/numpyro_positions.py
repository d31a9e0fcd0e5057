"""What positions of a NumPyro model look like: its latent sites, their shapes, and the supports of discrete ones.

`prototype_position` finds them in a run of the model on abstract values, and `fixed_values` the constants that the
model itself starts with. `check_shapes` compares two runs of a model.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from pmcmc._pytree import PRNGKey
from pmcmc.interop.numpyro_runs import random_trace
from pmcmc.interop.numpyro_sites import check_trace
from pmcmc.target import Supports

# Shapes of the value and the distribution of each sample site.
Shapes = dict[str, tuple[tuple[int, ...], tuple[int, ...]]]


class Prototype(NamedTuple):
    """What positions of a model look like.

    Attributes:
        position: Zeros in the shapes of latent sites.
        supports: Values of each discrete site.
        transformed: Continuous sites whose unconstrained values are not the values themselves.
        fixed: Names of sites to be fixed.
        shapes: Shapes of all sample sites.
    """

    position: dict[str, np.ndarray]
    supports: Supports
    transformed: tuple[str, ...]
    fixed: list[str]
    shapes: Shapes


def prototype_position(model: Callable, args: tuple, kwargs: dict) -> Prototype:
    """Return what positions of a model look like.

    The model runs on abstract values: with real ones every primitive of it would be compiled separately.
    """
    discrete: list[str] = []
    transformed: list[str] = []
    fixed: list[str] = []
    shapes: Shapes = {}
    trace = lambda key: _traced_position(model, args, kwargs, key, discrete, transformed, fixed, shapes)
    position = jax.eval_shape(lambda: trace(jax.random.key(0)))
    position = jax.tree.map(lambda leaf: np.zeros(leaf.shape, leaf.dtype), position)
    supports = _supports(model, args, kwargs, discrete) if discrete else ()
    return Prototype(position, supports, tuple(transformed), fixed, shapes)


def shapes_of(sites: dict[str, dict]) -> Shapes:
    """Return the `Shapes` of a trace."""
    drawn = {name: site for name, site in sites.items() if site["type"] == "sample"}
    return {name: (jnp.shape(site["value"]), tuple(map(int, site["fn"].shape()))) for name, site in drawn.items()}


def check_shapes(first: Shapes, later: Shapes) -> None:
    """Raise an error if a model was not the same in two runs.

    Raises:
        ValueError: It was not, as when its data are in an iterator, which is empty the second time.
    """
    added = {f"_{name}_log_det" for name in first}  # by NumPyro, where a position is unconstrained
    names = first.keys() | later.keys() - added
    if differing := sorted(name for name in names if first.get(name) != later.get(name)):
        raise ValueError(
            f"the model has other sites or shapes each time it runs, here at {', '.join(map(repr, differing))}, and it "
            "runs several times. If it reads an iterator, such as map(...) or an open file, make it a list or an array "
            "before; if it draws or counts something in Python, do so outside of it."
        )


def fixed_values(model: Callable, args: tuple, kwargs: dict, names: list[str]) -> dict[str, Any]:
    """Return the values of ``param`` and ``mutable`` sites, which are constants here, as in NumPyro.

    If the model changes a ``mutable`` site in place, its value is the one after a run, as in NumPyro. Values may be
    pytrees with leaves that are not arrays: placeholders of the weights that a random module samples.
    """
    others: list[Any] = []

    def start(rng_key: PRNGKey) -> list:
        sites = random_trace(model, args, kwargs, rng_key)
        leaves, treedef = jax.tree.flatten({name: sites[name]["value"] for name in names})
        others.extend((treedef, [None if _is_number(leaf) else leaf for leaf in leaves]))
        return [leaf for leaf in leaves if _is_number(leaf)]

    arrays = iter(jax.jit(start)(jax.random.key(0)))
    treedef, leaves = others
    return jax.tree.unflatten(treedef, [next(arrays) if leaf is None else leaf for leaf in leaves])


def _is_number(leaf: Any) -> bool:
    """Whether a leaf can be returned from a compiled function."""
    return isinstance(leaf, (bool, int, float, complex, np.ndarray, np.generic, jax.Array))


def _traced_position(
    model: Callable,
    args: tuple,
    kwargs: dict,
    rng_key: PRNGKey,
    discrete: list[str],
    transformed: list[str],
    fixed: list[str],
    shapes: Shapes,
) -> dict[str, Any]:
    """Return the latent sites at a random point; add to the other arguments, which are those of `Prototype`."""
    from numpyro.distributions.transforms import biject_to
    from numpyro.infer.util import helpful_support_errors

    trace = random_trace(model, args, kwargs, rng_key)
    check_trace(trace)
    shapes.update(shapes_of(trace))
    fixed.extend(name for name, site in trace.items() if site["type"] in ("param", "mutable"))
    latent = {
        name: site for name, site in trace.items() if site["type"] == "sample" and not site.get("is_observed", False)
    }
    if not latent:
        raise ValueError(
            "the model has no latent sample sites: there is nothing to sample. Check that not every site has obs=."
        )
    position = {}
    for name, site in latent.items():
        if site["fn"].support.is_discrete:
            position[name] = jnp.asarray(site["value"], int)
            discrete.append(name)
            continue
        with helpful_support_errors(site):
            transform = biject_to(site["fn"].support)
            position[name] = jnp.asarray(transform.inv(site["value"]), float)
        if not _is_identity(transform):
            transformed.append(name)
    return position


def _is_identity(transform: Any) -> bool:
    """Whether a transform leaves values as they are."""
    from numpyro.distributions.transforms import IdentityTransform, IndependentTransform

    while isinstance(transform, IndependentTransform):
        transform = transform.base_transform
    return isinstance(transform, IdentityTransform)


def _supports(model: Callable, args: tuple, kwargs: dict, names: list[str]) -> Supports:
    """Return the values of each discrete site at a random point."""
    sites = random_trace(model, args, kwargs, jax.random.key(0))
    return tuple((name, _support(name, sites[name]["fn"])) for name in names)


def _support(name: str, fn: Any) -> tuple[int, ...]:
    """Return the values that each element of a discrete site can take."""
    from numpyro.distributions import Independent, MaskedDistribution

    while isinstance(fn, (Independent, MaskedDistribution)):
        fn = fn.base_dist
    found = None
    if fn.has_enumerate_support and not fn.event_dim:
        try:
            found = np.unique(np.asarray(fn.enumerate_support(expand=False)))
        except NotImplementedError:
            found = None
    if found is None:
        raise ValueError(
            f"latent site {name!r} is discrete without a finite support that all its elements share: marginalise it "
            "out, truncate it to a Categorical site, or write its update and pass the model's log density to "
            "pmcmc.sample with Compose([...])."
        )
    return tuple(found.tolist())
