"""What keeps pairs apart, and what is suggested: one artificial pilot for each pattern, so each sentence has a cause.

Every test lists all sentences that it expects, so each sentence is required in one test and forbidden in the others.
"""

import re
from dataclasses import astuple
from functools import partial

import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import pytest
from numpyro.handlers import reparam, scale
from numpyro.infer.reparam import LocScaleReparam, TransformReparam

import pmcmc
from pmcmc.interop.numpyro import numpyro_target
from pmcmc.kernels import Info
from pmcmc.sampling import automatic
from pmcmc.stability import Coalescence, Diagnosis, SiteDistance, diagnose
from pmcmc.stability.diagnosis import distances_by_site
from pmcmc.stability.evidence import coalescence_of_paths
from pmcmc.target import Basis, Target
from tests.helpers.targets import funnel, funnel_may_warn, start_like

SENTENCES = {
    "scale": r"The scale of '\w+' depends on other latent sites, and differs by a factor \S+ between paths",
    "discrete": r"Paths keep different values of the discrete '\w+'",
    "modes": r"(Small distances .* a step, but paths|Paths move, but) keep to separate regions at .* separate modes",
    "forgets": r"Small distances shrink by \S+% a step only: pairs merge after about",
    "crawl": r"Chains move \S+ sd a step only",
    "resonance": r"Chains move \S+ sd a step and stay as far apart .* may resonate: try step_size_jitter=0.2",
    "step": r"The step size is large for this posterior \(acceptance rate",
    "rounding": r"Paths come within about \S+ sd of each other and no closer",
    "basis": r"The kernel works in the model's own coordinates, .* run warm-up",
}
NUM_STEPS, NUM_PAIRS = 512, 8
HMC = pmcmc.HMC(step_size=0.5, num_integration_steps=3)
GOOD = Info(np.full((2, 100), 0.8), np.zeros((2, 100), bool), None, None)


def said(found: Diagnosis) -> set[str]:
    """Return which sentences were given; each must be known."""
    kinds = [[kind for kind, pattern in SENTENCES.items() if re.match(pattern, text)] for text in found.suggestions]
    assert all(len(kind) == 1 for kind in kinds), found.suggestions
    return {kind for (kind,) in kinds}


def whitened(target: Target) -> Target:
    return target.with_basis(Basis(jnp.zeros(target.dim), jnp.ones(target.dim)))


def target_of(model, *args) -> Target:
    return whitened(numpyro_target(model, args, {}))


def pilot_of(
    target: Target, gaps: dict, shrinking: float | None = 0.5, near: float = 0.01, move: float = 1.0
) -> Coalescence:
    """Make pairs that follow common noise with a gap by site, (NUM_STEPS + 1, NUM_PAIRS); then two pairs that merge.

    Args:
        target: The target.
        gaps: Gaps by site.
        shrinking: Factor per step of the gap of the two merging pairs; None leaves them out.
        near: Initial gap of the two merging pairs.
        move: Size of the steps.
    """
    rng = np.random.default_rng(0)
    num_pairs = NUM_PAIRS + 2 * (shrinking is not None)
    first = move * rng.normal(size=(num_pairs, NUM_STEPS + 1, target.dim))
    gap = {name: np.zeros((*x.shape, NUM_STEPS + 1, num_pairs)) for name, x in target.spec.template.items()}
    for name, value in gaps.items():
        gap[name][..., :NUM_PAIRS] = value
    flat = np.concatenate([x.reshape(-1, NUM_STEPS + 1, num_pairs) for _, x in sorted(gap.items())]).T
    flat = np.swapaxes(flat, 0, 0).copy()
    if shrinking is not None:
        fall = near * shrinking ** np.arange(NUM_STEPS + 1.0)
        flat[NUM_PAIRS:] = np.where(fall > 1e-14, fall, 0.0)[None, :, None] * np.array([1.0, 1.1])[:, None, None]
    return coalescence_of_paths(first, first + flat, scale=np.ones(target.dim), tol=1e-13)


def steady(size: float, pairs: slice = slice(None)) -> np.ndarray:
    """A constant gap, for some of the pairs."""
    gap = np.zeros((NUM_STEPS + 1, NUM_PAIRS))
    gap[:, pairs] = size
    return gap


def wandering(size: float, seed: int = 1) -> np.ndarray:
    return size * np.random.default_rng(seed).normal(size=(NUM_STEPS + 1, NUM_PAIRS))


def beside_a_mode():
    numpyro.sample("b", dist.Normal(0, 10))
    mu = numpyro.sample("mu", dist.Normal(0, 5))
    tau = numpyro.sample("tau", dist.HalfNormal(5))
    with numpyro.plate("group", 3):
        numpyro.sample("theta", dist.Normal(mu, tau))


def test_modes_beside_a_centred_site_that_is_well_identified() -> None:
    """The site and its scale differ by 2e-6 between paths: no reason to reparametrise it."""
    target = target_of(beside_a_mode)
    pilot = pilot_of(target, {"b": steady(4.0), "theta": steady(2e-6), "tau": steady(2e-6)}, move=0.2)
    found = diagnose(target, HMC, pilot, GOOD)
    assert {name: astuple(site)[:3] for name, site in found.sites.items()} == {
        "b": (pytest.approx(4.0), NUM_PAIRS, NUM_PAIRS)
    }
    assert said(found) == {"modes"}
    assert "separate regions at 'b', " in found.suggestions[0]
    assert "LocScaleReparam" not in str(found)
    assert str(found).startswith(f"Kept apart by: b (4 sd in {NUM_PAIRS} of {NUM_PAIRS} pairs).")


def test_every_site_that_is_apart_is_named() -> None:
    """Each is apart in fewer than half of the pairs, where the median over all pairs would be zero."""
    target = target_of(beside_a_mode)
    pilot = pilot_of(target, {"b": steady(4.0, slice(0, 3)), "mu": steady(2.0, slice(3, None))}, move=0.2)
    found = diagnose(target, HMC, pilot, GOOD)
    assert list(found.sites) == ["mu", "b"]
    assert astuple(found.sites["mu"])[:3] == (pytest.approx(2.0), 5, 8)
    assert astuple(found.sites["b"])[:3] == (pytest.approx(4.0), 3, 8)
    assert said(found) == {"modes"}
    assert "separate regions at 'mu', 'b', " in found.suggestions[0]


FUNNEL = {"tau": wandering(1.5, 1), "theta": wandering(1.0, 2)}


def test_a_centred_hierarchy() -> None:
    target = target_of(beside_a_mode)
    found = diagnose(target, HMC, pilot_of(target, FUNNEL), GOOD)
    assert set(found.sites) == {"tau", "theta"}
    assert said(found) == {"scale"}
    assert found.suggestions[0].endswith(auto % "theta" + ".")


def test_a_site_that_a_scale_depends_on_is_explained_by_it() -> None:
    """A path that is caught in the neck stays there and is not in another mode; a second site does have modes."""
    target = target_of(beside_a_mode)
    caught = {"tau": steady(4.0), "theta": wandering(1.0)}
    found = diagnose(target, HMC, pilot_of(target, caught, move=0.2), GOOD)
    assert said(found) == {"scale"}
    found = diagnose(target, HMC, pilot_of(target, {**caught, "b": steady(4.0)}, move=0.2), GOOD)
    assert said(found) == {"scale", "modes"}
    assert "separate regions at 'b', " in found.suggestions[1]


def hierarchy(family=dist.Normal, name="theta"):
    tau = numpyro.sample("tau", dist.HalfNormal(5))
    numpyro.sample(name, family(0.0, tau))


def by_hand():
    """A user's site that only has such a name, next to a deterministic one."""
    tau = numpyro.sample("tau", dist.HalfNormal(5))
    numpyro.deterministic("theta", 2 * numpyro.sample("theta_decentered", dist.Normal(0.0, tau)))


def within():
    with reparam(config={"theta": LocScaleReparam(0.5)}):
        hierarchy()


half, none = {"theta": LocScaleReparam(0.5)}, {"theta": LocScaleReparam(0)}
again = lambda centred: {"theta_decentered": LocScaleReparam(centred)}
in_place = "put numpyro.infer.reparam.LocScaleReparam(0) in place of what reparametrises 'theta' now"
config = "config={%r: numpyro.infer.reparam.LocScaleReparam(%s)}"
auto = (  # true whatever the run was, so it says what AutoReparam needs
    "pass reparam=pmcmc.AutoReparam(), with the default warm-up, one kernel over all sites and no inverse_mass_matrix: "
    "it chooses how far %r is centred"
)
instead = f"leave out what reparametrises 'theta' now, and {auto}" % "theta"
scaled = lambda model: scale(model, scale=2.0)  # sites that cannot be partially centred
transformed = lambda loc, scale: dist.TransformedDistribution(dist.Normal(loc, scale), dist.transforms.ExpTransform())
FORMS = {
    "half": (reparam(hierarchy, config=half), "theta_decentered", instead),
    "half, scaled": (scaled(reparam(hierarchy, config=half)), "theta_decentered", in_place),
    "learned": (reparam(hierarchy, config={"theta": LocScaleReparam()}), "theta_decentered", instead),
    "function": (reparam(hierarchy, config=lambda site: half.get(site["name"])), "theta_decentered", instead),
    "within": (within, "theta_decentered", instead),
    "twice": (reparam(reparam(hierarchy, config=half), config=again(0.5)), "theta_decentered_decentered", instead),
    "by hand": (by_hand, "theta_decentered", auto % "theta_decentered"),
    "name": (partial(hierarchy, name="x_decentered"), "x_decentered", auto % "x_decentered"),
    "unrelated": (reparam(by_hand, config={"tau": None}), "theta_decentered", auto % "theta_decentered"),
    "student": (partial(hierarchy, partial(dist.StudentT, 4.0)), "theta", auto % "theta"),
    "student, scaled": (
        scaled(partial(hierarchy, partial(dist.StudentT, 4.0))),
        "theta",
        config % ("theta", "0, shape_params=['df']"),
    ),
    "positive": (partial(hierarchy, dist.LogNormal), "theta", auto % "theta"),
    "positive, scaled": (scaled(partial(hierarchy, dist.LogNormal)), "theta", "write 'theta' as a function of a site"),
    "base": (
        reparam(partial(hierarchy, transformed), config={"theta": TransformReparam()}),
        "theta_base",
        auto % "theta_base",
    ),
    "none": (reparam(hierarchy, config=none), "theta_decentered", ""),
    "twice none": (reparam(reparam(hierarchy, config=half), config=again(0)), "theta_decentered_decentered", ""),
}


@pytest.mark.parametrize("name", FORMS)
def test_the_remedy_names_the_site_of_the_model(name: str) -> None:
    """A site made by `LocScaleReparam` is traced back to its origin; a site without a dependent scale needs nothing."""
    model, site, remedy = FORMS[name]
    target = target_of(model)
    assert set(target.spec.template) == {"tau", site}
    found = diagnose(target, HMC, pilot_of(target, {"tau": FUNNEL["tau"], site: FUNNEL["theta"]}), GOOD)
    assert set(found.sites) == {"tau", site}
    if not remedy:
        assert said(found) == set()
    else:
        assert said(found) == {"scale"}
        assert remedy in found.suggestions[0]


def test_slow_chains() -> None:
    target = target_of(beside_a_mode)
    for kernel, remedy in (
        (HMC, "longer trajectories, or another kernel."),
        (pmcmc.MALA(step_size=0.1), ": try another"),
    ):
        found = diagnose(target, kernel, pilot_of(target, {"b": steady(1.0)}, move=0.01), GOOD)
        assert said(found) == {"crawl"}
        assert remedy in found.suggestions[0]


def test_chains_that_forget_slowly() -> None:
    """1 % per step takes 3,000 steps from one scale to the tolerance: the pairs had no time to merge."""
    target = target_of(beside_a_mode)
    found = diagnose(target, HMC, pilot_of(target, {"b": steady(1.0)}, shrinking=0.99, near=1e-7), GOOD)
    assert said(found) == {"forgets"}


def test_close_everywhere() -> None:
    target = target_of(beside_a_mode)
    found = diagnose(target, HMC, pilot_of(target, {"b": steady(0.01)}), GOOD)
    assert found == Diagnosis({}, ())
    assert "within 0.1 sd at every site" in str(found)


def test_resonance_needs_one_length_and_a_distance_that_stays() -> None:
    target = target_of(beside_a_mode)
    rigid = pmcmc.HMC(step_size=0.5, num_integration_steps=3, step_size_jitter=0.0)
    drawn = pmcmc.HMC(step_size=0.5, num_integration_steps=pmcmc.kernels.UniformLength(1, 5), step_size_jitter=0.0)
    flipping = steady(1.0) * (-1.0) ** np.arange(NUM_STEPS + 1)[:, None]
    pilots = [pilot_of(target, {"b": gap}, shrinking=None) for gap in (flipping, wandering(1.0))]
    assert said(diagnose(target, rigid, pilots[0], GOOD)) == {"resonance"}
    for kernel, pilot in ((HMC, pilots[0]), (drawn, pilots[0]), (rigid, pilots[1])):
        assert said(diagnose(target, kernel, pilot, GOOD)) == set()
    apart = pilot_of(target, {"b": steady(4.0)}, shrinking=None, move=0.2)  # no pair merges
    assert said(diagnose(target, rigid, apart, GOOD)) == {"modes"}


@pytest.mark.parametrize(
    ("kernel", "rate", "divergent", "goal"),
    [
        (HMC, 0.5, 0.0, r"target_acceptance_rate=0\.95\)"),
        (HMC, 0.8, 0.01, r"target_acceptance_rate=0\.95\)"),
        (HMC, 0.7, 0.0, None),
        (pmcmc.MALA(step_size=0.5), 0.55, 0.0, None),
        (pmcmc.MALA(step_size=0.5), 0.3, 0.0, r"target_acceptance_rate=0\.89\)"),
        (pmcmc.RandomWalk(step_size=0.5), 0.234, 0.5, None),
        (pmcmc.RandomWalk(step_size=5.0), 0.05, 0.5, r": leave step_size out, .* rate of 0\.27\."),
    ],
)
def test_a_step_size_that_is_too_large(kernel, rate: float, divergent: float, goal: str | None) -> None:
    """Compared with what warm-up aims at for this kernel; proposals of a random walk may be far off."""
    target = target_of(beside_a_mode)
    info = GOOD._replace(acceptance_rate=np.full((2, 100), rate), is_divergent=np.arange(100) < 100 * divergent)
    found = diagnose(target, kernel, pilot_of(target, {"b": wandering(1.0)}), info)
    assert said(found) == (set() if goal is None else {"step"})
    assert goal is None or re.search(goal, found.suggestions[0])


def test_own_coordinates_of_uneven_lengths() -> None:
    plain = numpyro_target(beside_a_mode, (), {})
    pilot = pilot_of(plain, {"b": wandering(1.0)})
    wide = pilot._replace(checkpoints=pilot.checkpoints._replace(first=pilot.checkpoints.first * [9.0, 1, 1, 1, 1, 1]))
    wide = wide._replace(checkpoints=wide.checkpoints._replace(second=wide.checkpoints.second * [9.0, 1, 1, 1, 1, 1]))
    found = diagnose(plain, HMC, wide, GOOD)
    assert said(found) == {"basis"}
    assert 0.05 < found.sites["b"].distance < 1  # b spreads over 9
    assert said(diagnose(plain, HMC, pilot, GOOD)) == set()
    metric = pmcmc.HMC(step_size=0.5, num_integration_steps=3, inverse_mass_matrix=np.ones(6))
    assert said(diagnose(plain, metric, wide, GOOD)) == set()


def labels():
    weight = numpyro.sample("weight", dist.Normal(0, 1))
    with numpyro.plate("item", 4):
        numpyro.sample("z", dist.Categorical(logits=jnp.stack([weight, 0.0])))


@pytest.mark.parametrize("dtype", [bool, np.uint8])
def test_booleans_and_unsigned_integers_differ_both_ways(dtype: type) -> None:
    """Their differences do not fit their dtype. A site without elements is never apart."""
    rng = np.random.default_rng(0)
    z = rng.integers(0, 2, (6, NUM_STEPS + 1, 40)).astype(dtype)
    other = z.copy()
    other[:4, :, :20] = ~z[:4, :, :20] if dtype is bool else 1 - z[:4, :, :20]
    other[4:, :3] = ~z[4:, :3] if dtype is bool else 1 - z[4:, :3]
    empty = np.zeros((6, NUM_STEPS + 1, 0))
    target = Target.from_logdensity(lambda x: 0.0 * jnp.sum(x["z"]), {"empty": jnp.zeros(0), "z": jnp.asarray(z[0, 0])})
    kernel = pmcmc.DiscreteGibbs(supports={"z": [0, 1]})
    pilot = coalescence_of_paths(
        *({"empty": empty, "z": labels} for labels in (z, other)),
        scale={"empty": np.ones(0), "z": np.ones(40)},
        tol=1e-13,
    )
    found = diagnose(target, kernel, pilot, GOOD)
    assert found.sites == {"z": SiteDistance(0.5, 4, 4, True)}


def test_distances_in_half_precision() -> None:
    """Spreads of paths over 2 x 20 x 30 bfloat16 numbers, in which sums stand still after some hundred."""
    target = Target.from_logdensity(lambda x: -jnp.sum(x["a"] ** 2), {"a": jnp.zeros(2, jnp.bfloat16)})
    paths = [np.random.default_rng(seed).normal(size=(20, 30, 2)).astype(jnp.bfloat16) for seed in (0, 1)]
    found, spread = distances_by_site(target, paths)["a"]
    unit = np.std(np.concatenate(paths, axis=1).astype(float), axis=(0, 1))
    np.testing.assert_allclose(found, np.abs(paths[0].astype(float) - paths[1]) / unit, rtol=0.02, atol=1e-3)
    assert np.all((spread > 0.3) & (spread < 3))


def test_a_discrete_site_under_a_kernel_of_sites() -> None:
    """Its distance is the share of elements that differ; step sizes and bases belong to the site groups."""
    target = numpyro_target(labels, (), {})
    rng = np.random.default_rng(0)
    weight = rng.normal(size=(6, NUM_STEPS + 1))
    z = rng.integers(0, 2, (6, NUM_STEPS + 1, 4))
    other = z.copy()
    other[:4, :, :2] = 1 - other[:4, :, :2]
    other[4:, :3] = 1 - other[4:, :3]
    kernel = pmcmc.Compose([pmcmc.DiscreteGibbs(), (HMC, ["weight"])])
    states = [({"z": labels}, weight[..., None]) for labels in (z, other)]
    pilot = coalescence_of_paths(*states, scale=({"z": np.ones(4)}, np.ones(1)), tol=1e-13)
    assert pilot.merged.tolist() == [False] * 4 + [True] * 2
    bad = GOOD._replace(acceptance_rate=np.full((2, 100), 0.1))
    found = diagnose(target, kernel, pilot, bad)
    assert found.sites == {"z": SiteDistance(0.5, 4, 4, True)}
    assert said(found) == {"discrete"}
    assert "z (50% of its elements in 4 of 4 pairs)" in str(found)


def test_pairs_that_are_lost_are_left_out() -> None:
    target = target_of(beside_a_mode)
    pilot = pilot_of(target, {"b": wandering(2.0)})
    lost = np.arange(NUM_PAIRS + 2) < 3
    found = diagnose(target, HMC, pilot._replace(finite=~lost), GOOD)
    assert found.sites["b"].num_pairs == NUM_PAIRS - 3
    assert said(found) == set()
    with pytest.raises(ValueError, match="nothing to explain"):
        diagnose(target, HMC, pilot._replace(finite=np.zeros_like(lost)), GOOD)


@funnel_may_warn
def test_nothing_is_worked_out_before_it_is_asked_for(free_lanes, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []
    monkeypatch.setattr(automatic, "diagnose", lambda *a: asked.append(1) or diagnose(*a))
    sizes = dict(num_samples=4000, num_warmup=200, num_chains=2, progress_bar=False)
    chain = pmcmc.sample(funnel, start_like(funnel), 0, **sizes)
    assert asked == []
    assert str(chain.report).count("Kept apart by: position (") == 1
    assert asked == [1]
