"""Seconds of a step, of lanes and of compilation."""

from typing import NamedTuple

from pmcmc._typing import Scalar


class Costs(NamedTuple):
    """Seconds, measured on the device at hand.

    sequential: a step of all chains, one after the other. overhead, lane: a step of n lanes takes
    ``overhead + n lane``. compile: of one more program. overlap: share of that time in which steps are taken in order.
    device_overhead, device_gain: where d > 1 devices share the lanes, it is
    ``overhead + device_overhead + n lane / (1 + device_gain (d - 1))``.
    """

    sequential: float
    overhead: float
    lane: float
    compile: float
    overlap: float = 0.0
    device_overhead: float = 0.0
    device_gain: float = 1.0

    def step(self, lanes: Scalar, num_devices: int = 1) -> float:
        """One step of this many lanes."""
        apart = self.device_overhead if num_devices > 1 else 0.0
        return self.overhead + apart + lanes * self.lane / (1 + self.device_gain * (num_devices - 1))
