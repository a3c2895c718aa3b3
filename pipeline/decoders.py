"""Take: the wanted seconds of one file, decoded and mixed to mono; the only door to libsndfile.

Measured on 10 s stereo clips, PyAV takes this multiple of libsndfile's time: wav 4.8, flac 1.1, mp3 1.2,
vorbis 0.7, opus 0.4. So wav and flac are libsndfile's, all else PyAV's. mp3 too: libsndfile's mpg123 writes to
stderr about every damaged frame, and PyAV steps over it.
"""

import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol, Self

import numpy as np
import soundfile

from pipeline.containers import Container, Readable, opened
from pipeline.errors import AudioError
from pipeline.ffmpeg import Ffmpeg, FFmpegError
from pipeline.locators import Sound

LENGTH_SLACK = 0.02  # of the segment: a source that differs by less is neither shorter nor longer
COMPLETE = 0.95  # a clip that lacks less than 5 % of what it should hold is whole
RATES_HZ = range(1_000, 1_000_000)
BLOCK_SAMPLES = 2**20  # of all channels: ten seconds in one go, since soundfile seeks after every piece
FLAC_FRAMES = 2**14  # what damage may cost beyond itself


@dataclass(frozen=True, slots=True)
class Segment:
    """The seconds of a video that a clip is."""

    start_seconds: float
    end_seconds: float
    exact: bool = False  # of the sound that is decoded, which else may be the clip alone

    def __post_init__(self) -> None:
        if not 0 <= self.start_seconds < self.end_seconds:
            raise ValueError(f"[{self.start_seconds}, {self.end_seconds}) is no segment of a video")

    @property
    def seconds(self) -> float:
        return self.end_seconds - self.start_seconds

    def lies_in(self, source_seconds: float) -> bool:
        """Whether a file of that length is the whole video: longer than the clip, and reaching its end; +- 5 %."""
        if self.exact:
            return True
        tolerance = (1 - COMPLETE) * self.seconds
        return source_seconds > self.seconds + tolerance and source_seconds >= self.end_seconds - tolerance


@dataclass(frozen=True, kw_only=True, slots=True)
class Take:
    """The samples of a segment that are there, at the source's own rate; maybe fewer than wanted, maybe none."""

    wave_S: np.ndarray  # float32, plain mean of the channels
    rate_hz: int
    channels: int
    codec: str
    source_seconds: float  # of the whole source: as declared, or as found where it ended early
    expected_samples: (
        int | None
    )  # of the segment, by the declared length; None where the source declares none
    cut: bool  # from a whole video, at the segment's start; else from the first sample on
    beyond_full_scale: bool  # in any channel


class Source(Protocol):
    """A file that a decoder has opened."""

    @property
    def rate_hz(self) -> int: ...
    @property
    def channels(self) -> int: ...
    @property
    def codec(self) -> str: ...
    @property
    def seconds(self) -> float:
        """As declared, else as there."""

    @property
    def declared(self) -> bool:
        """Whether `seconds` is a promise to be held against what decodes."""

    def blocks(self, first: int, wanted: int) -> Iterator[np.ndarray]:
        """Float32 [channel, sample] pieces of samples [first, first + wanted), as far as they decode."""


def decode(sound: Sound, container: Container, segment: Segment, *, max_seconds: float) -> Take:
    """Decode the segment. AudioError unreadable where nothing can be opened, too_long over `max_seconds`."""
    with sourced(sound, container) as source:
        return take(source, segment, max_seconds)


@contextmanager
def sourced(sound: Sound, container: Container) -> Iterator[Source]:
    """The file, opened by its decoder; AudioError unreadable where it cannot be, or claims what cannot be."""
    decoder = Sndfile.opened if container.libsndfile else Ffmpeg.opened
    try:
        with decoder(sound, container) as source:
            if source.rate_hz not in RATES_HZ:
                detail = f"claims {source.rate_hz} samples a second; damaged, fetch it again"
                raise AudioError("unreadable", detail)
            yield source
    except (soundfile.LibsndfileError, FFmpegError, OSError) as error:
        what = error.strerror if isinstance(error, OSError | FFmpegError) else str(error)
        detail = f"no {container.demuxer} file that can be decoded ({what}); incomplete? Fetch it again"
        raise AudioError("unreadable", detail) from None


def take(source: Source, segment: Segment, max_seconds: float) -> Take:
    """Choose the samples, decode and mix them. What is allocated is bounded by the segment, not by a header."""
    refuse_too_long(source, max_seconds)
    cut = segment.lies_in(source.seconds)
    first = round(segment.start_seconds * source.rate_hz) if cut else 0
    wanted = round(segment.seconds * source.rate_hz)
    if cut and first >= round(source.seconds * source.rate_hz) > 0:
        start_seconds = segment.start_seconds
        detail = (
            f"the clip starts at {start_seconds:g} s of a sound of {source.seconds:.2f} s; correct its list"
        )
        raise AudioError("too_short", detail)
    wave_S, beyond_full_scale = mixed(source.blocks(first, wanted))
    found_seconds = (first + len(wave_S)) / source.rate_hz
    promised = min(wanted, round(source.seconds * source.rate_hz) - first)
    return Take(
        wave_S=wave_S,
        rate_hz=source.rate_hz,
        channels=source.channels,
        codec=source.codec,
        source_seconds=found_seconds if len(wave_S) < wanted else max(found_seconds, source.seconds),
        expected_samples=promised if source.declared else None,
        cut=cut and source.seconds > segment.seconds + LENGTH_SLACK * segment.seconds,
        beyond_full_scale=beyond_full_scale,
    )


def refuse_too_long(source: Source, max_seconds: float) -> None:
    """AudioError too_long where a file claims to be longer."""
    if source.seconds > max_seconds:
        detail = f"{source.seconds:.0f} s long, more than {max_seconds:.0f}; cut it, or raise max_seconds"
        raise AudioError("too_long", detail)


def mixed(blocks_CS: Iterable[np.ndarray]) -> tuple[np.ndarray, bool]:
    """Pieces of channels as one mono wave, and whether any channel went beyond full scale."""
    pieces, beyond = [np.zeros(0, np.float32)], False
    for block_CS in blocks_CS:
        beyond |= bool(block_CS.max() > 1.0 or block_CS.min() < -1.0)
        pieces.append(mono(block_CS))
    return np.concatenate(pieces), beyond


def mono(block_CS: np.ndarray) -> np.ndarray:
    """Mean of the channels; added up one by one, 20 times faster than `.mean()` over interleaved samples."""
    if len(block_CS) == 1:
        return block_CS[0]
    with np.errstate(invalid="ignore", over="ignore"):  # NaN and infinity are judged later
        mono_S = block_CS[0] + block_CS[1]
        for channel_S in block_CS[2:]:
            mono_S += channel_S
        mono_S /= len(block_CS)
    return mono_S


@contextmanager
def readable(sound: Sound) -> Iterator[bytes | Readable]:
    """What libsndfile can open: a path it opens itself."""
    if isinstance(sound, Path):
        yield os.fsencode(sound)
    else:
        with opened(sound) as file:
            yield file


@dataclass(frozen=True, kw_only=True, slots=True)
class Sndfile:
    """A file opened by libsndfile."""

    file: soundfile.SoundFile
    rate_hz: int
    channels: int
    codec: str
    seconds: float
    declared: bool = True

    @classmethod
    @contextmanager
    def opened(cls, sound: Sound, container: Container) -> Iterator[Self]:
        """The file; LibsndfileError where it is none."""
        with readable(sound) as what, soundfile.SoundFile(what) as file:
            frames = file.frames if container.declared_frames is None else container.declared_frames
            yield cls(
                file=file,
                rate_hz=file.samplerate,
                channels=file.channels,
                codec="flac" if file.format == "FLAC" else file.subtype.lower(),
                seconds=frames / file.samplerate,
            )

    def blocks(self, first: int, wanted: int) -> Iterator[np.ndarray]:
        """As `Source` says; what lies behind damage is out of reach."""
        try:
            self.file.seek(min(first, self.file.frames))
            while wanted > 0:
                frames = FLAC_FRAMES if self.codec == "flac" else max(1, BLOCK_SAMPLES // self.channels)
                block_SC = self.file.read(min(wanted, frames), dtype="float32", always_2d=True)
                if not len(block_SC):
                    return
                yield block_SC.T
                wanted -= len(block_SC)
        except soundfile.LibsndfileError:
            return
