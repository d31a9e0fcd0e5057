"""Steps of a chain, computed again to compare them with the stored ones; used by `pmcmc.chain.verify`.

A `Checker` computes the steps that lead to stored draws again and measures the differences. A `Look` holds what was
found, and repeats draws that do not agree under other roundings. Draws are addressed by places (chain, draw); a draw
number equal to the number of draws means the last state of the chain.
"""

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from pmcmc._pytree import Array, PyTree, is_real
from pmcmc._xla.compile import tuned_jit
from pmcmc._xla.rewrites import FEW_LANES, in_one_kernel
from pmcmc.kernels import Info, Kernel
from pmcmc.kernels.base import near_tie_bound
from pmcmc.random.streams import step_noise, threefry_2x32
from pmcmc.target import Target

# Number of draws checked by one call of the program, and of lanes that are computed side by side in it if the kernel
# reports its margin.
CALL, ABREAST = 8192, 256
# Number of other roundings that are tried: a correct draw after one tie is missed by all of them once in 2^8 times. If
# more draws are far off than ties could explain (more than FEW and more than one in ten), only two are tried, to see
# whether rounding matters.
ROUNDINGS, FEW = 8, 64
# If paths of different roundings separate, a draw agrees up to GROWTH times their distance from each other, as long as
# that is at most MOST posterior standard deviations.
GROWTH, MOST = 4, 0.01
# Margins are compared up to this size. Beyond it, only an error of this size could change the decision.
WIDE_MARGIN = 30.0
# Largest number of draws from which the spread is computed.
SPREAD_DRAWS = 2**16
QUANTILES = (0.05, 0.25, 0.5, 0.75, 0.95)
# What is compared, in the order in which messages name differences.
FIELDS = ("state", "decision", *Info._fields)


class Record(NamedTuple):
    """Stored draws and where they come from.

    Attributes:
        unknowns: States of all draws; shape (C, n, ...).
        info: Info of all draws; shape (C, n).
        first: States ``thinning`` steps before the first draw; shape (C, ...). None if they are not known.
        last: States after the last step; shape (C, ...).
        thinning: Number of steps from one draw to the next.
        num_unkept: Number of steps from the last draw to ``last``.
        first_step: Number of the step that follows ``first``.
        scale: Posterior standard deviations of an unknown, as in `ChainState.scale`; None if they are not known.
    """

    unknowns: PyTree
    info: Info
    first: PyTree
    last: PyTree
    thinning: int
    num_unkept: int
    first_step: int
    scale: PyTree


class _Held(NamedTuple):
    """Comparison of n stored draws with steps computed again.

    Attributes:
        gaps: Differences in posterior standard deviations, or in a comparable unit (see `_info_gaps`); shape
            (n, FIELDS).
        agrees: Whether all differences of a draw are small enough; shape (n,).
        new: The computed states, if they were requested.
    """

    gaps: np.ndarray
    agrees: np.ndarray
    new: PyTree = None

    @property
    def difference(self) -> np.ndarray:
        """Differences of the states; shape (n,)."""
        return self.gaps[:, 0]


class Look:
    """What was found at some places, updated by further looks under other roundings.

    Args:
        checker: Computes the steps.
        places: Rows (chain, draw); shape (n, 2).
        held: Result of the first comparison.
    """

    def __init__(self, checker: "Checker", places: np.ndarray, held: _Held):
        self.checker, self.places, self.held = checker, places, held

    def again(self, among: np.ndarray, lanes: int, rounding: int) -> np.ndarray:
        """Repeat those draws that do not agree yet under another rounding.

        Args:
            among: Draws to consider; shape (n,).
            lanes: Number of lanes computed side by side.
            rounding: See `_follow`.

        Returns:
            Whether a draw agrees now and did not before; shape (n,).
        """
        left = np.flatnonzero(among & ~self.held.agrees)
        found = self.checker.hold(self.places[left], lanes, rounding)
        return self._accept(left[found.agrees], found.gaps[found.agrees])

    def _accept(self, rows: np.ndarray, gaps: np.ndarray) -> np.ndarray:
        """Record that these rows agree, and return a mask of them; shape (n,)."""
        self.held.agrees[rows], self.held.gaps[rows] = True, gaps
        return np.isin(np.arange(len(self.places)), rows)

    def under_other_roundings(self, among: np.ndarray, lanes: int) -> tuple[np.ndarray, np.ndarray]:
        """Repeat those draws that do not agree yet under several other roundings.

        Args:
            among: Draws to consider; shape (n,).
            lanes: Number of lanes computed side by side.

        Returns:
            Whether a draw agrees now within the plain tolerance, and whether it is undecided because the roundings end
            apart; shapes (n,).
        """
        tol, gap = self.checker.tol, self.checker.gap
        left = np.flatnonzero(among & ~self.held.agrees)
        far = np.sum(self.held.difference[left] > MOST)
        parted = np.zeros(len(self.places), bool)
        if not left.size:
            return parted, parted
        # Compute the steps under each rounding; keep the smallest gaps, and how far the results are apart.
        reference = nearest = self.checker.hold(self.places[left], lanes, 2, keep_new=True)
        best, spread = nearest.gaps, np.zeros(len(left))
        for rounding in range(3, 2 + (ROUNDINGS if far <= max(FEW, len(self.places) // 10) else 2)):
            found = self.checker.hold(self.places[left], lanes, rounding, keep_new=True)
            spread = np.maximum(spread, gap(reference.new, found.new))
            best = np.where((found.gaps.max(axis=1) < best.max(axis=1))[:, None], found.gaps, best)
        # Where the results are far apart, a draw may be near one of them by chance: it must then equal one.
        apart = GROWTH * spread > max(MOST, tol)
        agrees = best.max(axis=1) <= np.where(apart, tol, np.maximum(tol, GROWTH * spread))
        parted[left] = apart & ~agrees
        now = self._accept(left[agrees], best[agrees])
        return now & (self.held.difference <= tol), parted


class Checker:
    """Computes steps again and compares them with stored draws.

    Args:
        target: The target.
        kernel: The kernel.
        keys: Keys of the chains; shape (C,).
        record: The stored draws.
        tol: Largest difference that agrees, in posterior standard deviations.
    """

    def __init__(self, target: Target, kernel: Kernel, keys: Array, record: Record, tol: float):
        self.target, self.kernel, self.keys, self.record, self.tol = target, kernel, keys, record, tol
        self.num_draws = record.info.margin.shape[1]
        self.dim = sum(math.prod(x.shape[2:]) for x in jax.tree.leaves(record.unknowns))
        self.scale = jax.tree.map(_spread, record.unknowns) if record.scale is None else record.scale

    def num_steps(self, places: np.ndarray) -> np.ndarray:
        """Return the number of steps from the draw before each place; shape (n,)."""
        return np.where(places[:, 1] == self.num_draws, self.record.num_unkept, self.record.thinning)

    def gap(self, one: PyTree, other: PyTree) -> np.ndarray:
        """Return the largest difference between unknowns, in posterior standard deviations; shape (n,)."""
        return np.max(np.stack(jax.tree.leaves(jax.tree.map(_gap, one, other, self.scale))), axis=0)

    def hold(self, places: np.ndarray, lanes: int, rounding: int, keep_new: bool = False) -> _Held:
        """Compare stored draws with the steps computed from the states before them.

        Args:
            places: Rows (chain, draw); shape (n, 2).
            lanes: Number of lanes computed side by side.
            rounding: See `_follow`.
            keep_new: Whether to return the computed states.
        """
        gaps = np.zeros((len(places), len(FIELDS)))
        room = jax.tree.map(lambda x: np.empty((len(places), *x.shape[2:]), x.dtype), self.record.unknowns)
        new = room if keep_new else None
        steps = self.num_steps(places)
        for number in np.unique(steps).tolist():
            own = np.flatnonzero(steps == number)
            # Numbers of groups are powers of two, so that a second look often finds the program of the first.
            groups = min(max(1, CALL // lanes), 1 << math.ceil(math.log2(max(1.0, len(own) / lanes))))
            for begin in range(0, len(own), groups * lanes):
                some = own[begin : begin + groups * lanes]
                found, info = self._follow(places[some], number, (groups, lanes), rounding)
                gaps[some] = self._compare(places[some], found, info)
                if keep_new:
                    jax.tree.map(lambda room, x, some=some: room.__setitem__(some, x), new, found)
        return _Held(gaps, gaps.max(axis=1) <= self.tol, new)

    def _follow(self, places: np.ndarray, num_steps: int, shape: tuple[int, int], rounding: int) -> tuple:
        """Compute the unknowns at some places, and the info of the last step; the info is None if there was no step.

        Args:
            places: Rows (chain, draw) with the same number of steps from the draw before; at most as many as the shape
                holds.
            num_steps: That number of steps.
            shape: Numbers of groups and of lanes per group.
            rounding: See the function `_follow`.
        """
        if num_steps == 0:
            return self._stored(*(places - [0, 1]).T), None
        padding = np.repeat(places[-1:], math.prod(shape) - len(places), axis=0)
        chain, draw = np.concatenate([places, padding]).T
        group = lambda tree: jax.tree.map(lambda x: x.reshape(*shape, *x.shape[1:]), tree)
        first_step = self.record.first_step + draw * self.record.thinning
        rows = group((chain, first_step, self._stored(chain, draw - 1)))
        numbers = np.asarray(num_steps), np.asarray(rounding)
        found = _follow(self.target, self.kernel, self.keys, *rows, *numbers, moves_states=rounding > 1)
        return jax.tree.map(lambda x: np.asarray(x).reshape(math.prod(x.shape[:2]), *x.shape[2:])[: len(places)], found)

    def _stored(self, chain: np.ndarray, draw: np.ndarray) -> PyTree:
        """Return stored states. Draw -1 is the state before the first draw."""
        record, number = self.record, self.num_draws
        first = record.unknowns if record.first is None else record.first
        wide = lambda mask, rows: mask.reshape(-1, *(1,) * (rows.ndim - 1))

        def leaf(x, first, last):
            rows = x[chain, np.clip(draw, 0, number - 1)]
            if record.first is not None:
                rows = np.where(wide(draw == -1, rows), np.asarray(first)[chain], rows)
            return np.where(wide(draw == number, rows), np.asarray(last)[chain], rows)

        return jax.tree.map(leaf, record.unknowns, first, record.last)

    def _compare(self, places: np.ndarray, new: PyTree, info: Info | None) -> np.ndarray:
        """Return the differences between stored draws and computed ones; shape (n, FIELDS)."""
        chain, draw = places.T
        gaps = np.zeros((len(places), len(FIELDS)))
        gaps[:, 0] = self.gap(self._stored(chain, draw), new)
        kept = draw < self.num_draws  # the last states of the chains have no stored info
        if info is None or not kept.any():
            return gaps
        row = np.minimum(draw, self.num_draws - 1)
        stored: Info = jax.tree.map(lambda x: np.asarray(x)[chain, row], self.record.info)
        gaps[:, 1] = np.where(kept & ((stored.margin > 0) != (info.margin > 0)), np.inf, 0.0)
        for number, gap in enumerate(_info_gaps(stored, info, self.dim)):
            gaps[:, 2 + number] = np.where(kept, gap, 0.0)
        return gaps


@tuned_jit()
def _follow(
    target: Target,
    kernel: Kernel,
    keys: Array,
    chain: Array,
    first_step: Array,
    unknown: PyTree,
    num_steps: Array,
    rounding: Array,
    *,
    moves_states: bool,
) -> tuple[PyTree, Info]:
    """Take ``num_steps`` steps from each of (groups, lanes, ...) states.

    A few lanes are computed in one kernel, as in sequential sampling, which rounds differently from other programs of
    XLA.

    Args:
        target: The target.
        kernel: The kernel.
        keys: Keys of the chains; shape (C,).
        chain: Number of the chain whose noise each lane uses; shape (groups, lanes).
        first_step: Number of the first step of each lane; shape (groups, lanes).
        unknown: States before the first step; shape (groups, lanes, ...).
        num_steps: Number of steps.
        rounding: 0 changes nothing; 1 and -1 resolve near ties upwards and downwards; larger numbers are seeds of
            random roundings, see ``moves_states``.
        moves_states: Whether each near tie is resolved at random by itself, and each state is changed by up to two
            roundings before its step, as another program might.

    Returns:
        The unknown after the last step, and its info.
    """
    arrays = (target, kernel, keys, chain, first_step, unknown, num_steps, rounding)

    # `in_one_kernel` needs all arrays as arguments.
    def follow(target, kernel, keys, chain, first_step, unknown, num_steps, rounding):
        transition = kernel.transition(target)
        none = jnp.zeros((), target.spec.dtype)

        def one(chain: Array, first: Array, x: PyTree) -> tuple[PyTree, Info]:
            def take(state: PyTree, number: Array) -> tuple[PyTree, Info]:
                noise = jax.tree.map(lambda u: u[0], step_noise(kernel, target, keys[chain], (first + number)[None]))
                # Choose how near ties are resolved, and move the state as another rounding would.
                sign = jnp.ones_like(none) if moves_states else rounding.astype(none.dtype)
                words = jnp.stack([rounding, chain]).astype(jnp.uint32), (first + number).astype(jnp.uint32)
                if moves_states:
                    state = transition.restore(_moved(transition.unknown(state), *words))

                def attempt(_: Array, tried: tuple) -> tuple:
                    nudged = kernel.nudge(noise, tried[2])
                    if moves_states:
                        nudged = _either(nudged, kernel.nudge(noise, -tried[2]), *words)
                    new, info = transition.step(state, nudged)
                    new = jax.tree.map(lambda a, b: jnp.asarray(a, jnp.result_type(b)), new, state)
                    return new, info, sign * near_tie_bound(info)

                # The bound of a near tie is known only after the step, so the step is taken twice to resolve ties.
                shapes = jax.eval_shape(lambda: transition.step(state, noise)[1])
                empty = jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), shapes)
                return jax.lax.fori_loop(0, 1 + (rounding != 0), attempt, (state, empty, none))[:2]

            state = transition.restore(x)
            shapes = jax.eval_shape(lambda: take(state, jnp.zeros((), first.dtype))[1])
            empty = jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), shapes)
            step = lambda number, carry: take(carry[0], number)
            state, info = jax.lax.fori_loop(0, num_steps, step, (state, empty))
            return transition.unknown(state), info

        return jax.lax.map(lambda group: jax.vmap(one)(*group), (chain, first_step, unknown))

    return in_one_kernel(follow, *arrays) if chain.shape[1] <= FEW_LANES else follow(*arrays)


def _moved(unknown: PyTree, words: Array, number: Array) -> PyTree:
    """Multiply real numbers by 1 + k eps, with k drawn from -2 to 2."""

    def leaf(place: int, x: Array) -> Array:
        if not is_real(x):
            return x
        bits = _bits(x.shape, words + jnp.uint32(place), number, 1)
        return x * (1 + ((bits >> 8) % 5 - 2.0).astype(x.dtype) * jnp.finfo(x.dtype).eps)

    leaves, structure = jax.tree.flatten(unknown)
    return jax.tree.unflatten(structure, [leaf(place, x) for place, x in enumerate(leaves)])


def _either(one: PyTree, other: PyTree, words: Array, number: Array) -> PyTree:
    """Return a pytree whose entries are taken from either of two at random."""

    def leaf(place: int, a: Array, b: Array) -> Array:
        bits = _bits(a.shape, words + jnp.uint32(place), number, 2**31)  # not those that move states
        return jnp.where(bits >> 31 == 0, a, b)

    leaves, structure = jax.tree.flatten(one)
    pairs = zip(leaves, jax.tree.leaves(other), strict=True)
    return jax.tree.unflatten(structure, [leaf(place, *pair) for place, pair in enumerate(pairs)])


def _bits(shape: tuple[int, ...], words: Array, number: Array, first: int) -> Array:
    """Return random words of 32 bits: hashes of (number, counter), where the counter begins with ``first``."""
    counter = jnp.uint32(first) + jnp.arange(math.prod(shape), dtype=jnp.uint32).reshape(shape)
    return threefry_2x32(words, jnp.full_like(counter, number), counter)[0]


def _spread(x: np.ndarray) -> np.ndarray:
    """Estimate posterior standard deviations robustly, from the interquartile range of the draws.

    If half of the draws are equal, the range of nine in ten is used; if nothing moved, the size of the entry, or 1.
    """
    if not x.size or not is_real(x):
        return np.ones(x.shape[2:])
    rows = x.reshape(-1, *x.shape[2:])
    rows = np.asarray(rows[:: -(-len(rows) // SPREAD_DRAWS)], float)
    low, first, middle, third, high = np.nanquantile(np.where(np.isfinite(rows), rows, np.nan), QUANTILES, axis=0)
    size, eps = np.abs(middle), math.sqrt(float(jnp.finfo(x.dtype).eps))
    spread = np.where(size > 0, size, 1.0)
    # Both ranges are divided by their length for a standard normal distribution. The last one that is not zero counts.
    for found in ((high - low) / 3.29, (third - first) / 1.349):
        spread = np.where(found > eps * size, found, spread)
    return np.where(np.isfinite(spread), spread, 1.0)


def _gap(stored: np.ndarray, new: np.ndarray, scale: np.ndarray) -> np.ndarray:
    """Return the largest difference in units of the scale; shape (n,).

    It is inf where integers differ or an entry is not finite.
    """
    axes = tuple(range(1, stored.ndim))
    if not is_real(stored):
        return np.where(np.all(stored == new, axis=axes), 0.0, np.inf)
    with np.errstate(invalid="ignore", over="ignore"):
        ratio = np.abs(np.asarray(stored, float) - np.asarray(new, float)) / scale
    return np.max(np.where(np.isfinite(ratio), ratio, np.inf), axis=axes, initial=0.0)


def _info_gaps(stored: Info, new: Info, dim: int) -> list[np.ndarray]:
    """Return the differences of all fields of the info, each of shape (n,).

    They are in units in which the info of a step computed again differs as much as its state does in posterior standard
    deviations. Log densities and energies carry rounding errors of their size, and change by about one per standard
    deviation and coordinate. So does log alpha, and with it the margin and the acceptance rate. Counts must be equal.
    """
    finite = lambda x: np.where(np.isfinite(x), np.abs(np.asarray(x, float)), 0.0)
    size = dim + finite(new.logdensity) + (0.0 if new.energy is None else finite(new.energy))
    gaps = []
    for name in Info._fields:
        one, other = getattr(stored, name), getattr(new, name)
        if one is None or other is None:
            gaps.append(np.where(np.full(size.shape, one is other), 0.0, np.inf))
            continue
        if name == "margin":
            one, other = (np.clip(np.asarray(x, float), -WIDE_MARGIN, WIDE_MARGIN) for x in (one, other))
        same = (one == other) | (is_real(one) & (one != one) & (other != other))
        with np.errstate(invalid="ignore", over="ignore"):
            ratio = np.abs(np.asarray(one, float) - np.asarray(other, float)) / size
        gaps.append(np.where(same, 0.0, np.where(np.isfinite(ratio) & is_real(one), ratio, np.inf)))
    return gaps
