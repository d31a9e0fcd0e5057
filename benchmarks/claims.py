"""Compare what a run claims with what is true, on posteriors made to mislead and on well-behaved ones.

Each case is sampled by `pmcmc.sample` or `pmcmc.parallel_chain` as a user would do, under five seeds. The truth is the
mean of a test function whose exact value is known (by symmetry, by quadrature or by independent draws). It is compared
with the mean of the draws in units of the function's standard deviation. A run is *wrong* if it is off by more than
`WRONG` and by more than four standard errors of as many independent draws as the smallest effective sample size, or of
400 draws if it has fewer. The claims are the warnings and the report's line on bias. Three failures are counted:

- *silent*: a run is wrong and nothing warns;
- *alarm*: a run of a well-behaved case warns;
- *false bias*: the line on bias claims a small bias, and the run is off in the region that warm-up found.

Nothing can warn of a mode that none of warm-up's lanes visited: wrong runs whose check is an event on which all lanes
agreed over their last 64 steps are counted separately (*unseen*).

    python -m benchmarks.claims [--cases NAME ...] [--seeds 5] [--save claims]
"""

import argparse
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
from numpyro.infer.reparam import LocScaleReparam

import pmcmc
from benchmarks._harness import save

# Error from which a run is wrong, in standard deviations of the test function.
WRONG = 0.1
KINDS = ("well-behaved", "modes", "funnel", "tails", "slow", "start", "label", "unidentified", "shape")
RNG = np.random.default_rng(20261128)
NUM_REFERENCE = 400_000


@dataclass(frozen=True)
class Case:
    """One posterior, and a function of its draws whose mean is known.

    Args:
        name: Name of the case.
        kind: One of `KINDS`.
        model: A NumPyro model, or a log density if ``start`` is given.
        check: The test function: draws to values of shape (num_chains, num_draws).
        mean: Exact mean of the check.
        deviation: Exact standard deviation of the check.
        start: Starting position of a log density.
        options: Options of the call.
    """

    name: str
    kind: str
    model: Callable
    check: Callable[[Any], Any]
    mean: float
    deviation: float
    start: Any = None
    options: dict[str, Any] = field(default_factory=dict)


def above(index: int, edge: float) -> Callable:
    """Whether each draw's coordinate lies above an edge."""
    return lambda draws: draws[..., index] > edge


def coordinate(index: int) -> Callable:
    """One coordinate of each draw."""
    return lambda draws: draws[..., index]


def share(name: str, kind: str, model: Callable, check: Callable, probability: float, **options: Any) -> Case:
    """Make a case whose check is an event of known probability."""
    deviation = float(np.sqrt(probability * (1 - probability)))
    return Case(name, kind, model, check, probability, deviation, **options)


def gaussian(scales: np.ndarray, loc: Any = 0.0) -> Callable:
    """Independent Gaussian coordinates."""
    return lambda x: -0.5 * jnp.sum(((x - loc) / scales) ** 2)


def mixture(means: np.ndarray, scales: np.ndarray, shares: np.ndarray) -> Callable:
    """A mixture of isotropic Gaussians; ``means`` has shape (k, D)."""
    dim = means.shape[1]

    def logdensity(x: Any) -> Any:
        terms = [
            jnp.log(p) - dim * jnp.log(s) - 0.5 * jnp.sum(((x - m) / s) ** 2)
            for m, s, p in zip(means, scales, shares, strict=True)
        ]
        return jax.nn.logsumexp(jnp.stack(terms))

    return logdensity


def two_modes(distance: float, dim: int, *, weight: float = 0.5, ratio: float = 1.0) -> Callable:
    """Two modes along the first axis at -distance/2 and distance/2; the right one's weight and ratio of scales vary."""
    means = np.zeros((2, dim))
    means[:, 0] = -distance / 2, distance / 2
    return mixture(means, np.array([1.0, ratio]), np.array([1 - weight, weight]))


def narrow_mode() -> None:
    """Two modes of equal weight; in nine further dimensions one is 90 times narrower than the other."""
    a = numpyro.sample("a", dist.MixtureSameFamily(dist.Categorical(jnp.ones(2) / 2), dist.Normal(CENTRES, 0.25)))
    numpyro.sample("z", dist.Normal(0, jnp.where(a < -1.4, 0.011, 1.0)).expand([9]).to_event(1))


def funnel() -> None:
    """Neal's funnel in ten dimensions."""
    v = numpyro.sample("v", dist.Normal(0, 3))
    numpyro.sample("x", dist.Normal(0, jnp.exp(v / 2)).expand([9]).to_event(1))


def schools(centred: bool, scale: float = 5.0) -> Callable:
    """Rubin's eight schools, centred or not."""

    def model() -> None:
        mu = numpyro.sample("mu", dist.Normal(0, 5))
        tau = numpyro.sample("tau", dist.HalfCauchy(scale))
        with numpyro.plate("school", 8):
            theta = numpyro.sample("theta", dist.Normal(mu, tau))
            numpyro.sample("y", dist.Normal(theta, ERRORS), obs=EFFECTS)

    return model if centred else numpyro.handlers.reparam(model, config={"theta": LocScaleReparam(0)})


def horseshoe() -> None:
    """Linear regression under a horseshoe prior, on data that are zero."""
    scale = numpyro.sample("scale", dist.HalfCauchy(0.1))
    local = numpyro.sample("local", dist.HalfCauchy(1).expand([10]).to_event(1))
    beta = numpyro.sample("beta", dist.Normal(0, scale * local).to_event(1))
    numpyro.sample("y", dist.Normal(DESIGN[:, :10] @ beta, 1), obs=np.zeros(100))


def regression() -> None:
    """Linear regression with a Gaussian posterior."""
    beta = numpyro.sample("beta", dist.Normal(0, 1).expand([5]).to_event(1))
    numpyro.sample("y", dist.Normal(DESIGN[:, :5] @ beta, 1), obs=RESPONSE)


def labels(num: int) -> Callable:
    """A mixture with exchangeable components, on data that separate them."""

    def model() -> None:
        means = numpyro.sample("means", dist.Normal(0, 10).expand([num]).to_event(1))
        parts = dist.MixtureSameFamily(dist.Categorical(jnp.ones(num) / num), dist.Normal(means, 1))
        numpyro.sample("y", parts, obs=CLUSTERS[num])

    return model


def lognormal() -> None:
    """Five independent log-normal sites."""
    numpyro.sample("x", dist.LogNormal(0, 1).expand([5]).to_event(1))


def probability() -> None:
    """A beta distribution on the unit interval."""
    numpyro.sample("p", dist.Beta(4.0, 6.0))


def corners() -> None:
    """Three U-shaped beta distributions."""
    numpyro.sample("p", dist.Beta(0.3, 0.3).expand([3]).to_event(1))


def walk() -> None:
    """A Gaussian random walk observed with noise, sampled by its steps."""
    steps = numpyro.sample("steps", dist.Normal(0, 1).expand([30]).to_event(1))
    numpyro.sample("y", dist.Normal(jnp.cumsum(steps), 1.0).to_event(1), obs=jnp.zeros(30))


def spike(x: Any) -> Any:
    """Half of the mass at scale 0.01, half at scale 1, in each of two dimensions."""
    terms = [jnp.log(0.5) - 2 * jnp.log(s) - 0.5 * jnp.sum((x / s) ** 2) for s in (0.01, 1.0)]
    return jnp.logaddexp(*terms)


def ring(x: Any) -> Any:
    """A ring of radius 10 and width 0.1."""
    return -0.5 * ((jnp.sqrt(jnp.sum(x**2)) - 10) / 0.1) ** 2


def banana(bend: float, width: float) -> Callable:
    """x0 ~ N(0, 1) and x1 | x0 ~ N(bend (x0^2 - 1), width^2)."""
    return lambda x: -0.5 * x[0] ** 2 - 0.5 * ((x[1] - bend * (x[0] ** 2 - 1)) / width) ** 2


def student(df: float) -> Callable:
    """Independent Student t coordinates."""
    return lambda x: jnp.sum(-(df + 1) / 2 * jnp.log1p(x**2 / df))


def steps(x: Any) -> Any:
    """Ten steps of alternating heights 2 and 1, whose gradients are zero."""
    return jnp.where(jnp.abs(x[0]) < 5, jnp.log(1.0 + jnp.mod(jnp.floor(x[0]), 2)), -jnp.inf)


def sums(x: Any) -> Any:
    """A posterior in which only the sum is identified; each term has a wide prior."""
    return -0.5 * ((x[0] + x[1] - 1) / 0.01) ** 2 - 0.5 * jnp.sum((x / 100) ** 2)


def products(x: Any) -> Any:
    """A posterior in which only the product is identified, up to sign and scale."""
    return -0.5 * ((x[0] * x[1] - 1) / 0.05) ** 2 - 0.5 * jnp.sum((x / 3) ** 2)


CENTRES = jnp.array([-2.4, -0.4])
EFFECTS = np.array([28.0, 8, -3, 7, -1, 1, 18, 12])
ERRORS = np.array([15.0, 10, 16, 11, 9, 11, 10, 18])
DESIGN = RNG.standard_normal((100, 20))
RESPONSE = DESIGN[:, 0] + RNG.standard_normal(100)
CLUSTERS = {k: np.concatenate([RNG.normal(6 * i, 1, 30) for i in range(k)]) for k in (2, 3)}
WIDE = np.logspace(-3, 3, 20)
SLOW: dict[str, dict[str, Any]] = {
    "HMC, steps of 0.001": dict(kernel=pmcmc.HMC(step_size=0.001, num_integration_steps=1), num_warmup=0),
    "HMC, steps of 0.001, warmed up": dict(kernel=pmcmc.HMC(step_size=0.001, num_integration_steps=1)),
    "MALA, steps of 1e-4": dict(kernel=pmcmc.MALA(step_size=1e-4)),
    "random walk, steps of 0.01": dict(kernel=pmcmc.RandomWalk(step_size=0.01)),
}


def schools_reference() -> tuple[float, float]:
    """Return mean and standard deviation of log tau, on a grid with the effects and mu integrated out."""
    log_tau = np.linspace(-9, 6, 6001)
    tau = np.exp(log_tau)
    variance = ERRORS**2 + tau[:, None] ** 2  # variance of the effects, given mu and tau
    precision, weighted = (1 / variance).sum(1) + 1 / 25, (EFFECTS / variance).sum(1)
    logp = -0.5 * np.log(variance).sum(1) - 0.5 * (EFFECTS**2 / variance).sum(1)
    logp += 0.5 * weighted**2 / precision - 0.5 * np.log(precision) - np.log1p((tau / 5) ** 2) + log_tau
    p = np.exp(logp - logp.max())
    mean = (p * log_tau).sum() / p.sum()
    return float(mean), float(np.sqrt((p * (log_tau - mean) ** 2).sum() / p.sum()))


def regression_reference(dim: int = 5) -> tuple[float, float]:
    """Return mean and standard deviation of the first coefficient."""
    design = DESIGN[:, :dim]
    covariance = np.linalg.inv(np.eye(dim) + design.T @ design)
    return float((covariance @ design.T @ RESPONSE)[0]), float(np.sqrt(covariance[0, 0]))


def walk_reference() -> float:
    """Return the standard deviation of the first step."""
    total = np.tril(np.ones((30, 30)))
    return float(np.sqrt(np.linalg.inv(np.eye(30) + total.T @ total)[0, 0]))


def cases() -> list[Case]:
    """Return all cases, sorted as in `KINDS`."""
    log_tau = lambda draws: np.log(draws["tau"])
    first = lambda name: lambda draws: draws[name][..., 0]
    spread = lambda draws: np.linalg.norm(draws, axis=-1) < 0.05
    good = [
        Case("gaussian, D = 5", "well-behaved", gaussian(np.ones(5)), coordinate(0), 0, 1, jnp.zeros(5)),
        Case("gaussian, D = 50", "well-behaved", gaussian(np.ones(50)), coordinate(0), 0, 1, jnp.zeros(50)),
        Case("scales 1e-3 to 1e3", "well-behaved", gaussian(WIDE), coordinate(19), 0, 1e3, jnp.zeros(20)),
        Case("far start", "well-behaved", gaussian(np.ones(3), 1e3), coordinate(0), 1e3, 1, jnp.zeros(3)),
        Case("t, 10 degrees", "well-behaved", student(10), coordinate(0), 0, np.sqrt(10 / 8), jnp.zeros(3)),
        share("log-normal", "well-behaved", lognormal, lambda d: d["x"][..., 0] > 1, 0.5),
        Case("beta", "well-behaved", probability, lambda d: d["p"], 0.4, float(np.sqrt(0.24 / 11))),
        Case("regression", "well-behaved", regression, first("beta"), *regression_reference()),
        Case("smooth walk, D = 30", "well-behaved", walk, first("steps"), 0, walk_reference()),
        share("modes 2 sd apart", "well-behaved", two_modes(2, 2), above(0, 0), 0.5, start=jnp.zeros(2)),
        share("mild banana", "well-behaved", banana(0.3, 1.0), above(0, 0), 0.5, start=jnp.zeros(2)),
    ]
    apart = dict(start=jnp.zeros(2))
    modes = [
        share("a narrow mode", "modes", narrow_mode, lambda d: d["a"] > -1.4, 0.5),
        *(share(f"modes {d} sd apart", "modes", two_modes(d, 2), above(0, 0), 0.5, **apart) for d in (5, 7, 10, 20)),
        share("modes 8 sd apart, D = 20", "modes", two_modes(8, 20), above(0, 0), 0.5, start=jnp.zeros(20)),
        share("modes, scales 1 and 0.1", "modes", two_modes(8, 2, ratio=0.1), above(0, 2), 0.5, **apart),
        share("modes, shares 9 and 1", "modes", two_modes(8, 2, weight=0.1), above(0, 0), 0.1, **apart),
        share(
            "three modes",
            "modes",
            mixture(np.array([[-8.0, 0], [0, 8], [8, 0]]), np.ones(3), np.ones(3) / 3),
            above(1, 4),
            1 / 3,
            **apart,
        ),
        share(
            "started in one of two far modes",
            "modes",
            two_modes(80, 1, weight=0.7),
            above(0, 0),
            0.7,
            start=jnp.full(1, -40.0),
        ),
        share("spike and slab", "modes", spike, spread, 0.5 + 0.5 * (1 - np.exp(-(0.05**2) / 2)), **apart),
    ]
    hierarchies = [
        Case("funnel, D = 10", "funnel", funnel, lambda d: d["v"], 0, 3),
        Case("eight schools, centred", "funnel", schools(True), log_tau, *schools_reference()),
        Case("eight schools, non-centred", "funnel", schools(False), log_tau, *schools_reference()),
        share("horseshoe", "funnel", horseshoe, lambda d: d["beta"][..., 0] > 0, 0.5),
    ]
    tails = [
        Case("t, 2 degrees, above 3", "tails", student(2), above(0, 3), *event(0.04773), jnp.zeros(5)),
        Case("Cauchy, above 10", "tails", student(1), above(0, 10), *event(0.5 - np.arctan(10) / np.pi), jnp.zeros(2)),
        share("Cauchy, D = 10", "tails", student(1), above(0, 0), 0.5, start=jnp.zeros(10)),
        Case("half a degree", "tails", student(0.5), above(0, 0), *event(0.5), jnp.zeros(2)),
    ]
    slow = [
        Case(name, "slow", gaussian(np.ones(3)), coordinate(0), 0, 1, jnp.zeros(3), options=options)
        for name, options in SLOW.items()
    ]
    starts = [
        Case("stiff start", "start", gaussian(np.array([1.0, 1e-4])), coordinate(0), 0, 1, jnp.full(2, 50.0)),
        Case("start in the tails of a Cauchy", "start", student(1), above(0, 0), *event(0.5), jnp.full(2, 1e4)),
        Case(
            "start beyond a barrier",
            "start",
            two_modes(12, 2, weight=0.999),
            above(0, 0),
            *event(0.999),
            jnp.array([-6.0, 0.0]),
        ),
    ]
    switching = [
        share("label switching, 2", "label", labels(2), lambda d: d["means"][..., 0] < d["means"][..., 1], 0.5),
        share("label switching, 3", "label", labels(3), lambda d: d["means"][..., 0] < d["means"][..., 1], 0.5),
    ]
    unidentified = [
        Case("a sum", "unidentified", sums, coordinate(0), 0.5, 100 / np.sqrt(2), jnp.zeros(2)),
        share("a product", "unidentified", products, above(0, 0), 0.5, start=jnp.ones(2)),
    ]
    shapes = [
        share("strong banana", "shape", banana(3.0, 0.1), above(0, 0), 0.5, start=jnp.zeros(2)),
        share("ring", "shape", ring, above(0, 0), 0.5, start=jnp.array([10.0, 0.0])),
        share("corners", "shape", corners, lambda d: d["p"][..., 0] > 0.5, 0.5),
        share("steps", "shape", steps, above(0, 0), 7 / 15, start=jnp.full(1, 0.5)),
    ]
    return [*good, *modes, *hierarchies, *tails, *slow, *starts, *switching, *unidentified, *shapes]


def event(probability: float) -> tuple[float, float]:
    """Return mean and standard deviation of an event."""
    return float(probability), float(np.sqrt(probability * (1 - probability)))


@dataclass(frozen=True)
class Outcome:
    """What one run found.

    Attributes:
        error: Absolute error of the mean, in standard deviations of the check.
        unseen: Whether no lane of warm-up could show the error, see above.
        ess: Smallest effective sample size.
        rhat: Largest R-hat.
        warnings: Messages of the warnings.
        report: The report.
        seconds: Seconds of the call.
    """

    error: float
    unseen: bool
    ess: float
    rhat: float
    warnings: tuple[str, ...]
    report: pmcmc.SolveReport
    seconds: float

    @property
    def is_wrong(self) -> bool:
        """Whether the error exceeds `WRONG` and four standard errors."""
        return self.error > max(WRONG, 4 / np.sqrt(max(self.ess, 400)))

    @property
    def says_small_bias(self) -> bool:
        """Whether the report calls the bias small."""
        return "relative to the region" in str(self.report)


def run(case: Case, seed: int, **options: Any) -> Outcome:
    """Make one call and collect its warnings and report."""
    options = dict(num_samples=1000, progress_bar=False) | case.options | options
    options["save_warmup"] = options.get("num_warmup", 1000) > 0
    begin = time.perf_counter()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        if case.start is None:
            chain = pmcmc.parallel_chain(case.model, seed, **options)
        else:
            chain = pmcmc.sample(case.model, case.start, seed, **options)
    seconds = time.perf_counter() - begin
    values = np.asarray(case.check(jax.tree.map(np.asarray, chain.get_samples(group_by_chain=True))), float)
    mixing: Any = chain.report.mixing
    told = tuple(str(w.message) for w in caught if issubclass(w.category, UserWarning))
    error = float(abs(values.mean() - case.mean) / case.deviation)
    return Outcome(error, _is_unseen(case, chain), mixing.min_ess, mixing.max_rhat, told, chain.report, seconds)


def _is_unseen(case: Case, chain: pmcmc.Chain) -> bool:
    """Whether the check is an event on which all lanes of warm-up agreed over their last 64 steps."""
    if chain.warmup_path is None:
        return False
    seen = case.check(jax.tree.map(np.asarray, chain.get_warmup_samples()))
    return seen.dtype == bool and bool(np.ptp(seen[:, -64:].astype(int)) == 0)


def row(case: Case, seeds: int) -> dict[str, Any]:
    """Count errors and claims over the seeds."""
    found: list[Outcome | str] = []
    for seed in range(seeds):
        try:
            found.append(run(case, seed))
        except (pmcmc.WarmupError, ValueError, RuntimeError) as refused:
            found.append(str(refused))
    runs = [one for one in found if isinstance(one, Outcome)]
    wrong = [one for one in runs if one.is_wrong]
    count = lambda holds: sum(map(holds, runs))
    return {
        "case": case.name,
        "kind": case.kind,
        "runs": len(runs),
        "refused": sorted({one[:90] for one in found if isinstance(one, str)}),
        "wrong": len(wrong),
        "warned": count(lambda one: bool(one.warnings)),
        "silent": sum(not one.warnings and not one.unseen for one in wrong),
        "unseen": sum(not one.warnings and one.unseen for one in wrong),
        "alarms": count(lambda one: bool(one.warnings)) if case.kind == "well-behaved" else 0,
        "says_small_bias": count(lambda one: one.says_small_bias),
        "false_bias": sum(one.says_small_bias and not one.unseen for one in wrong),
        "largest_error_sd": max((one.error for one in runs), default=None),
        "largest_rhat": max((one.rhat for one in runs), default=None),
        "smallest_ess": min((one.ess for one in runs), default=None),
        "first_words": sorted({" ".join(text.split()[:6]) for one in runs for text in one.warnings}),
        "seconds": float(np.median([one.seconds for one in runs])) if runs else None,
    }


def main() -> None:
    """Run the cases, print their rows and the totals."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--cases", nargs="*")
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--save")
    args = parser.parse_args()
    rows = []
    for case in cases():
        if args.cases and case.name not in args.cases:
            continue
        rows.append(row(case, args.seeds))
        print({k: v for k, v in rows[-1].items() if v}, flush=True)
    print(
        {
            key: sum(r[key] for r in rows)
            for key in ("runs", "wrong", "warned", "silent", "unseen", "alarms", "false_bias")
        }
    )
    if args.save:
        save(args.save, rows)


if __name__ == "__main__":
    main()
