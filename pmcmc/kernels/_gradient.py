"""What kernels with a cached gradient share: the state and the way in and out of it."""

from typing import NamedTuple

from pmcmc._types import Array
from pmcmc.kernels._base import Kernel


class GradientState(NamedTuple):
    """Position (D,) in the target's coordinates with the log density and its gradient (D,) there."""

    position: Array
    logdensity: Array
    gradient: Array


class GradientKernel(Kernel):
    """A kernel whose unknown is the position alone; log density and gradient are caches."""

    def init(self, target, position):
        return self.restore(target, target.coordinates(position))

    def unknown(self, state: GradientState) -> Array:
        return state.position

    def restore(self, target, unknown: Array) -> GradientState:
        return GradientState(unknown, *target.value_and_grad(unknown))

    def coordinates(self, unknown: Array) -> Array:
        return unknown
