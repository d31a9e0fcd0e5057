"""Targets and kernels of the benchmarks, as published if a source is named."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks._harness import SHARED
from pmcmc.kernels import HMC, MALA, NUTS, Kernel, RandomWalk
from pmcmc.target import Basis, Target


@dataclass(frozen=True)
class Case:
    """A target with a tuned kernel and typical states.

    Args:
        name: Name of the case.
        target: The target.
        kernel: The tuned kernel.
        start: ``(key, n)`` -> n states.
        scale: Scale of each coordinate; None measures it on the path.
        length: Steps to solve.
        settle: Steps from ``start`` to typical states; 0 if it draws from the target, or nearly so.
    """

    name: str
    target: Target
    kernel: Kernel
    start: Callable
    scale: jax.Array | None
    length: int
    settle: int = 200

    @property
    def dim(self) -> int:
        """Number of entries of a state."""
        one = jax.eval_shape(lambda key: self.start(key, 1), jax.random.key(0))
        return sum(x.size for x in jax.tree.leaves(one))


def mixture(length: int = 10**5) -> Case:
    """Four standard Gaussians at (+-2, +-2), MALA."""
    centres = jnp.array([[2.0, 2.0], [-2.0, 2.0], [2.0, -2.0], [-2.0, -2.0]])

    def logdensity(x):
        return jax.nn.logsumexp(-0.5 * jnp.sum((x[None] - centres) ** 2, -1))

    start = lambda key, n: 2 * jax.random.normal(key, (n, 2))
    return Case("mixture, MALA", _target(logdensity, 2), MALA(0.8), start, jnp.full(2, 2.2), length)


def banana(length: int = 10**5) -> Case:
    """x0 ~ N(0, 10^2), x1 ~ N(0.03 (x0^2 - 100), 1) (Haario et al. 1999), HMC of 8 steps of 0.5."""

    def logdensity(x):
        return -0.5 * ((x[0] / 10) ** 2 + (x[1] - 0.03 * (x[0] ** 2 - 100)) ** 2)

    def start(key, n):
        z = jax.random.normal(key, (n, 2))
        return jnp.stack([10 * z[:, 0], z[:, 1] + 3 * (z[:, 0] ** 2 - 1)], 1)

    return Case("banana, HMC", _target(logdensity, 2), HMC(0.5, 8), start, jnp.array([10.0, 4.4]), length, 0)


def eight_schools(length: int = 10**5) -> Case:
    """Rubin 1981, non-centred, tau half-Cauchy(5) on the log scale; HMC of 4 jittered steps of 0.4."""
    effect = jnp.array([28.0, 8.0, -3.0, 7.0, -1.0, 1.0, 18.0, 12.0])
    error = jnp.array([15.0, 10.0, 16.0, 11.0, 9.0, 11.0, 10.0, 18.0])

    def logdensity(x):
        mu, log_tau, z = 5 * x[0], x[1], x[2:]
        tau = jnp.exp(log_tau)
        prior = -0.5 * x[0] ** 2 - jnp.log1p((tau / 5) ** 2) + log_tau - 0.5 * jnp.sum(z**2)
        return prior - 0.5 * jnp.sum(((effect - mu - tau * z) / error) ** 2)

    start = lambda key, n: 0.5 * jax.random.normal(key, (n, 10))
    return Case("eight schools, HMC", _target(logdensity, 10), HMC(0.4, 4), start, jnp.ones(10), length)


def german_credit(length: int = 10**5) -> Case:
    """Logistic regression, N(0, 1) priors, D = 25 (UCI Statlog, or synthetic data of the same size), MALA.

    Whitened by the Laplace approximation at the mode.
    """
    target, mode, scale_tril = german_target()
    target = target.with_basis(Basis(mode, scale_tril))
    start = lambda key, n: jax.random.normal(key, (n, 25))
    return Case("German credit, MALA", target, MALA(0.2), start, jnp.ones(25), length, 0)


def correlated(length: int = 10**5) -> Case:
    """Gaussian in ten dimensions whose neighbours correlate by 0.5, not whitened; random walk of step 0.6."""
    distance = np.abs(np.subtract.outer(np.arange(10), np.arange(10)))
    covariance = 0.5**distance
    precision, root = jnp.asarray(np.linalg.inv(covariance), float), jnp.asarray(np.linalg.cholesky(covariance), float)
    logdensity = lambda x: -0.5 * x @ precision @ x
    start = lambda key, n: jax.random.normal(key, (n, 10)) @ root.T
    return Case("correlated, walk", _target(logdensity, 10), RandomWalk(0.6), start, jnp.ones(10), length, 0)


def german_target() -> tuple[Target, jax.Array, jax.Array]:
    """Return the logistic regression in its own coordinates, with the mode and Cholesky factor of its Laplace fit."""
    design, good = german_data()
    mode, scale_tril = _laplace(design, good)
    x, y = jnp.asarray(design, float), jnp.asarray(good, float)

    def logdensity(beta):
        logits = x @ beta
        return jnp.sum(y * logits - jax.nn.softplus(logits)) - 0.5 * jnp.sum(beta**2)

    return _target(logdensity, 25), jnp.asarray(mode, float), jnp.asarray(scale_tril, float)


def _target(logdensity: Callable, dim: int) -> Target:
    """Make a target of a log density over vectors."""
    return Target.from_logdensity(logdensity, jnp.zeros(dim))


def german_data() -> tuple[np.ndarray, np.ndarray]:
    """Return the standardised design with an intercept, and the labels."""
    path = SHARED / "data" / "german_credit_numeric.csv"
    if path.exists():
        table = np.loadtxt(path, delimiter=",", skiprows=1)
        features, good = table[:, :-1], table[:, -1]
        features = (features - features.mean(0)) / features.std(0)
    else:
        print("German credit data absent: using a synthetic twin of the same size.")
        rng = np.random.default_rng(0)
        features = rng.standard_normal((1000, 24))
        good = (rng.random(1000) < 1 / (1 + np.exp(-(features @ rng.standard_normal(24) * 0.3 + 1)))).astype(float)
    return np.c_[features, np.ones(len(features))], good


def _laplace(design: np.ndarray, good: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return the mode and the Cholesky factor of the inverse Hessian, by Newton's method."""
    mode = np.zeros(design.shape[1])
    for _ in range(20):
        p = 1 / (1 + np.exp(-design @ mode))
        hessian = design.T @ (design * (p * (1 - p))[:, None]) + np.eye(len(mode))
        mode = mode + np.linalg.solve(hessian, design.T @ (good - p) - mode)
    return mode, np.linalg.cholesky(np.linalg.inv(hessian))


def gaussian(dim: int, length: int = 10**5) -> Case:
    """N(0, diag(s^2)), s log-spaced from 0.01 to 1, in the basis that warm-up with a diagonal metric would find.

    HMC with jittered steps of 1.3 D^(-1/4), about one radian long.
    """
    scales = jnp.logspace(-2, 0, dim)
    target = _target(lambda x: -0.5 * jnp.sum((x / scales) ** 2), dim).with_basis(Basis(jnp.zeros(dim), scales))
    step_size = 1.3 * dim**-0.25
    start = lambda key, n: jax.random.normal(key, (n, dim))
    kernel = HMC(step_size, max(1, round(1 / step_size)))
    return Case(f"Gaussian, D = {dim:,}, HMC", target, kernel, start, jnp.ones(dim), length, 0)


def german_credit_hmc(length: int = 10**5) -> Case:
    """HMC of 3 jittered steps of 0.5: acceptance rate 0.97."""
    return replace(german_credit(length), name="German credit, HMC", kernel=HMC(0.5, 3))


def mixture_hmc(length: int = 10**5) -> Case:
    """HMC of 3 jittered steps of 0.8."""
    return replace(mixture(length), name="mixture, HMC", kernel=HMC(0.8, 3))


def eight_schools_mala(length: int = 10**5) -> Case:
    """MALA of step size 0.25."""
    return replace(eight_schools(length), name="eight schools, MALA", kernel=MALA(0.25))


def banana_nuts(length: int = 10**5) -> Case:
    """NUTS of step 0.5."""
    return replace(banana(length), name="banana, NUTS", kernel=NUTS(0.5))


def eight_schools_nuts(length: int = 10**5) -> Case:
    """NUTS of step 0.5: acceptance rate 0.86."""
    return replace(eight_schools(length), name="eight schools, NUTS", kernel=NUTS(0.5))


def german_credit_nuts(length: int = 10**5) -> Case:
    """NUTS of step 0.7: acceptance rate 0.82."""
    return replace(german_credit(length), name="German credit, NUTS", kernel=NUTS(0.7))


CASES: dict[str, Callable[..., Case]] = {
    "mixture": mixture,
    "mixture_hmc": mixture_hmc,
    "banana": banana,
    "banana_nuts": banana_nuts,
    "eight_schools": eight_schools,
    "eight_schools_mala": eight_schools_mala,
    "eight_schools_nuts": eight_schools_nuts,
    "german_credit": german_credit,
    "german_credit_hmc": german_credit_hmc,
    "german_credit_nuts": german_credit_nuts,
    "correlated": correlated,
    **{f"gaussian_{dim}": partial(gaussian, dim) for dim in (10, 100, 1000, 10_000)},
}
