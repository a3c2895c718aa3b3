"""Decoders: a sound file opened by libsndfile or by FFmpeg (through PyAV), behind one Protocol; the only door to both.

Measured on 10 s stereo clips, PyAV takes this multiple of libsndfile's time: wav 4.8, flac 1.1, mp3 1.2, vorbis 0.7,
opus 0.4. So libsndfile decodes wav and flac, PyAV all other kinds, mp3 included: libsndfile's mpg123 writes
a line to stderr for every damaged frame, while PyAV skips the frame.

Start of the sound: if the container states the encoder's delay (LAME header in mp3, pre-skip in opus, codec delay in
matroska, edit list in mp4), FFmpeg removes it, and the start is exact to the sample. AAC often does not state it (ADTS,
MPEG-TS, many mp4). The delay is then unknown and is left in: 1024 samples for FFmpeg's encoder. The delay of mp3
without a LAME header is left in too: 1105 samples.
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

from pipeline.audio.byte_window import SoundInput
from pipeline.audio.containers import AudioContainer, ReadableFile, open_from_start
from pipeline.errors import AudioError

DECODER_ERRORS = (soundfile.LibsndfileError, FFmpegError, OSError)  # raised for a file that cannot be opened

# Samples per read of libsndfile, over all channels: ten seconds at once, because soundfile seeks after every read.
SNDFILE_BLOCK_SAMPLES = 2**20

FLAC_BLOCK_FRAMES = 2**14  # per read of a flac: damage costs the block that contains it

FFMPEG_BLOCK_SAMPLES = 2**14

PRE_ROLL_SECONDS = 1.0  # decoded before a segment and discarded: opus needs 0.08 s, AAC one frame

MAX_PLANES = 8  # with more, PyAV 18 reads beyond FFmpeg's table of planes, and sometimes crashes

# Bad text in tags is replaced; from version 19 on PyAV does so by itself.
PYAV_MAJOR_VERSION = int(av.__version__.split(".")[0])
TAG_OPTIONS: dict[str, Any] = {"metadata_errors": "replace"} if PYAV_MAJOR_VERSION < 19 else {}

LONG_INTEGER_FORMATS = ("s64", "s64p")  # that PyAV gives no array of

FAILED_SEEK_SAMPLE = 2**62  # position that a failed seek reports, beyond the end of every sound


class AudioDecoder(Protocol):
    """A sound file that is open for decoding."""

    @property
    def rate_hz(self) -> int: ...
    @property
    def channels(self) -> int: ...
    @property
    def codec(self) -> str: ...
    @property
    def seconds(self) -> float:
        """The length that the file declares, else the measured length."""

    @property
    def has_declared_length(self) -> bool:
        """Whether the file declares `seconds`, so that a shorter sound is truncated."""

    def read_blocks(self, first_sample: int, sample_count: int) -> Iterator[np.ndarray]:
        """Yield samples [first, first + count) in float32 blocks `[channel, sample]`, as far as they decode."""


def describe_decoder_error(error: BaseException) -> str:
    """The message of one of DECODER_ERRORS, without the file's path or the name of an object in memory."""
    if isinstance(error, OSError | FFmpegError):
        return str(error.strerror)
    if isinstance(error, soundfile.LibsndfileError):
        return str(error.error_string).rstrip(".")
    return str(error)


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
        """Open the sound; LibsndfileError if libsndfile cannot read it."""
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
        if self.codec == "flac":
            frames_per_block = FLAC_BLOCK_FRAMES

        try:
            self.file.seek(min(first_sample, self.file.frames))
            while sample_count > 0:
                frames = min(sample_count, frames_per_block)
                block_SC = self.file.read(frames, dtype="float32", always_2d=True)
                if not len(block_SC):
                    return
                yield block_SC.T
                sample_count -= len(block_SC)
        except soundfile.LibsndfileError:
            return


@contextmanager
def open_for_sndfile(sound: SoundInput) -> Iterator[bytes | ReadableFile]:
    """The sound in a form that libsndfile opens: a path in the bytes of the file system, or an open file."""
    if isinstance(sound, Path):
        yield os.fsencode(sound)
    else:
        with open_from_start(sound) as file:
            yield file


@dataclass(frozen=True, kw_only=True, slots=True)
class FfmpegDecoder:
    """The best audio stream of a file opened by FFmpeg, its first frame decoded."""

    sound: SoundInput
    container: AudioContainer
    demuxer: InputContainer
    stream: AudioStream
    first_frame: AudioFrame
    later_frames: Iterator[AudioFrame]  # all after the first
    rate_hz: int
    channels: int
    codec: str
    seconds: float
    has_declared_length: bool

    @classmethod
    @contextmanager
    def open_file(cls, sound: SoundInput, container: AudioContainer) -> Iterator[Self]:
        """Open the sound; FFmpegError if FFmpeg cannot read it, AudioError (unreadable) if it contains no sound."""
        with open_demuxer(sound, container) as (demuxer, stream):
            # FFmpeg's own length, read before decoding begins.
            ffmpeg_seconds = None
            if container.length_kind != "guessed":
                ffmpeg_seconds = stream_seconds(demuxer, stream)

            # Rate and channels are those of the first frame: headers of HE-AAC state half the rate.
            frames = decode_frames(demuxer, stream)
            first_frame = next(frames, None)
            if first_frame is None:
                raise AudioError("unreadable", "not one frame of its sound decodes; fetch it again")

            # The length: the header's, else FFmpeg's, else that of all packets.
            known_seconds = ffmpeg_seconds
            if container.declared_frames is not None and first_frame.sample_rate:
                known_seconds = container.declared_frames / first_frame.sample_rate
            yield cls(
                sound=sound,
                container=container,
                demuxer=demuxer,
                stream=stream,
                first_frame=first_frame,
                later_frames=frames,
                rate_hz=first_frame.sample_rate,
                channels=first_frame.layout.nb_channels,
                codec=stream.codec_context.codec.canonical_name,
                seconds=scan_stream_seconds(sound, container) if known_seconds is None else known_seconds,
                has_declared_length=known_seconds is not None and container.length_kind == "declared",
            )

    def read_blocks(self, first_sample: int, sample_count: int) -> Iterator[np.ndarray]:
        """Yield blocks as `AudioDecoder` says; damaged packets are left out."""
        stop_sample = first_sample + sample_count
        begin_sample, frames = self.seek_before(first_sample)
        if begin_sample <= first_sample:
            same_rate = itertools.takewhile(lambda frame: frame.sample_rate == self.rate_hz, frames)
            numbered_frames = overlapping_frames(same_rate, begin_sample, first_sample, stop_sample)
            yield from join_frame_samples(numbered_frames, first_sample, stop_sample)
            return

        # The seek went too far: open the file again and decode it from its beginning.
        unseekable = replace(self.container, is_seekable=False)
        with self.open_file(self.sound, unseekable) as decoder:
            yield from decoder.read_blocks(first_sample, sample_count)

    def seek_before(self, sample: int) -> tuple[int, Iterator[AudioFrame]]:
        """Seek to a place before `sample`; return the number of the first sample there, and the frames from there on.

        A number beyond `sample` means that the seek failed.
        """
        # Near the beginning, and without time stamps, decode from the first frame on.
        origin_seconds = self.first_frame.time
        unit_seconds = self.stream.time_base
        target_seconds = sample / self.rate_hz - PRE_ROLL_SECONDS
        decode_from_start = target_seconds < PRE_ROLL_SECONDS or not self.container.is_seekable
        if decode_from_start or origin_seconds is None or unit_seconds is None:
            return 0, itertools.chain([self.first_frame], self.later_frames)

        try:
            self.demuxer.seek(int((origin_seconds + target_seconds) / unit_seconds), stream=self.stream)
        except FFmpegError:
            return FAILED_SEEK_SAMPLE, iter(())

        # The time stamp of the first frame gives the place that the seek reached.
        frames = decode_frames(self.demuxer, self.stream)
        landing_frame = next(frames, None)
        if landing_frame is None or landing_frame.time is None:
            return FAILED_SEEK_SAMPLE, iter(())
        begin_sample = round((landing_frame.time - origin_seconds) * self.rate_hz)
        return begin_sample, itertools.chain([landing_frame], frames)


@contextmanager
def open_for_ffmpeg(sound: SoundInput) -> Iterator[str | ReadableFile]:
    """The sound in a form that FFmpeg opens: a path, or an open file.

    A path is absolute: one that begins with a slash is never taken for a protocol.
    """
    if isinstance(sound, Path):
        yield str(sound.absolute())
    else:
        with open_from_start(sound) as file:
            yield file


@contextmanager
def open_demuxer(
    sound: SoundInput, container: AudioContainer
) -> Iterator[tuple[InputContainer, AudioStream]]:
    """Open a file and its best audio stream; AudioError (unreadable) if there is none that FFmpeg decodes."""
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
    """The length of the track, or of the movie if an edit list makes it shorter; None if the file states neither."""
    track_seconds = float((stream.duration or 0) * (stream.time_base or 0))
    movie_seconds = (demuxer.duration or 0) / av.time_base
    return min((seconds for seconds in (track_seconds, movie_seconds) if seconds > 0), default=None)


def scan_stream_seconds(sound: SoundInput, container: AudioContainer) -> float:
    """The length of the sound by the time stamps of all packets; nothing is decoded."""
    begins: list[int] = []
    ends = [0]
    unit_seconds = 0.0
    with open_demuxer(sound, container) as (demuxer, stream):
        for packet in demux_packets(demuxer, stream):
            if packet.pts is not None:
                begins.append(packet.pts)
                ends.append(packet.pts + (packet.duration or 0))
                unit_seconds = float(packet.time_base)
    return (max(ends) - min(begins, default=0)) * unit_seconds


def demux_packets(demuxer: InputContainer, stream: AudioStream) -> Iterator[av.Packet]:
    """Yield every packet up to the end, or up to damage of the container, which the declared length reveals later."""
    # PyAV raises IndexError when damage in the middle of a file looks like an additional stream.
    try:
        yield from demuxer.demux(stream)
    except (FFmpegError, IndexError):
        return


def decode_frames(demuxer: InputContainer, stream: AudioStream) -> Iterator[AudioFrame]:
    """Yield every frame that decodes: a damaged packet costs its own frames only."""
    for packet in demux_packets(demuxer, stream):
        try:
            frames = stream.decode(packet)
        except FFmpegError:
            continue
        yield from frames


def overlapping_frames(
    frames: Iterable[AudioFrame], begin_sample: int, first_sample: int, stop_sample: int
) -> Iterator[tuple[int, AudioFrame]]:
    """Yield the frames that reach into [first, stop), each with the number of its first sample.

    `begin_sample` is the number of the first sample of the first frame.
    """
    for frame in frames:
        end_sample = begin_sample + frame.samples
        if end_sample > first_sample and frame.samples:
            yield begin_sample, frame
        if end_sample >= stop_sample:
            return
        begin_sample = end_sample


def join_frame_samples(
    numbered_frames: Iterable[tuple[int, AudioFrame]], first_sample: int, stop_sample: int
) -> Iterator[np.ndarray]:
    """Yield samples [first, stop) of numbered frames as float32 `[channel, sample]`.

    A block holds many frames, all of one format.
    """
    for _, same_format in itertools.groupby(numbered_frames, key=frame_format):
        for begin_sample, block in merge_frames(same_format):
            wanted = slice(max(0, first_sample - begin_sample), stop_sample - begin_sample)
            yield frame_samples_CS(block)[:, wanted]


def frame_format(numbered_frame: tuple[int, AudioFrame]) -> tuple[str, int]:
    """Sample format and number of channels of a frame; only frames with equal values can be joined."""
    frame = numbered_frame[1]
    return frame.format.name, frame.layout.nb_channels


def merge_frames(numbered_frames: Iterable[tuple[int, AudioFrame]]) -> Iterator[tuple[int, AudioFrame]]:
    """Yield frames of one format joined to blocks, each with the number of its first sample.

    FFmpeg's own queue joins them: an array for every frame took 5 times longer.
    """
    queue = av.AudioFifo()
    block_begin = None
    for begin_sample, frame in numbered_frames:
        if block_begin is None:
            block_begin = begin_sample
        frame.pts = None  # with time stamps, the queue would refuse the smallest gap between frames
        queue.write(frame)
        if queue.samples >= FFMPEG_BLOCK_SAMPLES and (block := queue.read()):
            yield block_begin, block
            block_begin += block.samples

    if block_begin is not None and (rest := queue.read()):
        yield block_begin, rest


def frame_samples_CS(frame: AudioFrame) -> np.ndarray:
    """The samples of a frame of any format as float32 `[channel, sample]`, full scale 1."""
    if frame.format.is_planar and frame.layout.nb_channels > MAX_PLANES:
        (frame,) = av.AudioResampler(format="flt").resample(frame)
    elif frame.format.name in LONG_INTEGER_FORMATS:
        (frame,) = av.AudioResampler(format="dbl").resample(frame)
    samples = frame.to_ndarray()
    if not frame.format.is_planar:
        samples = samples.reshape(-1, frame.layout.nb_channels).T
    if samples.dtype.kind == "f":
        return samples.astype(np.float32, copy=False)

    # Integers: full scale is half their range. Only 8-bit integers are unsigned, with 128 for silence.
    silence = 128 if samples.dtype == np.uint8 else 0
    return (samples.astype(np.float32) - np.float32(silence)) / np.float32(2 ** (8 * samples.itemsize - 1))
