"""Decoding: the sound of one clip becomes a mono waveform, or an error that says why it cannot be used.

A waveform is at most as long as the clip's segment and keeps the rate of its source; `ClipAudio.resample_wave` changes
the rate. `stream_wave` decodes a sound of any length in pieces.
"""

import hashlib
import math
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from pipeline.audio.byte_window import SoundInput
from pipeline.audio.container_kinds import AudioContainer
from pipeline.audio.containers import recognise_container
from pipeline.audio.decoders import AudioDecoder, open_decoder
from pipeline.audio.levels import (
    SILENCE_DBFS,
    SampleRange,
    describe_bad_samples,
    magnitude_dbfs,
    rms_magnitude,
)
from pipeline.audio.open_sound import OpenSound
from pipeline.audio.resample import resample_blocks, resample_wave
from pipeline.audio.sources import SoundLocator
from pipeline.audio.timeline import SHORTEST_GAP_SECONDS
from pipeline.errors import AudioError, InputError, UnexpectedAudioError, first_error_line

LENGTH_SLACK = 0.02  # of the segment: a source whose length differs by less is not flagged
COMPLETE_SHARE = 0.95  # a clip that lacks less than 5 % of its samples counts as whole
PACKET_SECONDS = 0.02  # one opus packet: a declared length may be rounded up by this much

MIN_SOUND_SECONDS = 0.1

ALL_SAMPLES = 2**62  # more samples than any sound has


@dataclass(frozen=True, kw_only=True, slots=True)
class AudioPolicy:
    """Which sounds are usable. A source longer than `max_seconds` is refused; YouTube's own limit is 12 h."""

    accept_truncated: bool = False
    keep_silent: bool = False
    max_seconds: float = 43_200.0


@dataclass(frozen=True, kw_only=True, slots=True)
class ClipAudio:
    """One decoded clip.

    wave_S               float32, mono (plain mean of the channels), never clipped, at the source's own `rate_hz`
    source_seconds       length of the whole source: the declared length, or the decoded length if that is shorter or
                         no length is declared
    peak_dbfs, rms_dbfs  levels of the mono wave before resampling; -200 for digital silence
    digest               32 hex digits of SHA-256 over that wave as little-endian float32
    flags                cut (the segment, from a whole video), longer (only the first seconds are used), shorter,
                         gaps (silence stands where time stamps leave out sound), truncated, silent, mixed_down,
                         beyond_full_scale, wrong_extension
    """

    wave_S: np.ndarray
    segment_seconds: float
    codec: str
    rate_hz: int
    channels: int
    source_seconds: float
    peak_dbfs: float
    rms_dbfs: float
    digest: str
    flags: tuple[str, ...]

    def resample_wave(self, rate_hz: int) -> np.ndarray:
        """The wave at `rate_hz` by soxr HQ: `round(segment_seconds * rate_hz)` samples of a full segment."""
        samples = len(self.wave_S)

        # A full segment has the same number of samples whatever the rate of its source; a shorter one keeps its length.
        wanted = round(samples * rate_hz / self.rate_hz)
        if samples == round(self.segment_seconds * self.rate_hz):
            wanted = round(self.segment_seconds * rate_hz)
        return resample_wave(self.wave_S, self.rate_hz, rate_hz, wanted)


@dataclass(frozen=True, slots=True)
class VideoSegment:
    """The part of a video that is a clip, in seconds."""

    start_seconds: float
    end_seconds: float
    is_exact: bool = False  # True: seconds of the decoded sound; False: that sound may be the clip alone

    def __post_init__(self) -> None:
        if not 0 <= self.start_seconds < self.end_seconds:
            raise ValueError(f"[{self.start_seconds}, {self.end_seconds}) is no segment of a video")

    @property
    def seconds(self) -> float:
        return self.end_seconds - self.start_seconds

    def is_part_of(self, source_seconds: float) -> bool:
        """Whether a source of this length is the whole video: longer than the clip, and reaching its end to 5 %."""
        if self.is_exact:
            return True
        tolerance = (1 - COMPLETE_SHARE) * self.seconds
        return source_seconds > self.seconds + tolerance and source_seconds >= self.end_seconds - tolerance


@dataclass(frozen=True, kw_only=True, slots=True)
class SegmentFacts:
    """What `check_complete` and `check_audible` need to know of decoded samples, which may have been used by then.

    samples           number of decoded samples, at the source's own rate; may be 0
    expected_samples  samples of the segment by the declared length; None if the source declares none
    is_cut            whether they were cut from a whole video at the segment's start; else they begin the source
    """

    rate_hz: int
    channels: int
    codec: str
    samples: int
    expected_samples: int | None
    is_cut: bool

    @property
    def seconds(self) -> float:
        """The length of the decoded samples."""
        return self.samples / self.rate_hz

    @property
    def is_truncated(self) -> bool:
        """Whether the source declares more samples than could be decoded."""
        if self.expected_samples is None:
            return False
        missing = self.expected_samples - self.samples
        tolerated = max((1 - COMPLETE_SHARE) * self.expected_samples, PACKET_SECONDS * self.rate_hz)
        return missing > tolerated


@dataclass(frozen=True, kw_only=True, slots=True)
class DecodedSegment:
    """The samples of a segment that could be decoded, at the source's own rate; there may be none.

    wave_S              float32, plain mean of the channels
    source_seconds      length of the whole source: the declared length, or the decoded length if it ended early
    exceeds_full_scale  whether any channel exceeds full scale
    has_gaps            whether silence stands where the time stamps leave a hole, or before sound that begins late
    """

    wave_S: np.ndarray
    facts: SegmentFacts
    source_seconds: float
    has_gaps: bool
    exceeds_full_scale: bool


def load_clip_audio(
    locator: SoundLocator,
    *,
    start_seconds: float,
    end_seconds: float,
    policy: AudioPolicy = AudioPolicy(),
    open_sound: OpenSound | None = None,
) -> ClipAudio:
    """Decode the segment of a sound; AudioError(reason, sentence) if the sound is unusable under the policy.

    A file that is longer than the segment and reaches its end (to within 5 %) is a whole video: [start, end) is cut
    from it. From any other file the first `end - start` seconds are used. If the locator is exact, the segment is
    always cut. `open_sound` is for clips that follow each other in one sound: it is the same for all of them.
    """
    # Every error begins with the name of the sound.
    segment = VideoSegment(start_seconds, end_seconds, is_exact=bool(locator.exact))
    with costing_the_clip_alone(locator):
        with (
            OpenSound() if open_sound is None else nullcontext(open_sound) as sound,
            sound.open_decoder(locator, end_seconds) as (container, decoder),
        ):
            decoded = read_segment(decoder, segment, policy.max_seconds)

        # There must be samples before their range can be measured.
        check_complete(decoded.facts, policy)
        sample_range = checked_range(decoded.wave_S)
        check_audible(decoded.facts, sample_range, policy)

    # Level and digest are those of the wave before resampling: they do not depend on a mel spec.
    return ClipAudio(
        wave_S=decoded.wave_S,
        segment_seconds=segment.seconds,
        codec=decoded.facts.codec,
        rate_hz=decoded.facts.rate_hz,
        channels=decoded.facts.channels,
        source_seconds=decoded.source_seconds,
        peak_dbfs=magnitude_dbfs(sample_range.peak),
        rms_dbfs=magnitude_dbfs(rms_magnitude(decoded.wave_S)),
        digest=hashlib.sha256(decoded.wave_S.astype("<f4", copy=False).data).hexdigest()[:32],
        flags=segment_flags(decoded, sample_range, segment, is_misnamed=container.is_misnamed(locator.name)),
    )


@contextmanager
def costing_the_clip_alone(locator: SoundLocator) -> Iterator[None]:
    """Within the block every error becomes an AudioError that begins with the sound's name.

    Decoders raise what their authors did not foresee, too, on files that nobody foresaw: UnexpectedAudioError then.
    InputError passes, since it means a server that fails, not a sound.
    """
    # A file name may hold line breaks and bytes that are no text.
    name = ascii(locator.name)[1:-1]
    try:
        yield
    except AudioError as error:
        raise AudioError(error.reason, f"{name}: {error}") from None
    except InputError:
        raise
    except Exception as error:
        fault = type(error).__name__
        message = first_error_line(error, Path(locator.path))
        detail = f"{name}: decoding it fails in a way that nobody foresaw ({fault}: {message})"
        raise UnexpectedAudioError(f"{detail}; convert it, and report this", fault) from error


def decode_segment(
    sound: SoundInput, container: AudioContainer, segment: VideoSegment, *, max_seconds: float
) -> DecodedSegment:
    """Decode the segment. AudioError: unreadable if the sound cannot be opened, too_long over `max_seconds`."""
    with open_decoder(sound, container) as decoder:
        return read_segment(decoder, segment, max_seconds)


def read_segment(decoder: AudioDecoder, segment: VideoSegment, max_seconds: float) -> DecodedSegment:
    """Decode the samples of the segment and mix them down.

    Memory use is limited by the length of the segment, whatever length the header declares.
    """
    refuse_long_sound(decoder, max_seconds)

    # The samples to decode, `wanted` from `first` on:
    #   of a whole video   |----------[=========)------------|          of the clip alone   [=========)--|
    #                      0        first   first + wanted   declared                       0    wanted  declared
    is_whole_video = segment.is_part_of(decoder.seconds)
    wanted = round(segment.seconds * decoder.rate_hz)
    if not wanted:
        raise AudioError("too_short", f"a segment of {segment.seconds:g} s has no sample; correct its list")
    declared = round(decoder.seconds * decoder.rate_hz)
    first = 0
    if is_whole_video:
        first = round(segment.start_seconds * decoder.rate_hz)
        if first >= declared > 0:
            detail = f"the clip starts at {segment.start_seconds:g} s of a sound of {decoder.seconds:.2f} s"
            raise AudioError("too_short", f"{detail}; correct its list")

    # Fewer samples may be decoded than the declared length promises: the source then ends where they end.
    filled_before = decoder.filled_samples
    wave_S, exceeds_full_scale = mix_down(decoder.read_blocks(first, wanted))
    source_seconds = (first + len(wave_S)) / decoder.rate_hz
    if len(wave_S) >= wanted:
        source_seconds = max(source_seconds, decoder.seconds)
    is_cut = is_whole_video and decoder.seconds > segment.seconds + LENGTH_SLACK * segment.seconds
    promised = max(0, min(wanted, declared - first))
    return DecodedSegment(
        wave_S=wave_S,
        facts=segment_facts(decoder, samples=len(wave_S), promised=promised, is_cut=is_cut),
        source_seconds=source_seconds,
        has_gaps=decoder.filled_samples - filled_before >= SHORTEST_GAP_SECONDS * decoder.rate_hz,
        exceeds_full_scale=exceeds_full_scale,
    )


def segment_facts(decoder: AudioDecoder, *, samples: int, promised: int, is_cut: bool) -> SegmentFacts:
    """The facts of `samples` that were decoded where the length of the source, if it is declared, promised so many."""
    expected_samples = None
    if decoder.has_declared_length:
        expected_samples = promised
    return SegmentFacts(
        rate_hz=decoder.rate_hz,
        channels=decoder.channels,
        codec=decoder.codec,
        samples=samples,
        expected_samples=expected_samples,
        is_cut=is_cut,
    )


def refuse_long_sound(decoder: AudioDecoder, max_seconds: float) -> None:
    """Raise AudioError (too_long) for a file whose length is more than `max_seconds`."""
    refuse_longer(decoder.seconds, max_seconds)


def refuse_longer(seconds: float, max_seconds: float) -> None:
    """Raise AudioError (too_long) for a length of more than `max_seconds`."""
    if seconds > max_seconds:
        detail = f"{seconds:.0f} s long, more than {max_seconds:.0f}; cut it, or raise max_seconds"
        raise AudioError("too_long", detail)


def mix_down(blocks_CS: Iterable[np.ndarray]) -> tuple[np.ndarray, bool]:
    """The blocks joined to one mono wave, and whether any channel exceeds full scale."""
    pieces = [np.zeros(0, np.float32)]
    exceeds_full_scale = False
    for block_CS in blocks_CS:
        exceeds_full_scale |= bool(block_CS.max() > 1.0 or block_CS.min() < -1.0)
        pieces.append(mean_of_channels(block_CS))
    return np.concatenate(pieces), exceeds_full_scale


def mean_of_channels(block_CS: np.ndarray) -> np.ndarray:
    """The mean of the channels, `[sample]`."""
    if len(block_CS) == 1:
        return block_CS[0]

    # Channels are added one by one: 20 times faster than `.mean()` over interleaved samples. NaN and infinity pass;
    # `checked_range` refuses them.
    with np.errstate(invalid="ignore", over="ignore"):
        mono_S = block_CS[0] + block_CS[1]
        for channel_S in block_CS[2:]:
            mono_S += channel_S
        mono_S /= len(block_CS)
    return mono_S


def check_complete(facts: SegmentFacts, policy: AudioPolicy) -> None:
    """Raise AudioError for a segment that is truncated (if the policy refuses that) or has no sample (unreadable)."""
    # A clip without a single sample is unreadable, unless it is cut from a longer sound, whose other samples are
    # readable: then its sound ends before it, and no policy can keep it.
    shortfall = describe_shortfall(facts)
    if facts.is_truncated and facts.is_cut and facts.samples == 0:
        raise AudioError("truncated", f"{shortfall}; fetch it again")
    if facts.samples == 0:
        raise AudioError("unreadable", f"{shortfall}; its writer was interrupted, fetch it again")
    if facts.is_truncated and not policy.accept_truncated:
        raise AudioError(
            "truncated", f"{shortfall}; fetch it again; a build keeps it with --accept-truncated"
        )


def check_audible(facts: SegmentFacts, sample_range: SampleRange, policy: AudioPolicy) -> None:
    """Raise AudioError for a segment that is too short, or silent (if the policy refuses that)."""
    if facts.seconds < MIN_SOUND_SECONDS:
        raise AudioError("too_short", f"{facts.seconds:.4f} s of sound, under {MIN_SOUND_SECONDS} s")
    if sample_range.is_silent and not policy.keep_silent:
        mixed = f" (the mean of {facts.channels} channels)" if facts.channels > 1 else ""
        peak_dbfs = magnitude_dbfs(sample_range.peak)
        level = f"peak {peak_dbfs:.0f} dBFS{mixed}, under {SILENCE_DBFS:.0f}"
        if peak_dbfs >= SILENCE_DBFS:
            level = f"nothing but a constant of {sample_range.highest:.3g}{mixed}"
        raise AudioError("silent", f"{level}; fetch it again, or keep silent clips")


def checked_range(wave_S: np.ndarray) -> SampleRange:
    """The range of the samples; AudioError (non_finite) if one is NaN, infinite or absurdly large."""
    sample_range = SampleRange.from_wave(wave_S)
    if not sample_range.is_usable:
        raise AudioError("non_finite", f"{describe_bad_samples(wave_S)}; damaged or no sound, fetch it again")
    return sample_range


def describe_shortfall(facts: SegmentFacts) -> str:
    """How much of the expected sound is there, in words."""
    if not facts.expected_samples:
        return f"a {facts.codec} header, but not one sample of sound"
    whole = "the segment's" if facts.is_cut else "the declared"
    expected_seconds = facts.expected_samples / facts.rate_hz
    return f"{facts.seconds:.2f} s of {whole} {expected_seconds:.2f} s can be decoded"


def segment_flags(
    decoded: DecodedSegment, sample_range: SampleRange, segment: VideoSegment, *, is_misnamed: bool
) -> tuple[str, ...]:
    """The flags of a usable segment, as listed at `ClipAudio`."""
    facts = decoded.facts
    wanted = round(segment.seconds * facts.rate_hz)
    is_longer = decoded.source_seconds > (1 + LENGTH_SLACK) * segment.seconds
    conditions = {
        "cut": facts.is_cut,
        "longer": not facts.is_cut and is_longer,
        "shorter": facts.samples < (1 - LENGTH_SLACK) * wanted,
        "gaps": decoded.has_gaps,
        "truncated": facts.is_truncated,
        "silent": sample_range.is_silent,
        "mixed_down": facts.channels > 1,
        "beyond_full_scale": decoded.exceeds_full_scale,
        "wrong_extension": is_misnamed,
    }
    return tuple(flag for flag, holds in conditions.items() if holds)


def stream_wave(
    locator: SoundLocator, rate_hz: int, *, policy: AudioPolicy = AudioPolicy()
) -> Iterator[np.ndarray]:
    """Yield a whole sound, mono at `rate_hz`, in pieces; samples equal those of `load_clip_audio` and `resample_wave`.

    Only a few seconds are in memory at a time. AudioError(reason, sentence) if the sound is unusable under the policy.
    The error comes after the last piece if only the end of the sound shows the fault (truncated, too short, silent).
    """
    with (
        costing_the_clip_alone(locator),
        locator.open_sound() as sound,
        open_decoder(sound, recognise_container(sound)) as decoder,
    ):
        refuse_long_sound(decoder, policy.max_seconds)
        yield from resample_blocks(checked_blocks(decoder, policy), decoder.rate_hz, rate_hz)


def checked_blocks(decoder: AudioDecoder, policy: AudioPolicy) -> Iterator[np.ndarray]:
    """Yield the whole sound in mono pieces, then check it; raises AudioError as `load_clip_audio` does."""
    # Each piece is checked before anybody uses it.
    samples = 0
    sample_range = SampleRange(math.inf, -math.inf)
    for block_CS in decoder.read_blocks(0, ALL_SAMPLES):
        wave_S = mean_of_channels(block_CS)
        if not len(wave_S):
            continue
        sample_range = sample_range.join(checked_range(wave_S))
        samples += len(wave_S)
        refuse_longer(samples / decoder.rate_hz, policy.max_seconds)
        yield wave_S

    # Only the end of the sound shows how long and how loud it was.
    declared = round(decoder.seconds * decoder.rate_hz)
    facts = segment_facts(decoder, samples=samples, promised=declared, is_cut=False)
    check_complete(facts, policy)
    check_audible(facts, sample_range, policy)
