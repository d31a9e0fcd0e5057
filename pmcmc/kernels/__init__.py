"""Markov kernels as deterministic maps of pre-drawn noise."""

from pmcmc.kernels._base import Info, Kernel
from pmcmc.kernels._blackjax import BlackJAX, from_blackjax
from pmcmc.kernels._hmc import HMC
from pmcmc.kernels._leapfrog import Leapfrog, ParallelLeapfrog, SequentialLeapfrog, UniformLength
from pmcmc.kernels._mala import MALA
from pmcmc.kernels._metropolis import BranchTaken, StraightThrough, Surrogate
from pmcmc.kernels._nuts import NUTS
from pmcmc.kernels._random_walk import RandomWalk

__all__ = [
    "HMC",
    "MALA",
    "NUTS",
    "BlackJAX",
    "BranchTaken",
    "Info",
    "Kernel",
    "Leapfrog",
    "ParallelLeapfrog",
    "RandomWalk",
    "SequentialLeapfrog",
    "StraightThrough",
    "Surrogate",
    "UniformLength",
    "from_blackjax",
]
