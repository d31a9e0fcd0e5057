"""Where chains stand, and what a file says of them."""

from collections.abc import Sequence
from dataclasses import fields
from typing import Any, NamedTuple

import jax
import numpy as np

from pmcmc._jit import default_platform
from pmcmc._storage import Writer
from pmcmc._types import Array, PRNGKey, PyTree
from pmcmc.kernels import Kernel
from pmcmc.recurrence import RecurrenceSolver
from pmcmc.report import SolveReport
from pmcmc.target import LogDensity, Target, WithoutDensity
from pmcmc.warmup._base import LaneTiming


class ChainState(NamedTuple):
    """Where chains stand, and all they need to go on as one long run would.

    target, kernel: as tuned by warm-up.
    unknown: the kernel's state, leading axis num_chains.
    rng_key: of the noise: that of step t of chain c is a function of (rng_key, c, t).
    num_steps: taken since warm-up. num_unkept: of these, those behind the last one that thinning kept.
    ensemble: last unknowns of warm-up, from which block starts are guessed. own: (num_chains,) those where the chains
        started. timing: of a step on many lanes, for the planner. None of the three changes a draw.
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


def header(
    writer: Writer,
    state: ChainState,
    report: SolveReport,
    thinning: int,
    solver: RecurrenceSolver | None,
    extra_fields: Sequence[str],
) -> dict[str, Any]:
    """What a file says of a chain beside its draws; arrays go to the writer. `pmcmc.load` is the other half."""
    target = state.target
    for name, tree in {
        "unknown": state.unknown,
        "ensemble": state.ensemble,
        "own": state.own,
        "key": jax.random.key_data(state.rng_key),
    }.items():
        writer.leaves(name, tree)
    names = [f.name for f in fields(report) if f.name not in ("plan", "find_diagnosis")]
    return {
        "is_model": not isinstance(target.model, (LogDensity, WithoutDensity)),
        "sites": describe_sites(target),
        "position": writer.encode("position", jax.tree.map(lambda x: np.zeros(x.shape, x.dtype), target.spec.template)),
        "basis": writer.encode("basis", target.basis and {"loc": target.basis.loc, "scale": target.basis.scale}),
        "kernel": writer.encode("kernel", state.kernel),
        "solver": writer.encode("solver", _anywhere(solver)),
        "report": writer.encode("report", {name: getattr(report, name) for name in names}),
        "logdensity": last_logdensity(state).tolist(),
        "key_impl": str(jax.random.key_impl(state.rng_key)),
        "timing": None if state.timing is None else [default_platform(), *state.timing],
        "num_steps": state.num_steps,
        "num_unkept": state.num_unkept,
        "thinning": thinning,
        "extra_fields": list(extra_fields),
    }


def _anywhere(solver: RecurrenceSolver | None) -> RecurrenceSolver | None:
    """Without devices, which a file cannot hold and another machine does not have."""
    return None if solver is None else solver.with_devices(None)


def describe_sites(target: Target) -> dict[str, list]:
    """Shape and dtype of every leaf of the target's positions, by its place."""
    leaves = jax.tree_util.tree_leaves_with_path(target.spec.template)
    return {jax.tree_util.keystr(path): [list(x.shape), str(x.dtype)] for path, x in leaves}


@jax.jit
def _logdensity(target: Target, kernel: Kernel, unknown: PyTree) -> Array:
    return jax.vmap(lambda x: target.model.logdensity(target.data, kernel.position(target, x)))(unknown)


def last_logdensity(state: ChainState) -> np.ndarray:
    """(num_chains,) log densities where the chains stand."""
    return np.asarray(_logdensity(state.target, state.kernel, state.unknown))
