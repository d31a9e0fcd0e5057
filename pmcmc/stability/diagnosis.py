"""Explain why coupled chains do not merge, and suggest what usually helps.

`diagnose` looks at the unmerged pairs of a pilot towards its end, names the sites at which they are apart, and adds a
suggestion for each cause that a measurement supports: scales that depend on other sites, discrete sites, separate
regions, trajectories that are too short or resonate, steps that are too large, a missing basis, coarse rounding.
`Diagnosis` is its result.
"""

from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from pmcmc._pytree import PyTree, is_real
from pmcmc.kernels import Info, Kernel, SiteKernel
from pmcmc.kernels.base import higher_rate
from pmcmc.stability.coalescence import Coalescence
from pmcmc.stability.distance import continuous_coordinates, site_distances
from pmcmc.target import Target

# A pair is apart at a site from this many posterior standard deviations on, and two scales differ from this log factor
# on. Closer paths are within the linear regime (`LINEAR_REGIME` of `pmcmc.planning.predict`): a site then only follows
# others that are apart, and its gap closes when theirs do.
APART = 0.1
# A pair may come close for a moment, or be far apart just before it merges, so the median over this many last
# checkpoints counts.
LAST_CHECKPOINTS = 4
# A distance is steady if at these checkpoints it never falls below the share STEADY of its largest value. A site is
# reported if at least the share MOST of the pairs that are apart there are steady.
STEADY, MOST = 0.5, 0.5
# Paths are in separate regions if they are this many times as far apart as the wider of them spreads. Midway between
# two normals this far apart, the density of each is below a seventh of its peak: exp(-2) = 0.135.
SEPARATE = 4.0
# A step size is too large if the acceptance rate is below the share LOW_ACCEPTANCE of what warm-up aims at, or the
# share of divergent steps is above MANY_DIVERGENCES.
LOW_ACCEPTANCE, MANY_DIVERGENCES = 0.75, 0.001
# Movement per step, in posterior scales, below which a chain crawls: a random walk of such steps takes 400 for one sd.
CRAWL = 0.05
# Spreads of coordinates are uneven if they differ by more than this factor: steps that suit the narrowest coordinate
# are too short for the widest by the same factor.
UNEVEN = 3.0
# Number of sites that are named at most.
MOST_NAMES = 8


@dataclass(frozen=True)
class SiteDistance:
    """Distance between the unmerged pairs of a pilot at one site.

    Attributes:
        distance: Median over the pairs that are apart, in posterior standard deviations; for a discrete site the share
            of its elements that differ.
        num_apart: Pairs that are measurably apart at the site: 0.1 posterior standard deviations or more at its largest
            entry; for a discrete site pairs whose values differ.
        num_pairs: All pairs that had not merged.
        is_discrete: Whether the site is discrete.
    """

    distance: float
    num_apart: int
    num_pairs: int
    is_discrete: bool = False

    def __str__(self) -> str:
        far = f"{self.distance:.0%} of its elements" if self.is_discrete else f"{self.distance:.2g} sd"
        return f"{far} in {self.num_apart} of {self.num_pairs} pairs"


@dataclass(frozen=True)
class Diagnosis:
    """What keeps coupled chains apart.

    Standard deviations are those that warm-up found, or without a warm-up those of the pilot's states.

    Attributes:
        sites: Sites at which some pair is measurably apart towards the end of the pilot (median of the last
            checkpoints), sorted by the number of pairs that are apart. Empty if pairs that did not merge are close at
            every site.
        suggestions: Sentences, each with the measurement that supports it; empty if no measurement supports any.
    """

    sites: dict[str, SiteDistance]
    suggestions: tuple[str, ...]

    def __str__(self) -> str:
        if self.sites:
            apart = f"Kept apart by: {_names([f'{name} ({distance})' for name, distance in self.sites.items()])}."
        else:
            apart = f"Pairs did not merge, and are within {APART} sd at every site."
        return "\n".join([apart, *(f"- {text}" for text in self.suggestions)])


class _Gaps(NamedTuple):
    """Unmerged pairs towards the end of a pilot.

    Attributes:
        ends: Positions of both paths; leaves (pairs, ...).
        apart: By site, whether each pair is apart; shape (pairs,).
        steady: By site, whether each pair is apart at a distance that does not shrink; shape (pairs,).
        separate: By site, whether a steady pair is also in separate regions; shape (pairs,).
        sites: See `Diagnosis`.
        spreads: Standard deviations of single paths by coordinate; shape (D,). NaN where not known.
    """

    ends: list[PyTree]
    apart: dict[str, np.ndarray]
    steady: dict[str, np.ndarray]
    separate: dict[str, np.ndarray]
    sites: dict[str, SiteDistance]
    spreads: np.ndarray


class _Pace(NamedTuple):
    """How fast the chains of a pilot move and contract.

    Attributes:
        movement: Mean movement of continuous coordinates per step, in scales.
        seen: Whether small distances were seen.
        shrinking: Share by which small distances shrink per step; NaN if they were not seen to shrink.
        meeting: Steps that this takes from one scale to the tolerance.
    """

    movement: float
    seen: bool
    shrinking: float
    meeting: float


def diagnose(target: Target, kernel: Kernel, pilot: Coalescence, info: Info) -> Diagnosis:
    """Find the sites that keep the pairs of a pilot apart, and what may help.

    Args:
        target: The target of the chains.
        kernel: The tuned kernel.
        pilot: Result of `coalescence_time` with pairs that did not merge; its states are unknowns of the kernel.
        info: Info of the chains' own steps.

    Returns:
        The sites and the suggestions.

    Raises:
        ValueError: Every pair merged, or those that did not reached states that are not finite.
    """
    open_pairs = np.asarray(pilot.finite) & ~np.asarray(pilot.merged)
    if not open_pairs.any():
        raise ValueError("every finite pair of this pilot merged: there is nothing to explain.")
    gaps, pace = _gaps(target, kernel, pilot, open_pairs), _pace(kernel, pilot)
    explained, found = _about_scales(target, gaps)
    found += _about_discrete(gaps) + _about_regions(gaps, pace, int(pilot.num_steps), explained)
    found += _about_length(kernel, gaps, pace) + _about_steps(target, kernel, info) + _about_basis(target, kernel, gaps)
    found += _about_rounding(pilot, open_pairs, gaps)
    return Diagnosis(gaps.sites, tuple(found))


def _names(names: list[str]) -> str:
    """List the first `MOST_NAMES` names, and count the others."""
    more = len(names) - MOST_NAMES
    return ", ".join(names[:MOST_NAMES]) + (f" and {more} more" if more > 0 else "")


def _gaps(target: Target, kernel: Kernel, pilot: Coalescence, open_pairs: np.ndarray) -> _Gaps:
    """Measure the unmerged pairs at the checkpoints, by site."""
    points = pilot.checkpoints
    last = int(np.sum(np.asarray(points.reached)))
    rows = np.arange(min(1, last - 1), last)  # the starts only if nothing else was reached
    # Unmerged pairs at the checkpoints: as coordinates (paths) and, at the last one, as positions (ends).
    take = lambda tree, some: jax.tree.map(lambda x: jnp.asarray(np.asarray(x)[some][:, open_pairs]), tree)
    position = jax.jit(jax.vmap(lambda unknown: kernel.position(target, unknown)))
    sides = points.first, points.second
    ends = [position(jax.tree.map(lambda x: x[0], take(side, rows[-1:]))) for side in sides]
    paths = [coordinates_of(target, kernel, take(side, rows)) for side in sides]
    distances = distances_by_site(target, paths)
    # Judge each site by its distances at the last checkpoints.
    real = dict(zip(distances, map(is_real, jax.tree.leaves(target.spec.template)), strict=True))
    apart, steady, separate, sites = {}, {}, {}, {}
    for name, (distance, spread) in distances.items():
        if not spread.size:  # no entries
            apart[name] = steady[name] = separate[name] = np.zeros(distance.shape[1], bool)
            continue
        late = distance[-LAST_CHECKPOINTS:]
        seen = late.max(axis=2) if real[name] else (late != 0).mean(axis=2)
        level = np.median(seen, axis=0)
        apart[name] = level >= APART if real[name] else level > 0
        steady[name] = apart[name] & (seen.min(axis=0) >= STEADY * seen.max(axis=0))
        separate[name] = steady[name] & (np.median(late, axis=0) >= SEPARATE * spread).any(axis=1)
        if apart[name].any():
            far = float(np.median(level[apart[name]]))
            sites[name] = SiteDistance(far, int(apart[name].sum()), len(level), not real[name])
    ranked = sorted(sites.items(), key=lambda item: (-item[1].num_apart, -item[1].distance))
    return _Gaps(ends, apart, steady, separate, dict(ranked), _spreads(paths))


def coordinates_of(target: Target, kernel: Kernel, states: PyTree) -> np.ndarray:
    """Return coordinates of states whose sites `site_distances` can tell apart; leading axes (rows, pairs), then D."""
    flat: Any = kernel.coordinates
    if target.basis is None:  # coordinates of the kernel may then be in the bases of its site groups
        flat = lambda unknown: target.spec.ravel(kernel.position(target, unknown))
    return np.asarray(jax.jit(jax.vmap(jax.vmap(flat)))(states))


def distances_by_site(target: Target, paths: list[np.ndarray]) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """Return by site the distances of the pairs and the spread of the wider path of each pair.

    Distances have shape (rows, pairs, entries), spreads (pairs, entries). Without a basis both are in standard
    deviations over all paths and checkpoints.

    Args:
        paths: Coordinates of the first and of the second paths, (rows, pairs, D) each.
    """
    scale = None
    if target.basis is None:
        spread = np.std(np.concatenate(paths, axis=1), axis=(0, 1), dtype=float)
        scale = target.spec.unravel(jnp.asarray(np.where(spread > 0, spread, 1.0)))
        scale = jax.tree.map(lambda s, x: s if is_real(x) else jnp.ones(x.shape), scale, target.spec.template)

    def between(first: np.ndarray, second: np.ndarray) -> dict[str, np.ndarray]:
        sites = site_distances(target, jnp.asarray(first), jnp.asarray(second), scale=scale)
        return {name: np.reshape(np.asarray(x), (*first.shape[:2], -1)) for name, x in sites.items()}

    # The spread of a path is that over its later half, about its own mean.
    late = [path[len(path) // 2 :] for path in paths]
    own = [between(path, np.broadcast_to(path.mean(axis=0, dtype=float), path.shape)) for path in late]
    width = lambda x: np.sqrt(np.mean(x**2, axis=0, dtype=float))
    gaps = between(*paths)
    return {name: (gap, np.maximum(*(width(each[name]) for each in own))) for name, gap in gaps.items()}


def _spreads(paths: list[np.ndarray]) -> np.ndarray:
    """Return the standard deviation of single paths over the later half of their checkpoints; shape (D,).

    Each path is centred on its own mean, so paths in different modes do not widen it.

    Args:
        paths: Coordinates of the first and of the second paths, (rows, pairs, D) each.
    """
    halves = np.concatenate([path[len(path) // 2 :] for path in paths], axis=1)
    if len(halves) < LAST_CHECKPOINTS:
        return np.full(halves.shape[2], np.nan)
    return np.sqrt(halves.var(axis=0, dtype=float).mean(axis=0))


def _pace(kernel: Kernel, pilot: Coalescence) -> _Pace:
    """Measure how fast the chains move and how fast small distances shrink."""
    states = pilot.checkpoints.first
    moves = np.asarray(pilot.dimension_movement)[continuous_coordinates(states, 2, kernel.discrete(states))]
    rate, error = float(pilot.growth_rate), float(pilot.growth_error)
    # One pair alone has no standard error; if it merged, its distance shrank.
    shrinks = rate < 0 and (rate + 2 * error < 0 or (np.isnan(error) and np.any(pilot.merged)))
    return _Pace(
        float(moves.mean()) if moves.size else np.nan,
        np.isfinite(rate),
        -np.expm1(rate) if shrinks else np.nan,
        np.log(float(pilot.tol)) / rate if shrinks else np.nan,
    )


def _about_scales(target: Target, gaps: _Gaps) -> tuple[set[str], list[str]]:
    """Suggest other forms for sites whose scales differ between the paths.

    Returns the sites that such a scale depends on, which it explains, and the suggestions.
    """
    model, explained, found = target.model, set(), []
    scales = jax.jit(jax.vmap(partial(model.site_scales, target.data)))
    first, second = (scales(end) for end in gaps.ends)

    def factor(name: str, other: dict) -> float:
        """Log factor between the scales of a site at its largest entry; median over the pairs that are apart there."""
        with np.errstate(divide="ignore", invalid="ignore"):
            logs = np.abs(np.log(np.asarray(first[name])) - np.log(np.asarray(other[name])))
        return float(np.median(logs.reshape(len(logs), -1).max(axis=1)[gaps.apart[name]]))

    names = [name for name in gaps.sites if name in first and factor(name, second) >= APART]
    for name in names:
        found.append(
            f"The scale of {name!r} depends on other latent sites, and differs by a factor "
            f"{np.exp(factor(name, second)):.2g} between paths that are apart there: {model.non_centred_form(name)}."
        )
    for site in gaps.sites if names else ():
        swapped = scales({**gaps.ends[0], site: gaps.ends[1][site]})
        if site in names or any(factor(name, swapped) >= APART for name in names):
            explained.add(site)
    return explained, found


def _about_discrete(gaps: _Gaps) -> list[str]:
    """Suggest marginalisation where paths keep different values of discrete sites."""
    names = [repr(name) for name, site in gaps.sites.items() if site.is_discrete]
    if not names:
        return []
    return [f"Paths keep different values of the discrete {_names(names)}: marginalise what can be marginalised."]


def _about_regions(gaps: _Gaps, pace: _Pace, num_steps: int, explained: set[str]) -> list[str]:
    """Report pairs that contract too slowly for this pilot, or contracting paths that stay in separate regions."""
    if not pace.movement > CRAWL or (pace.seen and not pace.shrinking > 0):
        return []
    if pace.meeting > num_steps:
        return [
            f"Small distances shrink by {pace.shrinking:.2%} a step only: pairs merge after about {pace.meeting:,.0f} "
            f"steps, and the pilot had {num_steps:,}. Try longer trajectories, or another kernel."
        ]
    names = [repr(name) for name in _most(gaps, gaps.separate) if name not in explained]
    if not names or pace.meeting > num_steps / 2:
        return []
    shrink = f"Small distances shrink by {pace.shrinking:.0%} a step, but paths" if pace.seen else "Paths move, but"
    return [
        f"{shrink} keep to separate regions at {_names(names)}, at most 1/{SEPARATE:.0f} as wide as they are apart: "
        "they may be in separate modes, which another parametrisation does not connect. Run more chains to see "
        "them; an ordering constraint removes modes that differ by labels alone, and marginalising or more informative "
        "priors remove others."
    ]


def _most(gaps: _Gaps, which: dict[str, np.ndarray]) -> list[str]:
    """Return the real sites where ``which`` is true for at least the share `MOST` of the pairs that are apart."""
    counts = lambda name: which[name].sum() >= MOST * gaps.sites[name].num_apart
    return [name for name, site in gaps.sites.items() if not site.is_discrete and counts(name)]


def _about_length(kernel: Kernel, gaps: _Gaps, pace: _Pace) -> list[str]:
    """Report trajectories that are too short, or of a single length that keeps pairs apart."""
    if pace.movement <= CRAWL:
        has_length = "num_integration_steps" in kernel.tunables
        longer = "longer trajectories, or another kernel" if has_length else "another kernel"
        return [f"Chains move {pace.movement:.2g} sd a step only: try {longer}."]
    if not kernel.may_resonate or pace.shrinking > 0 or _most(gaps, gaps.separate):
        return []
    if not _most(gaps, gaps.steady):
        return []
    return [
        f"Chains move {pace.movement:.2g} sd a step and stay as far apart as they are, under trajectories of one "
        "length, which may resonate: try step_size_jitter=0.2."
    ]


def _about_steps(target: Target, kernel: Kernel, info: Info) -> list[str]:
    """Report a step size that is too large, by acceptance rate and divergences."""
    if not np.size(info.is_divergent) or "step_size" not in kernel.tunables:  # Gibbs, Compose
        return []
    goal, rate = kernel.target_acceptance_rate(target.dim), float(np.mean(np.asarray(info.acceptance_rate, float)))
    divergent = float(np.mean(info.is_divergent)) if kernel.divergences_matter else 0.0
    if not (rate < LOW_ACCEPTANCE * goal or divergent > MANY_DIVERGENCES):  # rate is NaN if a kernel reports none
        return []
    seen = f"acceptance rate {rate:.2f}, {divergent:.1%} of steps divergent"
    remedy = f"leave step_size out, and warm-up tunes it to an acceptance rate of {goal:.2g}"
    if kernel.uses_gradient:
        rate = higher_rate(goal)
        remedy = f"leave it to warm-up, with warmup=EnsembleAdaptation(target_acceptance_rate={rate:.2g})"
    return [f"The step size is large for this posterior ({seen}): {remedy}."]


def _about_basis(target: Target, kernel: Kernel, gaps: _Gaps) -> list[str]:
    """Suggest warm-up where a kernel that takes a basis has none and the spreads of coordinates are uneven."""
    by_sites = isinstance(kernel, SiteKernel)
    if target.basis is not None or by_sites or not kernel.takes_basis or kernel.metric is not None:
        return []
    spreads = gaps.spreads[gaps.spreads > 0]
    if not spreads.size or not spreads.max() > UNEVEN * spreads.min():
        return []
    return [
        "The kernel works in the model's own coordinates, along which paths spread over lengths that differ by a "
        f"factor {spreads.max() / spreads.min():.2g}: run warm-up, which whitens them."
    ]


def _about_rounding(pilot: Coalescence, open_pairs: np.ndarray, gaps: _Gaps) -> list[str]:
    """Report paths that have come close and then stay at the same small distance, where rounding keeps them."""
    num_steps, tol = int(pilot.num_steps), float(pilot.tol)
    distances = np.asarray(pilot.distances)[: num_steps + 1, open_pairs]
    quarter = num_steps // 4
    if gaps.sites or not quarter:
        return []
    before, last = (float(np.median(part)) for part in (distances[-2 * quarter : -quarter], distances[-quarter:]))
    if last < STEADY * before or float(np.median(distances[0])) < APART:
        return []
    return [
        f"Paths come within about {last:.1e} sd of each other and no closer, and count as merged within {tol:.1e}: the "
        "model rounds more coarsely than that. Leave matrix products in float32 (jax_default_matmul_precision, "
        "precision= in the model; TF32 keeps 10 bits), keep float16 and bfloat16 out of the model, or use float64."
    ]
