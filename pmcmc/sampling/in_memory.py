"""Chains whose draws are kept in memory: new ones, extended ones, and those read from files."""

import time
from collections.abc import Callable
from contextlib import closing
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from pmcmc._progress import Progress
from pmcmc._typing import PRNGKey, PyTree
from pmcmc._xla.background import Ahead
from pmcmc._xla.trace import refuse_transformation
from pmcmc.chain.chain import Chain, Continuation
from pmcmc.chain.draws import judge_mixing
from pmcmc.chain.file_format import Reader
from pmcmc.chain.rebuild import check_num_draws, read_report, read_thinning, rebuild
from pmcmc.chain.state import ChainState, Source
from pmcmc.kernels import Kernel
from pmcmc.recurrence import RecurrenceSolver
from pmcmc.sampling.programs import Engine, fit_memory
from pmcmc.sampling.segments import NonFiniteState
from pmcmc.sampling.session import Interrupted, Sampling, engine_of, settings_of
from pmcmc.sampling.settings import Settings
from pmcmc.sampling.sinks import Draws, draw_bytes
from pmcmc.sampling.streaming import stream
from pmcmc.sampling.warm_up import WarmupRecord, tune_chains


def run_stages(
    source: Source,
    rng_key: PRNGKey,
    starts: PyTree,
    settings: Settings,
    progress_bar: bool,
    record: WarmupRecord | None = None,
) -> Chain:
    """Draws from ``starts`` (positions, leading axis num_starts, or num_chains without warm-up).

    record: keeps warm-up's draws for the chain.
    """
    began = time.perf_counter()
    with Progress(settings.num_samples, progress_bar) as progress, closing(Ahead()) as ahead:
        state = tune_chains(source, rng_key, starts, settings, progress, ahead, record)
        return _sample(state, settings, progress, ahead, began, time.perf_counter() - began, record)


def sample_from(state: ChainState, settings: Settings, progress_bar: bool) -> Chain:
    """Draws that follow a state; the chain holds these alone."""
    with Progress(settings.num_samples, progress_bar) as progress, closing(Ahead()) as ahead:
        return _sample(state, settings, progress, ahead, time.perf_counter(), 0.0)


def extend(chain: Chain, num_samples: int, progress_bar: bool) -> Chain:
    """See `Chain.extend`."""
    refuse_transformation("Chain.extend")
    chain.state.source.check()
    settings = settings_of(chain, num_samples, chain.max_memory)
    try:
        return _join(chain, sample_from(chain.state, settings, progress_bar))
    except Interrupted as stopped:
        raise Interrupted(_join(chain, stopped.chain), num_samples) from stopped
    except NonFiniteState as failed:
        failed.chain = chain if failed.chain is None else _join(chain, failed.chain)
        raise


CONTINUATION = Continuation(extend, stream)


def _join(chain: Chain, more: Chain) -> Chain:
    """One chain of both; what is not draws is that of the second."""
    join = lambda old, new: np.concatenate([old, new], axis=1)
    both = jax.tree.map(join, (chain.unknowns, chain.info), (more.unknowns, more.info))
    report = replace(more.report, find_mixing=partial(judge_mixing, more.target, more.kernel, both[0]))
    return replace(more, unknowns=both[0], info=both[1], report=report, warmup_path=chain.warmup_path)


def _sample(
    state: ChainState,
    settings: Settings,
    progress: Progress,
    ahead: Ahead,
    began: float,
    warmup_seconds: float,
    record: WarmupRecord | None = None,
) -> Chain:
    num_kept = (state.num_unkept + settings.num_samples) // settings.thinning
    engine = engine_of(state, ahead)
    fit_memory(engine, settings, draw_bytes(engine) * num_kept)
    draws = Draws(engine, num_kept)
    sampling = Sampling(state, settings, engine, draws, progress, began, warmup_seconds)

    def chain(x: PyTree, num_steps: int) -> Chain:
        after, report = sampling.standing(x, num_steps)
        return Chain(
            after,
            *draws.kept,
            report,
            settings.thinning,
            settings.solver,
            CONTINUATION,
            settings.extra_fields,
            warmup_path=None if record is None else record.path(),
            devices=settings.devices or None,
            max_memory=settings.max_memory,
        )

    def so_far() -> Chain | None:
        draws.cut()
        if not (kept := draws.info.margin.shape[1]):
            return None
        x = jax.tree.map(lambda rows: jnp.asarray(rows[:, -1]), draws.kept[0])
        return chain(x, kept * settings.thinning - state.num_unkept)

    try:
        sampling.execute()
    except KeyboardInterrupt as stopped:
        if (there := so_far()) is None:
            raise
        raise Interrupted(there, settings.num_samples) from stopped
    except NonFiniteState as failed:
        failed.chain = so_far()
        raise
    whole = chain(sampling.run.x, settings.num_samples)
    sampling.warn(whole.report)
    return whole


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
