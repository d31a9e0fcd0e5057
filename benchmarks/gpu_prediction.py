"""What a solve should take on a GPU, by counts of its program and stated costs, for the first figures to correct.

A step takes what is longer, the host's enqueues or the card's launches, and besides that the waits and the bytes that
noise, states and info of a step take through the card's memory. The counts are those of `benchmarks.gpu_programs` for
an H100. The costs are assumptions, not measurements.
"""

import json
from dataclasses import dataclass
from typing import Any

import jax

from benchmarks._harness import RESULTS

AS_GRAPHS = " as graphs"
COUNTED_LANES = 1024


@dataclass(frozen=True)
class Costs:
    """Assumed costs of a card and its host.

    Attributes:
        launch: Seconds that the card takes for a small kernel.
        enqueue: Seconds that the host takes to hand over a kernel or a graph.
        wait: Seconds until the host knows a result of the card.
        bandwidth: Bytes a second of the card's memory.
    """

    launch: float = 2e-6
    enqueue: float = 4e-6
    wait: float = 15e-6
    bandwidth: float = 3.35e12


def rows_of(case: str, graphs: bool) -> dict[str, Any] | None:
    """Return the counted solve of a case; without a count as graphs, that of the default with the host left out."""
    path = RESULTS / "gpu_programs.json"
    rows = json.loads(path.read_text())["rows"] if path.exists() else []
    rows = [row for row in rows if row["case"] == case and row["lanes"] == COUNTED_LANES]
    rows.sort(key=lambda row: row.get("jax") == jax.__version__)  # counts of this version count, if there are any
    found = {row["program"]: row for row in rows}
    if not graphs:
        return found.get("solve")
    if "solve" + AS_GRAPHS in found:
        return found["solve" + AS_GRAPHS]
    hosted = ("enqueues", "waits", "repair_enqueues", "repair_waits")
    return found["solve"] | dict.fromkeys(hosted, 0.0) if "solve" in found else None


def step_seconds(row: dict[str, Any], prefix: str, step_bytes: float, costs: Costs) -> float:
    """Return the seconds of a step in the zeroth sweep (``prefix`` "") or in repair ("repair_")."""
    launches, enqueues, waits = (row[prefix + count] for count in ("launches", "enqueues", "waits"))
    busy = max(launches * costs.launch, enqueues * costs.enqueue)
    return busy + waits * costs.wait + step_bytes / costs.bandwidth


def predicted_seconds(
    case: str, graphs: bool, block_length: int, repair_steps: int, step_bytes: float, costs: Costs | None = None
) -> float | None:
    """Predict the seconds of a solve; None if its program was not counted.

    Args:
        case: Name of the case, as in the counted rows.
        graphs: Whether loops run as graphs.
        block_length: Steps of the zeroth sweep.
        repair_steps: Steps of repair, one after the other.
        step_bytes: Bytes that a step of all lanes reads and writes.
        costs: Assumed costs.
    """
    row, costs = rows_of(case, graphs), costs or Costs()
    if row is None:
        return None
    zeroth = block_length * step_seconds(row, "", step_bytes, costs)
    return zeroth + repair_steps * step_seconds(row, "repair_", step_bytes, costs)
