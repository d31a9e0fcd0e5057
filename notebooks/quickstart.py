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
# # Quickstart: a NumPyro model, sampled in parallel across the length of the chain
#
# [![Open in Colab](https://colab.research.google.com/assets/colab-badge.svg)](https://colab.research.google.com/github/pmcmc/pmcmc/blob/main/notebooks/quickstart.ipynb)
#
# MCMC is sequential: 100,000 draws are 100,000 consecutive steps. But once all the randomness is drawn, a step is a
# deterministic map, $x_t = f(x_{t-1}, u_t)$, and the chain is one equation for all its states. pmcmc solves this
# equation and certifies that every state is $f$ of its predecessor. The draws are those of the ordinary sequential
# chain.

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
import warnings

import matplotlib.pyplot as plt
import numpy as np
import numpyro
import numpyro.distributions as dist

import pmcmc

warnings.filterwarnings("ignore", category=FutureWarning)  # ArviZ announces its next version on import
warnings.filterwarnings("ignore", message="Estimated shape parameter of Pareto")  # its table below says so, too
import arviz as az

plt.rcParams["figure.dpi"] = 80

# %% [markdown]
# Compiled programs are kept on disk, so that this notebook starts sooner the next time.

# %%
folder = pmcmc.cache_programs()

# %% [markdown]
# All sizes are set here: small if `PMCMC_SMALL` is set (tests), and smaller on a GPU, where sequential steps take much
# longer than on a CPU.

# %%
SMALL = "PMCMC_SMALL" in os.environ
NUM_SAMPLES = 2_000 if SMALL else 1_000_000 if device.platform == "gpu" else 3_000_000  # steps per chain
THINNING = 10 if SMALL else 50

# %% [markdown]
# ## A model
#
# Rubin's eight schools: estimated effects $y_j$ of a coaching programme with known standard errors $\sigma_j$,
#
# $$y_j \sim N(\theta_j, \sigma_j^2), \quad \theta_j = \mu + \tau z_j, \quad z_j \sim N(0, 1), \quad
# \mu \sim N(0, 5^2), \quad \tau \sim \text{half-Cauchy}(5).$$
#
# This is an ordinary NumPyro model without any changes for pmcmc.

# %%
effect = np.array([28.0, 8.0, -3.0, 7.0, -1.0, 1.0, 18.0, 12.0])
error = np.array([15.0, 10.0, 16.0, 11.0, 9.0, 11.0, 10.0, 18.0])


def model(error, effect=None):
    mu = numpyro.sample("mu", dist.Normal(0, 5))
    tau = numpyro.sample("tau", dist.HalfCauchy(5))
    with numpyro.plate("school", 8):
        z = numpyro.sample("z", dist.Normal(0, 1))
        theta = numpyro.deterministic("theta", mu + tau * z)
        numpyro.sample("effect", dist.Normal(theta, error), obs=effect)


# %% [markdown]
# ## Sample
#
# `parallel_chain` warms up, takes some steps, measures their cost and how soon coupled chains merge, chooses between
# parallel blocks of the chain and ordinary sequential sampling, and certifies the result. The report says what it did and
# why. The choice depends on the machine and on the length of the run; the draws do not.

# %%
settings = dict(model_args=(error, effect), num_samples=NUM_SAMPLES, thinning=THINNING, progress_bar=False)
chain = pmcmc.parallel_chain(model, 0, **settings)
print(chain.report)

# %% [markdown]
# ## Results in ArviZ
#
# Dimensions are named after the plates, and the solver's statistics are in `sample_stats` and the attributes.
# `log_likelihood=True` adds what `az.loo` and `az.compare` need. If the Pareto diagnostic of `az.loo` is bad, one school has
# much influence on its own posterior: that is a property of the model, not of the sampler.

# %%
idata = chain.to_arviz(log_likelihood=True)
az.summary(idata, var_names=["mu", "tau", "theta"], round_to=2)

# %%
az.loo(idata)

# %%
theta = chain.get_samples()["theta"]
low, middle, high = np.quantile(theta, [0.05, 0.5, 0.95], axis=0)
rows = np.arange(8)
figure, axes = plt.subplots(figsize=(7, 3.2), layout="constrained")
axes.errorbar(effect, rows + 0.15, xerr=1.645 * error, fmt="o", color="0.6", label="estimate, 90 % interval")
axes.errorbar(middle, rows - 0.15, xerr=[middle - low, high - middle], fmt="o", label="posterior median, 90 %")
axes.axvline(chain.get_samples()["mu"].mean(), color="0.4", lw=0.8, ls=":", label="posterior mean of $\\mu$")
axes.set(yticks=rows, yticklabels="ABCDEFGH", xlabel="effect", title="Eight schools: shrinkage")
axes.legend(frameon=False, fontsize="small", loc="center right")
plt.show()

# %% [markdown]
# ## The result is the sequential chain
#
# Choose the solvers yourself and compare. `MultipleShooting` cuts each chain into blocks that start from guesses and run
# at the same time; then each block is restarted from the end of its predecessor *with the same noise* until it merges
# with its recorded path. `Sequential` takes one step after the other. The same key gives the same chain: where the draws
# differ, an accept decision was so close that float32 rounding decides it, and the two paths merge again some steps later.

# %%
blocks = pmcmc.parallel_chain(model, 0, solver=pmcmc.recurrence.MultipleShooting(), **settings)
ordinary = pmcmc.parallel_chain(model, 0, solver=pmcmc.recurrence.Sequential(), **settings)

gap = np.abs(blocks.unknowns - ordinary.unknowns).max(axis=-1)
print(f"{np.mean(gap < 1e-3):.3%} of the draws agree to 0.001 posterior standard deviations")
for name, c in {"blocks": blocks, "in order": ordinary}.items():
    steps = c.report.num_sequential_steps.max()
    print(f"{name:9s} {steps:9,} steps one after the other, {c.report.solve_seconds:5.2f} s to solve")

# %% [markdown]
# The number of steps one after the other, the critical path, determines the time on an ideal parallel machine. The
# seconds depend on how much the machine can do in parallel. Those stored here are from two CPU cores, where sequential
# sampling is one compiled kernel and blocks gain much less than the critical path suggests. They say nothing about a GPU;
# run the notebook on one to see.
#
# `blocks` and `ordinary` hold the same draws, so the cheaper solver is the better one. `solver="auto"` predicts which one
# that is, including compilation.
#
# ## Continuing a chain
#
# `extend` continues the same chain without another warm-up, with the draws that one long run would have given. `save` and
# `pmcmc.load` continue it on another machine.

# %%
longer = chain.extend(NUM_SAMPLES // 2, progress_bar=False)
print(chain.num_samples, "->", longer.num_samples, "draws kept per chain")
print("the first part is unchanged:", np.array_equal(longer.unknowns[:, : chain.num_samples], chain.unknowns))

# %% [markdown]
# ## Existing NumPyro scripts
#
# `pmcmc.ParallelMCMC` is a `numpyro.infer.MCMC`: change the line that creates the `MCMC` object, and `get_samples`,
# `print_summary`, `Predictive` and `az.from_numpyro` work as before.

# %%
from numpyro.infer import NUTS

mcmc = pmcmc.ParallelMCMC(NUTS(model), num_warmup=500, num_samples=2_000, num_chains=2, progress_bar=False)
mcmc.run(jax.random.key(1), error, effect=effect)
mcmc.print_summary(exclude_deterministic=True)

# %% [markdown]
# Next: [when it pays](when_it_pays.ipynb), and when it does not; [one chain, every solver](every_solver.ipynb);
# [NUTS](nuts.ipynb); [Gibbs and discrete states](gibbs.ipynb); [a recurrent network](rnn.ipynb).
