"""Gibbs sampling from conditional distributions that the user provides, and cycles of kernels over groups of sites.

`Gibbs` updates the sites of a position one after the other, each from its full conditional,

    x[i]' ~ p(x[i] | x[1]', ..., x[i-1]', x[i+1], ..., x[n]),    i = 1..n.

How one site is drawn is an `Update` from `pmcmc.kernels.updates`, a map of the state and of noise drawn first.

`Compose` applies kernels one after the other. Each moves the sites of one group given the newest values of all others,
``x[g]' ~ K_g(x[g], . | x[-g])``, and so leaves the joint distribution invariant. `Block` holds one of the kernels with
its sites and, after warm-up by `pmcmc.SiteAdaptation`, their coordinates.

Source: Geman & Geman (1984); Gelfand & Smith (1990); Tierney (1994) for cycles of kernels.
"""

from collections.abc import Mapping, Sequence
from copy import copy
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar

import jax
import jax.numpy as jnp

from pmcmc._pytree import PyTree, is_real, register_dataclass
from pmcmc._xla.trace import traced_functions
from pmcmc.kernels.base import Info, Kernel, SiteKernel, is_of_pmcmc, site_templates, step_content
from pmcmc.kernels.discrete import DiscreteGibbs
from pmcmc.kernels.updates import Site, Update
from pmcmc.random.streams import fold_in, key_pair, raw_keys_are_threefry
from pmcmc.target import Basis, Target


@register_dataclass
@dataclass(frozen=True, init=False)
class Gibbs(SiteKernel):
    """Gibbs sampler that draws the sites one after the other, each given the newest values of all others.

        x[i]' ~ p(x[i] | x[1]', ..., x[i-1]', x[i+1], ..., x[n]),    i = 1..n

    No log density is needed: pass None to `pmcmc.sample`. If there is one, it is evaluated once per step and reported.
    The acceptance rate is NaN.

    Chains of normal, gamma and inverse gamma updates whose shapes are fixed numbers are smooth in the state, so
    `pmcmc.recurrence.deer` can solve them too. Use `MultipleShooting` for chains with integer sites.

    With a NumPyro model, updates see and return continuous sites as positions hold them: unconstrained, like
    ``init_params``, and not as their distributions draw them (unlike NumPyro's HMCGibbs). For a positive site this is
    the logarithm, so write ``jnp.exp(x["scale"])`` where a conditional depends on the scale itself. `GammaUpdate`,
    `InverseGammaUpdate`, `DirichletUpdate` and `CategoricalUpdate` are refused for sites whose unconstrained values
    are others than their own. A `CustomUpdate` draws such a site: if the conditional is a gamma distribution,

        CustomUpdate(lambda key: jax.random.loggamma(key, shape), lambda x, g: g - jnp.log(rate(x)))

    Args:
        updates: Dict from site to update, in the order in which sites are updated: `NormalUpdate`, `GammaUpdate`,
            `InverseGammaUpdate`, `DirichletUpdate`, `CategoricalUpdate` or `CustomUpdate`. Their functions receive a
            dict of all sites, with values in the user's dtypes: integers stay integers.

    Raises:
        TypeError: ``updates`` is not a mapping of names to updates, or the position is not a dict.
        ValueError: There are no updates, a name is not a site, a site has no update, an update has the wrong shape, or
            it does not draw the unconstrained values of its site.

    Source: Geman & Geman (1984); Gelfand & Smith (1990); Zoltowski et al. (2025) as a recurrence of pre-drawn noise.

    Example:
        >>> import pmcmc
        >>> rho = 0.6
        >>> kernel = pmcmc.Gibbs({
        ...     "a": pmcmc.kernels.NormalUpdate(lambda x: (rho * x["b"], (1 - rho**2) ** 0.5)),
        ...     "b": pmcmc.kernels.NormalUpdate(lambda x: (rho * x["a"], (1 - rho**2) ** 0.5)),
        ... })
        >>> chain = pmcmc.sample(None, {"a": 0.0, "b": 0.0}, 0, kernel=kernel, num_samples=100, progress_bar=False)
        >>> chain.get_samples()["a"].shape
        (400,)
    """

    sites: tuple[str, ...] = field(metadata=dict(static=True))
    updates: tuple[Update, ...]

    def __init__(self, updates: Mapping[str, Any]):
        if not isinstance(updates, Mapping):
            raise TypeError(f"updates must be a dict of site names to updates, got {type(updates).__name__}.")
        for name, update in updates.items():
            if not isinstance(update, Update):
                raise TypeError(
                    f"the update of {name!r} must be an update such as NormalUpdate(...), got {update!r}. Wrap your "
                    "own map as CustomUpdate(sample_noise, update)."
                )
        if not updates:
            raise ValueError("Gibbs needs at least one update: pass {site: update}.")
        object.__setattr__(self, "sites", tuple(updates))
        object.__setattr__(self, "updates", tuple(updates.values()))

    def site_names(self, target):
        return self.sites

    def check(self, target):
        super().check(target)
        for name, update in zip(self.sites, self.updates, strict=True):
            if update.confined_to and name in target.model.transformed:
                raise ValueError(
                    f"{type(update).__name__} draws {update.confined_to}, but positions hold the site {name!r} of this "
                    "model unconstrained, like init_params: write a CustomUpdate that returns unconstrained values, "
                    f"such as logarithms for a positive site, or sample {name!r} by another kernel, as in "
                    f"Compose([..., (HMC(), [{name!r}])])."
                )
        # Tracing the step checks shapes without evaluating anything.
        noise = jax.eval_shape(self.sample_noise, jax.random.key(0), target)
        jax.eval_shape(self.step, target, target.spec.template, noise)

    def traced(self, target):
        state = jax.eval_shape(target.model.sites, target.data, target.spec.template)
        updates = zip(self.sites, self.updates, strict=True)
        kernel = copy(self)
        object.__setattr__(kernel, "updates", tuple(u.traced(state, _site(target, name)) for name, u in updates))
        return kernel

    def context(self, target):
        functions = tuple(fn.trace for fn in traced_functions(self))
        return functions if is_of_pmcmc(self) else (functions, step_content(self, target))

    def sample_noise(self, rng_key, target):
        pair = key_pair(rng_key)
        with raw_keys_are_threefry():
            return tuple(
                update.draw_noise(fold_in(pair, jnp.asarray(number, jnp.uint32)), _site(target, name))
                for number, (name, update) in enumerate(zip(self.sites, self.updates, strict=True))
            )

    def discrete(self, unknown):
        kinds = dict(zip(self.sites, (update.is_discrete for update in self.updates), strict=True))
        return {name: jax.tree.map(lambda x, n=name: kinds[n] or not is_real(x), v) for name, v in unknown.items()}

    def nudge(self, noise, amount):
        return tuple(update.nudge(u, amount) for update, u in zip(self.updates, noise, strict=True))

    def step(self, target: Target, state: dict, noise: tuple) -> tuple[dict, Info]:
        dtype = target.spec.dtype
        margin, failed = jnp.asarray(jnp.inf, dtype), jnp.array(False)
        for name, update, u in zip(self.sites, self.updates, noise, strict=True):
            site = _site(target, name)
            drawn = update.draw(target.model.sites(target.data, state), u, site)
            value = _fitted(name, drawn.value, site.like)
            value = jax.tree.map(lambda new, old, bad=drawn.failed: jnp.where(bad, old, new), value, state[name])
            state = {**state, name: value}
            margin, failed = jnp.minimum(margin, drawn.margin), failed | drawn.failed
        return state, Info(
            acceptance_rate=jnp.asarray(jnp.nan, dtype),
            is_divergent=failed,
            margin=jnp.asarray(margin, dtype),
            logdensity=jnp.asarray(target.model.logdensity(target.data, state), dtype),
        )


def _site(target: Target, name: str) -> Site:
    """Return the shape and dtypes of a site for its update."""
    return Site(site_templates(target)[name], target.spec.dtype, target.model.has_density)


def _fitted(name: str, value: PyTree, like: PyTree) -> PyTree:
    """Return the value of an update in the site's dtypes.

    Raises:
        ValueError: The value differs from the site in structure, shape or kind (real or not).
    """
    kinds = lambda tree: [(jnp.shape(x), is_real(x)) for x in jax.tree.leaves(tree)]
    if jax.tree.structure(value) != jax.tree.structure(like) or kinds(value) != kinds(like):
        said = lambda tree: jax.tree.map(lambda x: f"{jnp.result_type(x)}{list(jnp.shape(x))}", tree)
        raise ValueError(
            f"the update of {name!r} must return a value like the site's, {said(like)}, got {said(value)}. Check its "
            "shape, or give the initial position the shape and dtype that the site should have."
        )
    cast: Any = lambda x, s: jnp.asarray(x, s.dtype)
    return jax.tree.map(cast, value, like)


@register_dataclass
@dataclass(frozen=True)
class Block:
    """One site group of a `Compose`: a kernel and the sites that it updates.

    `Compose` makes it from what the user passes, and warm-up adds the basis.

    Attributes:
        kernel: The kernel that updates the group.
        sites: Names of the sites; None if the kernel names its own.
        basis: Coordinates in which a kernel over vectors works; None for the user's own.

    Example:
        >>> import pmcmc
        >>> pmcmc.Compose([(pmcmc.HMC(step_size=0.1), ["mu"])]).blocks[0].sites
        ('mu',)
    """

    kernel: Kernel
    sites: tuple[str, ...] | None = field(default=None, metadata=dict(static=True))
    basis: Basis | None = None

    def names(self, target: Target) -> tuple[str, ...]:
        """Return the names of the sites of this group."""
        if self.sites is not None or not isinstance(self.kernel, SiteKernel):
            return self.sites or ()
        return self.kernel.site_names(target)

    def given(self, target: Target, position: PyTree = None) -> Target:
        """Return the conditional target of this group given all other sites.

        Args:
            target: The whole target.
            position: Values of all sites. None: only the shapes of the conditional target are known.

        Returns:
            A target over the sites of this group, in the coordinates of `basis`.
        """
        names = self.names(target)
        others = None if position is None else {k: v for k, v in position.items() if k not in names}
        return target.given(names, others, self.basis)


@register_dataclass
@dataclass(frozen=True, init=False)
class Compose(SiteKernel):
    """Kernels applied one after the other, each moving its own sites given the newest values of all others.

    The unknown is the tuple of the unknowns of the groups. `Info` of a step holds the acceptance rate averaged over the
    groups that have one, the margin nearest to zero (NaN if a group reports none), whether any group diverged, and the
    log density after the last group. Warm-up by `SiteAdaptation` tunes step size and coordinates of each group.

    With a NumPyro model, kernels and updates see continuous sites unconstrained, like ``init_params``, and discrete
    sites as they are.

    Args:
        blocks: List of ``(kernel, sites)`` pairs, or of kernels that name their sites (`Gibbs`, `DiscreteGibbs`).
            Kernels that use gradients see ``log p(sites | others)``. Their caches are computed anew in every step,
            because the other sites have moved.

    Raises:
        TypeError: ``blocks`` is not a list of kernels and pairs, a kernel lacks its sites, or the position is not a
            dict.
        ValueError: A name is not a site, or a site is in no group or in two.

    Source: Tierney (1994) for cycles of kernels; Duane et al. (1987) for HMC; Gelfand & Smith (1990) for Gibbs.

    Example:
        >>> import jax.numpy as jnp, pmcmc
        >>> logdensity = lambda x: -0.5 * (x["a"] ** 2 + (x["b"] - x["a"]) ** 2)
        >>> kernel = pmcmc.Compose([
        ...     pmcmc.Gibbs({"b": pmcmc.kernels.NormalUpdate(lambda x: (x["a"], 1.0))}),
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

    def finalize(self):
        return replace(self, blocks=tuple(replace(block, kernel=block.kernel.finalize()) for block in self.blocks))

    def unkept(self, tuned):
        parts = zip(self.blocks, tuned.blocks, strict=True)
        return " ".join(filter(None, (mine.kernel.unkept(other.kernel) for mine, other in parts)))

    @property
    def divergences_matter(self):
        return any(block.kernel.divergences_matter for block in self.blocks)

    @property
    def uses_gradient(self):
        return any(block.kernel.uses_gradient for block in self.blocks)

    def site_names(self, target):
        return tuple(name for block in self.blocks for name in block.names(target))

    def check(self, target):
        super().check(target)
        for block in self.blocks:
            if not block.kernel.takes_basis:
                raise ValueError(
                    "a BlackJAX algorithm that is already built has its own log density and cannot depend on the other "
                    "sites. Pass its constructor and parameters, as in from_blackjax(blackjax.mala, step_size=0.3)."
                )
            block.kernel.check(block.given(target, site_templates(target)))

    def traced(self, target):
        sites = site_templates(target)
        blocks = [replace(block, kernel=block.kernel.traced(block.given(target, sites))) for block in self.blocks]
        return replace(self, blocks=tuple(blocks))

    def context(self, target):
        sites = site_templates(target)
        contexts = tuple(block.kernel.context(block.given(target, sites)) for block in self.blocks)
        if type(self) is not Compose:  # a class of the user's own, which may step otherwise
            contexts = (*contexts, step_content(self, target))
        return contexts if any(context is not None for context in contexts) else None

    def check_start(self, target, position):
        for block in self.blocks:
            block.kernel.check_start(block.given(target, position), {n: position[n] for n in block.names(target)})

    @property
    def is_tuned(self):
        return all(block.kernel.is_tuned for block in self.blocks)

    def with_step_size(self, step_size):
        """Return the same kernel with this step size for each group that has none yet."""
        tuned = lambda kernel: kernel if kernel.is_tuned else kernel.with_step_size(step_size)
        return replace(self, blocks=tuple(replace(block, kernel=tuned(block.kernel)) for block in self.blocks))

    def init(self, target, position):
        return tuple(self._unknown(target, block, position) for block in self.blocks)

    def _unknown(self, target: Target, block: Block, position: PyTree) -> PyTree:
        """Return the unknown of one group at a position of all sites."""
        given = block.given(target, position)
        return block.kernel.unknown(block.kernel.init(given, {name: position[name] for name in block.names(target)}))

    def position(self, target, unknown):
        found = {}
        for block, part in zip(self.blocks, unknown, strict=True):
            found.update(block.kernel.position(block.given(target), part))
        return found

    def sample_noise(self, rng_key, target):
        pair = key_pair(rng_key)
        with raw_keys_are_threefry():
            return tuple(
                block.kernel.sample_noise(fold_in(pair, jnp.asarray(number, jnp.uint32)), block.given(target))
                for number, block in enumerate(self.blocks)
            )

    def discrete(self, unknown):
        return tuple(block.kernel.discrete(part) for block, part in zip(self.blocks, unknown, strict=True))

    def nudge(self, noise, amount):
        return tuple(block.kernel.nudge(u, amount) for block, u in zip(self.blocks, noise, strict=True))

    def step(self, target: Target, state: tuple, noise: tuple) -> tuple[tuple, Info]:
        state, infos = self.step_blocks(target, state, noise)
        return state, _combine(infos, target.spec.dtype)

    def step_blocks(self, target: Target, state: tuple, noise: tuple) -> tuple[tuple, tuple[Info, ...]]:
        """Take one step.

        Args:
            target: Target to sample.
            state: Unknowns of the groups.
            noise: Noise of one step, one entry per group.

        Returns:
            The new unknowns of the groups, and the `Info` of each group.
        """
        position, unknown, infos = self.position(target, state), [], []
        for block, part, u in zip(self.blocks, state, noise, strict=True):
            given = block.given(target, position)
            moved, info = block.kernel.step(given, block.kernel.restore(given, part), u)
            unknown.append(block.kernel.unknown(moved))
            infos.append(info)
            position = {**position, **block.kernel.position(given, unknown[-1])}
        return tuple(unknown), tuple(infos)


def with_discrete_sites(kernel: Kernel, target: Target) -> Kernel:
    """Return the kernel, with updates of the target's discrete sites if it has none."""
    discrete = [name for name, _ in target.model.supports]
    if not discrete or isinstance(kernel, SiteKernel):
        return kernel
    continuous = [name for name in target.spec.template if name not in discrete]
    return Compose([DiscreteGibbs(), (kernel, continuous)]) if continuous else DiscreteGibbs()


def _block(given: Any) -> Block:
    """Return a `Block` from what the user passed for it, after checks."""
    if isinstance(given, Block):
        return given
    kernel, sites = given if isinstance(given, tuple) and len(given) == 2 else (given, None)
    if not isinstance(kernel, Kernel) or isinstance(kernel, Compose):
        raise TypeError(
            f"each entry of blocks must be a kernel or a pair (kernel, sites), not a Compose, got {given!r}."
        )
    if isinstance(sites, str):
        sites = (sites,)
    if sites is None:
        if not isinstance(kernel, SiteKernel):
            who = type(kernel).__name__
            raise TypeError(f"{who} does not name its sites: write the pair ({who}(...), [site, ...]).")
        return Block(kernel)
    return Block(kernel, tuple(sites))


def _combine(infos: tuple[Info, ...], dtype: Any) -> Info:
    """Return the `Info` of a step from those of its groups; see `Compose`."""
    margins = jnp.stack([jnp.asarray(info.margin, dtype) for info in infos])
    rates = jnp.stack([jnp.asarray(info.acceptance_rate, dtype) for info in infos])
    return Info(
        acceptance_rate=jnp.nanmean(rates),
        is_divergent=jnp.any(jnp.stack([info.is_divergent for info in infos])),
        margin=margins[jnp.argmin(jnp.abs(margins))],  # argmin picks a NaN if there is one
        logdensity=jnp.asarray(infos[-1].logdensity, dtype),
    )
