"""The centredness of partially centred sites, chosen from the draws of an ensemble.

For an element with standardised value z, location mu and scale s (see `AutoReparam`), the coordinate w under
centredness c is

    w = c mu + s^c z

The divergence of a normal law of the same mean and variance from that of w is, up to a constant,

    log Var(w) / 2 - (c - 1) E[log s]

because ``dw/dx = s^(c-1)`` with ``x = mu + s z``. `choose` computes it on `GRID`, by means over the draws, without
gradients, and takes the least c that is near its minimum. `moved` maps draws from one centredness to another, at the
same x.

Source: Gorinova, Moore & Hoffman (2020), who minimise the divergence by stochastic gradients.
"""

import math

import jax
import numpy as np

from pmcmc._pytree import Array, ArrayLeaf, PyTree
from pmcmc._xla.compile import tuned_jit
from pmcmc.target import Place, Target

# Values of c that are considered. Between neighbours the divergence differs by about a hundredth near its minimum.
GRID = np.linspace(0.0, 1.0, 21)
# Number of draws from which c is chosen, at most about.
NUM_DRAWS = 512
# Noise of n draws lowers the least divergence of an element by up to NOISE / n: about one draw in five is independent,
# and the likelihood ratio of one parameter rarely exceeds 2 for a parameter that has no effect.
NOISE = 10
# Bytes of the places that are computed at a time, and the largest number of rows.
PLACES_BYTES, MOST_ROWS = 2**26, 512


def coordinate(place: Place, c: ArrayLeaf) -> np.ndarray:
    """Return ``w = c mu + s^c z``, computed in float64.

    Args:
        place: Where a site is; arrays with any leading axes.
        c: Its centredness.
    """
    z, mu, log_scale, c = (np.asarray(values, float) for values in (place.standard, place.loc, place.log_scale, c))
    return c * mu + np.exp(c * log_scale) * z


def choose(place: Place) -> np.ndarray:
    """Return the best centredness of every element of a site, from draws along the leading axis.

    It is the least c whose divergence exceeds the least one by no more than noise may: few draws show the neck of a
    funnel, in which chains of too large a c get stuck, while too small a c costs some draws. An element whose
    divergence is finite for no c is non-centred. For families with heavy tails, w is compared with a Cauchy law of the
    same quartiles, because its variance may be infinite.
    """
    mean_log_scale = np.mean(np.asarray(place.log_scale, float), axis=0)
    width = _width_of_cauchy if np.any(place.is_heavy) else _width_of_normal
    with np.errstate(all="ignore"):
        loss = np.array([width(coordinate(place, c)) - (c - 1) * mean_log_scale for c in GRID])
    loss = np.where(np.isfinite(loss), loss, np.inf)
    near = loss <= np.min(loss, axis=0) + NOISE / len(place.value)
    return GRID[np.argmax(near, axis=0)]


def _width_of_normal(w: np.ndarray) -> np.ndarray:
    """Return ``-E[log q(w)]``, up to a constant, of the normal law q with the mean and variance of w."""
    return np.log(np.var(w, axis=0)) / 2


def _width_of_cauchy(w: np.ndarray) -> np.ndarray:
    """Return ``-E[log q(w)]``, up to a constant, of the Cauchy law q with the median and quartile distance of w."""
    lower, median, upper = np.quantile(w, [0.25, 0.5, 0.75], axis=0)
    scale = (upper - lower) / 2
    return np.log(scale) + np.mean(np.log1p(((w - median) / scale) ** 2), axis=0)


def recentred(target: Target, path: np.ndarray, draws: np.ndarray) -> tuple[Target, np.ndarray]:
    """Return the target with the centredness that suits draws, and a path as its positions.

    If the centredness stays, both are returned as they are.

    Args:
        target: Target with partially centred sites; its basis is ignored.
        path: Positions of lanes; shape (steps, lanes, D).
        draws: The part of the path from which the centredness is chosen; the same axes.
    """
    steps, lanes, dim = draws.shape
    some = draws[:: math.ceil(steps * lanes / NUM_DRAWS)].reshape(-1, dim)
    centredness = {name: choose(place) for name, place in _places(target, some).items()}
    other = target.with_centredness(centredness)
    if all(np.array_equal(c, target.centredness[name]) for name, c in other.centredness.items()):
        return target, path
    return other, moved(target, path, centredness)


def moved(target: Target, rows: np.ndarray, centredness: dict[str, ArrayLeaf]) -> np.ndarray:
    """Return positions of a target as positions of the same target with another centredness.

    Elements whose centredness stays keep their coordinate, whatever their scale.

    Args:
        target: Target with partially centred sites; its basis is ignored.
        rows: Positions; shape (..., D).
        centredness: The other centredness, by site.
    """
    flat, parts = rows.reshape(-1, rows.shape[-1]), []
    stays = {name: np.asarray(centredness[name], c.dtype) == np.asarray(c) for name, c in target.centredness.items()}
    batch = _batch(target)
    for start in range(0, len(flat), batch):
        part = flat[start : start + batch]
        position = target.spec.unravel(part)
        for name, place in _places(target, part).items():
            with np.errstate(all="ignore"):
                position[name] = np.where(stays[name], position[name], coordinate(place, centredness[name]))
        parts.append(np.concatenate([np.reshape(x, (len(part), -1)) for x in jax.tree.leaves(position)], axis=1))
    return np.concatenate(parts).reshape(rows.shape).astype(rows.dtype)


def own_positions(target: Target, positions: PyTree) -> PyTree:
    """Return unconstrained values of the model as the user wrote it as positions of the target.

    Args:
        target: The target.
        positions: Values by site, with one leading axis.
    """
    if not target.centredness:
        return positions
    rows = np.concatenate([np.reshape(x, (len(x), -1)) for x in jax.tree.leaves(positions)], axis=1)
    return target.spec.unravel(moved(target.as_written, rows, target.centredness))


def _batch(target: Target) -> int:
    """Return the number of rows whose places are computed at a time."""
    size = target.dim + sum(4 * c.size for c in target.centredness.values())
    return max(1, min(MOST_ROWS, PLACES_BYTES // (size * target.spec.dtype.itemsize)))


def _places(target: Target, rows: np.ndarray) -> dict[str, Place]:
    """Return where partially centred sites are at positions (N, D), by one program for any N."""
    bare, batch, parts = target.with_basis(None), _batch(target), []
    for start in range(0, len(rows), batch):
        some = rows[np.minimum(np.arange(start, start + batch), len(rows) - 1)]
        found = _places_of_rows(bare, np.asarray(some, target.spec.dtype))
        parts.append(jax.tree.map(lambda x: np.asarray(x)[: len(rows) - start], found))  # noqa: B023
    return jax.tree.map(lambda *pieces: np.concatenate(pieces), *parts)


@tuned_jit()
def _places_of_rows(target: Target, rows: Array) -> dict[str, Place]:
    """Compute `Model.places` at positions (N, D)."""
    return jax.vmap(lambda row: target.model.places(target.data, target.spec.unravel(row)))(rows)
