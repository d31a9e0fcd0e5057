"""Pytrees of arrays and configuration objects in one file: an uncompressed ``.npz`` whose first entry is JSON.

Nothing is pickled. Objects of pmcmc's own classes are stored as their name and fields; functions and objects of other
packages are not stored, and must be given again by whoever reads the file.
"""

import json
import os
import zipfile
import zlib
from collections.abc import Iterable
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

from pmcmc import kernels, recurrence
from pmcmc._traced import Traced, Untraced
from pmcmc._types import PyTree
from pmcmc.kernels._compose import Block
from pmcmc.target import Basis


class Format(NamedTuple):
    """What a file says it is. origin: who writes it. remedy: where it is not whole."""

    name: str
    version: int
    origin: str
    remedy: str


CHAIN = Format("pmcmc.Chain", 1, "Chain.save", "Copy it again from where it was saved, or save the chain again.")
STORE = Format(
    "pmcmc.StoredChain",
    1,
    "Chain.stream",
    "It is replaced as a whole, so something else has touched it: restore it from a copy. The draws beside it can be "
    "read by xarray, but not be continued.",
)

# By name: the only classes that are made out of what a file says.
_CLASSES: dict[str, type] = {"Basis": Basis, "Block": Block} | {
    name: getattr(room, name)
    for room in (kernels, recurrence)
    for name in room.__all__
    if isinstance(getattr(room, name), type) and is_dataclass(getattr(room, name))
}


class Writer:
    """Collects the arrays of a file beside what JSON can hold."""

    def __init__(self) -> None:
        self.arrays: dict[str, np.ndarray] = {}

    def leaves(self, name: str, tree: PyTree) -> None:
        """The leaves of a pytree whose structure the reader knows."""
        for number, leaf in enumerate(jax.tree.leaves(tree)):
            self.arrays[f"{name}/{number}"] = np.asarray(leaf)

    def encode(self, name: str, value: Any) -> Any:
        """JSON for a value made of numbers, strings, arrays, containers and dataclasses; a gap for anything else."""
        if value is None or isinstance(value, (bool, int, float, str)):
            return value
        if isinstance(value, (np.ndarray, np.generic, jax.Array)):
            self.arrays[name] = np.asarray(value)
            return {"array": name}
        if isinstance(value, (Traced, Untraced)):
            return {"gap": "function"}
        items: Iterable[tuple[Any, Any]]
        if isinstance(value, dict) and all(isinstance(key, str) for key in value):
            kind, items = "dict", value.items()
        elif type(value) in (tuple, list):
            kind, items = type(value).__name__, enumerate(value)
        elif is_dataclass(value) and not isinstance(value, type):
            kind, items = type(value).__name__, ((f.name, getattr(value, f.name)) for f in fields(value))
        else:
            return {"gap": type(value).__name__}
        return {"kind": kind, "items": {str(key): self.encode(f"{name}/{key}", item) for key, item in items}}

    def write(self, path: str | Path, header: dict[str, Any], kind: Format = CHAIN) -> None:
        """Replaces a file at ``path`` only once the new one is whole."""
        text = json.dumps({"format": kind.name, "version": kind.version, **header})
        whole, part = Path(path), Path(f"{os.fspath(path)}.part")
        try:
            with part.open("wb") as file:
                np.savez(file, allow_pickle=False, header=np.array(text), **self.arrays)
            part.replace(whole)
        finally:
            part.unlink(missing_ok=True)


class Reader:
    """A file that `Writer` wrote, read and checked as a whole.

    kind: what it should be.

    Raises:
        ValueError: not such a file, not whole, or of another version.
    """

    def __init__(self, path: str | Path, kind: Format = CHAIN):
        self.path = os.fspath(path)
        try:
            with open(self.path, "rb") as raw, np.load(raw, allow_pickle=False) as file:
                self.arrays = {name: file[name] for name in file.files}
            self.header = json.loads(str(self.arrays.pop("header")))
        except (zipfile.BadZipFile, zlib.error, EOFError, KeyError, ValueError, AttributeError) as error:
            raise ValueError(
                f"{self.path} is not a whole file of {kind.origin}: cut short, damaged, or of another program "
                f"({error}). {kind.remedy}"
            ) from error
        if not isinstance(self.header, dict) or self.header.get("format") != kind.name:
            raise ValueError(f"{self.path} was not written by {kind.origin}: pass such a file.")
        if self.header["version"] != kind.version:
            raise ValueError(
                f"{self.path} has version {self.header['version']} of the format, and this pmcmc reads version "
                f"{kind.version}: read it with the pmcmc that wrote it."
            )

    def leaves(self, name: str, template: PyTree) -> PyTree:
        """A pytree of the template's structure from stored leaves."""
        expected, structure = jax.tree.flatten(template)
        number = sum(stored.startswith(f"{name}/") for stored in self.arrays)
        if number != len(expected):
            raise ValueError(
                f"{self.path} holds {number} arrays of {name}, but this kernel has {len(expected)}: pass the kernel= "
                "that the chain was made with."
            )
        return jax.tree.unflatten(structure, [self.arrays[f"{name}/{n}"] for n in range(number)])

    def decode(self, what: str, stored: Any, given: Any = None) -> Any:
        """The value behind `Writer.encode`; its gaps are filled with the same parts of ``given``.

        what: for messages, and the name of the argument by which it is given.

        Raises:
            ValueError: a gap that nothing fills.
        """
        if not isinstance(stored, dict):
            return stored
        if isinstance(given, (Traced, Untraced)):
            return given
        if "array" in stored:
            return self.arrays[stored["array"]]
        if "gap" in stored:
            if given is None:
                raise ValueError(
                    f"the {what} of this chain holds a {stored['gap']}, which is not stored in the file: pass {what}= "
                    "as when the chain was made."
                )
            return given
        kind, part = stored["kind"], lambda key: _part(given, key)
        items = {key: self.decode(what, item, part(key)) for key, item in stored["items"].items()}
        if kind == "dict":
            return items
        if kind in ("tuple", "list"):
            return {"tuple": tuple, "list": list}[kind](items.values())
        cls = type(given) if type(given).__name__ == kind else _CLASSES.get(kind)
        if cls is None:
            raise ValueError(
                f"the {what} of this chain is a {kind}, which pmcmc does not have: pass {what}= as when the chain was "
                f"made{'' if given is None else f', not a {type(given).__name__}'}."
            )
        made: Any = object.__new__(cls)  # as pytrees are rebuilt: a constructor may take something else
        for field, item in items.items():
            object.__setattr__(made, field, item)
        return made


def _part(given: Any, key: str) -> Any:
    """What ``given`` has where a file has an entry ``key``."""
    if isinstance(given, dict):
        return given.get(key)
    if isinstance(given, (tuple, list)):
        return given[int(key)] if int(key) < len(given) else None
    return getattr(given, key, None)
