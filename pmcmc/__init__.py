"""Sample one exact Markov chain in parallel across its length."""

from typing import TYPE_CHECKING, Any

from pmcmc import planning, plots, recurrence, stability
from pmcmc._pytree import register_dataclass
from pmcmc.chain.chain import Chain
from pmcmc.chain.report import SolveReport
from pmcmc.chain.state import ChainState
from pmcmc.chain.stored import StoredChain
from pmcmc.chain.verify import Verification
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
from pmcmc.sampling import Interrupted, NonFiniteState, load, parallel_chain, resume, sample
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

if TYPE_CHECKING:
    from pmcmc.drop_in import ParallelMCMC

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
    "ChainState",
    "Compose",
    "CustomUpdate",
    "DirichletUpdate",
    "DiscreteGibbs",
    "EnsembleAdaptation",
    "GammaUpdate",
    "Gibbs",
    "Info",
    "Interrupted",
    "InverseGammaUpdate",
    "Kernel",
    "NonFiniteState",
    "NormalUpdate",
    "ParallelMCMC",
    "Pathfinder",
    "RandomWalk",
    "SolveReport",
    "StoredChain",
    "StraightThrough",
    "Target",
    "UniformLength",
    "Verification",
    "Warmup",
    "WarmupError",
    "WindowAdaptation",
    "from_blackjax",
    "load",
    "parallel_chain",
    "planning",
    "plots",
    "recurrence",
    "register_dataclass",
    "resume",
    "sample",
    "stability",
]


def __getattr__(name: str) -> Any:
    """`ParallelMCMC` on first use: it is a subclass of NumPyro's, and NumPyro is slow to import."""
    if name != "ParallelMCMC":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from pmcmc.drop_in import ParallelMCMC

    return ParallelMCMC
