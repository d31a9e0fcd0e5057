"""Pytrees of arrays and configuration objects in one file: an uncompressed ``.npz`` whose first entry is JSON.

Nothing is pickled. Objects of pmcmc's own classes are stored as their name and fields; functions and objects of other
packages are not stored, and must be given again by whoever reads the file.
"""

import json
import os
from collections.abc import Iterable
from dataclasses import fields, is_dataclass
from pathlib import Path
from types import UnionType
from typing import Annotated, Any, NamedTuple, Union, get_args, get_origin, get_type_hints

import jax
import numpy as np

from pmcmc import kernels, recurrence
from pmcmc._typing import PyTree
from pmcmc._xla.trace import Traced, Untraced
from pmcmc.kernels.compose import Block
from pmcmc.model_basis import Basis


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
# Fields that had another name in earlier files, by class and name.
_RENAMED = {("MultipleShooting", "merge_tol"): "tol"}


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
                entries: dict[str, Any] = {"header": np.array(text), **self.arrays}
                np.savez(file, **entries)
            part.replace(whole)
        finally:
            part.unlink(missing_ok=True)


class Reader:
    """A file that `Writer` wrote, checked as it is read; `close` finds what nobody asked for.

    kind: what it should be.

    Raises:
        ValueError: not such a file, not whole, or of another version; here and by every method. One sentence for all
            that no `Writer` would have written.
    """

    def __init__(self, path: str | Path, kind: Format = CHAIN):
        self.path, self.kind, self._read = os.fspath(path), kind, set[str]()
        try:
            with open(self.path, "rb") as raw, np.load(raw, allow_pickle=False) as file:
                self.arrays = {name: file[name] for name in file.files}
            self.arrays.pop("allow_pickle", None)  # an option, which older numpy took for an array
            self.header = json.loads(str(self.arrays.pop("header")))
        except OSError:
            raise
        except Exception as error:  # of zip, zlib, numpy and json, whatever the damage makes them raise
            raise self.malformed(error) from error
        if not isinstance(self.header, dict) or self.header.get("format") != kind.name:
            raise ValueError(f"{self.path} was not written by {kind.origin}: pass such a file.")
        if (version := self.field("version", int)) != kind.version:
            raise ValueError(
                f"{self.path} has version {version} of the format, and this pmcmc reads version {kind.version}: read "
                "it with the pmcmc that wrote it."
            )
        for name, x in self.arrays.items():
            if not isinstance(x, np.ndarray) or x.dtype.kind not in "biuf":
                raise self.malformed(f"{name} is no array of numbers")

    def malformed(self, why: Any) -> ValueError:
        """What to raise."""
        return ValueError(
            f"{self.path} is not a whole file of {self.kind.origin}: cut short, damaged, or of another program "
            f"({' '.join(str(why).split())[:300]}). {self.kind.remedy}"
        )

    def field(self, name: str, *kinds: type, least: int | None = None) -> Any:
        """An entry of the header, of one of these types. least: smallest number that it may be."""
        if name not in self.header:
            raise self.malformed(f"{name} is missing")
        value = self.header[name]
        if type(value) not in kinds or (least is not None and value is not None and value < least):
            raise self.malformed(f"{name} is {value!r:.40}")
        return value

    def names(self, name: str) -> list[str]:
        """An entry that is a list of strings."""
        value = self.field(name, list)
        if not all(isinstance(item, str) for item in value):
            raise self.malformed(f"{name} is {value!r:.40}")
        return value

    def leaves(self, name: str, template: PyTree, *leading: int) -> PyTree:
        """A pytree of the template's structure from stored leaves.

        template: of arrays or shapes, as they are behind the axes ``leading``; None among these: any size, the same
            for all leaves.
        """
        expected, structure = jax.tree.flatten(template)
        number = sum(stored.startswith(f"{name}/") for stored in self.arrays)
        if number != len(expected):
            raise self.malformed(
                f"it holds {number} arrays of {name}, and this kernel has {len(expected)}; a kernel of your own must "
                "be passed as kernel= again"
            )
        return jax.tree.unflatten(structure, [self._leaf(f"{name}/{n}", s, leading) for n, s in enumerate(expected)])

    def _leaf(self, name: str, like: Any, leading: tuple[int, ...]) -> np.ndarray:
        x = self.array(name)
        # integers may have been written with jax_enable_x64, or without it
        same = x.dtype.kind == like.dtype.kind if like.dtype.kind == "i" else x.dtype == like.dtype
        if x.shape != (*leading, *like.shape) or not same:
            raise self.malformed(f"{name} is {x.dtype}{list(x.shape)}")
        return x

    def array(self, name: str, *ndims: int) -> np.ndarray:
        """A stored array, with one of these numbers of axes; none given: any."""
        if name not in self.arrays:
            raise self.malformed(f"{name} is missing")
        x = self.arrays[name]
        if ndims and x.ndim not in ndims:
            raise self.malformed(f"{name} is {x.dtype}{list(x.shape)}")
        self._read.add(name)
        return x

    def check_types(self, values: dict[str, Any], cls: type) -> None:
        """Values of fields of a dataclass against its annotations."""
        for name, hint in get_type_hints(cls, include_extras=True).items():
            if name in values and not _fits(values[name], hint):
                raise self.malformed(f"{cls.__name__} and its field {name}")

    def close(self) -> None:
        """All was read that is wanted; nothing may be left."""
        if left := sorted(set(self.arrays) - self._read):
            raise self.malformed(f"{left[0]} does not belong to it")

    def decode(self, what: str, stored: Any, given: Any = None) -> Any:
        """The value behind `Writer.encode`; its gaps are filled with the same parts of ``given``.

        what: for messages, and the name of the argument by which it is given.

        Raises:
            ValueError: a gap that nothing fills.
        """
        if stored is None or isinstance(stored, (bool, int, float, str)):
            return stored
        if isinstance(given, (Traced, Untraced)):
            return given
        if not isinstance(stored, dict):
            raise self.malformed(f"{what} holds {stored!r:.40}")
        if isinstance(name := stored.get("array"), str):
            return self.array(name)
        if isinstance(stored.get("gap"), str):
            if given is None:
                raise ValueError(
                    f"the {what} of this chain holds a {stored['gap']}, which is not stored in the file: pass {what}= "
                    "as when the chain was made."
                )
            return given
        kind, items = stored.get("kind"), stored.get("items")
        if not (isinstance(kind, str) and isinstance(items, dict)):
            raise self.malformed(f"{what} holds {stored!r:.40}")
        now = lambda name: _RENAMED.get((kind, name), name)
        values: dict[Any, Any] = {now(key): self.decode(what, item, _part(given, key)) for key, item in items.items()}
        if kind == "dict":
            return values
        if kind in ("tuple", "list"):
            if list(values) != [str(n) for n in range(len(values))]:
                raise self.malformed(f"{what} has items {list(values)}")
            return {"tuple": tuple, "list": list}[kind](values.values())
        cls = type(given) if type(given).__name__ == kind else _CLASSES.get(kind)
        if cls is None:
            raise ValueError(
                f"the {what} of this chain is a {kind}, which pmcmc does not have: pass {what}= as when the chain was "
                f"made{'' if given is None else f', not a {type(given).__name__}'}."
            )
        if differing := set(values) ^ {f.name for f in fields(cls)}:
            raise self.malformed(f"{kind} and its field {min(differing)}")
        if cls in _CLASSES.values():
            self.check_types(values, cls)
        made: Any = object.__new__(cls)  # as pytrees are rebuilt: a constructor may take something else
        for field, item in values.items():
            object.__setattr__(made, field, item)
        return made


def _fits(value: Any, hint: Any) -> bool:
    """Whether a value that was read may stand where an annotation does; a number may be an array without axes.

    Any is a number, an array, or an object.
    """
    origin, parts = get_origin(hint), get_args(hint)
    if origin in (Union, UnionType):
        return any(_fits(value, part) for part in parts)
    if origin is Annotated:  # a `Scalar`
        return not getattr(value, "ndim", 0) and _fits(value, parts[0])
    if hint is Any:
        return value is not None and not isinstance(value, (bool, str, tuple, list, dict))
    if hint in (int, float):
        kinds = "iu" if hint is int else "iuf"
        is_number = isinstance(value, (int, float, np.ndarray)) and not isinstance(value, bool)
        return is_number and np.ndim(value) == 0 and np.asarray(value).dtype.kind in kinds
    if origin is tuple and len(parts) == 2 and parts[1] is ...:
        return isinstance(value, tuple) and (parts[0] is Any or all(_fits(item, parts[0]) for item in value))
    kind = hint if origin is None else origin
    return not isinstance(kind, type) or kind is PyTree or isinstance(value, kind)


def _part(given: Any, key: str) -> Any:
    """What ``given`` has where a file has an entry ``key``."""
    if isinstance(given, dict):
        return given.get(key)
    if isinstance(given, (tuple, list)):
        return given[int(key)] if key.isdecimal() and int(key) < len(given) else None
    return getattr(given, key, None)
