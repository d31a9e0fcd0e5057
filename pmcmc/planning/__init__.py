"""Predict what each solver would cost on a run, and choose one. Arithmetic on measurements; nothing is run.

`CostModel` makes the `Costs` of a step out of measurements. `predict_sweeps` and `predict_iterations` predict how long
solvers take from the merge times of coupled chains. `plan` compares all solvers and returns a `Plan`.
"""

from pmcmc.planning.costs import CostModel, Costs
from pmcmc.planning.plan import Candidate, Plan, plan
from pmcmc.planning.predict import (
    Prediction,
    SweepPrediction,
    extrapolate_iterations,
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
    "plan",
    "predict_iterations",
    "predict_sweeps",
]
