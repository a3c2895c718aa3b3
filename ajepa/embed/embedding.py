"""Embedding and Embeddings: the vectors of one sound and of several, and how they are built from encoded windows."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from ajepa.model.pooling import PoolingName, pooled_deviation
from pipeline.errors import AudioError

ERRORS_IN_REPR = 1  # of failed sounds, so that a notebook's cell stays short


@dataclass(frozen=True, kw_only=True, slots=True, eq=False, repr=False)
class Embedding:
    """The vectors of one sound, float32 on the CPU.

    clip_D      mean of the vectors of all time columns that begin inside the sound; pooled by `moments` it is followed
                by their standard deviation
    frames_TD   one vector for each column whose centre is inside the sound; at least one
    times_ms_T  times of these centres in milliseconds, float64, evenly spaced. A sound that ends before the first
                centre has one frame, at the middle of the sound
    seconds     length of the sound in seconds
    error       why the sound could not be used: its `clip_D` is then nan, and it has no frames; None for a good sound
    """

    clip_D: Tensor
    frames_TD: Tensor
    times_ms_T: Tensor
    seconds: float
    error: AudioError | None = None

    @classmethod
    def from_error(cls, error: AudioError, *, width: int, frame_width: int) -> "Embedding":
        """The row of a sound that could not be used."""
        return cls(
            clip_D=torch.full((width,), torch.nan),
            frames_TD=torch.zeros(0, frame_width),
            times_ms_T=torch.zeros(0, dtype=torch.float64),
            seconds=torch.nan,
            error=error,
        )

    def __repr__(self) -> str:
        if self.error is not None:
            return f"Embedding(failed, {self.error.reason}: {self.error})"
        frames, width = self.frames_TD.shape
        return f"Embedding({self.seconds:.2f} s, clip_D [{len(self.clip_D)}], frames_TD [{frames}, {width}])"


@dataclass(frozen=True, kw_only=True, slots=True, eq=False, repr=False)
class Embeddings:
    """The embeddings of several sounds: an `Embedding` for each, and the clip vectors together as `clips_BD`.

    names   of the sounds, for messages: the path of a file
    """

    per_sound: tuple[Embedding, ...]
    width: int
    names: tuple[str, ...] = ()

    @property
    def clips_BD(self) -> Tensor:
        """One vector per sound, float32 on the CPU, nan for a failed one; shape `[0, D]` if there are no sounds."""
        if not self.per_sound:
            return torch.zeros(0, self.width)
        return torch.stack([embedding.clip_D for embedding in self.per_sound])

    @property
    def errors(self) -> Mapping[int, AudioError]:
        """Why sounds could not be used, by their number; empty if all could. `reason` of an error is a keyword."""
        return {
            number: embedding.error
            for number, embedding in enumerate(self.per_sound)
            if embedding.error is not None
        }

    @property
    def is_good_B(self) -> Tensor:
        """Which sounds have vectors, bool: `found.clips_BD[found.is_good_B]`."""
        return torch.tensor([embedding.error is None for embedding in self.per_sound], dtype=torch.bool)

    def __len__(self) -> int:
        return len(self.per_sound)

    def __getitem__(self, index: int) -> Embedding:
        return self.per_sound[index]

    def __iter__(self) -> Iterator[Embedding]:
        return iter(self.per_sound)

    def __repr__(self) -> str:
        failed = f", {describe_errors(self)}" if self.errors else ""
        return f"Embeddings(clips_BD [{len(self)}, {self.width}]{failed})"


class SoundResults(Protocol):
    """The results of several sounds: `Embeddings` or `Predictions`."""

    @property
    def errors(self) -> Mapping[int, AudioError]: ...
    @property
    def names(self) -> tuple[str, ...]: ...
    def __len__(self) -> int: ...


def describe_errors(results: SoundResults) -> str:
    """How many sounds failed, and why the first did: `1 of 3 failed: b.mp3: missing (...)`."""
    number, error = next(iter(results.errors.items()))
    name = results.names[number] if results.names else f"sound {number}"
    detail = str(error).removeprefix(f"{name.rpartition('/')[2]}: ")
    return f"{len(results.errors)} of {len(results)} failed: {name}: {error.reason} ({detail})"


def require_embeddings(
    results: Iterable[Embedding | AudioError], width: int, names: Sequence[str] = ()
) -> Embeddings:
    """Return the embeddings of all sounds; raise the AudioError of the first sound that could not be used."""
    embeddings = []
    for result in results:
        if isinstance(result, AudioError):
            raise result
        embeddings.append(result)
    return Embeddings(per_sound=tuple(embeddings), width=width, names=tuple(names))


def collect_embeddings(
    results: Iterable[Embedding | AudioError], *, width: int, frame_width: int, names: Sequence[str]
) -> Embeddings:
    """Return a row for every sound, also for a failed one; raise the first AudioError if all of them failed."""
    rows = [
        Embedding.from_error(result, width=width, frame_width=frame_width)
        if isinstance(result, AudioError)
        else result
        for result in results
    ]
    embeddings = Embeddings(per_sound=tuple(rows), width=width, names=tuple(names))
    if rows and len(embeddings.errors) == len(rows):
        raise embeddings.errors[0]
    return embeddings


class EmbeddingBuilder:
    """Collects the columns of one sound for its embedding; `is_open` until the last window of the sound is cut."""

    def __init__(self, pooling: PoolingName, *, keep_frames: bool) -> None:
        # The state of the sound, and the numbers of its windows that were cut and encoded.
        self.is_open = True
        self.seconds = 0.0
        self.failure: AudioError | None = None
        self.expected_windows = 0
        self.received_windows = 0

        # The columns of these windows: their sum and that of their squares in float64; every column if frames are kept.
        self.pooling = pooling
        self.keep_frames = keep_frames
        self.column_count = 0
        self.sum_D: Tensor | float = 0.0
        self.square_D: Tensor | float = 0.0
        self.frames: list[Tensor] = []

    @property
    def is_done(self) -> bool:
        """Whether the result is final: all windows are encoded, or the sound has failed."""
        if self.is_open:
            return False
        return self.failure is not None or self.received_windows == self.expected_windows

    def add_columns(self, columns_CD: Tensor) -> None:
        """Add the columns of the next window."""
        self.received_windows += 1
        self.column_count += len(columns_CD)
        exact_CD = columns_CD.double()
        self.sum_D = self.sum_D + exact_CD.sum(0)
        if self.pooling == "moments":
            self.square_D = self.square_D + exact_CD.square().sum(0)
        if self.keep_frames:
            self.frames.append(columns_CD)

    def build_embedding(self, first_centre_ms: float, column_ms: float) -> Embedding:
        """Return the embedding; the arguments are the centre of the first column and the time between columns."""
        # The vector of the clip: the mean over its columns, and their deviation if the pooling has it.
        mean_D = torch.as_tensor(self.sum_D / self.column_count)
        clip_D = mean_D.float()
        if self.pooling == "moments":
            variance_D = self.square_D / self.column_count - mean_D.square()
            clip_D = torch.cat((mean_D, pooled_deviation(variance_D))).float()

        # Select the frames whose centre is inside the sound; there are none if frames were not kept.
        frames_TD = torch.cat([*self.frames, clip_D.new_zeros(0, len(mean_D))])
        times_ms_T = first_centre_ms + column_ms * torch.arange(len(frames_TD), dtype=torch.float64)
        inside_T = times_ms_T <= self.seconds * 1e3
        if self.keep_frames and not inside_T.any():
            # The sound ends before the first centre: keep one frame, at the middle of the sound.
            frames_TD = frames_TD[:1]
            times_ms_T = torch.tensor([self.seconds * 1e3 / 2], dtype=torch.float64)
        else:
            frames_TD = frames_TD[inside_T]
            times_ms_T = times_ms_T[inside_T]
        return Embedding(clip_D=clip_D, frames_TD=frames_TD, times_ms_T=times_ms_T, seconds=self.seconds)
