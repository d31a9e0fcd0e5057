"""The draws, with everything needed to read them."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from pmcmc._typing import Array, PyTree
from pmcmc._xla.compile import TargetJit, tuned_jit
from pmcmc._xla.trace import refuse_transformation
from pmcmc.chain.draws import by_name, check_sites, constrain, fields, in_batches, piece, sample_stats, ungroup
from pmcmc.chain.file_format import Writer
from pmcmc.chain.replay import Record
from pmcmc.chain.report import SolveReport
from pmcmc.chain.state import ChainState, header
from pmcmc.chain.stored import StoredChain
from pmcmc.chain.verify import Verification, verify
from pmcmc.interop.arviz import predictive_groups, to_arviz
from pmcmc.interop.numpyro import print_summary
from pmcmc.kernels import Info, Kernel
from pmcmc.recurrence import RecurrenceSolver
from pmcmc.target import Target

# Draws constrained at a time, and their bytes: bound the memory of models with large deterministic sites.
_CONSTRAIN_BATCH, _CONSTRAIN_BYTES = 65_536, 2**26
# The same for log likelihoods, in observations times draws.
_LIKELIHOOD_BATCH = 2**22


@dataclass(frozen=True)
class Chain:
    """Draws of one or more Markov chains, each the chain that sequential sampling with the same key would give.

    state: where the chains stand after the last step; ``target``, ``kernel`` and ``last_state`` are parts of it.
    unknowns: the kernel's states, numpy arrays (num_chains, num_samples, ...), in the target's coordinates.
    info: the kernel's `Info` for every draw, numpy arrays (num_chains, num_samples).
    report: what was decided, why, and what it cost; of the last extension where there were any.
    thinning: of every so many steps the last was kept. solver: that was asked for; None for "auto".
    extra_fields: names that `get_extra_fields` returns beside ``diverging``.
    warmup_path: (lanes, steps, D) unconstrained positions of warm-up's lanes; None unless ``save_warmup`` was set.
    devices: that share the blocks, or Newton's steps, of what follows; None: none named. max_memory: bytes that what
        follows may take. Neither is stored by `save`.

    Example:
        >>> import jax.numpy as jnp, pmcmc
        >>> chain = pmcmc.sample(lambda x: -0.5 * jnp.sum(x**2), jnp.zeros(2), 0, num_samples=100, progress_bar=False)
        >>> chain.get_samples().shape
        (400, 2)
    """

    state: ChainState
    unknowns: PyTree
    info: Info
    report: SolveReport
    thinning: int
    solver: RecurrenceSolver | None
    extra_fields: Sequence[str] = ()
    warmup_path: np.ndarray | None = field(default=None, repr=False)
    devices: Sequence[jax.Device] | None = None
    max_memory: int | None = None
    _samples: dict = field(default_factory=dict, init=False, repr=False, compare=False)

    @property
    def target(self) -> Target:
        """As tuned by warm-up."""
        return self.state.target

    @property
    def kernel(self) -> Kernel:
        """As tuned by warm-up."""
        return self.state.kernel

    @property
    def last_state(self) -> PyTree:
        """Unknowns after the last step, leading axis num_chains."""
        return self.state.unknown

    @property
    def num_chains(self) -> int:
        return jax.tree.leaves(self.unknowns)[0].shape[0]

    @property
    def num_samples(self) -> int:
        """Draws kept per chain."""
        return jax.tree.leaves(self.unknowns)[0].shape[1]

    def extend(self, num_samples: int, *, progress_bar: bool = True) -> "Chain":
        """These draws and ``num_samples`` more steps of every chain: the chain that one long run would have given.

        Kernel, solver, thinning and noise go on where they stopped, without another warm-up; under "auto" the steps to
        come are planned anew. Thinning goes on counting, so at least ``thinning`` steps are needed.

        num_samples: steps per chain.

        Returns:
            A new `Chain` with all draws. Its ``report`` is that of the extension alone.

        Raises:
            ValueError, TypeError: ``num_samples`` is no integer of at least ``thinning``.

        Example:
            >>> import jax.numpy as jnp, pmcmc
            >>> logdensity = lambda x: -0.5 * jnp.sum(x**2)
            >>> chain = pmcmc.sample(logdensity, jnp.zeros(2), 0, num_samples=100, progress_bar=False)
            >>> chain.extend(50, progress_bar=False).num_samples
            150
        """
        from pmcmc.sampling.session import extend

        return extend(self, num_samples, progress_bar)

    def stream(
        self,
        path: str | Path,
        num_samples: int,
        *,
        sites: Sequence[str] | None = None,
        max_memory: int | None = None,
        progress_bar: bool = True,
    ) -> StoredChain:
        """`extend` for chains longer than memory: these draws and those to come go to a folder on disk.

        Draws are written as they are certified, under the model's names, in ArviZ's layout; kernel states are not. A
        run that is stopped, by Ctrl-C or by ``kill -9``, is finished by `pmcmc.resume`. Memory does not grow with
        ``num_samples``. Needs ``pip install pmcmc[zarr]``.

        path: of a folder to be made. num_samples: steps per chain.
        sites: to be kept, latent or deterministic; None: all.
        max_memory: bytes, as of `pmcmc.parallel_chain`; None: as there.

        Returns:
            A `StoredChain`. Its ``report`` is of the new steps alone.

        Raises:
            ValueError, TypeError: ``num_samples`` as for `extend`; sites that the model does not have.
            FileExistsError: there is something in the folder.
            MemoryError: the shortest segment does not fit; before any sampling.
            Interrupted: Ctrl-C; what was certified by then is its ``chain``.

        Example:
            >>> import jax.numpy as jnp, pmcmc, tempfile
            >>> logdensity = lambda x: -0.5 * jnp.sum(x**2)
            >>> chain = pmcmc.sample(logdensity, jnp.zeros(2), 0, num_samples=100, progress_bar=False)
            >>> chain.stream(tempfile.mkdtemp(), 900, progress_bar=False).num_samples
            1000
        """
        from pmcmc.sampling.streaming import stream

        return stream(self, path, num_samples, sites, max_memory, progress_bar)

    def verify(self, *, tolerance: float | None = None) -> Verification:
        """Check the draws on the equation: each is computed anew from the one before and the noise of the key.

        Nothing of the solver enters, so a file that was edited, a certificate that is wrong, or a model that is not the
        one sampled from all show. Every draw is checked, a thinned chain from one kept draw to the next, and so is
        every field of its ``info``; only the first draw of a run that went on from another's end (`ParallelMCMC` from
        its ``last_state``) has no predecessor. The report is not checked. Takes about as long as sampling on
        ``num_chains * num_blocks`` lanes, at least 256.

        In float32 steps within rounding of a tie may go either way, see `Verification`. A kernel that makes many
        decisions a step (`NUTS`, slice sampling) does not tell them; its steps are taken in the batch shape of the run.
        Between two draws of a thinned chain such a step may send the paths apart. Draws that do not agree are therefore
        tried under up to eight other roundings; where these end apart and none is the stored draw, nothing can be said
        of it, and the chain is not verified.

        tolerance: largest |stored - computed| in posterior standard deviations: units of warm-up's basis, or of the
            draws' interquartile range where there is none. None: 4096 eps, however many steps lie between two draws;
            more only where the other roundings are seen to end further apart than that, up to 0.01. A solver that
            was given a looser ``tol`` or ``tol`` needs the same here. Fields of ``info`` are held to it in units
            of the log density's size.

        Returns:
            A `Verification`, which is true where all agrees: ``if not chain.verify(): ...``.

        Raises:
            ValueError: a chain of one draw without a predecessor.

        Example:
            >>> import jax.numpy as jnp, pmcmc
            >>> logdensity = lambda x: -0.5 * jnp.sum(x**2)
            >>> chain = pmcmc.sample(logdensity, jnp.zeros(2), 0, num_samples=100, progress_bar=False)
            >>> bool(chain.verify())
            True
        """
        refuse_transformation("Chain.verify")
        state = self.state
        state.source.check()
        steps_before = state.num_steps - state.num_unkept - self.num_samples * self.thinning
        first = jax.tree.map(lambda x: np.asarray(x)[state.own], state.ensemble) if steps_before == 0 else None
        in_basis = state.target.basis is not None and len(jax.tree.leaves(self.unknowns)) == 1
        thinning = (self.thinning, state.num_unkept)
        record = Record(self.unknowns, self.info, first, self.last_state, *thinning, steps_before, in_basis)
        return verify(self.target, self.kernel, state.rng_key, record, self.report.num_blocks, tolerance)

    def save(self, path: str | Path) -> None:
        """Write the chain to one file, so that `pmcmc.load` can read it and `extend` go on, here or elsewhere.

        Stored are draws, tuned kernel, key and report (without its plan), as arrays and JSON in a ``.npz`` archive.
        The model and its data are not: they are given to `pmcmc.load` again. Nor are warm-up's draws. A file that
        exists is replaced once the new one is whole.

        path: of the file, taken as it is.

        Example:
            >>> import jax.numpy as jnp, pathlib, pmcmc, tempfile
            >>> logdensity = lambda x: -0.5 * jnp.sum(x**2)
            >>> chain = pmcmc.sample(logdensity, jnp.zeros(2), 0, num_samples=100, progress_bar=False)
            >>> path = pathlib.Path(tempfile.mkdtemp()) / "chain.npz"
            >>> chain.save(path)
            >>> pmcmc.load(path, logdensity).num_samples
            100
        """
        writer = Writer()
        writer.leaves("unknowns", self.unknowns)
        writer.leaves("info", self.info)
        writer.write(path, header(writer, self.state, self.report, self.thinning, self.solver, self.extra_fields))

    def get_samples(self, group_by_chain: bool = False, *, sites: Sequence[str] | None = None) -> PyTree:
        """Draws as the user's model names them: constrained latent and deterministic sites of a NumPyro model, or
        the position's own pytree for a plain log density.

        Leading axes (num_chains, num_samples) with ``group_by_chain``, else (num_chains * num_samples,).

        They are computed from `unknowns` when they are first asked for, and kept.

        sites: names of those wanted, in a dict; all others are not computed. None: all.

        Raises:
            ValueError, TypeError: sites that the model does not have.
        """
        wanted = None if sites is None else check_sites(self.target, sites)
        return jax.tree.map(lambda x: jnp.asarray(x if group_by_chain else ungroup(x)), self._grouped(wanted))

    def _grouped(self, sites: tuple[str, ...] | None) -> PyTree:
        """Numpy arrays (num_chains, num_samples, ...); kept: all, under None, and single sites by name."""
        if None not in self._samples and sites is not None:
            if missing := tuple(name for name in sites if name not in self._samples):
                self._samples.update(self._constrained(missing))
            return {name: self._samples[name] for name in sites}
        if None not in self._samples:
            whole = self._constrained(None)
            self._samples.clear()  # they are part of it
            self._samples[None] = whole
        whole = self._samples[None]
        return whole if sites is None else {name: by_name(whole)[name] for name in sites}

    def _constrained(self, sites: tuple[str, ...] | None) -> PyTree:
        compiled = lambda target, kernel, rows: constrain(target, kernel, rows, sites=sites)
        batch = min(self.num_chains * self.num_samples, _CONSTRAIN_BATCH)
        rows = jax.tree.map(lambda x: jax.ShapeDtypeStruct((batch, *x.shape[2:]), x.dtype), self.unknowns)
        # of a whole batch: where it fits, and mostly it does, this trace is that of the program
        draws = constrain.eval_shape(self.target, self.kernel, rows, sites=sites)
        return self._of_each_draw(compiled, piece(batch, _CONSTRAIN_BYTES, draws))

    def _of_each_draw(self, compiled: Callable, most: int) -> PyTree:
        """``compiled(target, kernel, unknowns)`` of all draws, at most so many at a time; (num_chains, draws, ...)."""
        batch = min(self.num_chains * self.num_samples, most)
        return in_batches(lambda rows: compiled(self.target, self.kernel, rows), self.unknowns, batch)

    def get_warmup_samples(self) -> PyTree:
        """Draws of warm-up as `get_samples` names them, leading axes (lanes, steps), in the order they were made.

        The lanes are an ensemble of its own, 32 by default, and not the start of the chains: first HMC that looks for
        location and metric from dispersed starts (`SolveReport.num_lost_lanes` counts replaced lanes), then the kernel
        itself, whose step size is tuned. They tell whether warm-up was long enough, and nothing else: no chain with the
        posterior as its law.

        Raises:
            ValueError: ``save_warmup`` was not set.

        Example:
            >>> import jax.numpy as jnp, pmcmc
            >>> logdensity = lambda x: -0.5 * jnp.sum(x**2)
            >>> chain = pmcmc.sample(logdensity, jnp.zeros(2), 0, num_samples=9, save_warmup=True, progress_bar=False)
            >>> chain.get_warmup_samples().shape[0]
            32
        """
        if self.warmup_path is None:
            raise ValueError("warm-up was not kept: pass save_warmup=True to parallel_chain or sample.")
        return self._of_each_warmup_draw(_constrain_rows)

    def _of_each_warmup_draw(self, compiled: TargetJit) -> PyTree:
        path: Any = self.warmup_path
        batch = min(path[..., 0].size, _CONSTRAIN_BATCH)
        rows = jax.ShapeDtypeStruct((batch, path.shape[-1]), path.dtype)
        batch = piece(batch, _CONSTRAIN_BYTES, compiled.eval_shape(self.target, rows))
        return in_batches(lambda rows: compiled(self.target, rows), path, batch)

    def _warmup_groups(self, sites: Sequence[str] | None) -> dict[str, Any]:
        """For ArviZ; empty where warm-up was not kept."""
        if self.warmup_path is None:
            return {}
        draws = by_name(self.get_warmup_samples())
        wanted = draws if sites is None else sites
        lp = self._of_each_warmup_draw(_logdensity_rows)
        return {"warmup_posterior": {name: draws[name] for name in wanted}, "warmup_sample_stats": {"lp": lp}}

    def get_extra_fields(self, group_by_chain: bool = False) -> dict[str, Any]:
        """Fields of the transitions under NumPyro's names: ``diverging``, and those asked for by ``extra_fields``.

        Available are the names in the kernel's ``extra_fields``.

        Raises:
            ValueError: an algorithm of another package does not report a field.
        """
        found = fields(self.kernel, self.info)
        names = dict.fromkeys(("diverging", *self.extra_fields))
        missing = [name for name in names if name not in found]
        if missing:
            raise ValueError(f"the kernel's algorithm does not report {missing}: expected names out of {list(found)}.")
        grouped = {name: np.asarray(found[name]) for name in names}
        if not group_by_chain:
            grouped = {name: x.reshape(-1) for name, x in grouped.items()}
        return {name: jnp.asarray(x) for name, x in grouped.items()}

    def print_summary(self, prob: float = 0.9, *, sites: Sequence[str] | None = None) -> None:
        """Mean, standard deviation, quantiles, effective sample size and R-hat of every site, by NumPyro.

        prob: of the interval between the quantiles. sites: as of `get_samples`.
        """
        samples = self._grouped(None if sites is None else check_sites(self.target, sites))
        print_summary(samples if isinstance(samples, dict) else {"x": samples}, prob)
        print(f"Number of divergences: {int(np.sum(self.info.is_divergent))}")

    def to_arviz(
        self,
        *,
        sites: Sequence[str] | None = None,
        log_likelihood: bool = False,
        prior: dict[str, Array] | None = None,
        posterior_predictive: dict[str, Array] | None = None,
        coords: dict[str, Any] | None = None,
        dims: dict[str, list[str]] | None = None,
    ) -> Any:
        """ArviZ's container: InferenceData on ArviZ 0.x, DataTree on 1.x.

        Groups: posterior; sample_stats with ``lp``, ``acceptance_rate``, ``diverging``, ``step_size``, ``energy``,
        ``n_steps`` and ``tree_depth`` as far as the kernel has them, and ``accept_margin`` (log alpha - log u). For a
        NumPyro model also observed_data, and constant_data with the other arrays among its arguments; dimensions are
        named after plates. With ``save_warmup`` also warmup_posterior, where each lane is a chain (see
        `get_warmup_samples`), and warmup_sample_stats with ``lp``. What the solver did is in the attributes.

        sites: of the posterior, as of `get_samples`. None: all.
        log_likelihood: of every observation at every draw, for ``arviz.loo`` and ``compare``; draws x observations of
            memory, so not unless asked for. Masked observations have 0; drop them where ArviZ 1.x refuses a constant.
        prior, posterior_predictive: draws of ``numpyro.infer.Predictive``; what of the prior's is not in the posterior
            is prior_predictive.
        coords, dims: ArviZ's labels, added to those of the plates.

        Raises:
            ValueError: ``log_likelihood`` of a plain log density; predictive draws of another number.

        Example:
            >>> import jax.numpy as jnp, pmcmc
            >>> logdensity = lambda x: -0.5 * jnp.sum(x["a"] ** 2)
            >>> chain = pmcmc.sample(logdensity, {"a": jnp.zeros(2)}, 0, num_samples=100, progress_bar=False)
            >>> chain.to_arviz(dims={"a": ["side"]}, coords={"side": ["left", "right"]}).posterior["a"].dims
            ('chain', 'draw', 'side')
        """
        samples = by_name(self._grouped(None if sites is None else check_sites(self.target, sites)))
        target, report = self.target, self.report
        place = self.kernel.position(target, jax.tree.map(lambda x: jnp.asarray(x)[0], self.last_state))
        described = self.state.source.describe(target, place)
        groups = {
            "posterior": samples,
            "sample_stats": sample_stats(self.kernel, self.info),
            "log_likelihood": self._log_likelihood() if log_likelihood else {},
            **predictive_groups(prior, posterior_predictive, samples),
            **self._warmup_groups(sites),
            "observed_data": described.observed,
            "constant_data": described.constant,
        }
        attrs = {
            "inference_library": "pmcmc",
            "kernel": type(self.kernel).__name__,
            "decision": report.decision,
            "num_sequential_steps": int(np.max(report.num_sequential_steps)),
            "residual": float(np.max(report.residual)),
            "sampling_time": float(report.total_seconds),
        }
        return to_arviz(groups, attrs, dims={**described.dims, **(dims or {})}, coords=coords or {})

    def _log_likelihood(self) -> PyTree:
        draw = jax.tree.map(lambda x: x[0, :1], self.unknowns)
        shapes = _log_likelihoods.eval_shape(self.target, self.kernel, draw)
        if not shapes:
            raise ValueError(
                "log_likelihood=True needs a NumPyro model with observed sites: a plain log density does not tell its "
                "observations apart."
            )
        size = sum(x.size for x in jax.tree.leaves(shapes))
        return self._of_each_draw(_log_likelihoods, max(1, _LIKELIHOOD_BATCH // size))


@tuned_jit()
def _log_likelihoods(target: Target, kernel: Kernel, unknowns: PyTree) -> PyTree:
    one = lambda unknown: target.model.log_likelihood(target.data, kernel.position(target, unknown))
    return jax.vmap(one)(unknowns)


@tuned_jit()
def _constrain_rows(target: Target, rows: Array) -> PyTree:
    """Of unconstrained positions (N, D) as the user's model has them, without a basis."""
    return jax.vmap(lambda row: target.model.constrain(target.data, target.spec.unravel(row)))(rows)


@tuned_jit()
def _logdensity_rows(target: Target, rows: Array) -> Array:
    return jax.vmap(lambda row: target.model.logdensity(target.data, target.spec.unravel(row)))(rows)
