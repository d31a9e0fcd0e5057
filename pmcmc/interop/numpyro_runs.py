"""Runs of a NumPyro model: one at a time, and with a say in what would be drawn.

NumPyro evaluates a density without `handlers.seed`. What the model keeps from inference, by ``numpyro.prng_key()`` or
within `handlers.block`, is then drawn by ``jax.random.key(0)``; where another value is missing, NumPyro fails. So does
`watched`, within ``scan`` and ``cond`` too, except that one can find out which values are missing.
"""

import threading
from collections.abc import Callable
from dataclasses import dataclass
from functools import wraps
from typing import Any

import jax

from pmcmc._pytree import PRNGKey

# All threads share NumPyro's stack of handlers: two models that run at once would see each other's sites.
_ONE_AT_A_TIME = threading.RLock()


def alone(function: Callable) -> Callable:
    """Decorate a function so that no other model runs meanwhile."""

    @wraps(function)
    def run(*args: Any, **kwargs: Any) -> Any:
        with _ONE_AT_A_TIME:
            return function(*args, **kwargs)

    return run


def random_trace(model: Callable, args: tuple, kwargs: dict, rng_key: PRNGKey) -> dict:
    """Trace the model at a random point, without validating its distributions.

    Raises:
        ValueError: A plate draws a subsample.
    """
    from numpyro import handlers, validation_enabled
    from numpyro.infer.initialization import init_to_uniform

    with validation_enabled(False):  # invalid values show in the density, and the site is named before sampling starts
        # Start as NumPyro starts its own samplers: an improper prior cannot be drawn from.
        started = handlers.substitute(handlers.seed(watched(model), rng_key), substitute_fn=init_to_uniform)
        return handlers.trace(started).get_trace(*args, **kwargs)


def watched(model: Callable, rng_key: PRNGKey | None = None, scanned: bool = False) -> Callable:
    """Return a model that draws no subsamples, and changes no dict that it keeps in a ``mutable`` site.

    Args:
        model: A NumPyro model, or a function within its ``scan`` or ``cond``.
        rng_key: Key of all sites that have no value when they are reached. If they get one later, from a handler around
            the model, it is not used: a result that depends on it was drawn. With a key, ``numpyro.prng_key()`` returns
            ``jax.random.key(0)``. None: `handlers.seed` around the model gives out the keys.
        scanned: Whether the model is a function within ``scan``.
    """
    from numpyro.primitives import Messenger

    class Watch(Messenger):
        def process_message(self, msg: dict[str, Any]) -> None:
            _watch(msg, rng_key, scanned)

    return Watch(model)


def _watch(msg: dict[str, Any], rng_key: PRNGKey | None, scanned: bool) -> None:
    """Do what `watched` does with one message of the model."""
    kind, value = msg["type"], msg.get("value")
    if kind == "control_flow":
        # The functions hide their sites from handlers around them. That of `scan` is its first argument, those of
        # `cond` follow the condition.
        is_scan = callable(msg["args"][0])
        functions = range(1) if is_scan else range(1, 3)
        wrap = lambda x: watched(x, rng_key, scanned or is_scan)
        msg["args"] = tuple(wrap(x) if n in functions else x for n, x in enumerate(msg["args"]))
    elif kind == "mutable" and isinstance(value, dict):
        msg["value"] = _copied(value)
    elif kind == "plate" and value is None:
        msg["fn"] = _Subsample(msg["name"], scanned)
    elif rng_key is not None and value is None:
        if kind == "prng_key":
            msg["value"] = jax.random.key(0)  # NumPyro's `_substitute_default_key`
        elif kind == "sample" and msg["kwargs"].get("rng_key") is None:
            msg["kwargs"]["rng_key"] = rng_key


def _copied(value: dict) -> dict:
    """Return a copy of a dict, and of dicts within it."""
    made = value.copy()
    made.update({name: _copied(x) for name, x in value.items() if isinstance(x, dict)})
    return made


@dataclass(frozen=True)
class _Subsample:
    """The function of a plate without given indices, called to draw them; equal ones are equal branches of ``cond``.

    Attributes:
        plate: Name of the plate.
        scanned: Whether the plate is within ``scan``, where its indices cannot be substituted.
    """

    plate: str
    scanned: bool

    def __call__(self, size: int, subsample_size: int, **_: Any) -> None:
        choose = (
            "index the arrays before the scan"
            if self.scanned
            else f"choose them by numpyro.handlers.substitute(model, data={{{self.plate!r}: indices}})"
        )
        raise ValueError(
            f"plate {self.plate!r} draws a subsample of {subsample_size} out of {size}, which MCMC does not support: "
            "every step would have to see the same data. Leave subsample_size out to condition on all of them, or "
            f"{choose}."
        )
