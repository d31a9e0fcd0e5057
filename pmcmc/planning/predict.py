"""Predict what parallel solves will take, from the merge times of a short pilot.

A solve ends with the slowest of many merges, and a pilot observes only a few. `ExponentialTail` extrapolates: it adds
an exponential tail to the observed times. `predict_sweeps` applies it to multiple shooting, `predict_iterations` and
`extrapolate_iterations` to Newton-type solvers. Each returns a `Prediction` with an interval.

Source: Pickands (1975) for the tail.
"""

import math
import sys
from dataclasses import dataclass
from functools import cached_property
from statistics import NormalDist
from typing import NamedTuple

import numpy as np

from pmcmc._pytree import ArrayLeaf, Scalar
from pmcmc.recurrence import Dense, Identity, JacobianStructure, Zero
from pmcmc.stability.coalescence import Coalescence

# Number of nodes of the average over the uncertain tail.
_NUM_NODES = 64
# Least number of times above the threshold. With fewer the mean excess is uncertain by more than a third.
_MIN_EXCESSES = 8


@dataclass(frozen=True)
class ExponentialTail:
    """Distribution of waiting times: as observed up to a threshold u, exponential above it.

    Above the threshold

        P(t > u + s) = p exp(-s / theta).

    theta is the maximum-likelihood estimate for censored times: the total time spent above u, divided by the number of
    times that ended there. Excesses over a high threshold are exponential if the tail is neither heavier nor bounded
    (Pickands 1975, shape 0). Coupled paths that merge with at least a certain probability in every stretch of time have
    such a tail.

    The threshold must be high. For a normal law, for example, an exponential tail fitted above the median is too long:
    the largest of 1,000 times comes out at 5.4 standard deviations instead of 3.2, and at 3.7 if it is fitted above the
    upper quartile. With this threshold at least 32 times are needed; 16 overestimate.

    Attributes:
        body: Sorted times up to u.
        threshold: u. The upper quarter of the times lies above it, but at least 8 of them, plus as many as never ended,
            and at most half of all.
        share: p, the share of the times above u.
        mean_excess: theta; inf if no time above u was seen to end.
        num_events: Number of times above u that were seen to end.
    """

    body: tuple[float, ...]
    threshold: float
    share: float
    mean_excess: float
    num_events: int

    @classmethod
    def fit(cls, times: ArrayLeaf, limit: Scalar) -> "ExponentialTail":
        """Fit the distribution to observed times; those above ``limit`` had not ended at ``limit``.

        Raises:
            ValueError: There are fewer than two times.
        """
        times = np.sort(np.asarray(times, float))
        if times.size < 2:
            raise ValueError(f"expected at least 2 waiting times to fit a tail to, got {times.size}.")
        ended = times <= limit
        times = np.where(ended, times, limit)
        low = times.size - min(int(np.sum(~ended)) + max(times.size // 4, _MIN_EXCESSES), times.size // 2)
        threshold = times[low - 1]
        excess, events = float(np.sum(times[low:] - threshold)), int(ended[low:].sum())
        # Times are whole steps: even if all of them equal the threshold, each is uncertain by half a step.
        mean_excess = max(excess, 0.5 * events) / events if events else np.inf
        return cls(tuple(map(float, times[:low])), float(threshold), 1 - low / times.size, float(mean_excess), events)

    @cached_property
    def _mean_excesses(self) -> np.ndarray:
        """Equally likely values of theta.

        They follow from ``1 / theta ~ Gamma(num_events)``, with quantiles in the cube-root approximation of Wilson &
        Hilferty (1931).
        """
        k = max(self.num_events, 1)
        z = np.array([NormalDist().inv_cdf((i + 0.5) / _NUM_NODES) for i in range(_NUM_NODES)])
        relative = np.maximum(1 - 1 / (9 * k) + z / (3 * np.sqrt(k)), 0.05) ** 3
        return self.mean_excess / relative

    def expected_maximum(self, count: Scalar) -> float:
        """Return the mean of the largest of ``count`` independent times: the integral of ``1 - F(t)^count``."""
        if not np.isfinite(self.mean_excess):
            return float("inf")
        body = np.array([0.0, *self.body])
        # Up to the threshold, F is constant between the observed times.
        below = np.arange(body.size - 1) / (len(self.body) / (1 - self.share))
        head = float(np.sum(np.diff(body) * (1 - below**count)))
        # Above the threshold, integrate over s in units of theta. log1p keeps p e^-s when it is far below 1.
        s = np.linspace(0, np.log(max(count, 1.0)) + 30, 4000)
        alive = -np.expm1(count * np.log1p(-self.share * np.exp(-s)))
        return head + self.mean_excess * float(np.sum((alive[1:] + alive[:-1]) / 2) * (s[1] - s[0]))

    def exceeds(self, time: Scalar, count: Scalar) -> float:
        """Return ``P(largest of count times > time)`` above the threshold, averaged over the uncertain theta."""
        tail = self.share * np.exp(-(time - self.threshold) / self._mean_excesses)
        return float(np.mean(-np.expm1(count * np.log1p(-tail))))

    def quantile(self, probability: Scalar, count: Scalar) -> float:
        """Return the quantile of the largest of ``count`` times, with theta uncertain."""
        if not np.isfinite(self.mean_excess):
            return float("inf")
        one = -np.expm1(np.log(probability) / count)  # probability with which a single time may exceed it
        if one >= self.share:
            rank = int(np.ceil((1 - one) * len(self.body) / (1 - self.share))) - 1
            return self.body[min(max(rank, 0), len(self.body) - 1)]
        # Above the threshold, bisect.
        low, high = self.threshold, self.threshold + float(self._mean_excesses.max() * (np.log(count) + 40))
        for _ in range(60):
            middle = (low + high) / 2
            low, high = (middle, high) if self.exceeds(middle, count) > 1 - probability else (low, middle)
        return (low + high) / 2


# Distance, in units of the scale, below which two paths are assumed to differ by their tangent.
LINEAR_REGIME = 0.1


class Prediction(NamedTuple):
    """An expected number and an interval that should contain it.

    No value is above what a sequential solve needs.

    Attributes:
        value: Expected value.
        lower: Lower end of the interval.
        upper: Upper end of the interval.
    """

    value: float
    lower: float
    upper: float


class SweepPrediction(NamedTuple):
    """What multiple shooting is expected to take.

    Attributes:
        num_sweeps: Number of repair sweeps.
        num_sequential_steps: Critical path: number of steps taken one after the other.
    """

    num_sweeps: Prediction
    num_sequential_steps: Prediction


def predict_sweeps(
    pilot: Coalescence, *, length: int, num_blocks: int, num_chains: int = 1, level: Scalar = 0.9
) -> SweepPrediction:
    """Predict sweeps and critical path of `MultipleShooting` from the merge times of a pilot.

    Repairs start at the P - 1 inner ends of blocks of S = ceil(T / P) steps and continue, sweep after sweep, until they
    merge. With M the longest of the C (P - 1) merge times

        critical path = min(T, S + M),        sweeps = min(P - 1, ceil(M / S))

    The mean of M is that of the largest of C (P - 1) independent draws from the pilot's merge times, extended by an
    exponential tail. The interval includes the uncertainty of that tail. Apart from the tail, the result is exact under
    one assumption: a repair merges with the recording of a later sweep after as many steps as with that of the first.

    Args:
        pilot: Result of `coalescence_time`, outside jit, with 32 pairs or more that start apart (16 overestimate, see
            `ExponentialTail`). Its starts should be like the guesses of the solve (wider starts give an upper
            estimate), and its tolerance that of the solve. Pairs that start within the tolerance are left out.
        length: T, the number of steps.
        num_blocks: P, the number of blocks.
        num_chains: C, the number of chains solved side by side.
        level: Probability of the intervals.

    Raises:
        ValueError: Fewer than two pairs start apart, or length, num_blocks or num_chains is below 1.

    Example:
        >>> import jax, jax.numpy as jnp, pmcmc
        >>> inputs = jax.random.normal(jax.random.key(0), (100, 8))
        >>> pilot = pmcmc.stability.coalescence_time(
        ...     lambda x, u: 0.5 * x + u, jnp.zeros(8), jnp.ones(8), inputs, scale=1.0, tol=1e-3)
        >>> found = pmcmc.planning.predict_sweeps(pilot, length=6400, num_blocks=64)
        >>> round(found.num_sequential_steps.value), round(found.num_sweeps.value)  # 100 + 10 and some
        (112, 1)
    """
    if min(length, num_blocks, num_chains) < 1:
        raise ValueError(f"length, num_blocks, num_chains must be at least 1: {length}, {num_blocks}, {num_chains}.")
    tail = merge_tail(pilot)
    block = -(-length // num_blocks)
    blocks = -(-length // block)
    if blocks == 1:
        return SweepPrediction(Prediction(0.0, 0.0, 0.0), Prediction(*[float(length)] * 3))
    lanes = num_chains * (blocks - 1)
    longest = longest_of(tail, lanes, level)
    path = Prediction(*[min(float(length), block + steps) for steps in longest])
    rounds = [min(blocks - 1.0, float(math.ceil(min(steps, length) / block))) for steps in longest]
    sweeps = sum(_exceeds(tail, k * block, lanes) for k in range(blocks - 1))
    return SweepPrediction(Prediction(sweeps, min(rounds[1], sweeps), max(rounds[2], sweeps)), path)


def predict_iterations(
    jacobian: JacobianStructure, pilot: Coalescence, *, length: int, level: Scalar = 0.9
) -> Prediction:
    """Predict the iterations of a Newton-type solver on T steps, from the structure of its Jacobian and a pilot.

    `Zero` (Jacobi): after k iterations the state at t is that of a path started from the guess at t - k, so the solve
    ends with the slowest merge of any start. This is the largest of about T / theta independent merge times, where
    theta is the mean excess of their tail (starts closer than that merge together). Exact apart from the tail.

    `Dense` (Newton, DEER): one iteration solves all steps at once where the paths contract linearly, and by causality
    at least one more step where paths are further apart than that. The prediction is a heuristic: the longest nonlinear
    phase (see `nonlinear_steps`) of T / median(merge time) windows, but at least log2(log tol / log 0.1) + 2, the
    quadratic phase and two iterations to reach it. It grows like log T if the growth rate is negative, as Gonzalez et
    al. (2025) prove, and is T otherwise, as they show. It was within a factor 3 of the truth on MALA and recurrent
    networks, 0.4 to 2.2 over a dozen seeds each. The interval ranges from 1 (an affine recurrence) to the upper end of
    that for Jacobi.

    `Identity` (Picard): T. A cumulative sum never forgets; 0.5 T to T was seen on contracting chains.

    Other structures (quasi-Newton): between Dense and Zero, depending on how much of the Jacobian the structure keeps.
    The value is their geometric mean, and the interval is everything that is known; measure on windows with
    `extrapolate_iterations` instead.

    Args:
        jacobian: Structure of the solver's Jacobian.
        pilot: See `predict_sweeps`.
        length: T, the number of steps.
        level: Probability of the interval.

    Raises:
        ValueError: Fewer than two pairs start apart, or length is below 1.

    Source: Gonzalez et al. (2025), "Predictability enables parallelization of nonlinear state space models".

    Example:
        >>> import jax, jax.numpy as jnp, pmcmc
        >>> inputs = jax.random.normal(jax.random.key(0), (100, 8))
        >>> pilot = pmcmc.stability.coalescence_time(
        ...     lambda x, u: 0.5 * x + u, jnp.zeros(8), jnp.ones(8), inputs, scale=1.0, tol=1e-3)
        >>> pmcmc.planning.predict_iterations(pmcmc.recurrence.Zero(), pilot, length=1000).value < 20
        True
    """
    if length < 1:
        raise ValueError(f"length must be at least 1, got {length}.")
    tail = merge_tail(pilot)
    whole = Prediction(*[float(length)] * 3)
    capped = lambda steps: min(float(length), steps)
    merges = longest_of(tail, max(1.0, length / max(tail.mean_excess, 1.0)), level)
    jacobi = Prediction(*map(capped, merges))
    if isinstance(jacobian, Zero):
        return jacobi
    tol, rate = max(float(pilot.tol), sys.float_info.min), float(pilot.growth_rate)
    quadratic = capped(math.ceil(math.log2(max(math.log(tol) / math.log(LINEAR_REGIME), 1.0))) + 2.0)
    if isinstance(jacobian, Identity) or rate >= 0:
        return whole._replace(lower=1.0)
    windows = max(1.0, length / max(float(np.median(merge_times(pilot))), 1.0))
    apart = nonlinear_steps(pilot)[np.asarray(pilot.started_apart)]
    nonlinear = ExponentialTail.fit(apart, pilot.max_steps).expected_maximum(windows)
    newton = Prediction(max(quadratic, min(nonlinear, jacobi.upper)), 1.0, max(quadratic, jacobi.upper))
    if isinstance(jacobian, Dense):
        return newton
    return Prediction(math.sqrt(newton.value * jacobi.value), newton.lower, jacobi.upper)


def extrapolate_iterations(
    num_iters: ArrayLeaf, *, window: int, length: int, limit: int | None = None, level: Scalar = 0.9
) -> Prediction:
    """Predict the iterations of a solver on T steps from those it took on windows of one path.

    This works for any structure of the Jacobian if the recurrence contracts. If paths merge within a window, what
    happens in one window does not affect the window after the next. A solve of T steps then ends with the slowest of
    its T / window windows. Windows shorter than a merge time underestimate. Not for Picard, whose iterations grow with
    the window.

    Args:
        num_iters: Number of iterations on each window; shape (num_windows,).
        window: Number of steps of a window.
        length: T, the number of steps.
        limit: Budget of iterations; a count that reached it had not ended. None: the window itself, after which every
            solver ends.
        level: Probability of the interval.

    Raises:
        ValueError: There are fewer than two windows, or a window is below 1 step or longer than T.

    Example:
        >>> import jax.numpy as jnp
        >>> round(extrapolate_iterations(jnp.array([5, 5, 6, 7]), window=100, length=100_000).value)
        15
    """
    if not 1 <= window <= length:
        raise ValueError(f"window must be between 1 and length = {length}, got {window}.")
    tail = ExponentialTail.fit(np.asarray(num_iters), window if limit is None else limit - 1)
    return Prediction(*[min(float(length), count) for count in longest_of(tail, length / window, level)])


def nonlinear_steps(pilot: Coalescence, *, linear_regime: Scalar = LINEAR_REGIME) -> np.ndarray:
    """Return how long pairs stayed apart beyond what contraction explains.

    For each pair this is the number of steps until it stayed within ``linear_regime`` = delta, minus the number that
    contraction at the measured rate accounts for:

        steps(d < delta for good) - log(d[0] / delta) / |growth_rate|,   at least 0

    It is near zero if distant paths approach each other as fast as near ones, and long if decisions or modes keep them
    apart.

    Args:
        pilot: Result of `coalescence_time`, outside jit.
        linear_regime: Distance, in units of the scale, below which two paths are assumed to differ by their tangent.

    Returns:
        Numbers of steps, shape (pairs,); inf for pairs that never came so close.

    Example:
        >>> import jax.numpy as jnp, pmcmc
        >>> pilot = pmcmc.stability.coalescence_time(
        ...     lambda x, u: jnp.where(u < 20, x, 0.5 * x), jnp.zeros(1), jnp.ones(1), jnp.arange(99)[:, None],
        ...     scale=1.0, tol=1e-3)
        >>> nonlinear_steps(pilot).round().tolist()
        [21.0]
    """
    distances = np.asarray(pilot.distances, float)[: int(pilot.num_steps) + 1]
    above = ~(distances <= linear_regime)
    last = np.where(above.any(axis=0), len(above) - np.argmax(above[::-1], axis=0), 0).astype(float)
    rate = float(pilot.growth_rate)
    if rate < 0:
        start = np.where(np.isfinite(distances[0]), distances[0], linear_regime)
        last = np.maximum(last - np.log(np.maximum(start / linear_regime, 1.0)) / -rate, 0.0)
    return np.where(above[-1], np.inf, last)


def merge_times(pilot: Coalescence) -> np.ndarray:
    """Return the merge times of the pairs that start apart; max_steps + 1 for those that did not merge.

    Raises:
        ValueError: There are fewer than two.
    """
    steps = np.asarray(pilot.steps)[np.asarray(pilot.started_apart)]
    if steps.size < 2:
        raise ValueError(
            f"expected a pilot with at least 2 pairs that start apart, got {steps.size}: couple more chains, from "
            "different states."
        )
    return steps


def merge_tail(pilot: Coalescence) -> ExponentialTail:
    """Fit a tail to the merge times of the pairs of a pilot that start apart."""
    return ExponentialTail.fit(merge_times(pilot), pilot.max_steps)


def longest_of(tail: ExponentialTail, count: Scalar, level: Scalar) -> tuple[float, float, float]:
    """Return the mean and the two quantiles of the longest of ``count`` times.

    Args:
        tail: Distribution of a time.
        count: Number of independent times.
        level: Probability between the quantiles.
    """
    mean = tail.expected_maximum(count)
    low, high = (tail.quantile(q, count) for q in ((1 - level) / 2, (1 + level) / 2))
    return mean, min(low, mean), max(high, mean)


def _exceeds(tail: ExponentialTail, steps: Scalar, count: Scalar) -> float:
    """Return ``P(longest of count times > steps)``; below the threshold it is computed from the observed times."""
    if steps >= tail.threshold:
        return tail.exceeds(steps, count)
    at_most = sum(t <= steps for t in tail.body) / (len(tail.body) / (1 - tail.share))
    return float(1 - at_most**count)
