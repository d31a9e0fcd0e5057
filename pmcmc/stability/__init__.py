"""Measure whether a chain contracts, and what that proves about solving it in parallel.

`coalescence_time` couples pairs of chains by common noise and measures when they merge; `check_pilot` raises where such
a run proves nothing, and `diagnose` names the sites that keep the pairs apart. `lyapunov_exponent` and
`contraction_bound` measure how tangents grow along one path. `wasserstein_bound` bounds the distance from stationarity.
This package only measures; plans and predictions based on its measurements are in `pmcmc.planning`.
"""

from pmcmc.stability.coalescence import Coalescence, coalescence_time
from pmcmc.stability.diagnosis import Diagnosis, SiteDistance, diagnose
from pmcmc.stability.distance import WassersteinBound, site_distances, wasserstein_bound
from pmcmc.stability.evidence import PilotError, check_pilot
from pmcmc.stability.lyapunov import ContractionBound, LyapunovExponent, contraction_bound, lyapunov_exponent

__all__ = [
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
    "diagnose",
    "lyapunov_exponent",
    "site_distances",
    "wasserstein_bound",
]
