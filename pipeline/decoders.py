"""Take: the wanted seconds of one file, decoded and mixed to mono; the only door to libsndfile and FFmpeg.

Measured on 10 s stereo clips, libsndfile against PyAV: wav 4 : 40 ms, flac 16 : 21, mp3 13 : 16, vorbis 22 : 15,
opus 92 : 30. So wav and flac are libsndfile's, all else PyAV's. mp3 too: libsndfile's mpg123 writes to stderr
about every damaged frame, and PyAV steps over it.

Where sound begins: what a container states of its encoder's delay is honoured (LAME header in mp3, pre-skip in
opus, codec delay in matroska, edit list in mp4), and then the start is exact to the sample. AAC without such a
statement (ADTS, MPEG-TS, many mp4) begins with that delay, 1024 samples for FFmpeg's encoder: it cannot be
known from the file and is left in. Likewise mp3 without a LAME header, 1105 samples.
"""

import itertools
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NamedTuple, Protocol, Self

import av
import numpy as np
import soundfile
from av.audio import AudioStream
from av.audio.frame import AudioFrame
from av.container import InputContainer

from pipeline.containers import Container
from pipeline.errors import AudioError

COMPLETE = 0.95  # a clip that lacks less than 5 % of what it should hold is whole
RATES_HZ = range(1_000, 1_000_000)
BLOCK_FRAMES = 2**14
PRE_ROLL_SECONDS = 1.0  # decoded before a cut and thrown away: opus needs 0.08, AAC one frame
NOWHERE = 2**62  # a sample number behind every sound: where a seek led that failed


class Segment(NamedTuple):
    """The seconds of a video that a clip is."""

    start_seconds: float
    end_seconds: float

    @property
    def seconds(self) -> float:
        return self.end_seconds - self.start_seconds

    def lies_in(self, source_seconds: float) -> bool:
        """Whether a file of that length is the whole video: longer than the clip, and reaching its end; +- 5 %."""
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

    rate_hz: int
    channels: int
    codec: str
    seconds: float  # as declared, else as there
    declared: bool  # whether `seconds` is a promise to be held against what decodes

    def blocks(self, first: int, wanted: int) -> Iterator[np.ndarray]:
        """Float32 [channel, sample] pieces of samples [first, first + wanted), as far as they decode."""


def decode(path: Path, container: Container, segment: Segment, *, max_seconds: float) -> Take:
    """Decode the segment. AudioError unreadable where nothing can be opened, too_long over `max_seconds`."""
    opened = Sndfile.opened if container.libsndfile else Ffmpeg.opened
    try:
        with opened(path, container) as source:
            return take(source, segment, max_seconds, path.name)
    except (soundfile.LibsndfileError, av.FFmpegError, OSError) as error:
        what = error.strerror if isinstance(error, OSError | av.FFmpegError) else str(error)
        detail = f"no {container.demuxer} file that can be decoded ({what}); incomplete? Fetch it again"
        raise AudioError("unreadable", f"{path.name}: {detail}") from None


def take(source: Source, segment: Segment, max_seconds: float, name: str) -> Take:
    """Choose the samples, decode and mix them. What is allocated is bounded by the segment, not by a header."""
    if source.rate_hz not in RATES_HZ:
        detail = f"claims {source.rate_hz} samples a second; damaged, fetch it again"
        raise AudioError("unreadable", f"{name}: {detail}")
    if source.seconds > max_seconds:
        detail = f"{source.seconds:.0f} s long, more than {max_seconds:.0f}; cut it, or raise max_seconds"
        raise AudioError("too_long", f"{name}: {detail}")
    cut = segment.lies_in(source.seconds)
    first = round(segment.start_seconds * source.rate_hz) if cut else 0
    wanted = round(segment.seconds * source.rate_hz)
    wave_S, beyond_full_scale = mixed(source.blocks(first, wanted))
    ended = len(wave_S) < wanted
    return Take(
        wave_S=wave_S,
        rate_hz=source.rate_hz,
        channels=source.channels,
        codec=source.codec,
        source_seconds=(first + len(wave_S)) / source.rate_hz if ended else source.seconds,
        expected_samples=min(wanted, round(source.seconds * source.rate_hz) - first)
        if source.declared
        else None,
        cut=cut,
        beyond_full_scale=beyond_full_scale,
    )


def mixed(blocks_CS: Iterable[np.ndarray]) -> tuple[np.ndarray, bool]:
    """Pieces of channels as one mono wave, and whether any channel went beyond full scale."""
    pieces, beyond = [np.zeros(0, np.float32)], False
    with np.errstate(invalid="ignore", over="ignore"):  # NaN and infinity are judged later
        for block_CS in blocks_CS:
            beyond |= bool(block_CS.max() > 1.0 or block_CS.min() < -1.0)
            mono_S = block_CS[0].copy()
            for channel_S in block_CS[1:]:  # 20 times faster than .mean() over interleaved samples
                mono_S += channel_S
            pieces.append(mono_S / np.float32(len(block_CS)))
    return np.concatenate(pieces), beyond


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
    def opened(cls, path: Path, container: Container) -> Iterator[Self]:
        with soundfile.SoundFile(path) as file:
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
                block_SC = self.file.read(min(wanted, BLOCK_FRAMES), dtype="float32", always_2d=True)
                if not len(block_SC):
                    return
                yield block_SC.T
                wanted -= len(block_SC)
        except soundfile.LibsndfileError:
            return


@dataclass(frozen=True, kw_only=True, slots=True)
class Ffmpeg:
    """The best audio stream of a file opened by FFmpeg, its first frame decoded."""

    path: Path
    container: Container
    demuxer: InputContainer
    stream: AudioStream
    first: AudioFrame
    frames: Iterator[AudioFrame]  # those after the first
    rate_hz: int
    channels: int
    codec: str
    seconds: float
    declared: bool

    @classmethod
    @contextmanager
    def opened(cls, path: Path, container: Container) -> Iterator[Self]:
        with demuxed(path, container) as (demuxer, stream):
            length = None if container.length == "guessed" else length_seconds(demuxer, stream)
            frames = decoded(demuxer, stream)
            first = next(frames, None)
            if first is None:
                raise AudioError(
                    "unreadable", f"{path.name}: not one frame of its sound decodes; fetch it again"
                )
            yield cls(
                path=path,
                container=container,
                demuxer=demuxer,
                stream=stream,
                first=first,
                frames=frames,
                rate_hz=first.sample_rate,  # HE-AAC headers tell half of it
                channels=first.layout.nb_channels,
                codec=stream.codec_context.codec.canonical_name,
                seconds=contained_seconds(path, container) if length is None else length,
                declared=length is not None and container.length == "declared",
            )

    def blocks(self, first: int, wanted: int) -> Iterator[np.ndarray]:
        """As `Source` says; damaged packets are left out."""
        begin, frames = self.entered(first)
        if begin <= first:
            yield from joined(overlapping(frames, begin, first, first + wanted), first, first + wanted)
            return
        with self.opened(self.path, replace(self.container, seekable=False)) as again:  # the index misled
            yield from again.blocks(first, wanted)

    def entered(self, sample: int) -> tuple[int, Iterator[AudioFrame]]:
        """Frames from somewhere before `sample` on, with the number of the first one's first sample."""
        whole = itertools.chain([self.first], self.frames)
        seconds = sample / self.rate_hz - PRE_ROLL_SECONDS
        if not self.container.seekable or self.first.time is None or seconds < PRE_ROLL_SECONDS:
            return 0, whole
        try:
            self.demuxer.seek(int((self.first.time + seconds) / self.stream.time_base), stream=self.stream)
        except av.FFmpegError:
            return NOWHERE, iter(())
        frames = decoded(self.demuxer, self.stream)
        landed = next(frames, None)
        if landed is None or landed.time is None:
            return NOWHERE, iter(())
        begin = round((landed.time - self.first.time) * self.rate_hz)
        return begin, itertools.chain([landed], frames)


@contextmanager
def demuxed(path: Path, container: Container) -> Iterator[tuple[InputContainer, AudioStream]]:
    """The file and its best audio stream; from a Python file, so that no path is taken for a protocol."""
    with (
        path.open("rb") as file,
        av.open(file, format=container.demuxer, metadata_errors="replace") as demuxer,
    ):
        stream = demuxer.streams.best("audio")
        if stream is None or stream.codec_context is None:
            what = "no stream of sound" if stream is None else "sound in a codec that FFmpeg cannot decode"
            raise AudioError("unreadable", f"{path.name}: holds {what}; fetch its audio")
        yield demuxer, stream


def length_seconds(demuxer: InputContainer, stream: AudioStream) -> float | None:
    """The track's length, or the movie's where an edit list makes that shorter; None where neither is known."""
    track_seconds = float((stream.duration or 0) * (stream.time_base or 0))
    movie_seconds = (demuxer.duration or 0) / av.time_base
    return min((seconds for seconds in (track_seconds, movie_seconds) if seconds > 0), default=None)


def contained_seconds(path: Path, container: Container) -> float:
    """The length of what is there by the time stamps of all packets; nothing is decoded."""
    begins, ends, unit_seconds = [], [0], 0.0
    with demuxed(path, container) as (demuxer, stream):
        for packet in packets(demuxer, stream):
            if packet.pts is not None:
                begins.append(packet.pts)
                ends.append(packet.pts + (packet.duration or 0))
                unit_seconds = float(packet.time_base)
    return (max(ends) - min(begins, default=0)) * unit_seconds


def packets(demuxer: InputContainer, stream: AudioStream) -> Iterator[av.Packet]:
    """Every packet up to the end, or to where the container is damaged."""
    try:
        yield from demuxer.demux(stream)
    except av.FFmpegError:
        return  # the declared length will tell


def decoded(demuxer: InputContainer, stream: AudioStream) -> Iterator[AudioFrame]:
    """Every frame that decodes: a damaged packet costs itself, not the rest."""
    for packet in packets(demuxer, stream):
        try:
            frames = packet.decode()
        except av.FFmpegError:
            continue
        yield from frames


def overlapping(
    frames: Iterable[AudioFrame], begin: int, first: int, stop: int
) -> Iterator[tuple[int, AudioFrame]]:
    """The frames that reach into [first, stop), each with the number of its first sample; `begin` numbers one."""
    for frame in frames:
        end = begin + frame.samples
        if end > first and frame.samples:
            yield begin, frame
        if end >= stop:
            return
        begin = end


def joined(numbered: Iterable[tuple[int, AudioFrame]], first: int, stop: int) -> Iterator[np.ndarray]:
    """Samples [first, stop) as float32 [channel, sample], one array for each run of frames of one kind.

    FFmpeg's own queue joins them: 4 ms for 10 s of sound, against 20 with an array for every frame.
    """
    for _, run in itertools.groupby(numbered, key=kind):
        begins, fifo = [], av.AudioFifo()
        for begin, frame in run:
            begins.append(begin)
            frame.pts = None  # the queue would refuse the least gap between time stamps
            fifo.write(frame)
        yield planes(fifo.read())[:, max(0, first - begins[0]) : stop - begins[0]]


def kind(numbered: tuple[int, AudioFrame]) -> tuple[str, int]:
    """What frames must share to be joined."""
    frame = numbered[1]
    return frame.format.name, frame.layout.nb_channels


def planes(frame: AudioFrame) -> np.ndarray:
    """A frame of any sample format as float32 [channel, sample], full scale 1."""
    samples = frame.to_ndarray()
    if not frame.format.is_planar:
        samples = samples.reshape(-1, frame.layout.nb_channels).T
    if samples.dtype.kind == "f":
        return samples.astype(np.float32, copy=False)
    limits = np.iinfo(samples.dtype)
    middle = 0 if limits.min else 128  # only 8 bits are unsigned
    return (samples.astype(np.float32) - np.float32(middle)) / np.float32(
        limits.max // 2 + 1 if middle else -limits.min
    )
