"""Does the chain contract? Lyapunov exponents, coalescence of coupled paths, and what these prove."""

from pmcmc.stability.coalescence import Checkpoints, Coalescence, coalescence_time
from pmcmc.stability.diagnosis import Diagnosis, SiteDistance, diagnose
from pmcmc.stability.distance import coordinate_distances, site_distances
from pmcmc.stability.evidence import PilotError, check_pilot
from pmcmc.stability.lyapunov import ContractionBound, LyapunovExponent, contraction_bound, lyapunov_exponent
from pmcmc.stability.wasserstein import WassersteinBound, wasserstein_bound

__all__ = [
    "Checkpoints",
    "Coalescence",
    "ContractionBound",
    "Diagnosis",
    "LyapunovExponent",
    "PilotError",
    "SiteDistance",
    "WassersteinBound",
    "check_pilot",
    "coalescence_time",
    "contraction_bound",
    "coordinate_distances",
    "diagnose",
    "lyapunov_exponent",
    "site_distances",
    "wasserstein_bound",
]
