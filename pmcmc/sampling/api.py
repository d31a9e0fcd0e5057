"""The public functions: `parallel_chain` for NumPyro models, `sample` for plain log densities.

Both check their arguments (`Settings.check`), say how starting positions are found (`Starts`), and pass them to
`pmcmc.sampling.session.sample_new`.
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from pmcmc._pytree import PRNGKey, PyTree
from pmcmc._xla.trace import refuse_transformation
from pmcmc.chain.chain import Chain
from pmcmc.chain.state import Source, density_source, model_source
from pmcmc.interop.numpyro_starts import numpyro_starts, strategy_starts
from pmcmc.interop.partial_centring import AutoReparam
from pmcmc.kernels import Kernel
from pmcmc.random.streams import fold_key
from pmcmc.recurrence import RecurrenceSolver
from pmcmc.sampling.session import WarmupRecord, sample_new
from pmcmc.sampling.settings import Settings, Starts, as_key, spread_starts
from pmcmc.target import Target
from pmcmc.warmup import Warmup
from pmcmc.warmup.centredness import own_positions


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
    init_strategy: Callable | None = None,
    extra_fields: Sequence[str] = (),
    save_warmup: bool = False,
    warmup: Warmup | None = None,
    reparam: AutoReparam | None = None,
    devices: Sequence[jax.Device] | None = None,
    max_memory: int | None = None,
    progress_bar: bool = True,
) -> Chain:
    """Sample the posterior of a NumPyro model, with each chain solved in parallel across its length.

    Args:
        model: A NumPyro model. Its latent sites are continuous, or discrete with finite support; the latter are sampled
            by `DiscreteGibbs` and returned as integers.
        rng_key: A JAX key, or an int seed. The draws are a function of it, whatever solver or blocks are used.
        model_args: Positional arguments of the model, data included.
        model_kwargs: Keyword arguments of the model, data included.
        kernel: Default: `HMC()`. Tunable fields that are None are set by warm-up. If there are discrete sites, a kernel
            over vectors becomes ``Compose([DiscreteGibbs(), (kernel, continuous sites)])``, or `DiscreteGibbs()` if all
            sites are discrete.
        solver: "auto" or any `RecurrenceSolver`. "auto" samples sequentially, unless coupled chains merge in a short
            pilot and blocks (`MultipleShooting`), DEER or quasi-DEER are predicted to save a quarter of the time, or
            blocks may do so and trying them risks less than a tenth.
        num_warmup: Number of warm-up steps. With 0 there is no warm-up, and the kernel must have a step size.
        num_samples: Number of steps per chain after warm-up, of which every ``thinning``-th is kept.
        num_chains: Number of chains.
        thinning: Number of steps per draw that is kept.
        init_params: Unconstrained starting values by site, for all chains or with a leading axis num_chains. None:
            continuous sites are drawn uniformly on (-2, 2) as in NumPyro, discrete ones uniformly on their values, or
            from their prior where uniform values are impossible.
        init_strategy: How NumPyro finds starting values, one for each chain: ``numpyro.infer.init_to_median``,
            ``init_to_value(values=...)``, ``init_to_sample``, ``init_to_uniform(radius=...)`` and so on. None: see
            ``init_params``, which models with discrete latent sites take instead.
        extra_fields: Names for `Chain.get_extra_fields`, as NumPyro spells them.
        save_warmup: Whether to keep the draws of the lanes of warm-up, for `Chain.get_warmup_samples` and
            `Chain.to_arviz`.
        warmup: Default: `EnsembleAdaptation()`; for `Gibbs`, `DiscreteGibbs` and `Compose` `SiteAdaptation()`. Its
            time does not depend on num_chains.
        reparam: `AutoReparam()` to choose during warm-up how far each element of a hierarchy is centred. None: sites
            are sampled as they are written.
        devices: Devices that share the blocks, or the steps of Newton's method, such as ``jax.devices()``. None: "auto"
            uses all devices of this process if it expects a gain, and any other solver uses JAX's default device. The
            draws do not depend on the devices. The cores of a CPU are used without it: threads share chains and blocks
            (docs/devices.md).
        max_memory: Bytes for the draws and for what one solve holds (noise, states, info) together; the run is cut into
            segments that fit. None: 512 MiB for a solve, and the available memory for draws. Compiled programs and the
            model's intermediate arrays come on top. `Chain.stream` writes draws to disk instead.
        progress_bar: Whether to show finished steps, sweeps and the remaining time, in terminals and notebooks only.

    Returns:
        A `Chain`. Its ``report`` says what was decided and certified.

    Raises:
        ValueError: A size, shape, model or density cannot be used; raised before any sampling.
        TypeError: An argument has the wrong type; raised before any sampling.
        WarmupError: Warm-up found no way to sample.
        MemoryError: The draws and the shortest segment do not fit into memory; raised before warm-up where it
            is known what warm-up returns, otherwise after it.
        Interrupted: Ctrl-C; its ``chain`` holds the draws so far.
        NonFiniteState: A chain reached a state that is not finite; its ``chain`` holds the draws before it, or is None
            if there are none.
        Warning: A filter of Python's ``warnings`` raises one of the warnings on the draws; its ``chain`` holds them.

    Warns:
        UserWarning: Warm-up did not settle, or some of its lanes did not move.
        UserWarning: A chain accepted no move, or one of its coordinates never moved.
        UserWarning: More than 1 % of the draws were divergent.
        UserWarning: The draws have not mixed.
        UserWarning: A ``solver`` passed by the user failed before it had solved a tenth of any chain. If it solved more
            before it failed, or if "auto" chose it, only the report says so.

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
    source = model_source(model, model_args, model_kwargs, reparam)
    target = source.target
    settings = Settings.check(
        target, kernel, solver, num_warmup, num_samples, num_chains, thinning, extra_fields, warmup, devices, max_memory
    )
    record = _warmup_record(settings, save_warmup)
    if init_strategy is not None:
        check_strategy(target, init_params, init_strategy)
        sizes = settings.num_chains, settings.uses_gradient
        init_params = strategy_starts(model, model_args, model_kwargs, init_strategy, key, *sizes)
    starts = model_starts(source, key, init_params, settings)
    return sample_new(source, key, starts, settings, progress_bar, record)


def check_strategy(target: Target, init_params: PyTree, init_strategy: Any) -> None:
    """Raise an error if starts cannot be found by a strategy.

    Raises:
        ValueError: Starts are given too, or the model has discrete latent sites.
        TypeError: The strategy is not callable.
    """
    if init_params is not None:
        raise ValueError("init_params and init_strategy both say where chains start: leave one of them out.")
    if not callable(init_strategy):
        raise TypeError(f"init_strategy must be one of NumPyro's, such as init_to_median, got {init_strategy!r}.")
    if target.model.supports:
        raise ValueError(
            f"init_strategy finds no values for the discrete sites {[name for name, _ in target.model.supports]}: pass "
            "init_params, or leave both out."
        )


def _warmup_record(settings: Settings, save_warmup: bool) -> WarmupRecord | None:
    """Return a record for the draws of warm-up; None if they are not wanted.

    Raises:
        ValueError: They are wanted, but there is no warm-up or it does not show its draws.
    """
    if not save_warmup:
        return None
    if not settings.num_warmup:
        raise ValueError("save_warmup=True with num_warmup=0: there is no warm-up to save. Leave one of them out.")
    if not settings.warmup.shows_path:
        raise ValueError(
            f"save_warmup=True is not possible with {type(settings.warmup).__name__}, whose draws never leave its "
            "program: use EnsembleAdaptation(), the default except for Gibbs, DiscreteGibbs and Compose, or leave it "
            "out."
        )
    return WarmupRecord()


def model_starts(source: Source, rng_key: PRNGKey, init_params: PyTree, settings: Settings) -> Starts:
    """Return where warm-up starts, or the chains if there is no warm-up.

    Positions are drawn once they are asked for (`numpyro_starts`), or made from those that the user passed.
    """
    target = source.target
    leaves, template = jax.tree.leaves(init_params), jax.tree.leaves(target.spec.template)
    per_chain = bool(leaves) and np.ndim(leaves[0]) > np.ndim(template[0])
    num_starts = _count_starts(target, settings, per_chain)
    if init_params is None:
        find = partial(numpyro_starts, target, fold_key(rng_key, 0), num_starts, settings.uses_gradient, source.prior)
        return Starts(find, num_starts)
    positions = spread_starts(target, init_params, settings.num_chains, num_starts)
    return Starts(lambda: own_positions(target, positions), num_starts, settings.num_chains if per_chain else 1)


def _count_starts(target: Target, settings: Settings, per_chain: bool) -> int:
    """Return the number of positions where warm-up starts, or the chains if there is no warm-up.

    Args:
        target: The target.
        settings: What the user asked for.
        per_chain: Whether the user gave a start for each chain.

    Raises:
        TypeError, ValueError: The kernel does not fit the target.
        ValueError: The warm-up would leave out some of the given starts.
    """
    settings.kernel.check(target)
    if not settings.num_warmup:
        return settings.num_chains
    num_given = settings.num_chains if per_chain else 1
    number = settings.warmup.count_starts(target, num_given)
    if number < num_given:
        raise ValueError(
            f"{type(settings.warmup).__name__} runs from {number} starts, but one is given for each of {num_given} "
            "chains: pass one start for all chains, another warmup=, or num_warmup=0."
        )
    return number


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
    init_per_chain: bool = False,
    extra_fields: Sequence[str] = (),
    save_warmup: bool = False,
    warmup: Warmup | None = None,
    devices: Sequence[jax.Device] | None = None,
    max_memory: int | None = None,
    progress_bar: bool = True,
) -> Chain:
    """Sample ``exp(logdensity_fn(position))`` over unconstrained positions, with each chain solved in parallel.

    Errors and warnings are those of `parallel_chain`.

    Args:
        logdensity_fn: ``position -> scalar``, as it is at the time of the call: arrays that it reads may change between
            two calls, and nothing is compiled again if their shapes stay the same. None for kernels that evaluate no
            density, such as `Gibbs`.
        initial_position: Any pytree of floating arrays, where all lanes of warm-up start; see ``init_per_chain``. For
            `Gibbs`, `DiscreteGibbs` and `Compose` a dict of sites, which may contain integers.
        rng_key: See `parallel_chain`, as for all arguments below.
        kernel: Default: `HMC()`.
        solver: "auto" or any `RecurrenceSolver`.
        num_warmup: Number of warm-up steps; 0 for none.
        num_samples: Number of steps per chain after warm-up.
        num_chains: Number of chains.
        thinning: Number of steps per draw that is kept.
        init_per_chain: Whether the arrays of ``initial_position`` have a leading axis num_chains, with one start for
            each chain.
        extra_fields: Names for `Chain.get_extra_fields`.
        save_warmup: Whether to keep the draws of warm-up.
        warmup: Default: `EnsembleAdaptation()`, or `SiteAdaptation()` for kernels over sites.
        devices: Devices that share the work; None for the default.
        max_memory: Bytes for the draws and for what one solve holds; None for the default.
        progress_bar: Whether to show progress.

    Returns:
        A `Chain`, whose ``get_samples()`` returns the pytree of the position.

    Example:
        >>> import jax.numpy as jnp, pmcmc
        >>> logdensity = lambda x: -0.5 * jnp.sum(x["a"] ** 2)
        >>> chain = pmcmc.sample(logdensity, {"a": jnp.zeros(3)}, 1, num_samples=100, progress_bar=False)
        >>> chain.get_samples()["a"].shape
        (400, 3)
    """
    refuse_transformation("sample", rng_key, initial_position)
    first = _first_chain(initial_position, num_chains) if init_per_chain else initial_position
    source = density_source(logdensity_fn, first)
    target = source.target
    settings = Settings.check(
        target, kernel, solver, num_warmup, num_samples, num_chains, thinning, extra_fields, warmup, devices, max_memory
    )
    num_starts = _count_starts(target, settings, init_per_chain)
    # In numpy, like everything between programs: each operation of JAX would be one more program to compile.
    in_numpy = lambda x: np.asarray(jnp.asarray(x))
    each = initial_position if init_per_chain else jax.tree.map(lambda x: in_numpy(x)[None], initial_position)
    positions = jax.tree.map(lambda x: in_numpy(x)[np.arange(num_starts) % len(x)], each)
    starts = Starts(lambda: positions, num_starts, settings.num_chains if init_per_chain else 1)
    record = _warmup_record(settings, save_warmup)
    return sample_new(source, as_key(rng_key), starts, settings, progress_bar, record)


def _first_chain(positions: PyTree, num_chains: int) -> PyTree:
    """Return the first of the positions with a leading axis num_chains.

    Raises:
        ValueError: An array has another leading axis.
    """
    shapes = [np.shape(x) for x in jax.tree.leaves(positions)]
    if any(shape[:1] != (num_chains,) for shape in shapes):
        raise ValueError(
            f"init_per_chain=True needs arrays with a leading axis num_chains={num_chains} in initial_position, got "
            f"shapes {shapes}."
        )
    return jax.tree.map(lambda x: np.asarray(x)[0], positions)
