"""The decoder of every other kind: the best audio stream of a file opened by FFmpeg (ffmpeg_stream.py).

Start of the sound: if the container states the encoder's delay (LAME header in mp3, pre-skip in opus, codec delay in
matroska, edit list in mp4), FFmpeg removes it, and the start is exact to the sample. AAC often does not state it (ADTS,
MPEG-TS, many mp4). The delay is then unknown and is left in: 1024 samples for FFmpeg's encoder. The delay of mp3
without a LAME header is left in too: 1105 samples.
"""

import itertools
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Self

import av
import numpy as np
from av import FFmpegError
from av.audio.frame import AudioFrame

from pipeline.audio.byte_window import SoundInput
from pipeline.audio.container_kinds import AudioContainer
from pipeline.audio.ffmpeg_stream import (
    OpenStream,
    StatedTimes,
    next_decoded,
    open_best_stream,
    scan_stream_seconds,
)
from pipeline.audio.resample import resample_blocks_CS
from pipeline.audio.timeline import FrameReader, HoleFiller, PlacedFrame, Timeline, TimelineCursor
from pipeline.errors import AudioError

FfmpegError = FFmpegError

FFMPEG_BLOCK_SAMPLES = 2**14

PRE_ROLL_SECONDS = 1.0  # decoded before a segment and discarded: opus needs 0.08 s, AAC one frame

# A stated length that differs by less from that of all packets is right: the last packet may be filled up.
MAX_DOUBT_SECONDS = 0.25

MAX_PLANES = 8  # with more, PyAV 18 reads beyond FFmpeg's table of planes, and sometimes crashes

LONG_INTEGER_FORMATS = ("s64", "s64p")  # that PyAV gives no array of


@dataclass(frozen=True, kw_only=True, slots=True)
class FfmpegDecoder:
    """The best audio stream of a file opened by FFmpeg, its first frame decoded.

    reader  of all frames from the first one on
    """

    sound: SoundInput
    container: AudioContainer
    source: OpenStream
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
            first_frame = next_decoded(frames)
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
        landing_frame = next_decoded(frames)
        if landing_frame is None or landing_frame.time is None:
            return None
        begin_sample = self.timeline.sample_at(landing_frame.time)
        if begin_sample > sample:
            return None
        return FrameReader(
            frames=itertools.chain([landing_frame], frames),
            cursor=TimelineCursor(timeline=self.timeline, position_samples=begin_sample),
        )


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
