"""Statistics of draws by site, which print as a table."""

from itertools import product

import numpy as np

from pmcmc._pytree import ArrayLeaf, PyTree
from pmcmc.chain.draws import by_name
from pmcmc.interop.numpyro import summary_of


class Summary(dict):
    """Statistics by site, ``{site: {statistic: array}}``, as ``numpyro.diagnostics.summary`` returns them.

    It prints as NumPyro's table. The statistics are ``mean``, ``std``, ``median``, both ends of the highest posterior
    density interval (``5.0%`` and ``95.0%`` by default), ``n_eff`` and ``r_hat``; their arrays have the site's shape.

    Attributes:
        num_divergences: Number of divergent draws.

    Example:
        >>> import jax.numpy as jnp, pmcmc
        >>> logdensity = lambda x: -0.5 * jnp.sum(x["a"] ** 2)
        >>> chain = pmcmc.sample(logdensity, {"a": jnp.zeros(2)}, 0, num_samples=100, progress_bar=False)
        >>> summary = chain.summary()
        >>> summary["a"]["mean"].shape, len(str(summary).splitlines())
        ((2,), 6)
    """

    num_divergences: int

    def __init__(self, samples: PyTree, prob: float, is_divergent: ArrayLeaf):
        super().__init__(summary_of(by_name(samples), prob))
        self.num_divergences = int(np.sum(is_divergent))

    def __repr__(self) -> str:
        rows = []
        for site, found in self.items():
            for index in product(*map(range, np.shape(found["mean"]))):
                name = f"{site}[{','.join(map(str, index))}]" if index else site
                rows.append((name, [f"{values[index]:9.2f}" for values in found.values()]))
        width = max(10, *(len(name) for name, _ in rows))
        header = ("", [f"{name:>9}" for name in next(iter(self.values()))])
        table = "\n".join(" ".join([name.rjust(width), *cells]) for name, cells in [header, *rows])
        return f"\n{table}\n\nNumber of divergences: {self.num_divergences}"
