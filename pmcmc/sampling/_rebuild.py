"""Chains out of what files say of them, and of the model that the user gives again."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from pmcmc._jit import default_platform
from pmcmc._state import ChainState, Source, describe_sites, last_logdensity
from pmcmc._storage import Reader
from pmcmc._types import PyTree
from pmcmc.kernels import Kernel
from pmcmc.recurrence import RecurrenceSolver
from pmcmc.report import SolveReport
from pmcmc.sampling._source import density_source, model_source
from pmcmc.target import Basis, Target
from pmcmc.warmup._base import LaneTiming


def read_report(reader: Reader) -> SolveReport:
    """Without its plan."""
    return SolveReport(**reader.decode("report", reader.header["report"]), plan=None)


def rebuild(
    reader: Reader,
    model: Callable | None,
    model_args: tuple,
    model_kwargs: dict | None,
    initial_position: PyTree,
    kernel: Kernel | None,
    solver: RecurrenceSolver | None,
) -> tuple[ChainState, RecurrenceSolver | None]:
    """Where the chains of a file stand, and the solver that they were made with; arguments as of `load`.

    Raises:
        ValueError, TypeError: see `load`.
    """
    header = reader.header
    if header["is_model"]:
        if model is None:
            raise TypeError(f"{reader.path} is a chain of a NumPyro model: pass that model, got None.")
        source = model_source(model, model_args, {} if model_kwargs is None else model_kwargs)
    else:
        source = density_source(model, reader.decode("initial_position", header["position"], initial_position))
    _check_sites(reader, source.target)
    _check_class("kernel", header["kernel"], kernel)
    _check_class("solver", header["solver"], solver)
    as_leaf = lambda x: jnp.asarray(x) if isinstance(x, np.ndarray) else x
    source, kernel = source.with_kernel(jax.tree.map(as_leaf, reader.decode("kernel", header["kernel"], kernel)))
    state = _state(reader, source, kernel)
    _check_digests(reader, source)
    _check_density(reader, state)
    return state, reader.decode("solver", header["solver"], solver)


def _state(reader: Reader, source: Source, kernel: Kernel) -> ChainState:
    header, target = reader.header, source.target
    basis = reader.decode("basis", header["basis"])
    if basis is not None:
        target = target.with_basis(Basis(jnp.asarray(basis["loc"]), jnp.asarray(basis["scale"])))
    template = jax.eval_shape(lambda x: kernel.unknown(kernel.init(target, x)), target.spec.template)
    arrays = lambda name: jax.tree.map(jnp.asarray, reader.leaves(name, template))
    timing = None
    if header["timing"] is not None and header["timing"][0] == default_platform():
        timing = LaneTiming(*header["timing"][1:])
    return ChainState(
        target,
        kernel,
        arrays("unknown"),
        jax.random.wrap_key_data(jnp.asarray(reader.leaves("key", 0)), impl=header["key_impl"]),
        header["num_steps"],
        header["num_unkept"],
        arrays("ensemble"),
        reader.leaves("own", 0),
        timing,
        source,
    )


def _check_class(name: str, stored: Any, given: Any) -> None:
    if given is not None and isinstance(stored, dict) and stored.get("kind", stored.get("gap")) != type(given).__name__:
        raise ValueError(
            f"this chain was made with the {name} {stored.get('kind', stored.get('gap'))}, got {type(given).__name__}: "
            "pass the same again, or none where the file has all of it."
        )


def _check_sites(reader: Reader, target: Target) -> None:
    stored, found = reader.header["sites"], describe_sites(target)
    if stored == found:
        return
    if {name: shape for name, (shape, _) in stored.items()} == {name: shape for name, (shape, _) in found.items()}:
        raise ValueError(
            f"{reader.path} was sampled in {sorted({d for _, d in stored.values()})} and the model now is in "
            f"{sorted({d for _, d in found.values()})}: set jax's jax_enable_x64 as it was, before anything else."
        )
    differing = sorted(set(stored) ^ set(found)) or [name for name in stored if stored[name] != found[name]]
    raise ValueError(
        f"the model's sites are not those of {reader.path}. They differ at {', '.join(differing)}: expected "
        f"{ {name: stored.get(name) for name in differing} }, got { {name: found.get(name) for name in differing} }. "
        "Pass the model and the arguments that the chain was made with."
    )


def _check_digests(reader: Reader, source: Source) -> None:
    """Data and model, as far as they can be compared: another version of JAX may trace the same model otherwise."""
    stored, found = reader.header.get("digests"), source.digests()
    if stored is None:  # of an older pmcmc
        return
    differing = [f"argument {name!r}" for name, x in stored["arguments"].items() if found["arguments"].get(name) != x]
    if stored["versions"] == found["versions"] and not differing:
        differing = [
            what
            for what in ("the model", "numbers that it reads", "functions in the kernel")
            if stored[what] != found[what]
        ]
    if differing:
        raise ValueError(
            f"{reader.path} was sampled with something else: {', '.join(differing)} differ. Pass the model, its "
            "arguments and data, and the kernel, as they were."
        )


def _check_density(reader: Reader, state: ChainState) -> None:
    """Another machine rounds differently; other data or another model are far further away."""
    stored, found = np.asarray(reader.header["logdensity"]), last_logdensity(state)
    tolerance = np.sqrt(np.finfo(np.float32).eps) * np.maximum(1.0, np.abs(stored))
    if np.any(np.abs(stored - found) > tolerance) or np.any(np.isnan(stored) != np.isnan(found)):
        raise ValueError(
            f"the model's log density where the chains stood last is {found}, and was {stored} when {reader.path} was "
            "saved: pass the model, its arguments and data as they were."
        )
