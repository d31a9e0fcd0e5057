"""Read chains from files: the inverse of `Chain.save`.

`load` reads a chain with all its draws. `rebuild`, `read_report`, `read_thinning` and `check_num_draws` are shared with
`pmcmc.resume`. No code is stored, so the user passes the model again, and it is compared with what the file says about
it.
"""

import re
import warnings
from collections.abc import Callable
from dataclasses import MISSING, fields, replace
from functools import partial
from pathlib import Path
from types import NoneType
from typing import Any, get_type_hints

import jax
import jax.numpy as jnp
import numpy as np

from pmcmc._pytree import PRNGKey, PyTree, is_real
from pmcmc._warnings import user_level
from pmcmc._xla import default_platform
from pmcmc._xla.trace import refuse_transformation
from pmcmc.chain.chain import Chain
from pmcmc.chain.draws import judge_mixing
from pmcmc.chain.file_format import Reader
from pmcmc.chain.report import BY_PAIR, NOT_STORED, SolveReport
from pmcmc.chain.state import ChainState, Source, density_source, describe_sites, last_logdensity, model_source
from pmcmc.interop.partial_centring import AutoReparam
from pmcmc.kernels import Kernel
from pmcmc.kernels.gibbs import with_discrete_sites
from pmcmc.random.streams import IMPL, threefry_key
from pmcmc.recurrence import RecurrenceSolver
from pmcmc.target import Basis, Target
from pmcmc.warmup.base import LaneTiming


def read_report(reader: Reader, state: ChainState) -> tuple[ChainState, SolveReport]:
    """Read the report, which has no plan.

    Returns:
        The state with the remarks on warm-up that the report holds, and the report.
    """
    found = reader.decode("report", reader.field("report", dict))
    stored = [f for f in fields(SolveReport) if f.name not in NOT_STORED]
    if not isinstance(found, dict) or not {f.name for f in stored if f.default is MISSING} <= set(found):
        raise reader.malformed("its report is not whole")
    if strange := set(found) - {f.name for f in stored}:
        raise reader.malformed(f"report and {min(strange)}")
    reader.check_types(found, SolveReport)
    hints = get_type_hints(SolveReport)
    for name, x in found.items():
        if hints[name] is not np.ndarray:
            continue
        if x.ndim != 1 or (len(x) != len(state.own) and name not in BY_PAIR):
            raise reader.malformed(f"report and {name}")
    report = SolveReport(**found, plan=None)
    remarks = {name: getattr(report, name) for name in ("warmup_remark", "num_lost_lanes", "num_lanes")}
    return state._replace(**remarks), report


def read_thinning(reader: Reader, state: ChainState) -> int:
    """Read the number of steps per kept draw."""
    thinning = reader.field("thinning", int, least=1)
    if state.num_unkept >= thinning:
        raise reader.malformed(f"num_unkept is {state.num_unkept} with thinning {thinning}")
    return thinning


def check_num_draws(reader: Reader, state: ChainState, num_draws: int, thinning: int) -> None:
    """Raise an error if the draws need more steps than the chains have taken."""
    if num_draws * thinning + state.num_unkept > state.num_steps:
        raise reader.malformed(f"num_steps is {state.num_steps} and there are {num_draws} draws")


def rebuild(
    reader: Reader,
    model: Callable | None,
    model_args: tuple,
    model_kwargs: dict | None,
    initial_position: PyTree,
    kernel: Kernel | None,
    solver: RecurrenceSolver | None,
) -> tuple[ChainState, RecurrenceSolver | None]:
    """Rebuild the state of chains from a file and the user's model.

    Args:
        reader: The file.
        model: See `load`, as for all other arguments.
        model_args: Positional arguments of the model.
        model_kwargs: Keyword arguments of the model.
        initial_position: Position of a log density.
        kernel: Kernel with the parts that are not stored.
        solver: Solver with the parts that are not stored.

    Returns:
        The state of the chains, and the solver that they were made with.

    Raises:
        ValueError: See `load`.
        TypeError: See `load`.
    """
    _check_described(reader)
    stored = {name: reader.field(name, dict, NoneType) for name in ("kernel", "solver")}
    position = reader.decode("initial_position", reader.field("position", dict), initial_position)
    centredness = _centredness(reader)
    if reader.field("is_model", bool):
        if model is None:
            raise TypeError(f"{reader.path} is a chain of a NumPyro model: pass that model, got None.")
        reparam = AutoReparam() if centredness else None
        source = model_source(model, model_args, {} if model_kwargs is None else model_kwargs, reparam)
    else:
        source = density_source(model, position)
    _check_sites(reader, source.target)
    source = _centred(reader, source, centredness)
    basis = _basis(reader, source.target)
    kernel = with_discrete_sites(kernel, source.target) if isinstance(kernel, Kernel) else kernel
    _check_class("kernel", stored["kernel"], kernel)
    _check_class("solver", stored["solver"], solver)
    given, as_leaf = kernel, lambda x: jnp.asarray(x) if isinstance(x, np.ndarray) else x
    kernel = jax.tree.map(as_leaf, reader.decode("kernel", stored["kernel"], kernel))
    solver = reader.decode("solver", stored["solver"], solver)
    try:
        template = _check_parts(source.target.with_basis(basis), kernel, solver)
    except Exception as error:  # a kernel that no constructor would have made may fail in any way
        _check_given(reader, source.target.with_basis(basis), given)
        raise reader.malformed(error) from error
    source, kernel = source.with_kernel(kernel)
    if given is not None:  # what a part of the user's own computes was recorded of the kernel before it was tuned
        source, _ = source.with_kernel(given)
    state = _state(reader, source, kernel, basis, template)
    _check_digests(reader, source)
    _check_density(reader, state)
    return state, solver


def _check_described(reader: Reader) -> None:
    """Check the file's description of the sites, and that its stored position agrees with it."""
    sites = reader.field("sites", dict)
    for name, said in sites.items():
        match said:
            case [list(shape), str()] if all(type(n) is int and n >= 0 for n in shape):
                continue
        raise reader.malformed(f"site {name} is {said!r:.40}")
    position = reader.field("position", dict)
    if not _is_plain(position):
        return  # it holds objects of the user's own classes, which are passed again
    found = jax.tree_util.tree_leaves_with_path(reader.decode("initial_position", position))
    if {jax.tree_util.keystr(path): [list(np.shape(x)), str(np.asarray(x).dtype)] for path, x in found} != sites:
        raise reader.malformed("its position is not that of its sites")


def _is_plain(stored: Any) -> bool:
    """Return whether what `Writer.encode` returned contains only arrays in containers."""
    if not isinstance(stored, dict) or "array" in stored:
        return isinstance(stored, dict)
    items = stored.get("items")
    if stored.get("kind") not in ("dict", "tuple", "list") or not isinstance(items, dict):
        return False
    return all(_is_plain(item) for item in items.values())


def _centredness(reader: Reader) -> dict[str, np.ndarray]:
    """Read the centredness of partially centred sites; empty if there are none."""
    if "centredness" not in reader.header:
        return {}
    found = reader.decode("centredness", reader.field("centredness", dict))
    within = lambda c: isinstance(c, np.ndarray) and is_real(c) and bool(np.all((c >= 0) & (c <= 1)))
    if not isinstance(found, dict) or not all(map(within, found.values())):
        raise reader.malformed("its centredness is not within 0 and 1")
    return found


def _centred(reader: Reader, source: Source, centredness: dict[str, np.ndarray]) -> Source:
    """Return the source with the centredness that the file has, if its sites are those of the model."""
    sites = centredness, source.target.centredness
    stored, found = ({name: c.shape for name, c in each.items()} for each in sites)
    if stored != found:
        raise ValueError(
            f"{reader.path} has the partially centred sites {stored}, and the model {found}: pass the model as it was."
        )
    return replace(source, target=source.target.with_centredness(centredness))


def _basis(reader: Reader, target: Target) -> Basis | None:
    """Read the basis found by warm-up; None if there was none."""
    found = reader.decode("basis", reader.field("basis", dict, NoneType))
    if found is None:
        return None
    dim, dtype = target.dim, target.spec.dtype
    shapes = {"loc": [(dim,)], "scale": [(dim,), (dim, dim)], "spread": [(dim,)]}
    is_basis = isinstance(found, dict) and {"loc", "scale"} <= set(found) <= set(shapes)
    if not is_basis or any(np.shape(x) not in shapes[name] for name, x in found.items()):
        raise reader.malformed("its basis is not that of its sites")
    if any(getattr(x, "dtype", None) != dtype for x in found.values()):
        raise reader.malformed(f"its basis is not {dtype}")
    return Basis(**jax.tree.map(jnp.asarray, found))


def _check_parts(target: Target, kernel: Any, solver: Any) -> PyTree:
    """Trace one step, and return the shapes of an unknown. Errors of the kernel or the solver are raised here."""
    if not isinstance(kernel, Kernel) or not kernel.is_tuned:
        raise ValueError(f"its kernel is {type(kernel).__name__}")
    if solver is not None:
        if not isinstance(solver, RecurrenceSolver):
            raise ValueError(f"its solver is {type(solver).__name__}")
        getattr(solver, "__post_init__", lambda: None)()
    template = jax.eval_shape(lambda x: kernel.unknown(kernel.init(target, x)), target.spec.template)
    after, _ = _record_shapes(target, kernel, template)
    if jax.tree.map(lambda x: x.shape, after) != jax.tree.map(lambda x: x.shape, template):
        raise ValueError("its kernel changes the shape of its state")
    return template


def _check_given(reader: Reader, target: Target, kernel: Any) -> None:
    """Raise what a kernel that the user passed raises by itself, without any number of the file.

    Nothing is known where there is no such kernel, or where its blocks still have to be tuned.
    """
    if not isinstance(kernel, Kernel):
        return
    if "step_size" in kernel.tunables and not kernel.is_tuned:
        kernel = kernel.with_step_size(1.0)
    if not kernel.is_tuned:
        return
    try:
        _check_parts(target, kernel, None)
    except Exception as error:
        name = type(kernel).__name__
        error.add_note(f"The {name} passed as kernel= raises this by itself: {reader.path} is not to blame.")
        raise


def _record_shapes(target: Target, kernel: Kernel, unknown: PyTree) -> tuple[PyTree, Any]:
    """Return the shapes of the unknown and the info after a step."""
    noise = jax.eval_shape(lambda: kernel.sample_noise(jax.random.key(0, impl=IMPL), target))
    return jax.eval_shape(kernel.transition(target), unknown, noise)


def _state(reader: Reader, source: Source, kernel: Kernel, basis: Basis | None, template: PyTree) -> ChainState:
    """Read the state of the chains."""
    own = reader.array("own/0", 1)
    logdensity = reader.field("logdensity", list)
    num_chains, num_states = len(own), np.shape(reader.array("ensemble/0"))[:1]
    if not (num_chains and num_states) or len(logdensity) != num_chains or not _are_numbers(logdensity):
        raise reader.malformed("its numbers of chains differ")
    if own.dtype.kind not in "iu" or own.min() < 0 or own.max() >= num_states[0]:
        raise reader.malformed("own/0 names no states")
    arrays = lambda name, leading: jax.tree.map(jnp.asarray, reader.leaves(name, template, leading))
    return ChainState(
        source.target.with_basis(basis),
        kernel,
        arrays("unknown", num_chains),
        _key(reader),
        reader.field("num_steps", int, least=0),
        reader.field("num_unkept", int, least=0),
        arrays("ensemble", num_states[0]),
        own,
        _timing(reader),
        source,
    )


def _key(reader: Reader) -> PRNGKey:
    """Read the key of the noise as a threefry key.

    An earlier pmcmc may have stored a key of another implementation, which is converted.

    Warns:
        UserWarning: The key was converted.
    """
    impl = reader.field("key_impl", str)
    key = reader.key("key/0", impl)
    if impl != IMPL:
        warnings.warn(
            f"{reader.path} was made with a key of {impl}, from which an earlier pmcmc drew noise that depended on how "
            "many lanes drew it. Its draws can be read, and extended with new noise; they cannot be verified.",
            stacklevel=user_level(),
        )
    return threefry_key(key)


def _timing(reader: Reader) -> LaneTiming | None:
    """Read the time of a step; None if it was not measured, or on another platform."""
    timing = reader.field("timing", list, NoneType)
    if timing is None:
        return None
    platform, *numbers = timing or [None]
    if not isinstance(platform, str) or len(numbers) not in (2, 3) or not _are_numbers(numbers):
        raise reader.malformed(f"timing is {timing!r:.40}")
    return LaneTiming(*numbers) if platform == default_platform() else None


def _are_numbers(values: list) -> bool:
    """Return whether all values are numbers; booleans are not."""
    return all(isinstance(x, (int, float)) and not isinstance(x, bool) for x in values)


def _check_class(name: str, stored: Any, given: Any) -> None:
    """Raise an error if the user passed a kernel or solver of another class than that in the file."""
    if given is not None and isinstance(stored, dict) and stored.get("kind", stored.get("gap")) != type(given).__name__:
        raise ValueError(
            f"this chain was made with the {name} {stored.get('kind', stored.get('gap'))}, got {type(given).__name__}: "
            "pass the same again, or none if the file contains all of it."
        )


def _check_sites(reader: Reader, target: Target) -> None:
    """Raise an error if the model's sites are not those in the file."""
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
    """Compare data and model with the digests in the file, as far as possible.

    Digests of the model are compared only between equal versions, because others may trace the same model differently.
    """
    if "digests" not in reader.header:  # the file is from an older pmcmc
        return
    stored, found = reader.field("digests", dict), source.digests()
    if not _are_digests(stored, found):
        raise reader.malformed(f"digests is {stored!r:.40}")
    then, now = stored["arguments"], found["arguments"]
    differing = [f"argument {name!r}" for name in sorted(then.keys() | now.keys()) if then.get(name) != now.get(name)]
    if stored["versions"] == found["versions"] and not differing:
        differing = [what for what in found if what not in ("versions", "arguments") and stored[what] != found[what]]
    if differing:
        raise ValueError(
            f"{reader.path} was sampled with something else: {', '.join(differing)} differ. Pass the model, its "
            "arguments and data, and the kernel, as they were."
        )


def _are_digests(stored: dict, found: dict) -> bool:
    """Return whether a file's digests have the same form as those found now."""
    matches = lambda form, x: isinstance(x, str) and re.fullmatch(form, x) is not None
    versions, arguments = stored.get("versions"), stored.get("arguments")
    if stored.keys() != found.keys() or not isinstance(versions, dict) or not isinstance(arguments, dict):
        return False
    digests = [*arguments.values(), *(x for what, x in stored.items() if what not in ("versions", "arguments"))]
    older = {"jax", "numpyro"}
    return (
        versions.keys() in (older, found["versions"].keys())
        and all(matches(r"\d[\w.+]*", x) for x in versions.values())
        and all(matches("[0-9a-f]{64}", x) for x in digests)
    )


def _check_density(reader: Reader, state: ChainState) -> None:
    """Compare the log density of the last states with that in the file.

    Another machine rounds differently; with other data or another model the difference is much larger than the
    tolerance.
    """
    stored, found = np.asarray(reader.header["logdensity"]), last_logdensity(state)
    tolerance = np.sqrt(np.finfo(np.float32).eps) * np.maximum(1.0, np.abs(stored))
    if np.any(np.abs(stored - found) > tolerance) or np.any(np.isnan(stored) != np.isnan(found)):
        raise ValueError(
            f"the model's log density at the last states of the chains is {found}, and was {stored} when {reader.path} "
            "was saved: pass the model, its arguments and data as they were."
        )


def load(
    path: str | Path,
    model: Callable | None,
    *,
    model_args: tuple = (),
    model_kwargs: dict | None = None,
    initial_position: PyTree = None,
    kernel: Kernel | None = None,
    solver: RecurrenceSolver | None = None,
) -> Chain:
    """Read a chain from a file written by `Chain.save`.

    `Chain.extend` continues it with the same result as the original chain.

    Args:
        path: The file.
        model: The NumPyro model or log density that the chain was made with; None if there was none. No code is stored.
            The model must have the same sites, and the same density at the last states of the chains.
        model_args: Positional arguments of a NumPyro model, data included.
        model_kwargs: Keyword arguments of a NumPyro model, data included.
        initial_position: Position of a log density over pytrees of other classes, such as your own or ``OrderedDict``.
            Dicts, lists and tuples are stored, so they need not be passed.
        kernel: The kernel that the chain was made with, if it holds functions or objects of user-defined classes, as
            kernels of `from_blackjax` do. Tuned values are in the file.
        solver: The solver that the chain was made with, under the same condition.

    Returns:
        The `Chain`. Its report has no plan.

    Raises:
        ValueError: The file is incomplete, or of another version; the model has other sites, another density, or
            another precision; or something that is not stored was not passed.
        TypeError: The chain is of a NumPyro model, and none was passed.
        Exception: Whatever code of your own in ``kernel`` raises.

    Warns:
        UserWarning: The chain was made by an earlier pmcmc with a key whose noise can no longer be reproduced, so it
            cannot be verified.

    Example:
        >>> import jax.numpy as jnp, pathlib, pmcmc, tempfile
        >>> logdensity = lambda x: -0.5 * jnp.sum(x["a"] ** 2)
        >>> chain = pmcmc.sample(logdensity, {"a": jnp.zeros(2)}, 0, num_samples=100, progress_bar=False)
        >>> path = pathlib.Path(tempfile.mkdtemp()) / "chain.npz"
        >>> chain.save(path)
        >>> pmcmc.load(path, logdensity).extend(100, progress_bar=False).get_samples()["a"].shape
        (800, 2)
    """
    refuse_transformation("load", model_args, model_kwargs, initial_position)
    if Path(path).is_dir():
        raise ValueError(f"{path} is a folder: pass a file of Chain.save, or read the folder with pmcmc.resume.")
    reader = Reader(path)
    state, solver = rebuild(reader, model, model_args, model_kwargs, initial_position, kernel, solver)
    thinning, extra_fields = read_thinning(reader, state), tuple(reader.names("extra_fields"))
    if strange := set(extra_fields) - set(state.kernel.extra_fields):
        raise reader.malformed(f"its kernel has no {min(strange)}")
    unknowns, info = _record(reader, state)
    check_num_draws(reader, state, info.margin.shape[1], thinning)
    state, report = read_report(reader, state)
    report = replace(report, find_mixing=partial(judge_mixing, state.target, state.kernel, unknowns))
    reader.close()
    return Chain(state, unknowns, info, report, thinning, solver, extra_fields)


def _record(reader: Reader, state: ChainState) -> tuple[PyTree, Any]:
    """Read unknowns and info of all draws."""
    unknown, info = _record_shapes(state.target, state.kernel, jax.tree.map(lambda x: x[0], state.ensemble))
    leading = np.shape(reader.array("unknowns/0"))[:2]
    if leading[:1] != (len(state.own),) or len(leading) < 2 or not leading[1]:
        raise reader.malformed(f"unknowns/0 has axes {leading}")
    return reader.leaves("unknowns", unknown, *leading), reader.leaves("info", info, *leading)
