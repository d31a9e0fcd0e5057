"""A chain checked on the equation it claims to solve: every step is taken anew from the draw before it.

Nothing of the solver is used: from the stored draw x[t-1] and the noise u[t], drawn again from the key, the kernel's
step gives f(x[t-1], u[t]), which is held against the stored x[t], and what the step says of itself against the stored
`Info`. A thinned chain is followed from one kept draw to the next, and must arrive within the tolerance of one step:
on a chain that contracts rounding is forgotten as fast as it comes.

Another program rounds differently, and a step within rounding of a tie may then be decided otherwise. Where a draw does
not agree, its steps are taken again under other roundings: of a single step with a margin both outcomes
(`Kernel.nudge`), else several times with ties resolved at random and with states moved by rounding (`_follow`). The
draw must agree with one of them, to within the tolerance or `GROWTH` times the distance of these paths from each
other. Where that is more than `MOST`, rounding alone says where these steps end, and nothing can be said of a draw that
none of them reaches to within the tolerance.
"""

import math
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np

from pmcmc._pytree import is_real
from pmcmc._typing import PRNGKey
from pmcmc.chain.replay import ABREAST, FIELDS, Checker, Look, Record
from pmcmc.kernels import Kernel
from pmcmc.random.streams import chain_keys
from pmcmc.target import Target

# A step taken anew by another program rounds differently: its differences in units of eps and posterior sd.
ROUNDING = 4096


@dataclass(frozen=True)
class Verification:
    """What `Chain.verify` found. True where every draw that has a predecessor agrees; ``print(it)`` reads as prose.

    num_steps: steps taken anew, over all chains. num_draws: stored draws that they were held against.
    num_agreed: of these draws, those that follow from the one before.
    num_mismatched: draws, and states where chains stand, that do not follow from the one before.
    num_mismatched_ends: of these the latter.
    first_mismatch: (chain, draw) of the first of them; a draw number of num_samples is the state where the chain
        stands. None: there is none.
    mismatched_fields: what differs at any of them: "state", "decision" (accepted or not), and names of `Info`.
    num_undecided: draws and states of which nothing can be said, because rounding alone decides where the steps before
        them end; a chain that has any is not verified. first_undecided: as first_mismatch.
    num_near_ties: draws that agree only under another rounding: with the other outcome of a decision near a tie.
    num_unverified: draws whose predecessor is not stored.
    max_difference: largest accepted difference, in posterior standard deviations. tolerance: what it may be; more, up
        to 0.01, only where rounding is seen to grow to as much between two draws.
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
    num_agreed: int
    num_mismatched: int
    num_mismatched_ends: int
    first_mismatch: tuple[int, int] | None
    mismatched_fields: tuple[str, ...]
    num_undecided: int
    first_undecided: tuple[int, int] | None
    num_near_ties: int
    num_unverified: int
    max_difference: float
    tolerance: float
    max_mismatch: float
    batch_shape: int
    has_margin: bool

    def __bool__(self) -> bool:
        return self.num_mismatched == 0 and self.num_undecided == 0

    def __str__(self) -> str:
        said = [
            f"{self.num_agreed:,} of {self.num_draws:,} draws follow from the one before, {self.num_steps:,} steps "
            f"taken anew, to within {self.max_difference:.2g} posterior sd (allowed: {self.tolerance:.2g}"
            f"{', and what rounding grows to between two draws' if self.max_difference > self.tolerance else ''})"
        ]
        if self.num_near_ties:
            said.append(f", {self.num_near_ties:,} of them by the other outcome of a near-tie decision")
        said.append(self._mismatches())
        if self.first_undecided is not None:
            said.append(
                ". Of {2:,} draws, draw {1:,} of chain {0} first, nothing can be said: the steps before them end "
                "elsewhere under another rounding. Sample in float64, or keep more draws (thinning=)".format(
                    *self.first_undecided, self.num_undecided
                )
            )
        if not self.has_margin:
            said.append(
                f". The kernel does not tell near ties; steps were taken in the batch shape of the run "
                f"({self.batch_shape} side by side), and in float32 another rounding may show as a mismatch"
            )
        if self.num_unverified:
            said.append(f". {self.num_unverified:,} draws could not be checked: what came before them is not stored")
        return "".join(said) + "."

    def _mismatches(self) -> str:
        if self.first_mismatch is None:
            return ""
        chain, draw = self.first_mismatch
        first = f"The first that does not is draw {draw:,} of chain {chain}"
        if self.num_mismatched == self.num_mismatched_ends:
            first = f"But the state where chain {chain} stands does not follow from its last draw"
        said = (
            f". {first}: the draws, the key, the kernel, the model or its data are not those of the run "
            f"(differing: {', '.join(self.mismatched_fields)})"
        )
        if 0 < self.max_mismatch < math.sqrt(self.tolerance):
            said += (
                f". But no difference is above {self.max_mismatch:.2g}: a density that amplifies rounding, as "
                "nearly singular matrices do, shows like that; tolerance= says what to allow"
            )
        return said


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
    tolerance = ROUNDING * eps if tolerance is None else tolerance
    shape = num_chains * num_blocks
    abreast = min(ABREAST, 1 << max(0, num_chains * num_draws - 1).bit_length())
    lanes = shape if not has_margin and eps > 1e-8 else max(shape, abreast)
    checker = Checker(target, kernel, chain_keys(rng_key, num_chains=num_chains), record, tolerance)
    skip = int(record.first is None)
    places = np.stack(np.meshgrid(np.arange(num_chains), np.arange(skip, num_draws), indexing="ij"), -1).reshape(-1, 2)
    places = np.concatenate([places, np.stack([np.arange(num_chains), np.full(num_chains, num_draws)], -1)])
    look = Look(checker, places, checker.hold(places, lanes, 0))
    steps = checker.num_steps(places)
    settled = (steps == 1) & has_margin  # both outcomes of its tie are all that rounding can do
    if has_margin:
        ties = look.again(settled, lanes, -1) | look.again(settled, lanes, 1)
    else:
        ties = np.zeros(len(places), bool)
        for other in (num_chains, ABREAST) if eps > 1e-8 else ():
            if other != lanes:  # in order they went in the first of these shapes; the other is another rounding
                look.again(steps > 0, other, 0)
    changed, undecided = look.under_other_roundings((steps > 0) & ~settled, lanes)
    held, ends = look.held, places[:, 1] == num_draws
    wrong = ~held.agrees & ~undecided
    return Verification(
        num_steps=num_chains * ((num_draws - skip) * record.thinning + record.num_unkept),
        num_draws=num_chains * (num_draws - skip),
        num_agreed=int((held.agrees & ~ends).sum()),
        num_mismatched=int(wrong.sum()),
        num_mismatched_ends=int((wrong & ends).sum()),
        first_mismatch=_earliest(places[wrong]),
        mismatched_fields=tuple(np.array(FIELDS)[(held.gaps[wrong] > tolerance).any(axis=0)].tolist()),
        num_undecided=int(undecided.sum()),
        first_undecided=_earliest(places[undecided]),
        num_near_ties=int((ties | changed).sum()) if has_margin else 0,
        num_unverified=num_chains * skip,
        max_difference=float(np.max(held.difference[held.agrees], initial=0.0)),
        tolerance=tolerance,
        max_mismatch=float(np.max(held.difference[wrong], initial=0.0)),
        batch_shape=lanes,
        has_margin=has_margin,
    )


def _earliest(places: np.ndarray) -> tuple[int, int] | None:
    if not len(places):
        return None
    chain, draw = places[np.lexsort((places[:, 0], places[:, 1]))[0]].tolist()
    return chain, draw
