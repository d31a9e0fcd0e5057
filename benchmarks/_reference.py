"""The hand-written steps of `lanes_reference.c`: compile them, run them, and compare them with pmcmc's own steps."""

import ctypes
import shutil
import subprocess
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.targets import Case
from pmcmc.kernels import HMC
from pmcmc.kernels.base import Info
from pmcmc.random.streams import key_pair, step_noise

SOURCE = Path(__file__).with_name("lanes_reference.c")
FLAGS = ("-O3", "-march=native", "-ffast-math")
TILE = 32  # lanes that step together
CHUNK = 16  # steps whose noise is drawn at once, as in the source
# Largest difference from pmcmc, in units of float32 rounding of the numbers involved. Four leapfrogs amplify it to 70.
ROUNDING = 256
EPS = float(np.finfo(np.float32).eps)


def compiler_version() -> str | None:
    """Return the version of ``cc``; None if there is no ``cc``."""
    if shutil.which("cc") is None:
        return None
    return subprocess.run(["cc", "-dumpversion"], check=True, capture_output=True, text=True).stdout.strip()


def compile_reference(model: str, folder: Path) -> ctypes.CDLL:
    """Compile and load the C steps of a model.

    Linking is a command of its own without ``-ffast-math``: with it, GCC makes libraries that change how the whole
    process treats denormal numbers.

    Args:
        model: Macro of the model in the source.
        folder: Where the library is written.
    """
    built, library = folder / f"{model}.o", folder / f"{model}.so"
    subprocess.run(
        ["cc", *FLAGS, "-fPIC", f"-D{model}", f"-DLANES={TILE}", "-c", str(SOURCE), "-o", str(built)], check=True
    )
    subprocess.run(["cc", "-shared", str(built), "-o", str(library), "-lm"], check=True)
    return ctypes.CDLL(str(library))


@dataclass
class Reference:
    """The C steps of one chain of a case, in lanes; lane l takes the steps from ``l * num_steps`` on.

    Args:
        library: From `compile_reference`.
        case: The case, whose numbers are float32.
        data: Numbers that the density reads, in the order of the source.
        starts: Unknowns of the lanes before their first steps, shape (lanes, D), lanes a multiple of `TILE`.
        num_steps: Steps of each lane, a multiple of `CHUNK`.
        key: Key of the chain.
        num_threads: Threads that share the lanes.

    Attributes:
        noise: Noise of the last `draw`, shape (tiles, steps, numbers, TILE).
        record: Positions and infos of the last `walk` or `sample`, of the same form.
    """

    library: ctypes.CDLL
    case: Case
    data: tuple[Any, ...]
    starts: np.ndarray
    num_steps: int
    key: Any
    num_threads: int = 1
    noise: np.ndarray = field(init=False)
    record: np.ndarray = field(init=False)

    def __post_init__(self) -> None:
        (num_lanes, dim), kernel = self.starts.shape, self.case.kernel
        if num_lanes % TILE or self.num_steps % CHUNK:
            raise ValueError(f"expected a multiple of {TILE} lanes and of {CHUNK} steps.")
        basis, shape = self.case.target.basis, (num_lanes // TILE, self.num_steps)
        parts = [getattr(kernel, "step_size"), *((basis.loc, basis.scale) if basis else ()), *self.data]  # noqa: B009
        self._constants = np.concatenate([np.ravel(np.asarray(part, np.float32)) for part in parts])
        self._key = np.asarray(key_pair(self.key), np.uint32)
        self._first = np.arange(num_lanes, dtype=np.uint32).reshape(-1, TILE) * np.uint32(self.num_steps)
        tiles = np.asarray(self.starts, np.float32).reshape(-1, TILE, dim)
        self._starts = np.ascontiguousarray(tiles.transpose(0, 2, 1))
        is_hmc = isinstance(kernel, HMC)
        self.noise = np.zeros((*shape, dim + 1 + is_hmc, TILE), np.float32)
        self.record = np.zeros((*shape, dim + 4 + is_hmc, TILE), np.float32)
        self._pool = ThreadPoolExecutor(self.num_threads)

    def draw(self) -> None:
        """Draw the noise of all steps."""
        self._run(self.library.draw, lambda s: [self._key, self._first[s]], self.noise)

    def walk(self) -> None:
        """Take all steps under the noise of the last `draw`."""
        self._run(self.library.walk, lambda s: [self._constants, self._starts[s]], self.noise, self.record)

    def sample(self) -> None:
        """Draw noise and take steps, chunk by chunk."""
        arrays = lambda s: [self._constants, self._key, self._first[s], self._starts[s]]
        self._run(self.library.sample, arrays, self.record)

    def _run(self, function: Any, arrays: Callable[[slice], list[np.ndarray]], *buffers: np.ndarray) -> None:
        """Call a C function in each thread with its tiles of the arrays, their number, the steps and the buffers."""
        bounds = np.linspace(0, len(self._starts), self.num_threads + 1).astype(int)

        def part(tiles: slice) -> None:
            size = int(tiles.stop - tiles.start)
            function(*map(_at, arrays(tiles)), size, self.num_steps, *(_at(b[tiles]) for b in buffers))

        list(self._pool.map(part, map(slice, bounds[:-1], bounds[1:])))

    def check(self) -> None:
        """Compare the noise, and every step from the state at which the C path was before it, with pmcmc's.

        Raises:
            ArithmeticError: They differ by more than rounding.
        """
        kernel, target, steps = self.case.kernel, self.case.target, jnp.arange(len(self.starts) * self.num_steps)
        noise = jax.jit(partial(step_noise, kernel, target))(self.key, steps)
        columns = [noise.normal, noise.log_uniform[:, None]]
        columns += [noise.jitter[:, None]] if isinstance(kernel, HMC) else []
        self.draw()
        drawn = _by_step(self.noise)
        _agree("noise", drawn, np.concatenate(columns, axis=1), np.abs(drawn).max(axis=1))
        step = jax.jit(jax.vmap(kernel.transition(target)))
        for run in (self.sample, self.walk):
            run()
            self._check_record(lambda before: step(before, noise))

    def _check_record(self, step: Callable[[np.ndarray], tuple[jax.Array, Info]]) -> None:
        """Compare the record with pmcmc's step, a function of all states; near ties may go either way."""
        record, dim = _by_step(self.record), self.starts.shape[1]
        paths = record[:, :dim].reshape(len(self.starts), self.num_steps, dim)
        before = np.concatenate([self.starts[:, None], paths[:, :-1]], axis=1)
        after, info = jax.tree.map(np.asarray, step(before.reshape(-1, dim)))
        size = 1 + np.abs(info.margin) + np.abs(info.logdensity)
        _agree("acceptance rates", record[:, dim], info.acceptance_rate, size)
        _agree("margins", record[:, dim + 2], info.margin, size)
        clear = np.abs(info.margin) > ROUNDING * EPS * size
        _agree("positions", record[clear, :dim], after[clear], 1 + np.abs(after[clear]).max(axis=1))
        _agree("divergences", record[clear, dim + 1], info.is_divergent[clear], size[clear])
        _agree("log densities", record[clear, dim + 3], info.logdensity[clear], size[clear])
        if info.energy is not None:
            _agree("energies", record[clear, dim + 4], info.energy[clear], size[clear])


def _at(array: np.ndarray) -> ctypes.c_void_p:
    """Return the address of an array."""
    return ctypes.c_void_p(array.ctypes.data)


def _by_step(tiled: np.ndarray) -> np.ndarray:
    """Return a row for each step of each lane, (lanes * steps, numbers)."""
    return tiled.transpose(0, 3, 1, 2).reshape(-1, tiled.shape[2])


def _agree(what: str, found: np.ndarray, expected: Any, size: Any) -> None:
    """Raise if rows differ by more than the rounding of numbers of their size."""
    difference = np.abs(found - np.asarray(expected, np.float32)).reshape(len(found), -1).max(axis=1)
    worst = float(np.max(difference / np.asarray(size))) / EPS
    if not worst <= ROUNDING:
        raise ArithmeticError(f"{what} of the C steps differ from pmcmc's by {worst:.0f} units of float32 rounding.")
