"""The clips of the demo corpus: all of them planned first, then each rendered on its own; a few are odd or broken.

`ClipKind` lists the odd and the broken ones, one of each kind, with what a build must make of them.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path, PurePosixPath
from typing import TypeVar

import numpy as np

from pipeline.datasets.demo.audio_files import CONTAINERS_BY_NAME, DemoContainer
from pipeline.datasets.demo.synthesis import SYNTHESIS_RATE_HZ, DemoSound, coloured_noise

T = TypeVar("T")

DEMO_CLIP_SECONDS = 10.0

CLIPS_PER_VARIANT = 33  # one clip in 33 is shorter than 10 s, and one in 33 has an id that begins with "-"

NOISE_BED_DBFS = (-72.0, -50.0)

MIN_EVENT_SECONDS = 2

CLIP_ID_ALPHABET = np.array(list("ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789-_"))

UNKNOWN_CLASS_MID = "/m/0unknown"

ERROR_PAGE_HTML = "<!DOCTYPE html>\n<html><body><h1>429 Too Many Requests</h1></body></html>\n"


@dataclass(frozen=True, kw_only=True, slots=True)
class SplitSounds:
    """The sounds that each split may draw from, and how many a clip gets beside its first."""

    sounds_by_split: dict[str, tuple[DemoSound, ...]]
    extra_sound_chances: tuple[float, ...]  # the chance of no other sound, of one, of two, ...


@dataclass(frozen=True, kw_only=True, slots=True)
class DemoClip:
    """One row of the corpus: its place in the lists, the sounds in it, how its file is made."""

    number: int  # seeds the samples
    split: str
    clip_id: str
    start_seconds: float
    seconds: float  # of sound in the file
    file: str  # relative to the corpus
    container: str
    rate_hz: int
    channels: int
    parts: tuple[str, ...]  # names of sounds
    labels: tuple[str, ...]
    kind: str = "clip"  # or the name of a `ClipKind`
    expected: str = "good"  # or "unlisted", or the reason for which the build must refuse the clip

    @property
    def end_seconds(self) -> float:
        return self.start_seconds + self.seconds


def plan_demo_clips(
    rng: np.random.Generator, split_sounds: SplitSounds, *, split: str, numbers: range, used_ids: set[str]
) -> list[DemoClip]:
    """The clips with these numbers: classes and containers dealt from decks, so that all occur equally often.

    New ids are added to `used_ids`, in lower case: no two differ in case alone, which some file systems merge.
    """
    # A deck of classes, and one of twenty containers.
    mids = sorted({sound.mids[0] for sound in split_sounds.sounds_by_split[split]})
    mid_of_clips = draw_evenly(rng, mids, len(numbers))
    deck = [container for container in CONTAINERS_BY_NAME.values() for _ in range(container.files_in_twenty)]
    container_of_clips = draw_evenly(rng, deck, len(numbers))
    return [
        plan_demo_clip(
            rng, split_sounds, split=split, number=number, mid=mid, container=container, used_ids=used_ids
        )
        for number, mid, container in zip(numbers, mid_of_clips, container_of_clips, strict=True)
    ]


def plan_demo_clip(
    rng: np.random.Generator,
    split_sounds: SplitSounds,
    *,
    split: str,
    number: int,
    mid: str,
    container: DemoContainer,
    used_ids: set[str],
) -> DemoClip:
    """A clip of this class in this container; the rest is drawn. The order of the draws decides every corpus."""
    # The sounds, and the id that the lists know the clip by.
    sounds = choose_clip_sounds(rng, split_sounds, mid=mid, split=split)
    clip_id = draw_clip_id(rng, used_ids, starts_with_dash=number % CLIPS_PER_VARIANT == 0)

    # Most segments of AudioSet start at a multiple of ten seconds, few are shorter than ten.
    starts_at_multiple = rng.random() < 0.7
    start_seconds = rng.integers(1, 60) * 10 if starts_at_multiple else rng.integers(1, 600)
    seconds = DEMO_CLIP_SECONDS
    if number % CLIPS_PER_VARIANT == CLIPS_PER_VARIANT // 2:
        seconds = round(rng.uniform(5.0, 9.8), 1)

    return DemoClip(
        number=number,
        split=split,
        clip_id=clip_id,
        start_seconds=float(start_seconds),
        seconds=seconds,
        file=f"audio/{split}/{clip_id}.{container.extension}",
        container=container.name,
        rate_hz=int(rng.choice(container.rates_hz)),
        channels=2 if rng.random() < 0.4 else 1,
        parts=tuple(sound.name for sound in sounds),
        labels=tuple(dict.fromkeys(mid for sound in sounds for mid in sound.mids)),
    )


def choose_clip_sounds(
    rng: np.random.Generator, split_sounds: SplitSounds, *, mid: str, split: str
) -> list[DemoSound]:
    """One sound of the class, then perhaps others of other classes; a sound that must be alone stays alone."""
    sounds = split_sounds.sounds_by_split[split]
    sounds_of_class = [sound for sound in sounds if sound.mids[0] == mid]
    other_sounds = [sound for sound in sounds if not sound.is_alone and sound.mids[0] != mid]
    first = sounds_of_class[rng.integers(len(sounds_of_class))]

    # Others beside it, each at most once.
    extra_count = 0
    if not first.is_alone:
        chances = split_sounds.extra_sound_chances
        extra_count = int(rng.choice(len(chances), p=chances))
    extra_indices = rng.choice(len(other_sounds), extra_count, replace=False)
    return [first, *(other_sounds[index] for index in extra_indices)]


def draw_evenly(rng: np.random.Generator, choices: Sequence[T], count: int) -> Iterator[T]:
    """`count` cards from a deck that is shuffled anew whenever it is used up."""
    decks = -(-count // len(choices))
    order = [index for _ in range(decks) for index in rng.permutation(len(choices))]
    return (choices[index] for index in order[:count])


def draw_clip_id(rng: np.random.Generator, used_ids: set[str], *, starts_with_dash: bool) -> str:
    """Draw an id of 11 characters, as YouTube's, that is not among `used_ids`, and add it there."""
    while True:
        clip_id = "".join(rng.choice(CLIP_ID_ALPHABET, 11))
        if starts_with_dash:
            clip_id = f"-{clip_id[1:]}"
        if clip_id.lower() not in used_ids:
            used_ids.add(clip_id.lower())
            return clip_id


def render_clip(clip: DemoClip, sounds: Sequence[DemoSound], *, seed: int) -> np.ndarray:
    """The clip as float32 `wave_SN` (sample, channel) at 48 kHz; may exceed 1, which whoever writes it corrects.

    Each sound gets its own level, onset, length and place between the channels; under it lies a bed of faint noise.
    The samples depend on `seed` and the clip's number only.
    """
    rng = np.random.default_rng([seed, clip.number])
    wave_SN = np.zeros((round(clip.seconds * SYNTHESIS_RATE_HZ), clip.channels), dtype=np.float32)

    # The bed; its second channel is the first, shifted: unlike it, at half the cost of another noise.
    if not any(sound.is_alone for sound in sounds):
        bed_S = coloured_noise(rng, len(wave_SN), db_per_octave=rng.uniform(-6.0, 0.0))
        wave_SN[:, 0] = bed_S * rms_of_dbfs(rng.uniform(*NOISE_BED_DBFS))
        wave_SN[:, -1] = np.roll(wave_SN[:, 0], len(bed_S) // 2)

    # The sounds, one after another: each takes its draws from the same generator.
    for sound in sounds:
        mix_in_sound(rng, wave_SN, sound)
    return wave_SN


def mix_in_sound(rng: np.random.Generator, wave_SN: np.ndarray, sound: DemoSound) -> None:
    """Add one sound in place: all along the clip, or for 2 s at least from a random onset on."""
    # Its length and onset.
    samples = len(wave_SN)
    if not sound.is_alone and rng.random() < 0.65:
        samples = int(rng.integers(MIN_EVENT_SECONDS * SYNTHESIS_RATE_HZ, samples))
    onset = rng.integers(len(wave_SN) - samples + 1)

    # Its wave at a random level, with soft ends, louder in one channel than in the other.
    event_S = sound.make_wave(rng, samples)
    event_S = scale_to_level(event_S, rng.uniform(*sound.level_dbfs))
    event_S = fade_both_ends(event_S, rng.uniform(0.005, 0.05))
    for channel_S in wave_SN.T:
        channel_S[onset : onset + samples] += np.float32(rng.uniform(0.5, 1.0)) * event_S


def scale_to_level(wave_S: np.ndarray, loudest_dbfs: float) -> np.ndarray:
    """The wave scaled so that the loudest of its tenths of a second has this RMS."""
    tenth_samples = SYNTHESIS_RATE_HZ // 10
    tenths_NS = wave_S[: len(wave_S) // tenth_samples * tenth_samples].reshape(-1, tenth_samples)
    loudest_rms = np.sqrt(np.square(tenths_NS).mean(axis=1).max())
    return wave_S * np.float32(rms_of_dbfs(loudest_dbfs) / loudest_rms)


def fade_both_ends(wave_S: np.ndarray, seconds: float) -> np.ndarray:
    """The wave, changed in place, with both ends faded over this time."""
    ramp_N = np.linspace(0.0, 1.0, max(2, round(seconds * SYNTHESIS_RATE_HZ)), dtype=np.float32)
    wave_S[: len(ramp_N)] *= ramp_N
    wave_S[-len(ramp_N) :] *= ramp_N[::-1]
    return wave_S


def rms_of_dbfs(dbfs: float) -> np.float32:
    """The RMS of a level: that of 0 dBFS is 1."""
    return np.float32(10 ** (dbfs / 20))


@dataclass(frozen=True, kw_only=True, slots=True)
class ClipKind:
    """One kind of odd or broken clip."""

    name: str
    expected: str  # as of `DemoClip`
    description: str  # of the fault, for the README of the corpus
    container: str = ""  # empty: any
    extension: str = ""  # of the file, where it is not the container's own


# Beside the good clips: these rows and files come on top of the number asked for.
BROKEN_FILE_KINDS = (
    ClipKind(name="empty_file", expected="unreadable", description="a file of 0 bytes", container="wav-16"),
    ClipKind(
        name="truncated_wav",
        expected="truncated",
        description="a wav whose header declares 2.5 times what is there",
        container="wav-16",
    ),
    ClipKind(
        name="html_as_m4a",
        expected="unreadable",
        description="the web page that a refused download leaves, named .m4a",
        container="m4a",
    ),
    ClipKind(name="missing_file", expected="missing", description="a row without a file", container="flac"),
    ClipKind(name="digital_silence", expected="silent", description="ten seconds of zeros", container="flac"),
    ClipKind(
        name="nan_float",
        expected="non_finite",
        description="a float wav with NaN in it",
        container="wav-float",
    ),
    ClipKind(
        name="unlisted_file", expected="unlisted", description="a file that no list names", container="flac"
    ),
)

# On top as well, but without a file of their own.
REPEATED_ROW_KINDS = (
    ClipKind(
        name="duplicate_id",
        expected="duplicate",
        description="an id for the second time in one list, with other labels: the first row counts",
    ),
    ClipKind(
        name="in_both_lists",
        expected="duplicate",
        description="an id of the eval list in the train list too: the eval row counts",
    ),
)

# Among the good clips: usable, only odd.
ODD_CLIP_KINDS = (
    ClipKind(
        name="wrong_extension",
        expected="good",
        description="a flac named .wav",
        container="flac",
        extension="wav",
    ),
    ClipKind(
        name="unknown_label",
        expected="good",
        description=f"a label outside the class list, {UNKNOWN_CLASS_MID}",
    ),
)


def with_clip_kind(clip: DemoClip, kind: ClipKind) -> DemoClip:
    """The clip as one of this kind: in another container and under another name where the kind asks for it."""
    clip = replace(clip, kind=kind.name, expected=kind.expected)
    if not kind.container:
        return clip
    extension = kind.extension or CONTAINERS_BY_NAME[kind.container].extension
    file = str(PurePosixPath(clip.file).with_suffix(f".{extension}"))
    return replace(clip, container=kind.container, file=file)


def make_odd_clips(train_clips: Sequence[DemoClip]) -> list[DemoClip]:
    """The clips, the second and third of them of the kinds of ODD_CLIP_KINDS."""
    wrong_extension, unknown_label = (
        with_clip_kind(clip, kind) for clip, kind in zip(train_clips[1:3], ODD_CLIP_KINDS, strict=True)
    )
    unknown_label = replace(unknown_label, labels=(*unknown_label.labels, UNKNOWN_CLASS_MID))
    return [train_clips[0], wrong_extension, unknown_label, *train_clips[3:]]


def make_repeated_rows(train_clips: Sequence[DemoClip], eval_clips: Sequence[DemoClip]) -> list[DemoClip]:
    """Rows of the train list whose ids stand in a list already, in the order of REPEATED_ROW_KINDS."""
    duplicate_id = replace(train_clips[0], labels=train_clips[3].labels)
    in_both_lists = replace(eval_clips[0], split=train_clips[0].split)
    return [
        with_clip_kind(clip, kind)
        for clip, kind in zip((duplicate_id, in_both_lists), REPEATED_ROW_KINDS, strict=True)
    ]


def damage_wave(wave_SN: np.ndarray, kind: str) -> np.ndarray:
    """The samples as a clip of this kind has them."""
    if kind == "digital_silence":
        return np.zeros_like(wave_SN)
    return wave_SN


def damage_file(path: Path, kind: str) -> None:
    """Turn a good file into one of this kind."""
    match kind:
        case "empty_file":
            path.write_bytes(b"")
        case "truncated_wav":
            # The header goes on declaring the whole.
            path.write_bytes(path.read_bytes()[: path.stat().st_size * 2 // 5])
        case "html_as_m4a":
            path.write_text(ERROR_PAGE_HTML, encoding="utf-8")
        case "missing_file":
            path.unlink()
        case "nan_float":
            # A thousand samples near the end.
            content = bytearray(path.read_bytes())
            content[-40_000:-36_000] = np.full(1_000, np.nan, dtype="<f4").tobytes()
            path.write_bytes(content)
