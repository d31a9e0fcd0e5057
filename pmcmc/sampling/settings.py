"""The arguments of the public functions, checked before anything is sampled.

`Settings.check` validates them and fills in the defaults. `as_key` and `spread_starts` convert keys and starting
positions.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from numbers import Integral
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from pmcmc._arguments import as_int
from pmcmc._pytree import PRNGKey, PyTree
from pmcmc._xla import default_platform
from pmcmc._xla.memory import available_bytes, size_text
from pmcmc.chain.chain import Chain
from pmcmc.chain.stored import StoredChain
from pmcmc.kernels import HMC, Compose, Kernel, SiteKernel
from pmcmc.kernels.gibbs import with_discrete_sites
from pmcmc.kernels.metropolis import GradientKernel
from pmcmc.random.streams import seed_key, threefry_key
from pmcmc.recurrence import RecurrenceSolver, Sequential
from pmcmc.sampling.engine import Engine
from pmcmc.target import Target
from pmcmc.warmup import ChEESAdaptation, EnsembleAdaptation, Pathfinder, SiteAdaptation, Warmup, WindowAdaptation
from pmcmc.warmup.base import check_metrics

# Least number of steps of a segment: with fewer, nearly all time is overhead. Sequential sampling takes steps in pieces
# of this size.
LEAST_STEPS = Sequential.unit
_REMEDY = "Keep fewer draws by thinning=, write them to disk by Chain.stream, or sample fewer chains at a time."


@dataclass(frozen=True)
class Settings:
    """What the user asked for, with the defaults filled in.

    Attributes:
        kernel: The kernel.
        solver: The solver; None for "auto".
        num_warmup: Number of warm-up steps.
        num_samples: Number of steps per chain after warm-up.
        num_chains: Number of chains.
        thinning: Number of steps per draw that is kept.
        extra_fields: Names for `Chain.get_extra_fields`.
        warmup: The warm-up.
        devices: Devices that share the work; empty for the default one.
        max_memory: Bytes; None if the user set no limit.
    """

    kernel: Kernel
    solver: RecurrenceSolver | None
    num_warmup: int
    num_samples: int
    num_chains: int
    thinning: int
    extra_fields: tuple[str, ...]
    warmup: Warmup
    devices: Sequence[jax.Device] = ()
    max_memory: int | None = None

    @property
    def uses_gradient(self) -> bool:
        """Whether warm-up or a step evaluates the gradient of the log density."""
        return self.kernel.uses_gradient or bool(self.num_warmup and self.warmup.uses_gradient)

    @classmethod
    def check(
        cls,
        target: Target,
        kernel: Any,
        solver: Any,
        num_warmup: Any,
        num_samples: Any,
        num_chains: Any,
        thinning: Any,
        extra_fields: Sequence[str],
        warmup: Any,
        devices: Any = None,
        max_memory: Any = None,
    ) -> "Settings":
        """Validate the arguments of `pmcmc.parallel_chain`, and fill in the defaults.

        Raises:
            ValueError: A value cannot be used; the message says what was expected and what to do.
            TypeError: A value has the wrong type.
        """
        kernel = HMC() if kernel is None else kernel
        if not isinstance(kernel, Kernel):
            hint = f" Write {kernel.__name__}() instead." if isinstance(kernel, type) else ""
            raise TypeError(f"kernel must be a pmcmc kernel such as HMC() or MALA(), got {kernel!r}.{hint}")
        if not (warmup is None or isinstance(warmup, Warmup)):
            raise TypeError(f"warmup must be a Warmup such as EnsembleAdaptation(), got {warmup!r}.")
        if not (isinstance(solver, RecurrenceSolver) or (isinstance(solver, str) and solver == "auto")):
            raise TypeError(
                f'solver must be "auto" or a solver such as pmcmc.recurrence.MultipleShooting(), got {solver!r}.'
            )
        for part in (kernel, solver):
            _check_registered(part)
        num_samples = as_int("num_samples", num_samples, 1)
        num_chains = as_int("num_chains", num_chains, 1)
        thinning = as_int("thinning", thinning, 1)
        num_warmup = as_int("num_warmup", num_warmup, 0)
        max_memory = None if max_memory is None else as_int("max_memory", max_memory, 1)
        if thinning > num_samples:
            raise ValueError(f"thinning={thinning} keeps none of num_samples={num_samples} steps: make it smaller.")
        kernel = with_discrete_sites(kernel, target)
        extra_fields = extra_fields if isinstance(extra_fields, str) else tuple(extra_fields)  # read more than once
        _check_kernel(kernel, extra_fields, num_warmup)
        warmup = _fitting_warmup(warmup, kernel)
        if not num_warmup and warmup.metric is not None:
            raise ValueError(
                "num_warmup=0 runs no warm-up, so the inverse_mass_matrix of warmup= would have no effect: pass it to "
                "the kernel, as in HMC(step_size=..., inverse_mass_matrix=...), or leave num_warmup at 1000."
            )
        if not num_warmup and isinstance(kernel, (GradientKernel, Compose)):  # else warm-up checks it
            check_metrics(target, kernel)
        solver = None if isinstance(solver, str) else solver
        devices = _devices(devices, solver)
        if solver is not None:
            solver.check_dtype(target.spec.dtype)
            solver = solver.with_devices(devices) if devices else solver
        sizes = num_warmup, num_samples, num_chains, thinning
        return cls(kernel, solver, *sizes, tuple(extra_fields), warmup, devices, max_memory)


def settings_of(chain: Chain | StoredChain, num_samples: Any, max_memory: Any) -> Settings:
    """Return the settings for steps that follow a chain.

    Raises:
        ValueError: There are fewer steps than lead to a draw.
    """
    if as_int("num_samples", num_samples, 1) < chain.thinning:
        raise ValueError(
            f"the chain keeps one draw in {chain.thinning} steps: take at least as many, got {num_samples}."
        )
    return Settings.check(
        chain.state.target,
        chain.state.kernel,
        "auto" if chain.solver is None else chain.solver,
        0,
        num_samples,
        chain.num_chains,
        chain.thinning,
        chain.extra_fields if isinstance(chain, Chain) else (),
        None,
        chain.devices,
        max_memory,
    )


def _check_registered(part: Any) -> None:
    """Raise an error if a kernel or solver is not a pytree, which would fail only after warm-up.

    Raises:
        TypeError: It is not.
    """
    if not isinstance(part, str) and any(leaf is part for leaf in jax.tree.leaves(part)):
        raise TypeError(
            f"{type(part).__name__} is not a pytree, so compiled programs cannot take it as an argument: decorate the "
            "class with @pmcmc.register_dataclass, above @dataclass(frozen=True)."
        )


def _check_kernel(kernel: Kernel, extra_fields: Sequence[str], num_warmup: int) -> None:
    """Raise an error if the kernel cannot do what was asked for.

    Raises:
        ValueError: The kernel has no such fields, needs a warm-up, or cannot be warmed up.
        TypeError: ``extra_fields`` is a string.
    """
    if isinstance(extra_fields, str):
        raise TypeError(f"extra_fields must be a sequence of names, got {extra_fields!r}: write ({extra_fields!r},).")
    unknown = set(extra_fields) - set(kernel.extra_fields)
    if unknown:
        raise ValueError(
            f"{type(kernel).__name__} has no extra_fields {sorted(unknown)}: expected names out of "
            f"{list(kernel.extra_fields)}."
        )
    if num_warmup == 0 and not kernel.is_tuned:
        parts = [block.kernel for block in kernel.blocks] if isinstance(kernel, Compose) else [kernel]
        who = next(type(part).__name__ for part in parts if not part.is_tuned)
        raise ValueError(
            f"num_warmup=0 tunes nothing, but {who}() has no step size: pass step_size=, or leave num_warmup at 1000."
        )
    if num_warmup and not kernel.takes_basis:
        raise ValueError(
            "a BlackJAX algorithm that is already built has its own log density and cannot be warmed up. Pass "
            "num_warmup=0, or its constructor and parameters, as in from_blackjax(blackjax.mala, step_size=None)."
        )


def check_reparam(target: Target, settings: Settings) -> None:
    """Raise an error if a target has partially centred sites, and what was asked for does not fit them.

    Raises:
        ValueError: Nothing chooses their centredness, or a metric was given for coordinates that are not known yet.
    """
    if not target.centredness:
        return
    kernel, warmup = settings.kernel, settings.warmup
    asked = "reparam=AutoReparam() chooses the coordinates of the sites during warm-up"
    if isinstance(kernel, SiteKernel):
        raise ValueError(
            f"{asked}, which needs a kernel over all sites at once, such as HMC(), got {type(kernel).__name__}: leave "
            "reparam out, or marginalise discrete sites out of the model."
        )
    if not settings.num_warmup:
        raise ValueError(f"{asked}, and num_warmup=0 runs none: leave num_warmup at 1000, or leave reparam out.")
    if not warmup.chooses_centredness:
        raise ValueError(
            f"{asked}, which {type(warmup).__name__} does not do: use EnsembleAdaptation(), the default, or leave "
            "reparam out."
        )
    if kernel.metric is not None or warmup.metric is not None:
        raise ValueError(
            f"{asked}, so no inverse_mass_matrix can be known before: leave it out, as well as adapt_mass_matrix=False "
            "of a NumPyro kernel, or leave reparam out."
        )


def _devices(devices: Any, solver: RecurrenceSolver | None) -> tuple[jax.Device, ...]:
    """Return the devices that share the work; empty for the default one.

    Raises:
        ValueError: There are none, they are of another platform than the default device, or "auto" should use several
            processes.
        TypeError: They are not a sequence of devices.
    """
    if devices is None:
        return ()
    if isinstance(devices, str) or not isinstance(devices, Sequence) or not all(map(_is_device, devices)):
        raise TypeError(f"devices must be a sequence of JAX devices such as jax.devices(), got {devices!r}.")
    if not devices:
        raise ValueError("devices is empty: pass jax.devices(), or leave it out for the default device.")
    default = default_platform()
    if other := {device.platform for device in devices} - {default}:
        raise ValueError(
            f"devices are of the platform {sorted(other)}, but the default device is of {default!r}: make the call "
            "within `with jax.default_device(devices[0]):`."
        )
    if solver is None and len({device.process_index for device in devices}) > 1:
        raise ValueError(
            'solver="auto" decides by timings, which differ from one process to the next: pass '
            "solver=MultipleShooting(num_blocks=...) for devices of several processes."
        )
    return tuple(devices)


def _is_device(value: Any) -> bool:
    """Return whether a value is a JAX device."""
    return isinstance(value, jax.Device)


def _fitting_warmup(warmup: Warmup | None, kernel: Kernel) -> Warmup:
    """Return the given warm-up, or the default for the kernel.

    Raises:
        TypeError: The given warm-up cannot tune the kernel.
    """
    by_sites = isinstance(kernel, SiteKernel)
    if warmup is None:
        return SiteAdaptation() if by_sites else EnsembleAdaptation()
    of_vectors = (EnsembleAdaptation, WindowAdaptation, ChEESAdaptation, Pathfinder)
    if isinstance(warmup, of_vectors if by_sites else SiteAdaptation):
        fitting = "SiteAdaptation()" if by_sites else "EnsembleAdaptation()"
        raise TypeError(
            f"{type(warmup).__name__} cannot warm up {type(kernel).__name__}: pass warmup={fitting}, or leave it out."
        )
    return warmup


def as_key(rng_key: PRNGKey | int) -> PRNGKey:
    """Return a threefry key made from an int seed or from a key of any of JAX's implementations, typed or raw.

    All noise of a run comes from this key. Keys of ``rbg`` and ``unsafe_rbg`` cannot be used directly: their bits under
    `jax.vmap` differ from those of single calls, so the noise would depend on the number of lanes that draw it.

    Raises:
        TypeError: ``rng_key`` is neither a seed nor a key.
    """
    if isinstance(rng_key, Integral) and not isinstance(rng_key, bool):
        return seed_key(int(rng_key))
    if isinstance(rng_key, np.ndarray) and rng_key.dtype == np.uint32:
        rng_key = jnp.asarray(rng_key)
    if isinstance(rng_key, jax.Array):
        typed = jnp.issubdtype(rng_key.dtype, jax.dtypes.prng_key)
        # Raw keys have 2 words for threefry, and 4 for rbg and unsafe_rbg.
        if rng_key.shape == () if typed else rng_key.dtype == jnp.uint32 and rng_key.shape in ((2,), (4,)):
            return threefry_key(rng_key)
    raise TypeError(
        f"rng_key must be one JAX key (jax.random.key(0)) or an int seed, got {rng_key!r}. For several chains pass "
        "num_chains, not several keys."
    )


class Starts(NamedTuple):
    """Positions where warm-up starts, or where the chains start if there is no warm-up.

    Attributes:
        find: Returns the positions, with leading axis ``number``. Drawn ones are evaluated, which needs a program.
        number: Number of positions (num_chains without warm-up).
        num_given: Number of starts that the user gave, one for each chain, which the positions repeat in turn; 1 if
            all chains share one, or if they were drawn.
    """

    find: Callable[[], PyTree]
    number: int
    num_given: int = 1


def spread_starts(target: Target, init_params: PyTree, num_chains: int, num_starts: int) -> PyTree:
    """Return starting positions made from one position, or from one per chain.

    Args:
        target: The target.
        init_params: Unconstrained values by site, with or without a leading axis num_chains.
        num_chains: Number of chains.
        num_starts: Number of starting positions.

    Returns:
        Positions with leading axis num_starts.

    Raises:
        ValueError: Names or shapes are not those of the target.
    """
    template = target.spec.template
    shapes = lambda tree: jax.tree.map(jnp.shape, tree)
    if jax.tree.structure(init_params) == jax.tree.structure(template):
        given, one = shapes(init_params), shapes(template)
        pick = jnp.arange(num_starts)
        if given == one:
            every = lambda x, like: jnp.repeat(jnp.asarray(x, like.dtype)[None], num_starts, axis=0)
            return jax.tree.map(every, init_params, template)
        if given == jax.tree.map(lambda s: (num_chains, *s.shape), template):
            return jax.tree.map(lambda x, like: jnp.asarray(x, like.dtype)[pick % num_chains], init_params, template)
    raise ValueError(
        "init_params must hold unconstrained values of the latent sites. Expected shapes "
        f"{shapes(template)}, with or without a leading axis num_chains={num_chains}, got {shapes(init_params)}."
    )


def fit_memory(engine: Engine, settings: Settings, held: int) -> None:
    """Set the memory budget of an engine, or raise if the shortest segment does not fit.

    With a budget given by the user, draws and engine share it. Without one, a solve of the engine may hold
    `SEGMENT_BYTES`, or less where less is available. In both cases everything must fit into the available memory.

    Args:
        engine: The engine; it may hold shapes only.
        settings: What the user asked for.
        held: Bytes of the draws of all chains that are kept in memory.

    Raises:
        MemoryError: The memory does not suffice. The message says how much is needed and available, and suggests a
            remedy.
    """
    num_steps, most, available = settings.num_samples, settings.max_memory, available_bytes()
    step = engine.bytes_per_step(settings.solver or Sequential())
    least = held + step * min(num_steps, LEAST_STEPS)
    if most is not None:
        if least > most:
            raise MemoryError(
                f"max_memory is {size_text(most)}, and the least is {size_text(least)}: {size_text(held)} for draws, "
                f"the rest for {LEAST_STEPS} steps of {engine.num_chains} chain(s) at once. Raise it. {_REMEDY}"
            )
        engine.max_bytes = most - held
    elif available - held < engine.max_bytes:
        engine.max_bytes = max(least - held, int(available - held))
    needed = max(least, held + min(num_steps * step, engine.max_bytes))
    if needed > available:
        raise MemoryError(
            f"{num_steps:,} steps of {engine.num_chains} chain(s) need about {size_text(needed)}, {size_text(held)} of "
            f"it for draws, and {size_text(available)} are available. {_REMEDY}"
        )
