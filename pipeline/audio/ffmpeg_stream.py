"""A stream of FFmpeg, through PyAV: its packets and decoded frames, each with its place on the movie's clock.

FFmpeg is told the kind of a file and does not probe it. Only this file and ffmpeg_decoder.py use PyAV.
"""

import itertools
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, Self

import av
from av import FFmpegError, InvalidDataError
from av.audio import AudioStream
from av.audio.frame import AudioFrame
from av.container import InputContainer

from pipeline.audio.avi_chunks import number_sound_chunks
from pipeline.audio.byte_window import ReadableFile, SoundInput, open_from_start
from pipeline.audio.container_kinds import AudioContainer
from pipeline.audio.flac_frames import (
    FRAME_HEADER_BYTES,
    StreamInfo,
    parse_frame_header,
    parse_stream_info,
    read_stream_info,
)
from pipeline.audio.timeline import MAX_LATE_SECONDS, LostFrame, Timeline, TimelineCursor
from pipeline.errors import AudioError

# Bad text in tags is replaced; from version 19 on PyAV does so by itself.
PYAV_MAJOR_VERSION = int(av.__version__.split(".")[0])
TAG_OPTIONS: dict[str, Any] = {"metadata_errors": "replace"} if PYAV_MAJOR_VERSION < 19 else {}

# A wav whose size was never filled in is read to the end of the file.
IGNORE_SIZE_OPTIONS = {"ignore_length": "1"}

OGG_ATTEMPTS = 1_000  # to find a next page: so many damaged ones may be in a file

# Codecs whose frames carry checksums: a damaged frame is left out, since decoded it would be noise.
CHECKED_CODECS = frozenset({"flac", "wavpack", "tta"})
CHECKSUM_OPTIONS = {"err_detect": "crccheck+explode"}


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

    has_clock      whether every packet has its time in the movie
    chunk_numbers  of an AVI with empty chunks: the time stamp of each packet, by its offset in the file
    flac_info      of a flac: FFmpeg counts the frames that it finds, so their own headers give the time stamps
    """

    demuxer: InputContainer
    stream: AudioStream
    has_clock: bool
    chunk_numbers: dict[int, int] | None
    flac_info: StreamInfo | None = None

    @property
    def is_ogg(self) -> bool:
        """Whether the packets come in pages."""
        return self.demuxer.format.name == "ogg"

    def read_packets(self) -> Iterator[av.Packet]:
        """Yield every packet up to the end, or to damage of the container, which the declared length reveals later."""
        packets = self.demux_packets()
        if self.is_ogg:
            packets = stamp_begins_of_pages(packets)
        yield from filter(self.stamp_packet, packets)

    def demux_packets(self) -> Iterator[av.Packet]:
        """Yield every packet as FFmpeg has it, which finds the next page of an Ogg when it is asked once more."""
        attempts = OGG_ATTEMPTS if self.is_ogg else 1
        while attempts:
            attempts -= 1
            try:
                yield from self.demuxer.demux(self.stream)
                return
            except (InvalidDataError, IndexError):
                # PyAV raises IndexError when damage in the middle of a file looks like an additional stream.
                continue
            except FFmpegError:  # of the disk, not of what is on it
                return

    def stamp_packet(self, packet: av.Packet) -> bool:
        """Give a packet its time stamp where FFmpeg's is wrong; returns whether it can be decoded."""
        if self.chunk_numbers is not None and packet.pos in self.chunk_numbers:
            packet.pts = packet.dts = self.chunk_numbers[packet.pos]
        if self.flac_info is not None and packet.size:
            head = bytes(memoryview(packet)[:FRAME_HEADER_BYTES])
            header = parse_frame_header(head, 0, self.flac_info)
            if header is None:
                return False
            packet.pts = packet.dts = header.first_sample
        return True

    def decode_frames(self) -> Iterator[AudioFrame | LostFrame]:
        """Yield every frame: a damaged packet costs its own frames only, and what follows keeps its place.

        In a stream without a clock, what does not decode may be no packet at all, and takes no time.
        """
        for packet in self.read_packets():
            try:
                frames = self.stream.decode(packet)
            except FFmpegError:
                if self.has_clock:
                    yield lost_frame(packet, self.stream.codec_context.sample_rate)
                continue
            yield from frames

    def make_timeline(
        self, container: AudioContainer, *, rate_hz: float, first_seconds: float | None
    ) -> Timeline:
        """What the stamps of the stream mean whose first sound is stamped `first_seconds`."""
        if container.clock == "none" or (container.clock == "chunks" and not self.chunk_numbers):
            return Timeline(rate_hz=rate_hz)
        if self.flac_info is not None:
            return flac_timeline(self.flac_info, rate_hz, first_seconds or 0.0)
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


def stamp_begins_of_pages(packets: Iterable[av.Packet]) -> Iterator[av.Packet]:
    """Yield the packets of an Ogg; the first of each page is stamped by the second.

    FFmpeg lets it begin where the last whole page ended, also behind lost ones, and stamps the others by their page.
    """
    for _, packets_of_page in itertools.groupby(packets, key=lambda packet: packet.pos):
        page = list(packets_of_page)
        if len(page) > 1 and page[1].pts is not None and page[0].duration:
            page[0].pts = page[0].dts = page[1].pts - page[0].duration
        yield from page


def lost_frame(packet: av.Packet, rate_hz: int) -> LostFrame:
    """The place of a packet that does not decode; without samples if FFmpeg does not know its length."""
    unit_seconds = float(packet.time_base or 0)
    return LostFrame(
        time=None if packet.pts is None else packet.pts * unit_seconds,
        samples=round((packet.duration or 0) * unit_seconds * rate_hz),
        sample_rate=rate_hz,
    )


def next_decoded(frames: Iterator[AudioFrame | LostFrame]) -> AudioFrame | None:
    """The next frame that decodes; None if there is none."""
    return next((frame for frame in frames if not isinstance(frame, LostFrame)), None)


def flac_timeline(info: StreamInfo, rate_hz: float, first_seconds: float) -> Timeline:
    """What the numbers of a flac's frames mean: places to the sample, the first as well if damage is before it.

    In a piece of a long stream, which states no length, the first frame is the begin.
    """
    first_sample = round(first_seconds * rate_hz)
    origin_seconds = 0.0
    if first_sample >= info.samples and first_seconds > MAX_LATE_SECONDS:
        origin_seconds = first_seconds
        first_sample = 0
    return Timeline(
        rate_hz=rate_hz,
        origin_seconds=origin_seconds,
        first_sample=first_sample,
        jitter_seconds=0.5 / rate_hz,
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
        chunk_numbers = None
        if container.clock == "chunks":
            with open_from_start(sound) as content:
                chunk_numbers = number_sound_chunks(content, stream.index)
        if stream.codec_context.name in CHECKED_CODECS:
            stream.codec_context.options = CHECKSUM_OPTIONS
        flac_info = None
        if container.demuxer == "flac":
            with open_from_start(sound) as content:
                flac_info = read_stream_info(content)
        elif container.demuxer == "ogg" and stream.codec_context.name == "flac":
            info = parse_stream_info(bytes(8) + bytes(stream.codec_context.extradata or b""))
            flac_info = info if info.has_one_size else None
        yield OpenStream(
            demuxer=demuxer,
            stream=stream,
            has_clock=container.clock in ("movie", "chunks"),
            chunk_numbers=chunk_numbers,
            flac_info=flac_info,
        )


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
