"""Sound: its log-mel in pieces, however long it is; sounds opened by threads before their turn.

Windows: a sound of any length as log-mel, cut into overlapping views of an encoder's length, in bounded memory.
"""

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import chain, islice

import numpy as np
import torch
from torch import Tensor

from ajepa.model.patches import PatchGrid
from pipeline.audio.mel import log_mel
from pipeline.audio.mel_spec import MelSpec

GATHERED_SAMPLES = 2**18

HEAD_FRAMES = (
    3_000  # of a sound that a thread makes before its turn comes: whole clips, the beginning of hours
)


class Sound:
    """A sound on its way through: its log-mel in pieces and, once they are all taken, its length in seconds."""

    def __init__(self, mels: Iterable[Tensor], seconds: float = 0.0) -> None:
        self.mels, self.seconds = iter(mels), seconds

    @classmethod
    def of_waves(cls, waves: Iterable[np.ndarray], spec: MelSpec) -> "Sound":
        """Of a wave in pieces, at the spec's rate."""
        sound = cls(())

        def counted() -> Iterator[np.ndarray]:
            for wave_S in waves:
                sound.seconds += len(wave_S) / spec.sample_rate_hz
                yield wave_S

        sound.mels = mel_pieces(counted(), spec)
        return sound


def mel_pieces(waves: Iterable[np.ndarray], spec: MelSpec) -> Iterator[Tensor]:
    """Log-mel of a wave in pieces, as pieces `TF`: frame for frame that of the whole wave (`mel.log_mel`)."""
    # A centred frame reaches back half a window; `ready` waits a whole one, which is more than it reaches ahead.
    margin = 0 if spec.framing == "kaldi" else -(-spec.window_samples // spec.hop_samples)
    held_S, told = torch.zeros(0), 0  # frames of the held samples that have been told
    for wave_S in gathered(waves):
        held_S = torch.cat((held_S, torch.from_numpy(wave_S)))
        ready = 1 + (len(held_S) - spec.window_samples) // spec.hop_samples
        if ready > told:
            yield log_mel(held_S[None], spec)[0, told:ready]
            gone = max(0, ready - margin)
            held_S, told = held_S[gone * spec.hop_samples :], ready - gone
    last_TF = log_mel(held_S[None], spec)[0, told:]
    if len(last_TF):
        yield last_TF


def gathered(waves: Iterable[np.ndarray]) -> Iterator[np.ndarray]:
    """Pieces joined to some seconds each: decoders give as little as 0.02 s at a time."""
    some: list[np.ndarray] = []
    for wave_S in waves:
        some.append(wave_S)
        if sum(map(len, some)) >= GATHERED_SAMPLES:
            yield np.concatenate(some)
            some = []
    if some:
        yield np.concatenate(some)


def without(mels: Iterable[Tensor], frames: int) -> Iterator[Tensor]:
    """A spectrogram in pieces without its first frames."""
    for mel_TF in mels:
        yield mel_TF[frames:]
        frames = max(0, frames - len(mel_TF))


def ahead(openings: Iterable[Callable[[], Sound]], workers: int) -> Iterator[Callable[[], Sound]]:
    """The same, each opened and begun by one of `workers` threads before its turn; 0: when its turn comes."""
    if not workers:
        yield from openings
        return
    coming, threads = iter(openings), ThreadPoolExecutor(workers, thread_name_prefix="sounds")
    try:
        begun = deque(threads.submit(begin, opening) for opening in islice(coming, 2 * workers))
        while begun:
            yield begun.popleft().result
            begun.extend(threads.submit(begin, opening) for opening in islice(coming, 1))
    finally:
        threads.shutdown(cancel_futures=True)


def begin(opening: Callable[[], Sound]) -> Sound:
    """A sound of which the first half minute is there: for most, all."""
    sound, head, frames = opening(), list[Tensor](), 0
    for mel_TF in sound.mels:
        head.append(mel_TF)
        frames += len(mel_TF)
        if frames >= HEAD_FRAMES:
            break
    sound.mels = chain(head, sound.mels)
    return sound


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
