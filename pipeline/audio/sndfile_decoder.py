"""The decoder of wav, flac and old kinds of files: a file opened by libsndfile; the only door to it.

It is the faster one for wav and flac. It cannot decode beyond damage.
"""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Self

import numpy as np
import soundfile

from pipeline.audio.byte_window import ReadableFile, SoundInput, open_from_start
from pipeline.audio.container_kinds import AudioContainer

SndfileError = soundfile.LibsndfileError

# Samples per read of libsndfile, over all channels: ten seconds at once. Of a block with damage it gives nothing.
SNDFILE_BLOCK_SAMPLES = 2**20


@dataclass(frozen=True, kw_only=True, slots=True)
class SndfileDecoder:
    """A file opened by libsndfile."""

    file: soundfile.SoundFile
    rate_hz: int
    channels: int
    codec: str
    seconds: float
    has_declared_length: bool = True
    filled_samples: int = 0  # such files have no time stamps, so there are no holes to fill

    @classmethod
    @contextmanager
    def open_file(cls, sound: SoundInput, container: AudioContainer) -> Iterator[Self]:
        """Open the sound; SndfileError if libsndfile cannot read it."""
        with open_for_sndfile(sound) as source, soundfile.SoundFile(source) as file:
            frames = file.frames if container.declared_frames is None else container.declared_frames
            yield cls(
                file=file,
                rate_hz=file.samplerate,
                channels=file.channels,
                codec="flac" if file.format == "FLAC" else file.subtype.lower(),
                seconds=frames / file.samplerate,
            )

    def read_blocks(self, first_sample: int, sample_count: int) -> Iterator[np.ndarray]:
        """Yield blocks as `AudioDecoder` says, up to the first damage: libsndfile cannot decode beyond it."""
        frames_per_block = max(1, SNDFILE_BLOCK_SAMPLES // self.channels)
        try:
            self._skip_samples(min(first_sample, self.file.frames), frames_per_block)
            while sample_count > 0:
                frames = min(sample_count, frames_per_block)
                block_SC = self.file.read(frames, dtype="float32", always_2d=True)
                if not len(block_SC):
                    return
                yield block_SC.T
                sample_count -= len(block_SC)
        except SndfileError:
            return

    def _skip_samples(self, samples: int, frames_per_block: int) -> None:
        """Go to a sample of a file at its beginning; SndfileError if that fails."""
        if self.file.seekable():
            self.file.seek(samples)
            return
        for begin in range(0, samples, frames_per_block):
            self.file.read(min(frames_per_block, samples - begin), dtype="float32")


def describe_sndfile_error(error: BaseException) -> str:
    """The message of libsndfile, without the name of an object in memory."""
    return str(getattr(error, "error_string", error)).rstrip(".")


@contextmanager
def open_for_sndfile(sound: SoundInput) -> Iterator[bytes | ReadableFile]:
    """The sound in a form that libsndfile opens: a path in the bytes of the file system, or an open file."""
    if isinstance(sound, Path):
        yield os.fsencode(sound)
    else:
        with open_from_start(sound) as file:
            yield file
