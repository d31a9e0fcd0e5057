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
import tempfile
from collections.abc import Callable, Hashable
from contextlib import suppress
from dataclasses import fields, is_dataclass
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple
from weakref import WeakKeyDictionary

import jax
import jaxlib
import numpy as np
from jax.experimental import serialize_executable
from jax.extend.mlir import ir

from pmcmc._xla import default_platform
from pmcmc._xla.content import shape_of
from pmcmc._xla.digest import DIGEST_VERSIONS
from pmcmc._xla.trace import Trace

# How the names of the files end.
SUFFIX = "-program"
# Packages whose classes are the same in every process with the same versions.
_KNOWN = frozenset(("builtins", "collections", "jax", "jaxlib", "numpy", "pmcmc"))
# Settings of JAX that change nothing about a program.
_BESIDE = ("cache", "log", "traceback")
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
    return _folder is not None and bool(jax.config.values["jax_enable_compilation_cache"])


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
        self._settings = _settings()

    def kept_in(self, programs: dict[Hashable, Any], jitted: Any) -> "Kept | None":
        """Return the program of this signature; None if it is not kept on disk.

        Args:
            programs: Programs of this process, which holds those that are known.
            jitted: The function, jitted.
        """
        if _folder is None or not self._is_plain():
            return None
        name = self._fn, self._about, self._static, self._structure, self._shapes, self._settings
        if name not in programs:
            try:
                programs[name] = Kept(_folder / self._file_name(), self._structure, jitted)
            except Unrecognisable:
                programs[name] = None
        return programs[name]

    def _is_plain(self) -> bool:
        """Whether this is a call outside other programs, on the default device alone."""
        if any(getattr(jax.config, name, False) for name in _CHECKING) or jax.process_count() > 1:
            return False
        device = _default_device()
        return all(_is_on(x, device) for x in self._leaves)

    def _file_name(self) -> str:
        """Return the name of its file."""
        fn = f"{self._fn.__module__}.{self._fn.__qualname__}"
        if not fn.startswith("pmcmc.") or "<" in fn:
            raise Unrecognisable(fn)
        own = (fn, self._about, repr(self._shapes), text_of(self._structure), text_of(self._static), self._settings)
        return f"{fn}-{_hash(_source(), _versions(), _machine(), *own)}{SUFFIX}"


class Kept:
    """A program that is kept on disk, or will be once it is compiled.

    Args:
        path: Path of its file.
        structure: Structure of its arguments.
        jitted: The function, jitted, from which it is made.
    """

    def __init__(self, path: Path, structure: Any, jitted: Any):
        self._path, self._structure, self._jitted = path, structure, jitted
        self._program: Any = None
        self._can_be_stored = True
        self._answers: dict[str, Any] = {}

    def lower(self, *args: Any, **static: Any) -> "_Lowered":
        """Load the program, or trace the function."""
        if self._program is None and (made := _read(self._path)) is not None:
            self._can_be_stored = made is not False
            with suppress(Exception):  # of another build of jaxlib, or broken: it is made anew and replaced
                payload, structure, calls = made
                _prepare(calls)
                self._program = serialize_executable.deserialize_and_load(payload, self._structure, structure)
        return _Lowered(self, None if self._program else self._jitted.lower(*args, **static))

    def compiled(self, lowered: Any) -> Any:
        """Return the program of a traced function, compiled if it is not known by now, and store it."""
        if self._program is not None:
            return self._program
        if not self._can_be_stored:
            self._program = lowered.compile()  # JAX's cache may have it
            return self._program
        name = f"{self._path.name.split('-')[0]}-{os.urandom(8).hex()}"
        _rename(lowered.compiler_ir(), name)
        self._program = lowered.compile()
        with suppress(OSError):  # a full disk, or a folder that is gone or belongs to somebody else
            _write(self._path, _packed(self._program, _libraries(lowered)))
            for file in self._path.parent.glob(f"{name}-*"):  # JAX's own copy
                file.unlink()
        return self._program

    def answer(self, question: str, find: Callable[[], Any]) -> Any:
        """Return the answer to a question about the function, which is stored.

        Args:
            question: Its name.
            find: Finds the answer, which is not None.
        """
        if question not in self._answers:
            name = f"{self._path.name.split('-')[0]}-{_hash(self._path.name, question)}{SUFFIX}"
            file = self._path.with_name(name)
            found = _read(file)
            if found is None:
                found = find()
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


def _packed(program: Any, calls: set[str]) -> Any:
    """Return what is stored of a compiled program; False if it cannot be stored.

    Args:
        program: The program.
        calls: Functions of libraries that it calls.
    """
    try:
        payload, _, structure = serialize_executable.serialize(program)
        pickle.dumps(structure)
    except Exception:  # depends on the platform and the version of JAX
        return False
    is_known = default_platform() == "cpu" and all(name.startswith(_LAPACK) for name in calls)
    return (payload, structure, calls) if is_known or not calls else False


def _libraries(lowered: Any) -> set[str]:
    """Return the names of the functions of libraries that a lowered program calls."""
    return set(re.findall(r"custom_call @([\w.$]+)", lowered.as_text()))


def _prepare(calls: set[str]) -> None:
    """Load the libraries that a program calls, which JAX does when it lowers a program that calls them."""
    if calls:
        jax.jit(jax.lax.linalg.cholesky).lower(jax.ShapeDtypeStruct((1, 1), np.float32))


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
    data = pickle.dumps(content)
    number, name = tempfile.mkstemp(prefix=f"{file.name}.", dir=file.parent)
    with os.fdopen(number, "wb") as opened:
        opened.write(data)
    os.replace(name, file)


def _default_device() -> Any:
    """Return the device on which JAX computes what has no device."""
    device = jax.config.jax_default_device  # type: ignore[attr-defined]  # a device, the name of a platform, or None
    return device if isinstance(device, jax.Device) else jax.local_devices(backend=device)[0]


def _is_on(x: Any, device: Any) -> bool:
    """Whether an argument is on a device, or has none yet."""
    if isinstance(x, jax.core.Tracer):
        return False
    sharding = getattr(x, "sharding", None)
    return sharding is None or sharding.device_set == {device}


def _settings() -> str:
    """Return the settings of JAX that may affect a program, of this thread."""
    every = jax.config.values.items()
    named = [(name, getattr(jax.config, name, x)) for name, x in every if not any(part in name for part in _BESIDE)]
    return repr(named)


@cache
def _source() -> str:
    """Return a hash of the source of this package."""
    root = Path(__file__).parents[1]
    digest = hashlib.sha256()
    for file in sorted(root.rglob("*.py")):
        content = file.read_bytes()
        digest.update(f"{file.relative_to(root).as_posix()} {len(content)}\n".encode() + content)
    return digest.hexdigest()


@cache
def _versions() -> str:
    """Return the versions that programs depend on."""
    names = ("XLA_FLAGS", "LIBTPU_INIT_ARGS")
    environment = {name: os.environ.get(name) for name in names}
    return repr((sys.version, jax.__version__, jaxlib.__version__, np.__version__, DIGEST_VERSIONS, environment))


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
    text = repr(value)
    if kind.__module__.split(".")[0] in ("jax", "jaxlib") and " at 0x" not in text:
        return f"{name} {text}"
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
    if trace not in _texts:
        _texts[trace] = _hash(text_of(trace.key))
    return f"trace {_texts[trace]}"
