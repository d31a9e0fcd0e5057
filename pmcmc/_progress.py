"""What a run shows of itself on its way, and the draws of warm-up for those who asked for them."""

import sys
from collections.abc import Hashable
from typing import Any


class Progress:
    """One bar through warm-up, compilation and sampling: draws that stand in every chain, sweeps, time left.

    Shown in terminals and notebooks, nowhere else: logs and pipes stay free of it.
    """

    def __init__(self, num_samples: int, show: bool):
        from tqdm import asyncio, auto

        in_notebook = auto.tqdm is not asyncio.tqdm  # a subclass that draws a widget
        shown = show and (in_notebook or sys.stderr.isatty())
        self._bar: Any = auto.tqdm(total=num_samples, unit="draw", unit_scale=True, disable=not shown)
        self._warmed, self._compiled = 0, set[Hashable]()
        self._stage = ""
        self._enter("warm-up")

    def close(self) -> None:
        """Leave the bar as it is."""
        self._bar.close()

    def warmed(self, num_steps: int) -> None:
        """Warm-up took ``num_steps`` more steps."""
        self._warmed += num_steps
        self._bar.set_postfix_str(f"{self._warmed:,} steps")

    def sample(self) -> None:
        """Warm-up is over. Its time is no sign of how long sampling takes."""
        self._bar.unpause()
        self._bar.set_postfix_str("", refresh=False)

    def solve(self, program: Hashable) -> None:
        """A stretch of draws begins; a program that was not met before is waited for first."""
        new = program not in self._compiled
        self._compiled.add(program)
        self._enter("compile and sample" if new else "sample")

    def _enter(self, stage: str) -> None:
        """Drawn at once where it is another one, since it may last; tqdm draws the rest as often as is sensible."""
        self._bar.set_description(stage, refresh=stage != self._stage)
        self._stage = stage

    def update(self, num_steps: int, num_sweeps: int) -> None:
        """So many more draws of every chain stand; sweeps: of the blocks that gave them, 0 for steps in order."""
        self._bar.set_postfix_str(f"sweeps: {num_sweeps}" if num_sweeps else "", refresh=False)
        self._bar.update(num_steps)
