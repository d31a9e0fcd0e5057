"""Why do coupled chains not merge, and what usually helps? Each suggestion rests on a measurement."""

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from pmcmc._pytree import is_real
from pmcmc._typing import PyTree
from pmcmc.kernels import Info, Kernel, SiteKernel
from pmcmc.stability.coalescence import Coalescence
from pmcmc.stability.distance import site_distances
from pmcmc.target import Target

# Posterior standard deviations from which on a pair is apart at a site, and the log factor from which on two scales
# differ. Closer paths differ by their tangent (`LINEAR_REGIME` of `_predict`): the gap is what a site takes over from
# others that are apart, and goes when theirs does.
APART = 0.1


# A pair may come close for a moment, and be far apart just before it meets: the median of so many checkpoints counts.
LAST_CHECKPOINTS = 4


# A distance that never falls below this share of its largest value at these checkpoints does not come down. It is what
# half of the pairs that are apart must show before a site is said to do so.
STEADY, MOST = 0.5, 0.5


# Paths are in regions of their own where they are so many times as far apart as either spreads over: normals this far
# from each other have a valley of density between them, with less than a seventh of that at their peaks.
SEPARATE = 4.0


# Acceptance rates below this share of what warm-up aims at, and shares of divergent steps above which, are those of a
# step size that is too large.
LOW_ACCEPTANCE, MANY_DIVERGENCES = 0.75, 0.001


# Movement a step, in posterior scales, below which a chain crawls: a random walk of such steps takes 400 for one sd.
CRAWL = 0.05


# Spreads of coordinates that differ by this factor: steps that suit the narrowest are that much too short for the
# widest.
UNEVEN = 3.0


# Sites that are named at most.
MOST_NAMES = 8


class SiteDistance(NamedTuple):
    """How far apart the unmerged pairs of a pilot are at a site.

    num_apart: pairs that are measurably apart there, which is 0.1 posterior standard deviations or more at the largest
        entry of the site; of a discrete site those that differ. num_pairs: all that had not merged.
    distance: median over the pairs that are apart, in posterior standard deviations; of a discrete site the share of
        its elements that differ.
    """

    distance: float
    num_apart: int
    num_pairs: int
    is_discrete: bool = False

    def __str__(self) -> str:
        far = f"{self.distance:.0%} of its elements" if self.is_discrete else f"{self.distance:.2g} sd"
        return f"{far} in {self.num_apart} of {self.num_pairs} pairs"


class Diagnosis(NamedTuple):
    """What keeps coupled chains apart.

    sites: those at which some pair is measurably apart towards the end of the pilot (median of the last checkpoints),
        the ones that most pairs are apart at first. Empty where pairs that did not meet are close everywhere.
    suggestions: sentences, each with what it rests on; none where nothing was measured that one could rest on.

    Standard deviations are those that warm-up found, or without it those of the pilot's states.
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

    ends: positions of both paths, (pairs, ...). apart, steady, separate: by site, (pairs,) whether a pair is apart
    there, at a distance that does not come down, and in regions of their own besides. sites: see `Diagnosis`.
    spreads: (D,) of single paths; NaN where not known.
    """

    ends: list[PyTree]
    apart: dict[str, np.ndarray]
    steady: dict[str, np.ndarray]
    separate: dict[str, np.ndarray]
    sites: dict[str, SiteDistance]
    spreads: np.ndarray


class _Pace(NamedTuple):
    """movement: of real coordinates, in scales a step. seen: whether there were small distances. shrinking: share by
    which they shrink a step, NaN where they were not seen to. meeting: steps that this takes from one scale to the
    tolerance."""

    movement: float
    seen: bool
    shrinking: float
    meeting: float


def diagnose(target: Target, kernel: Kernel, pilot: Coalescence, info: Info) -> Diagnosis:
    """Sites that keep the pairs of a pilot apart, and what may help.

    pilot: with pairs that did not merge; states are unknowns of the kernel. info: of the chains' own steps.

    Raises:
        ValueError: every pair merged, or those that did not reached states that are not finite.
    """
    open_pairs = np.asarray(pilot.finite) & ~np.asarray(pilot.merged)
    if not open_pairs.any():
        raise ValueError("every finite pair of this pilot merged: there is nothing to explain.")
    gaps, pace = _gaps(target, kernel, pilot, open_pairs), _pace(pilot)
    explained, found = _about_scales(target, gaps)
    found += _about_discrete(gaps) + _about_regions(gaps, pace, int(pilot.num_steps), explained)
    found += _about_length(kernel, gaps, pace) + _about_steps(target, kernel, info) + _about_basis(target, kernel, gaps)
    return Diagnosis(gaps.sites, tuple(found))


def _names(names: list[str]) -> str:
    more = len(names) - MOST_NAMES
    return ", ".join(names[:MOST_NAMES]) + (f" and {more} more" if more > 0 else "")


def _gaps(target: Target, kernel: Kernel, pilot: Coalescence, open_pairs: np.ndarray) -> _Gaps:
    points = pilot.checkpoints
    last = int(np.sum(np.asarray(points.reached)))
    rows = np.arange(min(1, last - 1), last)  # behind the starts
    take = lambda tree, some: jax.tree.map(lambda x: jnp.asarray(np.asarray(x)[some][:, open_pairs]), tree)
    position = jax.jit(jax.vmap(lambda unknown: kernel.position(target, unknown)))
    flat: Any = kernel.coordinates
    if target.basis is None:  # blocks have bases of their own
        flat = lambda unknown: target.spec.ravel(kernel.position(target, unknown))
    flat, sides = jax.jit(jax.vmap(jax.vmap(flat))), (points.first, points.second)
    ends = [position(jax.tree.map(lambda x: x[0], take(side, rows[-1:]))) for side in sides]
    paths = [np.asarray(flat(take(side, rows))) for side in sides]
    distances = _distances(target, paths)
    real = dict(zip(distances, map(is_real, jax.tree.leaves(target.spec.template)), strict=True))
    apart, steady, separate, sites = {}, {}, {}, {}
    for name, (distance, spread) in distances.items():
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


def _distances(target: Target, paths: list[np.ndarray]) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """By site: distances of the pairs, (rows, pairs, entries), and what the wider path of each spreads over.

    paths: coordinates, (rows, pairs, D). Without a basis in standard deviations of all of them.
    """
    scale = None
    if target.basis is None:
        spread = np.std(np.concatenate(paths, axis=1), axis=(0, 1))
        scale = target.spec.unravel(jnp.asarray(np.where(spread > 0, spread, 1.0)))
        scale = jax.tree.map(lambda s, x: s if is_real(x) else jnp.ones(x.shape), scale, target.spec.template)

    def between(first: np.ndarray, second: np.ndarray) -> dict[str, np.ndarray]:
        sites = site_distances(target, jnp.asarray(first), jnp.asarray(second), scale=scale)
        return {name: np.reshape(np.asarray(x), (*first.shape[:2], -1)) for name, x in sites.items()}

    late = [path[len(path) // 2 :] for path in paths]
    own = [between(path, np.broadcast_to(path.mean(axis=0), path.shape)) for path in late]
    width = lambda x: np.sqrt(np.mean(x**2, axis=0))
    gaps = between(*paths)
    return {name: (gap, np.maximum(*(width(each[name]) for each in own))) for name, gap in gaps.items()}


def _spreads(paths: list[np.ndarray]) -> np.ndarray:
    """Of single paths over their later half of checkpoints, (rows, pairs, D): modes apart do not widen it."""
    halves = np.concatenate([path[len(path) // 2 :] for path in paths], axis=1)
    if len(halves) < LAST_CHECKPOINTS:
        return np.full(halves.shape[2], np.nan)
    return np.sqrt(halves.var(axis=0).mean(axis=0))


def _pace(pilot: Coalescence) -> _Pace:
    finite = np.asarray(pilot.finite)
    if finite.all():
        leaves = jax.tree.leaves(pilot.checkpoints.first)
        real = np.concatenate([np.full(int(np.prod(x.shape[2:])), is_real(x)) for x in leaves])
        moves = np.asarray(pilot.dimension_movement)[real]
    else:  # by coordinate it is not known without the pairs that are lost
        moves = np.asarray(pilot.movement)[: int(pilot.num_steps)][:, :, finite]
    rate, error = float(pilot.growth_rate), float(pilot.growth_error)
    # of one pair there is no error; if it merged, it shrank
    shrinks = rate < 0 and (rate + 2 * error < 0 or (np.isnan(error) and np.any(pilot.merged)))
    return _Pace(
        float(moves.mean()) if moves.size else np.nan,
        np.isfinite(rate),
        -np.expm1(rate) if shrinks else np.nan,
        np.log(float(pilot.tol)) / rate if shrinks else np.nan,
    )


def _about_scales(target: Target, gaps: _Gaps) -> tuple[set[str], list[str]]:
    """Sites that are apart and whose scales are; with them those that such a scale depends on, which it explains."""
    model, explained, found = target.model, set(), []
    scales = jax.jit(jax.vmap(partial(model.site_scales, target.data)))
    first, second = (scales(end) for end in gaps.ends)

    def factor(name: str, other: dict) -> float:
        """Log of that between the scales of a site, its largest entry; median over the pairs that are apart there."""
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
    names = [repr(name) for name, site in gaps.sites.items() if site.is_discrete]
    if not names:
        return []
    return [f"Paths keep different values of the discrete {_names(names)}: marginalise what can be marginalised."]


def _about_regions(gaps: _Gaps, pace: _Pace, num_steps: int, explained: set[str]) -> list[str]:
    """Paths that keep to regions of their own though single regions contract, or that had no time to meet."""
    if not pace.movement > CRAWL or (pace.seen and not pace.shrinking > 0):
        return []
    if pace.meeting > num_steps:
        return [
            f"Small distances shrink by {pace.shrinking:.2%} a step only: pairs meet after some {pace.meeting:,.0f} "
            f"steps, and the pilot had {num_steps:,}. Try longer trajectories, or another kernel."
        ]
    names = [repr(name) for name in _most(gaps, gaps.separate) if name not in explained]
    if not names or pace.meeting > num_steps / 2:
        return []
    shrink = f"Small distances shrink by {pace.shrinking:.0%} a step, but paths" if pace.seen else "Paths move, but"
    return [
        f"{shrink} keep to regions of their own at {_names(names)}, at most 1/{SEPARATE:.0f} as wide as they are "
        "apart: they may sit in separate modes, which another parametrisation does not join. Run more chains to see "
        "them; an ordering constraint removes modes that differ by labels alone, and marginalising or more informative "
        "priors remove others."
    ]


def _most(gaps: _Gaps, which: dict[str, np.ndarray]) -> list[str]:
    """Sites where that holds of most pairs that are apart."""
    counts = lambda name: which[name].sum() >= MOST * gaps.sites[name].num_apart
    return [name for name, site in gaps.sites.items() if not site.is_discrete and counts(name)]


def _about_length(kernel: Kernel, gaps: _Gaps, pace: _Pace) -> list[str]:
    """Trajectories that are too short, or of the one length that keeps pairs apart."""
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
    if not np.size(info.is_divergent) or "step_size" not in kernel.tunables:  # Gibbs and Compose have none of their own
        return []
    goal, rate = kernel.target_acceptance_rate(target.dim), float(np.mean(info.acceptance_rate))
    divergent = float(np.mean(info.is_divergent)) if kernel.divergences_matter else 0.0
    if not (rate < LOW_ACCEPTANCE * goal or divergent > MANY_DIVERGENCES):  # a kernel that reports no rate has NaN
        return []
    seen = f"acceptance rate {rate:.2f}, {divergent:.1%} of steps divergent"
    return [
        f"The step size is large for this posterior ({seen}): leave it to warm-up, with "
        f"warmup=EnsembleAdaptation(target_acceptance_rate={1 - (1 - goal) / 4:.2g})."
    ]


def _about_basis(target: Target, kernel: Kernel, gaps: _Gaps) -> list[str]:
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
