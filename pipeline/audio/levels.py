"""Levels of a wave: the range of its samples, its power, decibels, and what is no sound."""

import math
from dataclasses import dataclass
from typing import Self

import numpy as np

SILENCE_DBFS = -90.0
DIGITAL_SILENCE_DBFS = -200.0  # reported for digital silence, whose level is minus infinity
MAX_USABLE_PEAK = 1e6  # +120 dBFS: no sound is louder, and the power of far larger samples exceeds float32


@dataclass(frozen=True, slots=True)
class SampleRange:
    """The lowest and the highest sample of a wave; both are NaN if a sample is."""

    lowest: float
    highest: float

    @classmethod
    def from_wave(cls, wave_S: np.ndarray) -> Self:
        """The range of a wave, which must have a sample."""
        return cls(float(wave_S.min()), float(wave_S.max()))

    def join(self, other: "SampleRange") -> "SampleRange":
        """The range of both waves together."""
        return SampleRange(min(self.lowest, other.lowest), max(self.highest, other.highest))

    @property
    def peak(self) -> float:
        """The largest magnitude."""
        return max(self.highest, -self.lowest)

    @property
    def is_usable(self) -> bool:
        """Whether no sample is NaN, infinite or absurdly large."""
        return self.peak <= MAX_USABLE_PEAK  # a NaN compares as False

    @property
    def is_constant(self) -> bool:
        """Whether the samples differ by less than what counts as silence: a constant offset is no sound."""
        return magnitude_dbfs(self.highest - self.lowest) < SILENCE_DBFS

    @property
    def is_silent(self) -> bool:
        """Whether there is nothing to hear."""
        return self.is_constant or magnitude_dbfs(self.peak) < SILENCE_DBFS


def rms_magnitude(wave_S: np.ndarray) -> float:
    """Root mean square."""
    return math.sqrt(np.dot(wave_S, wave_S) / len(wave_S))


def magnitude_dbfs(magnitude: float) -> float:
    """Decibels relative to full scale; -200 for zero."""
    if magnitude > 0:
        return max(DIGITAL_SILENCE_DBFS, 20 * math.log10(magnitude))
    return DIGITAL_SILENCE_DBFS


def describe_bad_samples(wave_S: np.ndarray) -> str:
    """Describe samples that are NaN, infinite or absurdly large, in words."""
    is_bad_S = ~np.isfinite(wave_S)
    if not is_bad_S.any():
        return f"samples up to {SampleRange.from_wave(wave_S).peak:.3g} times full scale"
    return f"{is_bad_S.sum()} of {len(wave_S)} samples are NaN or infinite, the first at {is_bad_S.argmax()}"
