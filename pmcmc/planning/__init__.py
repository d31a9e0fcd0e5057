"""What would each solver cost on this run, and which one is worth it? Arithmetic on measurements; nothing is run."""

from pmcmc.planning.costs import CostModel, Costs
from pmcmc.planning.plan import Candidate, Plan, plan
from pmcmc.planning.predict import (
    Prediction,
    SweepPrediction,
    extrapolate_iterations,
    nonlinear_steps,
    predict_iterations,
    predict_sweeps,
)

__all__ = [
    "Candidate",
    "CostModel",
    "Costs",
    "Plan",
    "Prediction",
    "SweepPrediction",
    "extrapolate_iterations",
    "nonlinear_steps",
    "plan",
    "predict_iterations",
    "predict_sweeps",
]
