"""Draws in ArviZ's layout, in memory or on disk. ArviZ and Zarr are imported only when a function of this module runs.

`to_arviz` builds containers of draws. `DrawArrays` writes draws as growing Zarr arrays; `open_lazily` and `read_arrays`
read them.

The files use Zarr format 2, because consolidated metadata, which xarray looks for first, is part of format 2 and not of
format 3. It is one file, replaced as a whole, and the only place that records how long the arrays are. So a reader
never sees one array longer than another, nor draws that are written but not shown yet.
"""

import inspect
import math
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from pmcmc.interop import require


def to_arviz(
    groups: dict[str, dict[str, Any]],
    attrs: dict[str, Any],
    *,
    known: dict[str, list[str]],
    dims: dict[str, list[str]],
    coords: dict[str, Any],
) -> Any:
    """Return an `InferenceData` (ArviZ 0.x) or `xarray.DataTree` (ArviZ 1.x) of copies of arrays, without empty groups.

    Args:
        groups: Arrays by group and name.
        attrs: Attributes of every group.
        known: Names of the leading axes of a draw that the model gives, by array.
        dims: The user's names of all axes of a draw, or of those after ``known``, by array.
        coords: Coordinates of named axes.
    """
    import arviz as az

    arrays: dict[str, Any] = {  # copies, since what is done to them in place must not change the chain
        group: {name: _known(value).copy() for name, value in values.items()}
        for group, values in groups.items()
        if values
    }
    dims = {**known, **{name: _after(known.get(name, []), names, name, groups) for name, names in dims.items()}}
    labels: dict[str, Any] = dict(dims=dims, coords=coords, save_warmup=any(g.startswith("warmup_") for g in arrays))
    # ArviZ 1.0 replaced one keyword per group by one dict of groups.
    if "data" in inspect.signature(az.from_dict).parameters:
        by_group = {"/": attrs, **{name: attrs for name in arrays}}
        arrays = {group: without_slashes(values) for group, values in arrays.items()}
        return az.from_dict(arrays, attrs=by_group, **{**labels, "dims": without_slashes(dims)})
    return az.from_dict(**arrays, attrs=attrs, **labels)


def without_slashes(by_name: dict[str, Any]) -> dict[str, Any]:
    """Replace "/" in names, as of `numpyro.handlers.scope`, by "." unless that name exists: it separates folders."""
    plain = {name: name.replace("/", ".") for name in by_name}
    return {plain[name] if list(plain.values()).count(plain[name]) == 1 else name: x for name, x in by_name.items()}


def _after(known: list[str], names: list[str], array: str, groups: dict[str, dict[str, Any]]) -> list[str]:
    """Return the user's names of an array's axes, preceded by the known ones if the user names only the last axes."""
    num_axes = (np.ndim(x[array]) - 2 * (group not in CONSTANT) for group, x in groups.items() if array in x)
    num_before = next(num_axes, 0) - len(names)
    return [*known[:num_before], *names] if 0 < num_before <= len(known) else names


def _known(value: Any) -> np.ndarray:
    """Return an array of a dtype that xarray and Zarr know: bfloat16 becomes float32, which holds all of its values."""
    x = np.asarray(value)
    return x.astype(np.float32) if x.dtype.kind == "V" else x


def predictive_groups(
    prior: dict[str, Any] | None,
    posterior_predictive: dict[str, Any] | None,
    latent: Collection[str],
    num_chains: int,
    num_draws: int,
) -> dict[str, dict[str, Any]]:
    """Return the groups of draws made with NumPyro's `Predictive`.

    Args:
        prior: Prior draws by site, leading axis draw; None for none.
        posterior_predictive: Posterior predictive draws by site, leading axes (chain, draw) or both flattened; None for
            none.
        latent: Names of all latent and deterministic sites, whose prior draws form a group of their own.
        num_chains: Number of chains.
        num_draws: Draws of each chain.

    Raises:
        ValueError: The number of posterior predictive draws differs from that of the posterior.
    """
    one_chain = {name: np.asarray(x)[None] for name, x in (prior or {}).items()}
    groups: dict[str, dict[str, Any]] = {
        "prior": {name: x for name, x in one_chain.items() if name in latent},
        "prior_predictive": {name: x for name, x in one_chain.items() if name not in latent},
        "posterior_predictive": {},
    }
    for name, given in (posterior_predictive or {}).items():
        x = np.asarray(given)
        if x.shape[:1] == (num_chains * num_draws,):
            x = x.reshape(num_chains, num_draws, *x.shape[1:])
        if x.shape[:2] != (num_chains, num_draws):
            raise ValueError(
                f"posterior_predictive has {name!r} of shape {x.shape}: expected {num_chains * num_draws} draws, or "
                f"{num_chains} chains of {num_draws}. Pass Predictive(model, chain.get_samples()) of all draws."
            )
        groups["posterior_predictive"][name] = x
    return groups


Groups = dict[str, dict[str, Any]]  # arrays by group and name
# Size of one chunk, all chains together. A chunk is a file, and each `DrawArrays.write` writes the last one again.
CHUNK_BYTES = 2**20
# Groups whose arrays grow.
DRAWN = ("posterior", "sample_stats")
# Groups whose arrays have no axes (chain, draw).
CONSTANT = ("observed_data", "constant_data")
_DIMS = "_ARRAY_DIMENSIONS"  # attribute in which xarray looks for names of axes in format 2


def check_zarr(who: str = "Chain.stream") -> None:
    """Raise an error if Zarr is missing, before draws are written or read.

    Raises:
        ImportError: Zarr is not installed.
    """
    require(("zarr",), who, "pmcmc[zarr]")


class DrawArrays:
    """Arrays (chain, draw, ...) in the groups of a Zarr hierarchy.

    Args:
        path: A new folder, or one made by this class.
        dims: Names of the leading axes of a draw, by array.
    """

    def __init__(self, path: Path, dims: dict[str, list[str]]):
        import zarr

        self.path, self.dims = path, dims
        self._root = zarr.open_group(str(path), mode="a", zarr_format=2, use_consolidated=False)
        self._shown = {x.path: x for _, group in self._root.groups() for _, x in group.arrays() if _grows(x)}
        self._whole: dict[str, Any] = {}

    def describe(self, attrs: dict[str, Any], num_chains: int, constants: Groups) -> None:
        """Write attributes, chain numbers, and arrays without draws."""
        self._root.attrs.update(attrs)
        for name in DRAWN:
            group = self._root.create_group(name, attributes=attrs)
            self._fixed(group, "chain", np.arange(num_chains), ["chain"])
        for name, arrays in constants.items():
            if arrays:
                group = self._root.create_group(name, attributes=attrs)
            for key, (like, value) in without_slashes({key: (key, value) for key, value in arrays.items()}).items():
                x = _known(value)
                self._fixed(group, key, x, self._names(like, x.shape))

    def _fixed(self, group: Any, name: str, x: np.ndarray, dims: list[str]) -> None:
        """Write an array that does not grow."""
        made = group.create_array(
            name, shape=x.shape, chunks=_some(x.shape), dtype=x.dtype, fill_value=None, attributes={_DIMS: dims}
        )
        made[...] = x

    def _names(self, name: str, shape: tuple[int, ...]) -> list[str]:
        """Return names of axes: those known, but for names that every draw has, then numbered ones."""
        known = [None if axis in ("chain", "draw") else axis for axis in self.dims.get(name, [])]
        known += [None] * (len(shape) - len(known))
        return [f"{name}_dim_{n}" if axis is None else axis for n, axis in enumerate(known)]

    def write(self, first: int, groups: Groups, room: int) -> None:
        """Write draws after the first ``first`` ones. Readers do not see them before `show`.

        Args:
            first: Number of draws already written.
            groups: Draws by group and name, leading axes (chain, draw).
            room: Number of draws that the arrays will have in the end; used for arrays that do not exist yet.
        """
        for group, arrays in groups.items():
            for name, x in arrays.items():
                whole = self._open(f"{group}/{name}", _known(x), room)
                whole[:, first : first + x.shape[1]] = _known(x)

    def _open(self, path: str, like: np.ndarray, room: int) -> Any:
        """Return the array at its final length. Readers see the length of a second handle, which `show` resizes."""
        import zarr

        if path not in self._whole:
            shape = (like.shape[0], room, *like.shape[2:])
            if path in self._shown:
                whole = self._shown[path]
                num_draws = whole.shape[1]
                whole.resize(shape)
            else:
                num_draws, chunk = 0, (like.shape[0], 1, *like.shape[2:])
                rows = max(1, CHUNK_BYTES // max(1, math.prod(chunk) * like.dtype.itemsize))
                dims = ["chain", "draw", *self._names(path.split("/")[-1], like.shape[2:])]
                whole = self._root.create_array(
                    path,
                    shape=shape,
                    chunks=_some((like.shape[0], min(rows, room), *like.shape[2:])),
                    dtype=like.dtype,
                    fill_value=None,  # xarray would mask entries equal to a fill value as missing
                    attributes={_DIMS: dims},
                )
            self._whole[path] = whole
            self._shown[path] = zarr.open_array(str(self.path), path=path, mode="r+", zarr_format=2)
            self._shown[path].resize((shape[0], num_draws, *shape[2:]))
        return self._whole[path]

    def show(self, num_draws: int) -> None:
        """Let readers see exactly ``num_draws`` draws of all arrays."""
        import zarr

        for x in self._shown.values():
            if x.shape[1] != num_draws:
                x.resize((x.shape[0], num_draws, *x.shape[2:]))
        zarr.consolidate_metadata(str(self.path), zarr_format=2)


def is_without_draws(path: Path) -> bool:
    """Return whether a folder is a `DrawArrays` of pmcmc that shows no draws yet."""
    import zarr

    try:
        root = zarr.open_group(str(path), mode="r", use_consolidated=False)
    except (OSError, ValueError):  # something else has this name
        return False
    lengths = [x.shape[1] for _, group in root.groups() for _, x in group.arrays() if _grows(x)]
    is_ours = root.metadata.zarr_format == 2 and root.attrs.get("inference_library") == "pmcmc"
    return is_ours and not any(lengths)


def _some(shape: tuple[int, ...]) -> tuple[int, ...]:
    """Replace zeros in a shape by ones: Zarr needs chunks of at least one element."""
    return tuple(max(1, n) for n in shape)


def _grows(x: Any) -> bool:
    """Whether an array has the axes (chain, draw)."""
    return x.attrs.get(_DIMS, [])[:2] == ["chain", "draw"]


def open_lazily(path: Path, num_draws: int) -> Any:
    """Return ArviZ's container of the first draws; its arrays are read when they are used."""
    check_zarr("StoredChain.to_arviz")
    import arviz as az
    import xarray as xr

    tree = xr.open_datatree(str(path), engine="zarr", chunks=None)
    for group in DRAWN:
        tree[group].dataset = tree[group].to_dataset().isel(draw=slice(num_draws))
    # ArviZ 0.x has its own class InferenceData. From 1.0 on it uses xarray's DataTree, which 1.3 also exports as
    # InferenceData.
    container: Any = getattr(az, "InferenceData", xr.DataTree)
    return tree if container is xr.DataTree else container.from_datatree(tree)


def read_arrays(path: Path, group: str, names: Sequence[str]) -> dict[str, Any]:
    """Return arrays at the length that is shown; each is read where it is indexed."""
    check_zarr("StoredChain.get_samples")
    import zarr

    found = zarr.open_group(str(path), mode="r")
    return {name: found[f"{group}/{name}"] for name in names}
