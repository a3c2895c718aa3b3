"""Metrics as curves for TensorBoard: an event file for each time that a run is carried on.

A kill loses the curves since the newest checkpoint at most, and these steps are taken again.
"""

from pathlib import Path
from typing import TYPE_CHECKING

from ajepa.training.run import Json

if TYPE_CHECKING:
    from torch.utils.tensorboard import SummaryWriter


def open_event_writer(folder: Path, first_step: int) -> "SummaryWriter":
    """A writer of a new event file, for steps from `first_step` on; older files no longer count from there on.

    Use it in a `with` block, which writes the events still held in memory, and flush it at every checkpoint.
    """
    from torch.utils.tensorboard import SummaryWriter  # imported late: takes more than a second

    return SummaryWriter(str(folder), purge_step=first_step)


def write_scalars(events: "SummaryWriter", step: int, line: Json) -> None:
    """Add the numbers of a line of metrics, each to the curve of its name."""
    for name, value in line.items():
        if isinstance(value, int | float) and name != "step":
            events.add_scalar(name, value, step)
