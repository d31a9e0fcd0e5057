"""Warm-up: tunes a kernel, and finds the coordinates and states that chains start from.

A `Warmup` runs a kernel from dispersed starts and returns a `Tuned`: the kernel with its step size set, the target in
whitened coordinates ``x = loc + scale y`` (the posterior's location and scales), and an ensemble of states near the
posterior.

- `EnsembleAdaptation`, the default: windows over up to 32 lanes of HMC.
- `WindowAdaptation`: Stan's windows with NUTS.
- `ChEESAdaptation`: also tunes the trajectory length of `pmcmc.HMC`.
- `Pathfinder`: moves the starts towards the posterior before another warm-up.
- `SiteAdaptation`: for kernels over named sites.

Source: Hoffman & Gelman (2014) for dual averaging; Stan Development Team for windows; Zhang et al. (2020) for pooling
over chains.
"""

from pmcmc.warmup.base import Tuned, Warmup, WarmupError
from pmcmc.warmup.blackjax import ChEESAdaptation, Pathfinder, WindowAdaptation
from pmcmc.warmup.ensemble import EnsembleAdaptation
from pmcmc.warmup.sites import SiteAdaptation

__all__ = [
    "ChEESAdaptation",
    "EnsembleAdaptation",
    "Pathfinder",
    "SiteAdaptation",
    "Tuned",
    "Warmup",
    "WarmupError",
    "WindowAdaptation",
]
