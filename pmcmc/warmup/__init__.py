"""Warm-up: tunes a kernel and finds the coordinates and states to start from."""

from pmcmc.warmup._base import Tuned, Warmup, WarmupError
from pmcmc.warmup._blocks import BlockAdaptation
from pmcmc.warmup._window import WindowAdaptation

__all__ = ["BlockAdaptation", "Tuned", "Warmup", "WarmupError", "WindowAdaptation"]
