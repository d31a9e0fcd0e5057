"""From a model to draws."""

from pmcmc.chain.loading import load
from pmcmc.sampling.api import parallel_chain, sample
from pmcmc.sampling.segments import NonFiniteState
from pmcmc.sampling.session import Interrupted
from pmcmc.sampling.streaming import resume

__all__ = ["Interrupted", "NonFiniteState", "load", "parallel_chain", "resume", "sample"]
