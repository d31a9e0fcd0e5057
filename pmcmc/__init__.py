"""Sample one exact Markov chain in parallel across its length."""

from pmcmc import plots, recurrence, stability
from pmcmc.chain import Chain
from pmcmc.kernels import (
    HMC,
    MALA,
    NUTS,
    BranchTaken,
    CategoricalUpdate,
    Compose,
    CustomUpdate,
    DirichletUpdate,
    DiscreteGibbs,
    GammaUpdate,
    Gibbs,
    Info,
    InverseGammaUpdate,
    Kernel,
    NormalUpdate,
    RandomWalk,
    StraightThrough,
    UniformLength,
    from_blackjax,
)
from pmcmc.recurrence import RESULTS
from pmcmc.report import SolveReport
from pmcmc.sampling import parallel_chain, sample
from pmcmc.target import Target
from pmcmc.warmup import (
    BlockAdaptation,
    ChEESAdaptation,
    EnsembleAdaptation,
    Pathfinder,
    Warmup,
    WarmupError,
    WindowAdaptation,
)

__version__ = "0.1.0"

__all__ = [
    "HMC",
    "MALA",
    "NUTS",
    "RESULTS",
    "BlockAdaptation",
    "BranchTaken",
    "CategoricalUpdate",
    "ChEESAdaptation",
    "Chain",
    "Compose",
    "CustomUpdate",
    "DirichletUpdate",
    "DiscreteGibbs",
    "EnsembleAdaptation",
    "GammaUpdate",
    "Gibbs",
    "Info",
    "InverseGammaUpdate",
    "Kernel",
    "NormalUpdate",
    "Pathfinder",
    "RandomWalk",
    "SolveReport",
    "StraightThrough",
    "Target",
    "UniformLength",
    "Warmup",
    "WarmupError",
    "WindowAdaptation",
    "from_blackjax",
    "parallel_chain",
    "plots",
    "recurrence",
    "sample",
    "stability",
]
