"""The longest of many waiting times, from a few: an exponential tail behind those observed."""

from dataclasses import dataclass
from functools import cached_property
from statistics import NormalDist

import numpy as np

from pmcmc._types import ArrayLeaf, Scalar

_NUM_NODES = 64  # of the average over the uncertain tail
_MIN_EXCESSES = 8  # with fewer the mean excess is known to less than a third


@dataclass(frozen=True)
class ExponentialTail:
    """Waiting times as observed up to a threshold u, and ``P(t > u + s) = p exp(-s / theta)`` behind it.

    body: sorted times up to u. threshold: u, such that the upper quarter of the times lies behind it, but at least
        8 of them, and as many more as never ended, or half. share: p, of the times behind u.
    mean_excess: theta, inf where no time behind u was seen to end. num_events: how many were.

    Behind the median of a normal law, say, an exponential tail fitted to the excesses is too long: the largest of 1,000
    comes out at 5.4 deviations instead of 3.2, and at 3.7 behind the upper quartile. Hence the high threshold, for
    which 32 times are the fewest that will do; 16 overestimate.

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
    def fit(cls, times: ArrayLeaf, limit: Scalar) -> "ExponentialTail":
        """From observed times; those above ``limit`` had not ended at ``limit``."""
        times = np.sort(np.asarray(times, float))
        if times.size < 2:
            raise ValueError(f"expected at least 2 waiting times to fit a tail to, got {times.size}.")
        ended = times <= limit
        times = np.where(ended, times, limit)
        low = times.size - min(int(np.sum(~ended)) + max(times.size // 4, _MIN_EXCESSES), times.size // 2)
        threshold = times[low - 1]
        excess, events = float(np.sum(times[low:] - threshold)), int(ended[low:].sum())
        # times are whole steps: ties at the threshold still leave half a step of doubt each
        mean_excess = max(excess, 0.5 * events) / events if events else np.inf
        return cls(tuple(map(float, times[:low])), float(threshold), 1 - low / times.size, float(mean_excess), events)

    @cached_property
    def _mean_excesses(self) -> np.ndarray:
        """Equally likely values of theta: 1 / theta ~ Gamma(num_events), in the cube-root approximation of its
        quantiles (Wilson & Hilferty 1931)."""
        k = max(self.num_events, 1)
        z = np.array([NormalDist().inv_cdf((i + 0.5) / _NUM_NODES) for i in range(_NUM_NODES)])
        relative = np.maximum(1 - 1 / (9 * k) + z / (3 * np.sqrt(k)), 0.05) ** 3
        return self.mean_excess / relative

    def expected_maximum(self, count: Scalar) -> float:
        """Mean of the largest of ``count`` independent times: the integral of ``1 - F(t)^count``."""
        if not np.isfinite(self.mean_excess):
            return float("inf")
        body = np.array([0.0, *self.body])
        below = np.arange(body.size - 1) / (len(self.body) / (1 - self.share))  # F between the observed times
        head = float(np.sum(np.diff(body) * (1 - below**count)))
        s = np.linspace(0, np.log(max(count, 1.0)) + 30, 4000)
        # in units of theta; log1p keeps p e^-s when it is far below 1
        alive = -np.expm1(count * np.log1p(-self.share * np.exp(-s)))
        return head + self.mean_excess * float(np.sum((alive[1:] + alive[:-1]) / 2) * (s[1] - s[0]))

    def exceeds(self, time: Scalar, count: Scalar) -> float:
        """``P(largest of count times > time)`` for times behind the threshold, theta being uncertain too."""
        tail = self.share * np.exp(-(time - self.threshold) / self._mean_excesses)
        return float(np.mean(-np.expm1(count * np.log1p(-tail))))

    def quantile(self, probability: Scalar, count: Scalar) -> float:
        """The largest of ``count`` times does not exceed it with this probability, theta being uncertain too."""
        if not np.isfinite(self.mean_excess):
            return float("inf")
        one = -np.expm1(np.log(probability) / count)  # how often a single time may exceed it
        if one >= self.share:
            rank = int(np.ceil((1 - one) * len(self.body) / (1 - self.share))) - 1
            return self.body[min(max(rank, 0), len(self.body) - 1)]
        low, high = self.threshold, self.threshold + float(self._mean_excesses.max() * (np.log(count) + 40))
        for _ in range(60):
            middle = (low + high) / 2
            low, high = (middle, high) if self.exceeds(middle, count) > 1 - probability else (low, middle)
        return (low + high) / 2
