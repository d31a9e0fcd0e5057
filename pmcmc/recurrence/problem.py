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

from pmcmc._arguments import as_int
from pmcmc._pytree import Array, PyTree, is_real, known_values, real_dtype
from pmcmc._xla.content import every_equation


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
        scale: Spread of each coordinate, structure of one state or one number, or None.

    Returns:
        The problem; x0 has the dtypes of the function's result.

    Raises:
        ValueError: Shapes do not fit, x0 holds no number, the length is missing or below 1, or the scale is negative or
            not finite.
        TypeError: ``fn`` is not callable, or draws random numbers that depend on how many steps are evaluated at once;
            or a state has complex numbers or typed keys, or is wider than what ``fn`` returns.
    """
    x0 = jax.tree.map(jnp.asarray, x0)
    inputs = jax.tree.map(jnp.asarray, inputs)
    num_chains = _num_chains(x0, inputs)
    length = _length(inputs, length)
    recurrence = as_recurrence(fn, has_aux)
    one = lambda tree, axes: jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape[axes:], x.dtype), tree)
    x_shape = one(x0, 1)
    out = step_shape(recurrence, x_shape, one(inputs, 2))
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
    scale = None if scale is None else check_scale(scale, out)
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


# What draws random bits, as opposed to passing keys on; and how the dtypes of keys are written whose bits under
# ``jax.vmap`` are not those of single calls. The last two draw such bits without a key.
_DRAWS = frozenset({"random_bits", "random_fold_in", "random_gamma", "random_split"})
_RBG_KEYS = frozenset({"key<rbg>", "key<urbg>"})
_RBG = frozenset({"rng_bit_generator", "rng_uniform"})


def step_shape(recurrence: Recurrence, x: PyTree, u: PyTree) -> PyTree:
    """Return the shapes of the state after a step, given those of one state and one input.

    Raises:
        TypeError: The step draws random numbers by one of JAX's generators that give other numbers to a batch of keys
            than to each of them, so that steps would not be functions of state and input.
    """
    program, out = jax.make_jaxpr(lambda x, u: recurrence(x, u)[0], return_shape=True)(x, u)
    for equation in every_equation(program.jaxpr):
        name, dtypes = equation.primitive.name, {str(getattr(v.aval, "dtype", "")) for v in equation.invars}
        if name in _RBG or (name in _DRAWS and dtypes & _RBG_KEYS):
            raise TypeError(
                f"fn draws random numbers by {name} of JAX's hardware generators ('rbg', 'unsafe_rbg'), which under "
                "jax.vmap depend on how many steps are evaluated at once. Pass keys of the default implementation, "
                "jax.random.key(seed, impl='threefry2x32'), or draw the numbers beforehand and pass them as inputs."
            )
    return out


def check_scale(scale: PyTree, state: PyTree) -> PyTree:
    """Return the scale of each leaf of a state, in its dtype.

    Args:
        scale: Structure of one state, whose leaves broadcast to its leaves; or one number for all of them.
        state: Shapes of one state.

    Raises:
        ValueError: Structure or shapes do not fit, or a scale is known to be negative or not finite. A scale of 0 is
            allowed: only equal numbers are then close.
    """
    if jax.tree.structure(scale) == jax.tree.structure(0) and not jnp.ndim(scale):
        scale = jax.tree.map(lambda _: scale, state)
    shapes = lambda tree: jax.tree.map(jnp.shape, tree)
    fits = jax.tree.structure(scale) == jax.tree.structure(state) and all(
        _broadcasts(jnp.shape(s), x.shape) for s, x in zip(jax.tree.leaves(scale), jax.tree.leaves(state), strict=True)
    )
    if not fits:
        raise ValueError(
            "scale must be one number, or have the structure of one state, with leaves that broadcast to its leaves. "
            f"Expected {shapes(state)}, got {shapes(scale)}."
        )
    return jax.tree_util.tree_map_with_path(_leaf_of_scale, scale, state)


def _broadcasts(shape: tuple[int, ...], target: tuple[int, ...]) -> bool:
    """Whether an array of this shape broadcasts to the target shape."""
    last = target[len(target) - len(shape) :]
    return len(shape) <= len(target) and all(n in (1, m) for n, m in zip(shape, last, strict=True))


def _leaf_of_scale(path: tuple, scale: Any, leaf: Any) -> Array:
    """Return the scale of one leaf of the state in its dtype; that of integers and booleans is not used."""
    if not is_real(leaf):
        return jnp.asarray(scale)
    known = known_values(scale)
    if known is not None:
        with np.errstate(over="ignore"):
            known = known.astype(leaf.dtype)
        if not np.all((known >= 0) & np.isfinite(known)):
            raise ValueError(
                f"scale{jax.tree_util.keystr(path)} must be positive and finite in {leaf.dtype}, got {scale}: pass the "
                "spread of each coordinate, or leave scale out to have it measured."
            )
    return jnp.asarray(scale, leaf.dtype)


def check_dtypes(x0: PyTree, out: PyTree) -> None:
    """Refuse states that solvers cannot compare, and those that would be truncated to the dtypes of fn's result.

    Args:
        x0: The state before the first step.
        out: Shapes of the state after it, with the structure of x0.

    Raises:
        TypeError: A leaf has complex numbers or typed keys, or a dtype that JAX does not promote to that after the
            step. Python's numbers may be narrowed, as JAX does, but not to another kind of number.
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
        with jax.numpy_dtype_promotion("standard"):
            fits = jnp.promote_types(before.dtype, after.dtype) == after.dtype
        if not (fits or (kind[0] == kind[1] and getattr(before, "weak_type", False))):
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


def _length(inputs: PyTree, length: Any) -> int:
    """Return T from inputs and ``length``, which must agree."""
    leaves = jax.tree.leaves(inputs)
    if any(x.ndim < 2 for x in leaves):
        raise ValueError("every leaf of inputs needs a leading time axis of length T.")
    lengths = {int(x.shape[1]) for x in leaves}
    if length is not None:
        lengths.add(as_int("length", length, 1, "It is T, the number of steps."))
    if not lengths:
        raise ValueError("without inputs the number of steps is unknown: pass length=T.")
    if len(lengths) > 1:
        raise ValueError(
            f"the leaves of inputs and length must agree on T, got {sorted(lengths)}. Leave length out to take it from "
            "inputs."
        )
    found = lengths.pop()
    if found < 1:
        raise ValueError(f"the number of steps must be at least 1, got {found}: pass inputs of one step or more.")
    return found


def _check_guess(guess, state, num_chains, length):
    """Check the shapes of a guess and convert it to the state's dtypes."""
    if guess is None:
        return None
    # Of a function the shapes are checked on two steps; solvers call it on the steps that they need.
    given, rows = (jax.eval_shape(guess, jnp.arange(2)), 2) if callable(guess) else (guess, length)
    expected = jax.tree.map(lambda s: (num_chains, rows, *s.shape), state)
    if jax.tree.structure(given) != jax.tree.structure(state) or jax.tree.map(jnp.shape, given) != expected:
        raise ValueError(
            "initial_guess must hold one state per step. Expected shapes (without the chain axis) "
            f"{jax.tree.map(lambda s: (rows, *s.shape), state)}, got {jax.tree.map(lambda g: jnp.shape(g)[1:], given)}."
        )
    convert = lambda guess: jax.tree.map(lambda g, s: jnp.asarray(g, s.dtype), guess, state)
    return (lambda steps: convert(guess(steps))) if callable(guess) else convert(guess)
