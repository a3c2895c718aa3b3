"""Sounds of any length as pieces of log-mel and as overlapping windows of the encoder's length, in bounded memory."""

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from itertools import chain, islice

import numpy as np
import torch
from torch import Tensor

from ajepa.model.patches import PatchGrid
from pipeline.audio.mel import log_mel
from pipeline.audio.mel_spec import MelSpec

# Waves are transformed in pieces of at least this many samples; pieces from decoders may be as short as 0.02 s.
MIN_PIECE_SAMPLES = 2**18

# A thread computes this many frames of a sound in advance: all of most clips, the beginning of very long sounds.
READ_AHEAD_FRAMES = 3_000


class SoundStream:
    """A sound being read: its log-mel in pieces `TF`; its length in seconds is final once all are read."""

    def __init__(self, mels: Iterable[Tensor], seconds: float = 0.0) -> None:
        self.mels = iter(mels)
        self.seconds = seconds

    @classmethod
    def from_waves(cls, waves: Iterable[np.ndarray], spec: MelSpec) -> "SoundStream":
        """Return the stream of a wave, which comes in pieces at the spec's sample rate."""
        sound = cls(())

        def count_seconds() -> Iterator[np.ndarray]:
            for wave_S in waves:
                sound.seconds += len(wave_S) / spec.sample_rate_hz
                yield wave_S

        sound.mels = stream_log_mel(count_seconds(), spec)
        return sound


def stream_log_mel(waves: Iterable[np.ndarray], spec: MelSpec) -> Iterator[Tensor]:
    """Yield the log-mel of a wave piece by piece, `TF`; the frames equal those of the whole wave (`mel.log_mel`)."""
    # A centred frame needs half a window on either side of its centre. `ready` waits for a whole window, which is more.
    margin = 0 if spec.framing == "kaldi" else -(-spec.window_samples // spec.hop_samples)

    # The end of the wave so far, and the number of frames beginning in it that are already yielded.
    tail_S = torch.zeros(0)
    given = 0
    for wave_S in join_short_pieces(waves):
        tail_S = torch.cat((tail_S, torch.from_numpy(wave_S)))
        ready = 1 + (len(tail_S) - spec.window_samples) // spec.hop_samples
        if ready > given:
            yield log_mel(tail_S[None], spec)[0, given:ready]

            # Drop the samples that no later frame needs.
            forgotten = max(0, ready - margin)
            tail_S = tail_S[forgotten * spec.hop_samples :]
            given = ready - forgotten

    # Yield the frames at the end of the wave.
    last_TF = log_mel(tail_S[None], spec)[0, given:]
    if len(last_TF):
        yield last_TF


def join_short_pieces(waves: Iterable[np.ndarray]) -> Iterator[np.ndarray]:
    """Yield the same wave in longer pieces, of some seconds each."""
    pieces: list[np.ndarray] = []
    for wave_S in waves:
        pieces.append(wave_S)
        if sum(map(len, pieces)) >= MIN_PIECE_SAMPLES:
            yield np.concatenate(pieces)
            pieces = []
    if pieces:
        yield np.concatenate(pieces)


def drop_frames(mels: Iterable[Tensor], frames: int) -> Iterator[Tensor]:
    """Yield the pieces of a spectrogram without its first frames."""
    for mel_TF in mels:
        yield mel_TF[frames:]
        frames = max(0, frames - len(mel_TF))


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class SoundWindow:
    """One view of a sound: at most as many frames as the grid has, and the range of columns that the window owns.

    A window owns the columns of the sound that have more context in this window than in its neighbours.

    mel_TF        log-mel, not normalised; fewer frames than the grid if the sound ends here
    start_column  column of the sound at which the window begins
    first_column  first column of the sound that the window owns
    end_column    one past the last column that the window owns
    """

    mel_TF: Tensor
    start_column: int
    first_column: int
    end_column: int


def column_ms(grid: PatchGrid, mel: MelSpec) -> float:
    """Return the time between the middles of adjacent columns, in milliseconds."""
    return grid.patch_frames * mel.hop_samples / mel.sample_rate_hz * 1e3


def first_centre_ms(grid: PatchGrid, mel: MelSpec) -> float:
    """Return the middle of the first column in milliseconds: half-way between its first and its last sample."""
    reach_samples = mel.window_samples if mel.framing == "kaldi" else 0
    samples = (grid.patch_frames - 1) * mel.hop_samples + reach_samples
    return samples / 2 / mel.sample_rate_hz * 1e3


def window_hop_columns(grid: PatchGrid, overlap: float) -> int:
    """Return the distance in columns between the starts of windows that share `overlap` of their length.

    ValueError if `overlap` is outside [0, 1).
    """
    if not 0 <= overlap < 1:
        raise ValueError(f"overlap must lie in [0, 1), got {overlap}")
    return max(1, round(grid.cols * (1 - overlap)))


def cut_windows(mels: Iterable[Tensor], grid: PatchGrid, hop_columns: int) -> Iterator[SoundWindow]:
    """Yield the windows of a sound, which start `hop_columns` apart; no window if the sound has no frame.

    The last window of a long sound starts early enough to be full. If windows do not overlap (`hop_columns` equals the
    columns of the grid), the last window ends with the sound and may be shorter. Of the columns that two windows share,
    each window owns the half that is nearer to its middle. Frames of at most two windows are in memory.
    """
    # The frames from column `tail_column` on; the next window starts at column `start`.
    tail_TF = torch.zeros(0, grid.bands)
    tail_column = 0
    start = 0

    # The previous window waits here until the next window sets the end of its own columns.
    previous: SoundWindow | None = None
    for mel_TF in mels:
        tail_TF = torch.cat((tail_TF.to(mel_TF), mel_TF))

        # Cut a window only if frames remain after it: the last window is cut below.
        while len(tail_TF) > (start + grid.cols - tail_column) * grid.patch_frames:
            first_column = first_own_column(previous, start, grid.cols)
            if previous is not None:
                yield replace(previous, end_column=first_column)
            tail_TF = tail_TF[(start - tail_column) * grid.patch_frames :]
            tail_column = start
            previous = SoundWindow(
                mel_TF=tail_TF[: grid.frames],
                start_column=start,
                first_column=first_column,
                end_column=start + grid.cols,
            )
            start += hop_columns
    if not len(tail_TF):
        return

    # Yield the previous window and the last window.
    end_column = tail_column + -(-len(tail_TF) // grid.patch_frames)
    if previous is not None and hop_columns < grid.cols:
        start = end_column - grid.cols
    first_column = first_own_column(previous, start, grid.cols)
    if previous is not None:
        yield replace(previous, end_column=first_column)
    yield SoundWindow(
        mel_TF=tail_TF[(start - tail_column) * grid.patch_frames :],
        start_column=start,
        first_column=first_column,
        end_column=end_column,
    )


def first_own_column(previous: SoundWindow | None, start_column: int, window_columns: int) -> int:
    """Return the first column that a window owns: the middle of the columns that it shares with the previous window."""
    if previous is None:
        return start_column
    return (previous.start_column + window_columns + start_column) // 2


def open_ahead(
    openers: Iterable[Callable[[], SoundStream]], workers: int
) -> Iterator[Callable[[], SoundStream]]:
    """Yield functions that return the opened sounds; `workers` threads open them in advance (0: opened when called)."""
    if not workers:
        yield from openers
        return
    remaining = iter(openers)
    threads = ThreadPoolExecutor(workers, thread_name_prefix="sounds")
    try:
        # Two sounds per thread are opened in advance; when the caller takes one, the next is started.
        started = deque(
            threads.submit(open_and_prefetch, opener) for opener in islice(remaining, 2 * workers)
        )
        while started:
            yield started.popleft().result
            started.extend(threads.submit(open_and_prefetch, opener) for opener in islice(remaining, 1))
    finally:
        threads.shutdown(cancel_futures=True)


def open_and_prefetch(opener: Callable[[], SoundStream]) -> SoundStream:
    """Return the opened sound with the log-mel of its first half minute already computed: most sounds are shorter."""
    sound = opener()
    prefetched: list[Tensor] = []
    frames = 0
    for mel_TF in sound.mels:
        prefetched.append(mel_TF)
        frames += len(mel_TF)
        if frames >= READ_AHEAD_FRAMES:
            break
    sound.mels = chain(prefetched, sound.mels)
    return sound
