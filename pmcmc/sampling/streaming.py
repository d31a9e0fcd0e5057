"""Chains that continue in a folder on disk, also after the run was stopped.

`stream` and `extend_stored` implement `Chain.stream` and `StoredChain.extend`; `resume` finishes a run that was
stopped. The draws go to a `pmcmc.sampling.store.Store`.
"""

from collections.abc import Callable, Sequence
from contextlib import closing, suppress
from dataclasses import replace
from pathlib import Path
from types import NoneType

import jax

from pmcmc._pytree import PyTree
from pmcmc._xla.trace import refuse_transformation
from pmcmc.chain.chain import Chain
from pmcmc.chain.draws import by_name
from pmcmc.chain.file_format import STORE, Reader
from pmcmc.chain.loading import check_num_draws, read_report, read_thinning, rebuild
from pmcmc.chain.stored import CHECKPOINT, DRAWS, StoredChain
from pmcmc.interop.arviz import read_arrays
from pmcmc.kernels import Kernel
from pmcmc.recurrence import RecurrenceSolver
from pmcmc.sampling.session import Interrupted, Session, execute, hand_over
from pmcmc.sampling.settings import Settings, settings_of
from pmcmc.sampling.store import Store, check_kept, held_bytes


def stream(
    chain: Chain,
    path: str | Path,
    num_samples: int,
    sites: Sequence[str] | None,
    max_memory: int | None,
    progress_bar: bool,
) -> StoredChain:
    """Implement `Chain.stream`."""
    refuse_transformation("Chain.stream")
    chain.state.source.check()
    settings = settings_of(chain, num_samples, chain.max_memory if max_memory is None else max_memory)
    kept = check_kept(chain.target, sites)
    with closing(Store.new(Path(path))) as store:
        stored = StoredChain(
            store.path,
            kept,
            0,
            chain.state,
            chain.report,
            chain.thinning,
            chain.solver,
            settings.max_memory,
            chain.devices,
        )
        return _to_store(store, stored, settings, progress_bar, chain)


def extend_stored(chain: StoredChain, num_samples: int, max_memory: int | None, progress_bar: bool) -> StoredChain:
    """Implement `StoredChain.extend`."""
    refuse_transformation("StoredChain.extend")
    chain.state.source.check()
    settings = settings_of(chain, num_samples, chain.max_memory if max_memory is None else max_memory)
    with closing(Store(chain.path)) as store:
        return _to_store(store, replace(chain, max_memory=settings.max_memory), settings, progress_bar)


def _to_store(
    store: Store,
    chain: StoredChain,
    settings: Settings,
    progress_bar: bool,
    first: Chain | None = None,
    num_planned: int | None = None,
) -> StoredChain:
    """Take the steps that follow a chain, and append their draws to a store.

    Args:
        store: The store.
        chain: The chain that is continued.
        settings: What the user asked for.
        progress_bar: Whether to show progress.
        first: A chain whose draws come first in the store; None if the store has them already.
        num_planned: See `Run`.
    """
    state = chain.state
    with Session(settings, progress_bar, state.num_steps) as session:
        engine = session.engine_for(state, lambda _: held_bytes(settings.max_memory))
        outcome = session.start(state, engine, store, num_planned)
        num_before, run = chain.num_samples if first is None else first.num_samples, outcome.run

        def there() -> StoredChain:
            num_samples = num_before + (state.num_unkept + run.done) // settings.thinning
            after, report = outcome.after(run.x, run.done)
            return replace(chain, num_samples=num_samples, state=after, report=report)

        before = None if first is None else (first.unknowns, first.info)
        try:
            store.begin(chain, there, engine, run.num_steps, run.num_planned, before)
            execute(outcome)
            outcome.warn(store.last.report, int(run.draws.moves.num_draws[0]))
        except KeyboardInterrupt as stopped:
            store.cut()
            if store.last is None:
                raise
            raise Interrupted(store.last, settings.num_samples) from stopped
        except Exception as failed:  # such as `NonFiniteState`, a warning that a filter raises, or a failing callback
            with suppress(OSError):  # of a full disk, for instance; `resume` cuts what is left
                store.cut()
            hand_over(failed, store.last)
            raise
        return store.last


def resume(
    path: str | Path,
    model: Callable | None,
    *,
    model_args: tuple = (),
    model_kwargs: dict | None = None,
    initial_position: PyTree = None,
    kernel: Kernel | None = None,
    solver: RecurrenceSolver | None = None,
    max_memory: int | None = None,
    devices: Sequence[jax.Device] | None = None,
    progress_bar: bool = True,
) -> StoredChain:
    """Finish a `Chain.stream` that was killed or interrupted. If it had finished, return its chain.

    Draws after the last checkpoint, which is at most some seconds or one segment old, are taken again. The chain equals
    that of a run that was never stopped. With a solver chosen by the user, on the same machine and as many cores, it is
    equal to the last bit, since the segments are the same, unless the solver had failed before the run was stopped: it
    is tried again. Then, and under "auto", the chain is equal up to the tolerance of merges, as with any other blocks.

    Args:
        path: The folder.
        model: The NumPyro model or log density, as for `load`; no code is stored.
        model_args: Positional arguments of a NumPyro model, data included.
        model_kwargs: Keyword arguments of a NumPyro model, data included.
        initial_position: Position of a log density over pytrees of other classes, as for `load`.
        kernel: The kernel, if it holds what is not stored, as for `load`.
        solver: The solver, if it holds what is not stored, as for `load`.
        max_memory: Memory limit in bytes; None for that of the run.
        devices: Devices that share the blocks, or the steps of Newton's method; they are not stored.
        progress_bar: Whether to show progress in terminals and notebooks.

    Returns:
        The `StoredChain` with all draws that were asked for. Its ``report`` covers the steps taken now.

    Raises:
        FileNotFoundError: No run was streamed to the folder, or it was stopped before its first checkpoint.
        ValueError: See `load`.
        TypeError: See `load`.
        RuntimeError: Another process is writing to the folder.
        MemoryError: The shortest segment does not fit into memory; raised before any sampling.
        Interrupted: Ctrl-C; its ``chain`` holds the draws of the last checkpoint.
        NonFiniteState: A chain reached a state that is not finite; its ``chain`` holds the draws of the last
            checkpoint.

    Example:
        >>> import jax.numpy as jnp, pmcmc, tempfile
        >>> folder, logdensity = tempfile.mkdtemp(), lambda x: -0.5 * jnp.sum(x**2)
        >>> chain = pmcmc.sample(logdensity, jnp.zeros(2), 0, num_samples=100, progress_bar=False)
        >>> chain = chain.stream(folder, 900, progress_bar=False)
        >>> pmcmc.resume(folder, logdensity).num_samples
        1000
    """
    refuse_transformation("resume", model_args, model_kwargs, initial_position)
    path = Path(path)
    if not (path / CHECKPOINT).exists():
        why = "no Chain.stream has begun there"
        if (path / DRAWS).exists():
            why = (
                "a Chain.stream was stopped there before its first checkpoint, or something has removed it. There is "
                "nothing to continue: delete the folder, and call Chain.stream again"
            )
        raise FileNotFoundError(f"{path} holds no {CHECKPOINT}: {why}.")
    with closing(Store(path)) as store:
        reader = Reader(path / CHECKPOINT, STORE)
        state, solver = rebuild(reader, model, model_args, model_kwargs, initial_position, kernel, solver)
        if not (kept_sites := tuple(reader.names("kept_sites"))):
            raise reader.malformed("kept_sites is empty")
        state, report = read_report(reader, state)
        stored_memory = reader.field("max_memory", int, NoneType, least=1)
        chain = StoredChain(
            path,
            kept_sites,
            reader.field("num_samples", int, least=1),
            state,
            report,
            read_thinning(reader, state),
            solver,
            stored_memory,
            devices,
        )
        check_num_draws(reader, state, chain.num_samples, chain.thinning)
        num_wanted = reader.field("num_wanted", int, least=max(1, chain.thinning, state.num_steps))
        num_planned = reader.field("num_planned", int, least=1)
        reader.names("extra_fields")
        reader.close()
        _check_draws(reader, chain)
        settings = settings_of(chain, num_wanted, stored_memory if max_memory is None else max_memory)
        chain = replace(chain, max_memory=settings.max_memory)
        if not (left := num_wanted - state.num_steps):
            return chain
        num_planned = None if solver is None else num_planned  # "auto" plans again
        return _to_store(store, chain, replace(settings, num_samples=left), progress_bar, num_planned=num_planned)


def _check_draws(reader: Reader, chain: StoredChain) -> None:
    """Raise an error if the folder does not hold the draws that its checkpoint describes."""
    target = chain.state.target
    known = by_name(jax.eval_shape(target.model.constrain, target.data, target.spec.template))
    if strange := set(chain.sites) - set(known):
        raise reader.malformed(f"the model has no site {min(strange)}")
    try:
        found = read_arrays(chain.path / DRAWS, "posterior", chain.sites)
        stats = read_arrays(chain.path / DRAWS, "sample_stats", ("lp",))
    except (OSError, KeyError, ValueError, TypeError) as error:
        raise reader.malformed(f"{DRAWS} cannot be read: {error}") from error
    for name, x in {**found, **stats}.items():
        if x.ndim < 2 or x.shape[0] != chain.num_chains or x.shape[1] < chain.num_samples:
            raise reader.malformed(f"{DRAWS} holds {name} of {list(x.shape)}, not {chain.num_samples} draws")
