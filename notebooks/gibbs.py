# ---
# jupyter:
#   jupytext:
#     formats: ipynb,py:percent
#     notebook_metadata_filter: kernelspec,jupytext
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
# ---

# %% [markdown]
# # Gibbs and discrete states
#
# [![Open in Colab](https://colab.research.google.com/assets/colab-badge.svg)](https://colab.research.google.com/github/pmcmc/pmcmc/blob/main/notebooks/gibbs.ipynb)
#
# Newton's method needs derivatives; multiple shooting does not. So a Gibbs sampler whose state contains integers is solved
# in parallel like any other chain. Each conditional draw is a map of the state and of noise drawn beforehand: the inverse
# CDF for a discrete site, $\mu + \sigma z$ for a normal site, and a standard gamma variate divided by the rate for a gamma
# site.

# %%
# On Colab this installs pmcmc. What runs the GPU (jax, jaxlib, their CUDA plugin) and numpy stay at the versions that
# are there: a newer jax beside an older plugin would lose the GPU.
import importlib.metadata
import importlib.util
import re
import subprocess
import sys

if importlib.util.find_spec("pmcmc") is None:
    there = {d.name: d.version for d in importlib.metadata.distributions()}
    held = [
        f"{name}=={version}" for name, version in there.items() if re.match(r"(jax|jaxlib|jax.cuda.*|numpy)$", name)
    ]
    subprocess.run([sys.executable, "-m", "pip", "install", "-q", "pmcmc", *held], check=True)

# %%
import jax

device = jax.devices()[0]
print(f"jax {jax.__version__} on {device.device_kind} ({device.platform})")
if device.platform == "cpu":
    print("For a GPU on Colab: Runtime > Change runtime type > GPU, then run again from the top.")

# %%
import os

import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
import numpyro
import numpyro.distributions as dist

import pmcmc
from pmcmc import recurrence, stability

plt.rcParams["figure.dpi"] = 80

# %%
SMALL = "PMCMC_SMALL" in os.environ
LARGE = device.platform == "gpu" and not SMALL
NUM_SAMPLES = 2_000 if SMALL else 1_000_000 if LARGE else 50_000  # steps per chain
NUM_BLOCKS = 8 if SMALL else 1_024 if LARGE else 64  # per chain
NUM_CHAINS = 2 if SMALL else 4
NUM_PAIRS, MAX_STEPS = (8, 100) if SMALL else (64, 200)

# %% [markdown]
# ## When did coal mining become safer?
#
# The data are the numbers of disasters in British coal mines per year, 1851 to 1962 (Jarrett 1979; as a Gibbs example
# Carlin, Gelfand & Smith 1992). The counts are Poisson with one rate up to year $k$ and another after it:
#
# $$y_i \sim \text{Poisson}(\lambda_1)\ (i \le k), \quad y_i \sim \text{Poisson}(\lambda_2)\ (i > k), \qquad
# \lambda_j \sim \text{Gamma}(2, \text{rate } 1), \quad k \sim \text{uniform on } 1, \ldots, n - 1.$$
#
# All conditionals are known:
#
# $$\lambda_1 \mid k, y \sim \text{Gamma}(2 + \sum_{i \le k} y_i,\ 1 + k), \quad
# \lambda_2 \mid k, y \sim \text{Gamma}(2 + \sum_{i > k} y_i,\ 1 + n - k),$$
# $$p(k \mid \lambda, y) \propto \exp( S_k \log(\lambda_1 / \lambda_2) - k (\lambda_1 - \lambda_2) ), \qquad
# S_k = \sum_{i \le k} y_i.$$

# %%
counts = np.array(
    [4, 5, 4, 1, 0, 4, 3, 4, 0, 6, 3, 3, 4, 0, 2, 6, 3, 3, 5, 4, 5, 3, 1, 4, 4, 1, 5, 5, 3, 4, 2, 5, 2, 2, 3, 4, 2, 1]
    + [3, 2, 2, 1, 1, 1, 1, 3, 0, 0, 1, 0, 1, 1, 0, 0, 3, 1, 0, 3, 2, 2, 0, 1, 1, 1, 0, 1, 0, 1, 0, 0, 0, 2, 1, 0]
    + [0, 0, 1, 1, 0, 2, 3, 3, 1, 1, 2, 1, 1, 1, 1, 2, 4, 2, 0, 0, 0, 1, 4, 0, 0, 0, 1, 0, 0, 0, 0, 0, 1, 0, 0, 1]
    + [0, 1]
)
years = 1851 + np.arange(len(counts))
before = jnp.asarray(np.cumsum(counts)[:-1], jnp.float32)  # S_k for k = 1 .. n - 1
total, n = counts.sum(), len(counts)
print(f"{total} disasters in {n} years")

kernel = pmcmc.Gibbs(
    {
        "early": pmcmc.kernels.GammaUpdate(lambda x: 2 + before[x["k"]], rate=lambda x: 2.0 + x["k"]),
        "late": pmcmc.kernels.GammaUpdate(lambda x: 2 + total - before[x["k"]], rate=lambda x: n - x["k"]),
        "k": pmcmc.kernels.CategoricalUpdate(
            lambda x: before * jnp.log(x["early"] / x["late"]) - jnp.arange(1, n) * (x["early"] - x["late"])
        ),
    }
)

# %% [markdown]
# `k` is an index here, 0 for a change after the first year; hence `2 + k` years and pseudo-years in the first rate.
# The functions receive a dict of all sites and return a parameter. No log density is needed (`None`), and there is no step
# size to tune.

# %%
start = {"early": 3.0, "late": 1.0, "k": jnp.array(n // 2)}
settings = dict(kernel=kernel, num_samples=NUM_SAMPLES, num_chains=NUM_CHAINS, num_warmup=100, progress_bar=False)
chain = pmcmc.sample(None, start, 0, solver=recurrence.MultipleShooting(NUM_BLOCKS), **settings)
ordinary = pmcmc.sample(None, start, 0, solver=recurrence.Sequential(), **settings)
print(chain.report)

same = chain.get_samples()["k"] == ordinary.get_samples()["k"]
print(f"\nthe change point agrees with the sequential chain in {np.mean(same):.3%} of the draws")
for name, c in {"blocks": chain, "in order": ordinary}.items():
    steps = c.report.num_sequential_steps.max()
    print(f"{name:9s}{steps:8,} steps one after the other; {c.report.solve_seconds:6.2f} s to solve")
print(f"on {device.device_kind} ({device.platform})")

# %%
samples = {name: np.asarray(x) for name, x in chain.get_samples().items()}
figure, (left, right) = plt.subplots(1, 2, figsize=(10, 3.4), layout="constrained")
left.bar(years, counts, color="0.8", width=1.0)
rate = np.where(np.arange(n)[:, None] <= samples["k"][None, ::50], samples["early"][::50], samples["late"][::50])
left.plot(years, rate.mean(axis=1), color="tab:blue", label="posterior mean of the rate")
left.set(xlabel="year", ylabel="disasters", title="Coal-mining disasters")
left.legend(frameon=False, fontsize="small")
share = np.bincount(samples["k"], minlength=n) / len(samples["k"])
right.bar(years, share, width=1.0)
right.set(xlim=(1875, 1905), xlabel="last year of the early rate", ylabel="posterior probability")
plt.show()
print(
    f"most probable: {years[share.argmax()]}; early rate {samples['early'].mean():.2f}, late rate {samples['late'].mean():.2f}"
)

# %% [markdown]
# ## Integers merge exactly
#
# Two chains with common noise and the same $k$ draw the same gamma variates from then on: they have merged to the last bit.
# So the merge time is the number of steps until two copies agree on $k$ once, and the tolerance of the solver does not matter.

# %%
target = chain.target
rng = np.random.default_rng(0)
wide = lambda: {
    "early": jnp.asarray(rng.gamma(2, size=NUM_PAIRS), jnp.float32),
    "late": jnp.asarray(rng.gamma(2, size=NUM_PAIRS), jnp.float32),
    "k": jnp.asarray(rng.integers(n - 1, size=NUM_PAIRS)),
}
keys = jax.random.split(jax.random.key(1), (MAX_STEPS, NUM_PAIRS))
noise = jax.vmap(jax.vmap(lambda key: kernel.sample_noise(key, target)))(keys)
ones = {"early": 1.0, "late": 1.0, "k": 1}
pairs = stability.coalescence_time(kernel.transition(target), wide(), wide(), noise, scale=ones)
times = np.asarray(pairs.steps)
print(
    f"{np.sum(pairs.merged)} of {NUM_PAIRS} pairs from prior draws merged; "
    f"steps: median {np.median(times):.0f}, longest {times.max()}; largest distance left {np.max(pairs.distance):.1g}"
)

# %% [markdown]
# ## Discrete sites of a NumPyro model
#
# The model is a straight line with some outliers. Each observation has an indicator $z_i$ of being an outlier, a
# discrete latent site. `DiscreteGibbs` draws such sites by inverse CDF over their support, from the model's own log density,
# and `HMC` samples the other sites given them; `Compose` combines the two. Given the line, the indicators are independent of
# each other, so all are drawn at once (`independent="z"`, which is checked at random points).

# %%
rng = np.random.default_rng(3)
x = np.linspace(-2, 2, 24)
y = 1 + 0.8 * x + 0.3 * rng.normal(size=24)
planted = [3, 9, 10, 20]
y[planted] += np.array([3.0, -2.5, 3.5, -3.0])


def model(x, y=None):
    intercept = numpyro.sample("intercept", dist.Normal(0, 2))
    slope = numpyro.sample("slope", dist.Normal(0, 2))
    sigma = numpyro.sample("sigma", dist.HalfNormal(1))
    share = numpyro.sample("share", dist.Beta(1, 9))
    with numpyro.plate("observation", len(x)):
        z = numpyro.sample("z", dist.Bernoulli(share))
        scale = jnp.where(z == 1, 5.0, sigma)
        numpyro.sample("y", dist.Normal(intercept + slope * x, scale), obs=y)


blocks = pmcmc.Compose([pmcmc.DiscreteGibbs(independent="z"), (pmcmc.HMC(), ["intercept", "slope", "sigma", "share"])])
fit = pmcmc.parallel_chain(
    model,
    0,
    model_args=(x, y),
    kernel=blocks,
    solver=recurrence.MultipleShooting(NUM_BLOCKS),
    num_samples=NUM_SAMPLES,
    num_chains=NUM_CHAINS,
    progress_bar=False,
)
print(fit.report)

# %%
draws = {name: np.asarray(value) for name, value in fit.get_samples().items()}
probability = draws["z"].mean(axis=0)
line = draws["intercept"][::50, None] + draws["slope"][::50, None] * x
figure, axes = plt.subplots(figsize=(7, 3.6), layout="constrained")
axes.fill_between(x, *np.quantile(line, [0.05, 0.95], axis=0), alpha=0.3, label="line, 90 %")
axes.plot(x, np.polyval(np.polyfit(x, y, 1), x), color="0.5", ls=":", label="least squares")
points = axes.scatter(x, y, c=probability, cmap="coolwarm", vmin=0, vmax=1, edgecolor="0.3")
axes.set(xlabel="x", ylabel="y", title="Outliers found")
figure.colorbar(points, label="probability of being an outlier")
axes.legend(frameon=False, fontsize="small")
plt.show()
print("posterior probability above 1/2:", np.flatnonzero(probability > 0.5), " planted:", np.array(planted))

# %% [markdown]
# All planted outliers are found; one more point, at the left edge, is uncertain. (The seconds stored here are from two CPU
# cores.)
#
# Without `kernel=`, `parallel_chain` adds `DiscreteGibbs()` if a model has discrete latent sites. It then draws the elements
# one after the other, which is correct whatever their dependence.
#
# More: [NUTS](nuts.ipynb); [when it pays](when_it_pays.ipynb).
