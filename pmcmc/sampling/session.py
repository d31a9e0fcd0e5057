"""One run of chains: optional warm-up, then steps of the tuned chains, whose draws are kept in memory.

`pmcmc.parallel_chain`, the drop-in and `Chain.extend` call `sample_new`, `sample_from` and `extend`. Runs that write
their draws to disk use the same `Session` (see `pmcmc.sampling.streaming`).

`tune_chains` runs the warm-up that the settings ask for and chooses where the chains start. `WarmupRecord` keeps the
draws of warm-up for the user.
"""

import time
import warnings
from collections.abc import Callable
from dataclasses import replace
from types import TracebackType
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from pmcmc._progress import Progress
from pmcmc._pytree import Array, PRNGKey, PyTree
from pmcmc._warnings import user_level
from pmcmc._xla.compile import BackgroundCompiler
from pmcmc._xla.trace import refuse_transformation
from pmcmc.chain.chain import Chain
from pmcmc.chain.state import ChainState, Source
from pmcmc.chain.stored import StoredChain
from pmcmc.kernels.base import is_of_pmcmc
from pmcmc.random.streams import MOST_STEPS, split_key
from pmcmc.sampling.automatic import Automatic, compile_first
from pmcmc.sampling.engine import Engine
from pmcmc.sampling.reporting import Outcome
from pmcmc.sampling.segments import Draws, Keeper, NonFiniteState, Run, draw_bytes
from pmcmc.sampling.settings import Settings, Starts, check_reparam, fit_memory, settings_of
from pmcmc.starts import check_starts
from pmcmc.target import Target
from pmcmc.warmup import Tuned
from pmcmc.warmup.base import Watch
from pmcmc.warmup.centredness import moved


class WarmupRecord:
    """A `Watch` that keeps the draws of warm-up, converted to unconstrained values of the model as it is written."""

    def __init__(self) -> None:
        self._stretches: list[np.ndarray] = []

    def __call__(self, target: Target, path: Array) -> None:
        rows, basis = np.asarray(path), target.basis
        if basis is not None:
            rows = basis.to_positions(rows).astype(rows.dtype)
        if target.centredness:
            rows = moved(target, rows, target.as_written.centredness)
        self._stretches.append(rows)

    def path(self) -> np.ndarray:
        """Return the unconstrained values at all steps so far; shape (lanes, steps, D)."""
        return np.swapaxes(np.concatenate(self._stretches), 0, 1)


def tune_chains(
    source: Source,
    rng_key: PRNGKey,
    starts: Starts,
    settings: Settings,
    watch: Watch,
    prepare: Callable[[ChainState], None],
) -> ChainState:
    """Warm up from ``starts``, or sample from them directly if there is no warm-up.

    Args:
        source: The model.
        rng_key: The key of the whole run.
        starts: Where warm-up starts, or the chains without warm-up.
        settings: What the user asked for.
        watch: Called with the draws of warm-up's lanes.
        prepare: Called first, with a state that holds shapes, if they are known, so that programs are compiled while
            starts are found and during warm-up.

    Returns:
        The state in which the chains start.

    Raises:
        TypeError, ValueError: The kernel does not fit the target, or the density is not finite at a start.
        WarmupError: The posterior cannot be sampled like this.

    Warns:
        UserWarning: The result of warm-up is doubtful, or the kernel cannot keep a setting.
    """
    source, kernel = source.with_kernel(settings.kernel)
    target, settings = source.target, replace(settings, kernel=kernel)
    check_reparam(target, settings)
    warmup_key, chain_key = split_key(rng_key, 2)
    # Compile for sampling in the meantime.
    if (expected := _expected(target, starts.number, settings)) is not None:
        prepare(_begin(expected, _chain_starts(expected, starts.number, False, settings), chain_key, source))
    # Check the starts before warm-up.
    positions = starts.find()
    check_starts(target, positions, settings.uses_gradient)
    kernel.check_start(target, jax.tree.map(lambda x: np.asarray(x)[0], positions))
    # Warm up, and start the chains from lanes of the ensemble.
    tuned = _tune(target, warmup_key, positions, starts.num_given, settings, watch)
    differ = any(np.any(np.asarray(x) != np.asarray(x)[:1]) for x in jax.tree.leaves(positions))
    own = _chain_starts(tuned, starts.number, starts.num_given > 1 and differ, settings)
    unknown = jax.tree.map(lambda x: jax.device_put(np.asarray(x)[own]), tuned.states)
    num_lanes = len(jax.tree.leaves(tuned.states)[0]) if settings.num_warmup else 0
    return _begin(tuned, own, chain_key, source)._replace(unknown=unknown, num_lanes=num_lanes)


def _expected(target: Target, num_starts: int, settings: Settings) -> Tuned | None:
    """Return the shapes of what warm-up will return; None if they are not known, or there is no warm-up."""
    if not settings.num_warmup:
        return None
    try:
        return settings.warmup.tuned_shapes(target, settings.kernel, num_starts)
    except (TypeError, ValueError, NotImplementedError):
        return None  # `check_starts` says what is wrong with the density


def _begin(tuned: Tuned, own: np.ndarray, chain_key: PRNGKey, source: Source) -> ChainState:
    """Return the first state of the chains, without ``unknown``; it holds shapes if ``tuned`` does."""
    state = ChainState(tuned.target, tuned.kernel, None, chain_key, 0, 0, tuned.states, own, tuned.timing, source)
    return state._replace(warmup_remark=tuned.remark, num_lost_lanes=tuned.num_lost)


def _tune(
    target: Target, rng_key: PRNGKey, positions: PyTree, num_given: int, settings: Settings, watch: Watch
) -> Tuned:
    """Run the warm-up; without warm-up, return the kernel with the states at ``positions``."""
    if settings.num_warmup:
        tuned = settings.warmup.run(target, settings.kernel, rng_key, positions, settings.num_warmup, watch, num_given)
        for doubt in filter(None, (tuned.remark, settings.kernel.unkept(tuned.kernel))):
            warnings.warn(doubt, stacklevel=user_level())
        return jax.block_until_ready(tuned)
    kernel = settings.kernel.finalize()
    if unkept := settings.kernel.unkept(kernel):
        warnings.warn(unkept, stacklevel=user_level())
    states = jax.vmap(lambda position: kernel.unknown(kernel.init(target, position)))(positions)
    return Tuned(target, kernel, states, jnp.array(jnp.nan))


def _chain_starts(tuned: Tuned, num_starts: int, own_starts: bool, settings: Settings) -> np.ndarray:
    """Return the lanes of the ensemble from which the chains start; shape (C,).

    If the lanes have not mixed, chains start in the order of `Tuned.order`, far apart. Otherwise, and always if the
    user gave the chains different starts (``own_starts``), consecutive chains take lanes that descend from consecutive
    starts.
    """
    num_states = jax.tree.leaves(tuned.states)[0].shape[0]
    chains = np.arange(settings.num_chains)
    if tuned.order is not None and not own_starts:
        return tuned.order[chains % num_states]
    stride = max(1, num_states // num_starts) if settings.num_warmup else 1
    return (chains * stride + chains * stride // num_states) % num_states


class Interrupted(KeyboardInterrupt):
    """The user pressed Ctrl-C while draws were taken or judged; those so far are in ``chain``.

    A running program is not stopped: the exception is raised when the current segment has ended. If no draw has been
    kept yet, for instance during warm-up, a plain KeyboardInterrupt is raised instead.

    Attributes:
        chain: A `Chain` of the draws so far, which `Chain.extend` continues as if the run had not been interrupted.
            From `Chain.stream`, the `StoredChain` of the last checkpoint, which `resume` continues as well.
        num_wanted: Steps per chain that were asked for.

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


def hand_over(error: Any, chain: Chain | StoredChain | None) -> None:
    """Make the draws so far the attribute ``chain`` of an exception that ends a run, which says so in a note."""
    error.chain = chain
    if not isinstance(error, NonFiniteState) and chain is not None:  # that one says so itself
        error.add_note("The draws so far are the attribute `chain` of this exception.")


class Session:
    """One run with its engine and its progress bar. Use it as a context manager.

    A run has one engine. During warm-up the engine has only the shapes of the tuned arrays, for which programs are
    compiled in the background; afterwards `engine_for` gives it the arrays.

    Args:
        settings: What the user asked for.
        progress_bar: Whether to show a progress bar.
        num_before: Steps that the chains took before this run.

    Raises:
        ValueError: The chains would take more than `MOST_STEPS` steps in all.
    """

    def __init__(self, settings: Settings, progress_bar: bool, num_before: int):
        if num_before + settings.num_samples > MOST_STEPS:
            raise ValueError(
                f"a chain has at most {MOST_STEPS:,} steps, since the numbers of steps that its noise is drawn from "
                f"have 32 bits: expected at most {max(MOST_STEPS - num_before, 0):,} more, got "
                f"{settings.num_samples:,}. Take fewer, or sample further chains with another key."
            )
        self.settings, self.began, self.warmup_seconds = settings, time.perf_counter(), 0.0
        self.progress = Progress(settings.num_samples, progress_bar)
        self._background = BackgroundCompiler()
        self._engine: Engine | None = None
        # What a solver of the user's own computes may change between calls, so no other run shares its programs.
        solver = settings.solver
        self._context = () if solver is None or is_of_pmcmc(solver) else (object(),)

    def __enter__(self) -> "Session":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._background.close()
        self.progress.close()

    def tune(self, source: Source, rng_key: PRNGKey, starts: Starts, record: WarmupRecord | None = None) -> ChainState:
        """Warm up and return the state in which the chains start.

        Args:
            source: The model.
            rng_key: The key of the whole run.
            starts: Where warm-up starts, or the chains without warm-up.
            record: Keeps warm-up's draws; None if they are not wanted.
        """

        def watch(target: Any, path: Any) -> None:
            self.progress.warmed(len(path))
            if record is not None:
                record(target, path)

        def prepare(expected: ChainState) -> None:
            engine = self.engine_for(expected, self.bytes_in_memory(0))
            compile_first(engine, self.settings.solver, self.settings.num_samples, self.settings.devices)

        state = tune_chains(source, rng_key, starts, self.settings, watch, prepare)
        if self.settings.num_warmup:
            self.warmup_seconds = time.perf_counter() - self.began
        return state

    def bytes_in_memory(self, num_unkept: int, num_before: int = 0) -> Callable[[Engine], int]:
        """Return a function of the engine: the bytes of all draws that are kept in memory.

        Args:
            num_unkept: Steps since the last kept draw, taken before this run.
            num_before: Draws per chain of the chain that is extended.
        """
        num_kept = num_before + (num_unkept + self.settings.num_samples) // self.settings.thinning
        return lambda engine: draw_bytes(engine) * num_kept

    def engine_for(self, state: ChainState, held: Callable[[Engine], int]) -> Engine:
        """Return the engine of this run, with the arrays (or shapes) of ``state``.

        Args:
            state: Where the chains start. For ahead-of-time compilation it may hold shapes only.
            held: Bytes of the draws that are kept in memory, as a function of the engine.

        Raises:
            MemoryError: The draws and the shortest segment do not fit into memory.
        """
        if self._context:
            target = replace(state.target, context=(state.target.context, *self._context))
            state = state._replace(target=target)
        if self._engine is None:
            self._engine = Engine.of(state, background=self._background)
            fit_memory(self._engine, self.settings, held(self._engine))
        else:
            self._engine.bind(state)
        return self._engine

    def start(self, state: ChainState, engine: Engine, sink: Keeper, num_planned: int | None = None) -> Outcome:
        """Prepare the steps that follow ``state``, which `execute` takes.

        Args:
            state: Where the chains start.
            engine: The engine of this run.
            sink: Where kept draws go.
            num_planned: As in `Run`.
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
    """Take all steps of a run, by the solver that the user chose or by `Automatic`."""
    if outcome.settings.solver is not None:
        outcome.run.with_solver(outcome.settings.solver)
    elif outcome.automatic is not None:
        outcome.automatic.execute()


def sample_new(
    source: Source,
    rng_key: PRNGKey,
    starts: Starts,
    settings: Settings,
    progress_bar: bool,
    record: WarmupRecord | None = None,
) -> Chain:
    """Warm up and sample.

    Args:
        source: The model.
        rng_key: The key of the whole run.
        starts: Where warm-up starts, or the chains without warm-up.
        settings: What the user asked for.
        progress_bar: Whether to show a progress bar.
        record: Keeps warm-up's draws for the chain; None if they are not wanted.

    Returns:
        The chain.

    Raises:
        Interrupted: The user pressed Ctrl-C after the first draw was kept.
        NonFiniteState: A chain reached a state that is not finite.
        Warning: A filter of Python's `warnings` raises a warning; its ``chain`` is that of the draws so far.
    """
    with Session(settings, progress_bar, 0) as session:
        return _sample(session, session.tune(source, rng_key, starts, record), record)


def warm_up(source: Source, rng_key: PRNGKey, starts: Starts, settings: Settings, progress_bar: bool) -> ChainState:
    """Return the state from which `sample_new` with the same arguments would sample."""
    with Session(settings, progress_bar, 0) as session:
        return session.tune(source, rng_key, starts)


def sample_from(state: ChainState, settings: Settings, progress_bar: bool) -> Chain:
    """Return a chain of the draws that follow a state; earlier draws are not included."""
    with Session(settings, progress_bar, state.num_steps) as session:
        return _sample(session, state)


def extend(chain: Chain, num_samples: int, max_memory: int | None, progress_bar: bool) -> Chain:
    """Extend a chain by ``num_samples`` steps; see `Chain.extend`."""
    refuse_transformation("Chain.extend")
    chain.state.source.check()
    settings = settings_of(chain, num_samples, chain.max_memory if max_memory is None else max_memory)
    with Session(settings, progress_bar, chain.state.num_steps) as session:
        return _sample(session, chain.state, before=chain)


def _sample(
    session: Session, state: ChainState, record: WarmupRecord | None = None, before: Chain | None = None
) -> Chain:
    """Sample from ``state`` on, into memory. If the run ends early, its exception carries the draws so far.

    Args:
        session: The session.
        state: Where the chains are.
        record: Draws of warm-up, for the chain; None if they are not wanted.
        before: The chain that is extended, whose draws come first; None if there is none.
    """
    settings, num_before = session.settings, 0 if before is None else before.num_samples
    # Prepare the engine, room for the draws, and the run.
    engine = session.engine_for(state, session.bytes_in_memory(state.num_unkept, num_before))
    first = None if before is None else (before.unknowns, before.info)
    draws = Draws(engine, (state.num_unkept + settings.num_samples) // settings.thinning, first)
    outcome = session.start(state, engine, draws)

    def chain(x: PyTree, num_steps: int) -> Chain:
        after, report = outcome.after(x, num_steps)
        warmed = None if record is None else record.path()
        return Chain(
            after,
            *draws.kept,
            report,
            settings.thinning,
            settings.solver,
            settings.extra_fields,
            warmup_path=warmed if before is None else before.warmup_path,
            devices=settings.devices or None,
            max_memory=settings.max_memory,
        )

    def so_far() -> Chain | None:
        draws.cut()
        if not draws.num_new:
            return None
        x = jax.tree.map(lambda rows: jnp.asarray(rows[:, -1]), draws.kept[0])
        return chain(x, draws.num_new * settings.thinning - state.num_unkept)

    # Take the steps and judge the draws; if that fails, hand over the draws that all chains have.
    try:
        execute(outcome)
        whole = chain(outcome.run.x, settings.num_samples)
        outcome.warn(whole.report, whole.num_samples)
    except KeyboardInterrupt as stopped:
        if (there := so_far()) is None:
            raise
        raise Interrupted(there, settings.num_samples) from stopped
    except Exception as failed:  # such as `NonFiniteState`, a warning that a filter raises, or a failing callback
        hand_over(failed, so_far() or before)
        raise
    return whole
