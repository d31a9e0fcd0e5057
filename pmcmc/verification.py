"""A chain checked on the equation it claims to solve: every step is taken anew from the draw before it.

Nothing of the solver is used: from the stored draw x[t-1] and the noise u[t], drawn again from the key, the kernel's
step gives f(x[t-1], u[t]), which is held against the stored x[t], and the accept decision against the stored one. A
thinned chain is followed from one kept draw to the next. Where a step does not agree it is taken twice more, with the
decision's near ties resolved upwards and downwards (`Kernel.nudge`): in float32 another program rounds differently, and
both outcomes of a tie are chains of this kernel.
"""

import math
from dataclasses import dataclass
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from pmcmc._jit import tuned_jit
from pmcmc._one_kernel import FEW_LANES, in_one_kernel
from pmcmc._tree import is_real
from pmcmc._types import Array, PRNGKey, PyTree
from pmcmc.kernels import Info, Kernel
from pmcmc.kernels._base import near_tie_bound
from pmcmc.kernels._stream import chain_keys, step_noise
from pmcmc.target import Target

# Draws handed to one call of the program, and taken side by side in it where the kernel tells its margin.
CALL, ABREAST = 8192, 256
# A step taken anew by another program rounds differently: its differences in units of eps and posterior sd.
ROUNDING = 4096


@dataclass(frozen=True)
class Verification:
    """What `Chain.verify` found. True where every draw that could be checked agrees; ``print(it)`` reads as prose.

    num_steps: steps taken anew, over all chains. num_draws: stored draws that they were held against.
    num_mismatched: draws that do not follow from the one before. first_mismatch: (chain, draw) of the first of them;
        a draw number of num_samples is the state where the chain stands. None: there is none.
    num_near_ties: draws that agree only with the other outcome of a decision within rounding of a tie.
    num_unverified: draws whose predecessor is not stored.
    max_difference: largest accepted difference, in posterior standard deviations. tolerance: what it may be.
    max_mismatch: largest difference of those that do not follow; 0 where there is none.
    batch_shape: steps taken side by side. has_margin: whether the kernel tells how near to a tie it decides.

    Example:
        >>> import jax.numpy as jnp, pmcmc
        >>> chain = pmcmc.sample(lambda x: -0.5 * jnp.sum(x**2), jnp.zeros(2), 0, num_samples=100, progress_bar=False)
        >>> found = chain.verify()
        >>> bool(found), found.num_steps, found.first_mismatch
        (True, 400, None)
    """

    num_steps: int
    num_draws: int
    num_mismatched: int
    first_mismatch: tuple[int, int] | None
    num_near_ties: int
    num_unverified: int
    max_difference: float
    tolerance: float
    max_mismatch: float
    batch_shape: int
    has_margin: bool

    def __bool__(self) -> bool:
        return self.num_mismatched == 0

    def __str__(self) -> str:
        agreed = self.num_draws - self.num_mismatched
        said = [
            f"{agreed:,} of {self.num_draws:,} draws follow from the one before, {self.num_steps:,} steps taken anew, "
            f"to within {self.max_difference:.2g} posterior sd (allowed: {self.tolerance:.2g})"
        ]
        if self.num_near_ties:
            said.append(f", {self.num_near_ties:,} of them by the other outcome of a near-tie decision")
        if self.first_mismatch is not None:
            said.append(
                ". The first that does not is draw {1:,} of chain {0}: the draws, the key, the kernel, the model or "
                "its data are not those of the run".format(*self.first_mismatch)
            )
            if 0 < self.max_mismatch < math.sqrt(self.tolerance):
                said.append(
                    f". But no difference is above {self.max_mismatch:.2g}: a density that amplifies rounding, as "
                    "nearly singular matrices do, shows like that; tolerance= says what to allow"
                )
        if not self.has_margin:
            said.append(
                f". The kernel does not tell near ties; steps were taken in the batch shape of the run "
                f"({self.batch_shape} side by side), and in float32 another rounding may show as a mismatch"
            )
        if self.num_unverified:
            said.append(f". {self.num_unverified:,} draws could not be checked: what came before them is not stored")
        return "".join(said) + "."


class Record(NamedTuple):
    """Stored draws and where they come from.

    unknowns, info: (C, n, ...). first: (C, ...) what is known to stand ``thinning`` steps before the first draw, or
    None. last: (C, ...) where the chains stand, ``num_unkept`` steps behind the last draw. first_step: number of the
    step behind what stands before the first draw.
    """

    unknowns: PyTree
    info: Info
    first: PyTree
    last: PyTree
    thinning: int
    num_unkept: int
    first_step: int


def verify(
    target: Target, kernel: Kernel, rng_key: PRNGKey, record: Record, num_blocks: int, tolerance: float | None
) -> Verification:
    """See `Chain.verify`. num_blocks: of the solve, for kernels that must be verified in its batch shape.

    Raises:
        ValueError: there is nothing to check.
    """
    num_chains, num_draws = jax.tree.leaves(record.unknowns)[0].shape[:2]
    if record.first is None and num_draws == 1:
        raise ValueError(
            "a chain of one draw that began at another's end cannot be verified: what came before it is not stored. "
            "Extend it, or verify the chain that it went on from."
        )
    margins = np.asarray(record.info.margin)
    has_margin = not np.isnan(margins).all()
    eps = max(float(jnp.finfo(x.dtype).eps) for x in jax.tree.leaves((record.unknowns, margins)) if is_real(x))
    if tolerance is None:
        tolerance = ROUNDING * eps * record.thinning
    shape = num_chains * num_blocks
    lanes = shape if not has_margin and eps > 1e-8 else max(shape, ABREAST)
    checker = _Checker(target, kernel, chain_keys(rng_key, num_chains=num_chains), record, tolerance)
    skip = int(record.first is None)
    places = np.stack(np.meshgrid(np.arange(num_chains), np.arange(skip, num_draws), indexing="ij"), -1).reshape(-1, 2)
    found = checker.hold(places, record.thinning, lanes, 0)
    tail = np.stack([np.arange(num_chains), np.full(num_chains, num_draws)], -1)
    found = found.join(checker.hold(tail, record.num_unkept, lanes, 0))
    places = np.concatenate([places, tail])
    agrees, ties = found.agrees.copy(), np.zeros(len(places), bool)
    others = [(lanes, -1), (lanes, 1)]
    if not has_margin:  # in order they went in the first of these shapes; the other is another rounding
        others = [(other, 0) for other in (num_chains, ABREAST) if other != lanes]
    for other_lanes, sign in others:
        for steps, own in ((record.thinning, places[:, 1] < num_draws), (record.num_unkept, places[:, 1] == num_draws)):
            left = np.flatnonzero(~agrees & own)
            again = checker.hold(places[left], steps, other_lanes, sign)
            agrees[left] = again.agrees
            ties[left] = again.agrees & has_margin
            found.difference[left] = np.where(again.agrees, again.difference, found.difference[left])
    wrong = np.flatnonzero(~agrees)
    first = wrong[np.lexsort((places[wrong, 0], places[wrong, 1]))[:1]]
    return Verification(
        num_steps=num_chains * ((num_draws - skip) * record.thinning + record.num_unkept),
        num_draws=num_chains * (num_draws - skip),
        num_mismatched=len(wrong),
        first_mismatch=(int(places[first[0], 0]), int(places[first[0], 1])) if len(first) else None,
        num_near_ties=int(ties.sum()),
        num_unverified=num_chains * skip,
        max_difference=float(np.max(found.difference[agrees], initial=0.0)),
        tolerance=tolerance,
        max_mismatch=float(np.max(found.difference[wrong], initial=0.0)),
        batch_shape=lanes,
        has_margin=has_margin,
    )


class _Held(NamedTuple):
    """(n,) arrays of the draws that were held against steps taken anew."""

    agrees: np.ndarray
    difference: np.ndarray

    def join(self, other: "_Held") -> "_Held":
        return _Held(*(np.concatenate(pair) for pair in zip(self, other, strict=True)))


class _Checker:
    """Takes steps anew and compares. Places are rows (chain, draw)."""

    def __init__(self, target: Target, kernel: Kernel, keys: Array, record: Record, tolerance: float):
        self.target, self.kernel, self.keys, self.record, self.tolerance = target, kernel, keys, record, tolerance
        self.scale = jax.tree.map(_spread, record.unknowns)

    def hold(self, places: np.ndarray, num_steps: int, lanes: int, sign: int) -> _Held:
        """Compare the draws at ``places`` with what ``num_steps`` steps make of the states before them."""
        # powers of two, so that what is left for a second look often finds the program of the first
        groups = min(max(1, CALL // lanes), 1 << math.ceil(math.log2(max(1.0, len(places) / lanes))))
        parts = [_Held(np.zeros(0, bool), np.zeros(0))]
        for begin in range(0, len(places), groups * lanes):
            some = places[begin : begin + groups * lanes]
            parts.append(self._compare(some, *self._follow(some, num_steps, (groups, lanes), sign)))
        return _Held(*(np.concatenate(column) for column in zip(*parts, strict=True)))

    def _follow(self, places: np.ndarray, num_steps: int, shape: tuple[int, int], sign: int) -> tuple:
        """Unknowns computed anew and whether the last step was accepted; None where there was no step."""
        if num_steps == 0:
            return self._stored(*(places - [0, 1]).T), None
        padding = np.repeat(places[-1:], math.prod(shape) - len(places), axis=0)
        chain, draw = np.concatenate([places, padding]).T
        group = lambda tree: jax.tree.map(lambda x: x.reshape(*shape, *x.shape[1:]), tree)
        first_step = self.record.first_step + draw * self.record.thinning
        rows = group((chain, first_step, self._stored(chain, draw - 1)))
        found = _follow(self.target, self.kernel, self.keys, *rows, np.asarray(num_steps), np.asarray(sign))
        return jax.tree.map(lambda x: np.asarray(x).reshape(-1, *x.shape[2:])[: len(places)], found)

    def _stored(self, chain: np.ndarray, draw: np.ndarray) -> PyTree:
        """Draw -1 is what stands before the first, and the number of draws stands for the state of the chain."""
        record, number = self.record, self.record.info.margin.shape[1]
        first = record.unknowns if record.first is None else record.first
        wide = lambda mask, rows: mask.reshape(-1, *(1,) * (rows.ndim - 1))

        def leaf(x, first, last):
            rows = x[chain, np.clip(draw, 0, number - 1)]
            if record.first is not None:
                rows = np.where(wide(draw == -1, rows), np.asarray(first)[chain], rows)
            return np.where(wide(draw == number, rows), np.asarray(last)[chain], rows)

        return jax.tree.map(leaf, record.unknowns, first, record.last)

    def _compare(self, places: np.ndarray, new: PyTree, accepted: np.ndarray | None) -> _Held:
        chain, draw = places.T
        stored, margin = self._stored(chain, draw), np.asarray(self.record.info.margin)
        gaps = jax.tree.leaves(jax.tree.map(_gap, stored, new, self.scale))
        difference = np.max(np.stack(gaps), axis=0)
        agrees = difference <= self.tolerance
        kept = draw < margin.shape[1]  # of other steps no decision is stored
        if accepted is not None:
            agrees &= ~kept | ((margin[chain, np.minimum(draw, margin.shape[1] - 1)] > 0) == accepted)
        return _Held(agrees, difference)


@tuned_jit()
def _follow(
    target: Target,
    kernel: Kernel,
    keys: Array,
    chain: Array,
    first_step: Array,
    unknown: PyTree,
    num_steps: Array,
    sign: Array,
) -> tuple[PyTree, Array]:
    """The unknown after ``num_steps`` steps from each of (groups, lanes, ...), and whether the last was accepted.

    chain, first_step: (groups, lanes), whose noise is drawn. sign: which way near ties are resolved; 0: as they come.
    Few lanes go in one kernel, as sampling in order does, which rounds differently from XLA's other programs.
    """
    arrays = (target, kernel, keys, chain, first_step, unknown, num_steps, sign)

    # of all arrays, as in_one_kernel wants it
    def follow(target, kernel, keys, chain, first_step, unknown, num_steps, sign):
        transition = kernel.transition(target)

        def one(chain: Array, first: Array, x: PyTree) -> tuple[PyTree, Array]:
            def step(number: Array, carry: tuple) -> tuple:
                state, _ = carry
                noise = jax.tree.map(lambda u: u[0], step_noise(kernel, target, keys[chain], (first + number)[None]))

                def attempt(_: Array, tried: tuple) -> tuple:
                    new, info = transition.step(state, kernel.nudge(noise, tried[2]))
                    new = jax.tree.map(lambda a, b: jnp.asarray(a, jnp.result_type(b)), new, state)
                    return new, info.margin > 0, sign * near_tie_bound(info)

                # the bound is known only once the step was taken, so where ties are resolved it is taken twice
                none = jnp.zeros((), target.spec.dtype)
                new, accepted, _ = jax.lax.fori_loop(0, 1 + (sign != 0), attempt, (state, jnp.array(False), none))
                return new, accepted

            state, accepted = jax.lax.fori_loop(0, num_steps, step, (transition.restore(x), jnp.array(False)))
            return transition.unknown(state), accepted

        return jax.lax.map(lambda group: jax.vmap(one)(*group), (chain, first_step, unknown))

    return in_one_kernel(follow, *arrays) if chain.shape[1] <= FEW_LANES else follow(*arrays)


def _spread(x: np.ndarray) -> np.ndarray:
    """Standard deviation over the draws; where nothing moved the size of the entry, or 1."""
    if not is_real(x):
        return np.ones(x.shape[2:])
    spread, size = np.std(x, axis=(0, 1), dtype=float), np.max(np.abs(x), axis=(0, 1), initial=0.0)
    still = ~(spread > math.sqrt(float(jnp.finfo(x.dtype).eps)) * size)
    return np.where(still, np.where(size > 0, size, 1.0), spread)


def _gap(stored: np.ndarray, new: np.ndarray, scale: np.ndarray) -> np.ndarray:
    """(n,) largest difference in units of scale; inf where integers differ, or anything is not finite."""
    axes = tuple(range(1, stored.ndim))
    if not is_real(stored):
        return np.where(np.all(stored == new, axis=axes), 0.0, np.inf)
    with np.errstate(invalid="ignore", over="ignore"):
        ratio = np.abs(np.asarray(stored, float) - np.asarray(new, float)) / scale
    return np.max(np.where(np.isfinite(ratio), ratio, np.inf), axis=axes, initial=0.0)
