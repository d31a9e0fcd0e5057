"""Inputs that are drawn where they are needed, instead of being read from memory; see `Drawn`."""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

from pmcmc._pytree import Array, PyTree
from pmcmc._xla.lanes_last import vmap_last
from pmcmc.recurrence.abreast import scan_abreast


class Drawn(NamedTuple):
    """Inputs that are a function of a lane's source, such as a key, and the number of the step.

    Nothing is stored: a step that is taken again draws its input again. Drawing is a kernel of its own, since the steps
    may be of a kind that no kernel takes. See `pmcmc.recurrence.sequential.Inputs`.

    Attributes:
        draw: ``(source, step) -> input`` of one lane. The steps of a lane are numbered from 0.
        sources: Sources of all lanes, lanes last.
    """

    draw: Callable[[PyTree, Array], PyTree]
    sources: PyTree

    def of_step(self, step: Array | int) -> PyTree:
        return jax.tree.map(lambda x: jnp.moveaxis(x[0], -1, 0), self.of_chunk(jnp.asarray(step), 1))

    def of_chunk(self, first: Array, length: int) -> PyTree:
        draw, num_lanes = vmap_last(self.draw, (-1, None)), jax.tree.leaves(self.sources)[0].shape[-1]
        body = lambda _, step: (None, draw(self.sources, step))
        return scan_abreast(body, None, first + jnp.arange(length), length, num_lanes)[1]
