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
# # NUTS in parallel
#
# [![Open in Colab](https://colab.research.google.com/assets/colab-badge.svg)](https://colab.research.google.com/github/pmcmc/pmcmc/blob/main/notebooks/nuts.ipynb)
#
# The No-U-Turn sampler decides at every step how far to go: it doubles a trajectory until it turns back on itself. It is
# still a map $x_t = f(x_{t-1}, u_t)$: the momentum and the random choices of the doublings determine the whole transition.
# So a chain of NUTS can be cut into blocks that run in parallel, like any other.
#
# Whether that pays depends on two questions. Do coupled chains merge although their trees differ? And do parallel lanes
# have to wait for the deepest tree?

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
from sklearn.datasets import load_diabetes

import pmcmc
from pmcmc import recurrence, stability

warnings.filterwarnings("ignore", category=FutureWarning)  # ArviZ announces its next version on import
import arviz as az

plt.rcParams["figure.dpi"] = 80

# %%
SMALL = "PMCMC_SMALL" in os.environ
LARGE = device.platform == "gpu" and not SMALL
NUM_SAMPLES = 1_000 if SMALL else 200_000 if LARGE else 20_000  # steps per chain
NUM_BLOCKS = 8 if SMALL else 256 if LARGE else 32  # per chain
NUM_CHAINS = 2 if SMALL else 4
NUM_PAIRS, MAX_STEPS = (8, 200) if SMALL else (32, 400)

# %% [markdown]
# ## A regression
#
# The model regresses the progression of diabetes in 442 patients on ten standardised covariates (Efron et al. 2004), with
# Student's t errors:
#
# $$y_i \sim t_5(\alpha + x_i^\top \beta, \sigma), \qquad \alpha, \beta_j \sim N(0, 1), \quad \sigma \sim \text{half-Normal}(1).$$

# %%
covariates, progression = load_diabetes(return_X_y=True)
covariates = covariates / covariates.std(axis=0)
progression = (progression - progression.mean()) / progression.std()


def regression(covariates, progression=None):
    intercept = numpyro.sample("intercept", dist.Normal(0, 1))
    slopes = numpyro.sample("slopes", dist.Normal(0, 1).expand([covariates.shape[1]]).to_event(1))
    sigma = numpyro.sample("sigma", dist.HalfNormal(1))
    numpyro.sample("progression", dist.StudentT(5, intercept + covariates @ slopes, sigma), obs=progression)


# %% [markdown]
# ## Blocks and the sequential chain
#
# We sample with the same key, once in blocks and once sequentially.

# %%
settings = dict(
    model_args=(covariates, progression),
    kernel=pmcmc.NUTS(),
    num_samples=NUM_SAMPLES,
    num_chains=NUM_CHAINS,
    extra_fields=("num_steps", "tree_depth"),
    progress_bar=False,
)
chain = pmcmc.parallel_chain(regression, 0, solver=recurrence.MultipleShooting(NUM_BLOCKS), **settings)
ordinary = pmcmc.parallel_chain(regression, 0, solver=recurrence.Sequential(), **settings)
print(chain.report)

# %%
gap = np.abs(chain.unknowns - ordinary.unknowns).max(axis=-1)
print(f"{np.mean(gap < 1e-3):.3%} of the draws agree to 0.001 posterior standard deviations")
for name, c in {"blocks": chain, "in order": ordinary}.items():
    steps = c.report.num_sequential_steps.max()
    print(f"{name:9s}{steps:8,} transitions one after the other; {c.report.solve_seconds:6.2f} s to solve")
print(f"on {device.device_kind} ({device.platform})")

# %% [markdown]
# Where a draw differs, float32 rounding decided an earlier near tie (one more doubling, or another point of the
# trajectory). Both paths are valid chains, and they merge again. The seconds stored here are from two CPU cores; costs on a
# GPU differ, so run the notebook there to compare.

# %%
az.summary(chain.to_arviz(), round_to=3)

# %% [markdown]
# ## Do coupled chains of NUTS merge?
#
# We run pairs from independent draws with the same noise. Their trees differ at first, and so do the points they select.
# Once two paths are close, they turn at the same leaf and select the same point of nearly the same trajectory. Whether they
# *become* close depends on the posterior. Besides the regression we use a hierarchy: batting averages of 18 baseball players
# in their first 45 at-bats of 1970 (Efron & Morris 1975),
#
# $$y_j \sim \text{Binomial}(45, \text{logit}^{-1}(\mu + \sigma z_j)), \quad z_j \sim N(0, 1), \quad
# \mu \sim N(-1, 1), \quad \sigma \sim \text{half-Normal}(1).$$

# %%
hits = np.array([18, 17, 16, 15, 14, 14, 13, 12, 11, 11, 10, 10, 10, 10, 10, 9, 8, 7])


def batting(hits=None):
    mu = numpyro.sample("mu", dist.Normal(-1, 1))
    sigma = numpyro.sample("sigma", dist.HalfNormal(1))
    with numpyro.plate("player", 18):
        z = numpyro.sample("z", dist.Normal(0, 1))
        numpyro.sample("hits", dist.Binomial(45, logits=mu + sigma * z), obs=hits)


hierarchy = pmcmc.parallel_chain(
    batting,
    0,
    model_args=(hits,),
    kernel=pmcmc.NUTS(),
    solver=recurrence.Sequential(),
    num_samples=1_000,
    extra_fields=("num_steps",),
    progress_bar=False,
)


def couple(chain):
    target, kernel = chain.target, chain.kernel
    draws = chain.unknowns.reshape(-1, target.dim)
    first, second = np.random.default_rng(0).choice(len(draws), (2, NUM_PAIRS), replace=False)
    keys = jax.random.split(jax.random.key(1), (MAX_STEPS, NUM_PAIRS))
    noise = jax.vmap(jax.vmap(lambda key: kernel.sample_noise(key, target)))(keys)
    return stability.coalescence_time(kernel.transition(target), draws[first], draws[second], noise, scale=1.0)


chains = {"regression": chain, "hierarchy": hierarchy}
pairs = {name: couple(c) for name, c in chains.items()}
figure, panels = plt.subplots(2, 2, figsize=(10, 5.6), layout="constrained")
for column, (name, p) in enumerate(pairs.items()):
    merged, leaves = np.asarray(p.merged), np.asarray(chains[name].get_extra_fields()["num_steps"])
    print(
        f"{name:11s}{merged.sum():3d} of {NUM_PAIRS} pairs merged within {MAX_STEPS} steps; leapfrog steps: mean {leaves.mean():.1f}"
    )
    distance = np.array(p.distances)[: int(p.num_steps) + 1]
    distance[distance == 0] = np.nan
    panels[0, column].plot(distance, color="tab:blue", lw=0.6, alpha=0.6)
    panels[0, column].axhline(float(p.tol), color="0.4", lw=0.8, ls=":")
    panels[0, column].set(yscale="log", xlabel="step", ylabel="distance (posterior sd)", title=name)
    values, counts = np.unique(leaves, return_counts=True)
    frequent = counts > 0.002 * counts.sum()
    panels[1, column].bar(values[frequent].astype(str), counts[frequent] / counts.sum())
    panels[1, column].set(xlabel="leapfrog steps of a transition", ylabel="share of the draws")
plt.show()

# %% [markdown]
# The posterior of the regression is nearly Gaussian, and all pairs merge soon. In the hierarchy pairs come close and
# separate again, and only some reach the tolerance. A likely reason is that the scale $\sigma$ of the influence of $z$ differs
# between the two paths of a pair, so that their trees turn at different leaves. `solver="auto"` detects this in its pilot and
# samples such a chain sequentially. Another kernel may merge where NUTS does not: [when it pays](when_it_pays.ipynb) shows how
# to measure it.
#
# ## Lanes do not wait for the deepest tree
#
# Lanes under `vmap` advance in lockstep: a transition of all lanes ends with the deepest tree among them. The cost of that
# would be the ratio of the longest to the mean trajectory over the lanes:

# %%
for name, c in chains.items():
    leaves = np.random.default_rng(0).permutation(np.asarray(c.get_extra_fields()["num_steps"]))
    for lanes in (4, 32, 256):
        groups = leaves[: len(leaves) // lanes * lanes].reshape(-1, lanes)
        print(f"{name:11s}{lanes:4d} lanes: longest / mean = {np.mean(groups.max(axis=1)) / leaves.mean():.2f}")

# %% [markdown]
# `pmcmc.NUTS` is therefore a state machine: one *advance* is one leapfrog step of every lane, and a lane whose tree is
# complete continues with its own next transition (after Dance et al. 2025). Blocks provide as many lanes as the device can
# use from a few long chains, with one warm-up.
#
# If you have a script with `numpyro.infer.NUTS`, `pmcmc.ParallelMCMC(NUTS(model), ...)` reads its options: see the
# [quickstart](quickstart.ipynb). More: [Gibbs and discrete states](gibbs.ipynb).
