"""What is sampled: a log density over a vector, made from any model over any pytree.

A `Target` is a pytree whose leaves are the model's data and the basis; the model itself is static and compared by
the user's function. So two calls with the same function and the same shapes compile once, whatever the numbers.
"""

import abc
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from pmcmc._tree import RavelSpec, is_real, register_dataclass
from pmcmc._types import Array, ArrayLeaf, Float, PyTree


class Described(NamedTuple):
    """What a model's sites say of themselves, for whoever labels draws.

    dims: names of the leading axes of a site's values. observed, constant: the data, by site and by argument.
    """

    dims: dict[str, list[str]]
    observed: dict[str, Array]
    constant: dict[str, Array]


class Model(abc.ABC):
    """The static half of a target: hashable, compared by the user's function."""

    @abc.abstractmethod
    def logdensity(self, data: PyTree, position: PyTree) -> Array:
        """Log density (up to a constant) at an unconstrained position, a scalar."""

    @abc.abstractmethod
    def constrain(self, data: PyTree, position: PyTree) -> PyTree:
        """What the user wants to see of a position."""

    def explain(self, data: PyTree, position: PyTree) -> str:
        """A sentence that says which part of the density is not finite at ``position``, or nothing."""
        return ""

    def centred_sites(self, data: PyTree, position: PyTree, other: PyTree) -> list[str]:
        """Latent sites whose scale differs between two positions, as far as the model has sites."""
        return []

    def describe(self, data: PyTree, position: PyTree) -> Described:
        """Sites with their dimensions and data, as far as the model has sites."""
        return Described({}, {}, {})

    def log_likelihood(self, data: PyTree, position: PyTree) -> dict[str, Array]:
        """Of each observation by observed site, as far as the model has sites."""
        return {}


@dataclass(frozen=True)
class LogDensity(Model):
    """A plain log density ``logdensity_fn(position) -> scalar``."""

    logdensity_fn: Callable

    def logdensity(self, data, position):
        return self.logdensity_fn(position)

    def constrain(self, data, position):
        return position


@register_dataclass
@dataclass(frozen=True)
class Basis:
    """Affine coordinates ``x = loc + scale y``; y is what kernels and solvers see.

    loc: (D,). scale: (D,) for a diagonal map, (D, D) lower triangular for a full one.
    """

    loc: ArrayLeaf
    scale: ArrayLeaf

    def to_position(self, y: Float[Array, " dim"]) -> Float[Array, " dim"]:
        return self.loc + (self.scale @ y if self.scale.ndim == 2 else self.scale * y)

    def to_coordinates(self, x: Float[Array, " dim"]) -> Float[Array, " dim"]:
        if self.scale.ndim == 2:
            return jax.scipy.linalg.solve_triangular(self.scale, x - self.loc, lower=True)
        return (x - self.loc) / self.scale

    @property
    def covariance(self) -> Array:
        """The inverse mass matrix this basis stands for: scale scale^T, or its diagonal."""
        return self.scale @ self.scale.T if self.scale.ndim == 2 else self.scale**2


@register_dataclass
@dataclass(frozen=True)
class Target:
    """A log density over vectors of length D, with the way back to the user's pytree.

    model: the static half, compared by the user's function.
    spec: how positions map to vectors.
    data: arrays the model reads, as leaves.
    basis: coordinates the kernels work in, from warm-up; None for the user's own.

    Example:
        >>> import jax.numpy as jnp, pmcmc
        >>> target = pmcmc.Target.from_logdensity(lambda x: -0.5 * jnp.sum(x["a"] ** 2), {"a": jnp.zeros(3)})
        >>> target.dim
        3
    """

    model: Model = field(metadata=dict(static=True))
    spec: RavelSpec = field(metadata=dict(static=True))
    data: PyTree = None
    basis: Basis | None = None

    @classmethod
    def from_logdensity(cls, logdensity_fn: Callable, position: PyTree) -> "Target":
        """A target from ``logdensity_fn(position) -> scalar`` over pytrees like ``position``.

        Raises:
            TypeError: ``logdensity_fn`` is not callable, or a leaf of ``position`` is not floating.
            ValueError: ``position`` is empty, or the density is not a scalar.
        """
        if not callable(logdensity_fn):
            raise TypeError(f"logdensity_fn must be callable as fn(position), got {type(logdensity_fn).__name__}.")
        return cls.build(LogDensity(logdensity_fn), position, None)

    @classmethod
    def build(cls, model: Model, position: PyTree, data: PyTree) -> "Target":
        """A target from a `Model`; checks shapes and dtypes without evaluating anything."""
        if not jax.tree.leaves(position):
            raise ValueError("the position has no leaves: there is nothing to sample.")
        for path, leaf in jax.tree_util.tree_leaves_with_path(position):
            if not is_real(leaf):
                raise TypeError(
                    f"the position{jax.tree_util.keystr(path)} has dtype {jnp.result_type(leaf)}: gradient-based "
                    "kernels need floating leaves. Convert it, or marginalise discrete variables out."
                )
        out = jax.eval_shape(model.logdensity, data, position)
        if jnp.shape(out) != () or not jnp.issubdtype(jnp.result_type(out), jnp.floating):
            raise ValueError(
                f"the log density must return one real number, got shape {jnp.shape(out)} and dtype "
                f"{jnp.result_type(out)}. Sum over observations, or vectorise over chains with num_chains."
            )
        return cls(model, RavelSpec.of(position), data)

    @property
    def dim(self) -> int:
        return self.spec.size

    def logdensity_fn(self, y: Float[Array, " dim"]) -> Float[Array, ""]:
        """Log density at coordinates ``y``, (D,); the basis' constant Jacobian is left out."""
        return self.model.logdensity(self.data, self.position(y)).astype(self.spec.dtype)

    def value_and_grad(self, y: Float[Array, " dim"]) -> tuple[Float[Array, ""], Float[Array, " dim"]]:
        return jax.value_and_grad(self.logdensity_fn)(y)

    def position(self, y: Float[Array, " dim"]) -> PyTree:
        """The user's unconstrained pytree at coordinates ``y``."""
        return self.spec.unravel(y if self.basis is None else self.basis.to_position(y))

    def coordinates(self, position: PyTree) -> Float[Array, " dim"]:
        """Inverse of `position`."""
        x = self.spec.ravel(position)
        return x if self.basis is None else self.basis.to_coordinates(x)

    def constrain(self, y: Float[Array, " dim"]) -> PyTree:
        """What the user sees of coordinates ``y``: constrained and deterministic sites of a NumPyro model."""
        return self.model.constrain(self.data, self.position(y))

    def with_basis(self, basis: Basis | None) -> "Target":
        return replace(self, basis=basis)


def check_starts(target: Target, starts: Float[Array, "num_starts dim"]) -> None:
    """Raise where the density or its gradient is not finite at every start; name what is to blame.

    starts: (N, D) coordinates.

    Raises:
        ValueError: no start is usable, or some are not.
    """
    values, gradients = _evaluate_starts(target, starts)
    usable = jnp.isfinite(values) & jnp.all(jnp.isfinite(gradients), axis=1)
    if bool(jnp.all(usable)):
        return
    bad = int(jnp.argmin(usable))
    position = target.position(starts[bad])
    where = "every start" if not bool(jnp.any(usable)) else f"{int(jnp.sum(~usable))} of {len(starts)} starts"
    if not bool(jnp.isfinite(values[bad])):
        blame = f"The log density is {float(values[bad])} there. " + target.model.explain(target.data, position)
    else:
        names = [
            jax.tree_util.keystr(path)
            for path, leaf in jax.tree_util.tree_leaves_with_path(target.spec.unravel(gradients[bad]))
            if not bool(jnp.all(jnp.isfinite(leaf)))
        ]
        blame = f"The gradient is not finite with respect to position{', position'.join(names)}."
    raise ValueError(
        f"the log density cannot be used at {where}. {blame.strip()} Check the model and its data for NaN, a prior "
        "that does not cover the data, or pass starting values by init_params."
    )


@jax.jit
def _evaluate_starts(target: Target, starts: Array) -> Any:
    return jax.vmap(target.value_and_grad)(starts)
