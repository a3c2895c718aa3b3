"""The movie's clock: decoded frames are put where their time stamps say, and silence into the holes between them.

Samples are counted from the last stamp that was believed, and stamps are compared with the count. A small difference
is rounding or jitter: then the count is right to the sample. A large one is a hole, an overlap, or another stream that
begins with a clock of its own.
"""

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Generic, NamedTuple, Protocol, TypeVar

import numpy as np

# Stamps that differ by less from the count of samples are jitter. FFmpeg's own resampler has the same limit.
JITTER_SECONDS = 0.1

# Shorter silence between two frames is rounding, and no gap. A lost frame of flac has 26 ms or more.
SHORTEST_GAP_SECONDS = 0.01

# An earlier stamp is an overlap up to this length, which is heard once; beyond it a new stream begins.
MAX_OVERLAP_SECONDS = 1.0

# A stamp so near to that of the first sample, after sound that is longer, is the begin of a new stream.
RESTART_SECONDS = 0.5

# With a longer delay, it is not the decoder that is late: packets before the first sound are lost.
MAX_DECODER_DELAY_SECONDS = 0.5

# A clock that begins later than this was not started with the recording: its first stamp is the begin of the movie.
MAX_LATE_SECONDS = 10.0

# Streams of packets that are cut and joined at will have jumps in their clocks: longer ones are no holes.
MAX_BROADCAST_HOLE_SECONDS = 10.0

# No recording has a longer hole: then another clock begins. Nor is a longer sound accepted.
MAX_HOLE_SECONDS = 43_200.0

SILENCE_BLOCK_SAMPLES = 2**18  # a hole may last hours


class AudioFrameLike(Protocol):
    """What the clock needs to know of a decoded frame."""

    @property
    def time(self) -> float | None: ...
    @property
    def samples(self) -> int: ...
    @property
    def sample_rate(self) -> int: ...


@dataclass(frozen=True, kw_only=True, slots=True)
class LostFrame:
    """The place of a packet that does not decode: so many samples with the stamp `time`, in seconds."""

    time: float | None
    samples: int
    sample_rate: int


Frame = TypeVar("Frame", bound=AudioFrameLike)


@dataclass(frozen=True, kw_only=True, slots=True)
class Timeline:
    """What the time stamps of a stream mean.

    rate_hz           rate at which samples are numbered
    origin_seconds    time stamp of sample 0; None: the stamps mean nothing, and samples are counted
    first_sample      number of the sample with which the sound begins, above 0 if it begins late
    max_hole_seconds  a longer jump forward is not a hole but another clock
    jitter_seconds    stamps that differ by less from the count of samples are jitter
    """

    rate_hz: float
    origin_seconds: float | None = None
    first_sample: int = 0
    max_hole_seconds: float = MAX_HOLE_SECONDS
    jitter_seconds: float = JITTER_SECONDS

    @classmethod
    def from_starts(
        cls,
        *,
        rate_hz: float,
        first_seconds: float | None,
        stream_start_seconds: float | None,
        movie_start_seconds: float | None,
        is_broadcast: bool,
    ) -> "Timeline":
        """The timeline of a sound whose first sample is stamped `first_seconds`.

        stream_start_seconds  the stamp at which the stream begins; its decoder may need packets before its first sample
        movie_start_seconds   the earliest stamp of all streams of the file
        is_broadcast          the movie begins with its earliest stamp, whatever that is; else at 0
        """
        if first_seconds is None:
            return cls(rate_hz=rate_hz)

        # The stamp at which the movie begins.
        zero_seconds = first_seconds if movie_start_seconds is None else movie_start_seconds
        if not is_broadcast and 0 <= zero_seconds <= MAX_LATE_SECONDS:
            zero_seconds = 0.0

        # Small differences are encoders' delays, which decoders have removed or not: the first sample is sample 0 then.
        begin_seconds = first_seconds
        if (
            stream_start_seconds is not None
            and first_seconds - stream_start_seconds < MAX_DECODER_DELAY_SECONDS
        ):
            begin_seconds = stream_start_seconds
        lead_seconds = begin_seconds - zero_seconds
        if lead_seconds <= JITTER_SECONDS:
            lead_seconds = 0.0
        return cls(
            rate_hz=rate_hz,
            origin_seconds=first_seconds - lead_seconds,
            first_sample=round(lead_seconds * rate_hz),
            max_hole_seconds=MAX_BROADCAST_HOLE_SECONDS if is_broadcast else MAX_HOLE_SECONDS,
        )

    @property
    def lead_seconds(self) -> float:
        """How much later than the movie the sound begins."""
        return self.first_sample / self.rate_hz

    def sample_at(self, seconds: float) -> int:
        """The number of the sample with this time stamp."""
        assert self.origin_seconds is not None
        return round((seconds - self.origin_seconds) * self.rate_hz)


@dataclass(kw_only=True, slots=True)
class TimelineCursor:
    """The place that a stream has reached on its timeline.

    position_samples  number of the next sample; fractions occur where frames of another rate are counted
    run               number of the present run of frames that follow each other without a hole or an overlap
    """

    timeline: Timeline
    position_samples: float = 0
    run: int = 0
    _zero_seconds: float | None = field(init=False)  # the stamp of sample 0 by the present clock
    _sample_seconds: float = field(init=False)

    def __post_init__(self) -> None:
        self._zero_seconds = self.timeline.origin_seconds
        self._sample_seconds = 1 / self.timeline.rate_hz

    @property
    def has_shifted(self) -> bool:
        """Whether another clock has begun."""
        return self._zero_seconds != self.timeline.origin_seconds

    def place(self, seconds: float | None, samples: float) -> float:
        """Place a frame of so many samples with the stamp `seconds`; returns the number of its first sample."""
        begin = self.position_samples
        if seconds is not None and self._zero_seconds is not None:
            late_seconds = seconds - self._zero_seconds - begin * self._sample_seconds
            if abs(late_seconds) >= self.timeline.jitter_seconds:
                self._jump(seconds, late_seconds)
                begin = self.position_samples
        self.position_samples = begin + samples
        return begin

    def _jump(self, seconds: float, late_seconds: float) -> None:
        """Go to the place of a stamp that comes unexpectedly, or take it for the begin of another clock."""
        assert self._zero_seconds is not None
        assert self.timeline.origin_seconds is not None
        is_restart = late_seconds < 0 and seconds - self.timeline.origin_seconds < RESTART_SECONDS
        if is_restart or not -MAX_OVERLAP_SECONDS <= late_seconds <= self.timeline.max_hole_seconds:
            self._zero_seconds += late_seconds
            return
        self.position_samples += round(late_seconds * self.timeline.rate_hz)
        self.run += 1


class PlacedFrame(NamedTuple, Generic[Frame]):
    """A frame with its place: number of the run, rate, numbers of its first sample and of the one after its last."""

    run: int
    rate_hz: int
    begin_sample: float
    end_sample: float
    frame: Frame


@dataclass(kw_only=True, slots=True)
class FrameReader(Generic[Frame]):
    """Frames in the order of decoding, each placed once: segments that are read one after the other are decoded once.

    frames        the frames that are not decoded yet; the place of a lost one becomes a hole
    cursor        the place of the next one of them
    keeps_frames  True: the frames of a segment are kept, since the next segment may begin in them; False: one segment
                  can be read
    """

    frames: Iterator[Frame | LostFrame]
    cursor: TimelineCursor
    keeps_frames: bool = False
    _kept: list[PlacedFrame[Frame]] = field(default_factory=list)
    _least_sample: float = 0  # frames that end before it are gone

    def can_read_from(self, first_sample: int) -> bool:
        """Whether no frame is gone that reaches beyond this sample."""
        return first_sample >= self._least_sample

    def read_frames(self, first_sample: int, stop_sample: int) -> Iterator[PlacedFrame[Frame]]:
        """Yield the frames that reach into [first, stop); `first` must be one that `can_read_from` allows.

        The first frame beyond `stop` is yielded too: it shows that silence before it is a hole, and not the end.
        """
        # Frames of the segment before, of which this one may need the last.
        self._kept = [placed for placed in self._kept if placed.end_sample > first_sample]
        self._least_sample = first_sample if self.keeps_frames else math.inf
        for placed in list(self._kept):
            yield placed
            if placed.end_sample >= stop_sample:
                return

        # New frames.
        for frame in self.frames:
            if not frame.samples:
                continue
            begin, end = self._place(frame)
            if isinstance(frame, LostFrame):
                self.cursor.run += 1
                continue
            placed = PlacedFrame(self.cursor.run, frame.sample_rate, begin, end, frame)
            if placed.end_sample > first_sample:
                if self.keeps_frames:
                    self._kept.append(placed)
                yield placed
            if placed.end_sample >= stop_sample:
                return

    def _place(self, frame: Frame | LostFrame) -> tuple[float, float]:
        """The numbers of a frame's first sample and of the one after its last."""
        samples: float = frame.samples
        own_rate_hz = frame.sample_rate
        rate_hz = self.cursor.timeline.rate_hz
        if own_rate_hz != rate_hz:
            samples *= rate_hz / (own_rate_hz or rate_hz)
        begin = self.cursor.place(frame.time, samples)
        return begin, begin + samples


@dataclass(kw_only=True, slots=True)
class HoleFiller:
    """Puts silence into holes of a timeline; `filled_samples` counts it."""

    filled_samples: int = 0

    def fill_holes(
        self, blocks: Iterable[tuple[float, np.ndarray]], first_sample: int, stop_sample: int
    ) -> Iterator[np.ndarray]:
        """Yield samples [first, stop) of blocks `[channel, sample]`, each with the number of its first sample.

        Where two blocks overlap, the earlier one counts.
        """
        position = first_sample
        for begin, block_CS in blocks:
            # A hole before the block.
            begin_sample = round(begin)
            hole_samples = min(begin_sample, stop_sample) - position
            if hole_samples > 0:
                self.filled_samples += hole_samples
                yield from silent_blocks(len(block_CS), hole_samples)
                position += hole_samples

            # Those of its samples that are wanted and not there yet.
            part_CS = block_CS[:, position - begin_sample : max(0, stop_sample - begin_sample)]
            if part_CS.shape[1]:
                yield part_CS
                position += part_CS.shape[1]
            if position >= stop_sample:
                return


def silent_blocks(channels: int, samples: int) -> Iterator[np.ndarray]:
    """Yield so many zeros `[channel, sample]`, in blocks."""
    for begin in range(0, samples, SILENCE_BLOCK_SAMPLES):
        yield np.zeros((channels, min(SILENCE_BLOCK_SAMPLES, samples - begin)), np.float32)
