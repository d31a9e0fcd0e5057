"""One run of chains: warm-up where it is wanted, then steps of the tuned chains, whose draws are kept in memory.

`sample_new`, `sample_from` and `extend` are what `pmcmc.parallel_chain`, the drop-in and `Chain.extend` call. Draws
that go to disk use the same `Session` (see `pmcmc.sampling.streaming`).
"""

import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from types import TracebackType
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from pmcmc._progress import Progress
from pmcmc._typing import PRNGKey, PyTree
from pmcmc._xla.background import BackgroundCompiler
from pmcmc._xla.trace import refuse_transformation
from pmcmc.chain.chain import Chain
from pmcmc.chain.draws import judge_mixing
from pmcmc.chain.state import ChainState, Source
from pmcmc.chain.stored import StoredChain
from pmcmc.sampling.automatic import Automatic, compile_first
from pmcmc.sampling.programs import Engine, fit_memory
from pmcmc.sampling.reporting import Outcome
from pmcmc.sampling.segments import NonFiniteState, Run
from pmcmc.sampling.settings import Settings, settings_of
from pmcmc.sampling.sinks import Draws, Keeper, draw_bytes
from pmcmc.sampling.warm_up import WarmupRecord, tune_chains


class Interrupted(KeyboardInterrupt):
    """Ctrl-C while draws were taken: those that stand are kept in ``chain``.

    A program that has begun is not stopped: the interruption comes when the segment under way has ended. Before the
    first draw was kept, during warm-up for instance, there is nothing to keep and a plain KeyboardInterrupt is raised.

    chain: a `Chain` of the draws so far, which `Chain.extend` continues as if nothing had been; from `Chain.stream` the
        `StoredChain` of the last checkpoint, from which `resume` goes on, too.

    Example:
        >>> import jax.numpy as jnp, pmcmc
        >>> try:
        ...     chain = pmcmc.sample(lambda x: -jnp.sum(x**2), jnp.zeros(2), 0, num_samples=100, progress_bar=False)
        ... except pmcmc.Interrupted as stopped:
        ...     chain = stopped.chain
    """

    def __init__(self, chain: Chain | StoredChain, num_wanted: int):
        self.chain: Any = chain
        self.num_wanted = num_wanted
        super().__init__(
            f"stopped after {chain.report.num_steps:,} of {num_wanted:,} steps. They are the attribute `chain` of this "
            "exception: chain.extend(...) goes on from there."
        )


class Session:
    """One run: its engine, its progress bar, and its steps into a sink. Use it as a context manager.

    A run has one engine. During warm-up it knows only the shapes of the tuned arrays, for which programs are compiled
    in the background; `engine_for` gives it the arrays afterwards.

    Args:
        settings: What the user asked for.
        progress_bar: Whether to show one.
    """

    def __init__(self, settings: Settings, progress_bar: bool):
        self.settings, self.began, self.warmup_seconds = settings, time.perf_counter(), 0.0
        self.progress = Progress(settings.num_samples, progress_bar)
        self._background = BackgroundCompiler()
        self._engine: Engine | None = None

    def __enter__(self) -> "Session":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._background.close()
        self.progress.close()

    def tune(self, source: Source, rng_key: PRNGKey, starts: PyTree, record: WarmupRecord | None = None) -> ChainState:
        """Warm up from ``starts`` (positions, leading axis num_starts); returns where the chains start."""

        def watch(target: Any, path: Any) -> None:
            self.progress.warmed(len(path))
            if record is not None:
                record(target, path)

        def prepare(expected: ChainState) -> None:
            engine = self.engine_for(expected, self.draw_bytes(0))
            compile_first(engine, self.settings.solver, self.settings.num_samples)

        state = tune_chains(source, rng_key, starts, self.settings, watch, prepare)
        self.warmup_seconds = time.perf_counter() - self.began
        return state

    def draw_bytes(self, num_unkept: int) -> Callable[[Engine], int]:
        """Bytes of all draws that are kept in memory, as a function of the engine."""
        num_kept = (num_unkept + self.settings.num_samples) // self.settings.thinning
        return lambda engine: draw_bytes(engine) * num_kept

    def engine_for(self, state: ChainState, held: Callable[[Engine], int]) -> Engine:
        """Return the engine of this run, with the arrays (or shapes) of ``state``.

        Args:
            state: Where the chains start. For ahead-of-time compilation it may hold shapes only.
            held: Bytes of what is kept besides, as a function of the engine.

        Raises:
            MemoryError: The draws and the shortest segment do not fit.
        """
        if self._engine is None:
            self._engine = Engine.of(state, background=self._background)
            fit_memory(self._engine, self.settings, held(self._engine))
        else:
            self._engine.bind(state)
        return self._engine

    def start(self, state: ChainState, engine: Engine, sink: Keeper, num_planned: int | None = None) -> Outcome:
        """Prepare the steps that follow ``state``; `execute` takes them.

        Args:
            state: Where the chains start.
            engine: The engine of this run.
            sink: Where kept draws go.
            num_planned: See `Run`.
        """
        self.progress.sample()
        settings = self.settings
        steps = settings.num_samples, settings.thinning
        run = Run(engine, state.unknown, *steps, self.progress, sink, state.num_unkept, num_planned)
        automatic = None
        if settings.solver is None:
            automatic = Automatic(run, state.own, state.timing, settings.devices)
        return Outcome(state, settings, run, automatic, self.began, self.warmup_seconds)


def execute(outcome: Outcome) -> None:
    """Take all steps of a run."""
    if outcome.settings.solver is not None:
        outcome.run.with_solver(outcome.settings.solver)
    elif outcome.automatic is not None:
        outcome.automatic.execute()


def sample_new(
    source: Source,
    rng_key: PRNGKey,
    starts: PyTree,
    settings: Settings,
    progress_bar: bool,
    record: WarmupRecord | None = None,
) -> Chain:
    """Warm up and sample.

    Args:
        source: The model.
        rng_key: The key of the whole run.
        starts: Positions with leading axis num_starts (num_chains without warm-up).
        settings: What the user asked for.
        progress_bar: Whether to show one.
        record: Keeps warm-up's draws for the chain; None if they are not wanted.
    """
    with Session(settings, progress_bar) as session:
        return _sample(session, session.tune(source, rng_key, starts, record), record)


def warm_up(source: Source, rng_key: PRNGKey, starts: PyTree, settings: Settings, progress_bar: bool) -> ChainState:
    """Return the state from which `sample_new` with the same arguments would sample."""
    with Session(settings, progress_bar) as session:
        return session.tune(source, rng_key, starts)


def sample_from(state: ChainState, settings: Settings, progress_bar: bool) -> Chain:
    """Return the draws that follow a state, without those that led to it."""
    with Session(settings, progress_bar) as session:
        return _sample(session, state)


def extend(chain: Chain, num_samples: int, progress_bar: bool) -> Chain:
    """Return the chain with ``num_samples`` more steps of every chain; see `Chain.extend`."""
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


def _sample(session: Session, state: ChainState, record: WarmupRecord | None = None) -> Chain:
    """Steps from ``state`` on, into memory. If they are cut short, the exception carries the draws so far."""
    settings = session.settings
    engine = session.engine_for(state, session.draw_bytes(state.num_unkept))
    draws = Draws(engine, (state.num_unkept + settings.num_samples) // settings.thinning)
    outcome = session.start(state, engine, draws)

    def chain(x: PyTree, num_steps: int) -> Chain:
        after, report = outcome.after(x, num_steps)
        return Chain(
            after,
            *draws.kept,
            report,
            settings.thinning,
            settings.solver,
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
        execute(outcome)
    except KeyboardInterrupt as stopped:
        if (there := so_far()) is None:
            raise
        raise Interrupted(there, settings.num_samples) from stopped
    except NonFiniteState as failed:
        failed.chain = so_far()
        raise
    whole = chain(outcome.run.x, settings.num_samples)
    outcome.warn(whole.report)
    return whole


def _join(chain: Chain, more: Chain) -> Chain:
    """One chain with the draws of both. Everything but the draws is that of the second."""
    join = lambda old, new: np.concatenate([old, new], axis=1)
    both = jax.tree.map(join, (chain.unknowns, chain.info), (more.unknowns, more.info))
    report = replace(more.report, find_mixing=partial(judge_mixing, more.target, more.kernel, both[0]))
    return replace(more, unknowns=both[0], info=both[1], report=report, warmup_path=chain.warmup_path)
