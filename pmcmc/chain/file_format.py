"""Pytrees of arrays and configuration objects in one file, an uncompressed ``.npz`` archive whose first entry is JSON.

`Writer` collects arrays and writes the file; `Reader` checks everything that it reads. Nothing is pickled. Objects of
pmcmc's own classes are stored as class name and fields. Functions and objects of other packages are not stored: the
user passes them again when the file is read.
"""

import json
import math
import os
from collections.abc import Iterable
from dataclasses import fields, is_dataclass
from pathlib import Path
from types import UnionType
from typing import Annotated, Any, NamedTuple, Union, get_args, get_origin, get_type_hints

import jax
import jax.numpy as jnp
import numpy as np

from pmcmc import kernels, recurrence
from pmcmc._pytree import PRNGKey, PyTree
from pmcmc._xla.trace import Traced, Untraced
from pmcmc.kernels.gibbs import Block
from pmcmc.stability import Diagnosis, SiteDistance
from pmcmc.target import Basis


class Format(NamedTuple):
    """Identity of a kind of file.

    Attributes:
        name: Name stored in the file.
        version: Version stored in the file.
        origin: The function that writes such files.
        remedy: What to do if a file is damaged.
    """

    name: str
    version: int
    origin: str
    remedy: str


CHAIN = Format("pmcmc.Chain", 1, "Chain.save", "Copy it again from where it was saved, or save the chain again.")
STORE = Format(
    "pmcmc.StoredChain",
    1,
    "Chain.stream",
    "pmcmc replaces it as a whole, so something else has changed it: restore it from a copy. The draws next to it can "
    "be read by xarray, but not continued.",
)


# Dtypes that are not numpy's own, by name and by the dtype as which their bits are stored.
_STORED_AS = {("bfloat16", np.dtype(np.uint16)): np.dtype(jnp.bfloat16)}
# By name, the only classes of which objects are created from a file.
_CLASSES: dict[str, type] = {cls.__name__: cls for cls in (Basis, Block, Diagnosis, SiteDistance)} | {
    name: getattr(room, name)
    for room in (kernels, recurrence, recurrence.trust_region)
    for name in room.__all__
    if isinstance(getattr(room, name), type) and is_dataclass(getattr(room, name))
}
# Fields that had another name in earlier files, by class and name.
_RENAMED = {
    ("MultipleShooting", "merge_tol"): "tol",
    ("HutchinsonDiagonal", "schedule"): "fixed_probes",
    ("HutchinsonBlockDiagonal", "schedule"): "fixed_probes",
}
# Fields that earlier files do not have, by class, with their values there.
_ADDED: dict[str, dict] = {
    "Basis": {"spread": None},
    "NUTS": {"inverse_mass_matrix": None},
    "HMC": {"trajectory_length": math.pi / 2},
    "BlackJAX": {"gradient": None},
}
# Classes without fields in earlier files, and the values that replace them.
_REPLACED = {"StandardBasis": None, "FreshProbes": False, "FixedProbes": True}


class Writer:
    """Collects the arrays of a file, separately from what JSON can hold."""

    def __init__(self) -> None:
        self.arrays: dict[str, np.ndarray] = {}

    def leaves(self, name: str, tree: PyTree) -> None:
        """Add the leaves of a pytree whose structure the reader knows."""
        for number, leaf in enumerate(jax.tree.leaves(tree)):
            self.arrays[f"{name}/{number}"] = np.asarray(leaf)

    def encode(self, name: str, value: Any) -> Any:
        """Encode a value as JSON; its arrays are added to the file.

        Args:
            name: Name of the value's array, or prefix of the names of its arrays.
            value: Any nesting of numbers, strings, arrays, keys, dicts, lists, tuples and dataclasses. Anything else,
                also a subclass of dict, becomes a gap, which `Reader.decode` fills.
        """
        if value is None or isinstance(value, (bool, int, float, str)):
            return value
        if isinstance(value, jax.Array) and jnp.issubdtype(value.dtype, jax.dtypes.prng_key):
            self.arrays[name] = np.asarray(jax.random.key_data(value))
            return {"key": name, "impl": str(jax.random.key_impl(value))}
        if isinstance(value, (np.ndarray, np.generic, jax.Array)):
            self.arrays[name] = np.asarray(value)
            return {"array": name}
        if isinstance(value, (Traced, Untraced)):
            return {"gap": "function"}
        items: Iterable[tuple[Any, Any]]
        if type(value) is dict and all(isinstance(key, str) for key in value):
            kind, items = "dict", value.items()
        elif type(value) in (tuple, list):
            kind, items = type(value).__name__, enumerate(value)
        elif is_dataclass(value) and not isinstance(value, type):
            kind, items = type(value).__name__, ((f.name, getattr(value, f.name)) for f in fields(value))
        else:
            return {"gap": type(value).__name__}
        return {"kind": kind, "items": {str(key): self.encode(f"{name}/{key}", item) for key, item in items}}

    def write(self, path: str | Path, header: dict[str, Any], kind: Format = CHAIN) -> None:
        """Write the file; an existing file at ``path`` is replaced only once the new one is complete.

        Args:
            path: File to write.
            header: Entries that JSON can hold.
            kind: Kind of the file.
        """
        # numpy stores bfloat16 as bytes without a type: write its bits as integers, and its name to the header.
        strange = {name: str(x.dtype) for name, x in self.arrays.items() if x.dtype.kind == "V"}
        arrays = {name: x.view(f"u{x.itemsize}") if name in strange else x for name, x in self.arrays.items()}
        dtypes = {"dtypes": strange} if strange else {}
        text = json.dumps({"format": kind.name, "version": kind.version, **dtypes, **header})
        whole, part = Path(path), Path(f"{os.fspath(path)}.part")
        try:
            with part.open("wb") as file:
                entries: dict[str, Any] = {"header": np.array(text), **arrays}
                np.savez(file, **entries)
            part.replace(whole)
        finally:
            part.unlink(missing_ok=True)


class Reader:
    """A file written by `Writer`, checked as it is read. Call `close` at the end to detect entries that nobody read.

    Args:
        path: File to read.
        kind: Expected kind of the file.

    Raises:
        ValueError: The file is of another kind, incomplete, or of another version. All methods raise this error, with
            one sentence for everything that `Writer` would not have written.
    """

    def __init__(self, path: str | Path, kind: Format = CHAIN):
        self.path, self.kind, self._read = os.fspath(path), kind, set[str]()
        try:
            with open(self.path, "rb") as raw, np.load(raw, allow_pickle=False) as file:
                self.arrays = {name: file[name] for name in file.files}
            self.arrays.pop("allow_pickle", None)  # an option that older versions of numpy stored as an array
            self.header = json.loads(str(self.arrays.pop("header")))
        except OSError:
            raise
        except Exception as error:  # zip, zlib, numpy and json raise various errors, depending on the damage
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
                raise self.malformed(f"{name} is not an array of numbers")
        for name, dtype in self.field("dtypes", dict).items() if "dtypes" in self.header else ():
            x = self.arrays.get(name)
            if x is None or not isinstance(dtype, str) or (dtype, x.dtype) not in _STORED_AS:
                raise self.malformed(f"the dtype of {name} is {dtype!r:.40}")
            self.arrays[name] = x.view(_STORED_AS[dtype, x.dtype])

    def malformed(self, why: Any) -> ValueError:
        """Return the error to raise if the file is damaged."""
        return ValueError(
            f"{self.path} is not a whole file of {self.kind.origin}: cut short, damaged, or of another program "
            f"({' '.join(str(why).split())[:300]}). {self.kind.remedy}"
        )

    def field(self, name: str, *kinds: type, least: int | None = None) -> Any:
        """Return an entry of the header.

        Args:
            name: Name of the entry.
            *kinds: Types that it may have.
            least: Smallest allowed number; None for no limit.
        """
        if name not in self.header:
            raise self.malformed(f"{name} is missing")
        value = self.header[name]
        if type(value) not in kinds or (least is not None and value is not None and value < least):
            raise self.malformed(f"{name} is {value!r:.40}")
        return value

    def names(self, name: str) -> list[str]:
        """Return an entry of the header that is a list of strings."""
        value = self.field(name, list)
        if not all(isinstance(item, str) for item in value):
            raise self.malformed(f"{name} is {value!r:.40}")
        return value

    def leaves(self, name: str, template: PyTree, *leading: int) -> PyTree:
        """Return a pytree from stored leaves.

        Args:
            name: Name given to `Writer.leaves`.
            template: Pytree of arrays or shapes: the structure, and the shapes without the leading axes.
            *leading: Sizes of the leading axes of all leaves.
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
        """Return one stored leaf, with its shape and dtype checked."""
        x = self.array(name)
        # The width of integers depends on jax_enable_x64 when they were written.
        same = x.dtype.kind == like.dtype.kind if like.dtype.kind == "i" else x.dtype == like.dtype
        if x.shape != (*leading, *like.shape) or not same:
            raise self.malformed(f"{name} is {x.dtype}{list(x.shape)}")
        return x

    def array(self, name: str, *ndims: int) -> np.ndarray:
        """Return a stored array.

        Args:
            name: Name of the array.
            *ndims: Numbers of axes that it may have; none for any number.
        """
        if name not in self.arrays:
            raise self.malformed(f"{name} is missing")
        x = self.arrays[name]
        if ndims and x.ndim not in ndims:
            raise self.malformed(f"{name} is {x.dtype}{list(x.shape)}")
        self._read.add(name)
        return x

    def key(self, name: str, impl: str) -> PRNGKey:
        """Return a stored key.

        Args:
            name: Name of the array of its words.
            impl: Name of its implementation.
        """
        words = self.array(name, 1)
        if words.dtype != np.uint32:
            raise self.malformed(f"{name} is {words.dtype}")
        try:
            return jax.random.wrap_key_data(jnp.asarray(words), impl=impl)
        except (TypeError, ValueError) as error:
            raise self.malformed(error) from error

    def check_types(self, values: dict[str, Any], cls: type) -> None:
        """Check the values of a dataclass's fields against its annotations."""
        for name, hint in get_type_hints(cls, include_extras=True).items():
            if name in values and not _fits(values[name], hint):
                raise self.malformed(f"{cls.__name__} and its field {name}")

    def close(self) -> None:
        """Check that every array was read."""
        if left := sorted(set(self.arrays) - self._read):
            raise self.malformed(f"{left[0]} does not belong to it")

    def decode(self, what: str, stored: Any, given: Any = None) -> Any:
        """Return the value that `Writer.encode` encoded; gaps are filled with the same parts of ``given``.

        Args:
            what: Name of the argument by which the user passes ``given``, for messages.
            stored: What `Writer.encode` returned.
            given: The user's value, with the parts that are not stored; None if there is none.

        Raises:
            ValueError: Nothing fills a gap.
        """
        if stored is None or isinstance(stored, (bool, int, float, str)):
            return stored
        if isinstance(given, (Traced, Untraced)):
            return given
        if not isinstance(stored, dict):
            raise self.malformed(f"{what} holds {stored!r:.40}")
        if isinstance(name := stored.get("array"), str):
            return self.array(name)
        if isinstance(name := stored.get("key"), str) and isinstance(impl := stored.get("impl"), str):
            return self.key(name, impl)
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
        if kind in _REPLACED and not items:
            return _REPLACED[kind]
        now = lambda name: _RENAMED.get((kind, name), name)
        values: dict[Any, Any] = {
            now(key): self.decode(what, item, _part(given, key)) for key, item in (_ADDED.get(kind, {}) | items).items()
        }
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
        # Set the fields without the constructor, which may take other arguments; JAX rebuilds pytrees in the same way.
        made: Any = object.__new__(cls)
        for field, item in values.items():
            object.__setattr__(made, field, item)
        return made


def _fits(value: Any, hint: Any) -> bool:
    """Return whether a value that was read fits an annotation. A number may be an array without axes.

    The annotation Any means a number, an array, or an object.
    """
    origin, parts = get_origin(hint), get_args(hint)
    if origin in (Union, UnionType):
        return any(_fits(value, part) for part in parts)
    if origin is Annotated:  # a `Scalar`
        return not getattr(value, "ndim", 0) and _fits(value, parts[0])
    if hint is Any:
        return value is not None and not isinstance(value, (bool, str, tuple, list, dict))
    if hint in (int, float):
        kinds = "iu" if hint is int else "iufV"  # V is the kind of bfloat16
        is_number = isinstance(value, (int, float, np.ndarray)) and not isinstance(value, bool)
        return is_number and np.ndim(value) == 0 and np.asarray(value).dtype.kind in kinds
    if origin is tuple and len(parts) == 2 and parts[1] is ...:
        return isinstance(value, tuple) and (parts[0] is Any or all(_fits(item, parts[0]) for item in value))
    if origin is tuple and parts:
        return isinstance(value, tuple) and len(value) == len(parts) and all(map(_fits, value, parts))
    if origin is dict:
        return isinstance(value, dict) and all(all(map(_fits, item, parts)) for item in value.items())
    kind = hint if origin is None else origin
    return not isinstance(kind, type) or kind is PyTree or isinstance(value, kind)


def _part(given: Any, key: str) -> Any:
    """Return the part of ``given`` that corresponds to the entry ``key`` of a file."""
    if isinstance(given, dict):
        return given.get(key)
    if isinstance(given, (tuple, list)):
        return given[int(key)] if key.isdecimal() and int(key) < len(given) else None
    return getattr(given, key, None)
