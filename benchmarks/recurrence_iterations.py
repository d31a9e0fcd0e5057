"""Iterations of the parallel solvers against T, for recurrences that contract and for recurrences that do not.

Gonzalez et al. (2025): with a largest Lyapunov exponent (LLE) below zero Newton's iterations grow like log T; above
zero they grow in proportion to T. Run

    python benchmarks/recurrence_iterations.py --out iterations.json [--lengths 64 256 1024] [--seed 0]

and read per row: problem, its measured LLE per step, solver, T, iterations, result code, residual, certified prefix.
"""

import argparse
import json
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from pmcmc import recurrence as rec


class Case(NamedTuple):
    """A recurrence of any length: ``inputs(T)`` is a pytree with leading axis T."""

    fn: Callable
    x0: Any
    inputs: Callable


def linear_map(radius: float, key) -> Case:
    """A random matrix scaled to this spectral radius: LLE = log(radius)."""
    matrix = jax.random.normal(key, (4, 4))
    matrix = radius * matrix / jnp.max(jnp.abs(jnp.linalg.eigvals(matrix)))
    return Case(lambda x, u: matrix @ x + u, jnp.zeros(4), lambda n: jax.random.normal(key, (n, 4)))


def mean_field_rnn(gain: float, key, dim: int = 32) -> Case:
    """``x[t] = W tanh(x[t-1]) + u[t]``, W ~ N(0, gain^2 / D): chaotic above a gain near 1 (Sompolinsky et al. 1988)."""
    matrix = gain / math.sqrt(dim) * jax.random.normal(key, (dim, dim))
    step = lambda x, u: matrix @ jnp.tanh(x) + u
    return Case(step, jnp.ones(dim), lambda n: 0.1 * jax.random.normal(key, (n, dim)))


def gru(scale: float, key, hidden: int = 8) -> Case:
    """A gated recurrent unit (Cho et al. 2014) with recurrent weights of this scale."""
    keys = jax.random.split(key, 3)
    w = scale / math.sqrt(hidden) * jax.random.normal(keys[0], (3, hidden, hidden))
    u = jax.random.normal(keys[1], (3, hidden, 2)) / math.sqrt(2)

    def step(h, x):
        into = jnp.einsum("gij,j->gi", u, x)
        reset, update = jax.nn.sigmoid(w[0] @ h + into[0]), jax.nn.sigmoid(w[1] @ h + into[1])
        return update * h + (1 - update) * jnp.tanh(w[2] @ (reset * h) + into[2])

    return Case(step, jnp.zeros(hidden), lambda n: jax.random.normal(keys[2], (n, 2)))


def logistic(rate: float) -> Case:
    """``x <- rate x (1 - x)``; LLE ln 2 at rate 4."""
    return Case(lambda x, u: rate * x * (1 - x), 0.3, lambda n: jnp.zeros(n))


def henon() -> Case:
    """The Henon map (1.4, 0.3); LLE 0.419."""
    step = lambda x, u: jnp.array([1 - 1.4 * x[0] ** 2 + x[1], 0.3 * x[0]])
    return Case(step, jnp.array([0.1, 0.1]), lambda n: jnp.zeros(n))


def lorenz(dt: float = 0.01) -> Case:
    """A Runge-Kutta step of the Lorenz flow (10, 28, 8/3); LLE 0.906 per unit of time."""

    def rate(x):
        return jnp.array([10 * (x[1] - x[0]), x[0] * (28 - x[2]) - x[1], x[0] * x[1] - 8 / 3 * x[2]])

    def step(x, u):
        k1 = rate(x)
        k2 = rate(x + dt / 2 * k1)
        k3 = rate(x + dt / 2 * k2)
        return x + dt / 6 * (k1 + 2 * k2 + 2 * k3 + rate(x + dt * k3))

    return Case(step, jnp.array([1.0, 2.0, 20.0]), lambda n: jnp.zeros(n))


def cases(key) -> dict[str, Case]:
    """All problems by name."""
    found = {f"linear, radius {r}": linear_map(r, key) for r in (0.5, 0.9, 1.1)}
    found |= {f"mean-field RNN, gain {g}": mean_field_rnn(g, key) for g in (0.5, 0.9, 1.5, 2.5)}
    found |= {f"GRU, scale {s}": gru(s, key) for s in (1.0, 8.0)}
    found |= {f"logistic, rate {r}": logistic(r) for r in (2.8, 3.5, 4.0)}
    return found | {"Henon": henon(), "Lorenz": lorenz()}


def solvers(key, max_iters: int) -> dict[str, rec.RecurrenceSolver]:
    """All methods by paper name."""
    budget = dict(max_iters=max_iters)
    return {
        "DEER": rec.deer(**budget),
        "quasi-DEER": rec.quasi_deer(**budget),
        "stochastic quasi-DEER": rec.Newton(rec.HutchinsonDiagonal(key), **budget),
        "ELK": rec.elk(**budget),
        "quasi-ELK": rec.quasi_elk(**budget),
        "Picard": rec.picard(**budget),
        "Jacobi": rec.jacobi(**budget),
    }


def lyapunov_exponent(case: Case, length: int = 4096) -> float:
    """Mean log growth of a tangent vector along a path, after a transient of a quarter."""

    def body(carry, u):
        x, v = carry
        x, v = jax.jvp(lambda x: case.fn(x, u), (x,), (v,))
        norm = jnp.sqrt(jnp.sum(v * v))
        return (x, v / norm), jnp.log(norm)

    x0 = jnp.asarray(case.x0)
    growth = jax.jit(lambda: jax.lax.scan(body, (x0, jnp.ones_like(x0)), case.inputs(length))[1])()
    return float(jnp.mean(growth[length // 4 :]))


def measure(case: Case, solver: rec.RecurrenceSolver, length: int) -> dict:
    """One row: what the solver did on T = length steps."""
    run = jax.jit(lambda solver, x0, inputs: solver.solve(case.fn, x0, inputs))
    found = run(solver, case.x0, case.inputs(length))
    exact = rec.Sequential().solve(case.fn, case.x0, case.inputs(length)).value
    error = float(jnp.max(jnp.abs(found.value - exact)))
    return {
        "length": length,
        "num_iters": int(found.stats.num_iters),
        "result": rec.RESULTS(int(found.result)).name,
        "residual": _number(float(found.residual)),
        "certified_steps": int(found.stats.certified_steps),
        "max_error": _number(error),
    }


def _number(x: float) -> float | None:
    """JSON has no infinity."""
    return x if math.isfinite(x) else None


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--lengths", type=int, nargs="+", default=[64, 256, 1024])
    parser.add_argument("--problems", nargs="+", help="only those whose name contains one of these")
    parser.add_argument("--solvers", nargs="+", help="only these")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", default="recurrence_iterations.json")
    options = parser.parse_args()
    jax.config.update("jax_enable_x64", True)
    problem_key, probe_key = jax.random.split(jax.random.key(options.seed))
    rows = []
    for name, case in cases(problem_key).items():
        if options.problems and not any(part in name for part in options.problems):
            continue
        exponent = lyapunov_exponent(case)
        for method, solver in solvers(probe_key, 2 * max(options.lengths)).items():
            if options.solvers and method not in options.solvers:
                continue
            for length in options.lengths:
                row = {"problem": name, "lyapunov_exponent": exponent, "solver": method}
                rows.append(row | measure(case, solver, length))
            counts = ", ".join(f"T={r['length']}: {r['num_iters']}" for r in rows[-len(options.lengths) :])
            print(f"{name:28s} LLE {exponent:+.3f}  {method:22s} {counts}  ({rows[-1]['result']})", flush=True)
    with open(options.out, "w") as file:
        json.dump({"jax": jax.__version__, "seed": options.seed, "rows": rows}, file, indent=1)


if __name__ == "__main__":
    main()
