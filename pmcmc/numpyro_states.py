"""`ParallelState`, from which a `ParallelMCMC` goes on, and whether a run fits the state that it is given.

`standing` makes the state of chains, and `continued` the chains of a run that begins with such a state.
"""

from dataclasses import fields, is_dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from pmcmc._pytree import Array, PRNGKey, PyTree
from pmcmc._xla.trace import Traced, Untraced
from pmcmc.chain.draws import unconstrained
from pmcmc.chain.state import ChainState, Source, last_logdensity
from pmcmc.chain.stored import warmup_logdensity
from pmcmc.interop.blackjax import is_of_blackjax
from pmcmc.kernels import Kernel
from pmcmc.random.streams import IMPL, fold_key
from pmcmc.starts import check_starts
from pmcmc.warmup.base import scale_of_metric
from pmcmc.warmup.trajectories import with_length_of


class AdaptState(NamedTuple):
    """What warm-up tuned, as in NumPyro's ``HMCAdaptState``; with a leading axis num_chains if there are several.

    Only kernels that take leapfrog steps have one: step sizes of other kernels mean nothing to NumPyro's samplers.

    Attributes:
        step_size: The leapfrog step h, in units of the metric.
        inverse_mass_matrix: M^{-1} by the sites that it acts on, ``{(site, ...): array}``: diagonal (D,) or full
            (D, D), over the concatenated unconstrained values of these sites.
    """

    step_size: Array
    inverse_mass_matrix: dict[tuple[str, ...], Array]


class ParallelState(NamedTuple):
    """State of the chains of a `ParallelMCMC`: its ``last_state`` and ``post_warmup_state``.

    A pickled or deeply copied state has all but ``chains``: it can be read, but no run can continue from it.

    Attributes:
        z: Unconstrained values by site as in NumPyro, with a leading axis num_chains if there are several chains. To
            start from other values, pass ``init_params``.
        potential_energy: Potential energy at z.
        rng_key: Key that continues this run: `ParallelMCMC.run` with it gives the draws that one long run would.
        chains: Everything else that the chains need to continue; None if the state was pickled.
    """

    z: PyTree
    potential_energy: Array
    rng_key: PRNGKey
    chains: ChainState | None

    def __copy__(self) -> "ParallelState":
        return self

    def __reduce__(self) -> tuple:
        return _unpickled, (self.z, self.potential_energy, np.asarray(jax.random.key_data(self.rng_key)))

    @property
    def adapt_state(self) -> AdaptState | None:
        """Step size and metric; None for kernels that take no leapfrog steps, such as `MALA`, `RandomWalk` and
        `Compose`, and with `AutoReparam`, whose coordinates are not those of z.

        All chains share what warm-up found. To use it in another sampler, take that of one chain:
        ``NUTS(model, step_size=..., inverse_mass_matrix=..., adapt_step_size=False, adapt_mass_matrix=False)``, with
        ``dense_mass=True`` if the metric is (D, D), of which NumPyro takes the diagonal otherwise.

        Raises:
            ValueError: The state was pickled.
        """
        if self.chains is None:
            raise ValueError(
                "a pickled state has no adapt_state: read step_size and inverse_mass_matrix before you pickle it, or "
                "save the chain by mcmc.chain.save(path)."
            )
        target = self.chains.target
        kernel: Any = self.chains.kernel
        if "step_size" not in kernel.tunables or target.centredness or not kernel.takes_leapfrogs(target):
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


def _unpickled(z: PyTree, potential_energy: Array, key_data: np.ndarray) -> ParallelState:
    """Return the state that `ParallelState.__reduce__` describes."""
    return ParallelState(z, potential_energy, jax.random.wrap_key_data(jnp.asarray(key_data), impl=IMPL), None)


def standing(state: ChainState) -> ParallelState:
    """Return where chains are, as NumPyro's users expect it."""
    target, positions = state.target, _positions(state)
    if target.centredness:  # chains move in other coordinates, with another density
        rows = np.asarray(jax.vmap(target.spec.ravel)(positions))
        potential = jnp.asarray(-warmup_logdensity(target.as_written, rows[:, None])[:, 0])
    else:
        potential = jnp.asarray(-last_logdensity(state))
    if len(state.own) == 1:
        positions, potential = jax.tree.map(lambda x: x[0], (positions, potential))
    return ParallelState(positions, potential, state.rng_key, state)


def _positions(state: ChainState) -> PyTree:
    """Return the user's unconstrained values where chains are, leading axis num_chains."""
    if state.target.centredness:
        return unconstrained(state.target, state.kernel, state.unknown)
    return jax.vmap(lambda x: state.kernel.position(state.target, x))(state.unknown)


def continued(
    state: Any, source: Source, rng_key: PRNGKey, kernel: Kernel, num_chains: int, thinning: int
) -> ChainState:
    """Return the chains of a run that begins with a ``post_warmup_state``.

    Args:
        state: The ``post_warmup_state``.
        source: The model with its arguments of this run.
        rng_key: Key of this run.
        kernel: The kernel that the user asks for, not tuned.
        num_chains: Number of chains.
        thinning: Number of steps per draw that is kept.

    Raises:
        TypeError: ``state`` is no `ParallelState`.
        ValueError: It does not fit what was asked for, was changed, or was pickled.
    """
    if not isinstance(state, ParallelState):
        raise TypeError(
            f"post_warmup_state must be None or the last_state of a ParallelMCMC, got {type(state).__name__}: "
            "states of NumPyro's own samplers do not hold what is needed. Pass init_params= instead."
        )
    chains, target = state.chains, source.target
    if chains is None:
        raise ValueError(
            "post_warmup_state was pickled, which keeps no chains to go on from: set it to None to warm up again. To "
            "go on in another process use mcmc.chain.save(path), pmcmc.load(path, model, ...) and Chain.extend."
        )
    shapes = [{name: c.shape for name, c in t.centredness.items()} for t in (target, chains.target)]
    if shapes[0] != shapes[1]:
        raise ValueError(
            "post_warmup_state was made with another reparam=: pass the same again, or set it to None to warm up again."
        )
    if len(chains.own) != num_chains or target.spec != chains.target.spec:
        raise ValueError(
            "post_warmup_state has another number of chains, or latent sites of other names or shapes: set it to None "
            "to warm up again."
        )
    _check_kernel(kernel, chains)
    _check_values(state.z, chains)
    source, _ = source.with_kernel(kernel)
    target = source.target
    data = jax.random.key_data
    num_unkept = chains.num_unkept % thinning
    if not np.array_equal(data(rng_key), data(chains.rng_key)):
        # Do not use the key itself: it may have drawn these steps before, and chains that share noise would merge.
        rng_key, num_unkept = fold_key(rng_key, chains.num_steps + 1), 0
    target = target.with_centredness(chains.target.centredness).with_basis(chains.target.basis)
    chains = chains._replace(target=target, rng_key=rng_key, num_unkept=num_unkept, source=source)
    _check_density(chains)
    return chains


def _check_values(z: PyTree, chains: ChainState) -> None:
    """Raise an error if the values in a state are not those of its chains.

    Raises:
        ValueError: They are not, since the user has replaced them.
    """
    positions = _positions(chains)
    if len(chains.own) == 1:
        positions = jax.tree.map(lambda x: x[0], positions)
    same = lambda a, b: np.shape(a) == np.shape(b) and np.allclose(a, b, equal_nan=True)
    if jax.tree.structure(z) != jax.tree.structure(positions) or not all(
        jax.tree.leaves(jax.tree.map(same, z, positions))
    ):
        raise ValueError(
            "z of post_warmup_state was changed, and chains go on from where they are: leave it as it was. To start "
            "from other values, set post_warmup_state to None and pass them as init_params= to run()."
        )


def _check_density(chains: ChainState) -> None:
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
