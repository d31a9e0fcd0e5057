"""Why do coupled chains not merge, and what usually helps? Each suggestion rests on a measurement."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from pmcmc.kernels import HMC, Info, Kernel, SiteKernel
from pmcmc.stability._coalescence import Coalescence
from pmcmc.stability._distance import site_distances
from pmcmc.target import Target

# A site is to blame where the pairs are this share as far apart as at the worst one.
SHARE_OF_WORST = 0.5
# Pairs that stay apart may come close for a moment, so they are looked at this many times.
LAST_CHECKPOINTS = 4
# Acceptance rates below which a step size is called large, and shares of divergent steps above which.
LOW_ACCEPTANCE, MANY_DIVERGENCES = 0.6, 0.001
# Movement a step, in posterior scales, below which a chain crawls.
CRAWL = 0.05


class Diagnosis(NamedTuple):
    """What keeps coupled chains apart.

    sites: distance of the pairs by site towards the end of the pilot, in posterior standard deviations (largest entry
        of a site, largest of the last checkpoints, median over the pairs), the worst first.
    suggestions: sentences, each with what it rests on.
    """

    sites: dict[str, float]
    suggestions: tuple[str, ...]

    def __str__(self) -> str:
        worst = ", ".join(f"{name} ({distance:.2g} sd)" for name, distance in list(self.sites.items())[:4])
        return "\n".join([f"Kept apart by: {worst}.", *(f"- {text}" for text in self.suggestions)])


def diagnose(target: Target, kernel: Kernel, pilot: Coalescence, info: Info) -> Diagnosis:
    """Sites that keep the pairs of a pilot apart, and what may help.

    pilot: with pairs that did not merge; states are unknowns of the kernel. info: of the chains' own steps.

    Raises:
        ValueError: every pair merged.
    """
    if np.all(pilot.merged):
        raise ValueError("every pair of this pilot merged: there is nothing to explain.")
    points, last = pilot.checkpoints, int(np.sum(np.asarray(pilot.checkpoints.reached))) - 1
    apart = ~np.asarray(pilot.merged)
    coordinates = jax.vmap(lambda unknown: target.coordinates(kernel.position(target, unknown)))
    at = lambda t: [
        coordinates(jax.tree.map(lambda x: jnp.asarray(x[t][apart]), x)) for x in (points.first, points.second)
    ]
    ends = at(last)
    seen = [site_distances(target, *at(t)) for t in range(max(0, last + 1 - LAST_CHECKPOINTS), last + 1)]
    widest = lambda d: np.max(np.reshape(np.asarray(d), (apart.sum(), -1)), axis=1)
    distances = {name: float(np.median(np.max([widest(d[name]) for d in seen], axis=0))) for name in seen[-1]}
    sites = dict(sorted(distances.items(), key=lambda item: -item[1]))
    worst = [name for name, d in sites.items() if d >= SHARE_OF_WORST * max(sites.values())]
    found = _about_model(target, ends, worst) + _about_steps(info) + _about_pilot(target, kernel, pilot)
    return Diagnosis(sites, tuple(found))


def _about_model(target: Target, ends: list, worst: list[str]) -> list[str]:
    centred = target.model.centred_sites(target.data, *(target.position(end[0]) for end in ends))
    if not centred:
        return []
    blamed = [name for name in centred if name in worst] or centred
    names = ", ".join(repr(name) for name in blamed)
    return [
        f"The scale of {names} depends on other latent sites: try a non-centred form, for instance numpyro.handlers."
        f"reparam(model, config={{{blamed[0]!r}: numpyro.infer.reparam.LocScaleReparam(0)}})."
    ]


def _about_steps(info: Info) -> list[str]:
    rate, divergent = float(np.mean(info.acceptance_rate)), float(np.mean(info.is_divergent))
    if not (rate < LOW_ACCEPTANCE or divergent > MANY_DIVERGENCES):  # a kernel that reports no rate has NaN
        return []
    seen = f"acceptance rate {rate:.2f}, {divergent:.1%} of steps divergent"
    return [f"The step size is large for this posterior ({seen}): try EnsembleAdaptation(target_acceptance_rate=0.95)."]


def _about_pilot(target: Target, kernel: Kernel, pilot: Coalescence) -> list[str]:
    found = []
    movement = float(np.nanmean(np.asarray(pilot.movement)))
    if isinstance(kernel, HMC) and not np.any(np.asarray(kernel.step_size_jitter) > 0) and movement > CRAWL:
        found.append(
            f"Chains move {movement:.2g} sd a step and stay apart under a fixed step size: trajectories of one length "
            "may resonate. Try step_size_jitter=0.2."
        )
    if movement <= CRAWL:
        found.append(f"Chains move {movement:.2g} sd a step only: try longer trajectories, or another kernel.")
    if target.basis is None and not isinstance(kernel, SiteKernel):  # blocks have coordinates of their own
        found.append("The kernel works in the model's own coordinates: run warm-up, which whitens them.")
    rate, error = float(pilot.growth_rate), float(pilot.growth_error)
    if rate + 2 * error < 0:
        found.append(
            f"Small distances shrink (by {1 - np.exp(rate):.0%} a step), so single regions do contract: the pairs may "
            "sit in separate modes."
        )
    return found
