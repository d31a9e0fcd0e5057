"""The draws, with everything needed to read them."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from pmcmc._types import Array, PyTree
from pmcmc.interop._arviz import to_arviz
from pmcmc.interop._numpyro import print_summary
from pmcmc.kernels import Info, Kernel
from pmcmc.report import SolveReport
from pmcmc.target import Target

# Draws constrained at a time: bounds the memory of models with large deterministic sites.
_CONSTRAIN_BATCH = 65_536


@dataclass(frozen=True)
class Chain:
    """Draws of one or more Markov chains, each the chain that sequential sampling with the same key would give.

    target, kernel: as tuned by warm-up.
    unknowns: the kernel's states, numpy arrays (num_chains, num_samples, ...), in the target's coordinates.
    info: the kernel's `Info` for every draw, numpy arrays (num_chains, num_samples).
    last_state: unknowns after the last step, leading axis num_chains.
    report: what was decided, why, and what it cost.
    extra_fields: names that `get_extra_fields` returns beside ``diverging``.

    Example:
        >>> import jax.numpy as jnp, pmcmc
        >>> chain = pmcmc.sample(lambda x: -0.5 * jnp.sum(x**2), jnp.zeros(2), 0, num_samples=100, progress_bar=False)
        >>> chain.get_samples().shape
        (400, 2)
    """

    target: Target
    kernel: Kernel
    unknowns: PyTree
    info: Info
    last_state: PyTree
    report: SolveReport
    extra_fields: Sequence[str] = ()
    _samples: dict = field(default_factory=dict, repr=False, compare=False)

    @property
    def num_chains(self) -> int:
        return jax.tree.leaves(self.unknowns)[0].shape[0]

    @property
    def num_samples(self) -> int:
        """Draws kept per chain."""
        return jax.tree.leaves(self.unknowns)[0].shape[1]

    def get_samples(self, group_by_chain: bool = False) -> PyTree:
        """Draws as the user's model names them: constrained latent and deterministic sites of a NumPyro model, or
        the position's own pytree for a plain log density.

        Leading axes (num_chains, num_samples) with ``group_by_chain``, else (num_chains * num_samples,).
        """
        if "grouped" not in self._samples:
            self._samples["grouped"] = self._constrained()
        grouped = self._samples["grouped"]
        if group_by_chain:
            return grouped
        return jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:]), grouped)

    def _constrained(self) -> PyTree:
        flat = jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:]), self.unknowns)
        total = self.num_chains * self.num_samples
        batch = min(total, _CONSTRAIN_BATCH)

        def constrained(start: int) -> PyTree:
            rows = np.minimum(np.arange(start, start + batch), total - 1)  # one shape, so one compilation
            part = _constrain(self.target, self.kernel, jax.tree.map(lambda x: x[rows], flat))
            return jax.tree.map(lambda x: np.asarray(x)[: total - start], part)

        parts = [constrained(start) for start in range(0, total, batch)]
        joined = jax.tree.map(lambda *xs: np.concatenate(xs), *parts)
        return jax.tree.map(lambda x: jnp.asarray(x.reshape(self.num_chains, self.num_samples, *x.shape[1:])), joined)

    def get_extra_fields(self, group_by_chain: bool = False) -> dict[str, Any]:
        """Fields of the transitions under NumPyro's names: ``diverging``, and those asked for by ``extra_fields``.

        Available are the names in the kernel's ``extra_fields``.

        Raises:
            ValueError: an algorithm of another package does not report a field.
        """
        fields = self._fields()
        names = dict.fromkeys(("diverging", *self.extra_fields))
        missing = [name for name in names if name not in fields]
        if missing:
            raise ValueError(f"the kernel's algorithm does not report {missing}: expected names out of {list(fields)}.")
        grouped = {name: np.asarray(fields[name]) for name in names}
        if not group_by_chain:
            grouped = {name: x.reshape(-1) for name, x in grouped.items()}
        return {name: jnp.asarray(x) for name, x in grouped.items()}

    def _fields(self) -> dict[str, Any]:
        info = self.info
        fields: dict[str, Any] = {
            "diverging": info.is_divergent,
            "accept_prob": info.acceptance_rate,
            "potential_energy": -info.logdensity,
        }
        if info.energy is not None:
            fields["energy"] = info.energy
        steps = info.num_integration_steps
        if steps is None:
            steps = getattr(self.kernel, "num_integration_steps", None)
        if steps is not None:
            fields["num_steps"] = np.broadcast_to(np.asarray(steps), info.margin.shape)
        if info.tree_depth is not None:
            fields["tree_depth"] = info.tree_depth
        return fields

    def print_summary(self, prob: float = 0.9) -> None:
        """Mean, standard deviation, quantiles, effective sample size and R-hat of every site, by NumPyro."""
        samples = self.get_samples(group_by_chain=True)
        print_summary(samples if isinstance(samples, dict) else {"x": samples}, prob)
        print(f"Number of divergences: {int(np.sum(self.info.is_divergent))}")

    def to_arviz(self) -> Any:
        """ArviZ's container: InferenceData on ArviZ 0.x, DataTree on 1.x.

        Groups: posterior; sample_stats with ``lp``, ``acceptance_rate``, ``diverging``, ``step_size``, ``energy``,
        ``n_steps`` and ``tree_depth`` as far as the kernel has them, and ``accept_margin`` (log alpha - log u).
        """
        samples = self.get_samples(group_by_chain=True)
        if not isinstance(samples, dict):
            samples = _named_leaves(samples)
        return to_arviz(
            samples, self._sample_stats(), {"inference_library": "pmcmc", "kernel": type(self.kernel).__name__}
        )

    def _sample_stats(self) -> dict[str, Any]:
        """The same fields under ArviZ's names."""
        fields = self._fields()
        stats = {
            "lp": self.info.logdensity,
            "acceptance_rate": fields["accept_prob"],
            "diverging": fields["diverging"],
            "accept_margin": self.info.margin,
        }
        if hasattr(self.kernel, "step_size"):
            stats["step_size"] = np.broadcast_to(np.asarray(self.kernel.step_size), self.info.margin.shape)
        if "energy" in fields:
            stats["energy"] = fields["energy"]
        if "num_steps" in fields:
            stats["n_steps"] = fields["num_steps"]
        if "tree_depth" in fields:
            stats["tree_depth"] = fields["tree_depth"]
        return stats


@jax.jit
def _constrain(target: Target, kernel: Kernel, unknowns: PyTree) -> PyTree:
    return jax.vmap(lambda unknown: target.model.constrain(target.data, kernel.position(target, unknown)))(unknowns)


def _named_leaves(samples: PyTree) -> dict[str, Array]:
    """Names for a position that is no dict: ``x`` for a single array, else the path within the pytree."""
    leaves = jax.tree_util.tree_leaves_with_path(samples)
    if len(leaves) == 1 and not leaves[0][0]:
        return {"x": leaves[0][1]}
    return {"x" + jax.tree_util.keystr(path): leaf for path, leaf in leaves}
