"""The public face: ``parallel_chain`` for NumPyro models, ``sample`` for plain log densities."""

from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np

from pmcmc._typing import PRNGKey, PyTree
from pmcmc._xla.trace import refuse_transformation
from pmcmc.chain.chain import Chain
from pmcmc.chain.state import density_source, model_source
from pmcmc.interop.numpyro_starts import numpyro_starts
from pmcmc.kernels import Kernel
from pmcmc.recurrence import RecurrenceSolver
from pmcmc.sampling.session import sample_new
from pmcmc.sampling.settings import Settings, as_key, spread_starts
from pmcmc.sampling.warm_up import WarmupRecord
from pmcmc.target import Target
from pmcmc.warmup import Warmup


def parallel_chain(
    model: Callable,
    rng_key: PRNGKey | int,
    *,
    model_args: tuple = (),
    model_kwargs: dict | None = None,
    kernel: Kernel | None = None,
    solver: RecurrenceSolver | str = "auto",
    num_warmup: int = 1000,
    num_samples: int = 10_000,
    num_chains: int = 4,
    thinning: int = 1,
    init_params: PyTree = None,
    extra_fields: Sequence[str] = (),
    save_warmup: bool = False,
    warmup: Warmup | None = None,
    devices: Sequence[jax.Device] | None = None,
    max_memory: int | None = None,
    progress_bar: bool = True,
) -> Chain:
    """Sample a NumPyro model's posterior, each chain solved in parallel across its length.

    model: a NumPyro model. model_args, model_kwargs: its arguments, data included. Its latent sites are continuous, or
        discrete with finite support; the latter are drawn by `DiscreteGibbs` and returned as integers.
    rng_key: a JAX key, or an int seed. The draws are a function of it, whatever solver or blocks are used.
    kernel: `HMC()` by default; tunables left None are set by warm-up. Where there are discrete sites, one that needs
        gradients becomes ``Compose([DiscreteGibbs(), (kernel, continuous sites)])``.
    solver: "auto" samples in order unless a short pilot of coupled chains merges and blocks (`MultipleShooting`), DEER
        or quasi-DEER should save a quarter of the time; or any `RecurrenceSolver`.
    num_warmup: steps of warm-up, 0 for none (then the kernel's tunables must be given).
    num_samples: steps per chain after warm-up; every ``thinning``-th is kept.
    init_params: unconstrained starting values by site, for all chains or with a leading axis num_chains.
    extra_fields: names for `Chain.get_extra_fields`, as NumPyro spells them.
    warmup: `EnsembleAdaptation()` by default, `SiteAdaptation()` for `Gibbs`, `DiscreteGibbs` and `Compose`; its
        seconds do not depend on num_chains.
    save_warmup: keep the draws of warm-up's lanes for `Chain.get_warmup_samples` and `Chain.to_arviz`.
    devices: that share the blocks, or Newton's steps, such as ``jax.devices()``. Left out, "auto" takes all of this
        process where it expects a gain, any other solver the one that JAX uses by default. The draws are the same. For
        the cores of a CPU call ``numpyro.set_host_device_count`` first (docs/devices.md).
    max_memory: bytes for the draws and for what one solve holds (noise, states, info) together: the run is cut into
        segments that fit. None: 512 MiB a solve, and for draws what the system has. Compiled programs and the model's
        own intermediates come on top. `Chain.stream` writes draws to disk instead.
    progress_bar: draws that stand, sweeps and the time left, in terminals and notebooks; elsewhere nothing is shown.

    Returns:
        A `Chain`; its ``report`` says what was decided and certified.

    Raises:
        ValueError, TypeError: before any sampling, for sizes, shapes, models and densities that cannot be used.
        WarmupError: warm-up found nothing to sample with.
        MemoryError: the draws and the shortest segment do not fit into memory; before any sampling.
        Interrupted: Ctrl-C; what was sampled so far is its ``chain``.
        NonFiniteState: a chain reached a state that is not finite; the draws from before are its ``chain``.

    Warns:
        UserWarning: warm-up did not settle or some of its lanes did not move, a chain accepted no move, a coordinate of
            one never moved, more than 1 % of the draws were divergent, the draws have not mixed, or a ``solver`` that
            you chose failed before it had solved a tenth of any chain. Where it solved more before it failed, or "auto"
            chose it, the report says so and nothing is warned of.

    Example:
        >>> import numpyro, numpyro.distributions as dist, pmcmc
        >>> def model(y):
        ...     mu = numpyro.sample("mu", dist.Normal(0, 1))
        ...     numpyro.sample("y", dist.Normal(mu, 1), obs=y)
        >>> chain = pmcmc.parallel_chain(model, 0, model_args=(1.0,), num_samples=200, progress_bar=False)
        >>> chain.get_samples(group_by_chain=True)["mu"].shape
        (4, 200)
    """
    model_kwargs = {} if model_kwargs is None else model_kwargs
    refuse_transformation("parallel_chain", rng_key, model_args, model_kwargs, init_params)
    key = as_key(rng_key)
    source = model_source(model, model_args, model_kwargs)
    target = source.target
    settings = Settings.check(
        target, kernel, solver, num_warmup, num_samples, num_chains, thinning, extra_fields, warmup, devices, max_memory
    )
    record = _warmup_record(settings, save_warmup)
    starts = model_starts(target, key, init_params, settings)
    return sample_new(source, key, starts, settings, progress_bar, record)


def _warmup_record(settings: Settings, save_warmup: bool) -> WarmupRecord | None:
    """Where warm-up's draws go; None where they are not wanted.

    Raises:
        ValueError: they are, and there are none to be had.
    """
    if not save_warmup:
        return None
    if not settings.num_warmup:
        raise ValueError("save_warmup=True with num_warmup=0: there is no warm-up to save. Leave one of them out.")
    if not settings.warmup.shows_path:
        raise ValueError(
            f"save_warmup=True is not possible with {type(settings.warmup).__name__}, whose draws never leave its "
            "program: use EnsembleAdaptation(), the default for kernels that take gradients, or leave it out."
        )
    return WarmupRecord()


def model_starts(target: Target, rng_key: PRNGKey, init_params: PyTree, settings: Settings) -> PyTree:
    """Positions where warm-up starts, or the chains without one: drawn as NumPyro does, or those given."""
    num_starts = settings.warmup.num_starts if settings.num_warmup else settings.num_chains
    if init_params is None:
        return numpyro_starts(target, jax.random.fold_in(rng_key, 0), num_starts)
    return spread_starts(target, init_params, settings.num_chains, num_starts)


def sample(
    logdensity_fn: Callable | None,
    initial_position: PyTree,
    rng_key: PRNGKey | int,
    *,
    kernel: Kernel | None = None,
    solver: RecurrenceSolver | str = "auto",
    num_warmup: int = 1000,
    num_samples: int = 10_000,
    num_chains: int = 4,
    thinning: int = 1,
    extra_fields: Sequence[str] = (),
    save_warmup: bool = False,
    warmup: Warmup | None = None,
    devices: Sequence[jax.Device] | None = None,
    max_memory: int | None = None,
    progress_bar: bool = True,
) -> Chain:
    """Sample ``exp(logdensity_fn(position))`` over unconstrained positions, each chain parallel across its length.

    logdensity_fn: ``position -> scalar``, as it is now: arrays that it reads may change between two calls, and nothing
        is compiled again where their shapes stay. None for kernels that evaluate none: `Gibbs`.
    initial_position: any pytree of floating arrays; every chain's warm-up starts there. For `Gibbs`, `DiscreteGibbs`
        and `Compose` a dict of sites, integers among them if need be.
    Other arguments, result and errors as in `parallel_chain`. ``get_samples()`` has the position's own pytree.

    Example:
        >>> import jax.numpy as jnp, pmcmc
        >>> logdensity = lambda x: -0.5 * jnp.sum(x["a"] ** 2)
        >>> chain = pmcmc.sample(logdensity, {"a": jnp.zeros(3)}, 1, num_samples=100, progress_bar=False)
        >>> chain.get_samples()["a"].shape
        (400, 3)
    """
    refuse_transformation("sample", rng_key, initial_position)
    source = density_source(logdensity_fn, initial_position)
    target = source.target
    settings = Settings.check(
        target, kernel, solver, num_warmup, num_samples, num_chains, thinning, extra_fields, warmup, devices, max_memory
    )
    num_starts = settings.warmup.num_starts if num_warmup else num_chains
    # by numpy, as all that happens between programs: every operation of jax's own is one more program to compile
    starts = jax.tree.map(lambda x: np.repeat(np.asarray(jnp.asarray(x))[None], num_starts, axis=0), initial_position)
    record = _warmup_record(settings, save_warmup)
    return sample_new(source, as_key(rng_key), starts, settings, progress_bar, record)
