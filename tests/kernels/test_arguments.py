"""Numbers given to kernels and warm-ups: numpy's count as Python's do, and booleans are none."""

import subprocess
import sys
from pathlib import Path

import blackjax
import numpy as np
import pytest

import pmcmc
from pmcmc.kernels import ParallelLeapfrog, UniformLength

ROOT = Path(__file__).parents[2]
# Constructors of one integer, which is at least 1. Those of `STATIC` are annotated as int, so tests, which check types,
# call them in a process of their own.
INTS = {
    "num_integration_steps": lambda n: pmcmc.HMC(num_integration_steps=n),
    "low": lambda n: UniformLength(n, 4),
    "high": lambda n: UniformLength(1, n),
}
STATIC = """
import numpy as np, pmcmc
from pmcmc.kernels import ParallelLeapfrog
for make, name, least in (
    (lambda n: ParallelLeapfrog(n), "num_steps", 1),
    (lambda n: pmcmc.NUTS(max_num_doublings=n), "max_num_doublings", 1),
    (lambda n: pmcmc.WindowAdaptation(num_starts=n), "num_starts", 1),
    (lambda n: pmcmc.SiteAdaptation(num_starts=n), "num_starts", 2),
):
    for kind in (int, np.int64, np.uint8):
        assert type(getattr(make(kind(3)), name)) is int
    for wrong in (True, np.True_, 3.0, np.float32(3), least - 1, np.int64(least - 1)):
        try:
            make(wrong)
        except (TypeError, ValueError) as error:
            print(f"{error}".startswith((f"{name} must be an integer", f"{name} must be at least {least}")))
        else:
            print(name, repr(wrong), "passed")
"""
# Constructors of one number that is not an integer, and one that each refuses.
NUMBERS = {
    "step_size": (lambda x: pmcmc.MALA(step_size=x), 0),
    "step_size of BlackJAX": (lambda x: pmcmc.from_blackjax(blackjax.mala, step_size=x), 0),
    "trajectory_length": (lambda x: pmcmc.HMC(trajectory_length=x), -1),
    "step_size_jitter": (lambda x: pmcmc.HMC(step_size_jitter=x), 1),
    "target_acceptance_rate of lanes": (lambda x: pmcmc.EnsembleAdaptation(target_acceptance_rate=x), 1),
    "target_acceptance_rate of windows": (lambda x: pmcmc.WindowAdaptation(target_acceptance_rate=x), 0),
    "target_acceptance_rate of sites": (lambda x: pmcmc.SiteAdaptation(target_acceptance_rate=x), 2),
    "grid_share": (lambda x: pmcmc.RandomWalk(grid_share=x), 2),
}


@pytest.mark.parametrize("name", INTS)
def test_integers(name: str) -> None:
    make = INTS[name]
    for kind in (int, np.int64, np.uint8):
        assert make(kind(3)) == make(3)
        with pytest.raises(ValueError, match=f"{name} must be at least 1, got 0"):
            make(kind(0))
    for wrong in (True, np.True_, 3.0, np.float32(3)):
        with pytest.raises(TypeError, match=f"{name} must be an integer, got"):
            make(wrong)


def test_static_integers() -> None:
    """They end as Python's: they are part of a program's key, and files hold them as numbers."""
    ran = subprocess.run([sys.executable, "-c", STATIC], capture_output=True, text=True, check=True, cwd=ROOT)
    assert ran.stdout.split("\n") == [*["True"] * 24, ""]


@pytest.mark.parametrize("name", NUMBERS)
def test_numbers(name: str) -> None:
    make, wrong = NUMBERS[name]
    for kind in (int, float, np.int64, np.float32, np.float64):
        with pytest.raises(ValueError, match=f"{name.split()[0]} must"):
            make(kind(wrong))
    for boolean in (True, np.False_):
        with pytest.raises(TypeError, match=f"{name.split()[0]} must be a number, got"):
            make(boolean)


def test_numbers_of_blackjax() -> None:
    found = pmcmc.from_blackjax(blackjax.hmc, step_size=np.int64(1), num_integration_steps=np.int64(3))
    assert found.parameters == {"step_size": 1.0}
    assert [type(value) for _, value in found.settings] == [int]


def test_two_arguments_of_hmc() -> None:
    with pytest.raises(ValueError, match="make them equal"):
        pmcmc.HMC(num_integration_steps=np.int64(3), leapfrog=ParallelLeapfrog(4))
    with pytest.raises(ValueError, match="1 <= low <= high"):
        UniformLength(np.int64(3), 2)
