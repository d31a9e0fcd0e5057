"""Measure what lanes of NUTS lose by waiting for the deepest tree of each step, and the time of a lane's step.

pmcmc's NUTS and BlackJAX's are compared with the same keys, states and step size, in the whitened coordinates of
warm-up. One lane is a plain loop; with more lanes, every lane waits for the slowest at every step, as lanes of
`jax.vmap` do.

``python -m benchmarks.nuts_lanes [--posteriors eight_schools german_credit] [--lanes 1 16 64 256 1024] [--save NAME]``
"""

import argparse
from collections.abc import Callable
from functools import partial

import blackjax
import jax
import jax.numpy as jnp
import numpy as np

from benchmarks._harness import alternate, ratio, save
from benchmarks.posteriors import POSTERIORS, Posterior
from pmcmc import NUTS, Kernel, Target, WindowAdaptation, from_blackjax
from pmcmc._xla.compile import tuned_jit
from pmcmc.random.streams import step_noise
from pmcmc.warmup import Tuned


@tuned_jit()
def draw(target: Target, kernel: Kernel, key: jax.Array, steps: jax.Array):
    """Draw the noise, leading axes (steps, lanes)."""
    flat = step_noise(kernel, target, key, steps.reshape(-1))
    return jax.tree.map(lambda x: x.reshape(*steps.shape, *x.shape[1:]), flat)


@tuned_jit()
def walk(target: Target, kernel: Kernel, positions: jax.Array, noise):
    """Return the leapfrog steps of every step, (steps, lanes) or (steps,), from positions (lanes, D)."""
    step = lambda state, u: kernel.step(target, state, u)
    alone = len(positions) == 1
    if alone:
        start, noise = kernel.start(target, positions[0]), jax.tree.map(lambda x: x[:, 0], noise)
    else:
        start, step = jax.vmap(lambda y: kernel.start(target, y))(positions), jax.vmap(step)

    def body(state, u):
        state, info = step(state, u)
        return state, info.num_integration_steps

    return jax.lax.scan(body, start, noise)[1]


def tune(posterior: Posterior) -> Tuned:
    """Warm up as `pmcmc.sample` does, from four starts near zero."""
    target = Target.from_logdensity(posterior.model, jnp.zeros(posterior.dim))
    starts = 0.5 * jax.random.normal(jax.random.key(0), (4, posterior.dim))
    return WindowAdaptation().run(target, NUTS(), jax.random.key(1), starts, 1000)


def measure(posterior: Posterior, lanes: list[int], evaluations: int, repeats: int) -> list[dict]:
    """Return one row for each number of lanes; ``evaluations`` is the product of steps and lanes that are timed."""
    tuned = tune(posterior)
    target, ours, step_size = tuned.target, tuned.kernel, float(getattr(tuned.kernel, "step_size"))  # noqa: B009
    kernels = {
        "NUTS": ours,
        "blackjax": from_blackjax(blackjax.nuts, step_size=step_size, inverse_mass_matrix=None),
    }
    rows = []
    for n in lanes:
        steps = jnp.arange(max(50, evaluations // n) * n).reshape(-1, n)
        positions = jnp.resize(jax.vmap(ours.coordinates)(tuned.states), (n, target.dim))
        noise = {name: draw(target, kernel, jax.random.key(2), steps) for name, kernel in kernels.items()}
        runs: dict[str, Callable] = {
            name: partial(walk, target, kernel, positions, noise[name]) for name, kernel in kernels.items()
        }
        leapfrogs = np.asarray(runs["NUTS"]()).reshape(steps.shape)
        timing = alternate(runs, repeats)
        rows.append(
            {
                "posterior": posterior.name,
                "lanes": n,
                "step_size": step_size,
                "mean_leapfrogs": float(leapfrogs.mean()),
                "deepest_over_mean": float(leapfrogs.max(1).mean() / leapfrogs.mean()),
                "us_per_lane_and_step": {name: 1e6 * times["median_s"] / steps.size for name, times in timing.items()},
                "compile_and_first_s": {name: times["first_s"] for name, times in timing.items()},
                "blackjax_over_ours": ratio(timing, "blackjax", "NUTS"),
            }
        )
    return rows


def main(arguments: list[str] | None = None) -> None:
    """Measure every posterior, and print and save the rows."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--posteriors", nargs="*", default=["eight_schools", "german_credit"])
    parser.add_argument("--lanes", nargs="*", type=int, default=[1, 16, 64, 256, 1024])
    parser.add_argument("--evaluations", type=int, default=50_000)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--save", default=None, help="name of the result file, without .json")
    options = parser.parse_args(arguments)
    rows = []
    for name in options.posteriors:
        for row in measure(POSTERIORS[name](), options.lanes, options.evaluations, options.repeats):
            us = row["us_per_lane_and_step"]
            print(
                f"{row['posterior']:16s} {row['lanes']:>5} lanes: {row['mean_leapfrogs']:5.1f} leapfrog steps, deepest "
                f"over mean {row['deepest_over_mean']:.2f}; us per lane and step: ours {us['NUTS']:.2f}, "
                f"BlackJAX {us['blackjax']:.2f}",
                flush=True,
            )
            rows.append(row)
    if options.save:
        print(save(options.save, rows))


if __name__ == "__main__":
    main()
