"""What kernels that update named sites share: their unknown is the position, a dict of values in the user's space."""

from abc import abstractmethod
from typing import ClassVar

import jax
import jax.numpy as jnp

from pmcmc._tree import RavelSpec
from pmcmc._types import Array, PyTree
from pmcmc.kernels._base import Kernel
from pmcmc.target import Target


class SiteKernel(Kernel):
    """A kernel over a position that is a dict of sites; leaves may be integers, and gradients are not needed.

    The state is the unknown: there are no caches to restore.
    """

    extra_fields: ClassVar[tuple[str, ...]] = ("diverging", "potential_energy")

    @abstractmethod
    def site_names(self, target: Target) -> tuple[str, ...]:
        """The sites that this kernel updates."""

    def check(self, target):
        check_names(type(self).__name__, self.site_names(target), site_templates(target))

    def init(self, target, position):
        return jax.tree.map(lambda x, like: jnp.asarray(x, like.dtype), position, target.spec.template)

    def start(self, target, y):
        return self.init(target, target.position(y))

    def unknown(self, state: PyTree) -> PyTree:
        return state

    def restore(self, target, unknown: PyTree) -> PyTree:
        return unknown

    def coordinates(self, unknown: PyTree) -> Array:
        return RavelSpec.of(unknown).ravel(unknown)

    def position(self, target, unknown):
        return unknown


def site_templates(target: Target) -> dict[str, PyTree]:
    """Shapes and dtypes by site.

    Raises:
        TypeError: the position is no dict.
    """
    template = target.spec.template
    if not isinstance(template, dict):
        raise TypeError(f"sites have names: pass the initial position as a dict, got {type(template).__name__}.")
    return template


def check_names(who: str, names: tuple[str, ...], sites: dict[str, PyTree]) -> None:
    """Every name a site, every site named, and once.

    Raises:
        ValueError: expected, got, fix.
    """
    unknown, missing = [n for n in names if n not in sites], [n for n in sites if n not in names]
    repeated = sorted({n for n in names if names.count(n) > 1})
    if unknown:
        raise ValueError(f"{who} updates {unknown}, but the position has sites {list(sites)}: check the names.")
    if repeated:
        raise ValueError(f"{who} updates {repeated} more than once: leave each site to one block.")
    if missing:
        raise ValueError(f"{who} has no update for {missing}, which would never move: add one for each site.")
