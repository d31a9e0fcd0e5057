"""Compile a program for an H100 on a machine without a GPU, and count what XLA would launch.

It needs the CUDA plugin of jax's own version and ptxas, see ``make gpu-counts``. XLA compiles as on a machine with the
card, except that it does not time kernels to choose among them, so products may be others there. Arrays stay on the
CPU, which must be jax's default device.
"""

import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import topologies

from benchmarks._gpu_dumps import Thunk, Work, loops_of, machine_code, parse, phases
from pmcmc._xla import default_platform
from pmcmc._xla.compile import TargetJit
from pmcmc.target import Target

CONFIG = Path(__file__).parent / "h100.txtpb"
# Options that make XLA write down its thunks and PTX; since 0.11 it writes PTX only for emitters that are named.
DUMP = {"xla_dump_hlo_as_text": True, "xla_dump_emitter_re": ".*"}
ARCHITECTURE = "sm_90a"
SMALL_PTX = 300  # bytes; a file without a kernel


@cache
def card() -> jax.sharding.Sharding:
    """Return the sharding that places arrays on the H100."""
    described = topologies.get_topology_desc("", platform="cuda", target_config=CONFIG.read_text(), topology="1x1x1")
    return jax.sharding.SingleDeviceSharding(described.devices[0])


@contextmanager
def as_on_gpu() -> Iterator[None]:
    """Let pmcmc take the decisions of tracing that it takes on a GPU."""
    name = "default_platform"
    modules = [module for key, module in sys.modules.items() if key.startswith("pmcmc.") and hasattr(module, name)]
    for module in modules:
        setattr(module, name, lambda: "gpu")
    try:
        yield
    finally:
        for module in modules:
            setattr(module, name, default_platform)


def on_card(tree: Any) -> Any:
    """Return shapes on the H100 instead of arrays; Python's numbers stay weakly typed."""

    def leaf(x: Any) -> jax.ShapeDtypeStruct:
        is_number = isinstance(x, (bool, int, float))
        return jax.ShapeDtypeStruct(jnp.shape(x), jnp.result_type(x), sharding=card(), weak_type=is_number)

    return jax.tree.map(leaf, tree)


@dataclass(frozen=True)
class Program:
    """A program compiled for the H100.

    Attributes:
        zeroth: Work of a step of the zeroth sweep; for programs with one loop, of a turn of it.
        repair: Work of a step of repair; None if there is none.
        visit: Work that is added to a step when lanes end theirs, for kernels whose lanes are not at the same step.
        launches: Launches of the whole program, every loop turned once.
        tf32: Products on operands of 10 bits, see `benchmarks._gpu_dumps.machine_code`.
        swaps: Atomics by compare-and-swap.
        spills: Bytes that kernels spill, stores and loads.
        temporaries: Bytes of temporary memory.
        compile_seconds: Seconds of compilation on this machine.
    """

    zeroth: Work
    repair: Work | None
    visit: Work | None
    launches: float
    tf32: int
    swaps: int
    spills: int
    temporaries: int
    compile_seconds: float


def lower(program: TargetJit, target: Target, *args: Any, **static: Any) -> Any:
    """Trace a program of a target as on a GPU, and lower it for one."""
    with as_on_gpu():
        return program._jitted(target).trace(*on_card((target, *args)), **static).lower(lowering_platforms=("cuda",))


def compile_for_gpu(
    lowered: Any, turns: int = 1, options: dict[str, Any] | None = None, steps_per_turn: int = 1
) -> Program:
    """Compile a lowered program for the H100, and count.

    Args:
        lowered: From `lower`.
        turns: Turns of loops within a step whose number XLA does not know, such as leapfrog steps.
        options: Compiler options.
        steps_per_turn: Steps of the zeroth sweep in a turn of its loop.
    """
    with tempfile.TemporaryDirectory() as folder:
        begin = time.perf_counter()
        compiled = lowered.compile(compiler_options={**DUMP, "xla_dump_to": folder, **(options or {})})
        seconds = time.perf_counter() - begin
        found = lambda pattern: sorted(Path(folder).glob(pattern), key=lambda path: path.stat().st_size)
        hlo = found("*gpu_after_optimizations.txt")[-1].read_text()
        thunks = found("*thunk_sequence_after_thunk_passes.txt") or found("*thunk_sequence.txt")
        root = _with_loops(parse(thunks[-1].read_text()), hlo, found("*thunk_metadata.txt")[-1].read_text(), turns)
        kernels = [path for path in found("*.ptx") if path.stat().st_size > SMALL_PTX]
        code = machine_code((path.read_text() for path in kernels), hlo)
        with ThreadPoolExecutor(os.cpu_count()) as pool:
            spills = sum(pool.map(_spills, kernels))
    zeroth, repair, visit = phases(root)
    zeroth = zeroth * (1 / steps_per_turn)
    temporaries = compiled.memory_analysis().temp_size_in_bytes
    launches = root.work().launches
    return Program(zeroth, repair, visit, launches, code.tf32, code.swaps, spills, temporaries, seconds)


def _with_loops(root: Thunk, hlo: str, metadata: str, turns: int) -> Thunk:
    """Attach to each loop what the optimised program says about it."""
    loops = loops_of(hlo)
    names = {}
    for block in metadata.split("thunk_metadata {")[1:]:
        number, name = re.search(r"thunk_id: (\d+)", block), re.search(r'profile_annotation: "([^"]+)"', block)
        if number and name and "kWhile" in block:
            names[int(number[1])] = name[1]
    for thunk in root.every():
        if thunk.kind == "kWhile":
            loop = loops[names[thunk.number]]
            thunk.loop = loop if loop.is_over_steps else replace(loop, turns=turns)
    return root


@cache
def ptxas() -> str:
    """Return the path of ptxas in this environment."""
    return str(next(Path(sys.prefix).glob("lib/python3*/site-packages/nvidia/cuda_nvcc/bin/ptxas")))


def _spills(kernel: Path) -> int:
    """Return the bytes that a kernel's registers are spilled to and from memory."""
    command = [ptxas(), "-v", f"-arch={ARCHITECTURE}", "-o", os.devnull, str(kernel)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    return sum(int(number) for number in re.findall(r"(\d+) bytes spill (?:stores|loads)", done.stderr + done.stdout))
