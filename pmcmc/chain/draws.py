"""Draws as users see them: constrained sites by name, and statistics of the transitions.

`constrain` turns the kernel's states into the sites of the user's model, and `in_batches` applies it (or any other
program) to many draws. `fields` and `sample_stats` name the statistics as NumPyro and ArviZ do.

`judge_mixing` computes R-hat and effective sample sizes as ArviZ and Stan define them, in numpy. `judge` returns a
`Mixing` for draws by site; `measure` computes the numbers. ArviZ itself is not used, because importing it takes two to
three seconds, as long as a whole short call. `tests/chain/test_mixing.py` compares the results.

Source: Vehtari, Gelman, Simpson, Carpenter & Buerkner (2021).
"""

import math
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import jax
import numpy as np
from scipy.fft import irfft, next_fast_len, rfft
from scipy.special import chdtri, ndtri

from pmcmc._pytree import PyTree
from pmcmc._xla.compile import tuned_jit
from pmcmc.kernels import Info, Kernel
from pmcmc.kernels.base import PositionKernel
from pmcmc.target import Target

# Requirements of ArviZ and Stan (Vehtari et al. 2021).
MAX_RHAT, MIN_ESS = 1.01, 400
# Numbers of draws of all chains together. Below the first nothing is judged; below the second a small effective sample
# size is not reported as a fault.
MIN_DRAWS, ENOUGH_DRAWS = 400, 2000
# Probability that R-hat of chains that sample the same law exceeds its noise level by chance.
CHANCE = 1e-4
# Largest number of numbers (draws times coordinates) to judge; longer chains are thinned, but not to fewer draws per
# chain than the second number, nor to fewer than ENOUGH_DRAWS of all chains.
MAX_NUMBERS, FEWEST = 2**18, 256
# Number of coordinates measured at once: limits the memory of wide posteriors.
MAX_COLUMNS = 2**12


class Mixing(NamedTuple):
    """How well draws have mixed, by the worst element of each site.

    Effective sample sizes are those of the draws that were judged. If ``stride`` is above 1, they are lower bounds for
    all draws. Whether there are enough draws is a question of all draws, ``num_draws`` times ``stride``.

    Attributes:
        rhat: Largest R-hat of each site as {site: (value, element)}, where element is the index of the worst element,
            () for a scalar site. Sites that do not vary are left out.
        bulk_ess: Smallest effective sample size in the bulk, in the same form.
        tail_ess: Smallest effective sample size in the tails, in the same form.
        num_apart: Number of elements whose R-hat is above 1.01 and above what the noise of their effective draws
            explains.
        num_draws: Number of draws judged, all chains together.
        stride: Every ``stride``-th draw of each chain was judged.
    """

    rhat: dict[str, tuple[float, tuple[int, ...]]]
    bulk_ess: dict[str, tuple[float, tuple[int, ...]]]
    tail_ess: dict[str, tuple[float, tuple[int, ...]]]
    num_apart: int
    num_draws: int
    stride: int

    @property
    def max_rhat(self) -> float:
        """Largest R-hat; NaN if nothing varies."""
        return max((value for value, _ in self.rhat.values()), default=math.nan)

    @property
    def min_ess(self) -> float:
        """Smallest effective sample size, bulk or tail; NaN if nothing varies."""
        return min((value for found in (self.bulk_ess, self.tail_ess) for value, _ in found.values()), default=math.nan)

    @property
    def has_few_draws(self) -> bool:
        """Whether all chains together have too few draws to judge them."""
        return self.num_draws * self.stride < MIN_DRAWS

    @property
    def is_judged(self) -> bool:
        """Whether there are enough draws to judge them."""
        return not self.has_few_draws and not math.isnan(self.max_rhat)

    @property
    def doubt(self) -> str:
        """What is wrong with the mixing, in words; "" if nothing is, or if there are too few draws to tell."""
        # A stream may hold fewer than ENOUGH_DRAWS of its draws: of these the same share must be effective.
        least = MIN_ESS * min(1.0, self.num_draws / ENOUGH_DRAWS)
        few = self.num_draws * self.stride >= ENOUGH_DRAWS and self.min_ess < least
        if not self.is_judged or not (few or self.num_apart):
            return ""
        return (
            f"the draws have not mixed: {self}. Where R-hat is above {MAX_RHAT} or an effective sample size below "
            f"{MIN_ESS}, means and intervals may be off by more than they seem. Take more draws (chain.extend), or "
            "reparametrise; if chains stay in different places, the posterior has separate modes and more draws do "
            "not help."
        )

    def __str__(self) -> str:
        if math.isnan(self.max_rhat):
            return "no site varies, or chains have fewer than four draws, or values that are not finite"
        (worst, place), *_ = sorted(((v, _name(*key)) for key, v in _flat(self.rhat)), reverse=True)
        sizes = [min((v, _name(*key)) for key, v in _flat(found)) for found in (self.bulk_ess, self.tail_ess)]
        (bulk, bulk_place), (tail, tail_place) = sizes
        rhat = f"at most {worst:.3f}" if worst < 100 else "above 100"  # R-hat is huge if chains do not move
        every = f" (one in {self.stride})" if self.stride > 1 else ""
        return (
            f"R-hat {rhat} ({place}), effective sample size at least {bulk:,.0f} in the bulk "
            f"({bulk_place}) and {tail:,.0f} in the tails ({tail_place}), of {self.num_draws:,} draws{every}"
        )


def _flat(found: dict) -> list:
    """Return items ((site, element), value)."""
    return [((site, element), value) for site, (value, element) in found.items()]


def _name(site: str, element: tuple[int, ...]) -> str:
    """Return the name of an element, such as ``theta[1]``."""
    return f"{site}[{', '.join(map(str, element))}]" if element else site


def stride_of(num_chains: int, num_draws: int, dim: int) -> int:
    """Return the stride by which long chains are thinned before they are judged."""
    wanted = max(FEWEST, ENOUGH_DRAWS // num_chains, MAX_NUMBERS // (num_chains * dim))
    return max(1, num_draws // wanted)


def judge(sites: dict[str, np.ndarray], stride: int = 1) -> Mixing:
    """Measure how well draws have mixed.

    Args:
        sites: Draws by site; shape (num_chains, num_draws, ...).
        stride: Thinning that was already applied: the draws are every ``stride``-th of the chain.
    """
    found: tuple[dict, dict, dict] = ({}, {}, {})
    num_draws = num_apart = 0
    for name, x in sites.items():
        num_draws, shape = x.shape[0] * x.shape[1], x.shape[2:]
        rows = x.reshape(*x.shape[:2], -1)
        varies = np.flatnonzero(np.any(rows != rows[:1, :1], axis=(0, 1)))
        if x.shape[1] < 4 or not len(varies) or not np.isfinite(rows).all():
            continue
        # Measure some coordinates at a time: several arrays as large as their draws are in memory.
        parts = np.array_split(varies, -(-len(varies) // MAX_COLUMNS))
        rhat, bulk, tail, noise = map(np.concatenate, zip(*(measure(rows[..., some]) for some in parts), strict=True))
        num_apart += int(np.sum(rhat > np.maximum(MAX_RHAT, noise)))
        picks = (np.nanargmax, np.nanargmin, np.nanargmin)
        for into, values, pick in zip(found, (rhat, bulk, tail), picks, strict=True):
            if not np.isnan(values).all():
                place = int(pick(values))
                into[name] = (float(values[place]), tuple(map(int, np.unravel_index(varies[place], shape))))
    return Mixing(*found, num_apart, num_draws, stride)


class Measures(NamedTuple):
    """Result of `measure`; arrays of shape (D,).

    Attributes:
        rhat: Rank-normalised split R-hat.
        bulk_ess: Effective sample size in the bulk.
        tail_ess: Effective sample size in the tails.
        noise: R-hat that chains sampling the same law exceed only with a small probability (`CHANCE`, over all
            coordinates).
    """

    rhat: np.ndarray
    bulk_ess: np.ndarray
    tail_ess: np.ndarray
    noise: np.ndarray


def measure(draws: np.ndarray) -> Measures:
    """Compute rank-normalised split R-hat (the larger of bulk and folded) and effective sample sizes of bulk and tails.

    The effective sample size of the tails is the smaller one of the 5 % and 95 % quantiles. Where a coordinate does not
    vary, R-hat is NaN.

    Noise: let each of m chains have n effective draws. If all sample the same law, the variance of their means is
    distributed as

        n var / within ~ chi2 / (m - 1)

    with m - 1 degrees of freedom, so R-hat is near ``sqrt(1 + chi2 / (n (m - 1)))``. The n used here is measured within
    chains, so that chains that stay apart do not increase their own noise.

    Args:
        draws: Draws; shape (num_chains, num_draws, D).

    Source: Vehtari, Gelman, Simpson, Carpenter & Buerkner (2021).
    """
    draws = np.ascontiguousarray(np.moveaxis(draws, 2, 0), float)  # (D, num_chains, num_draws): much faster to sort
    split = _split(draws)
    scores = _normal_scores(split)
    folded = _normal_scores(np.abs(split - np.median(split, axis=(1, 2), keepdims=True)))
    edges = np.quantile(draws, (0.05, 0.95), axis=(1, 2))[..., None, None]
    tails = [_ess(_split((draws <= edge).astype(float))) for edge in edges]
    rhats, num_chains = (_rhat(scores), _rhat(folded)), split.shape[1]
    unlikely = chdtri(num_chains - 1, CHANCE / len(draws)) / (num_chains - 1)
    # Effective draws within chains: centred chains have no variance between them.
    centred = [x - x.mean(axis=2, keepdims=True) for x in (scores, folded)]
    noise = [np.sqrt(1 + unlikely * num_chains / _ess(x)) for x in centred]
    # Take the larger R-hat of the two, with its own noise. Folded draws of two values may not vary; they have NaN.
    rhat, noise = np.fmax(*rhats), np.where(rhats[1] > rhats[0], noise[1], noise[0])
    return Measures(rhat, _ess(scores), np.minimum(*tails), noise)


def _split(x: np.ndarray) -> np.ndarray:
    """Split every chain into two halves; the middle draw of an odd number is left out."""
    half = x.shape[2] // 2
    return np.concatenate([x[..., :half], x[..., x.shape[2] - half :]], axis=1)


def _normal_scores(x: np.ndarray) -> np.ndarray:
    """Return normal quantiles of the ranks of all draws of a coordinate (Blom's formula); ties share the mean rank."""
    rows = x.reshape(len(x), -1)
    order = np.argsort(rows, axis=1)
    ordered = np.take_along_axis(rows, order, axis=1)
    num_draws = rows.shape[1]
    # Find the first and the last place of the tie that each place belongs to.
    new = np.ones((len(rows), num_draws + 1), bool)
    new[:, 1:-1] = ordered[:, 1:] != ordered[:, :-1]
    place = np.arange(num_draws)
    first = np.maximum.accumulate(np.where(new[:, :-1], place, 0), axis=1)
    last = np.minimum.accumulate(np.where(new[:, 1:], place, num_draws - 1)[:, ::-1], axis=1)[:, ::-1]
    scores = np.empty(rows.shape)
    np.put_along_axis(scores, order, ndtri((0.625 + (first + last) / 2) / (num_draws + 0.25)), axis=1)
    return scores.reshape(x.shape)


def _rhat(x: np.ndarray) -> np.ndarray:
    """Compute R-hat of draws (D, num_chains, num_draws); shape (D,)."""
    num_draws = x.shape[2]
    between = num_draws * x.mean(axis=2).var(axis=1, ddof=1)
    within = x.var(axis=2, ddof=1).mean(axis=1)
    with np.errstate(divide="ignore", invalid="ignore"):
        return np.sqrt((between / within + num_draws - 1) / num_draws)


def _ess(x: np.ndarray) -> np.ndarray:
    """Compute the effective sample size by Geyer's initial monotone sequence.

    Args:
        x: Draws; shape (D, num_chains, num_draws).

    Returns:
        Effective sample sizes (D,); as in ArviZ the number of draws where nothing varies, such as whether a draw is
        below a quantile that is the largest value of all.
    """
    _, num_chains, num_draws = x.shape
    total, means = num_chains * num_draws, x.mean(axis=2, keepdims=True)
    size = next_fast_len(2 * num_draws, real=True)
    power = np.mean(np.abs(rfft(x - means, size)) ** 2, axis=1)
    covariance = irfft(power, size)[:, :num_draws] / num_draws  # autocovariance by lag, averaged over the chains
    within = covariance[:, 0] * num_draws / (num_draws - 1)
    variance = covariance[:, 0] + (means[..., 0].var(axis=1, ddof=1) if num_chains > 1 else 0.0)
    with np.errstate(divide="ignore", invalid="ignore"):
        correlation = 1 - (within[:, None] - covariance) / variance[:, None]
    correlation[:, 0] = 1.0
    # Sum autocorrelations in pairs, up to the first negative pair, and make the pairs non-increasing.
    most = max(1, (num_draws - 3) // 2)
    pairs = (correlation[:, :-1:2] + correlation[:, 1::2])[:, :most]
    positive = np.logical_and.accumulate(pairs >= 0, axis=1)
    positive[:, 0] = True
    monotone = np.minimum.accumulate(np.where(positive, pairs, 0.0), axis=1)
    after = 2 * positive.sum(axis=1)  # lag of the first correlation after these pairs
    after = np.take_along_axis(correlation, np.minimum(after, num_draws - 1)[:, None], axis=1)[:, 0]
    time = -1 + 2 * monotone.sum(axis=1) + np.maximum(after, 0.0)
    return np.where(variance > 0, total / np.maximum(time, 1 / np.log10(total)), total)


# Number of draws whose positions are computed at a time.
_POSITIONS = 4096


def constrained(target: Target, kernel: Kernel, unknowns: PyTree) -> PyTree:
    """Return the sites of the user's model for unknowns with one leading axis."""
    return jax.vmap(lambda unknown: target.model.constrain(target.data, kernel.position(target, unknown)))(unknowns)


@tuned_jit()
def constrain(target: Target, kernel: Kernel, unknowns: PyTree, *, sites: tuple[str, ...] | None = None) -> PyTree:
    """Compute `constrained` as a compiled program.

    Args:
        target: The target.
        kernel: The kernel that made the draws.
        unknowns: The kernel's states, with one leading axis.
        sites: Names of the sites to return in a dict; what only the others need is not computed. None for all.
    """
    draws = constrained(target, kernel, unknowns)
    return draws if sites is None else {name: by_name(draws)[name] for name in sites}


def site_shapes(target: Target) -> PyTree:
    """Return the shapes of one draw of all sites."""
    return jax.eval_shape(target.model.constrain, target.data, target.spec.template)


def check_sites(target: Target, sites: Any) -> tuple[str, ...]:
    """Return the given names of sites as a tuple.

    Raises:
        ValueError: The model does not have one of the sites.
        TypeError: ``sites`` is not a sequence of names.
    """
    known = by_name(site_shapes(target))
    names = tuple(sites) if isinstance(sites, Iterable) and not isinstance(sites, str) else None
    if names is None or not all(isinstance(name, str) for name in names):
        raise TypeError(f"sites must be a sequence of names out of {list(known)}, got {sites!r}.")
    if unknown := [name for name in names if name not in known]:
        raise ValueError(f"sites: the model has no {unknown}: expected names out of {list(known)}.")
    return names


def by_name(samples: PyTree) -> dict[str, Any]:
    """Return draws, or their shapes, as a flat dict.

    A flat dict with names is returned as it is. A single array is named ``x``, and a leaf of any other pytree by ``x``
    and its path.
    """
    if isinstance(samples, dict) and all(isinstance(k, str) and hasattr(x, "shape") for k, x in samples.items()):
        return samples
    leaves = jax.tree_util.tree_leaves_with_path(samples)
    if len(leaves) == 1 and not leaves[0][0]:
        return {"x": leaves[0][1]}
    return {"x" + jax.tree_util.keystr(path): leaf for path, leaf in leaves}


@tuned_jit()
def unconstrained(target: Target, kernel: Kernel, unknowns: PyTree) -> PyTree:
    """Compute the user's unconstrained values for unknowns with one leading axis."""
    return jax.vmap(lambda unknown: target.unconstrained(kernel.position(target, unknown)))(unknowns)


def judge_mixing(target: Target, kernel: Kernel, unknowns: PyTree, before: int = 1) -> Mixing:
    """Measure how well draws have mixed, in the unconstrained values of the latent sites.

    Long chains are thinned first, see `stride_of`. For kernels whose unknown is the vector of coordinates no program is
    compiled, unless some sites are partially centred.

    Args:
        target: The target.
        kernel: The kernel that made the draws.
        unknowns: The kernel's states, leading axes (num_chains, num_draws).
        before: Thinning that was already applied: the unknowns are every ``before``-th draw.
    """
    num_chains, num_draws = jax.tree.leaves(unknowns)[0].shape[:2]
    if not num_draws:
        return judge({})
    stride = stride_of(num_chains, num_draws, target.dim)
    rows = jax.tree.map(lambda x: np.asarray(x)[:, stride - 1 :: stride], unknowns)
    if isinstance(kernel, PositionKernel) and not target.centredness:
        found = target.spec.unravel(rows if target.basis is None else target.basis.to_positions(rows))
    else:
        found = in_batches(lambda x: unconstrained(target, kernel, x), rows, min(num_chains * num_draws, _POSITIONS))
    return judge(by_name(found), before * stride)


def fields(kernel: Any, info: Info) -> dict[str, Any]:
    """Return the fields of the transitions under NumPyro's names, as far as the kernel has them."""
    found: dict[str, Any] = {
        "diverging": info.is_divergent,
        "accept_prob": info.acceptance_rate,
        "potential_energy": -info.logdensity,
    }
    if info.energy is not None:
        found["energy"] = info.energy
    steps = info.num_integration_steps
    if steps is None:
        steps = kernel.tunables.get("num_integration_steps")
    if steps is not None:
        found["num_steps"] = np.broadcast_to(np.asarray(steps), info.margin.shape)
    if info.tree_depth is not None:
        found["tree_depth"] = info.tree_depth
    return found


def sample_stats(kernel: Any, info: Info) -> dict[str, Any]:
    """Return the fields of the transitions under ArviZ's names, as far as the kernel has them."""
    found = fields(kernel, info)
    stats = {
        "lp": info.logdensity,
        "acceptance_rate": found["accept_prob"],
        "diverging": found["diverging"],
        "accept_margin": info.margin,
    }
    if "step_size" in kernel.tunables:
        stats["step_size"] = np.broadcast_to(np.asarray(kernel.tunables["step_size"]), info.margin.shape)
    if "energy" in found:
        stats["energy"] = found["energy"]
    if "num_steps" in found:
        stats["n_steps"] = found["num_steps"]
    if "tree_depth" in found:
        stats["tree_depth"] = found["tree_depth"]
    return stats


def in_batches(compiled: Callable, tree: PyTree, batch: int) -> PyTree:
    """Apply a program to all rows of leaves (A, B, ...), in batches of one size.

    Args:
        compiled: Maps a pytree with leading axis ``batch`` to another one.
        tree: Arrays with leading axes (A, B).
        batch: Number of rows per batch.

    Returns:
        The results as numpy arrays (A, B, ...).
    """
    first, second = jax.tree.leaves(tree)[0].shape[:2]
    flat, total = jax.tree.map(ungroup, tree), first * second
    whole: PyTree = None
    for start in range(0, total, batch):
        # The last batch repeats the last row, so that all have one shape and one program serves them.
        rows = np.minimum(np.arange(start, start + batch), total - 1)
        part = compiled(jax.tree.map(lambda x: x[rows], flat))  # noqa: B023
        if whole is None:
            whole = jax.tree.map(lambda x: np.empty((total, *x.shape[1:]), x.dtype), part)
        for room, x in zip(jax.tree.leaves(whole), jax.tree.leaves(part), strict=True):
            room[start : start + batch] = np.asarray(x)[: total - start]
    return jax.tree.map(lambda x: x.reshape(first, second, *x.shape[1:]), whole)


def piece(batch: int, num_bytes: int, draws: PyTree) -> int:
    """Return how many draws to compute at a time.

    Args:
        batch: Largest number of draws.
        num_bytes: Bytes that the results may take.
        draws: Shapes of the results for ``batch`` draws.
    """
    size = sum(math.prod(s.shape) * s.dtype.itemsize for s in jax.tree.leaves(draws))
    return max(1, min(batch, batch * num_bytes // max(size, 1)))


def ungroup(x: Any) -> Any:
    """Flatten the first two axes: (num_chains, num_draws, ...) becomes (num_chains * num_draws, ...)."""
    # A length of -1 would be ambiguous if the array is empty.
    return x.reshape(x.shape[0] * x.shape[1], *x.shape[2:])
