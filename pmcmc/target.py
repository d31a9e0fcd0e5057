"""What is sampled: a model over any pytree, and its log density over a vector.

A `Target` is a pytree whose leaves are the model's data and the basis. The `Model` itself is static: the user's
function as it was when the target was made, traced, and compared by what it computes (see `pmcmc._xla.trace`). Two
calls whose models differ only in the numbers of their arrays therefore compile once, and a changed model is
recompiled.

Kernels and solvers see coordinates y, (D,), with ``x = loc + scale y`` in the `Basis` that warm-up found; x is the
user's pytree as a vector.
"""

import abc
import math
from collections.abc import Callable, Hashable
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from pmcmc._pytree import Array, ArrayLeaf, Float, PyTree, RavelSpec, is_real, register_dataclass
from pmcmc._xla.compile import plain_jit
from pmcmc._xla.trace import Trace, trace


def _product(matrix: Array, vector: Array) -> Array:
    """Return ``matrix @ vector``; up to D = 32 as a sum, which XLA fuses with the rest (see `in_one_kernel`)."""
    return matrix @ vector if len(vector) > 32 else jnp.sum(matrix * vector[None, :], axis=1)


@register_dataclass
@dataclass(frozen=True)
class Basis:
    """Affine coordinates ``x = loc + scale y``; kernels and solvers see y.

    Attributes:
        loc: Shape (D,).
        scale: Shape (D,) for a diagonal map, (D, D) lower triangular for a full one.
        spread: Standard deviations of the posterior in y, as warm-up found them, if scale is a metric of the user's;
            shape (D,). None: 1, since scale is what warm-up found.
    """

    loc: ArrayLeaf
    scale: ArrayLeaf
    spread: ArrayLeaf | None = None

    def to_position(self, y: Float[Array, " dim"]) -> Float[Array, " dim"]:
        """Return ``x = loc + scale y``, (D,)."""
        return self.loc + (_product(self.scale, y) if self.scale.ndim == 2 else self.scale * y)

    def to_positions(self, rows: np.ndarray) -> np.ndarray:
        """Map many coordinates (..., D) by `to_position`, in numpy and float64."""
        loc, scale = np.asarray(self.loc, float), np.asarray(self.scale, float)
        return loc + (rows @ scale.T if scale.ndim == 2 else rows * scale)

    def to_coordinates(self, x: Float[Array, " dim"]) -> Float[Array, " dim"]:
        """Inverse of `to_position`, (D,)."""
        if self.scale.ndim == 2:
            return jax.scipy.linalg.solve_triangular(self.scale, x - self.loc, lower=True)
        return (x - self.loc) / self.scale

    @property
    def covariance(self) -> Array:
        """The inverse mass matrix that this basis corresponds to: scale scale^T, or its diagonal."""
        return self.scale @ self.scale.T if self.scale.ndim == 2 else self.scale**2


class Place(NamedTuple):
    """Where a partially centred site is, in the shape of its unconstrained values.

    Attributes:
        value: Unconstrained values x.
        standard: Standardised values z, which x - mu does not give where rounding takes all its digits.
        loc: Locations mu.
        log_scale: Logarithms of the scales s.
        is_heavy: Whether the variance of the family may be infinite, a scalar.
    """

    value: Array
    standard: Array
    loc: Array
    log_scale: Array
    is_heavy: Array


def _without_plates(site: str) -> ValueError:
    """Return the error of a model that does not know which of its terms belong to which element of a site."""
    return ValueError(
        f"independent=[{site!r}] needs a NumPyro model with {site!r} in a plate. Write CategoricalUpdate for a "
        "log density of your own, or leave the option out: then elements are drawn one after the other."
    )


# Pairs (site, its values) of discrete sites.
Supports = tuple[tuple[str, tuple[int | float, ...]], ...]


class Model(abc.ABC):
    """The static half of a target: hashable, compared by what it computes.

    Attributes:
        has_density: False if only the kernel knows what is sampled; `logdensity` is then NaN.
        supports: Values of each discrete site, as far as the model knows them.
        transformed: Sites of which positions hold other values than the user's, such as logarithms of positive ones.
    """

    has_density: bool = True
    supports: "Supports" = ()
    transformed: tuple[str, ...] = ()

    @abc.abstractmethod
    def logdensity(self, data: PyTree, position: PyTree) -> Array:
        """Return the log density (up to a constant) at an unconstrained position, a scalar."""

    def density_shape(self, data: PyTree, position: PyTree) -> Any:
        """Return the shape and dtype of `logdensity`."""
        return jax.eval_shape(self.logdensity, data, position)

    def constrain(self, data: PyTree, position: PyTree) -> PyTree:
        """Return what the user sees of a position, such as constrained values."""
        return position

    def explain(self, data: PyTree, position: PyTree) -> str:
        """Return a sentence saying which part of the density is not finite at ``position``; empty if unknown."""
        return ""

    def sites(self, data: PyTree, position: PyTree) -> PyTree:
        """Return the values of all sites of the model: those of the position, and others that the data may contain."""
        return position

    def element_logdensities(self, data: PyTree, position: PyTree, site: str, values: Array) -> Array:
        """Return log densities of each element of a discrete site at each value, up to constants.

        It requires elements that are independent of each other given all other sites.

        Args:
            data: The model's data.
            position: Values of the sites.
            site: Name of the discrete site.
            values: Its K values.

        Returns:
            Log densities, shape ``(*shape, K)``.

        Raises:
            ValueError: The model does not know which of its terms belong to which element.
        """
        raise _without_plates(site)

    def changes_own_terms(self, data: PyTree, position: PyTree, site: str, values: Array, index: Array) -> Array:
        """Return whether the value of one element of a discrete site changes no terms but its own.

        They are the terms that `element_logdensities` counts as the element's. A term that is NaN or infinite at all
        values has not changed.

        Args:
            data: The model's data.
            position: Values of the sites.
            site: Name of the discrete site.
            values: Its K values.
            index: Flat index of the element.

        Returns:
            A boolean, shape ().

        Raises:
            ValueError: The model does not know which of its terms belong to which element.
        """
        raise _without_plates(site)

    def site_scales(self, data: PyTree, position: PyTree) -> dict[str, Array]:
        """Return the scales of latent sites from location-scale families; empty if the model has no sites."""
        return {}

    def non_centred_form(self, site: str) -> str:
        """Return how to change the form of one of these sites, as the end of a sentence."""
        return "try a non-centred form"

    @property
    def could_be_centred(self) -> bool:
        """Whether `AutoReparam` would act on a site whose scale depends on other latent sites."""
        return False

    def centredness(self, data: PyTree) -> dict[str, Array]:
        """Return the centredness c of partially centred sites, see `AutoReparam`; empty if there are none."""
        return {}

    def with_centredness(self, data: PyTree, centredness: dict[str, Array]) -> PyTree:
        """Return the data with another centredness of the sites that `centredness` names."""
        return data

    def places(self, data: PyTree, position: PyTree) -> dict[str, Place]:
        """Return where partially centred sites are; empty if there are none."""
        return {}

    def observed(self, data: PyTree, position: PyTree) -> dict[str, Array]:
        """Return the values of the observed sites; empty if the model has no sites."""
        return {}

    def content(self, data: PyTree) -> tuple[Hashable, Hashable]:
        """Return what the model computes, and the numbers that it reads; equal as long as the model is the same."""
        return type(self), ()

    @property
    def dims(self) -> dict[str, list[str]]:
        """Names of the leading axes of each site's values; empty if the model has no sites."""
        return {}

    def log_likelihood(self, data: PyTree, position: PyTree) -> dict[str, Array]:
        """Return the log likelihood of each observation by observed site; empty if the model has no sites."""
        return {}


@dataclass(frozen=True)
class LogDensity(Model):
    """A plain log density ``logdensity_fn(position) -> scalar``. Its data are the arrays that the function read.

    Attributes:
        trace: The function, traced.
    """

    trace: Trace

    def density_shape(self, data, position):
        return self.trace.out_shapes

    def content(self, data):
        return self.trace.content(data)

    def logdensity(self, data, position):
        return self.trace(data, position)


@dataclass(frozen=True)
class WithoutDensity(Model):
    """A model without a density, for kernels that sample it without one, such as `Gibbs`."""

    has_density = False

    def logdensity(self, data, position):
        return jnp.asarray(jnp.nan, RavelSpec.of(position).dtype)


@dataclass(frozen=True)
class Conditional(Model):
    """Some sites of a model, given the others. Its data are (the model's data, {other site: value}).

    Attributes:
        model: The model of all sites.
    """

    model: Model

    def __post_init__(self) -> None:
        for name in ("has_density", "supports", "transformed"):
            object.__setattr__(self, name, getattr(self.model, name))

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

    def changes_own_terms(self, data, position, site, values, index):
        return self.model.changes_own_terms(data[0], {**data[1], **position}, site, values, index)


@register_dataclass
@dataclass(frozen=True)
class Target:
    """A log density over vectors of length D, with the map back to the user's pytree.

    Kernels that update named sites work on the pytree itself, whose leaves may then be integers. Build a target with
    `Target.from_logdensity`.

    Attributes:
        model: The static half, compared by what the user's function computes.
        spec: How positions map to vectors.
        data: Arrays that the model reads, as leaves.
        basis: Coordinates that kernels work in, found by warm-up. None: the user's own.
        context: What compiled programs depend on besides, static: the user's functions within a kernel. None: nothing.

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
        """Make a target from a log density over pytrees like ``position``.

        The function is traced once, now. Later changes to arrays and attributes that it reads do not affect the target,
        except for what the backward rule of a `jax.custom_vjp` reads from outside.

        Args:
            logdensity_fn: ``position -> scalar``. None for kernels that evaluate no density, such as `Gibbs`.
            position: A pytree of arrays.

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
        """Make a target from a `Model`; check shapes and dtypes without evaluating anything.

        Raises:
            ValueError: ``position`` is empty, or the density is not a real scalar.
        """
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
        """Key of the compiled programs: targets with equal keys differ only in numbers and coordinates."""
        return self.model, self.context

    @property
    def dim(self) -> int:
        """D, the length of the vectors."""
        return self.spec.size

    def check_real(self) -> None:
        """Raise if the position has leaves that are not floating, which have no gradient.

        Raises:
            TypeError: Some leaf is not floating.
        """
        for path, leaf in jax.tree_util.tree_leaves_with_path(self.spec.template):
            if not is_real(leaf):
                raise TypeError(
                    f"the position{jax.tree_util.keystr(path)} has dtype {leaf.dtype}: gradient-based "
                    "kernels need floating leaves. Convert it, marginalise discrete variables out, or update them by "
                    "Gibbs(...) or DiscreteGibbs(...), in a Compose([...]) with a kernel for the others."
                )

    def logdensity_fn(self, y: Float[Array, " dim"]) -> Float[Array, ""]:
        """Log density at coordinates ``y``, (D,), without the constant Jacobian of the basis."""
        return _logdensity(self, y)

    def value_and_grad(self, y: Float[Array, " dim"]) -> tuple[Float[Array, ""], Float[Array, " dim"]]:
        """Log density at coordinates ``y``, (D,), and its gradient with respect to y."""
        return _value_and_grad(self, y)

    def position(self, y: Float[Array, " dim"]) -> PyTree:
        """The unconstrained pytree at coordinates ``y``, which holds w of partially centred sites."""
        return self.spec.unravel(y if self.basis is None else self.basis.to_position(y))

    def coordinates(self, position: PyTree) -> Float[Array, " dim"]:
        """Inverse of `position`."""
        x = self.spec.ravel(position)
        return x if self.basis is None else self.basis.to_coordinates(x)

    def constrain(self, y: Float[Array, " dim"]) -> PyTree:
        """What the user sees of coordinates ``y``: constrained and deterministic sites of a NumPyro model."""
        return self.model.constrain(self.data, self.position(y))

    @property
    def centredness(self) -> dict[str, Array]:
        """The centredness c of partially centred sites, see `AutoReparam`; empty if there are none."""
        return self.model.centredness(self.data)

    def with_centredness(self, centredness: dict[str, ArrayLeaf]) -> "Target":
        """Return this target with another centredness of the sites that `centredness` names."""
        dtype = lambda name: self.spec.template[name].dtype
        data = {name: jax.device_put(np.asarray(c, dtype(name))) for name, c in centredness.items()}
        return replace(self, data=self.model.with_centredness(self.data, data))

    @property
    def as_written(self) -> "Target":
        """This target without basis, in the unconstrained coordinates of the model as the user wrote it."""
        return self.with_centredness({name: np.ones(c.shape) for name, c in self.centredness.items()}).with_basis(None)

    def unconstrained(self, position: PyTree) -> PyTree:
        """Return the user's unconstrained values at a position: their own for partially centred sites."""
        places = self.model.places(self.data, position)
        return {**position, **{name: place.value for name, place in places.items()}} if places else position

    def given(self, names: tuple[str, ...], others: PyTree, basis: Basis | None = None) -> "Target":
        """Restrict the target to some sites of a dict position, given the others.

        Args:
            names: The sites.
            others: Values of the other sites; may be left out until the density is evaluated.
            basis: Coordinates of the sites.
        """
        spec = RavelSpec.of({name: self.spec.template[name] for name in names})
        return Target(Conditional(self.model), spec, (self.data, others), basis, self.context)

    def with_basis(self, basis: Basis | None) -> "Target":
        """Return this target in other coordinates."""
        return replace(self, basis=basis)


def _spec(position: PyTree) -> RavelSpec:
    """Return the spec of a position, which must not be empty."""
    if not sum(math.prod(jnp.shape(x)) for x in jax.tree.leaves(position)):
        raise ValueError("the position holds no numbers: there is nothing to sample.")
    return RavelSpec.of(position)


# Within other programs these two are calls that XLA inlines: the model is traced once, rather than by each program and
# each loop that evaluates it.
@plain_jit()
def _logdensity(target: Target, y: Array) -> Array:
    """Return the log density at coordinates ``y``, in the dtype of the position."""
    return target.model.logdensity(target.data, target.position(y)).astype(target.spec.dtype)


@plain_jit()
def _value_and_grad(target: Target, y: Array) -> tuple[Array, Array]:
    """Return `_logdensity` and its gradient with respect to ``y``."""
    return jax.value_and_grad(partial(_logdensity, target))(y)
