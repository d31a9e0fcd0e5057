"""How good draws are: effective sample sizes, and whether methods agree with each other and with reference draws.

Every number of every compared site counts. ``min_ess`` is the smallest of ArviZ's bulk and tail effective sample sizes.

Agreement: the mean of a method is compared with the precision-weighted mean of all other methods (and of posteriordb's
reference draws where there are any), in units of the Monte Carlo error of the difference; and its standard deviation
likewise. With K such comparisons in a row, the largest \\|z\\| may be as large as a normal variable is with probability
`LEVEL` / K, so that a row of methods that agree fails with probability `LEVEL`, whatever its number of parameters.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np

LEVEL = 1e-3


@dataclass(frozen=True)
class Summary:
    """Moments of draws with their Monte Carlo errors, one number for each name.

    Args:
        names: Stan's names, such as ``beta[1]``.
        value: Means and standard deviations, shape (2, names).
        error: Their Monte Carlo standard errors.
    """

    names: tuple[str, ...]
    value: np.ndarray
    error: np.ndarray


def columns(samples: dict[str, Any]) -> dict[str, np.ndarray]:
    """Return the draws (chains, draws) of every number under Stan's names, such as ``beta[1]``."""
    found = {}
    for site, draws in samples.items():
        draws = np.asarray(draws, float)
        for index in np.ndindex(draws.shape[2:]):
            name = f"{site}[{','.join(str(i + 1) for i in index)}]" if index else site
            found[name] = draws[(slice(None), slice(None), *index)]
    return found


def summary(draws: dict[str, np.ndarray]) -> Summary:
    """Return the moments of draws by name."""
    from numpyro.diagnostics import effective_sample_size

    x = np.stack(list(draws.values()), -1)
    mean, sd = x.mean((0, 1)), x.std((0, 1))
    error_of_mean = sd / np.sqrt(effective_sample_size(x))
    squares = (x - mean) ** 2  # delta method: sd(s) is about sd(s^2) / (2 s)
    error_of_sd = squares.std((0, 1)) / np.sqrt(effective_sample_size(squares)) / (2 * sd)
    return Summary(tuple(draws), np.stack([mean, sd]), np.stack([error_of_mean, error_of_sd]))


def of_reference(reference: dict[str, Any]) -> Summary:
    """Return the moments of posteriordb's reference draws."""
    value = np.stack([reference["mean"], reference["sd"]])
    error = np.stack([reference["mcse_mean"], reference["mcse_sd"]])
    return Summary(tuple(map(str, reference["names"])), value, error)


def quality(draws: dict[str, np.ndarray]) -> dict[str, float]:
    """Return the smallest bulk and tail effective sample sizes, and the largest R-hat."""
    import arviz

    data = arviz.convert_to_dataset(draws)
    smallest = lambda found: float(min(found[name] for name in draws))
    bulk, tail = (smallest(arviz.ess(data, method=method)) for method in ("bulk", "tail"))
    rhat = arviz.rhat(data)
    largest = float(max(rhat[name] for name in draws))
    return {"min_ess": min(bulk, tail), "bulk_ess": bulk, "tail_ess": tail, "max_rhat": largest}


def deviations(one: Summary, others: list[Summary]) -> np.ndarray:
    """Return the z-scores, shape (2, names), of one method against the others pooled by their precision."""
    order = [[other.names.index(name) for name in one.names] for other in others]
    value = np.stack([other.value[:, i] for other, i in zip(others, order, strict=True)])
    weight = np.stack([other.error[:, i] ** -2.0 for other, i in zip(others, order, strict=True)])
    pooled = (weight * value).sum(0) / weight.sum(0)
    return (one.value - pooled) / np.sqrt(one.error**2 + 1 / weight.sum(0))


def agreement(found: dict[str, Summary], reference: Summary | None = None) -> dict[str, dict[str, Any]]:
    """Return each method's largest \\|z\\| of means and standard deviations, the limit, and the parameter it is of."""
    from scipy.stats import norm

    extra = [reference] if reference else []
    if len(found) + len(extra) < 2:
        return {}
    count = sum(2 * len(one.names) for one in found.values())
    limit = float(norm.isf(LEVEL / (2 * count)))
    rows: dict[str, dict[str, Any]] = {}
    for method, one in found.items():
        z = np.abs(deviations(one, [other for name, other in found.items() if name != method] + extra))
        mean, sd = z.max(1)
        worst = one.names[int(z.max(0).argmax())]
        rows[method] = {"max_z_mean": float(mean), "max_z_sd": float(sd), "z_limit": limit, "worst": worst}
    return rows


def judge(samples: dict[str, Any], reference: dict[str, Any] | None) -> dict[str, Any]:
    """Return NumPyro's smallest effective sample size and R-hat, and the largest \\|z\\| against a reference."""
    from numpyro.diagnostics import effective_sample_size, gelman_rubin

    moving = {name: x for name, x in columns(samples).items() if np.ptp(x) > 0}
    least = min(float(effective_sample_size(x)) for x in moving.values())
    found: dict[str, Any] = {"min_ess": least, "max_rhat": max(map(gelman_rubin, moving.values()))}
    if reference is None:
        return found
    published = of_reference(reference)
    z = np.abs(deviations(summary({name: moving[name] for name in published.names}), [published])).max(1)
    return {**found, "max_z_mean": float(z[0]), "max_z_sd": float(z[1])}
