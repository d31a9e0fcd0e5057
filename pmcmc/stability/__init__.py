"""Will parallel pay? Coalescence of coupled paths."""

from pmcmc.stability._coalescence import Coalescence, coalescence_steps

__all__ = ["Coalescence", "coalescence_steps"]
