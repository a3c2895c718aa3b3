"""A sound that stays open from one of its clips to the next, so that a long one is decoded once."""

import threading
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import NamedTuple, Self

from pipeline.audio.audio_decoder import AudioDecoder
from pipeline.audio.container_kinds import AudioContainer
from pipeline.audio.containers import recognise_container
from pipeline.audio.decoders import open_decoder
from pipeline.audio.ffmpeg_decoder import FfmpegDecoder
from pipeline.audio.sources import SoundLocator

MAX_PADDING_SECONDS = 0.1  # so little sound behind a clip is an encoder's padding, and no other clip


class KeptDecoder(NamedTuple):
    """The decoder of a sound; `stack` closes it."""

    locator: SoundLocator
    container: AudioContainer
    decoder: AudioDecoder
    stack: ExitStack


@dataclass(slots=True)
class OpenSound:
    """The sound that was read last, if its seconds are found only by decoding all that comes before them.

    mp3 and avi, for example: an hour in pieces of ten seconds would be decoded 180 times otherwise. Clips in another
    order than that of the sound are decoded too, each from the beginning.
    """

    _kept: KeptDecoder | None = field(default=None)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Close the sound that is open, if there is one."""
        if self._kept is not None:
            kept, self._kept = self._kept, None
            kept.stack.close()

    @contextmanager
    def open_decoder(
        self, locator: SoundLocator, end_seconds: float
    ) -> Iterator[tuple[AudioContainer, AudioDecoder]]:
        """Open the decoder of a sound, or the one that is open; errors are those of `decoders.open_decoder`.

        After an error the sound is closed, and so is one that ends with the clip, at `end_seconds`.
        """
        kept, self._kept = self._kept, None
        with ExitStack() as stack:
            if kept is not None:
                stack.push(kept.stack)
            if kept is None or kept.locator != locator:
                stack.close()
                sound = stack.enter_context(locator.open_sound())
                container = recognise_container(sound)
                decoder = stack.enter_context(open_decoder(sound, container))
            else:
                container, decoder = kept.container, kept.decoder

            # Where a decoder can seek, each clip opens its own: what a clip holds never depends on those before it.
            must_continue = (
                isinstance(decoder, FfmpegDecoder)
                and not decoder.container.is_seekable
                and decoder.seconds > end_seconds + MAX_PADDING_SECONDS
            )
            if isinstance(decoder, FfmpegDecoder):
                decoder.reader.keeps_frames = must_continue
            yield container, decoder
            if must_continue:
                self._kept = KeptDecoder(locator, container, decoder, stack.pop_all())


class OpenSounds:
    """An `OpenSound` for each thread that decodes clips in their order; all are closed once the threads are done."""

    def __init__(self) -> None:
        self._of_thread = threading.local()
        self._opened: list[OpenSound] = []

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        for open_sound in self._opened:
            open_sound.close()

    def sound_of_thread(self) -> OpenSound:
        """The one of the thread that asks."""
        if not hasattr(self._of_thread, "open_sound"):
            self._of_thread.open_sound = OpenSound()
            self._opened.append(self._of_thread.open_sound)
        return self._of_thread.open_sound
