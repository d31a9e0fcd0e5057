"""Draws of Markov chains in memory, with everything needed to read, check and continue them.

`Chain` is what `pmcmc.parallel_chain` and `pmcmc.sample` return. It stores the kernel's states and computes named
sites, statistics and ArviZ groups from them on request. `Chain.extend` and `Chain.stream` continue the chains,
`Chain.verify` checks the draws, and `Chain.save` writes them to a file.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from pmcmc._pytree import Array, PyTree
from pmcmc._xla.trace import refuse_transformation
from pmcmc.chain.draws import by_name, check_sites, fields, sample_stats, site_shapes, ungroup
from pmcmc.chain.file_format import Writer
from pmcmc.chain.replay import Record
from pmcmc.chain.report import SolveReport, Summary
from pmcmc.chain.state import ChainState, header
from pmcmc.chain.stored import StoredChain, constrain_draws, constrain_warmup, log_likelihoods, warmup_logdensity
from pmcmc.chain.verify import Verification, verify
from pmcmc.interop.arviz import predictive_groups, to_arviz
from pmcmc.kernels import Info, Kernel
from pmcmc.recurrence import RecurrenceSolver
from pmcmc.target import Target


@dataclass(frozen=True)
class Chain:
    """Draws of one or more Markov chains. Each equals the chain that sequential sampling with the same key would give.

    Attributes:
        state: State of the chains after the last step. The properties `target`, `kernel` and `last_state` are parts of
            it.
        unknowns: The kernel's states in the target's coordinates; numpy arrays (num_chains, num_samples, ...).
        info: The kernel's `Info` of every draw; numpy arrays (num_chains, num_samples).
        report: What was decided, why, and what it cost. If the chain was extended, the report covers the last
            extension.
        thinning: Every ``thinning``-th step was kept.
        solver: The solver that was asked for; None for "auto".
        extra_fields: Names that `get_extra_fields` returns besides ``diverging``.
        warmup_path: Unconstrained positions of the lanes of warm-up; shape (lanes, steps, D). None unless
            ``save_warmup`` was set.
        devices: Devices that share the blocks, or the steps of Newton's method, when the chain is continued; None if
            none were named. Not stored by `save`.
        max_memory: Bytes that may be used when the chain is continued; None for the defaults of `pmcmc.parallel_chain`.
            Not stored by `save`.

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
        """The target in the coordinates found by warm-up."""
        return self.state.target

    @property
    def kernel(self) -> Kernel:
        """The kernel as tuned by warm-up."""
        return self.state.kernel

    @property
    def last_state(self) -> PyTree:
        """The kernel's states after the last step, leading axis num_chains."""
        return self.state.unknown

    @property
    def num_chains(self) -> int:
        """Number of chains."""
        return jax.tree.leaves(self.unknowns)[0].shape[0]

    @property
    def num_samples(self) -> int:
        """Number of draws kept per chain."""
        return jax.tree.leaves(self.unknowns)[0].shape[1]

    def extend(self, num_samples: int, *, max_memory: int | None = None, progress_bar: bool = True) -> "Chain":
        """Continue every chain by ``num_samples`` steps, as one long run would.

        Kernel, solver, thinning and noise continue where they stopped, without another warm-up. Under "auto" the new
        steps are planned again. The count of thinning continues too, so at least ``thinning`` steps are needed.

        Args:
            num_samples: Number of new steps per chain.
            max_memory: Memory limit in bytes, as for `pmcmc.parallel_chain`; None for the limit of this chain.
            progress_bar: Whether to show progress in terminals and notebooks.

        Returns:
            A new `Chain` with these draws and the new ones. Its ``report`` covers the extension only.

        Raises:
            ValueError: ``num_samples`` is less than ``thinning``, a chain would have more than 2^32 steps, or the model
                has changed since the chain was sampled.
            TypeError: ``num_samples`` or ``max_memory`` is not an integer.
            MemoryError: All draws and the shortest segment do not fit into memory; raised before any sampling.
            Interrupted: Ctrl-C; its ``chain`` holds all draws so far.
            NonFiniteState: A chain reached a state that is not finite; its ``chain`` holds the draws before it.
            Warning: A filter of Python's ``warnings`` raises a warning; its ``chain`` holds all draws so far.

        Example:
            >>> import jax.numpy as jnp, pmcmc
            >>> logdensity = lambda x: -0.5 * jnp.sum(x**2)
            >>> chain = pmcmc.sample(logdensity, jnp.zeros(2), 0, num_samples=100, progress_bar=False)
            >>> chain.extend(50, progress_bar=False).num_samples
            150
        """
        from pmcmc.sampling.session import extend

        return extend(self, num_samples, max_memory, progress_bar)

    def stream(
        self,
        path: str | Path,
        num_samples: int,
        *,
        sites: Sequence[str] | None = None,
        max_memory: int | None = None,
        progress_bar: bool = True,
    ) -> StoredChain:
        """Continue the chains like `extend`, and write these draws and the new ones to a folder on disk.

        Use it for chains that do not fit into memory: memory does not grow with ``num_samples``. Draws are written once
        they are certified, under the names of the model's sites and in ArviZ's layout. The kernel's states are not
        written. If the run is stopped, by Ctrl-C or by ``kill -9``, `pmcmc.resume` finishes it. Needs
        ``pip install pmcmc[zarr]``.

        Args:
            path: Folder to write to; new or empty.
            num_samples: Number of new steps per chain.
            sites: Names of the latent or deterministic sites to keep; None for all.
            max_memory: Memory limit in bytes, as for `pmcmc.parallel_chain`; None for the limit of this chain.
            progress_bar: Whether to show progress in terminals and notebooks.

        Returns:
            A `StoredChain`. Its ``report`` covers the new steps only.

        Raises:
            ValueError: ``num_samples`` is less than ``thinning``, a chain would have more than 2^32 steps, the model
                has changed since the chain was sampled, or it does not have some of the sites.
            TypeError: ``num_samples`` is not an integer, or ``sites`` is not a sequence of names.
            FileExistsError: The folder is not empty.
            ImportError: Zarr is not installed.
            RuntimeError: Another process is writing to the folder.
            MemoryError: The shortest segment does not fit into memory; raised before any sampling.
            Interrupted: Ctrl-C; its ``chain`` holds the draws of the last checkpoint.
            NonFiniteState: A chain reached a state that is not finite; its ``chain`` holds the draws of the last
                checkpoint.

        Example:
            >>> import jax.numpy as jnp, pmcmc, tempfile
            >>> logdensity = lambda x: -0.5 * jnp.sum(x**2)
            >>> chain = pmcmc.sample(logdensity, jnp.zeros(2), 0, num_samples=100, progress_bar=False)
            >>> chain.stream(tempfile.mkdtemp(), 900, progress_bar=False).num_samples
            1000
        """
        from pmcmc.sampling.streaming import stream

        return stream(self, path, num_samples, sites, max_memory, progress_bar)

    def verify(self, *, tol: float | None = None) -> Verification:
        """Check that every draw follows from the draw before it and the noise of the key.

        Each draw is computed again from these two. The solver is not involved, so the check detects a file that was
        edited, a certificate that is wrong, and a model other than the one that was sampled. Every draw is checked with
        every field of its ``info``; a thinned chain is followed from one kept draw to the next. Only the first draw of
        a run that continued another one (`ParallelMCMC` from its ``last_state``) cannot be checked, because its
        predecessor is not stored. The report is not checked. The check takes about as long as sampling on
        ``num_chains * num_blocks`` lanes, or on 256 lanes if that is more.

        In float32 the decision of a step within rounding of a tie may go either way; both outcomes are accepted, see
        `Verification`. Kernels that make many decisions per step (`NUTS`, slice sampling) do not report how close these
        are to a tie, so their float32 steps are computed in the batch shape of the last run. If the chain was extended,
        earlier runs may have had another one, whose roundings may show as mismatches; verify such a chain before it is
        extended.

        Between two draws of a thinned chain such a decision may separate the paths. Draws that do not agree are
        therefore computed again under up to eight other roundings. If these end apart and none of them is the stored
        draw, the draw is undecided, and the chain is not verified.

        Args:
            tol: Largest ``|stored - computed|`` in posterior standard deviations, which are those found by warm-up, or
                an estimate from the interquartile range of the draws if there is no basis. None: 4096 eps,
                whatever the number of steps between two draws; more, up to 0.01, only for draws whose other roundings
                end further apart than that. If the solver was given a looser ``tol``, pass the same
                value here. Fields of ``info`` are compared with the same tolerance, in units of the size of the log
                density.

        Returns:
            A `Verification`, which is true if everything agrees: ``if not chain.verify(): ...``.

        Raises:
            ValueError: The chain consists of one draw without a predecessor, the model has changed since the chain was
                sampled, or its states are in half precision and ``tol`` is None.

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
        thinning = (self.thinning, state.num_unkept)
        record = Record(self.unknowns, self.info, first, self.last_state, *thinning, steps_before, state.scale)
        return verify(self.target, self.kernel, state.rng_key, record, self.report.num_blocks, tol)

    def save(self, path: str | Path) -> None:
        """Write the chain to one file, which `pmcmc.load` reads here or on another machine.

        The file is an ``.npz`` archive of arrays and JSON. It holds the draws, the tuned kernel, the solver, the key,
        and the report without its plan. It holds neither the model and its data, which are passed to `pmcmc.load`
        again, nor the draws of warm-up. An existing file is replaced only once the new one is complete. If coupled
        chains stayed apart, `SolveReport.diagnosis` is computed first and stored, which takes a few seconds.

        Args:
            path: File to write; no suffix is added.

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
        """Return the draws under the names of the user's model.

        For a NumPyro model these are its latent and deterministic sites, in their constrained values; for a plain log
        density, the pytree of the position. They are computed from `unknowns` on first use and kept.

        Args:
            group_by_chain: Whether chains are a separate axis.
            sites: Names of the sites to return in a dict; others are not computed. None for all.

        Returns:
            Draws with leading axes (num_chains, num_samples) if ``group_by_chain``, otherwise (num_chains *
            num_samples,).

        Raises:
            ValueError: The model does not have some of the sites.
            TypeError: ``sites`` is not a sequence of names.
        """
        wanted = None if sites is None else check_sites(self.target, sites)
        return jax.tree.map(lambda x: jax.device_put(x if group_by_chain else ungroup(x)), self._grouped(wanted))

    def _grouped(self, sites: tuple[str, ...] | None) -> PyTree:
        """Return numpy arrays (num_chains, num_samples, ...), computed once.

        The cache ``_samples`` holds all sites under None, or single sites by name.
        """
        if None not in self._samples and sites is not None:
            if missing := tuple(name for name in sites if name not in self._samples):
                self._samples.update(constrain_draws(self.target, self.kernel, self.unknowns, missing))
            return {name: self._samples[name] for name in sites}
        if None not in self._samples:
            whole = constrain_draws(self.target, self.kernel, self.unknowns, None)
            self._samples.clear()  # single sites are contained in the whole
            self._samples[None] = whole
        whole = self._samples[None]
        return whole if sites is None else {name: by_name(whole)[name] for name in sites}

    def get_warmup_samples(self) -> PyTree:
        """Return the draws of warm-up under the same names as `get_samples`, in the order in which they were made.

        The lanes of warm-up are a separate ensemble, not the beginning of the chains. There are 32 or fewer, or one for
        each start that you pass if these are more. First HMC runs from the starts to find location and metric
        (`SolveReport.num_lost_lanes` counts replaced lanes), then the kernel (for NUTS: HMC) runs while its step size
        is tuned. These draws show whether warm-up was long enough. They are no sample from the posterior.

        Returns:
            Draws with leading axes (lanes, steps).

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
        return constrain_warmup(self.target.as_written, self.warmup_path)

    def _warmup_groups(self, sites: Sequence[str] | None) -> dict[str, Any]:
        """Return the ArviZ groups of warm-up; empty if warm-up was not kept."""
        if self.warmup_path is None:
            return {}
        draws = by_name(self.get_warmup_samples())
        wanted = draws if sites is None else sites
        lp = warmup_logdensity(self.target.as_written, self.warmup_path)
        return {"warmup_posterior": {name: draws[name] for name in wanted}, "warmup_sample_stats": {"lp": lp}}

    def get_extra_fields(self, group_by_chain: bool = False) -> dict[str, Any]:
        """Return fields of the transitions under NumPyro's names: ``diverging``, and those named by ``extra_fields``.

        The names available are those in the kernel's ``extra_fields``.

        Args:
            group_by_chain: Whether chains are a separate axis.

        Returns:
            Arrays by name; shape (num_chains, num_samples) if ``group_by_chain``, otherwise (num_chains *
            num_samples,).

        Raises:
            ValueError: An algorithm of another package does not report one of the fields.
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

    def summary(self, prob: float = 0.9, *, sites: Sequence[str] | None = None) -> Summary:
        """Return mean, standard deviation, median, interval, effective sample size and R-hat of all sites.

        Args:
            prob: Probability of the highest posterior density interval.
            sites: Names of the sites, as for `get_samples`; None for all.

        Returns:
            NumPyro's statistics, ``{site: {statistic: array}}``, which print as a table.

        Raises:
            ValueError: There are fewer than four draws per chain, or the model does not have some of the sites.
            TypeError: ``sites`` is not a sequence of names.
        """
        samples = self._grouped(None if sites is None else check_sites(self.target, sites))
        return Summary(samples, prob, self.info.is_divergent)

    def print_summary(self, prob: float = 0.9, *, sites: Sequence[str] | None = None) -> None:
        """Print the table of `summary`.

        Args:
            prob: As in `summary`.
            sites: As in `summary`.

        Raises:
            ValueError, TypeError: As in `summary`.
        """
        print(self.summary(prob, sites=sites))

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
        """Return the chain as ArviZ's container: InferenceData for ArviZ 0.x, DataTree for 1.x.

        Its groups are posterior, sample_stats, observed_data and constant_data. sample_stats has ``lp``,
        ``acceptance_rate``, ``diverging``, ``accept_margin`` (log alpha - log u) and, as far as the kernel has them,
        ``step_size``, ``energy``, ``n_steps`` and ``tree_depth``. For a NumPyro model, observed_data and constant_data
        hold its data and its other array arguments, and dimensions are named after plates, but for names that occur
        with several sizes. ArviZ 1.x has dots for slashes in names. If ``save_warmup`` was set, there are
        warmup_posterior, in which each lane is a chain (see `get_warmup_samples`), and warmup_sample_stats with ``lp``.

        The attributes say what the solver did.

        Args:
            sites: Names of the sites in the posterior, as for `get_samples`; None for all.
            log_likelihood: Whether to compute the log likelihood of every observation at every draw, for ``arviz.loo``
                and ``compare``. It takes memory for draws x observations numbers. Masked observations have 0; drop them
                if ArviZ 1.x refuses constants.
            prior: Draws of ``numpyro.infer.Predictive`` from the prior. Latent and deterministic sites go to prior,
                whatever ``sites`` says, and all others to prior_predictive.
            posterior_predictive: Draws of ``numpyro.infer.Predictive`` from the posterior.
            coords: ArviZ's labels of coordinates.
            dims: ArviZ's names of dimensions by site: of all axes, or of the last ones, after those named after plates.

        Raises:
            ValueError: ``log_likelihood`` is set for a model without observed sites, the number of predictive draws
                differs from that of the posterior, or the model does not have some of the sites.
            TypeError: ``sites`` is not a sequence of names.

        Example:
            >>> import jax.numpy as jnp, pmcmc
            >>> logdensity = lambda x: -0.5 * jnp.sum(x["a"] ** 2)
            >>> chain = pmcmc.sample(logdensity, {"a": jnp.zeros(2)}, 0, num_samples=100, progress_bar=False)
            >>> chain.to_arviz(dims={"a": ["side"]}, coords={"side": ["left", "right"]}).posterior["a"].dims
            ('chain', 'draw', 'side')
        """
        target, report = self.target, self.report
        wanted = None if sites is None else check_sites(target, sites)
        samples, known = by_name(self._grouped(wanted)), by_name(site_shapes(target))
        place = self.kernel.position(target, jax.tree.map(lambda x: jnp.asarray(x)[0], self.last_state))
        described = self.state.source.describe(target, place)
        likelihood = log_likelihoods(target, self.kernel, self.unknowns) if log_likelihood else {}
        groups = {
            "posterior": samples,
            "sample_stats": sample_stats(self.kernel, self.info),
            "log_likelihood": likelihood,
            **predictive_groups(prior, posterior_predictive, known, *np.shape(self.info.margin)[:2]),
            **self._warmup_groups(wanted),
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
        return to_arviz(groups, attrs, known=described.dims, dims=dims or {}, coords=coords or {})
