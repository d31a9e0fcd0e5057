"""Warm-up: tunes a kernel and finds the coordinates and states to start from."""

from pmcmc.warmup._base import Tuned, Warmup, WarmupError
from pmcmc.warmup._blocks import BlockAdaptation
from pmcmc.warmup._chees import ChEESAdaptation
from pmcmc.warmup._ensemble import EnsembleAdaptation
from pmcmc.warmup._pathfinder import Pathfinder
from pmcmc.warmup._window import WindowAdaptation

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
