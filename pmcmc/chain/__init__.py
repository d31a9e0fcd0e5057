"""Chains and what belongs to them: draws, state, report, verification, and files.

A `Chain` holds draws in memory, a `StoredChain` draws on disk. Both contain a `ChainState`, from which sampling can
continue, and a `SolveReport` on how the draws were made. `Chain.summary` returns a `Summary`, and
`Chain.verify` a `Verification`. This package does not
sample: that is the task of `pmcmc.sampling`.
"""

from pmcmc.chain.chain import Chain
from pmcmc.chain.report import SolveReport, Summary
from pmcmc.chain.state import ChainState
from pmcmc.chain.stored import StoredChain
from pmcmc.chain.verify import Verification

__all__ = ["Chain", "ChainState", "SolveReport", "StoredChain", "Summary", "Verification"]
