"""NumPyro's HMC and NUTS as pmcmc kernels and warm-ups; what cannot be translated is refused."""

import math
from collections.abc import Callable, Sequence
from copy import copy
from dataclasses import replace
from functools import partial
from typing import Any

import jax.numpy as jnp
import numpy as np
from numpyro.infer import HMC as NumpyroHMC
from numpyro.infer import NUTS as NumpyroNUTS
from numpyro.infer.hmc_util import euclidean_kinetic_energy

from pmcmc.chain.draws import site_shapes
from pmcmc.interop.numpyro import numpyro_target
from pmcmc.kernels import HMC, NUTS, Kernel
from pmcmc.target import Target
from pmcmc.warmup import EnsembleAdaptation, Warmup

STEP_SIZE = "adapt_state.step_size"

# What to write in place of NumPyro's other kernels, by class: a kernel of pmcmc's, and the rest of the sentence.
_GIBBS = (
    "pmcmc.Compose([pmcmc.Gibbs({'site': update}), (pmcmc.HMC(), other_sites)])",
    ", where update draws a site given the others, such as a pmcmc.kernels.CustomUpdate",
)
_DISCRETE = "pmcmc.HMC()", ": discrete sites are drawn by DiscreteGibbs"
_INDEPENDENT = "pmcmc.HMC()", ": its chains do not depend on each other"
_INSTEAD = {
    "AIES": _INDEPENDENT,
    "ESS": _INDEPENDENT,
    "BarkerMH": ("pmcmc.from_blackjax(blackjax.barker_proposal, step_size=None)", ", or with kernel=pmcmc.MALA()"),
    "CustomGibbs": _GIBBS,
    "Gibbs": _GIBBS,
    "HMCGibbs": _GIBBS,
    "DiscreteGibbs": _DISCRETE,
    "DiscreteHMCGibbs": _DISCRETE,
    "MixedHMC": _DISCRETE,
    "HMCECS": ("pmcmc.HMC()", ", on all data: leave subsample_size out of the model's plates"),
    "SA": ("pmcmc.RandomWalk()", ", or kernel=pmcmc.Compose([(pmcmc.RandomWalk(), sites)]) if there is no gradient"),
}


def _site(field: str) -> str:
    """Return the site that an extra field such as ``"z.mu"`` or ``"~z.mu"`` names, or ""."""
    return field.removeprefix("~")[2:] if field.removeprefix("~").startswith("z.") else ""


def kernel_fields(target: Target, kernel: Kernel, extra_fields: Sequence[str]) -> tuple[str, ...]:
    """Return the extra fields that the kernel reports; raise if a name, or the site in it, does not exist."""
    if isinstance(extra_fields, str):
        raise TypeError(f"extra_fields must be a sequence of names, got {extra_fields!r}: write ({extra_fields!r},).")
    latent = set(target.spec.template)
    for name in filter(_site, extra_fields):
        sites = set(site_shapes(target)) if name.startswith("~") else latent
        if _site(name) not in sites:
            raise ValueError(f"extra_fields: {name!r} names no site of the model: expected one out of {sorted(sites)}.")
    is_adapted = bool(extra_fields) and "step_size" in kernel.tunables and kernel.takes_leapfrogs(target)
    others = ["z", STEP_SIZE] if is_adapted else ["z"]
    of_kernel = tuple(name for name in extra_fields if not (_site(name) or name in others))
    if unknown := sorted(set(of_kernel) - set(kernel.extra_fields)):
        raise ValueError(
            f"{type(kernel).__name__} has no extra_fields {unknown}: expected names out of "
            f"{[*others, *kernel.extra_fields]}, 'z.site' for the unconstrained values of one of "
            f"{sorted(latent)}, or '~z.site' to leave one of {sorted(site_shapes(target))} out."
        )
    return of_kernel


def translate(sampler: Any, num_warmup: int, given: Warmup | None = None) -> tuple[Kernel, EnsembleAdaptation]:
    """Return the pmcmc kernel and warm-up that correspond to a NumPyro kernel; raise if it has no counterpart.

    A metric that is not adapted and not given is the identity, unless the user's own warm-up ``given`` has one.
    """
    if type(sampler) not in (NumpyroHMC, NumpyroNUTS):
        raise TypeError(
            f"{type(sampler).__name__} has no counterpart that is sampled in parallel: expected numpyro.infer.NUTS or "
            f"HMC. Pass the model and a pmcmc kernel, as in {_instead(sampler)}."
        )
    metric = _kept_metric(sampler, num_warmup)
    _refuse(sampler, metric)
    step_size = None if sampler._adapt_step_size and num_warmup else sampler._step_size
    if isinstance(metric, dict):
        metric = next(iter(metric.values()))  # the only one
    if not sampler._dense_mass and np.ndim(metric) == 2:
        metric = jnp.diagonal(jnp.asarray(metric))  # as NumPyro does
    if num_warmup and not sampler._adapt_mass_matrix and metric is None and getattr(given, "metric", None) is None:
        metric = 1.0
    warmup = EnsembleAdaptation(dense=sampler._dense_mass, target_acceptance_rate=sampler._target_accept_prob)
    if type(sampler) is NumpyroHMC:
        return HMC(inverse_mass_matrix=metric, **_trajectory(sampler, step_size)), warmup
    depth = sampler._max_tree_depth
    return NUTS(step_size, depth[1] if isinstance(depth, tuple) else depth, metric), warmup


def _instead(sampler: Any) -> str:
    """Return what to write in place of a NumPyro kernel that is refused, as the end of a sentence."""
    names = [base.__name__ for base in type(sampler).__mro__]
    kernel, rest = next((_INSTEAD[name] for name in names if name in _INSTEAD), ("pmcmc.HMC()", ""))
    return f"ParallelMCMC(model, kernel={kernel}, ...){rest}"


def owned(sampler: Any) -> Any:
    """Return a copy of a NumPyro kernel whose functions of the model work although NumPyro never runs it.

    They are ``get_potential_fn``, ``postprocess_fn`` and ``get_constrain_fn``, made for the arguments that these get.
    """
    made = copy(sampler)
    made._potential_fn_gen = partial(_potential_fn, sampler.model)
    made._postprocess_fn = partial(_constrain_fn, sampler.model)
    # NumPyro uses its own transforms unless the support depends on other sites.
    made._inv_transforms, made._dynamic_support = {}, True
    return made


def _potential_fn(model: Callable, /, *args: Any, **kwargs: Any) -> Callable:
    """Return the potential energy of a model as a function of unconstrained values."""
    target = numpyro_target(model, args, kwargs)
    return lambda z: -target.model.logdensity(target.data, z)


def _constrain_fn(model: Callable, /, *args: Any, **kwargs: Any) -> Callable:
    """Return the map from unconstrained values to latent and deterministic sites of a model."""
    target = numpyro_target(model, args, kwargs)
    return lambda z: target.model.constrain(target.data, z)


def keep_options(warmup: Warmup, sampler: Any) -> Warmup:
    """Return a warm-up of the user's with what a NumPyro kernel says, where the warm-up leaves it open.

    Raises:
        ValueError: The kernel asks for something that the warm-up excludes or does not have.
    """
    for option, value, default, name in (
        ("target_accept_prob", sampler._target_accept_prob, 0.8, "target_acceptance_rate"),
        ("dense_mass", sampler._dense_mass, False, "dense"),
    ):
        if getattr(warmup, name, value) is None:
            warmup = replace(warmup, **{name: value})  # type: ignore[type-var]
        elif value != default and getattr(warmup, name, None) != value:
            raise ValueError(
                f"{option}={value} of {type(sampler).__name__} does not go with warmup={warmup!r}: leave one of them "
                f"out, or set {name} of a warm-up that has it to the same."
            )
    return warmup


def _kept_metric(sampler: Any, num_warmup: int) -> Any:
    """Return the metric of a NumPyro kernel as it was given; None if NumPyro would only start its adaptation there."""
    return None if sampler._adapt_mass_matrix and num_warmup else sampler._inverse_mass_matrix


def check_metric_sites(sampler: Any, num_warmup: int, target: Target) -> None:
    """Raise unless a metric by sites that is kept covers all sites of the model in their order."""
    metric, sites = _kept_metric(sampler, num_warmup), tuple(sorted(target.spec.template))
    if isinstance(metric, dict) and tuple(metric) != (sites,):
        raise ValueError(f"inverse_mass_matrix is over the sites {list(metric)}: expected one entry for {[sites]}.")


def _trajectory(sampler: Any, step_size: Any) -> dict[str, Any]:
    """Return the fields of `HMC` that make trajectories like those of NumPyro's.

    As there, steps are shortened until a whole number of them takes ``trajectory_length``, and with ``num_steps`` this
    is their number. A time of 2 pi, NumPyro's default, counts as left out where something else fixes the trajectory or
    the step size is tuned.

    Args:
        sampler: NumPyro's HMC.
        step_size: Step size; None if it is tuned.
    """
    time, num_steps = sampler._trajectory_length, sampler._num_steps
    is_default = time is None or time == 2 * math.pi
    if num_steps is None and step_size is not None:
        num_steps = max(1, math.ceil(time / float(step_size)))
        return dict(step_size=time / num_steps, num_integration_steps=num_steps)
    if num_steps is not None:
        return dict(step_size=step_size if is_default else time / num_steps, num_integration_steps=num_steps)
    return {} if is_default else dict(trajectory_length=time)


def _refuse(sampler: Any, metric: Any) -> None:
    """Raise for options of NumPyro's HMC and NUTS, and a metric that is kept, without a counterpart."""
    for unusable, message in (
        (
            sampler.model is None,
            "potential_fn has no model: use pmcmc.sample(lambda x: -potential_fn(x), initial_position, rng_key).",
        ),
        (
            sampler._kinetic_fn is not euclidean_kinetic_energy,
            "kinetic_fn must be the Euclidean one: leave it out.",
        ),
        (
            not isinstance(sampler._dense_mass, bool),
            "dense_mass by blocks of sites is not available: pass True or False.",
        ),
        (
            isinstance(metric, dict) and len(metric) != 1,
            "inverse_mass_matrix by blocks of sites is not available: pass an array (D,) or (D, D) over all sites.",
        ),
        (
            sampler._forward_mode_differentiation,
            "forward_mode_differentiation is not available: write loops of the model with numpyro's or jax's scan.",
        ),
    ):
        if unusable:
            raise ValueError(message)
