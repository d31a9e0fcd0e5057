"""The Metropolis decision, with an explicit derivative for Newton-type solvers.

A proposal is accepted if ``margin = log alpha - log u > 0``. The decision is a jump, so its derivative is zero almost
everywhere and does not show a solver that a state near the jump may change its decision. `select` keeps the hard
decision in the forward map, and takes its derivative from a `Surrogate`: `BranchTaken` or `StraightThrough`. `decide`
and `accept` make the decision of a kernel and report it as an `Info`; `GradientKernel` is the base of kernels that
cache the log density and its gradient.

The plainest kernel of this kind is `RandomWalk`, a random-walk Metropolis whose coupled chains merge. Two chains that
add the same increment to their states never come closer. `RandomWalk` makes the increment depend on the state, in ways
that keep the Metropolis step exact: radial steps bring coupled chains closer, and grid and independent steps let them
merge bit for bit. A step costs one log density and no gradient.

Source: Metropolis et al. (1953); Zoltowski et al. (2025) for the surrogate derivative; Papp & Sherlock (2022) and Neal
(1999) for the random walk.
"""

import abc
import math
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from pmcmc._arguments import known_number
from pmcmc._pytree import Array, PyTree, Scalar, register_dataclass
from pmcmc.kernels.base import Info, PositionKernel, check_step_size
from pmcmc.random.distributions import at_least_single, normals, rounded, uniforms

DIVERGENCE_THRESHOLD = 1000.0  # a larger loss of log density (energy) is a divergence, as in Stan and BlackJAX


class Surrogate(abc.ABC):
    """Derivative of the accept decision in the Jacobian of a Newton-type solver.

    The decision itself is always hard. A surrogate changes how fast the solver converges, not what it converges to.
    """

    @abc.abstractmethod
    def weight(self, margin: Array) -> tuple[Array, Array]:
        """Return the weight of the proposal in the tangent, and the derivative of that weight.

        Args:
            margin: log alpha - log u, a scalar.

        Returns:
            The weight w(margin), and its derivative w'(margin).
        """


@register_dataclass
@dataclass(frozen=True)
class BranchTaken(Surrogate):
    """The derivative of the branch taken: w = 1 if the proposal is accepted, 0 otherwise, and w' = 0.

    It is exact almost everywhere, but does not anticipate changes of the decision.
    """

    def weight(self, margin):
        return (margin > 0).astype(margin.dtype), jnp.zeros_like(margin)


@register_dataclass
@dataclass(frozen=True)
class StraightThrough(Surrogate):
    """A sigmoid of the margin in place of the jump: w = sigmoid(margin / temperature).

    It lets the solver anticipate changes of the decision. Here the sigmoid weights the tangents too; in the published
    code of Zoltowski et al. the weight is hard and only the slope is that of the sigmoid.

    Args:
        temperature: Width of the sigmoid, in units of log acceptance probability.

    Source: Zoltowski et al. (2025).
    """

    temperature: Scalar = 1.0

    def weight(self, margin):
        gate = jax.nn.sigmoid(margin / self.temperature)
        return gate, gate * (1 - gate) / self.temperature


@partial(jax.custom_jvp, nondiff_argnums=())
def select(surrogate: Surrogate, margin: Array, proposal: PyTree, current: PyTree) -> PyTree:
    """Return ``proposal`` if margin > 0, else ``current``, with the derivative of a surrogate.

    The tangent is ``w dproposal + (1 - w) dcurrent + w' (proposal - current) dmargin`` with the weight w(margin). A NaN
    margin selects ``current``.

    Args:
        surrogate: Derivative of the decision.
        margin: log alpha - log u, a scalar.
        proposal: Proposed state, a pytree.
        current: Current state, of the same structure.

    Returns:
        The state selected.
    """
    return jax.tree.map(lambda p, c: jnp.where(margin > 0, p, c), proposal, current)


@select.defjvp
def _select_jvp(primals: Any, tangents: Any) -> Any:
    """Return the value and tangent of `select`."""
    surrogate, margin, proposal, current = primals
    _, d_margin, d_proposal, d_current = tangents
    # A proposal that is not finite is never accepted, and 0 * NaN in its tangent must not reach the result.
    usable = jnp.isfinite(margin)
    weight, slope = surrogate.weight(jnp.where(usable, margin, -jnp.inf))
    slope = jnp.where(usable, slope, 0.0)

    def tangent(p, c, dp, dc):
        p, dp = jnp.where(usable, p, c), jnp.where(usable, dp, 0.0)
        return weight * dp + (1 - weight) * dc + slope * jnp.where(usable, d_margin, 0.0) * (p - c)

    out = select(surrogate, margin, proposal, current)
    return out, jax.tree.map(tangent, proposal, current, d_proposal, d_current)


def log_acceptance(log_ratio: Array) -> tuple[Array, Array]:
    """Return the log acceptance ratio, -inf for impossible proposals, and whether the proposal diverged.

    NaN and +inf are impossible. A proposal diverges if it is impossible or loses more than `DIVERGENCE_THRESHOLD`.
    """
    broken = jnp.isnan(log_ratio) | (log_ratio == jnp.inf)
    log_ratio = jnp.where(broken, -jnp.inf, log_ratio)
    return log_ratio, broken | (-log_ratio > DIVERGENCE_THRESHOLD)


def decide(surrogate: Surrogate, state: Any, proposal: Any, log_ratio: Array, log_uniform: Array) -> tuple[Any, Info]:
    """Make the Metropolis decision between a state and a proposal.

    NaN and +inf are rejected and counted as divergences, as in NumPyro and Stan.

    Args:
        surrogate: Derivative of the decision.
        state: Current state, with a field ``logdensity``.
        proposal: Proposed state, of the same structure.
        log_ratio: Log acceptance ratio.
        log_uniform: Log of a uniform on (0, 1).

    Returns:
        The new state and the `Info` of the step.
    """
    log_ratio, is_divergent = log_acceptance(log_ratio)
    # The barrier keeps XLA from recomputing the margin wherever it is read.
    margin = jax.lax.optimization_barrier(log_ratio - log_uniform)
    new = select(surrogate, margin, proposal, state)
    return new, Info(
        acceptance_rate=jnp.exp(jnp.minimum(log_ratio, 0.0)),
        is_divergent=is_divergent,
        margin=margin,
        logdensity=new.logdensity,
    )


class GradientState(NamedTuple):
    """A position with its log density and gradient.

    Attributes:
        position: Position in the target's coordinates; shape (D,).
        logdensity: Log density at the position.
        gradient: Gradient of the log density; shape (D,).
    """

    position: Array
    logdensity: Array
    gradient: Array


def accept(
    surrogate: Surrogate, state: GradientState, proposal: GradientState, log_ratio: Array, log_uniform: Array
) -> tuple[GradientState, Info]:
    """Make the Metropolis decision as `decide` does; a proposal whose gradient is not finite is impossible."""
    usable = jnp.all(jnp.isfinite(proposal.gradient))
    return decide(surrogate, state, proposal, jnp.where(usable, log_ratio, jnp.nan), log_uniform)


class GradientKernel(PositionKernel):
    """Base class of kernels whose unknown is the position alone; log density and gradient are caches.

    Momenta have shape (D,), or (D, L) for a batch with lanes last.
    """

    def restore(self, target, unknown: Array) -> GradientState:
        return GradientState(unknown, *target.value_and_grad(unknown))

    def _momentum(self, normal: Array) -> Array:
        """Return a momentum with covariance M: z / sqrt(M^{-1}), or L^{-T} z with M^{-1} = L L^T."""
        if self.metric is None:
            return normal
        metric = jnp.asarray(self.metric, normal.dtype)
        if metric.ndim < 2:
            return normal / _before_lanes(jnp.sqrt(metric), normal)
        return jax.scipy.linalg.solve_triangular(jnp.linalg.cholesky(metric), normal, lower=True, trans=1)

    def _velocity(self, momentum: Array) -> Array:
        """Return M^{-1} p."""
        if self.metric is None:
            return momentum
        metric = jnp.asarray(self.metric, momentum.dtype)
        return _before_lanes(metric, momentum) * momentum if metric.ndim < 2 else metric @ momentum


def _before_lanes(diagonal: Array, like: Array) -> Array:
    """Return a diagonal (D,), or a number, with axes of size 1 for the lanes of ``like``."""
    return diagonal.reshape(*diagonal.shape, *(1,) * (like.ndim - diagonal.ndim))


class WalkState(NamedTuple):
    """A position with its log density.

    Attributes:
        position: Position in the target's coordinates; shape (D,).
        logdensity: Log density at the position.
    """

    position: Array
    logdensity: Array


class WalkNoise(NamedTuple):
    """Randomness of one step of `RandomWalk`.

    Attributes:
        vector: Standard normal z; in a grid step the grid's offset, uniform on (0, 1). Shape (D,).
        radial: Standard normal, the component of the increment along the radius.
        is_grid: Whether the step is a grid step.
        is_independent: Whether the step is an independent step; None if the kernel takes none.
        half_square: |vector|^2 / 2, for independent steps; None if the kernel takes none.
        log_uniform: Log of a uniform on (0, 1), for the Metropolis decision.
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
    """Random-walk Metropolis without gradients: a proposal of variance h^2 per coordinate, accepted or rejected.

    Chains that add the same increments keep their distance. Here the increment depends on the state as well as on the
    noise, in ways that keep the Metropolis step exact. The kind of each step is part of its noise:

    - Radial: ``y = x + h (z + (v - z.n) n)`` with ``n = x / |x|`` and normal z (D,) and v drawn first. Given x, v
      replaces the component of z along n, which has the same distribution and is independent of the others, so the
      increment is N(0, h^2 I) at any x. Two chains move outwards or inwards together, each in its own direction from
      the origin, so they approach each other, the more strongly the closer they are. If |x|^2 underflows, n is zero and
      the increment is h z.
    - Grid: the point nearest to x of a lattice of width ``w = sqrt(12) h`` with an offset u uniform on its cell,
      ``y = w (round(x / w - u) + u)``. Given x, the fractional part of x / w - u is uniform for any x, so y is uniform
      on the box of width w around x. Since y lies in the box around x if and only if x lies in the box around y, the
      proposal is symmetric. All chains in one cell propose the same point, bit for bit, and have merged if they accept
      it.
    - Independent: ``y ~ N(0, I)``, with the ratio ``exp((|y|^2 - |x|^2) / 2)`` of its densities in the acceptance.

    Origin and unit are those of the coordinates found by warm-up, fixed before the chain: the posterior's mean and
    spread. Warm-up explores by HMC, though. For a density without a gradient pass ``num_warmup=0`` and a step size, or
    ``Compose([(RandomWalk(), sites)])``, which is warmed up by its own steps.

    Args:
        step_size: h, a standard deviation. None: tuned by warm-up to an acceptance rate of 0.234 + 0.206 / D.
        grid_share: Probability of a grid step among the steps that are not independent. None: ``min(1, 6 D^(-3/2))``.
            A grid step fails to merge two chains if a cell border lies between them, and leaves them about w apart. In
            more dimensions this is likelier, and radial steps bring the chains close more slowly.
        independence_share: Probability of an independent step. If the whitened posterior is so close to a Gaussian that
            independent steps are accepted now and then, chains merge after a few of them; otherwise they are wasted.
            None: no independent steps.
        surrogate: Derivative of the accept decision, used by Newton-type solvers only.

    Raises:
        ValueError: ``step_size`` is not positive, or a share is outside [0, 1].

    Source: Metropolis et al. (1953); Papp & Sherlock (2022), "A new and asymptotically optimally contracting coupling
    for the random walk Metropolis" (a shared component along the gradient, which is the radius on a spherical
    Gaussian); Neal (1999), "Circularly-coupled Markov chain sampling" (the random grid, used once other steps have
    brought chains close); Roberts, Gelman & Gilks (1997) for 0.234.

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
        check_step_size(self.step_size)
        for name in ("grid_share", "independence_share"):
            share = known_number(name, getattr(self, name))
            if share is not None and not 0 <= share <= 1:
                raise ValueError(f"{name} must lie in [0, 1], got {share}.")

    def target_acceptance_rate(self, dim):
        # Interpolates between 0.44 at D = 1 and the limit 0.234 for large D. Rates measured on Gaussians at the optimal
        # step 2.38 / sqrt(D): 0.44, 0.36, 0.32, 0.29, 0.26, 0.25 for D = 1, 2, 3, 5, 10, 25.
        return 0.234 + 0.206 / dim

    def first_step_size(self, dim):
        return 2.38 / math.sqrt(dim)

    def restore(self, target, unknown: Array) -> WalkState:
        return WalkState(unknown, target.logdensity_fn(unknown))

    @property
    def divergences_matter(self):
        return False

    @property
    def uses_gradient(self):
        return False

    def sample_noise(self, rng_key, target):
        dtype = target.spec.dtype
        u = uniforms(rng_key, target.dim + 3 + (self.independence_share is not None), at_least_single(dtype))
        vector, rest = u[: target.dim], u[target.dim :]
        is_grid, is_independent = rest[0] < self._grid_share(target.dim), None
        half_square = None
        if self.independence_share is not None:
            is_independent = rest[3] < self.independence_share
            is_grid = is_grid & ~is_independent
        vector = jnp.where(is_grid, rounded(vector, dtype), normals(vector).astype(dtype))
        if is_independent is not None:
            half_square = 0.5 * jnp.sum(vector**2)
        return WalkNoise(
            vector=vector,
            radial=normals(rest[1]).astype(dtype),
            is_grid=is_grid,
            is_independent=is_independent,
            half_square=half_square,
            log_uniform=jnp.log(rest[2]).astype(dtype),
        )

    def nudge(self, noise, amount):
        return noise._replace(log_uniform=noise.log_uniform + amount)

    def step(self, target, state: WalkState, noise: WalkNoise) -> tuple[WalkState, Info]:
        x, vector = state.position, noise.vector
        step_size = jnp.asarray(self.step_size, x.dtype)
        squared = jnp.sum(x**2)
        # Radial and independent proposals are both a x + b z, so one pass over the coordinates computes either of them.
        # Separately, each with its own reduction, a step in ten dimensions took 2.2 us instead of 0.2 us on CPU.
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
        """Return the probability of a grid step among steps that are not independent, in ``dim`` dimensions."""
        return min(1.0, 6 * dim**-1.5) if self.grid_share is None else self.grid_share


def _radial_weight(x: Array, squared: Array, noise: WalkNoise) -> Array:
    """Return c such that z + c x is z with v as its component along x; 0 if |x|^2 is too small to be accurate."""
    limits = jnp.finfo(x.dtype)
    usable = squared > limits.tiny / limits.eps
    squared = jnp.where(usable, squared, 1.0)
    return jnp.where(usable, noise.radial / jnp.sqrt(squared) - jnp.sum(noise.vector * x) / squared, 0.0)


def _grid_point(x: Array, offset: Array, step_size: Array) -> Array:
    """Return the lattice point nearest to x, with the same bits for all x of a cell.

    The integers are exact, and everything computed from them is independent of x.
    """
    width = math.sqrt(12) * step_size
    return (jnp.round(x / width - offset) + offset) * width
