"""How long sounds are, told from their headers, and clips cut out of long ones."""

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from pipeline.audio import AudioPolicy
from pipeline.containers import recognise
from pipeline.datasets.listed import Listed
from pipeline.decoders import Segment, decode
from pipeline.errors import AudioError, InputError
from pipeline.locators import Locator

Progress = Callable[[int, Iterator[Any]], Iterator[Any]]  # their number, and the stream to wrap

LEAST_SECONDS = 0.1  # of a clip: the build takes no shorter sound
LAST_SHARE = 0.5  # of a clip: the piece that a file ends with is kept from here up
LEAST_HOP = 0.1  # of a clip: with less, every sound would be stored over ten times
OVERLAP_SLACK = 0.01  # of a hop: what is less than this longer than a piece is not longer
PROBE_SECONDS = 0.01
PROBES = 8  # at a time: no gain on files in memory (1 ms a wav, 5 an m4a), much where a network answers late
LONGEST_SECONDS = AudioPolicy().max_seconds


@dataclass(frozen=True, kw_only=True, slots=True)
class Cut:
    """How clips are cut: pieces [k hop, k hop + clip) of a sound; without a hop its first piece only.

    The pieces end with the first that reaches the sound's end. That one is as long as there is sound, and is kept
    if it is at least half a clip long, or the only one.
    """

    clip_seconds: float = 10.0
    hop_seconds: float | None = None

    def __post_init__(self) -> None:
        if not LEAST_SECONDS <= self.clip_seconds <= LONGEST_SECONDS:
            raise InputError(
                f"clip_seconds {self.clip_seconds:g}: expected {LEAST_SECONDS} to {LONGEST_SECONDS:g}"
            )
        if self.hop_seconds is not None and not (
            LEAST_HOP * self.clip_seconds <= self.hop_seconds <= LONGEST_SECONDS
        ):
            raise InputError(
                f"hop_seconds {self.hop_seconds:g}: expected at least {LEAST_HOP:g} of clip_seconds, "
                f"{LEAST_HOP * self.clip_seconds:g}; {self.clip_seconds:g} cuts without overlap"
            )

    def spans(self, begin_seconds: float, stop_seconds: float) -> Iterator[tuple[float, float]]:
        """The pieces of a sound between two of its seconds, to the millisecond; at least one."""
        assert self.hop_seconds is not None
        start_seconds, number = begin_seconds, 0
        while stop_seconds - start_seconds > self.clip_seconds + OVERLAP_SLACK * self.hop_seconds:
            yield start_seconds, round(start_seconds + self.clip_seconds, 3)
            number += 1
            start_seconds = round(begin_seconds + number * self.hop_seconds, 3)
        if number == 0 or stop_seconds - start_seconds >= LAST_SHARE * self.clip_seconds:
            yield start_seconds, round(min(start_seconds + self.clip_seconds, stop_seconds), 3)


def fitted(
    clips: Sequence[Listed], cut: Cut, *, progress: Progress | None = None
) -> tuple[list[Listed], list[str]]:
    """The clips with their ends, cut where a hop says so, and notes on what could not be as listed.

    A piece's id is the clip's with `@` and the millisecond of the sound that it starts at. A sound whose length
    cannot be told, or that ends before the clip starts, stays one clip; the build will say why.
    """
    opened = [clip.path for clip in clips if clip.path and cut.hop_seconds is not None]
    seconds_of = lengths(list(dict.fromkeys(opened)), progress=progress)
    done, behind = list[Listed](), list[Listed]()
    for clip in clips:
        length_seconds = seconds_of.get(clip.path) if clip.path else None
        if length_seconds is not None and clip.start_seconds >= round(length_seconds, 3):
            behind.append(clip)
            length_seconds = None
        done.extend(_pieces(clip, cut, length_seconds))
    return done, _told(behind, "start behind the end of their sound")


def _pieces(clip: Listed, cut: Cut, length_seconds: float | None) -> Iterator[Listed]:
    begin_seconds, end_seconds = clip.start_seconds, clip.end_seconds
    if cut.hop_seconds is None:
        stop_seconds = begin_seconds + cut.clip_seconds if end_seconds is None else end_seconds
        yield replace(clip, end_seconds=round(stop_seconds, 3))
        return
    known = length_seconds is not None and length_seconds <= LONGEST_SECONDS and clip.path is not None
    stop_seconds = length_seconds if known and length_seconds else begin_seconds + cut.clip_seconds
    if end_seconds is not None:
        stop_seconds = min(stop_seconds, end_seconds) if known else end_seconds
    for start_seconds, end_seconds in cut.spans(begin_seconds, stop_seconds):
        clip_id = f"{clip.clip_id}@{round(start_seconds * 1000)}"
        yield replace(clip, clip_id=clip_id, start_seconds=start_seconds, end_seconds=end_seconds)


def _told(clips: Sequence[Listed], what: str) -> list[str]:
    if not clips:
        return []
    return [f"{len(clips)} clips {what}, such as {clips[0].source} from {clips[0].start_seconds:g} s on"]


def lengths(paths: Sequence[str], *, progress: Progress | None = None) -> dict[str, float]:
    """Seconds of each sound that can be opened."""
    pool = ThreadPoolExecutor(PROBES)
    try:
        found = pool.map(probe, paths)
        told = list(progress(len(paths), found) if progress and paths else found)
    finally:
        pool.shutdown(cancel_futures=True)  # Ctrl-C does not wait for the rest
    return {path: length for path, length in zip(paths, told, strict=True) if length is not None}


def probe(path: str) -> float | None:
    """Seconds of a sound as the build will see them; a hundredth of a second is decoded. None: it cannot be used."""
    try:
        with Locator.of(Path(path)).opened() as sound:
            take = decode(sound, recognise(sound), Segment(0.0, PROBE_SECONDS), max_seconds=float("inf"))
    except AudioError:
        return None
    return take.source_seconds or None
