"""The other half of `Chain.save`."""

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from pmcmc._samples import judge_mixing
from pmcmc._state import ChainState
from pmcmc._storage import Reader
from pmcmc._transformations import refuse_transformation
from pmcmc._types import PyTree
from pmcmc.chain import Chain
from pmcmc.kernels import Kernel
from pmcmc.recurrence import RecurrenceSolver
from pmcmc.sampling._engine import Engine
from pmcmc.sampling._rebuild import check_num_draws, read_report, read_thinning, rebuild
from pmcmc.sampling._stages import CONTINUATION


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
    """A chain from a file of `Chain.save`: to read its draws, or to `Chain.extend` it with the same result as there.

    path: of the file.
    model: the NumPyro model or log density that the chain was made with (None where there was none): no code is
        stored. It must have the same sites, and the same density where the chains stood last.
    model_args, model_kwargs: the model's arguments, data included; for a NumPyro model.
    initial_position: for a log density over pytrees with classes of your own; dicts, lists and tuples are stored.
    kernel, solver: those that the chain was made with, where they hold functions or classes of your own, as
        `from_blackjax` does. What was tuned is in the file.

    Returns:
        The `Chain`. Its report has no plan.

    Raises:
        ValueError: the file is not whole, or of another version; the model has other sites, another density, or
            another precision; something that is not stored was not given.

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
        raise ValueError(f"{path} is a folder: pass a file of Chain.save. What Chain.stream wrote takes pmcmc.resume.")
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
    return Chain(state, unknowns, info, report, thinning, solver, CONTINUATION, extra_fields)


def _record(reader: Reader, state: ChainState) -> tuple[PyTree, Any]:
    """Unknowns and info of all draws."""
    engine = Engine(state.target, state.kernel, state.rng_key[None], state.ensemble, None)
    unknown, info = engine.record_shapes
    leading = np.shape(reader.array("unknowns/0"))[:2]
    if leading[:1] != (len(state.own),) or len(leading) < 2 or not leading[1]:
        raise reader.malformed(f"unknowns/0 has axes {leading}")
    return reader.leaves("unknowns", unknown, *leading), reader.leaves("info", info, *leading)
