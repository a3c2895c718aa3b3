"""The clips of the demo corpus: all of them planned first, then each rendered on its own.

The demo corpus's few broken and odd inputs: one of each kind, and what a build must make of it.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path, PurePosixPath
from typing import TypeVar

import numpy as np

from pipeline.datasets.demo.audio_files import CONTAINERS
from pipeline.datasets.demo.synthesis import RATE_HZ, Sound, coloured_noise

T = TypeVar("T")

CLIP_SECONDS = 10.0

EVERY = 33  # one clip in 33 is shorter than 10 s, and one in 33 has an id that begins with "-"

BED_DBFS = (-72.0, -50.0)

ALPHABET = np.array(list("ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789-_"))


@dataclass(frozen=True, kw_only=True, slots=True)
class Palette:
    """The sounds a split may draw from, and how many go into one clip (the chance of 1, of 2, ...)."""

    sounds: dict[str, tuple[Sound, ...]]
    chances: tuple[float, ...]


@dataclass(frozen=True, kw_only=True, slots=True)
class Clip:
    """One row of the corpus: where it stands in the lists, what is heard in it, how its file is made.

    `kind` is "clip" or names what is odd or broken; `expected` is "good", "unlisted" or the reason it must fail
    with; `seconds` is how long the file sounds; `number` seeds its samples.
    """

    number: int
    split: str
    clip_id: str
    start_seconds: float
    seconds: float
    file: str  # relative to the corpus
    container: str
    rate_hz: int
    channels: int
    parts: tuple[str, ...]
    labels: tuple[str, ...]
    kind: str = "clip"
    expected: str = "good"

    @property
    def end_seconds(self) -> float:
        return self.start_seconds + self.seconds


def plan_clips(
    rng: np.random.Generator, palette: Palette, *, split: str, numbers: range, taken: set[str]
) -> list[Clip]:
    """The clips with these numbers: classes and containers dealt from decks, so that all occur equally often.

    New ids are added to `taken`, in lower case: no two differ in case alone, which some file systems merge.
    """
    by_class: dict[str, list[Sound]] = {}
    for sound in palette.sounds[split]:
        by_class.setdefault(sound.mids[0], []).append(sound)
    classes = deal(rng, sorted(by_class), len(numbers))
    containers = deal(rng, [each for each in CONTAINERS.values() for _ in range(each.share)], len(numbers))
    clips = []
    for number, mid, container in zip(numbers, classes, containers, strict=True):
        sounds = choose_sounds(rng, palette, mid=mid, split=split)
        clip_id = new_id(rng, taken, dash=number % EVERY == 0)
        clips.append(
            Clip(
                number=number,
                split=split,
                clip_id=clip_id,
                start_seconds=float(rng.integers(1, 60) * 10 if rng.random() < 0.7 else rng.integers(1, 600)),
                seconds=round(rng.uniform(5.0, 9.8), 1) if number % EVERY == EVERY // 2 else CLIP_SECONDS,
                file=f"audio/{split}/{clip_id}.{container.extension}",
                container=container.name,
                rate_hz=int(rng.choice(container.rates_hz)),
                channels=2 if rng.random() < 0.4 else 1,
                parts=tuple(sound.name for sound in sounds),
                labels=tuple(dict.fromkeys(mid for sound in sounds for mid in sound.mids)),
            )
        )
    return clips


def choose_sounds(rng: np.random.Generator, palette: Palette, *, mid: str, split: str) -> list[Sound]:
    """One sound of the class dealt, then perhaps others, all different; one that stands alone stays alone."""
    sounds = palette.sounds[split]
    own = [sound for sound in sounds if sound.mids[0] == mid]
    first = own[rng.integers(len(own))]
    others = [sound for sound in sounds if not sound.alone and sound.mids[0] != mid]
    more = 0 if first.alone else int(rng.choice(len(palette.chances), p=palette.chances))
    return [first, *(others[at] for at in rng.choice(len(others), more, replace=False))]


def deal(rng: np.random.Generator, cards: Sequence[T], count: int) -> Iterator[T]:
    """`count` cards from a deck that is shuffled anew whenever it is used up."""
    order = [at for _ in range(-(-count // len(cards))) for at in rng.permutation(len(cards))]
    return (cards[at] for at in order[:count])


def new_id(rng: np.random.Generator, taken: set[str], *, dash: bool) -> str:
    """A YouTube-like id of 11 characters that is not taken yet."""
    while True:
        clip_id = "".join(rng.choice(ALPHABET, 11))
        clip_id = f"-{clip_id[1:]}" if dash else clip_id
        if clip_id.lower() not in taken:
            taken.add(clip_id.lower())
            return clip_id


def render(clip: Clip, sounds: Sequence[Sound], *, seed: int) -> np.ndarray:
    """The clip as float32 `wave_SN` (sample, channel) at 48 kHz; what stands out beyond 1 is the writer's to mend.

    Each sound gets its own level, onset, length and place between the channels; under it lies a bed of faint noise.
    The samples depend on `seed` and the clip's number only.
    """
    rng = np.random.default_rng([seed, clip.number])
    wave_SN = np.zeros((round(clip.seconds * RATE_HZ), clip.channels), dtype=np.float32)
    if not any(sound.alone for sound in sounds):
        bed_S = coloured_noise(rng, len(wave_SN), db_per_octave=rng.uniform(-6.0, 0.0))
        wave_SN[:, 0] = bed_S * amplitude(rng.uniform(*BED_DBFS))
        wave_SN[:, -1] = np.roll(wave_SN[:, 0], len(bed_S) // 2)  # unlike the other side, at half the cost
    for sound in sounds:
        place(rng, wave_SN, sound)
    return wave_SN


def place(rng: np.random.Generator, wave_SN: np.ndarray, sound: Sound) -> None:
    """Add one sound in place: all along the clip, or for 2 s at least from a random onset on."""
    samples = len(wave_SN)
    if not sound.alone and rng.random() < 0.65:
        samples = int(rng.integers(2 * RATE_HZ, samples))
    onset = rng.integers(len(wave_SN) - samples + 1)
    event_S = fade(level(sound.make(rng, samples), rng.uniform(*sound.level_dbfs)), rng.uniform(0.005, 0.05))
    for channel_S in wave_SN.T:
        channel_S[onset : onset + samples] += np.float32(rng.uniform(0.5, 1.0)) * event_S


def level(wave_S: np.ndarray, loudest_dbfs: float) -> np.ndarray:
    """The wave scaled so that the loudest of its tenths of a second has this RMS."""
    tenth = RATE_HZ // 10
    tenths_NS = wave_S[: len(wave_S) // tenth * tenth].reshape(-1, tenth)
    loudest = np.sqrt(np.square(tenths_NS).mean(axis=1).max())
    return wave_S * np.float32(amplitude(loudest_dbfs) / loudest)


def fade(wave_S: np.ndarray, seconds: float) -> np.ndarray:
    """The wave with both ends faded over this time."""
    ramp_N = np.linspace(0.0, 1.0, max(2, round(seconds * RATE_HZ)), dtype=np.float32)
    wave_S[: len(ramp_N)] *= ramp_N
    wave_S[-len(ramp_N) :] *= ramp_N[::-1]
    return wave_S


def amplitude(dbfs: float) -> np.float32:
    """The RMS that a level means: 0 dBFS is 1."""
    return np.float32(10 ** (dbfs / 20))


UNKNOWN_MID = "/m/0unknown"

HTML = "<!DOCTYPE html>\n<html><body><h1>429 Too Many Requests</h1></body></html>\n"


@dataclass(frozen=True, kw_only=True, slots=True)
class Kind:
    """What is wrong, how it must come out (good, unlisted, or a reason to fail), and in which container it is."""

    name: str
    expected: str
    what: str
    container: str = ""
    extension: str = ""  # where it is not the container's own


SHORTENED = "a wav whose header declares 2.5 times what is there"

WEB_PAGE = "the web page that a refused download leaves, named .m4a"

TWICE = "an id for the second time in one list, with other labels: the first row counts"

BOTH = "an id of the eval list in the train list too: the eval row counts"

# Beside the good clips: these rows and files come on top of the number asked for.
EXTRA_FILES = (
    Kind(name="empty_file", expected="unreadable", what="a file of 0 bytes", container="wav-16"),
    Kind(name="truncated_wav", expected="truncated", what=SHORTENED, container="wav-16"),
    Kind(name="html_as_m4a", expected="unreadable", what=WEB_PAGE, container="m4a"),
    Kind(name="missing_file", expected="missing", what="a row without a file", container="flac"),
    Kind(name="digital_silence", expected="silent", what="ten seconds of zeros", container="flac"),
    Kind(name="nan_float", expected="non_finite", what="a float wav with NaN in it", container="wav-float"),
    Kind(name="unlisted_file", expected="unlisted", what="a file that no list names", container="flac"),
)

EXTRA_ROWS = (
    Kind(name="duplicate_id", expected="duplicate", what=TWICE),
    Kind(name="in_both_lists", expected="duplicate", what=BOTH),
)

# Among the good clips: usable, only odd.
ODD_CLIPS = (
    Kind(
        name="wrong_extension", expected="good", what="a flac named .wav", container="flac", extension="wav"
    ),
    Kind(name="unknown_label", expected="good", what=f"a label outside the class list, {UNKNOWN_MID}"),
)


def with_kind(clip: Clip, kind: Kind) -> Clip:
    """The clip as one of this kind: in another container and under another name where the kind asks for it."""
    clip = replace(clip, kind=kind.name, expected=kind.expected)
    if not kind.container:
        return clip
    extension = kind.extension or CONTAINERS[kind.container].extension
    file = str(PurePosixPath(clip.file).with_suffix(f".{extension}"))
    return replace(clip, container=kind.container, file=file)


def extra_rows(trains: Sequence[Clip], evals: Sequence[Clip]) -> list[Clip]:
    """The rows of the train list that name a clip which stands elsewhere already, in the order of EXTRA_ROWS."""
    twice = replace(trains[0], labels=trains[3].labels)
    both = replace(evals[0], split=trains[0].split)
    return [with_kind(clip, kind) for clip, kind in zip((twice, both), EXTRA_ROWS, strict=True)]


def odd_clips(trains: Sequence[Clip]) -> list[Clip]:
    """The clips, the second and third of them made odd as ODD_CLIPS says."""
    wrong, unknown = (with_kind(clip, kind) for clip, kind in zip(trains[1:3], ODD_CLIPS, strict=True))
    return [trains[0], wrong, replace(unknown, labels=(*unknown.labels, UNKNOWN_MID)), *trains[3:]]


def spoil_wave(wave_SN: np.ndarray, kind: str) -> np.ndarray:
    """The samples as a clip of this kind has them."""
    if kind == "digital_silence":
        return np.zeros_like(wave_SN)
    return wave_SN


def spoil_file(path: Path, kind: str) -> None:
    """Make a good file into one of this kind."""
    match kind:
        case "empty_file":
            path.write_bytes(b"")
        case "truncated_wav":
            path.write_bytes(path.read_bytes()[: path.stat().st_size * 2 // 5])
        case "html_as_m4a":
            path.write_text(HTML, encoding="utf-8")
        case "missing_file":
            path.unlink()
        case "nan_float":
            content = bytearray(path.read_bytes())
            content[-40_000:-36_000] = np.full(1_000, np.nan, dtype="<f4").tobytes()
            path.write_bytes(content)
