"""The decoder of several streams, one after the other in one file: chained Ogg, joined mp3 or flac.

Each stream has a header of its own, so it may have another rate and other channels. Players play them one by one.
"""

import functools
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np

from pipeline.audio.audio_decoder import AudioDecoder
from pipeline.audio.byte_window import SoundInput, file_identity, open_byte_range
from pipeline.audio.resample import limit_samples, resample_blocks_CS
from pipeline.errors import AudioError

ALL_SAMPLES = 2**62  # more samples than any stream has

CACHED_CHAINS = (
    64  # files whose streams are measured once in a process, however many segments are cut from them
)

# Opens one stream; gives None if it does not decode.
StreamOpener = Callable[[SoundInput], AbstractContextManager[AudioDecoder | None]]


class ChainLink(NamedTuple):
    """One stream of a chain, as it decodes: its bytes, and its samples at its own rate."""

    offset: int
    size: int
    rate_hz: int
    channels: int
    codec: str
    samples: int
    declared_seconds: float | None


@dataclass(kw_only=True, slots=True)
class ChainDecoder:
    """Streams one after the other; samples are numbered at the rate of the first, others are resampled."""

    sound: SoundInput
    links: tuple[ChainLink, ...]
    open_stream: StreamOpener
    filled_samples: int = 0

    @classmethod
    @contextmanager
    def open_parts(
        cls, sound: SoundInput, parts: Sequence[tuple[int, int]], open_stream: StreamOpener
    ) -> Iterator["ChainDecoder"]:
        """Open the streams at these offsets and sizes; AudioError (unreadable) if none of them decodes."""
        identity = file_identity(sound) if isinstance(sound, Path) else None
        if isinstance(sound, Path) and identity is not None:
            links = measure_file_links(sound, tuple(parts), open_stream, identity)
        else:
            links = measure_links(sound, parts, open_stream)
        if not links:
            raise AudioError("unreadable", f"not one of its {len(parts)} streams decodes; fetch it again")
        yield cls(sound=sound, links=links, open_stream=open_stream)

    @property
    def rate_hz(self) -> int:
        """The rate of the first stream."""
        return self.links[0].rate_hz

    @property
    def channels(self) -> int:
        """The number of channels of the stream that has most."""
        return max(link.channels for link in self.links)

    @property
    def codec(self) -> str:
        """The codec of the first stream."""
        return self.links[0].codec

    @property
    def seconds(self) -> float:
        """The measured length of all streams, or the declared length of the last one if that is longer."""
        last = self.links[-1]
        missing_seconds = max(0.0, (last.declared_seconds or 0.0) - last.samples / last.rate_hz)
        return sum(link.samples / link.rate_hz for link in self.links) + missing_seconds

    @property
    def has_declared_length(self) -> bool:
        """Whether the last stream declares its length: then a shorter chain is truncated."""
        return self.links[-1].declared_seconds is not None

    def read_blocks(self, first_sample: int, sample_count: int) -> Iterator[np.ndarray]:
        """Yield blocks as `AudioDecoder` says; a block has the channels of its stream."""
        stop_sample = first_sample + sample_count
        begin_sample = 0
        for link in self.links:
            end_sample = begin_sample + self._samples_of(link)
            first = max(first_sample, begin_sample) - begin_sample
            count = min(stop_sample, end_sample) - begin_sample - first
            if count > 0:
                yield from self._read_link(link, first, count)
            begin_sample = end_sample

    def _samples_of(self, link: ChainLink) -> int:
        """The length of a stream at the rate of the first."""
        return round(link.samples * self.rate_hz / link.rate_hz)

    def _read_link(self, link: ChainLink, first_sample: int, sample_count: int) -> Iterator[np.ndarray]:
        """Yield samples of one stream, at the rate of the first."""
        with (
            open_byte_range(self.sound, link.offset, link.size) as window,
            self.open_stream(window) as decoder,
        ):
            if decoder is None:
                return
            if link.rate_hz == self.rate_hz:
                yield from decoder.read_blocks(first_sample, sample_count)
            else:
                own_first = round(first_sample * link.rate_hz / self.rate_hz)
                own_count = min(ALL_SAMPLES, round(sample_count * link.rate_hz / self.rate_hz) + 1)
                blocks = decoder.read_blocks(own_first, own_count)
                resampled = resample_blocks_CS(blocks, link.rate_hz, self.rate_hz)
                yield from limit_samples(resampled, sample_count)
            self.filled_samples += round(decoder.filled_samples * self.rate_hz / link.rate_hz)


@functools.lru_cache(maxsize=CACHED_CHAINS)
def measure_file_links(
    path: Path, parts: tuple[tuple[int, int], ...], open_stream: StreamOpener, _identity: tuple[int, int, int]
) -> tuple[ChainLink, ...]:
    """The same as `measure_links`, remembered for a file until it changes."""
    return measure_links(path, parts, open_stream)


def measure_links(
    sound: SoundInput, parts: Sequence[tuple[int, int]], open_stream: StreamOpener
) -> tuple[ChainLink, ...]:
    """Decode every stream once to count its samples; streams without a sample are left out."""
    links = []
    for offset, size in parts:
        with open_byte_range(sound, offset, size) as window, open_stream(window) as decoder:
            if decoder is None:
                continue
            samples = sum(block_CS.shape[1] for block_CS in decoder.read_blocks(0, ALL_SAMPLES))
            if samples:
                declared_seconds = decoder.seconds if decoder.has_declared_length else None
                links.append(
                    ChainLink(
                        offset=offset,
                        size=size,
                        rate_hz=decoder.rate_hz,
                        channels=decoder.channels,
                        codec=decoder.codec,
                        samples=samples,
                        declared_seconds=declared_seconds,
                    )
                )
    return tuple(links)
