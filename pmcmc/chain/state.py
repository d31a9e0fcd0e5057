"""The state from which chains continue, and the user's model that they belong to.

`ChainState` holds everything that later steps need. `Source` keeps the user's model behind a target, so that a later
call can detect changes; `model_source` and `density_source` make one. `header` describes a chain in a file;
`pmcmc.load` reads it.
"""

import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, replace
from importlib.metadata import version
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from pmcmc._pytree import Array, ArrayLeaf, PRNGKey, PyTree, RavelSpec
from pmcmc._xla import default_platform
from pmcmc._xla.compile import plain_jit
from pmcmc._xla.digest import DIGEST_VERSIONS, digest
from pmcmc._xla.trace import Trace, traced_functions
from pmcmc.chain.file_format import Writer
from pmcmc.chain.report import NOT_STORED, SolveReport
from pmcmc.interop.numpyro import numpyro_target
from pmcmc.interop.numpyro_arguments import array_arguments
from pmcmc.interop.numpyro_starts import Prior, discrete_prior
from pmcmc.interop.partial_centring import AutoReparam
from pmcmc.kernels import Kernel
from pmcmc.recurrence import RecurrenceSolver
from pmcmc.stability import Diagnosis
from pmcmc.target import Basis, LogDensity, Model, Supports, Target, WithoutDensity
from pmcmc.warmup.base import LaneTiming


class Described(NamedTuple):
    """Names and data of a model's sites, used to label draws.

    Attributes:
        dims: Names of the leading axes of a site's values, by site.
        observed: Observed data, by site; as they were passed, if an argument of the model holds just these.
        constant: Other arrays among the model's arguments, by argument, as they were passed.
    """

    dims: dict[str, list[str]]
    observed: dict[str, ArrayLeaf]
    constant: dict[str, np.ndarray]


@dataclass(frozen=True)
class Source:
    """The user's model behind a target, so that a later call can tell whether the model has changed.

    Attributes:
        make: Returns the target of the model as it is when this is called.
        target: The target of the model as it was when the run began.
        constant: Array arguments of the model at that time, by name.
        given: The kernel as the user passed it.
        traced: The kernel with its functions as they were when the run began.
        prior: Draws discrete sites where chains start, see `discrete_prior`; None if there are none.
    """

    make: Callable[[], Target]
    target: Target
    constant: dict[str, np.ndarray]
    given: Kernel | None = None
    traced: Kernel | None = None
    prior: Prior | None = None

    def with_kernel(self, kernel: Kernel) -> tuple["Source", Kernel]:
        """Trace the functions in a kernel, and copy the arrays that the user could change.

        Returns:
            This source with the kernel, whose target includes the kernel's context, and the traced kernel.
        """
        target = replace(self.target, context=None)
        traced = jax.tree.map(lambda x: np.array(x) if isinstance(x, np.ndarray) else x, kernel).traced(target)
        target = replace(target, context=traced.context(target))
        return replace(self, target=target, given=kernel, traced=traced), traced

    def check(self) -> None:
        """Raise an error if the model, its data, or functions or arrays in the kernel have changed since the run began.

        Raises:
            ValueError: They have changed; the message says what.
        """
        with warnings.catch_warnings():  # what is said of the model was said when the run began
            warnings.simplefilter("ignore")
            target = self.make()
        now, then = (t.model.content(t.data) for t in (target, self.target))
        if target.spec != self.target.spec or now != then:
            what = "it reads other numbers" if now[0] == then[0] else "it computes something else"
            raise ValueError(
                f"the model has changed since this chain was sampled: {what}. Its draws belong to the earlier model. "
                "Restore the model, its data and the handlers around it, or sample the new model in a separate call."
            )
        if self.given is None:
            return
        again, _ = self.with_kernel(self.given)
        what = "" if again.has_kernel_of(self) else "functions"
        if not what and _arrays(again.traced) != _arrays(self.traced):
            what = "arrays"
        if what:
            raise ValueError(
                f"{what} in the kernel have changed since this chain was sampled: its draws belong to the earlier "
                "kernel. Restore them and what they read, or sample again with the new kernel."
            )

    def has_kernel_of(self, other: "Source") -> bool:
        """Return whether the functions in the two kernels compute the same."""
        return self._functions() == other._functions()

    def _functions(self) -> tuple:
        """Return what the functions in the kernel compute, in a form that can be compared.

        What a whole step computes is found on a stand-in, since the model and its numbers are compared by themselves.
        """
        context = None
        if self.traced is not None and self.target.context is not None:
            stand_in = Target.build(_StandIn(self.target.model.supports), self.target.spec.template, None)
            try:
                context = self.traced.context(stand_in)
            except Exception:  # a kernel of the user's own may read more of the model
                context = self.target.context
        return _operations(context), [fn.content for fn in traced_functions(self.traced)]

    def describe(self, target: Target, position: PyTree) -> Described:
        """Return the names of the sites' dimensions, and the data.

        Args:
            target: The target as tuned by warm-up.
            position: An unconstrained position, at which the model is run.
        """
        observed: dict[str, ArrayLeaf] = dict(target.model.observed(target.data, position))
        constant = dict(self.constant)
        # The model observed them in JAX's precision; they are described in their own.
        for site, y in observed.items():
            if given := [name for name, x in self.constant.items() if _is_in_jax(x, np.asarray(y))]:
                observed[site] = self.constant[given[0]]
            for name in given:
                constant.pop(name, None)
        return Described(target.model.dims, observed, constant)

    def digests(self) -> dict[str, Any]:
        """Return digests of the model, its data and the functions in the kernel, by which a file recognises them.

        Digests of the arguments can be compared on any machine, the others only between equal versions.
        """
        model, numbers = self.target.model.content(self.target.data)
        return {
            "versions": {name: version(name) for name in ("jax", "numpyro")} | DIGEST_VERSIONS,
            "arguments": {name: digest(x) for name, x in self.constant.items()},
            "the model": digest(model),
            "numbers that it reads": digest(numbers),
            "functions in the kernel": digest(self._functions()),
        }


def _is_in_jax(given: np.ndarray, y: np.ndarray) -> bool:
    """Return whether an array of the user's has the values y once it is rounded to JAX's precision."""
    with np.errstate(over="ignore"):
        narrow = given.astype(jax.dtypes.canonicalize_dtype(given.dtype))
    return np.array_equal(narrow, y, equal_nan=True)


def _arrays(kernel: Kernel | None) -> list[bytes]:
    """Return the content of the arrays in a kernel that the user could change."""
    return [leaf.tobytes() for leaf in jax.tree.leaves(kernel) if isinstance(leaf, np.ndarray)]


@dataclass(frozen=True)
class _StandIn(Model):
    """A standard normal density in place of a model's, with the discrete sites of that model."""

    supports: Supports = ()

    def logdensity(self, data, position):
        return -0.5 * jnp.sum(RavelSpec.of(position).ravel(position) ** 2)

    def element_logdensities(self, data, position, site, values):
        return jnp.broadcast_to(-0.5 * values**2, (*position[site].shape, *values.shape))


def _operations(context: Any) -> Any:
    """Return a context in which traces are replaced by the operations that they compute."""
    if isinstance(context, Trace):
        return context.operations
    return tuple(map(_operations, context)) if type(context) is tuple else context


class ChainState(NamedTuple):
    """Where chains are, and everything they need to continue as one long run would.

    ``ensemble``, ``own`` and ``timing`` do not affect later draws.

    Attributes:
        target: The target in the coordinates found by warm-up.
        kernel: The kernel as tuned by warm-up.
        unknown: The kernel's states, leading axis num_chains.
        rng_key: Key of the noise: the noise of step t of chain c is a function of (rng_key, c, t).
        num_steps: Number of steps taken since warm-up.
        num_unkept: Number of steps taken since the last one that thinning kept.
        ensemble: Last states of the lanes of warm-up, from which starts of blocks are guessed.
        own: Numbers of the states in the ensemble where the chains started; shape (num_chains,).
        timing: Time of a step on many lanes, for the planner; None if it was not measured.
        source: The user's model, for checking whether it has changed.
        warmup_remark: What is doubtful about warm-up, for all later reports; see `SolveReport`.
        num_lost_lanes: Number of replaced lanes of warm-up, for all later reports; see `SolveReport`.
        num_lanes: Number of lanes of warm-up, for all later reports; see `SolveReport`.
    """

    target: Target
    kernel: Kernel
    unknown: PyTree
    rng_key: PRNGKey
    num_steps: int
    num_unkept: int
    ensemble: PyTree
    own: np.ndarray
    timing: LaneTiming | None
    source: Source
    warmup_remark: str = ""
    num_lost_lanes: int = 0
    num_lanes: int = 0

    @property
    def scale(self) -> PyTree:
        """The scale of an unknown: `Basis.spread` if it is a vector in a basis, otherwise None (not known)."""
        if self.target.basis is None or len(jax.tree.leaves(self.ensemble)) > 1:
            return None
        spread = 1 if self.target.basis.spread is None else np.asarray(self.target.basis.spread)
        return jax.tree.map(lambda x: np.full(x.shape[1:], spread, x.dtype), self.ensemble)


def header(
    writer: Writer,
    state: ChainState,
    report: SolveReport,
    thinning: int,
    solver: RecurrenceSolver | None,
    extra_fields: Sequence[str],
) -> dict[str, Any]:
    """Return what a file says about a chain besides its draws; `pmcmc.load` reads it.

    Args:
        writer: Writer of the file, to which the arrays go.
        state: State of the chains.
        report: The report.
        thinning: Every ``thinning``-th step was kept.
        solver: The solver that was asked for; None for "auto".
        extra_fields: Names that `Chain.get_extra_fields` returns.

    Returns:
        Entries that JSON can hold.
    """
    target = state.target
    for name, tree in {
        "unknown": state.unknown,
        "ensemble": state.ensemble,
        "own": state.own,
        "key": jax.random.key_data(state.rng_key),
    }.items():
        writer.leaves(name, tree)
    told = {f.name: getattr(report, f.name) for f in fields(report) if f.name not in NOT_STORED}
    told["stored_diagnosis"] = _diagnosis(report)
    centred = {"centredness": writer.encode("centredness", target.centredness)} if target.centredness else {}
    return {
        **centred,
        "is_model": not isinstance(target.model, (LogDensity, WithoutDensity)),
        "sites": describe_sites(target),
        "position": writer.encode("position", jax.tree.map(lambda x: np.zeros(x.shape, x.dtype), target.spec.template)),
        "basis": writer.encode("basis", target.basis and _parts(target.basis)),
        "kernel": writer.encode("kernel", state.kernel),
        "solver": writer.encode("solver", _anywhere(solver)),
        "report": writer.encode("report", told),
        "logdensity": last_logdensity(state).tolist(),
        "key_impl": str(jax.random.key_impl(state.rng_key)),
        "timing": None if state.timing is None else [default_platform(), *state.timing],
        "digests": state.source.digests(),
        "num_steps": state.num_steps,
        "num_unkept": state.num_unkept,
        "thinning": thinning,
        "extra_fields": list(extra_fields),
    }


def _diagnosis(report: SolveReport) -> Diagnosis | None:
    """Return the diagnosis; None if a program of it fails, which must not keep the draws from being stored."""
    try:
        return report.diagnosis
    except jax.errors.JaxRuntimeError:
        return None


def _parts(basis: Basis) -> dict[str, Any]:
    """Return the arrays of a basis by name."""
    return {f.name: getattr(basis, f.name) for f in fields(basis) if getattr(basis, f.name) is not None}


def _anywhere(solver: RecurrenceSolver | None) -> RecurrenceSolver | None:
    """Return the solver without its devices, which a file cannot hold and another machine does not have."""
    return None if solver is None else solver.with_devices(None)


def describe_sites(target: Target) -> dict[str, list]:
    """Return shape and dtype of every leaf of the target's positions, by its path."""
    leaves = jax.tree_util.tree_leaves_with_path(target.spec.template)
    return {jax.tree_util.keystr(path): [list(x.shape), str(x.dtype)] for path, x in leaves}


@plain_jit()
def _logdensity(target: Target, kernel: Kernel, unknown: PyTree) -> Array:
    """Compute the log densities of unknowns with one leading axis."""
    return jax.vmap(lambda x: target.model.logdensity(target.data, kernel.position(target, x)))(unknown)


def last_logdensity(state: ChainState) -> np.ndarray:
    """Return the log densities where the chains are; shape (num_chains,)."""
    return np.asarray(_logdensity(state.target, state.kernel, state.unknown), float)


def model_source(model: Callable, model_args: tuple, model_kwargs: dict, reparam: AutoReparam | None = None) -> Source:
    """Return the source of a NumPyro model with its current arguments."""
    make = lambda: numpyro_target(model, model_args, model_kwargs, reparam)
    target = make()
    prior = discrete_prior(model, model_args, model_kwargs, target.model.supports)
    return Source(make, target, array_arguments(model, model_args, model_kwargs), prior=prior)


def density_source(logdensity_fn: Callable | None, position: PyTree) -> Source:
    """Return the source of a log density over pytrees like ``position``, as it is now."""
    target = Target.from_logdensity(logdensity_fn, position)
    return Source(lambda: Target.from_logdensity(logdensity_fn, target.spec.template), target, {})
