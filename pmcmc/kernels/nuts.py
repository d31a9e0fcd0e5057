"""The No-U-Turn sampler.

`NUTS` doubles a leapfrog trajectory of ``H(x, p) = -log p(x) + p^T M^{-1} p / 2``, forwards or backwards at random,
until it turns back on itself, and draws the new state from the trajectory with weights exp(-H). A transition is a loop
over the state machine of `pmcmc.kernels.nuts_tree`, one leapfrog step at a time. A batch of lanes advances together,
and solvers may let lanes go on to their next transition without waiting for the others (`NUTS.stages`).

Source: Hoffman & Gelman (2014); Betancourt (2017); Phan et al. (2019).
"""

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar, NamedTuple

import jax
import jax.numpy as jnp

from pmcmc._arguments import as_int
from pmcmc._pytree import Array, ArrayLeaf, PyTree, Scalar, register_dataclass
from pmcmc.kernels import nuts_tree as machine
from pmcmc.kernels.base import Info, check_step_size
from pmcmc.kernels.hmc import HMC
from pmcmc.kernels.metropolis import GradientKernel, GradientState
from pmcmc.random.distributions import jax_normals
from pmcmc.random.streams import fold_in, key_pair
from pmcmc.recurrence.abreast import map_lanes
from pmcmc.recurrence.problem import Staged
from pmcmc.target import Target

# Least time of the trajectories of HMC on which the step size is tuned; they take up to a step longer.
TUNING_LENGTH = 0.9


class NUTSNoise(NamedTuple):
    """Randomness of one NUTS transition.

    Attributes:
        momentum: Standard normal that the metric turns into a momentum; shape (D,).
        key: Raw key for the randomness along the trajectory; shape (2,).
    """

    momentum: Array
    key: Array


@register_dataclass
@dataclass(frozen=True)
class NUTS(GradientKernel):
    """Multinomial No-U-Turn sampler.

    A leapfrog trajectory of ``H(x, p) = -log p(x) + p^T M^{-1} p / 2`` is doubled until it turns back on itself. Given
    the same keys, every step equals that of ``blackjax.nuts`` (1.7).

    In addition to the extra fields of gradient kernels there are ``energy``, ``num_steps`` and ``tree_depth``.
    ``accept_prob`` is the mean over the trajectory. `Info.margin` is NaN, since a transition makes many decisions, so
    near ties are not counted.

    Args:
        step_size: Leapfrog step, in units of the metric. None: tuned by warm-up to an acceptance rate of 0.8, as for
            HMC.
        max_num_doublings: Depth of the deepest tree, which has ``2^max_num_doublings - 1`` leapfrog steps; NumPyro's
            ``max_tree_depth``.
        inverse_mass_matrix: As in `HMC`: M^{-1}, about the posterior's (co)variance; shape (D,) or (D, D). None: the
            identity, which suits the whitened coordinates of warm-up.

    Raises:
        ValueError: ``step_size`` is not positive, or ``max_num_doublings`` is below 1.
        TypeError: ``max_num_doublings`` is not an integer.

    Source: Hoffman & Gelman (2014); multinomial and iterative as in Betancourt (2017) and Phan et al. (2019).

    Example:
        >>> import pmcmc
        >>> pmcmc.NUTS(step_size=0.5).max_num_doublings
        10
    """

    extra_fields: ClassVar[tuple[str, ...]] = (*GradientKernel.extra_fields, "energy", "num_steps", "tree_depth")

    step_size: Scalar | None = None
    max_num_doublings: int = field(default=10, metadata=dict(static=True))
    inverse_mass_matrix: ArrayLeaf | None = None

    def __post_init__(self):
        check_step_size(self.step_size)
        object.__setattr__(self, "max_num_doublings", as_int("max_num_doublings", self.max_num_doublings, 1))

    def sample_noise(self, rng_key, target):
        momentum, trajectory = (fold_in(key_pair(rng_key), jnp.asarray(i)) for i in range(2))
        return NUTSNoise(jax_normals(momentum, target.dim, target.spec.dtype), trajectory)

    def tuned_by(self):
        # The program of NUTS takes several times as long to compile, and exploration has compiled that of HMC. Errors
        # of the energy are largest a quarter of a period (1.57) after the start and vanish after half a period. NUTS
        # averages over both, and accepts about as much as trajectories of 0.9 to 0.9 and a step (decision 029).
        return HMC(step_size=self.step_size, trajectory_length=TUNING_LENGTH)

    def step(self, target, state: GradientState, noise: NUTSNoise) -> tuple[GradientState, Info]:
        leaves, treedef = jax.tree.flatten((target, self, state, noise))
        return _step_of(treedef)(*leaves)

    def step_alone(self, target: Target, state: GradientState, noise: NUTSNoise) -> tuple[GradientState, Info]:
        """Take one step by a loop over a single transition."""
        advance = lambda tree: self._advance(target.value_and_grad, tree)
        return self._conclude(jax.lax.while_loop(lambda tree: ~tree.finished, advance, self._begin(state, noise)))

    def stages(self, target: Target) -> Staged:
        """Return `step` in stages for a batch of lanes, so that lanes need not wait for each other's trees."""
        value_and_grad = lambda x: map_lanes(target.value_and_grad, (-1,), x.shape[-1])(x)
        return Staged(
            begin=lambda state, noise: self._begin(*_lanes_last((state, noise))),
            advance=lambda tree: self._advance(value_and_grad, tree),
            finished=lambda tree: tree.finished,
            conclude=lambda tree: _lanes_first(self._conclude(tree)),
        )

    def transition(self, target):
        return replace(super().transition(target), staged=self.stages(target))

    def _begin(self, state: GradientState, noise: NUTSNoise) -> machine.Tree:
        return machine.begin(self._velocity, state, self._momentum(noise.momentum), noise.key, self.max_num_doublings)

    def _advance(self, value_and_grad, tree: machine.Tree) -> machine.Tree:
        step_size = jnp.asarray(self.step_size, tree.energy.dtype)
        return machine.advance(value_and_grad, self._velocity, step_size, self.max_num_doublings, tree)

    def _conclude(self, tree: machine.Tree) -> tuple[GradientState, Info]:
        new = tree.draw.state
        return new, Info(
            acceptance_rate=tree.acceptance / tree.num_steps,
            is_divergent=tree.is_divergent,
            margin=jnp.full_like(tree.energy, jnp.nan),
            logdensity=new.logdensity,
            energy=tree.draw.energy,
            num_integration_steps=tree.num_steps,
            tree_depth=tree.depth,
        )


def _step_of(treedef: Any) -> Callable:
    """Return ``step`` as a function of the leaves of (target, kernel, state, noise), with its own rule for `jax.vmap`.

    It takes leaves because jax 0.10 cannot differentiate a custom_vmap whose arguments contain None.
    """

    def alone(*leaves: ArrayLeaf) -> tuple[GradientState, Info]:
        """Take one step of one lane."""
        target, kernel, state, noise = jax.tree.unflatten(treedef, leaves)
        return kernel.step_alone(target, state, noise)

    def lanes(axis_size: int, in_batched: Any, *leaves: ArrayLeaf) -> Any:
        """Take one step of all lanes, in one loop that ends when the deepest tree is complete.

        Lanes are on the last axis. The batched loop that `jax.vmap` makes of `alone` is several times slower; it is
        used only if lanes differ in their target or kernel, such as in data or step sizes.
        """
        if not any(in_batched):  # only tangents are mapped
            out = alone(*leaves)
            return out, jax.tree.map(lambda _: False, out)
        target, kernel, _, _ = jax.tree.unflatten(treedef, in_batched)
        if any(jax.tree.leaves((target, kernel))):
            axes = [0 if batched else None for batched in in_batched]
            out = jax.vmap(alone, axes, axis_size=axis_size)(*leaves)
        else:
            target, kernel, _, _ = jax.tree.unflatten(treedef, leaves)
            widen = lambda x, batched: x if batched else jnp.broadcast_to(x, (axis_size, *jnp.shape(x)))
            wide = [widen(x, batched) for x, batched in zip(leaves, in_batched, strict=True)]
            _, _, state, noise = jax.tree.unflatten(treedef, wide)
            stages = kernel.stages(target)
            some_left = lambda work: jnp.any(~stages.finished(work))
            out = stages.conclude(jax.lax.while_loop(some_left, stages.advance, stages.begin(state, noise)))
        return out, jax.tree.map(lambda _: True, out)

    step = jax.custom_batching.custom_vmap(alone)
    step.def_vmap(lanes)
    return step


def _lanes_last(tree: PyTree) -> PyTree:
    """Move the lanes from the first to the last axis of every leaf."""
    return jax.tree.map(lambda x: jnp.moveaxis(x, 0, -1), tree)


def _lanes_first(tree: PyTree) -> PyTree:
    """Move the lanes from the last to the first axis of every leaf."""
    return jax.tree.map(lambda x: jnp.moveaxis(x, -1, 0), tree)
