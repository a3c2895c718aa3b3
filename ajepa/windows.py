"""Windows: a sound of any length as log-mel, cut into overlapping views of an encoder's length, in bounded memory."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from ajepa.patches import PatchGrid


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Window:
    """One view of a sound: at most a grid's frames of it, and which of its time columns it tells.

    mel_TF       log-mel as computed; fewer frames than the grid has where the sound ends
    start        the sound's column at which it begins
    first, last  columns [first, last) of the sound are told by this window: in it they have the most context
    """

    mel_TF: Tensor
    start: int
    first: int
    last: int


def windows(mels: Iterable[Tensor], grid: PatchGrid, hop_columns: int) -> Iterator[Window]:
    """The views of a sound, `hop_columns` apart, and its last as far back as it is then full; none of no frame.

    With as many columns as the grid has there is no overlap, and the last is as long as there is sound. What two
    windows share is told by each up to the middle. Two windows of frames are held at a time.
    """
    size, reach = grid.patch_frames, grid.cols
    held_TF, at, start = (
        torch.zeros(0, grid.bands),
        0,
        0,
    )  # held from column `at` on; the next begins at `start`
    before: tuple[int, int, Tensor] | None = None  # a window whose end waits for the next one's start
    for mel_TF in mels:
        held_TF = torch.cat((held_TF, mel_TF))
        while len(held_TF) > (start + reach - at) * size:
            view_TF = held_TF[(start - at) * size :][: grid.frames]
            if before is not None:
                yield closed(before, start, reach)
            before = (start, told_from(before, start, reach), view_TF)
            held_TF, at, start = held_TF[(start - at) * size :], start, start + hop_columns
    if not len(held_TF):
        return
    columns = at + -(-len(held_TF) // size)
    if before is not None:
        if hop_columns < reach:
            start = columns - reach
        yield closed(before, start, reach)
    view_TF = held_TF[(start - at) * size :]
    yield Window(mel_TF=view_TF, start=start, first=told_from(before, start, reach), last=columns)


def told_from(before: tuple[int, int, Tensor] | None, start: int, reach: int) -> int:
    """The first column that a window tells, beside the one before it."""
    return start if before is None else (before[0] + reach + start) // 2


def closed(window: tuple[int, int, Tensor], next_start: int, reach: int) -> Window:
    start, first, view_TF = window
    return Window(mel_TF=view_TF, start=start, first=first, last=told_from(window, next_start, reach))


def hop_of(grid: PatchGrid, overlap: float) -> int:
    """Columns between windows that share `overlap` of their length; ValueError outside [0, 1)."""
    if not 0 <= overlap < 1:
        raise ValueError(f"overlap must lie in [0, 1), got {overlap}")
    return max(1, round(grid.cols * (1 - overlap)))
