"""From a model to draws."""

from pmcmc.sampling._api import parallel_chain, sample
from pmcmc.sampling._load import load
from pmcmc.sampling._stages import Interrupted

__all__ = ["Interrupted", "load", "parallel_chain", "sample"]
