"""Sample one exact Markov chain in parallel across its length.

With its randomness drawn first, a Markov chain is a recurrence ``x[t] = f(x[t-1], noise[t])``, t = 1..T. pmcmc solves
all T equations at once where chains that start apart soon merge under the same noise, and certifies the solution on
the equations themselves. Elsewhere it samples sequentially. Either way the result is the chain that sequential sampling
with the same key gives, up to rounding.

Start with `parallel_chain` for a NumPyro model, `sample` for a log density, or `ParallelMCMC` in the place of
``numpyro.infer.MCMC``. All three take a `Kernel` (`HMC` by default), a `Warmup` and a solver; the first two return a
`Chain`. `load` reads saved chains, `resume` finishes an interrupted run. `pmcmc.recurrence` solves recurrences
without any MCMC, `pmcmc.stability` measures whether a chain contracts, `pmcmc.planning` predicts run times, and
`pmcmc.plots` draws the results.
"""

from typing import TYPE_CHECKING, Any

from pmcmc import kernels, planning, plots, recurrence, stability, warmup
from pmcmc._pytree import register_dataclass
from pmcmc._xla.folder import cache_programs
from pmcmc.chain.chain import Chain
from pmcmc.chain.report import SolveReport
from pmcmc.chain.stored import StoredChain
from pmcmc.chain.verify import Verification
from pmcmc.interop.partial_centring import AutoReparam
from pmcmc.kernels import (
    HMC,
    MALA,
    NUTS,
    Compose,
    DiscreteGibbs,
    Gibbs,
    Info,
    Kernel,
    RandomWalk,
    from_blackjax,
)
from pmcmc.recurrence import RESULTS
from pmcmc.sampling import Interrupted, NonFiniteState, load, parallel_chain, resume, sample
from pmcmc.target import Target
from pmcmc.warmup import (
    EnsembleAdaptation,
    SiteAdaptation,
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
    "AutoReparam",
    "Chain",
    "Compose",
    "DiscreteGibbs",
    "EnsembleAdaptation",
    "Gibbs",
    "Info",
    "Interrupted",
    "Kernel",
    "NonFiniteState",
    "ParallelMCMC",
    "RandomWalk",
    "SiteAdaptation",
    "SolveReport",
    "StoredChain",
    "Target",
    "Verification",
    "Warmup",
    "WarmupError",
    "WindowAdaptation",
    "cache_programs",
    "from_blackjax",
    "kernels",
    "load",
    "parallel_chain",
    "planning",
    "plots",
    "recurrence",
    "register_dataclass",
    "resume",
    "sample",
    "stability",
    "warmup",
]


def __getattr__(name: str) -> Any:
    """Import `ParallelMCMC` on first use: it subclasses NumPyro's ``MCMC``, and NumPyro is slow to import."""
    if name != "ParallelMCMC":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from pmcmc.drop_in import ParallelMCMC

    return ParallelMCMC
