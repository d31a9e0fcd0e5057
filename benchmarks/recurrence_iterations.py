"""Count iterations of the parallel solvers against T, for recurrences that contract and for recurrences that do not.

Gonzalez et al. (2025): with a largest Lyapunov exponent (LLE) below zero Newton's iterations grow like log T; above
zero they grow in proportion to T. Run

    python -m benchmarks.recurrence_iterations [--lengths 64 256 1024] [--problems RNN] [--save recurrence_iterations]

and read per row: problem, seed, measured LLE per step, solver, T, iterations, result code, residual, certified prefix,
seconds without compilation. All in float64; every solve starts from x[0] repeated. A longer T is left out if it would
take more than --patience seconds: chaotic problems cost T^2 and more.
"""

import argparse
import math
import time
from collections.abc import Callable
from dataclasses import replace
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from benchmarks._harness import save
from benchmarks.targets import CASES
from pmcmc import HMC, MALA, Kernel, Target
from pmcmc import recurrence as rec
from pmcmc.target import Basis


class Case(NamedTuple):
    """A recurrence ``fn(params, x, u)`` of any length.

    Attributes:
        fn: The recurrence.
        params: Numbers that vary between problems of one program.
        x0: Initial state.
        inputs: ``T -> u``, a pytree with leading axis T.
    """

    fn: Callable
    params: Any
    x0: Any
    inputs: Callable


def _linear_step(matrix, x, u):
    """One step of a linear map."""
    return matrix @ x + u


def linear_map(radius: float, key) -> Case:
    """A random matrix scaled to this spectral radius: LLE = log(radius)."""
    matrix = jax.random.normal(key, (4, 4))
    matrix = radius * matrix / jnp.max(jnp.abs(jnp.linalg.eigvals(matrix)))
    return Case(_linear_step, matrix, jnp.zeros(4), lambda n: jax.random.normal(key, (n, 4)))


def _rnn_step(matrix, x, u):
    """One step of a recurrent network."""
    return matrix @ jnp.tanh(x) + u


def mean_field_rnn(gain: float, key, dim: int) -> Case:
    """``x[t] = W tanh(x[t-1]) + u[t]``, W ~ N(0, gain^2 / D): chaotic above a gain near 1 (Sompolinsky et al. 1988)."""
    matrix = gain / math.sqrt(dim) * jax.random.normal(key, (dim, dim))
    return Case(_rnn_step, matrix, jnp.ones(dim), lambda n: 0.1 * jax.random.normal(key, (n, dim)))


def _gru_step(params, h, x):
    """One step of a gated recurrent unit."""
    w, u = params
    into = jnp.einsum("gij,j->gi", u, x)
    reset, update = jax.nn.sigmoid(w[0] @ h + into[0]), jax.nn.sigmoid(w[1] @ h + into[1])
    return update * h + (1 - update) * jnp.tanh(w[2] @ (reset * h) + into[2])


def gru(scale: float, key, hidden: int = 8) -> Case:
    """A gated recurrent unit (Cho et al. 2014) with recurrent weights of this scale."""
    keys = jax.random.split(key, 3)
    w = scale / math.sqrt(hidden) * jax.random.normal(keys[0], (3, hidden, hidden))
    u = jax.random.normal(keys[1], (3, hidden, 2)) / math.sqrt(2)
    return Case(_gru_step, (w, u), jnp.zeros(hidden), lambda n: jax.random.normal(keys[2], (n, 2)))


def _logistic_step(rate, x, u):
    """One step of the logistic map."""
    return rate * x * (1 - x)


def logistic(rate: float) -> Case:
    """``x <- rate x (1 - x)``; LLE ln 2 at rate 4."""
    return Case(_logistic_step, jnp.asarray(rate), jnp.array([0.3]), lambda n: jnp.zeros((n, 1)))


def _henon_step(_, x, u):
    """One step of the Henon map."""
    return jnp.array([1 - 1.4 * x[0] ** 2 + x[1], 0.3 * x[0]])


def henon() -> Case:
    """The Henon map (1.4, 0.3); LLE 0.419."""
    return Case(_henon_step, None, jnp.array([0.1, 0.1]), lambda n: jnp.zeros(n))


def _lorenz_step(dt, x, u):
    """One Runge-Kutta step of length dt of the Lorenz flow."""

    def rate(x):
        return jnp.array([10 * (x[1] - x[0]), x[0] * (28 - x[2]) - x[1], x[0] * x[1] - 8 / 3 * x[2]])

    k1 = rate(x)
    k2 = rate(x + dt / 2 * k1)
    k3 = rate(x + dt / 2 * k2)
    return x + dt / 6 * (k1 + 2 * k2 + 2 * k3 + rate(x + dt * k3))


def lorenz(dt: float = 0.01) -> Case:
    """A Runge-Kutta step of the Lorenz flow (10, 28, 8/3); LLE 0.906 per unit of time."""
    return Case(_lorenz_step, jnp.asarray(dt), jnp.array([1.0, 2.0, 20.0]), lambda n: jnp.zeros(n))


def _markov_step(params, x, u):
    """One step of a Markov chain."""
    target, kernel = params
    return kernel.transition(target)(x, u)[0]


def chain(target: Target, kernel: Kernel, start: jax.Array, key) -> Case:
    """A Markov chain with its noise as inputs. Newton sees the derivative of the branch that was taken."""

    def noise(n):
        return jax.vmap(lambda k: kernel.sample_noise(k, target))(jax.random.split(key, n))

    return Case(_markov_step, (target, kernel), start, noise)


GAINS = (0.5, 0.7, 0.9, 1.0, 1.1, 1.25, 1.5, 2.0)
ALL = ("DEER", "quasi-DEER", "stochastic quasi-DEER", "ELK", "quasi-ELK", "Picard", "Jacobi")
# Kernels of the chains, from too small to too large a step.
KERNELS = {f"MALA {h}": MALA(h) for h in (0.03, 0.1, 0.3, 0.8)}
KERNELS |= {f"HMC {h} x {steps}": HMC(h, steps) for h, steps in ((0.1, 4), (0.4, 4), (0.4, 12), (0.8, 4))}
WITHOUT_ELK = tuple(method for method in ALL if method != "ELK")  # its dense covariances take minutes to compile


class Problem(NamedTuple):
    """Cases by seed, and the methods that are run on them: DEER for all seeds, the others for the first one.

    Attributes:
        make: ``key -> Case``.
        methods: Names of the methods.
        num_seeds: Number of seeds.
    """

    make: Callable  # key -> Case
    methods: tuple[str, ...]
    num_seeds: int


def problems(num_seeds: int) -> dict[str, Problem]:
    """Return all problems by name."""
    found = {f"linear, radius {r}": Problem(lambda key, r=r: linear_map(r, key), ALL, 1) for r in (0.5, 0.9, 1.1)}
    found |= {f"logistic, rate {r}": Problem(lambda key, r=r: logistic(r), ALL, 1) for r in (2.8, 3.5, 4.0)}
    found |= {"Henon": Problem(lambda key: henon(), ALL, 1), "Lorenz": Problem(lambda key: lorenz(), ALL, 1)}
    found |= {f"GRU, scale {s}": Problem(lambda key, s=s: gru(s, key), WITHOUT_ELK, 1) for s in (1.0, 8.0)}
    for dim, methods in ((16, ("DEER",)), (128, WITHOUT_ELK)):
        for gain in GAINS:
            make = lambda key, gain=gain, dim=dim: mean_field_rnn(gain, key, dim)
            found[f"mean-field RNN, D {dim}, gain {gain}"] = Problem(make, methods, num_seeds)
    return found | _chains()


def _chains() -> dict[str, Problem]:
    """Return MALA and HMC on posteriors, in coordinates of scale about one."""
    found = {}
    for name, make in CASES.items():
        posterior = make()
        target = posterior.target
        if name in ("mixture", "banana"):
            target = target.with_basis(Basis(jnp.zeros(2), posterior.scale))
        methods = tuple(m for m in (ALL if target.dim <= 2 else WITHOUT_ELK) if m not in ("Picard",))
        start = target.coordinates(target.position(posterior.start(jax.random.key(0), 1)[0]))
        for label, kernel in KERNELS.items():
            case = lambda key, target=target, kernel=kernel, start=start: chain(target, kernel, start, key)
            found[f"{name}, {label}"] = Problem(case, methods, 1)
    return found


def solvers(key, max_iters: int) -> dict[str, rec.RecurrenceSolver]:
    """Return all methods by the names of their papers."""
    budget: dict[str, Any] = dict(max_iters=max_iters)
    return {
        "DEER": rec.deer(**budget),
        "quasi-DEER": rec.quasi_deer(**budget),
        "stochastic quasi-DEER": rec.Newton(rec.HutchinsonDiagonal(key), **budget),
        "ELK": rec.elk(**budget),
        "quasi-ELK": rec.quasi_elk(**budget),
        "Picard": rec.picard(**budget),
        "Jacobi": rec.jacobi(**budget),
    }


@jax.jit
def _total_growth(step, params, x0, inputs):
    """Return the log growth of a tangent vector at each step."""

    def body(carry, u):
        x, v = carry
        x, v = jax.jvp(lambda x: step(params, x, u), (x,), (v,))
        norm = jnp.sqrt(jnp.sum(v * v))
        return (x, v / norm), jnp.log(norm)

    return jax.lax.scan(body, (x0, jnp.ones_like(x0)), inputs)[1]


def lyapunov_exponent(case: Case, length: int = 4096) -> float:
    """Return the mean log growth of a tangent vector along a path, after a transient of a quarter."""
    growth = _total_growth(jax.tree_util.Partial(case.fn), case.params, case.x0, case.inputs(length))
    return float(jnp.mean(growth[length // 4 :]))


@jax.jit
def _solve(solver, step, params, x0, inputs):
    """Solve a problem; numbers such as max_iters are arrays, so that other values do not compile again."""
    return solver.solve(lambda x, u: step(params, x, u), x0, inputs)


def measure(case: Case, solver: rec.RecurrenceSolver, length: int) -> dict:
    """Return one row: what the solver did on T = length steps."""
    arguments = jax.tree_util.Partial(case.fn), case.params, case.x0, case.inputs(length)
    unsolved: Any = replace(solver, max_iters=0)  # type: ignore[type-var]
    jax.block_until_ready(_solve(unsolved, *arguments))  # compiles the same program, since max_iters is an array
    begin = time.perf_counter()
    found = jax.block_until_ready(_solve(solver, *arguments))
    seconds = time.perf_counter() - begin
    exact = _solve(rec.Sequential(), *arguments).value
    return {
        "length": length,
        "num_iters": int(found.stats.num_iters),
        "result": rec.RESULTS(int(found.result)).name,
        "residual": _number(float(found.residual)),
        "certified_steps": int(found.stats.certified_steps),
        "max_error": _number(float(jnp.max(jnp.abs(found.value - exact)))),
        "seconds": seconds,
    }


def expected_seconds(rows: list[dict], length: int) -> float:
    """Predict the seconds of a longer T: they grow like T, or like T^2 where the iterations grew in proportion to T."""
    growth = length / rows[-1]["length"]
    chaotic = rows[-1]["num_iters"] > 0.4 * rows[-1]["length"]
    return rows[-1]["seconds"] * growth * (growth if chaotic else 1.0)


def _number(x: float) -> float | None:
    """Return a number for JSON, which has no infinity, or None."""
    return x if math.isfinite(x) else None


def main(arguments: list[str] | None = None) -> None:
    """Measure every problem, solver and length, and print and save the rows."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--lengths", type=int, nargs="+", default=[64, 128, 256, 512, 1024])
    parser.add_argument("--problems", nargs="+", help="only those whose name contains one of these")
    parser.add_argument("--solvers", nargs="+", help="only these")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--patience", type=float, default=8.0)
    parser.add_argument("--save", default=None, help="name of the result file, without .json")
    options = parser.parse_args(arguments)
    jax.config.update("jax_enable_x64", True)
    rows: list[dict] = []
    programs: Any = None
    for name, problem in problems(options.seeds).items():
        if options.problems and not any(part in name for part in options.problems):
            continue
        for seed in range(problem.num_seeds):
            problem_key, probe_key = jax.random.split(jax.random.key(seed))
            case = problem.make(problem_key)
            if programs != (programs := (case.fn, case.x0.shape)):
                jax.clear_caches()  # several hundred programs exceed the memory maps that Linux allows one process
            exponent = lyapunov_exponent(case)
            for method, solver in solvers(probe_key, 2 * max(options.lengths)).items():
                if method not in problem.methods or (options.solvers and method not in options.solvers):
                    continue
                if seed > 0 and method != "DEER":
                    continue
                new: list[dict] = []
                for length in options.lengths:
                    if new and expected_seconds(new, length) > options.patience:
                        break
                    row = {"problem": name, "seed": seed, "lyapunov_exponent": exponent, "solver": method}
                    new.append(row | measure(case, solver, length))
                rows += new
                counts = ", ".join(f"T={r['length']}: {r['num_iters']}" for r in new)
                print(f"{name:34s} LLE {exponent:+.3f}  {method:22s} {counts}  ({new[-1]['result']})", flush=True)
                if options.save:
                    save(options.save, rows)


if __name__ == "__main__":
    main()
