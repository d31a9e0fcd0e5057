"""From a model to draws."""

from pmcmc.sampling._api import parallel_chain, sample

__all__ = ["parallel_chain", "sample"]
