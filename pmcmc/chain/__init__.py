"""Chains: draws, report, state, verification, and their files."""

from pmcmc.chain.chain import Chain
from pmcmc.chain.report import SolveReport
from pmcmc.chain.state import ChainState
from pmcmc.chain.stored import StoredChain
from pmcmc.chain.verify import Verification

__all__ = ["Chain", "ChainState", "SolveReport", "StoredChain", "Verification"]
