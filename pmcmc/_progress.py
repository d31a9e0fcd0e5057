"""The progress bar of a run."""

import sys
from collections.abc import Hashable
from typing import Any


class Progress:
    """One progress bar through warm-up, compilation and sampling.

    It counts the steps of each chain that are final and shows the number of sweeps and the remaining time. It is
    visible in terminals and notebooks only, so that logs and pipes stay clean.

    Args:
        num_samples: Steps per chain to be sampled, the total of the bar.
        show: Whether the user wants a bar.
    """

    def __init__(self, num_samples: int, show: bool):
        from tqdm import asyncio, auto

        in_notebook = auto.tqdm is not asyncio.tqdm  # in notebooks auto.tqdm is a subclass that draws a widget
        shown = show and (in_notebook or sys.stderr.isatty())
        self._bar: Any = auto.tqdm(total=num_samples, unit="step", unit_scale=True, disable=not shown)
        self._warmed, self._compiled = 0, set[Hashable]()
        self._stage = ""
        self._enter("warm-up")

    def close(self) -> None:
        """Leave the bar as it is."""
        self._bar.close()

    def warmed(self, num_steps: int) -> None:
        """Add ``num_steps`` to the count of warm-up steps."""
        self._warmed += num_steps
        self._bar.set_postfix_str(f"{self._warmed:,} steps")

    def sample(self) -> None:
        """End warm-up, and keep its duration out of the estimated rate of sampling."""
        self._bar.unpause()
        self._bar.set_postfix_str("", refresh=False)

    def solve(self, program: Hashable) -> None:
        """Begin a segment; say so if its program has not been used before and must be compiled first."""
        new = program not in self._compiled
        self._compiled.add(program)
        self._enter("compile and sample" if new else "sample")

    def _enter(self, stage: str) -> None:
        """Set the description. A new one is drawn at once, since its stage may last; tqdm times all other updates."""
        self._bar.set_description(stage, refresh=stage != self._stage)
        self._stage = stage

    def update(self, num_steps: int, num_sweeps: int) -> None:
        """Add ``num_steps`` steps per chain that are final.

        Args:
            num_steps: Further final steps of each chain.
            num_sweeps: Repair sweeps that the segment took; 0 if it was sampled sequentially.
        """
        self._bar.set_postfix_str(f"sweeps: {num_sweeps}" if num_sweeps else "", refresh=False)
        self._bar.update(num_steps)
