"""Is a pilot of coupled chains evidence at all? Chains that stand still or blow up say nothing of merging."""

import numpy as np

from pmcmc.stability._coalescence import Coalescence


class PilotError(RuntimeError):
    """A pilot of coupled chains that proves nothing: chains did not move, or a state is NaN or infinite.

    Not a pilot whose chains move and do not merge: that is a finding, and the remedy is to sample sequentially.
    """


def check_pilot(pilot: Coalescence) -> None:
    """Raise unless the chains of a pilot moved and stayed finite.

    Distances of zero between chains that stand still are no contraction. A kernel that always accepts can contract to
    a point and stand still there: movement over the last quarter of the run must exceed the regime of small distances,
    ``sqrt(tol)`` in units of the scale.

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
    num_steps = int(pilot.num_steps)
    finite = np.asarray(pilot.finite)
    if not finite.all():
        raise PilotError(
            f"{(~finite).sum()} of {finite.size} coupled pairs of chains reached a state that is NaN or infinite "
            f"within {num_steps} steps. Check the kernel and the log density there, or lower the step size."
        )
    movement = np.asarray(pilot.movement)[:num_steps]
    if not (movement > 0).any():
        raise PilotError(
            f"no chain moved in the {num_steps} steps of the pilot, so nothing is known of how chains merge. Lower the "
            "step size or run a longer warm-up; if every proposal diverges, check the model."
        )
    still = np.asarray(pilot.dimension_movement) == 0  # NaN: a discrete one, which may well keep its value
    if still.any():
        raise PilotError(
            f"coordinate(s) {', '.join(map(str, np.flatnonzero(still)[:8]))} of the state never moved in the "
            f"{num_steps} steps of the pilot. Check that the kernel updates them."
        )
    late = float(movement[(3 * num_steps) // 4 :].mean())
    if not late > np.sqrt(float(pilot.tol)):
        raise PilotError(
            f"the chains of the pilot came to rest: they moved {late:.1e} posterior scales a step at its end. They "
            "contract to a point instead of sampling; check that the kernel reads its noise."
        )
    merged_standing = np.asarray(pilot.merged) & ~(movement > 0).any(axis=(0, 1))
    if merged_standing.any():
        raise PilotError(
            f"{merged_standing.sum()} of {finite.size} coupled pairs counted as merged without a move: their starts "
            "coincide. Start the pilot from different states."
        )
