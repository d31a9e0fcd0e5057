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
# # When it pays: contraction, chaos, and funnels
#
# [![Open in Colab](https://colab.research.google.com/assets/colab-badge.svg)](https://colab.research.google.com/github/pmcmc/pmcmc/blob/main/notebooks/when_it_pays.ipynb)
#
# A chain with its noise drawn first is a recurrence $x_t = f(x_{t-1}, u_t)$. Solvers that find all its states at once
# need few rounds if and only if the recurrence *forgets* its start: two paths from different starts, driven by the same
# $u$, must merge. This notebook shows how to measure that, first on dynamical systems, then on posteriors, including a
# centred and a non-centred hierarchy and a funnel.

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

import pmcmc
from pmcmc import recurrence, stability

plt.rcParams["figure.dpi"] = 80
# All these warnings are issued, rightly, about the funnel, the centred form and the two modes below.
DOUBTS = "Warm-up did not settle|.* did not move|.* were divergent|the draws have not mixed|.* accepted no move"
warnings.filterwarnings("ignore", message=DOUBTS)
jax.config.update("jax_enable_x64", True)  # so that paths can be compared step for step

# %%
SMALL = "PMCMC_SMALL" in os.environ
LARGE = device.platform == "gpu" and not SMALL
LENGTH = 128 if SMALL else 1024 if LARGE else 512  # steps of the network
GAINS = np.linspace(0.5, 2.0, 4 if SMALL else 13)
NUM_PAIRS, MAX_STEPS = (8, 200) if SMALL else (32, 2_000)
NUM_SAMPLES = 2_000 if SMALL else 2_000_000 if LARGE else 5_000_000  # of the runs under "auto"

# %% [markdown]
# ## From contracting to chaotic
#
# The example is a network with gain $g$ and noise, $x_t = \tanh(g\, Q\, x_{t-1}) + 0.1\, u_t$, with a random rotation $Q$ in
# 16 dimensions. For small $g$ it forgets its past; for large $g$ it is chaotic. The **largest Lyapunov exponent** (LLE) is
# the mean log growth per step of an infinitesimal difference $v$,
#
# $$\lambda = \lim_{T \to \infty} \frac1T \log \lVert J_T \cdots J_1 v \rVert, \qquad J_t = \partial f / \partial x
# \text{ at } (x_{t-1}, u_t).$$

# %%
dim = 16
rng = np.random.default_rng(0)
rotation = jnp.asarray(np.linalg.qr(rng.normal(size=(dim, dim)))[0])
drive = jnp.asarray(rng.normal(size=(LENGTH, dim)))
start = jnp.asarray(rng.normal(size=dim))


def network(gain):
    return lambda x, u: jnp.tanh(gain * (rotation @ x)) + 0.1 * u


@jax.jit
def measure(gain):
    fn = network(gain)
    newton = recurrence.solve(fn, start, drive, solver=recurrence.deer(max_iters=LENGTH))
    blocks = recurrence.solve(fn, start, drive, solver=recurrence.MultipleShooting(num_blocks=16))
    exponent = stability.lyapunov_exponent(fn, start, drive, num_batches=8)
    return exponent.exponents[0], newton.stats.num_iters, blocks.stats.num_sequential_steps, blocks.result


found = [measure(gain) for gain in GAINS]
exponents, iterations, depths, results = (np.array(x) for x in zip(*found, strict=True))
for gain, row in zip(GAINS, zip(exponents, iterations, depths, results, strict=True), strict=True):
    print(
        f"gain {gain:.2f}  LLE {row[0]:+.3f}  Newton {row[1]:4d} iterations  shooting {row[2]:4d} steps"
        f"  {recurrence.RESULTS(int(row[3])).name}"
    )

# %%
figure, (left, right) = plt.subplots(1, 2, figsize=(9, 3.4), layout="constrained")
left.plot(GAINS, exponents, "o-", ms=4)
left.axhline(0, color="0.4", lw=0.8, ls=":")
left.set(xlabel="gain $g$", ylabel="largest Lyapunov exponent", title="A network turns chaotic")
right.plot(exponents, iterations, "o", ms=5, label="Newton (DEER): iterations")
right.plot(exponents, depths, "s", ms=5, label="shooting, 16 blocks: critical path")
right.axhline(LENGTH, color="0.4", lw=0.8, ls=":", label=f"sequential: T = {LENGTH}")
right.axvline(0, color="0.4", lw=0.8, ls=":")
right.set(xlabel="largest Lyapunov exponent", ylabel="rounds one after the other", yscale="log")
right.set_title("Rounds needed")
right.legend(frameon=False, fontsize="small")
plt.show()

# %% [markdown]
# If the exponent is clearly negative, both solvers finish in a fraction of $T$ rounds. As it approaches zero, merges take
# longer than a block, and the critical path of shooting increases to $T$. If it is positive, Newton's iterations grow to the
# order of $T$ as well. Then nothing is gained, and every round costs more than a plain step. (A round of Newton's method
# always costs more than a step: it evaluates all $T$ Jacobians and multiplies them.)
#
# ## A small residual is no proof
#
# Every solver here judges itself by the residual $r_t = x_t - f(x_{t-1}, u_t)$. Where paths converge, a small residual
# means a small error. Where they separate, it does not: by chance two chaotic paths come close, and merging them there
# gives a *pseudo-orbit*. An example is the logistic map $x_t = r\, x_{t-1}(1 - x_{t-1})$ at $r = 4$, with a very loose tolerance:

# %%
steps = 16_384
for rate in (2.8, 4.0):
    logistic = lambda x, u, rate=rate: rate * x * (1 - x)
    x0 = jnp.array(0.3)
    guess = jnp.asarray(np.random.default_rng(1).uniform(size=steps))
    blocks = recurrence.solve(
        logistic, x0, length=steps, initial_guess=guess, solver=recurrence.MultipleShooting(256, tol=1e-2)
    )
    truth = recurrence.solve(logistic, x0, length=steps, solver=recurrence.Sequential())
    wrong = np.mean(np.abs(blocks.value - truth.value) > 0.1)
    print(
        f"r = {rate}: residual {float(blocks.residual):.0e}, {wrong:.0%} of the states off by more than 0.1, "
        f"growth rate {float(blocks.stats.growth_rate):+.2f} -> {recurrence.RESULTS(int(blocks.result)).name}"
    )

# %% [markdown]
# The two residuals are of similar size, but the errors are very different. The solver therefore also measures, on the
# blocks that merge, whether small distances shrink or grow, and does not certify the second case. (By default blocks merge
# at rounding, $10^{-13}$ in float64, and only after they have stayed close for some steps. At $r = 4$ they then hardly ever
# merge, and the solution is exact but takes as long as the sequential one.)
#
# ## Posteriors: coupled chains
#
# For a Markov chain tangents are not enough. They do not reflect that an accept decision may differ between two nearby
# paths, or that two paths may be in different modes. So we measure finite distances: start *pairs* of chains at
# independent draws, give both the same noise, and count the steps until they agree to rounding. `coalescence_time` does
# this for any recurrence; the recurrence of a kernel on a target is `kernel.transition(target)`.
#
# We compare four posteriors, each with HMC as tuned by warm-up. The first two are *the same* hierarchy,
#
# $$\text{non-centred: } \theta_j = \mu + \tau z_j,\ z_j \sim N(0,1); \qquad
#   \text{centred: } \theta_j \sim N(\mu, \tau^2),$$
#
# the third is Neal's funnel, $v \sim N(0, 3^2)$, $x_j \sim N(0, e^v)$, a centred hierarchy without data, and the fourth has
# two modes that are far apart.

# %%
effect = np.array([28.0, 8.0, -3.0, 7.0, -1.0, 1.0, 18.0, 12.0])
error = np.array([15.0, 10.0, 16.0, 11.0, 9.0, 11.0, 10.0, 18.0])


def non_centred():
    mu = numpyro.sample("mu", dist.Normal(0, 5))
    tau = numpyro.sample("tau", dist.HalfCauchy(5))
    with numpyro.plate("school", 8):
        theta = numpyro.deterministic("theta", mu + tau * numpyro.sample("z", dist.Normal(0, 1)))
        numpyro.sample("effect", dist.Normal(theta, error), obs=effect)


def centred():
    mu = numpyro.sample("mu", dist.Normal(0, 5))
    tau = numpyro.sample("tau", dist.HalfCauchy(5))
    with numpyro.plate("school", 8):
        theta = numpyro.sample("theta", dist.Normal(mu, tau))
        numpyro.sample("effect", dist.Normal(theta, error), obs=effect)


def funnel():
    v = numpyro.sample("v", dist.Normal(0, 3))
    with numpyro.plate("coordinate", 9):
        numpyro.sample("x", dist.Normal(0, jnp.exp(v / 2)))


def two_modes():
    centres = jnp.array([[4.0, 4.0], [-4.0, -4.0]])
    x = numpyro.sample("x", dist.ImproperUniform(dist.constraints.real_vector, (), (2,)))
    numpyro.factor("modes", jax.nn.logsumexp(-0.5 * jnp.sum((x - centres) ** 2, axis=-1)))


def couple(chain, key):
    """Pairs of chains from independent draws of `chain`, under common noise."""
    target, kernel = chain.target, chain.kernel
    draws = chain.unknowns.reshape(-1, target.dim)
    first, second = np.random.default_rng(2).choice(len(draws), (2, NUM_PAIRS), replace=False)
    keys = jax.random.split(key, (MAX_STEPS, NUM_PAIRS))
    noise = jax.vmap(jax.vmap(lambda key: kernel.sample_noise(key, target)))(keys)
    return stability.coalescence_time(kernel.transition(target), draws[first], draws[second], noise, scale=1.0)


models = {
    "eight schools, non-centred": non_centred,
    "eight schools, centred": centred,
    "funnel": funnel,
    "two modes": two_modes,
}
order = recurrence.Sequential()
short = {
    name: pmcmc.parallel_chain(m, 0, solver=order, num_samples=1_000, progress_bar=False) for name, m in models.items()
}
pairs = {name: couple(chain, jax.random.key(3)) for name, chain in short.items()}
for name, p in pairs.items():
    merged = np.asarray(p.merged)
    when = (
        f"median {int(np.median(p.steps[merged]))}, longest {int(p.steps[merged].max())} steps" if merged.any() else ""
    )
    print(f"{name:27s} {merged.sum():2d} of {NUM_PAIRS} pairs merged within {MAX_STEPS} steps  {when}")

# %%
figure, panels = plt.subplots(2, 2, figsize=(9, 5.6), sharey=True, layout="constrained")
for axes, (name, p) in zip(panels.flat, pairs.items(), strict=True):
    distance = np.array(p.distances)[: int(p.num_steps) + 1]
    distance[distance == 0] = np.nan  # merged to the last bit
    every = len(distance) // 200 + 1
    axes.plot(np.arange(len(distance))[::every], distance[::every], color="tab:blue", lw=0.6, alpha=0.6)
    axes.axhline(float(p.tol), color="0.4", lw=0.8, ls=":")
    axes.set(yscale="log", xlabel="step", title=name)
figure.supylabel("distance of a pair (posterior sd)", fontsize="medium")
plt.show()

# %% [markdown]
# Each line is one pair. In the non-centred form all distances fall to the tolerance (dotted) at a steady rate. In the
# centred form and in the funnel a step size that suits the wide part is far too large for the neck, where both paths of a
# pair get stuck independently for many steps. For the same reason such posteriors are hard for HMC itself; a better
# parametrisation solves both problems. With two modes, pairs in the same mode merge, and pairs in different modes stay as
# far apart as the modes are.
#
# The exponents of the tangents, for comparison:

# %%
for name, chain in short.items():
    target, kernel = chain.target, chain.kernel
    noise = jax.vmap(lambda key: kernel.sample_noise(key, target))(jax.random.split(jax.random.key(4), MAX_STEPS))
    first = chain.unknowns[0, -1]
    tangents = stability.lyapunov_exponent(kernel.transition(target), first, noise, num_batches=8)
    print(
        f"{name:27s} tangents: {float(tangents.exponents[0]):+.3f} +- {2 * float(tangents.standard_error[0]):.3f}"
        f"   small finite distances: {float(pairs[name].growth_rate):+.3f}"
    )

# %% [markdown]
# ("nan": no pair came close enough to have small distances.) With a positive exponent nearby paths separate on average. Some
# pairs may still merge, as in the centred form, but blocks cannot rely on it. A negative exponent is no guarantee either:
# with two modes tangents shrink within each mode, but do not reflect the other. *What counts is that pairs from dispersed
# starts merge.*

# %% [markdown]
# ## How "auto" uses these measurements
#
# `parallel_chain(..., solver="auto")`, the default, runs such a pilot if the run is long enough to gain from it, predicts
# the critical path and the seconds of every candidate, and chooses the cheapest if it should save more than a quarter of the
# time, otherwise sequential sampling. On a CPU it may also try blocks on a first segment. If chains do not merge, it samples
# sequentially and names the sites that keep them apart.

# %%
for name in ("eight schools, non-centred", "eight schools, centred"):
    chain = pmcmc.parallel_chain(models[name], 0, num_samples=NUM_SAMPLES, thinning=100, progress_bar=False)
    print(f"--- {name}\n{chain.report}\n")
    if chain.report.plan is not None:
        print(chain.report.plan, "\n")

# %% [markdown]
# The seconds are those of the machine that ran this notebook. The outputs stored here are from two CPU cores that other work
# kept busy. On a GPU the decision may differ. The draws are the same whatever was chosen.
#
# More: [one chain, every solver](every_solver.ipynb).
