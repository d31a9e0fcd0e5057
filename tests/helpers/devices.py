"""Checks that need several devices, each run in a separate process: ``python -m tests.helpers.devices NAME``.

The caller sets ``XLA_FLAGS=--xla_force_host_platform_device_count=8`` before. See test_devices.py.
"""

import re
import sys
from collections import Counter
from collections.abc import Callable
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np

from pmcmc import HMC, NUTS, sample
from pmcmc import recurrence as rec
from pmcmc.planning import Costs
from pmcmc.recurrence import RESULTS, MultipleShooting, Sequential
from pmcmc.recurrence.scan import running
from pmcmc.recurrence.sharding import AllSteps, over_steps
from pmcmc.sampling import automatic, pilot
from tests.helpers.compilation import compile_quickly
from tests.helpers.networks import gradient, make_network
from tests.helpers.recurrence_problems import Variant, coupled, solve_variant
from tests.helpers.staged import APART, IN_STEP, X0, problem

COLLECTIVES = {"ppermute", "pmax", "pmin", "psum", "psum_invariant", "all_gather", "all_to_all", "reduce_scatter"}


def solver_for(num_devices: int, **options) -> MultipleShooting:
    """Make a solver for this many devices; 0 does not distribute at all."""
    return MultipleShooting(num_blocks=16, devices=jax.devices()[:num_devices] or None, **options)


def solve(solver: MultipleShooting, fn, inputs, guess):
    starts = jnp.broadcast_to(X0, (guess.shape[0], 2))
    return solver.solve_batch(fn, starts, inputs, initial_guess=guess)


def check_same(theirs, ours) -> None:
    """Compare integers exactly, and others up to rounding, which on some processors depends on the number of lanes."""
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-11, atol=1e-11), theirs, ours)


def solutions() -> None:
    """One, two or eight devices: solved fully and cut short, blocks empty or of one step, with and without stages."""
    for fn, length, options, shares in [
        (APART, 401, {}, (1, 2, 8)),
        (IN_STEP, 21, {}, (8,)),
        (IN_STEP, 401, {"max_steps": 60}, (2,)),
    ]:
        inputs, guess = problem(0, 3, length)
        run = jax.jit(lambda solver, inputs, guess, fn=fn: solve(solver, fn, inputs, guess))
        alone = run(solver_for(0, tol=1e-6, **options), inputs, guess)
        assert np.any(alone.result == RESULTS.max_iters_reached) == bool(options), alone.result
        assert np.all(np.asarray(alone.stats.num_sweeps) > 0)
        for num_devices in shares:
            check_same(alone, run(solver_for(num_devices, tol=1e-6, **options), inputs, guess))


def loop_collectives(jaxpr) -> list[Counter]:
    """Return the collectives of each loop whose body has any."""
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
            found += [counts for one in inner for counts in loop_collectives(one)]
    return found


def _is_jaxpr(p) -> bool:
    return hasattr(p, "eqns") or hasattr(p, "jaxpr")


def primitives(jaxpr) -> Counter:
    """Return the names of collectives, however deep."""
    counts: Counter = Counter()
    for eqn in jaxpr.eqns:
        if eqn.primitive.name in COLLECTIVES:
            counts[eqn.primitive.name] += 1
        for p in jax.tree.leaves(list(eqn.params.values()), is_leaf=_is_jaxpr):
            p = p.jaxpr if hasattr(p, "jaxpr") else p
            counts += primitives(p) if hasattr(p, "eqns") else Counter()
    return counts


def compiled_collectives(traced) -> dict[str, int]:
    """Return the collectives of the whole compiled program."""
    text = traced.lower().compile().as_text()
    kinds = ("collective-permute", "all-reduce", "all-gather", "all-to-all", "reduce-scatter")
    return {kind: text.count(f" {kind}(") + text.count(f" {kind}-start(") for kind in kinds}


def collectives() -> None:
    """One exchange and one reduction per sweep, and as many in the program however long the blocks are."""
    in_program = []
    for length in (320, 3200):
        inputs, guess = problem(0, 3, length)
        run = jax.jit(lambda inputs, guess: solve(solver_for(8), APART, inputs, guess))
        traced = run.trace(inputs, guess)
        assert loop_collectives(traced.jaxpr.jaxpr) == [Counter(ppermute=1, pmax=1)]
        in_program.append(compiled_collectives(traced))
    assert in_program[0] == in_program[1], in_program
    assert in_program[0]["collective-permute"] == 2, in_program


def check_close(theirs, ours) -> None:
    """Compare up to rounding: about 5,000 units in the last place of the largest entry, or of one."""

    def leaf(a, b):
        largest = np.max(np.abs(b), where=np.isfinite(b), initial=1.0)
        np.testing.assert_allclose(np.asarray(a), np.asarray(b), rtol=0, atol=1e-12 * largest)

    jax.tree.map(leaf, theirs, ours)


def shared_steps() -> None:
    """Newton's path and certificate on eight devices, which do not divide it or outnumber it, are those of one."""
    for length in (101, 9):
        check_joins(length)
        check_shared(rec.deer(), length)
    check_shared(rec.quasi_elk(step_rule=rec.trust_region.Smoother()), 101)


def check_joins(length: int) -> None:
    """Shifts, sums and similar operations over a path whose padding would show."""

    def joins(steps, shift, own):
        x = jnp.where((steps.numbers() < length)[:, None], own[0] + shift, 100.0)
        small = jnp.all(x < 50, axis=1)
        numbers = (steps.sum(x), steps.max(x), steps.any(~small), steps.all(small), steps.leading(x[:, 0] < 1.5))
        sums = running(steps, jnp.add, x, 0.0)
        return (*numbers, steps.every(3, x)), (steps.delayed(x, 7.0)[None], steps.ahead(x)[None], sums[None])

    path = jax.random.normal(jax.random.key(2), (1, length, 2)).at[0, 7, 0].set(2.0)
    alone = jax.jit(lambda x: joins(AllSteps(length), 1e-3, x))(path)
    found = over_steps(jax.devices(), joins, 1e-3, path, ((-1,) * 6, (1, 1, 1)), length)
    check_close(found, alone)


def more_shared_steps() -> None:
    """The same check for other structures, and for dense gains of the Kalman filter."""
    for solver in (rec.quasi_deer(), rec.Newton(rec.BlockDiagonal()), rec.picard(), rec.jacobi(), rec.elk()):
        check_shared(solver, 101)


def check_shared(solver: rec.Newton | rec.LevenbergMarquardt, length: int) -> None:
    solver = replace(solver, num_iterates=4)  # each iterate must be that of one device
    variant = Variant.draw(jax.random.key(1), length)
    broken = int(np.argmax(variant.inputs[:, 0]))  # the single step that is not finite in the second case
    for limit in (jnp.inf, float(variant.inputs[broken, 0]) - 1e-9):
        one = variant._replace(limit=limit)
        alone, shared = (solve_variant(solver.with_devices(found), one) for found in (None, jax.devices()))
        check_certificate(one, alone, shared)
        assert shared.stats.certified_steps == (length if limit == jnp.inf else broken)


def check_certificate(variant: Variant, alone: rec.Solution, shared: rec.Solution) -> None:
    assert shared.result == alone.result
    assert shared.stats.certified_steps == alone.stats.certified_steps
    check_close((shared.value, shared.iterates), (alone.value, alone.iterates))
    np.testing.assert_array_equal(np.isinf(shared.residual_profile), np.isinf(alone.residual_profile))
    if alone.result == RESULTS.successful:
        previous = np.concatenate([variant.start[None], np.asarray(shared.value)[:-1]])
        images = jax.vmap(variant.fn)(previous, variant.inputs)
        assert np.max(np.abs(shared.value - images)) < 1e-12
        assert shared.residual < 1e-12


def step_collectives() -> None:
    """An iteration on two chains communicates equally often and much for any path length, and so does the program."""
    fn, x0, inputs = coupled(jax.random.key(0), 4096)
    starts, scale = jnp.stack([x0, -x0]), jnp.ones_like(x0)
    for make in (rec.deer, rec.quasi_deer):
        solver, in_program = make(devices=jax.devices()), []
        for length in (512, 4096):
            batch = jnp.stack([inputs[:length], inputs[-length:]])
            run = jax.jit(lambda x, u, solver=solver: solver.solve_batch(fn, x, u, scale=scale))
            traced = run.trace(starts, batch)
            found = loop_collectives(traced.jaxpr.jaxpr)
            assert found == [Counter(ppermute=3, all_gather=2, pmin=1, pmax=3)], found
            in_program.append(messages(traced.lower().compile().as_text()))
        assert in_program[0] == in_program[1], in_program
        # A and b of each iteration, the directions of growth, and the errors at the end; XLA may combine two
        assert sum("all-gather" in message for message in in_program[0]) in (3, 4, 5), in_program


def messages(program: str) -> list[str]:
    """Return type and kind of every collective of a compiled program."""
    kinds = "collective-permute|all-reduce|all-gather|all-to-all|reduce-scatter"
    return sorted(map(" ".join, re.findall(rf"= (\S+|\([^=]*?\)) ({kinds})(?:-start)?\(", program)))


def gradients() -> None:
    """Forward and backward through a path on eight devices, 19 steps: from every state, aux, inputs and parameters."""
    network = make_network(jax.random.key(3))
    expected = gradient(Sequential(), *network)
    for solver in (rec.deer(devices=jax.devices()), rec.quasi_deer(devices=jax.devices()[:3])):
        found = gradient(solver, *network)
        jax.tree.map(lambda a, b: np.testing.assert_allclose(np.asarray(a), b, rtol=1e-10, atol=1e-10), found, expected)


def logdensity(x):
    return -0.5 * jnp.sum(x**2) - 0.1 * jnp.sum(x**4)


def chains() -> None:
    """`sample`, thinned and extended, gives the same draws on two devices and on three, which do not divide blocks."""
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
    """ "auto" uses all devices if they gain, and only the default device if one was set: the same draws."""
    automatic.SHORT_SECONDS, pilot.TIMING_SECONDS, pilot.SHARE = 0.0, 1e-9, 0.2
    automatic.num_cores = jax.device_count
    automatic.Automatic.costs = lambda self, head: Costs(1e6, 1e4, 1e4, 0.0)
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


def newton_chains() -> None:
    """`sample`, thinned and extended, gives the same draws with the steps of two chains on three devices."""
    options = dict(kernel=HMC(step_size=0.7, num_integration_steps=2), num_warmup=0, num_chains=2, progress_bar=False)
    draws = []
    for solver, devices in ((rec.quasi_deer(), None), (rec.quasi_deer(devices=jax.devices()[:3]), None)):
        chain = sample(
            logdensity, jnp.ones(2), 0, num_samples=301, thinning=2, solver=solver, devices=devices, **options
        )
        assert np.all(chain.report.result == RESULTS.successful)
        assert chain.report.fallback == ""
        draws.append(np.asarray(chain.extend(301, progress_bar=False).get_samples(group_by_chain=True)))
    np.testing.assert_allclose(draws[1], draws[0], rtol=0, atol=1e-10)


CHECKS: dict[str, Callable[[], None]] = {
    check.__name__: check
    for check in (
        *(solutions, collectives, chains, planned),
        *(shared_steps, more_shared_steps, step_collectives, gradients, newton_chains),
    )
}

if __name__ == "__main__":
    compile_quickly(True)
    CHECKS[sys.argv[1]]()
