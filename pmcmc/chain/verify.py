"""Check a chain against the equation that it should satisfy: every step is computed again from the draw before it.

`verify` implements `Chain.verify` and returns a `Verification`. The solver is not involved. From the stored draw x[t-1]
and the noise u[t], which is drawn again from the key, the kernel's step gives f(x[t-1], u[t]). This is compared with
the stored x[t], and the info of the step with the stored `Info`. A thinned chain is followed from one kept draw to the
next, and must arrive within the tolerance of one step: a chain that contracts forgets rounding errors as fast as they
arise.

Another program rounds differently, and may decide a step within rounding of a tie differently. If a draw does not
agree, its steps are computed again under other roundings: both outcomes (`Kernel.nudge`) for a single step with a
margin, and unless that step makes one decision only, several times with each tie resolved at random and with states
changed by rounding. The draw must agree with one of them to within the tolerance, or to within `GROWTH` times the
distance of these paths from each other. If that is more than `MOST`, rounding alone determines where the steps end. A
draw that none of them reaches to within the tolerance is then undecided. `pmcmc.chain.replay` computes the steps.
"""

import math
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np

from pmcmc._pytree import PRNGKey, is_real
from pmcmc.chain.replay import ABREAST, FIELDS, Checker, Look, Record
from pmcmc.kernels import Kernel
from pmcmc.random.streams import chain_keys
from pmcmc.target import Target

# Default tolerance in units of eps and posterior sd: another program that computes the same step rounds differently.
ROUNDING = 4096
# Largest default tolerance. In half precision rounding alone reaches several standard deviations.
MOST_TOL = 0.1


@dataclass(frozen=True)
class Verification:
    """Result of `Chain.verify`. It is true if every draw that has a predecessor agrees; ``print`` shows it as prose.

    Attributes:
        num_steps: Number of steps computed again, over all chains.
        num_draws: Number of stored draws with which they were compared.
        num_agreed: Number of these draws that follow from the one before.
        num_mismatched: Number of draws, and of last states of chains, that do not follow from the draw before.
        num_mismatched_ends: Number of last states among these.
        first_mismatch: (chain, draw) of the first of them; a draw number of num_samples means the last state of the
            chain. None if all follow.
        mismatched_fields: What differs at any of them: "state", "decision" (accepted or not), and names of `Info`.
        num_undecided: Number of draws and last states that cannot be judged, because rounding alone determines where
            the steps before them end. A chain that has any is not verified.
        first_undecided: (chain, draw) of the first of them, as in ``first_mismatch``.
        num_near_ties: Number of draws that agree only under another rounding, that is with the other outcome of a
            decision near a tie.
        num_unverified: Number of draws whose predecessor is not stored.
        max_difference: Largest accepted difference, in posterior standard deviations.
        tol: Largest difference allowed. More is allowed, up to 0.01, only where rounding is seen to grow to as
            much between two draws.
        max_mismatch: Largest difference of the draws that do not follow; 0 if all follow.
        batch_shape: Number of lanes on which steps were computed side by side.
        has_margin: Whether the kernel reports how close its decisions are to a tie.

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
    tol: float
    max_mismatch: float
    batch_shape: int
    has_margin: bool

    def __bool__(self) -> bool:
        return self.num_mismatched == 0 and self.num_undecided == 0

    def __str__(self) -> str:
        said = [
            f"{self.num_agreed:,} of {self.num_draws:,} draws follow from the one before, {self.num_steps:,} steps "
            f"computed again, to within {self.max_difference:.2g} posterior sd (allowed: {self.tol:.2g}"
            f"{', and what rounding grows to between two draws' if self.max_difference > self.tol else ''})"
        ]
        if self.num_near_ties:
            said.append(f", {self.num_near_ties:,} of them by the other outcome of a near-tie decision")
        said.append(self._mismatches())
        if self.first_undecided is not None:
            said.append(
                ". {2:,} draws are undecided, the first of them draw {1:,} of chain {0}: the steps before them end "
                "elsewhere under another rounding. Sample in float64, or keep more draws (thinning=)".format(
                    *self.first_undecided, self.num_undecided
                )
            )
        if not self.has_margin:
            said.append(
                f". The kernel does not report near ties; steps were taken {self.batch_shape} side by side, and in "
                "float32 another rounding may show as a mismatch"
            )
        if self.num_unverified:
            said.append(f". {self.num_unverified:,} draws could not be checked: their predecessors are not stored")
        return "".join(said) + "."

    def _mismatches(self) -> str:
        """Return the sentences on draws that do not follow; "" if all do."""
        if self.first_mismatch is None:
            return ""
        chain, draw = self.first_mismatch
        first = f"The first that does not is draw {draw:,} of chain {chain}"
        if self.num_mismatched == self.num_mismatched_ends:
            first = f"But the last state of chain {chain} does not follow from its last draw"
        said = (
            f". {first}: the draws, the key, the kernel, the model or its data are not those of the run "
            f"(differing: {', '.join(self.mismatched_fields)})"
        )
        if 0 < self.max_mismatch < math.sqrt(self.tol):
            said += (
                f". But no difference is above {self.max_mismatch:.2g}: a density that amplifies rounding, as "
                "nearly singular matrices do, looks like this; tol= sets what to allow"
            )
        return said


def _default_tolerance(eps: float) -> float:
    """Return the default tolerance for states of this relative precision."""
    if ROUNDING * eps > MOST_TOL:
        raise ValueError(
            f"states of {eps:.1g} relative precision cannot be verified: rounding may change them by "
            f"{ROUNDING * eps:.1g} posterior standard deviations. Sample in float32, or say by tol= what to allow."
        )
    return ROUNDING * eps


def verify(
    target: Target, kernel: Kernel, rng_key: PRNGKey, record: Record, num_blocks: int, tol: float | None
) -> Verification:
    """Check stored draws; see `Chain.verify`.

    Args:
        target: The target.
        kernel: The kernel.
        rng_key: Key of the noise.
        record: The stored draws.
        num_blocks: Number of blocks of the last solve, for kernels that must be verified in its batch shape.
        tol: Largest difference, in posterior standard deviations; None for the default.

    Raises:
        ValueError: There is nothing to check, or the states are in half precision and no tolerance is given.
    """
    num_chains, num_draws = jax.tree.leaves(record.unknowns)[0].shape[:2]
    if record.first is None and num_draws == 1:
        raise ValueError(
            "a chain of one draw that began at another's end cannot be verified: its predecessor is not stored. "
            "Extend it, or verify the chain that it continues."
        )
    # Choose the tolerance, and the number of lanes that are computed side by side.
    margins = np.asarray(record.info.margin)
    has_margin = not np.isnan(margins).all()
    eps = max(float(jnp.finfo(x.dtype).eps) for x in jax.tree.leaves((record.unknowns, margins)) if is_real(x))
    tol = _default_tolerance(eps) if tol is None else tol
    shape = num_chains * num_blocks
    abreast = min(ABREAST, 1 << max(0, num_chains * num_draws - 1).bit_length())
    lanes = shape if not has_margin and eps > 1e-8 else max(shape, abreast)
    checker = Checker(target, kernel, chain_keys(rng_key, num_chains=num_chains), record, tol)
    # First look: all draws that have a predecessor, and the last states.
    skip = int(record.first is None)
    places = np.stack(np.meshgrid(np.arange(num_chains), np.arange(skip, num_draws), indexing="ij"), -1).reshape(-1, 2)
    places = np.concatenate([places, np.stack([np.arange(num_chains), np.full(num_chains, num_draws)], -1)])
    look = Look(checker, places, checker.hold(places, lanes, 0))
    steps = checker.num_steps(places)
    # Second look, at draws that do not agree. For a single step with one decision, the two outcomes of its tie are all
    # that rounding can change. Steps of a kernel without margin are computed in other batch shapes.
    settled = (steps == 1) & has_margin & kernel.decides_once
    if has_margin:
        ties = look.again(steps == 1, lanes, -1) | look.again(steps == 1, lanes, 1)
    else:
        ties = np.zeros(len(places), bool)
        for other in (num_chains, ABREAST) if eps > 1e-8 else ():
            if other != lanes:  # sequential sampling used the first of these shapes; the second rounds differently
                look.again(steps > 0, other, 0)
    # Third look: several other roundings, for everything else.
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
        mismatched_fields=tuple(np.array(FIELDS)[(held.gaps[wrong] > tol).any(axis=0)].tolist()),
        num_undecided=int(undecided.sum()),
        first_undecided=_earliest(places[undecided]),
        num_near_ties=int((ties | changed).sum()) if has_margin else 0,
        num_unverified=num_chains * skip,
        max_difference=float(np.max(held.difference[held.agrees], initial=0.0)),
        tol=tol,
        max_mismatch=float(np.max(held.difference[wrong], initial=0.0)),
        batch_shape=lanes,
        has_margin=has_margin,
    )


def _earliest(places: np.ndarray) -> tuple[int, int] | None:
    """Return (chain, draw) of the place with the smallest draw number; None if there are no places."""
    if not len(places):
        return None
    chain, draw = places[np.lexsort((places[:, 0], places[:, 1]))[0]].tolist()
    return chain, draw
