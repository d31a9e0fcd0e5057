"""The longest of many waiting times, from a few: an exponential tail behind those observed."""

import math
from dataclasses import dataclass
from functools import cached_property
from statistics import NormalDist
from typing import NamedTuple

import numpy as np

from pmcmc._typing import ArrayLeaf, Scalar
from pmcmc.recurrence import Dense, Identity, JacobianStructure, Zero
from pmcmc.stability.coalescence import Coalescence

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


# Distance, in units of the scale, below which two paths are taken to differ by their tangent.
LINEAR_REGIME = 0.1


class Prediction(NamedTuple):
    """A number to expect, between two that it should lie in.

    None is more than what a sequential solve needs.
    """

    value: float
    lower: float
    upper: float


class SweepPrediction(NamedTuple):
    """What multiple shooting is expected to take.

    num_sweeps: repair sweeps. num_sequential_steps: critical path, in steps one after the other.
    """

    num_sweeps: Prediction
    num_sequential_steps: Prediction


def predict_sweeps(
    pilot: Coalescence, *, length: int, num_blocks: int, num_chains: int = 1, level: Scalar = 0.9
) -> SweepPrediction:
    """Sweeps and critical path of `MultipleShooting` from the merge times of a pilot.

    Repairs start at the P - 1 inner ends of blocks of S = ceil(T / P) steps and run on, sweep after sweep, until they
    merge. With M the longest of the C (P - 1) merge times

        critical path = min(T, S + M),        sweeps = min(P - 1, ceil(M / S))

    and the mean of M is that of the largest of C (P - 1) independent draws from the pilot's merge times, extended by an
    exponential tail. The interval also holds the uncertainty of that tail. Exact but for the tail and one assumption:
    that a repair meets the recording of a later sweep after as many steps as that of the first.

    pilot: from `coalescence_time`, outside jit, of 32 pairs or more (16 overestimate, see `ExponentialTail`), its
        starts like the guesses of the solve (wider starts: an upper estimate), its tolerance that of the solve.
    length: T. num_blocks: P. num_chains: C, solved side by side.
    level: probability of the intervals.

    Raises:
        ValueError: fewer than two pairs; length, num_blocks or num_chains below 1.

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
    tail = _merge_tail(pilot)
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
    """Iterations of a Newton-type solver on T steps, by the structure of its Jacobian, from a pilot alone.

    `Zero` (Jacobi): after k iterations the state at t is that of a path started from the guess at t - k, so the solve
    ends with the slowest merge of any start: the largest of about T / theta independent merge times, theta the mean
    excess of their tail (starts closer than that merge together). Exact but for the tail.

    `Dense` (Newton, DEER): an iteration solves the linear contraction of all steps at once, and by causality at least
    one more step where paths are further apart than that. A heuristic: the longest nonlinear phase (see
    `nonlinear_steps`) of T / median(merge time) windows, but at least log2(log tol / log 0.1) + 2, the quadratic phase
    and two iterations into it. It grows like log T where the growth rate is negative, as Gonzalez et al. (2025) prove,
    and is T where the rate is not, as they show. Within a factor 3 of the truth on MALA and recurrent networks, 0.4 to
    2.2 over a dozen seeds each. Interval: 1 (an affine recurrence) to Jacobi.

    `Identity` (Picard): T. A cumulative sum never forgets; 0.5 T to T was seen on contracting chains.

    Others (quasi-Newton): between Dense and Zero, depending on how much of the Jacobian the structure keeps. The value
    is their geometric mean, the interval is all that is known: measure on windows with `extrapolate_iterations`.

    pilot, level: as in `predict_sweeps`. length: T.

    Raises:
        ValueError: fewer than two pairs, or length below 1.

    Source: Gonzalez et al. 2025, "Predictability enables parallelization of nonlinear state space models".

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
    tail = _merge_tail(pilot)
    whole = Prediction(*[float(length)] * 3)
    capped = lambda steps: min(float(length), steps)
    merges = longest_of(tail, max(1.0, length / max(tail.mean_excess, 1.0)), level)
    jacobi = Prediction(*map(capped, merges))
    if isinstance(jacobian, Zero):
        return jacobi
    tol, rate = float(pilot.tol), float(pilot.growth_rate)
    quadratic = capped(math.ceil(math.log2(max(math.log(tol) / math.log(LINEAR_REGIME), 1.0))) + 2.0)
    if isinstance(jacobian, Identity) or rate >= 0:
        return whole._replace(lower=1.0)
    windows = max(1.0, length / max(float(np.median(pilot.steps)), 1.0))
    nonlinear = ExponentialTail.fit(nonlinear_steps(pilot), pilot.max_steps).expected_maximum(windows)
    newton = Prediction(max(quadratic, min(nonlinear, jacobi.upper)), 1.0, max(quadratic, jacobi.upper))
    if isinstance(jacobian, Dense):
        return newton
    return Prediction(math.sqrt(newton.value * jacobi.value), newton.lower, jacobi.upper)


def extrapolate_iterations(
    num_iters: ArrayLeaf, *, window: int, length: int, limit: int | None = None, level: Scalar = 0.9
) -> Prediction:
    """Iterations of a solver on T steps from those it took on windows of one path: for any contracting structure.

    Where paths merge within a window, what happens in one does not reach the next but one; a solve of T steps then ends
    with the slowest of its T / window windows. Windows shorter than a merge time underestimate. Not for Picard, whose
    iterations grow with the window.

    num_iters: (num_windows,) iterations on each. window: its steps. length: T. limit: budget of iterations; a count
        that reached it had not ended. None: the window itself, with which every solver ends.

    Raises:
        ValueError: fewer than two windows; a window below 1 step or longer than T.

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
    """(pairs,) steps until each pair stayed within ``linear_regime``, less those that contraction accounts for.

        steps(d < delta for good) - log(d[0] / delta) / |growth_rate|,   at least 0

    Near zero where paths approach each other from afar as they do from near; long where decisions or modes keep them
    apart. inf for pairs that never came so close.

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


def _merge_tail(pilot: Coalescence) -> ExponentialTail:
    return ExponentialTail.fit(np.asarray(pilot.steps), pilot.max_steps)


def longest_of(tail: ExponentialTail, count: Scalar, level: Scalar) -> tuple[float, float, float]:
    """Mean and quantiles of the longest of ``count`` times."""
    mean = tail.expected_maximum(count)
    low, high = (tail.quantile(q, count) for q in ((1 - level) / 2, (1 + level) / 2))
    return mean, min(low, mean), max(high, mean)


def _exceeds(tail: ExponentialTail, steps: Scalar, count: Scalar) -> float:
    """``P(longest of count times > steps)``; below the threshold from the observed times."""
    if steps >= tail.threshold:
        return tail.exceeds(steps, count)
    at_most = sum(t <= steps for t in tail.body) / (len(tail.body) / (1 - tail.share))
    return float(1 - at_most**count)
