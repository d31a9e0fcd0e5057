"""A ten-minute suite for GPUs: ``python -m benchmarks --gpu`` writes ``results/<device>.json``.

Every case has T = 100,000 and is solved by shooting with hundreds to thousands of blocks. It is compared with
sequential sampling on the GPU and on the CPU in the same process (fewer steps, scaled up, where T would take long) and
with the embarrassingly parallel limit. Known faults of GPUs are checked first, slow scatter-adds among them, and are
kept in the file.
"""

from pathlib import Path

import jax

from benchmarks import kernels
from benchmarks._harness import device_name
from pmcmc import doctor

# The most important first: the time may run out before the last ones.
CASES = (
    "german_credit",
    "german_credit_hmc",
    "eight_schools",
    "schools_gibbs",
    "mixture",
    "german_credit_nuts",
    "eight_schools_nuts",
    "banana",
    "mixture_hmc",
    "banana_nuts",
)
BLOCKS = (256, 1024, 4096)


def run(scale: float, folder: Path, minutes: float = 9.0) -> None:
    """Check for faults, then measure the cases, each of which is saved at once."""
    devices = jax.devices()
    if devices[0].platform == "cpu":
        print("No GPU is seen by JAX: this is a rehearsal on the CPU.")
    faults = [finding.text for finding in doctor.faults()]
    print(*faults, sep="\n", flush=True)
    blocks = [p for p in BLOCKS if p * kernels.MIN_BLOCK <= scale * 10**5]
    effort = kernels.Effort(repeats=5, seconds=4.0)
    name = device_name()
    kernels.run(CASES, blocks, scale, effort, name, folder, minutes, faults=faults)
    print(f"{folder / name}.json")
