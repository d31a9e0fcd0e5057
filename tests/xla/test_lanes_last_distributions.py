"""`vmap_last` and ``jax.vmap`` agree on every distribution and transform of NumPyro, for values and gradients."""

import jax
import jax.numpy as jnp
import numpy as np
import numpyro.distributions as dist
import pytest
from numpyro.distributions import constraints, transforms

from pmcmc._xla.lanes_last import vmap_last

LANES = 5
MATRIX = np.array([[2.0, 0.3, 0.1], [0.3, 1.5, 0.2], [0.1, 0.2, 1.0]])
TRIL = np.linalg.cholesky(MATRIX)
CORRELATION = np.linalg.cholesky(np.array([[1.0, 0.3, 0.1], [0.3, 1.0, 0.2], [0.1, 0.2, 1.0]]))
SIMPLEX = np.array([0.2, 0.5, 0.3])
ADJACENCY = np.array([[0.0, 1.0, 0.0], [1.0, 0.0, 1.0], [0.0, 1.0, 0.0]])
X = np.array([0.3, 0.6, 1.2])


def _walk(drift, noise):
    return dist.EulerMaruyama(np.arange(4.0), lambda x, t: (drift * x, noise), dist.Normal(0.0, 1.0))


# Each distribution: how it is made from parameters, the parameters, and a value.
DISTRIBUTIONS = {
    "AsymmetricLaplace": (dist.AsymmetricLaplace, (0.1, 1.2, 0.8), X),
    "AsymmetricLaplaceQuantile": (dist.AsymmetricLaplaceQuantile, (0.1, 1.2, 0.4), X),
    "BernoulliLogits": (lambda p: dist.Bernoulli(logits=p), (X,), np.array([0, 1, 1])),
    "BernoulliProbs": (lambda p: dist.Bernoulli(probs=p), (0.4,), np.array([0, 1, 1])),
    "Beta": (dist.Beta, (1.5, 2.5), np.array([0.2, 0.5])),
    "BetaBinomial": (lambda a, b: dist.BetaBinomial(a, b, 10), (1.5, 2.5), np.array([2, 5])),
    "BetaNegativeBinomial": (dist.BetaNegativeBinomial, (1.5, 2.5, 3.0), np.array([2, 5])),
    "BetaProportion": (dist.BetaProportion, (0.4, 3.0), np.array([0.2, 0.5])),
    "BinomialLogits": (lambda p: dist.Binomial(10, logits=p), (0.4,), np.array([2, 5])),
    "BinomialProbs": (lambda p: dist.Binomial(10, probs=p), (0.4,), np.array([2, 5])),
    "CAR": (lambda loc, c, p: dist.CAR(loc, c, p, ADJACENCY), (0.1, 0.4, 1.2), X),
    "CategoricalLogits": (lambda p: dist.Categorical(logits=p), (X,), np.array([0, 2, 1])),
    "CategoricalProbs": (lambda p: dist.Categorical(probs=p), (SIMPLEX,), np.array([0, 2, 1])),
    "Cauchy": (dist.Cauchy, (0.1, 1.2), X),
    "Chi2": (dist.Chi2, (2.5,), X),
    "CirculantNormal": (
        lambda loc, row: dist.CirculantNormal(loc, row),
        (X, np.array([2.0, 0.3, 0.3])),
        X + 0.5,
    ),
    "Dagum": (dist.Dagum, (1.2, 0.8, 2.0), X),
    "Delta": (lambda v, d: dist.Delta(v, d), (X, 0.4), X),
    "Dirichlet": (dist.Dirichlet, (X + 1.0,), SIMPLEX),
    "DirichletMultinomial": (lambda c: dist.DirichletMultinomial(c, 6), (X + 1.0,), np.array([1, 3, 2])),
    "DiscreteUniform": (lambda: dist.DiscreteUniform(0, 4), (), np.array([1, 3, 2])),
    "DoublyTruncatedPowerLaw": (dist.DoublyTruncatedPowerLaw, (-1.5, 0.1, 3.0), X),
    "EulerMaruyama": (_walk, (-0.3, 0.8), np.array([0.1, 0.4, -0.2, 0.3])),
    "Exponential": (dist.Exponential, (1.2,), X),
    "FoldedDistribution": (lambda loc: dist.FoldedDistribution(dist.Normal(loc, 1.0)), (0.3,), X),
    "Gamma": (dist.Gamma, (1.5, 2.5), X),
    "GammaPoisson": (dist.GammaPoisson, (1.5, 2.5), np.array([2, 5])),
    "GaussianCopula": (
        lambda a, m: dist.GaussianCopula(dist.Gamma(a, 1.0), correlation_cholesky=m),
        (1.5, CORRELATION),
        X,
    ),
    "GaussianCopulaBeta": (
        lambda m: dist.GaussianCopulaBeta(np.full(3, 1.5), np.full(3, 2.5), correlation_cholesky=m),
        (CORRELATION,),
        np.array([0.2, 0.5, 0.7]),
    ),
    "GaussianRandomWalk": (lambda s: dist.GaussianRandomWalk(s, 3), (0.7,), X),
    "GaussianStateSpace": (
        lambda a, t: dist.GaussianStateSpace(4, a, scale_tril=t),
        (0.3 * MATRIX, TRIL),
        np.linspace(-1, 1, 12).reshape(4, 3),
    ),
    "GeometricLogits": (lambda p: dist.Geometric(logits=p), (0.4,), np.array([2, 5])),
    "GeometricProbs": (lambda p: dist.Geometric(probs=p), (0.4,), np.array([2, 5])),
    "Gompertz": (dist.Gompertz, (0.8, 1.2), X),
    "Gumbel": (dist.Gumbel, (0.1, 1.2), X),
    "HalfCauchy": (dist.HalfCauchy, (1.2,), X),
    "HalfNormal": (dist.HalfNormal, (1.2,), X),
    "ImproperUniform": (lambda: dist.ImproperUniform(constraints.real, (), (3,)), (), X),
    "Independent": (lambda loc: dist.Normal(loc, 1.0).to_event(1), (X,), X + 0.5),
    "InverseGamma": (dist.InverseGamma, (1.5, 2.5), X),
    "Kumaraswamy": (dist.Kumaraswamy, (1.5, 2.5), np.array([0.2, 0.5])),
    "LKJ": (lambda c: dist.LKJ(3, c), (1.5,), CORRELATION @ CORRELATION.T),
    "LKJCholesky": (lambda c: dist.LKJCholesky(3, c), (1.5,), CORRELATION),
    "Laplace": (dist.Laplace, (0.1, 1.2), X),
    "LeftCensoredDistribution": (
        lambda loc: dist.LeftCensoredDistribution(dist.Normal(loc, 1.0), np.array([0, 1, 0])),
        (0.3,),
        X,
    ),
    "RightCensoredDistribution": (
        lambda loc: dist.RightCensoredDistribution(dist.Normal(loc, 1.0), np.array([0, 1, 0])),
        (0.3,),
        X,
    ),
    "LeftTruncatedDistribution": (
        lambda loc, low: dist.LeftTruncatedDistribution(dist.Normal(loc, 1.0), low),
        (0.3, 0.1),
        X,
    ),
    "Levy": (dist.Levy, (0.1, 1.2), X),
    "LogNormal": (dist.LogNormal, (0.1, 1.2), X),
    "LogUniform": (dist.LogUniform, (0.1, 5.0), X),
    "Logistic": (dist.Logistic, (0.1, 1.2), X),
    "LowRankMultivariateNormal": (dist.LowRankMultivariateNormal, (X, MATRIX[:, :2], X), X + 0.5),
    "LowerTruncatedPowerLaw": (dist.LowerTruncatedPowerLaw, (-1.5, 0.1), X),
    "MaskedDistribution": (lambda loc: dist.Normal(loc, 1.0).mask(np.array([True, False, True])), (0.3,), X),
    "MatrixNormal": (dist.MatrixNormal, (np.zeros((3, 2)), TRIL, TRIL[:2, :2]), np.linspace(-1, 1, 6).reshape(3, 2)),
    "MixtureGeneral": (
        lambda p, loc: dist.MixtureGeneral(dist.Categorical(p), [dist.Normal(loc, 1.0), dist.StudentT(3.0, loc, 2.0)]),
        (np.array([0.3, 0.7]), 0.3),
        X,
    ),
    "MixtureSameFamily": (
        lambda p, loc: dist.MixtureSameFamily(dist.Categorical(p), dist.Normal(loc, 1.0)),
        (SIMPLEX, X),
        X,
    ),
    "MultinomialLogits": (
        lambda p: dist.Multinomial(logits=p, total_count=6),
        (X,),
        np.array([1, 3, 2]),
    ),
    "MultinomialProbs": (lambda p: dist.Multinomial(probs=p, total_count=6), (SIMPLEX,), np.array([1, 3, 2])),
    "MultivariateNormal": (lambda loc, t: dist.MultivariateNormal(loc, scale_tril=t), (X, TRIL), X + 0.5),
    "MultivariateNormal of a covariance": (dist.MultivariateNormal, (X, MATRIX), X + 0.5),
    "MultivariateStudentT": (dist.MultivariateStudentT, (3.0, X, TRIL), X + 0.5),
    "NegativeBinomial2": (dist.NegativeBinomial2, (1.5, 2.5), np.array([2, 5])),
    "NegativeBinomialLogits": (lambda p: dist.NegativeBinomial(4, logits=p), (0.4,), np.array([2, 5])),
    "NegativeBinomialProbs": (lambda p: dist.NegativeBinomial(4, probs=p), (0.4,), np.array([2, 5])),
    "Normal": (dist.Normal, (0.1, 1.2), X),
    "OrderedLogistic": (lambda p, c: dist.OrderedLogistic(p, c), (0.3, X), np.array([0, 3, 1])),
    "Pareto": (dist.Pareto, (0.1, 1.5), X),
    "Poisson": (dist.Poisson, (1.5,), np.array([2, 5])),
    "ProjectedNormal": (dist.ProjectedNormal, (X,), X / np.linalg.norm(X)),
    "RelaxedBernoulliLogits": (lambda t, p: dist.RelaxedBernoulliLogits(t, p), (0.8, 0.3), np.array([0.2, 0.5])),
    "RightTruncatedDistribution": (
        lambda loc, high: dist.RightTruncatedDistribution(dist.Normal(loc, 1.0), high),
        (0.3, 2.0),
        X,
    ),
    "SineBivariateVonMises": (
        lambda a, b, c: dist.SineBivariateVonMises(0.1, 0.2, a, b, c),
        (1.5, 2.5, 0.5),
        np.array([0.3, 0.6]),
    ),
    "SineSkewed": (
        lambda k, s: dist.SineSkewed(dist.VonMises(0.1, k).expand([2]).to_event(1), s),
        (1.5, np.array([0.3, 0.2])),
        np.array([0.3, 0.6]),
    ),
    "SoftLaplace": (dist.SoftLaplace, (0.1, 1.2), X),
    "StudentT": (dist.StudentT, (3.5, 0.1, 1.2), X),
    "TransformedDistribution": (
        lambda loc: dist.TransformedDistribution(dist.Normal(loc, 1.0), transforms.SigmoidTransform()),
        (0.3,),
        np.array([0.2, 0.5]),
    ),
    "TruncatedCauchy": (lambda loc: dist.TruncatedCauchy(loc, 1.0, low=0.1), (0.3,), X),
    "TruncatedNormal": (lambda loc: dist.TruncatedNormal(loc, 1.0, low=0.1, high=3.0), (0.3,), X),
    "TruncatedPolyaGamma": (lambda: dist.TruncatedPolyaGamma(), (), X),
    "TwoSidedTruncatedDistribution": (
        lambda loc: dist.TwoSidedTruncatedDistribution(dist.Normal(loc, 1.0), 0.1, 3.0),
        (0.3,),
        X,
    ),
    "Uniform": (dist.Uniform, (0.1, 5.0), X),
    "Unit": (lambda factor: dist.Unit(factor), (X,), np.zeros((3, 0))),
    "VonMises": (dist.VonMises, (0.1, 1.5), X),
    "Weibull": (dist.Weibull, (1.2, 1.5), X),
    "Wishart": (lambda t: dist.Wishart(4.5, scale_tril=t), (TRIL,), MATRIX),
    "WishartCholesky": (lambda t: dist.WishartCholesky(4.5, scale_tril=t), (TRIL,), TRIL),
    "ZeroInflatedDistribution": (
        lambda g, r: dist.ZeroInflatedDistribution(dist.Poisson(r), gate=g),
        (0.3, 1.5),
        np.array([0, 5]),
    ),
    "ZeroInflatedLogits": (
        lambda g, r: dist.ZeroInflatedDistribution(dist.Poisson(r), gate_logits=g),
        (0.3, 1.5),
        np.array([0, 5]),
    ),
    "ZeroInflatedNegativeBinomial2": (
        lambda m, c: dist.ZeroInflatedNegativeBinomial2(m, c, gate=0.3),
        (1.5, 2.5),
        np.array([0, 5]),
    ),
    "ZeroInflatedPoisson": (dist.ZeroInflatedPoisson, (0.3, 1.5), np.array([0, 5])),
    "ZeroSumNormal": (lambda s: dist.ZeroSumNormal(s, event_shape=(3,)), (1.2,), np.array([0.2, 0.3, -0.5])),
}
# Base classes, and functions that return one of the distributions above.
OTHERS = {
    *("Bernoulli", "Binomial", "Categorical", "Distribution", "ExpandedDistribution", "Geometric", "Mixture"),
    *("Multinomial", "NegativeBinomial", "RelaxedBernoulli", "TruncatedDistribution", "TruncatedGamma"),
    *("HurdleDistribution", "ZeroInflatedProbs"),
}
# Those that older NumPyros lack.
NEWER = {
    "HurdleGamma": lambda: (lambda g, a: dist.HurdleGamma(g, a, 1.0), (0.3, 1.5), np.array([0.0, 1.2])),
    "HurdleLogits": lambda: (
        lambda g, r: dist.HurdleDistribution(dist.Poisson(r), gate_logits=g),
        (0.3, 1.5),
        np.array([0, 5]),
    ),
    "HurdleLogNormal": lambda: (lambda g, m: dist.HurdleLogNormal(g, m, 1.0), (0.3, 0.5), np.array([0.0, 1.2])),
    "HurdleNegativeBinomial2": lambda: (
        lambda m, c: dist.HurdleNegativeBinomial2(0.3, m, c),
        (1.5, 2.5),
        np.array([0, 5]),
    ),
    "HurdlePoisson": lambda: (lambda g, r: dist.HurdlePoisson(g, r), (0.3, 1.5), np.array([0, 5])),
    "HurdleProbs": lambda: (
        lambda g, r: dist.HurdleDistribution(dist.Poisson(r), gate=g),
        (0.3, 1.5),
        np.array([0, 5]),
    ),
    "IntervalCensoredDistribution": lambda: (
        lambda loc: dist.IntervalCensoredDistribution(dist.Normal(loc, 1.0), np.zeros(3, bool), np.zeros(3, bool)),
        (0.3,),
        np.stack([X, X + 1], -1),
    ),
    "InverseWishart": lambda: (lambda t: dist.InverseWishart(4.5, scale_tril=t), (TRIL,), MATRIX),
    "InverseWishartCholesky": lambda: (lambda t: dist.InverseWishartCholesky(4.5, scale_tril=t), (TRIL,), TRIL),
    "LeftTruncatedGamma": lambda: (lambda a: dist.LeftTruncatedGamma(dist.Gamma(a, 1.0), 0.1), (1.5,), X),
    "RightTruncatedGamma": lambda: (lambda a: dist.RightTruncatedGamma(dist.Gamma(a, 1.0), 3.0), (1.5,), X),
    "TwoSidedTruncatedGamma": lambda: (
        lambda a: dist.TwoSidedTruncatedGamma(dist.Gamma(a, 1.0), 0.1, 3.0),
        (1.5,),
        X,
    ),
}


def lanes_of(x, dtype):
    """Different, valid values near ``x`` for each lane, on the last axis; integers are those of ``x``."""
    x = np.asarray(x)
    wide = np.repeat(x[..., None], LANES, -1)
    if not np.issubdtype(x.dtype, np.floating):
        return jnp.asarray(wide)
    return jnp.asarray(wide * (1 + 0.01 * np.arange(LANES)), dtype)


def agree(fn, arguments, dtype):
    """Compare values and gradients of the sum of what ``fn`` returns."""
    floating = tuple(n for n, x in enumerate(arguments) if jnp.issubdtype(x.dtype, jnp.floating))
    total = lambda *args: sum(jnp.sum(x) for x in jax.tree.leaves(fn(*args)) if jnp.issubdtype(x.dtype, jnp.floating))
    both = lambda *args: (fn(*args), jax.grad(total, floating)(*args) if floating else ())
    found = jax.jit(vmap_last(both))(*arguments)
    expected = jax.jit(jax.vmap(both, in_axes=-1, out_axes=-1))(*arguments)
    bound = dict(rtol=2e-4, atol=2e-4) if dtype == jnp.float32 else dict(rtol=1e-8, atol=1e-9)
    for x, y in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        assert (x.shape, x.dtype) == (y.shape, y.dtype)
        np.testing.assert_allclose(x, y, **bound)
    assert any(np.all(np.isfinite(x)) and np.size(x) for x in jax.tree.leaves(expected))


def case(name):
    return DISTRIBUTIONS[name] if name in DISTRIBUTIONS else NEWER[name]()


DTYPES = [pytest.param(jnp.float32, marks=pytest.mark.slow), jnp.float64]
pytestmark = pytest.mark.filterwarnings("ignore")  # NumPyro's, about values near the edge of a support


@pytest.fixture(autouse=True)
def settings_of_users(request):
    """NumPyro relies on implicit rank promotion, and makes float64 of float32 where JAX lets it."""
    wide = request.node.callspec.params["dtype"] == jnp.float64 if hasattr(request.node, "callspec") else True
    with jax.numpy_rank_promotion("allow"), jax.enable_x64(wide):
        yield


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", [*DISTRIBUTIONS, *(name for name in NEWER if hasattr(dist, name))])
def test_log_densities(name, dtype):
    make, parameters, value = case(name)
    arguments = [lanes_of(x, dtype) for x in (*parameters, value)]
    agree(lambda *args: make(*args[:-1]).log_prob(args[-1]), arguments, dtype)


def test_every_distribution_is_compared():
    compared = {name.split(" ")[0] for name in DISTRIBUTIONS}
    missing = {name for name in dist.__all__ if name[0].isupper()} - compared - OTHERS - set(NEWER)
    assert missing == set()


TRANSFORMS = {
    "affine": (lambda: transforms.AffineTransform(0.3, 1.5), X),
    "cholesky": (lambda: transforms.CholeskyTransform(), MATRIX),
    "compose": (lambda: transforms.ComposeTransform([transforms.ExpTransform(), transforms.AffineTransform(1, 2)]), X),
    "corr_cholesky": (lambda: transforms.CorrCholeskyTransform(), X),
    "corr_matrix": (lambda: transforms.CorrMatrixCholeskyTransform(), CORRELATION @ CORRELATION.T),
    "cosine": (lambda: transforms.DiscreteCosineTransform(), X),
    "exp": (lambda: transforms.ExpTransform(), X),
    "haar": (lambda: transforms.HaarTransform(), X),
    "l1_ball": (lambda: transforms.L1BallTransform(), X),
    "lower_affine": (lambda: transforms.LowerCholeskyAffine(X, TRIL), X),
    "lower_cholesky": (lambda: transforms.LowerCholeskyTransform(), np.arange(6.0) / 3),
    "ordered": (lambda: dist.biject_to(constraints.ordered_vector), X),
    "permute": (lambda: transforms.PermuteTransform(np.array([2, 0, 1])), X),
    "positive_definite": (lambda: dist.biject_to(constraints.positive_definite), np.arange(6.0) / 3),
    "power": (lambda: transforms.PowerTransform(2.0), X),
    "real_fourier": (lambda: transforms.RealFastFourierTransform((4,)), np.arange(4.0)),
    "reshape": (lambda: transforms.ReshapeTransform((2, 3), (6,)), np.arange(6.0)),
    "scaled_unit": (lambda: transforms.ScaledUnitLowerCholeskyTransform(), np.arange(6.0) / 3),
    "sigmoid": (lambda: transforms.SigmoidTransform(), X),
    "softplus": (lambda: transforms.SoftplusTransform(), X),
    "softplus_cholesky": (lambda: transforms.SoftplusLowerCholeskyTransform(), np.arange(6.0) / 3),
    "sphere": (lambda: dist.biject_to(constraints.interval(-1.0, 2.0)), X),
    "stick": (lambda: transforms.StickBreakingTransform(), X),
    "zero_sum": (lambda: transforms.ZeroSumTransform(1), X),
}


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", TRANSFORMS)
def test_transforms(name, dtype):
    make, x = TRANSFORMS[name]

    def both(x):
        y = make()(x)
        parts = (jnp.real(y), jnp.imag(y)) if jnp.iscomplexobj(y) else (y,)
        return (*parts, make().log_abs_det_jacobian(x, y)) if name != "real_fourier" else parts

    agree(both, [lanes_of(x, dtype)], dtype)
