"""Random problems from warm-up to draws: each ends in the right chain or in an error with what to do.

How many is set by PMCMC_SOAK: 300 by default, a thousand before a release.

20 families are compiled: a kernel, a solver, and one or two chains. Target, scale, seed and start are numbers of one
program. The chain is compared with the sequential one from the end of warm-up, in float64.
"""

import os
from collections import Counter

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import pmcmc
from pmcmc.chain.state import Source
from pmcmc.recurrence import MultipleShooting, Sequential
from pmcmc.sampling.session import sample_from, warm_up
from pmcmc.sampling.settings import Settings, Starts
from tests.helpers.problems import DIM, random_numbers, target_of

pytestmark = pytest.mark.optimized

NUM_PROBLEMS = int(os.environ.get("PMCMC_SOAK", "300"))
NUM_SHAPES = NUM_PROBLEMS // 30
KERNELS = (
    pmcmc.HMC(),
    pmcmc.MALA(),
    pmcmc.RandomWalk(),
    pmcmc.HMC(num_integration_steps=3),
    pmcmc.NUTS(max_num_doublings=4),
)
SOLVERS = (MultipleShooting(4), "auto")
FAMILIES = [(kernel, solver, chains) for kernel in KERNELS for solver in SOLVERS for chains in (1, 2)]
# Errors that users may see, each with what to do.
CLEAR = (ValueError, pmcmc.WarmupError)


def settings_of(target: pmcmc.Target, kernel: pmcmc.Kernel, solver, num_chains: int, num_samples: int) -> Settings:
    return Settings.check(target, kernel, solver, 40, num_samples, num_chains, 1, (), None)


def end_to_end(rng: np.random.Generator, kernel: pmcmc.Kernel, solver, num_chains: int, num_samples: int) -> str:
    """Run one problem and return what happened."""
    numbers = random_numbers(rng)
    target = target_of(numbers)
    start = numbers.shift + numbers.size * (numbers.modes[0] + rng.choice([0.1, 1.0, 10.0]) * rng.normal(size=DIM))
    settings = settings_of(target, kernel, solver, num_chains, num_samples)
    num_starts = settings.warmup.count_starts(target)
    starts = Starts(lambda: jnp.repeat(jnp.asarray(start)[None], num_starts, axis=0), num_starts)
    try:
        source = Source(lambda: target, target, {})
        state = warm_up(source, jax.random.key(int(rng.integers(2**31))), starts, settings, progress_bar=False)
    except CLEAR as error:
        said = str(error)
    else:
        said = ""
    if said:
        assert len(said) > 60, f"an error without a remedy: {said}"
        return "refused"
    chain = sample_from(state, settings, progress_bar=False)
    exact = sample_from(state, settings_of(target, kernel, Sequential(), num_chains, num_samples), progress_bar=False)
    scale = np.maximum(exact.unknowns.std(axis=(0, 1)), 1e-12)
    gap = np.max(np.abs(chain.unknowns - exact.unknowns) / scale)
    assert gap <= 1e-8, f"{gap}: {numbers}, {chain.report}"
    np.testing.assert_array_equal(chain.info.margin > 0, exact.info.margin > 0)
    return chain.report.decision + (", finished in order" if chain.report.fallback else "")


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::UserWarning")  # 40 steps of warm-up are few, and so are 200 draws
@pytest.mark.parametrize("kernel", KERNELS, ids=lambda kernel: type(kernel).__name__)
def test_random_problems(kernel: pmcmc.kernels.Kernel) -> None:
    """Each kernel has its own test, since all together would exceed the time limit of a test."""
    families = [family for family in FAMILIES if family[0] == kernel]
    number, ends = NUM_PROBLEMS // len(KERNELS), Counter()
    rng = np.random.default_rng(KERNELS.index(kernel))
    for problem in range(number):
        _, solver, chains = families[problem * len(families) // number]  # family by family: programs may be dropped
        ends[end_to_end(rng, kernel, solver, chains, 200)] += 1
    print(dict(ends))
    assert sum(ends.values()) == number
    assert ends["shooting"] > number / 8
    assert ends["refused"] < number / 4


@pytest.mark.slow
def test_fresh_shapes() -> None:
    """Sizes for which no program was compiled: steps, chains, blocks, dimensions and thinning at random."""
    rng = np.random.default_rng(1)
    for _ in range(NUM_SHAPES):
        dim, num_samples = int(rng.integers(1, 6)), int(rng.integers(1, 200))
        step = 0.8 / np.sqrt(dim)
        chain = pmcmc.sample(
            lambda x: -0.5 * jnp.sum(x**2),
            jnp.asarray(rng.normal(size=dim)) if dim > 1 else float(rng.normal()),
            int(rng.integers(2**31)),
            kernel=pmcmc.RandomWalk(step_size=step),
            solver=MultipleShooting(int(rng.integers(1, 2 * num_samples + 1))),
            num_warmup=0,
            num_samples=num_samples,
            num_chains=int(rng.integers(1, 4)),
            thinning=int(rng.integers(1, min(num_samples, 5) + 1)),
            progress_bar=False,
        )
        found = chain.verify()
        assert found, str(found)
