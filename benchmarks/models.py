"""The models of `benchmarks.whole_call`: each one in NumPyro, PyMC and Stan, with one data set for all three.

The three texts of a model have the same density up to a constant, with the same names and the same parametrization.
Neither JAX nor PyMC is imported before a model needs it, because each is absent from the other's environment.
"""

import functools
import json
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np

Data = dict[str, np.ndarray]


@dataclass(frozen=True)
class Model:
    """One posterior in three languages.

    Args:
        parameters: Names of the sites whose draws are compared.
        data: Makes the arrays, which are the arguments of the NumPyro model; raises `FileNotFoundError` if absent.
        numpyro: The NumPyro model.
        pymc: Adds the variables to the current PyMC model, given the same arguments.
        stan: The Stan program.
        sizes: Sizes that the Stan program declares besides the arrays: name to array and axis.
        reference: Name of the posterior in posteriordb, if it has one.
    """

    parameters: tuple[str, ...]
    data: Callable[[], Data]
    numpyro: Callable[..., None]
    pymc: Callable[..., None]
    stan: str
    sizes: dict[str, tuple[str, int]] = field(default_factory=dict)
    reference: str | None = None

    def stan_data(self, data: Data) -> dict[str, Any]:
        """Return the data of the Stan program: lists and sizes."""
        sizes = {name: data[array].shape[axis] for name, (array, axis) in self.sizes.items()}
        return {**{name: value.tolist() for name, value in data.items()}, **sizes}


def eight_schools() -> Model:
    """Rubin (1981), non-centred."""

    def data():
        effects = np.array([28.0, 8.0, -3.0, 7.0, -1.0, 1.0, 18.0, 12.0])
        return {"effect": effects, "error": np.array([15.0, 10.0, 16.0, 11.0, 9.0, 11.0, 10.0, 18.0])}

    def in_numpyro(effect, error):
        import numpyro
        import numpyro.distributions as dist

        mu = numpyro.sample("mu", dist.Normal(0, 5))
        tau = numpyro.sample("tau", dist.HalfCauchy(5))
        with numpyro.plate("school", 8):
            z = numpyro.sample("z", dist.Normal(0, 1))
            theta: Any = numpyro.deterministic("theta", mu + tau * z)
            numpyro.sample("y", dist.Normal(theta, error), obs=effect)

    def in_pymc(effect, error):
        import pymc as pm

        mu, tau = pm.Normal("mu", 0, 5), pm.HalfCauchy("tau", 5)
        theta = pm.Deterministic("theta", mu + tau * pm.Normal("z", 0, 1, shape=8))
        pm.Normal("y", theta, error, observed=effect)

    stan = """
    data { vector[8] effect; vector[8] error; }
    parameters { real mu; real<lower=0> tau; vector[8] z; }
    transformed parameters { vector[8] theta = mu + tau * z; }
    model { mu ~ normal(0, 5); tau ~ cauchy(0, 5); z ~ normal(0, 1); effect ~ normal(theta, error); }
    """
    return Model(("mu", "tau", "theta"), data, in_numpyro, in_pymc, stan)


def kidiq() -> Model:
    """posteriordb's ``kidiq-kidscore_momiq``: regression of 434 test scores, flat priors on the coefficients."""

    def data():
        from benchmarks._harness import SHARED

        found = json.loads((SHARED / "posteriordb" / "data" / "kidiq-kidscore_momiq.json").read_text())
        x = np.asarray(found["mom_iq"], float)
        return {"x": np.stack([np.ones_like(x), x], 1), "y": np.asarray(found["kid_score"], float)}

    def in_numpyro(x, y):
        import numpyro
        import numpyro.distributions as dist

        beta = numpyro.sample("beta", dist.ImproperUniform(dist.constraints.real_vector, (), (2,)))
        sigma = numpyro.sample("sigma", dist.HalfCauchy(2.5))
        numpyro.sample("score", dist.Normal(x @ beta, sigma), obs=y)

    def in_pymc(x, y):
        import pymc as pm

        beta, sigma = pm.Flat("beta", shape=2), pm.HalfCauchy("sigma", 2.5)
        pm.Normal("score", x @ beta, sigma, observed=y)

    stan = """
    data { int N; matrix[N, 2] x; vector[N] y; }
    parameters { vector[2] beta; real<lower=0> sigma; }
    model { sigma ~ cauchy(0, 2.5); y ~ normal(x * beta, sigma); }
    """
    return Model(("beta", "sigma"), data, in_numpyro, in_pymc, stan, {"N": ("x", 0)}, reference="kidiq-kidscore_momiq")


def german_credit() -> Model:
    """Logistic regression on German credit: 1,000 rows, 25 columns with the intercept, standardised."""

    def data():
        from benchmarks._harness import SHARED

        table = np.loadtxt(SHARED / "data" / "german_credit_numeric.csv", delimiter=",", skiprows=1)
        x = (table[:, :-1] - table[:, :-1].mean(0)) / table[:, :-1].std(0)
        return {"x": np.c_[x, np.ones(len(x))], "y": table[:, -1].astype(np.int64)}

    return _logistic(data)


def logistic(num_rows: int) -> Model:
    """Logistic regression on synthetic data with nine columns, one of which is the intercept."""

    def data():
        rng = np.random.default_rng(5)
        x = np.c_[rng.standard_normal((num_rows, 8)), np.ones(num_rows)]
        probability = 1 / (1 + np.exp(-x @ (0.5 * rng.standard_normal(9))))
        return {"x": x, "y": (rng.random(num_rows) < probability).astype(np.int64)}

    return _logistic(data)


def _logistic(data: Callable[[], Data]) -> Model:
    """Logistic regression with standard normal priors."""

    def in_numpyro(x, y):
        import numpyro
        import numpyro.distributions as dist

        beta = numpyro.sample("beta", dist.Normal(0, 1).expand([x.shape[1]]).to_event(1))
        numpyro.sample("label", dist.Bernoulli(logits=x @ beta), obs=y)

    def in_pymc(x, y):
        import pymc as pm

        pm.Bernoulli("label", logit_p=x @ pm.Normal("beta", 0, 1, shape=x.shape[1]), observed=y)

    stan = """
    data { int N; int K; matrix[N, K] x; array[N] int y; }
    parameters { vector[K] beta; }
    model { beta ~ normal(0, 1); y ~ bernoulli_logit_glm(x, 0, beta); }
    """
    return Model(("beta",), data, in_numpyro, in_pymc, stan, {"N": ("x", 0), "K": ("x", 1)})


def varying_intercepts() -> Model:
    """The model of radon by county (Gelman & Hill 2007, chapter 12), non-centred; 919 synthetic houses, 85 counties."""

    def data():
        rng = np.random.default_rng(4)
        county = np.r_[np.arange(85), rng.choice(85, 919 - 85, p=rng.dirichlet(np.full(85, 0.7)))]
        basement = (rng.random(919) < 0.17).astype(float)
        radon = 1.5 + 0.35 * rng.standard_normal(85)[county] - 0.7 * basement + 0.75 * rng.standard_normal(919)
        return {"county": county, "basement": basement, "radon": radon}

    def in_numpyro(county, basement, radon):
        import numpyro
        import numpyro.distributions as dist

        average = numpyro.sample("average", dist.Normal(0, 2))
        spread = numpyro.sample("spread", dist.HalfNormal(1))
        slope = numpyro.sample("slope", dist.Normal(0, 2))
        noise = numpyro.sample("noise", dist.HalfNormal(1))
        with numpyro.plate("counties", 85):
            z = numpyro.sample("z", dist.Normal(0, 1))
            alpha: Any = numpyro.deterministic("alpha", average + spread * z)
        numpyro.sample("y", dist.Normal(alpha[county] + slope * basement, noise), obs=radon)

    def in_pymc(county, basement, radon):
        import pymc as pm

        average, spread = pm.Normal("average", 0, 2), pm.HalfNormal("spread", 1)
        slope, noise = pm.Normal("slope", 0, 2), pm.HalfNormal("noise", 1)
        alpha = pm.Deterministic("alpha", average + spread * pm.Normal("z", 0, 1, shape=85))
        pm.Normal("y", alpha[county] + slope * basement, noise, observed=radon)

    stan = """
    data { int N; array[N] int county; vector[N] basement; vector[N] radon; }
    transformed data {
      array[N] int one_based;
      for (n in 1:N) one_based[n] = county[n] + 1;
    }
    parameters { real average; real<lower=0> spread; real slope; real<lower=0> noise; vector[85] z; }
    transformed parameters { vector[85] alpha = average + spread * z; }
    model {
      average ~ normal(0, 2); spread ~ normal(0, 1); slope ~ normal(0, 2); noise ~ normal(0, 1); z ~ normal(0, 1);
      radon ~ normal(alpha[one_based] + slope * basement, noise);
    }
    """
    return Model(("average", "spread", "slope", "noise", "alpha"), data, in_numpyro, in_pymc, stan, {"N": ("radon", 0)})


def gaussian_process() -> Model:
    """Regression by a Gaussian process with a squared exponential kernel: 60 synthetic points, function integrated out.

    The priors are those of the example in Stan's user's guide.
    """

    def data():
        rng = np.random.default_rng(6)
        x = np.sort(rng.uniform(0, 10, 60))
        return {"x": x, "y": np.sin(x) + 0.5 * np.cos(2.3 * x) + 0.3 * rng.standard_normal(60)}

    def in_numpyro(x, y):
        import jax.numpy as jnp
        import numpyro
        import numpyro.distributions as dist

        amplitude: Any = numpyro.sample("amplitude", dist.HalfNormal(1))
        length: Any = numpyro.sample("length", dist.InverseGamma(5, 5))
        noise: Any = numpyro.sample("noise", dist.HalfNormal(1))
        distance = (x[:, None] - x) / length
        covariance = amplitude**2 * jnp.exp(-0.5 * distance**2) + noise**2 * jnp.eye(x.size)
        numpyro.sample("f", dist.MultivariateNormal(jnp.zeros(x.size), covariance), obs=y)

    def in_pymc(x, y):
        import pymc as pm
        import pytensor.tensor as pt

        amplitude, noise = pm.HalfNormal("amplitude", 1), pm.HalfNormal("noise", 1)
        distance = (x[:, None] - x) / pm.InverseGamma("length", alpha=5, beta=5)
        covariance = amplitude**2 * pt.exp(-0.5 * distance**2) + noise**2 * np.eye(x.size)
        pm.MvNormal("f", np.zeros(x.size), cov=covariance, observed=y)

    stan = """
    data { int N; array[N] real x; vector[N] y; }
    parameters { real<lower=0> amplitude; real<lower=0> length; real<lower=0> noise; }
    model {
      matrix[N, N] covariance = add_diag(gp_exp_quad_cov(x, amplitude, length), square(noise));
      amplitude ~ normal(0, 1); length ~ inv_gamma(5, 5); noise ~ normal(0, 1);
      y ~ multi_normal_cholesky(rep_vector(0, N), cholesky_decompose(covariance));
    }
    """
    return Model(("amplitude", "length", "noise"), data, in_numpyro, in_pymc, stan, {"N": ("x", 0)})


# Steps of the Runge-Kutta method in each of 20 years.
STEPS_PER_YEAR = 4


def lotka_volterra() -> Model:
    """Prey and predators over 20 years, with the priors of Carpenter (2018, Stan case study); synthetic counts.

    All languages take the same fixed steps of the classical Runge-Kutta method (RK4), four a year, on the logarithms of
    the populations, so that the posterior does not depend on the tolerance of a solver. RK4's error is far below the
    noise.
    """

    def data():
        rng = np.random.default_rng(7)
        field = lambda log_z: np.array([0.55 - 0.028 * np.exp(log_z[1]), -0.84 + 0.026 * np.exp(log_z[0])])
        path = [np.log([33.0, 6.0])]
        for _ in range(20 * STEPS_PER_YEAR):
            path.append(_runge_kutta(field, path[-1]))
        yearly = np.array(path[::STEPS_PER_YEAR])
        return {"y": np.exp(yearly + 0.25 * rng.standard_normal(yearly.shape))}

    names = ("birth", "predation", "death", "growth", "start", "sigma")
    return Model(names, data, _populations_in_numpyro, _populations_in_pymc, POPULATIONS_IN_STAN)


def _runge_kutta(field: Callable, log_z: Any) -> Any:
    """Take one step of the equation whose right-hand side is ``field``."""
    h = 1 / STEPS_PER_YEAR
    k1 = field(log_z)
    k2 = field(log_z + h / 2 * k1)
    k3 = field(log_z + h / 2 * k2)
    return log_z + h / 6 * (k1 + 2 * k2 + 2 * k3 + field(log_z + h * k3))


def _populations_in_numpyro(y: np.ndarray) -> None:
    import jax
    import jax.numpy as jnp
    import numpyro
    import numpyro.distributions as dist

    positive = lambda mean, sd: dist.TruncatedNormal(mean, sd, low=0.0)
    birth, predation = numpyro.sample("birth", positive(1, 0.5)), numpyro.sample("predation", positive(0.05, 0.05))
    death, growth = numpyro.sample("death", positive(1, 0.5)), numpyro.sample("growth", positive(0.05, 0.05))
    start = numpyro.sample("start", dist.LogNormal(np.log(10), 1).expand([2]).to_event(1))
    sigma = numpyro.sample("sigma", dist.LogNormal(-1, 1).expand([2]).to_event(1))

    def field(log_z):
        z = jnp.exp(log_z)
        return jnp.stack([birth - predation * z[1], growth * z[0] - death])

    def step(log_z, _):
        log_z = _runge_kutta(field, log_z)
        return log_z, log_z

    first = jnp.log(start)
    path = jax.lax.scan(step, first, length=20 * STEPS_PER_YEAR)[1]
    yearly = jnp.concatenate([first[None], path[STEPS_PER_YEAR - 1 :: STEPS_PER_YEAR]])
    numpyro.sample("count", dist.LogNormal(yearly, sigma), obs=y)


def _populations_in_pymc(y: np.ndarray) -> None:
    import pymc as pm
    import pytensor
    import pytensor.tensor as pt

    positive = lambda name, mean, sd: pm.TruncatedNormal(name, mean, sd, lower=0)
    birth, predation = positive("birth", 1, 0.5), positive("predation", 0.05, 0.05)
    death, growth = positive("death", 1, 0.5), positive("growth", 0.05, 0.05)
    start = pm.LogNormal("start", np.log(10), 1, shape=2)
    sigma = pm.LogNormal("sigma", -1, 1, shape=2)

    def step(log_z, birth, predation, death, growth):
        def field(log_z):
            z = pt.exp(log_z)
            return pt.stack([birth - predation * z[1], growth * z[0] - death])

        return _runge_kutta(field, log_z)

    first, num_steps = pt.log(start), 20 * STEPS_PER_YEAR
    rates = [birth, predation, death, growth]
    path = pytensor.scan(step, outputs_info=first, non_sequences=rates, n_steps=num_steps, return_updates=False)
    yearly = pt.concatenate([first[None], path[STEPS_PER_YEAR - 1 :: STEPS_PER_YEAR]])
    pm.LogNormal("count", yearly, sigma, observed=y)


POPULATIONS_IN_STAN = """
functions {
  vector field(vector log_z, real birth, real predation, real death, real growth) {
    vector[2] z = exp(log_z);
    return [birth - predation * z[2], growth * z[1] - death]';
  }
}
data { array[21] vector[2] y; }
parameters {
  real<lower=0> birth; real<lower=0> predation; real<lower=0> death; real<lower=0> growth;
  vector<lower=0>[2] start; vector<lower=0>[2] sigma;
}
model {
  vector[2] log_z = log(start);
  real h = 1.0 / STEPS;
  birth ~ normal(1, 0.5); death ~ normal(1, 0.5); predation ~ normal(0.05, 0.05); growth ~ normal(0.05, 0.05);
  start ~ lognormal(log(10), 1); sigma ~ lognormal(-1, 1);
  y[1] ~ lognormal(log_z, sigma);
  for (year in 1:20) {
    for (step in 1:STEPS) {
      vector[2] k1 = field(log_z, birth, predation, death, growth);
      vector[2] k2 = field(log_z + h / 2 * k1, birth, predation, death, growth);
      vector[2] k3 = field(log_z + h / 2 * k2, birth, predation, death, growth);
      vector[2] k4 = field(log_z + h * k3, birth, predation, death, growth);
      log_z += h / 6 * (k1 + 2 * k2 + 2 * k3 + k4);
    }
    y[year + 1] ~ lognormal(log_z, sigma);
  }
}
""".replace("STEPS", str(STEPS_PER_YEAR))


def item_response() -> Model:
    """One-parameter logistic item response (Rasch 1960): 450 students, 49 questions, an average; synthetic answers."""

    def data():
        rng = np.random.default_rng(2)
        logits = 0.75 + rng.standard_normal((450, 1)) - rng.standard_normal(49)
        return {"correct": (rng.random((450, 49)) < 1 / (1 + np.exp(-logits))).astype(np.int64)}

    def in_numpyro(correct):
        import numpyro
        import numpyro.distributions as dist

        average = numpyro.sample("average", dist.Normal(0.75, 1))
        ability = numpyro.sample("ability", dist.Normal(0, 1).expand([450]).to_event(1))
        difficulty = numpyro.sample("difficulty", dist.Normal(0, 1).expand([49]).to_event(1))
        numpyro.sample("y", dist.Bernoulli(logits=average + ability[:, None] - difficulty[None, :]), obs=correct)

    def in_pymc(correct):
        import pymc as pm

        average, ability = pm.Normal("average", 0.75, 1), pm.Normal("ability", 0, 1, shape=450)
        difficulty = pm.Normal("difficulty", 0, 1, shape=49)
        pm.Bernoulli("y", logit_p=average + ability[:, None] - difficulty, observed=correct)

    stan = """
    data { array[450, 49] int correct; }
    parameters { real average; vector[450] ability; vector[49] difficulty; }
    model {
      average ~ normal(0.75, 1); ability ~ normal(0, 1); difficulty ~ normal(0, 1);
      for (i in 1:450) correct[i] ~ bernoulli_logit(average + ability[i] - difficulty);
    }
    """
    return Model(("average", "ability", "difficulty"), data, in_numpyro, in_pymc, stan)


MODELS: dict[str, Callable[[], Model]] = {
    "eight_schools": eight_schools,
    "kidiq": kidiq,
    "german_credit": german_credit,
    "varying_intercepts": varying_intercepts,
    "logistic_10_000": functools.partial(logistic, 10_000),
    "logistic_100_000": functools.partial(logistic, 100_000),
    "gaussian_process": gaussian_process,
    "lotka_volterra": lotka_volterra,
    "item_response": item_response,
}
