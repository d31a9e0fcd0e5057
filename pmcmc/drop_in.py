"""`ParallelMCMC`: ``numpyro.infer.MCMC`` whose chains are sampled in parallel across their length.

NumPyro's samplers are translated into pmcmc's kernels and warm-ups; options without a counterpart are refused before
anything runs. `ParallelState` and `AdaptState` have the fields that NumPyro users expect in ``last_state``.
"""

from collections.abc import Callable, Sequence
from dataclasses import fields, is_dataclass, replace
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from numpyro.infer import MCMC
from numpyro.infer import NUTS as NumpyroNUTS
from numpyro.infer.mcmc import MCMCKernel

from pmcmc._pytree import Array, PRNGKey, PyTree
from pmcmc._xla.trace import Traced, Untraced, refuse_transformation
from pmcmc.chain.chain import Chain
from pmcmc.chain.draws import site_shapes, unconstrained
from pmcmc.chain.state import ChainState, Source, last_logdensity, model_source
from pmcmc.chain.stored import warmup_logdensity
from pmcmc.interop.blackjax import is_of_blackjax
from pmcmc.interop.numpyro import strategy_starts
from pmcmc.interop.partial_centring import AutoReparam
from pmcmc.kernels import Kernel
from pmcmc.numpyro_samplers import STEP_SIZE, check_metric_sites, keep_options, kernel_fields, translate
from pmcmc.random.streams import fold_key
from pmcmc.recurrence import RecurrenceSolver
from pmcmc.sampling.api import model_starts
from pmcmc.sampling.session import sample_from, sample_new, warm_up
from pmcmc.sampling.settings import Settings, as_key
from pmcmc.starts import check_starts
from pmcmc.target import Target
from pmcmc.warmup import Warmup
from pmcmc.warmup.base import scale_of_metric
from pmcmc.warmup.trajectories import with_length_of

__all__ = ["AdaptState", "ParallelMCMC", "ParallelState"]


class AdaptState(NamedTuple):
    """What warm-up tuned, as in NumPyro's ``HMCAdaptState``; with a leading axis num_chains if there are several.

    Attributes:
        step_size: The leapfrog step h, in units of the metric.
        inverse_mass_matrix: M^{-1} by the sites that it acts on, ``{(site, ...): array}``: diagonal (D,) or full
            (D, D), over the concatenated unconstrained values of these sites.
    """

    step_size: Array
    inverse_mass_matrix: dict[tuple[str, ...], Array]


class ParallelState(NamedTuple):
    """State of the chains of a `ParallelMCMC`: its ``last_state`` and ``post_warmup_state``.

    Attributes:
        z: Unconstrained values by site as in NumPyro, with a leading axis num_chains if there are several chains.
        potential_energy: Potential energy at z.
        rng_key: Key that continues this run: `ParallelMCMC.run` with it gives the draws that one long run would.
        chains: Everything else that the chains need to continue.
    """

    z: PyTree
    potential_energy: Array
    rng_key: PRNGKey
    chains: ChainState

    @property
    def adapt_state(self) -> AdaptState | None:
        """Step size and metric; None for kernels without a step size, such as `Compose`, and with `AutoReparam`, whose
        coordinates are not those of z.

        All chains share what warm-up found. To use it in another sampler, take that of one chain:
        ``NUTS(model, step_size=..., inverse_mass_matrix=..., adapt_step_size=False, adapt_mass_matrix=False)``.
        """
        target = self.chains.target
        kernel: Any = self.chains.kernel
        if "step_size" not in kernel.tunables or target.centredness:
            return None
        # Without a warm-up, the metric of the kernel was not turned into a basis.
        metric = kernel.metric
        if metric is None:
            metric = jnp.ones((), target.spec.dtype) if target.basis is None else target.basis.covariance
        metric = jnp.broadcast_to(metric, jnp.shape(metric) or (target.dim,))
        sites, num_chains = tuple(sorted(target.spec.template)), len(self.chains.own)
        found = AdaptState(jnp.asarray(kernel.step_size), {sites: metric})
        if num_chains == 1:
            return found
        return jax.tree.map(lambda x: jnp.broadcast_to(x, (num_chains, *x.shape)), found)


class ParallelMCMC(MCMC):
    """``numpyro.infer.MCMC`` with each chain solved in parallel across its length.

    To use it, change the one line that makes the MCMC object. Everything that reads draws is NumPyro's own:
    ``get_samples``, ``get_extra_fields``, ``print_summary``, ``Predictive``, ``log_likelihood``,
    ``arviz.from_numpyro``. The attribute ``chain`` is the underlying `Chain`, with its report.

    These options of NUTS and HMC are kept: ``model``, ``target_accept_prob``, ``dense_mass`` (True or False),
    ``max_tree_depth``, ``num_steps``, ``trajectory_length``, ``init_strategy``, ``adapt_step_size``,
    ``adapt_mass_matrix``, and ``step_size`` and ``inverse_mass_matrix`` if they are not adapted. If they are, NumPyro
    only starts from them, and pmcmc starts elsewhere. Steps of HMC are jittered. If ``trajectory_length`` is left out,
    its trajectories take the time that `HMC` tunes, at least 1.82, instead of 2 pi. Where steps are tuned, a trajectory
    has at most 64, with a warning if ``trajectory_length`` needs more. ``regularize_mass_matrix`` and
    ``find_heuristic_step_size`` have no effect: pmcmc has warm-ups of its own. Options that cannot be kept are refused.

    Args:
        sampler: ``numpyro.infer.NUTS(model, ...)`` or ``HMC(model, ...)``, translated as described above; or the model
            itself, sampled by ``kernel``.
        num_warmup, num_samples, num_chains, thinning: As in NumPyro; ``num_samples`` counts steps before thinning.
        postprocess_fn: Not supported; must be None.
        progress_bar: Whether to show progress, in terminals and notebooks only.
        chain_method, progress_rate, jit_model_args: Accepted without effect. Chains always run side by side, and new
            data of the same shapes never compile again.
        kernel: A pmcmc kernel, `HMC()` by default, if ``sampler`` is a model.
        solver, warmup, reparam: As in `pmcmc.parallel_chain`.

    Raises:
        TypeError: The sampler has no counterpart; the message says what to write instead.
        ValueError: An option has no counterpart; the message says what to write instead.

    Example:
        >>> import jax, numpyro, numpyro.distributions as dist, pmcmc
        >>> def model(y):
        ...     mu = numpyro.sample("mu", dist.Normal(0, 1))
        ...     numpyro.sample("y", dist.Normal(mu, 1), obs=y)
        >>> mcmc = pmcmc.ParallelMCMC(numpyro.infer.NUTS(model), num_warmup=200, num_samples=100)
        >>> mcmc.run(jax.random.key(0), 1.0)
        >>> mcmc.get_samples()["mu"].shape
        (100,)
    """

    _state: ParallelState | None
    _chains: ChainState | None

    def __init__(
        self,
        sampler: MCMCKernel | Callable,
        *,
        num_warmup: int,
        num_samples: int,
        num_chains: int = 1,
        thinning: int = 1,
        postprocess_fn: Callable | None = None,
        chain_method: str | Callable = "parallel",
        progress_bar: bool = True,
        progress_rate: int | None = None,
        jit_model_args: bool = False,
        kernel: Kernel | None = None,
        solver: RecurrenceSolver | str = "auto",
        warmup: Warmup | None = None,
        reparam: AutoReparam | None = None,
    ):
        given = warmup
        if postprocess_fn is not None:
            raise ValueError(
                "postprocess_fn cannot be used: make derived values numpyro.deterministic sites, or compute them from "
                "get_samples()."
            )
        if not isinstance(sampler, MCMCKernel):
            if not callable(sampler):
                raise TypeError(f"sampler must be numpyro.infer.NUTS(model), HMC(model) or the model, got {sampler!r}.")
            self._stands_for = ""
            sampler = NumpyroNUTS(sampler)  # a placeholder, in which NumPyro and ArviZ look for the model
        else:
            if kernel is not None:
                raise ValueError(
                    f"both {type(sampler).__name__} and kernel= choose the kernel: pass the model instead of the "
                    "former, or leave kernel= out."
                )
            self._stands_for = type(sampler).__name__
            kernel, adaptation = translate(sampler, num_warmup)
            warmup = adaptation if warmup is None else keep_options(warmup, sampler)
        if callable(chain_method) or chain_method in ("parallel", "sequential"):
            chain_method = "vectorized"  # NumPyro refuses other values
        super().__init__(
            sampler,
            num_warmup=num_warmup,
            num_samples=num_samples,
            num_chains=num_chains,
            thinning=thinning,
            chain_method=chain_method,
            progress_bar=progress_bar,
        )
        self._kernel, self._solver, self._warmup, self._warmup_given = kernel, solver, warmup, given
        self._reparam = reparam
        self._chain: Chain | None = None

    @property
    def _last_state(self) -> ParallelState | None:
        """Where the chains are, which NumPyro's methods read by this name; computed when it is first read."""
        if self._state is None and self._chains is not None:
            self._state = _standing(self._chains)
        return self._state

    @_last_state.setter
    def _last_state(self, state: ParallelState | None) -> None:
        self._state, self._chains = state, None

    @property
    def chain(self) -> Chain:
        """The `Chain` of the last `run`.

        Raises:
            ValueError: `run` was not called yet.
        """
        if self._chain is None:
            raise ValueError("there is no chain yet: call run() first.")
        return self._chain

    def warmup(self, rng_key, *args, extra_fields=(), collect_warmup=False, init_params=None, **kwargs) -> None:
        """Tune only; `run` then starts from ``post_warmup_state``. Arguments are those of `run`.

        Raises:
            ValueError: ``collect_warmup`` is True: warm-up runs a separate ensemble, whose draws belong to no chain.
        """
        if collect_warmup:
            raise ValueError(
                "collect_warmup=True is not possible: warm-up runs a separate ensemble, whose draws belong to no "
                "chain. To see them use pmcmc.parallel_chain(model, ..., save_warmup=True).get_warmup_samples(); to "
                "see a chain from its start, use num_warmup=0 and a step size."
            )
        self._args, self._kwargs, self._warmup_state = args, kwargs, None
        source, key, settings = self._prepare(rng_key, extra_fields)
        starts = model_starts(source.target, key, self._init_params(key, init_params), settings)
        state = warm_up(source, key, starts, settings, self.progress_bar)
        self._last_state = self._warmup_state = _standing(state)

    def run(self, rng_key, *args, extra_fields=(), init_params=None, **kwargs) -> None:
        """Warm up, unless there is a ``post_warmup_state``, and sample.

        Args:
            rng_key: A key. Of a batch with one key for each chain, the first is used. If it equals
                ``post_warmup_state.rng_key``, the chains continue as one long run would; any other key gives new noise.
                Thinning continues with the noise: if ``thinning`` does not divide ``num_samples``, a run that continues
                may keep one draw more than the run before it.
            *args: Arguments of the model.
            extra_fields: Names as in NumPyro: fields of the kernel, ``"adapt_state.step_size"``, ``"z.site"`` for
                unconstrained values, ``"~z.site"`` to leave a site out.
            init_params: Unconstrained starting values by site, with a leading axis num_chains if there are several
                chains.
            **kwargs: Keyword arguments of the model.
        """
        self._args, self._kwargs = args, kwargs
        extra_fields = extra_fields if isinstance(extra_fields, str) else tuple(extra_fields)  # read more than once
        source, key, settings = self._prepare(rng_key, extra_fields)
        if self._warmup_state is None:
            starts = model_starts(source.target, key, self._init_params(key, init_params), settings)
            chain = sample_new(source, key, starts, settings, self.progress_bar)
        else:
            chain = sample_from(self._go_on(source, key, settings.kernel), settings, self.progress_bar)
        self._chain = chain
        self._last_state, self._chains = None, chain.state
        self._states, self._states_flat = _states(chain, extra_fields), None

    def _prepare(self, rng_key: Any, extra_fields: Sequence[str]) -> tuple[Source, PRNGKey, Settings]:
        refuse_transformation("ParallelMCMC.run", rng_key, self._args, self._kwargs)
        source = model_source(self.sampler.model, self._args, self._kwargs, self._reparam)
        target = source.target
        if self._stands_for and self._warmup_given is None and target.model.supports:
            raise ValueError(
                f"{self._stands_for} has no counterpart for models with discrete latent sites, here "
                f"{[name for name, _ in target.model.supports]}: NumPyro sums over their values, pmcmc draws them "
                "by Gibbs. Write ParallelMCMC(model, ...) instead of "
                f"ParallelMCMC({self._stands_for}(model, ...), ...)."
            )
        if isinstance(rng_key, (jax.Array, np.ndarray)) and rng_key.shape:
            typed = jnp.issubdtype(rng_key.dtype, jax.dtypes.prng_key)
            if rng_key.ndim == (1 if typed else 2) and len(rng_key) == self.num_chains:
                rng_key = rng_key[0]
        check_metric_sites(self.sampler._inverse_mass_matrix, target)
        settings = self._settings(target)
        settings = replace(settings, extra_fields=kernel_fields(target, settings.kernel, extra_fields))
        return source, as_key(rng_key), settings

    def _settings(self, target: Target) -> Settings:
        sizes = self.num_warmup, self.num_samples, self.num_chains, self.thinning
        return Settings.check(target, self._kernel, self._solver, *sizes, (), self._warmup)

    def _init_params(self, rng_key: PRNGKey, given: PyTree) -> PyTree:
        """Return the given starts, or those of the sampler's strategy; None for the default of NumPyro and pmcmc."""
        if given is not None:
            return given
        sampler = self.sampler
        return strategy_starts(
            sampler.model, self._args, self._kwargs, sampler._init_strategy, rng_key, self.num_chains
        )

    def _go_on(self, source: Source, rng_key: PRNGKey, kernel: Kernel) -> ChainState:
        """Continue from ``post_warmup_state``, with the model's arguments of this run; ``kernel`` is not tuned."""
        state = self._warmup_state
        if not isinstance(state, ParallelState):
            raise TypeError(
                f"post_warmup_state must be None or the last_state of a ParallelMCMC, got {type(state).__name__}: "
                "states of NumPyro's own samplers do not hold what is needed. Pass init_params= instead."
            )
        chains, target = state.chains, source.target
        shapes = [{name: c.shape for name, c in t.centredness.items()} for t in (target, chains.target)]
        if shapes[0] != shapes[1]:
            raise ValueError(
                "post_warmup_state was made with another reparam=: pass the same again, or set it to None to warm up "
                "again."
            )
        if len(chains.own) != self.num_chains or target.spec != chains.target.spec:
            raise ValueError(
                "post_warmup_state has another number of chains, or latent sites of other names or shapes: set it to "
                "None to warm up again."
            )
        _check_kernel(kernel, chains)
        source, _ = source.with_kernel(kernel)
        target = source.target
        data = jax.random.key_data
        num_unkept = chains.num_unkept % self.thinning
        if not np.array_equal(data(rng_key), data(chains.rng_key)):
            # Do not use the key itself: it may have drawn these steps before, and chains that share noise would merge.
            rng_key, num_unkept = fold_key(rng_key, chains.num_steps + 1), 0
        target = target.with_centredness(chains.target.centredness).with_basis(chains.target.basis)
        chains = chains._replace(target=target, rng_key=rng_key, num_unkept=num_unkept, source=source)
        _check_standing(chains)
        return chains


def _check_standing(chains: ChainState) -> None:
    """Raise an error if the log density is not finite where chains stand, as with other data than before.

    Raises:
        ValueError: It is not finite there; the message says why.
    """
    if np.isfinite(last_logdensity(chains)).all():  # by a program that the run before has compiled
        return
    target = chains.target
    try:
        positions = jax.vmap(lambda x: chains.kernel.position(target, x))(chains.unknown)
        check_starts(target, positions, chains.kernel.uses_gradient)
    except ValueError as error:
        raise ValueError(
            "post_warmup_state was made with other data, and the chains cannot go on from where they stand: "
            f"{error} To warm up with the new data, set post_warmup_state to None."
        ) from error


def _check_kernel(kernel: Kernel, chains: ChainState) -> None:
    """Raise an error if a kernel is another than that of the chains, or leaves something else to be tuned.

    Functions are traced for the data that the chains were sampled with, so that other data are no change of the kernel.

    Raises:
        ValueError: It is; the message says in what.
    """
    asked, basis, otherwise = kernel, chains.target.basis, "or set post_warmup_state to None to warm up again."
    if chains.kernel.metric is None and kernel.metric is not None:  # warm-up has made it the basis
        scale = scale_of_metric(kernel.metric, chains.target.dim)
        if basis is None or basis.scale.shape != scale.shape or not np.allclose(basis.scale, scale, rtol=1e-4):
            raise ValueError(
                "post_warmup_state is a state in another metric than the inverse_mass_matrix of this ParallelMCMC: "
                f"make it with the same sampler or kernel, {otherwise}"
            )
        asked = kernel.without_metric()
    asked = with_length_of(asked, chains.kernel)
    if not _could_be_tuned_to(asked, chains.kernel):
        raise ValueError(
            f"post_warmup_state is a state of {_name(chains.kernel, asked)}, and this ParallelMCMC samples by "
            f"{_name(asked, chains.kernel)}: make it with the same sampler or kernel, {otherwise}"
        )
    if not chains.source.with_kernel(kernel)[0].has_kernel_of(chains.source):
        raise ValueError(
            "functions in the kernel compute something else than when post_warmup_state was made: restore what they "
            f"read, pass the same functions, {otherwise}"
        )


def _could_be_tuned_to(asked: Any, tuned: Any) -> bool:
    """Whether warm-up could have turned ``asked`` into ``tuned``: every setting that was given is unchanged.

    A setting of None is left to warm-up. Functions of the user's own are compared by what they compute, elsewhere,
    since they may have been defined again.
    """
    if asked is None:
        return True
    if isinstance(asked, (Untraced, Traced)):
        return isinstance(tuned, (Untraced, Traced))
    if type(asked) is not type(tuned) and (is_dataclass(asked) or is_dataclass(tuned)):
        return False
    if is_dataclass(asked):
        names = [f.name for f in fields(asked)]
        return all(_could_be_tuned_to(getattr(asked, name), getattr(tuned, name)) for name in names)
    if callable(asked):
        return asked == tuned or (callable(tuned) and not (is_of_blackjax(asked) or is_of_blackjax(tuned)))
    if isinstance(asked, dict):
        return set(asked) == set(tuned) and all(_could_be_tuned_to(asked[name], tuned[name]) for name in asked)
    if isinstance(asked, (tuple, list)):
        return len(asked) == len(tuned) and all(map(_could_be_tuned_to, asked, tuned))
    if isinstance(asked, jax.Array) and jnp.issubdtype(asked.dtype, jax.dtypes.prng_key):
        words = jax.random.key_data
        return getattr(tuned, "dtype", None) == asked.dtype and np.array_equal(words(asked), words(tuned))
    if isinstance(asked, (int, float, np.ndarray, np.generic, jax.Array)):
        tuned = np.asarray(tuned)  # compare in the precision of the chain, which may be lower
        return tuned.dtype != object and np.array_equal(np.asarray(asked, tuned.dtype), tuned)
    return bool(asked == tuned)


def _name(kernel: Kernel, other: Kernel) -> str:
    """Name a kernel in a message about two kernels: its class if that tells them apart, else its repr."""
    return repr(kernel) if type(kernel) is type(other) else type(kernel).__name__


def _standing(state: ChainState) -> ParallelState:
    target = state.target
    if target.centredness:  # chains move in other coordinates, with another density
        positions = unconstrained(target, state.kernel, state.unknown)
        rows = np.asarray(jax.vmap(target.spec.ravel)(positions))
        potential = jnp.asarray(-warmup_logdensity(target.as_written, rows[:, None])[:, 0])
    else:
        positions = jax.vmap(lambda x: state.kernel.position(target, x))(state.unknown)
        potential = jnp.asarray(-last_logdensity(state))
    if len(state.own) == 1:
        positions, potential = jax.tree.map(lambda x: x[0], (positions, potential))
    return ParallelState(positions, potential, state.rng_key, state)


def _states(chain: Chain, extra_fields: Sequence[str]) -> dict[str, Any]:
    """Return what NumPyro's methods read: arrays (num_chains, draws, ...) by field, with the samples under ``z``."""
    wanted = None
    if any(name.startswith("~") for name in extra_fields):  # do not compute the sites that are left out
        wanted = [name for name in site_shapes(chain.target) if f"~z.{name}" not in extra_fields]
    states = {"z": dict(chain.get_samples(True, sites=wanted)), **chain.get_extra_fields(group_by_chain=True)}
    if any(name.startswith("z.") for name in extra_fields):
        positions = _positions(chain)
        states |= {name: positions[name[2:]] for name in extra_fields if name.startswith("z.")}
    if STEP_SIZE in extra_fields:
        step_size = jnp.asarray(chain.kernel.tunables.get("step_size", jnp.nan))
        states[STEP_SIZE] = jnp.broadcast_to(step_size, (chain.num_chains, chain.num_samples))
    return states


def _positions(chain: Chain) -> dict[str, Array]:
    """Return the unconstrained draws by site."""
    one = lambda x: chain.target.unconstrained(chain.kernel.position(chain.target, x))
    return jax.jit(jax.vmap(jax.vmap(one)))(chain.unknowns)
