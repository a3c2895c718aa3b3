"""Embedding: what is told of one sound, and how it comes together from windows."""

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from pipeline.errors import AudioError


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Embedding:
    """One sound's vectors, float32 on the CPU.

    clip_D      mean of the vectors of all time columns that begin inside the sound
    frames_TD   one vector a column, for those whose centre lies inside the sound; at least one
    times_ms_T  where those centres lie, float64, evenly spaced. A sound that ends before its first centre
                has one frame, told at its middle
    seconds     length of the sound
    """

    clip_D: Tensor
    frames_TD: Tensor
    times_ms_T: Tensor
    seconds: float


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Embeddings:
    """Those of several sounds: `clips_BD`, `width` values wide, and for each its `Embedding`."""

    each: tuple[Embedding, ...]
    width: int

    @property
    def clips_BD(self) -> Tensor:
        """One vector a sound, float32 on the CPU."""
        return torch.stack([torch.zeros(self.width), *(one.clip_D for one in self.each)])[1:]  # of none, too

    def __len__(self) -> int:
        return len(self.each)

    def __getitem__(self, index: int) -> Embedding:
        return self.each[index]


class Making:
    """What is known so far of one sound."""

    def __init__(self, keep: bool) -> None:
        self.keep, self.open, self.seconds = keep, True, 0.0
        self.expected, self.received, self.columns = 0, 0, 0
        self.sum_D: Tensor | float = 0.0
        self.frames: list[Tensor] = []
        self.failure: AudioError | None = None

    @property
    def done(self) -> bool:
        return not self.open and (self.failure is not None or self.received == self.expected)

    def add(self, columns_CD: Tensor) -> None:
        """The next window's columns."""
        self.received, self.columns = self.received + 1, self.columns + len(columns_CD)
        self.sum_D = self.sum_D + columns_CD.double().sum(0)
        if self.keep:
            self.frames.append(columns_CD)

    def embedding(self, first_centre_ms: float, column_ms: float) -> Embedding:
        clip_D = torch.as_tensor(self.sum_D / self.columns).float()
        frames_TD = torch.cat([*self.frames, clip_D.new_zeros(0, len(clip_D))])
        times_ms_T = first_centre_ms + column_ms * torch.arange(len(frames_TD), dtype=torch.float64)
        inside_T = times_ms_T <= self.seconds * 1e3
        if self.keep and not inside_T.any():
            frames_TD, times_ms_T = frames_TD[:1], torch.tensor([self.seconds * 500], dtype=torch.float64)
        else:
            frames_TD, times_ms_T = frames_TD[inside_T], times_ms_T[inside_T]
        return Embedding(clip_D=clip_D, frames_TD=frames_TD, times_ms_T=times_ms_T, seconds=self.seconds)


def all_good(told: Iterable[Embedding | AudioError], width: int) -> Embeddings:
    """Every sound's; raises the AudioError of the first that could not be used."""
    each = []
    for one in told:
        if isinstance(one, AudioError):
            raise one
        each.append(one)
    return Embeddings(each=tuple(each), width=width)
