"""Problems of Zoltowski et al. (2025, "Parallelizing MCMC across the sequence length") with the settings there.

Each is a recurrence with its starts, its initial guess and the iteration counts of the published code (minimum, median
and maximum over 5 seeds). Their Metropolis decisions have the derivative of a sigmoid, `StraightThrough`.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import jax
import jax.numpy as jnp

from benchmarks.targets import banana, german_target, mixture
from pmcmc.kernels import HMC, MALA, Kernel, StraightThrough
from pmcmc.recurrence import Diagonal, HutchinsonDiagonal, LinearBasis, Newton, deer
from pmcmc.target import Target


@dataclass(frozen=True)
class Problem:
    """A recurrence ``fn(x, u)``, and how to draw and solve it.

    Args:
        name: Name of the problem.
        method: Name of the published method.
        fn: The recurrence.
        start: ``key -> x0``.
        inputs: ``(key, T) -> u``, leading axis T.
        guess: ``(key, x0, T)`` -> states, leading axis T.
        solver: ``key -> Newton``.
        length: T.
        published: Iterations of the published code: minimum, median, maximum.
    """

    name: str
    method: str
    fn: Callable
    start: Callable
    inputs: Callable
    guess: Callable
    solver: Callable
    length: int
    published: tuple[int, int, int]


def _repeat(key: Any, x0: jax.Array, length: int) -> jax.Array:
    """Guess x0 at every step."""
    return jnp.broadcast_to(x0, (length, *x0.shape))


def _chain(target: Target, kernel: Kernel) -> dict[str, Callable]:
    """A kernel on a target as a recurrence with its noise as inputs."""
    transition = kernel.transition(target)
    noise = lambda key, n: jax.vmap(lambda k: kernel.sample_noise(k, target))(jax.random.split(key, n))
    return dict(fn=lambda x, u: transition(x, u)[0], inputs=noise)


def _stochastic(key: Any, **options: Any) -> Newton:
    """Newton with a diagonal estimated by one probe."""
    return Newton(HutchinsonDiagonal(key, num_probes=1), **options)


def german_credit_mala(length: int = 10_000, published: tuple = (20, 22, 87)) -> Problem:
    """Logistic regression, D = 25, MALA of step 0.0015 from 0.1 N(0, 1); basis: principal axes of the Laplace fit."""
    target, _, scale_tril = german_target()
    basis = LinearBasis.from_covariance(scale_tril @ scale_tril.T)
    return Problem(
        name="German credit, MALA",
        method="stochastic quasi-DEER, rotated",
        **_chain(target, MALA(0.0015, StraightThrough())),
        start=lambda key: 0.1 * jax.random.normal(key, (25,)),
        guess=_repeat,
        solver=lambda key: _stochastic(key, basis=basis, clip=1.0),
        length=length,
        published=published,
    )


def mixture_mala() -> Problem:
    """Four Gaussians, MALA of step 0.5, from a guess of independent N(0, 1) states."""
    return Problem(
        name="mixture, MALA",
        method="stochastic quasi-DEER",
        **_chain(mixture().target, MALA(0.5, StraightThrough())),
        start=lambda key: jax.random.normal(key, (2,)),
        guess=lambda key, x0, n: jax.random.normal(key, (n, 2)),
        solver=lambda key: _stochastic(key, clip=1.0),
        length=10_000,
        published=(77, 98, 140),
    )


def banana_hmc() -> Problem:
    """Banana, HMC of 8 leapfrog steps of 0.5 without jitter, from 10 N(0, 1); Jacobians damped by 0.55.

    The clip differs from the source: 0.5 instead of 1.0. With 1.0, 4 of 10 seeds are not solved in 300 iterations in
    float32 (93/133/301); without a clip 7 of 10 are not solved in 200. The clip was chosen among about 15 variants
    (damping, clip, surrogate, guess, basis, trust region) on seeds 0-9, so the figure there, 90/104/139, is tuned;
    seeds 100-109 gave 87/109/135.
    """
    kernel = HMC(0.5, 8, step_size_jitter=0.0, surrogate=StraightThrough())
    return Problem(
        name="banana, HMC",
        method="DEER, damping 0.55, clipped",
        **_chain(banana().target, kernel),
        start=lambda key: 10 * jax.random.normal(key, (2,)),
        guess=_repeat,
        solver=lambda key: deer(damping=0.55, clip=0.5),
        length=10_000,
        published=(94, 107, 127),
    )


NUM_SCHOOLS, NUM_STUDENTS = 8, 20
MEAN_CONCENTRATION, MEAN_DEGREES, MEAN_VARIANCE = 0.1, 0.1, 100.0  # prior of the schools' mean and variance
SCHOOL_DEGREES, SCHOOL_VARIANCE = 0.1, 10.0  # prior of the variance within a school


def gibbs_step(x: jax.Array, u: tuple) -> jax.Array:
    """One sweep of a Gibbs sampler of the eight schools with unknown variances, 18 numbers.

    20 students in school s with mean m[s] and variance 20 e[s]^2 (the published effects and errors, exactly), students
    ~ N(theta[s], v[s]), theta[s] ~ N(mu, tau2), mu ~ N(0, tau2 / 0.1), tau2 and v[s] scaled inverse chi-squared.
    Inverse gammas are ``scale / g`` with g ~ Gamma(shape, 1) drawn first: no shape depends on the state.

    Args:
        x: The state: theta (8), v (8), mu, tau2.
        u: Standard normals (9,) and gammas (9,); the last of each are for mu and tau2.
    """
    effect = jnp.array([28.0, 8.0, -3.0, 7.0, -1.0, 1.0, 18.0, 12.0])
    error = jnp.array([15.0, 10.0, 16.0, 11.0, 9.0, 11.0, 10.0, 18.0])
    normal, gamma = u
    theta, v, mu = x[:NUM_SCHOOLS], x[NUM_SCHOOLS:-2], x[-2]
    squares = MEAN_DEGREES * MEAN_VARIANCE + MEAN_CONCENTRATION * mu**2 + jnp.sum((theta - mu) ** 2)
    tau2 = 0.5 * squares / gamma[-1]
    weight = MEAN_CONCENTRATION + NUM_SCHOOLS
    mu = jnp.sum(theta) / weight + jnp.sqrt(tau2 / weight) * normal[-1]
    variance = 1 / (NUM_STUDENTS / v + 1 / tau2)
    theta = variance * (NUM_STUDENTS * effect / v + mu / tau2) + jnp.sqrt(variance) * normal[:-1]
    squares = NUM_STUDENTS * (NUM_STUDENTS * error**2 + (effect - theta) ** 2)
    v = 0.5 * (SCHOOL_DEGREES * SCHOOL_VARIANCE + squares) / gamma[:-1]
    return jnp.concatenate([theta, v, jnp.stack([mu, tau2])])


def _gibbs_inputs(key: Any, length: int) -> tuple:
    """Draw the noise of ``length`` sweeps."""
    normal_key, gamma_key = jax.random.split(key)
    shapes = 0.5 * jnp.array([SCHOOL_DEGREES + NUM_STUDENTS] * NUM_SCHOOLS + [MEAN_DEGREES + NUM_SCHOOLS + 1])
    draws = (length, NUM_SCHOOLS + 1)
    return jax.random.normal(normal_key, draws), jax.random.gamma(gamma_key, shapes, draws)


def _gibbs_start(key: Any) -> jax.Array:
    """Take three sweeps from a rough guess."""
    x = jnp.concatenate([jnp.zeros(NUM_SCHOOLS), jnp.full(NUM_SCHOOLS, 10.0), jnp.array([0.0, MEAN_VARIANCE])])
    return jax.lax.scan(lambda x, u: (gibbs_step(x, u), None), x, _gibbs_inputs(key, 3))[0]


def gibbs_deer() -> Problem:
    """Gibbs on the eight schools with the full Jacobian."""
    return Problem(
        name="eight schools, Gibbs",
        method="DEER",
        fn=gibbs_step,
        start=_gibbs_start,
        inputs=_gibbs_inputs,
        guess=_repeat,
        solver=lambda key: deer(),
        length=10_000,
        published=(19, 27, 38),
    )


def gibbs_quasi() -> Problem:
    """Gibbs on the eight schools with the exact clipped diagonal.

    The published code uses one probe instead, and divides entries by 10 or 1,000.
    """
    quasi = lambda key: Newton(Diagonal(), clip=1.0)
    return replace(gibbs_deer(), method="quasi-DEER", solver=quasi, published=(105, 120, 218))


PROBLEMS = {
    "mixture": mixture_mala,
    "banana": banana_hmc,
    "gibbs": gibbs_deer,
    "gibbs_quasi": gibbs_quasi,
    "german_short": lambda: german_credit_mala(2048, (15, 18, 22)),
    "german": german_credit_mala,
}
