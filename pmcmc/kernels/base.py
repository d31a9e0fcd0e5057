"""The interface of a Markov kernel: a deterministic map of a state and pre-drawn noise.

A `Kernel` writes one step of a Markov chain as ``state' = step(target, state, noise)``. If the noise of every step is
drawn first, from a key of that step, the chain is the deterministic recurrence

    x[t] = f(x[t-1], noise[t]),    t = 1..T,

and solvers can evaluate it in parallel across t. The unknown x is the dynamic state without caches such as the log
density and its gradient (`Kernel.unknown`, `Kernel.restore`). `Info` reports what happened in a step. `PositionKernel`
is the base of kernels whose unknown is a vector, `SiteKernel` that of kernels over named sites.

Source: Zoltowski et al. (2025).
"""

import abc
from abc import abstractmethod
from collections.abc import Callable, Hashable
from dataclasses import fields, is_dataclass, replace
from typing import Any, ClassVar, NamedTuple

import jax
import jax.numpy as jnp

from pmcmc._arguments import known_number
from pmcmc._pytree import Array, ArrayLeaf, PRNGKey, PyTree, RavelSpec, Scalar, is_real
from pmcmc._xla.trace import trace
from pmcmc.random.streams import IMPL
from pmcmc.recurrence import Recurrence
from pmcmc.target import Target

# Fields that warm-up looks at if a kernel has them, see `Kernel.tunables`.
TUNABLES = ("step_size", "num_integration_steps", "inverse_mass_matrix")


class Info(NamedTuple):
    """Diagnostics of one step of a kernel.

    Attributes:
        acceptance_rate: Acceptance probability min(1, alpha); NaN if the kernel has none.
        is_divergent: Whether the proposal was NaN or +inf, or lost more than 1,000 units of log density (energy).
        margin: log alpha - log u, with u the uniform that decides. The proposal is accepted if the margin is positive;
            within rounding of zero the decision is a near tie. For discrete values drawn by inverse CDF, the distance
            of u to the nearest step of the CDF; without a log density it is divided by the size of the largest logit,
            at least 1. NaN if the kernel does not report it, inf if the step makes no decision; near ties are then not
            counted.
        logdensity: Log density of the new state.
        energy: Potential plus kinetic energy of the state that was kept, as in NumPyro and Stan; None for kernels
            without momentum.
        num_integration_steps: Number of leapfrog steps taken if it is drawn, otherwise None.
        tree_depth: Number of doublings of the trajectory for NUTS, otherwise None.
    """

    acceptance_rate: Array
    is_divergent: Array
    margin: Array
    logdensity: Array
    energy: Array | None = None
    num_integration_steps: Array | None = None
    tree_depth: Array | None = None


def near_tie_bound(info: Info) -> Array:
    """Return the largest ``|margin|`` at which rounding can change the decision.

    log alpha is a difference of log densities and carries a few rounding errors of their size. If the log density is
    NaN (not reported) or infinite, its size is taken to be at most one; margins of discrete draws are then in units of
    the size of their logits. Decisions that a merge within the tolerance moves are not covered: see "Merge tolerance"
    in docs/trust.md.
    """
    size = jnp.where(jnp.isfinite(info.logdensity), jnp.abs(info.logdensity), 1)
    return 4 * jnp.finfo(info.margin.dtype).eps * jnp.maximum(1.0, size)


class Kernel(abc.ABC):
    """Base class of Markov kernels ``state' = step(target, state, noise)``, which draw all randomness first.

    With the noise of every step drawn from its own key, the chain is a deterministic recurrence, which a solver may
    evaluate in any order. A kernel is a frozen dataclass and a pytree: numbers such as a step size are leaves.
    """

    # Fields that `Chain.get_extra_fields` can return, under NumPyro's names.
    extra_fields: ClassVar[tuple[str, ...]] = ("diverging", "accept_prob", "potential_energy")

    @abc.abstractmethod
    def init(self, target: Target, position: PyTree) -> Any:
        """Return the state at a position.

        Args:
            target: Target to sample.
            position: The user's unconstrained pytree.

        Returns:
            The kernel's state, caches included.
        """

    @abc.abstractmethod
    def sample_noise(self, rng_key: PRNGKey, target: Target) -> PyTree:
        """Draw all randomness of one step.

        Args:
            rng_key: Key of this step.
            target: Target to sample.

        Returns:
            The noise of one step, a pytree.
        """

    @abc.abstractmethod
    def step(self, target: Target, state: Any, noise: PyTree) -> tuple[Any, Info]:
        """Take one step.

        The step is deterministic, and works under `jax.jit`, `jax.vmap` and forward-mode differentiation.

        Args:
            target: Target to sample.
            state: State as returned by `init`, `restore` or an earlier step.
            noise: Noise of one step, from `sample_noise`.

        Returns:
            The new state and the `Info` of the step.
        """

    @abc.abstractmethod
    def unknown(self, state: Any) -> PyTree:
        """Return the dynamic state without caches, which is what solvers solve for, compare and store."""

    @abc.abstractmethod
    def restore(self, target: Target, unknown: PyTree) -> Any:
        """Rebuild a state, with caches such as the log density and its gradient; the inverse of `unknown`."""

    @abc.abstractmethod
    def coordinates(self, unknown: PyTree) -> Array:
        """Return the target's coordinates within an unknown; shape (D,)."""

    def discrete(self, unknown: PyTree) -> PyTree:
        """Return for each leaf of an unknown whether its values are discrete, and may well stay the same for long.

        By default those that are not floating.
        """
        return jax.tree.map(lambda x: not is_real(x), unknown)

    def check(self, target: Target) -> None:
        """Raise an error if this kernel cannot sample the target; called once, before anything else.

        Raises:
            TypeError: The target has no log density, or a leaf of the position is not floating, and the kernel needs
                them.
            ValueError: The kernel's settings do not fit the target.
        """
        if not target.model.has_density:
            raise TypeError(f"{type(self).__name__} needs a log density: pass logdensity_fn, not None.")
        target.check_real()

    def check_start(self, target: Target, position: PyTree) -> None:
        """Raise an error if what the user declared about the target is wrong at a position; called once, after `check`.

        Args:
            target: Target to sample.
            position: The user's unconstrained pytree.

        Raises:
            ValueError: The declaration that does not hold.
        """
        return None

    def traced(self, target: Target) -> "Kernel":
        """Return this kernel with its user functions replaced by their current traces (see `pmcmc._xla.trace`).

        A kernel that keeps its functions as they were given is identified by `context` instead.
        """
        return self

    def context(self, target: Target) -> Hashable:
        """Return what compiled programs of this kernel depend on besides its fields.

        A program is reused as long as this value is equal. For a kernel defined outside pmcmc, or with such a part,
        this is the trace of a whole step, with the content of every array that it reads. None for the kernels of pmcmc,
        whose steps depend on their fields, the target, the state and the noise alone.
        """
        return None if is_of_pmcmc(self) else step_content(self, target)

    def position(self, target: Target, unknown: PyTree) -> PyTree:
        """Return the user's unconstrained position within an unknown."""
        return target.position(self.coordinates(unknown))

    def nudge(self, noise: PyTree, amount: Array) -> PyTree:
        """Return the noise with ``amount`` added to the variables that decide, on the scale of `Info.margin`.

        This flips near ties and changes nothing else, so it shows whether they matter. A kernel that reports no margin
        returns the noise unchanged.

        Args:
            noise: Noise of one step.
            amount: Shift of these variables.

        Returns:
            Noise for `step`.
        """
        return noise

    @property
    def tunables(self) -> dict[str, Any]:
        """The fields that warm-up looks at, by name: those of `TUNABLES` that the kernel has.

        A ``step_size`` of None is tuned. An ``inverse_mass_matrix`` becomes part of the basis, and in it the kernel has
        None, the identity. ``num_integration_steps`` is left to `finalize`; only `ChEESAdaptation` sets that of `HMC`.
        """
        return {name: getattr(self, name) for name in TUNABLES if hasattr(self, name)}

    @property
    def metric(self) -> ArrayLeaf | None:
        """The inverse mass matrix that the user gave to the kernel; None if there is none."""
        return self.tunables.get("inverse_mass_matrix")

    def without_metric(self) -> "Kernel":
        """Return the kernel without its inverse mass matrix, which warm-up makes the basis of the target."""
        if self.metric is None:
            return self
        changes: dict[str, Any] = {"inverse_mass_matrix": None}
        return replace(self, **changes)  # type: ignore[type-var]

    def tuned_by(self) -> "Kernel":
        """Return the kernel that warm-up runs to tune the step size of this one: itself, or one of shorter programs.

        Its unknowns must have the same form.
        """
        return self

    def at_most(self, num_steps: Scalar) -> "Kernel":
        """Return the kernel with trajectories of at most ``num_steps`` leapfrog steps.

        Called while a program is traced. Exploration, which runs `HMC`, sets a limit; tuning sets none.
        """
        return self

    def finalize(self) -> "Kernel":
        """Return the kernel with all that follows from its step size fixed; called before sampling."""
        return self

    def unkept(self, tuned: "Kernel") -> str:
        """Return a sentence on settings of this kernel that the tuned and finalized one does not keep; "" for none."""
        return ""

    @property
    def may_resonate(self) -> bool:
        """Whether all steps are trajectories of one length, which a posterior may have as a period."""
        return False

    @property
    def divergences_matter(self) -> bool:
        """Whether a divergence is a fault. It is none if proposals may be far off by design, as in a random walk."""
        return True

    @property
    def decides_once(self) -> bool:
        """Whether a step makes at most one decision, so that near a tie of it rounding has two outcomes.

        If not, `Info.margin` is that of the decision nearest to a tie, and each decision may fall by itself.
        """
        return True

    @property
    def uses_gradient(self) -> bool:
        """Whether a step evaluates the gradient of the log density, which must then be finite where chains start."""
        return True

    def takes_leapfrogs(self, target: Target) -> bool:
        """Whether the step size is that of leapfrog steps, whose number the kernel then reports as ``num_steps``."""
        return "num_steps" in self.extra_fields

    @property
    def is_tuned(self) -> bool:
        """Whether the kernel can step without warm-up."""
        return self.tunables.get("step_size", 0.0) is not None

    @property
    def takes_basis(self) -> bool:
        """Whether the kernel can work in the whitened coordinates of warm-up."""
        return True

    def target_acceptance_rate(self, dim: int) -> float:
        """Return the mean acceptance rate to which warm-up tunes the step size; 0.8 by default, as in Stan."""
        return 0.8

    def first_step_size(self, dim: int) -> float:
        """Return the step size at which tuning starts, in whitened coordinates.

        By default 0.8 D^(-1/4), the optimal scaling of HMC.
        """
        return 0.8 * dim ** (-1 / 4)

    def final_step_size(self, step_size: Array) -> Array:
        """Return the step size to sample with, given that at which tuning ended; the same by default."""
        return step_size

    def start(self, target: Target, y: Array) -> Any:
        """Return the state at the target's coordinates y; shape (D,)."""
        return self.init(target, target.position(y))

    def with_step_size(self, step_size: Scalar) -> "Kernel":
        """Return the same kernel with another step size; for kernels that have an attribute ``step_size``."""
        changes: dict[str, Any] = {"step_size": step_size}
        return replace(self, **changes)  # type: ignore[type-var]

    def transition(self, target: Target) -> Recurrence:
        """Return the recurrence ``x[t] = f(x[t-1], noise[t])`` of this kernel on a target."""
        step: Callable = lambda state, noise: self.step(target, state, noise)
        return Recurrence(step, self.unknown, lambda unknown: self.restore(target, unknown))


def is_of_pmcmc(part: Any) -> bool:
    """Whether a kernel or solver has no part of the user's own: a dataclass, or of a class derived from pmcmc's."""
    if isinstance(part, (tuple, list)):
        return all(map(is_of_pmcmc, part))
    package = __name__.split(".")[0]
    own = type(part).__module__.split(".")[0] == package
    if not is_dataclass(part):
        return own or not any(base.__module__.split(".")[0] == package for base in type(part).__mro__)
    return own and all(is_of_pmcmc(getattr(part, f.name)) for f in fields(part))


def step_content(kernel: Kernel, target: Target) -> Hashable:
    """Return what the noise and step of a kernel compute: their operations, and the arrays that they read.

    The kernel's own numbers do not count: they are arguments of every program.
    """
    if not kernel.is_tuned:
        kernel = kernel.with_step_size(1.0)

    def whole(kernel: Kernel, target: Target, position: PyTree, rng_key: PRNGKey) -> PyTree:
        noise, state = kernel.sample_noise(rng_key, target), kernel.init(target, position)
        return kernel.step(target, kernel.restore(target, kernel.unknown(state)), noise)

    return trace(whole, kernel, target, target.spec.template, jax.random.key(0, impl=IMPL)).content


def higher_rate(rate: float) -> float:
    """Return an acceptance rate with a quarter of the rejections, to suggest where steps are too large."""
    return 1 - (1 - rate) / 4


def check_step_size(step_size: Any) -> None:
    """Raise an error if a step size is a number that is not positive; None and arrays pass.

    Raises:
        ValueError: It is.
        TypeError: It is a boolean.
    """
    number = known_number("step_size", step_size)
    if number is not None and not number > 0:
        raise ValueError(f"step_size must be positive, got {step_size}.")


class PositionKernel(Kernel):
    """Base class of kernels whose unknown is the field ``position`` of their state; all other fields are caches."""

    def init(self, target, position):
        return self.restore(target, target.coordinates(position))

    def start(self, target, y):
        return self.restore(target, y)

    def unknown(self, state: Any) -> Array:
        return state.position

    def coordinates(self, unknown: Array) -> Array:
        return unknown


class SiteKernel(Kernel):
    """Base class of kernels over a position that is a dict of sites.

    Leaves may be integers, and gradients are not needed. The state is the unknown: there are no caches to restore.
    """

    extra_fields: ClassVar[tuple[str, ...]] = ("diverging", "potential_energy")

    @property
    def uses_gradient(self):
        return False

    @abstractmethod
    def site_names(self, target: Target) -> tuple[str, ...]:
        """Return the names of the sites that this kernel updates."""

    @property
    def decides_once(self):
        return False

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
    """Return the shapes and dtypes of the position, by site.

    Raises:
        TypeError: The position is not a dict.
    """
    template = target.spec.template
    if not isinstance(template, dict):
        raise TypeError(f"sites have names: pass the initial position as a dict, got {type(template).__name__}.")
    return template


def check_names(who: str, names: tuple[str, ...], sites: dict[str, PyTree]) -> None:
    """Check that the names are exactly the sites of the position, each of them once.

    Args:
        who: Class name of the kernel, for the messages.
        names: Sites that the kernel updates.
        sites: Shapes and dtypes of the position, by site.

    Raises:
        ValueError: A name is not a site, or is repeated, or a site has no update.
    """
    unknown, missing = [n for n in names if n not in sites], [n for n in sites if n not in names]
    repeated = sorted({n for n in names if names.count(n) > 1})
    if unknown:
        raise ValueError(f"{who} updates {unknown}, but the position has sites {list(sites)}: check the names.")
    if repeated:
        raise ValueError(f"{who} updates {repeated} more than once: name each site once.")
    if missing:
        raise ValueError(f"{who} has no update for {missing}, which would never change: add one for each site.")
