"""Costs of a step: `Costs` holds the seconds that plans are computed with, `CostModel` derives them from measurements.

A run measures the time of a step of its own chains and, in warm-up, that of a step of many lanes. Whatever it does not
measure is a constant of `CostModel`.
"""

import math
from dataclasses import dataclass
from typing import NamedTuple

from pmcmc._pytree import Scalar


class Costs(NamedTuple):
    """Costs of steps in seconds, on the device that runs them.

    A step of n lanes takes ``overhead + n lane``; if d > 1 devices share the lanes, it takes
    ``overhead + device_overhead + n lane / (1 + device_gain (d - 1))``. On one device, blocks take
    ``overhead + (n + spare) lane / block_gain``.

    Attributes:
        sequential: Seconds of a sequential step of all chains.
        overhead: Seconds of a step of lanes that do not depend on their number.
        lane: Seconds that each lane adds to a step.
        compile: Seconds to compile one more program.
        overlap: Share of the compilation time in which sequential steps are taken.
        device_overhead: Seconds that sharing lanes between devices adds to a step.
        device_gain: Throughput that each further device adds, relative to that of the first.
        block_gain: Throughput of lanes in blocks, in all threads, over that of other lanes.
        spare: Number of lanes in blocks that take as long as what a step takes whatever the number of its lanes.
        most_lanes: Largest number of lanes of blocks that is considered on one device.
        least_lane: Share of ``lane`` that a lane may take in fact. Where blocks pay only then, they are tried.
    """

    sequential: float
    overhead: float
    lane: float
    compile: float
    overlap: float = 0.0
    device_overhead: float = 0.0
    device_gain: float = 1.0
    block_gain: float = 1.0
    spare: float = 0.0
    most_lanes: float = math.inf
    least_lane: float = 1.0

    def step(self, lanes: Scalar, num_devices: int = 1) -> float:
        """Return the seconds of one step of ``lanes`` lanes, shared by ``num_devices`` devices."""
        apart = self.device_overhead if num_devices > 1 else 0.0
        return self.overhead + apart + lanes * self.lane / (1 + self.device_gain * (num_devices - 1))

    def blocks_step(self, lanes: Scalar, num_devices: int = 1) -> float:
        """Return the seconds of one step of blocks."""
        if num_devices > 1:
            return self.step(lanes, num_devices)
        return self.overhead + (lanes + self.spare) * self.lane / self.block_gain


def segment_cost(step: Scalar, num_blocks: int, merge: Scalar, length: Scalar) -> Scalar:
    """Return the cost of one step of a segment in blocks, in sequential steps.

    A segment of ``length`` steps takes ``length / num_blocks`` steps of all lanes for its zeroth sweep and ``merge``
    for its repair.

    Args:
        step: Cost of a step of all lanes, in sequential steps.
        num_blocks: P, blocks per chain.
        merge: Steps until the slowest lane has merged.
        length: Steps per chain of the segment.
    """
    return step * (1 / num_blocks + merge / length)


@dataclass(frozen=True)
class CostModel:
    """Constants with which `costs` derives `Costs` from the measurements of a run.

    Attributes:
        compile_ratio: Compile time of the program of blocks over that of sequential sampling. The former contains the
            step twice, for the zeroth sweep and for repair; the latter was compiled while warm-up used the cores, too.
        overlap: Share of the compilation time of blocks in which sequential steps are taken, if there is more than one
            core. The rest is lost to tracing and because two threads share the cores.
        cpu_overhead: Seconds of a step of lanes on a CPU that do not depend on the number of lanes.
        cpu_warmup_overhead: Seconds of a step of warm-up on a CPU that do not depend on the number of lanes. It is
            larger than ``cpu_overhead``, because a run of warm-up's program has 16 steps only.
        cpu_lane_ratio: Seconds of one of many lanes over those of a lane in warm-up, which has a quarter of the lanes
            or less and adapts the step size in between.
        cpu_block_share: Largest time of a lane in blocks that is expected where lanes gain, over that of a step of a
            sequential chain.
        cpu_spare: Lanes in blocks on a CPU that take as long as what a step takes whatever the number of its lanes.
        cpu_most_lanes: Lanes of blocks on a CPU beyond which each takes longer, since they leave the caches.
        cpu_step_lane: Seconds of a lane of HMC for each step, besides its gradients: noise, acceptance and records.
        cpu_tree_lane: Seconds of a lane of NUTS for each leapfrog step, besides the gradient: what builds the tree.
        least_tree_share: Least time of a lane of NUTS on a CPU over that of a step of a sequential chain. In many
            dimensions the tree costs more.
        least_lane_share: Least share of the time of a step of warm-up that is attributed to its lanes.
        cpu_least_lane: Share of the estimated seconds of a lane on a CPU that a lane may take in fact. The estimate is
            a difference of two times of short runs, by a program that is compiled quickly (docs/decisions/036).
        cpu_thread_gain: Throughput that each further thread with a group of chains adds, relative to that of the first.
            Two threads were 1.3 to 1.9 times as fast as one (decision 031).
        free_lanes: Number of lanes that double the time of a step on devices other than CPUs.
        cpu_device_overhead: Seconds that sharing adds to a step on CPU devices, which are threads of the same cores.
        cpu_device_gain: Throughput that each further CPU device adds, relative to that of the first. Two devices were
            1.09 to 1.79 times as fast as one for steps of 97 us and more, and 0.68 times for short ones (decision 019).

    Source: Measured on 2 shared x86-64 cores; see docs/decisions, 017 to 020.
    """

    compile_ratio: float = 1.0
    overlap: float = 0.7
    cpu_overhead: float = 1e-6
    cpu_warmup_overhead: float = 1.1e-5
    cpu_lane_ratio: float = 0.8
    cpu_block_share: float = 0.3
    cpu_spare: float = 16.0
    cpu_most_lanes: int = 256
    cpu_step_lane: float = 1.5e-7
    cpu_tree_lane: float = 1e-7
    least_tree_share: float = 0.4
    least_lane_share: float = 0.15
    cpu_least_lane: float = 0.5
    cpu_thread_gain: float = 0.4
    free_lanes: int = 8192
    cpu_device_overhead: float = 1e-5
    cpu_device_gain: float = 0.2

    def costs(
        self,
        *,
        on_cpu: bool,
        sequential: float,
        num_chains: int,
        compile_seconds: float,
        num_cores: int,
        lanes: tuple[int, float] | None,
        leapfrogs: tuple[float, float] | None = None,
        num_threads: int = 1,
        lanes_gain: bool = False,
    ) -> Costs:
        """Return the costs of the steps of a run.

        Args:
            on_cpu: Whether the run's device is a CPU.
            sequential: Seconds of a sequential step of all chains.
            num_chains: C, the number of chains.
            compile_seconds: Seconds that the sequential program took to compile.
            num_cores: Cores that this process may use.
            lanes: Number of lanes of warm-up, and seconds of a step of all of them; None if that was not measured.
            leapfrogs: Leapfrog steps of a step of NUTS, and of the HMC that warm-up's lanes ran in its place. None:
                they ran the kernel itself.
            num_threads: Threads that solve groups of chains or parts of the lanes at once.
            lanes_gain: Whether the step consists of operations that take less time per lane in many lanes.
        """
        compilation = self.compile_ratio * compile_seconds
        overlap = self.overlap if num_cores > 1 else 0.0
        if not on_cpu:  # a step of NUTS asks more of the card for each leapfrog than one of HMC
            overhead = sequential if lanes is None or leapfrogs else lanes[1]
            return Costs(sequential, overhead, overhead / self.free_lanes, compilation, overlap)
        overhead, lane = 0.0, sequential / num_chains
        if lanes is not None:
            number, seconds = lanes
            overhead = self.cpu_overhead
            lanes_alone = max(seconds - self.cpu_warmup_overhead, self.least_lane_share * seconds)
            lane = self.cpu_lane_ratio * lanes_alone / number
            if leapfrogs:
                taken, timed = leapfrogs
                gradients = max(lane - self.cpu_step_lane, self.least_lane_share * lane)
                lane = taken * (gradients / timed + self.cpu_tree_lane)
                lane = max(lane, self.least_tree_share * sequential / num_chains)
        # Where lanes were not timed no gain is counted on.
        gain, least = 1.0, 1.0
        if lanes is not None:
            gain, least = 1 + self.cpu_thread_gain * (num_threads - 1), self.cpu_least_lane
            if lanes_gain:
                gain = max(gain, lane * num_chains / (self.cpu_block_share * sequential))
        devices = self.cpu_device_overhead, self.cpu_device_gain
        blocks = gain, self.cpu_spare, self.cpu_most_lanes, least
        return Costs(sequential, overhead, lane, compilation, overlap, *devices, *blocks)
