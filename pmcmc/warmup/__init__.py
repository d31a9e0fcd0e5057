"""Warm-up: tunes a kernel and finds the coordinates and states to start from."""

from pmcmc.warmup.base import Tuned, Warmup, WarmupError
from pmcmc.warmup.blackjax import ChEESAdaptation, Pathfinder, WindowAdaptation
from pmcmc.warmup.ensemble import EnsembleAdaptation
from pmcmc.warmup.sites import BlockAdaptation

__all__ = [
    "BlockAdaptation",
    "ChEESAdaptation",
    "EnsembleAdaptation",
    "Pathfinder",
    "Tuned",
    "Warmup",
    "WarmupError",
    "WindowAdaptation",
]
