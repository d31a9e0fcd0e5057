"""The No-U-Turn sampler."""

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import cache
from typing import Any, ClassVar, NamedTuple

import jax
import jax.numpy as jnp

from pmcmc._pytree import register_dataclass
from pmcmc._typing import Array, ArrayLeaf, PyTree, Scalar
from pmcmc.kernels import nuts_tree as machine
from pmcmc.kernels.base import Info
from pmcmc.kernels.metropolis import GradientKernel, GradientState
from pmcmc.random.distributions import jax_normals
from pmcmc.random.threefry import fold_in, key_pair
from pmcmc.recurrence import Staged
from pmcmc.target import Target


class NUTSNoise(NamedTuple):
    """momentum: (D,) standard normal. key: (2,) words, for what is drawn along the trajectory."""

    momentum: Array
    key: Array


@register_dataclass
@dataclass(frozen=True)
class NUTS(GradientKernel):
    """A trajectory of ``H(x, p) = -log p(x) + |p|^2 / 2`` doubled until it turns back on itself; multinomial NUTS.

    step_size: the leapfrog step, in units of the target's coordinates; None: tuned by warm-up to an acceptance rate
        of 0.8, as for HMC. The metric is the identity, right in the whitened coordinates of warm-up.
    max_num_doublings: deepest tree, of ``2^max_num_doublings - 1`` leapfrog steps; NumPyro's ``max_tree_depth``.

    Extra fields ``num_steps`` and ``tree_depth`` beside those of HMC; ``accept_prob`` is the mean over the trajectory.
    `Info.margin` is NaN, since a step makes many decisions: its near ties are not counted.
    Given the same keys, step for step equal to ``blackjax.nuts`` (1.7).

    Raises:
        ValueError: step_size not positive, max_num_doublings below 1.

    Source: Hoffman & Gelman 2014; multinomial and iterative as in Betancourt 2017 and Phan et al. 2019.

    Example:
        >>> import pmcmc
        >>> pmcmc.NUTS(step_size=0.5).max_num_doublings
        10
    """

    extra_fields: ClassVar[tuple[str, ...]] = (*GradientKernel.extra_fields, "energy", "num_steps", "tree_depth")

    step_size: Scalar | None = None
    max_num_doublings: int = field(default=10, metadata=dict(static=True))

    def __post_init__(self):
        if isinstance(self.step_size, (int, float)) and not self.step_size > 0:
            raise ValueError(f"step_size must be positive, got {self.step_size}.")
        if self.max_num_doublings < 1:
            raise ValueError(f"max_num_doublings must be at least 1, got {self.max_num_doublings}.")

    def sample_noise(self, rng_key, target):
        momentum, trajectory = (fold_in(key_pair(rng_key), jnp.asarray(i)) for i in range(2))
        return NUTSNoise(jax_normals(momentum, target.dim, target.spec.dtype), trajectory)

    def step(self, target, state: GradientState, noise: NUTSNoise) -> tuple[GradientState, Info]:
        leaves, treedef = jax.tree.flatten((target, self, state, noise))
        return _step_of(treedef)(*leaves)

    def step_alone(self, target: Target, state: GradientState, noise: NUTSNoise) -> tuple[GradientState, Info]:
        """`step` by a loop over one transition."""
        advance = lambda tree: self._advance(target.value_and_grad, tree)
        return self._conclude(jax.lax.while_loop(lambda tree: ~tree.finished, advance, self._begin(state, noise)))

    def stages(self, target: Target) -> Staged:
        """`step` of a batch of lanes, which need not wait for each other's trees."""
        value_and_grad = jax.vmap(target.value_and_grad, in_axes=-1, out_axes=-1)
        return Staged(
            begin=lambda state, noise: self._begin(*_lanes_last((state, noise))),
            advance=lambda tree: self._advance(value_and_grad, tree),
            finished=lambda tree: tree.finished,
            conclude=lambda tree: _lanes_first(self._conclude(tree)),
        )

    def transition(self, target):
        return replace(super().transition(target), staged=self.stages(target))

    def _begin(self, state: GradientState, noise: NUTSNoise) -> machine.Tree:
        return machine.begin(state, noise.momentum, noise.key, self.max_num_doublings)

    def _advance(self, value_and_grad, tree: machine.Tree) -> machine.Tree:
        step_size = jnp.asarray(self.step_size, tree.energy.dtype)
        return machine.advance(value_and_grad, step_size, self.max_num_doublings, tree)

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


@cache
def _step_of(treedef: Any) -> Callable:
    """``step`` of the leaves of (target, kernel, state, noise), which may be mapped over.

    Of leaves, since jax 0.10 cannot differentiate a custom_vmap whose arguments hold a None.
    """

    def alone(*leaves: ArrayLeaf) -> tuple[GradientState, Info]:
        target, kernel, state, noise = jax.tree.unflatten(treedef, leaves)
        return kernel.step_alone(target, state, noise)

    def lanes(axis_size: int, in_batched: Any, *leaves: ArrayLeaf) -> Any:
        """Lanes last, until the deepest tree of all is done: what `jax.vmap` makes of `alone` is several times slower.

        Lanes with data or step sizes of their own are left to it.
        """
        if not any(in_batched):  # only derivatives are mapped
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
    return jax.tree.map(lambda x: jnp.moveaxis(x, 0, -1), tree)


def _lanes_first(tree: PyTree) -> PyTree:
    return jax.tree.map(lambda x: jnp.moveaxis(x, -1, 0), tree)
