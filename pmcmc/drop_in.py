"""`ParallelMCMC`: ``numpyro.infer.MCMC`` whose chains are sampled in parallel across their length.

NumPyro's samplers are translated into pmcmc's kernels and warm-ups; options without a counterpart are refused before
anything runs. `ParallelState` and `AdaptState` (`pmcmc.numpyro_states`) have the fields that NumPyro users expect in
``last_state``.
"""

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from numpyro.infer import MCMC, init_to_uniform
from numpyro.infer import NUTS as NumpyroNUTS
from numpyro.infer.mcmc import MCMCKernel

from pmcmc._pytree import Array, PRNGKey, PyTree
from pmcmc._xla.trace import refuse_transformation
from pmcmc.chain.chain import Chain
from pmcmc.chain.draws import site_shapes
from pmcmc.chain.state import ChainState, Source, model_source
from pmcmc.interop.numpyro_starts import strategy_starts
from pmcmc.interop.partial_centring import AutoReparam
from pmcmc.kernels import Kernel
from pmcmc.numpyro_samplers import STEP_SIZE, check_metric_sites, keep_options, kernel_fields, owned, translate
from pmcmc.numpyro_states import AdaptState, ParallelState, continued, standing
from pmcmc.recurrence import RecurrenceSolver
from pmcmc.sampling.api import check_strategy, model_starts
from pmcmc.sampling.session import sample_from, sample_new, warm_up
from pmcmc.sampling.settings import Settings, as_key
from pmcmc.target import Target
from pmcmc.warmup import Warmup

__all__ = ["AdaptState", "ParallelMCMC", "ParallelState"]


class ParallelMCMC(MCMC):
    """``numpyro.infer.MCMC`` with each chain solved in parallel across its length.

    To use it, change the one line that makes the MCMC object. Everything that reads draws is NumPyro's own:
    ``get_samples``, ``get_extra_fields``, ``print_summary``, ``Predictive``, ``log_likelihood``,
    ``arviz.from_numpyro``. The attribute ``chain`` is the underlying `Chain`, with its report. ``sampler`` is a copy of
    the kernel that was passed; its ``postprocess_fn`` and ``get_potential_fn`` need no run before.

    Like NumPyro's, the object can be pickled if the model can. The copy has draws and settings, but not ``chain``,
    which `Chain.save` stores.

    These options of NUTS and HMC are kept: ``model``, ``target_accept_prob``, ``dense_mass`` (True or False),
    ``max_tree_depth``, ``num_steps``, ``trajectory_length``, ``init_strategy``, ``adapt_step_size``,
    ``adapt_mass_matrix``, and ``step_size`` and ``inverse_mass_matrix`` if they are not adapted. If they are, NumPyro
    only starts from them, and pmcmc starts elsewhere. Without ``dense_mass``, the diagonal of a full
    ``inverse_mass_matrix`` is taken, as in NumPyro. Steps of HMC are jittered. If ``trajectory_length`` is left out,
    its trajectories take the time that `HMC` tunes, at least 1.82, instead of 2 pi. Where steps are tuned, a trajectory
    has at most 64, with a warning if ``trajectory_length`` needs more. ``regularize_mass_matrix`` and
    ``find_heuristic_step_size`` have no effect: pmcmc has warm-ups of its own. Options that cannot be kept are refused.

    Args:
        sampler: ``numpyro.infer.NUTS(model, ...)`` or ``HMC(model, ...)``, translated as described above; or the model
            itself, sampled by ``kernel``.
        num_warmup, num_samples, num_chains, thinning: As in NumPyro; ``num_samples`` counts steps before thinning.
        postprocess_fn: Not supported; must be None.
        progress_bar: Whether to show progress, in terminals and notebooks only.
        chain_method, progress_rate, jit_model_args: Accepted without effect. Chains always run side by side, and
            arrays of new values and the same shapes are not compiled again.
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
            kernel, adaptation = translate(sampler, num_warmup, warmup)
            warmup = adaptation if warmup is None else keep_options(warmup, sampler)
        if callable(chain_method) or chain_method in ("parallel", "sequential"):
            chain_method = "vectorized"  # NumPyro refuses other values
        super().__init__(
            owned(sampler),
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
            self._state = standing(self._chains)
        return self._state

    @_last_state.setter
    def _last_state(self, state: ParallelState | None) -> None:
        self._state, self._chains = state, None

    @property
    def chain(self) -> Chain:
        """The `Chain` of the last `run`.

        Raises:
            ValueError: `run` was not called yet, or the object was pickled.
        """
        if self._chain is None and self._states is not None:
            raise ValueError(
                "a pickled or deeply copied ParallelMCMC has no chain: save it by mcmc.chain.save(path), and open it "
                "by pmcmc.load(path, model, ...)."
            )
        if self._chain is None:
            raise ValueError("there is no chain yet: call run() first.")
        return self._chain

    def __getstate__(self) -> dict[str, Any]:
        """Return what is pickled: all but the chains, whose compiled programs no file can hold."""
        return {**super().__getstate__(), "_state": self._last_state, "_chains": None, "_chain": None}

    def __copy__(self) -> "ParallelMCMC":
        made = object.__new__(type(self))
        made.__dict__.update(self.__dict__)  # with the chains
        return made

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
        starts = model_starts(source, key, self._init_params(source.target, key, init_params, settings), settings)
        state = warm_up(source, key, starts, settings, self.progress_bar)
        self._last_state = self._warmup_state = standing(state)

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
            starts = model_starts(source, key, self._init_params(source.target, key, init_params, settings), settings)
            chain = sample_new(source, key, starts, settings, self.progress_bar)
        else:
            sizes = self.num_chains, self.thinning
            state = continued(self._warmup_state, source, key, settings.kernel, *sizes)
            chain = sample_from(state, settings, self.progress_bar)
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
        check_metric_sites(self.sampler, self.num_warmup, target)
        settings = self._settings(target)
        settings = replace(settings, extra_fields=kernel_fields(target, settings.kernel, extra_fields))
        return source, as_key(rng_key), settings

    def _settings(self, target: Target) -> Settings:
        sizes = self.num_warmup, self.num_samples, self.num_chains, self.thinning
        return Settings.check(target, self._kernel, self._solver, *sizes, (), self._warmup)

    def _init_params(self, target: Target, rng_key: PRNGKey, given: PyTree, settings: Settings) -> PyTree:
        """Return the given starts, or those of the sampler's strategy; None for the default of NumPyro and pmcmc."""
        model, strategy = self.sampler.model, self.sampler._init_strategy
        if given is not None or strategy is init_to_uniform:
            return given
        check_strategy(target, None, strategy)
        sizes = self.num_chains, settings.uses_gradient
        return strategy_starts(model, self._args, self._kwargs, strategy, rng_key, *sizes)


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
        step_size = jnp.asarray(chain.kernel.tunables["step_size"])
        states[STEP_SIZE] = jnp.broadcast_to(step_size, (chain.num_chains, chain.num_samples))
    return states


def _positions(chain: Chain) -> dict[str, Array]:
    """Return the unconstrained draws by site."""
    one = lambda x: chain.target.unconstrained(chain.kernel.position(chain.target, x))
    return jax.jit(jax.vmap(jax.vmap(one)))(chain.unknowns)
