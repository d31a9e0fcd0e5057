"""``solver="auto"``: first steps in order, a pilot, a plan, and its execution under guard."""

import math
import time
from collections.abc import Callable
from dataclasses import replace

import jax
import numpy as np

from pmcmc._tree import is_real
from pmcmc.recurrence import MultipleShooting
from pmcmc.sampling._pilot import Head, bias_after_warmup, couple
from pmcmc.sampling._run import Run, join
from pmcmc.stability import Costs, Diagnosis, Plan, check_pilot, diagnose, plan
from pmcmc.stability._plan import FIRST_SHARE, next_segment
from pmcmc.warmup._base import LaneTiming

# Runs that should take less than this sequentially are sampled so, without a pilot.
SHORT_SECONDS = 1.0
# The program of blocks holds the step twice (zeroth sweep and repair), the sequential one once.
COMPILE_RATIO = 1.8
# A step of lanes has an overhead near this on a CPU, and one of the warm-up, which averages beside it, near that; on
# other devices lanes are all but free up to some thousands.
CPU_OVERHEAD, CPU_WARMUP_OVERHEAD, FREE_LANES = 2e-6, 1e-5, 8192
# A segment may take this many times its predicted merge before it is given up.
PATIENCE = 4


class Automatic:
    """One run under "auto", and what it found out.

    plan, reason: None and why not, where the run was too short to plan. find_diagnosis: where chains did not merge.
    bias_bound: what warm-up left, see `bias_after_warmup`. pilot_seconds: that partners took. seconds: taken by what
    was planned, compilation included.
    """

    def __init__(self, run: Run, own: np.ndarray, timing: LaneTiming | None, on_cpu: bool):
        self.run, self.own, self.timing, self.on_cpu = run, own, timing, on_cpu
        self.plan: Plan | None = None
        self.find_diagnosis: Callable[[], Diagnosis] | None = None
        self.bias_bound = np.zeros(0)
        self.reason, self.pilot_seconds, self.seconds = "", 0.0, 0.0

    def execute(self) -> None:
        """Take all steps."""
        run, head = self.run, Head(self.run)
        whole = run.num_steps * head.seconds_per_step
        if run.left * head.seconds_per_step <= SHORT_SECONDS:
            self.reason = (
                f"A run of {run.num_steps:,} steps takes about {whole:.2g} s sequentially: too short to gain by "
                "anything else."
            )
            run.sequentially()
            return
        self.plan = self.make_plan(head)
        self.reason = self.plan.reason
        begin = time.perf_counter()
        if isinstance(self.plan.solver, MultipleShooting):
            self.in_blocks(self.plan, self.plan.solver)
        else:
            run.with_solver(self.plan.solver)
        self.seconds = time.perf_counter() - begin

    def make_plan(self, head: Head) -> Plan:
        """Pilot, check, plan; and where chains did not merge, why."""
        run = self.run
        pilot, excuse, self.pilot_seconds = couple(head, self.own)
        if pilot is not None:
            check_pilot(pilot)
            self.bias_bound = bias_after_warmup(pilot)
            if not np.all(pilot.merged):
                target, kernel, info = run.engine.target, run.engine.kernel, join(run.draws.info)
                self.find_diagnosis = lambda: diagnose(target, kernel, pilot, info)
        limit = run.shape_for(MultipleShooting(2), run.left)
        most = limit.num_blocks * limit.capacity
        leaves = jax.tree.leaves(run.x)
        dim = sum(x[0].size for x in leaves) if all(map(is_real, leaves)) else None
        found = plan(run.left, run.engine.num_chains, self.costs(head), pilot, dim=dim, max_steps=most)
        return replace(found, reason=excuse) if excuse else found

    def costs(self, head: Head) -> Costs:
        """The chains' own steps in order, and from the warm-up's lanes what a step of many takes."""
        chains, seconds = self.run.engine.num_chains, head.seconds_per_step
        compile_seconds = COMPILE_RATIO * self.run.engine.clock.compile_seconds
        if not self.on_cpu:
            overhead = seconds if self.timing is None else self.timing.seconds_per_step
            return Costs(seconds, overhead, overhead / FREE_LANES, compile_seconds)
        if self.timing is None:
            return Costs(seconds, 0.0, seconds / chains, compile_seconds)
        lanes, wide = self.timing
        lane = max(wide - CPU_WARMUP_OVERHEAD, 0.25 * wide) / lanes
        return Costs(seconds, CPU_OVERHEAD, lane, compile_seconds)

    def in_blocks(self, planned: Plan, solver: MultipleShooting) -> None:
        """Segments that grow with what was saved; in order where merges do not arrive, or nothing is saved."""
        run, chosen, sequential = self.run, planned.chosen, planned.costs.sequential
        blocks, total, start = solver.blocks_for(run.left), run.left, run.done
        step = planned.costs.step(blocks * run.engine.num_chains) / sequential
        # only the first segment is sure to be short of the whole
        shape = run.shape_for(solver, total - int(FIRST_SHARE * total))
        spent = 0.0  # in steps of sequential sampling
        while run.left:
            done = run.done - start
            cost = spent / done if done else step * (1 / blocks + chosen.merge / (FIRST_SHARE * total))
            length = next_segment(total, done, done - spent, cost, shape.capacity * blocks)
            patience = math.ceil(PATIENCE * max(chosen.merge, solver.unit))
            guarded = MultipleShooting(num_blocks=blocks, max_steps=math.ceil(length / blocks) + patience)
            _, failed, clock = run.take(guarded, shape, length)
            done, spent = run.done - start, spent + clock.run_seconds / sequential
            if failed:
                run.fall_back(failed)
            elif run.left and spent > done:
                run.fall_back(
                    f"Blocks took {spent / max(done, 1):.2f} times as long as sequential sampling would have."
                )
