"""The problem to be solved: a recurrence ``x[t] = f(x[t-1], u[t])``, its inputs, an initial guess and a scale.

Users write a `Recurrence` (or a plain function); `make_problem` checks shapes and returns the `Problem` that solvers
get.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from pmcmc._pytree import Array, PyTree, is_real, real_dtype


def _identity(x):
    """Return x."""
    return x


@dataclass(frozen=True)
class Staged:
    """A step in stages, whose number depends on carry and input: begin, advance until finished, conclude.

    All four functions take and return a batch of lanes. The *work* is everything known of an unfinished step. It has
    the lanes on the last axis of every leaf, so that per-lane numbers are contiguous; carries, inputs and aux have them
    on the first axis.

    Args:
        begin: ``(carry, input) -> work``.
        advance: ``work -> work``. It must not change what conclude reads of a finished lane.
        finished: ``work -> (lanes,)``, whether a lane's step has ended.
        conclude: ``work -> (carry, aux)``.

    Source: Dance et al. (2025), "Efficiently vectorized MCMC on modern accelerators".
    """

    begin: Callable
    advance: Callable
    finished: Callable
    conclude: Callable


@dataclass(frozen=True)
class Recurrence:
    """A recurrence whose step carries more than the unknown, such as a cached gradient.

    Args:
        step: ``(carry, input) -> (carry, aux)``, one step.
        unknown: ``carry -> x``, what is solved for, compared and stored.
        restore: ``x -> carry``, rebuilds the caches.
        staged: The same step in stages, if its length varies; solvers that walk lanes then let no lane wait for the
            slowest. None: no stages.
    """

    step: Callable
    unknown: Callable = _identity
    restore: Callable = _identity
    staged: Staged | None = None

    def __call__(self, x: PyTree, u: PyTree) -> tuple[PyTree, PyTree]:
        """Return ``x[t], aux[t]`` from ``x[t-1]``, without caches."""
        carry, aux = self.step(self.restore(x), u)
        return self.unknown(carry), aux


class Problem(NamedTuple):
    """A validated batch of recurrences; leading axes are chains and time.

    Attributes:
        recurrence: The recurrence.
        x0: States before the first step, (C, ...).
        inputs: Inputs, (C, T, ...).
        guess: States (C, T, ...), a function of step numbers, or None.
        scale: Spread of each coordinate, structure of one state. None: measured on the path.
        num_chains: C.
        length: T.
    """

    recurrence: Recurrence
    x0: PyTree
    inputs: PyTree
    guess: PyTree
    scale: PyTree
    num_chains: int
    length: int

    @property
    def dtype(self) -> Any:
        """Widest floating dtype of the state."""
        return real_dtype(self.x0)

    def guess_at(self, steps: Array) -> PyTree:
        """Return guessed states after these steps (numbered from 0), leading axes (C, steps); None without a guess."""
        if self.guess is None:
            return None
        return self.guess(steps) if callable(self.guess) else jax.tree.map(lambda g: g[:, steps], self.guess)


def make_problem(fn, x0, inputs, length, guess, has_aux, scale) -> Problem:
    """Check shapes and dtypes of a batch, and convert ``fn`` to a `Recurrence`.

    Args:
        fn: Function or `Recurrence`, see `pmcmc.recurrence.solve`.
        x0: States before the first step, (C, ...).
        inputs: Inputs, (C, T, ...), or None.
        length: T, or None if there are inputs.
        guess: States (C, T, ...), a function of step numbers, or None.
        has_aux: Whether ``fn`` also returns auxiliary output.
        scale: Spread of each coordinate, structure of one state, or None.

    Returns:
        The problem; x0 has the dtypes of the function's result.

    Raises:
        ValueError: Shapes do not fit, x0 holds no number, or the length is missing or below 1.
        TypeError: ``fn`` is not callable, or a state has complex numbers or typed keys.
    """
    x0 = jax.tree.map(jnp.asarray, x0)
    inputs = jax.tree.map(jnp.asarray, inputs)
    num_chains = _num_chains(x0, inputs)
    length = _length(inputs, length)
    recurrence = as_recurrence(fn, has_aux)
    one = lambda tree, axes: jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape[axes:], x.dtype), tree)
    x_shape = one(x0, 1)
    out = jax.eval_shape(lambda x, u: recurrence(x, u)[0], x_shape, one(inputs, 2))
    if jax.tree.structure(out) != jax.tree.structure(x_shape) or any(
        a.shape != b.shape for a, b in zip(jax.tree.leaves(out), jax.tree.leaves(x_shape), strict=True)
    ):
        raise ValueError(
            f"fn must return a state like x0. Expected {jax.tree.map(lambda s: s.shape, x_shape)}, got "
            f"{jax.tree.map(lambda s: s.shape, out)}. If fn returns (state, aux), pass has_aux=True."
        )
    check_dtypes(x0, out)
    x0 = jax.tree.map(lambda x, s: x.astype(s.dtype), x0, out)
    guess = _check_guess(guess, out, num_chains, length)
    if scale is not None:
        scale = jax.tree.map(lambda s, x: jnp.asarray(s, x.dtype if is_real(x) else None), scale, out)
    return Problem(recurrence, x0, inputs, guess, scale, num_chains, length)


def as_recurrence(fn: Callable | Recurrence, has_aux: bool = False) -> Recurrence:
    """Return ``fn`` as a `Recurrence`.

    ``(x, u) -> x`` and ``(x, u) -> (x, aux)`` become recurrences without caches.
    """
    if isinstance(fn, Recurrence):
        return fn
    if not callable(fn):
        raise TypeError(f"fn must be callable as fn(x, u), got {type(fn).__name__}.")
    return Recurrence(fn if has_aux else lambda x, u: (fn(x, u), None))


def check_dtypes(x0: PyTree, out: PyTree) -> None:
    """Refuse states that solvers cannot compare, and those that would be truncated to the dtypes of fn's result.

    Args:
        x0: The state before the first step.
        out: Shapes of the state after it, with the structure of x0.

    Raises:
        TypeError: A leaf has complex numbers or typed keys, or a wider kind of number before the step than after it.
    """
    kinds = (np.bool_, jnp.integer, jnp.floating)
    for (path, before), after in zip(jax.tree_util.tree_leaves_with_path(x0), jax.tree.leaves(out), strict=True):
        kind = [next((i for i, k in enumerate(kinds) if jnp.issubdtype(x.dtype, k)), None) for x in (before, after)]
        where = f"x{jax.tree_util.keystr(path)}"
        if None in kind:
            raise TypeError(
                f"the state {where} has dtype {after.dtype if kind[1] is None else before.dtype}: expected real "
                "numbers, integers or booleans. Hold a complex number as two leaves, its real and imaginary parts, "
                "and a typed key as jax.random.key_data(key): within fn, jax.random.wrap_key_data makes it a key again."
            )
        if kind[0] > kind[1]:
            raise TypeError(
                f"the state {where} has dtype {before.dtype} in x0, and fn returns {after.dtype}, to which x0 would be "
                f"truncated. Pass x0 as {after.dtype}, or let fn return {before.dtype}."
            )


def _num_chains(x0: PyTree, inputs: PyTree) -> int:
    """Return C, the leading axis that all leaves of x0 and inputs must have."""
    if not any(x.ndim and math.prod(x.shape[1:]) for x in jax.tree.leaves(x0)):
        raise ValueError("x0 holds no number: expected a pytree of arrays, the state before the first step.")
    sizes = {x.shape[:1] for x in jax.tree.leaves((x0, inputs))}
    if len(sizes) > 1:
        raise ValueError(
            f"all leaves of x0 and inputs need the same leading axis of chains, got {sorted(sizes)}. Repeat what the "
            "chains share, or use solve for a single one."
        )
    return sizes.pop()[0]


def _length(inputs: PyTree, length: int | None) -> int:
    """Return T from inputs and ``length``, which must agree."""
    leaves = jax.tree.leaves(inputs)
    if any(x.ndim < 2 for x in leaves):
        raise ValueError("every leaf of inputs needs a leading time axis of length T.")
    lengths = {int(x.shape[1]) for x in leaves} | ({length} if length is not None else set())
    if not lengths:
        raise ValueError("without inputs the number of steps is unknown: pass length=T.")
    if len(lengths) > 1:
        raise ValueError(f"the leaves of inputs and length must agree on T, got {sorted(lengths)}.")
    found = lengths.pop()
    if found < 1:
        raise ValueError(f"the number of steps must be at least 1, got {found}.")
    return found


def _check_guess(guess, state, num_chains, length):
    """Check the shapes of a guess and convert it to the state's dtypes."""
    if guess is None:
        return None
    if callable(guess):  # its shapes are checked on two steps; solvers call it on the steps that they need
        given, rows = jax.eval_shape(guess, jnp.arange(2)), 2
        checked: Any = lambda steps: jax.tree.map(lambda g, s: jnp.asarray(g, s.dtype), guess(steps), state)
    else:
        given, rows = guess, length
        checked = jax.tree.map(lambda g, s: jnp.asarray(g, s.dtype), guess, state)
    expected = jax.tree.map(lambda s: (num_chains, rows, *s.shape), state)
    if jax.tree.structure(given) != jax.tree.structure(state) or jax.tree.map(jnp.shape, given) != expected:
        raise ValueError(
            "initial_guess must hold one state per step. Expected shapes (without the chain axis) "
            f"{jax.tree.map(lambda s: (rows, *s.shape), state)}, got {jax.tree.map(lambda g: jnp.shape(g)[1:], given)}."
        )
    return checked
