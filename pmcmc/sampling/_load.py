"""The other half of `Chain.save`."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

from pmcmc._state import ChainState
from pmcmc._storage import Reader
from pmcmc._transformations import refuse_transformation
from pmcmc._types import PyTree
from pmcmc.chain import Chain
from pmcmc.kernels import Kernel
from pmcmc.recurrence import RecurrenceSolver
from pmcmc.sampling._engine import Engine
from pmcmc.sampling._rebuild import read_report, rebuild
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
    unknowns, info = _record(reader, state)
    header = reader.header
    report, extra_fields = read_report(reader), tuple(header["extra_fields"])
    return Chain(state, unknowns, info, report, header["thinning"], solver, CONTINUATION, extra_fields)


def _record(reader: Reader, state: ChainState) -> tuple[PyTree, Any]:
    """Unknowns and info of all draws."""
    engine = Engine(state.target, state.kernel, state.rng_key[None], state.ensemble, None)
    unknown, info = engine.record_shapes
    return reader.leaves("unknowns", unknown), reader.leaves("info", info)
