"""``solver="auto"``: sequential first steps, a pilot, a plan, and its execution with limited losses.

`Automatic` executes one run. It times the first steps (`Head`), couples chains in a pilot, and plans the remaining
steps by `pmcmc.planning.plan`. While the plan is executed, what steps really cost is measured: a sequential run is
planned anew if its steps turn out to be expensive, and a run in blocks falls back to sequential sampling if it saves
nothing.
"""

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import cache, partial
from statistics import median_low

import jax
import numpy as np

from pmcmc._pytree import is_real, real_dtype, single_or_wider
from pmcmc._xla import default_platform
from pmcmc._xla.compile import is_compiling, num_cores
from pmcmc.planning import Costs, Plan, plan
from pmcmc.planning.costs import CostModel
from pmcmc.planning.plan import BLOCK_COUNTS, FIRST_SHARE, allowance, block_solvers, next_segment
from pmcmc.recurrence import RESULTS, MultipleShooting, RecurrenceSolver, Sequential
from pmcmc.sampling.engine import Engine
from pmcmc.sampling.pilot import Head, bias_after_warmup, couple
from pmcmc.sampling.programs import Shape, lanes_gain, operations_of
from pmcmc.sampling.segments import Run
from pmcmc.stability import Coalescence, Diagnosis, diagnose
from pmcmc.stability.evidence import pilot_fault
from pmcmc.warmup.base import LaneTiming

# If the remaining steps should take at most this many seconds sequentially, there is no pilot and no plan.
SHORT_SECONDS = 1.0
# The repair of a segment may take this many times its predicted merge time, if the segment may cost as much
# (`pmcmc.planning.plan.allowance`); then the segment is given up.
PATIENCE = 4
# While the program of blocks is being compiled, steps are sampled sequentially in stretches of this many seconds. The
# sampling and the compiling thread wait for each other between stretches.
STRETCH_SECONDS = 0.25
# Blocks per chain for which the gain of threads is planned; a few blocks may have fewer threads.
PLANNED_BLOCKS = 64
# The pace of sequential steps is checked this many times in a run. The run is planned anew if a step takes more than
# this many times as long as it did when the last plan was made.
NUM_LOOKS, SURPRISE = 16, 2.0
# A run of at least this many operations takes some seconds on a CPU. Then the program of blocks is compiled during
# warm-up, before it is known whether blocks pay: of this many lanes, if each block has at least this many steps.
LONG_OPERATIONS, LIKELY_LANES, LIKELY_STEPS = 2**36, 128, 512


def compile_first(
    engine: Engine, solver: RecurrenceSolver | None, num_steps: int, devices: Sequence[jax.Device] = ()
) -> None:
    """Start to compile the programs that a run needs in any case and, if it is long, those of `likely_blocks`.

    Args:
        engine: Engine of the run.
        solver: Solver of the run; None for "auto", which begins sequentially.
        num_steps: Steps of the run.
        devices: Devices that the user named.
    """
    first = Sequential() if solver is None else solver
    engine.compile_ahead(first, engine.shape_for(first, num_steps))
    if solver is None and not devices and (likely := likely_blocks(engine, num_steps)) is not None:
        engine.compile_ahead(likely, block_shape(engine, likely, num_steps))


def likely_blocks(engine: Engine, num_steps: int) -> MultipleShooting | None:
    """Return the blocks that "auto" will probably choose for a long run if chains merge; None if it is not likely to.

    Args:
        engine: Engine of the run.
        num_steps: Steps of the run.
    """
    if default_platform() != "cpu" or num_cores() == 1 or device_sets(()) != [()]:
        return None
    num_blocks = max((p for p in BLOCK_COUNTS if p * engine.num_chains <= LIKELY_LANES), default=None)
    if num_blocks is None or num_steps < LIKELY_STEPS * num_blocks:
        return None
    model = engine.target, engine.kernel, engine.chain_keys, engine.guesses
    if operations_of(*model, num_steps) < LONG_OPERATIONS or not lanes_gain(*model):
        return None
    return MultipleShooting(num_blocks=num_blocks, max_steps=1)  # the program does not depend on `max_steps`


def block_shape(engine: Engine, solver: MultipleShooting, num_steps: int) -> Shape:
    """Return the shape of the program of blocks, for 7/8 of a run, since the first segment is 1/8 of it at most.

    The shape depends only on the length of the run, so that runs of equal length share the program.

    Args:
        engine: Engine of the run.
        solver: The blocks.
        num_steps: Steps of the run.
    """
    return engine.shape_for(solver, num_steps - int(FIRST_SHARE * num_steps))


def default_devices() -> Sequence[jax.Device]:
    """Return the devices of this process that JAX would use; JAX computes on the first one whatever is not shared."""
    chosen = jax.config.jax_default_device  # type: ignore[attr-defined]  # a device, the name of a platform, or None
    return [chosen] if isinstance(chosen, jax.Device) else jax.local_devices(backend=chosen)


def device_sets(named: Sequence[jax.Device]) -> list[Sequence[jax.Device]]:
    """Return the sets of devices that a plan may choose from; an empty set is the default device.

    If the user named devices, they are the only set. Otherwise the default device is a set. All devices are another set
    if there are several and only one process; CPU devices count up to the number of cores.

    Args:
        named: Devices that the user named; may be empty.
    """
    if named:
        return [named]
    every = default_devices()
    if every[0].platform == "cpu":
        every = every[: num_cores()]
    return [(), tuple(every)] if len(every) > 1 and jax.process_count() == 1 else [()]


class Automatic:
    """Execution of one run under ``solver="auto"``, and what it found out.

    Args:
        run: The run, before its first step.
        own: Lanes of warm-up's ensemble from which the chains start; shape (C,).
        timing: Time of a step of warm-up's lanes; None if it was not measured.
        devices: Devices that the user named to share blocks. Empty: the plan chooses.

    Attributes:
        plan: The last plan; None if the run was too short to plan.
        find_diagnosis: Computes why chains did not merge, once; None if no pair of finite paths stayed apart.
        bias_bound: Bounds on the bias left after warm-up, see `bias_after_warmup`; empty if the pilot proves nothing.
        reason: Why this plan was chosen, or why there is none.
        pilot_seconds: Seconds that the pilot took.
        partner_seconds: Seconds of the pilot in which the partners' programs ran.
    """

    def __init__(self, run: Run, own: np.ndarray, timing: LaneTiming | None, devices: Sequence[jax.Device] = ()):
        self.run, self.own, self.timing, self.devices = run, own, timing, devices
        self.plan: Plan | None = None
        self.find_diagnosis: Callable[[], Diagnosis] | None = None
        self.bias_bound = np.zeros(0)
        self.reason, self.pilot_seconds, self.partner_seconds = "", 0.0, 0.0
        self._planned_pace, self._began, self._ended = float("nan"), float("nan"), float("nan")

    def execute(self) -> None:
        """Take all steps of the run."""
        self.reason = "These are the first steps, which are sampled sequentially and timed."  # if there are no others
        run, head = self.run, Head(self.run, lambda: not is_compiling())
        whole = run.num_steps * head.seconds_per_step
        if run.left * head.seconds_per_step <= SHORT_SECONDS:
            self.reason = (
                f"A run of {run.num_steps:,} steps takes about {whole:.2g} s sequentially: too short to gain by "
                "anything else."
            )
            if head.num_waited * head.seconds_per_step > SHORT_SECONDS:
                self.reason = (
                    f"{head.num_waited:,} of {run.num_steps:,} steps were sampled while programs were being compiled, "
                    "and the others are too few to gain by anything else."
                )
            run.sequentially()
            return
        if (dtype := real_dtype(run.x)) != single_or_wider(dtype):
            self.reason = (
                f"States in {dtype} are too coarse to tell whether paths have merged: steps are sampled sequentially. "
                "With float32 states they could be solved in parallel."
            )
            run.sequentially()
            return
        self._planned_pace = head.seconds_per_step
        planned = self.make_plan(head)
        del head  # and with it the paths that the pilot compared
        self.follow(planned)

    def follow(self, planned: Plan) -> None:
        """Take the remaining steps as planned."""
        self.plan, self.reason, self._began = planned, planned.reason, time.perf_counter()
        if not planned.solver.is_sequential:
            self.in_parallel(planned)
        elif better := self.sequential_under_watch(planned):
            return self.follow(better)
        self._ended = time.perf_counter()

    @property
    def seconds(self) -> float:
        """Seconds spent so far on the last plan, compilation included; 0 if there is no plan."""
        if self.plan is None:
            return 0.0
        return (time.perf_counter() if math.isnan(self._ended) else self._ended) - self._began

    def in_parallel(self, planned: Plan) -> None:
        """Solve the run as planned. If a solve fails, as on a device with too little memory, go on sequentially."""
        why = ""
        try:
            if isinstance(planned.solver, MultipleShooting):
                self.in_blocks(planned, planned.solver)
            else:
                self.run.with_solver(planned.solver)
        except jax.errors.JaxRuntimeError as failed:
            if not self.run.is_solving:  # steps were being stored
                raise
            first_line = str(failed).split("\n")[0].rstrip(".")
            why = f"A program of the solver failed ({first_line[:200]})."
        if why:  # now that the exception, and the arrays of the failed solve with it, are gone
            self.run.fall_back(why)

    def make_plan(self, head: Head) -> Plan:
        """Run the pilot, check it, and plan the remaining steps.

        A pilot that proves nothing raises no error: sequential sampling is valid however coupled chains behave. If
        pairs did not merge, `find_diagnosis` is set.
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
                self.find_diagnosis = cache(lambda: diagnose(target, kernel, seen, info))  # by all reports of this run
        found = self.planned(self.costs(head), pilot)
        return replace(found, reason=excuse) if excuse else found

    def planned(self, costs: Costs, pilot: Coalescence | None) -> Plan:
        """Plan the remaining steps.

        Args:
            costs: Costs of steps.
            pilot: The pilot; None if there was none, or if it proves nothing.
        """
        leaves = jax.tree.leaves(self.run.x)
        planned_by = partial(
            plan,
            self.run.left,
            self.run.engine.num_chains,
            costs,
            pilot,
            max_steps=self.most_steps,
            device_sets=device_sets(self.devices),
            ready=self.compiled_blocks(),
        )
        found = planned_by(dim=sum(x[0].size for x in leaves) if all(map(is_real, leaves)) else None)
        is_newton = not (found.solver.is_sequential or isinstance(found.solver, MultipleShooting))
        return planned_by(dim=None) if is_newton and not self.has_tangents() else found

    def has_tangents(self) -> bool:
        """Whether a step has the forward derivatives of Newton's method; a gradient by `jax.custom_vjp` has none."""
        target, kernel = self.run.engine.target, self.run.engine.kernel
        x = jax.tree.map(lambda v: v[0], self.run.x)
        noise = jax.eval_shape(kernel.sample_noise, jax.random.key(0), target)
        step = lambda x, noise: jax.jvp(lambda x: kernel.transition(target)(x, noise), (x,), (x,))
        try:
            jax.jit(step).lower(x, noise)  # tracing alone does not find out
        except (TypeError, ValueError, NotImplementedError):
            return False
        return True

    @property
    def correction(self) -> float:
        """Measured seconds of a sequential step, from all such steps so far, over those that the plan assumed."""
        return self.run.sequential_pace.seconds_per_step / self._planned_pace

    def most_steps(self, solver: RecurrenceSolver) -> float:
        """Return the number of steps per chain for which one solve has memory."""
        return self.run.engine.max_bytes / self.run.engine.bytes_per_step(solver)

    def costs(self, head: Head) -> Costs:
        """Return the costs of steps, from the times of the chains' first steps and of the lanes of warm-up."""
        engine, timing = self.run.engine, self.timing
        leapfrogs = None
        if timing is not None and timing.num_leapfrogs:
            taken = self.run.counts.num_leapfrogs / self.run.position
            leapfrogs = (float(taken.mean()), timing.num_leapfrogs) if np.isfinite(taken).all() else None
            timing = timing if leapfrogs else None
        return CostModel().costs(
            on_cpu=default_platform() == "cpu",
            sequential=head.seconds_per_step,
            num_chains=engine.num_chains,
            compile_seconds=engine.compile_seconds(Sequential(), head.shape) or 0.0,
            num_cores=num_cores(),
            lanes=None if timing is None else timing[:2],
            leapfrogs=leapfrogs,
            num_threads=max(engine.threads(PLANNED_BLOCKS)),
            lanes_gain=lanes_gain(engine.target, engine.kernel, engine.chain_keys, engine.guesses),
        )

    def block_shape(self, solver: MultipleShooting) -> Shape:
        """Return the shape of the program of blocks of this run."""
        return block_shape(self.run.engine, solver, self.run.num_steps)

    def compiled_blocks(self) -> set[RecurrenceSolver]:
        """Return the shooting solvers whose program this process has compiled or is compiling."""
        engine = self.run.engine

        def known(solver: MultipleShooting) -> bool:
            shape = self.block_shape(solver)
            return engine.is_compiling(solver, shape) or engine.compile_seconds(solver, shape) is not None

        return {solver for solver in block_solvers(device_sets(self.devices)) if known(replace(solver, max_steps=1))}

    def sequential_under_watch(self, planned: Plan) -> Plan | None:
        """Sample sequentially, and plan anew if steps take much longer than planned.

        Returns:
            The new plan if it is not sequential, as soon as it is made; None if all steps were taken.
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
        """Solve the run in segments of blocks that grow with the time saved.

        Falls back to sequential sampling if merges do not occur or no time is saved. The time saved follows from the
        measured time of a sequential step, and from the lower median over the segments of the time of a step in blocks.
        Since a single segment may have been held up, the decision after the first segment takes its time or the planned
        one, whichever is shorter.

        Args:
            planned: The plan.
            solver: Its solver.
        """
        run, chosen = self.run, planned.chosen
        # Compile the program of blocks in the background, and sample sequentially in the meantime.
        solver = replace(solver, max_steps=1)  # the program does not depend on this number
        blocks, shape = solver.blocks_for(run.left), self.block_shape(solver)
        if num_cores() > 1:
            run.engine.compile_ahead(solver, shape)
            self.sequentially_until_ready(solver, shape, planned)
        # Compare with the time of sequential steps as measured by now. ``path`` counts the steps of all lanes so far,
        # ``rates`` holds the seconds of such a step in each segment, ``spent`` is the total in sequential steps.
        sequential = planned.costs.sequential * self.correction
        total, start = run.left, run.done
        expected = planned.costs.blocks_step(blocks * run.engine.num_chains, max(1, len(solver.shared_by)))
        path, rates, spent = 0, list[float](), 0.0
        while run.left:
            # Choose the length of the segment by the time saved so far; less than whole chunks would take as long.
            done, rate = run.done - start, median_low(rates) if rates else expected
            saved, merge = done - spent, max(chosen.merge, solver.unit)
            unit = math.gcd(solver.unit, shape.capacity)
            length = next_segment(total, done, saved, rate / sequential, blocks, merge, shape.capacity * blocks)
            length = max(length, min(blocks * unit, run.left))
            # It is given up after several predicted merges, or when it has taken what it may. One is always waited for.
            plain = unit * math.ceil(math.ceil(length / blocks) / unit)
            allowed = math.floor(allowance(total, saved) * sequential / rate)
            patience = min(max(allowed - plain, math.ceil(merge)), math.ceil(PATIENCE * merge))
            attempt = replace(solver, max_steps=plain + patience)
            # Solve it, and account for its time.
            segment, failed, clock = run.take(attempt, shape, length)
            steps, kept = int(np.max(segment.stats.num_sequential_steps)), run.done - start - done
            path, rates = path + steps, [*rates, clock.run_seconds / steps]
            spent = path * median_low(rates) / sequential
            rate = min(expected, *rates) if len(rates) == 1 else median_low(rates)
            # Go on or fall back. A slow merge does not end the run if the certified prefix of its segment was worth the
            # time: the next segment begins where that prefix ends.
            codes = segment.result
            slow = np.isin(codes, (RESULTS.successful, RESULTS.max_iters_reached)).all()
            if failed and not (slow and steps * rate / sequential < kept):
                run.fall_back(failed)
            elif run.left and path * rate / sequential > done + kept:
                ratio = spent / max(done + kept, 1)  # as measured, by the time of every segment
                run.fall_back(f"Blocks took {ratio:.2f} times as long as sequential sampling would have.")

    def sequentially_until_ready(self, solver: RecurrenceSolver, shape: Shape, planned: Plan) -> None:
        """Sample sequentially in stretches of about `STRETCH_SECONDS` until the program of blocks is compiled."""
        run = self.run
        in_order = run.engine.shape_for(Sequential(), run.num_steps)
        while run.left and not run.engine.is_ready(solver, shape):
            sequential = planned.costs.sequential * self.correction
            run.take(Sequential(), in_order, max(1, int(STRETCH_SECONDS / sequential)))
