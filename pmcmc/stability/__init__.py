"""Will parallel pay? Lyapunov exponents, coalescence of coupled paths, and what they say of a solve."""

from pmcmc.stability._checkpoints import Checkpoints
from pmcmc.stability._coalescence import Coalescence, coalescence_time
from pmcmc.stability._contraction import ContractionBound, contraction_bound
from pmcmc.stability._diagnosis import Diagnosis, SiteDistance, diagnose
from pmcmc.stability._distance import coordinate_distances, site_distances
from pmcmc.stability._lyapunov import LyapunovExponent, lyapunov_exponent
from pmcmc.stability._pilot import PilotError, check_pilot
from pmcmc.stability._plan import Candidate, Costs, Plan, plan
from pmcmc.stability._predict import (
    Prediction,
    SweepPrediction,
    extrapolate_iterations,
    nonlinear_steps,
    predict_iterations,
    predict_sweeps,
)
from pmcmc.stability._wasserstein import WassersteinBound, wasserstein_bound

__all__ = [
    "Candidate",
    "Checkpoints",
    "Coalescence",
    "ContractionBound",
    "Costs",
    "Diagnosis",
    "LyapunovExponent",
    "PilotError",
    "Plan",
    "Prediction",
    "SiteDistance",
    "SweepPrediction",
    "WassersteinBound",
    "check_pilot",
    "coalescence_time",
    "contraction_bound",
    "coordinate_distances",
    "diagnose",
    "extrapolate_iterations",
    "lyapunov_exponent",
    "nonlinear_steps",
    "plan",
    "predict_iterations",
    "predict_sweeps",
    "site_distances",
    "wasserstein_bound",
]
