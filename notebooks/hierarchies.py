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
# # Hierarchies
#
# [![Open in Colab](https://colab.research.google.com/assets/colab-badge.svg)](https://colab.research.google.com/github/pmcmc/pmcmc/blob/main/notebooks/hierarchies.ipynb)
#
# A hierarchy is easiest to write in centred form: groups have effects, and the effects have a spread, which is a parameter
# too. MCMC samples this form badly where the data say little about an effect, and its non-centred form badly where they say
# much. `reparam=pmcmc.AutoReparam()` chooses during warm-up, for each effect, how far it is centred. The model stays as it is
# written.

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

import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
import numpyro
import numpyro.distributions as dist
from numpyro.handlers import reparam
from numpyro.infer.reparam import LocScaleReparam

import pmcmc
from pmcmc import stability

warnings.filterwarnings("ignore", category=FutureWarning)  # ArviZ announces its next version on import
import arviz as az

plt.rcParams["figure.dpi"] = 80

# %%
SMALL = "PMCMC_SMALL" in os.environ
NUM_SAMPLES = 1_000 if SMALL else 10_000  # steps per chain
NUM_PAIRS, MAX_STEPS = (8, 200) if SMALL else (32, 2_000)

# %% [markdown]
# ## Eight schools
#
# Eight schools measured the effect of coaching, with known standard errors (Rubin 1981). The model in centred form:
#
# $$\theta_j \sim N(\mu, \tau), \quad y_j \sim N(\theta_j, \sigma_j), \qquad \mu \sim N(0, 5), \quad \tau \sim \text{half-Cauchy}(5).$$

# %%
effects = jnp.array([28.0, 8, -3, 7, -1, 1, 18, 12])
errors = jnp.array([15.0, 10, 16, 11, 9, 11, 10, 18])


def schools(errors, effects):
    mu = numpyro.sample("mu", dist.Normal(0, 5))
    tau = numpyro.sample("tau", dist.HalfCauchy(5))
    with numpyro.plate("schools", 8):
        theta = numpyro.sample("theta", dist.Normal(mu, tau))
        numpyro.sample("effect", dist.Normal(theta, errors), obs=effects)


settings = dict(num_samples=NUM_SAMPLES, extra_fields=("num_steps", "diverging"), progress_bar=False)
with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # pmcmc warns that the centred form does not mix; here we look at how
    centred = pmcmc.parallel_chain(schools, 0, model_args=(errors, effects), **settings)
chosen = pmcmc.parallel_chain(schools, 0, model_args=(errors, effects), reparam=pmcmc.AutoReparam(), **settings)
print(chosen.report.centredness)


# %% [markdown]
# The report gives the smallest and the largest $c$ of each site: all schools are sampled non-centred ($c = 0$) or nearly so;
# $c = 1$ is centred. The draws have the names and the values of the model as it was written, so both chains can be compared as
# they are.


# %%
def worth(chain):
    """Smallest effective sample size in the bulk per 1,000 gradients, and the share of divergent draws."""
    ess = az.ess(chain.to_arviz(), method="bulk")
    least = min(float(ess[name].min()) for name in ess.data_vars)
    fields = chain.get_extra_fields()
    return 1000 * least / np.sum(fields["num_steps"]), np.mean(fields["diverging"])


def show(chains):
    for name, chain in chains.items():
        ess, divergent = worth(chain)
        print(f"{name:12s}{ess:7.1f} effective draws per 1,000 gradients, {divergent:.2%} divergent")


show({"centred": centred, "chosen": chosen})

figure, panels = plt.subplots(1, 2, figsize=(10, 3.8), sharex=True, sharey=True, layout="constrained")
for panel, (name, chain) in zip(panels, {"centred": centred, "chosen": chosen}.items(), strict=True):
    draws = {site: np.asarray(x) for site, x in chain.get_samples().items()}
    panel.plot(draws["theta"][:, 0], np.log(draws["tau"]), ".", ms=1, alpha=0.4)
    panel.set(title=name, xlabel=r"$\theta_1$", ylabel=r"$\log\,\tau$" if name == "centred" else None, ylim=(-6, 5))
plt.show()

# %% [markdown]
# Where $\tau$ is small, $\theta$ is squeezed into the neck of a funnel. One step size cannot suit both the neck and the wide
# part, so the centred chain hardly visits the neck. In the other form the same draws come from a shape that a chain crosses
# easily.
#
# ## Chains that merge
#
# Parallel blocks pay only if chains from different starts merge under the same noise. We run pairs in both forms.


# %%
def couple(chain):
    target, kernel = chain.target, chain.kernel
    draws = chain.unknowns.reshape(-1, target.dim)
    first, second = np.random.default_rng(0).choice(len(draws), (2, NUM_PAIRS), replace=False)
    keys = jax.random.split(jax.random.key(1), (MAX_STEPS, NUM_PAIRS))
    noise = jax.vmap(jax.vmap(lambda key: kernel.sample_noise(key, target)))(keys)
    return stability.coalescence_time(kernel.transition(target), draws[first], draws[second], noise, scale=1.0)


figure, panel = plt.subplots(figsize=(8, 3.6), layout="constrained")
for name, chain in {"centred": centred, "chosen": chosen}.items():
    pairs = couple(chain)
    times = np.where(np.asarray(pairs.merged), np.asarray(pairs.steps), np.inf)
    steps = np.arange(1, MAX_STEPS + 1)
    panel.step(steps, [np.mean(times <= step) for step in steps], label=name, where="post")
panel.set(xscale="log", xlabel="step", ylabel="share of the pairs that have merged", ylim=(0, 1.02))
panel.legend()
plt.show()

# %% [markdown]
# ## Groups of different size
#
# In the next model neither form is good: ten groups have 2 rows, three have 500. A small group wants the non-centred form,
# a large one the centred form.

# %%
rng, sizes = np.random.default_rng(1), np.array([2] * 10 + [500] * 3)
group = np.repeat(np.arange(len(sizes)), sizes)
rows = rng.normal(1.0, 0.7, len(sizes))[group] + rng.normal(size=len(group))


def groups(group, rows):
    mu = numpyro.sample("mu", dist.Normal(0, 5))
    tau = numpyro.sample("tau", dist.HalfNormal(2))
    sigma = numpyro.sample("sigma", dist.HalfNormal(2))
    with numpyro.plate("groups", len(sizes)):
        effect = numpyro.sample("effect", dist.Normal(mu, tau))
    with numpyro.plate("rows", len(group)):
        numpyro.sample("y", dist.Normal(effect[group], sigma), obs=rows)


non_centred = reparam(groups, config={"effect": LocScaleReparam(0)})
with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    chains = {
        name: pmcmc.parallel_chain(model, 0, model_args=(group, rows), reparam=choice, **settings)
        for name, model, choice in (
            ("centred", groups, None),
            ("non-centred", non_centred, None),
            ("chosen", groups, pmcmc.AutoReparam()),
        )
    }
show(chains)

# %%
print(chains["chosen"].report.centredness)
c = np.asarray(chains["chosen"].target.centredness["effect"])
figure, panel = plt.subplots(figsize=(8, 3), layout="constrained")
panel.bar(range(len(sizes)), c)
panel.set_xticks(range(len(sizes)), [f"{size}" for size in sizes])
panel.set(xlabel="rows of the group", ylabel="centredness c", ylim=(0, 1))
plt.show()

# %% [markdown]
# The draws are exact for every $c$: it decides only in which coordinates the chain moves, and is fixed before the step size is
# tuned. The page *Hierarchies* of the documentation has the formula, the models that it was measured on, and what it cannot do.
# How to see whether parallel blocks pay: [when it pays](when_it_pays.ipynb).
