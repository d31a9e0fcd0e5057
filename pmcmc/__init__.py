"""Sample one exact Markov chain in parallel across its length."""

from pmcmc import plots, recurrence, stability
from pmcmc.chain import Chain, ChainState
from pmcmc.kernels import (
    HMC,
    MALA,
    NUTS,
    BranchTaken,
    Info,
    Kernel,
    RandomWalk,
    StraightThrough,
    UniformLength,
    from_blackjax,
)
from pmcmc.recurrence import RESULTS
from pmcmc.report import SolveReport
from pmcmc.sampling import load, parallel_chain, sample
from pmcmc.target import Target
from pmcmc.warmup import Warmup, WarmupError, WindowAdaptation

__version__ = "0.1.0"

__all__ = [
    "HMC",
    "MALA",
    "NUTS",
    "RESULTS",
    "BranchTaken",
    "Chain",
    "ChainState",
    "Info",
    "Kernel",
    "RandomWalk",
    "SolveReport",
    "StraightThrough",
    "Target",
    "UniformLength",
    "Warmup",
    "WarmupError",
    "WindowAdaptation",
    "from_blackjax",
    "load",
    "parallel_chain",
    "plots",
    "recurrence",
    "sample",
    "stability",
]
