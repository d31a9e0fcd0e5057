"""Markov kernels as deterministic maps of pre-drawn noise."""

from pmcmc.kernels.base import Info, Kernel, SiteKernel
from pmcmc.kernels.blackjax import BlackJAX, from_blackjax
from pmcmc.kernels.compose import Block, Compose
from pmcmc.kernels.discrete import DiscreteGibbs
from pmcmc.kernels.gibbs import Gibbs
from pmcmc.kernels.hmc import HMC
from pmcmc.kernels.leapfrog import Leapfrog, ParallelLeapfrog, SequentialLeapfrog, UniformLength
from pmcmc.kernels.mala import MALA
from pmcmc.kernels.metropolis import BranchTaken, StraightThrough, Surrogate
from pmcmc.kernels.nuts import NUTS
from pmcmc.kernels.random_walk import RandomWalk
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
