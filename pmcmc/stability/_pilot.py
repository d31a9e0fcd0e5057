"""Is a pilot of coupled chains evidence at all? Chains that stand still or blow up say nothing of merging."""

import numpy as np

from pmcmc.stability._coalescence import Coalescence


class PilotError(RuntimeError):
    """A pilot of coupled chains that proves nothing: chains hardly moved, or a state is NaN or infinite.

    Not a pilot whose chains move and do not merge: that is a finding, and the remedy is to sample sequentially.
    Raised by `check_pilot` alone: ``solver="auto"`` samples in order after such a pilot, and its report says why.
    """


def check_pilot(pilot: Coalescence) -> None:
    """Raise unless the chains of a pilot moved and stayed finite.

    Distances of zero between chains that stand still are no contraction. A kernel that always accepts can contract to
    a point and stand still there: movement over the last quarter of the run must exceed the regime of small distances,
    ``sqrt(tol)`` in units of the scale. A valid kernel that moves less than that a step is sampled all the same; its
    pilot just cannot tell.

    pilot: from `coalescence_time`, outside jit.

    Raises:
        PilotError: with what was seen and a remedy.

    Example:
        >>> import jax.numpy as jnp, pmcmc
        >>> still = pmcmc.stability.coalescence_time(
        ...     lambda x, u: x, jnp.zeros(2), jnp.ones(2), jnp.zeros((50, 2)), scale=1.0)
        >>> pmcmc.stability.check_pilot(still)
        Traceback (most recent call last):
        pmcmc.stability._pilot.PilotError: no chain moved in the 50 steps of the pilot...
    """
    if fault := pilot_fault(pilot):
        raise PilotError(fault)


def pilot_fault(pilot: Coalescence) -> str:
    """Why a pilot proves nothing, what was seen and a remedy; "" where it is evidence. See `check_pilot`."""
    num_steps = int(pilot.num_steps)
    finite = np.asarray(pilot.finite)
    if not finite.all():
        return (
            f"{(~finite).sum()} of {finite.size} coupled pairs of chains reached a state that is NaN or infinite "
            f"within {num_steps} steps. Check the kernel and the log density there, or lower the step size."
        )
    movement = np.asarray(pilot.movement)[:num_steps]
    if not (movement > 0).any():
        return (
            f"no chain moved in the {num_steps} steps of the pilot, so nothing is known of how chains merge. Lower the "
            "step size or run a longer warm-up; if every proposal diverges, check the model."
        )
    still = np.asarray(pilot.dimension_movement) == 0  # NaN: a discrete one, which may well keep its value
    if still.any():
        return (
            f"coordinate(s) {', '.join(map(str, np.flatnonzero(still)[:8]))} of the state never moved in the "
            f"{num_steps} steps of the pilot. Check that the kernel updates them."
        )
    quarter = max(1, num_steps // 4)
    early, late = float(movement[:quarter].mean()), float(movement[-quarter:].mean())
    if not late > np.sqrt(float(pilot.tol)):
        return (
            f"chains move {late:.1e} posterior sd a step at the end of the pilot ({early:.1e} at its beginning), too "
            "little to tell a kernel that moves slowly from one that comes to rest at a point. Take larger steps or "
            "longer trajectories; of a kernel of your own, check that it reads its noise."
        )
    merged_standing = np.asarray(pilot.merged) & ~(movement > 0).any(axis=(0, 1))
    if merged_standing.any():
        return (
            f"{merged_standing.sum()} of {finite.size} coupled pairs counted as merged without a move: their starts "
            "coincide. Start the pilot from different states, as a longer warm-up leaves them."
        )
    return ""
