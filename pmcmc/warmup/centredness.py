"""The centredness of partially centred sites, chosen from the draws of an ensemble.

For an element with standardised value z, location mu and scale s (see `AutoReparam`), the coordinate w under
centredness c is

    w = c mu + s^c z

The divergence of a normal law of the same mean and variance from that of w is, up to a constant,

    log Var(w) / 2 - (c - 1) E[log s]

because ``dw/dx = s^(c-1)`` with ``x = mu + s z``. `choose` minimises it over `GRID`, by means over the draws, without
gradients. `moved` maps draws from one centredness to another, at the same x.

Source: Gorinova, Moore & Hoffman (2020), who minimise the divergence by stochastic gradients.
"""

import jax
import numpy as np

from pmcmc._pytree import Array, ArrayLeaf, PyTree
from pmcmc._xla.compile import tuned_jit
from pmcmc.target import Place, Target

# Values of c that are considered. Between neighbours the divergence differs by about a hundredth near its minimum.
GRID = np.linspace(0.0, 1.0, 21)
# Draws from which c is chosen, and the number of rows that are evaluated at a time.
NUM_DRAWS = 512


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

    An element whose divergence is finite for no c is non-centred.
    """
    mean_log_scale = np.mean(np.asarray(place.log_scale, float), axis=0)
    with np.errstate(all="ignore"):
        loss = np.array([np.log(np.var(coordinate(place, c), axis=0)) / 2 - (c - 1) * mean_log_scale for c in GRID])
    return GRID[np.argmin(np.where(np.isfinite(loss), loss, np.inf), axis=0)]


def recentred(target: Target, path: np.ndarray, draws: np.ndarray) -> tuple[Target, np.ndarray]:
    """Return the target with the centredness that suits draws, and a path as its positions.

    Args:
        target: Target with partially centred sites; its basis is ignored.
        path: Positions of lanes; shape (steps, lanes, D).
        draws: The part of the path from which the centredness is chosen; the same axes.
    """
    steps, lanes, dim = draws.shape
    some = draws[:: max(1, steps * lanes // NUM_DRAWS)].reshape(-1, dim)[:NUM_DRAWS]
    centredness = {name: choose(place) for name, place in _places(target, some).items()}
    return target.with_centredness(centredness), moved(target, path, centredness)


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
    for start in range(0, len(flat), NUM_DRAWS):
        part = flat[start : start + NUM_DRAWS]
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


def _places(target: Target, rows: np.ndarray) -> dict[str, Place]:
    """Return where partially centred sites are at up to `NUM_DRAWS` positions (N, D), by one program for any N."""
    padded = np.asarray(rows[np.minimum(np.arange(NUM_DRAWS), len(rows) - 1)], target.spec.dtype)
    return jax.tree.map(lambda x: np.asarray(x)[: len(rows)], _places_of_rows(target.with_basis(None), padded))


@tuned_jit()
def _places_of_rows(target: Target, rows: Array) -> dict[str, Place]:
    """Compute `Model.places` at positions (N, D)."""
    return jax.vmap(lambda row: target.model.places(target.data, target.spec.unravel(row)))(rows)
