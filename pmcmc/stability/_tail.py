"""The longest of many waiting times, from a few: an exponential tail behind the observed median."""

from dataclasses import dataclass
from functools import cached_property
from statistics import NormalDist

import numpy as np

_NUM_NODES = 64  # of the average over the uncertain tail


@dataclass(frozen=True)
class ExponentialTail:
    """Waiting times as observed up to a threshold u, and ``P(t > u + s) = p exp(-s / theta)`` behind it.

    body: sorted times up to u. threshold: u, the median. share: p, of the times behind u.
    mean_excess: theta, inf where no time behind u was seen to end. num_events: how many were.

    theta is the maximum-likelihood estimate with censored times: the time spent behind u over the times that ended
    there. Excesses over a high threshold are exponential where the tail is neither heavier nor bounded (Pickands 1975,
    shape 0); coupled paths that meet by a bounded probability in every stretch of time have such a tail.
    """

    body: tuple[float, ...]
    threshold: float
    share: float
    mean_excess: float
    num_events: int

    @classmethod
    def fit(cls, times: np.ndarray, limit: float | int) -> "ExponentialTail":
        """From observed times; those above ``limit`` had not ended at ``limit``."""
        times = np.sort(np.asarray(times, float))
        if times.size < 2:
            raise ValueError(f"expected at least 2 waiting times to fit a tail to, got {times.size}.")
        ended = times <= limit
        times = np.where(ended, times, limit)
        low = (times.size + 1) // 2
        threshold = times[low - 1]
        excess, events = float(np.sum(times[low:] - threshold)), int(ended[low:].sum())
        # times are whole steps: ties at the threshold still leave half a step of doubt each
        mean_excess = max(excess, 0.5 * events) / events if events else np.inf
        return cls(tuple(times[:low]), float(threshold), 1 - low / times.size, mean_excess, events)

    @cached_property
    def _mean_excesses(self) -> np.ndarray:
        """Equally likely values of theta: 1 / theta ~ Gamma(num_events), in the cube-root approximation of its
        quantiles (Wilson & Hilferty 1931)."""
        k = max(self.num_events, 1)
        z = np.array([NormalDist().inv_cdf((i + 0.5) / _NUM_NODES) for i in range(_NUM_NODES)])
        relative = np.maximum(1 - 1 / (9 * k) + z / (3 * np.sqrt(k)), 0.05) ** 3
        return self.mean_excess / relative

    def expected_maximum(self, count: float) -> float:
        """Mean of the largest of ``count`` independent times: the integral of ``1 - F(t)^count``."""
        if not np.isfinite(self.mean_excess):
            return np.inf
        body = np.array([0.0, *self.body])
        below = np.arange(body.size - 1) / (len(self.body) / (1 - self.share))  # F between the observed times
        head = float(np.sum(np.diff(body) * (1 - below**count)))
        s = np.linspace(0, np.log(max(count, 1.0)) + 30, 4000)
        # in units of theta; log1p keeps p e^-s when it is far below 1
        alive = -np.expm1(count * np.log1p(-self.share * np.exp(-s)))
        return head + self.mean_excess * float(np.sum((alive[1:] + alive[:-1]) / 2) * (s[1] - s[0]))

    def quantile(self, probability: float, count: float) -> float:
        """The largest of ``count`` times does not exceed it with this probability, theta being uncertain too."""
        if not np.isfinite(self.mean_excess):
            return np.inf
        if self.share == 0:
            return self.threshold
        one = -np.expm1(np.log(probability) / count)  # 1 - probability^(1 / count)
        if one >= self.share:
            rank = int(np.ceil((1 - one) * len(self.body) / (1 - self.share))) - 1
            return self.body[min(max(rank, 0), len(self.body) - 1)]
        low, high = 0.0, float(self._mean_excesses.max() * (np.log(count) + 40))
        for _ in range(60):
            middle = (low + high) / 2
            chance = np.mean(np.exp(count * np.log1p(-self.share * np.exp(-middle / self._mean_excesses))))
            low, high = (middle, high) if chance < probability else (low, middle)
        return self.threshold + (low + high) / 2
