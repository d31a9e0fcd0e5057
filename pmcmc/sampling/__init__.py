"""From a model to draws.

`api` has the public functions and `settings` checks their arguments; `session` is one run, warm-up included.
`automatic` decides how to sample, from the `pilot`; `segments` takes the steps, with the compiled `programs`, and keeps
their draws in memory, `store` and `streaming` on disk; `reporting` makes the report and warns.
"""

from pmcmc.chain.loading import load
from pmcmc.sampling.api import parallel_chain, sample
from pmcmc.sampling.segments import NonFiniteState
from pmcmc.sampling.session import Interrupted
from pmcmc.sampling.streaming import resume

__all__ = ["Interrupted", "NonFiniteState", "load", "parallel_chain", "resume", "sample"]
