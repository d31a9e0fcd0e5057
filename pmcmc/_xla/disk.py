"""Compiled programs on disk that are found without tracing them.

JAX's persistent cache finds a program by its code, so that a new process traces and lowers each function before it
knows that it need not compile it: two thirds of a call's time. Here a program is found by all that it is made from: the
source of this package, the model as traced, the structure, shapes and dtypes of the arguments, the static arguments,
JAX's settings and the versions. What another process could not recognise, such as a function or class of the user's,
has no such description (`Unrecognisable`); those programs are left to JAX's cache.

A file holds a pickle of an executable. As with JAX's cache, whoever can write to the folder can run code in this
process.
"""

import enum
import hashlib
import os
import pickle
import platform
import re
import sys
import threading
import time
from collections.abc import Callable, Hashable
from contextlib import suppress
from dataclasses import fields, is_dataclass
from functools import cache
from importlib import metadata
from pathlib import Path
from typing import Any, NamedTuple
from weakref import WeakKeyDictionary

import jax
import jaxlib
import numpy as np
from jax.experimental import serialize_executable
from jax.extend.mlir import ir
from jax.sharding import SingleDeviceSharding

from pmcmc._xla.content import shape_of
from pmcmc._xla.digest import DIGEST_VERSIONS
from pmcmc._xla.trace import Trace, is_clean

# How the names of the files end.
SUFFIX = "-program"
# Packages whose classes are the same in every process with the same versions.
_KNOWN = frozenset(("builtins", "collections", "jax", "jaxlib", "numpy", "pmcmc"))
# Classes of JAX whose text says all about an object.
_TOLD = frozenset(("AbstractMesh", "GatherScatterMode", "Mesh", "UnspecifiedValue"))
# Settings of JAX that change nothing about a program.
_BESIDE = ("cache", "log", "traceback")
# Settings under which programs are checked or replaced while they run: they are left to ``jax.jit``.
_CHECKING = ("jax_debug_nans", "jax_debug_infs", "jax_disable_jit", "jax_check_tracer_leaks")
# How the names of LAPACK's functions in a program begin.
_LAPACK = "lapack_"
# Packages whose functions are traced into programs.
_TRACED = ("blackjax", "numpyro", "optax")

_folder: Path | None = None
# What was loaded, and what XLA read when it started, is what there was by now.
_IMPORTED = time.time()
_ENVIRONMENT = {name: os.environ.get(name) for name in ("XLA_FLAGS", "LIBTPU_INIT_ARGS")}


def keep_in(folder: Path | None) -> None:
    """Keep programs in this folder from now on; None: nowhere."""
    global _folder
    _folder = folder


def is_on() -> bool:
    """Whether programs are kept on disk."""
    return _folder is not None and bool(jax.config.jax_enable_compilation_cache)  # type: ignore[attr-defined]


class Unrecognisable(Exception):
    """A program depends on something that another process could not recognise."""


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
        self._shapes = tuple(shape_of(jax.typeof(x)) for x in self._leaves)
        self._context = _trace_context()

    def kept_in(self, programs: dict[Hashable, Any], make: Callable[[], Any]) -> "Kept | None":
        """Return the program of this signature; None if it is not kept on disk.

        Args:
            programs: Programs of this process, which holds those that are known.
            make: Returns the function, jitted for this purpose alone: JAX keeps what it has compiled in memory, too.
        """
        if _folder is None or not self._is_plain():
            return None
        name = self._fn, self._about, self._static, self._structure, self._shapes, self._context
        if name not in programs:
            try:
                programs[name] = Kept(_folder / self._file_name(), self._structure, make(), _default_device())
            except Unrecognisable:
                programs[name] = None
        return programs[name]

    def _is_plain(self) -> bool:
        """Whether this is a call outside other programs, with all arguments on the default device alone."""
        if any(getattr(jax.config, name, False) for name in _CHECKING) or jax.process_count() > 1 or not is_clean():
            return False
        device = _default_device()
        return all(_is_on(x, device) for x in self._leaves)

    def _file_name(self) -> str:
        """Return the name of its file."""
        fn = f"{self._fn.__module__}.{self._fn.__qualname__}"
        if not fn.startswith("pmcmc.") or "<" in fn:
            raise Unrecognisable(fn)
        context = text_of(tuple(x for x in self._context if type(x).__name__ != "AxisEnv"))  # it is empty: `is_clean`
        own = (fn, self._about, repr(self._shapes), text_of(self._structure), text_of(self._static), context)
        return f"{fn}-{_hash(_source(), _versions(), _machine(), _settings(), *own)}{SUFFIX}"


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
        self._can_be_stored = self._has_run = True
        self._answers: dict[str, Any] = {}
        self._lock = threading.Lock()

    def lower(self, *args: Any, **static: Any) -> "_Lowered":
        """Load the program, or trace the function."""
        with self._lock:
            if self._program is None and self._can_be_stored and (made := _read(self._path)) is not None:
                self._program = self._loaded(made)
                self._can_be_stored = self._program is not None
                self._has_run = self._program is None
        return _Lowered(self, None if self._program else self._jitted.lower(*args, **static))

    def _loaded(self, made: Any) -> Any:
        """Return the program that a file holds; None if it has none, or one that cannot be loaded."""
        try:
            payload, structure, calls = made
            if calls:  # JAX looks for LAPACK when it lowers a program that calls it
                jax.jit(jax.lax.linalg.cholesky).lower(jax.ShapeDtypeStruct((1, 1), np.float32))
            where = dict(backend=self._device.client, execution_devices=[self._device])
            return serialize_executable.deserialize_and_load(payload, self._structure, structure, **where)
        except Exception:  # not to be stored at all, or of another build of jaxlib
            return None

    def compiled(self, lowered: Any) -> Any:
        """Return the program of a traced function, compiled if it is not known by now, and store it."""
        with self._lock:
            if self._program is None and not self._can_be_stored:
                self._program = lowered.compile()  # JAX's cache may have it
            if self._program is None:
                name = f"{self._path.name.split('-')[0]}-{os.urandom(8).hex()}"
                _rename(lowered.compiler_ir(), name)
                self._program = lowered.compile()
                with suppress(OSError):  # a full disk, or a folder that is gone or belongs to somebody else
                    for file in self._path.parent.glob(f"{name}-*"):  # JAX's own copy
                        file.unlink()
                    _write(self._path, self._packed(_libraries(lowered)))
            return self._program

    def _packed(self, calls: set[str]) -> Any:
        """Return what is stored of the program, which calls these functions of libraries; False if it cannot be."""
        if calls and not (self._device.platform == "cpu" and all(name.startswith(_LAPACK) for name in calls)):
            return False
        try:
            payload, _, structure = serialize_executable.serialize(self._program)
            pickle.dumps(structure)
        except Exception:  # depends on the platform and the version of JAX
            return False
        return payload, structure, calls

    def run(self, args: tuple, static: dict[str, Any]) -> Any:
        """Run the program, compiled or loaded. If a loaded one fails when it first runs, it is made anew."""
        program = self.lower(*args, **static).compile()
        if self._has_run:
            return program(*args)
        try:
            result = jax.block_until_ready(program(*args))
        except Exception:
            if any(getattr(x, "is_deleted", bool)() for x in jax.tree.leaves(args)):  # its memory was given away
                raise
            self._program, self._can_be_stored, self._has_run = None, False, True
            with suppress(OSError):
                _write(self._path, False)
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
            name = f"{self._path.name.split('-')[0]}-{_hash(self._path.name, question)}{SUFFIX}"
            file = self._path.with_name(name)
            found = _read(file)
            if found is None:
                found = find(self._jitted)
                with suppress(Exception):  # answers that cannot be pickled are found again
                    _write(file, found)
            self._answers[question] = found
        return self._answers[question]


class _Lowered(NamedTuple):
    """A program that is loaded, or about to be compiled.

    Attributes:
        kept: Where it is kept.
        lowered: The traced function; None if the program is loaded.
    """

    kept: Kept
    lowered: Any

    def compile(self) -> Any:
        """Return the program, to be called with the dynamic arguments."""
        return self.kept.compiled(self.lowered)


def _libraries(lowered: Any) -> set[str]:
    """Return the names of the functions of libraries that a lowered program calls."""
    return set(re.findall(r"custom_call @(\"[^\"]*\"|[\w.$]+)", lowered.as_text()))


def _rename(module: Any, name: str) -> None:
    """Name a lowered program, so that JAX's cache does not know it.

    A program that JAX's cache has loaded cannot be stored: its functions would be missing.
    """
    with module.context:
        module.operation.attributes["sym_name"] = ir.StringAttr.get(name)


def _hash(*parts: str) -> str:
    """Return one hash of several texts."""
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()


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


def _default_device() -> Any:
    """Return the device on which JAX computes what has no device."""
    device = jax.config.jax_default_device  # type: ignore[attr-defined]  # a device, the name of a platform, or None
    return device if isinstance(device, jax.Device) else jax.local_devices(backend=device)[0]


def _is_on(x: Any, device: Any) -> bool:
    """Whether an argument is on a device, or has none yet."""
    if isinstance(x, jax.core.Tracer):
        return False
    sharding = getattr(x, "sharding", None)
    return sharding is None or (isinstance(sharding, SingleDeviceSharding) and sharding.device_set == {device})


def _settings() -> str:
    """Return the settings of JAX that may affect a program, of this thread."""
    every = jax.config.values.items()
    named = [(name, getattr(jax.config, name, x)) for name, x in every if not any(part in name for part in _BESIDE)]
    return repr(named)


def _trace_context() -> tuple:
    """Return what JAX finds traced programs by besides their arguments: settings and contexts of this thread."""
    try:
        from jax._src.config import trace_context
    except ImportError:  # a private name of JAX
        return (_settings(),)
    return trace_context()


@cache
def _source() -> str:
    """Return a hash of the source of this package.

    Raises:
        Unrecognisable: It is not what was imported, or not there.
    """
    root = Path(__file__).parents[1]
    digest = hashlib.sha256()
    files = sorted(root.rglob("*.py"))
    for file in files:
        content, status = file.read_bytes(), file.stat()
        if max(status.st_mtime, status.st_ctime) > _IMPORTED:
            raise Unrecognisable(file.name)
        digest.update(f"{file.relative_to(root).as_posix()} {len(content)}\n".encode() + content)
    if not files:
        raise Unrecognisable("the source")
    return digest.hexdigest()


@cache
def _versions() -> str:
    """Return the versions that programs depend on.

    Raises:
        Unrecognisable: XLA may have read other flags.
    """
    if {name: os.environ.get(name) for name in _ENVIRONMENT} != _ENVIRONMENT:
        raise Unrecognisable("flags of XLA")
    return repr(
        (sys.version, jax.__version__, jaxlib.__version__, np.__version__, DIGEST_VERSIONS, _ENVIRONMENT, _others())
    )


def _others() -> dict[str, str | None]:
    """Return the versions of the packages whose functions are traced into programs; None if they are not installed."""

    def version(name: str) -> str | None:
        try:
            return metadata.version(name)
        except metadata.PackageNotFoundError:
            return None

    return {name: version(name) for name in _TRACED}


def _machine() -> str:
    """Return the kind of the default device."""
    device = _default_device()
    return repr((device.platform, device.device_kind, device.client.platform_version, processor()))


def processor() -> str:
    """Return the instruction sets of the processor, or its name where the system does not list them."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor()
    return next((line for line in lines if line.startswith(("flags", "Features"))), platform.processor())


def text_of(value: Any) -> str:
    """Return text that is equal only for values of which equal programs are traced, in any process.

    Raises:
        Unrecognisable: There is none.
    """
    if isinstance(value, Trace):
        return _text_of_trace(value)
    if isinstance(value, (jax.Device, jax.sharding.Sharding)) or getattr(value, "axis_names", None):
        raise Unrecognisable(repr(value))  # programs for several devices
    if isinstance(value, type):
        return f"type {_name_of(value)}"
    kind = type(value)
    name = _name_of(kind)
    if value is None or kind in (bool, int, float, complex, str, bytes) or isinstance(value, (np.dtype, np.generic)):
        return f"{name} {value!r}"
    if isinstance(value, enum.Enum):
        return f"{name} {value.name}"
    if isinstance(value, (tuple, list)):
        return f"{name} ({','.join(map(text_of, value))})"
    if isinstance(value, (set, frozenset)):
        return f"{name} ({','.join(sorted(map(text_of, value)))})"
    if isinstance(value, dict):
        return f"{name} ({','.join(f'{text_of(key)}:{text_of(x)}' for key, x in value.items())})"
    if isinstance(value, jax.tree_util.PyTreeDef):
        return _text_of_structure(value)
    if is_dataclass(value):
        compared = (field.name for field in fields(value) if field.compare)
        return f"{name} ({','.join(f'{x}={text_of(getattr(value, x))}' for x in compared)})"
    if kind.__name__ in _TOLD and kind.__module__.split(".")[0] == "jax":
        return f"{name} {value!r}"
    raise Unrecognisable(name)


def _name_of(kind: type) -> str:
    """Return the full name of a class; of a named tuple also its fields, which are all that JAX sees of it."""
    name = f"{kind.__module__}.{kind.__qualname__}"
    if issubclass(kind, tuple) and kind.__bases__ == (tuple,) and hasattr(kind, "_fields"):
        return f"{name}{kind._fields}"
    if kind.__module__.split(".")[0] not in _KNOWN:
        raise Unrecognisable(name)
    return name


def _text_of_structure(structure: Any) -> str:
    """Return the text of a tree's structure, with the static parts of its nodes."""
    node = structure.node_data()
    if node is None:
        return "*"
    kind, static = node
    return f"{_name_of(kind)} [{text_of(static)}] ({','.join(map(_text_of_structure, structure.children()))})"


_texts: WeakKeyDictionary[Trace, str] = WeakKeyDictionary()


def _text_of_trace(trace: Trace) -> str:
    """Return a hash of the content of a trace, computed once."""
    text = _texts.get(trace)
    if text is None:
        text = _texts[trace] = _hash(text_of(trace.key))
    return f"trace {text}"
