"""Count what pmcmc's programs would do on an H100, by compiling for one on any machine: ``make gpu-counts``.

    python -m benchmarks.gpu_programs            compare with benchmarks/results/gpu_programs.json; exit status 1 if any
                                                 count got worse or is above its limit
    python -m benchmarks.gpu_programs --save     write the rows of this version of jax in that file again
    python -m benchmarks.gpu_programs --quick    two programs, for CI

A row is one program: the noise of a segment, its solve in blocks, a piece of warm-up, or a gradient that adds to few
places; "as graphs" with the options of `pmcmc._xla.graphs`. Launches, enqueues by the host and waits of the host are
counted a step: in the zeroth sweep and in repair of a solve, a step of warm-up, a turn of the loop that draws noise.
For NUTS a step is one leapfrog of all lanes, and a visit is what is done when lanes end steps.
Nothing runs, so there are no times; seconds are those of compilation here. Run it in the environment of ``make
gpu-counts``: the CUDA plugin must have the version of jax.
"""

import argparse
import json
import math
import sys
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

import pmcmc
from benchmarks import posteriors, targets
from benchmarks._gpu_compile import Program, as_on_gpu, compile_for_gpu, lower
from benchmarks._harness import RESULTS, save, with_others
from benchmarks._runs import Run, in_blocks
from benchmarks.gibbs import schools_gibbs
from benchmarks.targets import Case
from pmcmc._xla.compile import TargetJit
from pmcmc._xla.graphs import OPTIONS
from pmcmc.interop.numpyro import numpyro_target
from pmcmc.recurrence.sequential import UNROLLED
from pmcmc.recurrence.shooting.solver import CHUNK
from pmcmc.sampling.programs import Shape, draw_noise, solve_noise
from pmcmc.target import Target
from pmcmc.warmup import lanes

NAME = "gpu_programs"
# A count that is worse by more than this share fails. XLA's versions are compared with themselves only.
TOLERANCE = 0.1
COUNTS = (
    *("launches", "enqueues", "waits", "repair_launches", "repair_enqueues", "repair_waits", "visit_launches"),
    *("swaps", "temporary_bytes"),
)
# Counts that no program may have.
EXACT = ("tf32", "spills")
WARMUP_LANES = 32


def varying_intercepts(length: int = 10**5) -> Case:
    """Regression with an intercept for each county, HMC of 4 jittered steps: its gradients scatter."""
    found = posteriors.varying_intercepts()
    target = numpyro_target(found.model, found.arguments, {})
    start = lambda key, n: 0.1 * jax.random.normal(key, (n, target.dim))
    return Case("varying intercepts, HMC", target, pmcmc.HMC(0.1, 4), start, jnp.ones(target.dim), length)


def intercepts(length: int = 10**5) -> Case:
    """Numbers about the intercepts of 16 groups: their gradient adds negated numbers."""
    index, y = jnp.arange(512) % 16, jnp.linspace(-1.0, 1.0, 512)
    target = Target.from_logdensity(lambda alpha: -0.5 * jnp.sum((y - alpha[index]) ** 2), jnp.zeros(16))
    start = lambda key, n: jax.random.normal(key, (n, 16))
    return Case("intercepts, MALA", target, pmcmc.MALA(0.1), start, jnp.ones(16), length)


CASES = {
    **{name: targets.CASES[name] for name in ("mixture", "mixture_hmc", "eight_schools_mala", "eight_schools")},
    "mixture_nuts": lambda: replace(targets.mixture(), name="mixture, NUTS", kernel=pmcmc.NUTS(0.8)),
    "eight_schools_nuts": targets.eight_schools_nuts,
    "german_credit": targets.german_credit,
    "german_credit_hmc": targets.german_credit_hmc,
    "varying_intercepts": varying_intercepts,
    "schools_gibbs": schools_gibbs,
    "intercepts": intercepts,
}


class Job(NamedTuple):
    """A program to compile.

    Attributes:
        case: Name of the case.
        lanes: Lanes.
        program: "noise", "solve", "warm-up" or "gradient"; followed by `AS_GRAPHS` with loops as graphs.
    """

    case: str
    lanes: int
    program: str


AS_GRAPHS = " as graphs"


SOLVES = [Job(name, 1024, "solve") for name in CASES if name != "intercepts"]
SIZES = [Job("eight_schools_mala", lanes, "solve") for lanes in (256, 4096)]
NOISE = [Job(name, 1024, "noise") for name in ("eight_schools", "eight_schools_nuts", "schools_gibbs")]
WARMUP = [Job(name, WARMUP_LANES, "warm-up") for name in ("eight_schools", "german_credit_hmc")]
GRAPHS = [
    *(
        Job(name, 1024, "solve")
        for name in ("eight_schools_mala", "eight_schools", "eight_schools_nuts", "schools_gibbs")
    ),
    Job("eight_schools", 1024, "noise"),
    Job("eight_schools", WARMUP_LANES, "warm-up"),
]
GRAPHS = [job._replace(program=job.program + AS_GRAPHS) for job in GRAPHS]
GRADIENT = [Job("intercepts", 1024, "gradient")]
JOBS = SOLVES + SIZES + NOISE + WARMUP + GRAPHS + GRADIENT
QUICK = [Job("eight_schools_mala", 1024, "solve" + AS_GRAPHS), Job("german_credit", 1024, "solve"), *GRADIENT]


def measure(job: Job) -> dict[str, Any]:
    """Compile one program and return its row."""
    case, program = CASES[job.case](), job.program.removesuffix(AS_GRAPHS)
    lowered = {"warm-up": warmup_piece, "gradient": gradient}.get(program, partial(in_segments, program))(
        case, job.lanes
    )
    length = getattr(case.kernel, "num_integration_steps", None)
    options = OPTIONS if job.program.endswith(AS_GRAPHS) else None
    steps = steps_per_turn(case, job.lanes) if program == "solve" else 1
    found = compile_for_gpu(lowered, length if isinstance(length, int) else 1, options, steps)
    return {"jax": jax.__version__, "case": case.name, "lanes": job.lanes, "program": job.program, **counts(found)}


def steps_per_turn(case: Case, num_lanes: int) -> int:
    """Return the steps of the zeroth sweep in a turn of its loop, see `pmcmc.recurrence.sequential.walk`."""
    if case.kernel.transition(case.target).staged is not None:
        return 1
    return min(UNROLLED, math.gcd(run_on_gpu(case, num_lanes)[1].capacity, CHUNK))


def counts(found: Program) -> dict[str, Any]:
    """Return the counts of a program by name."""
    step, repair, visit = found.zeroth, found.repair, found.visit
    return {
        "launches": round(step.launches, 2),
        "enqueues": round(step.enqueues, 2),
        "waits": round(step.waits, 2),
        "repair_launches": None if repair is None else round(repair.launches, 2),
        "repair_enqueues": None if repair is None else round(repair.enqueues, 2),
        "repair_waits": None if repair is None else round(repair.waits, 2),
        "visit_launches": None if visit is None else round(visit.launches, 2),
        "tf32": found.tf32,
        "swaps": found.swaps,
        "spills": found.spills,
        "temporary_bytes": found.temporaries,
        "compile_s": round(found.compile_seconds, 1),
    }


def run_on_gpu(case: Case, num_lanes: int) -> tuple[Run, Shape]:
    """Return a run in blocks, and the shape of its programs on a GPU."""
    with as_on_gpu():
        run = in_blocks(case, case.start(jax.random.key(1), 64), num_lanes)
        return run, run.engine.shape_for(run.solver, case.length)


def in_segments(program: str, case: Case, num_lanes: int) -> Any:
    """Lower the program that draws noise, or the one that solves in blocks."""
    run, shape = run_on_gpu(case, num_lanes)
    engine = run.engine
    noise, record = engine._buffer_shapes(shape)
    number, numbers = (jax.ShapeDtypeStruct(axes, jnp.result_type(int)) for axes in ((), (1,)))
    target, kernel, guesses = engine.target, engine.kernel, engine.guesses
    if program == "noise":
        return lower(draw_noise, target, kernel, engine.chain_keys, numbers, number, number, noise, shape=shape)
    x0 = jax.tree.map(lambda g: jax.ShapeDtypeStruct((1, *g.shape[1:]), g.dtype), guesses)
    arguments = (kernel, run.solver, noise, x0, numbers, numbers, number, guesses, engine.scale, record)
    return lower(solve_noise, target, *arguments, shape=shape)


def gradient(case: Case, num_lanes: int) -> Any:
    """Lower the gradients of lanes by themselves."""
    value_and_grad = TargetJit(lambda target, y: jax.vmap(target.value_and_grad)(y), tuned=True)
    return lower(value_and_grad, case.target, jnp.zeros((num_lanes, case.target.dim)))


def warmup_piece(case: Case, num_lanes: int) -> Any:
    """Lower the piece of warm-up that explores."""
    target, kernel, rate = case.target, pmcmc.HMC(), 0.8
    positions = jax.ShapeDtypeStruct((num_lanes, target.dim), target.spec.dtype)
    states, averaged = lanes._start_lanes.eval_shape(target, kernel, positions, rate)
    number, weights = np.asarray(0), np.zeros(num_lanes, target.spec.dtype)
    limits = np.asarray(1, np.int32), np.asarray(0.1, target.spec.dtype)
    arguments = (number, states, averaged, rate, np.asarray(True), weights, *limits)
    return lower(lanes.run_piece, target, kernel, jax.random.key(0), *arguments)


def limits(row: dict[str, Any]) -> Iterator[str]:
    """Yield a line for each count of a row that is above what any program may have."""
    for count in EXACT:
        if row[count]:
            yield f"{label(row)}: {row[count]:,} {count}, and there should be none"
    for count in ("enqueues", "waits", "repair_enqueues", "repair_waits") if row["program"].endswith(AS_GRAPHS) else ():
        if row[count]:
            yield f"{label(row)}: {row[count]:g} {count} a step, which a graph does not need"


def label(row: dict[str, Any]) -> str:
    """Name a row."""
    return f"jax {row['jax']}, {row['case']}, {row['lanes']:,} lanes, {row['program']}"


def compare(now: list[dict[str, Any]], before: list[dict[str, Any]]) -> list[str]:
    """Return a line for each count that is above its limit or got worse than in the rows of the same version of jax."""
    old = {label(row): row for row in before}
    lines = [line for row in now for line in limits(row)]
    for row in now:
        known = old.get(label(row))
        if known is None:
            lines.append(f"{label(row)}: not in the file; write it with --save")
            continue
        for count in COUNTS:
            new, was = row[count], known[count]
            if (new is None) != (was is None) or (was is not None and new > was + max(TOLERANCE * was, 0.01)):
                lines.append(f"{label(row)}: {count} {was} before, {new} now")
    return lines


def line(row: dict[str, Any]) -> str:
    """Return the printed line of a row."""
    step = "{launches:g} launches, {enqueues:g} enqueues, {waits:g} waits a step".format(**row)
    if row["repair_launches"] is not None:
        step += "; repair {repair_launches:g}, {repair_enqueues:g}, {repair_waits:g}".format(**row)
    if row["visit_launches"] is not None:
        step += f"; a visit {row['visit_launches']:g}"
    rest = "tf32 {tf32}, swaps {swaps}, spills {spills} B, temporaries {temporary_bytes:,} B, compiled in {compile_s} s"
    return f"{label(row)}: {step}; {rest.format(**row)}"


def main(arguments: list[str] | None = None) -> int:
    """Compile, then compare or save; return the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--save", action="store_true", help=f"write the rows into benchmarks/results/{NAME}.json")
    parser.add_argument("--quick", action="store_true", help="two programs only")
    parser.add_argument("--cases", nargs="*", default=list(CASES), choices=list(CASES), metavar="NAME")
    known = list(dict.fromkeys(job.program for job in JOBS))
    parser.add_argument("--programs", nargs="*", default=known, choices=known, metavar="NAME")
    options = parser.parse_args(arguments)
    rows: list[dict[str, Any]] = []
    for job in QUICK if options.quick else JOBS:
        if job.case in options.cases and job.program in options.programs:
            rows.append(measure(job))
            print(line(rows[-1]), flush=True)
            if options.save:
                save(NAME, with_others(NAME, rows, ("jax", "case", "lanes", "program")), compiled_for="H100")
    if options.save:
        worse = [fault for row in rows for fault in limits(row)]
    else:
        worse = compare(rows, json.loads((RESULTS / f"{NAME}.json").read_text())["rows"])
    print(*worse, sep="\n", end="\n" if worse else "")
    print(f"{len(rows)} programs for an H100, jax {jax.__version__}: {len(worse) or 'no'} counts to mend.")
    return 1 if worse else 0


if __name__ == "__main__":
    sys.exit(main())
