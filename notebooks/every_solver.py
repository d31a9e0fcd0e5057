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
# # One chain, every solver
#
# [![Open in Colab](https://colab.research.google.com/assets/colab-badge.svg)](https://colab.research.google.com/github/pmcmc/pmcmc/blob/main/notebooks/every_solver.ipynb)
#
# Many methods find all states of a recurrence $x_t = f(x_{t-1}, u_t)$ at once. Nearly all of them iterate one formula,
#
# $$x_t^{k+1} = f(x_{t-1}^k, u_t) + A_t\, (x_{t-1}^{k+1} - x_{t-1}^k),$$
#
# a *linear* recurrence in the new states, which a parallel scan solves with depth $O(\log T)$. They differ in $A_t$
# (Gonzalez et al. 2025):
#
# | method | $A_t$ | source |
# |---|---|---|
# | DEER | the Jacobian $\partial f / \partial x$ at $x_{t-1}^k$: Newton's method | Lim et al. 2024 |
# | quasi-DEER | its diagonal | Gonzalez et al. 2024 |
# | ELK | the Jacobian, in a trust region (a Kalman filter) | Gonzalez et al. 2024 |
# | Picard | the identity | Shih et al. 2023 |
# | Jacobi | zero | |
#
# *Multiple shooting* is a different method: cut the path into blocks, run all blocks from guessed starts, then restart each
# block from the end of its predecessor until it merges with its recorded path. It needs no derivative.
#
# In this notebook all of them solve the same Markov chain, and we plot how the error decreases.

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
from functools import partial

import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np

import pmcmc
from pmcmc import recurrence, stability

plt.rcParams["figure.dpi"] = 80
jax.config.update("jax_enable_x64", True)  # so that solutions can be compared to the last digits

# %%
SMALL = "PMCMC_SMALL" in os.environ
LARGE = device.platform == "gpu" and not SMALL
LENGTH = 128 if SMALL else 4096 if LARGE else 512  # T, steps of the chain
NUM_BLOCKS = LENGTH // 16
NUM_ITERATES = 40  # Newton iterates that are kept for the pictures
STEP_SIZES = np.geomspace(0.01, 1.0, 3 if SMALL else 11)

# %% [markdown]
# ## The posterior: O-rings
#
# The data are the 23 flights before the Challenger disaster (Dalal, Fowlkes & Hoadley 1989): was there damage to the
# O-rings, given the temperature at launch? The model is a logistic regression with standardised temperature and
# $N(0, 2^2)$ priors:

# %%
temperature = np.array([66, 70, 69, 68, 67, 72, 73, 70, 57, 63, 70, 78, 67, 53, 67, 75, 70, 81, 76, 79, 75, 76, 58.0])
damage = np.array([0, 1, 0, 0, 0, 0, 0, 0, 1, 1, 1, 0, 0, 1, 0, 0, 0, 0, 0, 0, 1, 0, 1.0])
standardised = (temperature - temperature.mean()) / temperature.std()


def logdensity(position):
    logits = position["intercept"] + position["slope"] * standardised
    return jnp.sum(damage * logits - jax.nn.softplus(logits)) - (
        position["intercept"] ** 2 + position["slope"] ** 2
    ) / (2 * 2**2)


origin = {"intercept": jnp.zeros(()), "slope": jnp.zeros(())}
target = pmcmc.Target.from_logdensity(logdensity, origin)

# %% [markdown]
# ## The chain as a recurrence
#
# The Metropolis-adjusted Langevin algorithm with step size $h$ proposes $y = x + h \nabla \log p(x) + \sqrt{2h}\, z$ and
# accepts if $\log u$ is below the log acceptance ratio. With $(z, u)$ of all steps drawn beforehand this is a
# deterministic map. `kernel.transition(target)` is this map, and every solver in `pmcmc.recurrence` can solve it.

# %%
kernel = pmcmc.MALA(step_size=0.2)
keys = jax.random.split(jax.random.key(0), LENGTH)
noise = jax.vmap(lambda key: kernel.sample_noise(key, target))(keys)
start = target.coordinates(origin)

exact = recurrence.solve(kernel.transition(target), start, noise, solver=recurrence.Sequential(), has_aux=True)
accepted = float(jnp.mean(exact.aux.margin > 0))


@jax.jit
def lyapunov_exponent(step_size):
    transition = kernel.with_step_size(step_size).transition(target)
    return stability.lyapunov_exponent(transition, start, noise, num_batches=8).exponents[0]


print(f"{accepted:.0%} of the proposals accepted; Lyapunov exponent {float(lyapunov_exponent(kernel.step_size)):.2f}")

# %% [markdown]
# ## All solvers
#
# Each solver starts from the same guess, the start of the chain repeated $T$ times, and stops when all $T$ equations are
# satisfied to $10^{-13}$ of the path's own spread.

# %%
options = dict(max_iters=LENGTH, num_iterates=NUM_ITERATES)
solvers = {
    "DEER": recurrence.deer(**options),
    "quasi-DEER": recurrence.quasi_deer(**options),
    "ELK": recurrence.elk(**options),
    "Picard": recurrence.picard(**options),
    "Jacobi": recurrence.jacobi(**options),
    "shooting": recurrence.MultipleShooting(num_blocks=NUM_BLOCKS),
}


@jax.jit
def solve(solver, step_size):
    transition = kernel.with_step_size(step_size).transition(target)
    return recurrence.solve(transition, start, noise, solver=solver)


solutions = {name: solve(solver, kernel.step_size) for name, solver in solvers.items()}
spread = exact.value.std(axis=0)
distance = lambda path: np.abs((np.asarray(path) - exact.value) / spread).max(axis=-1)

print(f"{'':12s}{'iterations':>11s}{'evaluations of f':>18s}{'residual':>10s}{'error':>10s}")
for name, s in solutions.items():
    rounds = f"{int(s.stats.num_iters)}" if s.stats.num_iters else f"{int(s.stats.num_sequential_steps)} steps"
    each = float(s.stats.num_fn_evals) / LENGTH
    error = distance(s.value).max()
    print(
        f"{name:12s}{rounds:>11s}{each:14.1f} x T{float(s.residual):10.0e}{error:10.0e}  {recurrence.RESULTS(int(s.result)).name}"
    )

# %% [markdown]
# The error is the largest distance of a state from the sequential chain, in units of the path's standard deviation. All
# solvers that converge find *the same chain*. The evaluations count the step only, without the Jacobians.
#
# ## Convergence
#
# The figure shows $\log_{10}$ of the error for each solver, over the step $t$ (horizontal) and the iteration (downwards).
# Blue is solved. Black dots mark steps at which the iterate accepts and the chain rejects, or vice versa.


# %%
def iterates_of_shooting():
    """States after 0, 1, 2, ... steps of repair; rows start where the blocks have run once."""
    first = LENGTH // NUM_BLOCKS
    last = int(solutions["shooting"].stats.num_sequential_steps)
    depths = np.unique(np.linspace(first, last, NUM_ITERATES).astype(int))
    budget = partial(recurrence.MultipleShooting, NUM_BLOCKS)
    return depths, [solve(budget(max_steps=int(depth)), kernel.step_size).value for depth in depths]


@jax.jit
def accepts(path):
    previous = jnp.concatenate([start[None], path[:-1]])
    return jax.vmap(kernel.transition(target))(previous, noise)[1].margin > 0


def draw(axes, rows, paths):
    wrong = [np.asarray(accepts(path) != accepts(exact.value)) for path in paths]
    row, step = np.nonzero(wrong)
    axes.plot(step + 1, rows[row], "k.", ms=1)
    errors = np.log10(np.maximum([distance(path) for path in paths], 1e-16))
    return axes.pcolormesh(np.arange(1, LENGTH + 1), rows, errors, cmap="RdYlBu_r", vmin=-16, vmax=1, shading="nearest")


figure, panels = plt.subplots(2, 3, figsize=(11, 5.6), layout="constrained")
for axes, (name, s) in zip(panels.flat, solutions.items(), strict=True):
    if s.iterates is not None:
        image = draw(axes, np.arange(NUM_ITERATES), s.iterates)
        axes.set(title=f"{name}: {int(s.stats.num_iters)} iterations", ylabel="iteration")
    else:
        image = draw(axes, *iterates_of_shooting())
        axes.set(title=f"{name}: {NUM_BLOCKS} blocks", ylabel="steps one after the other")
    axes.set(xlabel="step $t$")
    axes.invert_yaxis()
figure.colorbar(image, ax=panels, label="$\\log_{10}$ error (path sd)", shrink=0.8)
plt.show()

# %% [markdown]
# The figure shows three effects.
#
# - *Causality.* After $k$ iterations at least the first $k$ states are exact: the blue triangle on the left. So $T$
#   iterations always suffice, and Picard, whose cumulative sum never forgets an error, needs nearly all of them.
# - *Forgetting.* The methods that contract do not depend on the triangle: errors vanish along the whole path at once. Even
#   Jacobi, without derivatives, finishes as soon as paths from a wrong start have merged with the right one.
# - *Accept decisions.* For Newton-type methods the errors that remain longest follow the dots. A wrong decision in the
#   iterate is a jump that no derivative anticipates; once it is right, the errors after it decrease quickly.
#
# ## The best solver depends on the kernel
#
# The step size determines how fast the chain forgets. Step sizes are numbers, so changing them compiles nothing.

# %%
counts = {name: [] for name in solvers}
exponents = []
for h in STEP_SIZES:
    for name, solver in solvers.items():
        s = solve(solver, h)
        counts[name].append(int(s.stats.num_iters) or int(s.stats.num_sequential_steps))
    exponents.append(float(lyapunov_exponent(h)))

figure, (left, right) = plt.subplots(1, 2, figsize=(10, 3.6), layout="constrained")
for name, count in counts.items():
    left.plot(STEP_SIZES, count, "o-", ms=4, label=name + (" (critical path)" if name == "shooting" else ""))
left.axhline(LENGTH, color="0.4", lw=0.8, ls=":", label=f"T = {LENGTH}")
left.set(xscale="log", yscale="log", xlabel="step size $h$", ylabel="iterations")
figure.legend(frameon=False, fontsize="small", loc="outside right upper")
right.plot(STEP_SIZES, exponents, "o-", ms=4)
right.axhline(0, color="0.4", lw=0.8, ls=":")
right.set(xscale="log", xlabel="step size $h$", ylabel="largest Lyapunov exponent")
plt.show()

# %% [markdown]
# With small steps the chain forgets slowly. This slows down Jacobi and shooting, which rely on forgetting alone, but not the
# methods with a derivative, since a map close to the identity is close to linear (and for Picard $A_t = I$ is then nearly
# right). Jacobi and shooting are best where the exponent is lowest. For larger step sizes, accepted steps overshoot and
# rejected steps forget nothing: the exponent rises above zero, and in the end all methods need of the order of $T$ iterations.
#
# ## The cost of an iteration
#
# Counts are not seconds. An iteration of DEER evaluates $T$ Jacobians and multiplies $D \times D$ matrices along a
# scan, $O(T D^3)$ work; quasi-DEER takes $O(T D)$; shooting takes plain steps only. The times below are for `LENGTH` steps of
# this small model, once compiled, median of 5:

# %%
import time


def seconds(call):
    jax.block_until_ready(call())
    taken = []
    for _ in range(5):
        begin = time.perf_counter()
        jax.block_until_ready(call())
        taken.append(time.perf_counter() - begin)
    return np.median(taken)


for name, solver in {"sequential": recurrence.Sequential(), **solvers}.items():
    print(f"{name:12s}{1e3 * seconds(lambda solver=solver: solve(solver, kernel.step_size)):8.2f} ms")
print(f"on {device.device_kind} ({device.platform})")

# %% [markdown]
# The times stored here are from two CPU cores that were also busy with other work. They show only orders of magnitude, and
# say nothing about a GPU. Two cores can run little in parallel, so the extra evaluations of the solvers count in full. Run
# the notebook on a GPU, where `LENGTH` is larger, to compare.
#
# More: [when it pays](when_it_pays.ipynb); [a recurrent network](rnn.ipynb) with derivatives through these solvers.
