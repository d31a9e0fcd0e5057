"""Markov kernels as deterministic maps of pre-drawn noise."""

from pmcmc.kernels._base import Info, Kernel
from pmcmc.kernels._blackjax import BlackJAX, from_blackjax
from pmcmc.kernels._compose import Block, Compose
from pmcmc.kernels._discrete import DiscreteGibbs
from pmcmc.kernels._gibbs import Gibbs
from pmcmc.kernels._hmc import HMC
from pmcmc.kernels._leapfrog import Leapfrog, ParallelLeapfrog, SequentialLeapfrog, UniformLength
from pmcmc.kernels._mala import MALA
from pmcmc.kernels._metropolis import BranchTaken, StraightThrough, Surrogate
from pmcmc.kernels._nuts import NUTS
from pmcmc.kernels._random_walk import RandomWalk
from pmcmc.kernels._sites import SiteKernel
from pmcmc.kernels._updates import (
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
