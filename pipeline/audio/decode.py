"""Take: the wanted seconds of one file, decoded and mixed to mono; the only door to libsndfile.

Measured on 10 s stereo clips, PyAV takes this multiple of libsndfile's time: wav 4.8, flac 1.1, mp3 1.2,
vorbis 0.7, opus 0.4. So wav and flac are libsndfile's, all else PyAV's. mp3 too: libsndfile's mpg123 writes to
stderr about every damaged frame, and PyAV steps over it.

The sound of one clip -> one mono waveform, at most as long as its segment, at any rate.
"""

import hashlib
import math
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
import soundfile
import soxr

from pipeline.audio.containers import AudioContainer, recognise_container
from pipeline.audio.decoders import AudioDecoder, FfmpegDecoder, FFmpegError, SndfileDecoder
from pipeline.audio.sources import SoundInput, SoundLocator
from pipeline.errors import AudioError

LENGTH_SLACK = 0.02  # of the segment: a source that differs by less is neither shorter nor longer

COMPLETE_SHARE = 0.95  # a clip that lacks less than 5 % of what it should hold is whole

PLAUSIBLE_RATES_HZ = range(1_000, 1_000_000)


@dataclass(frozen=True, slots=True)
class VideoSegment:
    """The seconds of a video that a clip is."""

    start_seconds: float
    end_seconds: float
    is_exact: bool = False  # of the sound that is decoded, which else may be the clip alone

    def __post_init__(self) -> None:
        if not 0 <= self.start_seconds < self.end_seconds:
            raise ValueError(f"[{self.start_seconds}, {self.end_seconds}) is no segment of a video")

    @property
    def seconds(self) -> float:
        return self.end_seconds - self.start_seconds

    def is_part_of(self, source_seconds: float) -> bool:
        """Whether a file of that length is the whole video: longer than the clip, and reaching its end; +- 5 %."""
        if self.is_exact:
            return True
        tolerance = (1 - COMPLETE_SHARE) * self.seconds
        return source_seconds > self.seconds + tolerance and source_seconds >= self.end_seconds - tolerance


@dataclass(frozen=True, kw_only=True, slots=True)
class DecodedSegment:
    """The samples of a segment that are there, at the source's own rate; maybe fewer than wanted, maybe none."""

    wave_S: np.ndarray  # float32, plain mean of the channels
    rate_hz: int
    channels: int
    codec: str
    source_seconds: float  # of the whole source: as declared, or as found where it ended early
    expected_samples: (
        int | None
    )  # of the segment, by the declared length; None where the source declares none
    is_cut: bool  # from a whole video, at the segment's start; else from the first sample on
    exceeds_full_scale: bool  # in any channel


def decode_segment(
    sound: SoundInput, container: AudioContainer, segment: VideoSegment, *, max_seconds: float
) -> DecodedSegment:
    """Decode the segment. AudioError unreadable where nothing can be opened, too_long over `max_seconds`."""
    with open_decoder(sound, container) as source:
        return read_segment(source, segment, max_seconds)


@contextmanager
def open_decoder(sound: SoundInput, container: AudioContainer) -> Iterator[AudioDecoder]:
    """The file, opened by its decoder; AudioError unreadable where it cannot be, or claims what cannot be."""
    decoder = SndfileDecoder.open_file if container.uses_libsndfile else FfmpegDecoder.open_file
    try:
        with decoder(sound, container) as source:
            if source.rate_hz not in PLAUSIBLE_RATES_HZ:
                detail = f"claims {source.rate_hz} samples a second; damaged, fetch it again"
                raise AudioError("unreadable", detail)
            yield source
    except (soundfile.LibsndfileError, FFmpegError, OSError) as error:
        what = error.strerror if isinstance(error, OSError | FFmpegError) else str(error)
        detail = f"no {container.demuxer} file that can be decoded ({what}); incomplete? Fetch it again"
        raise AudioError("unreadable", detail) from None


def read_segment(decoder: AudioDecoder, segment: VideoSegment, max_seconds: float) -> DecodedSegment:
    """Choose the samples, decode and mix them. What is allocated is bounded by the segment, not by a header."""
    refuse_long_sound(decoder, max_seconds)
    cut = segment.is_part_of(decoder.seconds)
    first = round(segment.start_seconds * decoder.rate_hz) if cut else 0
    wanted = round(segment.seconds * decoder.rate_hz)
    if cut and first >= round(decoder.seconds * decoder.rate_hz) > 0:
        start_seconds = segment.start_seconds
        detail = (
            f"the clip starts at {start_seconds:g} s of a sound of {decoder.seconds:.2f} s; correct its list"
        )
        raise AudioError("too_short", detail)
    wave_S, beyond_full_scale = mix_down(decoder.read_blocks(first, wanted))
    found_seconds = (first + len(wave_S)) / decoder.rate_hz
    promised = min(wanted, round(decoder.seconds * decoder.rate_hz) - first)
    return DecodedSegment(
        wave_S=wave_S,
        rate_hz=decoder.rate_hz,
        channels=decoder.channels,
        codec=decoder.codec,
        source_seconds=found_seconds if len(wave_S) < wanted else max(found_seconds, decoder.seconds),
        expected_samples=promised if decoder.has_declared_length else None,
        is_cut=cut and decoder.seconds > segment.seconds + LENGTH_SLACK * segment.seconds,
        exceeds_full_scale=beyond_full_scale,
    )


def refuse_long_sound(decoder: AudioDecoder, max_seconds: float) -> None:
    """AudioError too_long where a file claims to be longer."""
    if decoder.seconds > max_seconds:
        detail = f"{decoder.seconds:.0f} s long, more than {max_seconds:.0f}; cut it, or raise max_seconds"
        raise AudioError("too_long", detail)


def mix_down(blocks_CS: Iterable[np.ndarray]) -> tuple[np.ndarray, bool]:
    """Pieces of channels as one mono wave, and whether any channel went beyond full scale."""
    pieces, beyond = [np.zeros(0, np.float32)], False
    for block_CS in blocks_CS:
        beyond |= bool(block_CS.max() > 1.0 or block_CS.min() < -1.0)
        pieces.append(mean_of_channels(block_CS))
    return np.concatenate(pieces), beyond


def mean_of_channels(block_CS: np.ndarray) -> np.ndarray:
    """Mean of the channels; added up one by one, 20 times faster than `.mean()` over interleaved samples."""
    if len(block_CS) == 1:
        return block_CS[0]
    with np.errstate(invalid="ignore", over="ignore"):  # NaN and infinity are judged later
        mono_S = block_CS[0] + block_CS[1]
        for channel_S in block_CS[2:]:
            mono_S += channel_S
        mono_S /= len(block_CS)
    return mono_S


PACKET_SECONDS = 0.02  # what a declared length may round up: one opus packet

MIN_SOUND_SECONDS = 0.1

SILENCE_DBFS = -90.0

DIGITAL_SILENCE_DBFS = -200.0  # reported for digital silence, whose level is minus infinity

ALL_SAMPLES = 2**62  # asked of a decoder: all there are

MAX_USABLE_PEAK = 1e6  # +120 dBFS is no sound, and far above it the power leaves float32


@dataclass(frozen=True, kw_only=True, slots=True)
class AudioPolicy:
    """What counts as usable. A source longer than `max_seconds` is refused; YouTube's own limit is 12 h."""

    accept_truncated: bool = False
    keep_silent: bool = False
    max_seconds: float = 43_200.0


@dataclass(frozen=True, kw_only=True, slots=True)
class ClipAudio:
    """One clip, decoded.

    wave_S      float32, mono (plain mean of the channels), never clipped, at the source's own `rate_hz`
    seconds     length of the whole source: as declared, or as found where that is less or nothing is declared
    peak_dbfs, rms_dbfs   of the mono wave before resampling; digital silence is -200
    digest      32 hex digits of SHA-256 over that wave as little-endian float32
    flags       cut (a whole video, cut at the segment), longer (the first seconds count), shorter, truncated,
                silent, mixed_down, beyond_full_scale, wrong_extension
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
        """The wave at `rate_hz` by soxr HQ: `round(segment_seconds * rate_hz)` samples of a full segment.

        soxr may return one sample more or less than the ratio says: that one is trimmed, or a zero added.
        """
        samples = len(self.wave_S)
        full = samples == round(self.segment_seconds * self.rate_hz)
        wanted = round(self.segment_seconds * rate_hz) if full else round(samples * rate_hz / self.rate_hz)
        wave_S = soxr.resample(self.wave_S, self.rate_hz, rate_hz, quality="HQ")
        return wave_S[:wanted] if len(wave_S) >= wanted else np.pad(wave_S, (0, wanted - len(wave_S)))


def load_clip_audio(
    locator: SoundLocator,
    *,
    start_seconds: float,
    end_seconds: float,
    policy: AudioPolicy = AudioPolicy(),
) -> ClipAudio:
    """Decode the segment of a sound; AudioError(reason, sentence) where the policy cannot use it.

    A file longer than the segment that reaches its end (less 5 %) is a whole video: it is cut at [start, end).
    Of any other file the first `end - start` seconds count. Where the locator is exact, the segment is always cut.
    """
    segment = VideoSegment(start_seconds, end_seconds, is_exact=bool(locator.exact))
    try:
        with locator.open_sound() as source:
            container = recognise_container(source)
            take = decode_segment(source, container, segment, max_seconds=policy.max_seconds)
        check_usable(take, policy)
    except AudioError as error:
        name = ascii(locator.name)[1:-1]  # a file name may hold line breaks and bytes that are no text
        raise AudioError(error.reason, f"{name}: {error}") from None
    return ClipAudio(
        wave_S=take.wave_S,
        segment_seconds=segment.seconds,
        codec=take.codec,
        rate_hz=take.rate_hz,
        channels=take.channels,
        source_seconds=take.source_seconds,
        peak_dbfs=magnitude_dbfs(peak_magnitude(take.wave_S)),
        rms_dbfs=magnitude_dbfs(rms_magnitude(take.wave_S)),
        digest=hashlib.sha256(take.wave_S.astype("<f4", copy=False).data).hexdigest()[:32],
        flags=segment_flags(take, segment, is_misnamed=container.is_misnamed(locator.name)),
    )


def stream_wave(
    locator: SoundLocator, rate_hz: int, *, policy: AudioPolicy = AudioPolicy()
) -> Iterator[np.ndarray]:
    """A whole sound, mono at `rate_hz`, in pieces: sample for sample what `load` and `resampled` give of it.

    A few seconds are held at a time, however long it is. AudioError(reason, sentence) where the policy cannot use
    it: after the last piece, where only the end tells (truncated, too short, silent).
    """
    try:
        with locator.open_sound() as sound, open_decoder(sound, recognise_container(sound)) as source:
            refuse_long_sound(source, policy.max_seconds)
            yield from resample_blocks(checked_blocks(source, policy), source.rate_hz, rate_hz)
    except AudioError as error:
        name = ascii(locator.name)[1:-1]
        raise AudioError(error.reason, f"{name}: {error}") from None


def checked_blocks(decoder: AudioDecoder, policy: AudioPolicy) -> Iterator[np.ndarray]:
    """The whole source in mono pieces; raises AudioError as `judge` does."""
    samples, loudest = 0, 0.0
    for block_CS in decoder.read_blocks(0, ALL_SAMPLES):
        wave_S = mean_of_channels(block_CS)
        if not len(wave_S):
            continue
        if not peak_magnitude(wave_S) <= MAX_USABLE_PEAK:
            raise AudioError(
                "non_finite", f"{describe_bad_samples(wave_S)}; damaged or no sound, fetch it again"
            )
        samples, loudest = samples + len(wave_S), max(loudest, peak_magnitude(wave_S))
        yield wave_S
    found_seconds = samples / decoder.rate_hz
    whole = DecodedSegment(
        wave_S=np.broadcast_to(np.float32(loudest), (samples,)),  # as long and as loud as what has passed
        rate_hz=decoder.rate_hz,
        channels=decoder.channels,
        codec=decoder.codec,
        source_seconds=found_seconds,
        expected_samples=round(decoder.seconds * decoder.rate_hz) if decoder.has_declared_length else None,
        is_cut=False,
        exceeds_full_scale=loudest > 1.0,
    )
    check_usable(whole, policy)


def resample_blocks(blocks: Iterator[np.ndarray], from_hz: int, to_hz: int) -> Iterator[np.ndarray]:
    """A wave in pieces at another rate, by soxr HQ; as many samples as `Audio.resampled` gives."""
    resampler = soxr.ResampleStream(from_hz, to_hz, 1, dtype="float32", quality="HQ")
    taken, given = 0, 0
    for piece_S in blocks:
        resampled_S = resampler.resample_chunk(np.ascontiguousarray(piece_S))
        taken, given = taken + len(piece_S), given + len(resampled_S)
        if len(resampled_S):
            yield resampled_S
    last_S = resampler.resample_chunk(np.zeros(0, np.float32), last=True)
    wanted = max(0, round(taken * to_hz / from_hz) - given)
    yield last_S[:wanted] if len(last_S) >= wanted else np.pad(last_S, (0, wanted - len(last_S)))


def check_usable(decoded_segment: DecodedSegment, policy: AudioPolicy) -> None:
    """Raise AudioError where a take is not usable: truncated, empty, broken, too short or silent, in this order."""
    found_seconds = len(decoded_segment.wave_S) / decoded_segment.rate_hz
    if (
        is_truncated(decoded_segment)
        and not policy.accept_truncated
        and (len(decoded_segment.wave_S) or decoded_segment.is_cut)
    ):
        raise AudioError(
            "truncated", f"{describe_shortfall(decoded_segment)}; fetch it again, or accept truncated clips"
        )
    if not len(decoded_segment.wave_S):
        raise AudioError(
            "unreadable", f"{describe_shortfall(decoded_segment)}; its writer was interrupted, fetch it again"
        )
    level = peak_magnitude(decoded_segment.wave_S)
    if not level <= MAX_USABLE_PEAK:
        raise AudioError(
            "non_finite",
            f"{describe_bad_samples(decoded_segment.wave_S)}; damaged or no sound, fetch it again",
        )
    if found_seconds < MIN_SOUND_SECONDS:
        raise AudioError("too_short", f"{found_seconds:.4f} s of sound, under {MIN_SOUND_SECONDS} s")
    if magnitude_dbfs(level) < SILENCE_DBFS and not policy.keep_silent:
        mean = f" (the mean of {decoded_segment.channels} channels)" if decoded_segment.channels > 1 else ""
        detail = f"peak {magnitude_dbfs(level):.0f} dBFS{mean}, under {SILENCE_DBFS:.0f}"
        raise AudioError("silent", f"{detail}; fetch it again, or keep silent clips")


def is_truncated(decoded_segment: DecodedSegment) -> bool:
    """Whether the source promised more than decodes."""
    if decoded_segment.expected_samples is None:
        return False
    missing = decoded_segment.expected_samples - len(decoded_segment.wave_S)
    return missing > max(
        (1 - COMPLETE_SHARE) * decoded_segment.expected_samples, PACKET_SECONDS * decoded_segment.rate_hz
    )


def describe_shortfall(decoded_segment: DecodedSegment) -> str:
    """How much of what was promised is there, in words."""
    found_seconds = len(decoded_segment.wave_S) / decoded_segment.rate_hz
    if not decoded_segment.expected_samples:
        return f"a {decoded_segment.codec} header, but not one sample of sound"
    whole = "the segment's" if decoded_segment.is_cut else "the declared"
    return f"{found_seconds:.2f} s of {whole} {decoded_segment.expected_samples / decoded_segment.rate_hz:.2f} s can be decoded"


def describe_bad_samples(wave_S: np.ndarray) -> str:
    """What is wrong with samples that no microphone gives, in words."""
    odd_S = ~np.isfinite(wave_S)
    if not odd_S.any():
        return f"samples up to {peak_magnitude(wave_S):.3g} times full scale"
    return f"{odd_S.sum()} of {len(wave_S)} samples are NaN or infinite, the first at {odd_S.argmax()}"


def segment_flags(
    decoded_segment: DecodedSegment, segment: VideoSegment, *, is_misnamed: bool
) -> tuple[str, ...]:
    """What is odd about a take that is used."""
    wanted = round(segment.seconds * decoded_segment.rate_hz)
    odd = {
        "cut": decoded_segment.is_cut,
        "longer": not decoded_segment.is_cut
        and decoded_segment.source_seconds > (1 + LENGTH_SLACK) * segment.seconds,
        "shorter": len(decoded_segment.wave_S) < (1 - LENGTH_SLACK) * wanted,
        "truncated": is_truncated(decoded_segment),
        "silent": magnitude_dbfs(peak_magnitude(decoded_segment.wave_S)) < SILENCE_DBFS,
        "mixed_down": decoded_segment.channels > 1,
        "beyond_full_scale": decoded_segment.exceeds_full_scale,
        "wrong_extension": is_misnamed,
    }
    return tuple(flag for flag, holds in odd.items() if holds)


def peak_magnitude(wave_S: np.ndarray) -> float:
    """The largest magnitude; NaN where there is a NaN."""
    return float(max(wave_S.max(), -wave_S.min()))


def rms_magnitude(wave_S: np.ndarray) -> float:
    """Root mean square."""
    return math.sqrt(np.dot(wave_S, wave_S) / len(wave_S))


def magnitude_dbfs(magnitude: float) -> float:
    """Decibels relative to full scale, -200 for zero."""
    return max(DIGITAL_SILENCE_DBFS, 20 * math.log10(magnitude)) if magnitude > 0 else DIGITAL_SILENCE_DBFS
