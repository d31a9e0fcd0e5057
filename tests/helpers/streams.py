"""The chain that the streaming tests use."""

import pmcmc
from pmcmc.recurrence import MultipleShooting
from tests.helpers.targets import gaussian, start_like

KERNEL = pmcmc.HMC(step_size=0.9, num_integration_steps=2)
SIZES = dict(kernel=KERNEL, num_warmup=0, num_chains=2, num_samples=100, progress_bar=False)
NUM_MORE = 1901


BLOCKS = MultipleShooting(4)


def start(solver=BLOCKS, thinning: int = 3, **options) -> pmcmc.Chain:
    return pmcmc.sample(gaussian, start_like(gaussian), 0, solver=solver, thinning=thinning, **{**SIZES, **options})
