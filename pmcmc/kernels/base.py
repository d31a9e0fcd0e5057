"""The seam of a kernel: a deterministic map of pre-drawn noise."""

import abc
from abc import abstractmethod
from collections.abc import Callable, Hashable
from dataclasses import replace
from typing import Any, ClassVar, NamedTuple

import jax
import jax.numpy as jnp

from pmcmc._pytree import RavelSpec
from pmcmc._typing import Array, PRNGKey, PyTree, Scalar
from pmcmc._xla.trace import trace
from pmcmc.recurrence import Recurrence
from pmcmc.target import Target


class Info(NamedTuple):
    """What one step of a kernel says about itself.

    acceptance_rate: min(1, alpha); NaN where the kernel has none.
    is_divergent: the proposal was NaN, +inf, or lost more than 1,000 units of log density (energy).
    margin: log alpha - log u. The proposal is accepted where it is positive; within rounding of zero the decision is
        a near tie. For draws of discrete values by inverse CDF the distance of u to the nearest step of the CDF. NaN
        where the kernel does not tell, and inf where it decides nothing: near ties are not counted.
    logdensity: of the new state.
    energy: potential plus kinetic energy at the state kept, as NumPyro and Stan report it; None for kernels without
        momentum.
    num_integration_steps: leapfrog steps taken, where their number is drawn; else None.
    tree_depth: doublings of the trajectory, for NUTS; else None.
    """

    acceptance_rate: Array
    is_divergent: Array
    margin: Array
    logdensity: Array
    energy: Array | None = None
    num_integration_steps: Array | None = None
    tree_depth: Array | None = None


def near_tie_bound(info: Info) -> Array:
    """The |margin| up to which rounding decides: log alpha is a difference of log densities and carries a few
    roundings at their size. Without a log density (NaN) they are taken to be of order one."""
    return 4 * jnp.finfo(info.margin.dtype).eps * jnp.fmax(1.0, jnp.abs(info.logdensity))


class Kernel(abc.ABC):
    """A Markov kernel written as ``state' = step(target, state, noise)``: all randomness is drawn first.

    With the noise of every step drawn from its own key, the chain is a deterministic recurrence, which a solver may
    evaluate in any order. A kernel is a frozen dataclass and a pytree: numbers such as a step size are leaves.
    """

    # What `Chain.get_extra_fields` can return, as NumPyro spells it.
    extra_fields: ClassVar[tuple[str, ...]] = ("diverging", "accept_prob", "potential_energy")

    @abc.abstractmethod
    def init(self, target: Target, position: PyTree) -> Any:
        """State at a position (the user's unconstrained pytree)."""

    @abc.abstractmethod
    def sample_noise(self, rng_key: PRNGKey, target: Target) -> PyTree:
        """All the randomness of one step."""

    @abc.abstractmethod
    def step(self, target: Target, state: Any, noise: PyTree) -> tuple[Any, Info]:
        """One step: deterministic; can be jitted, mapped and differentiated forward."""

    @abc.abstractmethod
    def unknown(self, state: Any) -> PyTree:
        """The dynamic state without caches: what is solved for, compared at merges and stored."""

    @abc.abstractmethod
    def restore(self, target: Target, unknown: PyTree) -> Any:
        """Inverse of `unknown`: rebuilds caches such as the log density and its gradient."""

    @abc.abstractmethod
    def coordinates(self, unknown: PyTree) -> Array:
        """The target's coordinates (D,) within an unknown."""

    def check(self, target: Target) -> None:
        """Raise where this kernel cannot sample the target; called once, before anything else.

        Raises:
            TypeError, ValueError: expected, got, fix.
        """
        if not target.model.has_density:
            raise TypeError(f"{type(self).__name__} needs a log density: pass logdensity_fn, not None.")
        target.check_real()

    def check_start(self, target: Target, position: PyTree) -> None:
        """Raise where what the kernel was told of the target is wrong at a position; called once, after `check`.

        Raises:
            ValueError: what does not hold.
        """
        return None

    def traced(self, target: Target) -> "Kernel":
        """This kernel with the user's functions in it as they are now (`pmcmc._xla.trace`).

        A kernel that keeps its functions as they were given is known by `context` instead.
        """
        return self

    def context(self, target: Target) -> Hashable:
        """What programs of this kernel depend on besides its fields: equal as long as that has not changed.

        For a kernel from outside pmcmc the trace of a whole step, with the content of every array that it reads. None
        for those of pmcmc, whose steps are functions of their fields, the target, the state and the noise.
        """
        return None if type(self).__module__.split(".")[0] == __name__.split(".")[0] else step_content(self, target)

    def position(self, target: Target, unknown: PyTree) -> PyTree:
        """The user's unconstrained position within an unknown."""
        return target.position(self.coordinates(unknown))

    def nudge(self, noise: PyTree, amount: Array) -> PyTree:
        """The noise with ``amount`` added to what decisions are made by, on the scale of `Info.margin`.

        Near ties then come out the other way and all else stays as it is. A kernel without a margin has nothing to add
        to.
        """
        return noise

    @property
    def is_tuned(self) -> bool:
        """Whether the kernel can step without warm-up."""
        return getattr(self, "step_size", 0.0) is not None

    @property
    def takes_basis(self) -> bool:
        """Whether the kernel can work in the whitened coordinates of warm-up."""
        return True

    def target_acceptance_rate(self, dim: int) -> float:
        """The mean acceptance rate to which warm-up tunes the step size; 0.8, as in Stan, if nothing else is known."""
        return 0.8

    def first_step_size(self, dim: int) -> float:
        """Where that tuning begins in whitened coordinates; 0.8 D^(-1/4), the optimal scaling of HMC."""
        return 0.8 * dim ** (-1 / 4)

    def start(self, target: Target, y: Array) -> Any:
        """State at the target's coordinates y (D,)."""
        return self.init(target, target.position(y))

    def with_step_size(self, step_size: Scalar) -> "Kernel":
        """The same kernel with another step size; for kernels that have an attribute ``step_size``."""
        changes: dict[str, Any] = {"step_size": step_size}
        return replace(self, **changes)  # type: ignore[type-var]

    def transition(self, target: Target) -> Recurrence:
        """The recurrence ``x[t] = f(x[t-1], noise[t])`` of this kernel on a target."""
        step: Callable = lambda state, noise: self.step(target, state, noise)
        return Recurrence(step, self.unknown, lambda unknown: self.restore(target, unknown))


def step_content(kernel: Kernel, target: Target) -> Hashable:
    """What noise and step of a kernel compute, arrays that they read included."""
    if not kernel.is_tuned:
        kernel = kernel.with_step_size(1.0)

    def whole(target: Target, position: PyTree, rng_key: PRNGKey) -> PyTree:
        noise, state = kernel.sample_noise(rng_key, target), kernel.init(target, position)
        return kernel.step(target, kernel.restore(target, kernel.unknown(state)), noise)

    return trace(whole, target, target.spec.template, jax.random.key(0)).content


class PositionKernel(Kernel):
    """A kernel whose unknown is the field ``position`` of its state alone: the rest are caches."""

    def init(self, target, position):
        return self.restore(target, target.coordinates(position))

    def start(self, target, y):
        return self.restore(target, y)

    def unknown(self, state: Any) -> Array:
        return state.position

    def coordinates(self, unknown: Array) -> Array:
        return unknown


class SiteKernel(Kernel):
    """A kernel over a position that is a dict of sites; leaves may be integers, and gradients are not needed.

    The state is the unknown: there are no caches to restore.
    """

    extra_fields: ClassVar[tuple[str, ...]] = ("diverging", "potential_energy")

    @abstractmethod
    def site_names(self, target: Target) -> tuple[str, ...]:
        """The sites that this kernel updates."""

    def check(self, target):
        check_names(type(self).__name__, self.site_names(target), site_templates(target))

    def init(self, target, position):
        return jax.tree.map(lambda x, like: jnp.asarray(x, like.dtype), position, target.spec.template)

    def start(self, target, y):
        return self.init(target, target.position(y))

    def unknown(self, state: PyTree) -> PyTree:
        return state

    def restore(self, target, unknown: PyTree) -> PyTree:
        return unknown

    def coordinates(self, unknown: PyTree) -> Array:
        return RavelSpec.of(unknown).ravel(unknown)

    def position(self, target, unknown):
        return unknown


def site_templates(target: Target) -> dict[str, PyTree]:
    """Shapes and dtypes by site.

    Raises:
        TypeError: the position is no dict.
    """
    template = target.spec.template
    if not isinstance(template, dict):
        raise TypeError(f"sites have names: pass the initial position as a dict, got {type(template).__name__}.")
    return template


def check_names(who: str, names: tuple[str, ...], sites: dict[str, PyTree]) -> None:
    """Every name a site, every site named, and once.

    Raises:
        ValueError: expected, got, fix.
    """
    unknown, missing = [n for n in names if n not in sites], [n for n in sites if n not in names]
    repeated = sorted({n for n in names if names.count(n) > 1})
    if unknown:
        raise ValueError(f"{who} updates {unknown}, but the position has sites {list(sites)}: check the names.")
    if repeated:
        raise ValueError(f"{who} updates {repeated} more than once: leave each site to one block.")
    if missing:
        raise ValueError(f"{who} has no update for {missing}, which would never move: add one for each site.")
