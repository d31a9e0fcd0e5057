"""Markov kernels, each written as a deterministic map of a state and pre-drawn noise.

A `Kernel` draws all randomness of a step before it takes the step. A chain is then the deterministic recurrence
``x[t] = f(x[t-1], noise[t])``, which the solvers of `pmcmc.recurrence` evaluate in parallel across t.

- Kernels that use gradients: `HMC`, `MALA` and `NUTS`. Without gradients: `RandomWalk`.
- Kernels over named sites: `Gibbs` with updates such as `NormalUpdate`, `DiscreteGibbs`, and `Compose`, which applies
  several kernels one after the other.
- Algorithms of BlackJAX: `from_blackjax`.
- Base classes for kernels and their parts: `Kernel`, `SiteKernel`, `Update`, `Leapfrog` and `Surrogate`.

Source: Zoltowski et al. (2025).
"""

from pmcmc.kernels.base import Info, Kernel, SiteKernel
from pmcmc.kernels.blackjax import BlackJAX, from_blackjax
from pmcmc.kernels.discrete import DiscreteGibbs
from pmcmc.kernels.gibbs import Block, Compose, Gibbs
from pmcmc.kernels.hmc import HMC, Leapfrog, ParallelLeapfrog, SequentialLeapfrog, UniformLength
from pmcmc.kernels.mala import MALA
from pmcmc.kernels.metropolis import BranchTaken, RandomWalk, StraightThrough, Surrogate
from pmcmc.kernels.nuts import NUTS
from pmcmc.kernels.updates import (
    CategoricalUpdate,
    CustomUpdate,
    DirichletUpdate,
    GammaUpdate,
    InverseGammaUpdate,
    NormalUpdate,
    Update,
)

__all__ = [
    "HMC",
    "MALA",
    "NUTS",
    "BlackJAX",
    "Block",
    "BranchTaken",
    "CategoricalUpdate",
    "Compose",
    "CustomUpdate",
    "DirichletUpdate",
    "DiscreteGibbs",
    "GammaUpdate",
    "Gibbs",
    "Info",
    "InverseGammaUpdate",
    "Kernel",
    "Leapfrog",
    "NormalUpdate",
    "ParallelLeapfrog",
    "RandomWalk",
    "SequentialLeapfrog",
    "SiteKernel",
    "StraightThrough",
    "Surrogate",
    "UniformLength",
    "Update",
    "from_blackjax",
]
