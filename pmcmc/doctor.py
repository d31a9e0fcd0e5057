"""``python -m pmcmc doctor``: report what this machine has, what is wrong with it, and what lanes cost on it.

`run` prints every `Finding` of `versions`, `devices`, `settings` and `faults`, each with a remedy where something is
wrong, then a `calibration`: the time of a step on 1 to 1,024 lanes, or 8,192 on accelerators.
"""

import importlib.metadata
import os
import platform
import re
import shutil
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

import pmcmc
from pmcmc._xla import graphs
from pmcmc._xla.compile import adapted
from pmcmc._xla.factorizations import may_wait_for_ever
from pmcmc._xla.precision import asked_for
from pmcmc.kernels import HMC
from pmcmc.recurrence import RESULTS, MultipleShooting, Sequential
from pmcmc.recurrence.solution import default_tolerance
from pmcmc.sampling.engine import Engine
from pmcmc.target import Target

# The same as in pyproject.toml, which a test checks: if the source folder is on the path, there is no metadata to read.
DEPENDENCIES = {
    "jax": "0.7.2",
    "numpy": "1.26",
    "numpyro": "0.19",
    "blackjax": "1.2.5",
    "arviz": "0.21",
    "scipy": "1.11",
    "jaxtyping": "0.2.34",
    "tqdm": "4.60",
}


OPTIONAL = ("jaxlib", "matplotlib", "scikit-learn", "ipywidgets")
PLUGINS = ("jax-cuda12-plugin", "jax-cuda13-plugin")
# Releases of jaxlib whose GPU scatter-adds are loops of compare-and-swap (jax issue 38806).
SLOW_SCATTER = ((0, 10, 2), (0, 11, 0))
# A scatter-add this many times slower than a sum of the same numbers is such a loop. Issue reports name slowdowns of
# 450 to 2,000 times; on a CPU it is about 3 times slower than the sum.
SLOW_RATIO = 100
# A product of float32 numbers is off by 1e-7 of the sum of its terms' sizes or less, and by 1e-4 or more with operands
# of 10 bits.
PRODUCT_ERROR = 1e-6
# Numbers of lanes of the calibration; the last is timed on accelerators only.
LANES = (1, 16, 64, 256, 1024, 8192)


class Finding(NamedTuple):
    """One finding of the doctor.

    Attributes:
        text: What was seen, as a sentence.
        remedy: What to do about it; "" where nothing is wrong.
    """

    text: str
    remedy: str = ""


def run(seconds: float = 10.0) -> int:
    """Print all findings, then a calibration of about ``seconds``; return the number of things that are wrong."""
    wrong = 0
    for check in (versions, devices, settings, faults):
        for finding in check():
            wrong += bool(finding.remedy)
            print(f"{'!! ' if finding.remedy else 'ok '} {finding.text}", flush=True)
            if finding.remedy:
                print(f"    {finding.remedy}", flush=True)
    for line in calibration(seconds):
        print(line, flush=True)
    print(f"\n{wrong or 'No'} thing{'' if wrong == 1 else 's'} to fix{', see the lines marked !!' if wrong else ''}.")
    return wrong


def _version(name: str) -> str | None:
    """Return the installed version of a package, or None."""
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def _numbers(version: str) -> tuple[int, ...]:
    """Return the first three numbers of a version."""
    return tuple(int(x) for x in re.findall(r"\d+", version)[:3])


def versions(version_of: Callable[[str], str | None] = _version) -> Iterator[Finding]:
    """Report the version of every dependency, and those that are missing, too old or incompatible."""
    found = {name: version_of(name) for name in (*DEPENDENCIES, *OPTIONAL, *PLUGINS)}
    there = ", ".join(f"{name} {version}" for name, version in found.items() if version)
    yield Finding(f"Python {platform.python_version()}, pmcmc {pmcmc.__version__}, {there}.")
    for name, least in DEPENDENCIES.items():
        version = found[name]
        if version is None:
            yield Finding(f"{name} is not installed.", f"pip install '{name}>={least}'")
        elif _numbers(version) < _numbers(least):
            yield Finding(f"{name} {version} is older than {least}.", f"pip install --upgrade '{name}>={least}'")
    for name in PLUGINS:
        if found[name] and found["jaxlib"] and _numbers(found[name] or "") != _numbers(found["jaxlib"]):
            extra = name.split("-")[1]
            yield Finding(
                f"{name} {found[name]} does not match jaxlib {found['jaxlib']}: the GPU is not used.",
                f"Install them together: pip install --upgrade 'jax[{extra}]'; restart the kernel if in a notebook.",
            )


def devices() -> Iterator[Finding]:
    """Report the devices that jax computes on, and a GPU that it does not see."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    for device in jax.devices():
        memory = (device.memory_stats() or {}).get("bytes_limit")
        limit = f", {memory / 2**30:.0f} GiB for jax" if memory else ""
        yield Finding(f"Device {device.id}: {device.device_kind} ({device.platform}{limit}).")
    backend, number = jax.default_backend(), jax.device_count()
    if backend == "cpu":
        yield Finding(f"{cores} CPU core(s): threads share chains or blocks, and XLA may split large operations.")
    if number > 1:
        yield Finding(f'{number} {backend} devices: "auto" distributes blocks over them where it predicts a gain.')
    if backend == "cpu" and may_wait_for_ever():
        yield Finding(
            "With this jaxlib, batched matrix factorisations in programs that you compile yourself may deadlock; "
            "pmcmc's own do not. jaxlib 0.11.1 fixes this, NPROC=1 in the environment avoids it."
        )
    if backend == "cpu" and (Path("/proc/driver/nvidia/version").exists() or shutil.which("nvidia-smi")):
        yield Finding(
            "There is an NVIDIA GPU, but jax computes on the CPU.",
            "pip install 'pmcmc[cuda12]' (or cuda13, depending on the driver), unless you set JAX_PLATFORMS=cpu. On "
            "Colab, keep the installed version of jax when you install pmcmc: upgrading jax alone loses the GPU.",
        )


def settings() -> Iterator[Finding]:
    """Report the settings of jax that matter here."""
    dtype = jnp.zeros(()).dtype
    how = "float32; JAX_ENABLE_X64=1 gives twice the digits" if dtype == jnp.float32 else "64-bit mode is on"
    yield Finding(
        f"Chains are computed in {dtype}, and blocks merge within {default_tolerance(dtype):.1e} of the posterior's "
        f"scale ({how})."
    )
    if jax.config.values["jax_disable_jit"]:
        yield Finding("jax_disable_jit is on: every step is taken in Python.", "Unset JAX_DISABLE_JIT.")
    if asked := asked_for():
        yield Finding(
            f"jax_default_matmul_precision is {asked}: products round more coarsely than blocks merge.",
            "Unset it, unless your models contain no matrix products.",
        )
    if jax.config.values["jax_debug_nans"]:
        yield Finding(
            "jax_debug_nans is on: a proposal that is NaN, which a kernel rejects, ends the run instead.",
            "Unset JAX_DEBUG_NANS.",
        )
    kept = jax.config.values["jax_compilation_cache_dir"]
    if kept:
        yield Finding(f"Compiled programs are kept between processes in {kept}.")
    else:
        yield Finding("Compiled programs are not kept between processes: pmcmc.cache_programs() does that.")
    if "xla_gpu_deterministic_ops" in os.environ.get("XLA_FLAGS", "") and jax.default_backend() != "cpu":
        yield Finding(
            "xla_gpu_deterministic_ops is set: sums repeat to the last bit, and the gradient of alpha[index], which "
            "hierarchical models need, may become a slow loop (jax issue 17844).",
            "Leave it out of XLA_FLAGS unless you need equal bits: what is certified does not depend on it.",
        )


def faults() -> Iterator[Finding]:
    """Run small programs that show known faults, rather than compare versions."""
    if jax.default_backend() == "gpu":
        yield _graphs()
    yield _product()
    yield from _scatters()
    yield _maximum()
    yield _blocks()


def _seconds(fn: Callable, *args: object) -> float:
    """Return the shortest of five times that a call takes, after one for compilation."""
    jax.block_until_ready(fn(*args))
    times = []
    for _ in range(5):
        begin = time.perf_counter()
        jax.block_until_ready(fn(*args))
        times.append(time.perf_counter() - begin)
    return min(times)


def _graphs() -> Finding:
    """Say whether the card runs the loops of pmcmc's programs by itself."""
    if fault := graphs.fault():
        return Finding(f"The host drives each turn of a loop, which costs waits: loops as graphs fail ({fault}).")
    return Finding("Loops run as graphs on the card: a small one ran three times with the right results.")


def _product(multiply: Callable = jnp.matmul) -> Finding:
    """Compare products of float32 numbers, as pmcmc's programs and as jax compute them, with float64."""
    left, right = np.random.default_rng(0).standard_normal((2, 256, 256)).astype(np.float32)
    exact, size = left.astype(float) @ right.astype(float), np.abs(left).astype(float) @ np.abs(right).astype(float)
    error = lambda fn: float(np.max(np.abs(np.asarray(jax.jit(fn)(left, right)) - exact) / size))
    own, alone = error(adapted(multiply)), error(multiply)
    seen = f"Products of float32 numbers are off by {own:.1e} in pmcmc's programs, and by {alone:.1e} in jax's own"
    if own < PRODUCT_ERROR:
        return Finding(f"{seen}.")
    return Finding(
        f"{seen}: operands are rounded to fewer digits than float32 has, and coupled chains do not merge.",
        f"Unset jax_default_matmul_precision, which is {jax.config.values['jax_default_matmul_precision']}; if it is "
        "None, please report this line.",
    )


def _scatters() -> Iterator[Finding]:
    """Time the gradients of alpha[index] and y - alpha[index], which add many numbers up in few places."""
    values, index = jnp.ones(2**18, jnp.float32), jnp.arange(2**18) % 16
    plain = _seconds(jax.jit(jnp.sum), values)
    add = lambda y: jnp.zeros(16, y.dtype).at[index].add(y)
    gradient = lambda y: jax.grad(lambda alpha: 0.5 * jnp.sum((y - alpha[index]) ** 2))(jnp.zeros(16, y.dtype))
    low, high = (".".join(map(str, v)) for v in SLOW_SCATTER)
    for form, fn in (("alpha[index]", add), ("y - alpha[index]", gradient)):
        own, alone = (_seconds(jax.jit(one), values) / plain for one in (adapted(fn), fn))
        seen = f"The gradient of {form}, 2^18 float32 numbers added up in 16 places, takes {own:.0f} times their sum"
        if jax.default_backend() == "cpu" or max(own, alone) < SLOW_RATIO:
            yield Finding(f"{seen}: the gradients of hierarchical models are sound.")
        elif own < SLOW_RATIO:
            yield Finding(
                f"{seen} in pmcmc's programs, and {alone:.0f} times in others with this jaxlib, whose loop of "
                "compare-and-swap jax.lax.optimization_barrier around what is added avoids."
            )
        else:
            yield Finding(
                f"{seen}: gradients of hierarchical models are a slow loop on this GPU.",
                f"jaxlib {low} to {high} compile this loop in any case (jax issue 38806): install 0.11.1 or newer, or "
                "write the gather as a product with one_hot(index).",
            )


def _maximum() -> Finding:
    """Check that the maximum of a large array keeps NaN; on CPU, that of jax 0.10.2 drops it."""
    largest = jax.jit(jnp.max)(jnp.ones(2**13).at[100].set(jnp.nan))
    if bool(jnp.isnan(largest)):
        return Finding("The maximum of a large array with a NaN in it is NaN, as it should be.")
    return Finding(
        "The maximum of a large array with a NaN in it is not NaN. pmcmc tests with isfinite and is not affected; your "
        "model or your tests may be, if they take max, min or the inf-norm of arrays that may contain NaN."
    )


def _eight_schools(x: jax.Array) -> jax.Array:
    """Log density of the eight schools of Rubin (1981), non-centred: mu / 5, log(tau / 5) and standardised effects."""
    y = jnp.array([28.0, 8, -3, 7, -1, 1, 18, 12])
    error = jnp.array([15.0, 10, 16, 11, 9, 11, 10, 18])
    mu, log_tau, z = x[0], x[1], x[2:]
    theta = 5 * mu + 5 * jnp.exp(log_tau) * z
    prior = -0.5 * mu**2 - 0.5 * jnp.sum(z**2) + log_tau - jnp.log1p(jnp.exp(2 * log_tau))
    return prior - 0.5 * jnp.sum(((y - theta) / error) ** 2)


# Tuned manually: acceptance rate 0.9.
_KERNEL = HMC(step_size=0.4, num_integration_steps=4)


def _blocks(num_steps: int = 2048) -> Finding:
    """Sample a short chain in blocks and sequentially, and compare."""
    target = Target.from_logdensity(_eight_schools, jnp.zeros(10))
    keys = jax.random.split(jax.random.key(0), num_steps)
    noise = jax.vmap(lambda key: _KERNEL.sample_noise(key, target))(keys)
    x0, transition = _KERNEL.unknown(_KERNEL.init(target, jnp.zeros(10))), _KERNEL.transition(target)
    solve = lambda solver: jax.jit(adapted(lambda: solver.solve(transition, x0, noise)))()
    blocks, order = solve(MultipleShooting(16)), solve(Sequential())
    apart = np.max(np.abs(np.asarray(blocks.value) - np.asarray(order.value)), axis=1)
    share, result = float(np.mean(apart < 1e-2)), RESULTS(int(blocks.result))
    seen = (
        f"A chain of {num_steps:,} steps in 16 blocks: {result.name}, {share:.1%} of its states match a sequential run"
    )
    if result == RESULTS.successful and share > 0.9:
        return Finding(f"{seen}.")
    return Finding(f"{seen}.", "Lanes may round differently from single chains, or worse: please report this line.")


class Timing(NamedTuple):
    """Time of a step.

    Attributes:
        num_lanes: Number of lanes.
        seconds: Seconds that one step of all lanes takes.
    """

    num_lanes: int
    seconds: float


def time_lanes(num_lanes: int, seconds: float) -> Timing:
    """Time a step of the calibration's chain in this many blocks, with its noise, in the programs that `sample` runs.

    Blocks are not repaired. One block is sequential sampling.
    """
    target, x0 = Target.from_logdensity(_eight_schools, jnp.zeros(10)), jnp.zeros((1, 10))
    engine = Engine(target, _KERNEL, jax.random.split(jax.random.key(0), 1), x0, jnp.ones(10))
    no_sweeps = np.zeros((), np.int32)  # as a number it would be refused
    solver = Sequential() if num_lanes == 1 else MultipleShooting(num_lanes, max_sweeps=no_sweeps)
    shape = engine.shape_for(solver, max(64, 2**17 // num_lanes) * num_lanes)._replace(brief=False)
    took: list[float] = []
    while sum(took) < seconds or len(took) < 2:
        _, clock = engine.solve(solver, shape, x0, np.zeros(1, int), shape.capacity)
        took.append(clock.run_seconds)
    engine.background.close()
    return Timing(num_lanes, min(took) / shape.capacity)


def calibration(seconds: float) -> Iterator[str]:
    """Yield the lines of a table of what a step costs sequentially and on lanes."""
    lanes = LANES[:-1] if jax.default_backend() == "cpu" else LANES
    yield f"\nCalibration: eight schools (10 parameters), HMC with 4 leapfrog steps, {jnp.zeros(()).dtype}."
    yield "  lanes     us a step   million steps a second"
    timings = []
    for num_lanes in lanes:
        timings.append(time_lanes(num_lanes, 0.6 * seconds / len(lanes)))
        each = timings[-1].seconds
        yield f"{num_lanes:7,d}  {1e6 * each:12.2f}  {1e-6 * num_lanes / each:23.3f}"
    rate = lambda timing: timing.num_lanes / timing.seconds
    best = max(timings, key=rate)
    gain = rate(best) / rate(timings[0])
    yield (
        f"Sequentially a step takes {1e6 * timings[0].seconds:.2f} us; {best.num_lanes:,} lanes give {gain:.1f} times "
        "as many steps a second."
    )
    if gain < 2:
        yield "Blocks gain little on a model this small here: one chain already uses most of the machine."
    else:
        yield (
            "That is the most that blocks of one chain can gain on such a model here; repairs and several chains "
            "reduce it."
        )
