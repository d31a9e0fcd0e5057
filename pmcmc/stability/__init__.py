"""Will parallel pay? Lyapunov exponents and coalescence of coupled paths."""

from pmcmc.stability._coalescence import Checkpoints, Coalescence, coalescence_time
from pmcmc.stability._contraction import ContractionBound, contraction_bound
from pmcmc.stability._distance import coordinate_distances, site_distances
from pmcmc.stability._lyapunov import LyapunovExponent, lyapunov_exponent
from pmcmc.stability._pilot import PilotError, check_pilot
from pmcmc.stability._plan import Candidate, Costs, Plan, plan

__all__ = [
    "Candidate",
    "Checkpoints",
    "Coalescence",
    "ContractionBound",
    "Costs",
    "LyapunovExponent",
    "PilotError",
    "Plan",
    "check_pilot",
    "coalescence_time",
    "contraction_bound",
    "coordinate_distances",
    "lyapunov_exponent",
    "plan",
    "site_distances",
]
