"""Loops of GPU programs as graphs that the card runs by itself, where a self-test shows that it can.

By default XLA lets the host drive a loop: it waits for the card at each turn to learn whether there is another one, and
hands over each turn anew. `OPTIONS` put whole loops into one graph (a command buffer). Some versions of XLA end the
process when such a graph runs for the second time (openxla/xla pull request 35760) or take no such loop, so `fault`
first runs a small loop three times in a process of its own. This file is the program of that process, and imports
nothing of pmcmc.
"""

import os
import subprocess
import sys
import threading
from functools import cache
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

# All kinds that XLA takes into graphs by default, and loops; a list that only adds a kind is refused. Without the
# second option a loop with fewer than four neighbours stays outside. The passes that are left out make copies that
# graphs do not take: the first in jaxlib 0.10, the second in 0.11.
OPTIONS = {
    "xla_gpu_enable_command_buffer": "FUSION,CUBLAS,CUBLASLT,CUSTOM_CALL,CUDNN,DYNAMIC_SLICE_FUSION,CONDITIONAL,WHILE",
    "xla_gpu_graph_min_graph_size": 1,
    "xla_disable_hlo_passes": "fusion-dynamic-memcpy-rewriter,dynamic-slice-annotator",
}
PATIENCE = 120.0  # seconds
# Turns of the loop in the three runs, which are of one program.
TURNS = (3, 7, 5)


def fault() -> str:
    """Return why loops are not run as graphs on jax's default device; "" if they are.

    The self-test takes some seconds, once per process.
    """
    device = jax.config.jax_default_device  # type: ignore[attr-defined]  # a device, the name of a platform, or None
    if device is None or isinstance(device, str):
        device = jax.local_devices(backend=device)[0]
    if not is_cuda(device):
        return "only CUDA devices are tested"
    with _lock:
        return _fault_of(device.local_hardware_id or 0)


def is_cuda(device: Any) -> bool:
    """Whether a device is a CUDA card."""
    return "cuda" in getattr(getattr(device, "client", None), "platform_version", "")


_lock = threading.Lock()  # two threads that ask at once wait for one test


@cache
def _fault_of(hardware_id: int) -> str:
    """Return `fault` of the CUDA card with this number."""
    return run_apart([str(sys.executable), "-P", __file__, str(hardware_id)])


def run_apart(command: list[str]) -> str:
    """Run the self-test in a process of its own; return what went wrong, or ""."""
    environment = os.environ | {"XLA_PYTHON_CLIENT_PREALLOCATE": "false"}  # this process may hold most of the memory
    try:
        done = subprocess.run(
            command, env=environment, capture_output=True, text=True, timeout=PATIENCE, check=False, errors="replace"
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        return str(error)
    if done.returncode == 0:
        return ""
    said = done.stderr.strip().splitlines() or [""]
    return f"the self-test ended with status {done.returncode}: {said[-1]}"


def loop(x: jax.Array, turns: jax.Array) -> jax.Array:
    """Turn nested loops, some of whose numbers of turns are found while they run, as in a solve."""

    def inner(_: Any, x: jax.Array) -> jax.Array:
        # The derivative is near 1: rounding hardly grows, and a turn too few is seen.
        x = jnp.roll(x, 7) + (jnp.sort(x) + jnp.sin(jnp.cumsum(x) / x.size)) / 64
        return x.at[jnp.argmax(x)].set(jnp.mean(x))

    def outer(state: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        x, rows = jax.lax.scan(lambda x, _: (inner(_, x), x), state[1], length=4)  # writes rows, as a chunk of steps
        return state[0] + 1, jax.lax.fori_loop(0, state[0] % 3 + 1, inner, x + jnp.mean(rows))

    return jax.lax.while_loop(lambda state: state[0] < turns, outer, (jnp.zeros_like(turns), x))[1]


def self_test(options: dict[str, Any], tested: Any = loop) -> None:
    """Run the loop three times under compiler options, and compare with the loop as XLA compiles it by default.

    Raises:
        RuntimeError: A result differs.
    """
    plain, program = jax.jit(loop), jax.jit(tested, compiler_options=options)
    for number, turns in enumerate(TURNS):
        x = jnp.linspace(0.1, 0.9 + number, 512)
        expected, found = np.asarray(plain(x, jnp.int32(turns))), np.asarray(program(x, jnp.int32(turns)))
        if not np.allclose(found, expected, rtol=1e-3, atol=1e-3):
            raise RuntimeError(f"run {number + 1} of the loop differs by {np.max(np.abs(found - expected)):.1e}")


if __name__ == "__main__":
    cards = [d for d in jax.local_devices() if is_cuda(d) and (d.local_hardware_id or 0) == int(sys.argv[1])]
    if not cards:
        sys.exit("there is no CUDA device with this number")
    with jax.default_device(cards[0]):
        self_test(OPTIONS)
