"""Calls that compile programs of their own, and so cannot stand within ``jax.jit`` or ``jax.vmap``."""

import jax

from pmcmc._types import PyTree


def refuse_transformation(who: str, *arguments: PyTree) -> None:
    """Raise where ``who`` is called while JAX transforms a function around it.

    Raises:
        TypeError: with what to do instead.
    """
    if any(isinstance(leaf, jax.core.Tracer) for leaf in jax.tree.leaves(arguments)) or not _is_clean():
        raise TypeError(
            f"{who} cannot be called within jax.jit, jax.vmap or jax.grad, since it compiles programs of its own and "
            "decides by what they return: call it outside; for several data sets or keys in a Python loop, where equal "
            "shapes are compiled once; for several chains pass num_chains."
        )


def _is_clean() -> bool:
    """No transformation is under way, as far as JAX tells: a closure may hold what its arguments do not show."""
    try:
        from jax._src.core import trace_state_clean
    except ImportError:  # a private name, which NumPyro uses too
        return True
    return trace_state_clean()
