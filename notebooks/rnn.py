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
# # A nonlinear recurrent network, evaluated and trained in parallel
#
# [![Open in Colab](https://colab.research.google.com/assets/colab-badge.svg)](https://colab.research.google.com/github/pmcmc/pmcmc/blob/main/notebooks/rnn.ipynb)
#
# `pmcmc.recurrence` does not depend on MCMC. A recurrent network $h_t = f_\vartheta(h_{t-1}, r_t)$ is a recurrence with
# inputs $r_t$: Newton's method finds all its states at once (DEER: Lim et al. 2024), and the solution can be differentiated,
# so that the network can be trained. This also matters for Bayesian models: the likelihood of a nonlinear state-space or
# time-series model is often such a recursion.
#
# In this notebook a gated recurrent unit (GRU) learns how rain becomes river flow.

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
import time
from functools import partial

import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
import optax

from pmcmc import recurrence, stability

plt.rcParams["figure.dpi"] = 80

# %%
SMALL = "PMCMC_SMALL" in os.environ
LARGE = device.platform == "gpu" and not SMALL
LENGTH = 128 if SMALL else 16_384 if LARGE else 1_024  # days, T
NUM_UPDATES = 20 if SMALL else 400
DIM = 4  # hidden states, D

# %% [markdown]
# ## Data: a reservoir with nonlinear outflow
#
# A storage $s_t$ fills with rain and empties faster the fuller it is, $q_t = 0.1\, s_t^{1.5}$. We observe rain and a noisy
# flow. The training series and the test series are equally long.

# %%
rng = np.random.default_rng(0)
rain = np.where(rng.random(2 * LENGTH) < 0.3, rng.gamma(1.0, 1.0, 2 * LENGTH), 0.0)
storage, flow = 1.0, []
for r in rain:
    storage += r
    flow.append(min(storage, 0.1 * storage**1.5))
    storage -= flow[-1]
flow = np.array(flow)
seen = flow + 0.03 * rng.normal(size=2 * LENGTH)
to_train, to_test = slice(0, LENGTH), slice(LENGTH, 2 * LENGTH)
rain, seen = jnp.asarray(rain, jnp.float32), jnp.asarray(seen, jnp.float32)


# %% [markdown]
# ## The network
#
# $$g = \sigma(W_g h + v_g r + b_g), \quad c = \tanh(W_c h + v_c r + b_c), \quad h' = g \odot h + (1 - g) \odot c, \qquad
# \hat q = w^\top h' + b.$$


# %%
def initial_parameters(key):
    draw = lambda key, *shape: jax.random.normal(key, shape) / np.sqrt(DIM)
    k = jax.random.split(key, 5)
    return {
        "gate": (draw(k[0], DIM, DIM), draw(k[1], DIM), jnp.ones(DIM)),
        "candidate": (draw(k[2], DIM, DIM), draw(k[3], DIM), jnp.zeros(DIM)),
        "output": (draw(k[4], DIM), jnp.zeros(())),
    }


def unit(parameters, h, r):
    affine = lambda p: p[0] @ h + p[1] * r + p[2]
    gate = jax.nn.sigmoid(affine(parameters["gate"]))
    return gate * h + (1 - gate) * jnp.tanh(affine(parameters["candidate"]))


origin = jnp.zeros(DIM)
parameters = initial_parameters(jax.random.key(1))

# %% [markdown]
# ## Evaluation in parallel
#
# One call iterates until the residual is small. The states are those of the sequential loop.

# %%
newton = recurrence.deer(max_iters=100)


def in_parallel(parameters, inputs, guess=None):
    return recurrence.solve(partial(unit, parameters), origin, inputs, solver=newton, initial_guess=guess)


def in_order(parameters, inputs):
    def step(h, r):
        h = unit(parameters, h, r)
        return h, h

    return jax.lax.scan(step, origin, inputs)[1]


solution = jax.jit(in_parallel)(parameters, rain[to_train])
loop = jax.jit(in_order)(parameters, rain[to_train])
exponent = stability.lyapunov_exponent(partial(unit, parameters), origin, rain[to_train], num_batches=8)
print(
    f"{recurrence.RESULTS(int(solution.result)).name} after {int(solution.stats.num_iters)} iterations for {LENGTH} steps"
)
print(f"largest difference from the loop: {float(jnp.max(jnp.abs(solution.value - loop))):.1e}")
print(f"largest Lyapunov exponent: {float(exponent.exponents[0]):.2f} a step")

# %% [markdown]
# The exponent is negative: the network forgets its past, so a few iterations suffice
# ([when it pays](when_it_pays.ipynb)).
#
# ## Derivatives through the solution
#
# A solution satisfies $h_t = f_\vartheta(h_{t-1}, r_t)$ for all $t$. We differentiate this equation, not the iterations:
#
# $$dh_t = J_t\, dh_{t-1} + \frac{\partial f}{\partial \vartheta}\, d\vartheta,$$
#
# This is one more linear recurrence, so it takes one more parallel scan, whatever the number of iterations was. Reverse mode
# is its transpose. We compare the gradients of the mean squared error, computed in parallel and sequentially:


# %%
def predict(parameters, path):
    weights, bias = parameters["output"]
    return path @ weights + bias


def loss_in_parallel(parameters, inputs, outcome, guess):
    found = in_parallel(parameters, inputs, guess)
    loss = jnp.mean((predict(parameters, found.value) - outcome) ** 2)
    return loss, (found.value, found.stats.num_iters, found.result)


def loss_in_order(parameters, inputs, outcome):
    return jnp.mean((predict(parameters, in_order(parameters, inputs)) - outcome) ** 2)


data = rain[to_train], seen[to_train]
guess = jnp.zeros((LENGTH, DIM))
gradient_in_parallel = jax.jit(jax.value_and_grad(loss_in_parallel, has_aux=True))
gradient_in_order = jax.jit(jax.value_and_grad(loss_in_order))
_, first = gradient_in_parallel(parameters, *data, guess)
_, second = gradient_in_order(parameters, *data)
flat = lambda tree: jnp.concatenate([leaf.ravel() for leaf in jax.tree.leaves(tree)])
difference = jnp.linalg.norm(flat(first) - flat(second)) / jnp.linalg.norm(flat(second))
print(f"{flat(first).size} derivatives; relative difference of the two gradients: {float(difference):.1e}")

# %% [markdown]
# ## Training in parallel
#
# Adam uses the whole series in each update. The states of one update are the guess for the next: the parameters have changed
# little, so Newton's method starts close to the solution.

# %%
schedule = optax.adam(0.02)


@jax.jit
def update_in_parallel(parameters, memory, guess):
    (loss, (path, num_iters, result)), gradient = jax.value_and_grad(loss_in_parallel, has_aux=True)(
        parameters, *data, guess
    )
    change, memory = schedule.update(gradient, memory)
    return optax.apply_updates(parameters, change), memory, path, (loss, num_iters, result)


@jax.jit
def update_in_order(parameters, memory):
    loss, gradient = jax.value_and_grad(loss_in_order)(parameters, *data)
    change, memory = schedule.update(gradient, memory)
    return optax.apply_updates(parameters, change), memory, loss


trained, memory, path, told = parameters, schedule.init(parameters), guess, []
for _ in range(NUM_UPDATES):
    trained, memory, path, report = update_in_parallel(trained, memory, path)
    told.append(report)
losses, iterations, results = (np.array(x) for x in zip(*told, strict=True))

again, memory, losses_in_order = parameters, schedule.init(parameters), []
for _ in range(NUM_UPDATES):
    again, memory, loss = update_in_order(again, memory)
    losses_in_order.append(float(loss))

print("solves that were not successful:", np.sum(results != recurrence.RESULTS.successful))
print(
    f"iterations: {iterations[0]} in the first update, then {np.median(iterations[1:]):.0f} (median), {iterations[1:].max()} at most"
)
print(
    f"loss: {losses[0]:.4f} -> {losses[-1]:.5f}; trained in order: {losses_in_order[-1]:.5f}; noise variance {0.03**2:.5f}"
)

# %%
test = jax.jit(in_order)(trained, rain[to_test])
predicted = predict(trained, test)
figure, (left, middle, right) = plt.subplots(1, 3, figsize=(13, 3.4), layout="constrained", width_ratios=[1, 1, 2])
left.plot(losses, label="in parallel")
left.plot(losses_in_order, ls="--", label="in order")
left.set(yscale="log", xlabel="update", ylabel="mean squared error")
left.legend(frameon=False, fontsize="small")
middle.plot(iterations, ".", ms=3)
middle.set(xlabel="update", ylabel="Newton iterations", ylim=(0, None))
shown = slice(0, 120)
right.plot(seen[to_test][shown], ".", ms=4, color="0.5", label="observed")
right.plot(predicted[shown], label="GRU")
right.plot(flow[to_test][shown], ls="--", lw=1, color="0.2", label="true flow")
right.set(xlabel="day of the test series", ylabel="flow", title="Prediction from rain alone")
right.legend(frameon=False, fontsize="small")
plt.show()

error = float(jnp.mean((predicted[20:] - flow[to_test][20:]) ** 2))
print(
    f"test series, from day 20 on: mean squared error against the true flow {error:.5f}, its variance {flow[to_test].var():.3f}"
)

# %% [markdown]
# The two losses follow the same curve: the parallel gradient equals the sequential one to rounding. The network starts the
# test series from $h = 0$, which explains the errors of the first days.
#
# ## Cost
#
# A sequential scan has a critical path of $O(T)$ steps, forward and backward. DEER takes a few iterations of depth $O(\log T)$
# with $T D^3$ work each. The times are for loss and gradient, compiled, median of 5:


# %%
def milliseconds(call):
    jax.block_until_ready(call())
    taken = []
    for _ in range(5):
        begin = time.perf_counter()
        jax.block_until_ready(call())
        taken.append(time.perf_counter() - begin)
    return 1e3 * np.median(taken)


cold = milliseconds(lambda: gradient_in_parallel(trained, *data, guess))
warm = milliseconds(lambda: gradient_in_parallel(trained, *data, path))
loop = milliseconds(lambda: gradient_in_order(trained, *data))
print(f"in parallel: {cold:.2f} ms from zeros, {warm:.2f} ms from the last states; in order: {loop:.2f} ms")
print(f"on {device.device_kind} ({device.platform}), T = {LENGTH}, D = {DIM}")

# %% [markdown]
# The numbers stored here are from two busy CPU cores, which can run little in parallel, so the work of the Jacobians counts in
# full. DEER suits long series, small states and GPUs; set `LENGTH` there and compare.
#
# Does the trained network still forget its past? If tangents shrink, gradients cannot explode, and the number of Newton
# iterations stays small:

# %%
exponent = stability.lyapunov_exponent(partial(unit, trained), origin, rain[to_train], num_batches=8)
print(f"largest Lyapunov exponent after training: {float(exponent.exponents[0]):.2f} a step")

# %% [markdown]
# More: [one chain, every solver](every_solver.ipynb) for the alternatives to DEER.
