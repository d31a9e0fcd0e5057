"""What is sampled: a model over any pytree, and its log density over a vector.

A `Target` is a pytree whose leaves are the model's data and the basis. The model itself is static: the user's function
as it was when the target was made, traced, and compared by what it computes (see `pmcmc._xla.trace`). So two calls
whose models differ in nothing but the numbers of their arrays compile once, and a changed model compiles anew.
"""

import abc
import math
from collections.abc import Callable, Hashable
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from pmcmc._pytree import RavelSpec, is_real, register_dataclass
from pmcmc._typing import Array, ArrayLeaf, Float, PyTree
from pmcmc._xla.compile import plain_jit, tuned_jit
from pmcmc._xla.trace import Trace, trace

# Matrices of this many rows are multiplied without a library.
SMALL_DIM = 32


Supports = tuple[tuple[str, tuple[int | float, ...]], ...]  # (site, its values)


class Model(abc.ABC):
    """The static half of a target: hashable, compared by what it computes.

    has_density: False where only the kernel knows what is sampled; then `logdensity` is NaN.
    supports: values of each discrete site, as far as the model knows them.
    """

    has_density: bool = True
    supports: "Supports" = ()

    @abc.abstractmethod
    def logdensity(self, data: PyTree, position: PyTree) -> Array:
        """Log density (up to a constant) at an unconstrained position, a scalar."""

    def density_shape(self, data: PyTree, position: PyTree) -> Any:
        """Shape and dtype of `logdensity`."""
        return jax.eval_shape(self.logdensity, data, position)

    @abc.abstractmethod
    def constrain(self, data: PyTree, position: PyTree) -> PyTree:
        """What the user wants to see of a position."""

    def explain(self, data: PyTree, position: PyTree) -> str:
        """A sentence that says which part of the density is not finite at ``position``, or nothing."""
        return ""

    def sites(self, data: PyTree, position: PyTree) -> PyTree:
        """Values of all sites of the model: those of the position, and others that the data may hold."""
        return position

    def element_logdensities(self, data: PyTree, position: PyTree, site: str, values: Array) -> Array:
        """Log densities of each element of a discrete site at each value, up to constants: (*shape, K).

        For elements that are independent of each other given all other sites.

        Raises:
            ValueError: the model does not know which of its terms belong to which element.
        """
        raise ValueError(
            f"independent=[{site!r}] needs a NumPyro model with {site!r} in a plate. Write CategoricalUpdate for a "
            "log density of your own, or leave the option out: then elements are drawn one after the other."
        )

    def site_scales(self, data: PyTree, position: PyTree) -> dict[str, Array]:
        """Scales of the latent sites of location-scale families, as far as the model has sites."""
        return {}

    def non_centred_form(self, site: str) -> str:
        """What to write for a non-centred form of one of these sites, as the end of a sentence."""
        return "try a non-centred form"

    def observed(self, data: PyTree, position: PyTree) -> dict[str, Array]:
        """Values of the observed sites, as far as the model has sites."""
        return {}

    def content(self, data: PyTree) -> tuple[Hashable, Hashable]:
        """What the model computes, and the numbers that it reads: equal as long as it is the same model."""
        return type(self), ()

    @property
    def dims(self) -> dict[str, list[str]]:
        """Names of the leading axes of a site's values, as far as the model has sites."""
        return {}

    def log_likelihood(self, data: PyTree, position: PyTree) -> dict[str, Array]:
        """Of each observation by observed site, as far as the model has sites."""
        return {}


@dataclass(frozen=True)
class LogDensity(Model):
    """A plain log density ``logdensity_fn(position) -> scalar``. Its data are the arrays that the function read."""

    trace: Trace

    def density_shape(self, data, position):
        return self.trace.out_shapes

    def content(self, data):
        return self.trace.content(data)

    def logdensity(self, data, position):
        return self.trace(data, position)

    def constrain(self, data, position):
        return position


@dataclass(frozen=True)
class WithoutDensity(Model):
    """Nothing but a kernel that samples it by itself, such as Gibbs."""

    has_density = False

    def logdensity(self, data, position):
        return jnp.asarray(jnp.nan, RavelSpec.of(position).dtype)

    def constrain(self, data, position):
        return position


@dataclass(frozen=True)
class Conditional(Model):
    """Some sites of a model given the others. Its data are (the model's data, {other site: value})."""

    model: Model

    @property
    def has_density(self) -> bool:  # type: ignore[override]
        return self.model.has_density

    @property
    def supports(self) -> Supports:  # type: ignore[override]
        return self.model.supports

    def logdensity(self, data, position):
        return self.model.logdensity(data[0], {**data[1], **position})

    def constrain(self, data, position):
        return self.model.constrain(data[0], {**data[1], **position})

    def explain(self, data, position) -> str:
        return self.model.explain(data[0], {**data[1], **position})

    def sites(self, data, position):
        return self.model.sites(data[0], {**data[1], **position})

    def element_logdensities(self, data, position, site, values):
        return self.model.element_logdensities(data[0], {**data[1], **position}, site, values)


def _product(matrix: Array, vector: Array) -> Array:
    """``matrix @ vector``; a small one by a sum, which XLA fuses with what is around it (see `in_one_kernel`)."""
    if len(vector) > SMALL_DIM:
        return matrix @ vector
    return jnp.sum(matrix * vector[None, :], axis=1)


@register_dataclass
@dataclass(frozen=True)
class Basis:
    """Affine coordinates ``x = loc + scale y``; y is what kernels and solvers see.

    loc: (D,). scale: (D,) for a diagonal map, (D, D) lower triangular for a full one.
    """

    loc: ArrayLeaf
    scale: ArrayLeaf

    def to_position(self, y: Float[Array, " dim"]) -> Float[Array, " dim"]:
        return self.loc + (_product(self.scale, y) if self.scale.ndim == 2 else self.scale * y)

    def to_positions(self, rows: np.ndarray) -> np.ndarray:
        """`to_position` of many coordinates (..., D), by numpy in float64."""
        loc, scale = np.asarray(self.loc, float), np.asarray(self.scale, float)
        return loc + (rows @ scale.T if scale.ndim == 2 else rows * scale)

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

    Kernels that update named sites work on the pytree itself, whose leaves may then be integers.

    model: the static half, compared by the user's function.
    spec: how positions map to vectors.
    data: arrays the model reads, as leaves.
    basis: coordinates the kernels work in, from warm-up; None for the user's own.
    context: what else programs depend on, static: functions of the user's within a kernel. None: nothing.

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
    context: Hashable = field(default=None, metadata=dict(static=True))

    @classmethod
    def from_logdensity(cls, logdensity_fn: Callable | None, position: PyTree) -> "Target":
        """A target from ``logdensity_fn(position) -> scalar`` over pytrees like ``position``.

        The function is traced once, now: what becomes of arrays and attributes that it reads does not change the
        target.

        logdensity_fn: None for kernels that evaluate no density, such as `Gibbs`.

        Raises:
            TypeError: ``logdensity_fn`` is not callable.
            ValueError: ``position`` is empty, or the density is not a scalar.
        """
        if logdensity_fn is None:
            return cls.build(WithoutDensity(), position, None)
        if not callable(logdensity_fn):
            raise TypeError(f"logdensity_fn must be callable as fn(position), got {type(logdensity_fn).__name__}.")
        spec = _spec(position)
        traced = trace(logdensity_fn, spec.template)
        return cls.build(LogDensity(traced.trace), position, traced.constants)

    @classmethod
    def build(cls, model: Model, position: PyTree, data: PyTree) -> "Target":
        """A target from a `Model`; checks shapes and dtypes without evaluating anything."""
        spec = _spec(position)
        out = model.density_shape(data, spec.template)
        if jnp.shape(out) != () or not jnp.issubdtype(jnp.result_type(out), jnp.floating):
            raise ValueError(
                f"the log density must return one real number, got shape {jnp.shape(out)} and dtype "
                f"{jnp.result_type(out)}. Sum over observations, or vectorise over chains with num_chains."
            )
        return cls(model, spec, data)

    @property
    def owner(self) -> Hashable:
        """What programs are compiled for: targets with the same differ in numbers and coordinates only."""
        return self.model, self.context

    @property
    def dim(self) -> int:
        return self.spec.size

    def check_real(self) -> None:
        """Raise where the position has leaves that are not floating, and so no gradient."""
        for path, leaf in jax.tree_util.tree_leaves_with_path(self.spec.template):
            if not is_real(leaf):
                raise TypeError(
                    f"the position{jax.tree_util.keystr(path)} has dtype {leaf.dtype}: gradient-based "
                    "kernels need floating leaves. Convert it, marginalise discrete variables out, or update them by "
                    "Gibbs(...) or DiscreteGibbs(...), in a Compose([...]) with a kernel for the others."
                )

    def logdensity_fn(self, y: Float[Array, " dim"]) -> Float[Array, ""]:
        """Log density at coordinates ``y``, (D,); the basis' constant Jacobian is left out."""
        return _logdensity(self, y)

    def value_and_grad(self, y: Float[Array, " dim"]) -> tuple[Float[Array, ""], Float[Array, " dim"]]:
        return _value_and_grad(self, y)

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

    def given(self, names: tuple[str, ...], others: PyTree, basis: Basis | None = None) -> "Target":
        """The sites ``names`` of a dict position given the others, whose values may be left out until needed."""
        spec = RavelSpec.of({name: self.spec.template[name] for name in names})
        return Target(Conditional(self.model), spec, (self.data, others), basis, self.context)

    def with_basis(self, basis: Basis | None) -> "Target":
        return replace(self, basis=basis)


def _spec(position: PyTree) -> RavelSpec:
    if not sum(math.prod(jnp.shape(x)) for x in jax.tree.leaves(position)):
        raise ValueError("the position holds no numbers: there is nothing to sample.")
    return RavelSpec.of(position)


# Within other programs these two are calls that XLA inlines: the model is traced once, and not again by each program
# and each loop within it that evaluates it.
@plain_jit()
def _logdensity(target: Target, y: Array) -> Array:
    return target.model.logdensity(target.data, target.position(y)).astype(target.spec.dtype)


@plain_jit()
def _value_and_grad(target: Target, y: Array) -> tuple[Array, Array]:
    return jax.value_and_grad(partial(_logdensity, target))(y)


def check_starts(target: Target, starts: PyTree) -> None:
    """Raise where the density or its gradient is not finite at some start; name what is to blame.

    starts: positions, leading axis N. Without a density they need only be finite; gradients are those of real leaves.

    Raises:
        ValueError: some starts, or all, are not usable.
        TypeError: the density has no gradient, or cannot be mapped over positions.
    """
    try:
        values, gradients, usable = evaluate_starts(target, starts)
    except (TypeError, ValueError, NotImplementedError) as error:
        raise TypeError(f"the log density works at one position, but {_obstacle(target, starts)} ({error})") from error
    if usable.all():
        return
    if not target.model.has_density:
        raise ValueError("the initial position is not finite: start from other values.")
    bad = int(np.argmin(usable))
    position = jax.tree.map(lambda x: x[bad], starts)
    where = "every start" if not usable.any() else f"{int(np.sum(~usable))} of {len(usable)} starts"
    if not np.isfinite(values[bad]):
        blame = f"The log density is {float(values[bad])} there. " + target.model.explain(target.data, position)
    else:
        names = [
            jax.tree_util.keystr(path)
            for path, leaf in jax.tree_util.tree_leaves_with_path(gradients)
            if not np.all(np.isfinite(leaf[bad]))
        ]
        blame = f"The gradient is not finite with respect to position{', position'.join(names)}."
    raise ValueError(
        f"the log density cannot be used at {where}. {blame.strip()} Check the model and its data for NaN, a prior "
        "that does not cover the data, or pass starting values by init_params."
    )


def _obstacle(target: Target, starts: PyTree) -> str:
    """Why densities and gradients cannot be had at many starts."""
    try:
        jax.eval_shape(_evaluate_start, target, jax.tree.map(lambda x: x[0], starts))
    except (TypeError, ValueError, NotImplementedError):
        return (
            "jax cannot differentiate it. Write it with operations of jax that have a derivative (scan in place of "
            "while_loop), or give it one by jax.custom_jvp."
        )
    return (
        "jax.vmap cannot map it over several, as chains and blocks are. Use operations of jax, or tell how they are "
        "mapped, as by vmap_method= of jax.pure_callback."
    )


def evaluate_starts(target: Target, starts: PyTree) -> tuple[np.ndarray, PyTree, np.ndarray]:
    """Log densities (N,), gradients of real leaves (N, ...) at positions, and where both are finite.

    Without a density the first two mean nothing, and positions need only be finite themselves.
    """
    if target.model.has_density:
        values, gradients = jax.tree.map(np.asarray, _evaluate_starts(target, starts))
        judged = [values, *jax.tree.leaves(gradients)]
    else:
        values, gradients = np.full(len(jax.tree.leaves(starts)[0]), np.nan), None
        judged = [np.asarray(x) for x in jax.tree.leaves(starts) if is_real(x)]
    finite = [np.isfinite(x).reshape(len(x), -1).all(axis=1) for x in judged]
    return values, gradients, np.all(finite, axis=0) if finite else np.ones(len(values), bool)


def _evaluate_start(target: Target, position: PyTree) -> tuple[Array, PyTree]:
    """Log density, and its gradient with respect to real leaves (None in the place of others)."""
    split = lambda keep: jax.tree.map(lambda x: x if is_real(x) == keep else None, position)
    real, discrete = split(True), split(False)
    merge = lambda a, b: b if a is None else a
    logdensity = lambda x: target.model.logdensity(
        target.data, jax.tree.map(merge, x, discrete, is_leaf=lambda leaf: leaf is None)
    )
    return jax.value_and_grad(logdensity)(real)


@tuned_jit()
def _evaluate_starts(target: Target, starts: PyTree) -> Any:
    return jax.vmap(lambda position: _evaluate_start(target, position))(starts)
