"""From a model to draws."""

from pmcmc.sampling._api import parallel_chain, sample
from pmcmc.sampling._load import load

__all__ = ["load", "parallel_chain", "sample"]
