"""From a model to draws."""

from pmcmc.sampling._api import parallel_chain, sample
from pmcmc.sampling._load import load
from pmcmc.sampling._run import NonFiniteState
from pmcmc.sampling._sampling import Interrupted
from pmcmc.sampling._streaming import resume

__all__ = ["Interrupted", "NonFiniteState", "load", "parallel_chain", "resume", "sample"]
