"""Checks that need several devices, each to be run in a process of its own: ``python -m tests._devices NAME``.

The caller sets ``XLA_FLAGS=--xla_force_host_platform_device_count=8`` before. See test_devices.py.
"""

import sys
from collections import Counter
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

from pmcmc import HMC, NUTS, sample
from pmcmc.recurrence import RESULTS, MultipleShooting
from pmcmc.sampling import _auto, _pilot
from pmcmc.stability import Costs
from tests.recurrence.test_staged import APART, IN_STEP, X0, problem

COLLECTIVES = {"ppermute", "pmax", "pmin", "psum", "psum_invariant", "all_gather", "all_to_all", "reduce_scatter"}


def solver_for(num_devices: int, **options) -> MultipleShooting:
    """0: not shared at all."""
    return MultipleShooting(num_blocks=16, devices=jax.devices()[:num_devices] or None, **options)


def solve(solver: MultipleShooting, fn, inputs, guess):
    starts = jnp.broadcast_to(X0, (guess.shape[0], 2))
    return solver.solve_batch(fn, starts, inputs, initial_guess=guess)


def check_same(theirs, ours) -> None:
    """Bit for bit."""
    jax.tree.map(lambda a, b: np.testing.assert_array_equal(np.asarray(a), np.asarray(b)), theirs, ours)


def solutions() -> None:
    """One, two or eight devices: whole and cut short, blocks empty or of one step, with and without stages."""
    for fn, length, options, shares in [
        (APART, 401, {}, (1, 2, 8)),
        (IN_STEP, 21, {}, (8,)),
        (IN_STEP, 401, {"max_steps": 60}, (2,)),
    ]:
        inputs, guess = problem(0, 3, length)
        run = jax.jit(lambda solver, inputs, guess, fn=fn: solve(solver, fn, inputs, guess))
        alone = run(solver_for(0, merge_tol=1e-6, **options), inputs, guess)
        assert np.any(alone.result == RESULTS.max_iters_reached) == bool(options), alone.result
        assert np.all(np.asarray(alone.stats.num_sweeps) > 0)
        for num_devices in shares:
            check_same(alone, run(solver_for(num_devices, merge_tol=1e-6, **options), inputs, guess))


def repair_collectives(jaxpr) -> list[Counter]:
    """Of each loop whose body holds any."""
    found = []
    for eqn in jaxpr.eqns:
        inner = [
            p.jaxpr if hasattr(p, "jaxpr") else p for p in jax.tree.leaves(list(eqn.params.values()), is_leaf=_is_jaxpr)
        ]
        inner = [p for p in inner if hasattr(p, "eqns")]
        if eqn.primitive.name == "while":
            counts = sum((primitives(one) for one in inner), Counter())
            found += [counts] if counts else []
        else:
            found += [counts for one in inner for counts in repair_collectives(one)]
    return found


def _is_jaxpr(p) -> bool:
    return hasattr(p, "eqns") or hasattr(p, "jaxpr")


def primitives(jaxpr) -> Counter:
    """Collectives, however deep."""
    counts: Counter = Counter()
    for eqn in jaxpr.eqns:
        if eqn.primitive.name in COLLECTIVES:
            counts[eqn.primitive.name] += 1
        for p in jax.tree.leaves(list(eqn.params.values()), is_leaf=_is_jaxpr):
            p = p.jaxpr if hasattr(p, "jaxpr") else p
            counts += primitives(p) if hasattr(p, "eqns") else Counter()
    return counts


def collectives() -> None:
    """One exchange and one reduction a sweep; as many in the program, however long the blocks are."""
    in_program = []
    for length in (320, 3200):
        inputs, guess = problem(0, 3, length)
        run = jax.jit(lambda inputs, guess: solve(solver_for(8), APART, inputs, guess))
        traced = run.trace(inputs, guess)
        assert repair_collectives(traced.jaxpr.jaxpr) == [Counter(ppermute=1, pmax=1)]
        text = traced.lower().compile().as_text()
        kinds = ("collective-permute", "all-reduce", "all-gather", "all-to-all", "reduce-scatter")
        in_program.append({kind: text.count(f" {kind}(") + text.count(f" {kind}-start(") for kind in kinds})
    assert in_program[0] == in_program[1], in_program
    assert in_program[0]["collective-permute"] == 2, in_program


def logdensity(x):
    return -0.5 * jnp.sum(x**2) - 0.1 * jnp.sum(x**4)


def chains() -> None:
    """`sample`, thinned and extended, on two devices and on three, which do not divide the blocks: the same draws."""
    for kernel, shares in ((HMC(step_size=0.7, num_integration_steps=2), (0, 2, 3)), (NUTS(step_size=0.7), (0, 3))):
        options = dict(kernel=kernel, num_warmup=0, num_chains=2, thinning=2, progress_bar=False)
        draws: list[np.ndarray] = []
        for num_devices in shares:
            chain = sample(
                logdensity,
                jnp.ones(2),
                0,
                num_samples=600,
                solver=MultipleShooting(num_blocks=8),
                devices=jax.devices()[:num_devices] or None,
                **options,
            )
            assert np.all(chain.report.result == RESULTS.successful)
            assert chain.report.num_blocks == (9 if num_devices == 3 else 8)
            chain = chain.extend(601, progress_bar=False)
            draws.append(np.asarray(chain.get_samples(group_by_chain=True)))
        for found in draws[1:]:
            np.testing.assert_allclose(found, draws[0], rtol=0, atol=1e-10)


def planned() -> None:
    """ "auto" takes all devices where they gain, and keeps to one that was set as default: the same draws."""
    _auto.SHORT_SECONDS, _pilot.TIMING_SECONDS, _pilot.SHARE = 0.0, 1e-9, 0.2
    _auto.num_cores = jax.device_count
    _auto.Automatic.costs = lambda self, head: Costs(1e6, 1e4, 1e4, 0.0)
    options = dict(kernel=HMC(step_size=0.5, num_integration_steps=3), num_warmup=100, num_chains=2, progress_bar=False)
    run = lambda: sample(logdensity, jnp.ones(2), 0, num_samples=20_000, **options)
    shared = run()
    with jax.default_device(jax.devices()[0]):
        alone = run()
    assert shared.report.plan.solver.devices == tuple(jax.devices())
    assert alone.report.plan.solver.devices is None
    assert shared.report.decision == alone.report.decision == "shooting"
    assert shared.report.fallback == alone.report.fallback == ""
    assert " on 8 devices" in shared.report.reason
    np.testing.assert_allclose(shared.unknowns, alone.unknowns, rtol=0, atol=1e-9)


CHECKS: dict[str, Callable[[], None]] = {check.__name__: check for check in (solutions, collectives, chains, planned)}

if __name__ == "__main__":
    CHECKS[sys.argv[1]]()
