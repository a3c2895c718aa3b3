"""Decoders: a sound is opened by libsndfile or by FFmpeg, behind one Protocol; streams joined end to end are one sound.

Measured on 10 s stereo clips, PyAV takes this multiple of libsndfile's time: wav 4.8, flac 1.1, mp3 1.2, vorbis 0.7,
opus 0.4. So libsndfile decodes wav and flac, PyAV all other kinds, mp3 included: libsndfile's mpg123 writes
a line to stderr for every damaged frame, while PyAV skips the frame.
"""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass

import numpy as np

from pipeline.audio.audio_decoder import AudioDecoder
from pipeline.audio.byte_window import SoundInput, open_byte_range
from pipeline.audio.chain_decoder import ChainDecoder
from pipeline.audio.container_kinds import AudioContainer
from pipeline.audio.containers import recognise_container
from pipeline.audio.ffmpeg_decoder import FfmpegDecoder, FfmpegError
from pipeline.audio.ffmpeg_stream import describe_ffmpeg_error
from pipeline.audio.sndfile_decoder import SndfileDecoder, SndfileError, describe_sndfile_error
from pipeline.errors import AudioError

DECODER_ERRORS = (SndfileError, FfmpegError, OSError)  # raised for a file that cannot be opened

PLAUSIBLE_RATES_HZ = range(1_000, 1_000_000)


@contextmanager
def open_decoder(sound: SoundInput, container: AudioContainer) -> Iterator[AudioDecoder]:
    """Open the sound with its decoder; AudioError (unreadable) if that fails, or if its sampling rate is impossible."""
    try:
        with choose_decoder(sound, container) as decoder:
            if decoder.rate_hz not in PLAUSIBLE_RATES_HZ:
                detail = f"claims {decoder.rate_hz} samples a second; damaged, fetch it again"
                raise AudioError("unreadable", detail)
            yield decoder
    except DECODER_ERRORS as error:
        message = describe_decoder_error(error)
        detail = f"no {container.demuxer} file that can be decoded ({message}); incomplete? Fetch it again"
        raise AudioError("unreadable", detail) from None


@contextmanager
def choose_decoder(sound: SoundInput, container: AudioContainer) -> Iterator[AudioDecoder]:
    """Open the sound with the decoder that is best for its container, and with the other one if that gives up.

    libsndfile knows neither BW64 nor flac of 32 bits, for example, and FFmpeg not every AIFF. If the second gives up
    too, the error is that of the first. A sound of several streams, one after the other, is opened as one.
    """
    with ExitStack() as stack:
        decoder: AudioDecoder
        if container.skip_bytes:
            sound = stack.enter_context(open_byte_range(sound, container.skip_bytes))
        if container.parts:
            decoder = stack.enter_context(ChainDecoder.open_parts(sound, container.parts, open_stream))
        else:
            try:
                decoder = stack.enter_context(FIRST_DECODERS[container.uses_libsndfile](sound, container))
            except (*DECODER_ERRORS, AudioError) as first_error:
                try:
                    decoder = stack.enter_context(
                        SECOND_DECODERS[container.uses_libsndfile](sound, container)
                    )
                except (*DECODER_ERRORS, AudioError):
                    raise first_error from None
        yield decoder


@contextmanager
def open_stream(sound: SoundInput) -> Iterator[AudioDecoder | None]:
    """Open one stream of a chain; None if it is no sound or does not decode."""
    with ExitStack() as stack:
        decoder: AudioDecoder | None = None
        try:
            decoder = stack.enter_context(choose_decoder(sound, recognise_container(sound)))
        except (*DECODER_ERRORS, AudioError):
            pass
        yield decoder


@contextmanager
def open_flac_rescue(sound: SoundInput, container: AudioContainer) -> Iterator[AudioDecoder]:
    """Open a wav or flac with libsndfile; FFmpeg carries on where a flac is damaged."""
    with SndfileDecoder.open_file(sound, container) as decoder:
        if decoder.codec == "flac":
            yield RescuingDecoder(sound=sound, container=container, first=decoder)
        else:
            yield decoder


DecoderOpener = Callable[[SoundInput, AudioContainer], AbstractContextManager[AudioDecoder]]

# By whether libsndfile is the better decoder of a container.
FIRST_DECODERS: dict[bool, DecoderOpener] = {True: open_flac_rescue, False: FfmpegDecoder.open_file}

SECOND_DECODERS: dict[bool, DecoderOpener] = {True: FfmpegDecoder.open_file, False: SndfileDecoder.open_file}


def describe_decoder_error(error: BaseException) -> str:
    """The message of one of DECODER_ERRORS, without the file's path or the name of an object in memory."""
    if isinstance(error, SndfileError):
        return describe_sndfile_error(error)
    return describe_ffmpeg_error(error)


@dataclass(kw_only=True, slots=True)
class RescuingDecoder:
    """A flac opened by libsndfile, which gives up at the first damage; FFmpeg decodes what lies beyond."""

    sound: SoundInput
    container: AudioContainer
    first: SndfileDecoder
    filled_samples: int = 0

    @property
    def rate_hz(self) -> int:
        """The rate that the header states."""
        return self.first.rate_hz

    @property
    def channels(self) -> int:
        """The number of channels that the header states."""
        return self.first.channels

    @property
    def codec(self) -> str:
        """Always flac."""
        return self.first.codec

    @property
    def seconds(self) -> float:
        """The length that the header states."""
        return self.first.seconds

    @property
    def has_declared_length(self) -> bool:
        """Always True: a flac without a length is left to FFmpeg alone."""
        return self.first.has_declared_length

    def read_blocks(self, first_sample: int, sample_count: int) -> Iterator[np.ndarray]:
        """Yield blocks as `AudioDecoder` says; the damaged blocks are silent."""
        position = first_sample
        for block_CS in self.first.read_blocks(first_sample, sample_count):
            yield block_CS
            position += block_CS.shape[1]

        # FFmpeg is asked only if sound is missing, and believed only if it decodes something beyond the damage.
        stop_sample = min(first_sample + sample_count, round(self.seconds * self.rate_hz))
        if position >= stop_sample:
            return
        try:
            with FfmpegDecoder.open_file(self.sound, self.container) as decoder:
                if decoder.rate_hz == self.rate_hz:
                    yield from decoder.read_blocks(position, stop_sample - position)
                    self.filled_samples += decoder.filled_samples
        except (FfmpegError, OSError, AudioError):
            return
