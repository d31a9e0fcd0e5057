"""``solver="auto"``: first steps in order, a pilot, a plan, and its execution under guard."""

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from statistics import median_low

import jax
import numpy as np

from pmcmc._pytree import is_real
from pmcmc._xla.background import num_cores
from pmcmc._xla.compile import default_platform
from pmcmc.planning import Costs, Plan, plan
from pmcmc.planning.costs import CostModel, segment_cost
from pmcmc.planning.plan import block_solvers
from pmcmc.planning.schedule import FIRST_SHARE, next_segment
from pmcmc.recurrence import RESULTS, MultipleShooting, RecurrenceSolver, Sequential
from pmcmc.sampling.pilot import Head, bias_after_warmup, couple
from pmcmc.sampling.programs import SEGMENT_BYTES, Engine, Shape
from pmcmc.sampling.segments import Run
from pmcmc.stability import Coalescence, Diagnosis, diagnose
from pmcmc.stability.evidence import pilot_fault
from pmcmc.warmup.base import LaneTiming

# Runs that should take less than this sequentially are sampled so, without a pilot.
SHORT_SECONDS = 1.0
# A segment may take this many times its predicted merge before it is given up.
PATIENCE = 4
# Steps taken in order while the program of blocks is compiled come in stretches of so many seconds: between them the
# two threads wait for each other.
STRETCH_SECONDS = 0.25
# Steps in order are looked at so many times in a run, which is planned anew where they take this many times what was
# thought.
NUM_LOOKS, SURPRISE = 16, 2.0


def compile_first(engine: Engine, solver: RecurrenceSolver | None, num_steps: int) -> None:
    """Begin with the programs that a run needs for certain; None is "auto", which begins in order."""
    first = Sequential() if solver is None else solver
    engine.compile_ahead(first, engine.shape_for(first, num_steps))


def default_devices() -> Sequence[jax.Device]:
    """Of this process, those that JAX would use; the first is where it computes what is not shared."""
    chosen = jax.config.jax_default_device  # type: ignore[attr-defined]  # a device, the name of a platform, or None
    return [chosen] if isinstance(chosen, jax.Device) else jax.local_devices(backend=chosen)


def device_sets(named: Sequence[jax.Device]) -> list[Sequence[jax.Device]]:
    """To choose from: those that the user named, else the default one, or all.

    CPU devices count up to the number of cores. Of several processes each keeps to its default device.
    """
    if named:
        return [named]
    every = default_devices()
    if every[0].platform == "cpu":
        every = every[: num_cores()]
    return [(), tuple(every)] if len(every) > 1 and jax.process_count() == 1 else [()]


class Automatic:
    """One run under "auto", and what it found out.

    plan, reason: None and why not, where the run was too short to plan. find_diagnosis: where chains did not merge.
    bias_bound: what warm-up left, see `bias_after_warmup`; empty where the pilot proves nothing. pilot_seconds,
    partner_seconds: the pilot's, and of them its programs'. devices: that the user named to share blocks; none: the
    plan chooses.
    """

    def __init__(self, run: Run, own: np.ndarray, timing: LaneTiming | None, devices: Sequence[jax.Device] = ()):
        self.run, self.own, self.timing, self.devices = run, own, timing, devices
        self.plan: Plan | None = None
        self.find_diagnosis: Callable[[], Diagnosis] | None = None
        self.bias_bound = np.zeros(0)
        self.reason, self.pilot_seconds, self.partner_seconds = "", 0.0, 0.0
        self._planned_pace, self._began, self._ended = float("nan"), float("nan"), float("nan")

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
        self._planned_pace = head.seconds_per_step
        self.follow(self.make_plan(head))

    def follow(self, planned: Plan) -> None:
        """Take the steps that are left as planned."""
        self.plan, self.reason, self._began = planned, planned.reason, time.perf_counter()
        if isinstance(planned.solver, MultipleShooting):
            self.in_blocks(planned, planned.solver)
        elif not planned.solver.is_sequential:
            self.run.with_solver(planned.solver)
        elif better := self.sequential_under_watch(planned):
            return self.follow(better)
        self._ended = time.perf_counter()

    @property
    def seconds(self) -> float:
        """Taken by what was planned, compilation included, so far; 0 where nothing was."""
        if self.plan is None:
            return 0.0
        return (time.perf_counter() if math.isnan(self._ended) else self._ended) - self._began

    def make_plan(self, head: Head) -> Plan:
        """Pilot, check, plan; and where chains did not merge, why.

        A pilot that proves nothing is no reason to stop: the chain in order is valid whatever coupled ones do.
        """
        run = self.run
        seen, excuse, self.pilot_seconds, self.partner_seconds = couple(head, self.own)
        pilot = seen
        if seen is not None:
            if fault := pilot_fault(seen):
                pilot, excuse = None, f"The pilot of coupled chains proves nothing: {fault}"
            else:
                self.bias_bound = bias_after_warmup(seen)
            if np.any(seen.finite & ~seen.merged):
                target, kernel, info = run.engine.target, run.engine.kernel, run.draws.info
                self.find_diagnosis = lambda: diagnose(target, kernel, seen, info)
        found = self.planned(self.costs(head), pilot)
        return replace(found, reason=excuse) if excuse else found

    def planned(self, costs: Costs, pilot: Coalescence | None) -> Plan:
        """For the steps that are left."""
        leaves = jax.tree.leaves(self.run.x)
        return plan(
            self.run.left,
            self.run.engine.num_chains,
            costs,
            pilot,
            dim=sum(x[0].size for x in leaves) if all(map(is_real, leaves)) else None,
            max_steps=self.most_steps,
            device_sets=device_sets(self.devices),
            ready=self.compiled_blocks(),
        )

    @property
    def correction(self) -> float:
        """Seconds of a step in order as all of them tell by now, over those that it was planned with."""
        return self.run.sequential_pace.seconds_per_step / self._planned_pace

    def most_steps(self, solver: RecurrenceSolver) -> float:
        """Per chain, for which one solve has memory."""
        budget = self.run.engine.max_bytes
        return (SEGMENT_BYTES if budget is None else budget) / self.run.engine.bytes_per_step(solver)

    def costs(self, head: Head) -> Costs:
        """Return what steps cost, from those of the chains' own first steps and of the lanes of warm-up."""
        engine = self.run.engine
        return CostModel().costs(
            on_cpu=default_platform() == "cpu",
            sequential=head.seconds_per_step,
            num_chains=engine.num_chains,
            compile_seconds=engine.compile_seconds(Sequential(), head.shape) or 0.0,
            num_cores=num_cores(),
            lanes=self.timing,
        )

    def block_shape(self, solver: MultipleShooting) -> Shape:
        """For most of a run: its first segment is sure to be short of the whole. Runs of one length share it."""
        num_steps = self.run.num_steps
        return self.run.engine.shape_for(solver, num_steps - int(FIRST_SHARE * num_steps))

    def compiled_blocks(self) -> set[RecurrenceSolver]:
        """Those whose program is there from an earlier run."""

        def known(solver: MultipleShooting) -> bool:
            return self.run.engine.compile_seconds(solver, self.block_shape(solver)) is not None

        return {solver for solver in block_solvers(device_sets(self.devices)) if known(replace(solver, max_steps=1))}

    def sequential_under_watch(self, planned: Plan) -> Plan | None:
        """In order, up to the end or until steps turn out so dear that, planned anew, something else is better.

        Returns that other plan.
        """
        run, shape = self.run, self.run.engine.shape_for(Sequential(), self.run.num_planned)
        known = self.correction
        while run.left:
            run.take(Sequential(), shape, max(1, run.num_steps // NUM_LOOKS))
            sequential, correction = planned.costs.sequential * self.correction, self.correction
            if correction > SURPRISE * known and run.left * sequential > SHORT_SECONDS:
                known = correction
                again = self.planned(planned.costs._replace(sequential=sequential), planned.coalescence)
                if not again.solver.is_sequential:
                    self._planned_pace = run.sequential_pace.seconds_per_step
                    return again
        return None

    def in_blocks(self, planned: Plan, solver: MultipleShooting) -> None:
        """Segments that grow with what was saved; in order where merges do not arrive, or nothing is saved.

        What is saved is judged by what steps in order have turned out to take, and by the lower median of what those of
        blocks took, in two segments at least: one may have been held up.
        """
        run, chosen = self.run, planned.chosen
        solver = replace(solver, max_steps=1)  # any number is the same program
        blocks, shape = solver.blocks_for(run.left), self.block_shape(solver)
        if num_cores() > 1:
            run.engine.compile_ahead(solver, shape)
            self.sequentially_until_ready(solver, shape, planned)
        sequential = planned.costs.sequential * self.correction
        total, start = run.left, run.done
        expected = planned.costs.step(blocks * run.engine.num_chains, max(1, len(solver.shared_by)))
        path, rates, spent = 0, list[float](), 0.0  # of all lanes; spent: in steps of sequential sampling
        while run.left:
            done = run.done - start
            at_first = segment_cost(expected / sequential, blocks, chosen.merge, FIRST_SHARE * total)
            cost = spent / done if done else at_first
            length = next_segment(total, done, done - spent, cost, shape.capacity * blocks)
            if rates:
                length = max(length, blocks * min(solver.unit, shape.capacity))  # a shorter one takes as long
            patience = math.ceil(PATIENCE * max(chosen.merge, solver.unit))
            attempt = replace(solver, max_steps=math.ceil(length / blocks) + patience)
            segment, failed, clock = run.take(attempt, shape, length)
            steps, kept = int(np.max(segment.solution.stats.num_sequential_steps)), run.done - start - done
            path, rates = path + steps, [*rates, clock.run_seconds / steps]
            spent = path * median_low(rates) / sequential
            rate = min(expected, *rates) if len(rates) == 1 else median_low(rates)
            # one slow merge ends a segment, not the run: the next one begins where the prefix ends
            codes = np.asarray(segment.solution.result)
            slow = np.isin(codes, (RESULTS.successful, RESULTS.max_iters_reached)).all()
            if failed and not (slow and steps * rate / sequential < kept):
                run.fall_back(failed)
            elif run.left and (ratio := path * rate / sequential / max(done + kept, 1)) > 1:
                run.fall_back(f"Blocks took {ratio:.2f} times as long as sequential sampling would have.")

    def sequentially_until_ready(self, solver: RecurrenceSolver, shape: Shape, planned: Plan) -> None:
        """Stretches of `STRETCH_SECONDS`, by what steps have turned out to take, while a program is being compiled."""
        run = self.run
        in_order = run.engine.shape_for(Sequential(), run.num_steps)
        while run.left and not run.engine.is_ready(solver, shape):
            sequential = planned.costs.sequential * self.correction
            run.take(Sequential(), in_order, max(1, int(STRETCH_SECONDS / sequential)))
