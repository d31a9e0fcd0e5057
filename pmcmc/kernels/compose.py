"""Kernels over blocks of sites, one after the other: HMC within Gibbs and the like."""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar

import jax.numpy as jnp

from pmcmc._pytree import register_dataclass
from pmcmc._typing import PyTree
from pmcmc.kernels.base import Info, Kernel, SiteKernel, site_templates
from pmcmc.random.threefry import fold_in, key_pair
from pmcmc.target import Basis, Target


@register_dataclass
@dataclass(frozen=True)
class Block:
    """One kernel of a `Compose` and its sites; made there from what the user passes, and given a basis by warm-up.

    sites: None for a kernel that names its own. basis: coordinates of a kernel that works on vectors.

    Example:
        >>> import pmcmc
        >>> pmcmc.Compose([(pmcmc.HMC(step_size=0.1), ["mu"])]).blocks[0].sites
        ('mu',)
    """

    kernel: Kernel
    sites: tuple[str, ...] | None = field(default=None, metadata=dict(static=True))
    basis: Basis | None = None

    def names(self, target: Target) -> tuple[str, ...]:
        if self.sites is not None or not isinstance(self.kernel, SiteKernel):
            return self.sites or ()
        return self.kernel.site_names(target)

    def given(self, target: Target, position: PyTree = None) -> Target:
        """The conditional target of this block; without a position only its shapes are known."""
        names = self.names(target)
        others = None if position is None else {k: v for k, v in position.items() if k not in names}
        return target.given(names, others, self.basis)


@register_dataclass
@dataclass(frozen=True, init=False)
class Compose(SiteKernel):
    """Kernels one after the other, each moving its own sites given the newest values of all others.

    blocks: ``(kernel, sites)`` pairs, or kernels that name their sites (`Gibbs`, `DiscreteGibbs`). Kernels with a
        gradient see ``log p(sites | others)``; what they cache of it is computed anew in every step, because the other
        blocks have moved.

    The unknown is the tuple of the blocks' unknowns. Of a step is reported: the acceptance rate averaged over the
    blocks that have one, the margin nearest to zero, divergent if any block is, and the log density after the last
    block. Warm-up (`BlockAdaptation`) tunes each block's step size and coordinates.

    With a NumPyro model, blocks and updates see continuous sites unconstrained, as init_params are, and discrete ones
    as they are.

    Raises:
        TypeError: blocks is no list of kernels and pairs; a kernel without its sites; the position is no dict.
        ValueError: names that are no sites, sites in no block or in two.

    Source: Tierney 1994 (cycles of kernels); Duane et al. 1987 for HMC; Gelfand & Smith 1990 for Gibbs.

    Example:
        >>> import jax.numpy as jnp, pmcmc
        >>> logdensity = lambda x: -0.5 * (x["a"] ** 2 + (x["b"] - x["a"]) ** 2)
        >>> kernel = pmcmc.Compose([
        ...     pmcmc.Gibbs({"b": pmcmc.NormalUpdate(lambda x: (x["a"], 1.0))}),
        ...     (pmcmc.HMC(step_size=1.0, num_integration_steps=2), ["a"]),
        ... ])
        >>> chain = pmcmc.sample(
        ...     logdensity, {"a": 0.0, "b": 0.0}, 0, kernel=kernel, num_samples=100, progress_bar=False)
        >>> chain.get_samples()["a"].shape
        (400,)
    """

    extra_fields: ClassVar[tuple[str, ...]] = Kernel.extra_fields

    blocks: tuple[Block, ...]

    def __init__(self, blocks: Sequence[Any]):
        if not isinstance(blocks, Sequence) or not blocks:
            raise TypeError(f"blocks must be a list of (kernel, sites) pairs or kernels, got {blocks!r}.")
        object.__setattr__(self, "blocks", tuple(_block(given) for given in blocks))

    def site_names(self, target):
        return tuple(name for block in self.blocks for name in block.names(target))

    def check(self, target):
        super().check(target)
        for block in self.blocks:
            if not block.kernel.takes_basis:
                raise ValueError(
                    "a BlackJAX algorithm that is already built has its own log density and knows nothing of the other "
                    "blocks. Pass its constructor and parameters, as in from_blackjax(blackjax.mala, step_size=0.3)."
                )
            block.kernel.check(block.given(target, site_templates(target)))

    def traced(self, target):
        sites = site_templates(target)
        blocks = [replace(block, kernel=block.kernel.traced(block.given(target, sites))) for block in self.blocks]
        return Compose(blocks)

    def context(self, target):
        sites = site_templates(target)
        contexts = tuple(block.kernel.context(block.given(target, sites)) for block in self.blocks)
        return contexts if any(context is not None for context in contexts) else None

    def check_start(self, target, position):
        for block in self.blocks:
            block.kernel.check_start(block.given(target, position), {n: position[n] for n in block.names(target)})

    @property
    def is_tuned(self):
        return all(block.kernel.is_tuned for block in self.blocks)

    def init(self, target, position):
        return tuple(self._unknown(target, block, position) for block in self.blocks)

    def _unknown(self, target: Target, block: Block, position: PyTree) -> PyTree:
        given = block.given(target, position)
        return block.kernel.unknown(block.kernel.init(given, {name: position[name] for name in block.names(target)}))

    def position(self, target, unknown):
        found = {}
        for block, part in zip(self.blocks, unknown, strict=True):
            found.update(block.kernel.position(block.given(target), part))
        return found

    def sample_noise(self, rng_key, target):
        pair = key_pair(rng_key)
        return tuple(
            block.kernel.sample_noise(fold_in(pair, jnp.asarray(number, jnp.uint32)), block.given(target))
            for number, block in enumerate(self.blocks)
        )

    def nudge(self, noise, amount):
        return tuple(block.kernel.nudge(u, amount) for block, u in zip(self.blocks, noise, strict=True))

    def step(self, target: Target, state: tuple, noise: tuple) -> tuple[tuple, Info]:
        state, infos = self.step_blocks(target, state, noise)
        return state, _combine(infos, target.spec.dtype)

    def step_blocks(self, target: Target, state: tuple, noise: tuple) -> tuple[tuple, tuple[Info, ...]]:
        """One step, and what each block says of it."""
        position, unknown, infos = self.position(target, state), [], []
        for block, part, u in zip(self.blocks, state, noise, strict=True):
            given = block.given(target, position)
            moved, info = block.kernel.step(given, block.kernel.restore(given, part), u)
            unknown.append(block.kernel.unknown(moved))
            infos.append(info)
            position = {**position, **block.kernel.position(given, unknown[-1])}
        return tuple(unknown), tuple(infos)


def _block(given: Any) -> Block:
    if isinstance(given, Block):
        return given
    kernel, sites = given if isinstance(given, tuple) and len(given) == 2 else (given, None)
    if not isinstance(kernel, Kernel) or isinstance(kernel, Compose):
        raise TypeError(f"a block must be a kernel or a pair (kernel, sites), and no Compose, got {given!r}.")
    if isinstance(sites, str):
        sites = (sites,)
    if sites is None:
        if not isinstance(kernel, SiteKernel):
            who = type(kernel).__name__
            raise TypeError(f"{who} does not name its sites: write the pair ({who}(...), [site, ...]).")
        return Block(kernel)
    return Block(kernel, tuple(sites))


def _combine(infos: tuple[Info, ...], dtype: Any) -> Info:
    """One account of a step from those of its blocks; see `Compose`."""
    margins = jnp.stack([jnp.asarray(info.margin, dtype) for info in infos])
    rates = jnp.stack([jnp.asarray(info.acceptance_rate, dtype) for info in infos])
    return Info(
        acceptance_rate=jnp.nanmean(rates),
        is_divergent=jnp.any(jnp.stack([info.is_divergent for info in infos])),
        margin=margins[jnp.argmin(jnp.abs(margins))],  # NaN where a block does not tell
        logdensity=jnp.asarray(infos[-1].logdensity, dtype),
    )
