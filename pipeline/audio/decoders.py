"""Ffmpeg: a file opened by FFmpeg through PyAV, which carries it; the only door to both.

Where sound begins: what a container states of its encoder's delay is honoured (LAME header in mp3, pre-skip in
opus, codec delay in matroska, edit list in mp4), and then the start is exact to the sample. AAC without such a
statement (ADTS, MPEG-TS, many mp4) begins with that delay, 1024 samples for FFmpeg's encoder: it cannot be
known from the file and is left in. Likewise mp3 without a LAME header, 1105 samples.
"""

import itertools
import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol, Self

import av
import numpy as np
import soundfile
from av import FFmpegError
from av.audio import AudioStream
from av.audio.frame import AudioFrame
from av.container import InputContainer

from pipeline.audio.containers import AudioContainer, ReadableFile, open_from_start
from pipeline.audio.sources import SoundInput
from pipeline.errors import AudioError

__all__ = ["FFmpegError", "FfmpegDecoder"]

FFMPEG_BLOCK_SAMPLES = 2**14

PRE_ROLL_SECONDS = 1.0  # decoded before a cut and thrown away: opus needs 0.08, AAC one frame

MAX_PLANES = 8  # with more, PyAV 18 runs past the end of FFmpeg's table of planes, and sometimes crashes

PYAV_MAJOR_VERSION = int(av.__version__.split(".")[0])

TAG_OPTIONS: dict[str, Any] = (
    {"metadata_errors": "replace"} if PYAV_MAJOR_VERSION < 19 else {}
)  # of itself from 19 on

FAILED_SEEK_SAMPLE = 2**62  # a sample number behind every sound: where a seek led that failed


@dataclass(frozen=True, kw_only=True, slots=True)
class FfmpegDecoder:
    """The best audio stream of a file opened by FFmpeg, its first frame decoded."""

    sound: SoundInput
    container: AudioContainer
    demuxer: InputContainer
    stream: AudioStream
    first_frame: AudioFrame
    later_frames: Iterator[AudioFrame]  # those after the first
    rate_hz: int
    channels: int
    codec: str
    seconds: float
    has_declared_length: bool

    @classmethod
    @contextmanager
    def open_file(cls, sound: SoundInput, container: AudioContainer) -> Iterator[Self]:
        """The file; FFmpegError where it is none, AudioError unreadable where it holds no sound."""
        with open_demuxer(sound, container) as (demuxer, stream):
            told = None if container.length_kind == "guessed" else stream_seconds(demuxer, stream)
            frames = decode_frames(demuxer, stream)
            first = next(frames, None)
            if first is None:
                raise AudioError("unreadable", "not one frame of its sound decodes; fetch it again")
            stated = container.declared_frames
            length = told if stated is None or not first.sample_rate else stated / first.sample_rate
            yield cls(
                sound=sound,
                container=container,
                demuxer=demuxer,
                stream=stream,
                first_frame=first,
                later_frames=frames,
                rate_hz=first.sample_rate,  # HE-AAC headers tell half of it
                channels=first.layout.nb_channels,
                codec=stream.codec_context.codec.canonical_name,
                seconds=scan_stream_seconds(sound, container) if length is None else length,
                has_declared_length=length is not None and container.length_kind == "declared",
            )

    def read_blocks(self, first_sample: int, sample_count: int) -> Iterator[np.ndarray]:
        """As `Source` says; damaged packets are left out."""
        begin, frames = self.seek_before(first_sample)
        if begin <= first_sample:
            steady = itertools.takewhile(lambda frame: frame.sample_rate == self.rate_hz, frames)
            yield from join_frame_samples(
                overlapping_frames(steady, begin, first_sample, first_sample + sample_count),
                first_sample,
                first_sample + sample_count,
            )
            return
        with self.open_file(
            self.sound, replace(self.container, is_seekable=False)
        ) as again:  # the index misled
            yield from again.read_blocks(first_sample, sample_count)

    def seek_before(self, sample: int) -> tuple[int, Iterator[AudioFrame]]:
        """Frames from somewhere before `sample` on, with the number of the first one's first sample."""
        origin_seconds, unit = self.first_frame.time, self.stream.time_base
        ahead_seconds = sample / self.rate_hz - PRE_ROLL_SECONDS if self.container.is_seekable else 0.0
        if origin_seconds is None or unit is None or ahead_seconds < PRE_ROLL_SECONDS:
            return 0, itertools.chain([self.first_frame], self.later_frames)
        try:
            self.demuxer.seek(int((origin_seconds + ahead_seconds) / unit), stream=self.stream)
        except FFmpegError:
            return FAILED_SEEK_SAMPLE, iter(())
        frames = decode_frames(self.demuxer, self.stream)
        landed = next(frames, None)
        if landed is None or landed.time is None:
            return FAILED_SEEK_SAMPLE, iter(())
        begin = round((landed.time - origin_seconds) * self.rate_hz)
        return begin, itertools.chain([landed], frames)


@contextmanager
def open_for_ffmpeg(sound: SoundInput) -> Iterator[str | ReadableFile]:
    """What FFmpeg can open: a path it opens itself; beginning with a slash, no name is taken for a protocol."""
    if isinstance(sound, Path):
        yield str(sound.absolute())
    else:
        with open_from_start(sound) as file:
            yield file


@contextmanager
def open_demuxer(
    sound: SoundInput, container: AudioContainer
) -> Iterator[tuple[InputContainer, AudioStream]]:
    """The file and its best audio stream."""
    with (
        open_for_ffmpeg(sound) as file,
        av.open(file, mode="r", format=container.demuxer, **TAG_OPTIONS) as demuxer,
    ):
        stream = demuxer.streams.best("audio")
        if not isinstance(stream, AudioStream):
            raise AudioError("unreadable", "holds no stream of sound; fetch its audio")
        if stream.codec_context is None:
            raise AudioError("unreadable", "FFmpeg has no decoder for its sound; convert it")
        yield demuxer, stream


def stream_seconds(demuxer: InputContainer, stream: AudioStream) -> float | None:
    """The track's length, or the movie's where an edit list makes that shorter; None where neither is known."""
    track_seconds = float((stream.duration or 0) * (stream.time_base or 0))
    movie_seconds = (demuxer.duration or 0) / av.time_base
    return min((seconds for seconds in (track_seconds, movie_seconds) if seconds > 0), default=None)


def scan_stream_seconds(sound: SoundInput, container: AudioContainer) -> float:
    """The length of what is there by the time stamps of all packets; nothing is decoded."""
    begins, ends, unit_seconds = [], [0], 0.0
    with open_demuxer(sound, container) as (demuxer, stream):
        for packet in demux_packets(demuxer, stream):
            if packet.pts is not None:
                begins.append(packet.pts)
                ends.append(packet.pts + (packet.duration or 0))
                unit_seconds = float(packet.time_base)
    return (max(ends) - min(begins, default=0)) * unit_seconds


def demux_packets(demuxer: InputContainer, stream: AudioStream) -> Iterator[av.Packet]:
    """Every packet up to the end, or to where the container is damaged; the declared length will tell.

    PyAV ends with an IndexError where damage has looked like a further stream in the middle of a file.
    """
    try:
        yield from demuxer.demux(stream)
    except (FFmpegError, IndexError):
        return


def decode_frames(demuxer: InputContainer, stream: AudioStream) -> Iterator[AudioFrame]:
    """Every frame that decodes: a damaged packet costs itself, not the rest."""
    for packet in demux_packets(demuxer, stream):
        try:
            frames = stream.decode(packet)
        except FFmpegError:
            continue
        yield from frames


def overlapping_frames(
    frames: Iterable[AudioFrame], begin_sample: int, first_sample: int, stop_sample: int
) -> Iterator[tuple[int, AudioFrame]]:
    """The frames that reach into [first, stop), each with the number of its first sample; `begin` numbers one."""
    for frame in frames:
        end = begin_sample + frame.samples
        if end > first_sample and frame.samples:
            yield begin_sample, frame
        if end >= stop_sample:
            return
        begin_sample = end


def join_frame_samples(
    numbered_frames: Iterable[tuple[int, AudioFrame]], first_sample: int, stop_sample: int
) -> Iterator[np.ndarray]:
    """Samples [first, stop) of numbered frames as float32 [channel, sample], in blocks of one kind each."""
    for _, run in itertools.groupby(numbered_frames, key=frame_format):
        for begin, block in merge_frames(run):
            yield frame_samples_CS(block)[:, max(0, first_sample - begin) : stop_sample - begin]


def merge_frames(numbered_frames: Iterable[tuple[int, AudioFrame]]) -> Iterator[tuple[int, AudioFrame]]:
    """Frames of one kind, joined to blocks by FFmpeg's own queue: an array for every frame took 5 times longer."""
    fifo, begin = av.AudioFifo(), None
    for position, frame in numbered_frames:
        begin = position if begin is None else begin
        frame.pts = None  # the queue would refuse the least gap between time stamps
        fifo.write(frame)
        if fifo.samples >= FFMPEG_BLOCK_SAMPLES and (block := fifo.read()):
            yield begin, block
            begin += block.samples
    if begin is not None and (rest := fifo.read()):
        yield begin, rest


def frame_format(numbered_frame: tuple[int, AudioFrame]) -> tuple[str, int]:
    """What frames must share to be joined."""
    frame = numbered_frame[1]
    return frame.format.name, frame.layout.nb_channels


def frame_samples_CS(frame: AudioFrame) -> np.ndarray:
    """A frame of any sample format as float32 [channel, sample], full scale 1."""
    if frame.format.is_planar and frame.layout.nb_channels > MAX_PLANES:
        (frame,) = av.AudioResampler(format="flt").resample(frame)
    samples = frame.to_ndarray()
    if not frame.format.is_planar:
        samples = samples.reshape(-1, frame.layout.nb_channels).T
    if samples.dtype.kind == "f":
        return samples.astype(np.float32, copy=False)
    middle = 128 if samples.dtype == np.uint8 else 0  # only 8 bits are unsigned
    return (samples.astype(np.float32) - np.float32(middle)) / np.float32(2 ** (8 * samples.itemsize - 1))


SNDFILE_BLOCK_SAMPLES = (
    2**20
)  # of all channels: ten seconds in one go, since soundfile seeks after every piece

FLAC_BLOCK_FRAMES = 2**14  # what damage may cost beyond itself


class AudioDecoder(Protocol):
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
    def has_declared_length(self) -> bool:
        """Whether `seconds` is a promise to be held against what decodes."""

    def read_blocks(self, first_sample: int, sample_count: int) -> Iterator[np.ndarray]:
        """Float32 [channel, sample] pieces of samples [first, first + wanted), as far as they decode."""


@contextmanager
def open_for_sndfile(sound: SoundInput) -> Iterator[bytes | ReadableFile]:
    """What libsndfile can open: a path it opens itself."""
    if isinstance(sound, Path):
        yield os.fsencode(sound)
    else:
        with open_from_start(sound) as file:
            yield file


@dataclass(frozen=True, kw_only=True, slots=True)
class SndfileDecoder:
    """A file opened by libsndfile."""

    file: soundfile.SoundFile
    rate_hz: int
    channels: int
    codec: str
    seconds: float
    has_declared_length: bool = True

    @classmethod
    @contextmanager
    def open_file(cls, sound: SoundInput, container: AudioContainer) -> Iterator[Self]:
        """The file; LibsndfileError where it is none."""
        with open_for_sndfile(sound) as what, soundfile.SoundFile(what) as file:
            frames = file.frames if container.declared_frames is None else container.declared_frames
            yield cls(
                file=file,
                rate_hz=file.samplerate,
                channels=file.channels,
                codec="flac" if file.format == "FLAC" else file.subtype.lower(),
                seconds=frames / file.samplerate,
            )

    def read_blocks(self, first_sample: int, sample_count: int) -> Iterator[np.ndarray]:
        """As `Source` says; what lies behind damage is out of reach."""
        try:
            self.file.seek(min(first_sample, self.file.frames))
            while sample_count > 0:
                frames = (
                    FLAC_BLOCK_FRAMES
                    if self.codec == "flac"
                    else max(1, SNDFILE_BLOCK_SAMPLES // self.channels)
                )
                block_SC = self.file.read(min(sample_count, frames), dtype="float32", always_2d=True)
                if not len(block_SC):
                    return
                yield block_SC.T
                sample_count -= len(block_SC)
        except soundfile.LibsndfileError:
            return
