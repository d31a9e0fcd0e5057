"""What a gradient adds to few places is kept out of the combiner of the addition on a GPU."""

import re
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pmcmc._xla import compile as compiling
from pmcmc._xla.compile import adapted, plain_jit, tuned_jit
from pmcmc.target import Target

index = jnp.arange(12) % 3
y = jnp.linspace(0.0, 1.0, 12)
a = jnp.array([0.5, -1.0, 2.0])


@pytest.fixture
def on_gpu(monkeypatch: pytest.MonkeyPatch, fresh_programs: None) -> None:
    """Trace as for a GPU."""
    monkeypatch.setattr(compiling, "default_platform", lambda: "gpu")


def barriers(fn: Callable, *args) -> tuple[int, int]:
    """Return the number of scatters in the program for a GPU, and how many of their updates come from a barrier."""
    return behind_barriers(jax.jit(fn).trace(*args).lower(lowering_platforms=("cuda",)).as_text())


def behind_barriers(text: str) -> tuple[int, int]:
    made = set(re.findall(r"(%\w+) = stablehlo\.optimization_barrier", text))
    updates = re.findall(r"stablehlo\.scatter\"?\(%\w+, %\w+, (%\w+)\)", text)
    return len(updates), sum(name in made for name in updates)


gathered = lambda a: jnp.sum((y - a[index]) ** 2)
HELD = {
    "gathered": jax.grad(gathered),
    "lanes": lambda a: jax.vmap(jax.grad(gathered))(jnp.stack([a, 2 * a])),
    "loop": lambda a: jax.lax.fori_loop(0, 3, lambda i, a: a - 0.1 * jax.grad(gathered)(a), a),
    "jitted": lambda a: jax.grad(lambda a: jax.jit(gathered)(a))(a),
    "plain": lambda a: a.at[index].add(y),
}


@pytest.mark.parametrize("name", HELD)
def test_updates_are_behind_a_barrier(name: str, on_gpu: None) -> None:
    assert barriers(HELD[name], a) == (1, 0)
    assert barriers(adapted(HELD[name]), a) == (1, 1)
    np.testing.assert_array_equal(jax.jit(adapted(HELD[name]))(a), jax.jit(HELD[name])(a))


def test_other_scatters_and_cpus_are_left_alone(on_gpu: None, monkeypatch: pytest.MonkeyPatch) -> None:
    assert barriers(adapted(lambda a: a.at[index].set(y)), a) == (1, 0)
    assert barriers(adapted(lambda a: a.at[index].add(index)), jnp.arange(3)) == (1, 0)
    monkeypatch.setattr(compiling, "default_platform", lambda: "cpu")
    assert barriers(adapted(HELD["gathered"]), a) == (1, 0)


def test_a_function_within_a_program_gets_one_barrier(on_gpu: None) -> None:
    """It is traced by itself first, and then rewritten as part of the program."""
    target = Target.from_logdensity(lambda x: -gathered(x), a)
    inner = plain_jit()(lambda target, x: jax.grad(lambda x: target.model.logdensity(target.data, x))(x))
    outer = tuned_jit()(lambda target, x: 2 * inner(target, x))
    text = outer._jitted(target).trace(target, a).lower(lowering_platforms=("cuda",)).as_text()
    assert behind_barriers(text) == (1, 1)
    assert text.count("optimization_barrier") == 1


def test_operations_keep_the_places_where_they_were_written(on_gpu: None) -> None:
    """Counts of programs tell loops apart by them."""

    def descend(a):
        return jax.lax.fori_loop(0, 3, lambda i, a: a - 0.1 * jax.grad(gathered)(a), a)

    text = jax.jit(adapted(descend)).trace(a).lower(lowering_platforms=("cuda",)).as_text(debug_info=True)
    assert f'loc("{descend.__qualname__}"(' in text
