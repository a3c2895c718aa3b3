"""The decoder of every other kind: the best audio stream of a file opened by FFmpeg, through PyAV; the only door to it.

Start of the sound: if the container states the encoder's delay (LAME header in mp3, pre-skip in opus, codec delay in
matroska, edit list in mp4), FFmpeg removes it, and the start is exact to the sample. AAC often does not state it (ADTS,
MPEG-TS, many mp4). The delay is then unknown and is left in: 1024 samples for FFmpeg's encoder. The delay of mp3
without a LAME header is left in too: 1105 samples.
"""

import itertools
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, NamedTuple, Self

import av
import numpy as np
from av import FFmpegError
from av.audio import AudioStream
from av.audio.frame import AudioFrame
from av.container import InputContainer

from pipeline.audio.avi_chunks import number_sound_chunks
from pipeline.audio.byte_window import ReadableFile, SoundInput, open_from_start
from pipeline.audio.container_kinds import AudioContainer
from pipeline.audio.resample import resample_blocks_CS
from pipeline.audio.timeline import (
    MAX_LATE_SECONDS,
    FrameReader,
    HoleFiller,
    PlacedFrame,
    Timeline,
    TimelineCursor,
)
from pipeline.errors import AudioError

FfmpegError = FFmpegError

FFMPEG_BLOCK_SAMPLES = 2**14

PRE_ROLL_SECONDS = 1.0  # decoded before a segment and discarded: opus needs 0.08 s, AAC one frame

# A stated length that differs by less from that of all packets is right: the last packet may be filled up.
MAX_DOUBT_SECONDS = 0.25

MAX_PLANES = 8  # with more, PyAV 18 reads beyond FFmpeg's table of planes, and sometimes crashes

# Bad text in tags is replaced; from version 19 on PyAV does so by itself.
PYAV_MAJOR_VERSION = int(av.__version__.split(".")[0])
TAG_OPTIONS: dict[str, Any] = {"metadata_errors": "replace"} if PYAV_MAJOR_VERSION < 19 else {}

# A wav whose size was never filled in is read to the end of the file.
IGNORE_SIZE_OPTIONS = {"ignore_length": "1"}

# A damaged frame of flac is left out: decoded, it would be noise.
CHECKSUM_OPTIONS = {"err_detect": "crccheck"}

LONG_INTEGER_FORMATS = ("s64", "s64p")  # that PyAV gives no array of


@dataclass(frozen=True, kw_only=True, slots=True)
class FfmpegDecoder:
    """The best audio stream of a file opened by FFmpeg, its first frame decoded.

    reader  of all frames from the first one on
    """

    sound: SoundInput
    container: AudioContainer
    source: "OpenStream"
    reader: FrameReader[AudioFrame]
    rate_hz: int
    channels: int
    codec: str
    seconds: float
    has_declared_length: bool
    timeline: Timeline
    filler: HoleFiller = field(default_factory=HoleFiller)

    @property
    def filled_samples(self) -> int:
        """Samples of silence that `read_blocks` has put into holes so far."""
        return self.filler.filled_samples

    @classmethod
    @contextmanager
    def open_file(cls, sound: SoundInput, container: AudioContainer) -> Iterator[Self]:
        """Open the sound; FFmpegError if FFmpeg cannot read it, AudioError (unreadable) if it contains no sound."""
        with open_best_stream(sound, container) as source:
            # FFmpeg's own lengths, read before decoding begins.
            stated = StatedTimes.from_demuxer(source.demuxer, source.stream)

            # Rate and channels are those of the first frame: headers of HE-AAC state half the rate.
            frames = source.decode_frames()
            first_frame = next(frames, None)
            if first_frame is None:
                raise AudioError("unreadable", "not one frame of its sound decodes; fetch it again")
            rate_hz = first_frame.sample_rate
            timeline = source.make_timeline(container, rate_hz=rate_hz, first_seconds=first_frame.time)

            # The length: the header's, else FFmpeg's, else that of all packets.
            known_seconds = None
            if container.declared_frames is not None and rate_hz:
                known_seconds = container.declared_frames / rate_hz
            else:
                known_seconds = stated.length_on_timeline(container, timeline)
            if known_seconds is not None and container.length_kind != "doubtful":
                seconds = known_seconds
            else:
                seconds = scan_stream_seconds(sound, container) / container.present_share
                if known_seconds is not None and abs(known_seconds - seconds) <= MAX_DOUBT_SECONDS:
                    seconds = known_seconds
            yield cls(
                sound=sound,
                container=container,
                source=source,
                reader=FrameReader(
                    frames=itertools.chain([first_frame], frames),
                    cursor=TimelineCursor(timeline=timeline, position_samples=timeline.first_sample),
                ),
                rate_hz=rate_hz,
                channels=first_frame.layout.nb_channels,
                codec=source.stream.codec_context.codec.canonical_name,
                seconds=seconds,
                has_declared_length=known_seconds is not None
                and container.length_kind in ("declared", "doubtful"),
                timeline=timeline,
            )

    def read_blocks(self, first_sample: int, sample_count: int) -> Iterator[np.ndarray]:
        """Yield blocks as `AudioDecoder` says: damaged packets are left out, holes between time stamps are silent."""
        stop_sample = first_sample + sample_count
        reader = self.seek_before(first_sample) if self.can_seek_to(first_sample) else self.reader
        if reader is not None and reader.can_read_from(first_sample):
            blocks = join_frame_samples(reader.read_frames(first_sample, stop_sample), self.rate_hz)
            yield from self.filler.fill_holes(blocks, first_sample, stop_sample)
            return

        # The seek failed, or the frames are gone: open the file again and decode it from its beginning.
        unseekable = replace(self.container, is_seekable=False)
        with self.open_file(self.sound, unseekable) as decoder:
            from_start = replace(decoder, filler=self.filler)
            yield from from_start.read_blocks(first_sample, sample_count)

    def can_seek_to(self, sample: int) -> bool:
        """Whether the sound before `sample` need not be decoded: there are time stamps, and it is not the beginning."""
        target_seconds = sample / self.rate_hz - PRE_ROLL_SECONDS
        return (
            self.container.is_seekable
            and target_seconds >= PRE_ROLL_SECONDS
            and self.timeline.origin_seconds is not None
            and self.source.stream.time_base is not None
        )

    def seek_before(self, sample: int) -> FrameReader[AudioFrame] | None:
        """Seek to a place before `sample`; return the frames from there on, None if the seek failed or went too far."""
        origin_seconds = self.timeline.origin_seconds
        unit_seconds = self.source.stream.time_base
        assert origin_seconds is not None
        assert unit_seconds is not None
        target_seconds = sample / self.rate_hz - PRE_ROLL_SECONDS
        try:
            self.source.demuxer.seek(
                int((origin_seconds + target_seconds) / unit_seconds), stream=self.source.stream
            )
        except FFmpegError:
            return None

        # The time stamp of the first frame gives the place that the seek reached.
        frames = self.source.decode_frames()
        landing_frame = next(frames, None)
        if landing_frame is None or landing_frame.time is None:
            return None
        begin_sample = self.timeline.sample_at(landing_frame.time)
        if begin_sample > sample:
            return None
        return FrameReader(
            frames=itertools.chain([landing_frame], frames),
            cursor=TimelineCursor(timeline=self.timeline, position_samples=begin_sample),
        )


def describe_ffmpeg_error(error: BaseException) -> str:
    """The message of an error that FFmpeg or the operating system raises, without the file's path."""
    return str(error.strerror) if isinstance(error, OSError | FFmpegError) else str(error)


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


@dataclass(frozen=True, kw_only=True, slots=True)
class OpenStream:
    """The best audio stream of an open file.

    chunk_numbers  of an AVI with empty chunks: the time stamp of each packet, by its offset in the file
    """

    demuxer: InputContainer
    stream: AudioStream
    chunk_numbers: dict[int, int] | None

    def read_packets(self) -> Iterator[av.Packet]:
        """Yield every packet up to the end, or to damage of the container, which the declared length reveals later."""
        # PyAV raises IndexError when damage in the middle of a file looks like an additional stream.
        try:
            if self.chunk_numbers is None:
                yield from self.demuxer.demux(self.stream)
                return
            for packet in self.demuxer.demux(self.stream):
                if packet.pos in self.chunk_numbers:
                    packet.pts = packet.dts = self.chunk_numbers[packet.pos]
                yield packet
        except (FFmpegError, IndexError):
            return

    def decode_frames(self) -> Iterator[AudioFrame]:
        """Yield every frame that decodes: a damaged packet costs its own frames only."""
        for packet in self.read_packets():
            try:
                frames = self.stream.decode(packet)
            except FFmpegError:
                continue
            yield from frames

    def make_timeline(
        self, container: AudioContainer, *, rate_hz: float, first_seconds: float | None
    ) -> Timeline:
        """What the stamps of the stream mean whose first sound is stamped `first_seconds`."""
        if container.clock == "none" or (container.clock == "chunks" and not self.chunk_numbers):
            return Timeline(rate_hz=rate_hz)
        stream_start_seconds = None
        if self.stream.start_time is not None and self.stream.time_base and not self.chunk_numbers:
            stream_start_seconds = float(self.stream.start_time * self.stream.time_base)
        movie_start_seconds = None
        if self.demuxer.start_time is not None:
            movie_start_seconds = self.demuxer.start_time / av.time_base
        return Timeline.from_starts(
            rate_hz=rate_hz,
            first_seconds=first_seconds,
            stream_start_seconds=stream_start_seconds,
            movie_start_seconds=movie_start_seconds,
            is_broadcast=container.clock == "broadcast",
        )


@contextmanager
def open_best_stream(sound: SoundInput, container: AudioContainer) -> Iterator[OpenStream]:
    """Open a file and its best audio stream; AudioError (unreadable) if there is none that FFmpeg decodes."""
    options = {}
    if container.demuxer == "wav" and container.length_kind == "guessed":
        options = IGNORE_SIZE_OPTIONS
    with (
        open_for_ffmpeg(sound) as file,
        av.open(file, mode="r", format=container.demuxer, options=options, **TAG_OPTIONS) as demuxer,
    ):
        stream = demuxer.streams.best("audio")
        if not isinstance(stream, AudioStream):
            raise AudioError("unreadable", "holds no stream of sound; fetch its audio")
        if stream.codec_context is None:
            raise AudioError("unreadable", "FFmpeg has no decoder for its sound; convert it")
        if container.demuxer == "flac":
            stream.codec_context.options = CHECKSUM_OPTIONS
        chunk_numbers = None
        if container.clock == "chunks":
            with open_from_start(sound) as content:
                chunk_numbers = number_sound_chunks(content, stream.index)
        yield OpenStream(demuxer=demuxer, stream=stream, chunk_numbers=chunk_numbers)


class StatedTimes(NamedTuple):
    """What FFmpeg says of a file before decoding begins, in seconds; 0 where the file states nothing."""

    track_seconds: float
    movie_seconds: float
    movie_start_seconds: float

    @classmethod
    def from_demuxer(cls, demuxer: InputContainer, stream: AudioStream) -> Self:
        """The lengths of the track and of the movie, and the earliest time stamp of all tracks."""
        return cls(
            track_seconds=float((stream.duration or 0) * (stream.time_base or 0)),
            movie_seconds=(demuxer.duration or 0) / av.time_base,
            movie_start_seconds=(demuxer.start_time or 0) / av.time_base,
        )

    def length_on_timeline(self, container: AudioContainer, timeline: Timeline) -> float | None:
        """The length that the header states: of the track, or of the movie if an edit list makes it shorter; else None.

        Where sound begins late, or the clock does, only the lengths in an mp4 have one meaning.
        """
        begins_elsewhere = (timeline.origin_seconds or 0.0) > MAX_LATE_SECONDS
        begins_late = timeline.first_sample > 0
        if (
            container.length_kind == "guessed"
            or begins_elsewhere
            or (begins_late and container.demuxer != "mov")
        ):
            return None
        track_seconds = self.track_seconds
        movie_seconds = self.movie_seconds
        if begins_late:
            track_seconds += timeline.lead_seconds
            movie_seconds += self.movie_start_seconds
        return min((seconds for seconds in (track_seconds, movie_seconds) if seconds > 0), default=None)


def scan_stream_seconds(sound: SoundInput, container: AudioContainer) -> float:
    """The length of the sound by the time stamps of all packets; nothing is decoded."""
    cursor: TimelineCursor | None = None
    unit_seconds = 0.0
    end_units = 0.0
    with open_best_stream(sound, container) as source:
        for packet in source.read_packets():
            if packet.pts is None:
                continue

            # Samples are counted in the units of the stamps, which are whole numbers.
            if cursor is None:
                first_pts = packet.pts
                unit_seconds = float(packet.time_base)
                timeline = source.make_timeline(
                    container, rate_hz=1 / unit_seconds, first_seconds=first_pts * unit_seconds
                )
                cursor = TimelineCursor(timeline=timeline, position_samples=timeline.first_sample)

            # Durations are rounded to units, stamps are not: as long as one clock runs, the stamps are better.
            cursor.place(packet.pts * unit_seconds, packet.duration or 0)
            end_units = cursor.position_samples
            if not cursor.has_shifted:
                end_units = timeline.first_sample + packet.pts - first_pts + (packet.duration or 0)
    return end_units * unit_seconds


def join_frame_samples(
    placed_frames: Iterable[PlacedFrame[AudioFrame]], rate_hz: int
) -> Iterator[tuple[float, np.ndarray]]:
    """Yield placed frames as blocks of float32 `[channel, sample]`, each with the number of its first sample.

    A block holds many frames, all of one run and one format. Frames of another rate are resampled.
    """
    for (_, own_rate_hz, _, _), same_format in itertools.groupby(placed_frames, key=frame_format):
        blocks = merge_frames(same_format)
        if own_rate_hz == rate_hz:
            for begin, block in blocks:
                yield begin, frame_samples_CS(block)
        else:
            yield from resample_run(blocks, own_rate_hz, rate_hz)


def frame_format(placed: PlacedFrame[AudioFrame]) -> tuple[int, int, str, int]:
    """Run, rate, sample format and channels of a frame; only frames with equal values can be joined."""
    frame = placed.frame
    return placed.run, placed.rate_hz, frame.format.name, frame.layout.nb_channels


def resample_run(
    blocks: Iterator[tuple[float, AudioFrame]], from_hz: int, to_hz: int
) -> Iterator[tuple[float, np.ndarray]]:
    """Yield the blocks of one run at another rate, each with the number of its first sample."""
    begin, first_block = next(blocks)
    later_blocks = (block for _, block in blocks)
    all_blocks = itertools.chain([first_block], later_blocks)
    for block_CS in resample_blocks_CS(map(frame_samples_CS, all_blocks), from_hz, to_hz):
        yield begin, block_CS
        begin += block_CS.shape[1]


def merge_frames(placed_frames: Iterable[PlacedFrame[AudioFrame]]) -> Iterator[tuple[float, AudioFrame]]:
    """Yield frames of one format joined to blocks, each with the number of its first sample.

    FFmpeg's own queue joins them: an array for every frame took 5 times longer.
    """
    queue = av.AudioFifo()
    block_begin: float | None = None
    for placed in placed_frames:
        if block_begin is None:
            block_begin = placed.begin_sample
        frame = placed.frame
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
