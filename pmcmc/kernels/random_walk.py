"""Random-walk Metropolis whose chains merge under common noise."""

import math
from dataclasses import dataclass
from typing import NamedTuple

import jax.numpy as jnp

from pmcmc._pytree import register_dataclass
from pmcmc._typing import Array, Scalar
from pmcmc.kernels.base import Info, PositionKernel
from pmcmc.kernels.metropolis import BranchTaken, Surrogate, decide
from pmcmc.random.distributions import normals, uniforms


class WalkState(NamedTuple):
    """Position (D,) in the target's coordinates with the log density there."""

    position: Array
    logdensity: Array


class WalkNoise(NamedTuple):
    """vector: (D,) the grid's offset, uniform on (0, 1), in a grid step; else standard normal.

    radial: standard normal, the increment's component along the radius. is_grid, is_independent: which of the three
    proposals it is. half_square: |vector|^2 / 2, for independent steps; None, as is_independent, where there are none.
    log_uniform: log of a uniform on (0, 1).
    """

    vector: Array
    radial: Array
    is_grid: Array
    is_independent: Array | None
    half_square: Array | None
    log_uniform: Array


@register_dataclass
@dataclass(frozen=True)
class RandomWalk(PositionKernel):
    """Metropolis' random walk, without gradients: a move of variance h^2 a coordinate, kept or not.

    Chains that add the same increments stay as far apart as they are. What a step's noise means is therefore made to
    depend on the state, in ways that leave the proposal's law as it is; each step is of a kind drawn in its noise:

    - Radial: ``y = x + h (z + (v - z.n) n)`` with ``n = x / |x|`` and normal z (D,) and v drawn first. Given x, v takes
      the place of the component of z along n, which it equals in law and is independent of the others, so the
      increment is N(0, h^2 I) at any x. Two chains move outwards or inwards together but around the origin each in its
      own direction, which draws them towards each other, the more the closer they are. n is zero, and the increment
      h z, where |x|^2 underflows.
    - Grid: the point nearest to x of a lattice of width ``w = sqrt(12) h`` with an offset u uniform on its cell,
      ``y = w (round(x / w - u) + u)``. Given x, the fraction of x / w - u is uniform whatever x is, so y is uniform on
      the box of width w around x. As y lies in the box around x if and only if x lies in the box around y, the
      proposal is symmetric. All chains in one cell propose the same point, bit for bit, and have merged if they accept.
    - Independent: ``y ~ N(0, I)``, with the ratio ``exp((|y|^2 - |x|^2) / 2)`` of its densities in the acceptance.

    Origin and unit are those of the coordinates of warm-up, fixed before the chain: the posterior's mean and spread.

    step_size: the h above, a standard deviation; None: tuned by warm-up to an acceptance rate of 0.234 + 0.206 / D.
    grid_share: probability of a grid step. None: ``min(1, 6 D^(-3/2))``. A step misses when a cell's border lies
        between two chains, and leaves them about w apart; with more coordinates this is likelier, and radial steps
        bring them close more slowly.
    independence_share: probability of an independent step. Where the whitened posterior is near enough to a Gaussian
        that they are accepted now and then, chains merge after a few of them; elsewhere they are wasted. None: none.
    surrogate: derivative of the accept decision, seen only by Newton-type solvers.

    Sources: Metropolis et al. 1953; Papp & Sherlock 2022, "A new and asymptotically optimally contracting coupling for
    the random walk Metropolis" (a shared component along the gradient, which on a spherical Gaussian is the radius);
    Neal 1999, "Circularly-coupled Markov chain sampling" (the random grid, and its use once others have brought chains
    close); Roberts, Gelman & Gilks 1997 (0.234).

    Raises:
        ValueError: step_size is not positive; a share outside [0, 1].

    Example:
        >>> import jax.numpy as jnp, pmcmc
        >>> chain = pmcmc.sample(lambda x: -jnp.sum(jnp.abs(x)), jnp.zeros(2), 0, kernel=pmcmc.RandomWalk(),
        ...     num_warmup=100, num_samples=1000, num_chains=2, progress_bar=False)
        >>> chain.get_samples().shape
        (2000, 2)
    """

    step_size: Scalar | None = None
    grid_share: Scalar | None = None
    independence_share: Scalar | None = 0.05
    surrogate: Surrogate = BranchTaken()

    def __post_init__(self):
        if isinstance(self.step_size, (int, float)) and not self.step_size > 0:
            raise ValueError(f"step_size must be positive, got {self.step_size}.")
        for name in ("grid_share", "independence_share"):
            share = getattr(self, name)
            if isinstance(share, (int, float)) and not 0 <= share <= 1:
                raise ValueError(f"{name} must lie in [0, 1], got {share}.")

    def target_acceptance_rate(self, dim):
        # 0.44 for D = 1 and the limit for large D. Measured on Gaussians at the optimal step 2.38 / sqrt(D): 0.44,
        # 0.36, 0.32, 0.29, 0.26, 0.25 for D = 1, 2, 3, 5, 10, 25.
        return 0.234 + 0.206 / dim

    def first_step_size(self, dim):
        return 2.38 / math.sqrt(dim)

    def restore(self, target, unknown: Array) -> WalkState:
        return WalkState(unknown, target.logdensity_fn(unknown))

    def sample_noise(self, rng_key, target):
        u = uniforms(rng_key, target.dim + 3 + (self.independence_share is not None), target.spec.dtype)
        vector, rest = u[: target.dim], u[target.dim :]
        is_grid, is_independent = rest[0] < self._grid_share(target.dim), None
        half_square = None
        if self.independence_share is not None:
            is_independent = rest[3] < self.independence_share
            is_grid = is_grid & ~is_independent
        vector = jnp.where(is_grid, vector, normals(vector))
        if is_independent is not None:
            half_square = 0.5 * jnp.sum(vector**2)
        return WalkNoise(
            vector=vector,
            radial=normals(rest[1]),
            is_grid=is_grid,
            is_independent=is_independent,
            half_square=half_square,
            log_uniform=jnp.log(rest[2]),
        )

    def nudge(self, noise, amount):
        return noise._replace(log_uniform=noise.log_uniform + amount)

    def step(self, target, state: WalkState, noise: WalkNoise) -> tuple[WalkState, Info]:
        x, vector = state.position, noise.vector
        step_size = jnp.asarray(self.step_size, x.dtype)
        squared = jnp.sum(x**2)
        # All kinds are a x + b z: one pass over the coordinates. Written one after the other, with a reduction inside
        # each, a step in ten dimensions took 2.2 instead of 0.2 us on CPU.
        of_x, of_vector = 1 + step_size * _radial_weight(x, squared, noise), step_size
        log_weight = jnp.zeros((), x.dtype)
        if noise.is_independent is not None:
            of_x = jnp.where(noise.is_independent, 0.0, of_x)
            of_vector = jnp.where(noise.is_independent, 1.0, of_vector)
            log_weight = jnp.where(noise.is_independent, noise.half_square - 0.5 * squared, 0.0)
        y = jnp.where(noise.is_grid, _grid_point(x, vector, step_size), of_x * x + of_vector * vector)
        proposal = self.restore(target, y)
        log_ratio = proposal.logdensity - state.logdensity + log_weight
        return decide(self.surrogate, state, proposal, log_ratio, noise.log_uniform)

    def _grid_share(self, dim: int) -> Scalar:
        return min(1.0, 6 * dim**-1.5) if self.grid_share is None else self.grid_share


def _radial_weight(x: Array, squared: Array, noise: WalkNoise) -> Array:
    """c such that z + c x is z with v for its component along x; 0 where |x|^2 is too small to be accurate."""
    limits = jnp.finfo(x.dtype)
    usable = squared > limits.tiny / limits.eps
    squared = jnp.where(usable, squared, 1.0)
    return jnp.where(usable, noise.radial / jnp.sqrt(squared) - jnp.sum(noise.vector * x) / squared, 0.0)


def _grid_point(x: Array, offset: Array, step_size: Array) -> Array:
    """The same bits for all x of a cell: the integers are exact, and what follows does not see x."""
    width = math.sqrt(12) * step_size
    return (jnp.round(x / width - offset) + offset) * width
