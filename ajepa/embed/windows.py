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

MIN_PIECE_SAMPLES = 2**18

READ_AHEAD_FRAMES = (
    3_000  # of a sound that a thread makes before its turn comes: whole clips, the beginning of hours
)


class SoundStream:
    """A sound on its way through: its log-mel in pieces and, once they are all taken, its length in seconds."""

    def __init__(self, mels: Iterable[Tensor], seconds: float = 0.0) -> None:
        self.mels, self.seconds = iter(mels), seconds

    @classmethod
    def from_waves(cls, waves: Iterable[np.ndarray], spec: MelSpec) -> "SoundStream":
        """Of a wave in pieces, at the spec's rate."""
        sound = cls(())

        def count_seconds() -> Iterator[np.ndarray]:
            for wave_S in waves:
                sound.seconds += len(wave_S) / spec.sample_rate_hz
                yield wave_S

        sound.mels = stream_log_mel(count_seconds(), spec)
        return sound


def stream_log_mel(waves: Iterable[np.ndarray], spec: MelSpec) -> Iterator[Tensor]:
    """Log-mel of a wave in pieces, as pieces `TF`: frame for frame that of the whole wave (`mel.log_mel`)."""
    # A centred frame reaches back half a window; `ready` waits a whole one, which is more than it reaches ahead.
    margin = 0 if spec.framing == "kaldi" else -(-spec.window_samples // spec.hop_samples)
    held_S, told = torch.zeros(0), 0  # frames of the held samples that have been told
    for wave_S in join_short_pieces(waves):
        held_S = torch.cat((held_S, torch.from_numpy(wave_S)))
        ready = 1 + (len(held_S) - spec.window_samples) // spec.hop_samples
        if ready > told:
            yield log_mel(held_S[None], spec)[0, told:ready]
            gone = max(0, ready - margin)
            held_S, told = held_S[gone * spec.hop_samples :], ready - gone
    last_TF = log_mel(held_S[None], spec)[0, told:]
    if len(last_TF):
        yield last_TF


def join_short_pieces(waves: Iterable[np.ndarray]) -> Iterator[np.ndarray]:
    """Pieces joined to some seconds each: decoders give as little as 0.02 s at a time."""
    some: list[np.ndarray] = []
    for wave_S in waves:
        some.append(wave_S)
        if sum(map(len, some)) >= MIN_PIECE_SAMPLES:
            yield np.concatenate(some)
            some = []
    if some:
        yield np.concatenate(some)


def drop_frames(mels: Iterable[Tensor], frames: int) -> Iterator[Tensor]:
    """A spectrogram in pieces without its first frames."""
    for mel_TF in mels:
        yield mel_TF[frames:]
        frames = max(0, frames - len(mel_TF))


def open_ahead(
    openers: Iterable[Callable[[], SoundStream]], workers: int
) -> Iterator[Callable[[], SoundStream]]:
    """The same, each opened and begun by one of `workers` threads before its turn; 0: when its turn comes."""
    if not workers:
        yield from openers
        return
    coming, threads = iter(openers), ThreadPoolExecutor(workers, thread_name_prefix="sounds")
    try:
        begun = deque(threads.submit(open_and_prefetch, opening) for opening in islice(coming, 2 * workers))
        while begun:
            yield begun.popleft().result
            begun.extend(threads.submit(open_and_prefetch, opening) for opening in islice(coming, 1))
    finally:
        threads.shutdown(cancel_futures=True)


def open_and_prefetch(opener: Callable[[], SoundStream]) -> SoundStream:
    """A sound of which the first half minute is there: for most, all."""
    sound, head, frames = opener(), list[Tensor](), 0
    for mel_TF in sound.mels:
        head.append(mel_TF)
        frames += len(mel_TF)
        if frames >= READ_AHEAD_FRAMES:
            break
    sound.mels = chain(head, sound.mels)
    return sound


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class SoundWindow:
    """One view of a sound: at most a grid's frames of it, and which of its time columns it tells.

    mel_TF       log-mel as computed; fewer frames than the grid has where the sound ends
    start        the sound's column at which it begins
    first, last  columns [first, last) of the sound are told by this window: in it they have the most context
    """

    mel_TF: Tensor
    start_column: int
    first_column: int
    end_column: int


def cut_windows(mels: Iterable[Tensor], grid: PatchGrid, hop_columns: int) -> Iterator[SoundWindow]:
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
                yield finish_window(before, start, reach)
            before = (start, first_own_column(before, start, reach), view_TF)
            held_TF, at, start = held_TF[(start - at) * size :], start, start + hop_columns
    if not len(held_TF):
        return
    columns = at + -(-len(held_TF) // size)
    if before is not None:
        if hop_columns < reach:
            start = columns - reach
        yield finish_window(before, start, reach)
    view_TF = held_TF[(start - at) * size :]
    yield SoundWindow(
        mel_TF=view_TF,
        start_column=start,
        first_column=first_own_column(before, start, reach),
        end_column=columns,
    )


def first_own_column(previous: tuple[int, int, Tensor] | None, start: int, window_columns: int) -> int:
    """The first column that a window tells, beside the one before it."""
    return start if previous is None else (previous[0] + window_columns + start) // 2


def finish_window(window: tuple[int, int, Tensor], next_start: int, window_columns: int) -> SoundWindow:
    start, first, view_TF = window
    return SoundWindow(
        mel_TF=view_TF,
        start_column=start,
        first_column=first,
        end_column=first_own_column(window, next_start, window_columns),
    )


def window_hop_columns(grid: PatchGrid, overlap: float) -> int:
    """Columns between windows that share `overlap` of their length; ValueError outside [0, 1)."""
    if not 0 <= overlap < 1:
        raise ValueError(f"overlap must lie in [0, 1), got {overlap}")
    return max(1, round(grid.cols * (1 - overlap)))
