"""Compiled programs on disk that are found without tracing them.

JAX's persistent cache finds a program by its code, so that a new process traces and lowers each function before it
knows that it need not compile it: two thirds of a call's time. Here a program is found by all that it is made from: the
source of this package, the model as traced, the structure, shapes and dtypes of the arguments, the static arguments,
JAX's settings and the versions. What another process could not recognise, such as a function or class of the user's,
has no such description (`pmcmc._xla.identity`); those programs are left to JAX's cache.

A file holds a pickle of an executable. As with JAX's cache, whoever can write to the folder can run code in this
process.
"""

import os
import pickle
import re
import threading
import time
from collections.abc import Callable, Hashable
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.experimental import serialize_executable
from jax.extend.mlir import ir
from jax.sharding import SingleDeviceSharding

from pmcmc._xla import identity
from pmcmc._xla.content import shape_of
from pmcmc._xla.identity import Unrecognisable, default_device, hash_of, text_of
from pmcmc._xla.trace import is_clean

# How the names of the files end.
SUFFIX = "-program"
# Settings under which programs are checked or replaced while they run: they are left to ``jax.jit``.
_CHECKING = ("jax_debug_nans", "jax_debug_infs", "jax_disable_jit", "jax_check_tracer_leaks")
# How the names of LAPACK's functions in a program begin.
_LAPACK = "lapack_"

_folder: Path | None = None


def keep_in(folder: Path | None) -> None:
    """Keep programs in this folder from now on; None: nowhere."""
    global _folder
    _folder = folder


def is_on() -> bool:
    """Whether programs are kept on disk."""
    return _folder is not None and bool(jax.config.jax_enable_compilation_cache)  # type: ignore[attr-defined]


class Signature:
    """What a program is made from, beside the source of this package, the versions and the machine.

    Args:
        fn: The function.
        about: How it is compiled.
        dynamic: Its arguments that are arrays, or their shapes.
        static: Its static arguments.
    """

    def __init__(self, fn: Callable, about: str, dynamic: tuple, static: dict[str, Hashable]):
        self._fn, self._about, self._static = fn, about, tuple(sorted(static.items()))
        self._leaves, self._structure = jax.tree.flatten((dynamic, {}))

    def kept_in(self, programs: dict[Hashable, Any], make: Callable[[], Any]) -> "Kept | None":
        """Return the program of this signature; None if it is not kept on disk.

        Args:
            programs: Programs of this process, which holds those that are known.
            make: Returns the function, jitted for this purpose alone: JAX keeps what it has compiled in memory, too.
        """
        device = default_device()
        if _folder is None or not self._is_plain(device):
            return None
        # An argument that must stay on its device makes results that must.
        shapes = tuple((*shape_of(jax.typeof(x)), getattr(x, "committed", False)) for x in self._leaves)
        context = identity.trace_context()
        name = self._fn, self._about, self._static, self._structure, shapes, context, device
        if name not in programs:
            try:
                made = Kept(_folder / self._file_name(shapes, context), self._structure, make(), device)
            except Unrecognisable:
                made = None
            programs.setdefault(name, made)  # another thread may have been first
        return programs[name]

    def _is_plain(self, device: Any) -> bool:
        """Whether this is a call outside other programs, with all arguments on the default device alone."""
        if any(getattr(jax.config, name, False) for name in _CHECKING) or jax.process_count() > 1 or not is_clean():
            return False
        return all(_is_on(x, device) for x in self._leaves)

    def _file_name(self, shapes: tuple, context: tuple) -> str:
        """Return the name of its file, given the shapes of the arguments and the context of JAX."""
        fn = f"{self._fn.__module__}.{self._fn.__qualname__}"
        if not fn.startswith("pmcmc.") or "<" in fn:
            raise Unrecognisable(fn)
        around = identity.source(), identity.versions(), identity.machine(), identity.settings()
        texts = *map(text_of, (self._structure, self._static)), identity.text_of_context(context)
        return f"{fn}-{hash_of(*around, fn, self._about, repr(shapes), *texts)}{SUFFIX}"


class Kept:
    """A program that is kept on disk, or will be once it is compiled.

    Args:
        path: Path of its file.
        structure: Structure of its arguments.
        jitted: The function, jitted, from which it is made.
        device: Where it runs.
    """

    def __init__(self, path: Path, structure: Any, jitted: Any, device: Any):
        self._path, self._structure, self._jitted, self._device = path, structure, jitted, device
        self._program: Any = None
        self._seconds = 0.0
        self._can_be_stored = self._has_run = True
        self._answers: dict[str, Any] = {}
        self._lock = threading.Lock()

    def lower(self, *args: Any, **static: Any) -> "Lowered":
        """Load the program, or trace the function."""
        with self._lock:
            if self._program is None and self._can_be_stored and (made := _read(self._path)) is not None:
                self._program, self._seconds = self._loaded(made)
                self._can_be_stored = self._program is not None
                self._has_run = self._program is None
            if self._program is not None:
                return Lowered(self, self._program, None, self._seconds)
        return Lowered(self, None, self._jitted.lower(*args, **static), 0.0)

    def _loaded(self, made: Any) -> tuple[Any, float]:
        """Return the program that a file holds, and how long it took to compile; None if it cannot be loaded."""
        try:
            payload, structure, calls, seconds = made
            if calls:  # JAX looks for LAPACK when it lowers a program that calls it
                jax.jit(jax.lax.linalg.cholesky).lower(jax.ShapeDtypeStruct((1, 1), np.float32))
            where = dict(backend=self._device.client, execution_devices=[self._device])
            return serialize_executable.deserialize_and_load(payload, self._structure, structure, **where), seconds
        except Exception:  # not to be stored at all, or of another build of jaxlib
            return None, 0.0

    def compiled(self, lowered: Any) -> Any:
        """Return the program of a traced function, compiled if it is not known by now, and store it."""
        with self._lock:
            if self._program is not None:
                return self._program
            if not self._can_be_stored:
                self._program = lowered.compile()  # JAX's cache may have it
                return self._program
            name = f"{self._path.name.split('-')[0]}-{os.urandom(8).hex()}"
            _rename(lowered.compiler_ir(), name)
            begin = time.perf_counter()
            self._program = program = lowered.compile()
            seconds = time.perf_counter() - begin
            with suppress(OSError):  # a full disk, or a folder that is gone or belongs to somebody else
                for file in self._path.parent.glob(f"{name}-*"):  # JAX's own copy
                    file.unlink()
                _write(self._path, self._packed(_libraries(lowered), seconds))
            return program

    def _packed(self, calls: set[str], seconds: float) -> Any:
        """Return what is stored of the program, which calls these functions of libraries; False if it cannot be."""
        if calls and not (self._device.platform == "cpu" and all(name.startswith(_LAPACK) for name in calls)):
            return False
        try:
            payload, _, structure = serialize_executable.serialize(self._program)
            pickle.dumps(structure)
        except Exception:  # depends on the platform and the version of JAX
            return False
        return payload, structure, calls, seconds

    def run(self, args: tuple, static: dict[str, Any]) -> Any:
        """Run the program, compiled or loaded. If a loaded one fails when it first runs, it is made anew."""
        program = self.lower(*args, **static).compile()
        if self._has_run:
            return program(*args)
        try:
            result = jax.block_until_ready(program(*args))
        except Exception:
            with self._lock, suppress(OSError):
                if self._program is program:
                    self._program, self._has_run = None, True
                    self._path.unlink(missing_ok=True)
            if any(getattr(x, "is_deleted", bool)() for x in jax.tree.leaves(args)):  # its memory was given away
                raise
            return self.lower(*args, **static).compile()(*args)
        self._has_run = True
        return result

    def answer(self, question: str, find: Callable[[Any], Any]) -> Any:
        """Return the answer to a question about the function, which is stored.

        Args:
            question: Its name.
            find: Finds the answer, which is not None, by the jitted function.
        """
        if question not in self._answers:
            name = f"{self._path.name.split('-')[0]}-{hash_of(self._path.name, question)}{SUFFIX}"
            file = self._path.with_name(name)
            found = _read(file)
            if found is None:
                found = find(self._jitted)
                with suppress(Exception):  # answers that cannot be pickled are found again
                    _write(file, found)
            self._answers[question] = found
        return self._answers[question]


class Lowered(NamedTuple):
    """A program that is loaded, or about to be compiled.

    Attributes:
        kept: Where it is kept.
        program: The program; None if it is to be compiled.
        lowered: The traced function; None if the program is loaded.
        seconds: How long the loaded program took to compile.
    """

    kept: Kept
    program: Any
    lowered: Any
    seconds: float

    def compile(self) -> Any:
        """Return the program, to be called with the dynamic arguments."""
        return self.kept.compiled(self.lowered) if self.program is None else self.program


def _libraries(lowered: Any) -> set[str]:
    """Return the names of the functions of libraries that a lowered program calls."""
    return set(re.findall(r"custom_call @(\"[^\"]*\"|[\w.$]+)", lowered.as_text()))


def _rename(module: Any, name: str) -> None:
    """Name a lowered program, so that JAX's cache does not know it.

    A program that JAX's cache has loaded cannot be stored: its functions would be missing.
    """
    with module.context:
        module.operation.attributes["sym_name"] = ir.StringAttr.get(name)


def _read(file: Path) -> Any:
    """Return the content of a file; None if there is none, or if it is broken."""
    try:
        return pickle.loads(file.read_bytes())
    except Exception:  # pickles may raise anything: classes that are gone, files cut short
        return None


def _write(file: Path, content: Any) -> None:
    """Write a file in one step, so that no process reads a part of it."""
    data, part = pickle.dumps(content), file.with_name(f"{file.name}.{os.urandom(4).hex()}")
    part.write_bytes(data)
    os.replace(part, file)


def _is_on(x: Any, device: Any) -> bool:
    """Whether an argument is on a device, or has none yet."""
    if isinstance(x, jax.core.Tracer):
        return False
    sharding = getattr(x, "sharding", None)
    if sharding is None:
        return True
    is_single = isinstance(sharding, SingleDeviceSharding) and sharding.device_set == {device}
    return is_single and sharding.memory_kind in (None, device.default_memory().kind)
