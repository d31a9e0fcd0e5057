"""Solve a segment in parts of the lanes, each in a thread: the calls of `pmcmc.recurrence.shooting.parts` in turn."""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np

from pmcmc._pytree import Array, PyTree
from pmcmc.kernels import Kernel
from pmcmc.recurrence import MultipleShooting, Solution
from pmcmc.recurrence.shooting.parts import Call, Part, conclude_parts, joined
from pmcmc.sampling.programs import Shape, draw_noise, one_carry, solve_part
from pmcmc.sampling.threads import AtOnce, Clock
from pmcmc.target import Target


@dataclass(frozen=True)
class InParts:
    """A segment that is solved in parts.

    Attributes:
        target: Target to sample.
        kernel: The tuned kernel.
        solver: Solver of the segment.
        shape: Shape for which the programs are compiled.
        chain_keys: Keys of the chains; shape (C,).
        guesses: A bank of unknowns from which initial guesses are taken.
        scale: Spread of each coordinate of an unknown; None if it is not known.
        x0: Unknowns before the first step, leading axis C. Here and below, shapes do for `lower`.
        first: Number of each chain's first step since its start; shape (C,).
        length: Steps of each block.
    """

    target: Target
    kernel: Kernel
    solver: MultipleShooting
    shape: Shape
    chain_keys: Array
    guesses: PyTree
    scale: PyTree
    x0: PyTree
    first: Any
    length: Any

    @property
    def num_chains(self) -> int:
        """C, the number of chains."""
        return len(self.chain_keys)

    def _arguments(self, noise: PyTree, *rest: Any) -> tuple[Any, ...]:
        """Return the arguments of `solve_part`."""
        model = (self.target, self.kernel, self.solver, noise, self.x0, self.first, self.length)
        return (*model, self.guesses, self.scale, *rest)

    def _blank(self) -> Part:
        """Return the state of a part before its first call."""
        end = one_carry.eval_shape(self.target, self.kernel, self.chain_keys, self.guesses)
        x = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape[1:], x.dtype), self.x0)
        num_lanes = self.num_chains * self.shape.num_blocks // self.shape.num_parts
        return Part.blank(end, x, num_lanes, self.num_chains, self.scale is not None)

    def _conclusion(self) -> dict[str, int]:
        """Return the static arguments of `conclude_parts`."""
        return dict(num_chains=self.num_chains, num_blocks=self.shape.num_blocks)

    def lower(self, noise: PyTree, buffers: PyTree) -> list[Any]:
        """Trace the programs; ``noise`` are the keys of the chains if the solve draws it."""
        part, number, integer = self._blank(), self._number(0), self.length.dtype
        what = Call(True, False, False, 0, 0).as_arrays(integer)
        rest = (number, what, part.message, part, buffers)
        counts = np.zeros(self.num_chains, integer)
        found = joined([part] * self.shape.num_parts)
        return [
            solve_part.lower(*self._arguments(noise, *rest), shape=self.shape, brief=self.shape.brief),
            conclude_parts.lower(self.solver, self.x0, found, counts, counts, number, **self._conclusion()),
        ]

    def solve(
        self, buffers: list[tuple[PyTree, PyTree]], at_once: AtOnce
    ) -> tuple[Solution, list[tuple[PyTree, PyTree]], list[PyTree]]:
        """Make all calls.

        Args:
            buffers: Noise, None if the solve draws it, and (value, aux), of each part; all are overwritten.
            at_once: Runs the parts.

        Returns:
            The solution without its states, the new buffers, and the near ties of each part.
        """
        parts, count = [self._blank()] * self.shape.num_parts, range(self.shape.num_parts)
        kept, ties = list(buffers), [None] * len(buffers)
        messages = [parts[0].message] * len(buffers)
        num_sweeps = np.zeros(self.num_chains, int)
        path = np.full(self.num_chains, int(self.length))

        def advance(what: Call, numbers: Iterable[int]) -> None:
            """Call some parts; the others do nothing."""

            def one(number: int) -> tuple[Any, Clock]:
                mine = what._replace(before_moved=what.before_moved and number > 0)
                noise, record = kept[number]
                source = self.chain_keys if self.shape.draws else noise
                rest = (
                    self._number(number),
                    mine.as_arrays(self.length.dtype),
                    messages[number],
                    parts[number],
                    record,
                )
                arguments = self._arguments(source, *rest)
                found, seconds = solve_part.timed(*arguments, shape=self.shape, brief=self.shape.brief)
                return (noise, found), Clock(*seconds)

            done = dict(zip(numbers, at_once(one, numbers), strict=True))
            for number in count:
                parts[number] = parts[number]._replace(moved=np.zeros((), bool))
            for number, (noise, (value, aux, near, part)) in done.items():
                kept[number], ties[number], parts[number] = (noise, (value, aux)), near, part
            for counts, name in ((num_sweeps, "num_sweeps"), (path, "taken")):
                counts += np.max([np.asarray(getattr(part, name)) for _, (*_, part) in done.values()], axis=0)
            messages[1:] = [part.message for part in parts[:-1]]

        if not self.shape.draws:
            noises = at_once(lambda number: self._draw(number, kept[number][0]), count)
            kept = [(noise, record) for noise, (_, record) in zip(noises, kept, strict=True)]
        advance(Call(True, False, False, 0, int(self.length)), count)
        advance(Call(False, True, True, 0, int(self.length)), count)
        # Hand over as long as an end has changed and a budget is left.
        _, max_sweeps, max_steps = self.solver.limits(self.x0)
        lanes = self.num_chains * self.shape.num_blocks // self.shape.num_parts
        joined_on = [number for number in count if number * lanes % self.shape.num_blocks]  # within a chain
        while pending := [number for number in joined_on if parts[number - 1].moved]:
            if num_sweeps.max() >= max_sweeps or path.max() >= max_steps:
                parts = [part.stopped() if number in pending else part for number, part in enumerate(parts)]
                break
            advance(Call(False, False, True, int(num_sweeps.max()), int(path.max())), pending)
        numbers = (num_sweeps, path, self.length)
        solution = conclude_parts(self.solver, self.x0, joined(parts), *numbers, **self._conclusion())
        return solution, kept, ties

    def _draw(self, number: int, buffer: PyTree) -> tuple[PyTree, Clock]:
        """Draw the noise of a part."""
        arrays = (self.chain_keys, self.first, self.length, self._number(number), buffer)
        noise, seconds = draw_noise.timed(self.target, self.kernel, *arrays, shape=self.shape, brief=self.shape.brief)
        return noise, Clock(*seconds)

    def _number(self, number: int) -> np.ndarray:
        """Return an argument of the programs."""
        return np.asarray(number, self.length.dtype)
