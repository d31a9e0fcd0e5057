"""All cases of the suites: `benchmarks.targets`, `benchmarks.gibbs`, and posteriors with kernels tuned by warm-up."""

from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks import gibbs, posteriors, targets
from benchmarks.posteriors import Posterior
from benchmarks.targets import Case
from pmcmc import HMC, MALA, NUTS, Kernel, RandomWalk
from pmcmc.recurrence import Sequential


def tuned(posterior: Callable[[], Posterior], kernel: Kernel, length: int = 10**5) -> Case:
    """Make a case with the coordinates, kernel and ensemble of pmcmc's default warm-up."""
    found = posterior()
    chain = found.sampler()(
        0, kernel=kernel, solver=Sequential(), num_samples=1, num_chains=1, progress_bar=False
    ).state
    bank = chain.ensemble

    def start(key: jax.Array, n: int):
        size = len(jax.tree.leaves(bank)[0])
        return jax.tree.map(lambda x: x[jax.random.permutation(key, jnp.arange(n) % size)], bank)

    scale = jax.tree.map(lambda x: np.ones(x.shape[1:], x.dtype), bank)
    name = f"{found.name}, {type(kernel).__name__}"
    return Case(name, chain.target, chain.kernel, start, scale, length, settle=0)


irt_500 = partial(posteriors.irt, 480, 19)

CASES: dict[str, Callable[..., Case]] = {
    **targets.CASES,
    **gibbs.CASES,
    "irt_500": partial(tuned, irt_500, HMC(), 10**4),
    "irt_500_nuts": partial(tuned, irt_500, NUTS(), 10**4),
    "stochastic_volatility": partial(tuned, posteriors.stochastic_volatility, HMC()),
    "stochastic_volatility_mala": partial(tuned, posteriors.stochastic_volatility, MALA()),
    "german_credit_walk": partial(tuned, posteriors.german_credit, RandomWalk()),
    "eight_schools_walk": partial(tuned, posteriors.eight_schools, RandomWalk()),
}
