"""Whether what is asked for fits into memory, before anything is sampled: the system would only end the process."""

from pmcmc._memory import available_bytes, size_text
from pmcmc.recurrence import Sequential
from pmcmc.sampling._engine import SEGMENT_BYTES, Engine
from pmcmc.sampling._settings import Settings

# A solve for fewer steps at once is all overhead; sequential sampling takes them in such pieces.
LEAST_STEPS = Sequential.unit
_REMEDY = "Keep fewer draws by thinning=, write them to disk by Chain.stream, or sample fewer chains at a time."


def fit_memory(engine: Engine, settings: Settings, held: int) -> None:
    """Give an engine its share of the memory, or raise where that holds nothing to speak of.

    engine: of shapes, if there is no more yet. held: bytes of what is kept of all chains, which share the user's
    budget with the engine. Without one it has `SEGMENT_BYTES`, and both share what is available.

    Raises:
        MemoryError: how much is needed and there, and what to do.
    """
    num_steps, most, available = settings.num_samples, settings.max_memory, available_bytes()
    step = engine.bytes_per_step(settings.solver or Sequential())
    least = held + step * min(num_steps, LEAST_STEPS)
    if most is not None:
        if least > most:
            raise MemoryError(
                f"max_memory is {size_text(most)}, and the least is {size_text(least)}: {size_text(held)} for draws, "
                f"the rest for {LEAST_STEPS} steps of {engine.num_chains} chain(s) at once. {_REMEDY}"
            )
        engine.max_bytes = most - held
    needed = max(least, held + min(num_steps * step, engine.max_bytes or SEGMENT_BYTES))
    if needed > available:
        raise MemoryError(
            f"{num_steps:,} steps of {engine.num_chains} chain(s) need about {size_text(needed)}, {size_text(held)} of "
            f"it for draws, and {size_text(available)} are available. {_REMEDY}"
        )
