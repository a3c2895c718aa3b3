"""The movie's clock: decoded frames are put where their time stamps say, and silence into the holes between them.

Samples are counted from the last stamp that was believed, and stamps are compared with the count. A small difference
is rounding or jitter: then the count is right to the sample. A large one is a hole, an overlap, or another stream that
begins with a clock of its own.
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Protocol, TypeVar

import numpy as np

# Stamps that differ by less from the count of samples are jitter. FFmpeg's own resampler has the same limit.
JITTER_SECONDS = 0.1

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


Frame = TypeVar("Frame", bound=AudioFrameLike)


@dataclass(frozen=True, kw_only=True, slots=True)
class Timeline:
    """What the time stamps of a stream mean.

    rate_hz           rate at which samples are numbered
    origin_seconds    time stamp of sample 0; None: the stamps mean nothing, and samples are counted
    first_sample      number of the sample with which the sound begins, above 0 if it begins late
    max_hole_seconds  a longer jump forward is not a hole but another clock
    """

    rate_hz: float
    origin_seconds: float | None = None
    first_sample: int = 0
    max_hole_seconds: float = MAX_HOLE_SECONDS

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
            if not -JITTER_SECONDS < late_seconds < JITTER_SECONDS:
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


def place_frames(
    frames: Iterable[Frame], begin_sample: int, timeline: Timeline, first_sample: int, stop_sample: int
) -> Iterator[tuple[int, int, float, Frame]]:
    """Yield the frames that reach into [first, stop): number of the run, rate, number of the first sample, frame.

    `begin_sample` is the number of the first sample of the first frame. The first frame beyond `stop` is yielded too:
    it shows that silence before it is a hole, and not the end.
    """
    cursor = TimelineCursor(timeline=timeline, position_samples=begin_sample)
    rate_hz = timeline.rate_hz
    for frame in frames:
        samples: float = frame.samples
        if not samples:
            continue
        own_rate_hz = frame.sample_rate
        if own_rate_hz != rate_hz:
            samples *= rate_hz / (own_rate_hz or rate_hz)
        begin = cursor.place(frame.time, samples)
        end = begin + samples
        if end > first_sample:
            yield cursor.run, own_rate_hz, begin, frame
        if end >= stop_sample:
            return


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
