"""Solve random recurrences, and check that what each solve certifies is the sequential path.

`python -m tests.helpers.prefixes --solves 10000` counts false certificates by solver.
"""

import argparse
import time
from dataclasses import replace
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from pmcmc import recurrence as rec
from pmcmc._pytree import Array, PyTree, tree_index
from pmcmc.recurrence import RESULTS, Solution
from tests.helpers.compilation import compile_quickly

LENGTH = 200
DIM = 2
# A bound above this share of its scale no longer describes small errors: then a path is the sequential one only if
# every state is f of its predecessor up to rounding.
SMALL = {"float64": 1e-6, "float32": 2e-3}
# Factor on the bound: shooting accepts twice the range of a lane, and the bound is a first-order one.
SLACK = 10.0


class Input(NamedTuple):
    """What a step reads: which map it is, that map's parameter in [0, 1], and noise."""

    map: Array
    parameter: Array
    noise: Array  # (DIM,)
    level: Array  # a standard exponential


# --- maps: (x, parameter, noise, level) -> x, two coordinates


def logistic(x, p, n, e):
    return (3.9 + 0.1 * p) * x * (1 - x)


def calm_logistic(x, p, n, e):
    return (2.4 + 0.5 * p) * x * (1 - x)


def linear(x, p, n, e):
    return jnp.stack([0.7 * x[0] + 0.2 * x[1], 0.9 * p * x[1] - 0.1 * x[0]]) + n


def strong(x, p, n, e):
    return 0.3 * p * x + n


def slow(x, p, n, e):
    return (0.95 + 0.05 * p) * x + 0.1 * n


def square(x, p, n, e):
    return (0.1 + 0.2 * p) * x * x + 0.1 * n


def henon(x, p, n, e):
    return jnp.stack([1 - (1.3 + 0.1 * p) * x[0] ** 2 + x[1], 0.3 * x[0]])


def gated(x, p, n, e):
    turned = jnp.stack([x[0] + x[1], x[1] - x[0]])
    gate = jax.nn.sigmoid(1.5 * turned + n)
    return (1 - gate) * x + gate * jnp.tanh((0.5 + 2 * p) * turned - n)


def wells(x, p, n, e):
    return jnp.tanh((1 + 2 * p) * x + 0.3 * n)


def _accept(x, new, e, target):
    return jnp.where(target(new) - target(x) > -e, new, x)


def gaussian(x):
    return -0.5 * (x[0] ** 2 + x[1] ** 2)


def metropolis(x, p, n, e):
    return _accept(x, x + (0.2 + p) * n, e, gaussian)


def independent(x, p, n, e):
    return _accept(x, (1 + p) * n, e, gaussian)


def langevin(x, p, n, e):
    """Contracts by 1 - h except where a decision flips, like a chain under MALA."""
    h = 0.1 + 0.5 * p
    return _accept(x, (1 - h) * x + jnp.sqrt(2 * h) * n, e, lambda x: 0.1 * gaussian(x))


def shifted(x, p, n, e):
    return 1e5 + 0.9 * p * (x - 1e5) + n


MAPS = [logistic, calm_logistic, linear, strong, slow, square, henon, gated, wells]
MAPS += [metropolis, independent, langevin, shifted]
FAR = {"linear", "strong", "slow", "langevin"}  # these may start far away


def step(x: Array, u: Input) -> Array:
    branches = [lambda x, u, fn=fn: fn(x, u.parameter, u.noise, u.level) for fn in MAPS]
    return jax.lax.switch(u.map, branches, x, u)


def margin(x: Array, u: Input) -> Array:
    """Return how far the accept decision of a step is from a tie; inf for maps without one."""
    h, p = 0.1 + 0.5 * u.parameter, u.parameter
    gap = lambda new, factor: jnp.abs(factor * (gaussian(new) - gaussian(x)) + u.level)
    return jnp.select(
        [u.map == MAPS.index(metropolis), u.map == MAPS.index(independent), u.map == MAPS.index(langevin)],
        [
            gap(x + (0.2 + p) * u.noise, 1.0),
            gap((1 + p) * u.noise, 1.0),
            gap((1 - h) * x + jnp.sqrt(2 * h) * u.noise, 0.1),
        ],
        jnp.inf,
    )


# --- solvers, each with a budget that is an array


def with_budget(solver: rec.RecurrenceSolver, budget: Array) -> rec.RecurrenceSolver:
    if isinstance(solver, rec.Windowed):
        return replace(solver, solver=replace(solver.solver, max_iters=budget))
    if isinstance(solver, rec.MultipleShooting):
        return replace(solver, max_sweeps=budget)
    return replace(solver, max_iters=budget)


SOLVERS = {
    "deer": rec.deer(),
    "quasi_deer": rec.quasi_deer(),
    "stochastic": rec.Newton(rec.HutchinsonDiagonal(jax.random.key(3))),
    "picard": rec.picard(),
    "jacobi": rec.jacobi(),
    "damped": rec.deer(damping=0.7),
    "clipped": rec.quasi_deer(clip=0.9),
    "elk": rec.elk(),
    "elk-fixed": rec.elk(regularization=rec.FixedRegularization(0.1)),
    "quasi_elk": rec.quasi_elk(step_rule=rec.trust_region.Smoother()),
    "window-deer": rec.Windowed(rec.deer(), 24),
    "window-picard": rec.Windowed(rec.picard(), 7),
    "window-quasi_elk": rec.Windowed(rec.quasi_elk(), 24),
    "shooting": rec.MultipleShooting(num_blocks=8),
    "shooting-many": rec.MultipleShooting(num_blocks=25),
}
BUDGETS = np.array([0, 1, 2, 3, 4, 5, 6, 8, 10, 12, 20, 40, 200])
GUESSES = ["random", "wild", "very wild", "growing", "NaN rows", "constant", "other path", "near", "near a part"]


class Case(NamedTuple):
    """A random solve; in a batch every leaf has a leading axis."""

    x0: Array
    inputs: Input
    guess: Array
    kind: Array  # kind of the guess
    scale: Array


def path_of(x0: Array, inputs: Input) -> Array:
    return jax.lax.scan(lambda x, u: (step(x, u),) * 2, x0, inputs)[1]


def draw_case(key: Array, dtype: str) -> Case:
    """Draw one random recurrence, start and guess."""
    keys = jax.random.split(key, 12)
    normal = lambda k, *shape: jax.random.normal(keys[k], shape, dtype)
    which = jax.random.randint(keys[0], (), 0, len(MAPS))
    inside = jax.random.uniform(keys[1], (2, DIM), dtype, 0.05, 0.95)
    far = jax.random.bernoulli(keys[2], 0.2) & jnp.isin(
        which, jnp.array([i for i, f in enumerate(MAPS) if f.__name__ in FAR])
    )
    centre = jnp.where(which == MAPS.index(shifted), 1e5, 0.0).astype(dtype)
    size = jnp.where(far, 10.0 ** jax.random.uniform(keys[3], (), dtype, 1, 6), 1.0).astype(dtype)
    x0, other = centre + inside * size
    inputs = Input(
        jnp.full(LENGTH, which),
        jnp.full(LENGTH, jax.random.uniform(keys[4], (), dtype)),
        normal(5, LENGTH, DIM),
        jax.random.exponential(keys[6], (LENGTH,), dtype),
    )
    exact, noise = path_of(x0, inputs), normal(7, LENGTH, DIM)
    steps = jnp.arange(LENGTH)[:, None]
    error = 10.0 ** jax.random.uniform(keys[8], (), dtype, -14 if dtype == "float64" else -7, -1)
    near = exact + error * noise
    hole = jax.random.bernoulli(keys[9], 0.2, (LENGTH, 1))
    first = jax.random.randint(keys[10], (), 0, LENGTH)
    guesses = jnp.stack(
        [
            centre + noise,
            1e3 * noise,
            1e30 * noise,
            noise * 10.0 ** (30 * steps / LENGTH).astype(dtype),
            jnp.where(hole, jnp.nan, centre + noise),
            jnp.broadcast_to(x0, exact.shape),
            path_of(other, inputs),
            near,
            jnp.where(steps < first, near, 1e3 * noise),
        ]
    )
    kind = jax.random.randint(keys[11], (), 0, len(GUESSES))
    scale = jnp.where(far, 1.0, jnp.maximum(jnp.nanstd(exact), 1e-3))
    scale = jnp.where(jnp.isfinite(scale), scale, 1.0).astype(dtype)
    return Case(x0, inputs, guesses[kind], kind, jnp.full(DIM, scale))


class Judgement(NamedTuple):
    """What is checked of one solve."""

    false: Array
    near_tie: Array  # a decision within the prefix is closer to a tie than the tolerance, so no solve can be sure of it
    certified: Array
    result: Array
    error: Array  # largest ratio of error and bound over the prefix


def judge(case: Case, solution: Solution, scale_given: bool) -> Judgement:
    """Compare with the sequential path: error against tolerance times the amplification measured along that path."""
    dtype = str(case.x0.dtype)
    eps = float(jnp.finfo(dtype).eps)
    tol = (512 if dtype == "float64" else 32) * eps
    exact, path = path_of(case.x0, case.inputs), solution.value
    before = jnp.concatenate([case.x0[None], exact[:-1]])
    along = jnp.concatenate([case.x0[None], exact])
    reach = (jax.lax.cummax(along) - jax.lax.cummin(along))[1:]
    low, high = jnp.quantile(exact, 0.25, axis=0), jnp.quantile(exact, 0.75, axis=0)
    spread = jnp.where(jnp.isfinite(high - low), high - low, 0.0)
    scale = jnp.broadcast_to(case.scale, exact.shape) if scale_given else jnp.maximum(reach, spread[None])
    gap = jnp.abs(path - jax.vmap(step)(jnp.concatenate([case.x0[None], path[:-1]]), case.inputs))
    sizes = jnp.stack([tol * scale + 8 * eps * jnp.abs(exact), gap])
    sizes = jnp.where(jnp.isfinite(sizes), sizes, 0.0)  # what comes after must not be certified

    def body(products, now):
        t, x, u = now
        jacobian = jax.jacfwd(step)(x, u)
        products = jnp.einsum("ij,sjk->sik", jacobian, products)
        products = products.at[t].set(jnp.eye(DIM, dtype=dtype))
        return products, jnp.einsum("sij,nsj->ni", jnp.abs(products), sizes)

    start = jnp.zeros((LENGTH, DIM, DIM), dtype)
    _, bounds = jax.lax.scan(body, start, (jnp.arange(LENGTH), before, case.inputs))
    bound, grown = bounds[:, 0], bounds[:, 1]
    rounds = jnp.cumsum(~jnp.all(gap <= 4 * eps * jnp.maximum(jnp.abs(path), scale), axis=1)) == 0
    gone = jnp.abs(path - exact)
    ratio = jnp.max(jnp.where(gone == 0, 0.0, gone / (SLACK * bound)), axis=1)
    # small: errors there behave as the linearised recurrence says
    small = jnp.all(grown <= SLACK * SMALL[dtype] * jnp.maximum(scale, jnp.abs(exact)), axis=1)
    right = ((ratio <= 1) & small) | rounds
    right = right & jnp.all(jnp.isfinite(path), axis=1)
    certified = jnp.where(solution.result == RESULTS.successful, LENGTH, solution.stats.certified_steps)
    inside = jnp.arange(LENGTH) < certified
    profile_holds = jnp.zeros_like(inside)
    if solution.residual_profile is not None:
        profile_holds = (jnp.cumsum(~(solution.residual_profile <= tol)) == 0) & small
    false = jnp.any(inside & ~right) | jnp.any(profile_holds & ~right)
    ties = jax.vmap(margin)(before, case.inputs) < 1e4 * tol
    error = jnp.max(jnp.where(inside & ~rounds, ratio, 0.0))
    return Judgement(false, jnp.any(ties & inside), certified, solution.result, error)


@partial(jax.jit, static_argnames="dtype")
def draw_cases(keys: Array, dtype: str) -> Case:
    return jax.vmap(lambda key: draw_case(key, dtype))(keys)


@partial(jax.jit, static_argnames="scale_given")
def solve_cases(solver: rec.RecurrenceSolver, cases: Case, budgets: Array, scale_given: bool) -> Solution:
    def one(case, budget):
        options = dict(scale=case.scale) if scale_given else {}
        return with_budget(solver, budget).solve(step, case.x0, case.inputs, initial_guess=case.guess, **options)

    return jax.vmap(one)(cases, budgets)


@partial(jax.jit, static_argnames="scale_given")
def judge_cases(cases: Case, solutions: Solution, scale_given: bool) -> Judgement:
    return jax.vmap(lambda case, solution: judge(case, solution, scale_given))(cases, solutions)


def run(name: str, num_solves: int, dtype: str, scale_given: bool, seed: int) -> PyTree:
    """Return cases, budgets and judgements of random solves by one solver."""
    budgets = np.random.default_rng(seed).choice(BUDGETS, num_solves)
    if "shooting" in name:
        budgets = np.maximum(budgets, 1)
    if "elk" in name:
        budgets = np.minimum(budgets, 40)  # its iterations cost the most
    key = jax.random.fold_in(jax.random.key(seed), list(SOLVERS).index(name))
    cases = draw_cases(jax.random.split(key, num_solves), dtype)
    solutions = solve_cases(SOLVERS[name], cases, jnp.asarray(budgets), scale_given)
    return jax.tree.map(np.asarray, (cases, budgets, judge_cases(cases, solutions, scale_given)))


def describe(case: Case, budget: int, found: Judgement) -> str:
    name, guess = MAPS[case.inputs.map[0]].__name__, GUESSES[case.kind]
    return (
        f"    {name:14s} guess {guess:12s} budget {budget:3d} {RESULTS(int(found.result)).name:18s} "
        f"certified {found.certified:3d} error/bound {found.error:.1e}"
    )


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--solves", type=int, default=10_000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--solver", nargs="*", default=list(SOLVERS))
    parser.add_argument("--verbose", action="store_true")
    options = parser.parse_args()
    jax.config.update("jax_enable_x64", True)
    compile_quickly(True)
    legs = [(dtype, given) for dtype in ("float64", "float32") for given in (False, True)]
    each = -(-options.solves // (len(options.solver) * len(legs)))
    total, false, ties, certified = 0, 0, 0, 0
    for name in options.solver:
        for dtype, given in legs:
            began = time.perf_counter()
            case, budgets, found = run(name, each, dtype, given, options.seed)
            wrong = found.false & ~found.near_tie
            total, false, ties = total + each, false + wrong.sum(), ties + (found.false & found.near_tie).sum()
            certified += found.certified.sum()
            solved = (found.result == RESULTS.successful).sum()
            print(
                f"{name:17s} {dtype} scale {'given   ' if given else 'measured'}: {wrong.sum():3d} false of {each}, "
                f"{solved:4d} solved, {found.certified.mean():5.1f} of {LENGTH} steps certified, "
                f"{time.perf_counter() - began:.0f} s",
                flush=True,
            )
            for i in np.flatnonzero(wrong) if options.verbose else []:
                print(describe(*tree_index((case, budgets, found), i)))
    print(f"{false} false certificates in {total:,} solves ({ties} more by near ties); {certified:,} states certified")


if __name__ == "__main__":
    main()
