"""Markov kernels as deterministic maps of pre-drawn noise."""

from pmcmc.kernels._base import Info, Kernel
from pmcmc.kernels._hmc import HMC
from pmcmc.kernels._leapfrog import Leapfrog, ParallelLeapfrog, SequentialLeapfrog, UniformLength
from pmcmc.kernels._mala import MALA
from pmcmc.kernels._metropolis import BranchTaken, StraightThrough, Surrogate

__all__ = [
    "HMC",
    "MALA",
    "BranchTaken",
    "Info",
    "Kernel",
    "Leapfrog",
    "ParallelLeapfrog",
    "SequentialLeapfrog",
    "StraightThrough",
    "Surrogate",
    "UniformLength",
]
