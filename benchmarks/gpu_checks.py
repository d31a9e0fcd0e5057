"""Checks before anything is measured on a GPU: known faults, and chains that must be those of the CPU."""

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import jax
import numpy as np

from benchmarks._runs import in_blocks, in_order
from benchmarks.cases import CASES
from pmcmc import doctor
from pmcmc.recurrence import RESULTS

# Short chains in few blocks, by name of the case, and the share of states that must be those of a CPU: an accept
# decision near a tie may differ, and the chain is another one until it merges.
CHAINS = {"mixture_hmc": 2048, "banana_nuts": 1024}
NUM_BLOCKS = 16
LEAST_SHARE = 0.9
APART = 1e-2  # in posterior scales


def checks() -> Iterator[dict[str, Any]]:
    """Yield a row for each check: what was seen, and whether it is as it should be."""
    for finding in doctor.faults():
        yield {"suite": "checks", "sound": not finding.remedy, "seen": f"{finding.text} {finding.remedy}".strip()}
    for x64 in (False, True):
        with jax.enable_x64(x64):
            for name in CHAINS:
                yield exactness(name)


def exactness(name: str) -> dict[str, Any]:
    """Return the row of a case: blocks on the default device beside the CPU, or the error that stopped them."""
    try:
        return _compared(name)
    except Exception as error:  # the rest is measured all the same
        return {"suite": "checks", "sound": False, "seen": f"{name}: {error!r}"}


def _compared(name: str) -> dict[str, Any]:
    """Compare blocks on the default device with sequential sampling on the CPU, under the same noise."""
    here, result = _states(name, NUM_BLOCKS)
    with jax.default_device(jax.devices("cpu")[0]):
        there, _ = _states(name, 0)
    share = float(np.mean(np.max(np.abs(here - there), axis=-1) < APART))
    seen = f"{CASES[name]().name}, {here.dtype}: {NUM_BLOCKS} blocks {result}, {share:.1%} of the states are the CPU's"
    return {"suite": "checks", "sound": result == RESULTS.successful.name and share >= LEAST_SHARE, "seen": seen}


def _states(name: str, num_blocks: int) -> tuple[np.ndarray, str]:
    """Return the states of a short chain on the default device, in blocks or sequentially (0), and the result."""
    case = replace(CASES[name](), length=CHAINS[name])
    bank = case.start(jax.random.key(1), 64)
    segment, _ = (in_blocks(case, bank, num_blocks) if num_blocks else in_order(case, bank))()
    (states,) = jax.tree.leaves(segment.chains()[0])
    return states.reshape(-1, case.dim)[: case.length], RESULTS(int(segment.result[0])).name
