"""What a program is made from, as text that is the same in every process: see `pmcmc._xla.disk`."""

import enum
import hashlib
import os
import platform
import sys
import time
from dataclasses import fields, is_dataclass
from functools import cache
from importlib import metadata, util
from pathlib import Path
from typing import Any
from weakref import WeakKeyDictionary

import jax
import jaxlib
import numpy as np

from pmcmc._xla.content import INSTALLED
from pmcmc._xla.digest import DIGEST_VERSIONS
from pmcmc._xla.trace import Trace

# Packages whose classes are the same in every process with the same versions.
_KNOWN = frozenset(("builtins", "collections", "jax", "jaxlib", "numpy", "pmcmc"))
# Classes of JAX whose text says all about an object.
_TOLD = frozenset(("AbstractMesh", "GatherScatterMode", "Mesh", "UnspecifiedValue"))
# Settings of JAX that change nothing about a program.
_BESIDE = ("cache", "log", "traceback")
# Packages whose functions are traced into programs.
_TRACED = ("blackjax", "numpyro", "optax")
# The flag of XLA that only makes more devices of the same processor; `numpyro.set_host_device_count` sets it.
_MORE_DEVICES = "--xla_force_host_platform_device_count="


def flags() -> tuple[str | None, ...]:
    """Return the flags of XLA in the environment, which it reads when it starts."""
    given = os.environ.get("XLA_FLAGS", "").split()
    return " ".join(flag for flag in given if not flag.startswith(_MORE_DEVICES)), os.environ.get("LIBTPU_INIT_ARGS")


# When this package was imported, and with which flags.
_IMPORTED, _FLAGS = time.time(), flags()


class Unrecognisable(Exception):
    """A program depends on something that another process could not recognise."""


def hash_of(*parts: str) -> str:
    """Return one hash of several texts."""
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()


def default_device() -> Any:
    """Return the device on which JAX computes what has no device."""
    device = jax.config.jax_default_device  # type: ignore[attr-defined]  # a device, the name of a platform, or None
    return device if isinstance(device, jax.Device) else jax.local_devices(backend=device)[0]


def trace_context() -> tuple:
    """Return what JAX finds traced programs by besides their arguments: settings and contexts of this thread."""
    try:
        from jax._src.config import trace_context as found
    except ImportError:  # a private name of JAX
        return (settings(),)
    return found()


def text_of_context(context: tuple) -> str:
    """Return the text of a `trace_context` outside other programs."""
    device = default_device()
    return text_of(tuple(x for x in context if x is not device and type(x).__name__ != "AxisEnv"))  # which is empty


def settings() -> str:
    """Return the settings of JAX that may affect a program, of this thread."""
    every = jax.config.values.items()
    named = [(name, getattr(jax.config, name, x)) for name, x in every if not any(part in name for part in _BESIDE)]
    return repr(named)


def source() -> str:
    """Return a hash of the source of this package.

    Raises:
        Unrecognisable: It is not what was imported, or not there.
    """
    root = Path(__file__).parents[1]
    try:
        files = sorted(root.rglob("*.py"))
        changed = max(max(status.st_mtime, status.st_ctime) for status in (file.stat() for file in files))
        if changed > _IMPORTED:
            raise Unrecognisable("the source has changed")
        return _hash_of_files(root)
    except (OSError, ValueError) as missing:
        raise Unrecognisable("the source") from missing


@cache
def _hash_of_files(root: Path) -> str:
    """Return a hash of the Python files in a folder."""
    digest = hashlib.sha256()
    for file in sorted(root.rglob("*.py")):
        content = file.read_bytes()
        digest.update(f"{file.relative_to(root).as_posix()} {len(content)}\n".encode() + content)
    return digest.hexdigest()


def versions() -> str:
    """Return the versions that programs depend on.

    Raises:
        Unrecognisable: XLA may have read other flags, or a package is not an installed one.
    """
    if flags() != _FLAGS:
        raise Unrecognisable("flags of XLA")
    return repr((sys.version, jax.__version__, jaxlib.__version__, np.__version__, DIGEST_VERSIONS, _FLAGS, _others()))


@cache
def _others() -> dict[str, str | None]:
    """Return the versions of the packages whose functions are traced into programs; None if they are not there."""

    def version(name: str) -> str | None:
        found = util.find_spec(name)
        if found is None:
            return None
        if not str(found.origin).startswith(INSTALLED):
            raise Unrecognisable(name)  # code that may change while its version does not
        return metadata.version(name)

    return {name: version(name) for name in _TRACED}


def machine() -> str:
    """Return the kind of the default device."""
    device = default_device()
    return repr((device.platform, device.device_kind, device.client.platform_version, processor()))


@cache
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
        text = _texts[trace] = hash_of(text_of(trace.key))
    return f"trace {text}"
