"""Dataclasses as pytrees: leaves, static fields, and classes that differ."""

from dataclasses import dataclass, field

import jax
import jax.numpy as jnp
import pytest

from pmcmc import recurrence
from pmcmc._pytree import register_dataclass


@register_dataclass
@dataclass(frozen=True)
class First:
    size: float
    name: str = field(default="a", metadata=dict(static=True))

    def __post_init__(self):
        if isinstance(self.size, str):
            raise TypeError("checked by the constructor, not by jax")


@register_dataclass
@dataclass(frozen=True)
class Second:
    size: float
    name: str = field(default="a", metadata=dict(static=True))


def test_fields_are_leaves_or_static() -> None:
    tree = First(jnp.array(2.0), "b")
    leaves, structure = jax.tree.flatten(tree)
    assert leaves == [2.0]
    assert jax.tree.unflatten(structure, leaves) == tree
    assert jax.tree.map(lambda x: 2 * x, tree) == First(4.0, "b")
    ((path, _),) = jax.tree_util.tree_leaves_with_path(tree)
    assert jax.tree_util.keystr(path) == ".size"
    assert jax.tree.structure(First(1.0, "a")) != structure
    assert jax.tree.unflatten(structure, ["placeholder"]).size == "placeholder"  # __post_init__ is not run


def test_classes_are_told_apart() -> None:
    """By equality, not by hash alone: jit compares keys whose hashes are equal."""
    assert jax.tree.structure(First(1.0)) != jax.tree.structure(Second(1.0))
    none = [recurrence.Identity(), recurrence.Zero(), recurrence.Dense(), recurrence.Diagonal()]
    assert len({id(a) for a in none}) == 4
    for i, a in enumerate(none):
        assert all(jax.tree.structure(a) != jax.tree.structure(b) for b in none[:i])


def test_jit_sees_the_class() -> None:
    @jax.jit
    def name(tree):
        return jnp.array(isinstance(tree, First))

    assert name(First(1.0))
    assert not name(Second(1.0))


@pytest.mark.parametrize("number", [1.0, 2])
def test_numbers_do_not_compile_anew(number) -> None:
    traces = []

    @jax.jit
    def double(tree):
        traces.append(1)
        return 2 * tree.size

    assert double(First(number)) == 2 * number
    double(First(number + 1))
    assert len(traces) == 1
